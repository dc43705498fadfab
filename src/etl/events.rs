//! Events from files: CSV or parquet, batch by batch, checked cell by cell.
//!
//! | module | what it does |
//! | --- | --- |
//! | `input` | opens a file, a pipe or standard input, finds its format and decompresses it |
//! | `records` | splits CSV into records and fields |
//! | `csv` | reads CSV: records to batches |
//! | `columns` | reads parquet: columns to batches |
//! | `request` | reads a table in memory: a request's events |
//! | `cells` | the rules for every cell, whatever the format |
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

/// A batch of events that can be used: every one has a session, an item, a time and a price.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// `[rows]`.
    pub time: Vec<EventTime>,
    /// Finite and not negative, `[rows]`.
    pub price: Vec<f64>,
    /// By [`Coded`]; `None` for a column that is not there.
    pub cells: [Option<Cells>; 7],
    /// Where each event is in its file, counted in `unit`, `[rows]`.
    pub number: Vec<u64>,
    /// `line` or `row`.
    pub unit: &'static str,
    /// Places of the bad rows that were left out, in `unit`, whatever the number of `[rows]`.
    pub bad: Vec<u64>,
}

/// The values of an encoded column, `[rows]`.
#[derive(Debug)]
pub(crate) enum Cells {
    Int(Vec<Option<i64>>),
    Text(Texts),
}

/// What became of the rows of one or more files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowCounts {
    /// Rows in the files, headers not counted.
    pub read: u64,
    /// Rows that were left out because they cannot be read.
    pub bad: u64,
    /// Rows that were left out because they belong to no session.
    pub without_session: u64,
}

impl AddAssign for RowCounts {
    fn add_assign(&mut self, of_file: Self) {
        self.read += of_file.read;
        self.bad += of_file.bad;
        self.without_session += of_file.without_session;
    }
}

/// What to do with a row that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BadRows {
    /// Stop, and name it.
    #[default]
    Refuse,
    /// Leave it out, and count it.
    Skip,
}

/// Takes the batches of a file, in the file's order.
type Each<'a> = dyn FnMut(Batch) -> Result<(), Error> + 'a;

/// Reads a file's events, in its order, and hands them on batch by batch. `-` is standard input.
///
/// `scratch` is a folder that may hold a copy of a stream in a format that is not read in one go.
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

/// How many columns a thread takes: those of a small table all together, because to wake others takes longer.
pub(crate) fn columns_at_once(n_rows: usize) -> usize {
    if n_rows < 2048 { Coded::ALL.len() } else { 1 }
}

/// The required column that is not among those of a file.
fn missing_column(found: &[&str]) -> Option<&'static str> {
    event::REQUIRED.into_iter().find(|name| !found.contains(name))
}

fn listed(names: &[&str]) -> String {
    /// A message has room for so many names.
    const MOST: usize = 12;
    let mut list: Vec<String> = names.iter().take(MOST).map(|name| quoted(name)).collect();
    if names.len() > MOST {
        list.push(format!("{} more", names.len() - MOST));
    }
    if list.is_empty() { "none".into() } else { list.join(", ") }
}
