//! Day partitions on disk → batches of sessions on a device.
//!
//! [`Days`] finds the partitions and their schema, [`SessionFile`] reads rows of one file, [`plan`] deals the
//! rows of a day to the micro-batches of its steps without knowing how many ranks there are, and [`Loader`]
//! prepares a rank's batches in the background.

mod batch;
mod days;
mod file;
mod loader;
mod occurrences;
pub mod plan;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use batch::{Batch, Noise, Segment, with_seed};
pub use bireme_etl::Split;
pub use days::{Days, Features};
pub use file::{SessionFile, Sessions, Window};
pub use loader::{DayPlan, Loader, evaluation_batches};
pub use occurrences::occurrences;

/// Section `[data]` of a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// First day trained on.
    pub first_day: i64,
    /// Last day evaluated on: days `first_day` to `last_day - 1` are trained on, each evaluated on the next.
    pub last_day: i64,
    /// Days trained on at a time: each day of those above, and as many of the days before it, from `first_day` on.
    #[serde(default = "default_window_days")]
    pub window_days: usize,
    /// Longest part of a session that is read, in events; of a longer one the most recent events are kept.
    #[serde(default = "default_max_length")]
    pub max_length: usize,
    /// List columns the model reads, by their schema names; empty: the item id alone.
    #[serde(default)]
    pub features: Vec<String>,
}

fn default_window_days() -> usize {
    1
}

fn default_max_length() -> usize {
    20
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
    /// The folder holds no partitions at all.
    #[error(
        "`{0}` holds no day partitions: neither `sessions_by_day/<day>` nor `<day>` with `train.parquet`"
    )]
    NoDays(PathBuf),
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
    /// More ranks than there is work for.
    #[error("{world_size} ranks are more than {limit}")]
    TooManyRanks {
        /// Number of ranks.
        world_size: usize,
        /// What limits them.
        limit: String,
    },
}
