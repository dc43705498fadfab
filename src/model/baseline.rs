//! Models that count: what any learnt model has to beat.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{Neighbours, Recommender};
use crate::collective::CollectiveError;
use crate::data::Batch;

/// What speaks for an item besides how often it occurred.
pub enum BaselineKind {
    /// Nothing.
    None,
    /// How often it occurred on the last day: `[V]`.
    LastDay(Vec<i64>),
    /// How often it followed the session's last item: occurrences of (item, next item).
    Successors(BTreeMap<(i64, i64), i64>),
    /// That sessions like this one hold it.
    Neighbours(Neighbours),
}

/// Occurrences of items over all days, which score below 1, and kind, which scores more.
pub struct Baseline {
    /// Occurrences of each item, `[V]`.
    items: Vec<i64>,
    kind: BaselineKind,
    /// Scores without regard to the session: `[V]`.
    base: Vec<f64>,
}

impl Baseline {
    /// Nothing counted yet.
    pub fn new(kind: BaselineKind, n_items: i64) -> Self {
        let n_items = n_items as usize;
        Self { items: vec![0; n_items], kind, base: vec![0.0; n_items] }
    }

    /// Baseline the sessions of a day, later than the days before.
    pub fn add_day<'a>(&mut self, sessions: impl Iterator<Item = &'a [i64]>) {
        if let BaselineKind::LastDay(counts) = &mut self.kind {
            *counts = vec![0; self.items.len()];
        }
        for session in sessions {
            for &item in session {
                self.items[item as usize] += 1;
            }
            match &mut self.kind {
                BaselineKind::None => {}
                BaselineKind::LastDay(counts) => {
                    for &item in session {
                        counts[item as usize] += 1;
                    }
                }
                BaselineKind::Successors(pairs) => {
                    for pair in session.windows(2) {
                        *pairs.entry((pair[0], pair[1])).or_default() += 1;
                    }
                }
                BaselineKind::Neighbours(neighbours) => neighbours.add(session),
            }
        }
        self.set_base();
    }

    fn set_base(&mut self) {
        let most = self.items.iter().copied().max().unwrap_or(0) as f64;
        self.base = self.items.iter().map(|&n| n as f64 / (most + 1.0)).collect();
        if let BaselineKind::LastDay(counts) = &self.kind {
            for (base, &n) in self.base.iter_mut().zip(counts) {
                *base += n as f64;
            }
        }
    }

    /// The items that the known part of a session speaks for, and their scores.
    fn evident(&self, known: &[i64]) -> Vec<(i64, f64)> {
        match &self.kind {
            BaselineKind::None | BaselineKind::LastDay(_) => Vec::new(),
            BaselineKind::Successors(pairs) => {
                let last = *known.last().expect("an event is known");
                let successors = pairs.range((last, 0)..(last + 1, 0));
                successors.map(|(&(_, next), &n)| (next, n as f64 + self.base[next as usize])).collect()
            }
            BaselineKind::Neighbours(neighbours) => {
                let scores = neighbours.scores(known).into_iter();
                scores.map(|(item, score)| (i64::from(item), 1.0 + score)).collect()
            }
        }
    }

    /// What was counted.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![("items".to_owned(), Tensor::from_slice(&self.items))];
        let mut push = |name: &str, tensor| tensors.push((name.to_owned(), tensor));
        match &self.kind {
            BaselineKind::None => {}
            BaselineKind::LastDay(counts) => push("last_day", Tensor::from_slice(counts)),
            BaselineKind::Successors(pairs) => {
                let flat: Vec<i64> = pairs.iter().flat_map(|(&(item, next), &n)| [item, next, n]).collect();
                push("pairs", Tensor::from_slice(&flat).view([-1, 3]));
            }
            BaselineKind::Neighbours(neighbours) => {
                let (items, lengths) = neighbours.flat();
                push("session_items", Tensor::from_slice(&items));
                push("session_lengths", Tensor::from_slice(&lengths));
            }
        }
        tensors
    }

    /// Takes what [`Baseline::tensors`] gave, before anything was counted.
    ///
    /// # Errors
    /// Says which tensor is missing or does not fit.
    pub fn load(&mut self, tensors: &[(String, Tensor)]) -> Result<(), String> {
        let numbers = |name: &str| -> Result<Vec<i64>, String> {
            let found = tensors.iter().find(|(tensor, _)| tensor == name);
            let (_, tensor) = found.ok_or_else(|| format!("tensor `{name}` is missing"))?;
            Vec::try_from(tensor.reshape([-1])).map_err(|error| format!("tensor `{name}`: {error}"))
        };
        let n_items = self.items.len();
        let of_each_item = |name: &str| {
            let mut counts = numbers(name)?;
            // A catalogue may have grown since.
            if counts.len() <= n_items {
                counts.resize(n_items, 0);
                return Ok(counts);
            }
            Err(format!("`{name}` counts {} items, the schema has {n_items}", counts.len()))
        };
        let items_of = |name: &str, items: &[i64]| match items
            .iter()
            .find(|&&item| usize::try_from(item).map_or(true, |item| item >= n_items))
        {
            Some(item) => Err(format!("`{name}` has the item {item}, the schema {n_items}")),
            None => Ok(()),
        };
        self.items = of_each_item("items")?;
        match &mut self.kind {
            BaselineKind::None => {}
            BaselineKind::LastDay(counts) => *counts = of_each_item("last_day")?,
            BaselineKind::Successors(pairs) => {
                for entry in numbers("pairs")?.chunks_exact(3) {
                    items_of("pairs", &entry[..2])?;
                    pairs.insert((entry[0], entry[1]), entry[2]);
                }
            }
            BaselineKind::Neighbours(neighbours) => {
                let (items, lengths) = (numbers("session_items")?, numbers("session_lengths")?);
                items_of("session_items", &items)?;
                let mut rest = &items[..];
                for length in lengths {
                    let taken = usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length));
                    let (session, after) = taken.ok_or("`session_lengths` does not fit `session_items`")?;
                    neighbours.add(session);
                    rest = after;
                }
            }
        }
        self.set_base();
        Ok(())
    }
}

impl Recommender for Baseline {
    fn n_items(&self) -> i64 {
        self.items.len() as i64
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn scores_are_logits(&self) -> bool {
        false
    }

    /// The items that each session speaks for and their scores, f64 `[B, E, 2]`; item −1 where there are fewer.
    fn encode(&self, known: &Batch) -> Result<Tensor, CollectiveError> {
        let evident: Vec<_> = known.sessions().iter().map(|session| self.evident(session)).collect();
        let longest = evident.iter().map(Vec::len).max().unwrap_or(0);
        let mut padded = vec![-1.0; evident.len() * longest * 2];
        for (row, session) in padded.chunks_exact_mut(2 * longest.max(1)).zip(&evident) {
            for (place, &(item, score)) in row.chunks_exact_mut(2).zip(session) {
                place.copy_from_slice(&[item as f64, score]);
            }
        }
        Ok(Tensor::from_slice(&padded).view([evident.len() as i64, longest as i64, 2]))
    }

    fn scores(&self, encoded: &Tensor, items: Range<i64>) -> Tensor {
        let (n_sessions, _, _) = encoded.size3().expect("kind is [B, E, 2]");
        let width = items.end - items.start;
        // One column more than there are items takes what lies outside of them.
        let base = [&self.base[items.start as usize..items.end as usize], &[0.0]].concat();
        let scores = Tensor::from_slice(&base).unsqueeze(0).repeat([n_sessions, 1]);
        let item = encoded.select(2, 0).to_kind(Kind::Int64);
        let inside = item.ge(items.start).logical_and(&item.lt(items.end));
        let place = (item - items.start).where_scalarother(&inside, width);
        scores.scatter(1, &place, &encoded.select(2, 1)).narrow(1, 0, width)
    }
}
