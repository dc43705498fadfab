//! Models that count: what any learnt model has to beat.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::Recommender;
use crate::data::Batch;

/// How much of a session counting looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Nothing: items are scored by how often they occurred.
    Zero,
    /// The last item: items are scored by how often they followed it, then by how often they occurred.
    First,
}

/// Occurrences of items and of pairs of consecutive items.
pub struct Counts {
    order: Order,
    n_items: i64,
    /// Occurrences of each item, `[V]`.
    items: Vec<i64>,
    /// Occurrences of (item, next item).
    pairs: BTreeMap<(i64, i64), i64>,
    /// Scores that popularity alone gives, below 1 so that one pair outweighs it: f64 `[1, V]`.
    popularity: Tensor,
}

impl Counts {
    /// Nothing counted yet.
    pub fn new(order: Order, n_items: i64) -> Self {
        let popularity = Tensor::zeros([1, n_items], (Kind::Double, Device::Cpu));
        Self { order, n_items, items: vec![0; n_items as usize], pairs: BTreeMap::new(), popularity }
    }

    /// Counts the events of a batch.
    pub fn count(&mut self, batch: &Batch) {
        for session in batch.sessions() {
            session.iter().for_each(|&item| self.items[item as usize] += 1);
            if self.order == Order::First {
                session.windows(2).for_each(|pair| *self.pairs.entry((pair[0], pair[1])).or_default() += 1);
            }
        }
    }

    /// Adds what another rank, day or run counted.
    pub fn add(&mut self, items: &[i64], pairs: impl IntoIterator<Item = ((i64, i64), i64)>) {
        for (mine, theirs) in self.items.iter_mut().zip(items) {
            *mine += theirs;
        }
        for (pair, n) in pairs {
            *self.pairs.entry(pair).or_default() += n;
        }
        let most = self.items.iter().copied().max().unwrap_or(0) as f64;
        self.popularity = (Tensor::from_slice(&self.items).to_kind(Kind::Double) / (most + 1.0)).unsqueeze(0);
    }

    /// Occurrences of each item.
    pub fn items(&self) -> &[i64] {
        &self.items
    }

    /// Occurrences of each (item, next item), ascending.
    pub fn pairs(&self) -> impl Iterator<Item = ((i64, i64), i64)> {
        self.pairs.iter().map(|(&pair, &n)| (pair, n))
    }
}

impl Recommender for Counts {
    fn n_items(&self) -> i64 {
        self.n_items
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn scores_are_logits(&self) -> bool {
        false
    }

    /// Each session's last item, i64 `[B]`.
    fn encode(&self, known: &Batch) -> Tensor {
        let last = |session: &Vec<i64>| *session.last().expect("a known session has an event");
        Tensor::from_slice(&known.sessions().iter().map(last).collect::<Vec<_>>())
    }

    fn scores(&self, encoded: &Tensor, items: Range<i64>) -> Tensor {
        let last = Vec::<i64>::try_from(encoded).expect("item indices are i64");
        let width = items.end - items.start;
        let popularity = self.popularity.narrow(1, items.start, width);
        let scores = popularity.repeat([last.len() as i64, 1]);
        if self.order == Order::First {
            let (mut places, mut counts) = (Vec::new(), Vec::new());
            for (row, &item) in last.iter().enumerate() {
                for (&(_, next), &n) in self.pairs.range((item, items.start)..(item, items.end)) {
                    places.push(row as i64 * width + next - items.start);
                    counts.push(n as f64);
                }
            }
            let counts = Tensor::from_slice(&counts);
            let _ = scores.view(-1).index_add_(0, &Tensor::from_slice(&places), &counts);
        }
        scores
    }
}
