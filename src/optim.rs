//! From summed gradients to new parameters: clipping, AdamW, the learning rate's schedule.

use tch::{Kind, Tensor};

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

    /// First and second moments, to be saved.
    pub fn moments(&self) -> (&Tensor, &Tensor) {
        (&self.m, &self.v)
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

/// Learning rate of step `step` (from 0) of `n_steps`: falls to zero in a straight line.
pub fn linear_decay(initial: f64, step: usize, n_steps: usize) -> f64 {
    initial * (n_steps - step) as f64 / n_steps as f64
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
    fn learning_rate_ends_one_step_above_zero() {
        assert_eq!(linear_decay(1.0, 0, 4), 1.0);
        assert_eq!(linear_decay(1.0, 3, 4), 0.25);
    }
}
