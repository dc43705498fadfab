//! Numbers of candidates and of their features, and tensors that follow from them.

use tch::{Device, Tensor};

use super::counts::{UNITS, WINDOW};
use crate::config::CandidatesConfig;

/// Factor of a pair's weight for each event between the known item and the end of the session.
const DECAY: f64 = 0.8;

/// Weight of predecessors beside successors, where both are summed.
pub(super) const PREDECESSOR_WEIGHT: f64 = 0.5;

/// Known items by their place from the end with a feature each; those before share one.
pub(super) const PLACES: i64 = 5;

/// Numbers of candidates and of what is known of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Largest number of events of a session.
    pub max_length: usize,
    /// Recent items whose neighbours are looked up, `P`.
    pub n_recent: i64,
    /// Attributes with codes.
    pub n_codes: usize,
    /// Candidates of a session, `E`.
    pub n_candidates: i64,
    /// Features of a candidate, `F`.
    pub n_features: i64,
}

impl Shape {
    /// `n_attributes`: with codes and with values.
    pub fn new(
        config: &CandidatesConfig,
        n_codes: usize,
        n_attributes: usize,
        max_length: usize,
    ) -> Self {
        let n_recent = config.n_recent.min(max_length as i64);
        let n_attribute_features = 2 * n_attributes as i64 + if n_codes > 1 { 1 } else { 0 };
        let n_pair_features = 2 * config.n_recent.min(2) + 4;
        let mut shape = Self {
            max_length,
            n_recent,
            n_codes,
            n_candidates: 0,
            n_features: n_pair_features + 5 + (PLACES + 2) + n_attribute_features + 2,
        };
        let n_entries = 2 * n_recent * config.n_neighbours
            + max_length as i64
            + shape.n_lists() * config.n_frequent;
        shape.n_candidates = config.n_candidates.min(n_entries);
        shape
    }

    /// Number of counts of pairs `C`.
    pub fn n_columns(&self) -> usize {
        2 * self.n_recent as usize + 2
    }

    /// The attributes with the same codes in each list of alike items, by their number among those
    /// with codes: each and, if there are several, all of them.
    pub fn alike_attributes(&self) -> Vec<Vec<usize>> {
        let mut lists: Vec<Vec<usize>> =
            (0..self.n_codes).map(|attribute| vec![attribute]).collect();
        if self.n_codes > 1 {
            lists.push((0..self.n_codes).collect());
        }
        lists
    }

    /// Number of lists of frequent items.
    fn n_lists(&self) -> i64 {
        self.alike_attributes().len() as i64 + 1
    }
}

/// Tensors that depend on the configuration alone. They exist before a lookup is traced, because a
/// trace does not record the values of new tensors.
pub(super) struct Constants {
    /// Decay by place from the end, f32 `[P]`; the first is 1.
    pub decays: Tensor,
    /// See [`priorities`]: f64 `[C + 2]`.
    pub priorities: Tensor,
    /// Column of each value that [`Tables::merge`] adds up, i64 `[1, values]`.
    pub columns: Tensor,
    /// Which of the known items share a feature, f32 `[L, PLACES + 1]`.
    pub places: Tensor,
    /// Weight of a pair of events of a session, 0 unless the first is the earlier: f32 `[L, L]`.
    pub pair_weights: Tensor,
    /// 1 for an event and the next, else 0: f32 `[L, L]`.
    pub is_next: Tensor,
}

impl Constants {
    pub fn new(config: &CandidatesConfig, shape: Shape, device: Device) -> Self {
        let Shape { n_recent, .. } = shape;
        let length = shape.max_length as i64;
        let k = config.n_neighbours;
        let of_recent = |first: i64| (0..n_recent * k).map(move |entry| first + entry / k);
        let repeated = |column: i64, n: i64| std::iter::repeat_n(column, n as usize);
        let columns: Vec<i64> = of_recent(0)
            .chain(of_recent(n_recent))
            .chain(repeated(2 * n_recent, k))
            .chain(repeated(2 * n_recent + 1, k))
            .chain(repeated(2 * n_recent + 2, length))
            .chain(repeated(2 * n_recent + 3, shape.n_lists() * config.n_frequent))
            .collect();
        let decays = decays(n_recent);
        let priorities = priorities(n_recent);
        let places: Vec<f32> = (0..length)
            .flat_map(|place| {
                (0..=PLACES).map(move |of| f32::from(u8::from(place.min(PLACES) == of)))
            })
            .collect();
        let of_pairs = |weight: fn(i64) -> f32| {
            let pairs = (0..length).flat_map(|first| (0..length).map(move |second| second - first));
            on_device(&pairs.map(weight).collect::<Vec<_>>(), device).view([length, length])
        };
        let by_distance = |distance: i64| {
            if (1..=WINDOW).contains(&distance) {
                (i64::from(UNITS) / distance) as f32
            } else {
                0.0
            }
        };
        Self {
            pair_weights: of_pairs(by_distance),
            is_next: of_pairs(|distance| f32::from(u8::from(distance == 1))),
            decays: on_device(&decays, device),
            priorities: on_device(&priorities, device),
            columns: on_device(&columns, device).unsqueeze(0),
            places: on_device(&places, device).view([length, PLACES + 1]),
        }
    }
}

/// Decay by place from the end, of `n_recent` places.
pub(super) fn decays(n_recent: i64) -> Vec<f32> {
    (0..n_recent).map(|place| DECAY.powi(place as i32) as f32).collect()
}

/// Weight of each count of a candidate in its priority: weights as successor of each of the
/// `n_recent` items and as predecessor of each, occurrences as their direct neighbour, places in
/// the session, lists of frequent items. All are whole numbers, as the counts are, so that a
/// priority is exact and the choice of candidates the same wherever it is made.
pub(super) fn priorities(n_recent: i64) -> Vec<f64> {
    const ONE: f64 = 1024.0;
    let by_place = |weight: f64| {
        (0..n_recent).map(move |place| (ONE * weight * DECAY.powi(place as i32)).round())
    };
    // A known item goes before all others, whatever their weights. A list of frequent items counts
    // as a pair of the last item at the largest distance.
    let others = [0.0, 0.0, (1u64 << 45) as f64, ONE * f64::from(UNITS) / WINDOW as f64];
    by_place(1.0).chain(by_place(PREDECESSOR_WEIGHT)).chain(others).collect()
}

pub(super) fn on_device<T: tch::kind::Element>(numbers: &[T], device: Device) -> Tensor {
    Tensor::from_slice(numbers).to_device(device)
}
