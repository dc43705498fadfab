//! The columns of events and sessions, named once, and the schema that tells a model what they hold.
//!
//! [`Schema`] is the part of a `tensorflow_metadata` schema that a model needs, read and written in protobuf's
//! text format: for every column its name, whether it is a list, the range of its values, and its tags. The
//! format's reference is <https://protobuf.dev/reference/protobuf/textformat-spec/>; this reader takes the whole
//! syntax of messages, lists, strings and numbers, and refuses fields that it does not know, so that a
//! misspelled key cannot be lost in silence.

use std::fmt::{self, Write as _};
use std::fs;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Columns of the raw events, as REES46 names them.
pub mod event {
    /// When the event happened, UTC.
    pub const TIME: &str = "event_time";
    /// `view`, `cart`, `purchase`, ...
    pub const TYPE: &str = "event_type";
    /// The item.
    pub const PRODUCT: &str = "product_id";
    /// The item's category.
    pub const CATEGORY: &str = "category_id";
    /// The category's path in words; may be missing.
    pub const CATEGORY_CODE: &str = "category_code";
    /// The item's brand; may be missing.
    pub const BRAND: &str = "brand";
    /// What the item costs at that time.
    pub const PRICE: &str = "price";
    /// Who it was; may be missing.
    pub const USER: &str = "user_id";
    /// The visit that the event belongs to; a row without one is dropped.
    pub const SESSION: &str = "user_session";

    /// Columns that a file of events must have.
    pub const REQUIRED: [&str; 6] = [TIME, TYPE, PRODUCT, CATEGORY, PRICE, SESSION];
    /// Columns that a file of events may lack: every row then holds null there.
    pub const OPTIONAL: [&str; 3] = [CATEGORY_CODE, BRAND, USER];
}

/// Columns of the sessions; those that end in `-list_seq` hold one value per event.
pub mod session {
    /// The encoded session id, int64.
    pub const SESSION: &str = "user_session";
    /// Events of the session before it was cut to the longest length, int64.
    pub const COUNT: &str = "product_id-count";
    /// Item indices, list of int64.
    pub const PRODUCT: &str = "product_id-list_seq";
    /// Encoded category codes, list of int64.
    pub const CATEGORY_CODE: &str = "category_code-list_seq";
    /// Encoded event types, list of int64.
    pub const EVENT_TYPE: &str = "event_type-list_seq";
    /// Encoded brands, list of int64.
    pub const BRAND: &str = "brand-list_seq";
    /// Encoded categories, list of int64.
    pub const CATEGORY: &str = "category_id-list_seq";
    /// Sine of the weekday, list of float64.
    pub const WEEKDAY_SIN: &str = "et_dayofweek_sin-list_seq";
    /// Cosine of the weekday, list of float64.
    pub const WEEKDAY_COS: &str = "et_dayofweek_cos-list_seq";
    /// Logarithm of the price, normalised, list of float32.
    pub const PRICE: &str = "price_log_norm-list_seq";
    /// Price relative to the mean of its category, list of float64.
    pub const RELATIVE_PRICE: &str = "relative_price_to_avg_categ_id-list_seq";
    /// Logarithm of the days since the product was first seen, normalised, list of float32.
    pub const RECENCY: &str = "product_recency_days_log_norm-list_seq";
}

/// The tag of the column that holds the items.
pub const ITEM_ID_TAG: &str = "item_id";

/// What a schema could not be read for.
#[derive(Debug, Error)]
pub enum SchemaError {
    /// The file cannot be opened, read or written.
    #[error("cannot {action} the schema `{}`", path.display())]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The schema's path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is no schema.
    #[error("schema `{}`, line {line}: {message}", path.display())]
    Text {
        /// The schema's path.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// No feature, or more than one, is tagged as the item.
    #[error("the schema tags {found} features with `{ITEM_ID_TAG}`, where exactly one is needed")]
    ItemId {
        /// How many are tagged.
        found: usize,
    },
}

/// What a folder of sessions holds, column by column.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Schema {
    /// In the order of the file.
    pub features: Vec<Feature>,
}

/// One column.
#[derive(Clone, Debug, PartialEq)]
pub struct Feature {
    /// The column's name in the parquet files.
    pub name: String,
    /// How many values a row holds, for a list; `None` for a column with one value per row.
    pub value_count: Option<ValueCount>,
    /// Integer or float, and in which range.
    pub domain: Domain,
    /// `item_id`, `list`, `categorical`, `continuous`, `item`, `time`, `groupby_col`, ...
    pub tags: Vec<String>,
}

/// The shortest and the longest list of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueCount {
    /// Values in the shortest list.
    pub min: i64,
    /// Values in the longest list.
    pub max: i64,
}

/// The values of a column, both ends included; without a range, nothing is promised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Domain {
    /// `type: INT`.
    Int(Option<IntRange>),
    /// `type: FLOAT`.
    Float(Option<FloatRange>),
}

/// The range of an integer column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntRange {
    /// The smallest value.
    pub min: i64,
    /// The largest value.
    pub max: i64,
    /// Whether the integers name things (an embedding's rows) or count them.
    pub is_categorical: bool,
}

/// The range of a float column.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FloatRange {
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
}

impl FloatRange {
    /// What holds the values of both.
    pub(crate) fn with(self, other: Self) -> Self {
        Self { min: self.min.min(other.min), max: self.max.max(other.max) }
    }
}

impl Feature {
    /// Whether a row holds one value per event, and not one for the session.
    pub fn is_list(&self) -> bool {
        self.value_count.is_some()
    }

    /// Whether the values are rows of an embedding.
    pub fn is_categorical(&self) -> bool {
        matches!(self.domain, Domain::Int(Some(IntRange { is_categorical: true, .. })))
    }

    /// Rows that an embedding of this column needs: its largest value and one more, as 0 is the padding.
    /// `None` unless the column is categorical.
    pub fn cardinality(&self) -> Option<i64> {
        match self.domain {
            Domain::Int(Some(range)) if range.is_categorical => Some(range.max + 1),
            _ => None,
        }
    }

    /// Whether the column carries this tag.
    pub fn has_tag(&self, tag: &str) -> bool {
        self.tags.iter().any(|t| t == tag)
    }
}

impl Schema {
    /// Reads a schema in protobuf's text format.
    ///
    /// # Errors
    /// A file that cannot be read; text that is no schema, with its line.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, SchemaError> {
        let path = path.as_ref();
        let text = fs::read_to_string(path).map_err(|source| SchemaError::Io {
            action: "read",
            path: path.into(),
            source,
        })?;
        Self::parse(&text).map_err(|fault| SchemaError::Text {
            path: path.into(),
            line: fault.line,
            message: fault.message,
        })
    }

    /// Writes the schema in protobuf's text format, such that [`Schema::read`] gives back an equal one.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), SchemaError> {
        let path = path.as_ref();
        fs::write(path, self.to_string()).map_err(|source| SchemaError::Io {
            action: "write",
            path: path.into(),
            source,
        })
    }

    /// The column of this name.
    pub fn feature(&self, name: &str) -> Option<&Feature> {
        self.features.iter().find(|f| f.name == name)
    }

    /// The column that holds the items: the one tagged `item_id`.
    ///
    /// # Errors
    /// None or several carry the tag.
    pub fn item_id(&self) -> Result<&Feature, SchemaError> {
        let tagged: Vec<_> = self.features.iter().filter(|f| f.has_tag(ITEM_ID_TAG)).collect();
        match tagged[..] {
            [feature] => Ok(feature),
            _ => Err(SchemaError::ItemId { found: tagged.len() }),
        }
    }

    fn parse(text: &str) -> Result<Self, Fault> {
        let root = Parser::new(text).message(0, None)?;
        let mut features: Vec<Feature> = Vec::new();
        for field in root.fields {
            if field.name != "feature" {
                return Err(field.unknown("a schema", &["feature"]));
            }
            let line = field.line;
            let feature = Feature::from_message(field.message()?)?;
            if features.iter().any(|f| f.name == feature.name) {
                return Err(Fault::at(line, format!("the feature `{}` is there twice", feature.name)));
            }
            features.push(feature);
        }
        Ok(Self { features })
    }
}

impl Feature {
    fn from_message(message: Message) -> Result<Self, Fault> {
        const KNOWN: [&str; 6] = ["name", "value_count", "type", "int_domain", "float_domain", "annotation"];
        let line = message.line;
        let (mut name, mut value_count, mut kind) = (None, None, None);
        let (mut ints, mut floats, mut tags) = (None, None, Vec::new());
        for field in message.fields {
            match field.name.as_str() {
                "name" => field.set(&mut name, Field::text)?,
                "type" => field.set(&mut kind, Field::kind)?,
                "value_count" => field.set(&mut value_count, |f| {
                    let mut range = RangeFields::default();
                    range.take("a value count", &["min", "max"], f.message()?)?;
                    let (min, max) = range.ints((0, i64::MAX))?;
                    Ok(ValueCount { min, max })
                })?,
                "int_domain" => field.set(&mut ints, |f| {
                    let mut range = RangeFields::default();
                    range.take(
                        "an integer domain",
                        &["name", "min", "max", "is_categorical"],
                        f.message()?,
                    )?;
                    // A cardinality is the maximum and one more.
                    let (min, max) = range.ints((i64::MIN, i64::MAX - 1))?;
                    Ok(IntRange { min, max, is_categorical: range.is_categorical.unwrap_or(false) })
                })?,
                "float_domain" => field.set(&mut floats, |f| {
                    let mut range = RangeFields::default();
                    range.take("a float domain", &["name", "min", "max"], f.message()?)?;
                    let (min, max) = range.floats((f64::NEG_INFINITY, f64::INFINITY))?;
                    Ok(FloatRange { min, max })
                })?,
                "annotation" => {
                    for field in field.message()?.fields {
                        match field.name.as_str() {
                            "tag" => tags.push(field.text()?),
                            _ => return Err(field.unknown("an annotation", &["tag"])),
                        }
                    }
                }
                _ => return Err(field.unknown("a feature", &KNOWN)),
            }
        }
        let name = name.ok_or_else(|| Fault::at(line, "a feature without a `name`".into()))?;
        let lacks = |what: &str| Fault::at(line, format!("the feature `{name}` {what}"));
        let domain = match (kind, ints, floats) {
            (Some(Kind::Int), ints, None) => Domain::Int(ints),
            (Some(Kind::Float), None, floats) => Domain::Float(floats),
            (Some(Kind::Int), ..) => return Err(lacks("is of `type: INT` and has a `float_domain`")),
            (Some(Kind::Float), ..) => return Err(lacks("is of `type: FLOAT` and has an `int_domain`")),
            (None, ..) => return Err(lacks("has no `type`")),
        };
        Ok(Self { name, value_count, domain, tags })
    }
}

impl fmt::Display for Schema {
    /// Protobuf's text format, two spaces a level.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for feature in &self.features {
            let name = quoted(&feature.name);
            writeln!(f, "feature {{\n  name: {name}")?;
            if let Some(ValueCount { min, max }) = feature.value_count {
                writeln!(f, "  value_count {{\n    min: {min}\n    max: {max}\n  }}")?;
            }
            match feature.domain {
                Domain::Int(range) => {
                    writeln!(f, "  type: INT")?;
                    if let Some(IntRange { min, max, is_categorical }) = range {
                        writeln!(f, "  int_domain {{\n    name: {name}\n    min: {min}\n    max: {max}")?;
                        writeln!(f, "    is_categorical: {is_categorical}\n  }}")?;
                    }
                }
                Domain::Float(range) => {
                    writeln!(f, "  type: FLOAT")?;
                    if let Some(FloatRange { min, max }) = range {
                        writeln!(
                            f,
                            "  float_domain {{\n    name: {name}\n    min: {min}\n    max: {max}\n  }}"
                        )?;
                    }
                }
            }
            if !feature.tags.is_empty() {
                writeln!(f, "  annotation {{")?;
                for tag in &feature.tags {
                    writeln!(f, "    tag: {}", quoted(tag))?;
                }
                writeln!(f, "  }}")?;
            }
            writeln!(f, "}}")?;
        }
        Ok(())
    }
}

fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => {
                // Escapes are bytes in this format, so a control character above 0x7f takes two of them.
                for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                    let _ = write!(out, "\\{byte:03o}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

// The text format, down to a tree of named fields.

/// Something wrong on a line.
#[derive(Debug)]
struct Fault {
    line: usize,
    message: String,
}

impl Fault {
    fn at(line: usize, message: String) -> Self {
        Self { line, message }
    }
}

struct Message {
    line: usize,
    fields: Vec<Field>,
}

struct Field {
    name: String,
    line: usize,
    value: Value,
}

enum Value {
    Message(Message),
    Text(String),
    /// A number, an enum's name, `true` or `false`: what it is depends on the field.
    Word(String),
}

enum Kind {
    Int,
    Float,
}

impl Field {
    fn fault(&self, needed: &str) -> Fault {
        Fault::at(self.line, format!("`{}` needs {needed}", self.name))
    }

    fn unknown(&self, parent: &str, known: &[&str]) -> Fault {
        let known = known.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
        Fault::at(self.line, format!("`{}` is no field of {parent}, which has {known}", self.name))
    }

    /// Fills a field that may be there once.
    fn set<T>(self, slot: &mut Option<T>, read: impl FnOnce(Self) -> Result<T, Fault>) -> Result<(), Fault> {
        if slot.is_some() {
            return Err(Fault::at(self.line, format!("`{}` is there twice", self.name)));
        }
        *slot = Some(read(self)?);
        Ok(())
    }

    fn message(self) -> Result<Message, Fault> {
        let fault = self.fault("a block in braces");
        if let Value::Message(message) = self.value { Ok(message) } else { Err(fault) }
    }

    fn text(self) -> Result<String, Fault> {
        let fault = self.fault("a text in quotes");
        if let Value::Text(text) = self.value { Ok(text) } else { Err(fault) }
    }

    fn word<T>(self, needed: &str, read: impl FnOnce(&str) -> Option<T>) -> Result<T, Fault> {
        let word = if let Value::Word(word) = &self.value { read(word) } else { None };
        word.ok_or_else(|| self.fault(needed))
    }

    fn kind(self) -> Result<Kind, Fault> {
        self.word("`INT` or `FLOAT`", |word| match word {
            "INT" => Some(Kind::Int),
            "FLOAT" => Some(Kind::Float),
            _ => None,
        })
    }

    fn int(self) -> Result<i64, Fault> {
        self.word("an integer", |word| word.parse().ok())
    }

    fn float(self) -> Result<f64, Fault> {
        // The format allows `1.5f`; the names of infinity and NaN are Rust's too.
        self.word("a number", |word| {
            let digits = word
                .strip_suffix(['f', 'F'])
                .filter(|d| d.ends_with(|c: char| c.is_ascii_digit() || c == '.'));
            digits.unwrap_or(word).parse().ok()
        })
    }

    fn bool(self) -> Result<bool, Fault> {
        self.word("`true` or `false`", |word| match word {
            "true" | "True" | "t" | "1" => Some(true),
            "false" | "False" | "f" | "0" => Some(false),
            _ => None,
        })
    }
}

/// What `value_count`, `int_domain` and `float_domain` have in common, before the type is known.
#[derive(Default)]
struct RangeFields {
    name: Option<String>,
    min: Option<Field>,
    max: Option<Field>,
    is_categorical: Option<bool>,
    line: usize,
}

impl RangeFields {
    fn take(&mut self, parent: &str, known: &[&str], message: Message) -> Result<(), Fault> {
        self.line = message.line;
        for field in message.fields {
            match field.name.as_str() {
                name if !known.contains(&name) => return Err(field.unknown(parent, known)),
                "name" => field.set(&mut self.name, Field::text)?,
                "min" => field.set(&mut self.min, Ok)?,
                "max" => field.set(&mut self.max, Ok)?,
                _ => field.set(&mut self.is_categorical, Field::bool)?,
            }
        }
        Ok(())
    }

    fn ints(&mut self, unless_given: (i64, i64)) -> Result<(i64, i64), Fault> {
        self.ends(Field::int, unless_given)
    }

    fn floats(&mut self, unless_given: (f64, f64)) -> Result<(f64, f64), Fault> {
        self.ends(Field::float, unless_given)
    }

    fn ends<T: PartialOrd>(
        &mut self,
        read: impl Fn(Field) -> Result<T, Fault>,
        unless_given: (T, T),
    ) -> Result<(T, T), Fault> {
        let (min, max) = (self.min.take().map(&read).transpose()?, self.max.take().map(&read).transpose()?);
        let (min, max) = (min.unwrap_or(unless_given.0), max.unwrap_or(unless_given.1));
        if min > max {
            return Err(Fault::at(self.line, "`min` is greater than `max`".into()));
        }
        Ok((min, max))
    }
}

struct Parser<'a> {
    rest: &'a str,
    line: usize,
}

impl<'a> Parser<'a> {
    /// Blocks within blocks that are read; a schema needs three.
    const DEEPEST: usize = 16;

    fn new(text: &'a str) -> Self {
        Self { rest: text, line: 1 }
    }

    fn fault<T>(&self, message: impl Into<String>) -> Result<T, Fault> {
        Err(Fault::at(self.line, message.into()))
    }

    fn advance(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.line += taken.bytes().filter(|b| *b == b'\n').count();
        self.rest = rest;
        taken
    }

    /// Passes over white space and comments.
    fn skip(&mut self) {
        loop {
            let blank = self.rest.len() - self.rest.trim_start().len();
            self.advance(blank);
            if !self.rest.starts_with('#') {
                return;
            }
            self.advance(self.rest.find('\n').unwrap_or(self.rest.len()));
        }
    }

    /// Takes this character, if it comes next.
    fn eat(&mut self, c: char) -> bool {
        self.skip();
        let found = self.rest.starts_with(c);
        if found {
            self.advance(c.len_utf8());
        }
        found
    }

    fn word(&mut self) -> Option<&'a str> {
        self.skip();
        let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '+' | '.');
        let end = self.rest.find(|c| !is_word(c)).unwrap_or(self.rest.len());
        (end > 0).then(|| self.advance(end))
    }

    /// The fields up to `close`, or up to the end of the text at the top.
    fn message(&mut self, depth: usize, close: Option<char>) -> Result<Message, Fault> {
        let mut message = Message { line: self.line, fields: Vec::new() };
        if depth > Self::DEEPEST {
            return self.fault("blocks are nested too deeply");
        }
        loop {
            self.skip();
            match close {
                Some(close) if self.eat(close) => return Ok(message),
                Some(_) if self.rest.is_empty() => {
                    return self
                        .fault(format!("the text ends within the block opened on line {}", message.line));
                }
                None if self.rest.is_empty() => return Ok(message),
                _ => self.field(depth, &mut message.fields)?,
            }
        }
    }

    fn field(&mut self, depth: usize, fields: &mut Vec<Field>) -> Result<(), Fault> {
        let line = self.line;
        let Some(name) = self.word() else {
            let found = self.rest.chars().next().unwrap_or(' ');
            return self.fault(format!("found `{found}` where a field's name should be"));
        };
        let colon = self.eat(':');
        if self.eat('[') {
            while !self.eat(']') {
                fields.push(Field {
                    name: name.into(),
                    line: self.line,
                    value: self.value(depth, name, true)?,
                });
                if !self.eat(',') && !self.rest.starts_with(']') {
                    return self.fault(format!("the list of `{name}` needs `,` or `]`"));
                }
            }
        } else {
            fields.push(Field { name: name.into(), line, value: self.value(depth, name, colon)? });
        }
        // Fields may be separated by one of these.
        let _ = self.eat(',') || self.eat(';');
        Ok(())
    }

    fn value(&mut self, depth: usize, name: &str, colon: bool) -> Result<Value, Fault> {
        if self.eat('{') {
            return self.message(depth + 1, Some('}')).map(Value::Message);
        }
        if self.eat('<') {
            return self.message(depth + 1, Some('>')).map(Value::Message);
        }
        if !colon {
            return self.fault(format!("`{name}` needs `:` and a value, or a block in braces"));
        }
        if self.rest.starts_with(['"', '\'']) {
            return self.text(name).map(Value::Text);
        }
        match self.word() {
            Some(word) => Ok(Value::Word(word.into())),
            None => self.fault(format!("`{name}` has no value")),
        }
    }

    /// One or more quoted texts, which the format joins.
    fn text(&mut self, name: &str) -> Result<String, Fault> {
        let mut bytes = Vec::new();
        while let Some(quote) = self.rest.chars().next().filter(|c| matches!(c, '"' | '\'')) {
            self.advance(1);
            loop {
                let Some(c) = self.rest.chars().next().filter(|c| *c != '\n') else {
                    return self.fault(format!("the text of `{name}` is not closed"));
                };
                self.advance(c.len_utf8());
                match c {
                    c if c == quote => break,
                    '\\' => self.escape(&mut bytes)?,
                    c => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                }
            }
            self.skip();
        }
        String::from_utf8(bytes).or_else(|_| self.fault(format!("the text of `{name}` is not UTF-8")))
    }

    fn escape(&mut self, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        let plain = match self.rest.chars().next() {
            Some('n') => b'\n',
            Some('t') => b'\t',
            Some('r') => b'\r',
            Some(c @ ('"' | '\'' | '\\' | '?')) => c as u8,
            Some(c) if c.is_digit(8) => {
                let digits = self.rest.bytes().take(3).take_while(|b| (b'0'..=b'7').contains(b)).count();
                let taken = self.advance(digits);
                let Ok(byte) = u8::from_str_radix(taken, 8) else {
                    return self.fault(format!("`\\{taken}` is no byte"));
                };
                bytes.push(byte);
                return Ok(());
            }
            _ => return self.fault("an escape that is not one of \\n \\t \\r \\\" \\' \\\\ \\? or octal"),
        };
        self.advance(1);
        bytes.push(plain);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_survives_its_own_text() {
        let schema = Schema {
            features: vec![
                Feature {
                    name: "product \"id\"\u{7}\u{85}é-list_seq".into(),
                    value_count: Some(ValueCount { min: 2, max: 20 }),
                    domain: Domain::Int(Some(IntRange { min: 1, max: 118_334, is_categorical: true })),
                    tags: vec![ITEM_ID_TAG.into(), "list".into()],
                },
                Feature {
                    name: "price".into(),
                    value_count: None,
                    domain: Domain::Float(Some(FloatRange { min: -4.011559, max: 1e-300 })),
                    tags: vec![],
                },
                Feature { name: "bare".into(), value_count: None, domain: Domain::Float(None), tags: vec![] },
            ],
        };
        assert_eq!(Schema::parse(&schema.to_string()).unwrap(), schema);
        assert_eq!(schema.item_id().unwrap().cardinality(), Some(118_335));
    }

    #[test]
    fn the_whole_syntax_is_read() {
        let text = "# a comment\nfeature: < name: 'a' 'b'; type: FLOAT, float_domain { min: -1.5f max: inf }\n\
                    annotation { tag: [\"x\", 'y'] } >";
        let schema = Schema::parse(text).unwrap();
        let feature = schema.feature("ab").unwrap();
        assert_eq!(feature.domain, Domain::Float(Some(FloatRange { min: -1.5, max: f64::INFINITY })));
        assert_eq!(feature.tags, ["x", "y"]);
        assert!(matches!(schema.item_id(), Err(SchemaError::ItemId { found: 0 })));
    }

    #[test]
    fn faults_name_their_line() {
        let cases = [
            (
                "feature {\n  name: \"a\"\n  type: INT\n  int_domian { }\n}",
                4,
                "`int_domian` is no field of a feature",
            ),
            ("feature {\n  name: \"a\"\n", 3, "the text ends within the block opened on line 1"),
            ("feature {\n  name: \"a\n}", 2, "the text of `name` is not closed"),
            ("feature {\n  name: 7\n}", 2, "`name` needs a text in quotes"),
            ("feature {\n  name: \"a\"\n  type: BYTES\n}", 3, "`type` needs `INT` or `FLOAT`"),
            ("feature { name: \"a\" type: INT }\nfeature {\n name: \"a\" type: INT }", 2, "is there twice"),
            ("feature { name: \"a\" type: INT int_domain {\n min: 3\n max: 2 } }", 1, "`min` is greater"),
            ("feature { name: \"a\" type: INT value_count {\n max: -20 } }", 1, "`min` is greater"),
            ("feature { name: \"a\" type: INT float_domain { } }", 1, "has a `float_domain`"),
            ("}\n", 1, "found `}` where a field's name should be"),
            ("feature { name: \"a\" name: \"b\" type: INT }", 1, "`name` is there twice"),
        ];
        for (text, line, message) in cases {
            let fault = Schema::parse(text).err().unwrap_or_else(|| panic!("{text:?} was read"));
            assert!(fault.message.contains(message), "{text:?}: {}", fault.message);
            assert_eq!(fault.line, line, "{text:?}: {}", fault.message);
        }
    }
}
