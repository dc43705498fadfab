//! What is wrong with a section of a configuration: which key, what it may be, and what it is.
//!
//! Serde describes the first value that it refuses and does not name its key, and it reads a table
//! with `kind` before it knows the table's keys. So the key is found by trying: the one that, alone
//! in its section, is refused in the same words.

use bireme_base::message::{expected, quoted, single_line};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{ConfigError, nearest};

/// The key that names the form of a table.
const KIND: &str = "kind";

/// What no form is called.
const NO_NAME: &str = "\u{fffd}";

/// The error for a section that serde refused with `message`.
pub(super) fn find<T: DeserializeOwned>(
    section: &str,
    value: &Value,
    message: &str,
) -> ConfigError {
    let section = Section {
        name: section,
        value,
        refusal: |value: Value| value.try_into::<T>().err().map(text),
    };
    let mut named = message.split('`').skip(1).step_by(2);
    let first = named.next().unwrap_or_default();
    if message.starts_with("missing field") {
        let mut path = section.incomplete(message);
        path.push(first.to_owned());
        let forms = if first == KIND { section.forms(&path) } else { None };
        let forms =
            forms.map_or(String::new(), |forms| format!("; it is one of {}", forms.names()));
        return ConfigError::Key { key: section.key(&path), problem: format!("is missing{forms}") };
    }
    let path = section.refused(message);
    if message.starts_with("unknown field") {
        let path = path.unwrap_or_else(|| vec![first.to_owned()]);
        let parent = &path[..path.len().saturating_sub(1)];
        let near = nearest(first, named).map(|near| section.key(&[parent, &[near][..]].concat()));
        return ConfigError::UnknownKey { key: section.key(&path), nearest: near };
    }
    let Some(path) = path else {
        return ConfigError::Value {
            section: section.name.to_owned(),
            problem: single_line(message),
        };
    };
    let key = section.key(&path);
    let value = at(section.value, &path);
    let found = value.map_or("nothing".to_owned(), describe);
    let problem = match (section.forms(&path), value.and_then(Value::as_str)) {
        (Some(forms @ Forms::Names(_)), Some(name)) => {
            format!("cannot be {}; it is one of {}", quoted(name), forms.names())
        }
        (Some(forms), _) => format!("must be {forms}, not {found}"),
        (None, _) => {
            value.map_or_else(|| single_line(message), |value| refused_type(value, message))
        }
    };
    ConfigError::Key { key, problem }
}

fn text(error: toml::de::Error) -> String {
    error.message().to_owned()
}

/// A value in words.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the string {}", quoted(text)),
        Value::Integer(_) | Value::Float(_) => format!("the number {value}"),
        Value::Boolean(truth) => format!("`{truth}`"),
        Value::Datetime(_) => "a date".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Table(_) => "a table".to_owned(),
    }
}

/// What is wrong with a value of a type that the key does not take.
fn refused_type(value: &Value, message: &str) -> String {
    let Some((_, wanted)) = message.rsplit_once(", expected ") else {
        return format!("cannot be {}: {}", describe(value), single_line(message));
    };
    let must = expected(wanted);
    match value {
        Value::String(digits) if must.contains("whole number") && is_large_number(digits) => {
            format!("is too large for a 64-bit integer: {}", quoted(digits))
        }
        Value::Array(_) if must != "a list" && must != "a table" => {
            format!("is a list with a value that is not {must}")
        }
        value => format!("must be {must}, not {}", describe(value)),
    }
}

fn is_large_number(text: &str) -> bool {
    let digits = text.trim().trim_start_matches(['+', '-']);
    digits.len() > 18 && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// The forms that a value may have.
enum Forms {
    /// A string of these.
    Names(Vec<String>),
    /// A table with one of these as `kind`.
    Kinds(Vec<String>),
}

impl Forms {
    fn names(&self) -> String {
        let (Self::Names(names) | Self::Kinds(names)) = self;
        names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    }
}

impl std::fmt::Display for Forms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Names(_) => write!(f, "one of {}", self.names()),
            Self::Kinds(kinds) => {
                let example = kinds.first().map_or("", String::as_str);
                write!(f, "a table like `{{ kind = \"{example}\" }}` with one of {}", self.names())
            }
        }
    }
}

/// A section that is refused.
struct Section<'a, F> {
    name: &'a str,
    value: &'a Value,
    /// Why a value is refused, if it is.
    refusal: F,
}

impl<F: Fn(Value) -> Option<String>> Section<'_, F> {
    fn key(&self, path: &[String]) -> String {
        [&[self.name.to_owned()], path].concat().join(".")
    }

    /// The shortest path whose value is refused with `message` where it stands alone. A table
    /// stands for itself, without its keys. `kind` comes before its neighbours, which never stand
    /// without it.
    fn refused(&self, message: &str) -> Option<Vec<String>> {
        let mut paths = paths(self.value);
        paths.sort_by_key(|path| (path.len(), path.last().is_none_or(|key| key != KIND)));
        paths.into_iter().find(|path| {
            let value = match at(self.value, path) {
                Some(Value::Table(_)) => Value::Table(Table::new()),
                Some(value) => value.clone(),
                None => return false,
            };
            (self.refusal)(alone(self.value, path, value)).as_deref() == Some(message)
        })
    }

    /// The longest path of a table that lacks a key, as `message` says.
    fn incomplete(&self, message: &str) -> Vec<String> {
        let mut paths = paths(self.value);
        paths.retain(|path| !path.is_empty() && at(self.value, path).is_some_and(Value::is_table));
        paths.sort_by_key(|path| std::cmp::Reverse(path.len()));
        let is_cause = |path: &Vec<String>| {
            let mut without = self.value.clone();
            remove(&mut without, path);
            (self.refusal)(without).as_deref() != Some(message)
        };
        paths.into_iter().find(is_cause).unwrap_or_default()
    }

    /// The forms that the value at `path` may have, where serde names them.
    fn forms(&self, path: &[String]) -> Option<Forms> {
        let name = Value::String(NO_NAME.to_owned());
        let kind = Value::Table(Table::from_iter([(KIND.to_owned(), name.clone())]));
        let names = |value: Value| {
            let message = (self.refusal)(alone(self.value, path, value))?;
            let names = message.strip_prefix(&format!("unknown variant `{NO_NAME}`"))?;
            Some(names.split('`').skip(1).step_by(2).map(str::to_owned).collect())
        };
        names(name).map(Forms::Names).or_else(|| names(kind).map(Forms::Kinds))
    }
}

/// The paths of all keys in a value, that of the value itself first.
fn paths(value: &Value) -> Vec<Vec<String>> {
    let mut all = vec![Vec::new()];
    for (key, inner) in value.as_table().into_iter().flatten() {
        all.extend(
            paths(inner).into_iter().map(|path| [std::slice::from_ref(key), &path[..]].concat()),
        );
    }
    all
}

fn at<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(value, |inner, key| inner.get(key))
}

fn remove(value: &mut Value, path: &[String]) {
    let Some((key, parents)) = path.split_last() else { return };
    let parent = parents.iter().try_fold(value, |inner, key| inner.get_mut(key));
    parent.and_then(Value::as_table_mut).map(|table| table.remove(key));
}

/// `whole` with nothing but `value` at `path`, and the kinds of the tables around it.
fn alone(whole: &Value, path: &[String], value: Value) -> Value {
    let Some((key, rest)) = path.split_first() else { return value };
    let mut table = Table::new();
    if let Some(kind) = whole.get(KIND) {
        table.insert(KIND.to_owned(), kind.clone());
    }
    let empty = Value::Table(Table::new());
    table.insert(key.clone(), alone(whole.get(key).unwrap_or(&empty), rest, value));
    Value::Table(table)
}
