//! What a backward pass reads that depends on its sessions, prepared in host memory.
//!
//! A CUDA graph needs the same sizes in every step. [`StepSizes`] are sizes that all steps fit
//! into; a batch is then filled up with sessions of padding events, whose targets have the weight
//! 0. The loss and its gradients are those of the batch alone.

use bireme_kernels::parallel::torch_in_parallel;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use super::Objective;
use super::body::Layout;
use super::evidence::{CandidatePreparer, CandidateSearch};
use super::input::swap_sources;
use super::item_table::div_ceil;
use super::objective::{AttentionMask, Plan};
use crate::data::Batch;
use crate::data::plan::derive_seed;

/// Sizes are rounded up to multiples of this, so that they rarely grow from epoch to epoch.
const SIZE_MULTIPLE: i64 = 64;

/// Prepares batches. It holds no tensor of the model, so that another thread can have it.
#[derive(Clone)]
pub struct Preparer {
    pub(super) objective: Objective,
    /// Whether the body is an attention model, or a recurrence.
    pub(super) attends: bool,
    pub(super) is_on_gpu: bool,
    /// Largest number of parts in which a batch goes through the encoder.
    pub(super) n_parts: usize,
    /// Whether looked-up vectors have dropout.
    pub(super) drops_inputs: bool,
    pub(super) swap_noise: f64,
    /// See [`Encoder::padded_length`](super::encoder::Encoder).
    pub(super) padded_length: Option<usize>,
    /// Largest number of positions of a session in training.
    pub(super) max_positions: usize,
    /// For scores of candidates.
    pub(super) candidates: Option<CandidatePreparer>,
}

/// What a backward pass over a batch reads.
pub struct PreparedBatch {
    /// Values of each feature, with a padding event at the end: `[T + 1]`.
    pub(super) columns: Vec<Tensor>,
    /// The event from which each event takes its value of a column under swap noise, i64 `[T + 1]`
    /// for each column; empty without swap noise.
    pub(super) swap_sources: Vec<Tensor>,
    /// Consecutive parts.
    pub(super) parts: Vec<PreparedPart>,
    /// Events of each part.
    pub(super) n_events: Vec<i64>,
    /// Events that are predicted, i64 `[N]`.
    pub(super) predicted: Tensor,
    /// Number of the micro-batch of each target, i64 `[N]`; −1 for padding.
    pub(super) micro_batches: Tensor,
    /// 1 for a target, 0 for padding, f32 `[N]`; `None` without padding.
    pub(super) weights: Option<Tensor>,
    /// See [`Targets::uniform`](super::head::Targets).
    pub(super) uniform: Option<Tensor>,
    /// Output positions of each part.
    pub(super) n_outputs: Vec<i64>,
    /// Targets of all parts, f32 `[1]`.
    pub(super) n_targets: Tensor,
    /// For [`Objective::Replaced`].
    pub(super) detection: Option<PreparedSessions>,
    /// Whether the sizes are those of every step on every rank.
    pub(super) is_sized: bool,
    /// Seed of the random numbers that all ranks share, with the bits of a u64: i64 `[]`.
    pub(super) step_seed: Tensor,
}

/// A part of a [`PreparedBatch`].
pub(super) struct PreparedPart {
    pub search: Option<CandidateSearch>,
    pub sessions: PreparedSessions,
}

/// A plan over the sessions of a batch, as the encoder reads it.
pub(super) struct PreparedSessions {
    pub layout: Layout,
    /// Keys of the events for dropout, i32 `[T + 1]`.
    pub event_keys: Option<Tensor>,
}

impl PreparedSessions {
    /// The same sessions for another thread.
    pub fn share(&self) -> Self {
        let event_keys = self.event_keys.as_ref().map(Tensor::shallow_clone);
        Self { layout: self.layout.share(), event_keys }
    }

    /// All tensors, to be sent to a device together.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let mut tensors = self.layout.tensors_mut();
        tensors.extend(&mut self.event_keys);
        tensors
    }
}

impl PreparedBatch {
    /// Seed of the random numbers that all ranks share in the step: i64 `[]`.
    pub fn step_seed(&self) -> &Tensor {
        &self.step_seed
    }

    /// All tensors, to be sent to a device together.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let mut tensors: Vec<&mut Tensor> =
            self.columns.iter_mut().chain(&mut self.swap_sources).collect();
        tensors.extend([&mut self.predicted, &mut self.micro_batches, &mut self.n_targets]);
        tensors.push(&mut self.step_seed);
        tensors.extend(&mut self.weights);
        tensors.extend(&mut self.uniform);
        for PreparedPart { search, sessions } in &mut self.parts {
            tensors.extend(search.iter_mut().flat_map(CandidateSearch::tensors_mut));
            tensors.extend(sessions.tensors_mut());
        }
        tensors.extend(self.detection.iter_mut().flat_map(PreparedSessions::tensors_mut));
        tensors
    }
}

impl Preparer {
    /// Prepares a backward pass over `batch`, with the plan of the objective. With `sizes` the
    /// batch is filled up to them.
    pub fn prepare(&self, batch: &Batch, sizes: Option<&StepSizes>) -> PreparedBatch {
        let n_parts = if sizes.is_some() { 1 } else { self.n_parts };
        let parts = batch.split(n_parts).into_iter();
        let planned = parts.map(|part| (self.objective.training(&part, self.attends), part));
        self.prepare_parts(batch, planned.collect(), sizes)
    }

    /// [`Preparer::prepare`] with the masked and predicted positions given, and without padding.
    pub fn prepare_planned(&self, batch: &Batch, plan: Plan) -> PreparedBatch {
        let whole = batch.split(1).into_iter().map(|whole| (plan.clone(), whole)).collect();
        self.prepare_parts(batch, whole, None)
    }

    fn prepare_parts(
        &self,
        batch: &Batch,
        parts: Vec<(Plan, Batch)>,
        sizes: Option<&StepSizes>,
    ) -> PreparedBatch {
        let n_targets: usize = parts.iter().map(|(plan, _)| plan.targets.len()).sum();
        let mut micro_batches = micro_batches(&parts);
        let parts = match sizes {
            Some(sizes) => {
                parts.into_iter().map(|(plan, part)| (plan.sized(sizes), part)).collect()
            }
            None => parts,
        };
        let n_rows = sizes.map_or(batch.n_events() as i64, |sizes| sizes.n_events);
        let predicted = predicted_events(&parts, n_rows);
        micro_batches.resize(predicted.len(), -1);
        let weights = sizes.map(|_| {
            let mut weights = vec![1f32; n_targets];
            weights.resize(predicted.len(), 0.0);
            Tensor::from_slice(&weights)
        });
        let is_replaced = matches!(self.objective, Objective::Replaced { .. });
        PreparedBatch {
            columns: batch.padded_columns(n_rows as usize + 1),
            swap_sources: self.swap_sources(batch, n_rows),
            predicted: Tensor::from_slice(&predicted),
            micro_batches: Tensor::from_slice(&micro_batches),
            weights,
            uniform: is_replaced.then(|| uniform(&parts)),
            n_events: match sizes {
                Some(sizes) => vec![sizes.n_events],
                None => parts.iter().map(|(_, part)| part.n_events() as i64).collect(),
            },
            n_outputs: parts.iter().map(|(plan, _)| plan.targets.len() as i64).collect(),
            n_targets: Tensor::from_slice(&[n_targets as f32]),
            detection: is_replaced.then(|| {
                // A causal body classifies an event by the events before it, an attending one by
                // all.
                let plan = Plan::all(&batch.lengths, AttentionMask::Full);
                self.sessions(plan, batch, true, None)
            }),
            parts: torch_in_parallel(parts, |(plan, part)| PreparedPart {
                search: self
                    .candidates
                    .as_ref()
                    .map(|candidates| candidates.of_targets(&plan.targets, &part, sizes)),
                sessions: self.sessions(plan, &part, true, sizes),
            }),
            is_sized: sizes.is_some(),
            step_seed: Tensor::from(batch.step_seed as i64),
        }
    }

    /// The layout of `plan` over `batch`. Dropout is possible if `training`.
    pub(super) fn sessions(
        &self,
        plan: Plan,
        batch: &Batch,
        training: bool,
        sizes: Option<&StepSizes>,
    ) -> PreparedSessions {
        let plan = match self.padded_length {
            Some(length) => plan.padded(length),
            None => plan,
        };
        let n_rows = sizes.map_or(batch.n_events() as i64, |sizes| sizes.n_events);
        let mut layout = Layout::new(&plan, n_rows, sizes);
        if !self.is_on_gpu && !self.attends {
            layout = layout.with_packed_sequence(&plan);
        }
        if training {
            layout = layout.with_row_keys(&plan, batch);
        }
        let event_keys = (training && self.drops_inputs).then(|| {
            let mut keys = batch.row_keys(&batch.lengths);
            keys.resize(n_rows as usize + 1, 0);
            Tensor::from_slice(&keys)
        });
        PreparedSessions { layout, event_keys }
    }

    fn swap_sources(&self, batch: &Batch, n_rows: i64) -> Vec<Tensor> {
        if self.swap_noise == 0.0 {
            return Vec::new();
        }
        let of_column = |column: usize| {
            let mut sources = swap_sources(batch, column, self.swap_noise);
            sources.resize(n_rows as usize + 1, n_rows);
            Tensor::from_slice(&sources)
        };
        (0..batch.columns.len()).map(of_column).collect()
    }

    /// The sizes of a pass over sessions of these lengths and seeds. The columns of `batch` are not
    /// read.
    pub fn bounds(&self, batch: &Batch) -> SizeBounds {
        let plan = self.objective.training(batch, self.attends);
        let plan = match self.padded_length {
            Some(length) => plan.padded(length),
            None => plan,
        };
        let [n_sessions, n_positions, n_outputs] =
            [plan.lengths.len(), plan.inputs.len(), plan.outputs.len()].map(|n| n as i64);
        let length = self.max_positions as i64;
        SizeBounds {
            n_sessions,
            n_events: batch.n_events() as i64,
            n_positions,
            n_outputs,
            other_positions: n_positions - n_outputs,
            later_positions: n_positions - n_sessions,
            free_positions: length * n_sessions - n_positions,
            free_outputs: length * n_sessions - n_outputs,
        }
    }

    /// Whether sessions of `day` are left out of the counts that candidates are found by.
    pub fn leaves_out(&self, day: i64) -> bool {
        self.candidates.as_ref().is_some_and(|candidates| candidates.leaves_out(day))
    }

    /// Sizes for all steps within `bounds`. `includes_counted`: whether some session is left out of
    /// the counts.
    pub fn sizes(&self, bounds: &SizeBounds, includes_counted: bool) -> StepSizes {
        bounds.sizes(self.max_positions as i64, includes_counted)
    }
}

/// Largest sizes of several steps, each on its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SizeBounds {
    n_sessions: i64,
    n_events: i64,
    n_positions: i64,
    n_outputs: i64,
    /// Positions less outputs.
    other_positions: i64,
    /// Positions less sessions.
    later_positions: i64,
    /// Positions that longer sessions would have had.
    free_positions: i64,
    /// Outputs that longer sessions could have had.
    free_outputs: i64,
}

impl SizeBounds {
    /// In an order that [`SizeBounds::from_numbers`] reads, for a maximum over ranks.
    pub fn numbers(&self) -> [i64; 8] {
        [
            self.n_sessions,
            self.n_events,
            self.n_positions,
            self.n_outputs,
            self.other_positions,
            self.later_positions,
            self.free_positions,
            self.free_outputs,
        ]
    }

    pub fn from_numbers(numbers: [i64; 8]) -> Self {
        let [
            n_sessions,
            n_events,
            n_positions,
            n_outputs,
            other_positions,
            later_positions,
            free_positions,
            free_outputs,
        ] = numbers;
        Self {
            n_sessions,
            n_events,
            n_positions,
            n_outputs,
            other_positions,
            later_positions,
            free_positions,
            free_outputs,
        }
    }

    /// Bounds of both.
    #[must_use]
    pub fn max(self, other: &Self) -> Self {
        let (a, b) = (self.numbers(), other.numbers());
        Self::from_numbers(std::array::from_fn(|i| a[i].max(b[i])))
    }

    /// Sizes that all steps fit into: of a step with `B` sessions, `P` positions and `N` outputs,
    /// the missing `k` sessions can have the missing `q` positions, at least one and at most
    /// `length` each, and the missing `r ≤ q` outputs.
    fn sizes(&self, length: i64, includes_counted: bool) -> StepSizes {
        let round_up = |n: i64| div_ceil(n, SIZE_MULTIPLE) * SIZE_MULTIPLE;
        let all_are_outputs = self.other_positions == 0;
        let mut n_outputs = round_up(self.n_outputs);
        // Sessions of padding in a step with the most sessions.
        let mut n_spare = 1;
        loop {
            let n_sessions = self.n_sessions + n_spare;
            // `P + k` with `k = n_sessions − B`, and `P + r` with `r = n_outputs − N`.
            let least = (n_sessions + self.later_positions).max(n_outputs + self.other_positions);
            let n_positions = round_up(least);
            if all_are_outputs {
                n_outputs = n_positions;
            }
            // `q ≤ k length` for every step, and the same for outputs.
            let wanted = div_ceil(n_positions + self.free_positions, length);
            let wanted = wanted.max(div_ceil(n_outputs + self.free_outputs, length));
            if wanted <= n_sessions {
                let n_events = round_up(self.n_events);
                return StepSizes {
                    n_sessions,
                    n_events,
                    n_positions,
                    n_outputs,
                    length,
                    includes_counted,
                };
            }
            n_spare += wanted - n_sessions;
        }
    }
}

/// Sizes that all steps of a day fit into, on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepSizes {
    pub n_sessions: i64,
    pub n_events: i64,
    pub n_positions: i64,
    pub n_outputs: i64,
    /// Positions of the longest session, and most outputs of a session.
    pub length: i64,
    /// Whether sessions are left out of the counts of candidates.
    pub includes_counted: bool,
}

/// Events that are predicted, counted from the first of the batch: `[N]`. `padding`: the event that
/// targets of padding have.
fn predicted_events(parts: &[(Plan, Batch)], padding: i64) -> Vec<i64> {
    let (mut predicted, mut first) = (Vec::new(), 0);
    for (plan, part) in parts {
        let n_events = part.n_events() as i64;
        let event = |&target: &i64| if target < n_events { first + target } else { padding };
        predicted.extend(plan.targets.iter().map(event));
        first += n_events;
    }
    predicted
}

/// Number of the micro-batch of each target.
fn micro_batches(parts: &[(Plan, Batch)]) -> Vec<i64> {
    let mut of_targets = Vec::new();
    let mut number = 0;
    for (plan, part) in parts {
        for n_targets in part.by_segment(&plan.outputs_per_session) {
            of_targets.extend(std::iter::repeat_n(number, n_targets));
            number += 1;
        }
    }
    of_targets
}

/// A uniform number in 0..1 for each target, from the seed of its session: `[N]`.
fn uniform(parts: &[(Plan, Batch)]) -> Tensor {
    let numbers: Vec<f32> = parts
        .iter()
        .flat_map(|(plan, batch)| batch.session_seeds.iter().zip(&plan.outputs_per_session))
        .flat_map(|(&seed, &n)| {
            let mut generator = ChaCha8Rng::seed_from_u64(derive_seed(seed, "replaced", &[]));
            (0..n).map(move |_| generator.random())
        })
        .collect();
    Tensor::from_slice(&numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Segment;

    /// Sessions of the given lengths, without columns.
    fn outline(lengths: &[usize]) -> Batch {
        Batch {
            columns: Vec::new(),
            lengths: lengths.to_vec(),
            session_seeds: (0..lengths.len() as u64).collect(),
            days: vec![1; lengths.len()],
            step_seed: 0,
            segments: vec![Segment { seed: 0, n_sessions: lengths.len() }],
        }
    }

    fn preparer(objective: Objective, attends: bool) -> Preparer {
        Preparer {
            objective,
            attends,
            is_on_gpu: true,
            n_parts: 1,
            drops_inputs: false,
            swap_noise: 0.0,
            padded_length: None,
            max_positions: 6,
            candidates: None,
        }
    }

    #[test]
    fn every_step_fits_into_the_sizes_of_all() {
        let steps: Vec<Vec<usize>> = vec![
            vec![2; 200],
            vec![6; 200],
            (0..200).map(|session| 2 + session % 5).collect(),
            vec![6],
            vec![],
        ];
        for (objective, attends) in [
            (Objective::Causal { drop: 0.0, reverse: 0.0 }, false),
            (Objective::Masked { probability: 0.3 }, true),
            (Objective::Permutation { probability: 0.3, max_span: 2 }, true),
        ] {
            let preparer = preparer(objective, attends);
            for chosen in [&steps[..], &steps[2..], &steps[..1], &steps[3..]] {
                let bounds = chosen
                    .iter()
                    .map(|lengths| preparer.bounds(&outline(lengths)))
                    .reduce(|all, bounds| all.max(&bounds))
                    .unwrap();
                let sizes = preparer.sizes(&bounds, false);
                for lengths in chosen {
                    let batch = outline(lengths);
                    let plan = preparer.objective.training(&batch, attends);
                    let sized = plan.clone().sized(&sizes);
                    assert_eq!(sized.lengths.len() as i64, sizes.n_sessions);
                    assert_eq!(sized.inputs.len() as i64, sizes.n_positions);
                    assert_eq!(sized.outputs.len() as i64, sizes.n_outputs);
                    assert_eq!(sized.targets.len() as i64, sizes.n_outputs);
                    assert_eq!(sized.lengths.iter().sum::<usize>(), sized.inputs.len());
                    assert_eq!(
                        sized.outputs_per_session.iter().sum::<usize>(),
                        sized.outputs.len()
                    );
                    let per_session = sized.lengths.iter().zip(&sized.outputs_per_session);
                    assert!(per_session.skip(lengths.len()).all(|(&n_positions, &n_outputs)| {
                        (1..=6).contains(&n_positions) && n_outputs <= n_positions
                    }));
                    assert_eq!(sized.lengths[..lengths.len()], plan.lengths);
                    assert_eq!(sized.outputs[..plan.outputs.len()], plan.outputs);
                }
            }
        }
    }
}
