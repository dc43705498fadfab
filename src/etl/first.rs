//! The earliest events of files, in memory that does not grow with the files.

use std::path::PathBuf;

use crate::error::Error;
use crate::events::{self, BadRows, Cells, EventBatch, RowCounts};
use crate::inputs::check_distinct;
use crate::time::EventTime;
use crate::vocab::Coded;

/// An event with the values of its file.
#[derive(Clone, Debug, PartialEq)]
pub struct RawEvent {
    pub time: EventTime,
    pub event_type: Option<String>,
    pub product_id: i64,
    pub category_id: Option<i64>,
    pub category_code: Option<String>,
    pub brand: Option<String>,
    pub price: f64,
    pub user_id: Option<i64>,
    pub session: String,
}

/// The first `n` events of all files by time, those of the same time in file order. Memory holds up
/// to 2 `n` events and a batch of a file.
///
/// # Errors
/// A file that cannot be read, or a bad row if these are refused.
pub fn first_events(
    files: &[PathBuf],
    n: usize,
    bad_rows: BadRows,
) -> Result<(Vec<RawEvent>, RowCounts), Error> {
    check_distinct(files)?;
    let scratch = tempfile::tempdir().map_err(|source| Error::Io {
        action: "create a folder in",
        path: std::env::temp_dir(),
        source,
    })?;
    // Sorted by time and place in the files. It grows to twice the wanted number before it is
    // sorted and cut, so that sorting is rare.
    let mut first: Vec<((EventTime, u64), RawEvent)> = Vec::new();
    let mut latest = (EventTime::MAX, u64::MAX);
    let mut counts = RowCounts::default();
    let mut place = 0;
    for file in files {
        counts += events::read(file, bad_rows, scratch.path(), &mut |batch| {
            for row in 0..batch.time.len() {
                place += 1;
                let key = (batch.time[row], place);
                if key >= latest {
                    continue;
                }
                first.push((key, raw_event(&batch, row)));
                if first.len() >= n.saturating_mul(2).max(1) {
                    latest = cut(&mut first, n).unwrap_or(latest);
                }
            }
            Ok(())
        })?;
    }
    cut(&mut first, n);
    Ok((first.into_iter().map(|(_, event)| event).collect(), counts))
}

/// Sorts, keeps the first `n`, and returns the key of the last of them if there are as many.
fn cut(first: &mut Vec<((EventTime, u64), RawEvent)>, n: usize) -> Option<(EventTime, u64)> {
    first.sort_unstable_by_key(|(key, _)| *key);
    first.truncate(n);
    if first.len() < n {
        None
    } else {
        Some(first.last().map_or((EventTime::MIN, 0), |(key, _)| *key))
    }
}

fn raw_event(batch: &EventBatch, row: usize) -> RawEvent {
    let int = |column: Coded| match &batch.cells[column as usize] {
        Some(Cells::Int(cells)) => cells[row],
        _ => None,
    };
    let text = |column: Coded| match &batch.cells[column as usize] {
        Some(Cells::Text(cells)) => cells.get(row).map(str::to_owned),
        Some(Cells::Int(cells)) => cells[row].map(|int| int.to_string()),
        None => None,
    };
    RawEvent {
        time: batch.time[row],
        event_type: text(Coded::EventType),
        product_id: int(Coded::Product).expect("a batch holds no event without an item"),
        category_id: int(Coded::Category),
        category_code: text(Coded::CategoryCode),
        brand: text(Coded::Brand),
        price: batch.price[row],
        user_id: int(Coded::User),
        session: text(Coded::Session).expect("a batch holds no event without a session"),
    }
}
