//! Section `[evaluate]`, and the metrics that a configuration can name.

use serde::{Deserialize, Serialize};

use super::check_count;

/// Section `[evaluate]`: ranking of the held-out item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateConfig {
    /// Sessions that are scored together; at least 1.
    pub block: usize,
    /// Memory for their scores, in MiB: the catalogue is scored in chunks that fit.
    pub scores_mib: usize,
    /// Which items of a session may be recommended to the same session again.
    pub reminders: Reminders,
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self { block: 256, scores_mib: 64, reminders: Reminders::All }
    }
}

impl EvaluateConfig {
    /// Checks the ranges of the values.
    ///
    /// # Errors
    /// Returns the first invalid key.
    pub fn check(&self) -> Result<(), String> {
        check_count("block", self.block, 1 << 20)?;
        check_count("scores_mib", self.scores_mib, 1 << 24)
    }
}

/// `evaluate.reminders`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Reminders {
    /// All items.
    All,
    /// All but the last, which never follows itself after preprocessing.
    Earlier,
    /// No item.
    None,
}

/// One of the ranking metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Measure {
    /// NDCG@10.
    #[serde(rename = "ndcg_at_10")]
    NdcgAt10,
    /// NDCG@20.
    #[serde(rename = "ndcg_at_20")]
    NdcgAt20,
    /// Recall@10.
    #[serde(rename = "recall_at_10")]
    RecallAt10,
    /// Recall@20.
    #[serde(rename = "recall_at_20")]
    RecallAt20,
    /// MRR@20.
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
}
