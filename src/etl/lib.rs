//! Shop events to sessions that a model can learn from.
//!
//! In the order in which data flows:
//!
//! | module | what it does |
//! | --- | --- |
//! | [`schema`] | names the columns, and describes them to a model |
//! | `events` | reads and checks CSV and parquet, batch by batch |
//! | `time` | times of events, with their fractions of a second |
//! | `inputs` | refuses a file that is given twice |
//! | `extremes` | the events that are far from all others |
//! | [`vocab`] | numbers the values of a column, and remembers them both ways |
//! | `sessions` | sorts coded events, drops repeats, cuts sessions |
//! | `buckets` | keeps more events than memory holds |
//! | `fit` | counts and sums over the events |
//! | [`workflow`] | what a fit has learnt, and its application to events old and new |
//! | `partition` | writes the sessions of each day |
//! | [`preprocess()`] | all of it |
//! | `first` | the earliest events of a file |
//! | [`serving`] | the events of a request to the inputs of a model |
//! | `numpy` | the same for those who do it in Python |
//! | [`tensor`] | what requests and responses are made of |
//!
//! The transforms are those of the NVTabular workflow in Transformers4Rec's session-based tutorial, its faults
//! corrected.

mod buckets;
mod error;
mod events;
mod extremes;
mod first;
mod fit;
mod hash;
mod inputs;
mod numpy;
mod partition;
mod preprocess;
pub mod schema;
pub mod serving;
mod sessions;
pub mod tensor;
mod time;
pub mod vocab;
pub mod workflow;

pub use error::Error;
pub use events::{BadRows, RowCounts};
pub use first::{RawEvent, first_events};
pub use hash::hash_of;
pub use inputs::{check_distinct, check_output};
pub use partition::{Day, Split};
pub use preprocess::{Options, Report, SCHEMA, SESSIONS_BY_DAY, WORKFLOW, preprocess};
pub use schema::{Domain, Feature, FloatRange, IntRange, Schema, SchemaError, ValueCount};
pub use sessions::Keep;
pub use time::EventTime;
pub use vocab::{Coded, Value, Vocabulary};
pub use workflow::{Applied, ProductInWords, Settings, Statistics, Workflow, copy_without_visitors};
