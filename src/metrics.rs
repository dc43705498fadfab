//! How well the held-out item is ranked: NDCG@K, Recall@K and MRR@K over the full catalogue.
//!
//! With one relevant item at rank r (from 1), NDCG@K is `1 / log2(r + 1)`, Recall@K is 1 and MRR@K is `1 / r` if
//! r ≤ K, and 0 otherwise. All of them are functions of *how many* sessions had which rank, so ranks of a job
//! add up integer counts, and the figures are the same to the last digit however the sessions were divided.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, CollectiveError};
use crate::data::{DataError, Features, SessionFile, evaluation_batches};
use crate::model::Recommender;

/// Largest K of any metric.
const K_MAX: usize = 20;

/// First item index that may be recommended: padding (0) and unknown (1) never are.
const FIRST_ITEM: i64 = 2;

/// Losses are added up as whole multiples of 2⁻³⁰, so that their order does not matter: room for 10⁸ sessions.
const LOSS_UNIT: f64 = (1u64 << 30) as f64;

/// Section `[evaluate]` of a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Sessions scored together.
    pub block: usize,
    /// Memory for scores, in MiB: a block is scored against as much of the catalogue at a time as this holds.
    pub scores_mib: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { block: 256, scores_mib: 256 }
    }
}

/// What can go wrong while evaluating.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// Reading sessions.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Adding up over ranks.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A score that cannot be ranked.
    #[error("`{path}`: the model's scores are not finite")]
    NotFinite {
        /// The file being evaluated.
        path: std::path::PathBuf,
    },
}

/// Means over sessions; NaN (`null` in JSON) where there is no session, or no loss.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metrics {
    /// Sessions evaluated.
    pub n_sessions: i64,
    /// Cross entropy of the held-out item; none for a model whose scores are not logits.
    pub loss: f64,
    /// NDCG@10.
    pub ndcg_at_10: f64,
    /// NDCG@20.
    pub ndcg_at_20: f64,
    /// Recall@10.
    pub recall_at_10: f64,
    /// Recall@20.
    pub recall_at_20: f64,
    /// MRR@20.
    pub mrr_at_20: f64,
}

/// How many sessions had their item at which rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// `at_rank[r]` for ranks 1 to [`K_MAX`]; `at_rank[0]` counts the sessions beyond.
    at_rank: [i64; K_MAX + 1],
    /// Summed loss in units of [`LOSS_UNIT`].
    loss: i64,
}

impl Tally {
    /// Counts target ranks (1 is best; i64 `[B]`) and adds their losses (f64 `[B]`).
    pub fn add(&mut self, ranks: &Tensor, losses: Option<&Tensor>) {
        for rank in Vec::<i64>::try_from(ranks.to_device(Device::Cpu)).expect("ranks are i64") {
            self.at_rank[usize::try_from(rank).ok().filter(|&rank| rank <= K_MAX).unwrap_or(0)] += 1;
        }
        if let Some(losses) = losses {
            self.loss += (losses * LOSS_UNIT).round().to_kind(Kind::Int64).sum(Kind::Int64).int64_value(&[]);
        }
    }

    /// *All ranks.* Adds up over ranks.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn all_reduce(mut self, collective: &dyn Collective) -> Result<Self, CollectiveError> {
        let mut counts = [&self.at_rank[..], &[self.loss]].concat();
        collective.sum_i64(&mut counts)?;
        self.at_rank.copy_from_slice(&counts[..=K_MAX]);
        self.loss = counts[K_MAX + 1];
        Ok(self)
    }

    /// Divides, at last. `has_loss`: whether losses were added.
    pub fn metrics(&self, has_loss: bool) -> Metrics {
        let n_sessions: i64 = self.at_rank.iter().sum();
        let mean = |k: usize, value: fn(f64) -> f64| {
            (1..=k).map(|rank| self.at_rank[rank] as f64 * value(rank as f64)).sum::<f64>()
                / n_sessions as f64
        };
        let ndcg = |rank: f64| 1.0 / (rank + 1.0).log2();
        Metrics {
            n_sessions,
            loss: if has_loss { self.loss as f64 / LOSS_UNIT / n_sessions as f64 } else { f64::NAN },
            ndcg_at_10: mean(10, ndcg),
            ndcg_at_20: mean(20, ndcg),
            recall_at_10: mean(10, |_| 1.0),
            recall_at_20: mean(20, |_| 1.0),
            mrr_at_20: mean(20, |rank| 1.0 / rank),
        }
    }
}

/// *All ranks.* Evaluates a file: the last event of every session is predicted from those before it.
///
/// # Errors
/// Unreadable sessions, scores that are not finite, a failing collective.
pub fn evaluate(
    recommender: &dyn Recommender,
    file: &SessionFile,
    features: &Features,
    config: &Config,
    collective: &dyn Collective,
) -> Result<Metrics, EvaluateError> {
    let mut tally = Tally::default();
    let max_scores = (config.scores_mib << 20) as i64 / 4;
    let share = (collective.rank(), collective.world_size());
    for batch in evaluation_batches(file, features, config.block, share)? {
        let (known, targets) = batch.to_device(recommender.device()).split_last();
        let encoded = recommender.encode(&known);
        let (ranks, losses) = rank_targets(
            |items| recommender.scores(&encoded, items),
            &targets,
            recommender.n_items(),
            max_scores / batch.n_sessions().max(1) as i64,
        );
        if !bool::try_from(losses.isfinite().all()).expect("a truth value") {
            return Err(EvaluateError::NotFinite { path: file.path().to_owned() });
        }
        tally.add(&ranks, recommender.scores_are_logits().then_some(&losses));
    }
    Ok(tally.all_reduce(collective)?.metrics(recommender.scores_are_logits()))
}

/// The rank of each target among the items that may be recommended, i64 `[B]`, and its cross entropy, f64 `[B]`.
///
/// A rank is one more than the number of better items, counted chunk by chunk of at most `chunk` items; among
/// equal scores the lower index is better. A target that may not be recommended gets a rank beyond all others.
pub fn rank_targets(
    scores: impl Fn(Range<i64>) -> Tensor,
    targets: &Tensor,
    n_items: i64,
    chunk: i64,
) -> (Tensor, Tensor) {
    let chunks: Vec<Range<i64>> = (0..n_items)
        .step_by(chunk.clamp(1, n_items) as usize)
        .map(|start| start..(start + chunk.max(1)).min(n_items))
        .collect();
    let target = targets.unsqueeze(1);
    // First the targets' own scores, taken from the very product that they are compared with in the second
    // round: a score computed in another way could differ in its last bit.
    let mut target_scores = None;
    let mut log_sum: Option<Tensor> = None;
    let mut last = None;
    for items in &chunks {
        let chunk = scores(items.clone());
        let inside = target.ge(items.start).logical_and(&target.lt(items.end));
        let place = (&target - items.start).clamp(0, items.end - items.start - 1);
        let found = chunk
            .gather(1, &place, false)
            .where_self(&inside, &chunk.new_zeros([1], (chunk.kind(), chunk.device())));
        target_scores = Some(target_scores.map_or_else(|| found.shallow_clone(), |sum: Tensor| sum + &found));
        let chunk_log_sum = chunk.logsumexp([1i64].as_slice(), true);
        log_sum =
            Some(log_sum.map_or_else(|| chunk_log_sum.shallow_clone(), |sum| sum.logaddexp(&chunk_log_sum)));
        last = Some(chunk);
    }
    let (target_scores, log_sum) = (target_scores.expect("a catalogue"), log_sum.expect("a catalogue"));
    let losses = (log_sum - target_scores.to_kind(Kind::Double)).squeeze_dim(1);

    let mut n_better = Tensor::zeros_like(targets);
    let only = last.filter(|_| chunks.len() == 1);
    for items in &chunks {
        let first = items.start.max(FIRST_ITEM);
        if first >= items.end {
            continue;
        }
        let chunk = only.as_ref().map_or_else(|| scores(items.clone()), Tensor::shallow_clone);
        let chunk = chunk.narrow(1, first - items.start, items.end - first);
        let indices = Tensor::arange_start(first, items.end, (Kind::Int64, targets.device())).unsqueeze(0);
        let tied_before = chunk.eq_tensor(&target_scores).logical_and(&indices.lt_tensor(&target));
        let better = chunk.gt_tensor(&target_scores).logical_or(&tied_before);
        n_better += better.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
    }
    let beyond = Tensor::full_like(targets, n_items + 1);
    ((n_better + 1).where_self(&targets.ge(FIRST_ITEM), &beyond), losses)
}
