//! Optimizers: gradient clipping, AdamW, Adagrad for embedding tables, learning-rate schedules.

mod finish;

use bireme_kernels::adamw::{AdamWBuffers, AdamWStep, adamw};
use bireme_kernels::cuda;
use tch::{Kind, Tensor};

pub use crate::config::{Schedule, TableOptimizer};
use crate::model::View;
use finish::StepEnd;
pub use finish::{LateOutcome, SkippedStep, StepOutcome, StepSums, StepValues};

#[derive(Clone, Copy, Debug)]
pub struct OptimizerConfig {
    pub tables: TableOptimizer,
    /// Learning rate of AdamW at the start of each day.
    pub learning_rate: f64,
    pub weight_decay: f64,
}

/// AdamW for all parameters, or Adagrad for the tables and AdamW for all others.
pub struct Optimizer {
    adamw: AdamW,
    learning_rate: f64,
    /// Start of AdamW's parameters in the flat buffers.
    adamw_start: i64,
    tables: Option<TableAdagrad>,
    end: StepEnd,
}

struct TableAdagrad {
    adagrad: Adagrad,
    learning_rate: f64,
}

impl Optimizer {
    /// Zero state for parameters of the size and device of `values: [n]`. The views `tables` are
    /// contiguous and start at the first parameter.
    pub fn new(values: &Tensor, tables: &[View], config: OptimizerConfig) -> Self {
        let OptimizerConfig { tables: table_optimizer, learning_rate, weight_decay } = config;
        let (adamw_start, lazy, table_adagrad) = match table_optimizer {
            TableOptimizer::Adamw => (0, &[][..], None),
            TableOptimizer::LazyAdamw => (0, tables, None),
            TableOptimizer::Adagrad { learning_rate, momentum } => {
                let adagrad = Adagrad::new(values, tables, momentum);
                (adagrad.sum.size()[0], &[][..], Some(TableAdagrad { adagrad, learning_rate }))
            }
        };
        let adamw_values = values.narrow(0, adamw_start, values.size()[0] - adamw_start);
        let adamw = AdamW::new(&adamw_values, lazy, weight_decay);
        let end = StepEnd::new(values.device());
        Self { adamw, learning_rate, adamw_start, tables: table_adagrad, end }
    }

    /// Learning rates of AdamW and of the tables if the schedule multiplies them by `factor`.
    pub fn rates(&self, factor: f64) -> [f64; 2] {
        let of_tables = self.tables.as_ref().map_or(0.0, |tables| tables.learning_rate);
        [factor * self.learning_rate, factor * of_tables]
    }

    /// Updates `values: [n]` on the CPU by one step with `gradients: [n]` times `scale: []` and
    /// sets the gradients to zero. `rates`: see [`Optimizer::rates`].
    pub fn step(&mut self, values: &Tensor, gradients: &Tensor, scale: &Tensor, rates: [f64; 2]) {
        let start = self.adamw_start;
        let adamw_part = |flat: &Tensor| flat.narrow(0, start, flat.size()[0] - start);
        let [of_adamw, of_tables] = rates;
        let n_steps = self.end.n_steps() + 1;
        self.end.set_n_steps(n_steps);
        self.adamw.step(&adamw_part(values), &adamw_part(gradients), scale, of_adamw, n_steps);
        if let Some(TableAdagrad { adagrad, .. }) = &mut self.tables {
            adagrad.step(values, gradients, scale, of_tables);
        }
    }

    /// Tables of which a step changes only the rows with a gradient.
    fn tables_by_row(&self) -> Vec<View> {
        let tables = self.tables.as_ref().map_or(&self.adamw.lazy, |tables| &tables.adagrad.tables);
        tables.clone()
    }

    /// Steps of AdamW since the state was zero. On a GPU this waits for the device.
    pub fn n_steps(&self) -> i32 {
        self.end.n_steps()
    }

    /// Sets the number of steps of a restored state.
    pub fn set_n_steps(&mut self, n_steps: i32) {
        self.end.set_n_steps(n_steps);
    }

    /// The state for a checkpoint: name, start in the flat buffers, and tensor.
    pub fn state(&self) -> Vec<(&'static str, i64, &Tensor)> {
        let mut state =
            vec![("m", self.adamw_start, &self.adamw.m), ("v", self.adamw_start, &self.adamw.v)];
        if let Some(TableAdagrad { adagrad, .. }) = &self.tables {
            state.push(("sum", 0, &adagrad.sum));
            state.extend(adagrad.last_step.as_ref().map(|last_step| ("last_step", 0, last_step)));
        }
        state
    }
}

/// Adagrad for tables (Duchi et al. 2011), as in PyTorch: `s ← s + g²`, `p ← p − lr g / (√s + ε)`.
/// With momentum a row's step is `d ← momentum d − lr g / (√s + ε)`, as in GRU4Rec.
///
/// Rows without a gradient do not change. So a step reads all gradients once and otherwise costs as
/// much as the rows with a gradient.
pub struct Adagrad {
    tables: Vec<View>,
    /// Sums of squared gradients, `[n]`.
    sum: Tensor,
    momentum: f64,
    /// Last step of each row, `[n]`; `None` without momentum.
    last_step: Option<Tensor>,
}

impl Adagrad {
    /// Zero sums for `tables`, which are contiguous from the start of `values: [n]`.
    pub fn new(values: &Tensor, tables: &[View], momentum: f64) -> Self {
        let n = tables.last().map_or(0, View::end);
        let zeros = || values.narrow(0, 0, n).zeros_like();
        let last_step = (momentum > 0.0).then(zeros);
        Self { tables: tables.to_vec(), sum: zeros(), momentum, last_step }
    }

    /// Updates the tables in `values: [n]` on the CPU by one step with `gradients: [n]` times
    /// `scale: []` and sets the gradients of the tables to zero.
    pub fn step(
        &mut self,
        values: &Tensor,
        gradients: &Tensor,
        scale: &Tensor,
        learning_rate: f64,
    ) {
        tch::no_grad(|| {
            for table in &self.tables {
                let [mut values, mut gradients, mut sum] =
                    [values, gradients, &self.sum].map(|flat| matrix(table, flat));
                let rows = rows_with_gradient(&gradients);
                let gradient = gradients.index_select(0, &rows) * scale;
                let squares = sum.index_select(0, &rows) + &gradient * &gradient;
                let mut change = gradient * -learning_rate / (squares.sqrt() + 1e-10);
                if let Some(last_step) = &self.last_step {
                    let mut last_step = matrix(table, last_step);
                    change += last_step.index_select(0, &rows) * self.momentum;
                    let _ = last_step.index_copy_(0, &rows, &change);
                }
                let _ = values.index_copy_(0, &rows, &(values.index_select(0, &rows) + change));
                let _ = sum.index_copy_(0, &rows, &squares);
                let _ = gradients.index_fill_(0, &rows, 0.0);
            }
        });
    }

    /// [`Adagrad::step`] on a GPU for table number `number`, whose gradients are `rows`.
    fn step_rows(
        &self,
        number: usize,
        values: &Tensor,
        rows: &cuda::RowGradients,
        step: &cuda::StepBuffers,
        rates: &Tensor,
    ) {
        let table = &self.tables[number];
        let last_step = self.last_step.as_ref().map(|last_step| matrix(table, last_step));
        let of_table = cuda::AdagradTable {
            values: &matrix(table, values),
            squares: &matrix(table, &self.sum),
            last_step: last_step.as_ref(),
        };
        cuda::adagrad_rows(of_table, rows, step, rates, self.momentum)
            .unwrap_or_else(|problem| panic!("{problem}"));
    }
}

/// The table in a flat buffer as a matrix of rows: `[rows, columns]`.
fn matrix(table: &View, flat: &Tensor) -> Tensor {
    table.of(flat).view([table.shape[0], -1])
}

/// Indices of the rows of `gradients: [rows, D]` that are not zero, i64.
fn rows_with_gradient(gradients: &Tensor) -> Tensor {
    // The norm of a row with a NaN is NaN, which is nonzero, so the NaN reaches the parameters and
    // is found.
    gradients.norm_scalaropt_dim(2.0, [1i64].as_slice(), false).nonzero().squeeze_dim(1)
}

/// AdamW on one flat buffer, as in Hugging Face's `AdamW` (Loshchilov & Hutter 2019):
/// `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
/// `p ← p − lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)`.
/// Unlike `torch.optim.AdamW`, ε is added to the root of the uncorrected `v`. Weight decay is
/// decoupled.
pub struct AdamW {
    weight_decay: f64,
    /// Tables at the start of the buffer of which only rows with a gradient are updated.
    lazy: Vec<View>,
    /// First moments, `[n]`.
    m: Tensor,
    /// Second moments, `[n]`.
    v: Tensor,
}

impl AdamW {
    /// Zero moments for parameters of the size and device of `values: [n]`. `lazy`: see
    /// [`TableOptimizer::LazyAdamw`].
    pub fn new(values: &Tensor, lazy: &[View], weight_decay: f64) -> Self {
        let zeros = || Tensor::zeros_like(values);
        Self { weight_decay, lazy: lazy.to_vec(), m: zeros(), v: zeros() }
    }

    /// Updates `values: [n]` on the CPU by step number `n_steps` (from 1) with `gradients: [n]`
    /// times `scale: []` and sets the gradients to zero.
    pub fn step(
        &mut self,
        values: &Tensor,
        gradients: &Tensor,
        scale: &Tensor,
        learning_rate: f64,
        n_steps: i32,
    ) {
        let decay_factor = 1.0 - learning_rate * self.weight_decay;
        let step = AdamWStep { learning_rate, n_steps, decay_factor };
        let update = |buffers: &mut AdamWBuffers| adamw(buffers, scale, step);
        tch::no_grad(|| {
            for table in &self.lazy {
                let [mut values, mut gradients, mut m, mut v] =
                    [values, gradients, &self.m, &self.v].map(|flat| matrix(table, flat));
                let rows = rows_with_gradient(&gradients);
                // Rows are gathered to a dense buffer, updated there and copied back.
                let mut selected = AdamWBuffers {
                    values: values.index_select(0, &rows),
                    gradients: gradients.index_select(0, &rows),
                    m: m.index_select(0, &rows),
                    v: v.index_select(0, &rows),
                };
                update(&mut selected);
                let updated =
                    [(&mut values, selected.values), (&mut m, selected.m), (&mut v, selected.v)];
                for (buffer, new_rows) in updated {
                    let _ = buffer.index_copy_(0, &rows, &new_rows);
                }
                let _ = gradients.index_fill_(0, &rows, 0.0);
            }
            update(&mut self.behind_tables(values, gradients));
        });
    }

    /// The buffers behind the tables of which only rows with a gradient are updated.
    fn behind_tables(&self, values: &Tensor, gradients: &Tensor) -> AdamWBuffers {
        let start = self.lazy.last().map_or(0, View::end);
        let behind = |flat: &Tensor| flat.narrow(0, start, flat.size()[0] - start);
        AdamWBuffers {
            values: behind(values),
            gradients: behind(gradients),
            m: behind(&self.m),
            v: behind(&self.v),
        }
    }

    /// [`AdamW::step`] on a GPU for the rows of table number `number`, whose gradients are `rows`.
    fn step_rows(
        &self,
        number: usize,
        values: &Tensor,
        rows: &cuda::RowGradients,
        step: &cuda::StepBuffers,
    ) {
        let table = &self.lazy[number];
        let of_table = cuda::AdamWTable {
            values: &matrix(table, values),
            m: &matrix(table, &self.m),
            v: &matrix(table, &self.v),
        };
        cuda::lazy_adamw_rows(of_table, rows, step).unwrap_or_else(|problem| panic!("{problem}"));
    }

    /// [`AdamW::step`] on a GPU for the parameters behind the tables.
    fn step_dense_on_gpu(&mut self, values: &Tensor, gradients: &Tensor, step: &cuda::StepBuffers) {
        cuda::adamw(&mut self.behind_tables(values, gradients), step)
            .unwrap_or_else(|problem| panic!("{problem}"));
    }
}

/// Returns the factor that turns summed gradients into the mean over `n_targets: []` clipped to
/// `max_norm` (as in `torch.nn.utils.clip_grad_norm_`), and the norm of the mean before clipping,
/// both `[]`. The gradients are `gradients: [n]` and the sharded gradients of all ranks, whose
/// squares sum to `sharded_squares: []`. Does not wait for the device.
pub fn average_and_clip(
    gradients: &Tensor,
    sharded_squares: &Tensor,
    n_targets: &Tensor,
    max_norm: f64,
) -> (Tensor, Tensor) {
    let norm = (sum_of_squares(gradients) + sharded_squares).sqrt() / n_targets;
    let clip = ((&norm + 1e-6).reciprocal() * max_norm).clamp_max(1.0);
    (clip / n_targets, norm)
}

/// Sum of squares of `numbers: [n]`: `[]`.
pub fn sum_of_squares(numbers: &Tensor) -> Tensor {
    numbers.norm_scalaropt_dtype(2.0, Kind::Float).square()
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::model::Parameters;
    use crate::model::parameters::ParameterBuilder;

    #[test]
    fn the_first_step_has_the_length_of_the_learning_rate() {
        let values = Tensor::from_slice(&[1f32, -2.0]);
        let mut adamw = AdamW::new(&values, &[], 0.0);
        adamw.step(&values, &Tensor::from_slice(&[0.5f32, -3.0]), &Tensor::from(1f32), 0.1, 1);
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
            let g: Vec<f64> =
                (0..3).map(|i| (f64::from(t) * 0.7 + f64::from(i)).sin() * 1e-3).collect();
            // The scale below undoes the factor, as clipping would.
            let gradients = Tensor::from_slice(&g).to_kind(Kind::Float) * 4.0;
            adamw.step(&values, &gradients, &Tensor::from(0.25f32), lr, t);
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
    fn the_mean_gradient_is_clipped_if_it_exceeds_the_norm() {
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

    /// A table of two rows, a bias per row, and two further parameters.
    fn parameters() -> (Parameters, Tensor) {
        let mut builder = ParameterBuilder::default();
        for (name, size) in [("table", &[2, 2][..]), ("bias", &[2]), ("rest", &[2])] {
            builder.constant(name, size, 1.0);
        }
        let parameters = Parameters::new(builder, Device::Cpu);
        let values = parameters.values();
        (parameters, values)
    }

    /// The numbers of the three parameters in the layout of the flat buffers.
    fn flat(parameters: &Parameters, numbers: &[f32; 8]) -> Tensor {
        let flat = parameters.values().zeros_like();
        let mut rest = &numbers[..];
        for (_, mut tensor) in parameters.named(&flat) {
            let (own, after) = rest.split_at(tensor.numel());
            tensor.copy_(&Tensor::from_slice(own).view_as(&tensor));
            rest = after;
        }
        flat
    }

    /// The numbers of the parameters that `flat` contains. It starts at the first parameter.
    fn numbers(parameters: &Parameters, flat: &Tensor) -> Vec<f32> {
        let elements =
            |(_, tensor): &(String, Tensor)| Vec::<f32>::try_from(tensor.reshape([-1])).unwrap();
        parameters.named(flat).iter().flat_map(elements).collect()
    }

    #[test]
    fn adagrad_steps_shrink_and_rows_without_gradient_keep_their_values() {
        let (parameters, values) = parameters();
        let mut adagrad = Adagrad::new(&values, &parameters.views()[..2], 0.0);
        for _ in 0..2 {
            let gradients = flat(&parameters, &[0.0, 0.0, 1.0, 0.0, 2.0, 0.0, 7.0, 7.0]);
            adagrad.step(&values, &gradients, &Tensor::from(0.5f32), 0.1);
            // Only the gradients of the tables are set to zero.
            assert_eq!(numbers(&parameters, &gradients), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 7.0]);
        }
        // Two steps of the learning rate times 0.5 / √0.25 and 0.5 / √0.5. Rows without a gradient
        // and parameters outside the tables do not change.
        let moved = 1.0 - 0.1 - 0.1 * 0.5f32.sqrt();
        let values = numbers(&parameters, &values);
        for (value, expected) in values.iter().zip([1.0, 1.0, moved, 1.0, moved, 1.0, 1.0, 1.0]) {
            assert!((value - expected).abs() < 1e-6, "{values:?}");
        }
        assert_eq!(numbers(&parameters, &adagrad.sum), [0.0, 0.0, 0.5, 0.0, 2.0, 0.0]);
    }

    #[test]
    fn momentum_repeats_a_part_of_the_last_step_of_a_row() {
        let (parameters, values) = parameters();
        let mut adagrad = Adagrad::new(&values, &parameters.views()[..2], 0.5);
        // The second row has a gradient in the first and the last step only.
        for of_second in [1.0, 0.0, 1.0] {
            let gradients = flat(&parameters, &[1.0, 0.0, of_second, 0.0, 0.0, 0.0, 0.0, 0.0]);
            adagrad.step(&values, &gradients, &Tensor::from(1f32), 0.1);
        }
        let (first, second, third) = (0.1, 0.1 * 0.5f32.sqrt(), 0.1 / 3f32.sqrt());
        let of_first = [first, 0.5 * first + second, 0.25 * first + 0.5 * second + third];
        let of_second = [first, 0.5 * first + second];
        let values = numbers(&parameters, &values);
        assert!((values[0] - (1.0 - of_first.iter().sum::<f32>())).abs() < 1e-6, "{values:?}");
        assert!((values[2] - (1.0 - of_second.iter().sum::<f32>())).abs() < 1e-6, "{values:?}");
    }

    #[test]
    fn tables_use_adagrad_and_other_parameters_use_adamw() {
        let (parameters, values) = parameters();
        let adagrad = TableOptimizer::Adagrad { learning_rate: 0.5, momentum: 0.0 };
        let mut optimizer = Optimizer::new(
            &values,
            &parameters.views()[..2],
            OptimizerConfig { tables: adagrad, learning_rate: 0.1, weight_decay: 0.0 },
        );
        let gradients = flat(&parameters, &[0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.0]);
        let rates = optimizer.rates(0.5);
        optimizer.step(&values, &gradients, &Tensor::from(1f32), rates);
        let moved = numbers(&parameters, &values);
        for (value, expected) in moved.iter().zip([0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.95, 1.0]) {
            assert!((value - expected).abs() < 1e-5, "{moved:?}");
        }
        let names: Vec<_> =
            optimizer.state().iter().map(|(name, first, t)| (*name, *first, t.numel())).collect();
        assert_eq!(names, [("m", 32, 16), ("v", 32, 16), ("sum", 0, 32)]);
    }

    #[test]
    fn lazy_adamw_skips_rows_without_gradient_and_equals_adamw_elsewhere() {
        let (parameters, values) = parameters();
        let dense = values.copy();
        let mut lazy = AdamW::new(&values, &parameters.views()[..2], 0.0);
        let mut adamw = AdamW::new(&values, &[], 0.0);
        for (step, gradients) in
            [[0.5f32, 0.1, 0.0, 0.0, 0.0, 2.0, 0.3, 0.0], [0.0; 8]].iter().enumerate()
        {
            for (optimizer, values) in [(&mut lazy, &values), (&mut adamw, &dense)] {
                let gradients = flat(&parameters, gradients);
                optimizer.step(values, &gradients, &Tensor::from(1f32), 0.1, step as i32 + 1);
                assert_eq!(numbers(&parameters, &gradients), [0.0; 8]);
            }
            let [ours, theirs] = [&values, &dense].map(|flat| numbers(&parameters, flat));
            let is_like_dense: Vec<bool> = ours.iter().zip(theirs).map(|(a, b)| *a == b).collect();
            // In the second step AdamW moves the rows that have moments; the lazy one does not.
            let table = step == 0;
            assert_eq!(is_like_dense, [table, table, true, true, true, table, true, true]);
        }
    }

    #[test]
    fn a_nan_gradient_reaches_the_table() {
        let (parameters, values) = parameters();
        let mut adagrad = Adagrad::new(&values, &parameters.views()[..2], 0.0);
        let gradients = flat(&parameters, &[f32::NAN, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        adagrad.step(&values, &gradients, &Tensor::from(1f32), 0.5);
        assert!(values.double_value(&[0]).is_nan() && values.double_value(&[2]) == 1.0);
    }

    #[test]
    fn the_linear_schedule_ends_one_step_above_zero() {
        assert_eq!(Schedule::Linear.factor(0, 4), 1.0);
        assert_eq!(Schedule::Linear.factor(3, 4), 0.25);
        assert_eq!(Schedule::Constant.factor(3, 4), 1.0);
    }
}
