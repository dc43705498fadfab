//! Protobuf's text format, by its specification:
//! <https://protobuf.dev/reference/protobuf/textformat-spec/>.
//!
//! [`prost_reflect`] parses the text. A scan of the text beforehand adds what it lacks: the colon
//! before a list of messages is optional (`instance_group [ { … } ]`); fields and values of enums
//! that the descriptor lacks, as newer versions may write them, are ignored and listed; and the
//! nesting of messages is limited, because the parser is recursive.

use std::ops::Range;

use bireme_base::message::single_line;
use miette::Diagnostic;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor};

/// The deepest nesting of messages, as in other parsers of the format.
const DEEPEST: usize = 100;

/// The result of parsing a text.
#[derive(Debug)]
pub struct Parsed {
    /// The fields of the descriptor.
    pub message: DynamicMessage,
    /// Other fields, in the order of the text.
    pub ignored: Vec<Ignored>,
    /// The lines of the values of the outermost message, in the order of the text.
    pub values: Vec<ValueLine>,
}

/// A field that was ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ignored {
    /// The name, with those of the enclosing messages: `feature.annotation.note`.
    pub path: String,
    pub line: usize,
}

/// A value of a field of the outermost message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueLine {
    pub field: String,
    /// From 1.
    pub line: usize,
}

/// A text that is not in the format, or does not fit the descriptor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct TextError {
    /// From 1.
    pub line: usize,
    /// Characters from the start of the line, from 1.
    pub column: usize,
    pub message: String,
}

/// Lists ignored fields, each once, for a warning of one line.
pub fn list(ignored: &[Ignored]) -> String {
    const SHOWN: usize = 8;
    let mut paths: Vec<(&str, usize)> = Vec::new();
    for Ignored { path, line } in ignored {
        if !paths.iter().any(|(known, _)| known == path) {
            paths.push((path, *line));
        }
    }
    let shown = paths.iter().take(SHOWN).map(|(path, line)| format!("`{path}` (line {line})"));
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if paths.len() > SHOWN {
        text += &format!(" and {} others", paths.len() - SHOWN);
    }
    text
}

/// Parses a text.
///
/// # Errors
/// The first error and its place.
pub fn parse(descriptor: &MessageDescriptor, text: &str) -> Result<Parsed, TextError> {
    let mut outline = Outline::new(text);
    // Where the scan fails, the parser reports the reason.
    let _ = outline.fields(Some(descriptor), None, 0);
    let at = |offset: usize, message: String| {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.matches('\n').count() + 1;
        let column = before[line_start..].chars().count() + 1;
        TextError { line, column, message: single_line(&message) }
    };
    if let Some(offset) = outline.too_deep {
        return Err(at(offset, format!("messages are nested more than {DEEPEST} deep")));
    }
    let edited = outline.edited();
    let message =
        DynamicMessage::parse_text_format(descriptor.clone(), &edited).map_err(|error| {
            let offset =
                error.labels().and_then(|mut labels| labels.next()).map(|label| label.offset());
            let offset = offset.map_or(text.len(), |offset| outline.original(offset));
            at(offset, error.to_string())
        })?;
    let (mut line_of_value, mut line_of_ignored) = (lines(text), lines(text));
    let values = outline.values.into_iter();
    let values =
        values.map(|(field, offset)| ValueLine { field, line: line_of_value(offset) }).collect();
    let ignored = outline.ignored.into_iter();
    let ignored = ignored.map(|(path, range)| Ignored { path, line: line_of_ignored(range.start) });
    Ok(Parsed { message, ignored: ignored.collect(), values })
}

/// Returns the lines of increasing offsets, and scans each line once.
fn lines(text: &str) -> impl FnMut(usize) -> usize {
    let (mut line, mut counted) = (1, 0);
    move |offset| {
        line += text[counted..offset].matches('\n').count();
        counted = offset;
        line
    }
}

/// The structure of a text: names, brackets, strings. It accepts more than the format allows,
/// because the parser reports errors.
struct Outline<'a> {
    text: &'a str,
    at: usize,
    /// Names of the enclosing messages.
    path: Vec<&'a str>,
    /// Fields and values that the descriptor lacks.
    ignored: Vec<(String, Range<usize>)>,
    /// Offsets of lists without a colon.
    without_colon: Vec<usize>,
    values: Vec<(String, usize)>,
    too_deep: Option<usize>,
}

impl<'a> Outline<'a> {
    fn new(text: &'a str) -> Self {
        let at = if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
        Self {
            text,
            at,
            path: Vec::new(),
            ignored: Vec::new(),
            without_colon: Vec::new(),
            values: Vec::new(),
            too_deep: None,
        }
    }

    /// The text with colons, and without ignored fields and byte order mark. Line numbers stay the
    /// same.
    fn edited(&self) -> String {
        let mut edited = String::with_capacity(self.text.len() + self.without_colon.len());
        let mut copied = 0;
        if self.text.starts_with('\u{feff}') {
            copied = '\u{feff}'.len_utf8();
            edited.push_str("   ");
        }
        let mut colons = self.without_colon.iter().copied().peekable();
        let mut copy = |range: Range<usize>, edited: &mut String| {
            let mut from = range.start;
            while let Some(colon) = colons.next_if(|colon| *colon < range.end) {
                edited.push_str(&self.text[from..colon]);
                edited.push(':');
                from = colon;
            }
            edited.push_str(&self.text[from..range.end]);
        };
        for (_, range) in &self.ignored {
            copy(copied..range.start, &mut edited);
            edited.extend(
                self.text[range.clone()].bytes().map(|b| if b == b'\n' { '\n' } else { ' ' }),
            );
            copied = range.end;
        }
        copy(copied..self.text.len(), &mut edited);
        edited
    }

    /// Converts an offset in the edited text to one in the text.
    fn original(&self, offset: usize) -> usize {
        let mut added = 0;
        for colon in &self.without_colon {
            if colon + added >= offset {
                break;
            }
            added += 1;
        }
        offset - added
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    /// Skips white space and comments.
    fn skip(&mut self) {
        while let Some(byte) = self.peek() {
            match byte {
                b' ' | b'\n' | b'\r' | b'\t' | 0x0b | 0x0c => self.at += 1,
                b'#' => self.take_while(|byte| byte != b'\n'),
                _ => return,
            }
        }
    }

    fn take_while(&mut self, mut wanted: impl FnMut(u8) -> bool) {
        while self.peek().is_some_and(&mut wanted) {
            self.at += 1;
        }
    }

    /// Scans the fields up to `close`; `None` if the structure is broken.
    fn fields(
        &mut self,
        message: Option<&MessageDescriptor>,
        close: Option<u8>,
        depth: usize,
    ) -> Option<()> {
        if depth > DEEPEST {
            self.too_deep = Some(self.at);
            return None;
        }
        loop {
            self.skip();
            match (self.peek(), close) {
                (None, None) => return Some(()),
                (Some(byte), Some(close)) if byte == close => {
                    self.at += 1;
                    return Some(());
                }
                (None, Some(_)) => return None,
                _ => self.field(message, depth)?,
            }
        }
    }

    fn field(&mut self, message: Option<&MessageDescriptor>, depth: usize) -> Option<()> {
        let start = self.at;
        let name = self.name()?;
        let kind = message.map(|message| kind(message, name));
        let is_known = matches!(kind, Some(Some(_)));
        self.path.push(name);
        self.skip();
        let has_colon = self.eat(b':');
        self.skip();
        let kind = kind.flatten();
        let mut fits = true;
        if self.peek() == Some(b'[') {
            if is_known && !has_colon {
                self.without_colon.push(self.at);
            }
            self.at += 1;
            loop {
                self.skip();
                if self.eat(b']') {
                    break;
                }
                fits &= self.value(kind.as_ref(), depth)?;
                self.skip();
                if !self.eat(b',') && self.peek() != Some(b']') {
                    return None;
                }
            }
        } else {
            fits = self.value(kind.as_ref(), depth)?;
        }
        let mut end = self.at;
        self.skip();
        if self.eat(b',') || self.eat(b';') {
            end = self.at;
        }
        if message.is_some() && !(is_known && fits) {
            // Drop the entries for the field's contents too.
            while self.without_colon.pop_if(|colon| *colon >= start).is_some() {}
            while self.ignored.pop_if(|(_, range)| range.start >= start).is_some() {}
            self.ignored.push((self.path.join("."), start..end));
        }
        self.path.pop();
        Some(())
    }

    /// The name of a field, or in brackets that of an extension or a type.
    fn name(&mut self) -> Option<&'a str> {
        let start = self.at;
        if self.eat(b'[') {
            self.take_while(|byte| !matches!(byte, b']' | b'\n' | b'{' | b'"' | b'\''));
            return self.eat(b']').then(|| &self.text[start..self.at]);
        }
        self.take_while(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let name = &self.text[start..self.at];
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_').then_some(name)
    }

    /// Scans a value. False for an unknown value of an enum.
    fn value(&mut self, kind: Option<&Kind>, depth: usize) -> Option<bool> {
        if self.path.len() == 1 {
            self.values.push((self.path[0].to_owned(), self.at));
        }
        let message = kind.and_then(Kind::as_message);
        match self.peek()? {
            b'{' => {
                self.at += 1;
                self.fields(message, Some(b'}'), depth + 1)?;
            }
            b'<' => {
                self.at += 1;
                self.fields(message, Some(b'>'), depth + 1)?;
            }
            b'"' | b'\'' => self.strings()?,
            _ => {
                let start = self.at;
                if self.eat(b'-') {
                    self.skip();
                }
                self.take_while(|byte| {
                    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'+' | b'-')
                });
                let word = &self.text[start..self.at];
                if word.is_empty() {
                    return None;
                }
                let values = kind.and_then(Kind::as_enum);
                let is_name = word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
                return Some(
                    !is_name
                        || values.is_none_or(|values| values.get_value_by_name(word).is_some()),
                );
            }
        }
        Some(true)
    }

    /// Scans one or more adjacent strings.
    fn strings(&mut self) -> Option<()> {
        while let Some(quote @ (b'"' | b'\'')) = self.peek() {
            self.at += 1;
            loop {
                match self.peek()? {
                    b'\n' => return None,
                    b'\\' => {
                        self.at += 1;
                        // Skipping one byte is enough: no byte of a longer character looks like a
                        // quote.
                        self.peek().filter(|byte| *byte != b'\n')?;
                    }
                    byte if byte == quote => {
                        self.at += 1;
                        break;
                    }
                    _ => {}
                }
                self.at += 1;
            }
            self.skip();
        }
        Some(())
    }
}

/// The kind of a field's values; `None` where the message has no such field.
fn kind(message: &MessageDescriptor, name: &str) -> Option<Kind> {
    let Some(inner) = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) else {
        return message.get_field_by_name(name).map(|field| field.kind());
    };
    let inner: String = inner.split_whitespace().collect();
    match inner.rsplit_once('/') {
        None => message.get_extension_by_full_name(&inner).map(|extension| extension.kind()),
        Some((_, of)) if message.full_name() == "google.protobuf.Any" => {
            message.parent_pool().get_message_by_name(of).map(Kind::Message)
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::descriptor;

    fn names(text: &str) -> Vec<String> {
        let parsed = parse(&descriptor(), text).unwrap();
        let features = parsed.message.get_field_by_name("feature").unwrap();
        let features = features.as_list().unwrap().iter();
        features
            .map(|feature| {
                let name = feature.as_message().unwrap().get_field_by_name("name").unwrap();
                name.as_str().unwrap().to_owned()
            })
            .collect()
    }

    #[test]
    fn every_way_to_write_a_list_is_read() {
        for text in [
            "feature { name: 'a' } feature { name: 'b' }",
            "feature: { name: 'a' }, feature: < name: 'b' >;",
            "feature [ { name: 'a' }, { name: 'b' } ]",
            "feature[{name:'a'},{name:'b'}]",
            "feature: [ { name: 'a' }, < name: 'b' > ] feature []",
            "# [ {\nfeature # {\n [ # }\n { name: \"\" 'a' # '\n \"\" } ,\n{ name: '\\x62' } ]",
            "\u{feff}feature { name: '\\141' } feature { name: '\\u0062' }",
        ] {
            assert_eq!(names(text), ["a", "b"], "{text}");
        }
    }

    #[test]
    fn fields_and_values_of_newer_versions_are_ignored_and_named() {
        let text = "feature \
                    {\n  name: 'a'\n  later { feature: 'b' x [ { y: 1 } ] } type: QUATERNION\n}\n\
                    later: -1.5f, feature { later [ '}', \"]\" ]; name: 'b' [of.other]: 7 }\n\
                    [type.googleapis.com/any.Thing] { x: 1 }";
        let parsed = parse(&descriptor(), text).unwrap();
        let ignored: Vec<_> =
            parsed.ignored.iter().map(|field| (field.path.as_str(), field.line)).collect();
        let expected = [
            ("feature.later", 3),
            ("feature.type", 3),
            ("later", 5),
            ("feature.later", 5),
            ("feature.[of.other]", 5),
            ("[type.googleapis.com/any.Thing]", 6),
        ];
        assert_eq!(ignored, expected);
        assert_eq!(names(text), ["a", "b"]);
        let lines: Vec<_> =
            parsed.values.iter().map(|place| (place.field.as_str(), place.line)).collect();
        let expected =
            [("feature", 1), ("later", 5), ("feature", 5), ("[type.googleapis.com/any.Thing]", 6)];
        assert_eq!(lines, expected);
        assert!(
            list(&parsed.ignored)
                .starts_with("`feature.later` (line 3), `feature.type` (line 3), ")
        );
    }

    #[test]
    fn errors_have_their_place() {
        let deep = format!("later {}", "{ x ".repeat(100_000));
        for (text, line, column, message) in [
            ("feature [ {} ] feature [ { name: 7 } ]", 1, 34, "expected a string"),
            ("later { x: 1 }\nfeature {\n  name: 'é' type INT\n}", 3, 18, "expected ':'"),
            ("feature {\n name: \"a\n}", 2, 10, "string"),
            ("feature {\n", 2, 1, "reached end of input"),
            ("}", 1, 1, "found '}'"),
            ("feature { int_domain { max: 9223372036854775808 } }", 1, 29, "out of range"),
            ("feature { name: 'a' name: 'b' }", 1, 27, "'name' is already set"),
            ("feature { name: 'a' later }", 1, 27, "expected"),
            (deep.as_str(), 1, 408, "nested more than 100 deep"),
        ] {
            let error = parse(&descriptor(), text).unwrap_err();
            assert!(error.message.contains(message), "{text:.60}: {error}");
            assert_eq!((error.line, error.column), (line, column), "{text:.60}: {error}");
        }
    }
}
