//! Values to indices and back, column by column.
//!
//! A [`Dictionary`] numbers the distinct values of a column in the order of their appearance, so
//! that everything after the reading works on small integers. A [`Vocabulary`] is fitted on a
//! dictionary and counts: id 0 is padding, 1 is null and everything unknown, and from 2 on the
//! values follow by (count descending, value ascending). An embedding of the column needs
//! [`Vocabulary::cardinality`] rows.

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use crate::schema::event;

/// The columns of events whose values are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coded {
    /// The item.
    Product,
    Category,
    /// The path of the category, in words.
    CategoryCode,
    Brand,
    EventType,
    User,
    Session,
}

impl Coded {
    /// `column as usize` is the index here.
    pub const ALL: [Self; 7] = [
        Self::Product,
        Self::Category,
        Self::CategoryCode,
        Self::Brand,
        Self::EventType,
        Self::User,
        Self::Session,
    ];

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

    /// Whether files hold integers, and not text.
    pub fn is_int(self) -> bool {
        matches!(self, Self::Product | Self::Category | Self::User)
    }
}

/// A value of an encoded column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ColumnValue<'a> {
    Int(i64),
    Text(&'a str),
}

impl<'a> ColumnValue<'a> {
    pub fn as_int(self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(value),
            Self::Text(_) => None,
        }
    }

    pub fn as_text(self) -> Option<&'a str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Int(_) => None,
        }
    }
}

/// The distinct values of a column, numbered from 1 in the order of their first appearance; 0 is
/// null.
#[derive(Clone, Debug)]
pub struct Dictionary {
    values: Values,
    /// Codes, found by the hash of their value.
    table: HashTable<u32>,
}

#[derive(Clone, Debug)]
enum Values {
    Int(Vec<i64>),
    /// All texts, one after the other, and the offset at which each ends.
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

    fn get(&self, index: usize) -> ColumnValue<'_> {
        match self {
            Self::Int(values) => ColumnValue::Int(values[index]),
            Self::Text { joined, ends } => {
                let start = if index == 0 { 0 } else { ends[index - 1] };
                ColumnValue::Text(&joined[start..ends[index]])
            }
        }
    }
}

fn hash(value: ColumnValue<'_>) -> u64 {
    match value {
        ColumnValue::Int(value) => xxh3_64(&value.to_le_bytes()),
        ColumnValue::Text(value) => xxh3_64(value.as_bytes()),
    }
}

impl Dictionary {
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

    pub(crate) fn is_int(&self) -> bool {
        matches!(self.values, Values::Int(_))
    }

    /// The number of values, without null.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value of a code.
    ///
    /// # Panics
    /// On the code of null, and on one that was never assigned.
    pub fn value(&self, code: u32) -> ColumnValue<'_> {
        self.values.get(code as usize - 1)
    }

    /// The value of a code; `None` for null.
    ///
    /// # Panics
    /// On a code that was never assigned.
    pub(crate) fn cell(&self, code: u32) -> Option<ColumnValue<'_>> {
        (code != Self::NULL).then(|| self.value(code))
    }

    /// The code of a value that has one.
    pub fn find(&self, value: ColumnValue<'_>) -> Option<u32> {
        self.table.find(hash(value), |code| self.value(*code) == value).copied()
    }

    /// The code of a value, assigned now if the value is new.
    ///
    /// # Panics
    /// On text in a dictionary of integers or the reverse, and beyond 2^32 - 1 values.
    pub fn intern(&mut self, value: ColumnValue<'_>) -> u32 {
        let Self { values, table } = self;
        let hasher = |code: &u32| hash(values.get(*code as usize - 1));
        let code = match table.entry(
            hash(value),
            |code| values.get(*code as usize - 1) == value,
            hasher,
        ) {
            Entry::Occupied(known) => return *known.get(),
            Entry::Vacant(vacant) => {
                let code = u32::try_from(values.len() + 1)
                    .expect("fewer than 2^32 distinct values in a column");
                vacant.insert(code);
                code
            }
        };
        match (values, value) {
            (Values::Int(values), ColumnValue::Int(value)) => values.push(value),
            (Values::Text { joined, ends }, ColumnValue::Text(value)) => {
                joined.push_str(value);
                ends.push(joined.len());
            }
            _ => panic!("{value:?} is not of the dictionary's type"),
        }
        code
    }

    /// Turns text into integers if every value is the usual spelling of one. Codes stay the same.
    fn into_ints_if_all_are(self) -> Self {
        let codes = 1..=self.len() as u32;
        let ints: Option<Vec<i64>> = codes.map(|code| canonical_int(self.value(code))).collect();
        match ints {
            Some(ints) if !ints.is_empty() => {
                let mut dictionary = Self::new(true);
                for value in ints {
                    dictionary.intern(ColumnValue::Int(value));
                }
                dictionary
            }
            _ => self,
        }
    }
}

/// The integer that a text spells in the usual way: `7`, but not `07` or `+7`.
fn canonical_int(value: ColumnValue<'_>) -> Option<i64> {
    match value {
        ColumnValue::Int(value) => Some(value),
        ColumnValue::Text(text) => text.parse().ok().filter(|int: &i64| int.to_string() == text),
    }
}

/// A column's values and their ids in a model.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    column: Coded,
    dictionary: Dictionary,
    /// By code; [`Vocabulary::UNKNOWN`] for null and for values outside the fit.
    ids: Vec<u32>,
    /// By id, from [`Vocabulary::FIRST`].
    codes: Vec<u32>,
    /// Occurrences in the fit, by id from [`Vocabulary::FIRST`].
    counts: Vec<u32>,
}

impl Vocabulary {
    /// The id of padding, which no value has.
    pub const PADDING: u32 = 0;
    /// The id of null and of every value that the fit did not see.
    pub const UNKNOWN: u32 = 1;
    /// The id of the most frequent value.
    pub const FIRST: u32 = 2;

    /// Assigns ids by (count descending, value ascending) to the values that occurred.
    ///
    /// `counts` is by code, that of null first. Session ids that are all integers are ordered as
    /// integers.
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

    /// Keeps every id, and assigns further ones in the order of a fit to values of `dictionary`
    /// that occurred and have none. `dictionary` must begin with this vocabulary's own values, as
    /// [`Vocabulary::dictionary_of_files`] returns them.
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
        let counted =
            codes.iter().zip(before).map(|(code, before)| before + counts[*code as usize]);
        Self {
            column: self.column,
            dictionary: fitted.dictionary,
            ids,
            counts: counted.collect(),
            codes,
        }
    }

    /// A dictionary of the same codes with the types of files: session ids as text.
    pub(crate) fn dictionary_of_files(&self) -> Dictionary {
        let is_text_in_files = !self.column.is_int();
        match &self.dictionary.values {
            Values::Int(values) if is_text_in_files => {
                let mut texts = Dictionary::new(false);
                for value in values {
                    texts.intern(ColumnValue::Text(&value.to_string()));
                }
                texts
            }
            _ => self.dictionary.clone(),
        }
    }

    pub(crate) fn empty(column: Coded) -> Self {
        Self::fit(column, Dictionary::new(column.is_int()), &[0])
    }

    /// A vocabulary whose values were interned in the order of their ids.
    pub(crate) fn of_ids(column: Coded, dictionary: Dictionary, counts: Vec<u32>) -> Self {
        let codes: Vec<u32> = (1..=dictionary.len() as u32).collect();
        let mut ids = vec![Self::UNKNOWN];
        ids.extend((Self::FIRST..).take(codes.len()));
        Self { column, dictionary, ids, codes, counts }
    }

    pub fn column(&self) -> Coded {
        self.column
    }

    /// The number of values with an id of their own.
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// Rows of an embedding: the largest id and one more.
    pub fn cardinality(&self) -> usize {
        self.len() + Self::FIRST as usize
    }

    pub fn id(&self, value: ColumnValue<'_>) -> u32 {
        self.code(value).map_or(Self::UNKNOWN, |code| self.ids[code as usize])
    }

    /// The value of an id; `None` for padding, unknown and numbers that are no id.
    pub fn value(&self, id: u32) -> Option<ColumnValue<'_>> {
        let place = id.checked_sub(Self::FIRST)?;
        self.codes.get(place as usize).map(|code| self.dictionary.value(*code))
    }

    /// Occurrences of an id's value in the fit; `None` as for [`Vocabulary::value`].
    pub fn count(&self, id: u32) -> Option<u32> {
        self.counts.get(id.checked_sub(Self::FIRST)? as usize).copied()
    }

    /// The code of a value in the dictionary, also of a value without an id.
    pub(crate) fn code(&self, value: ColumnValue<'_>) -> Option<u32> {
        match (&self.dictionary.values, value) {
            // Files hold session ids as text; the fit may have turned all of them into integers.
            (Values::Int(_), text @ ColumnValue::Text(_)) => {
                self.dictionary.find(ColumnValue::Int(canonical_int(text)?))
            }
            _ => self.dictionary.find(value),
        }
    }

    /// By code.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(crate) fn dictionary(&self) -> &Dictionary {
        &self.dictionary
    }

    /// Adds a value without an id and returns its code.
    pub(crate) fn add_unknown(&mut self, value: ColumnValue<'_>) -> u32 {
        let code = self.dictionary.intern(value);
        if code as usize == self.ids.len() {
            self.ids.push(Self::UNKNOWN);
        }
        code
    }
}
