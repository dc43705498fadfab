//! Numbers of candidates and of their features, and tensors that follow from them.

use tch::{Device, Tensor};

use crate::config::CandidatesConfig;

/// Factor of a pair's weight for each event between the known item and the end of the session.
const DECAY: f64 = 0.8;

/// Weight of predecessors beside successors, where both are summed.
pub(super) const PREDECESSOR_WEIGHT: f64 = 0.5;

/// Known items by their place from the end with a feature each; those before share one.
pub(super) const PLACES: i64 = 5;

/// Number of features `F` of a candidate.
pub(super) fn n_features(config: &CandidatesConfig, n_codes: usize, n_values: usize) -> i64 {
    let n_pair_features = 2 * config.n_recent.min(2) + 4;
    let n_attribute_features = 2 * (n_codes + n_values) as i64 + if n_codes > 1 { 1 } else { 0 };
    n_pair_features + 5 + (PLACES + 2) + n_attribute_features + 2
}

/// Number of candidates `E` of a session of at most `max_length` events.
pub(super) fn n_candidates(config: &CandidatesConfig, n_codes: usize, max_length: usize) -> i64 {
    let n_recent = config.n_recent.min(max_length as i64);
    let n_entries = 2 * n_recent * config.n_neighbours
        + max_length as i64
        + n_lists(n_codes) * config.n_frequent;
    config.n_candidates.min(n_entries)
}

/// Tensors that depend on the configuration alone. They exist before a lookup is traced, because a
/// trace does not record the values of new tensors.
pub(super) struct Constants {
    /// `P`: recent items whose neighbours are looked up.
    pub n_recent: i64,
    /// Decay by place from the end, f32 `[P]`; the first is 1.
    pub decays: Tensor,
    /// Weight of each column of [`Merged`] in the priority of a candidate, f32 `[C + 1]`.
    pub priorities: Tensor,
    /// Column of each value that [`Tables::merge`] adds up, i64 `[1, values]`.
    pub columns: Tensor,
    /// Which of the known items share a feature, f32 `[L, PLACES + 1]`.
    pub places: Tensor,
}

impl Constants {
    /// For sessions of at most `length` events.
    pub fn new(config: &CandidatesConfig, n_codes: usize, length: usize, device: Device) -> Self {
        let length = length as i64;
        let n_recent = config.n_recent.min(length);
        let k = config.n_neighbours;
        let of_recent = |first: i64| (0..n_recent * k).map(move |entry| first + entry / k);
        let repeated = |column: i64, n: i64| std::iter::repeat_n(column, n as usize);
        let n_others = length + n_lists(n_codes) * config.n_frequent;
        let columns: Vec<i64> = of_recent(0)
            .chain(of_recent(n_recent))
            .chain(repeated(2 * n_recent, k))
            .chain(repeated(2 * n_recent + 1, k))
            .chain(repeated(2 * n_recent + 2, n_others))
            .collect();
        let decays: Vec<f32> = (0..n_recent).map(|place| DECAY.powi(place as i32) as f32).collect();
        let mut priorities = decays.clone();
        priorities.extend(decays.iter().map(|decay| decay * PREDECESSOR_WEIGHT as f32));
        priorities.extend([0.0, 0.0, 1.0]);
        let places: Vec<f32> = (0..length)
            .flat_map(|place| {
                (0..=PLACES).map(move |of| f32::from(u8::from(place.min(PLACES) == of)))
            })
            .collect();
        Self {
            n_recent,
            decays: on_device(&decays, device),
            priorities: on_device(&priorities, device),
            columns: on_device(&columns, device).unsqueeze(0),
            places: on_device(&places, device).view([length, PLACES + 1]),
        }
    }

    /// Number of columns of pair weights `C`.
    pub fn n_columns(&self) -> i64 {
        2 * self.n_recent + 2
    }
}

/// Number of lists of frequent items.
fn n_lists(n_codes: usize) -> i64 {
    let n_alike = n_codes + usize::from(n_codes > 1);
    n_alike as i64 + 1
}

pub(super) fn on_device<T: tch::kind::Element>(numbers: &[T], device: Device) -> Tensor {
    Tensor::from_slice(numbers).to_device(device)
}
