//! Section `[evaluate]`.

use serde::{Deserialize, Serialize};

use super::check_count;

/// Section `[evaluate]`: ranking of the held-out item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateConfig {
    /// Sessions that are scored together, or cases of them; at least 1.
    pub block: usize,
    /// Memory for their scores, in MiB: the catalogue is scored in chunks that fit.
    pub scores_mib: usize,
    /// Which items of a session may be recommended to the same session again.
    pub reminders: Reminders,
    /// Which items of a session are predicted from those before them.
    pub cases: Cases,
    /// Whether cases with an unknown target count.
    pub unknown_targets: UnknownTargets,
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self {
            block: 256,
            scores_mib: 64,
            reminders: Reminders::All,
            cases: Cases::Last,
            unknown_targets: UnknownTargets::Count,
        }
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

/// `evaluate.cases`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Cases {
    /// The last item: a session is one case.
    Last,
    /// Every item but the first, as in the tables of GRU4Rec and SR-GNN: long sessions weigh more.
    /// Of each prefix, the last `data.max_length` events with the target are read.
    Every,
}

/// `evaluate.unknown_targets`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum UnknownTargets {
    /// They are cases that no model gets right.
    Count,
    /// They are no cases.
    LeaveOut,
}

/// `evaluate.reminders`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Reminders {
    /// `earlier` if no item follows itself in the first training day, else `all`.
    Auto,
    /// All items.
    All,
    /// All but the last, which never follows itself after preprocessing.
    Earlier,
    /// No item.
    None,
}
