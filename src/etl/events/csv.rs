//! Reads CSV.
//!
//! One thread reads, decompresses and splits into records, a second lets all threads of rayon parse
//! the records of a block, and the caller receives the batches in the file's order. A few blocks
//! are in memory at a time.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use bireme_base::message::quoted;
use memchr::memchr;
use rayon::prelude::*;

use super::cells::{CellError, MISSING, NOT_UTF8, Target, Texts, read_int, read_price, read_time};
use super::guard::guarded;
use super::input::{Text, text_kind};
use super::records::{Block, Columns, CsvRecord, RecordShape, Splitter, Unknown, quoted_fields};
use super::{BadRows, Cells, Each, EventBatch, RowCounts, listed, missing_column};
use crate::error::Error;
use crate::schema::event;
use crate::time::EventTime;
use crate::vocab::Coded;

/// Reads the events of an open file.
pub(super) fn read(
    path: &Path,
    text: Text,
    bad_rows: BadRows,
    each: &mut Each<'_>,
) -> Result<RowCounts, Error> {
    let parsed = start(path.into(), text, bad_rows);
    let mut counts = RowCounts::default();
    let mut n_lines = 0;
    for step in parsed {
        match step? {
            Parsed::Rows(parts) => {
                for part in parts {
                    if let Some((line, fault)) = part.fault {
                        return Err(bad_row(path, line, fault));
                    }
                    counts += part.counts;
                    n_lines += part.n_lines;
                    if !(part.batch.time.is_empty() && part.batch.bad.is_empty()) {
                        each(part.batch)?;
                    }
                }
            }
            Parsed::End(lines) if n_lines + lines.outside_rows == lines.in_file => {
                return Ok(counts);
            }
            Parsed::End(lines) => {
                let read = n_lines + lines.outside_rows;
                return Err(Error::Miscounted { path: path.into(), lines: lines.in_file, read });
            }
        }
    }
    Err(Error::unreadable(path)("its reader ended early".into()))
}

fn bad_row(path: &Path, line: u64, CellError { column, problem }: CellError) -> Error {
    Error::BadRow { path: path.into(), place: "line", number: line, column, problem }
}

/// A message from the thread that reads.
enum Read {
    Plan(Arc<Plan>),
    Block(Block),
    End(Lines),
}

/// A message from the thread that parses.
enum Parsed {
    Rows(Vec<Part>),
    End(Lines),
}

/// Counts of a file's lines.
#[derive(Clone, Copy, Default)]
struct Lines {
    /// All lines, counted by line ends.
    in_file: u64,
    /// Lines of the header and blank lines.
    outside_rows: u64,
}

/// Starts both threads. They are not joined, because a pipe may have no end.
fn start(path: PathBuf, text: Text, bad_rows: BadRows) -> Receiver<Result<Parsed, Error>> {
    let (send_read, read) = sync_channel(1);
    let (send_parsed, parsed) = sync_channel(1);
    let path = Arc::new(path);
    thread::spawn({
        let path = path.clone();
        move || {
            let ended =
                guarded(&path, || text.with(&path, |source| split(&path, source, &send_read)));
            if let Err(error) = ended {
                let _ = send_read.send(Err(error));
            }
        }
    });
    thread::spawn(move || {
        let mut plan: Option<Arc<Plan>> = None;
        for step in read {
            let step = match step {
                Ok(Read::Plan(columns)) => {
                    plan = Some(columns);
                    continue;
                }
                Ok(Read::Block(block)) => {
                    plan.as_ref().map_or(Ok(Parsed::Rows(Vec::new())), |plan| {
                        guarded(&path, || parse(&path, &block, plan, bad_rows)).map(Parsed::Rows)
                    })
                }
                Ok(Read::End(lines)) => Ok(Parsed::End(lines)),
                Err(error) => Err(error),
            };
            if send_parsed.send(step).is_err() {
                return;
            }
        }
    });
    parsed
}

/// Sends the blocks of a stream until the receiver is dropped.
fn split(
    path: &Path,
    source: &mut dyn std::io::Read,
    send: &SyncSender<Result<Read, Error>>,
) -> Result<(), Error> {
    let unreadable = |e: std::io::Error| Error::unreadable(path)(e.into());
    let mut splitter = Splitter::new(source).map_err(unreadable)?;
    let head = splitter.head()[..splitter.head().len().min(1 << 12)].to_vec();
    let mut lines = Lines::default();
    let header = loop {
        match splitter.next_block(&Unknown, 1).map_err(unreadable)? {
            None => return Err(no_header(path)),
            Some(block) => {
                lines.outside_rows += block.n_blank;
                if let [record] = &block.records[..] {
                    break Plan::of_header(
                        path,
                        &block.bytes[record.start..record.end],
                        record,
                        &head,
                    )?;
                }
            }
        }
    };
    let (plan, n_lines) = header;
    lines.outside_rows += n_lines;
    let plan = Arc::new(plan);
    if send.send(Ok(Read::Plan(plan.clone()))).is_err() {
        return Ok(());
    }
    while let Some(block) = splitter.next_block(&*plan, usize::MAX).map_err(unreadable)? {
        lines.outside_rows += block.n_blank;
        if send.send(Ok(Read::Block(block))).is_err() {
            return Ok(());
        }
    }
    lines.in_file = splitter.n_lines();
    let _ = send.send(Ok(Read::End(lines)));
    Ok(())
}

fn no_header(path: &Path) -> Error {
    Error::MissingColumn {
        path: path.into(),
        column: event::TIME,
        found: "the file is empty".into(),
    }
}

/// The columns of the header and their types.
struct Plan {
    names: Vec<String>,
    /// The fields that are used, in the header's order.
    used: Vec<(usize, Target)>,
    session: usize,
    has: [bool; 7],
}

impl Plan {
    /// Reads the header, and returns the number of its lines too.
    fn of_header(
        path: &Path,
        text: &[u8],
        record: &CsvRecord,
        head: &[u8],
    ) -> Result<(Self, u64), Error> {
        let refused =
            |problem: String| Error::Header { path: path.into(), line: record.line, problem };
        if let RecordShape::Wrong { problem, .. } = record.shape {
            return Err(text_kind(path, head).unwrap_or_else(|| refused(problem.into())));
        }
        let (fields, n_breaks) = quoted_fields(text);
        let names: Vec<String> =
            fields.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        let texts: Vec<&str> = names.iter().map(String::as_str).collect();
        if let Some(column) = missing_column(&texts) {
            if let Some(kind) = text_kind(path, head) {
                return Err(kind);
            }
            let is_one_line = n_breaks == 0 && text.contains(&b'\r');
            let found = if is_one_line {
                "its lines seem to end with CR alone, as on old Macs: `tr '\\r' '\\n'` mends that"
                    .into()
            } else {
                separator(text).map_or_else(
                    || format!("it has {}", listed(&texts)),
                    |separator| format!("its fields seem to be separated by {}", quoted(separator)),
                )
            };
            return Err(Error::MissingColumn { path: path.into(), column, found });
        }
        if let Some(name) = twice(&texts) {
            return Err(Error::ColumnTwice { path: path.into(), column: quoted(name) });
        }
        let mut plan = Self { names, used: Vec::new(), session: 0, has: [false; 7] };
        for (field, name) in plan.names.iter().enumerate() {
            let Some(target) = Target::of(name) else { continue };
            if let Target::Int(column) | Target::Text(column) = target {
                plan.has[column as usize] = true;
            }
            if target == Target::Text(Coded::Session) {
                plan.session = field;
            }
            plan.used.push((field, target));
        }
        Ok((plan, 1 + n_breaks))
    }

    fn fault(&self, field: usize, problem: impl Into<String>) -> CellError {
        let name = self.names.get(field).or(self.names.last()).map_or("", String::as_str);
        CellError::new(name, problem)
    }

    /// The values of a row with `n_fields` fields; `None` if it has no session.
    ///
    /// `field` returns `None` for bytes that are not UTF-8.
    fn row<'a>(
        &self,
        n_fields: usize,
        field: impl Fn(usize) -> Option<&'a str>,
        without_session: WithoutSession,
    ) -> Result<Option<Row<'a>>, CellError> {
        let n_needed = self.names.len();
        if n_fields != n_needed {
            let fields = if n_fields == 1 { "field" } else { "fields" };
            let problem = format!("the row has {n_fields} {fields} instead of {n_needed}");
            return Err(self.fault(n_fields, problem));
        }
        let text = |i: usize| field(i).ok_or_else(|| self.fault(i, NOT_UTF8));
        if without_session == WithoutSession::LeftOut && text(self.session)?.is_empty() {
            return Ok(None);
        }
        let mut row = Row::default();
        for (i, target) in &self.used {
            let cell = text(*i)?;
            let bad = |problem: String| self.fault(*i, problem);
            match *target {
                Target::Time => row.time = read_time(cell).map_err(bad)?,
                Target::Price => row.price = read_price(cell).map_err(bad)?,
                Target::Text(column) => row.texts[column as usize] = cell,
                Target::Int(Coded::Product) if cell.is_empty() => {
                    return Err(self.fault(*i, MISSING));
                }
                Target::Int(_) if cell.is_empty() => {}
                Target::Int(column) => {
                    row.ints[column as usize] = Some(read_int(cell).map_err(bad)?)
                }
            }
        }
        Ok(Some(row))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum WithoutSession {
    LeftOut,
    /// The row is checked like any other.
    Checked,
}

impl Columns for Plan {
    fn n_columns(&self) -> usize {
        self.names.len()
    }

    fn is_row(&self, record: &[u8]) -> bool {
        let (fields, _) = quoted_fields(record);
        let field = |i: usize| std::str::from_utf8(&fields[i]).ok();
        self.row(fields.len(), field, WithoutSession::Checked).is_ok()
    }
}

/// A name that occurs twice. Columns without a name are not used, and may be many.
fn twice<'a>(names: &[&'a str]) -> Option<&'a str> {
    let repeats = |(i, name): &(usize, &&str)| !name.is_empty() && names[..*i].contains(name);
    names.iter().enumerate().find(repeats).map(|(_, name)| *name)
}

/// The separator of a header that has the required columns, but no commas.
fn separator(header: &[u8]) -> Option<&'static str> {
    let text = std::str::from_utf8(header).ok()?;
    [";", "\t", "|"].into_iter().find(|separator| {
        let names: Vec<&str> =
            text.split(separator).map(|name| name.trim().trim_matches('"')).collect();
        names.len() > 1 && (missing_column(&names).is_none() || !text.contains(','))
    })
}

#[derive(Default)]
struct Row<'a> {
    time: EventTime,
    price: f64,
    ints: [Option<i64>; 7],
    texts: [&'a str; 7],
}

/// The result of parsing some records.
#[derive(Default)]
struct Part {
    batch: EventBatch,
    counts: RowCounts,
    /// The number of lines of the records.
    n_lines: u64,
    /// The first bad row and its line, if bad rows are refused.
    fault: Option<(u64, CellError)>,
}

/// Parses the records of a block in parallel parts, and appends the results in their order.
fn parse(path: &Path, block: &Block, plan: &Plan, bad_rows: BadRows) -> Result<Vec<Part>, Error> {
    /// Fewer records are not worth several threads.
    const FEWEST: usize = 1 << 12;
    let n_rows = block.records.len().div_ceil(rayon::current_num_threads()).max(FEWEST);
    let parts = block
        .records
        .par_chunks(n_rows)
        .map(|records| guarded(path, || Ok(parse_part(&block.bytes, records, plan, bad_rows))));
    parts.collect()
}

fn parse_part(bytes: &[u8], records: &[CsvRecord], plan: &Plan, bad_rows: BadRows) -> Part {
    let mut part = Part::default();
    let mut columns = Builder::new(plan, records.len());
    let (Some(first), Some(last)) = (records.first(), records.last()) else { return part };
    let origin = first.start;
    // Check all cells at once, and one by one only if that fails.
    let utf8 = std::str::from_utf8(&bytes[origin..last.end]).ok();
    let mut ends = Vec::with_capacity(plan.names.len());
    for &CsvRecord { start, end, line, ref shape } in records {
        let record = &bytes[start..end];
        part.counts.read += 1;
        part.n_lines += 1;
        let unescaped;
        let row = match *shape {
            RecordShape::Wrong { field, problem } => Err(plan.fault(field, problem)),
            RecordShape::Plain => {
                ends.clear();
                let mut at = 0;
                while let Some(length) = memchr(b',', &record[at..]) {
                    ends.push(at + length);
                    at += length + 1;
                }
                ends.push(record.len());
                let field = |i: usize| {
                    let field = if i == 0 { 0..ends[0] } else { ends[i - 1] + 1..ends[i] };
                    match utf8 {
                        Some(text) => {
                            Some(&text[start - origin + field.start..start - origin + field.end])
                        }
                        None => std::str::from_utf8(&record[field]).ok(),
                    }
                };
                plan.row(ends.len(), field, WithoutSession::LeftOut)
            }
            RecordShape::Quoted => {
                let (fields, n_breaks) = quoted_fields(record);
                part.n_lines += n_breaks;
                unescaped = fields;
                let fields: &[Cow<'_, [u8]>] = &unescaped;
                let field = |i: usize| std::str::from_utf8(&fields[i]).ok();
                plan.row(fields.len(), field, WithoutSession::LeftOut)
            }
        };
        match row {
            Ok(Some(row)) => columns.push(&row, line),
            Ok(None) => part.counts.without_session += 1,
            Err(_) if bad_rows == BadRows::Skip => {
                part.counts.bad += 1;
                columns.batch.bad.push(line);
            }
            Err(fault) => {
                part.fault = Some((line, fault));
                break;
            }
        }
    }
    part.batch = columns.batch;
    part
}

/// Appends rows to the columns of a batch.
struct Builder {
    batch: EventBatch,
}

impl Builder {
    fn new(plan: &Plan, n_rows: usize) -> Self {
        let cells = |column: Coded| match column {
            _ if !plan.has[column as usize] => None,
            _ if column.is_int() => Some(Cells::Int(Vec::with_capacity(n_rows))),
            _ => Some(Cells::Text(Texts::default())),
        };
        let time = Vec::with_capacity(n_rows);
        let price = Vec::with_capacity(n_rows);
        let number = Vec::with_capacity(n_rows);
        let cells = Coded::ALL.map(cells);
        Self { batch: EventBatch { time, price, cells, number, unit: "line", bad: Vec::new() } }
    }

    fn push(&mut self, row: &Row<'_>, line: u64) {
        self.batch.number.push(line);
        self.batch.time.push(row.time);
        self.batch.price.push(row.price);
        for (column, cells) in self.batch.cells.iter_mut().enumerate() {
            match cells {
                Some(Cells::Int(ints)) => ints.push(row.ints[column]),
                Some(Cells::Text(texts)) => texts.push(row.texts[column]),
                None => {}
            }
        }
    }
}
