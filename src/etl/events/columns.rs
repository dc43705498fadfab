//! Reads parquet.
//!
//! The types are checked in the footer's schema first. Only the columns that are used are decoded,
//! a range of rows at a time: one thread decodes with all threads of rayon while the caller takes
//! the batches.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use bireme_base::message::quoted;
use parquet::basic::{
    ConvertedType, Encoding, LogicalType, Repetition, TimeUnit, Type as Physical,
};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl, get_column_reader};
use parquet::data_type::{DataType, Int96};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::{ColumnDescPtr, Type};
use rayon::prelude::*;

use super::cells::{
    CellError, MISSING, NOT_UTF8, TOO_LARGE, Target, Texts, check_price, read_int, read_price,
    read_time,
};
use super::guard::guarded;
use super::table::Table;
use super::{BadRows, Cells, Each, EventBatch, RowCounts, listed, missing_column};
use crate::error::Error;
use crate::schema::event;
use crate::time::EventTime;
use crate::vocab::Coded;

/// Rows of a batch.
const ROWS: usize = 1 << 15;

/// Reads the events of an open file.
pub(super) fn read(
    path: &Path,
    file: File,
    bad_rows: BadRows,
    each: &mut Each<'_>,
) -> Result<RowCounts, Error> {
    let (send, tables) = sync_channel(1);
    thread::spawn({
        let path = path.to_owned();
        move || {
            let ended = guarded(&path, || Reader::open(&path, file)?.each_table(&send));
            let _ = send.send(ended.map(|()| None));
        }
    });
    let mut counts = RowCounts::default();
    for table in tables {
        match table? {
            Some(table) => each(Table::clean(table, path, bad_rows, &mut counts)?)?,
            None => return Ok(counts),
        }
    }
    Err(Error::unreadable(path)("its reader ended early".into()))
}

/// Reads at offsets, so that columns can be read in parallel.
struct Chunks {
    file: Arc<File>,
    length: u64,
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.length
    }
}

struct ReadFrom {
    file: Arc<File>,
    offset: u64,
}

impl Read for ReadFrom {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<ReadFrom>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(BufReader::with_capacity(1 << 12, ReadFrom { file: self.file.clone(), offset: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<bytes::Bytes, ParquetError> {
        // A damaged file must not cause a large allocation.
        if start.checked_add(length as u64).is_none_or(|end| end > self.length) {
            return Err(ParquetError::EOF(format!(
                "{length} bytes at {start} are beyond the file's end"
            )));
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, start)?;
        Ok(bytes.into())
    }
}

/// Checks the sizes of pages, so that a damaged file causes no large allocation in a decoder.
struct Pages {
    pages: SerializedPageReader<Chunks>,
    physical: Physical,
    type_length: usize,
    is_optional: bool,
}

impl Pages {
    fn check(&self, page: &Page) -> Result<(), ParquetError> {
        let (buf, n_values, encoding) =
            (page.buffer(), page.num_values() as usize, page.encoding());
        let is_possible = match page {
            Page::DictionaryPage { .. } => {
                let least = match self.physical {
                    Physical::BOOLEAN => 0,
                    Physical::INT32 | Physical::FLOAT | Physical::BYTE_ARRAY => 4,
                    Physical::INT64 | Physical::DOUBLE => 8,
                    Physical::INT96 => 12,
                    Physical::FIXED_LEN_BYTE_ARRAY => self.type_length,
                };
                n_values.checked_mul(least).is_some_and(|least| least <= buf.len())
            }
            Page::DataPage { .. } if self.is_optional => {
                let length =
                    buf.first_chunk().map_or(0, |length| u32::from_le_bytes(*length) as usize);
                let values = buf.get(4_usize.saturating_add(length)..).unwrap_or_default();
                delta_is_possible(encoding, values, n_values)
            }
            Page::DataPage { .. } => delta_is_possible(encoding, buf, n_values),
            Page::DataPageV2 { def_levels_byte_len, rep_levels_byte_len, .. } => {
                let levels = *def_levels_byte_len as usize + *rep_levels_byte_len as usize;
                delta_is_possible(encoding, buf.get(levels..).unwrap_or_default(), n_values)
            }
        };
        let problem = || ParquetError::General(format!("a page cannot hold its {n_values} values"));
        if is_possible { Ok(()) } else { Err(problem()) }
    }
}

/// Whether the header of a delta encoding agrees with that of the page; true for other encodings.
fn delta_is_possible(encoding: Encoding, values: &[u8], n_values: usize) -> bool {
    let is_delta = matches!(
        encoding,
        Encoding::DELTA_BINARY_PACKED
            | Encoding::DELTA_LENGTH_BYTE_ARRAY
            | Encoding::DELTA_BYTE_ARRAY
    );
    if !is_delta || values.is_empty() {
        return true;
    }
    let mut rest = values;
    let mut number = || {
        let length = 1 + rest.iter().take(9).position(|byte| byte & 0x80 == 0)?;
        let (digits, after) = rest.split_at(length);
        rest = after;
        Some(
            digits
                .iter()
                .rev()
                .fold(0_u64, |number, digit| (number << 7) | u64::from(digit & 0x7f)),
        )
    };
    let (block, miniblocks, n) = (number(), number(), number());
    let most = 1 << 24;
    block.is_some_and(|n| n <= most)
        && miniblocks.is_some_and(|n| n <= most)
        && n.is_some_and(|n| n <= n_values as u64)
}

impl Iterator for Pages {
    type Item = Result<Page, ParquetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>, ParquetError> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = &page {
            self.check(page)?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>, ParquetError> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<(), ParquetError> {
        self.pages.skip_next_page()
    }
}

/// A file with its footer.
struct Reader<'a> {
    path: &'a Path,
    chunks: Arc<Chunks>,
    metadata: ParquetMetaData,
    columns: Vec<Column>,
}

/// A column that is used.
struct Column {
    name: &'static str,
    /// The index among the leaves of the schema.
    leaf: usize,
    target: Target,
    stored: Stored,
    description: ColumnDescPtr,
}

/// The meaning of a column's values.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stored {
    Signed,
    Unsigned,
    Decimal {
        scale: i32,
    },
    Float,
    Float16,
    Text,
    /// Times in ticks, with the number of ticks per second.
    Ticks(u32),
    Int96,
    /// All values are null.
    Null,
}

impl Target {
    fn takes(self, stored: Stored) -> bool {
        let is_int =
            matches!(stored, Stored::Signed | Stored::Unsigned | Stored::Decimal { scale: 0 });
        match stored {
            Stored::Text | Stored::Null => true,
            Stored::Ticks(_) | Stored::Int96 => self == Self::Time,
            Stored::Float | Stored::Float16 | Stored::Decimal { .. } if self == Self::Price => true,
            _ => is_int && self != Self::Time,
        }
    }

    fn needed(self) -> &'static str {
        match self {
            Self::Time => "text or a timestamp",
            Self::Price => "a number",
            Self::Int(_) => "an integer",
            Self::Text(_) => "text or an integer",
        }
    }
}

impl Stored {
    /// `None` for types that no column of events may have.
    fn of(field: &Type) -> Option<Self> {
        if !field.is_primitive() || field.get_basic_info().repetition() == Repetition::REPEATED {
            return None;
        }
        let info = field.get_basic_info();
        let (physical, converted) = (field.get_physical_type(), info.converted_type());
        let ticks = |unit: &TimeUnit| match unit {
            TimeUnit::MILLIS => 1_000,
            TimeUnit::MICROS => 1_000_000,
            TimeUnit::NANOS => 1_000_000_000,
        };
        let stored = match info.logical_type_ref() {
            Some(LogicalType::String | LogicalType::Enum | LogicalType::Json) => Self::Text,
            Some(LogicalType::Decimal(_)) => Self::Decimal { scale: field.get_scale() },
            Some(LogicalType::Timestamp(timestamp)) => Self::Ticks(ticks(&timestamp.unit)),
            Some(LogicalType::Integer(int)) if int.is_signed => Self::Signed,
            Some(LogicalType::Integer(_)) => Self::Unsigned,
            Some(LogicalType::Unknown) => Self::Null,
            Some(LogicalType::Float16) => Self::Float16,
            Some(_) => return None,
            None => match (converted, physical) {
                (ConvertedType::UTF8 | ConvertedType::ENUM | ConvertedType::JSON, _) => Self::Text,
                (ConvertedType::DECIMAL, _) => Self::Decimal { scale: field.get_scale() },
                (ConvertedType::TIMESTAMP_MILLIS, _) => Self::Ticks(1_000),
                (ConvertedType::TIMESTAMP_MICROS, _) => Self::Ticks(1_000_000),
                (
                    ConvertedType::INT_8
                    | ConvertedType::INT_16
                    | ConvertedType::INT_32
                    | ConvertedType::INT_64,
                    _,
                ) => Self::Signed,
                (
                    ConvertedType::UINT_8
                    | ConvertedType::UINT_16
                    | ConvertedType::UINT_32
                    | ConvertedType::UINT_64,
                    _,
                ) => Self::Unsigned,
                (ConvertedType::NONE, Physical::INT32 | Physical::INT64) => Self::Signed,
                (ConvertedType::NONE, Physical::INT96) => Self::Int96,
                (ConvertedType::NONE, Physical::FLOAT | Physical::DOUBLE) => Self::Float,
                (ConvertedType::NONE, Physical::BYTE_ARRAY) => Self::Text,
                _ => return None,
            },
        };
        let is_int = matches!(physical, Physical::INT32 | Physical::INT64);
        let is_bytes = matches!(physical, Physical::BYTE_ARRAY | Physical::FIXED_LEN_BYTE_ARRAY);
        let fits = match stored {
            Self::Signed | Self::Unsigned => is_int,
            Self::Decimal { scale } => scale >= 0 && (is_int || is_bytes),
            Self::Float => true,
            Self::Float16 => physical == Physical::FIXED_LEN_BYTE_ARRAY,
            Self::Text => physical == Physical::BYTE_ARRAY,
            Self::Ticks(_) => physical == Physical::INT64,
            Self::Int96 => physical == Physical::INT96,
            Self::Null => true,
        };
        fits.then_some(stored)
    }
}

/// A type as parquet names it.
fn type_name(field: &Type) -> String {
    let info = field.get_basic_info();
    let logical = info.logical_type_ref();
    let converted = info.converted_type();
    if !field.is_primitive() {
        let is = |of: ConvertedType| converted == of;
        return match logical {
            Some(LogicalType::List) => "a list".into(),
            Some(LogicalType::Map) => "a map".into(),
            _ if is(ConvertedType::LIST) => "a list".into(),
            _ if is(ConvertedType::MAP) || is(ConvertedType::MAP_KEY_VALUE) => "a map".into(),
            _ => "a struct".into(),
        };
    }
    let name = match (logical, field.get_physical_type()) {
        (_, Physical::BOOLEAN) => "bool".into(),
        (Some(LogicalType::Decimal(_)), _) => decimal_name(field),
        (Some(LogicalType::Date), _) => "DATE".into(),
        (Some(LogicalType::Time(_)), _) => "TIME".into(),
        (Some(LogicalType::Timestamp(_)), _) => "TIMESTAMP".into(),
        (Some(LogicalType::Uuid), _) => "UUID".into(),
        (Some(LogicalType::Bson), _) => "BSON".into(),
        (Some(LogicalType::Float16), _) => "FLOAT16".into(),
        (Some(LogicalType::String), _) => "STRING".into(),
        (Some(LogicalType::Integer(int)), _) => {
            format!("{}{}", if int.is_signed { "INT" } else { "UINT" }, int.bit_width)
        }
        _ if converted == ConvertedType::DECIMAL => decimal_name(field),
        (_, physical) if converted == ConvertedType::NONE => physical.to_string(),
        _ => converted.to_string(),
    };
    match info.repetition() {
        Repetition::REPEATED => format!("repeated {name}"),
        _ => name,
    }
}

fn decimal_name(field: &Type) -> String {
    format!("DECIMAL({},{})", field.get_precision(), field.get_scale())
}

impl<'a> Reader<'a> {
    fn open(path: &'a Path, file: File) -> Result<Self, Error> {
        let cannot_open = |source| Error::Open { path: path.into(), source };
        let length = file.metadata().map_err(cannot_open)?.len();
        let chunks = Chunks { file: Arc::new(file), length };
        let metadata = ParquetMetaDataReader::new()
            .parse_and_finish(&chunks)
            .map_err(|e| Error::unreadable(path)(e.into()))?;
        let columns = columns(path, &metadata)?;
        Ok(Self { path, chunks: Arc::new(chunks), metadata, columns })
    }

    fn broken(&self, problem: String) -> Error {
        Error::unreadable(self.path)(problem.into())
    }

    /// Sends tables until the receiver is dropped.
    fn each_table(&self, send: &SyncSender<Result<Option<Table>, Error>>) -> Result<(), Error> {
        let n_rows = self.metadata.file_metadata().num_rows();
        let in_groups: i128 =
            self.metadata.row_groups().iter().map(|group| i128::from(group.num_rows())).sum();
        if i128::from(n_rows) != in_groups {
            return Err(
                self.broken(format!("it has {n_rows} rows, and its row groups {in_groups}"))
            );
        }
        for group in 0..self.metadata.num_row_groups() {
            let readers = self.columns.iter().map(|column| self.pages(column, group));
            let mut readers = readers.collect::<Result<Vec<_>, _>>()?;
            let mut n_left = self.n_rows(group)?;
            while n_left > 0 {
                let n = n_left.min(ROWS);
                n_left -= n;
                let decoded =
                    (self.columns.par_iter().zip(&mut readers)).map(|(column, reader)| {
                        guarded(self.path, || {
                            column.read(reader, n).map_err(|e| {
                                let column = quoted(column.name);
                                self.broken(format!(
                                    "row group {}, column {column}: {e}",
                                    group + 1
                                ))
                            })
                        })
                    });
                let decoded = decoded.collect::<Result<Vec<_>, _>>()?;
                if send.send(Ok(Some(table(decoded)))).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn n_rows(&self, group: usize) -> Result<usize, Error> {
        let n_rows = self.metadata.row_group(group).num_rows();
        usize::try_from(n_rows)
            .map_err(|_| self.broken(format!("row group {} has {n_rows} rows", group + 1)))
    }

    fn pages(&self, column: &Column, group: usize) -> Result<ColumnReader, Error> {
        let chunk = self.metadata.row_group(group).columns().get(column.leaf);
        let chunk =
            chunk.ok_or_else(|| self.broken(format!("row group {} lacks columns", group + 1)))?;
        let pages =
            SerializedPageReader::new(self.chunks.clone(), chunk, self.n_rows(group)?, None);
        let pages = Pages {
            pages: pages.map_err(|e| Error::unreadable(self.path)(e.into()))?,
            physical: column.description.physical_type(),
            type_length: column.description.type_length().max(0) as usize,
            is_optional: column.description.max_def_level() > 0,
        };
        Ok(get_column_reader(column.description.clone(), Box::new(pages)))
    }
}

/// The columns that are used. A column of an unsupported type is refused.
fn columns(path: &Path, metadata: &ParquetMetaData) -> Result<Vec<Column>, Error> {
    let schema = metadata.file_metadata().schema_descr();
    let fields = schema.root_schema().get_fields();
    let names: Vec<&str> = fields.iter().map(|field| field.name()).collect();
    if let Some(column) = missing_column(&names) {
        let found = format!("it has {}", listed(&names));
        return Err(Error::MissingColumn { path: path.into(), column, found });
    }
    let mut columns = Vec::new();
    for name in event::REQUIRED.into_iter().chain(event::OPTIONAL) {
        let (mut of_name, target) =
            (fields.iter().filter(|field| field.name() == name), Target::of(name));
        let (Some(field), Some(target)) = (of_name.next(), target) else { continue };
        if of_name.next().is_some() {
            return Err(Error::ColumnTwice { path: path.into(), column: quoted(name) });
        }
        let leaf =
            schema.columns().iter().position(|column| column.path().parts() == [name.to_owned()]);
        let (Some(leaf), Some(stored)) =
            (leaf, Stored::of(field).filter(|stored| target.takes(*stored)))
        else {
            return Err(Error::ColumnType {
                path: path.into(),
                column: name,
                needed: target.needed(),
                found: type_name(field),
            });
        };
        columns.push(Column { name, leaf, target, stored, description: schema.column(leaf) });
    }
    Ok(columns)
}

/// A cell of any physical type.
enum Cell<'a> {
    Int(i64),
    Unsigned(u64),
    Decimal {
        unscaled: i128,
        scale: i32,
    },
    /// A decimal of more than 38 digits.
    LongDecimal(f64),
    Float(f64),
    Text(&'a [u8]),
    Time(EventTime),
}

impl Cell<'_> {
    fn int(&self) -> Result<Option<i64>, String> {
        match *self {
            Self::Int(int) => Ok(Some(int)),
            Self::Unsigned(int) => {
                i64::try_from(int).map(Some).map_err(|_| format!("`{int}` {TOO_LARGE}"))
            }
            Self::Decimal { unscaled, .. } => {
                i64::try_from(unscaled).map(Some).map_err(|_| format!("`{unscaled}` {TOO_LARGE}"))
            }
            Self::LongDecimal(value) => Err(format!("`{value:e}` {TOO_LARGE}")),
            Self::Text(text) => match utf8(text)? {
                "" => Ok(None),
                text => read_int(text).map(Some),
            },
            Self::Float(_) | Self::Time(_) => Err(TYPE.into()),
        }
    }

    fn price(&self) -> Result<f64, String> {
        match *self {
            Self::Int(int) => check_price(int as f64),
            Self::Unsigned(int) => check_price(int as f64),
            Self::Decimal { unscaled, scale } => check_price(decimal(unscaled, scale)),
            Self::LongDecimal(value) | Self::Float(value) => check_price(value),
            Self::Text(text) => read_price(utf8(text)?),
            Self::Time(_) => Err(TYPE.into()),
        }
    }

    fn time(&self) -> Result<EventTime, String> {
        match *self {
            Self::Time(time) => Ok(time),
            Self::Text(text) => read_time(utf8(text)?),
            _ => Err(TYPE.into()),
        }
    }

    fn push(&self, texts: &mut Texts) -> Result<(), String> {
        match *self {
            Self::Text(text) => texts.push(utf8(text)?),
            Self::Int(int) => texts.push(&int.to_string()),
            Self::Unsigned(int) => texts.push(&int.to_string()),
            Self::Decimal { unscaled, .. } => texts.push(&unscaled.to_string()),
            Self::LongDecimal(_) | Self::Float(_) | Self::Time(_) => return Err(TYPE.into()),
        }
        Ok(())
    }
}

/// For types that [`Target::takes`] excludes.
const TYPE: &str = "the cell is of another type";

fn utf8(text: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(text).map_err(|_| NOT_UTF8.into())
}

/// The nearest float to `unscaled` · 10^-`scale`, as if parsed from its digits.
fn decimal(unscaled: i128, scale: i32) -> f64 {
    format!("{unscaled}e-{scale}").parse().unwrap_or(f64::NAN)
}

/// A decimal of big-endian bytes in two's complement.
fn decimal_cell<'a>(bytes: &[u8], scale: i32) -> Cell<'a> {
    let is_negative = bytes.first().is_some_and(|byte| byte & 0x80 != 0);
    let sign = if is_negative { 0xff } else { 0 };
    if let Some((sign_bytes, rest)) = bytes.split_last_chunk::<16>()
        && (sign_bytes.iter().any(|byte| *byte != sign) || (rest[0] ^ sign) & 0x80 != 0)
    {
        let value = bytes.iter().fold(0.0, |value, byte| value * 256.0 + f64::from(byte ^ sign));
        let value = if is_negative { -value } else { value } / 10_f64.powi(scale);
        return Cell::LongDecimal(value);
    }
    let start = bytes.len().saturating_sub(16);
    let first = if is_negative { -1 } else { 0 };
    let unscaled =
        bytes[start..].iter().fold(first, |value: i128, byte| (value << 8) | i128::from(*byte));
    Cell::Decimal { unscaled, scale }
}

fn time(int96: &Int96) -> EventTime {
    const EPOCH: i64 = 2_440_588;
    let &[low, high, day] = int96.data().first_chunk().unwrap_or(&[0; 3]);
    let nanos = ((u64::from(high) << 32) | u64::from(low)).cast_signed();
    let of_day = EventTime::from_ticks(nanos, 1_000_000_000);
    // Cannot overflow, because days have 32 bits.
    let seconds = (i64::from(day.cast_signed()) - EPOCH) * 86_400 + of_day.seconds;
    EventTime { seconds, ..of_day }
}

/// Errors, each with the index of its row.
type CellErrors = Vec<(usize, CellError)>;

/// Some rows of a column.
enum Decoded {
    Time(Vec<EventTime>, CellErrors),
    Price(Vec<f64>, CellErrors),
    Cells(Coded, Cells, CellErrors),
}

fn table(decoded: Vec<Decoded>) -> Table {
    let mut table = Table { batch: EventBatch::default(), faults: Vec::new() };
    for column in decoded {
        let faults = match column {
            Decoded::Time(time, faults) => {
                table.batch.time = time;
                faults
            }
            Decoded::Price(price, faults) => {
                table.batch.price = price;
                faults
            }
            Decoded::Cells(column, cells, faults) => {
                table.batch.cells[column as usize] = Some(cells);
                faults
            }
        };
        table.faults.extend(faults);
    }
    table
}

impl Column {
    fn read(&self, reader: &mut ColumnReader, n: usize) -> Result<Decoded, ParquetError> {
        let missing = || MISSING.to_owned();
        match self.target {
            Target::Time => {
                let (times, faults) =
                    self.values(reader, n, |cell| cell.ok_or_else(missing)?.time())?;
                Ok(Decoded::Time(times, faults))
            }
            Target::Price => {
                let (prices, faults) =
                    self.values(reader, n, |cell| cell.ok_or_else(missing)?.price())?;
                Ok(Decoded::Price(prices, faults))
            }
            Target::Int(column) => {
                let (ints, faults) =
                    self.values(reader, n, |cell| match cell.map_or(Ok(None), Cell::int)? {
                        None if column == Coded::Product => Err(missing()),
                        int => Ok(int),
                    })?;
                Ok(Decoded::Cells(column, Cells::Int(ints), faults))
            }
            Target::Text(column) => {
                let mut texts = Texts::default();
                let (_, faults) = self.values(reader, n, |cell| match cell {
                    None => {
                        texts.push("");
                        Ok(())
                    }
                    // An empty text would mean a row without a session; a bad cell must not.
                    Some(cell) => cell.push(&mut texts).inspect_err(|_| texts.push("\u{fffd}")),
                })?;
                Ok(Decoded::Cells(column, Cells::Text(texts), faults))
            }
        }
    }

    /// Reads the next `n` rows. A bad cell leaves the default of `T` and an error.
    fn values<T: Default>(
        &self,
        reader: &mut ColumnReader,
        n: usize,
        mut value: impl FnMut(Option<&Cell<'_>>) -> Result<T, String>,
    ) -> Result<(Vec<T>, CellErrors), ParquetError> {
        let (mut values, mut faults) = (Vec::with_capacity(n), Vec::new());
        self.each(reader, n, |row, cell| {
            values.push(value(cell).unwrap_or_else(|problem| {
                faults.push((row, CellError::new(self.name, problem)));
                T::default()
            }));
        })?;
        Ok((values, faults))
    }

    /// Calls `each` with the next cells, nulls included.
    fn each(
        &self,
        reader: &mut ColumnReader,
        n: usize,
        mut each: impl FnMut(usize, Option<&Cell<'_>>),
    ) -> Result<(), ParquetError> {
        let stored = self.stored;
        match reader {
            _ if stored == Stored::Null => {
                (0..n).for_each(|row| each(row, None));
                Ok(())
            }
            ColumnReader::Int32ColumnReader(reader) => rows(reader, n, |row, value| {
                each(row, value.map(|value| int32(*value, stored)).as_ref())
            }),
            ColumnReader::Int64ColumnReader(reader) => rows(reader, n, |row, value| {
                each(row, value.map(|value| int64(*value, stored)).as_ref())
            }),
            ColumnReader::Int96ColumnReader(reader) => rows(reader, n, |row, value| {
                each(row, value.map(|value| Cell::Time(time(value))).as_ref())
            }),
            ColumnReader::FloatColumnReader(reader) => rows(reader, n, |row, value| {
                each(row, value.map(|value| Cell::Float(f64::from(*value))).as_ref());
            }),
            ColumnReader::DoubleColumnReader(reader) => rows(reader, n, |row, value| {
                each(row, value.map(|value| Cell::Float(*value)).as_ref())
            }),
            ColumnReader::ByteArrayColumnReader(reader) => rows(reader, n, |row, value| {
                each(row, value.map(|value| bytes(value.data(), stored)).as_ref());
            }),
            ColumnReader::FixedLenByteArrayColumnReader(reader) => rows(reader, n, |row, value| {
                each(row, value.map(|value| bytes(value.data(), stored)).as_ref());
            }),
            ColumnReader::BoolColumnReader(_) => Err(ParquetError::General(TYPE.into())),
        }
    }
}

fn int32<'a>(value: i32, stored: Stored) -> Cell<'a> {
    match stored {
        Stored::Unsigned => Cell::Unsigned(u64::from(value.cast_unsigned())),
        _ => int64(i64::from(value), stored),
    }
}

fn int64<'a>(value: i64, stored: Stored) -> Cell<'a> {
    match stored {
        Stored::Unsigned => Cell::Unsigned(value.cast_unsigned()),
        Stored::Decimal { scale } => Cell::Decimal { unscaled: i128::from(value), scale },
        Stored::Ticks(per_second) => Cell::Time(EventTime::from_ticks(value, per_second)),
        _ => Cell::Int(value),
    }
}

fn bytes(value: &[u8], stored: Stored) -> Cell<'_> {
    match stored {
        Stored::Decimal { scale } => decimal_cell(value, scale),
        Stored::Float16 => {
            let half = value.first_chunk().copied().unwrap_or_default();
            Cell::Float(half::f16::from_le_bytes(half).to_f64())
        }
        _ => Cell::Text(value),
    }
}

/// Decodes the next `n` rows of a column that is not nested.
fn rows<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    n: usize,
    mut each: impl FnMut(usize, Option<&T::T>),
) -> Result<(), ParquetError> {
    let (mut levels, mut values) = (Vec::new(), Vec::with_capacity(n));
    let (n_read, n_values, _) = reader.read_records(n, Some(&mut levels), None, &mut values)?;
    let of_levels = levels.iter().filter(|level| **level > 0).count();
    if n_read != n || n_values != values.len() || !(levels.is_empty() || of_levels == n_values) {
        return Err(ParquetError::General(format!("{n} rows are needed, and {n_read} are there")));
    }
    let mut values = values.iter();
    for row in 0..n {
        let is_null = levels.get(row).is_some_and(|level| *level == 0);
        each(row, if is_null { None } else { values.next() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_the_numbers_of_their_digits() {
        let read = |bytes: &[u8], scale: i32| match decimal_cell(bytes, scale) {
            Cell::Decimal { unscaled, scale } => decimal(unscaled, scale),
            Cell::LongDecimal(value) => value,
            _ => f64::NAN,
        };
        assert_eq!(read(&[0x30, 0x39], 2), 123.45);
        assert_eq!(read(&[0xff, 0xff], 2), -0.01);
        assert_eq!(read(&[], 0), 0.0);
        let mut wide = [0; 32];
        wide[30..].copy_from_slice(&[0x30, 0x39]);
        assert_eq!(read(&wide, 2), 123.45);
        assert_eq!(read(&[0xff; 32], 1), -0.1);
        wide[10] = 1;
        assert!(read(&wide, 0) > 1e38);
    }

    #[test]
    fn times_of_96_bits_count_from_1970() {
        let mut int96 = Int96::new();
        int96.set_data(250_000_000, 0, 2_440_589);
        assert_eq!(time(&int96), EventTime { seconds: 86_400, nanos: 250_000_000 });
    }

    #[test]
    fn headers_of_delta_encodings_are_held_against_the_page() {
        let delta = |bytes: &[u8]| delta_is_possible(Encoding::DELTA_BINARY_PACKED, bytes, 10);
        assert!(delta(&[0x80, 1, 4, 10, 0]));
        assert!(!delta(&[0x80, 1, 4, 11, 0]));
        assert!(!delta(&[0x80, 1, 4, 0xff, 0xff, 0xff, 0xff, 0x0f, 0]));
        assert!(delta_is_possible(Encoding::PLAIN, &[0xff; 9], 1));
    }
}
