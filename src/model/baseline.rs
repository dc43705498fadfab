//! Baselines, which count instead of learning by gradients.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{CountingModel, Encoded, Neighbours, Recommender, SparseScores};
use crate::collective::CollectiveError;
use crate::data::{Batch, DataError, SessionFile};

/// Counts that rank an item before its total number of occurrences does.
pub enum BaselineKind {
    None,
    /// Occurrences of each item on the last day: `[V]`.
    LastDay(Vec<i64>),
    /// Occurrences of each pair (item, next item); scores are those of the session's last item.
    Successors(BTreeMap<(i64, i64), i64>),
    /// V-SkNN over all past sessions.
    Neighbours(Neighbours),
}

/// A baseline: counts of its kind, then occurrences of items over all days.
///
/// Occurrences give a score below 1, and the counts of the kind are added to it or give more than
/// 1, so that occurrences break ties and rank the items without other counts.
pub struct Baseline {
    /// Occurrences of each item, `[V]`.
    items: Vec<i64>,
    kind: BaselineKind,
    /// Scores that do not depend on the session: `[V]`.
    base_scores: Vec<f64>,
}

impl Baseline {
    pub fn new(kind: BaselineKind, n_items: i64) -> Self {
        let n_items = n_items as usize;
        Self { items: vec![0; n_items], kind, base_scores: vec![0.0; n_items] }
    }

    /// Counts the sessions of a day, which is later than all days before.
    pub fn add_sessions<'a>(&mut self, sessions: impl Iterator<Item = &'a [i64]>) {
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
        self.update_base_scores();
    }

    fn update_base_scores(&mut self) {
        let max_count = self.items.iter().copied().max().unwrap_or(0) as f64;
        self.base_scores = self.items.iter().map(|&n| n as f64 / (max_count + 1.0)).collect();
        if let BaselineKind::LastDay(counts) = &self.kind {
            for (score, &n) in self.base_scores.iter_mut().zip(counts) {
                *score += n as f64;
            }
        }
    }

    /// Items whose score depends on the known part of a session, and their scores.
    fn session_scores(&self, known: &[i64]) -> Vec<(i64, f64)> {
        match &self.kind {
            BaselineKind::None | BaselineKind::LastDay(_) => Vec::new(),
            BaselineKind::Successors(pairs) => {
                let last = *known.last().expect("an event is known");
                let successors = pairs.range((last, 0)..(last + 1, 0));
                successors
                    .map(|(&(_, next), &n)| (next, n as f64 + self.base_scores[next as usize]))
                    .collect()
            }
            BaselineKind::Neighbours(neighbours) => {
                let scores = neighbours.scores(known).into_iter();
                scores.map(|(item, score)| (i64::from(item), 1.0 + score)).collect()
            }
        }
    }
}

impl CountingModel for Baseline {
    fn add_day(&mut self, _day: i64, file: &SessionFile) -> Result<(), DataError> {
        let sessions = file.read(&file.spans(0..file.n_sessions()))?;
        self.add_sessions((0..sessions.len()).map(|row| sessions.ids(0, row)));
        Ok(())
    }

    fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![("items".to_owned(), Tensor::from_slice(&self.items))];
        let mut push = |name: &str, tensor| tensors.push((name.to_owned(), tensor));
        match &self.kind {
            BaselineKind::None => {}
            BaselineKind::LastDay(counts) => push("last_day", Tensor::from_slice(counts)),
            BaselineKind::Successors(pairs) => {
                let flat: Vec<i64> =
                    pairs.iter().flat_map(|(&(item, next), &n)| [item, next, n]).collect();
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

    fn load(&mut self, tensors: &[(String, Tensor)]) -> Result<(), String> {
        let numbers = |name: &str| -> Result<Vec<i64>, String> {
            let tensor = tensors.iter().find(|(tensor, _)| tensor == name);
            let (_, tensor) = tensor.ok_or_else(|| format!("tensor `{name}` is missing"))?;
            Vec::try_from(tensor.reshape([-1])).map_err(|error| format!("tensor `{name}`: {error}"))
        };
        let n_items = self.items.len();
        let item_counts = |name: &str| {
            let mut counts = numbers(name)?;
            // The catalogue may have grown since the checkpoint.
            if counts.len() <= n_items {
                counts.resize(n_items, 0);
                return Ok(counts);
            }
            Err(format!("`{name}` counts {} items, the schema has {n_items}", counts.len()))
        };
        let check_items = |name: &str, items: &[i64]| {
            let is_known = |item: i64| usize::try_from(item).is_ok_and(|item| item < n_items);
            match items.iter().find(|&&item| !is_known(item)) {
                Some(item) => {
                    Err(format!("`{name}` has the item {item}, the schema has {n_items} items"))
                }
                None => Ok(()),
            }
        };
        self.items = item_counts("items")?;
        match &mut self.kind {
            BaselineKind::None => {}
            BaselineKind::LastDay(counts) => *counts = item_counts("last_day")?,
            BaselineKind::Successors(pairs) => {
                for entry in numbers("pairs")?.chunks_exact(3) {
                    check_items("pairs", &entry[..2])?;
                    pairs.insert((entry[0], entry[1]), entry[2]);
                }
            }
            BaselineKind::Neighbours(neighbours) => {
                let (items, lengths) = (numbers("session_items")?, numbers("session_lengths")?);
                check_items("session_items", &items)?;
                let mut rest = &items[..];
                for length in lengths {
                    let split = usize::try_from(length)
                        .ok()
                        .and_then(|length| rest.split_at_checked(length));
                    let (session, after) =
                        split.ok_or("`session_lengths` does not fit `session_items`")?;
                    neighbours.add(session);
                    rest = after;
                }
            }
        }
        self.update_base_scores();
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

    /// Only sparse scores, f64.
    fn encode(&self, known: &Batch) -> Result<Encoded, CollectiveError> {
        let scored: Vec<_> =
            known.sessions().iter().map(|session| self.session_scores(session)).collect();
        let (n_sessions, longest) =
            (scored.len() as i64, scored.iter().map(Vec::len).max().unwrap_or(0));
        let padded = |session: &Vec<(i64, f64)>| {
            let missing = std::iter::repeat_n((0, 0.0), longest - session.len());
            session.iter().copied().chain(missing).collect::<Vec<_>>()
        };
        let (items, scores): (Vec<i64>, Vec<f64>) = scored.iter().flat_map(padded).unzip();
        let size = [n_sessions, longest as i64];
        let sparse = SparseScores {
            items: Tensor::from_slice(&items).view(size),
            scores: Tensor::from_slice(&scores).view(size),
        };
        let vectors = Tensor::zeros([n_sessions, 0], (Kind::Float, Device::Cpu));
        Ok(Encoded { vectors, sparse: Some(sparse) })
    }

    fn scores(&self, encoded: &Encoded, items: Range<i64>) -> Tensor {
        let sparse = encoded.sparse.as_ref().expect("a baseline encodes sparse scores");
        let base = &self.base_scores[items.start as usize..items.end as usize];
        let scores = Tensor::from_slice(base).unsqueeze(0).repeat([sparse.items.size()[0], 1]);
        sparse.write_to(&scores, None, &items);
        scores
    }
}
