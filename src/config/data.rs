//! Section `[data]`.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::check_count;

/// In `data.features`: every feature of the schema that is a list.
pub const ALL_FEATURES: &str = "*";

/// Section `[data]`: which days, events and columns the model learns from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// First day to train on; absent: the first day of the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_day: Option<i64>,
    /// Last day to evaluate on: the run trains on `first_day` to `last_day - 1` and evaluates each
    /// on the day after it. Absent: the last day of the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_day: Option<i64>,
    /// Length of the training window in days: the day itself and the days before it, none earlier
    /// than `first_day`; at least 1.
    pub window_days: usize,
    /// Most recent events of a session that are read; 2 to 65536.
    pub max_length: usize,
    /// Columns that the model reads, by their names in `schema.pbtxt`; `"*"`: all lists; empty: the
    /// item id alone.
    pub features: Vec<String>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            first_day: None,
            last_day: None,
            window_days: 1,
            max_length: 20,
            features: Vec::new(),
        }
    }
}

impl DataConfig {
    /// Checks the ranges of the values.
    ///
    /// # Errors
    /// Returns the first invalid key.
    pub fn check(&self) -> Result<(), String> {
        let &Self { first_day, last_day, window_days, max_length, .. } = self;
        if let (Some(first_day), Some(last_day)) = (first_day, last_day)
            && last_day <= first_day
        {
            return Err(format!("`last_day` {last_day} is not after `first_day` {first_day}"));
        }
        if max_length < 2 {
            return Err(format!("`max_length` {max_length} leaves nothing to predict from"));
        }
        check_count("max_length", max_length, 1 << 16)?;
        check_count("window_days", window_days, usize::MAX)
    }

    /// The training days.
    ///
    /// # Panics
    /// A day is absent: call [`DataConfig::resolve_days`] first.
    pub fn training_days(&self) -> Range<i64> {
        let resolved = |day: Option<i64>| day.expect("the days of the run are resolved");
        resolved(self.first_day)..resolved(self.last_day)
    }
}
