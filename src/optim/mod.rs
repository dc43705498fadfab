//! From summed gradients to new parameters: clipping, AdamW, Adagrad for tables, the learning rate's schedule.

mod fused;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::device::host::{in_parallel, numbers, part_len};
use crate::model::View;

/// `train.tables`: how the tables learn, of which a step touches few rows. Everything else is left to AdamW.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TableOptimizer {
    /// As everything else does.
    #[default]
    Adamw,
    /// The same, but a row without a gradient stays as it is, and so do its moments, which AdamW would let decay and move the
    /// row by: other results, at the price of the rows that a step touches (TensorFlow's LazyAdam). Worth it with sampled
    /// losses only, as a softmax over the catalogue touches every row.
    LazyAdamw,
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
    /// Factor of the learning rate at step `step` (from 0) of `n_steps`.
    pub fn factor(self, step: usize, n_steps: usize) -> f64 {
        match self {
            Schedule::Linear => (n_steps - step) as f64 / n_steps as f64,
            Schedule::Constant => 1.0,
        }
    }
}

/// Settings of an [`Optimizer`].
#[derive(Clone, Copy, Debug)]
pub struct OptimizerConfig {
    pub tables: TableOptimizer,
    /// Of AdamW, at the start of each day.
    pub learning_rate: f64,
    pub weight_decay: f64,
}

/// AdamW for all parameters, or Adagrad for the tables and AdamW for the others.
pub struct Optimizer {
    adamw: AdamW,
    learning_rate: f64,
    /// Where AdamW's parameters begin.
    first: i64,
    adagrad: Option<(Adagrad, f64)>,
}

impl Optimizer {
    /// For parameters like `values: [n]`, of which `tables`, side by side from the first on, are tables.
    pub fn new(values: &Tensor, tables: &[View], config: OptimizerConfig) -> Self {
        let OptimizerConfig { tables: optimizer, learning_rate, weight_decay } = config;
        let (first, lazy, adagrad) = match optimizer {
            TableOptimizer::Adamw => (0, &[][..], None),
            TableOptimizer::LazyAdamw => (0, tables, None),
            TableOptimizer::Adagrad { learning_rate } => {
                let adagrad = Adagrad::new(values, tables);
                (adagrad.sum.size()[0], &[][..], Some((adagrad, learning_rate)))
            }
        };
        let adamw = AdamW::new(&values.narrow(0, first, values.size()[0] - first), lazy, weight_decay);
        Self { adamw, learning_rate, first, adagrad }
    }

    /// Changes `values: [n]` by one step against `gradients: [n]` times `scale: []`, at this share of the learning rates.
    /// The gradients are zero afterwards.
    pub fn step(&mut self, values: &Tensor, gradients: &Tensor, scale: &Tensor, share: f64) {
        let rest = |flat: &Tensor| flat.narrow(0, self.first, flat.size()[0] - self.first);
        self.adamw.step(&rest(values), &rest(gradients), scale, share * self.learning_rate);
        if let Some((adagrad, learning_rate)) = &mut self.adagrad {
            adagrad.step(values, gradients, scale, share * *learning_rate);
        }
    }

    /// Steps taken since the state was zero.
    pub fn n_steps(&self) -> i32 {
        self.adamw.n_steps()
    }

    /// Goes on from a state of so many steps.
    pub fn set_n_steps(&mut self, n_steps: i32) {
        self.adamw.n_steps = n_steps;
    }

    /// What is to be saved: a name, where in the flat buffers it begins, and the numbers.
    pub fn state(&self) -> Vec<(&'static str, i64, &Tensor)> {
        let mut state = vec![("m", self.first, &self.adamw.m), ("v", self.first, &self.adamw.v)];
        state.extend(self.adagrad.as_ref().map(|(adagrad, _)| ("sum", 0, &adagrad.sum)));
        state
    }
}

/// Adagrad over tables (Duchi et al. 2011), as PyTorch computes it: `s ← s + g²`, `p ← p − lr g / (√s + ε)`.
///
/// A row without a gradient stays as it is, so only the others are touched: a step reads the gradients once and is
/// otherwise as long as there are rows in it.
pub struct Adagrad {
    tables: Vec<View>,
    /// Sums of squared gradients `[n]`.
    sum: Tensor,
}

impl Adagrad {
    /// Zero sums for `tables`, which lie side by side from the first of `values: [n]` on.
    pub fn new(values: &Tensor, tables: &[View]) -> Self {
        let n = tables.last().map_or(0, View::end);
        Self { tables: tables.to_vec(), sum: values.narrow(0, 0, n).zeros_like() }
    }

    /// Changes the tables in `values: [n]` by one step against `gradients: [n]` times `scale: []`, which are zero
    /// afterwards.
    pub fn step(&mut self, values: &Tensor, gradients: &Tensor, scale: &Tensor, learning_rate: f64) {
        tch::no_grad(|| {
            for table in &self.tables {
                let [mut values, mut gradients, mut sum] =
                    [values, gradients, &self.sum].map(|flat| matrix(table, flat));
                let rows = rows_with_gradient(&gradients);
                let gradient = gradients.index_select(0, &rows) * scale;
                let squares = sum.index_select(0, &rows) + &gradient * &gradient;
                let change = gradient * -learning_rate / (squares.sqrt() + 1e-10);
                let _ = values.index_copy_(0, &rows, &(values.index_select(0, &rows) + change));
                let _ = sum.index_copy_(0, &rows, &squares);
                let _ = gradients.index_fill_(0, &rows, 0.0);
            }
        });
    }
}

/// A table in a flat buffer as `[rows, numbers of a row]`.
fn matrix(table: &View, flat: &Tensor) -> Tensor {
    table.of(flat).view([table.shape[0], -1])
}

/// The rows of `gradients: [rows, D]` that are not zero, i64. On a GPU, asking waits for it.
fn rows_with_gradient(gradients: &Tensor) -> Tensor {
    // A NaN is not zero either, so that nothing hides it.
    gradients.norm_scalaropt_dim(2.0, [1i64].as_slice(), false).nonzero().squeeze_dim(1)
}

/// AdamW over one flat buffer, as Hugging Face's `AdamW` computes it (Loshchilov & Hutter 2019):
/// `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`, `p ← p − lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)`,
/// with ε added to the root of the uncorrected `v`, unlike `torch.optim.AdamW`. Weight decay is decoupled.
pub struct AdamW {
    weight_decay: f64,
    /// Tables at the beginning of which only rows with a gradient are touched.
    lazy: Vec<View>,
    /// First moments `[n]`.
    m: Tensor,
    /// Second moments `[n]`.
    v: Tensor,
    n_steps: i32,
}

const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;

/// How far a step goes.
#[derive(Clone, Copy)]
struct Rates {
    learning_rate: f64,
    /// This one included.
    n_steps: i32,
    /// What is left of a parameter after decay.
    kept: f64,
}

impl Rates {
    /// The learning rate, with what corrects the moments for having begun at zero.
    fn corrected(&self) -> f64 {
        self.learning_rate * self.second_correction() / (1.0 - BETAS.0.powi(self.n_steps))
    }

    /// What the root of the second moment is too small by.
    fn second_correction(&self) -> f64 {
        (1.0 - BETAS.1.powi(self.n_steps)).sqrt()
    }
}

impl AdamW {
    /// Zero moments for parameters like `values: [n]`. `lazy`: see [`TableOptimizer::LazyAdamw`].
    pub fn new(values: &Tensor, lazy: &[View], weight_decay: f64) -> Self {
        let zeros = || Tensor::zeros_like(values);
        Self { weight_decay, lazy: lazy.to_vec(), m: zeros(), v: zeros(), n_steps: 0 }
    }

    /// Steps taken since the moments were zero.
    pub fn n_steps(&self) -> i32 {
        self.n_steps
    }

    /// Changes `values: [n]` by one step against `gradients: [n]` times `scale: []`, which are zero afterwards.
    pub fn step(&mut self, values: &Tensor, gradients: &Tensor, scale: &Tensor, learning_rate: f64) {
        self.n_steps += 1;
        let kept = 1.0 - learning_rate * self.weight_decay;
        let rates = Rates { learning_rate, n_steps: self.n_steps, kept };
        tch::no_grad(|| {
            let mut first = 0;
            for table in &self.lazy {
                let [mut values, mut gradients, mut m, mut v] =
                    [values, gradients, &self.m, &self.v].map(|flat| matrix(table, flat));
                let rows = rows_with_gradient(&gradients);
                let touched = [&values, &gradients, &m, &v].map(|of| of.index_select(0, &rows));
                update(&touched, scale, rates);
                let [of_values, _, of_m, of_v] = touched;
                for (whole, rows_of) in [(&mut values, of_values), (&mut m, of_m), (&mut v, of_v)] {
                    let _ = whole.index_copy_(0, &rows, &rows_of);
                }
                let _ = gradients.index_fill_(0, &rows, 0.0);
                first = table.end();
            }
            let rest = |flat: &Tensor| flat.narrow(0, first, flat.size()[0] - first);
            update(&[values, gradients, &self.m, &self.v].map(rest), scale, rates);
        });
    }
}

/// One step of `[values, gradients, m, v]`, all contiguous and equally large; the gradients are zero afterwards.
fn update(of: &[Tensor; 4], scale: &Tensor, rates: Rates) {
    let [mut values, mut gradients, mut m, mut v] = of.each_ref().map(Tensor::shallow_clone);
    if values.device() != Device::Cpu {
        fused::adamw(of, scale, rates);
        if rates.kept < 1.0 {
            let _ = values.g_mul_scalar_(rates.kept);
        }
        let _ = gradients.zero_();
        return;
    }
    // In one pass: one operation after the other would read and write about three times as much memory.
    let scale = scale.double_value(&[]) as f32;
    let n_each = part_len(values.numel(), BLOCK);
    let [values, gradients, m, v] = [&mut values, &mut gradients, &mut m, &mut v].map(numbers::<f32>);
    let moments = m.chunks_mut(n_each).zip(v.chunks_mut(n_each));
    let parts = values.chunks_mut(n_each).zip(gradients.chunks_mut(n_each)).zip(moments);
    in_parallel(parts, |((values, gradients), (m, v))| update_here(values, gradients, (m, v), scale, rates));
}

/// Numbers that are looked at together: a row of a table, usually.
const BLOCK: usize = 64;

fn update_here(
    values: &mut [f32],
    gradients: &mut [f32],
    (m, v): (&mut [f32], &mut [f32]),
    scale: f32,
    rates: Rates,
) {
    let (b1, b2) = BETAS;
    let (rest_1, b2, rest_2) = ((1.0 - b1) as f32, b2 as f32, (1.0 - b2) as f32);
    let (corrected, kept) = (rates.corrected() as f32, rates.kept as f32);
    let blocks = values.chunks_mut(BLOCK).zip(gradients.chunks_mut(BLOCK));
    let moments = m.chunks_mut(BLOCK).zip(v.chunks_mut(BLOCK));
    for ((values, gradients), (m, v)) in blocks.zip(moments) {
        // Rows that no step has touched yet are many in a large table, and stay as they are.
        let is_zero = |numbers: &[f32]| numbers.iter().all(|&number| number == 0.0);
        if kept == 1.0 && is_zero(gradients) && is_zero(m) && is_zero(v) {
            continue;
        }
        for (((value, gradient), m), v) in values.iter_mut().zip(gradients).zip(m).zip(v) {
            let g = *gradient * scale;
            *m += rest_1 * (g - *m);
            *v = b2 * *v + rest_2 * g * g;
            *value = (*value - corrected * *m / (v.sqrt() + EPSILON as f32)) * kept;
            *gradient = 0.0;
        }
    }
}

/// What summed gradients are to be multiplied by, so that they are those of the mean over `n_targets: []` and at most
/// `max_norm` long in all (the coefficient of `torch.nn.utils.clip_grad_norm_`); and their norm before clipping. They are
/// `gradients: [n]`, and those whose squares add up to `others: []`. Nothing waits for the device.
pub fn average_and_clip(
    gradients: &Tensor,
    others: &Tensor,
    n_targets: &Tensor,
    max_norm: f64,
) -> (Tensor, Tensor) {
    let norm = (squares(gradients) + others).sqrt() / n_targets;
    let clip = ((&norm + 1e-6).reciprocal() * max_norm).clamp_max(1.0);
    (clip / n_targets, norm)
}

/// The sum of squares of `[n]`: `[]`.
pub fn squares(numbers: &Tensor) -> Tensor {
    numbers.norm_scalaropt_dtype(2.0, Kind::Float).square()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Parameters;
    use crate::model::parameters::ParameterBuilder;

    #[test]
    fn first_step_is_as_long_as_the_learning_rate() {
        let values = Tensor::from_slice(&[1f32, -2.0]);
        let mut adamw = AdamW::new(&values, &[], 0.0);
        adamw.step(&values, &Tensor::from_slice(&[0.5f32, -3.0]), &Tensor::from(1f32), 0.1);
        let moved: Vec<f32> = Vec::try_from(values).unwrap();
        assert!((moved[0] - 0.9).abs() < 1e-5 && (moved[1] + 1.9).abs() < 1e-5, "{moved:?}");
    }

    #[test]
    fn steps_follow_the_formula() {
        let (b1, b2, epsilon, lr, decay) = (0.9f64, 0.999f64, 1e-8, 0.01, 0.1);
        let values = Tensor::from_slice(&[0.3f32, -0.7, 1e-4]);
        let mut adamw = AdamW::new(&values, &[], decay);
        let (mut p, mut m, mut v) = ([0.3f64, -0.7, 1e-4], [0.0; 3], [0.0; 3]);
        for t in 1..=6 {
            let g: Vec<f64> = (0..3).map(|i| (f64::from(t) * 0.7 + f64::from(i)).sin() * 1e-3).collect();
            // Clipping is folded in.
            let gradients = Tensor::from_slice(&g).to_kind(Kind::Float) * 4.0;
            adamw.step(&values, &gradients, &Tensor::from(0.25f32), lr);
            assert_eq!(gradients.count_nonzero(None).int64_value(&[]), 0);
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
    fn the_fused_step_is_the_same() {
        let random =
            |seed| crate::data::with_seed(seed, || Tensor::randn([1000], (Kind::Float, Device::Cpu)));
        let start = [random(1), Tensor::zeros([1000], (Kind::Float, Device::Cpu))];
        let of = |start: &[Tensor; 2]| [start[0].copy(), start[1].copy(), start[1].copy(), start[1].copy()];
        let (ours, theirs) = (of(&start), of(&start));
        for n_steps in 1..=5 {
            let rates = Rates { learning_rate: 0.01, n_steps, kept: 1.0 };
            let gradients = random(n_steps as u64 + 1) * 1e-3;
            ours[1].shallow_clone().copy_(&gradients);
            theirs[1].shallow_clone().copy_(&gradients);
            let scale = Tensor::from(0.25f32);
            update(&ours, &scale, rates);
            fused::adamw(&theirs, &scale, rates);
            for number in [0, 2, 3] {
                let largest = |x: &Tensor| x.abs().max().double_value(&[]);
                let apart = largest(&(&ours[number] - &theirs[number])) / largest(&ours[number]);
                assert!(apart < 1e-6, "{n_steps} {number}: {apart}");
            }
        }
    }

    #[test]
    fn clipping_acts_on_the_mean_and_only_above_the_norm() {
        let (n, none) = (Tensor::from(2f32), Tensor::from(0f32));
        let long = Tensor::from_slice(&[6f32, 8.0]);
        let (scale, norm) = average_and_clip(&long, &none, &n, 1.0);
        assert!((norm.double_value(&[]) - 5.0).abs() < 1e-6);
        assert!(((long * scale).norm().double_value(&[]) - 1.0).abs() < 1e-5);
        let short = Tensor::from_slice(&[0.6f32, 0.8]);
        let (scale, norm) = average_and_clip(&short, &Tensor::from(3f32), &n, 1.0);
        assert!((norm.double_value(&[]) - 1.0).abs() < 1e-6);
        assert!(((short.copy() * scale).norm().double_value(&[]) - 0.5).abs() < 1e-6);
        let (scale, _) = average_and_clip(&short, &none, &n, 1.0);
        assert!(((short * scale).norm().double_value(&[]) - 0.5).abs() < 1e-6);
    }

    /// A table of two rows, a bias for each, and two further parameters.
    fn parameters() -> (Parameters, Tensor) {
        let mut builder = ParameterBuilder::default();
        for (name, size) in [("table", &[2, 2][..]), ("bias", &[2]), ("rest", &[2])] {
            builder.constant(name, size, 1.0);
        }
        let parameters = Parameters::new(builder, Device::Cpu);
        let values = parameters.values();
        (parameters, values)
    }

    /// Numbers of the three as they lie in the flat buffers.
    fn flat(parameters: &Parameters, numbers: &[f32; 8]) -> Tensor {
        let flat = parameters.values().zeros_like();
        let mut rest = &numbers[..];
        for (_, mut tensor) in parameters.named(&flat) {
            let (mine, after) = rest.split_at(tensor.numel());
            tensor.copy_(&Tensor::from_slice(mine).view_as(&tensor));
            rest = after;
        }
        flat
    }

    /// The numbers of those that are in `flat`, which begins with the first.
    fn numbers(parameters: &Parameters, flat: &Tensor) -> Vec<f32> {
        let of = |(_, tensor): &(String, Tensor)| Vec::<f32>::try_from(tensor.reshape([-1])).unwrap();
        parameters.named(flat).iter().flat_map(of).collect()
    }

    #[test]
    fn adagrad_steps_shrink_and_leave_other_rows_alone() {
        let (parameters, values) = parameters();
        let mut adagrad = Adagrad::new(&values, &parameters.views()[..2]);
        for _ in 0..2 {
            let gradients = flat(&parameters, &[0.0, 0.0, 1.0, 0.0, 2.0, 0.0, 7.0, 7.0]);
            adagrad.step(&values, &gradients, &Tensor::from(0.5f32), 0.1);
            // Only what it has learnt from is used up.
            assert_eq!(numbers(&parameters, &gradients), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 7.0]);
        }
        // 0.5 / √0.25, then 0.5 / √0.5; what has no gradient stays, as does what is no table.
        let moved = 1.0 - 0.1 - 0.1 * 0.5f32.sqrt();
        let values = numbers(&parameters, &values);
        for (value, expected) in values.iter().zip([1.0, 1.0, moved, 1.0, moved, 1.0, 1.0, 1.0]) {
            assert!((value - expected).abs() < 1e-6, "{values:?}");
        }
        assert_eq!(numbers(&parameters, &adagrad.sum), [0.0, 0.0, 0.5, 0.0, 2.0, 0.0]);
    }

    #[test]
    fn tables_and_the_rest_learn_by_their_own_rules() {
        let (parameters, values) = parameters();
        let adagrad = TableOptimizer::Adagrad { learning_rate: 0.5 };
        let mut optimizer = Optimizer::new(
            &values,
            &parameters.views()[..2],
            OptimizerConfig { tables: adagrad, learning_rate: 0.1, weight_decay: 0.0 },
        );
        let gradients = flat(&parameters, &[0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.0]);
        optimizer.step(&values, &gradients, &Tensor::from(1f32), 0.5);
        let moved = numbers(&parameters, &values);
        for (value, expected) in moved.iter().zip([0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.95, 1.0]) {
            assert!((value - expected).abs() < 1e-5, "{moved:?}");
        }
        let names: Vec<_> =
            optimizer.state().iter().map(|(name, first, t)| (*name, *first, t.numel())).collect();
        assert_eq!(names, [("m", 32, 16), ("v", 32, 16), ("sum", 0, 32)]);
    }

    #[test]
    fn lazy_adamw_leaves_rows_without_gradient_alone_and_others_to_adamw() {
        let (parameters, values) = parameters();
        let dense = values.copy();
        let mut lazy = AdamW::new(&values, &parameters.views()[..2], 0.0);
        let mut adamw = AdamW::new(&values, &[], 0.0);
        for (step, gradients) in [[0.5f32, 0.1, 0.0, 0.0, 0.0, 2.0, 0.3, 0.0], [0.0; 8]].iter().enumerate() {
            for (optimizer, values) in [(&mut lazy, &values), (&mut adamw, &dense)] {
                let gradients = flat(&parameters, gradients);
                optimizer.step(values, &gradients, &Tensor::from(1f32), 0.1);
                assert_eq!(numbers(&parameters, &gradients), [0.0; 8]);
            }
            let [ours, theirs] = [&values, &dense].map(|of| numbers(&parameters, of));
            let is_like_dense: Vec<bool> = ours.iter().zip(theirs).map(|(a, b)| *a == b).collect();
            // After the second step, those of the tables that have moments.
            let table = step == 0;
            assert_eq!(is_like_dense, [table, table, true, true, true, table, true, true]);
        }
    }

    #[test]
    fn a_gradient_that_is_no_number_reaches_the_table() {
        let (parameters, values) = parameters();
        let mut adagrad = Adagrad::new(&values, &parameters.views()[..2]);
        let gradients = flat(&parameters, &[f32::NAN, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        adagrad.step(&values, &gradients, &Tensor::from(1f32), 0.5);
        assert!(values.double_value(&[0]).is_nan() && values.double_value(&[2]) == 1.0);
    }

    #[test]
    fn learning_rate_ends_one_step_above_zero() {
        assert_eq!(Schedule::Linear.factor(0, 4), 1.0);
        assert_eq!(Schedule::Linear.factor(3, 4), 0.25);
        assert_eq!(Schedule::Constant.factor(3, 4), 1.0);
    }
}
