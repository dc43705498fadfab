//! The candidates of sessions and their features.

use tch::{Kind, Tensor};

use super::counts::UNITS;
use super::shape::{Constants, PREDECESSOR_WEIGHT};
use super::tables::{FoundNeighbours, Tables, take};
use crate::config::{CandidatesConfig, Reminders};
use crate::data::FIRST_ITEM;

/// The known parts of `N` sessions.
pub(in crate::model) struct Known {
    /// Items, the most recent first, 0 beyond the first: i64 `[N, L]`.
    pub items: Tensor,
    /// Codes of their attributes, i64 `[N, L]` each.
    pub codes: Vec<Tensor>,
    /// Values of their attributes, f32 `[N, L]` each.
    pub values: Vec<Tensor>,
    /// The sessions that the counts contain, whose own contributions are left out.
    pub counted: Option<CountedSessions>,
}

/// Whole sessions, their targets and later events included.
pub(in crate::model) struct CountedSessions {
    /// In order of time, 0 beyond the last: i64 `[N, S]`.
    pub items: Tensor,
    /// 1 for a session of the last day, else 0: f32 `[N, 1]`.
    pub is_last_day: Tensor,
}

/// Items that may follow, with what the counts say of them.
pub struct Candidates {
    /// i64 `[N, E]`; 0 if a session has fewer candidates.
    pub items: Tensor,
    /// f32 `[N, E, F]`, each about 0 to 3.
    pub features: Tensor,
    /// Known items that may not be recommended: bool `[N, E]`.
    pub is_hidden: Tensor,
}

/// The candidates of `known`, without their features.
struct Merged {
    /// i64 `[N, E]`.
    items: Tensor,
    /// Counts of pairs, whole numbers in f32 `[N, E, C]`: weights as successor of each of the `P`
    /// recent items and as predecessor of each, in units of 1/[`UNITS`], and occurrences as direct
    /// successor and predecessor of the last.
    weights: Tensor,
    /// Whether the item is known or frequent: bool `[N, E]`.
    has_other_source: Tensor,
}

impl Tables {
    /// The candidates of sessions.
    pub fn candidates(
        &self,
        known: &Known,
        config: &CandidatesConfig,
        reminders: Reminders,
    ) -> Candidates {
        let recommendable = known.items.ge(FIRST_ITEM).to_kind(Kind::Int64);
        let items = &known.items * recommendable;
        let recent = items.narrow(1, 0, self.shape.n_recent);
        let Merged { items: candidates, weights, has_other_source } =
            self.merge(&items, &recent, known, config);
        let weights = match &known.counted {
            Some(counted) => {
                weights - own_weights(&self.constants, &recent, &counted.items, &candidates)
            }
            None => weights,
        };
        // Counts are whole numbers. Pairs that were dropped are negative now.
        let weights = weights.clamp_min(0.0);
        // A candidate that only the session itself suggests would not be one on the next day: that
        // it is in the list would reveal the target.
        let has_pairs = weights.sum_dim_intlist([2i64].as_slice(), false, Kind::Float).gt(0.0);
        let candidates = candidates * has_pairs.logical_or(&has_other_source).to_kind(Kind::Int64);
        let features = self.features(&items, known, &candidates, &weights);
        let is_in = |known: &Tensor| {
            candidates.unsqueeze(2).eq_tensor(&known.unsqueeze(1)).any_dim(2, false)
        };
        let is_hidden = match reminders {
            Reminders::Auto | Reminders::All => candidates.lt(0),
            Reminders::Earlier => is_in(&items.narrow(1, 0, 1)),
            Reminders::None => is_in(&items),
        };
        let is_hidden = is_hidden.logical_and(&candidates.gt(0));
        Candidates { items: candidates, features, is_hidden }
    }

    /// Joins the sources of candidates, and keeps the best `E`: first the known items, then those
    /// with the greatest pair weights, then frequent ones.
    fn merge(
        &self,
        known_items: &Tensor,
        recent: &Tensor,
        known: &Known,
        config: &CandidatesConfig,
    ) -> Merged {
        let constants = &self.constants;
        let (k, n_recent) = (config.n_neighbours, self.shape.n_recent);
        let of_recent = recent.reshape([-1]);
        let successors = self.successors.find(&of_recent, k);
        let predecessors = self.predecessors.find(&of_recent, k);
        // A reshape to `[-1, n_recent · k]` fails if `k` is 0.
        let by_session = |x: &Tensor| x.unflatten(0, [-1, n_recent]).flatten(1, 2);
        let last_codes: Vec<Tensor> = known.codes.iter().map(|codes| codes.select(1, 0)).collect();
        let mut frequent: Vec<Tensor> =
            self.alike.iter().map(|alike| alike.find(&last_codes, config.n_frequent)).collect();
        frequent.push(&self.frequent + recent.narrow(1, 0, 1).zeros_like());
        let frequent = Tensor::cat(&frequent, 1);
        let all = Tensor::cat(
            &[
                &by_session(&successors.items),
                &by_session(&predecessors.items),
                known_items,
                &frequent,
            ],
            1,
        );

        // The number of each entry's item among the distinct items of its session.
        let n_entries = all.size()[1];
        let (sorted, order) = all.sort(1, false);
        let first = sorted.narrow(1, 0, 1).zeros_like();
        let is_next = sorted
            .narrow(1, 1, n_entries - 1)
            .ne_tensor(&sorted.narrow(1, 0, n_entries - 1))
            .to_kind(Kind::Int64);
        let sorted_numbers = Tensor::cat(&[first, is_next], 1).cumsum(1, Kind::Int64);
        let numbers = all.zeros_like().scatter(1, &order, &sorted_numbers);
        let distinct = all.zeros_like().scatter(1, &sorted_numbers, &sorted);

        // Pair weights of each distinct item, with a column for its other sources.
        let n_columns = self.shape.n_columns() as i64 + 2;
        let n_pairs = n_recent * k;
        let of_entries = |first: i64, n: i64| numbers.narrow(1, first, n);
        let cells = Tensor::cat(
            &[
                of_entries(0, 2 * n_pairs),
                of_entries(0, k),
                of_entries(n_pairs, k),
                of_entries(2 * n_pairs, n_entries - 2 * n_pairs),
            ],
            1,
        );
        let cells = cells * n_columns + &constants.columns;
        let last_adjacent = |found: &FoundNeighbours| by_session(&found.adjacent).narrow(1, 0, k);
        let once = |items: &Tensor| items.ones_like().to_kind(Kind::Float);
        let values = Tensor::cat(
            &[
                by_session(&successors.weights),
                by_session(&predecessors.weights),
                last_adjacent(&successors),
                last_adjacent(&predecessors),
                once(known_items),
                once(&frequent),
            ],
            1,
        );
        let zeros = all.zeros_like().to_kind(Kind::Float).repeat([1, n_columns]);
        let weights = zeros.scatter_add(1, &cells, &values).reshape([-1, n_entries, n_columns]);

        let priority = weights.to_kind(Kind::Double).matmul(&constants.priorities);
        let priority = priority * distinct.gt(0).to_kind(Kind::Double);
        let n_candidates = self.shape.n_candidates;
        // Equal priorities keep the order of items, so that a choice does not depend on the device.
        let (priority, chosen) = priority.sort_stable(true, 1, true);
        let [priority, chosen] = [priority, chosen].map(|of| of.narrow(1, 0, n_candidates));
        let items = distinct.gather(1, &chosen, false) * priority.gt(0.0).to_kind(Kind::Int64);
        let rows = chosen.unsqueeze(2).expand([-1, -1, n_columns], false);
        let weights = weights.gather(1, &rows, false);
        Merged {
            items,
            has_other_source: weights.narrow(2, n_columns - 2, 2).gt(0.0).any_dim(2, false),
            weights: weights.narrow(2, 0, n_columns - 2),
        }
    }

    fn features(
        &self,
        known_items: &Tensor,
        known: &Known,
        candidates: &Tensor,
        weights: &Tensor,
    ) -> Tensor {
        let n_recent = self.shape.n_recent;
        let Constants { decays, places, .. } = &self.constants;
        let last = known_items.narrow(1, 0, 1);
        let is_known = known_items.gt(0).to_kind(Kind::Float);
        let n_known = is_known.sum_dim_intlist([1i64].as_slice(), true, Kind::Float).clamp_min(1.0);

        let of_pairs = weights.narrow(2, 0, 2 * n_recent) / f64::from(UNITS);
        let successors = of_pairs.narrow(2, 0, n_recent);
        let predecessors = of_pairs.narrow(2, n_recent, n_recent);
        let decayed = [&successors, &predecessors].map(|of| of.matmul(decays));
        let n_places = n_recent.min(2);
        let pair_features = Tensor::cat(
            &[
                successors.narrow(2, 0, n_places),
                predecessors.narrow(2, 0, n_places),
                weights.narrow(2, 2 * n_recent, 2),
                Tensor::stack(&decayed, 2),
            ],
            2,
        );
        let pair_features = (pair_features * 20.0).log1p() / 4.0;

        let (mut occurrences, mut of_last) =
            (take(&self.occurrences, candidates), take(&self.occurrences, &last));
        let mut last_day = take(&self.last_day_occurrences, candidates);
        if let Some(counted) = &known.counted {
            let own = n_equal(candidates, &counted.items);
            last_day -= &own * &counted.is_last_day;
            occurrences -= own;
            of_last -= n_equal(&last, &counted.items);
        }
        let [occurrences, of_last, last_day] =
            [occurrences, of_last, last_day].map(|counts| counts.clamp_min(0.0));
        let of_pair = successors.select(2, 0) + predecessors.select(2, 0);
        let [all_successors, all_predecessors] = &decayed;
        let decayed = all_successors + all_predecessors * PREDECESSOR_WEIGHT;
        let occurrence_features = [
            occurrences.log1p() / 4.0,
            last_day.log1p() / 4.0,
            occurrences.lt(0.5).to_kind(Kind::Float),
            (of_pair / ((&occurrences + 1.0) * (&of_last + 1.0)).sqrt()).sqrt(),
            (decayed / (&occurrences + 1.0).sqrt()).sqrt() / 2.0,
        ];
        let occurrence_features = Tensor::stack(&occurrence_features, 2);

        // The place from the end at which a candidate occurs, and how often it does.
        let repeats = candidates.unsqueeze(2).eq_tensor(&known_items.unsqueeze(1));
        let repeats = repeats.to_kind(Kind::Float) * is_known.unsqueeze(1);
        let is_latest = &repeats * repeats.cumsum(2, Kind::Float).le(1.5).to_kind(Kind::Float);
        let n_repeats = repeats.sum_dim_intlist([2i64].as_slice(), true, Kind::Float);
        let repeat_features = Tensor::cat(&[is_latest.matmul(places), n_repeats.log1p()], 2);

        // A known item has the attributes of its event: it may not have occurred in training.
        let is_repeat = n_repeats.squeeze_dim(2).gt(0.0);
        let attribute = |of_items: &Tensor, of_known: &Tensor| {
            let of_event = (&is_latest * of_known.unsqueeze(1)).sum_dim_intlist(
                [2i64].as_slice(),
                false,
                Kind::Float,
            );
            let of_items = take(of_items, candidates);
            of_event.to_kind(of_items.kind()).where_self(&is_repeat, &of_items)
        };
        let mut attribute_features = Vec::new();
        let mut is_all_same: Option<Tensor> = None;
        for (of_items, of_known) in self.codes.iter().zip(&known.codes) {
            let codes = attribute(of_items, of_known);
            let is_same = codes.unsqueeze(2).eq_tensor(&of_known.unsqueeze(1));
            let is_same = is_same.to_kind(Kind::Float) * is_known.unsqueeze(1);
            let share = is_same.sum_dim_intlist([2i64].as_slice(), false, Kind::Float) / &n_known;
            let is_same = is_same.select(2, 0);
            is_all_same = Some(match is_all_same {
                Some(all) => all * &is_same,
                None => is_same.shallow_clone(),
            });
            attribute_features.extend([is_same, share]);
        }
        if let Some(all) = is_all_same.filter(|_| self.codes.len() > 1) {
            attribute_features.push(all);
        }
        for (of_items, of_known) in self.values.iter().zip(&known.values) {
            let values = attribute(of_items, of_known);
            let mean = (of_known * &is_known).sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
                / &n_known;
            let of_last = of_known.narrow(1, 0, 1);
            for reference in [of_last, mean] {
                attribute_features.push((&values - reference).abs().clamp_max(3.0));
            }
        }
        let shape = candidates.zeros_like().to_kind(Kind::Float);
        attribute_features.push(of_last.log1p() / 4.0 + &shape);
        attribute_features.push(n_known.log() / 2.0 + &shape);
        let attribute_features = Tensor::stack(&attribute_features, 2);
        Tensor::cat(&[pair_features, occurrence_features, repeat_features, attribute_features], 2)
    }
}

/// What the sessions themselves contribute to the pair weights of `candidates: [N, E]` with
/// `recent: [N, P]`: `[N, E, C]`.
///
/// With `a` the matrix of equality between recent items and events, `d` the weights of pairs of
/// events, and `b` that between events and candidates, the contribution is `a d b`.
fn own_weights(
    constants: &Constants,
    recent: &Tensor,
    session: &Tensor,
    candidates: &Tensor,
) -> Tensor {
    let Constants { pair_weights: by_distance, is_next: adjacent, .. } = constants;
    let is_event = session.ge(FIRST_ITEM).unsqueeze(1);
    let of_recent = recent.unsqueeze(2).eq_tensor(&session.unsqueeze(1)).logical_and(&is_event);
    let of_recent = of_recent.to_kind(Kind::Float);
    let of_last = of_recent.narrow(1, 0, 1);
    let by_event = Tensor::cat(
        &[
            of_recent.matmul(by_distance),
            of_recent.matmul(&by_distance.tr()),
            of_last.matmul(adjacent),
            of_last.matmul(&adjacent.tr()),
        ],
        1,
    );
    let of_candidates = session.unsqueeze(1).eq_tensor(&candidates.unsqueeze(2));
    of_candidates.to_kind(Kind::Float).matmul(&by_event.transpose(1, 2))
}

/// How often each of `items: [N, E]` occurs in `sessions: [N, S]`: f32 `[N, E]`.
fn n_equal(items: &Tensor, sessions: &Tensor) -> Tensor {
    let is_equal = items.unsqueeze(2).eq_tensor(&sessions.unsqueeze(1));
    is_equal.to_kind(Kind::Float).sum_dim_intlist([2i64].as_slice(), false, Kind::Float)
}
