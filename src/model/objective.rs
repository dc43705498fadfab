//! What is hidden from a session, and what is to be predicted from the rest.
//!
//! Objectives are those of Transformers4Rec (de Souza Pereira Moreira et al. 2021). Whatever is drawn for a session is
//! drawn from that session's own seed, so that it does not depend on the company in which the session is seen.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::config::check_finite;
use crate::data::Batch;

/// `[model.objective]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// Every event is predicted from those before it.
    Causal {
        /// Probability with which an event is left out of what is learnt from a session in an epoch (Tan et al. 2016).
        #[serde(default)]
        drop: f64,
        /// Probability with which a session is read from its end to its beginning in an epoch: what was seen together
        /// counts in either order.
        #[serde(default)]
        reverse: f64,
    },
    /// Masked item modelling: some events are hidden behind a learnt vector and predicted from all others (Devlin et
    /// al. 2019, Sun et al. 2019).
    Masked {
        /// With which probability an event is hidden.
        #[serde(default = "mask_probability")]
        probability: f64,
    },
    /// Permutation: spans of events are predicted in a random order, each from the events outside the spans and those
    /// before it in that order (Yang et al. 2019). A body that reads forward reads them in that order.
    Permutation {
        /// Share of the events that are predicted, about.
        #[serde(default = "permutation_probability")]
        probability: f64,
        /// Longest span.
        #[serde(default = "max_span")]
        max_span: usize,
    },
    /// Replaced-item detection on top of masked item modelling: hidden events are filled with what the model itself
    /// predicts there, and for every event it must tell whether it is the original (Clark et al. 2020, with one network
    /// in both roles).
    Replaced {
        /// With which probability an event is hidden.
        #[serde(default = "mask_probability")]
        probability: f64,
        /// Weight of an event's detection loss beside a hidden event's prediction loss.
        #[serde(default = "detection_weight")]
        weight: f64,
    },
}

fn mask_probability() -> f64 {
    0.15
}

fn permutation_probability() -> f64 {
    1.0 / 6.0
}

fn max_span() -> usize {
    5
}

fn detection_weight() -> f64 {
    1.0
}

/// Which events the body sees at which positions, which states are read, and what these are to predict.
///
/// `P` positions in all, packed session after session, of which `N` are read.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Positions of each session, `[B]`.
    pub lengths: Vec<usize>,
    /// What stands at each position, `[P]`.
    pub shown: Vec<Shown>,
    /// Who may attend to whom.
    pub visible: Visible,
    /// Positions that are read, ascending, `[N]`.
    pub reads: Vec<i64>,
    /// Reads of each session, `[B]`.
    pub reads_per_session: Vec<usize>,
    /// The event that each read position predicts, `[N]`; none where the next one is not known yet.
    pub targets: Vec<i64>,
}

/// What stands at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// The event of this number in the batch.
    Event(i64),
    /// The mask.
    Mask,
    /// Padding, where the original's attention reads it.
    Padding,
}

/// Which positions of its session a position may attend to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Visible {
    /// All.
    All,
    /// Itself and those before it.
    Before,
    /// Those without a place in the order of prediction (−1), and those with an earlier place than its own. `[P]`.
    Order(Vec<i64>),
}

impl Objective {
    /// Causal, over whole sessions as they are.
    pub fn causal() -> Self {
        Objective::Causal { drop: 0.0, reverse: 0.0 }
    }

    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Says which key is wrong.
    pub fn check(&self) -> Result<(), String> {
        let probability = match *self {
            Objective::Causal { drop, reverse } => {
                let shares = [("drop", drop), ("reverse", reverse)];
                return match shares.iter().find(|(_, p)| !(0.0..1.0).contains(p)) {
                    Some((key, p)) => Err(format!("`objective.{key}` {p:?} is not within 0 <= p < 1")),
                    None => Ok(()),
                };
            }
            Objective::Permutation { max_span: max_span @ (0 | 65_537..), .. } => {
                return Err(format!("`objective.max_span` cannot be {max_span}"));
            }
            Objective::Replaced { weight, .. } if check_finite("", weight, 0.0).is_err() => {
                return Err(format!("`objective.weight` cannot be {weight:?}"));
            }
            Objective::Masked { probability }
            | Objective::Permutation { probability, .. }
            | Objective::Replaced { probability, .. } => probability,
        };
        if (f64::MIN_POSITIVE..1e-6).contains(&probability) {
            return Err(format!("`objective.probability` {probability:?} is less than 0.000001"));
        }
        if !(probability > 0.0 && probability < 1.0) {
            return Err(format!("`objective.probability` {probability:?} is not within 0 < p < 1"));
        }
        Ok(())
    }

    /// What the literature calls it.
    pub fn short_name(&self) -> &'static str {
        match self {
            Objective::Causal { .. } => "CLM",
            Objective::Masked { .. } => "MLM",
            Objective::Permutation { .. } => "PLM",
            Objective::Replaced { .. } => "RTD",
        }
    }

    /// Whether positions may be hidden behind the mask. `attends`: whether the body attends to positions in any order,
    /// or reads forward only.
    pub fn masks(&self, attends: bool) -> bool {
        match self {
            Objective::Causal { .. } => false,
            Objective::Permutation { .. } => attends,
            Objective::Masked { .. } | Objective::Replaced { .. } => true,
        }
    }

    /// Whether the prediction of an event must not see that event while others do.
    pub fn two_streams(&self) -> bool {
        matches!(self, Objective::Permutation { .. })
    }

    /// What is learnt from a batch.
    pub fn training(&self, batch: &Batch, attends: bool) -> Plan {
        let draws = batch.lengths.iter().zip(&batch.session_seeds);
        match *self {
            Objective::Causal { drop, reverse } => {
                let read: Vec<_> = draws.map(|(&n, &seed)| reading(n, drop, reverse, seed)).collect();
                Plan::causal(&batch.lengths, &read)
            }
            Objective::Masked { probability } | Objective::Replaced { probability, .. } => {
                let hidden = draws.map(|(&n, &seed)| hide(n, probability, seed)).collect::<Vec<_>>();
                Plan::masked(&hidden)
            }
            Objective::Permutation { probability, max_span } => {
                let orders: Vec<_> =
                    draws.map(|(&n, &seed)| prediction_order(n, probability, max_span, seed)).collect();
                if attends { Plan::permuted(&orders) } else { Plan::read_in_order(&batch.lengths, &orders) }
            }
        }
    }

    /// Who may attend to whom where the next event is predicted; an order is left open.
    pub(super) fn sight_of_next(&self, attends: bool) -> Visible {
        match self {
            Objective::Causal { .. } => Visible::Before,
            Objective::Masked { .. } | Objective::Replaced { .. } => Visible::All,
            Objective::Permutation { .. } if attends => Visible::Order(Vec::new()),
            Objective::Permutation { .. } => Visible::Before,
        }
    }

    /// Predicts what follows sessions of these lengths, all of which is known.
    pub fn next(&self, lengths: &[usize], attends: bool) -> Plan {
        let mut shown = Vec::new();
        let mut reads = Vec::new();
        let mut order = Vec::new();
        let mut event = 0;
        for &length in lengths {
            shown.extend((event..event + length as i64).map(Shown::Event));
            event += length as i64;
            order.extend(std::iter::repeat_n(-1, length));
            if self.masks(attends) {
                shown.push(Shown::Mask);
                order.push(0);
            }
            reads.push(shown.len() as i64 - 1);
        }
        let visible = match self.sight_of_next(attends) {
            Visible::Order(_) => Visible::Order(order),
            other => other,
        };
        let lengths = lengths.iter().map(|length| length + usize::from(self.masks(attends))).collect();
        let reads_per_session = vec![1; reads.len()];
        Plan { lengths, shown, visible, reads, reads_per_session, targets: Vec::new() }
    }
}

impl Plan {
    /// Every event but the first that is read is predicted from the state after the one read before it. `read`: which
    /// events of each session are read, in which order.
    pub fn causal(lengths: &[usize], read: &[Vec<usize>]) -> Self {
        let mut plan = Self::empty(Visible::Before);
        let mut first = 0;
        for (&length, read) in lengths.iter().zip(read) {
            let n = read.len().saturating_sub(1);
            let event = |&place: &usize| (first + place) as i64;
            plan.reads.extend((plan.shown.len()..plan.shown.len() + n).map(|position| position as i64));
            plan.targets.extend(read.iter().skip(1).map(event));
            plan.shown.extend(read.iter().take(n).map(|place| Shown::Event(event(place))));
            plan.lengths.push(n);
            plan.reads_per_session.push(n);
            first += length;
        }
        plan
    }

    /// The hidden events of each session are predicted where they stand, from all that is not hidden.
    pub fn masked(hidden: &[Vec<bool>]) -> Self {
        let mut plan = Self::empty(Visible::All);
        for session in hidden {
            let first = plan.shown.len() as i64;
            let hidden = session.iter().zip(first..).filter(|(hidden, _)| **hidden).map(|(_, event)| event);
            plan.reads.extend(hidden);
            plan.shown.extend(
                session
                    .iter()
                    .zip(first..)
                    .map(|(&h, event)| if h { Shown::Mask } else { Shown::Event(event) }),
            );
            plan.lengths.push(session.len());
            plan.reads_per_session.push(session.iter().filter(|&&hidden| hidden).count());
        }
        plan.targets.clone_from(&plan.reads);
        plan
    }

    /// The events that have a place in their session's order are predicted in that order.
    pub fn permuted(orders: &[Vec<i64>]) -> Self {
        let hidden: Vec<Vec<bool>> =
            orders.iter().map(|order| order.iter().map(|&place| place >= 0).collect()).collect();
        let mut plan = Self::masked(&hidden);
        plan.shown = (0..plan.shown.len() as i64).map(Shown::Event).collect();
        plan.visible = Visible::Order(orders.concat());
        plan
    }

    /// The same for a body that reads forward only: it reads the other events first, as they came, then these in their
    /// order.
    pub fn read_in_order(lengths: &[usize], orders: &[Vec<i64>]) -> Self {
        let read_first = |order: &Vec<i64>| {
            let mut read: Vec<usize> = (0..order.len()).collect();
            read.sort_by_key(|&event| order[event]);
            read
        };
        let mut plan = Self::causal(lengths, &orders.iter().map(read_first).collect::<Vec<_>>());
        // A position is read if the event behind it has a place in the order.
        let is_read: Vec<bool> = orders
            .iter()
            .flat_map(|order| {
                let n_others = order.iter().filter(|&&place| place < 0).count();
                (1..order.len()).map(move |next| next >= n_others)
            })
            .collect();
        let mut kept = is_read.iter();
        plan.reads.retain(|_| kept.next() == Some(&true));
        let mut kept = is_read.iter();
        plan.targets.retain(|_| kept.next() == Some(&true));
        plan.reads_per_session =
            orders.iter().map(|order| order.iter().filter(|&&place| place >= 0).count()).collect();
        plan
    }

    /// Every event is shown and read.
    pub fn all(lengths: &[usize], visible: Visible) -> Self {
        let n = lengths.iter().sum::<usize>() as i64;
        Self {
            lengths: lengths.to_vec(),
            shown: (0..n).map(Shown::Event).collect(),
            visible,
            reads: (0..n).collect(),
            reads_per_session: lengths.to_vec(),
            targets: (0..n).collect(),
        }
    }

    /// The same with padding behind every session up to `length` positions, which is attended to like events.
    pub fn padded(self, length: usize) -> Self {
        let length = self.lengths.iter().copied().max().unwrap_or(0).max(length);
        let mut shown = Vec::with_capacity(length * self.lengths.len());
        let mut order = Vec::new();
        let (mut first, mut new_place) = (0, Vec::with_capacity(self.shown.len()));
        for (session, &n) in self.lengths.iter().enumerate() {
            new_place.extend((0..n).map(|i| (session * length + i) as i64));
            shown.extend_from_slice(&self.shown[first..first + n]);
            shown.extend(std::iter::repeat_n(Shown::Padding, length - n));
            if let Visible::Order(of) = &self.visible {
                order.extend_from_slice(&of[first..first + n]);
                order.extend(std::iter::repeat_n(-1, length - n));
            }
            first += n;
        }
        Self {
            lengths: vec![length; self.lengths.len()],
            shown,
            visible: match self.visible {
                Visible::Order(_) => Visible::Order(order),
                other => other,
            },
            reads: self.reads.iter().map(|&read| new_place[read as usize]).collect(),
            ..self
        }
    }

    fn empty(visible: Visible) -> Self {
        Self {
            lengths: Vec::new(),
            shown: Vec::new(),
            visible,
            reads: Vec::new(),
            reads_per_session: Vec::new(),
            targets: Vec::new(),
        }
    }
}

/// Which of `n` events are read, in which order: all, but each left out with probability `drop` as long as two are left,
/// from the last to the first with probability `reverse`.
pub fn reading(n: usize, drop: f64, reverse: f64, seed: u64) -> Vec<usize> {
    let mut read: Vec<usize> = (0..n).collect();
    if drop == 0.0 && reverse == 0.0 {
        return read;
    }
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut n_left = n;
    read.retain(|_| {
        let left_out = generator.random_bool(drop) && n_left > 2;
        n_left -= usize::from(left_out);
        !left_out
    });
    if generator.random_bool(reverse) {
        read.reverse();
    }
    read
}

/// Which of `n` events are hidden: each with `probability`, and one in any case, but not all. A single event is not.
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

/// The order in which some of `n` events are predicted: −1 for those that are not. Spans of 1 to `max_span` events,
/// each within a stretch `1 / probability` times as long; one event in any case, but not all.
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
    for place in 0..left.len() as i64 {
        order[left.swap_remove(generator.random_range(0..left.len()))] = place;
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_event_is_hidden_in_any_case_but_never_all() {
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
        // 1 + 0.15 (n − 1) of n events, less what is shown again where all were hidden, which only short ones feel.
        let expected: f64 = (0..100_000).map(|seed| 1.0 + 0.15 * f64::from(1 + seed % 19)).sum();
        let rate = n_hidden as f64 / expected;
        assert!((0.98..1.002).contains(&rate), "{rate} of {expected} among {n_events}");
        assert_eq!(hide(1, 0.15, 3), [false]);
        assert!(hide(0, 0.15, 3).is_empty());
    }

    #[test]
    fn readings_leave_out_and_turn_round_as_often_as_they_should() {
        let (mut n_read, mut n_reversed) = (0, 0);
        for seed in 0..20_000 {
            let read = reading(10, 0.25, 0.5, seed);
            assert!(read.len() >= 2 && (read.is_sorted() || read.is_sorted_by(|a, b| a > b)));
            n_read += read.len();
            n_reversed += usize::from(read[0] > read[1]);
            assert_eq!(reading(2, 0.9, 0.0, seed), [0, 1]);
        }
        assert!((n_read as f64 / 2e5 - 0.75).abs() < 0.005, "{n_read}");
        assert!((n_reversed as f64 / 2e4 - 0.5).abs() < 0.02, "{n_reversed}");
        assert_eq!(reading(4, 0.0, 0.0, 1), [0, 1, 2, 3]);
        let plan = Plan::causal(&[3, 4], &[vec![0, 1, 2], vec![3, 0]]);
        assert_eq!(
            (&plan.lengths[..], &plan.targets[..], &plan.reads[..]),
            (&[2, 1][..], &[1, 2, 3][..], &[0, 1, 2][..])
        );
        assert_eq!(plan.shown, [Shown::Event(0), Shown::Event(1), Shown::Event(6)]);
    }

    #[test]
    fn every_place_is_hidden_equally_often() {
        let mut counts = [0; 5];
        for seed in 0..100_000 {
            hide(5, 0.15, seed).iter().zip(&mut counts).for_each(|(&hidden, n)| *n += i64::from(hidden));
        }
        for n in counts {
            // 0.15 + 0.85 / 5, give or take the correction for all five and five standard deviations.
            assert!((n as f64 / 1e5 - 0.32).abs() < 0.008, "{counts:?}");
        }
    }

    #[test]
    fn orders_are_permutations_of_some_events() {
        let mut n_predicted = 0;
        for seed in 0..20_000u64 {
            let n = 2 + (seed % 19) as usize;
            let order = prediction_order(n, 1.0 / 6.0, 5, seed);
            let mut places: Vec<i64> = order.iter().copied().filter(|&place| place >= 0).collect();
            places.sort_unstable();
            assert!(places.iter().copied().eq(0..places.len() as i64));
            assert!(!places.is_empty() && places.len() < n);
            n_predicted += places.len();
        }
        assert!(n_predicted > 20_000);
    }

    #[test]
    fn padding_moves_what_is_read() {
        let plan = Plan::masked(&[vec![false, true], vec![true, false, false]]).padded(4);
        assert_eq!(plan.lengths, [4, 4]);
        assert_eq!(plan.reads, [1, 4]);
        assert_eq!(plan.targets, [1, 2]);
        use Shown::{Event, Mask, Padding};
        assert_eq!(plan.shown, [Event(0), Mask, Padding, Padding, Mask, Event(3), Event(4), Padding]);
    }
}
