//! Occurrences and co-occurrences of items in the sessions of all days so far.

use std::cmp::Reverse;
use std::slice;

use tch::Tensor;

use crate::data::{DataError, FIRST_ITEM, SessionFile, Sessions};
use crate::model::attributes::Attributes;

/// Events at most this far apart in a session are a pair.
pub(super) const WINDOW: i64 = 7;

/// A pair at distance d weighs 1/d. Weights are counted in this fraction of 1, the least common
/// multiple of the distances, so that their sums are exact.
pub(super) const UNITS: u32 = 420;

/// Pairs are merged into the sorted ones whenever this many wait, or half as many as are sorted.
const MIN_MERGED: usize = 1 << 22;

/// Co-occurrences of two items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub first: u32,
    /// The later item.
    pub second: u32,
    /// Summed weights, in units of 1/[`UNITS`].
    units: u32,
    /// How often the second item directly followed the first.
    adjacent: u32,
}

impl Pair {
    fn key(&self) -> (u32, u32) {
        (self.first, self.second)
    }

    /// Summed weights, in units of 1/[`UNITS`].
    pub fn units(&self) -> f32 {
        self.units as f32
    }

    pub fn adjacent(&self) -> f32 {
        self.adjacent as f32
    }

    /// Sorts the pairs of an item by weight.
    pub fn by_first(&self) -> (u32, Reverse<u32>, u32) {
        (self.first, Reverse(self.units), self.second)
    }

    /// Sorts the pairs of a later item by weight.
    pub fn by_second(&self) -> (u32, Reverse<u32>, u32) {
        (self.second, Reverse(self.units), self.first)
    }
}

/// Pairs of an item that are factored.
const N_FACTORED: usize = 128;

/// Counts of items and of pairs, and the attributes of items.
///
/// At the end of a day the lightest pairs are dropped: a pair stays if it is among the `n_kept`
/// heaviest of its first item or of its second. Memory then grows with the catalogue, not with the
/// number of days, and a checkpoint holds all that the next day needs.
pub struct Counts {
    n_kept: usize,
    /// Sorted by both items.
    pairs: Vec<Pair>,
    /// Pairs of single events, not yet merged into `pairs`.
    waiting: Vec<Pair>,
    /// Occurrences of each item, `[V]`.
    pub items: Vec<i64>,
    /// Occurrences of each item on the last day, `[V]`.
    pub last_day_items: Vec<i64>,
    pub last_day: i64,
    pub attributes: Attributes,
}

impl Counts {
    pub fn new(n_items: i64, n_kept: usize, attributes: Attributes) -> Self {
        let n_items = n_items as usize;
        Self {
            n_kept,
            pairs: Vec::new(),
            waiting: Vec::new(),
            items: vec![0; n_items],
            last_day_items: vec![0; n_items],
            last_day: i64::MIN,
            attributes,
        }
    }

    /// Counts without attributes, as the factors of pairs need them.
    pub fn of_items(n_items: i64) -> Self {
        Self::new(n_items, N_FACTORED, Attributes::default())
    }

    /// Both items of each pair, and its weight.
    pub fn weights(&self) -> impl Iterator<Item = (usize, usize, f32)> {
        let weight = |pair: &Pair| pair.units() / UNITS as f32;
        self.pairs.iter().map(move |pair| (pair.first as usize, pair.second as usize, weight(pair)))
    }

    /// Counts the sessions of a day, which is later than all days before. Row groups are read one
    /// at a time.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn add_day(&mut self, day: i64, file: &SessionFile) -> Result<(), DataError> {
        self.begin_day(day);
        for span in file.spans(0..file.n_sessions()) {
            self.add(&file.read(slice::from_ref(&span))?);
        }
        self.end_day();
        Ok(())
    }

    pub fn begin_day(&mut self, day: i64) {
        self.last_day = day;
        self.last_day_items.fill(0);
    }

    /// Counts sessions of the day that began last.
    pub fn add(&mut self, sessions: &Sessions) {
        for row in 0..sessions.len() {
            self.add_items(sessions.ids(0, row), true);
            self.attributes.add(sessions, row);
        }
    }

    pub fn add_items(&mut self, items: &[i64], is_last_day: bool) {
        for &item in items {
            self.items[item as usize] += 1;
            self.last_day_items[item as usize] += i64::from(is_last_day);
        }
        self.add_pairs(items);
    }

    fn add_pairs(&mut self, items: &[i64]) {
        for (start, &first) in items.iter().enumerate().filter(|(_, item)| **item >= FIRST_ITEM) {
            let later = items[start + 1..].iter().zip(1..=WINDOW as u32);
            self.waiting.extend(later.filter(|(item, _)| **item >= FIRST_ITEM).map(
                |(&second, distance)| Pair {
                    first: first as u32,
                    second: second as u32,
                    units: UNITS / distance,
                    adjacent: u32::from(distance == 1),
                },
            ));
        }
        if self.waiting.len() >= MIN_MERGED.max(self.pairs.len() / 2) {
            self.merge();
        }
    }

    /// Merges the pairs that wait.
    fn merge(&mut self) {
        let mut pairs = std::mem::take(&mut self.pairs);
        pairs.append(&mut self.waiting);
        pairs.sort_unstable_by_key(Pair::key);
        pairs.dedup_by(|later, kept| {
            let is_same = later.key() == kept.key();
            if is_same {
                kept.units = kept.units.saturating_add(later.units);
                kept.adjacent = kept.adjacent.saturating_add(later.adjacent);
            }
            is_same
        });
        self.pairs = pairs;
    }

    /// Drops the lightest pairs.
    pub fn end_day(&mut self) {
        self.merge();
        let mut is_kept = vec![false; self.pairs.len()];
        let mut order: Vec<u32> = (0..self.pairs.len() as u32).collect();
        let pairs = &self.pairs;
        let mut keep_heaviest = |sort_key: fn(&Pair) -> (u32, Reverse<u32>, u32)| {
            order.sort_unstable_by_key(|&index| sort_key(&pairs[index as usize]));
            let item = |index: &u32| sort_key(&pairs[*index as usize]).0;
            for of_item in order.chunk_by(|a, b| item(a) == item(b)) {
                of_item.iter().take(self.n_kept).for_each(|&index| is_kept[index as usize] = true);
            }
        };
        keep_heaviest(Pair::by_first);
        keep_heaviest(Pair::by_second);
        let mut kept = is_kept.into_iter();
        self.pairs.retain(|_| kept.next() == Some(true));
        self.pairs.shrink_to_fit();
    }

    /// Items that occurred, the most frequent first.
    pub fn by_occurrence(&self) -> Vec<usize> {
        let mut items: Vec<usize> =
            (FIRST_ITEM as usize..self.items.len()).filter(|&item| self.items[item] > 0).collect();
        items.sort_by_key(|&item| (-self.items[item], item));
        items
    }

    /// All pairs, sorted by both items.
    pub(super) fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// The counts as a checkpoint holds them.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let join = |high: u32, low: u32| (i64::from(high) << 32) | i64::from(low);
        let pairs: Vec<i64> = self
            .pairs
            .iter()
            .flat_map(|pair| [join(pair.first, pair.second), join(pair.units, pair.adjacent)])
            .collect();
        let named = |name: &str, numbers: &[i64]| (name.to_owned(), Tensor::from_slice(numbers));
        let mut tensors = vec![
            named("pairs", &pairs),
            named("items", &self.items),
            named("last_day_items", &self.last_day_items),
            named("last_day", &[self.last_day]),
        ];
        tensors.extend(self.attributes.tensors());
        tensors
    }

    /// Restores what [`Counts::tensors`] returned, perhaps of a smaller catalogue.
    ///
    /// # Errors
    /// Returns the first tensor that is missing or does not fit.
    pub fn load(&mut self, tensors: &[(String, Tensor)]) -> Result<(), String> {
        let find = |name: &str| {
            let tensor = tensors.iter().find(|(tensor, _)| tensor == name);
            tensor.map(|(_, tensor)| tensor).ok_or_else(|| format!("tensor `{name}` is missing"))
        };
        let numbers = |name: &str| -> Result<Vec<i64>, String> {
            let numbers = Vec::try_from(find(name)?.reshape([-1]));
            numbers.map_err(|error| format!("tensor `{name}`: {error}"))
        };
        let n_items = self.items.len();
        let of_items = |name: &str| {
            let mut counts = numbers(name)?;
            if counts.len() > n_items {
                return Err(format!("`{name}` counts {} items, not {n_items}", counts.len()));
            }
            counts.resize(n_items, 0);
            Ok(counts)
        };
        self.items = of_items("items")?;
        self.last_day_items = of_items("last_day_items")?;
        self.last_day = numbers("last_day")?.first().copied().unwrap_or(i64::MIN);
        let split = |number: i64| ((number >> 32) as u32, number as u32);
        let pair = |numbers: &[i64]| {
            let ((first, second), (units, adjacent)) = (split(numbers[0]), split(numbers[1]));
            Pair { first, second, units, adjacent }
        };
        self.pairs = numbers("pairs")?.chunks_exact(2).map(pair).collect();
        let is_known = |pair: &Pair| (pair.first.max(pair.second) as usize) < n_items;
        if !(self.pairs.iter().all(is_known) && self.pairs.is_sorted_by_key(Pair::key)) {
            return Err(format!("`pairs` are not sorted pairs of {n_items} items"));
        }
        self.attributes.load(find, n_items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(sessions: &[&[i64]], n_kept: usize) -> Counts {
        let mut counts = Counts::new(10, n_kept, Attributes::default());
        sessions.iter().for_each(|items| counts.add_pairs(items));
        counts.end_day();
        counts
    }

    #[test]
    fn pairs_weigh_the_inverse_of_their_distance() {
        let counts = counts(&[&[2, 3, 4], &[2, 3], &[1, 2, 0]], 8);
        let pairs: Vec<_> = counts
            .pairs()
            .iter()
            .map(|pair| (pair.first, pair.second, pair.units(), pair.adjacent()))
            .collect();
        assert_eq!(pairs, [(2, 3, 840.0, 2.0), (2, 4, 210.0, 0.0), (3, 4, 420.0, 1.0)]);
    }

    #[test]
    fn the_heaviest_pairs_of_either_item_are_kept() {
        let sessions: [&[i64]; 6] = [&[2, 3], &[2, 3], &[2, 4], &[5, 4], &[5, 4], &[5, 6]];
        let counts = counts(&sessions, 1);
        let pairs: Vec<_> = counts.pairs().iter().map(Pair::key).collect();
        // (2, 4) is neither the heaviest of 2 nor of 4.
        assert_eq!(pairs, [(2, 3), (5, 4), (5, 6)]);
    }

    #[test]
    fn loaded_counts_are_those_that_were_saved() {
        let saved = counts(&[&[2, 3, 4, 2], &[7, 2]], 4);
        let mut loaded = Counts::new(12, 4, Attributes::default());
        loaded.load(&saved.tensors()).unwrap();
        assert_eq!(loaded.pairs(), saved.pairs());
        assert_eq!(loaded.items.len(), 12);
        let mut smaller = Counts::new(5, 4, Attributes::default());
        assert!(smaller.load(&saved.tensors()).unwrap_err().contains("items"));
    }
}
