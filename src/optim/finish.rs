//! The end of a step: from summed gradients to changed parameters, without waiting for the device.

use bireme_kernels::cuda::{self, LateRead, RowGradients};
use tch::{Device, Kind, Tensor};

use super::{Optimizer, average_and_clip, matrix};
use crate::model::{Gradients, RowList};

/// What is summed over all ranks besides the gradients, and the rates of the step.
pub struct StepSums<'a> {
    /// Gradients that are listed by row, of the first tables.
    pub lists: Vec<RowList>,
    /// Sum of squares of the sharded gradients of all ranks, f32 `[]`; `None` without sharding.
    pub sharded_squares: Option<&'a Tensor>,
    /// Summed loss of this rank, f32 `[1]`. Set to zero for the next step.
    pub own_loss: &'a Tensor,
    /// See [`Optimizer::rates`].
    pub rates: &'a Tensor,
    /// Largest norm of the mean gradient.
    pub clip_norm: f64,
}

/// Steps with a loss or a gradient that is not finite, and so without an effect, of which the
/// history has details.
const N_KEPT: usize = cuda::KEPT_STEPS;

/// Numbers of the history that describe such a step.
const N_EACH: usize = 4;

/// What all ranks know after a step, on the device: reading it waits for the step there.
pub struct StepOutcome {
    /// `[loss, n_targets, n_stop, n_save, norm, own loss]`, f64.
    values: Tensor,
    /// Numbers of steps and of steps without effect since the start of the process, and `[step,
    /// loss, norm, own loss]` of the last [`N_KEPT`] of these: f64.
    history: Tensor,
}

/// A [`StepOutcome`] in host memory.
#[derive(Clone, Debug)]
pub struct StepValues {
    /// Mean over the targets of all ranks.
    pub loss: f64,
    pub n_targets: usize,
    /// Whether a rank requested to stop.
    pub stop: bool,
    /// Whether a rank requested a checkpoint.
    pub save: bool,
    /// Number of steps without effect since the start of the process.
    pub n_skipped: usize,
    /// The last of them, in order.
    pub skipped: Vec<SkippedStep>,
}

/// A step whose loss or gradient is not finite. It leaves the parameters unchanged.
#[derive(Clone, Copy, Debug)]
pub struct SkippedStep {
    /// Steps after it.
    pub n_after: usize,
    /// Mean over the targets of all ranks.
    pub loss: f64,
    /// Norm of the gradient of the mean loss before clipping.
    pub norm: f64,
    /// Whether the loss of this rank is finite.
    pub is_own_loss_finite: bool,
}

impl StepOutcome {
    /// The same outcome.
    pub fn share(&self) -> Self {
        Self { values: self.values.shallow_clone(), history: self.history.shallow_clone() }
    }

    /// Reads the outcome. On a GPU this waits for the device.
    pub fn read(&self) -> StepValues {
        let all = Tensor::cat(&[&self.values, &self.history], 0);
        StepValues::new(&Vec::<f64>::try_from(all).expect("the outcome is f64"))
    }

    /// Starts to read the outcome, without a wait.
    ///
    /// # Panics
    /// If a GPU refuses the copy.
    pub fn read_later(&self) -> LateOutcome {
        let all = Tensor::cat(&[&self.values, &self.history], 0);
        if all.device() == Device::Cpu {
            return LateOutcome::Cpu(Vec::try_from(all).expect("the outcome is f64"));
        }
        LateOutcome::Gpu(LateRead::new(&all).unwrap_or_else(|problem| panic!("{problem}")))
    }
}

/// A [`StepOutcome`] on its way to host memory.
pub enum LateOutcome {
    Cpu(Vec<f64>),
    Gpu(LateRead),
}

impl LateOutcome {
    /// Waits for the step.
    ///
    /// # Panics
    /// If work on the GPU failed.
    pub fn read(&self) -> StepValues {
        match self {
            Self::Cpu(numbers) => StepValues::new(numbers),
            Self::Gpu(late) => {
                StepValues::new(&late.read().unwrap_or_else(|problem| panic!("{problem}")))
            }
        }
    }
}

impl StepValues {
    /// From the numbers of an outcome and of the history.
    fn new(all: &[f64]) -> Self {
        let [loss, n_targets, n_stop, n_save, _, _, n_steps, n_skipped, kept @ ..] = all else {
            unreachable!("the outcome has eight numbers and a history")
        };
        let n_skipped = *n_skipped as usize;
        let skipped = (n_skipped.saturating_sub(N_KEPT)..n_skipped).map(|number| {
            let start = number % N_KEPT * N_EACH;
            let of_step = &kept[start..start + N_EACH];
            SkippedStep {
                n_after: (n_steps - of_step[0]) as usize,
                loss: of_step[1],
                norm: of_step[2],
                is_own_loss_finite: of_step[3].is_finite(),
            }
        });
        Self {
            loss: loss / n_targets,
            n_targets: *n_targets as usize,
            stop: *n_stop > 0.0,
            save: *n_save > 0.0,
            n_skipped,
            skipped: skipped.collect(),
        }
    }
}

/// Where the scalars of the end of a step are.
pub(super) enum StepEnd {
    /// Number of steps of AdamW, and the history.
    Cpu {
        n_steps: i32,
        history: Vec<f64>,
    },
    Gpu(Box<cuda::StepBuffers>),
}

impl StepEnd {
    pub fn new(device: Device) -> Self {
        match device {
            Device::Cpu => Self::Cpu { n_steps: 0, history: vec![0.0; cuda::N_HISTORY] },
            _ => Self::Gpu(Box::new(cuda::StepBuffers::new(device))),
        }
    }

    /// Number of steps of AdamW so far. On a GPU this waits for the device.
    pub fn n_steps(&self) -> i32 {
        match self {
            Self::Cpu { n_steps, .. } => *n_steps,
            Self::Gpu(buffers) => buffers.n_steps.double_value(&[0]) as i32,
        }
    }

    pub fn set_n_steps(&mut self, number: i32) {
        match self {
            Self::Cpu { n_steps, .. } => *n_steps = number,
            Self::Gpu(buffers) => buffers.set_n_steps(number),
        }
    }
}

/// Sums gradients `[n, ..]` over equal rows `[n]`, except for row 0.
fn summed_rows((rows, gradients): (Tensor, Tensor)) -> RowGradients {
    let ids = rows.masked_fill(&rows.eq(0), -1);
    cuda::summed_by_row(&ids, &gradients).unwrap_or_else(|text| panic!("{text}"))
}

impl Optimizer {
    /// Ends a step: turns summed gradients into the clipped mean and updates `values: [n]`. Sets
    /// gradients and scalars to zero. If the loss or the norm of the gradient is not finite, the
    /// values stay as they are.
    ///
    /// # Panics
    /// If a GPU cannot run a kernel.
    pub fn finish(
        &mut self,
        values: &Tensor,
        gradients: &mut Gradients,
        sums: StepSums<'_>,
    ) -> StepOutcome {
        match self.end {
            StepEnd::Cpu { .. } => self.finish_on_cpu(values, gradients, &sums),
            StepEnd::Gpu(_) => self.finish_on_gpu(values, gradients, sums),
        }
    }

    fn finish_on_cpu(
        &mut self,
        values: &Tensor,
        gradients: &mut Gradients,
        sums: &StepSums<'_>,
    ) -> StepOutcome {
        let scalars = gradients.scalars();
        let no_squares = Tensor::from(0f32);
        let (scale, norm) = average_and_clip(
            &gradients.replicated(),
            sums.sharded_squares.unwrap_or(&no_squares),
            &scalars.get(1),
            sums.clip_norm,
        );
        let numbers = |x: &Tensor| Vec::<f64>::try_from(x.to_kind(Kind::Double)).expect("numbers");
        let own_loss = sums.own_loss.double_value(&[0]);
        let _ = sums.own_loss.shallow_clone().zero_();
        let mut outcome = numbers(&scalars);
        outcome.extend([norm.double_value(&[]), own_loss]);
        let (loss, norm) = (outcome[0] / outcome[1], outcome[4]);
        let rates = numbers(sums.rates);
        let is_finite = loss.is_finite() && norm.is_finite();
        if is_finite {
            self.step(values, &gradients.all(), &scale, [rates[0], rates[1]]);
            let _ = gradients.scalars().zero_();
        } else {
            gradients.zero();
        }
        let StepEnd::Cpu { history, .. } = &mut self.end else { unreachable!("on the CPU") };
        history[0] += 1.0;
        if !is_finite {
            let start = 2 + history[1] as usize % N_KEPT * N_EACH;
            let of_step = [history[0], loss, norm, own_loss];
            history[start..start + N_EACH].copy_from_slice(&of_step);
            history[1] += 1.0;
        }
        StepOutcome { values: Tensor::from_slice(&outcome), history: Tensor::from_slice(history) }
    }

    fn finish_on_gpu(
        &mut self,
        values: &Tensor,
        gradients: &Gradients,
        sums: StepSums<'_>,
    ) -> StepOutcome {
        let run = |result: Result<(), String>| result.unwrap_or_else(|text| panic!("{text}"));
        let tables = self.tables_by_row();
        let StepEnd::Gpu(buffers) = &mut self.end else { unreachable!("on a GPU") };
        let is_listed = !sums.lists.is_empty();
        let mut lists: Vec<Option<RowGradients>> =
            sums.lists.into_iter().map(|list| list.joined().map(summed_rows)).collect();
        let dense = gradients.dense();
        let of_rows = lists.iter().flatten().map(|rows| &rows.sums);
        let parts: Vec<&Tensor> = std::iter::once(&dense).chain(of_rows).collect();
        run(cuda::sum_of_squares(&parts, buffers));
        let sharded_squares = sums.sharded_squares.map(|squares| squares.view([1]));
        let step = cuda::StepSums {
            scalars: &gradients.scalars(),
            own_loss: sums.own_loss,
            extra_squares: sharded_squares.as_ref(),
            rates: sums.rates,
            max_norm: sums.clip_norm,
            weight_decay: self.adamw.weight_decay,
        };
        run(cuda::finish_step(step, buffers));
        let all = gradients.all();
        if !is_listed {
            lists = tables
                .iter()
                .map(|table| Some(RowGradients::of_table(&matrix(table, &all))))
                .collect();
        }
        for (table, rows) in lists.iter().enumerate() {
            let Some(rows) = rows else { continue };
            match &self.tables {
                Some(tables) => tables.adagrad.step_rows(table, values, rows, buffers, sums.rates),
                None => self.adamw.step_rows(table, values, rows, buffers),
            }
        }
        if !is_listed {
            tables.iter().for_each(|table| drop(table.of(&all).zero_()));
        }
        let adamw_part =
            |flat: &Tensor| flat.narrow(0, self.adamw_start, flat.size()[0] - self.adamw_start);
        self.adamw.step_dense_on_gpu(&adamw_part(values), &adamw_part(&all), buffers);
        StepOutcome {
            values: buffers.outcome.shallow_clone(),
            history: buffers.history.shallow_clone(),
        }
    }
}
