//! Section `[checkpoint]`.

use bireme_tools::measure::Measure;
use serde::{Deserialize, Serialize};

use super::check_finite;

/// Section `[checkpoint]`: when a checkpoint is written, besides the end of each day, and which are
/// kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps of a day between two checkpoints; 0 disables them.
    pub every_steps: usize,
    /// Minutes between two checkpoints; 0 disables them.
    pub every_minutes: f64,
    /// Number of newest checkpoints to keep.
    pub keep_last: usize,
    /// Whether the last checkpoint of every day is kept too.
    pub keep_days: bool,
    /// Keep the checkpoint of the day after which this metric was best too; absent: it is not kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(schema_with = "super::page::measures"))]
    pub keep_best: Option<Measure>,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_steps: 0, every_minutes: 0.0, keep_last: 2, keep_days: false, keep_best: None }
    }
}

impl CheckpointConfig {
    /// Checks the ranges of the values.
    ///
    /// # Errors
    /// Returns the first invalid key.
    pub fn check(&self) -> Result<(), String> {
        check_finite("every_minutes", self.every_minutes, 0.0)
    }
}
