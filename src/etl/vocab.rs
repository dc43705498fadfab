//! Values to indices and back, column by column.
//!
//! A [`Dictionary`] numbers the distinct values of a column as they come, so that everything after the reading
//! works on small integers. A [`Vocabulary`] is what a fit makes of it: 0 is padding, 1 is null and everything
//! unknown, and from 2 on the values follow by (count descending, value ascending). An embedding of the column
//! needs [`Vocabulary::cardinality`] rows.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use polars::prelude::*;
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::Error;
use crate::schema::event;

/// The columns of events whose values are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coded {
    /// The item.
    Product,
    /// Its category.
    Category,
    /// The category in words.
    CategoryCode,
    /// Its brand.
    Brand,
    /// What was done with it.
    EventType,
    /// By whom.
    User,
    /// In which visit.
    Session,
}

impl Coded {
    /// All of them; `column as usize` is the place here.
    pub const ALL: [Self; 7] = [
        Self::Product,
        Self::Category,
        Self::CategoryCode,
        Self::Brand,
        Self::EventType,
        Self::User,
        Self::Session,
    ];

    /// The column's name in the events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Product => event::PRODUCT,
            Self::Category => event::CATEGORY,
            Self::CategoryCode => event::CATEGORY_CODE,
            Self::Brand => event::BRAND,
            Self::EventType => event::TYPE,
            Self::User => event::USER,
            Self::Session => event::SESSION,
        }
    }

    /// Whether the values are integers, and not text.
    pub fn is_int(self) -> bool {
        matches!(self, Self::Product | Self::Category | Self::User)
    }
}

/// A value of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value<'a> {
    /// An integer.
    Int(i64),
    /// Text.
    Text(&'a str),
}

/// The distinct values of a column, numbered from 1 in the order of their first appearance; 0 is null.
#[derive(Clone, Debug)]
pub struct Dictionary {
    values: Values,
    /// Codes, found by the hash of their value.
    table: HashTable<u32>,
}

#[derive(Clone, Debug)]
enum Values {
    Int(Vec<i64>),
    /// All texts one after the other, and where each ends.
    Text {
        joined: String,
        ends: Vec<usize>,
    },
}

impl Values {
    fn len(&self) -> usize {
        match self {
            Self::Int(values) => values.len(),
            Self::Text { ends, .. } => ends.len(),
        }
    }

    fn get(&self, index: usize) -> Value<'_> {
        match self {
            Self::Int(values) => Value::Int(values[index]),
            Self::Text { joined, ends } => {
                let start = if index == 0 { 0 } else { ends[index - 1] };
                Value::Text(&joined[start..ends[index]])
            }
        }
    }
}

fn hash(value: Value<'_>) -> u64 {
    match value {
        Value::Int(value) => xxh3_64(&value.to_le_bytes()),
        Value::Text(value) => xxh3_64(value.as_bytes()),
    }
}

impl Dictionary {
    /// The code of null.
    pub const NULL: u32 = 0;

    /// An empty dictionary for integers or for text.
    pub fn new(is_int: bool) -> Self {
        let values = if is_int {
            Values::Int(Vec::new())
        } else {
            Values::Text { joined: String::new(), ends: Vec::new() }
        };
        Self { values, table: HashTable::new() }
    }

    /// How many values there are, without null.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is no value but null.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value of a code, which must not be null's.
    ///
    /// # Panics
    /// On null's code, and on one that was never given out.
    pub fn value(&self, code: u32) -> Value<'_> {
        self.values.get(code as usize - 1)
    }

    /// The code of a value that has one.
    pub fn find(&self, value: Value<'_>) -> Option<u32> {
        self.table.find(hash(value), |code| self.value(*code) == value).copied()
    }

    /// The code of a value, given out now if it is new.
    ///
    /// # Panics
    /// When text comes to a dictionary of integers, or the other way round; past 2^32 - 1 values.
    pub fn intern(&mut self, value: Value<'_>) -> u32 {
        let Self { values, table } = self;
        let hasher = |code: &u32| hash(values.get(*code as usize - 1));
        let code = match table.entry(hash(value), |code| values.get(*code as usize - 1) == value, hasher) {
            Entry::Occupied(known) => return *known.get(),
            Entry::Vacant(vacant) => {
                let code =
                    u32::try_from(values.len() + 1).expect("fewer than 2^32 distinct values in a column");
                vacant.insert(code);
                code
            }
        };
        match (values, value) {
            (Values::Int(values), Value::Int(value)) => values.push(value),
            (Values::Text { joined, ends }, Value::Text(value)) => {
                joined.push_str(value);
                ends.push(joined.len());
            }
            _ => panic!("{value:?} does not belong into this dictionary"),
        }
        code
    }

    /// Turns text into integers if every value is one, as it would be written; codes stay what they are.
    fn into_ints_if_all_are(self) -> Self {
        let codes = 1..=self.len() as u32;
        let ints: Option<Vec<i64>> = codes.map(|code| canonical_int(self.value(code))).collect();
        match ints {
            Some(ints) if !ints.is_empty() => {
                let mut dictionary = Self::new(true);
                for value in ints {
                    dictionary.intern(Value::Int(value));
                }
                dictionary
            }
            _ => self,
        }
    }
}

/// The integer that a text is, if it is written as that integer would be: `7`, but not `07` or `+7`.
fn canonical_int(value: Value<'_>) -> Option<i64> {
    match value {
        Value::Int(value) => Some(value),
        Value::Text(text) => text.parse().ok().filter(|int: &i64| int.to_string() == text),
    }
}

/// A column's values and the ids that a model knows them by.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    column: Coded,
    dictionary: Dictionary,
    /// `[codes]`, [`Vocabulary::UNKNOWN`] for null and for values outside the fit.
    ids: Vec<u32>,
    /// `[ids - 2]`.
    codes: Vec<u32>,
    /// `[ids - 2]`, how often each value was seen in the fit.
    counts: Vec<u32>,
}

/// Columns of a vocabulary's parquet file, beside the one with the values.
const ID: &str = "id";
const COUNT: &str = "count";

impl Vocabulary {
    /// The id of padding, which no value has.
    pub const PADDING: u32 = 0;
    /// The id of null and of every value that the fit did not see.
    pub const UNKNOWN: u32 = 1;
    /// The id of the most frequent value.
    pub const FIRST: u32 = 2;

    /// Gives ids by (count descending, value ascending) to the values that were counted at least once.
    ///
    /// `counts` is `[codes]`, with null's count at 0. Session ids that are all integers are ordered as integers.
    pub(crate) fn fit(column: Coded, dictionary: Dictionary, counts: &[u32]) -> Self {
        let dictionary =
            if column == Coded::Session { dictionary.into_ints_if_all_are() } else { dictionary };
        let mut codes: Vec<u32> =
            (1..=dictionary.len() as u32).filter(|code| counts[*code as usize] > 0).collect();
        codes.par_sort_unstable_by(|a, b| {
            let by_count = counts[*b as usize].cmp(&counts[*a as usize]);
            by_count.then_with(|| dictionary.value(*a).cmp(&dictionary.value(*b)))
        });
        let mut ids = vec![Self::UNKNOWN; dictionary.len() + 1];
        for (id, code) in (Self::FIRST..).zip(&codes) {
            ids[*code as usize] = id;
        }
        let counts = codes.iter().map(|code| counts[*code as usize]).collect();
        Self { column, dictionary, ids, codes, counts }
    }

    /// Keeps every id and gives further ones, in the same order, to values of `dictionary` that were counted now and have
    /// none. `dictionary` must begin with this vocabulary's own values, as [`Vocabulary::dictionary_of_files`] gives them.
    pub(crate) fn extended(&self, dictionary: Dictionary, counts: &[u32]) -> Self {
        let fitted = Self::fit(self.column, dictionary, counts);
        let has_id = |code: u32| self.ids.get(code as usize).is_some_and(|&id| id != Self::UNKNOWN);
        let new = fitted.codes.iter().copied().filter(|&code| !has_id(code));
        let codes: Vec<u32> = self.codes.iter().copied().chain(new).collect();
        let mut ids = vec![Self::UNKNOWN; fitted.dictionary.len() + 1];
        for (id, code) in (Self::FIRST..).zip(&codes) {
            ids[*code as usize] = id;
        }
        let before = self.counts.iter().copied().chain(std::iter::repeat(0));
        let counted = codes.iter().zip(before).map(|(code, before)| before + counts[*code as usize]);
        Self { column: self.column, dictionary: fitted.dictionary, ids, counts: counted.collect(), codes }
    }

    /// A dictionary of the same codes that takes what files hold: session ids as text.
    pub(crate) fn dictionary_of_files(&self) -> Dictionary {
        let is_text_in_files = !self.column.is_int();
        match &self.dictionary.values {
            Values::Int(values) if is_text_in_files => {
                let mut texts = Dictionary::new(false);
                for value in values {
                    texts.intern(Value::Text(&value.to_string()));
                }
                texts
            }
            _ => self.dictionary.clone(),
        }
    }

    /// Without a value.
    pub(crate) fn empty(column: Coded) -> Self {
        Self::fit(column, Dictionary::new(column.is_int()), &[0])
    }

    /// The column.
    pub fn column(&self) -> Coded {
        self.column
    }

    /// How many values have an id of their own.
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// Whether every value is unknown.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// Rows that an embedding needs: the largest id and one more.
    pub fn cardinality(&self) -> usize {
        self.len() + Self::FIRST as usize
    }

    /// The id of a value.
    pub fn id(&self, value: Value<'_>) -> u32 {
        self.code(value).map_or(Self::UNKNOWN, |code| self.ids[code as usize])
    }

    /// The value of an id; `None` for padding, unknown and what is no id.
    pub fn value(&self, id: u32) -> Option<Value<'_>> {
        let place = id.checked_sub(Self::FIRST)?;
        self.codes.get(place as usize).map(|code| self.dictionary.value(*code))
    }

    /// How often the value of an id was seen in the fit, with the same exceptions.
    pub fn count(&self, id: u32) -> Option<u32> {
        self.counts.get(id.checked_sub(Self::FIRST)? as usize).copied()
    }

    /// The code of a value in this vocabulary's own dictionary, which may be one that has no id.
    pub(crate) fn code(&self, value: Value<'_>) -> Option<u32> {
        match (&self.dictionary.values, value) {
            // Session ids come as text, and may have been integers throughout the fit.
            (Values::Int(_), text @ Value::Text(_)) => self.dictionary.find(Value::Int(canonical_int(text)?)),
            _ => self.dictionary.find(value),
        }
    }

    /// `[codes]` of this vocabulary's own dictionary.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(crate) fn dictionary(&self) -> &Dictionary {
        &self.dictionary
    }

    /// Adds a value that has no id of its own, and returns its code.
    pub(crate) fn add_unknown(&mut self, value: Value<'_>) -> u32 {
        let code = self.dictionary.intern(value);
        if code as usize == self.ids.len() {
            self.ids.push(Self::UNKNOWN);
        }
        code
    }

    /// Writes `id`, the value and its count, by ascending id; the first row is id 1 with null, which is not
    /// counted.
    pub(crate) fn write(&self, path: &Path) -> Result<(), Error> {
        /// Rows of a table that is built at once: the session ids alone may be many millions.
        const ROWS: usize = 1 << 20;
        let file = File::create(path).map_err(Error::io("create", path))?;
        let (name, values) = (self.column.name(), &self.dictionary.values);
        let table = |ids: std::ops::Range<usize>| -> PolarsResult<DataFrame> {
            let rows = ids.len();
            let cells = ids.clone().map(|id| self.value(id as u32));
            let values = match values {
                Values::Int(_) => Int64Chunked::from_iter_options(
                    name.into(),
                    cells.map(|v| v.map(|v| if let Value::Int(v) = v { v } else { unreachable!() })),
                )
                .into_column(),
                Values::Text { .. } => StringChunked::from_iter_options(
                    name.into(),
                    cells.map(|v| v.map(|v| if let Value::Text(v) = v { v } else { unreachable!() })),
                )
                .into_column(),
            };
            let counts = ids.clone().map(|id| i64::from(self.count(id as u32).unwrap_or(0)));
            DataFrame::new(
                rows,
                vec![
                    Column::new(ID.into(), ids.map(|id| id as i64).collect::<Vec<_>>()),
                    values,
                    Column::new(COUNT.into(), counts.collect::<Vec<_>>()),
                ],
            )
        };
        let write = || {
            let schema = table(0..0)?.schema().clone();
            let mut writer = ParquetWriter::new(BufWriter::new(file)).batched(&schema)?;
            let mut start = Self::UNKNOWN as usize;
            while start < self.cardinality() {
                let end = self.cardinality().min(start + ROWS);
                writer.write_batch(&table(start..end)?)?;
                start = end;
            }
            writer.finish()
        };
        write().map(drop).map_err(Error::parquet("write", path))
    }

    /// Reads what [`Vocabulary::write`] wrote.
    pub(crate) fn read(path: &Path, column: Coded) -> Result<Self, Error> {
        let broken = |problem: String| Error::Workflow { path: path.into(), problem };
        let table = read_parquet(path)?;
        let ids = ints(&table, ID, path)?;
        if ids.iter().enumerate().any(|(row, id)| *id != row as i64 + i64::from(Self::UNKNOWN)) {
            return Err(broken(format!("`{ID}` does not count up from 1")));
        }
        let values = table.column(column.name()).map_err(|e| broken(e.to_string()))?;
        let is_int = values.dtype() == &DataType::Int64;
        let mut dictionary = Dictionary::new(is_int);
        let mut intern = |row: usize, value: Option<Value<'_>>| match value {
            // Row 0 is null, which has code 0.
            None if row == 0 => Ok(()),
            Some(value) if row > 0 && dictionary.intern(value) as usize == row => Ok(()),
            _ => Err(broken(format!("row {}: `{}` is null or there twice", row + 1, column.name()))),
        };
        if is_int {
            let values = values.i64().map_err(|e| broken(e.to_string()))?;
            values.iter().enumerate().try_for_each(|(row, v)| intern(row, v.map(Value::Int)))?;
        } else {
            let values = values.str().map_err(|e| broken(e.to_string()))?;
            values.iter().enumerate().try_for_each(|(row, v)| intern(row, v.map(Value::Text)))?;
        }
        let counts = ints(&table, COUNT, path)?.into_iter().skip(1).map(u32::try_from);
        let counts: Vec<u32> = counts.collect::<Result<_, _>>().map_err(|e| broken(e.to_string()))?;
        let codes: Vec<u32> = (1..=dictionary.len() as u32).collect();
        let mut ids = vec![Self::UNKNOWN];
        ids.extend(codes.iter().map(|code| code + 1));
        Ok(Self { column, dictionary, ids, codes, counts })
    }
}

/// The whole of a parquet file of ours.
pub(crate) fn read_parquet(path: &Path) -> Result<DataFrame, Error> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    ParquetReader::new(file).finish().map_err(Error::parquet("read", path))
}

/// A column of a table of ours that holds integers and no null.
pub(crate) fn ints(table: &DataFrame, name: &str, path: &Path) -> Result<Vec<i64>, Error> {
    let values = table.column(name).and_then(|column| {
        let cells = column.i64()?;
        polars_ensure!(cells.null_count() == 0, ComputeError: "`{}` holds null", name);
        Ok(cells.into_no_null_iter().collect())
    });
    values.map_err(|e| Error::Workflow { path: path.into(), problem: e.to_string() })
}
