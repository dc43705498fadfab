//! Splits CSV into records and fields, in the dialect of `docs/data.md`.
//!
//! A line without a quote is a record. A line with one is scanned field by field, over further
//! lines where a quoted field holds line breaks. If the quotes are wrong, only the first line is
//! left out, and reading resumes with the second: a quote too many costs its own line and never
//! the rows after it.

use std::borrow::Cow;
use std::io::{self, Read};
use std::ops::Range;

use memchr::{memchr, memchr_iter, memchr2};

/// The most bytes of a record over several lines and of a quoted field. A quote that is not closed
/// within them counts as not closed, so that a stray quote costs neither memory nor time.
const QUOTED: usize = 1 << 20;
/// The most bytes of a line.
const LINE: usize = 16 << 20;
/// Bytes per read.
const BLOCK: usize = 2 << 20;

const NOT_CLOSED: &str = "the quote that opens this field is not closed";
const AFTER_QUOTE: &str = "there is text after the field's closing quote";
const LONG_QUOTED: &str = "the quoted field is longer than 1 MiB, or its quote is not closed";
const SWALLOWED: &str = "the quote that opens this field is not closed before the next row";
const LONG_LINE: &str = "the line is longer than 16 MiB";

/// The end of a record.
#[derive(Debug, PartialEq)]
enum Scan {
    CsvRecord {
        end: usize,
        next: usize,
    },
    /// The quotes are wrong in the field of this index.
    Wrong {
        field: usize,
        problem: &'static str,
    },
    /// The end is beyond the buffer.
    More,
}

/// Scans the record at `start`, whose first line has a quote and ends at `line_end`.
fn scan(buffer: &[u8], start: usize, line_end: usize, is_last: bool, n_columns: usize) -> Scan {
    // A record over several lines with more fields than this is a chain of stray quotes.
    let most_fields = n_columns.saturating_add(100);
    let (mut at, mut field) = (start, 0);
    loop {
        if at > line_end && (at - start > QUOTED || field > most_fields) {
            return Scan::Wrong { field: 0, problem: LONG_QUOTED };
        }
        if buffer.get(at) == Some(&b'"') {
            let text = &buffer[at + 1..];
            match closing_quote(&text[..text.len().min(QUOTED)]) {
                Some(length) => at += length + 2,
                None if text.len() > QUOTED => return Scan::Wrong { field, problem: LONG_QUOTED },
                None if is_last => return Scan::Wrong { field, problem: NOT_CLOSED },
                None => return Scan::More,
            }
            match &buffer[at..] {
                // The next byte may be the second half of an escaped quote.
                [] | [b'\r'] if !is_last => return Scan::More,
                [b',', ..] => at += 1,
                [b'\n', ..] => return Scan::CsvRecord { end: at, next: at + 1 },
                [b'\r', b'\n', ..] => return Scan::CsvRecord { end: at, next: at + 2 },
                [] | [b'\r'] => return Scan::CsvRecord { end: at, next: buffer.len() },
                _ => return Scan::Wrong { field, problem: AFTER_QUOTE },
            }
        } else {
            match memchr2(b',', b'\n', &buffer[at..]) {
                Some(length) if buffer[at + length] == b',' => at += length + 1,
                Some(length) => {
                    let end = at + length;
                    return Scan::CsvRecord { end: without_cr(buffer, at, end), next: end + 1 };
                }
                None if is_last => {
                    return Scan::CsvRecord {
                        end: without_cr(buffer, at, buffer.len()),
                        next: buffer.len(),
                    };
                }
                None if buffer.len() - start > QUOTED => {
                    return Scan::Wrong { field, problem: LONG_QUOTED };
                }
                None => return Scan::More,
            }
        }
        field += 1;
    }
}

/// The offset of the quote that closes a field; `text` follows its opening quote.
fn closing_quote(text: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        at += memchr(b'"', &text[at..])?;
        if text.get(at + 1) != Some(&b'"') {
            return Some(at);
        }
        at += 2;
    }
}

/// The end of a line without the CR of a CRLF.
fn without_cr(buffer: &[u8], start: usize, end: usize) -> usize {
    if end > start && buffer[end - 1] == b'\r' { end - 1 } else { end }
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
}

/// The fields of a record with valid quotes, and the number of line breaks in quoted fields.
pub(super) fn quoted_fields(record: &[u8]) -> (Vec<Cow<'_, [u8]>>, u64) {
    let (mut fields, mut n_breaks) = (Vec::new(), 0);
    let mut rest = record;
    loop {
        let end = if let [b'"', text @ ..] = rest {
            let end = closing_quote(text).unwrap_or(text.len());
            let text = &text[..end];
            n_breaks += memchr_iter(b'\n', text).count() as u64;
            fields.push(unescaped(text));
            (end + 2).min(rest.len())
        } else {
            let end = memchr(b',', rest).unwrap_or(rest.len());
            fields.push(Cow::Borrowed(&rest[..end]));
            end
        };
        match &rest[end..] {
            [_, after @ ..] => rest = after,
            [] => return (fields, n_breaks),
        }
    }
}

fn unescaped(text: &[u8]) -> Cow<'_, [u8]> {
    if memchr(b'"', text).is_none() {
        return Cow::Borrowed(text);
    }
    let mut unescaped = Vec::with_capacity(text.len());
    let mut is_second = false;
    for byte in text {
        is_second = *byte == b'"' && !is_second;
        if !is_second {
            unescaped.push(*byte);
        }
    }
    Cow::Owned(unescaped)
}

/// A record of a block.
#[derive(Debug)]
pub(super) struct CsvRecord {
    pub start: usize,
    /// Without the line end.
    pub end: usize,
    /// The number of the first line, from 1.
    pub line: u64,
    pub shape: RecordShape,
}

#[derive(Debug, PartialEq)]
pub(super) enum RecordShape {
    /// A line without quotes.
    Plain,
    /// A record with valid quotes.
    Quoted,
    /// A line that is not a record, with the index of the field in error.
    Wrong { field: usize, problem: &'static str },
}

/// A block of whole records.
#[derive(Debug, Default)]
pub(super) struct Block {
    pub bytes: Vec<u8>,
    pub records: Vec<CsvRecord>,
    pub n_blank: u64,
}

/// The splitter's knowledge of the columns.
pub(super) trait Columns {
    fn n_columns(&self) -> usize;

    /// Whether a record with valid quotes is a good row.
    fn is_row(&self, record: &[u8]) -> bool;
}

/// The columns before the header is read.
pub(super) struct Unknown;

impl Columns for Unknown {
    fn n_columns(&self) -> usize {
        // Any number of names is allowed in a header of several lines.
        usize::MAX
    }

    fn is_row(&self, _: &[u8]) -> bool {
        false
    }
}

pub(super) struct Splitter<'a> {
    source: &'a mut dyn Read,
    /// Bytes that were not yet assigned to records.
    buffer: Vec<u8>,
    is_last: bool,
    /// Whether the buffer begins inside a line that is too long.
    in_long_line: bool,
    /// The number of the buffer's first line.
    line: u64,
    n_newlines: u64,
    ends_in_newline: bool,
}

impl<'a> Splitter<'a> {
    /// # Errors
    /// The stream cannot be read.
    pub fn new(source: &'a mut dyn Read) -> io::Result<Self> {
        let mut splitter = Self {
            source,
            buffer: Vec::new(),
            is_last: false,
            in_long_line: false,
            line: 1,
            n_newlines: 0,
            ends_in_newline: true,
        };
        splitter.fill(BLOCK)?;
        if splitter.buffer.starts_with(b"\xef\xbb\xbf") {
            splitter.buffer.drain(..3);
        }
        Ok(splitter)
    }

    /// The buffered bytes that follow.
    pub fn head(&self) -> &[u8] {
        &self.buffer
    }

    /// The number of lines so far, counted by line ends.
    pub fn n_lines(&self) -> u64 {
        self.n_newlines + u64::from(!self.ends_in_newline)
    }

    fn fill(&mut self, length: usize) -> io::Result<()> {
        let start = self.buffer.len();
        if self.is_last || start >= length {
            return Ok(());
        }
        self.buffer.reserve_exact(length - start);
        let n = (&mut *self.source).take((length - start) as u64).read_to_end(&mut self.buffer)?;
        self.is_last = n < length - start;
        let read = &self.buffer[start..];
        self.n_newlines += memchr_iter(b'\n', read).count() as u64;
        self.ends_in_newline = read.last().map_or(self.ends_in_newline, |last| *last == b'\n');
        Ok(())
    }

    /// The next records, at most `most`; `None` after the last.
    ///
    /// # Errors
    /// The stream cannot be read.
    pub fn next_block(&mut self, columns: &dyn Columns, most: usize) -> io::Result<Option<Block>> {
        let mut length = BLOCK;
        loop {
            self.fill(length)?;
            if self.buffer.is_empty() {
                return Ok(None);
            }
            let mut block = Block::default();
            let end = self.split(columns, most, &mut block);
            if end > 0 {
                let rest = self.buffer[end..].to_vec();
                block.bytes = std::mem::replace(&mut self.buffer, rest);
                block.bytes.truncate(end);
                return Ok(Some(block));
            }
            length += BLOCK;
        }
    }

    /// Finds the records in the buffer, and returns the end of the last.
    fn split(&mut self, columns: &dyn Columns, most: usize, block: &mut Block) -> usize {
        let buffer = &self.buffer[..];
        let mut start = 0;
        if self.in_long_line {
            let Some(end) = memchr(b'\n', buffer) else { return buffer.len() };
            self.in_long_line = false;
            self.line += 1;
            start = end + 1;
        }
        let mut quote = 0;
        while start < buffer.len() && block.records.len() < most {
            let line = self.line;
            let line_end = match memchr(b'\n', &buffer[start..]) {
                Some(length) => start + length,
                None if self.is_last => buffer.len(),
                None if buffer.len() - start < LINE => return start,
                None => {
                    self.in_long_line = true;
                    let shape = RecordShape::Wrong { field: 0, problem: LONG_LINE };
                    block.records.push(CsvRecord { start, end: start, line, shape });
                    return buffer.len();
                }
            };
            if quote < start {
                quote = memchr(b'"', &buffer[start..]).map_or(usize::MAX, |length| start + length);
            }
            let (end, mut next) =
                (without_cr(buffer, start, line_end), (line_end + 1).min(buffer.len()));
            if buffer[start] <= b' ' && is_blank(&buffer[start..end]) {
                block.n_blank += 1;
                self.line += 1;
                start = next;
                continue;
            }
            let mut record = CsvRecord { start, end, line, shape: RecordShape::Plain };
            if quote < end {
                match scan(buffer, start, line_end, self.is_last, columns.n_columns()) {
                    Scan::CsvRecord { end, next: after } => {
                        match swallowed(buffer, start..end, self.is_last, columns) {
                            None => return start,
                            Some(Some(field)) => {
                                record.shape = RecordShape::Wrong { field, problem: SWALLOWED }
                            }
                            Some(None) => {
                                (record.end, next, record.shape) = (end, after, RecordShape::Quoted)
                            }
                        }
                    }
                    Scan::Wrong { field, problem } => {
                        record.shape = RecordShape::Wrong { field, problem }
                    }
                    Scan::More => return start,
                }
            }
            // Count the lines of a record over several lines by its line ends.
            self.line += match record.shape {
                RecordShape::Quoted => {
                    1 + memchr_iter(b'\n', &buffer[start..record.end]).count() as u64
                }
                _ => 1,
            };
            block.records.push(record);
            start = next;
        }
        start
    }
}

/// The field of a record's first line whose quote was a character, and not meant to open it; `None`
/// if there is none.
///
/// Such a quote joins rows. It is detected by a complete row inside the record, or, where two rows
/// are joined, by a last line that has the right number of fields if the quote is a character. The
/// outer `None` means that the end of a line is beyond the buffer.
fn swallowed(
    buffer: &[u8],
    record: Range<usize>,
    is_last: bool,
    columns: &dyn Columns,
) -> Option<Option<usize>> {
    let n_columns = columns.n_columns();
    let breaks = memchr_iter(b'\n', &buffer[record.clone()]).map(|at| record.start + at);
    let breaks: Vec<usize> = breaks.collect();
    let (Some(first), Some(last)) = (breaks.first(), breaks.last()) else { return Some(None) };
    let Some((field, after_quote)) = open_field(&buffer[record.start..*first]) else {
        return Some(None);
    };
    let of_first = field + 1 + memchr_iter(b',', after_quote).count();
    for at in &breaks {
        let start = at + 1;
        let line_end =
            memchr(b'\n', &buffer[start..]).map_or(buffer.len(), |length| start + length);
        let joins = match scan(buffer, start, line_end, is_last, n_columns) {
            Scan::More => return None,
            Scan::Wrong { .. } => false,
            Scan::CsvRecord { end, .. } if at == last => {
                of_first == n_columns && quoted_fields(&buffer[start..end]).0.len() == n_columns
            }
            Scan::CsvRecord { end, .. } => columns.is_row(&buffer[start..end]),
        };
        if joins {
            return Some(Some(field));
        }
    }
    Some(None)
}

/// The index of the quoted field that a line opens and does not close, and its text.
fn open_field(line: &[u8]) -> Option<(usize, &[u8])> {
    let (mut field, mut rest) = (0, line);
    loop {
        let end = match rest {
            [b'"', text @ ..] => match closing_quote(text) {
                Some(end) => end + 2,
                None => return Some((field, text)),
            },
            _ => memchr(b',', rest)?,
        };
        rest = rest.get(end + 1..)?;
        field += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Two;

    impl Columns for Two {
        fn n_columns(&self) -> usize {
            2
        }

        fn is_row(&self, record: &[u8]) -> bool {
            let fields = quoted_fields(record).0;
            fields.len() == 2 && &*fields[0] == b"row"
        }
    }

    /// Reads one byte at a time.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = buffer.len().min(1).min(self.0.len());
            buffer[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    /// The index of the field in error, and the problem.
    type Wrong = (usize, &'static str);

    /// The line of a record and its fields.
    type Found = (u64, Result<Vec<String>, Wrong>);

    /// All records; the number of lines by records and blank lines; the number of lines by line
    /// ends.
    fn split(source: &mut dyn Read, most: usize) -> (Vec<Found>, u64, u64) {
        let mut splitter = Splitter::new(source).unwrap();
        let (mut found, mut n_lines) = (Vec::new(), 0);
        while let Some(block) = splitter.next_block(&Two, most).unwrap() {
            n_lines += block.n_blank;
            for CsvRecord { start, end, line, shape } in block.records {
                n_lines += 1;
                let text = &block.bytes[start..end];
                let fields = match shape {
                    RecordShape::Wrong { field, problem } => Err((field, problem)),
                    RecordShape::Plain => {
                        Ok(text.split(|byte| *byte == b',').map(<[u8]>::to_vec).collect())
                    }
                    RecordShape::Quoted => {
                        let (fields, n_breaks) = quoted_fields(text);
                        n_lines += n_breaks;
                        Ok(fields.into_iter().map(Cow::into_owned).collect::<Vec<_>>())
                    }
                };
                let texts = |fields: Vec<Vec<u8>>| {
                    fields.into_iter().map(|field| String::from_utf8(field).unwrap()).collect()
                };
                found.push((line, fields.map(texts)));
            }
        }
        (found, n_lines, splitter.n_lines())
    }

    fn check(text: &str, expected: &[(u64, Result<&[&str], Wrong>)]) {
        for most in [1, usize::MAX] {
            let (found, n_lines, counted) = split(&mut Slow(text.as_bytes()), most);
            let expected: Vec<Found> = (expected.iter())
                .map(|(line, fields)| {
                    (*line, fields.map(|fields| fields.iter().map(ToString::to_string).collect()))
                })
                .collect();
            assert_eq!(found, expected, "{text:?}");
            assert_eq!(n_lines, counted, "{text:?}");
        }
    }

    #[test]
    fn lines_and_quoted_fields_are_records() {
        check("", &[]);
        check("a,b", &[(1, Ok(&["a", "b"]))]);
        check("a,b\nc,d\n", &[(1, Ok(&["a", "b"])), (2, Ok(&["c", "d"]))]);
        check("a,b\r\n\r\nc,\r\n", &[(1, Ok(&["a", "b"])), (3, Ok(&["c", ""]))]);
        check("\u{feff}a,b\n \t\n\n,\n", &[(1, Ok(&["a", "b"])), (4, Ok(&["", ""]))]);
        check("\"a\",\"b\"\"c\"\"\"\n", &[(1, Ok(&["a", "b\"c\""]))]);
        check("\"a\n\",\"\r\nb\"\r\n\"\",c", &[(1, Ok(&["a\n", "\r\nb"])), (4, Ok(&["", "c"]))]);
        check("\"a,b\",c\r", &[(1, Ok(&["a,b", "c"]))]);
        check("a,\"b\"\r", &[(1, Ok(&["a", "b"]))]);
        check("a,\"\"", &[(1, Ok(&["a", ""]))]);
        check("a\rb,c\n", &[(1, Ok(&["a\rb", "c"]))]);
    }

    #[test]
    fn a_quote_inside_an_unquoted_field_is_a_character() {
        check("24\" tv,b\na,24\"\n", &[(1, Ok(&["24\" tv", "b"])), (2, Ok(&["a", "24\""]))]);
        check("a,b\"\"c\"\nd, \"e\"\n", &[(1, Ok(&["a", "b\"\"c\""])), (2, Ok(&["d", " \"e\""]))]);
    }

    #[test]
    fn wrong_quotes_cost_their_line() {
        check("\"LG\" 24\",b\nc,d\n", &[(1, Err((0, AFTER_QUOTE))), (2, Ok(&["c", "d"]))]);
        check("a,\"b\nc,d\n", &[(1, Err((1, NOT_CLOSED))), (2, Ok(&["c", "d"]))]);
        check(
            "a,\"b\nc,\"d\ne,f",
            &[(1, Err((1, AFTER_QUOTE))), (2, Err((1, NOT_CLOSED))), (3, Ok(&["e", "f"]))],
        );
        check("a,\"\"\"", &[(1, Err((1, NOT_CLOSED)))]);
        check("\"\n", &[(1, Err((0, NOT_CLOSED)))]);
        check("\"a\"\rb,c\nd,e\n", &[(1, Err((0, AFTER_QUOTE))), (2, Ok(&["d", "e"]))]);
    }

    #[test]
    fn a_row_inside_a_quoted_field_was_swallowed() {
        // In the middle, and at the end, where the quote of the next row closes the field.
        check(
            "a,\"b\nrow,1\nrow,2\nc,d\"\n",
            &[
                (1, Err((1, SWALLOWED))),
                (2, Ok(&["row", "1"])),
                (3, Ok(&["row", "2"])),
                (4, Ok(&["c", "d\""])),
            ],
        );
        check("a,\"b\nc,24\"\n", &[(1, Err((1, SWALLOWED))), (2, Ok(&["c", "24\""]))]);
        check("a,\"b\nrow,\"\nc\"\n", &[(1, Err((1, SWALLOWED))), (2, Ok(&["row", "\nc"]))]);
        check(
            "a,\"b\r\nrow,1\r\nc\"\r\n",
            &[(1, Err((1, SWALLOWED))), (2, Ok(&["row", "1"])), (3, Ok(&["c\""]))],
        );
        // Text that is no row stays text, also in the first field.
        check("a,\"b\nno row,1\nc\"\n", &[(1, Ok(&["a", "b\nno row,1\nc"]))]);
        check("\"a\nrow\",1\n", &[(1, Ok(&["a\nrow", "1"]))]);
    }

    #[test]
    fn long_fields_and_lines_cost_their_line_and_no_memory() {
        let long = "xxxxxxx\n".repeat(QUOTED / 8 + 1);
        let text = format!("a,\"{long}\"\nb,c\n");
        let (found, n_lines, counted) = split(&mut text.as_bytes(), usize::MAX);
        assert_eq!(found[0], (1, Err((1, LONG_QUOTED))));
        assert_eq!(found[found.len() - 1].1, Ok(vec!["b".to_owned(), "c".to_owned()]));
        assert_eq!((n_lines, found.len()), (counted, QUOTED / 8 + 3));

        let mut long = vec![b'x'; 2 * LINE + BLOCK];
        long.extend(b"\na,b\n");
        let mut source = &long[..];
        let mut splitter = Splitter::new(&mut source).unwrap();
        let mut lines = Vec::new();
        while let Some(block) = splitter.next_block(&Two, usize::MAX).unwrap() {
            assert!(block.bytes.len() <= LINE + BLOCK);
            lines.extend(block.records.into_iter().map(|record| (record.line, record.shape)));
        }
        let wrong = RecordShape::Wrong { field: 0, problem: LONG_LINE };
        assert_eq!(lines, [(1, wrong), (2, RecordShape::Plain)]);
        assert_eq!(splitter.n_lines(), 2);
    }

    #[test]
    fn many_stray_quotes_take_linear_time() {
        // From the first field on, every quote closes one field and opens another.
        let text = "a\",\"b\n".repeat(20_000);
        let (found, n_lines, counted) = split(&mut text.as_bytes(), usize::MAX);
        assert_eq!((n_lines, found.len()), (counted, 20_000));
    }
}
