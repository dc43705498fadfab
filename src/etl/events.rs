//! Events out of files: CSV (plain or gzip) or parquet, batch by batch, checked cell by cell.
//!
//! Polars' streaming engine reads and splits; what a cell may hold is decided here, by the same functions for
//! every format. A CSV row is bad when it has too few or too many fields, when a cell of it cannot be read, or
//! when its price is negative or not finite. Polars fills up short rows with nulls, so whenever the last column
//! of a file holds a null and the separators do not add up, or anything else is wrong, the file is walked once
//! more, row by row, to tell a short row from an empty cell and to name the line.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read};
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;

use csv::{ByteRecord, ReaderBuilder, Terminator, WriterBuilder};
use flate2::read::MultiGzDecoder;
use polars::prelude::*;
use rayon::prelude::*;

use crate::error::Error;
use crate::schema::event;
use crate::time::EventTime;
use crate::vocab::Coded;

/// A batch of events that can be used: every one has a session, an item, a time and a price.
#[derive(Debug)]
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
}

/// The values of an encoded column, `[rows]`.
#[derive(Debug)]
pub(crate) enum Cells {
    Int(Int64Chunked),
    Text(StringChunked),
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

/// Reads a file's events, in its order, and hands them on batch by batch.
///
/// `scratch` is a folder that may hold a copy of a CSV file without its bad rows.
pub(crate) fn read(
    path: &Path,
    bad_rows: BadRows,
    scratch: &Path,
    each: &mut dyn FnMut(Batch) -> Result<(), Error>,
) -> Result<RowCounts, Error> {
    if is_parquet(path)? {
        return read_parquet(path, bad_rows, each);
    }
    let csv = CsvFile::open(path)?;
    match bad_rows {
        BadRows::Refuse => read_csv(&csv, each),
        BadRows::Skip => {
            let n_bad = csv.check_rows(|_, _| Ok(()))?;
            if n_bad == 0 {
                return read_csv(&csv, each);
            }
            let copy = csv.without_bad_rows(scratch)?;
            let counts = read_csv(&copy, each)?;
            std::fs::remove_file(&copy.path).map_err(Error::io("remove", &copy.path))?;
            Ok(RowCounts { read: counts.read + n_bad, bad: n_bad, ..counts })
        }
    }
}

fn is_parquet(path: &Path) -> Result<bool, Error> {
    Ok(magic(path)?.starts_with(b"PAR1"))
}

/// Whether a file is as long as the text in it.
pub(crate) fn is_plain(path: &Path) -> Result<bool, Error> {
    Ok(!is_parquet(path)? && !is_gzip(path)?)
}

fn is_gzip(path: &Path) -> Result<bool, Error> {
    Ok(magic(path)?.starts_with(&[0x1f, 0x8b]))
}

/// The first bytes of a file, which say what it is.
fn magic(path: &Path) -> Result<Vec<u8>, Error> {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(4).read_to_end(&mut start));
    read.map(|_| start).map_err(|source| Error::Open { path: path.into(), source })
}

// Batches.

fn read_csv(csv: &CsvFile, each: &mut dyn FnMut(Batch) -> Result<(), Error>) -> Result<RowCounts, Error> {
    // Every column is read as text, also those that are not used: polars looks for surplus fields only in rows
    // that it reads whole.
    let schema: Schema = csv.header.iter().map(|name| Field::new(name.into(), DataType::String)).collect();
    let last = csv.header.last().cloned().unwrap_or_default();
    let frame = LazyCsvReader::new(csv.polars_path()?)
        .with_schema(Some(Arc::new(schema)))
        .with_glob(false)
        .with_low_memory(true)
        .finish();
    let mut may_be_short = false;
    let counts = stream(&csv.path, frame, &mut |frame, counts| {
        may_be_short |= frame.column(&last).is_ok_and(|column| column.null_count() > 0);
        clean(&frame, &csv.path, BadRows::Refuse, counts).and_then(&mut *each)
    });
    let is_wrong = match &counts {
        Ok(counts) => may_be_short && !csv.has_all_separators(counts.read)?,
        Err(error) => matches!(error, Error::Unreadable { .. } | Error::BadRow { .. }),
    };
    if is_wrong {
        csv.check_rows(|line, fault| Err(fault.at(&csv.path, "line", line)))?;
    }
    counts
}

fn read_parquet(
    path: &Path,
    bad_rows: BadRows,
    each: &mut dyn FnMut(Batch) -> Result<(), Error>,
) -> Result<RowCounts, Error> {
    let unreadable = |e: PolarsError| Error::unreadable(path)(e.into());
    let scan_path = polars_path(path)?;
    let mut frame = LazyFrame::scan_parquet(scan_path, ScanArgsParquet { glob: false, ..Default::default() })
        .map_err(unreadable)?;
    let schema = frame.collect_schema().map_err(unreadable)?;
    let found: Vec<String> = schema.iter_names().map(ToString::to_string).collect();
    require_columns(path, &found)?;
    let used = event::REQUIRED.iter().chain(&event::OPTIONAL).filter(|name| schema.contains(name));
    let frame = frame.select(used.map(|name| col(*name)).collect::<Vec<_>>());
    stream(path, Ok(frame), &mut |frame, counts| clean(&frame, path, bad_rows, counts).and_then(&mut *each))
}

/// Runs a scan with the streaming engine, in the file's order.
fn stream(
    path: &Path,
    frame: PolarsResult<LazyFrame>,
    each: &mut dyn FnMut(DataFrame, &mut RowCounts) -> Result<(), Error>,
) -> Result<RowCounts, Error> {
    let unreadable = |e: PolarsError| Error::unreadable(path)(e.into());
    // The engine fills this channel while `each` works, and stops once nobody listens any more.
    let (send, batches) = sync_channel(1);
    let sink = PlanCallback::new(move |batch| Ok(send.send(batch).is_err()));
    let query = frame.and_then(|frame| frame.sink_batches(sink, true, None)).map_err(unreadable)?;
    let mut counts = RowCounts::default();
    thread::scope(|scope| {
        let query = scope.spawn(|| query.collect_with_engine(Engine::Streaming));
        for batch in batches {
            each(batch, &mut counts)?;
        }
        match query.join() {
            Ok(result) => result.map(drop).map_err(unreadable),
            Err(_) => Err(Error::unreadable(path)("polars panicked".into())),
        }
    })?;
    Ok(counts)
}

/// Drops the rows without a session and reads the cells of the others.
pub(crate) fn clean(
    frame: &DataFrame,
    path: &Path,
    bad_rows: BadRows,
    counts: &mut RowCounts,
) -> Result<Batch, Error> {
    let first_row = counts.read + 1;
    counts.read += frame.height() as u64;
    let session = Table { frame, path }.text(event::SESSION)?;
    let has_session: BooleanChunked = session.iter().map(|id| id.is_some_and(|id| !id.is_empty())).collect();
    let n_kept = has_session.num_trues();
    counts.without_session += (frame.height() - n_kept) as u64;
    let kept = if n_kept == frame.height() { frame.clone() } else { frame.filter(&has_session)? };

    let (batch, faults) = read_cells(&kept, path)?;
    let number = (first_row..).zip(has_session.iter());
    let number: Vec<u64> = number.filter(|(_, kept)| *kept == Some(true)).map(|(row, _)| row).collect();
    let Some((row, fault)) = faults.iter().min_by_key(|(row, _)| *row) else {
        return Ok(Batch { number, ..batch });
    };
    if bad_rows == BadRows::Refuse {
        return Err(fault.clone().at(path, "row", number[*row]));
    }
    let mut good = vec![true; kept.height()];
    for (row, _) in &faults {
        good[*row] = false;
    }
    let number = number.into_iter().zip(&good).filter(|(_, good)| **good).map(|(row, _)| row).collect();
    let good: BooleanChunked = good.into_iter().map(Some).collect();
    counts.bad += (kept.height() - good.num_trues()) as u64;
    read_cells(&kept.filter(&good)?, path).map(|(batch, _)| Batch { number, ..batch })
}

/// What is wrong in a row.
#[derive(Clone, Debug)]
struct Fault {
    column: String,
    problem: String,
}

impl Fault {
    fn new(column: &str, problem: String) -> Self {
        Self { column: column.into(), problem }
    }

    fn at(self, path: &Path, place: &'static str, number: u64) -> Error {
        Error::BadRow { path: path.into(), place, number, column: self.column, problem: self.problem }
    }
}

/// Faults and the rows that have them.
type Faults = Vec<(usize, Fault)>;

/// How many columns a thread takes: those of a small table all together, because to wake others takes longer.
pub(crate) fn columns_at_once(n_rows: usize) -> usize {
    if n_rows < 2048 { Coded::ALL.len() } else { 1 }
}

fn read_cells(frame: &DataFrame, path: &Path) -> Result<(Batch, Faults), Error> {
    let table = Table { frame, path };
    let cells = |column: &Coded| match column {
        _ if frame.column(column.name()).is_err() => Ok((None, Faults::new())),
        Coded::Product => {
            table.ints(column.name(), true).map(|(ints, faults)| (Some(Cells::Int(ints)), faults))
        }
        _ if column.is_int() => {
            table.ints(column.name(), false).map(|(ints, faults)| (Some(Cells::Int(ints)), faults))
        }
        _ => table.text(column.name()).map(|text| (Some(Cells::Text(text)), Faults::new())),
    };
    let at_once = columns_at_once(frame.height());
    let all = || Coded::ALL.par_iter().with_min_len(at_once).map(cells).collect::<Result<Vec<_>, _>>();
    let (time, (price, cells)) = match at_once {
        1 => rayon::join(|| table.times(), || rayon::join(|| table.prices(), all)),
        _ => (table.times(), (table.prices(), all())),
    };
    let ((time, mut faults), (price, price_faults), cells) = (time?, price?, cells?);
    faults.extend(price_faults);
    let mut batch = Batch { time, price, cells: [const { None }; 7], number: Vec::new(), unit: "row" };
    for (place, (column, column_faults)) in batch.cells.iter_mut().zip(cells) {
        *place = column;
        faults.extend(column_faults);
    }
    Ok((batch, faults))
}

/// A batch as a file's format gives it: columns of text, or of types of their own.
#[derive(Clone, Copy)]
struct Table<'a> {
    frame: &'a DataFrame,
    path: &'a Path,
}

impl<'a> Table<'a> {
    fn column(self, name: &'static str) -> Result<&'a Column, Error> {
        self.frame.column(name).map_err(|_| Error::MissingColumn {
            path: self.path.into(),
            column: name,
            found: listed(self.frame.get_column_names().iter().map(|name| name.as_str())),
        })
    }

    /// The values that `read` gets out of a column, which says `None` to a column of another type.
    fn typed<T>(
        self,
        name: &'static str,
        needed: &'static str,
        read: impl FnOnce(&Column) -> PolarsResult<Option<T>>,
    ) -> Result<T, Error> {
        let column = self.column(name)?;
        read(column).ok().flatten().ok_or_else(|| Error::ColumnType {
            path: self.path.into(),
            column: name,
            needed,
            found: column.dtype().to_string(),
        })
    }

    fn text(self, name: &'static str) -> Result<StringChunked, Error> {
        self.typed(name, "text or an integer", |column| {
            let dtype = column.dtype();
            if !(dtype.is_string() || dtype.is_integer() || dtype.is_categorical() || dtype.is_null()) {
                return Ok(None);
            }
            Ok(Some(column.cast(&DataType::String)?.str()?.clone()))
        })
    }

    fn ints(self, name: &'static str, required: bool) -> Result<(Int64Chunked, Faults), Error> {
        let mut faults = Faults::new();
        let values = self.typed(name, "an integer", |column| match column.dtype() {
            DataType::String => {
                let cells = column.str()?.iter().enumerate().map(|(row, cell)| match cell {
                    None | Some("") => {
                        if required {
                            faults.push((row, Fault::new(name, MISSING.into())));
                        }
                        None
                    }
                    Some(cell) => {
                        read_int(cell).map_err(|problem| faults.push((row, Fault::new(name, problem)))).ok()
                    }
                });
                Ok(Some(cells.collect()))
            }
            dtype if dtype.is_integer() || dtype.is_null() => {
                let values = column.strict_cast(&DataType::Int64)?.i64()?.clone();
                if required && values.null_count() > 0 {
                    let missing = values.iter().enumerate().filter(|(_, value)| value.is_none());
                    faults.extend(missing.map(|(row, _)| (row, Fault::new(name, MISSING.into()))));
                }
                Ok(Some(values))
            }
            _ => Ok(None),
        })?;
        Ok((values, faults))
    }

    fn times(self) -> Result<(Vec<EventTime>, Faults), Error> {
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

    fn prices(self) -> Result<(Vec<f64>, Faults), Error> {
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

/// Reads every cell of a column that allows no null, and notes those that cannot be read.
fn checked<T: Default, C>(
    cells: impl Iterator<Item = Option<C>>,
    name: &str,
    read: impl Fn(C) -> Result<T, String>,
) -> (Vec<T>, Faults) {
    let mut faults = Faults::new();
    let values = cells.enumerate().map(|(row, cell)| {
        cell.map_or_else(|| Err(MISSING.into()), &read).unwrap_or_else(|problem| {
            faults.push((row, Fault::new(name, problem)));
            T::default()
        })
    });
    (values.collect(), faults)
}

const MISSING: &str = "the cell is empty";

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.map(|name| format!("`{name}`")).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

// Cells.

fn read_int(text: &str) -> Result<i64, String> {
    text.parse().map_err(|_| format!("`{text}` is no integer"))
}

fn read_price(text: &str) -> Result<f64, String> {
    match text.parse() {
        _ if text.is_empty() => Err(MISSING.into()),
        Ok(price) => {
            check_price(price).map_err(|_| format!("`{text}` is no price: it is {}", price_fault(price)))
        }
        Err(_) => Err(format!("`{text}` is no number")),
    }
}

fn check_price(price: f64) -> Result<f64, String> {
    // The logarithm is taken in float32.
    if price >= 0.0 && (price as f32).is_finite() {
        Ok(price)
    } else {
        Err(format!("{price} is no price: it is {}", price_fault(price)))
    }
}

fn price_fault(price: f64) -> &'static str {
    match price {
        _ if !price.is_finite() => "not finite",
        0.0.. => "too large for float32",
        _ => "below zero",
    }
}

fn read_time(text: &str) -> Result<EventTime, String> {
    EventTime::parse(text.as_bytes()).ok_or_else(|| {
        if text.is_empty() {
            MISSING.into()
        } else {
            format!("`{text}` is no time like `2019-10-01 00:00:00 UTC`")
        }
    })
}

// CSV files, row by row.

struct CsvFile {
    path: PathBuf,
    header: Vec<String>,
}

fn polars_path(path: &Path) -> Result<PlRefPath, Error> {
    PlRefPath::try_from_path(path).map_err(|e| Error::unreadable(path)(e.into()))
}

fn require_columns(path: &Path, found: &[String]) -> Result<(), Error> {
    match event::REQUIRED.into_iter().find(|name| !found.iter().any(|f| f == name)) {
        Some(column) => Err(Error::MissingColumn {
            path: path.into(),
            column,
            found: listed(found.iter().map(String::as_str)),
        }),
        None => Ok(()),
    }
}

impl CsvFile {
    /// Bytes that are read at once.
    const BLOCK: usize = 1 << 18;

    fn open(path: &Path) -> Result<Self, Error> {
        let mut rows = Self::rows(path)?;
        let header = rows.byte_headers().map_err(|e| Error::unreadable(path)(e.into()))?;
        let header: Vec<String> = fields(header).map(|name| String::from_utf8_lossy(name).into()).collect();
        require_columns(path, &header)?;
        Ok(Self { path: path.into(), header })
    }

    fn polars_path(&self) -> Result<PlRefPath, Error> {
        polars_path(&self.path)
    }

    fn bytes(path: &Path) -> Result<Box<dyn Read>, Error> {
        let is_gzip = is_gzip(path)?;
        let file = File::open(path).map_err(|source| Error::Open { path: path.into(), source })?;
        Ok(if is_gzip { Box::new(MultiGzDecoder::new(BufReader::new(file))) } else { Box::new(file) })
    }

    /// Whether so many rows have all their separators, and surely so: with a quote in the file, it takes a walk
    /// over the rows to know. To be asked only when polars has found no row with too many.
    fn has_all_separators(&self, n_rows: u64) -> Result<bool, Error> {
        let mut bytes = Self::bytes(&self.path)?;
        let mut block = vec![0; Self::BLOCK];
        let mut n_separators = 0;
        loop {
            let n = bytes.read(&mut block).map_err(|e| Error::unreadable(&self.path)(e.into()))?;
            if n == 0 {
                // The header has as many as a row.
                return Ok(n_separators == (n_rows + 1) * (self.header.len() as u64 - 1));
            }
            if memchr::memchr(b'"', &block[..n]).is_some() {
                return Ok(false);
            }
            n_separators += memchr::memchr_iter(b',', &block[..n]).count() as u64;
        }
    }

    fn rows(path: &Path) -> Result<csv::Reader<Box<dyn Read>>, Error> {
        let mut rows = ReaderBuilder::new();
        // Lines end as they do for polars. The reader's own idea of a line end miscounts `\r\n`.
        rows.flexible(true).terminator(Terminator::Any(b'\n')).buffer_capacity(Self::BLOCK);
        Ok(rows.from_reader(Self::bytes(path)?))
    }

    /// Counts the bad rows, and hands each on with its line.
    fn check_rows(&self, mut bad: impl FnMut(u64, Fault) -> Result<(), Error>) -> Result<u64, Error> {
        let mut n_bad = 0;
        self.each_row(|row, fault| {
            let Some(fault) = fault else { return Ok(()) };
            n_bad += 1;
            bad(row.position().map_or(0, csv::Position::line), fault)
        })?;
        Ok(n_bad)
    }

    /// A copy in the scratch folder that lacks the bad rows.
    fn without_bad_rows(&self, scratch: &Path) -> Result<Self, Error> {
        let path = scratch.join("without-bad-rows.csv");
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut copy = WriterBuilder::new().from_writer(BufWriter::new(file));
        let failed = |e: csv::Error| Error::io("write", &path)(e.into());
        copy.write_record(&self.header).map_err(failed)?;
        self.each_row(|row, fault| match fault {
            Some(_) => Ok(()),
            None => copy.write_record(fields(row)).map_err(failed),
        })?;
        copy.flush().map_err(Error::io("write", &path))?;
        Ok(Self { path, header: self.header.clone() })
    }

    fn each_row(
        &self,
        mut each: impl FnMut(&ByteRecord, Option<Fault>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut rows = Self::rows(&self.path)?;
        let mut row = ByteRecord::new();
        while rows.read_byte_record(&mut row).map_err(|e| Error::unreadable(&self.path)(e.into()))? {
            let is_blank = row.len() == 1 && fields(&row).all(<[u8]>::is_empty);
            if !is_blank {
                each(&row, self.fault(&row))?;
            }
        }
        Ok(())
    }

    /// What makes a row bad, if anything does.
    fn fault(&self, row: &ByteRecord) -> Option<Fault> {
        let (found, needed) = (row.len(), self.header.len());
        if found != needed {
            let column = self.header.get(found).or(self.header.last()).cloned().unwrap_or_default();
            return Some(Fault::new(&column, format!("the row has {found} fields instead of {needed}")));
        }
        let mut cells = Vec::with_capacity(needed);
        for (column, cell) in self.header.iter().zip(fields(row)) {
            match std::str::from_utf8(cell) {
                Ok(cell) => cells.push((column.as_str(), cell)),
                Err(_) => return Some(Fault::new(column, "the cell is not UTF-8".into())),
            }
        }
        if cells.iter().any(|(column, cell)| *column == event::SESSION && cell.is_empty()) {
            return None;
        }
        cells.into_iter().find_map(|(column, cell)| {
            let problem = match column {
                event::TIME => read_time(cell).err(),
                event::PRICE => read_price(cell).err(),
                event::PRODUCT if cell.is_empty() => Some(MISSING.into()),
                event::PRODUCT | event::CATEGORY | event::USER if !cell.is_empty() => read_int(cell).err(),
                _ => None,
            };
            problem.map(|problem| Fault::new(column, problem))
        })
    }
}

/// The fields of a row, without the first half of Windows' line end.
fn fields(row: &ByteRecord) -> impl Iterator<Item = &[u8]> {
    let last = row.len().saturating_sub(1);
    row.iter().enumerate().map(move |(i, field)| match field {
        [field @ .., b'\r'] if i == last => field,
        field => field,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_are_finite_and_not_negative() {
        assert_eq!(read_price("35.79"), Ok(35.79));
        assert_eq!(read_price("0"), Ok(0.0));
        for text in ["", "-0.01", "nan", "inf", "1e999", "4e38", "12,5", " 1"] {
            assert!(read_price(text).is_err(), "{text}");
        }
    }
}
