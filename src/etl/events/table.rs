//! Drops rows of a table that cannot be used.

use std::path::Path;

use super::cells::{CellError, Texts};
use super::{BadRows, Cells, EventBatch, RowCounts};
use crate::error::Error;
use crate::vocab::Coded;

/// Cells of rows, some of which may be bad or without a session.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub batch: EventBatch,
    /// With the index of the row; such a cell holds a default value.
    pub faults: Vec<(usize, CellError)>,
}

impl Table {
    /// Drops the rows without a session. Bad rows are dropped or refused.
    pub fn clean(
        self,
        path: &Path,
        bad_rows: BadRows,
        counts: &mut RowCounts,
    ) -> Result<EventBatch, Error> {
        let Self { mut batch, faults } = self;
        let n_rows = batch.time.len();
        let first_row = counts.read + 1;
        counts.read += n_rows as u64;
        (batch.number, batch.unit) = ((first_row..).take(n_rows).collect(), "row");
        let mut keep: Vec<bool> = match &batch.cells[Coded::Session as usize] {
            Some(Cells::Text(ids)) => ids.iter().map(|id| id.is_some()).collect(),
            Some(Cells::Int(ids)) => ids.iter().map(Option::is_some).collect(),
            None => vec![false; n_rows],
        };
        counts.without_session += keep.iter().filter(|keep| !**keep).count() as u64;
        let bad = faults.into_iter().filter(|(row, _)| keep[*row]);
        match bad_rows {
            BadRows::Refuse => {
                if let Some((row, CellError { column, problem })) = bad.min_by_key(|(row, _)| *row)
                {
                    let number = first_row + row as u64;
                    return Err(Error::BadRow {
                        path: path.into(),
                        place: "row",
                        number,
                        column,
                        problem,
                    });
                }
            }
            BadRows::Skip => {
                let mut bad: Vec<usize> = bad.map(|(row, _)| row).collect();
                // A row may have several bad cells.
                bad.sort_unstable();
                bad.dedup();
                counts.bad += bad.len() as u64;
                for row in bad {
                    batch.bad.push(first_row + row as u64);
                    keep[row] = false;
                }
            }
        }
        Ok(if keep.iter().all(|keep| *keep) { batch } else { batch.filter(&keep) })
    }
}

impl EventBatch {
    fn filter(self, keep: &[bool]) -> Self {
        fn kept<T>(values: Vec<T>, keep: &[bool]) -> Vec<T> {
            values
                .into_iter()
                .zip(keep)
                .filter(|(_, keep)| **keep)
                .map(|(value, _)| value)
                .collect()
        }
        Self {
            time: kept(self.time, keep),
            price: kept(self.price, keep),
            number: kept(self.number, keep),
            unit: self.unit,
            bad: self.bad,
            cells: self.cells.map(|cells| match cells? {
                Cells::Int(ints) => Some(Cells::Int(kept(ints, keep))),
                Cells::Text(texts) => {
                    let texts = texts.iter().zip(keep).filter(|(_, keep)| **keep);
                    Some(Cells::Text(texts.map(|(text, _)| text).collect::<Texts>()))
                }
            }),
        }
    }
}
