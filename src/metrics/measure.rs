//! Names of the ranking metrics.

use super::Metrics;
use crate::config::Measure;

impl Measure {
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
