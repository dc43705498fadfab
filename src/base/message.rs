//! Messages of one line for a terminal or a log, also if they contain text of a file, a request or
//! a library.

use std::error::Error;

/// Characters of a message at most.
const MESSAGE: usize = 300;

/// Characters of a quoted value at most.
const VALUE: usize = 60;

/// An error and its causes on one line of at most some 300 characters, without control characters.
///
/// A cause that the text before it ends with is not repeated: many errors print their cause
/// themselves.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    single_line(&without_types(without_trace(&text)))
}

/// What libtorch says without the stack of C++ functions or of TorchScript, which may be hundreds
/// of lines.
fn without_trace(text: &str) -> &str {
    let text = text.split_once("\nException raised from ").map_or(text, |(text, _)| text);
    match text.split_once("Traceback of TorchScript") {
        // The last line is the error, as in Python.
        Some((_, trace)) => trace.trim_end().rsplit('\n').next().unwrap_or(trace).trim(),
        None => text,
    }
}

/// What serde says of a file or a request, without the types of the program.
fn without_types(text: &str) -> String {
    let untagged = "data did not match any variant of untagged enum ";
    if let Some((before, name)) = text.split_once(untagged) {
        let after = name.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
        return format!("{before}the value has none of the forms that are known{after}");
    }
    let found = text.split_once("invalid type: ").or_else(|| text.split_once("invalid value: "));
    let Some((before, problem)) = found else { return text.to_owned() };
    let Some((found, rest)) = problem.rsplit_once(", expected ") else { return text.to_owned() };
    let (wanted, place) = rest
        .split_once(" at line ")
        .map_or((rest, String::new()), |(wanted, place)| (wanted, format!(" at line {place}")));
    format!("{before}{} where {} is expected{place}", found_value(found), expected(wanted))
}

/// A value as serde describes it, in words.
fn found_value(found: &str) -> String {
    match found.split_once(' ').map_or((found, ""), |(kind, value)| (kind, value)) {
        ("map", _) => "a table".to_owned(),
        ("sequence", _) => "a list".to_owned(),
        ("null", _) | ("unit", _) | ("Option", _) => "nothing".to_owned(),
        ("string", value) => format!("the string {}", quoted(value.trim_matches('"'))),
        ("integer", value) => format!("the number {}", value.trim_matches('`')),
        ("boolean", value) => value.to_owned(),
        ("floating", value) => {
            format!("the number {}", value.trim_start_matches("point ").trim_matches('`'))
        }
        _ => found.to_owned(),
    }
}

/// What serde expects, by the name of its type, in words.
pub fn expected(wanted: &str) -> &str {
    match wanted {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number from 0 on",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" | "bool" => "`true` or `false`",
        "a sequence" => "a list",
        "a map" | "map" => "a table",
        _ if wanted.starts_with("struct ") || wanted.contains("tagged enum ") => "a table",
        _ => wanted,
    }
}

/// `text` on one line: line breaks become spaces, control characters are escaped, and the middle is
/// left out where the text is long, because the file stands at the start and the cause at the end.
pub fn single_line(text: &str) -> String {
    let words: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let line = escape(&words.join(" "));
    let n = line.chars().count();
    if n <= MESSAGE {
        return line;
    }
    let (start, end) = (MESSAGE * 3 / 5, MESSAGE * 2 / 5 - 3);
    let head: String = line.chars().take(start).collect();
    let tail: String = line.chars().skip(n - end).collect();
    format!("{head} … {tail}")
}

/// A value of a file or a request in backticks: control characters escaped, cut after 60
/// characters.
pub fn quoted(value: &str) -> String {
    let mut cut: String = value.chars().take(VALUE).collect();
    if cut.len() < value.len() {
        cut.push('…');
    }
    format!("`{}`", escape(&cut))
}

fn escape(text: &str) -> String {
    // Terminals also act on the controls U+0080 to U+009F and on marks of direction.
    let is_safe = |c: char| {
        !c.is_control()
            && !matches!(
                c,
                '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            )
    };
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if is_safe(c) {
            escaped.push(c);
        } else {
            escaped.extend(c.escape_default());
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_one_line_and_no_control_characters() {
        assert_eq!(single_line("a\n  b\r\n\nc"), "a b c");
        assert_eq!(single_line("bell \u{7} tab \t"), "bell \\u{7} tab");
        assert_eq!(single_line("\u{9b}31m\u{202e}"), "\\u{9b}31m\\u{202e}");
        assert_eq!(single_line("größer 日本"), "größer 日本");
    }

    #[test]
    fn long_messages_keep_their_start_and_their_end() {
        let long = single_line(&format!("file {} cause", "x".repeat(1000)));
        assert!(long.chars().count() <= MESSAGE, "{}", long.chars().count());
        assert!(long.starts_with("file ") && long.ends_with(" cause"));
    }

    #[test]
    fn values_are_quoted_and_cut() {
        assert_eq!(quoted("a\nb"), "`a\\nb`");
        assert_eq!(quoted(&"ä".repeat(61)), format!("`{}…`", "ä".repeat(60)));
        assert_eq!(quoted(&"ä".repeat(60)), format!("`{}`", "ä".repeat(60)));
    }

    #[test]
    fn libraries_are_quoted_without_their_types_and_stacks() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Said(&'static str);
        for (said, text) in [
            (
                "`f`: invalid type: map, expected struct State at line 3 column 5",
                "`f`: a table where a table is expected at line 3 column 5",
            ),
            (
                "invalid type: string \"a, b\", expected u64",
                "the string `a, b` where a whole number from 0 on is expected",
            ),
            (
                "invalid value: integer `-1`, expected usize",
                "the number -1 where a whole number from 0 on is expected",
            ),
            (
                "data did not match any variant of untagged enum Wire at line 1",
                "the value has none of the forms that are known at line 1",
            ),
            (
                "index out of range\nException raised from at /src/x.cpp:1 (first):\nframe #0: f",
                "index out of range",
            ),
            (
                "failed.\nTraceback of TorchScript (most recent call last):\n  File x\n  y\n\
                 RuntimeError: k out of range\n",
                "RuntimeError: k out of range",
            ),
        ] {
            assert_eq!(chain(&Said(said)), text);
        }
    }

    #[test]
    fn causes_are_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Outer(&'static str, #[source] std::fmt::Error);
        let cause = std::fmt::Error.to_string();
        assert_eq!(
            chain(&Outer("cannot print", std::fmt::Error)),
            format!("cannot print: {cause}")
        );
        let said: &'static str = Box::leak(format!("cannot print: {cause}").into_boxed_str());
        assert_eq!(chain(&Outer(said, std::fmt::Error)), format!("cannot print: {cause}"));
    }
}
