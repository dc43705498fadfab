//! Events from files: CSV or parquet, batch by batch, checked cell by cell.
//!
//! | module | what it does |
//! | --- | --- |
//! | `input` | opens a file, a pipe or stdin, detects its format and decompresses it |
//! | `records` | splits CSV into records and fields |
//! | `csv` | reads CSV: records to batches |
//! | `columns` | reads parquet: columns to batches |
//! | `request` | reads the events of an inference request |
//! | `cells` | the rules for cells, the same for all formats |
//! | `table` | leaves out rows without a session and bad rows |
//!
//! `docs/data.md` describes the formats and the dialect of CSV.

mod cells;
mod columns;
mod csv;
mod guard;
mod input;
mod records;
mod request;
mod table;

use std::ops::AddAssign;
use std::path::Path;

pub(crate) use cells::Texts;
pub(crate) use input::expected_bytes;
pub(crate) use request::clean;

use bireme_base::message::quoted;

use crate::error::Error;
use crate::schema::event;
use crate::time::EventTime;
use crate::vocab::Coded;
use input::Content;

/// Valid events: each has a session, an item, a time and a price.
#[derive(Debug, Default)]
pub(crate) struct EventBatch {
    /// `[rows]`.
    pub time: Vec<EventTime>,
    /// Finite and not negative, `[rows]`.
    pub price: Vec<f64>,
    /// By [`Coded`]; `None` for an absent column.
    pub cells: [Option<Cells>; 7],
    /// The number of each event's line or row (`unit`) in its file, `[rows]`.
    pub number: Vec<u64>,
    /// `line` or `row`.
    pub unit: &'static str,
    /// The numbers of the bad rows that were left out, also counted in `unit`.
    pub bad: Vec<u64>,
}

/// The values of an encoded column, `[rows]`.
#[derive(Debug)]
pub(crate) enum Cells {
    Int(Vec<Option<i64>>),
    Text(Texts),
}

/// Counts of the rows of one or more files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowCounts {
    /// All rows, without headers.
    pub read: u64,
    /// Bad rows that were left out.
    pub bad: u64,
    /// Rows that were left out because they have no session.
    pub without_session: u64,
}

impl AddAssign for RowCounts {
    fn add_assign(&mut self, of_file: Self) {
        self.read += of_file.read;
        self.bad += of_file.bad;
        self.without_session += of_file.without_session;
    }
}

/// The treatment of a row that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BadRows {
    /// Stop with an error that names the row.
    #[default]
    Refuse,
    /// Leave the row out and count it.
    Skip,
}

/// Receives the batches of a file in their order.
type Each<'a> = dyn FnMut(EventBatch) -> Result<(), Error> + 'a;

/// Reads a file's events in their order and passes them to `each` in batches. `-` is stdin.
///
/// `scratch` is a folder for a copy of a stream whose format needs random access.
pub(crate) fn read(
    path: &Path,
    bad_rows: BadRows,
    scratch: &Path,
    each: &mut Each<'_>,
) -> Result<RowCounts, Error> {
    match input::open(path, scratch)? {
        Content::Parquet(file) => columns::read(path, file, bad_rows, each),
        Content::Text(text) => csv::read(path, text, bad_rows, each),
    }
}

/// The number of columns per thread: all of them for a small table, because starting threads would
/// take longer.
pub(crate) fn columns_at_once(n_rows: usize) -> usize {
    if n_rows < 2048 { Coded::ALL.len() } else { 1 }
}

/// The first required column that is missing.
fn missing_column(found: &[&str]) -> Option<&'static str> {
    event::REQUIRED.into_iter().find(|name| !found.contains(name))
}

fn listed(names: &[&str]) -> String {
    /// The most names in a message.
    const MOST: usize = 12;
    let mut list: Vec<String> = names.iter().take(MOST).map(|name| quoted(name)).collect();
    if names.len() > MOST {
        list.push(format!("{} more", names.len() - MOST));
    }
    if list.is_empty() { "none".into() } else { list.join(", ") }
}
