//! The rules for cells, the same for all formats.

use bireme_base::message::quoted;

use crate::schema::event;
use crate::time::EventTime;
use crate::vocab::Coded;

/// A cell that makes its row bad.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CellError {
    pub column: String,
    pub problem: String,
}

impl CellError {
    pub fn new(column: &str, problem: impl Into<String>) -> Self {
        Self { column: column.into(), problem: problem.into() }
    }
}

pub(super) const MISSING: &str = "the cell is empty";
pub(super) const NOT_UTF8: &str = "the cell is not UTF-8";
pub(super) const TOO_LARGE: &str = "is too large for a 64-bit integer";

/// The type of a column's cells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Target {
    Time,
    Price,
    Int(Coded),
    Text(Coded),
}

impl Target {
    /// `None` for a column that is not used.
    pub fn of(name: &str) -> Option<Self> {
        Some(match name {
            event::TIME => Self::Time,
            event::PRICE => Self::Price,
            _ => match Coded::ALL.into_iter().find(|column| column.name() == name)? {
                column if column.is_int() => Self::Int(column),
                column => Self::Text(column),
            },
        })
    }
}

pub(super) fn read_int(text: &str) -> Result<i64, String> {
    text.parse().map_err(|_| {
        let (sign, digits) = match text.as_bytes() {
            [sign @ (b'-' | b'+'), digits @ ..] => (*sign, digits),
            digits => (b'+', digits),
        };
        let is_integer = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
        match sign {
            _ if !is_integer => format!("{} is not an integer", quoted(text)),
            b'-' => format!("{} is too small for a 64-bit integer", quoted(text)),
            _ => format!("{} {TOO_LARGE}", quoted(text)),
        }
    })
}

pub(super) fn read_price(text: &str) -> Result<f64, String> {
    match text.parse() {
        _ if text.is_empty() => Err(MISSING.into()),
        Ok(price) => match price_fault(price) {
            None => Ok(price),
            Some(fault) => Err(format!("{} is not a price: it is {fault}", quoted(text))),
        },
        Err(_) => Err(format!("{} is not a number", quoted(text))),
    }
}

pub(super) fn check_price(price: f64) -> Result<f64, String> {
    price_fault(price)
        .map_or(Ok(price), |fault| Err(format!("{price} is not a price: it is {fault}")))
}

fn price_fault(price: f64) -> Option<&'static str> {
    match price {
        // The price must be finite in float32, in which its logarithm is computed.
        0.0.. if (price as f32).is_finite() => None,
        _ if !price.is_finite() => Some("not finite"),
        0.0.. => Some("too large for float32"),
        _ => Some("below zero"),
    }
}

pub(super) fn read_time(text: &str) -> Result<EventTime, String> {
    EventTime::parse(text.as_bytes()).ok_or_else(|| match text {
        "" => MISSING.into(),
        _ => format!("{} is not a timestamp; expected `2019-10-01 00:00:00 UTC`", quoted(text)),
    })
}

/// Text cells of a column, `[rows]`; an empty cell is null.
#[derive(Debug, Default)]
pub(crate) struct Texts {
    joined: String,
    ends: Vec<usize>,
}

impl Texts {
    pub fn push(&mut self, text: &str) {
        self.joined.push_str(text);
        self.ends.push(self.joined.len());
    }

    pub fn get(&self, row: usize) -> Option<&str> {
        let start = if row == 0 { 0 } else { self.ends[row - 1] };
        Some(&self.joined[start..self.ends[row]]).filter(|text| !text.is_empty())
    }

    pub fn iter(&self) -> impl Iterator<Item = Option<&str>> {
        (0..self.ends.len()).map(|row| self.get(row))
    }
}

impl<'a> FromIterator<Option<&'a str>> for Texts {
    fn from_iter<I: IntoIterator<Item = Option<&'a str>>>(cells: I) -> Self {
        let mut texts = Self::default();
        cells.into_iter().for_each(|cell| texts.push(cell.unwrap_or_default()));
        texts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_are_finite_and_not_negative() {
        assert_eq!(read_price("35.79"), Ok(35.79));
        assert_eq!(read_price("0"), Ok(0.0));
        for text in ["", "-0.01", "nan", "inf", "1e999", "4e38", "12,5", " 1"] {
            assert!(read_price(text).is_err(), "{text}");
        }
    }

    #[test]
    fn integers_out_of_range_are_called_so() {
        assert_eq!(read_int("9223372036854775807"), Ok(i64::MAX));
        assert_eq!(read_int("-9223372036854775808"), Ok(i64::MIN));
        for (text, problem) in [
            ("9223372036854775808", "is too large for a 64-bit integer"),
            ("+18446744073709551616", "is too large for a 64-bit integer"),
            ("-9223372036854775809", "is too small for a 64-bit integer"),
            ("12.0", "is not an integer"),
            ("1e5", "is not an integer"),
            ("0x1f", "is not an integer"),
            (" 1", "is not an integer"),
            ("-", "is not an integer"),
            ("１", "is not an integer"),
        ] {
            assert_eq!(read_int(text), Err(format!("`{text}` {problem}")));
        }
        let long = read_int(&"9".repeat(500)).unwrap_err();
        assert!(
            long.chars().count() < 110 && long.ends_with("is too large for a 64-bit integer"),
            "{long}"
        );
    }

    #[test]
    fn an_empty_text_is_a_null() {
        let texts: Texts = [Some("a"), None, Some(""), Some("äb")].into_iter().collect();
        assert_eq!(texts.iter().collect::<Vec<_>>(), [Some("a"), None, None, Some("äb")]);
    }
}
