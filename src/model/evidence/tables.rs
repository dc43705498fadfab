//! Counts as tensors, from which the candidates of sessions and their features are looked up.
//!
//! No operation depends on the number of sessions, so that lookups can be traced.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::counts::{Counts, Pair};
use super::shape::{Constants, Shape, on_device};
use crate::config::CandidatesConfig;
use crate::model::attributes::Cells;

/// Lists of items, one after the other.
pub(super) struct Lists {
    /// List `i` has the elements `offsets[i]..offsets[i + 1]`: i64 `[lists + 1]`.
    offsets: Tensor,
    /// i32 `[elements + 1]`; the last element is 0 and belongs to no list.
    items: Tensor,
}

/// The first elements of some lists.
pub(super) struct Found {
    /// i64 `[N, k]`; 0 beyond the end of a list.
    pub items: Tensor,
    /// Numbers of these elements, i64 `[N, k]`; the last element beyond the end of a list.
    elements: Tensor,
}

impl Lists {
    /// `lengths`: of each list.
    fn new(lengths: impl Iterator<Item = usize>, items: &[i32], device: Device) -> Self {
        let mut offsets = vec![0i64];
        offsets.extend(lengths.scan(0, |end, length| {
            *end += length as i64;
            Some(*end)
        }));
        Self { offsets: on_device(&offsets, device), items: with_last(items, device) }
    }

    /// The first `k` elements of the lists `numbers: [N]`.
    pub fn find(&self, numbers: &Tensor, k: i64) -> Found {
        let start = self.offsets.index_select(0, numbers).unsqueeze(1);
        let end = self.offsets.index_select(0, &(numbers + 1)).unsqueeze(1);
        let elements = start + Tensor::arange(k, (Kind::Int64, self.items.device()));
        let last = self.items.size()[0] - 1;
        let elements = elements.where_scalarother(&elements.lt_tensor(&end), last);
        Found { items: take(&self.items, &elements).to_kind(Kind::Int64), elements }
    }
}

/// `values: [n]` at `indices: [..]`.
pub(super) fn take(values: &Tensor, indices: &Tensor) -> Tensor {
    values.index_select(0, &indices.reshape([-1])).reshape_as(indices)
}

/// Appends a zero.
fn with_last<T: tch::kind::Element + Default + Copy>(numbers: &[T], device: Device) -> Tensor {
    on_device(&[numbers, &[T::default()]].concat(), device)
}

/// The successors or the predecessors of each item, the most frequent first.
pub(super) struct Neighbours {
    lists: Lists,
    /// Summed inverse distances in units of 1/[`super::counts::UNITS`], f32 `[elements + 1]`.
    weights: Tensor,
    /// Occurrences at distance 1, f32 `[elements + 1]`.
    adjacent: Tensor,
}

/// Neighbours of some items.
pub(super) struct FoundNeighbours {
    /// i64 `[N, k]`; 0 if there is none.
    pub items: Tensor,
    /// Summed inverse distances in units of 1/[`super::counts::UNITS`], f32 `[N, k]`.
    pub weights: Tensor,
    /// f32 `[N, k]`.
    pub adjacent: Tensor,
}

impl Neighbours {
    /// `sorted`: pairs, those of an item together and the heaviest first. `ends`: the item and the
    /// neighbour of a pair.
    fn new(sorted: &[Pair], ends: fn(&Pair) -> (u32, u32), n_items: usize, device: Device) -> Self {
        let mut lengths = vec![0; n_items];
        sorted.iter().for_each(|pair| lengths[ends(pair).0 as usize] += 1);
        let items: Vec<i32> = sorted.iter().map(|pair| ends(pair).1 as i32).collect();
        let weights: Vec<f32> = sorted.iter().map(Pair::units).collect();
        let adjacent: Vec<f32> = sorted.iter().map(Pair::adjacent).collect();
        Self {
            lists: Lists::new(lengths.into_iter(), &items, device),
            weights: with_last(&weights, device),
            adjacent: with_last(&adjacent, device),
        }
    }

    /// The first `k` neighbours of `items: [N]`.
    pub fn find(&self, items: &Tensor, k: i64) -> FoundNeighbours {
        let Found { items, elements } = self.lists.find(items, k);
        let [weights, adjacent] = [&self.weights, &self.adjacent].map(|of| take(of, &elements));
        FoundNeighbours { items, weights, adjacent }
    }
}

/// The most frequent items with the same codes of some attributes.
pub(super) struct Alike {
    /// Which attributes, by their number among those with codes.
    attributes: Vec<usize>,
    /// Keys of the codes, ascending: i64 `[lists]`.
    keys: Tensor,
    /// The last list is empty.
    lists: Lists,
}

/// Joins the codes of an item to a key; different codes may have the same key.
const KEY_FACTOR: i64 = 1_000_003;

impl Alike {
    /// `by_occurrence`: items that occurred, the most frequent first.
    fn new(
        attributes: Vec<usize>,
        codes: &[&Vec<i64>],
        by_occurrence: &[usize],
        n_most: usize,
        device: Device,
    ) -> Self {
        let mut items_by_key: BTreeMap<i64, Vec<i32>> = BTreeMap::new();
        for &item in by_occurrence {
            let key = attributes.iter().fold(0, |key: i64, &attribute| {
                key.wrapping_mul(KEY_FACTOR).wrapping_add(codes[attribute][item])
            });
            let items = items_by_key.entry(key).or_default();
            if items.len() < n_most {
                items.push(item as i32);
            }
        }
        let mut keys: Vec<i64> = items_by_key.keys().copied().collect();
        // A key that is greater than all others finds the last list.
        keys.push(i64::MAX);
        let lengths = items_by_key.values().map(Vec::len).chain([0]);
        let items: Vec<i32> = items_by_key.values().flatten().copied().collect();
        let lists = Lists::new(lengths, &items, device);
        Self { attributes, keys: on_device(&keys, device), lists }
    }

    /// Items with the codes `codes`, `[N]` of each attribute: i64 `[N, k]`, 0 if there is none.
    pub fn find(&self, codes: &[Tensor], k: i64) -> Tensor {
        let (first, others) = self.attributes.split_first().expect("an attribute is chosen");
        let key = others.iter().fold(codes[*first].shallow_clone(), |key, &attribute| {
            key * KEY_FACTOR + &codes[attribute]
        });
        let last = self.keys.size()[0] - 1;
        let number =
            key.contiguous().searchsorted(&self.keys, false, false, "left", None::<&Tensor>);
        let number = number.clamp_max(last);
        let number = number.where_scalarother(&take(&self.keys, &number).eq_tensor(&key), last);
        self.lists.find(&number, k).items
    }
}

/// All counts on a device.
pub(super) struct Tables {
    pub successors: Neighbours,
    pub predecessors: Neighbours,
    /// Occurrences of each item, f32 `[V]`.
    pub occurrences: Tensor,
    /// Occurrences on the last day, f32 `[V]`.
    pub last_day_occurrences: Tensor,
    /// Codes of each item, i64 `[V]` for each attribute.
    pub codes: Vec<Tensor>,
    /// Values of each item, f32 `[V]` for each attribute.
    pub values: Vec<Tensor>,
    /// By each attribute with codes and, if there are several, by all of them.
    pub alike: Vec<Alike>,
    /// The most frequent items, i64 `[n_frequent]`; 0 if there are fewer.
    pub frequent: Tensor,
    pub shape: Shape,
    pub constants: Constants,
}

impl Tables {
    pub fn new(counts: &Counts, config: &CandidatesConfig, shape: Shape, device: Device) -> Self {
        let n_items = counts.items.len();
        let mut sorted = counts.pairs().to_vec();
        sorted.sort_unstable_by_key(Pair::by_first);
        let successors =
            Neighbours::new(&sorted, |pair| (pair.first, pair.second), n_items, device);
        sorted.sort_unstable_by_key(Pair::by_second);
        let predecessors =
            Neighbours::new(&sorted, |pair| (pair.second, pair.first), n_items, device);

        let by_occurrence = counts.by_occurrence();
        let n_most = config.n_frequent as usize;
        let mut frequent: Vec<i64> =
            by_occurrence.iter().take(n_most).map(|&item| item as i64).collect();
        frequent.resize(n_most, 0);

        let (mut host_codes, mut values) = (Vec::new(), Vec::new());
        for attribute in &counts.attributes.0 {
            match &attribute.cells {
                Cells::Codes(codes) => host_codes.push(codes),
                Cells::Values(of_items) => values.push(on_device(of_items, device)),
            }
        }
        let alike =
            |attributes| Alike::new(attributes, &host_codes, &by_occurrence, n_most, device);
        let floats =
            |counts: &[i64]| Tensor::from_slice(counts).to_kind(Kind::Float).to_device(device);
        Self {
            successors,
            predecessors,
            occurrences: floats(&counts.items),
            last_day_occurrences: floats(&counts.last_day_items),
            alike: shape.alike_attributes().into_iter().map(alike).collect(),
            codes: host_codes.iter().map(|codes| on_device(codes, device)).collect(),
            values,
            frequent: on_device(&frequent, device),
            constants: Constants::new(config, shape, device),
            shape,
        }
    }
}
