//! Training objectives: which events are hidden from the body, and which are predicted.
//!
//! The objectives are those of Transformers4Rec (de Souza Pereira Moreira et al. 2021). Random
//! choices for a session come from the session's own seed, so they do not depend on the other
//! sessions of its batch or on the number of ranks.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::prepare::StepSizes;
use crate::config::Objective;
use crate::data::Batch;

/// The inputs of all positions, the attention mask, the output positions, and their targets.
///
/// `P` positions in all, packed session after session, of which `N` are output positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Positions of each session, `[B]`.
    pub lengths: Vec<usize>,
    /// Input of each position, `[P]`.
    pub inputs: Vec<PositionInput>,
    /// Which positions attend to which.
    pub mask: AttentionMask,
    /// Positions whose states are used, ascending, `[N]`.
    pub outputs: Vec<i64>,
    /// Output positions of each session, `[B]`.
    pub outputs_per_session: Vec<usize>,
    /// The event that each output position predicts, `[N]`; empty if the events are in the future.
    pub targets: Vec<i64>,
}

/// The input of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionInput {
    /// The event with this index in the batch.
    Event(i64),
    /// The learnt mask vector.
    Mask,
    /// Padding, to which Transformers4Rec attends.
    Padding,
}

/// Which positions of its session a position may attend to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttentionMask {
    /// All positions.
    Full,
    /// Itself and the positions before it.
    Causal,
    /// Context positions, with prediction order −1, and positions with a lower order than its own.
    /// `[P]`.
    Permuted(Vec<i64>),
}

impl Objective {
    /// The plan of a training batch.
    pub fn training(&self, batch: &Batch, attends: bool) -> Plan {
        let sessions = batch.lengths.iter().zip(&batch.session_seeds);
        match *self {
            Objective::Causal { drop, reverse } => {
                let events: Vec<_> =
                    sessions.map(|(&n, &seed)| augment(n, drop, reverse, seed)).collect();
                Plan::causal(&batch.lengths, &events)
            }
            Objective::Masked { probability } | Objective::Replaced { probability, .. } => {
                let hidden =
                    sessions.map(|(&n, &seed)| hide(n, probability, seed)).collect::<Vec<_>>();
                Plan::masked(&hidden)
            }
            Objective::Permutation { probability, max_span } => {
                let orders: Vec<_> = sessions
                    .map(|(&n, &seed)| prediction_order(n, probability, max_span, seed))
                    .collect();
                if attends {
                    Plan::permuted(&orders)
                } else {
                    Plan::permuted_causal(&batch.lengths, &orders)
                }
            }
        }
    }

    /// The attention mask when the next event is predicted; a prediction order is left empty.
    pub(super) fn next_mask(&self, attends: bool) -> AttentionMask {
        match self {
            Objective::Causal { .. } => AttentionMask::Causal,
            Objective::Masked { .. } | Objective::Replaced { .. } => AttentionMask::Full,
            Objective::Permutation { .. } if attends => AttentionMask::Permuted(Vec::new()),
            Objective::Permutation { .. } => AttentionMask::Causal,
        }
    }

    /// The plan that predicts the next event of sessions with `lengths` known events.
    ///
    /// An objective with a mask vector appends it as one more position and predicts there; others
    /// predict from the last event.
    pub fn next(&self, lengths: &[usize], attends: bool) -> Plan {
        let mut inputs = Vec::new();
        let mut outputs = Vec::new();
        let mut order = Vec::new();
        let mut event = 0;
        for &length in lengths {
            inputs.extend((event..event + length as i64).map(PositionInput::Event));
            event += length as i64;
            order.extend(std::iter::repeat_n(-1, length));
            if self.masks(attends) {
                inputs.push(PositionInput::Mask);
                order.push(0);
            }
            outputs.push(inputs.len() as i64 - 1);
        }
        let mask = match self.next_mask(attends) {
            AttentionMask::Permuted(_) => AttentionMask::Permuted(order),
            other => other,
        };
        let lengths =
            lengths.iter().map(|length| length + usize::from(self.masks(attends))).collect();
        let outputs_per_session = vec![1; outputs.len()];
        Plan { lengths, inputs, mask, outputs, outputs_per_session, targets: Vec::new() }
    }
}

impl Plan {
    /// Each event is predicted from the state at the event before it. `order`: the events of each
    /// session in reading order, some of which may be left out.
    pub fn causal(lengths: &[usize], order: &[Vec<usize>]) -> Self {
        let mut plan = Self::empty(AttentionMask::Causal);
        let mut first = 0;
        for (&length, order) in lengths.iter().zip(order) {
            // The last event is only a target, the first only an input.
            let n = order.len().saturating_sub(1);
            let event = |&offset: &usize| (first + offset) as i64;
            plan.outputs
                .extend((plan.inputs.len()..plan.inputs.len() + n).map(|position| position as i64));
            plan.targets.extend(order.iter().skip(1).map(event));
            plan.inputs
                .extend(order.iter().take(n).map(|offset| PositionInput::Event(event(offset))));
            plan.lengths.push(n);
            plan.outputs_per_session.push(n);
            first += length;
        }
        plan
    }

    /// The hidden events of each session are predicted at their own positions from all other
    /// events.
    pub fn masked(hidden: &[Vec<bool>]) -> Self {
        let mut plan = Self::empty(AttentionMask::Full);
        for session in hidden {
            let first = plan.inputs.len() as i64;
            let hidden =
                session.iter().zip(first..).filter(|(hidden, _)| **hidden).map(|(_, event)| event);
            plan.outputs.extend(hidden);
            plan.inputs.extend(session.iter().zip(first..).map(|(&is_hidden, event)| {
                if is_hidden { PositionInput::Mask } else { PositionInput::Event(event) }
            }));
            plan.lengths.push(session.len());
            plan.outputs_per_session.push(session.iter().filter(|&&hidden| hidden).count());
        }
        plan.targets.clone_from(&plan.outputs);
        plan
    }

    /// The events with a prediction order of 0 or more are predicted in that order, at their own
    /// positions, from the context and the events predicted earlier.
    pub fn permuted(orders: &[Vec<i64>]) -> Self {
        let hidden: Vec<Vec<bool>> =
            orders.iter().map(|order| order.iter().map(|&order| order >= 0).collect()).collect();
        let mut plan = Self::masked(&hidden);
        // The mask vector is the query of the second stream; the first stream has all events.
        plan.inputs = (0..plan.inputs.len() as i64).map(PositionInput::Event).collect();
        plan.mask = AttentionMask::Permuted(orders.concat());
        plan
    }

    /// The same objective for a recurrence: it reads the context events first, in time order, then
    /// the predicted events in prediction order.
    pub fn permuted_causal(lengths: &[usize], orders: &[Vec<i64>]) -> Self {
        let reading_order = |order: &Vec<i64>| {
            let mut events: Vec<usize> = (0..order.len()).collect();
            // A stable sort: context events, all −1, keep their time order.
            events.sort_by_key(|&event| order[event]);
            events
        };
        let mut plan = Self::causal(lengths, &orders.iter().map(reading_order).collect::<Vec<_>>());
        // A position is an output if the event after it is predicted and not context.
        let is_output: Vec<bool> = orders
            .iter()
            .flat_map(|order| {
                let n_context = order.iter().filter(|&&order| order < 0).count();
                (1..order.len()).map(move |next| next >= n_context)
            })
            .collect();
        let mut kept = is_output.iter();
        plan.outputs.retain(|_| kept.next() == Some(&true));
        let mut kept = is_output.iter();
        plan.targets.retain(|_| kept.next() == Some(&true));
        plan.outputs_per_session =
            orders.iter().map(|order| order.iter().filter(|&&order| order >= 0).count()).collect();
        plan
    }

    /// Every position has its event as input and is an output position.
    pub fn all(lengths: &[usize], mask: AttentionMask) -> Self {
        let n = lengths.iter().sum::<usize>() as i64;
        Self {
            lengths: lengths.to_vec(),
            inputs: (0..n).map(PositionInput::Event).collect(),
            mask,
            outputs: (0..n).collect(),
            outputs_per_session: lengths.to_vec(),
            targets: (0..n).collect(),
        }
    }

    /// The same plan with every session padded to at least `length` positions. Padding is attended
    /// to like events.
    pub fn padded(self, length: usize) -> Self {
        let length = self.lengths.iter().copied().max().unwrap_or(0).max(length);
        let mut inputs = Vec::with_capacity(length * self.lengths.len());
        let mut order = Vec::new();
        let (mut first, mut new_positions) = (0, Vec::with_capacity(self.inputs.len()));
        for (session, &n) in self.lengths.iter().enumerate() {
            new_positions.extend((0..n).map(|i| (session * length + i) as i64));
            inputs.extend_from_slice(&self.inputs[first..first + n]);
            inputs.extend(std::iter::repeat_n(PositionInput::Padding, length - n));
            if let AttentionMask::Permuted(unpadded) = &self.mask {
                order.extend_from_slice(&unpadded[first..first + n]);
                order.extend(std::iter::repeat_n(-1, length - n));
            }
            first += n;
        }
        Self {
            lengths: vec![length; self.lengths.len()],
            inputs,
            mask: match self.mask {
                AttentionMask::Permuted(_) => AttentionMask::Permuted(order),
                other => other,
            },
            outputs: self
                .outputs
                .iter()
                .map(|&position| new_positions[position as usize])
                .collect(),
            ..self
        }
    }

    /// The same plan with sessions of padding behind the others, so that it has the given sizes.
    /// The targets of padding are the event behind the last.
    ///
    /// # Panics
    /// If the plan does not fit: see [`Preparer::sizes`](super::prepare::Preparer::sizes).
    #[must_use]
    pub(super) fn sized(mut self, sizes: &StepSizes) -> Self {
        let missing = |wanted: i64, n: usize| wanted as usize - n;
        let n_sessions = missing(sizes.n_sessions, self.lengths.len());
        let n_positions = missing(sizes.n_positions, self.inputs.len());
        let n_outputs = missing(sizes.n_outputs, self.outputs.len());
        let part =
            |all: usize, session: usize| all / n_sessions + usize::from(session < all % n_sessions);
        for session in 0..n_sessions {
            let first = self.inputs.len() as i64;
            let (n, n_outputs) = (part(n_positions, session), part(n_outputs, session));
            assert!(1 <= n && n as i64 <= sizes.length && n_outputs <= n, "the plan does not fit");
            self.lengths.push(n);
            self.inputs.extend(std::iter::repeat_n(PositionInput::Padding, n));
            if let AttentionMask::Permuted(order) = &mut self.mask {
                order.extend(std::iter::repeat_n(-1, n));
            }
            self.outputs.extend(first..first + n_outputs as i64);
            self.outputs_per_session.push(n_outputs);
            self.targets.extend(std::iter::repeat_n(sizes.n_events, n_outputs));
        }
        self
    }

    fn empty(mask: AttentionMask) -> Self {
        Self {
            lengths: Vec::new(),
            inputs: Vec::new(),
            mask,
            outputs: Vec::new(),
            outputs_per_session: Vec::new(),
            targets: Vec::new(),
        }
    }
}

/// Data augmentation for the causal objective: the reading order of `n` events. Each event is
/// dropped with probability `drop` while more than two are left, and the order is reversed with
/// probability `reverse`.
pub fn augment(n: usize, drop: f64, reverse: f64, seed: u64) -> Vec<usize> {
    let mut events: Vec<usize> = (0..n).collect();
    if drop == 0.0 && reverse == 0.0 {
        return events;
    }
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut n_left = n;
    events.retain(|_| {
        // The generator draws first, so that every event takes one draw.
        let is_dropped = generator.random_bool(drop) && n_left > 2;
        n_left -= usize::from(is_dropped);
        !is_dropped
    });
    if generator.random_bool(reverse) {
        events.reverse();
    }
    events
}

/// Which of `n` events are hidden: each with `probability`, at least one, and never all. A single
/// event is not hidden.
pub fn hide(n: usize, probability: f64, seed: u64) -> Vec<bool> {
    if n < 2 {
        return vec![false; n];
    }
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut hidden: Vec<bool> = (0..n).map(|_| generator.random_bool(probability)).collect();
    hidden[generator.random_range(0..n)] = true;
    if hidden.iter().all(|&hidden| hidden) {
        hidden[generator.random_range(0..n)] = false;
    }
    hidden
}

/// The prediction order of `n` events, −1 for context events, which are not predicted.
///
/// As in XLNet, the session is cut into stretches. A stretch holds one predicted span of 1 to
/// `max_span` events and is `1 / probability` times as long as its span. At least one event is
/// predicted, and at least one is context.
pub fn prediction_order(n: usize, probability: f64, max_span: usize, seed: u64) -> Vec<i64> {
    if n < 2 {
        return vec![-1; n];
    }
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut predicted = vec![false; n];
    let mut first = 0;
    while first < n {
        let span = generator.random_range(1..=max_span);
        let stretch = (span as f64 / probability) as usize;
        let start = first + generator.random_range(0..=stretch - span);
        predicted[start.min(n)..(start + span).min(n)].fill(true);
        first += stretch;
    }
    if predicted.iter().all(|&predicted| !predicted) {
        predicted[generator.random_range(0..n)] = true;
    }
    if predicted.iter().all(|&predicted| predicted) {
        predicted[generator.random_range(0..n)] = false;
    }
    let mut order = vec![-1; n];
    let mut left: Vec<usize> = (0..n).filter(|&i| predicted[i]).collect();
    for rank in 0..left.len() as i64 {
        order[left.swap_remove(generator.random_range(0..left.len()))] = rank;
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_least_one_event_is_hidden_and_never_all() {
        let mut n_hidden = 0;
        let mut n_events = 0;
        for seed in 0..100_000u64 {
            let n = 2 + (seed % 19) as usize;
            let hidden = hide(n, 0.15, seed);
            let count = hidden.iter().filter(|&&hidden| hidden).count();
            assert!(hidden.len() == n && 0 < count && count < n);
            n_hidden += count;
            n_events += n;
        }
        // 1 + 0.15 (n − 1) of n events, slightly less in short sessions, where one event is shown
        // again if all were hidden.
        let expected: f64 = (0..100_000).map(|seed| 1.0 + 0.15 * f64::from(1 + seed % 19)).sum();
        let rate = n_hidden as f64 / expected;
        assert!((0.98..1.002).contains(&rate), "{rate} of {expected} among {n_events}");
        assert_eq!(hide(1, 0.15, 3), [false]);
        assert!(hide(0, 0.15, 3).is_empty());
    }

    #[test]
    fn augmentation_drops_and_reverses_with_the_given_probabilities() {
        let (mut n_kept, mut n_reversed) = (0, 0);
        for seed in 0..20_000 {
            let events = augment(10, 0.25, 0.5, seed);
            assert!(events.len() >= 2 && (events.is_sorted() || events.is_sorted_by(|a, b| a > b)));
            n_kept += events.len();
            n_reversed += usize::from(events[0] > events[1]);
            assert_eq!(augment(2, 0.9, 0.0, seed), [0, 1]);
        }
        assert!((n_kept as f64 / 2e5 - 0.75).abs() < 0.005, "{n_kept}");
        assert!((n_reversed as f64 / 2e4 - 0.5).abs() < 0.02, "{n_reversed}");
        assert_eq!(augment(4, 0.0, 0.0, 1), [0, 1, 2, 3]);
        let plan = Plan::causal(&[3, 4], &[vec![0, 1, 2], vec![3, 0]]);
        assert_eq!(
            (&plan.lengths[..], &plan.targets[..], &plan.outputs[..]),
            (&[2, 1][..], &[1, 2, 3][..], &[0, 1, 2][..])
        );
        assert_eq!(plan.inputs, [0, 1, 6].map(PositionInput::Event));
    }

    #[test]
    fn every_position_is_hidden_equally_often() {
        let mut counts = [0; 5];
        for seed in 0..100_000 {
            hide(5, 0.15, seed)
                .iter()
                .zip(&mut counts)
                .for_each(|(&hidden, n)| *n += i64::from(hidden));
        }
        for n in counts {
            // 0.15 + 0.85 / 5, within the correction for all five hidden plus five standard
            // deviations.
            assert!((n as f64 / 1e5 - 0.32).abs() < 0.008, "{counts:?}");
        }
    }

    #[test]
    fn a_prediction_order_permutes_some_but_not_all_events() {
        let mut n_predicted = 0;
        for seed in 0..20_000u64 {
            let n = 2 + (seed % 19) as usize;
            let order = prediction_order(n, 1.0 / 6.0, 5, seed);
            let mut ranks: Vec<i64> = order.iter().copied().filter(|&rank| rank >= 0).collect();
            ranks.sort_unstable();
            assert!(ranks.iter().copied().eq(0..ranks.len() as i64));
            assert!(!ranks.is_empty() && ranks.len() < n);
            n_predicted += ranks.len();
        }
        assert!(n_predicted > 20_000);
    }

    #[test]
    fn padding_moves_the_output_positions() {
        let plan = Plan::masked(&[vec![false, true], vec![true, false, false]]).padded(4);
        assert_eq!(plan.lengths, [4, 4]);
        assert_eq!(plan.outputs, [1, 4]);
        assert_eq!(plan.targets, [1, 2]);
        use PositionInput::{Event, Mask, Padding};
        assert_eq!(
            plan.inputs,
            [Event(0), Mask, Padding, Padding, Mask, Event(3), Event(4), Padding]
        );
    }
}
