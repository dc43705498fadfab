//! Messages of one line for a terminal or a log, whatever text a file, a request or a library puts into them.

use std::error::Error;

/// Characters of a message at most.
const MESSAGE: usize = 300;

/// Characters of a quoted value at most.
const VALUE: usize = 60;

/// An error and its causes on one line of at most some 300 characters, without control characters.
///
/// A cause that the text before it ends with is not repeated: many errors print their cause themselves.
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
    single_line(&text)
}

/// `text` on one line: line breaks become spaces, control characters are escaped, and the middle is left out where
/// the text is long, because the file stands at the start and the cause at the end.
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

/// A value of a file or a request in backticks: control characters escaped, cut after 60 characters.
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
            && !matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
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
    fn causes_are_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Outer(&'static str, #[source] std::fmt::Error);
        let cause = std::fmt::Error.to_string();
        assert_eq!(chain(&Outer("cannot print", std::fmt::Error)), format!("cannot print: {cause}"));
        let said: &'static str = Box::leak(format!("cannot print: {cause}").into_boxed_str());
        assert_eq!(chain(&Outer(said, std::fmt::Error)), format!("cannot print: {cause}"));
    }
}
