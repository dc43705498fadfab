//! Turns shop events into sessions for training.
//!
//! In the order in which data flows:
//!
//! | module | what it does |
//! | --- | --- |
//! | [`schema`] | the names of the columns, and their description for models |
//! | `events` | reads and checks CSV and parquet, batch by batch |
//! | `time` | times of events with fractions of a second |
//! | `inputs` | refuses a file that is given twice |
//! | `extremes` | warns of events far from all others in time |
//! | [`vocab`] | the ids of a column's values |
//! | `sessions` | sorts coded events, drops repeats, cuts sessions |
//! | `buckets` | scratch files for more events than fit in memory |
//! | `fit` | counts and sums over the events |
//! | [`workflow`] | the fitted preprocessing, and its application to events |
//! | `workflow_files` | its folder |
//! | `partition` | writes the sessions of each day |
//! | [`preprocess()`] | all stages, from files of events to a folder of sessions |
//! | `first` | the earliest events of a file |
//! | [`serving`] | preprocessing of inference requests |
//!
//! The transforms are those of the NVTabular workflow in Transformers4Rec's session-based tutorial,
//! with its errors corrected.

#![allow(missing_docs, reason = "most names say what a doc would repeat")]

mod buckets;
mod error;
mod events;
mod extremes;
mod first;
mod fit;
mod inputs;
mod partition;
mod preprocess;
pub mod schema;
pub mod serving;
mod sessions;
mod time;
pub mod vocab;
pub mod workflow;
mod workflow_files;

pub use error::Error;
pub use events::{BadRows, RowCounts};
pub use first::{RawEvent, first_events};
pub use inputs::{check_distinct, check_output};
pub use partition::{Day, Split};
pub use preprocess::{
    ITEMS, PreprocessOptions, PreprocessReport, SCHEMA, SESSIONS_BY_DAY, WORKFLOW, preprocess,
};
pub use schema::{Domain, Feature, FloatRange, IntRange, Schema, SchemaError, ValueCount};
pub use sessions::Keep;
pub use time::EventTime;
pub use vocab::{Coded, ColumnValue, Vocabulary};
pub use workflow::{Applied, ProductInWords, Settings, Statistics, Workflow};
pub use workflow_files::copy_without_visitors;
