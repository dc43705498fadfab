//! The names of the columns of events and sessions, and the schema that describes them to models.
//!
//! [`Schema`] is the part of a `tensorflow_metadata` schema that models need, in protobuf's text
//! format: the name of each column, whether it is a list, the range of its values, and its tags.
//! The format's reference is <https://protobuf.dev/reference/protobuf/textformat-spec/>. Fields
//! that `tensorflow_metadata` does not have are ignored with a warning; a feature that no model can
//! read is refused when a model asks for it.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt::{self, Write as _};
use std::fs;
use std::path::{Path, PathBuf};

use bireme_base::message::quoted as quote;
use bireme_protocol::prost_reflect::{DynamicMessage, ReflectMessage as _, Value};
use bireme_protocol::schema as protocol;
use bireme_protocol::text::{self, Parsed, TextError};
use thiserror::Error;

/// Columns of the raw events, as REES46 names them.
pub mod event {
    /// The time of the event in UTC.
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
    /// The price of the item at the time.
    pub const PRICE: &str = "price";
    /// The visitor; may be missing.
    pub const USER: &str = "user_id";
    /// The session of the event; a row without one is dropped.
    pub const SESSION: &str = "user_session";

    /// Columns that a file of events must have.
    pub const REQUIRED: [&str; 6] = [TIME, TYPE, PRODUCT, CATEGORY, PRICE, SESSION];
    /// Columns that a file of events may lack. All rows are then null there.
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
    /// Logarithm of the days since the product's first event, normalised, list of float32.
    pub const RECENCY: &str = "product_recency_days_log_norm-list_seq";
}

/// The tag of the column that holds the items.
pub const ITEM_ID_TAG: &str = "item_id";

#[derive(Debug, Error)]
pub enum SchemaError {
    #[error("cannot {action} the schema `{}`", path.display())]
    Io {
        /// `read` or `write`.
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("schema `{}`, {problem}", path.display())]
    Text { path: PathBuf, problem: TextError },
    #[error("{0}")]
    Unusable(String),
    #[error("the schema tags {found} features with `{ITEM_ID_TAG}`, where exactly one is needed")]
    ItemId { found: usize },
}

/// The description of a folder of sessions, column by column.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Schema {
    /// In the order of the file.
    pub features: Vec<Feature>,
    /// Fields that were ignored when the file was read.
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Feature {
    /// The column's name in the parquet files.
    pub name: String,
    /// The lengths of a list; `None` for a column with one value per row.
    pub value_count: Option<ValueCount>,
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

/// The range of a column's values, both ends included; `None` if it is unknown.
#[derive(Clone, Debug, PartialEq)]
pub enum Domain {
    /// `type: INT`.
    Int(Option<IntRange>),
    /// `type: FLOAT`.
    Float(Option<FloatRange>),
    /// No model can read the column, for this reason.
    Unusable(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntRange {
    pub min: i64,
    pub max: i64,
    /// Whether the integers are ids (rows of an embedding) or quantities.
    pub is_categorical: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FloatRange {
    pub min: f64,
    pub max: f64,
}

impl FloatRange {
    /// The smallest range that holds both.
    pub(crate) fn with(self, other: Self) -> Self {
        Self { min: self.min.min(other.min), max: self.max.max(other.max) }
    }
}

impl Feature {
    /// Whether a row holds one value per event.
    pub fn is_list(&self) -> bool {
        self.value_count.is_some()
    }

    /// Whether the values are rows of an embedding.
    pub fn is_categorical(&self) -> bool {
        matches!(self.domain, Domain::Int(Some(IntRange { is_categorical: true, .. })))
    }

    /// Rows of an embedding of this column: its largest value plus one, because 0 is padding.
    /// `None` unless the column is categorical.
    pub fn cardinality(&self) -> Option<i64> {
        match self.domain {
            Domain::Int(Some(range)) if range.is_categorical => Some(range.max + 1),
            _ => None,
        }
    }

    /// Refuses a column that no model can read.
    ///
    /// # Errors
    /// The reason, with file and line.
    pub fn check(&self) -> Result<&Self, SchemaError> {
        match &self.domain {
            Domain::Unusable(problem) => Err(SchemaError::Unusable(problem.clone())),
            _ => Ok(self),
        }
    }

    pub fn has_tag(&self, tag: &str) -> bool {
        self.tags.iter().any(|t| t == tag)
    }
}

impl Schema {
    /// Reads a schema in protobuf's text format.
    ///
    /// # Errors
    /// A file that cannot be read, or text that is not a schema, with its line.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, SchemaError> {
        let path = path.as_ref();
        let text = fs::read_to_string(path).map_err(|source| SchemaError::Io {
            action: "read",
            path: path.into(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Writes the schema in protobuf's text format. [`Schema::read`] reads an equal one back.
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

    pub fn feature(&self, name: &str) -> Option<&Feature> {
        self.features.iter().find(|f| f.name == name)
    }

    /// The column of the items: the one tagged `item_id`.
    ///
    /// # Errors
    /// None or several carry the tag, or no model can read the one that does.
    pub fn item_id(&self) -> Result<&Feature, SchemaError> {
        let tagged: Vec<_> = self.features.iter().filter(|f| f.has_tag(ITEM_ID_TAG)).collect();
        match tagged[..] {
            [feature] => feature.check(),
            _ => Err(SchemaError::ItemId { found: tagged.len() }),
        }
    }

    /// Reads a text; `path` is its file in messages.
    fn parse(text: &str, path: &Path) -> Result<Self, SchemaError> {
        let at = |problem| SchemaError::Text { path: path.into(), problem };
        let Parsed { message, mut ignored, values } =
            text::parse(&protocol::descriptor(), text).map_err(at)?;
        ignored.retain(|field| !protocol::UNREAD.contains(&field.path.as_str()));
        let mut warnings = Vec::new();
        if !ignored.is_empty() {
            let (path, fields) = (path.display(), text::list(&ignored));
            warnings.push(format!("schema `{path}`: ignored unknown fields: {fields}"));
        }
        let lines = values.iter().filter(|place| place.field == "feature").map(|place| place.line);
        let mut features: Vec<Feature> = Vec::new();
        let mut names = HashSet::new();
        for (message, line) in messages(&message, "feature").iter().zip(lines) {
            let feature = Feature::from_message(message, path, line);
            if !feature.name.is_empty() && !names.insert(feature.name.clone()) {
                let message = format!("the feature {} occurs twice", quote(&feature.name));
                return Err(at(TextError { line, column: 1, message }));
            }
            features.push(feature);
        }
        Ok(Self { features, warnings })
    }
}

impl Feature {
    fn from_message(message: &DynamicMessage, path: &Path, line: usize) -> Self {
        let name = string(message, "name").unwrap_or_default();
        let annotation = submessage(message, "annotation");
        let tags = annotation.iter().flat_map(|annotation| strings(annotation, "tag")).collect();
        let value_count = submessage(message, "value_count").map(|count| ValueCount {
            min: int(&count, "min").unwrap_or(0),
            max: int(&count, "max").unwrap_or(i64::MAX),
        });
        let domain = domain(message, value_count).unwrap_or_else(|problem| {
            let feature = if name.is_empty() {
                "a feature".into()
            } else {
                format!("the feature {}", quote(&name))
            };
            Domain::Unusable(format!(
                "schema `{}`, line {line}: {feature} {problem}",
                path.display()
            ))
        });
        Self { name, value_count, domain, tags }
    }
}

/// The values of a feature, or the reason why no model can read it.
fn domain(message: &DynamicMessage, value_count: Option<ValueCount>) -> Result<Domain, String> {
    if string(message, "name").is_none_or(|name| name.is_empty()) {
        return Err("has no `name`".into());
    }
    if value_count.is_some_and(|ValueCount { min, max }| min > max || min < 0) {
        return Err("has a `value_count` whose `min` is negative or greater than `max`".into());
    }
    let (ints, floats) = (submessage(message, "int_domain"), submessage(message, "float_domain"));
    match (enum_name(message, "type").as_deref(), ints, floats) {
        (Some("INT"), _, Some(_)) => Err("is of `type: INT` and has a `float_domain`".into()),
        (Some("FLOAT"), Some(_), _) => Err("is of `type: FLOAT` and has an `int_domain`".into()),
        (Some("INT"), None, None) => Ok(Domain::Int(None)),
        (Some("FLOAT"), None, None) => Ok(Domain::Float(None)),
        (Some("INT"), Some(of), None) => {
            let range = IntRange {
                min: int(&of, "min").unwrap_or(i64::MIN),
                // So that the cardinality, one more, does not overflow.
                max: int(&of, "max").unwrap_or(i64::MAX - 1),
                is_categorical: of
                    .get_field_by_name("is_categorical")
                    .is_some_and(|value| value.as_bool() == Some(true)),
            };
            if range.min > range.max {
                return Err("has an `int_domain` whose `min` is greater than `max`".into());
            }
            if range.is_categorical && (range.max < 0 || range.max == i64::MAX) {
                return Err(format!(
                    "has categories up to {}: codes count from 0, below 2^63 - 1",
                    range.max
                ));
            }
            Ok(Domain::Int(Some(range)))
        }
        (Some("FLOAT"), None, Some(of)) => {
            let range = FloatRange {
                min: float(&of, "min").unwrap_or(f64::NEG_INFINITY),
                max: float(&of, "max").unwrap_or(f64::INFINITY),
            };
            if range.min > range.max {
                return Err("has a `float_domain` whose `min` is greater than `max`".into());
            }
            Ok(Domain::Float(Some(range)))
        }
        (Some(of @ ("BYTES" | "STRUCT")), ..) => {
            Err(format!("is of `type: {of}`; models read `INT` and `FLOAT`"))
        }
        _ => Err("has no `type`".into()),
    }
}

// Fields of a message, where they are set.

fn field<'m>(message: &'m DynamicMessage, name: &str) -> Option<Cow<'m, Value>> {
    message.has_field_by_name(name).then(|| message.get_field_by_name(name)).flatten()
}

fn string(message: &DynamicMessage, name: &str) -> Option<String> {
    field(message, name).and_then(|value| value.as_str().map(str::to_owned))
}

fn strings(message: &DynamicMessage, name: &str) -> Vec<String> {
    let values = field(message, name);
    let values = values.as_deref().and_then(Value::as_list).unwrap_or_default();
    values.iter().filter_map(|value| value.as_str().map(str::to_owned)).collect()
}

fn int(message: &DynamicMessage, name: &str) -> Option<i64> {
    field(message, name).and_then(|value| value.as_i64())
}

fn float(message: &DynamicMessage, name: &str) -> Option<f64> {
    field(message, name).and_then(|value| value.as_f64())
}

fn enum_name(message: &DynamicMessage, name: &str) -> Option<String> {
    let number = field(message, name)?.as_enum_number()?;
    let kind = message.descriptor().get_field_by_name(name)?.kind();
    Some(kind.as_enum()?.get_value(number)?.name().to_owned())
}

fn submessage(message: &DynamicMessage, name: &str) -> Option<DynamicMessage> {
    field(message, name).and_then(|value| value.as_message().cloned())
}

fn messages(message: &DynamicMessage, name: &str) -> Vec<DynamicMessage> {
    let values = field(message, name);
    let values = values.as_deref().and_then(Value::as_list).unwrap_or_default();
    values.iter().filter_map(|value| value.as_message().cloned()).collect()
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
            match &feature.domain {
                Domain::Unusable(_) => {}
                Domain::Int(range) => {
                    writeln!(f, "  type: INT")?;
                    if let Some(IntRange { min, max, is_categorical }) = range {
                        writeln!(
                            f,
                            "  int_domain {{\n    name: {name}\n    min: {min}\n    max: {max}"
                        )?;
                        writeln!(f, "    is_categorical: {is_categorical}\n  }}")?;
                    }
                }
                Domain::Float(range) => {
                    writeln!(f, "  type: FLOAT")?;
                    if let Some(FloatRange { min, max }) = range {
                        writeln!(
                            f,
                            "  float_domain {{\n    name: {name}\n    min: {min}\n    max: \
                             {max}\n  }}"
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
                // Escapes are of bytes in this format: a control character above 0x7f takes two.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Schema, SchemaError> {
        Schema::parse(text, Path::new("s"))
    }

    #[test]
    fn a_schema_survives_its_own_text() {
        let schema = Schema {
            warnings: Vec::new(),
            features: vec![
                Feature {
                    name: "product \"id\"\u{7}\u{85}é-list_seq".into(),
                    value_count: Some(ValueCount { min: 2, max: 20 }),
                    domain: Domain::Int(Some(IntRange {
                        min: 1,
                        max: 118_334,
                        is_categorical: true,
                    })),
                    tags: vec![ITEM_ID_TAG.into(), "list".into()],
                },
                Feature {
                    name: "price".into(),
                    value_count: None,
                    domain: Domain::Float(Some(FloatRange { min: -4.011559, max: 1e-300 })),
                    tags: vec![],
                },
                Feature {
                    name: "bare".into(),
                    value_count: None,
                    domain: Domain::Float(None),
                    tags: vec![],
                },
            ],
        };
        assert_eq!(parse(&schema.to_string()).unwrap(), schema);
        assert_eq!(schema.item_id().unwrap().cardinality(), Some(118_335));
    }

    #[test]
    fn the_whole_syntax_is_read() {
        let text = "# a comment\nfeature: < name: 'a' 'b'; type: FLOAT, float_domain \
                    { min: -1.5f max: inf }\n\
                    annotation { tag: [\"x\", 'y'] } >";
        let schema = parse(text).unwrap();
        let feature = schema.feature("ab").unwrap();
        assert_eq!(
            feature.domain,
            Domain::Float(Some(FloatRange { min: -1.5, max: f64::INFINITY }))
        );
        assert_eq!(feature.tags, ["x", "y"]);
        assert!(matches!(schema.item_id(), Err(SchemaError::ItemId { found: 0 })));
    }

    #[test]
    fn what_other_programs_write_is_read() {
        let text = r#"feature {
  name: "item" type: INT
  int_domain { name: "item" min: 0 max: 100 is_categorical: true }
  shape { dim { size: 20 } } presence { min_fraction: 1.0 } lifecycle_stage: PRODUCTION
  annotation {
    tag: "item_id"
    extra_metadata { type_url: "type.googleapis.com/google.protobuf.Struct"
      value: "\n\021\n\013num_buckets\022\002\010\000" }
    extra_metadata { [type.googleapis.com/google.protobuf.Struct] {
      fields { key: "is_list" value { bool_value: true } } } }
    extra_metadata: [ { type_url: "" }, { [type.googleapis.com/nobody.Knows] < a: [1, 2] > } ]
  }
}
string_domain { name: "words" value: ["a", "b"] }
feature { name: "text" type: BYTES domain: "words" }
feature { name: "odd" type: INT int_domain { min: 3 max: 2 } }
feature { type: FLOAT }
feature { name: "new" type: QUATERNION invented: 1 }"#;
        let schema = parse(text).unwrap();
        assert_eq!(schema.item_id().unwrap().cardinality(), Some(101));
        let expected = "schema `s`: ignored unknown fields: \
                        `feature.type` (line 18), `feature.invented` (line 18)";
        assert_eq!(schema.warnings, [expected]);
        for (name, problem) in [
            ("text", "line 15: the feature `text` is of `type: BYTES`"),
            ("odd", "line 16: the feature `odd` has an `int_domain` whose `min` is greater"),
            ("", "line 17: a feature has no `name`"),
            ("new", "line 18: the feature `new` has no `type`"),
        ] {
            let error = schema.feature(name).unwrap().check().unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
        assert_eq!(parse(&schema.to_string()).unwrap().to_string(), schema.to_string());
    }

    #[test]
    fn faults_name_their_line() {
        let item = |rest: &str| {
            format!("feature {{ name: \"a\" annotation {{ tag: \"item_id\" }}\n{rest} }}")
        };
        let texts = [
            (
                "feature {\n  name: \"a\"\n".to_owned(),
                "line 3, column 1: expected '}' or a field name",
            ),
            ("feature {\n  name: \"a\n}".to_owned(), "line 2, column 11: "),
            ("feature {\n  name: 7\n}".to_owned(), "line 2, column 9: expected a string"),
            (
                "feature { name: \"a\" type: INT }\nfeature {\n name: \"a\" type: INT }".to_owned(),
                "line 2, column 1: the feature `a` occurs twice",
            ),
            ("}\n".to_owned(), "line 1, column 1: expected a field name, but found '}'"),
            ("feature { name: \"a\" name: \"b\" type: INT }".to_owned(), "'name' is already set"),
            (item("type: BYTES"), "line 1: the feature `a` is of `type: BYTES`"),
            (item("type: INT int_domain { min: 3 max: 2 }"), "whose `min` is greater than `max`"),
            (
                item("type: INT value_count { max: -20 }"),
                "`value_count` whose `min` is negative or greater",
            ),
            (item("type: INT float_domain { }"), "is of `type: INT` and has a `float_domain`"),
            (
                item("type: INT int_domain { max: 9223372036854775807 is_categorical: true }"),
                "categories up to",
            ),
            (item("int_domain { }"), "has no `type`"),
        ];
        for (text, message) in texts {
            let error = parse(&text).and_then(|schema| schema.item_id().cloned());
            let error = error.err().unwrap_or_else(|| panic!("{text:?} was read")).to_string();
            assert!(error.contains(message) && error.contains("schema `s`"), "{text:?}: {error}");
        }
    }
}
