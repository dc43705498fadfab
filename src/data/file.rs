//! Reads rows of a session file column by column, straight from parquet into vectors.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bireme_etl::schema::Feature;
use parquet::basic::Type as Physical;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::DataType;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use xxhash_rust::xxh3::xxh3_64;

use super::plan::spans_in_order;
use super::{DataError, FIRST_ITEM, Features};
use crate::config::{Cases, EvaluateConfig, UnknownTargets};

/// Values of one list column, session after session.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// Categorical codes: 0 padding (never in a file), 1 unknown, 2.. known values.
    Ids(Vec<i64>),
    /// Continuous values.
    Values(Vec<f32>),
}

impl Column {
    /// Appends a column of the same feature.
    fn append(&mut self, other: Column) {
        match (self, other) {
            (Column::Ids(ids), Column::Ids(appended)) => ids.extend(appended),
            (Column::Values(values), Column::Values(appended)) => values.extend(appended),
            _ => unreachable!("both follow the same feature"),
        }
    }
}

/// Consecutive events of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionPart {
    /// Row of the session in [`Sessions`].
    pub row: usize,
    /// Positions in the session.
    pub events: Range<usize>,
}

/// Sessions in ragged form: row `i` is `offsets[i]..offsets[i + 1]` of every column.
#[derive(Clone, Debug, PartialEq)]
pub struct Sessions {
    offsets: Vec<usize>,
    columns: Vec<Column>,
    /// Day of each session, and its row in the file of that day.
    day_rows: Vec<(i64, u64)>,
}

impl Sessions {
    fn empty(features: &Features) -> Self {
        let columns = features.columns().iter().map(|feature| {
            if feature.is_categorical() {
                Column::Ids(Vec::new())
            } else {
                Column::Values(Vec::new())
            }
        });
        Self { offsets: vec![0], columns: columns.collect(), day_rows: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// New sessions, each of consecutive events of a session.
    pub fn select(&self, selected: &[SessionPart], features: &Features) -> Self {
        let mut parts = Self::empty(features);
        for SessionPart { row, events } in selected {
            let first = self.offsets[*row];
            let events = first + events.start..first + events.end;
            parts.offsets.push(parts.offsets.last().unwrap_or(&0) + events.len());
            parts.day_rows.push(self.day_rows[*row]);
            for (part, column) in parts.columns.iter_mut().zip(&self.columns) {
                match (part, column) {
                    (Column::Ids(part), Column::Ids(ids)) => {
                        part.extend_from_slice(&ids[events.clone()]);
                    }
                    (Column::Values(part), Column::Values(values)) => {
                        part.extend_from_slice(&values[events.clone()]);
                    }
                    _ => unreachable!("both follow the same features"),
                }
            }
        }
        parts
    }

    /// Range of the events of session `row` in every column.
    pub fn span(&self, row: usize) -> Range<usize> {
        self.offsets[row]..self.offsets[row + 1]
    }

    /// Number of events in each session.
    pub fn lengths(&self) -> Vec<usize> {
        self.offsets.windows(2).map(|ends| ends[1] - ends[0]).collect()
    }

    /// Day of session `row`, and its row in the file of that day. They identify the session
    /// whichever way it is read.
    pub fn day_row(&self, row: usize) -> (i64, u64) {
        self.day_rows[row]
    }

    /// Codes of session `row` in the categorical column `column` of [`Features::columns`].
    pub fn ids(&self, column: usize, row: usize) -> &[i64] {
        match &self.columns[column] {
            Column::Ids(ids) => &ids[self.span(row)],
            Column::Values(_) => unreachable!("column {column} is continuous"),
        }
    }

    /// Values of session `row` in the continuous column `column` of [`Features::columns`].
    pub fn values(&self, column: usize, row: usize) -> &[f32] {
        match &self.columns[column] {
            Column::Values(values) => &values[self.span(row)],
            Column::Ids(_) => unreachable!("column {column} is categorical"),
        }
    }

    fn append(&mut self, other: Sessions) {
        self.day_rows.extend(other.day_rows);
        let base = *self.offsets.last().unwrap_or(&0);
        self.offsets.extend(other.offsets[1..].iter().map(|offset| base + offset));
        for (column, appended) in self.columns.iter_mut().zip(other.columns) {
            column.append(appended);
        }
    }
}

/// One opened `train`, `valid` or `test` file.
pub struct SessionFile {
    day: i64,
    path: PathBuf,
    features: Features,
    /// Leaf column of each feature.
    leaves: Vec<Leaf>,
    group_rows: Vec<usize>,
    max_length: usize,
}

impl SessionFile {
    pub(super) fn open(
        path: &Path,
        day: i64,
        features: &Features,
        max_length: usize,
    ) -> Result<Self, DataError> {
        let reader = open_parquet(path)?;
        let leaves = features.columns().iter().map(|feature| {
            leaf(&reader, path, feature, Rows::Lists)?
                .ok_or_else(|| column_error(path, &feature.name, "is missing".to_owned()))
        });
        let leaves = leaves.collect::<Result<_, _>>()?;
        let group_rows =
            reader.metadata().row_groups().iter().map(|group| group.num_rows() as usize).collect();
        Ok(Self {
            day,
            path: path.to_owned(),
            features: features.clone(),
            leaves,
            group_rows,
            max_length,
        })
    }

    /// Its day.
    pub fn day(&self) -> i64 {
        self.day
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of sessions.
    pub fn n_sessions(&self) -> usize {
        self.group_rows.iter().sum()
    }

    /// Number of sessions in each row group.
    pub fn group_rows(&self) -> &[usize] {
        &self.group_rows
    }

    /// Returns the file's size and an xxh3 hash of its end. The end holds the parquet footer with
    /// sizes, smallest and largest values of all column chunks, so that a changed file has another
    /// fingerprint.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn fingerprint(&self) -> Result<String, DataError> {
        let read = || -> std::io::Result<String> {
            let mut file = File::open(&self.path)?;
            let n_bytes = file.metadata()?.len();
            file.seek(SeekFrom::Start(n_bytes.saturating_sub(1 << 16)))?;
            let mut end = Vec::new();
            file.read_to_end(&mut end)?;
            Ok(format!("{n_bytes}-{:016x}", xxh3_64(&end)))
        };
        read().map_err(|source| DataError::Open { path: self.path.clone(), source })
    }

    /// Reads spans of rows, given by row group, in this order: the last `data.max_length` events of
    /// each session.
    ///
    /// # Errors
    /// The file has changed or is truncated, a session has fewer than 2 events, or a value is null
    /// or out of range.
    pub fn read(&self, spans: &[(usize, Range<usize>)]) -> Result<Sessions, DataError> {
        self.read_last(self.max_length, spans)
    }

    /// Reads the last `max_length` events of each session in spans of rows.
    fn read_last(
        &self,
        max_length: usize,
        spans: &[(usize, Range<usize>)],
    ) -> Result<Sessions, DataError> {
        let reader = open_parquet(&self.path)?;
        let mut sessions = Sessions::empty(&self.features);
        for (group, rows) in spans {
            sessions.append(self.read_group(&reader, *group, rows.clone(), max_length)?);
        }
        Ok(sessions)
    }

    /// Reads the sessions `rows` of the whole file as evaluation cases, each a session whose last
    /// event is the target. Returns them by blocks of at most `config.block` cases from as many
    /// sessions; a block is copied from the sessions when it is its turn.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn read_cases(
        &self,
        rows: Range<usize>,
        config: &EvaluateConfig,
    ) -> Result<impl ExactSizeIterator<Item = Sessions> + use<>, DataError> {
        let spans = self.spans(rows);
        let sessions = match config.cases {
            Cases::Last => self.read(&spans)?,
            // The first events of a long session are those of its first cases.
            Cases::Every => self.read_last(usize::MAX, &spans)?,
        };
        let cases_of = |row: usize| {
            let items = sessions.ids(0, row);
            let first_target = match config.cases {
                Cases::Last => items.len() - 1,
                Cases::Every => 1,
            };
            let is_case = |&target: &usize| {
                config.unknown_targets == UnknownTargets::Count || items[target] >= FIRST_ITEM
            };
            let case = |target: usize| SessionPart {
                row,
                events: (target + 1).saturating_sub(self.max_length)..target + 1,
            };
            (first_target..items.len()).filter(is_case).map(case).collect::<Vec<_>>()
        };
        let rows: Vec<usize> = (0..sessions.len()).collect();
        let blocks = rows.chunks(config.block).flat_map(|rows| {
            let cases: Vec<SessionPart> = rows.iter().flat_map(|&row| cases_of(row)).collect();
            cases.chunks(config.block).map(<[_]>::to_vec).collect::<Vec<_>>()
        });
        let blocks: Vec<Vec<SessionPart>> = blocks.collect();
        let features = self.features.clone();
        Ok(blocks.into_iter().map(move |cases| sessions.select(&cases, &features)))
    }

    /// Checks all rows of a row group.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn check(&self, group: usize) -> Result<(), DataError> {
        let reader = open_parquet(&self.path)?;
        if group >= reader.metadata().num_row_groups() {
            let problem =
                ParquetError::EOF(format!("{group} of {} row groups", self.group_rows.len()));
            return Err(DataError::Parquet { path: self.path.clone(), source: problem });
        }
        self.read_group(&reader, group, 0..self.group_rows[group], self.max_length).map(drop)
    }

    /// Splits the rows `rows` of the whole file into spans by row group.
    pub fn spans(&self, rows: Range<usize>) -> Vec<(usize, Range<usize>)> {
        let in_file_order: Vec<usize> = (0..self.group_rows.len()).collect();
        spans_in_order(&self.group_rows, &in_file_order, rows)
    }

    fn read_group(
        &self,
        reader: &SerializedFileReader<File>,
        group: usize,
        rows: Range<usize>,
        max_length: usize,
    ) -> Result<Sessions, DataError> {
        let unreadable = |source| DataError::Parquet { path: self.path.clone(), source };
        let first_row = self.group_rows[..group].iter().sum::<usize>() + rows.start;
        let group_reader = reader.get_row_group(group).map_err(unreadable)?;
        let mut lengths = Vec::new();
        let mut columns = Vec::with_capacity(self.leaves.len());
        for (feature, leaf) in self.features.columns().iter().zip(&self.leaves) {
            let invalid = |row: usize, problem: String| DataError::Row {
                path: self.path.clone(),
                row: first_row + row,
                column: feature.name.clone(),
                problem,
            };
            let column = group_reader.get_column_reader(leaf.index).map_err(unreadable)?;
            let lists = read_lists(column, rows.clone(), leaf.defined).map_err(unreadable)?;
            if let Some(row) = lists.first_gap {
                return Err(invalid(row, "holds a null or an empty list".to_owned()));
            }
            if lists.lengths.len() != rows.len() {
                let problem =
                    ParquetError::EOF(format!("{} of {} rows", lists.lengths.len(), rows.len()));
                return Err(unreadable(problem));
            }
            // The item id is the first column; all others must have its lengths.
            if columns.is_empty() {
                if let Some(row) = lists.lengths.iter().position(|&length| length < 2) {
                    return Err(DataError::ShortSession {
                        path: self.path.clone(),
                        row: first_row + row,
                        column: feature.name.clone(),
                    });
                }
                lengths.clone_from(&lists.lengths);
            } else if let Some(row) =
                (0..rows.len()).find(|&row| lengths[row] != lists.lengths[row])
            {
                let problem =
                    format!("has {} values, the item id {}", lists.lengths[row], lengths[row]);
                return Err(invalid(row, problem));
            }
            let recent = lists.keep_last(max_length);
            columns
                .push(recent.into_column(feature).map_err(|(row, problem)| invalid(row, problem))?);
        }
        let mut offsets = vec![0];
        offsets.extend(lengths.iter().scan(0, |end, &length| {
            *end += length.min(max_length);
            Some(*end)
        }));
        let day_rows =
            (first_row..first_row + lengths.len()).map(|row| (self.day, row as u64)).collect();
        Ok(Sessions { offsets, columns, day_rows })
    }
}

/// The train files of consecutive days, read like one file.
#[derive(Clone)]
pub struct Window(Vec<Arc<SessionFile>>);

impl Window {
    /// `files`: at least one, the earliest day first.
    pub fn new(files: Vec<Arc<SessionFile>>) -> Self {
        assert!(!files.is_empty(), "a window has a day");
        Self(files)
    }

    /// The file of the last day.
    pub fn today(&self) -> &SessionFile {
        &self.0[self.0.len() - 1]
    }

    pub fn first_day(&self) -> i64 {
        self.0[0].day()
    }

    /// Number of sessions.
    pub fn n_sessions(&self) -> usize {
        self.0.iter().map(|file| file.n_sessions()).sum()
    }

    /// Number of sessions in each row group, file by file.
    pub fn group_rows(&self) -> Vec<usize> {
        self.0.iter().flat_map(|file| file.group_rows()).copied().collect()
    }

    /// Reads spans of rows, given by row group of the whole window, in this order.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn read(&self, spans: &[(usize, Range<usize>)]) -> Result<Sessions, DataError> {
        let mut sessions = Sessions::empty(&self.today().features);
        let groups: Vec<(&SessionFile, usize)> = self
            .0
            .iter()
            .flat_map(|file| (0..file.group_rows().len()).map(move |group| (&**file, group)))
            .collect();
        for (group, rows) in spans {
            let (file, group) = groups[*group];
            sessions.append(file.read(&[(group, rows.clone())])?);
        }
        Ok(sessions)
    }
}

pub(super) fn open_parquet(path: &Path) -> Result<SerializedFileReader<File>, DataError> {
    let file =
        File::open(path).map_err(|source| DataError::Open { path: path.to_owned(), source })?;
    SerializedFileReader::new(file)
        .map_err(|source| DataError::Parquet { path: path.to_owned(), source })
}

/// A leaf column of a file.
#[derive(Clone, Copy)]
pub(super) struct Leaf {
    index: usize,
    /// Definition level of a value that is not null.
    defined: i16,
}

/// What the rows of a column hold.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// A list each.
    Lists,
    /// One value each.
    Values,
}

/// The column of a feature; `None` if the file does not have it.
///
/// # Errors
/// Its rows hold something else, or it has a type that the feature cannot have.
pub(super) fn leaf(
    reader: &SerializedFileReader<File>,
    path: &Path,
    feature: &Feature,
    rows: Rows,
) -> Result<Option<Leaf>, DataError> {
    let descriptor = reader.metadata().file_metadata().schema_descr();
    let index = (0..descriptor.num_columns())
        .find(|&index| descriptor.column(index).path().parts()[0] == feature.name);
    let Some(index) = index else { return Ok(None) };
    let column = descriptor.column(index);
    let problem = |problem: String| column_error(path, &feature.name, problem);
    match (rows, column.max_rep_level()) {
        (Rows::Lists, 1) | (Rows::Values, 0) => {}
        (Rows::Lists, _) => return Err(problem("is not a list".to_owned())),
        (Rows::Values, _) => {
            return Err(problem("is a list, not one value for each item".to_owned()));
        }
    }
    let is_supported = match column.physical_type() {
        Physical::INT32 | Physical::INT64 => true,
        Physical::FLOAT | Physical::DOUBLE => !feature.is_categorical(),
        _ => false,
    };
    if !is_supported {
        return Err(problem(format!("has the unexpected type {}", column.physical_type())));
    }
    Ok(Some(Leaf { index, defined: column.max_def_level() }))
}

pub(super) fn column_error(path: &Path, column: &str, problem: String) -> DataError {
    DataError::Column { path: path.to_owned(), column: column.to_owned(), problem }
}

/// The values of all rows of a column.
pub(super) struct WholeColumn {
    pub column: Column,
    /// Values of each row.
    pub lengths: Vec<usize>,
}

/// Reads the values of all rows of a column and checks them against `feature`.
///
/// # Errors
/// The file is damaged, or a value is null or out of range.
pub(super) fn read_column(
    reader: &SerializedFileReader<File>,
    path: &Path,
    feature: &Feature,
    leaf: Leaf,
) -> Result<WholeColumn, DataError> {
    let unreadable = |source| DataError::Parquet { path: path.to_owned(), source };
    let empty =
        if feature.is_categorical() { Column::Ids(Vec::new()) } else { Column::Values(Vec::new()) };
    let mut whole = WholeColumn { column: empty, lengths: Vec::new() };
    for group in 0..reader.num_row_groups() {
        let first_row = whole.lengths.len();
        let invalid = |row: usize, problem: String| DataError::Row {
            path: path.to_owned(),
            row: first_row + row,
            column: feature.name.clone(),
            problem,
        };
        let group = reader.get_row_group(group).map_err(unreadable)?;
        let n_rows = group.metadata().num_rows() as usize;
        let values = group.get_column_reader(leaf.index).map_err(unreadable)?;
        let values = read_lists(values, 0..n_rows, leaf.defined).map_err(unreadable)?;
        if let Some(row) = values.first_gap {
            return Err(invalid(row, "holds a null or an empty list".to_owned()));
        }
        whole.lengths.extend_from_slice(&values.lengths);
        let column = values.into_column(feature);
        whole.column.append(column.map_err(|(row, problem)| invalid(row, problem))?);
    }
    Ok(whole)
}

/// Values as stored, before they are checked against the schema.
enum Raw {
    Int(Vec<i64>),
    Float(Vec<f64>),
}

/// Rows of a list column; the rows of a column of single values are lists of one.
struct Lists {
    lengths: Vec<usize>,
    values: Raw,
    /// First row with a null list, an empty list or a null element.
    first_gap: Option<usize>,
}

impl Lists {
    /// Keeps the last `max_length` values of each row.
    fn keep_last(self, max_length: usize) -> Self {
        if self.lengths.iter().all(|&length| length <= max_length) {
            return self;
        }
        fn truncate<T: Copy>(values: &[T], lengths: &[usize], max_length: usize) -> Vec<T> {
            let mut kept = Vec::with_capacity(values.len());
            let mut end = 0;
            for &length in lengths {
                end += length;
                kept.extend_from_slice(&values[end - length.min(max_length)..end]);
            }
            kept
        }
        let values = match &self.values {
            Raw::Int(values) => Raw::Int(truncate(values, &self.lengths, max_length)),
            Raw::Float(values) => Raw::Float(truncate(values, &self.lengths, max_length)),
        };
        let lengths = self.lengths.iter().map(|&length| length.min(max_length)).collect();
        Self { lengths, values, first_gap: self.first_gap }
    }

    /// Checks that codes are within `1..cardinality` and continuous values are finite. The error
    /// has the row and the problem.
    fn into_column(self, feature: &Feature) -> Result<Column, (usize, String)> {
        let row_of = |index: usize| {
            let mut end = 0;
            self.lengths.iter().position(|&length| {
                end += length;
                index < end
            })
        };
        let n = feature.cardinality().unwrap_or_default();
        match self.values {
            Raw::Int(values) if feature.is_categorical() => {
                match values.iter().position(|value| !(1..n).contains(value)) {
                    None => Ok(Column::Ids(values)),
                    Some(i) => {
                        let problem = format!(
                            "has the id {}, outside 1..={} of the schema",
                            values[i],
                            n - 1
                        );
                        Err((row_of(i).unwrap_or(0), problem))
                    }
                }
            }
            Raw::Int(values) => {
                Ok(Column::Values(values.iter().map(|&value| value as f32).collect()))
            }
            Raw::Float(values) => {
                let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
                match values.iter().position(|value| !value.is_finite()) {
                    None => Ok(Column::Values(values)),
                    Some(i) => {
                        Err((row_of(i).unwrap_or(0), format!("has the value {}", values[i])))
                    }
                }
            }
        }
    }
}

fn read_lists(
    column: ColumnReader,
    rows: Range<usize>,
    defined: i16,
) -> Result<Lists, ParquetError> {
    fn read<T: DataType, V>(
        mut column: ColumnReaderImpl<T>,
        rows: Range<usize>,
        defined: i16,
        wrap: impl FnOnce(Vec<T::T>) -> V,
    ) -> Result<(Vec<usize>, V, Option<usize>), ParquetError> {
        column.skip_records(rows.start)?;
        let (mut definitions, mut repetitions, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let mut n_read = 0;
        while n_read < rows.len() {
            let (n, ..) = column.read_records(
                rows.len() - n_read,
                Some(&mut definitions),
                Some(&mut repetitions),
                &mut values,
            )?;
            if n == 0 {
                break;
            }
            n_read += n;
        }
        // Required values have no levels, and single values no repetition.
        if definitions.is_empty() {
            definitions.resize(n_read, defined);
        }
        if repetitions.is_empty() {
            repetitions.resize(n_read, 0);
        }
        let mut lengths: Vec<usize> = Vec::with_capacity(n_read);
        let mut first_gap = None;
        // Dremel encoding: repetition level 0 starts a new list; a definition level below the
        // largest is a null element, or a null or empty list.
        for (definition, repetition) in definitions.iter().zip(&repetitions) {
            if *repetition == 0 {
                lengths.push(0);
            }
            if *definition < defined {
                first_gap = first_gap.or(Some(lengths.len() - 1));
            } else if let Some(length) = lengths.last_mut() {
                *length += 1;
            }
        }
        Ok((lengths, wrap(values), first_gap))
    }
    let (lengths, values, first_gap) = match column {
        ColumnReader::Int32ColumnReader(column) => read(column, rows, defined, |values| {
            Raw::Int(values.into_iter().map(i64::from).collect())
        })?,
        ColumnReader::Int64ColumnReader(column) => read(column, rows, defined, Raw::Int)?,
        ColumnReader::FloatColumnReader(column) => read(column, rows, defined, |values| {
            Raw::Float(values.into_iter().map(f64::from).collect())
        })?,
        ColumnReader::DoubleColumnReader(column) => read(column, rows, defined, Raw::Float)?,
        _ => return Err(ParquetError::General("unexpected column type".to_owned())),
    };
    Ok(Lists { lengths, values, first_gap })
}
