//! Day partitions on disk → batches of sessions on a device.
//!
//! [`Days`] finds the partitions and their schema, [`SessionFile`] reads rows of one file, [`plan`] deals the
//! rows of a day to the micro-batches of its steps without knowing how many ranks there are, and [`Loader`]
//! prepares a rank's batches in the background.

mod batch;
mod check;
mod days;
mod file;
mod loader;
mod occurrences;
pub mod plan;

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::check_count;

pub use batch::{Batch, DropoutGenerator, Segment, with_seed};
pub use bireme_etl::Split;
pub use check::{AT_THE_START, RowCheck};
pub use days::{Days, Features};
pub use file::{SessionFile, Sessions, Window};
pub use loader::{DayPlan, Loader, evaluation_batches};
pub use occurrences::occurrences;

/// Section `[data]` of a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// First day trained on; absent: the first of the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_day: Option<i64>,
    /// Last day evaluated on: days `first_day` to `last_day - 1` are trained on, each evaluated on the next. Absent:
    /// the last of the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_day: Option<i64>,
    /// Days trained on at a time: each day of those above, and as many of the days before it, from `first_day` on.
    pub window_days: usize,
    /// Longest part of a session that is read, in events; of a longer one the most recent events are kept.
    pub max_length: usize,
    /// List columns the model reads, by their schema names; empty: the item id alone.
    pub features: Vec<String>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { first_day: None, last_day: None, window_days: 1, max_length: 20, features: Vec::new() }
    }
}

impl DataConfig {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Says which key is wrong.
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

    /// Fills absent days in from what lies in `dir`. `trained_to`: the last day of weights from elsewhere, which need
    /// no later day.
    ///
    /// # Errors
    /// What [`Days::open`] says, or `dir` holds no day to train on with a later one to evaluate on.
    pub fn resolve_days(&mut self, dir: &Path, trained_to: Option<i64>) -> Result<(), DataError> {
        if let (Some(_), Some(_)) = (self.first_day, self.last_day) {
            return Ok(());
        }
        let days = Days::open(dir, self)?;
        let first_day = self.first_day.unwrap_or(days.first());
        let least = trained_to.map_or(i64::MIN, |day| day.saturating_add(1));
        let last_day = self.last_day.unwrap_or(days.last().max(least));
        let dir = dir.to_owned();
        if first_day >= last_day && days.first() == days.last() {
            return Err(DataError::OneDay { dir, day: days.first() });
        }
        if first_day >= last_day {
            return Err(DataError::NoDayToTrainOn { first_day, last_day, dir, have: days.in_words() });
        }
        (self.first_day, self.last_day) = (Some(first_day), Some(last_day));
        Ok(())
    }

    /// The days trained on.
    ///
    /// # Panics
    /// A day is absent that [`DataConfig::resolve_days`] would have filled in.
    pub fn training_days(&self) -> Range<i64> {
        let resolved = |day: Option<i64>| day.expect("the days of the run are resolved");
        resolved(self.first_day)..resolved(self.last_day)
    }
}

/// What can be wrong with the data of a run.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// No partition where one is needed.
    #[error("no day {day} under `{dir}`, which has the days {have}")]
    MissingDay {
        /// The day asked for.
        day: i64,
        /// Where it was looked for.
        dir: PathBuf,
        /// The days found there.
        have: String,
    },
    #[error("internal error while reading sessions: {0}")]
    LoaderPanicked(String),
    /// The folder holds no partitions at all.
    #[error(
        "`{0}` holds no day partitions: neither `sessions_by_day/<day>` nor `<day>` with `train.parquet`"
    )]
    NoDays(PathBuf),
    /// A folder with one day, and no configuration that says otherwise.
    #[error("`{dir}` holds the day {day} alone: training needs one day, and the next to evaluate on")]
    OneDay {
        /// The folder.
        dir: PathBuf,
        /// Its day.
        day: i64,
    },
    /// The configuration gives one end, and the data lies on its other side.
    #[error(
        "`data.first_day` {first_day} is not before `data.last_day` {last_day}: `{dir}` has the days {have}"
    )]
    NoDayToTrainOn {
        /// As configured, or the first of the data.
        first_day: i64,
        /// As configured, or the last of the data.
        last_day: i64,
        /// The folder.
        dir: PathBuf,
        /// Its days.
        have: String,
    },
    /// The schema cannot be read.
    #[error(transparent)]
    Schema(#[from] bireme_etl::SchemaError),
    /// The schema's item id is no list of categorical codes.
    #[error("the schema's item id `{feature}` is not a categorical list")]
    ItemId {
        /// The feature tagged `item_id`.
        feature: String,
    },
    /// The configuration names a feature that the schema lacks.
    #[error("feature `{feature}` of `data.features` is not in the schema, which has {have}")]
    UnknownFeature {
        /// As written in the configuration.
        feature: String,
        /// The list features of the schema.
        have: String,
    },
    /// A file cannot be opened.
    #[error("cannot open `{path}`")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not readable parquet, or is cut off.
    #[error("`{path}` is not a readable parquet file")]
    Parquet {
        /// The file.
        path: PathBuf,
        /// Why.
        source: parquet::errors::ParquetError,
    },
    /// A file lacks a column, or has it with an unexpected type.
    #[error("`{path}`: column `{column}` {problem}")]
    Column {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A row that no model can use.
    #[error("`{path}` row {row}: column `{column}` {problem}")]
    Row {
        /// The file.
        path: PathBuf,
        /// Zero-based row.
        row: usize,
        /// The column.
        column: String,
        /// What is wrong with the value.
        problem: String,
    },
    /// A session that leaves nothing to predict, or nothing to predict from.
    #[error("`{path}` row {row}: column `{column}` has a session of one event: at least two are needed")]
    ShortSession {
        /// The file.
        path: PathBuf,
        /// Zero-based row.
        row: usize,
        /// The item id's column.
        column: String,
    },
    /// More ranks than there is work for.
    #[error("{world_size} ranks are more than {limit}")]
    TooManyRanks {
        /// Number of ranks.
        world_size: usize,
        /// What limits them.
        limit: String,
    },
}

impl DataError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::ShortSession { .. } => Some("`bireme preprocess --min-length 2` leaves such sessions out"),
            _ => None,
        }
    }
}
