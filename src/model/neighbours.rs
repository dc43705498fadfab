//! V-SkNN: what the most similar of the sessions so far hold.
//!
//! Ludewig and Jannach 2018, "Evaluation of session-based recommendation algorithms", with the decays and the
//! inverse document frequency that their later comparisons tune (Ludewig et al. 2021, "Empirical analysis of
//! session-based recommendation algorithms"). Let the known part of a session be the items `i₁ … i_n`, unknown
//! ones left out, and `s` one of the sessions so far as a set of items.
//!
//! 1. *Candidates* are the `sample_size` most recent sessions that share an item with it.
//! 2. *Similarity.* Each distinct item of the known part weighs `w(p, n)`, where p is its last position in it. The
//!    similarity of `s` is the dot product of these weights with `s`, over the number of distinct items:
//!    `sim(s) = Σ_{i ∈ s} w(p_i, n) / n_distinct`.
//! 3. *Neighbours* are the `k` candidates of greatest similarity above 0, of equal ones the more recent.
//! 4. *Scores.* A neighbour speaks for all its items, less so the further back the last item is that it shares: the
//!    d-th from the end, d = 1 being the last. `score(i) = (1 + idf_weight · idf(i)) · Σ_{s ∋ i} sim(s) · v(d_s)`,
//!    where `idf(i)` is the logarithm of all sessions so far over those that hold i.
//!
//! Items of the session itself are scored like all others. Of two sessions the one of the later day is the more
//! recent, and in a day the one of the later row: sessions carry no times inside a day.

use serde::{Deserialize, Serialize};

/// First item index that two sessions can share: padding (0) and unknown (1) are no items.
const FIRST_ITEM: i64 = 2;

/// How weight falls towards the beginning of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Not at all.
    Same,
    /// By a tenth an item, to 0: `w = 1 − (n − p) / 10`, `v = 1 − d / 10`.
    Linear,
    /// `w = p / n`, `v = 1 / d`.
    Div,
    /// The square of [`Decay::Div`].
    Quadratic,
    /// `w = 1 / log₁₀(n − p + 1.7)`, `v = 1 / log₁₀(d + 1.7)`.
    Log,
}

impl Decay {
    /// `w(p, n)`: the weight of position `p` (from 1) of `n`.
    pub fn of_position(self, p: usize, n: usize) -> f64 {
        let back = (n - p) as f64;
        match self {
            Decay::Same => 1.0,
            Decay::Linear => (1.0 - back / 10.0).max(0.0),
            Decay::Div => p as f64 / n as f64,
            Decay::Quadratic => (p as f64 / n as f64).powi(2),
            Decay::Log => 1.0 / (back + 1.7).log10(),
        }
    }

    /// `v(d)`: the weight of a neighbour whose last shared item is number `d` from the end (from 1).
    pub fn of_distance(self, d: usize) -> f64 {
        let d = d as f64;
        match self {
            Decay::Same => 1.0,
            Decay::Linear => (1.0 - d / 10.0).max(0.0),
            Decay::Div => 1.0 / d,
            Decay::Quadratic => 1.0 / (d * d),
            Decay::Log => 1.0 / (d + 1.7).log10(),
        }
    }
}

/// Parameters of V-SkNN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NeighboursConfig {
    /// Neighbours that items are taken from.
    pub k: usize,
    /// Most recent sessions with a shared item that neighbours are chosen from.
    pub sample_size: usize,
    /// `w`: how an item's weight in the similarity falls towards the beginning of the session.
    pub weighting: Decay,
    /// `v`: how a neighbour's weight falls with the place of the last item that it shares.
    pub score_weighting: Decay,
    /// How much rarer items are preferred; 0: not at all.
    pub idf_weight: f64,
}

impl Default for NeighboursConfig {
    fn default() -> Self {
        Self {
            k: 500,
            sample_size: 2500,
            weighting: Decay::Linear,
            score_weighting: Decay::Div,
            idf_weight: 5.0,
        }
    }
}

impl NeighboursConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        let Self { k, sample_size, idf_weight, .. } = *self;
        if k == 0 {
            return Err("`k` must be at least 1".to_owned());
        }
        if sample_size < k {
            return Err(format!("`sample_size` {sample_size} is less than `k` {k}"));
        }
        if !(idf_weight.is_finite() && idf_weight >= 0.0) {
            return Err(format!("`idf_weight` cannot be {idf_weight:?}"));
        }
        Ok(())
    }
}

/// The sessions so far, by session and by item.
pub struct Neighbours {
    config: NeighboursConfig,
    /// The distinct items of all sessions, oldest session first, ascending in each.
    items: Vec<u32>,
    /// Session `s` holds `items[offsets[s]..offsets[s + 1]]`.
    offsets: Vec<usize>,
    /// The sessions that hold each item, oldest first.
    holders: Vec<Vec<u32>>,
}

impl Neighbours {
    /// None yet.
    pub fn new(config: &NeighboursConfig, n_items: i64) -> Self {
        let holders = vec![Vec::new(); n_items as usize];
        Self { config: config.clone(), items: Vec::new(), offsets: vec![0], holders }
    }

    /// Adds a session, more recent than those before.
    pub fn add(&mut self, session: &[i64]) {
        let mut items: Vec<u32> =
            session.iter().filter(|&&item| item >= FIRST_ITEM).map(|&item| item as u32).collect();
        items.sort_unstable();
        items.dedup();
        let index = self.n_sessions() as u32;
        for &item in &items {
            self.holders[item as usize].push(index);
        }
        self.items.extend(items);
        self.offsets.push(self.items.len());
    }

    fn n_sessions(&self) -> usize {
        self.offsets.len() - 1
    }

    fn session(&self, index: u32) -> &[u32] {
        let index = index as usize;
        &self.items[self.offsets[index]..self.offsets[index + 1]]
    }

    /// The items of all sessions, one after the other, and how many each has.
    pub fn flat(&self) -> (Vec<i64>, Vec<i64>) {
        let lengths = self.offsets.windows(2).map(|ends| (ends[1] - ends[0]) as i64);
        (self.items.iter().map(|&item| i64::from(item)).collect(), lengths.collect())
    }

    /// The items that neighbours of the known part of a session hold, ascending, and their scores.
    pub fn scores(&self, session: &[i64]) -> Vec<(u32, f64)> {
        let Self { config, holders, .. } = self;
        let known: Vec<u32> =
            session.iter().filter(|&&item| item >= FIRST_ITEM).map(|&item| item as u32).collect();
        let n = known.len();
        let distinct: Vec<(usize, u32)> =
            (1..=n).zip(known.iter().copied()).filter(|&(p, item)| !known[p..].contains(&item)).collect();

        // A session that is not among an item's most recent holders is not among the most recent of all.
        let weights = distinct.iter().flat_map(|&(p, item)| {
            let weight = config.weighting.of_position(p, n) / distinct.len() as f64;
            let holders = &holders[item as usize];
            holders[holders.len().saturating_sub(config.sample_size)..].iter().map(move |&s| (s, weight))
        });
        let mut sample = summed(weights.collect());
        sample.reverse();
        sample.truncate(config.sample_size);
        sample.retain(|&(_, similarity)| similarity > 0.0);
        // Stable: among equals the more recent stays first.
        sample.sort_by(|a, b| b.1.total_cmp(&a.1));
        sample.truncate(config.k);

        let spoken_for = sample.iter().flat_map(|&(s, similarity)| {
            let items = self.session(s);
            let last = distinct.iter().rev().find(|(_, item)| items.binary_search(item).is_ok());
            let (p, _) = last.expect("a candidate shares an item");
            let score = similarity * config.score_weighting.of_distance(n - p + 1);
            items.iter().map(move |&item| (item, score))
        });
        let mut scores = summed(spoken_for.collect());
        for (item, score) in &mut scores {
            let n_holders = self.holders[*item as usize].len();
            let idf = (self.n_sessions() as f64 / n_holders as f64).ln();
            *score *= 1.0 + config.idf_weight * idf;
        }
        scores
    }
}

/// Adds up the values of each key, in their order, so that a sum is the same to the last bit: keys ascending.
fn summed(mut pairs: Vec<(u32, f64)>) -> Vec<(u32, f64)> {
    pairs.sort_by_key(|&(key, _)| key);
    pairs.chunk_by(|a, b| a.0 == b.0).map(|same| (same[0].0, same.iter().map(|pair| pair.1).sum())).collect()
}
