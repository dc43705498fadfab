//! V-SkNN: scores from the items of the most similar past sessions.
//!
//! Ludewig and Jannach 2018, "Evaluation of session-based recommendation algorithms", with the
//! decays and the inverse document frequency of their later comparison (Ludewig et al. 2021,
//! "Empirical analysis of session-based recommendation algorithms"). Let the known part of a
//! session be the items `i₁ … i_n`, without unknown ones, and let `s` be a past session as a set of
//! items.
//!
//! 1. *Candidates* are the `sample_size` most recent sessions that share an item with it.
//! 2. *Similarity.* Each distinct item of the known part has the weight `w(p, n)`, where p is its
//!    last position in it. The similarity of `s` is the dot product of these weights with `s`,
//!    divided by the number of distinct items: `sim(s) = Σ_{i ∈ s} w(p_i, n) / n_distinct`.
//! 3. *Neighbours* are the `k` candidates with the greatest similarity above 0; ties go to the more
//!    recent session.
//! 4. *Scores.* A neighbour votes for all its items. Its vote decays with the distance of the last
//!    shared item from the end of the known part, d = 1 for the last item:
//!    `score(i) = (1 + idf_weight · idf(i)) · Σ_{s ∋ i} sim(s) · v(d_s)`, where `idf(i)` is the
//!    logarithm of the number of past sessions divided by the number of those that contain i.
//!
//! Items of the session itself are scored like all others. Sessions are ordered by day and, as they
//! have no times within a day, by row.

use crate::config::NeighboursConfig;
use crate::data::FIRST_ITEM;

/// Past sessions, indexed by session and by item.
pub struct Neighbours {
    config: NeighboursConfig,
    /// The distinct items of each session, ascending; oldest session first.
    items: Vec<u32>,
    /// Session `s` has the items `items[offsets[s]..offsets[s + 1]]`.
    offsets: Vec<usize>,
    /// Sessions with each item, oldest first.
    sessions_by_item: Vec<Vec<u32>>,
}

impl Neighbours {
    pub fn new(config: &NeighboursConfig, n_items: i64) -> Self {
        let sessions_by_item = vec![Vec::new(); n_items as usize];
        Self { config: config.clone(), items: Vec::new(), offsets: vec![0], sessions_by_item }
    }

    /// Adds a session, which becomes the most recent one.
    pub fn add(&mut self, session: &[i64]) {
        let mut items: Vec<u32> =
            session.iter().filter(|&&item| item >= FIRST_ITEM).map(|&item| item as u32).collect();
        items.sort_unstable();
        items.dedup();
        let index = self.n_sessions() as u32;
        for &item in &items {
            self.sessions_by_item[item as usize].push(index);
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

    /// The items of all sessions, concatenated, and the number of items of each session.
    pub fn flat(&self) -> (Vec<i64>, Vec<i64>) {
        let lengths = self.offsets.windows(2).map(|ends| (ends[1] - ends[0]) as i64);
        (self.items.iter().map(|&item| i64::from(item)).collect(), lengths.collect())
    }

    /// Scores of the items of the neighbours of `session`, the known part of one; items ascend.
    pub fn scores(&self, session: &[i64]) -> Vec<(u32, f64)> {
        let Self { config, sessions_by_item, .. } = self;
        let known: Vec<u32> =
            session.iter().filter(|&&item| item >= FIRST_ITEM).map(|&item| item as u32).collect();
        let n = known.len();
        let distinct: Vec<(usize, u32)> = (1..=n)
            .zip(known.iter().copied())
            .filter(|&(p, item)| !known[p..].contains(&item))
            .collect();

        // The sample needs only the `sample_size` most recent sessions of each item: an older one
        // has that many more recent candidates.
        let weights = distinct.iter().flat_map(|&(p, item)| {
            let weight = config.weighting.of_position(p, n) / distinct.len() as f64;
            let sessions = &sessions_by_item[item as usize];
            sessions[sessions.len().saturating_sub(config.sample_size)..]
                .iter()
                .map(move |&s| (s, weight))
        });
        let mut sample = sum_by_key(weights.collect());
        sample.reverse();
        sample.truncate(config.sample_size);
        sample.retain(|&(_, similarity)| similarity > 0.0);
        // The sort is stable: ties keep the more recent session first.
        sample.sort_by(|a, b| b.1.total_cmp(&a.1));
        sample.truncate(config.k);

        let votes = sample.iter().flat_map(|&(s, similarity)| {
            let items = self.session(s);
            let last = distinct.iter().rev().find(|(_, item)| items.binary_search(item).is_ok());
            let (p, _) = last.expect("a candidate shares an item");
            let score = similarity * config.score_weighting.of_distance(n - p + 1);
            items.iter().map(move |&item| (item, score))
        });
        let mut scores = sum_by_key(votes.collect());
        for (item, score) in &mut scores {
            let n_sessions = sessions_by_item[*item as usize].len();
            let idf = (self.n_sessions() as f64 / n_sessions as f64).ln();
            *score *= 1.0 + config.idf_weight * idf;
        }
        scores
    }
}

/// The sum of the values of each key; keys ascend. The sort is stable, so values are added in their
/// order and sums are bitwise reproducible.
fn sum_by_key(mut pairs: Vec<(u32, f64)>) -> Vec<(u32, f64)> {
    pairs.sort_by_key(|&(key, _)| key);
    pairs
        .chunk_by(|a, b| a.0 == b.0)
        .map(|pairs| (pairs[0].0, pairs.iter().map(|pair| pair.1).sum()))
        .collect()
}
