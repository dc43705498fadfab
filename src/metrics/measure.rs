//! Names of the ranking metrics.

use serde::{Deserialize, Serialize};

use super::Metrics;

/// One of the ranking metrics in [`Metrics`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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

    /// Value in `metrics`.
    pub fn of(self, metrics: &Metrics) -> f64 {
        match self {
            Self::NdcgAt10 => metrics.ndcg_at_10,
            Self::NdcgAt20 => metrics.ndcg_at_20,
            Self::RecallAt10 => metrics.recall_at_10,
            Self::RecallAt20 => metrics.recall_at_20,
            Self::MrrAt20 => metrics.mrr_at_20,
        }
    }
}
