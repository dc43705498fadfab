//! The ranking metrics, as functions of how many sessions had which rank.

use serde::{Deserialize, Serialize};

/// Largest K of a metric.
pub const K_MAX: usize = 20;

/// Sessions by the rank of their held-out item: ranks 1 to 20 at their index, all beyond at 0.
pub type RankCounts = [i64; K_MAX + 1];

/// Index of a rank in [`RankCounts`].
pub fn rank_bin(rank: i64) -> usize {
    usize::try_from(rank).ok().filter(|&rank| rank <= K_MAX).unwrap_or(0)
}

/// A ranking metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Measure {
    #[serde(rename = "ndcg_at_10")]
    NdcgAt10,
    #[serde(rename = "ndcg_at_20")]
    NdcgAt20,
    #[serde(rename = "recall_at_10")]
    RecallAt10,
    #[serde(rename = "recall_at_20")]
    RecallAt20,
    #[serde(rename = "mrr_at_20")]
    MrrAt20,
}

impl Measure {
    /// All measures, in the order of tables.
    pub const ALL: [Self; 5] =
        [Self::NdcgAt10, Self::NdcgAt20, Self::RecallAt10, Self::RecallAt20, Self::MrrAt20];

    /// JSON key, as in `metrics.jsonl`.
    pub fn key(self) -> &'static str {
        match self {
            Self::NdcgAt10 => "ndcg_at_10",
            Self::NdcgAt20 => "ndcg_at_20",
            Self::RecallAt10 => "recall_at_10",
            Self::RecallAt20 => "recall_at_20",
            Self::MrrAt20 => "mrr_at_20",
        }
    }

    /// Title in tables and charts.
    pub fn title(self) -> &'static str {
        match self {
            Self::NdcgAt10 => "NDCG@10",
            Self::NdcgAt20 => "NDCG@20",
            Self::RecallAt10 => "Recall@10",
            Self::RecallAt20 => "Recall@20",
            Self::MrrAt20 => "MRR@20",
        }
    }

    /// The mean over sessions; NaN without sessions.
    pub fn mean(self, counts: &RankCounts) -> f64 {
        let (k, gain): (usize, fn(f64) -> f64) = match self {
            Self::NdcgAt10 => (10, |rank| 1.0 / (rank + 1.0).log2()),
            Self::NdcgAt20 => (20, |rank| 1.0 / (rank + 1.0).log2()),
            Self::RecallAt10 => (10, |_| 1.0),
            Self::RecallAt20 => (20, |_| 1.0),
            Self::MrrAt20 => (20, |rank| 1.0 / rank),
        };
        let sum: f64 = (1..=k).map(|rank| counts[rank] as f64 * gain(rank as f64)).sum();
        sum / counts.iter().sum::<i64>() as f64
    }
}
