//! Reads the events of a table in memory, which is an inference request.

use std::path::Path;

use polars::prelude::*;
use rayon::prelude::*;

use super::cells::{CellError, MISSING, check_price, read_int, read_price, read_time};
use super::table::Table;
use super::{BadRows, Cells, EventBatch, RowCounts, columns_at_once, listed, missing_column};
use crate::error::Error;
use crate::schema::event;
use crate::time::EventTime;
use crate::vocab::Coded;

/// Reads the cells, and drops the rows without a session.
pub(crate) fn clean(
    frame: &DataFrame,
    path: &Path,
    bad_rows: BadRows,
    counts: &mut RowCounts,
) -> Result<EventBatch, Error> {
    let found: Vec<&str> = frame.get_column_names().into_iter().map(|name| name.as_str()).collect();
    if let Some(column) = missing_column(&found) {
        let found = format!("it has {}", listed(&found));
        return Err(Error::MissingColumn { path: path.into(), column, found });
    }
    read_cells(Frame { frame, path })?.clean(path, bad_rows, counts)
}

/// Errors, each with the index of its row.
type CellErrors = Vec<(usize, CellError)>;

fn read_cells(table: Frame<'_>) -> Result<Table, Error> {
    let cells = |column: &Coded| match column {
        _ if table.frame.column(column.name()).is_err() => Ok((None, CellErrors::new())),
        Coded::Product => {
            table.ints(column.name(), true).map(|(ints, faults)| (Some(Cells::Int(ints)), faults))
        }
        _ if column.is_int() => {
            table.ints(column.name(), false).map(|(ints, faults)| (Some(Cells::Int(ints)), faults))
        }
        _ => table.text(column.name()).map(|cells| (Some(cells), CellErrors::new())),
    };
    let at_once = columns_at_once(table.frame.height());
    let all =
        || Coded::ALL.par_iter().with_min_len(at_once).map(cells).collect::<Result<Vec<_>, _>>();
    let (time, (price, cells)) = match at_once {
        1 => rayon::join(|| table.times(), || rayon::join(|| table.prices(), all)),
        _ => (table.times(), (table.prices(), all())),
    };
    let ((time, mut faults), (price, price_faults), cells) = (time?, price?, cells?);
    faults.extend(price_faults);
    let mut batch = EventBatch { time, price, ..EventBatch::default() };
    for (place, (column, column_faults)) in batch.cells.iter_mut().zip(cells) {
        *place = column;
        faults.extend(column_faults);
    }
    Ok(Table { batch, faults })
}

/// Columns of text, or of the types of their values.
#[derive(Clone, Copy)]
struct Frame<'a> {
    frame: &'a DataFrame,
    path: &'a Path,
}

impl Frame<'_> {
    /// Applies `read` to a column; `None` refuses the column's type.
    fn typed<T>(
        self,
        name: &'static str,
        needed: &'static str,
        read: impl FnOnce(&Column) -> PolarsResult<Option<T>>,
    ) -> Result<T, Error> {
        let column = self.frame.column(name)?;
        read(column).ok().flatten().ok_or_else(|| Error::ColumnType {
            path: self.path.into(),
            column: name,
            needed,
            found: column.dtype().to_string(),
        })
    }

    fn text(self, name: &'static str) -> Result<Cells, Error> {
        self.typed(name, "text or an integer", |column| {
            let dtype = column.dtype();
            if !(dtype.is_string()
                || dtype.is_integer()
                || dtype.is_categorical()
                || dtype.is_null())
            {
                return Ok(None);
            }
            Ok(Some(Cells::Text(column.cast(&DataType::String)?.str()?.iter().collect())))
        })
    }

    fn ints(
        self,
        name: &'static str,
        required: bool,
    ) -> Result<(Vec<Option<i64>>, CellErrors), Error> {
        let mut faults = CellErrors::new();
        let values = self.typed(name, "an integer", |column| match column.dtype() {
            DataType::String => {
                let cells = column.str()?.iter().enumerate().map(|(row, cell)| match cell {
                    None | Some("") => None,
                    Some(cell) => read_int(cell)
                        .map_err(|problem| faults.push((row, CellError::new(name, problem))))
                        .ok(),
                });
                Ok(Some(cells.collect::<Vec<_>>()))
            }
            dtype if dtype.is_integer() || dtype.is_null() => {
                Ok(Some(column.strict_cast(&DataType::Int64)?.i64()?.iter().collect()))
            }
            _ => Ok(None),
        })?;
        if required {
            let missing = values.iter().enumerate().filter(|(_, value)| value.is_none());
            faults.extend(missing.map(|(row, _)| (row, CellError::new(name, MISSING))));
            // An unreadable cell is null too; the error about its content comes first.
            faults.sort_by_key(|(row, _)| *row);
        }
        Ok((values, faults))
    }

    fn times(self) -> Result<(Vec<EventTime>, CellErrors), Error> {
        self.typed(event::TIME, "text or a datetime", |column| match column.dtype() {
            DataType::String => Ok(Some(checked(column.str()?.iter(), event::TIME, read_time))),
            DataType::Datetime(unit, _) => {
                let per_second: u32 = match unit {
                    TimeUnit::Nanoseconds => 1_000_000_000,
                    TimeUnit::Microseconds => 1_000_000,
                    TimeUnit::Milliseconds => 1_000,
                };
                let ticks = column.to_physical_repr();
                let time = |ticks: i64| Ok(EventTime::from_ticks(ticks, per_second));
                Ok(Some(checked(ticks.i64()?.iter(), event::TIME, time)))
            }
            _ => Ok(None),
        })
    }

    fn prices(self) -> Result<(Vec<f64>, CellErrors), Error> {
        self.typed(event::PRICE, "a number", |column| match column.dtype() {
            DataType::String => Ok(Some(checked(column.str()?.iter(), event::PRICE, read_price))),
            dtype if dtype.is_primitive_numeric() || dtype.is_null() => {
                let values = column.cast(&DataType::Float64)?;
                Ok(Some(checked(values.f64()?.iter(), event::PRICE, check_price)))
            }
            _ => Ok(None),
        })
    }
}

/// Reads the cells of a column without null, and collects the errors.
fn checked<T: Default, C>(
    cells: impl Iterator<Item = Option<C>>,
    name: &str,
    read: impl Fn(C) -> Result<T, String>,
) -> (Vec<T>, CellErrors) {
    let mut faults = CellErrors::new();
    let values = cells.enumerate().map(|(row, cell)| {
        cell.map_or_else(|| Err(MISSING.into()), &read).unwrap_or_else(|problem| {
            faults.push((row, CellError::new(name, problem)));
            T::default()
        })
    });
    (values.collect(), faults)
}
