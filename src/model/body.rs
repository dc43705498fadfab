//! The sequence model between event vectors and states, a GRU or an XLNet, and the layout of
//! positions that both run over.

use tch::{Kind, Tensor};

use super::Objective;
use super::objective::{AttentionMask, Plan, PositionInput};
use super::prepare::StepSizes;
use super::rows::take_rows;
use super::{Gru, Parameters, Xlnet};
use crate::data::{Batch, DropoutGenerator};

pub enum Body {
    Gru(Gru),
    Xlnet(Xlnet),
}

impl Body {
    /// Positions `x: [P, D]` → the output states of `layout`, `[N, D]`. `query: [1, D]`: the
    /// initial state of the second stream, for an objective with two streams. A GRU ignores it.
    pub(super) fn states(
        &self,
        parameters: &Parameters,
        x: Tensor,
        query: Option<Tensor>,
        layout: &Layout,
        dropout: Option<&mut DropoutGenerator>,
    ) -> Tensor {
        match self {
            Body::Gru(gru) => gru.states(parameters, x, layout, dropout),
            Body::Xlnet(xlnet) => xlnet.states(parameters, x, query, layout, dropout),
        }
    }
}

/// The positions of a batch in a `[B, L]` rectangle, their inputs, and the attention mask.
///
/// [`Layout::new`] packs positions: only cells with a position are computed. [`Layout::next`] is
/// for a trace, which must serve any number of sessions and gets their lengths as a tensor. Its
/// positions fill the rectangle, and every size that depends on the batch is −1. The other methods
/// work for both.
pub struct Layout {
    /// `B`, or −1.
    n_sessions: i64,
    /// Longest session in positions, `L`.
    pub length: i64,
    /// Input of each position, i64 `[P]`: the row of an event in `[T]`, of the padding, `T`, or of
    /// the mask, `T + 1`.
    pub(super) input_rows: Tensor,
    /// Cell `session * L + offset` of each position, i64 `[P]`; `None` if every cell has a
    /// position.
    cells: Option<Tensor>,
    /// Positions of each session, i64 `[B]`; `None` if all sessions have `L`.
    lengths: Option<Tensor>,
    mask: LayoutMask,
    /// Cell of each output position, i64 `[N]`.
    pub output_cells: Tensor,
    /// Session of each output position, i64 `[N]`.
    output_sessions: Tensor,
    /// Offset of each output position in its session, i64 `[N]`.
    output_offsets: Tensor,
    /// The output positions, i64 `[N]`.
    pub outputs: Tensor,
    /// Largest number of output positions of a session, `R`.
    max_outputs: i64,
    /// Slot `session * R + number` of each output position, i64 `[N]`; `None` if all sessions have
    /// `R` output positions.
    output_slots: Option<Tensor>,
    /// Whether every position is an output position.
    pub all_are_outputs: bool,
    /// The positions in time order, for a recurrence on a CPU.
    pub(super) packed_sequence: Option<PackedSequence>,
    /// Of positions, outputs and sessions, in training.
    pub(super) row_keys: Option<RowKeys>,
}

/// Keys of rows for dropout: see [`Batch::row_keys`].
pub(super) struct RowKeys {
    /// i32 `[P]`.
    pub positions: Tensor,
    /// i32 `[N]`.
    pub outputs: Tensor,
    /// i32 `[B]`.
    pub sessions: Tensor,
}

/// Positions in the order in which a recurrence without padding computes them, as in PyTorch's
/// `PackedSequence`: the first positions of all sessions, longest session first, then the second
/// positions, and so on.
pub(super) struct PackedSequence {
    /// The positions in this order, i64 `[P]`.
    pub positions: Tensor,
    /// Number of sessions with a position at each of the `L` steps.
    pub n_sessions: Vec<i64>,
    /// Index of each output position in this order, i64 `[N]`.
    pub outputs: Tensor,
}

impl PackedSequence {
    fn new(plan: &Plan) -> Self {
        // (length, first position)
        let mut sessions: Vec<(usize, usize)> = Vec::with_capacity(plan.lengths.len());
        let mut first = 0;
        for &length in &plan.lengths {
            sessions.push((length, first));
            first += length;
        }
        sessions.sort_by_key(|&(length, _)| std::cmp::Reverse(length));
        let (mut positions, mut n_sessions) = (Vec::with_capacity(first), Vec::new());
        let mut index_of_position = vec![0i64; first];
        for step in 0..sessions.first().map_or(0, |&(longest, _)| longest) {
            let n = sessions.partition_point(|&(length, _)| length > step);
            for (_, first) in &sessions[..n] {
                index_of_position[first + step] = positions.len() as i64;
                positions.push((first + step) as i64);
            }
            n_sessions.push(n as i64);
        }
        let outputs = plan.outputs.iter().map(|&position| index_of_position[position as usize]);
        let outputs: Vec<i64> = outputs.collect();
        Self {
            positions: Tensor::from_slice(&positions),
            n_sessions,
            outputs: Tensor::from_slice(&outputs),
        }
    }
}

/// An [`AttentionMask`] on the device of the model.
enum LayoutMask {
    Full,
    Causal,
    /// Prediction order of each cell, i64 `[B, L]`; −1 for context.
    Permuted(Tensor),
}

impl Layout {
    /// Packs the positions of `plan` in host memory. `n_events`: of the batch that the plan was
    /// made for. With `sizes`, whose plan it is, all sizes are theirs.
    pub fn new(plan: &Plan, n_events: i64, sizes: Option<&StepSizes>) -> Self {
        let longest = |of: &[usize]| of.iter().copied().max().unwrap_or(0);
        let [length, max_outputs] = match sizes {
            Some(sizes) => [sizes.length as usize; 2],
            None => [longest(&plan.lengths), longest(&plan.outputs_per_session)],
        };
        let cells: Vec<i64> = plan
            .lengths
            .iter()
            .enumerate()
            .flat_map(|(session, &n)| (0..n).map(move |offset| (session * length + offset) as i64))
            .collect();
        let output_cells: Vec<i64> =
            plan.outputs.iter().map(|&position| cells[position as usize]).collect();
        let input_rows: Vec<i64> = plan
            .inputs
            .iter()
            .map(|input| match input {
                PositionInput::Event(event) => *event,
                PositionInput::Padding => n_events,
                PositionInput::Mask => n_events + 1,
            })
            .collect();
        let slots = plan.outputs_per_session.iter().enumerate();
        let slots: Vec<i64> = slots
            .flat_map(|(session, &n)| {
                (0..n).map(move |number| (session * max_outputs + number) as i64)
            })
            .collect();
        let fills_slots = sizes.is_none() && slots.len() == plan.lengths.len() * max_outputs;
        let are_equal = sizes.is_none() && plan.lengths.iter().all(|&n| n == length);
        let lengths: Vec<i64> = plan.lengths.iter().map(|&n| n as i64).collect();
        let numbers = |numbers: &[i64]| Tensor::from_slice(numbers);
        let mut layout = Self {
            n_sessions: plan.lengths.len() as i64,
            length: length as i64,
            input_rows: numbers(&input_rows),
            cells: (!are_equal).then(|| numbers(&cells)),
            lengths: (!are_equal).then(|| numbers(&lengths)),
            mask: LayoutMask::Full,
            output_sessions: numbers(&quotients(&output_cells, length)),
            output_offsets: numbers(&remainders(&output_cells, length)),
            output_cells: numbers(&output_cells),
            outputs: numbers(&plan.outputs),
            max_outputs: max_outputs as i64,
            output_slots: (!fills_slots).then(|| numbers(&slots)),
            all_are_outputs: plan.outputs.len() == plan.inputs.len(),
            packed_sequence: None,
            row_keys: None,
        };
        layout.mask = match &plan.mask {
            AttentionMask::Full => LayoutMask::Full,
            AttentionMask::Causal => LayoutMask::Causal,
            AttentionMask::Permuted(order) => {
                LayoutMask::Permuted(layout.pad(&numbers(order).unsqueeze(1)).squeeze_dim(2))
            }
        };
        layout
    }

    /// Adds the order of a recurrence without padding.
    #[must_use]
    pub(super) fn with_packed_sequence(self, plan: &Plan) -> Self {
        Self { packed_sequence: Some(PackedSequence::new(plan)), ..self }
    }

    /// Adds the keys that dropout needs.
    #[must_use]
    pub(super) fn with_row_keys(self, plan: &Plan, batch: &Batch) -> Self {
        // The plan may have sessions of padding behind those of the batch.
        let keys = |per_session: &[usize]| {
            let mut keys = batch.row_keys(&per_session[..batch.n_sessions()]);
            keys.resize(per_session.iter().sum(), 0);
            Tensor::from_slice(&keys)
        };
        let row_keys = RowKeys {
            positions: keys(&plan.lengths),
            outputs: keys(&plan.outputs_per_session),
            sessions: keys(&vec![1; plan.lengths.len()]),
        };
        Self { row_keys: Some(row_keys), ..self }
    }

    /// The same layout for another thread.
    pub(super) fn share(&self) -> Self {
        let share = |x: &Option<Tensor>| x.as_ref().map(Tensor::shallow_clone);
        Self {
            input_rows: self.input_rows.shallow_clone(),
            cells: share(&self.cells),
            lengths: share(&self.lengths),
            mask: match &self.mask {
                LayoutMask::Full => LayoutMask::Full,
                LayoutMask::Causal => LayoutMask::Causal,
                LayoutMask::Permuted(order) => LayoutMask::Permuted(order.shallow_clone()),
            },
            output_cells: self.output_cells.shallow_clone(),
            output_sessions: self.output_sessions.shallow_clone(),
            output_offsets: self.output_offsets.shallow_clone(),
            outputs: self.outputs.shallow_clone(),
            output_slots: share(&self.output_slots),
            packed_sequence: self.packed_sequence.as_ref().map(|sequence| PackedSequence {
                positions: sequence.positions.shallow_clone(),
                n_sessions: sequence.n_sessions.clone(),
                outputs: sequence.outputs.shallow_clone(),
            }),
            row_keys: self.row_keys.as_ref().map(|keys| RowKeys {
                positions: keys.positions.shallow_clone(),
                outputs: keys.outputs.shallow_clone(),
                sessions: keys.sessions.shallow_clone(),
            }),
            ..*self
        }
    }

    /// All tensors, to be sent to a device together.
    pub(super) fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let mut tensors = vec![
            &mut self.input_rows,
            &mut self.output_cells,
            &mut self.output_sessions,
            &mut self.output_offsets,
            &mut self.outputs,
        ];
        tensors.extend(&mut self.cells);
        tensors.extend(&mut self.lengths);
        tensors.extend(&mut self.output_slots);
        if let LayoutMask::Permuted(order) = &mut self.mask {
            tensors.push(order);
        }
        if let Some(sequence) = &mut self.packed_sequence {
            tensors.extend([&mut sequence.positions, &mut sequence.outputs]);
        }
        if let Some(keys) = &mut self.row_keys {
            tensors.extend([&mut keys.positions, &mut keys.outputs, &mut keys.sessions]);
        }
        tensors
    }

    /// The layout of [`Objective::next`] for a trace: one output position per session, after its
    /// last event. Session lengths (i64 `[B]`, at least 1) are known only when the model runs.
    ///
    /// Events are in padded columns `[B, width]`. Positions after the end of a session read the
    /// padding item. With a `padded_length`, sessions are padded to it, and attention includes
    /// these positions.
    pub fn next(
        objective: &Objective,
        attends: bool,
        lengths: &Tensor,
        width: i64,
        padded_length: Option<i64>,
    ) -> Self {
        let masks = objective.masks(attends);
        let length = (width + i64::from(masks)).max(padded_length.unwrap_or(0));
        let ends = lengths.unsqueeze(1);
        let session = lengths.ones_like().cumsum(0, Kind::Int64) - 1;
        let offsets = Tensor::arange(length, (Kind::Int64, lengths.device())).unsqueeze(0);
        let event = session.unsqueeze(1) * width + &offsets;
        let padding = lengths.ones_like().sum(Kind::Int64) * width;
        let after_end = if masks {
            (&padding + 1).where_self(&offsets.eq_tensor(&ends), &padding)
        } else {
            padding
        };
        let input_rows = event.where_self(&offsets.lt_tensor(&ends), &after_end).reshape([-1]);
        let output_offsets = if masks { lengths.shallow_clone() } else { lengths - 1 };
        let output_cells = &session * length + &output_offsets;
        let mask = match objective.next_mask(attends) {
            AttentionMask::Full => LayoutMask::Full,
            AttentionMask::Causal => LayoutMask::Causal,
            // The mask is predicted first, with order 0; all events are context, with order −1.
            AttentionMask::Permuted(_) => {
                LayoutMask::Permuted(offsets.eq_tensor(&ends).to_kind(Kind::Int64) - 1)
            }
        };
        Self {
            n_sessions: -1,
            length,
            input_rows,
            cells: None,
            lengths: padded_length.is_none().then(|| lengths + i64::from(masks)),
            mask,
            outputs: output_cells.shallow_clone(),
            output_sessions: session,
            output_offsets,
            max_outputs: 1,
            output_slots: None,
            output_cells,
            all_are_outputs: false,
            packed_sequence: None,
            row_keys: None,
        }
    }

    /// `x: [P, D]` → `[B, L, D]`, zero in cells without a position.
    pub fn pad(&self, x: &Tensor) -> Tensor {
        let padded = scatter_rows(x, &self.cells, self.n_sessions * self.length);
        padded.view([self.n_sessions, self.length, x.size()[1]])
    }

    /// `x: [B, L, D]` → `[P, D]`.
    pub fn pack(&self, x: &Tensor) -> Tensor {
        gather_rows(x.reshape([-1, x.size()[2]]), &self.cells)
    }

    /// Groups rows of output positions by session: `x: [N, H, D]` → `[B, H, R, D]`, zero in unused
    /// slots.
    pub fn pad_outputs(&self, x: &Tensor) -> Tensor {
        let slots = scatter_rows(x, &self.output_slots, self.n_sessions * self.max_outputs);
        slots.view([-1, self.max_outputs, x.size()[1], x.size()[2]]).transpose(1, 2)
    }

    /// The inverse of [`Layout::pad_outputs`]: `x: [B, H, R, D]` → `[N, H, D]`.
    pub fn pack_outputs(&self, x: &Tensor) -> Tensor {
        gather_rows(x.transpose(1, 2).flatten(0, 1), &self.output_slots)
    }

    /// Attention mask between positions, bool `[B or 1, L, L]` as (session, query, key): true where
    /// the query must not attend to the key. A position always attends to itself. `None` if nothing
    /// is masked.
    pub fn attention_mask(&self) -> Option<Tensor> {
        let offsets = Tensor::arange(self.length, (Kind::Int64, self.input_rows.device()));
        let (query, key) = (offsets.view([1, -1, 1]), offsets.view([1, 1, -1]));
        let mask = match &self.mask {
            LayoutMask::Full => self.padding()?.unsqueeze(1),
            // Padding follows the last event, so the causal mask covers it.
            LayoutMask::Causal => key.gt_tensor(&query),
            LayoutMask::Permuted(order) => {
                let later = is_unavailable(&order.unsqueeze(1), &order.unsqueeze(2));
                let mask = later.logical_and(&key.ne_tensor(&query));
                self.padding()
                    .map_or(mask.shallow_clone(), |padding| mask.logical_or(&padding.unsqueeze(1)))
            }
        };
        Some(mask.expand([-1, self.length, self.length], false))
    }

    /// Attention mask from output positions, bool `[N, L]`: true where the output position must not
    /// attend to the key. In a permuted order it does not attend to itself, because it predicts its
    /// own event.
    pub fn output_mask(&self) -> Option<Tensor> {
        let sessions = &self.output_sessions;
        let padding = self.padding().map(|padding| padding.index_select(0, sessions));
        match &self.mask {
            LayoutMask::Full => padding,
            LayoutMask::Causal => {
                let key = Tensor::arange(self.length, (Kind::Int64, self.input_rows.device()))
                    .unsqueeze(0);
                Some(key.gt_tensor(&self.output_offsets().unsqueeze(1)))
            }
            LayoutMask::Permuted(order) => {
                let query_order =
                    order.reshape([-1]).index_select(0, &self.output_cells).unsqueeze(1);
                let mask = is_unavailable(&order.index_select(0, sessions), &query_order);
                Some(padding.map_or(mask.shallow_clone(), |padding| mask.logical_or(&padding)))
            }
        }
    }

    /// Offset of each output position in its session, i64 `[N]`.
    pub fn output_offsets(&self) -> &Tensor {
        &self.output_offsets
    }

    /// Whether the number of sessions is not known.
    pub fn is_traced(&self) -> bool {
        self.n_sessions < 0
    }

    /// Cells after the end of their session, bool `[B, L]`; `None` if all sessions have `L`
    /// positions.
    fn padding(&self) -> Option<Tensor> {
        let lengths = self.lengths.as_ref()?;
        let offsets = Tensor::arange(self.length, (Kind::Int64, lengths.device()));
        Some(offsets.unsqueeze(0).ge_tensor(&lengths.unsqueeze(1)))
    }
}

/// Session of each cell of a rectangle with rows of `length`.
fn quotients(cells: &[i64], length: usize) -> Vec<i64> {
    cells.iter().map(|cell| cell / (length as i64).max(1)).collect()
}

/// Offset in its session of each cell.
fn remainders(cells: &[i64], length: usize) -> Vec<i64> {
    cells.iter().map(|cell| cell % (length as i64).max(1)).collect()
}

/// Whether the event of a key is unknown when the query is predicted: it is not context, and its
/// prediction does not come earlier.
fn is_unavailable(key_order: &Tensor, query_order: &Tensor) -> Tensor {
    key_order.ge(0).logical_and(&key_order.ge_tensor(query_order))
}

/// Puts the rows of `x: [P, ..]` at `indices` into `n` rows, zero elsewhere: `[n, ..]`. Without
/// indices `x` has `n` rows already.
fn scatter_rows(x: &Tensor, indices: &Option<Tensor>, n: i64) -> Tensor {
    let Some(indices) = indices else { return x.shallow_clone() };
    let size = [&[n], &x.size()[1..]].concat();
    x.new_zeros(size, (x.kind(), x.device())).index_copy_(0, indices, x)
}

/// The inverse of [`scatter_rows`]: `x: [n, ..]` → `[P, ..]`.
fn gather_rows(x: Tensor, indices: &Option<Tensor>) -> Tensor {
    match indices {
        Some(indices) => take_rows(&x, indices),
        None => x,
    }
}
