//! Day partitions on disk → batches of sessions on a device.
//!
//! [`Days`] finds the partitions and their schema, [`SessionFile`] reads rows of one file, [`plan`]
//! assigns the rows of a day to the micro-batches of its steps independent of the number of ranks,
//! and [`Loader`] prepares the batches of a rank in the background.

mod batch;
mod catalogue;
mod check;
mod days;
mod file;
mod loader;
mod occurrences;
pub mod plan;
mod pretrained;

use std::path::{Path, PathBuf};

use bireme_base::user_error::{REFUSED, UserError};

pub use crate::config::DataConfig;

pub use batch::{Batch, DropoutGenerator, Segment, with_seed};
pub use bireme_etl::Split;
pub use catalogue::Catalogue;
pub use check::{N_CHECKED_AT_START, RowCheck};
pub use days::{Days, Features};
pub use file::{Column, SessionFile, Sessions, Window};
pub use loader::{DayPlan, Loader, Read, evaluation_batches};
pub use occurrences::occurrences;
pub use pretrained::Pretrained;

/// First item index that is recommendable: padding (0) and unknown (1) are not.
pub const FIRST_ITEM: i64 = 2;

impl DataConfig {
    /// Fills in absent days from the partitions in `dir`. `trained_to`: last training day of
    /// imported weights, which need no later day to evaluate on.
    ///
    /// # Errors
    /// [`Days::open`] fails, or `dir` has no two days to train and evaluate on.
    pub fn resolve_days(&mut self, dir: &Path, trained_to: Option<i64>) -> Result<(), DataError> {
        if let (Some(_), Some(_)) = (self.first_day, self.last_day) {
            return Ok(());
        }
        let days = Days::open(dir, self)?;
        let first_day = self.first_day.unwrap_or(days.first());
        let min_last_day = trained_to.map_or(i64::MIN, |day| day.saturating_add(1));
        let last_day = self.last_day.unwrap_or(days.last().max(min_last_day));
        let dir = dir.to_owned();
        if first_day >= last_day && days.first() == days.last() {
            return Err(DataError::OneDay { dir, day: days.first() });
        }
        if first_day >= last_day {
            return Err(DataError::NoDayToTrainOn {
                first_day,
                last_day,
                dir,
                have: days.in_words(),
            });
        }
        (self.first_day, self.last_day) = (Some(first_day), Some(last_day));
        Ok(())
    }
}

/// An error in the data of a run.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("no day {day} under `{dir}`, which has the days {have}")]
    MissingDay {
        day: i64,
        dir: PathBuf,
        /// The days that `dir` has.
        have: String,
    },
    #[error("internal error while reading sessions: {0}")]
    LoaderPanicked(String),
    #[error(
        "`{0}` holds no day partitions: neither `sessions_by_day/<day>` nor `<day>` with \
         `train.parquet`"
    )]
    NoDays(PathBuf),
    #[error(
        "`{dir}` holds the day {day} alone: training needs one day, and the next to evaluate on"
    )]
    OneDay { dir: PathBuf, day: i64 },
    /// The configuration has one of the two days, and the other, from the data, is on the wrong
    /// side.
    #[error(
        "`data.first_day` {first_day} is not before `data.last_day` {last_day}: `{dir}` has the \
         days {have}"
    )]
    NoDayToTrainOn {
        first_day: i64,
        last_day: i64,
        dir: PathBuf,
        /// The days that `dir` has.
        have: String,
    },
    #[error(transparent)]
    Schema(#[from] bireme_etl::SchemaError),
    #[error("the schema's item id `{feature}` is not a categorical list")]
    ItemId {
        /// The feature tagged `item_id`.
        feature: String,
    },
    #[error("feature `{feature}` of `data.features` is not in the schema, which has {have}")]
    UnknownFeature {
        feature: String,
        /// The list features of the schema.
        have: String,
    },
    #[error("cannot open `{path}`")]
    Open { path: PathBuf, source: std::io::Error },
    /// The file is not parquet, or it is truncated.
    #[error("`{path}` is not a readable parquet file")]
    Parquet { path: PathBuf, source: parquet::errors::ParquetError },
    /// A column is missing or has an unexpected type.
    #[error("`{path}`: column `{column}` {problem}")]
    Column { path: PathBuf, column: String, problem: String },
    /// A value is null or out of range.
    #[error("`{path}` row {row}: column `{column}` {problem}")]
    Row {
        path: PathBuf,
        /// Zero-based.
        row: usize,
        column: String,
        problem: String,
    },
    /// A session of one event has no event to predict the target from.
    #[error(
        "`{path}` row {row}: column `{column}` has a session of one event: at least two are needed"
    )]
    ShortSession {
        path: PathBuf,
        /// Zero-based.
        row: usize,
        column: String,
    },
    #[error("{world_size} ranks are more than {limit}")]
    TooManyRanks {
        world_size: usize,
        /// The quantity that limits the number of ranks.
        limit: String,
    },
}

impl UserError for DataError {
    fn exit_code(&self) -> i32 {
        REFUSED
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::ShortSession { .. } => {
                Some("`bireme preprocess --min-length 2` leaves such sessions out".to_owned())
            }
            _ => None,
        }
    }
}
