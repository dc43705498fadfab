//! Times of events, with a resolution of nanoseconds.

use std::fmt;

use chrono::{DateTime, NaiveDate};

/// A time in UTC. Sessions are ordered by seconds and nanoseconds; features and days depend on the
/// seconds only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventTime {
    /// Since 1970-01-01, rounded down.
    pub seconds: i64,
    /// Below 10^9.
    pub nanos: u32,
}

impl EventTime {
    pub const MAX: Self = Self { seconds: i64::MAX, nanos: 999_999_999 };
    pub const MIN: Self = Self { seconds: i64::MIN, nanos: 0 };

    /// Converts ticks since 1970-01-01; `per_second` is 1, 10^3, 10^6 or 10^9.
    pub(crate) fn from_ticks(ticks: i64, per_second: u32) -> Self {
        let after = ticks.rem_euclid(i64::from(per_second)) as u32;
        Self {
            seconds: ticks.div_euclid(i64::from(per_second)),
            nanos: after * (1_000_000_000 / per_second),
        }
    }

    /// Parses `2019-10-01 00:00:00 UTC`. `T`, `Z`, `+00:00` and a fraction of up to nine digits are
    /// accepted, and a time without a zone is UTC. Further digits of a fraction must be zeros,
    /// because times that differ there would become equal.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let (stamp, rest) = text.split_at_checked(19)?;
        let number = |range: std::ops::Range<usize>| {
            stamp[range].iter().try_fold(0, |n, digit| {
                digit.is_ascii_digit().then(|| n * 10 + u32::from(digit - b'0'))
            })
        };
        let separators = [stamp[4], stamp[7], stamp[13], stamp[16]] == *b"--::"
            && matches!(stamp[10], b' ' | b'T');
        let (nanos, zone) = match rest {
            [b'.', rest @ ..] => {
                let n_digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
                let (digits, zone) = rest.split_at(n_digits);
                (fraction(digits)?, zone)
            }
            zone => (0, zone),
        };
        if !separators || !matches!(zone, b"" | b" UTC" | b"Z" | b"+00:00") {
            return None;
        }
        let date = NaiveDate::from_ymd_opt(number(0..4)? as i32, number(5..7)?, number(8..10)?)?;
        let time = date.and_hms_opt(number(11..13)?, number(14..16)?, number(17..19)?)?;
        Some(Self { seconds: time.and_utc().timestamp(), nanos })
    }
}

/// Nanoseconds from the digits after a decimal point.
fn fraction(digits: &[u8]) -> Option<u32> {
    let (nanos, beyond) = digits.split_at(digits.len().min(9));
    if beyond.iter().any(|digit| *digit != b'0') {
        return None;
    }
    let nanos = nanos.iter().chain(std::iter::repeat(&b'0')).take(9);
    Some(nanos.fold(0, |n, digit| n * 10 + u32::from(digit - b'0')))
}

/// As in the events, with a fraction only where it is not zero.
impl fmt::Display for EventTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(time) = DateTime::from_timestamp(self.seconds, 0) else {
            return write!(f, "{} s after 1970-01-01 00:00:00 UTC", self.seconds);
        };
        write!(f, "{}", time.format("%Y-%m-%d %H:%M:%S"))?;
        if self.nanos > 0 {
            let digits = format!("{:09}", self.nanos);
            write!(f, ".{}", digits.trim_end_matches('0'))?;
        }
        f.write_str(" UTC")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_keep_nine_decimals() {
        let cases = [
            ("1970-01-01 00:00:00 UTC", 0, 0),
            ("1969-12-31 23:59:59.75 UTC", -1, 750_000_000),
            ("2019-10-01 00:00:01 UTC", 1_569_888_001, 0),
            ("2019-10-01T00:00:01Z", 1_569_888_001, 0),
            ("2019-10-01 00:00:01.999 UTC", 1_569_888_001, 999_000_000),
            ("2019-10-01T00:00:01.000000001+00:00", 1_569_888_001, 1),
            ("2019-10-01 00:00:01.1234567890000", 1_569_888_001, 123_456_789),
            ("2020-02-29 23:59:59", 1_583_020_799, 0),
        ];
        for (text, seconds, nanos) in cases {
            assert_eq!(
                EventTime::parse(text.as_bytes()),
                Some(EventTime { seconds, nanos }),
                "{text}"
            );
        }
        for text in [
            "",
            "2019-10-01",
            "2019-02-29 00:00:00 UTC",
            "2019-10-01 24:00:00 UTC",
            "2019-10-01 00:00:00 CET",
            "2019-10-01 00:00:00.1234567891 UTC",
            "2019-10-01 00:00:00.1.2 UTC",
        ] {
            assert_eq!(EventTime::parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn ticks_and_texts_are_the_same_times() {
        for (ticks, per_second, text) in [
            (1_569_888_001_250, 1_000, "2019-10-01 00:00:01.25 UTC"),
            (1_569_888_001_000_001, 1_000_000, "2019-10-01 00:00:01.000001 UTC"),
            (-1, 1_000_000_000, "1969-12-31 23:59:59.999999999 UTC"),
            (-1, 1, "1969-12-31 23:59:59 UTC"),
        ] {
            let time = EventTime::from_ticks(ticks, per_second);
            assert_eq!(time.to_string(), text);
            assert_eq!(EventTime::parse(text.as_bytes()), Some(time));
        }
    }
}
