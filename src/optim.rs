//! From summed gradients to new parameters: clipping, AdamW, Adagrad for tables, the learning rate's schedule.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// `train.tables`: how the tables learn, of which a step touches few rows. Everything else is left to AdamW.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TableOptimizer {
    /// As everything else does.
    #[default]
    Adamw,
    /// Adagrad (Duchi et al. 2011), whose steps shrink with what a row has already learnt.
    Adagrad {
        /// Learning rate that each day starts with; it follows the same schedule.
        learning_rate: f64,
    },
}

/// `train.schedule`: the learning rate over a day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// It falls to zero in a straight line.
    #[default]
    Linear,
    /// It stays.
    Constant,
}

impl Schedule {
    /// Share of the learning rate at step `step` (from 0) of `n_steps`.
    pub fn share(self, step: usize, n_steps: usize) -> f64 {
        match self {
            Schedule::Linear => (n_steps - step) as f64 / n_steps as f64,
            Schedule::Constant => 1.0,
        }
    }
}

/// AdamW for all parameters, or for those behind the tables, which then learn by Adagrad.
pub struct Optimizer {
    adamw: AdamW,
    learning_rate: f64,
    /// Where AdamW's parameters begin.
    first: i64,
    adagrad: Option<(Adagrad, f64)>,
}

impl Optimizer {
    /// For parameters like `values: [n]`, those in `tables` (which lie first) being tables.
    pub fn new(
        values: &Tensor,
        tables: Range<i64>,
        optimizer: TableOptimizer,
        (learning_rate, weight_decay): (f64, f64),
    ) -> Self {
        let (first, adagrad) = match optimizer {
            TableOptimizer::Adamw => (0, None),
            TableOptimizer::Adagrad { learning_rate } => {
                let adagrad = Adagrad::new(&values.narrow(0, 0, tables.end));
                (tables.end, Some((adagrad, learning_rate)))
            }
        };
        let adamw = AdamW::new(&values.narrow(0, first, values.size()[0] - first), weight_decay);
        Self { adamw, learning_rate, first, adagrad }
    }

    /// Changes `values: [n]` by one step against `gradients: [n]`, at this share of the learning rates.
    pub fn step(&mut self, values: &Tensor, gradients: &Tensor, share: f64) {
        let rest = |flat: &Tensor| flat.narrow(0, self.first, flat.size()[0] - self.first);
        self.adamw.step(&mut rest(values), &rest(gradients), share * self.learning_rate);
        if let Some((adagrad, learning_rate)) = &mut self.adagrad {
            let tables = |flat: &Tensor| flat.narrow(0, 0, self.first);
            adagrad.step(&mut tables(values), &tables(gradients), share * *learning_rate);
        }
    }

    /// Steps taken since the state was zero.
    pub fn n_steps(&self) -> i32 {
        self.adamw.n_steps()
    }

    /// What is to be saved: a name, where in the flat buffers it begins, and the numbers.
    pub fn state(&self) -> Vec<(&'static str, i64, &Tensor)> {
        let mut state = vec![("m", self.first, &self.adamw.m), ("v", self.first, &self.adamw.v)];
        state.extend(self.adagrad.as_ref().map(|(adagrad, _)| ("sum", 0, &adagrad.sum)));
        state
    }
}

/// Adagrad over one flat buffer (Duchi et al. 2011), as PyTorch computes it: `s ← s + g²`, `p ← p − lr g / (√s + ε)`.
pub struct Adagrad {
    /// Sums of squared gradients `[n]`.
    sum: Tensor,
}

impl Adagrad {
    /// Zero sums for parameters like `values: [n]`.
    pub fn new(values: &Tensor) -> Self {
        Self { sum: Tensor::zeros_like(values) }
    }

    /// Changes `values: [n]` by one step against `gradients: [n]`.
    pub fn step(&mut self, values: &mut Tensor, gradients: &Tensor, learning_rate: f64) {
        tch::no_grad(|| {
            let _ = self.sum.addcmul_(gradients, gradients);
            let denominator = self.sum.sqrt().g_add_scalar_(1e-10);
            let _ = values.addcdiv_(&(gradients * -learning_rate), &denominator);
        });
    }
}

/// AdamW over one flat buffer, as Hugging Face's `AdamW` computes it (Loshchilov & Hutter 2019):
/// `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`, `p ← p − lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)`,
/// with ε added to the root of the uncorrected `v`, unlike `torch.optim.AdamW`. Weight decay is decoupled.
pub struct AdamW {
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    /// First moments `[n]`.
    m: Tensor,
    /// Second moments `[n]`.
    v: Tensor,
    n_steps: i32,
}

impl AdamW {
    /// Zero moments for parameters like `values: [n]`.
    pub fn new(values: &Tensor, weight_decay: f64) -> Self {
        let zeros = || Tensor::zeros_like(values);
        Self { betas: (0.9, 0.999), epsilon: 1e-8, weight_decay, m: zeros(), v: zeros(), n_steps: 0 }
    }

    /// Steps taken since the moments were zero.
    pub fn n_steps(&self) -> i32 {
        self.n_steps
    }

    /// Changes `values: [n]` by one step against `gradients: [n]`.
    pub fn step(&mut self, values: &mut Tensor, gradients: &Tensor, learning_rate: f64) {
        self.n_steps += 1;
        let (b1, b2) = self.betas;
        let corrected = learning_rate * (1.0 - b2.powi(self.n_steps)).sqrt() / (1.0 - b1.powi(self.n_steps));
        tch::no_grad(|| {
            let _ = self.m.lerp_(gradients, 1.0 - b1);
            let _ = self.v.g_mul_scalar_(b2).addcmul_(&(gradients * (1.0 - b2)), gradients);
            let denominator = self.v.sqrt().g_add_scalar_(self.epsilon);
            let _ = values.addcdiv_(&(&self.m * -corrected), &denominator);
            if self.weight_decay > 0.0 {
                let _ = values.g_mul_scalar_(1.0 - learning_rate * self.weight_decay);
            }
        });
    }
}

/// Turns summed gradients `[n]` into those of the mean over `n_targets: []`, at most `max_norm` long in all (the
/// coefficient of `torch.nn.utils.clip_grad_norm_`). Nothing waits for the device. Returns the norm before.
pub fn average_and_clip(gradients: &mut Tensor, n_targets: &Tensor, max_norm: f64) -> Tensor {
    let norm = gradients.norm_scalaropt_dtype(2.0, Kind::Float) / n_targets;
    let clip = ((&norm + 1e-6).reciprocal() * max_norm).clamp_max(1.0);
    let _ = gradients.g_mul_(&(clip / n_targets));
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_step_is_as_long_as_the_learning_rate() {
        let mut values = Tensor::from_slice(&[1f32, -2.0]);
        let mut adamw = AdamW::new(&values, 0.0);
        adamw.step(&mut values, &Tensor::from_slice(&[0.5f32, -3.0]), 0.1);
        let moved: Vec<f32> = Vec::try_from(values).unwrap();
        assert!((moved[0] - 0.9).abs() < 1e-5 && (moved[1] + 1.9).abs() < 1e-5, "{moved:?}");
    }

    #[test]
    fn steps_follow_the_formula() {
        let (b1, b2, epsilon, lr, decay) = (0.9f64, 0.999f64, 1e-8, 0.01, 0.1);
        let mut values = Tensor::from_slice(&[0.3f32, -0.7, 1e-4]);
        let mut adamw = AdamW::new(&values, decay);
        let (mut p, mut m, mut v) = ([0.3f64, -0.7, 1e-4], [0.0; 3], [0.0; 3]);
        for t in 1..=6 {
            let g: Vec<f64> = (0..3).map(|i| (f64::from(t) * 0.7 + f64::from(i)).sin() * 1e-3).collect();
            let gradients = Tensor::from_slice(&g).to_kind(Kind::Float);
            adamw.step(&mut values, &gradients, lr);
            for i in 0..3 {
                m[i] = b1 * m[i] + (1.0 - b1) * g[i];
                v[i] = b2 * v[i] + (1.0 - b2) * g[i] * g[i];
                let rate = lr * (1.0 - b2.powi(t)).sqrt() / (1.0 - b1.powi(t));
                p[i] -= rate * m[i] / (v[i].sqrt() + epsilon);
                p[i] -= lr * decay * p[i];
            }
        }
        let values: Vec<f32> = Vec::try_from(values).unwrap();
        for (ours, expected) in values.iter().zip(p) {
            assert!((f64::from(*ours) - expected).abs() < 1e-6, "{ours} {expected}");
        }
    }

    #[test]
    fn clipping_acts_on_the_mean_and_only_above_the_norm() {
        let n = Tensor::from(2f32);
        let mut long = Tensor::from_slice(&[6f32, 8.0]);
        let norm = average_and_clip(&mut long, &n, 1.0);
        assert!((norm.double_value(&[]) - 5.0).abs() < 1e-6);
        assert!((long.norm().double_value(&[]) - 1.0).abs() < 1e-5);
        let mut short = Tensor::from_slice(&[0.6f32, 0.8]);
        let _ = average_and_clip(&mut short, &n, 1.0);
        assert!((short.norm().double_value(&[]) - 0.5).abs() < 1e-6);
    }

    #[test]
    fn adagrad_steps_shrink() {
        let mut values = Tensor::from_slice(&[1f32, 1.0]);
        let mut adagrad = Adagrad::new(&values);
        for _ in 0..2 {
            adagrad.step(&mut values, &Tensor::from_slice(&[0.5f32, 0.0]), 0.1);
        }
        // 0.5 / √0.25, then 0.5 / √0.5; what has no gradient stays.
        let moved: Vec<f32> = Vec::try_from(values).unwrap();
        assert!((moved[0] - (1.0 - 0.1 - 0.1 * 0.5f32.sqrt())).abs() < 1e-6, "{moved:?}");
        assert_eq!(moved[1], 1.0);
    }

    #[test]
    fn tables_and_the_rest_learn_by_their_own_rules() {
        let values = Tensor::from_slice(&[1f32, 1.0, 1.0]);
        let adagrad = TableOptimizer::Adagrad { learning_rate: 0.5 };
        let mut optimizer = Optimizer::new(&values, 0..2, adagrad, (0.1, 0.0));
        optimizer.step(&values, &Tensor::from_slice(&[0.3f32, 0.0, 0.2]), 0.5);
        let moved: Vec<f32> = Vec::try_from(values).unwrap();
        assert!(
            (moved[0] - 0.75).abs() < 1e-5 && moved[1] == 1.0 && (moved[2] - 0.95).abs() < 1e-5,
            "{moved:?}"
        );
        let names: Vec<_> =
            optimizer.state().iter().map(|(name, first, t)| (*name, *first, t.numel())).collect();
        assert_eq!(names, [("m", 2, 1), ("v", 2, 1), ("sum", 0, 2)]);
    }

    #[test]
    fn learning_rate_ends_one_step_above_zero() {
        assert_eq!(Schedule::Linear.share(0, 4), 1.0);
        assert_eq!(Schedule::Linear.share(3, 4), 0.25);
        assert_eq!(Schedule::Constant.share(3, 4), 1.0);
    }
}
