//! A synthetic shop: any number of events in the format of REES46's files, drawn from a known law.
//!
//! # The law
//!
//! *Items.* The popularity of an item falls with its rank by the Zipf-Mandelbrot law,
//! `1 / (rank + 20)`. Categories hold about 25 items each, in a fixed order (a shelf); popularity
//! and category are independent. One item in a hundred is released on each day after the first (at
//! most half of all items) and does not occur before.
//!
//! *Sessions.* A session has an intent: two categories, those of two items drawn by popularity. No
//! column holds it. The first item belongs to one of the two categories with probability 0.9,
//! else it is any item. Each further item is
//!
//! | percent | item | predictable from |
//! | --: | --- | --- |
//! | 10 | a neighbour of the last item: one of the next three on its shelf | the last item |
//! | 80 | an item of the two categories; 65 % switch category, 35 % stay | the whole session |
//! | 10 | any item | nothing |
//!
//! by popularity, and is drawn again while it equals the last item. The last item thus shows the
//! category that the session mostly leaves, and earlier items show where it goes: a model that
//! reads the whole session beats every count of item pairs, however much data was counted. The
//! category of an item must be learned, from `category_id` or from co-occurrence.
//!
//! *Rows.* A session has 1 to 400 rows (lognormal with median 4.2: about one session in a thousand
//! has over 100). 30 % of the rows after the first repeat the item of the row before, as another
//! view, a cart or a purchase, like the consecutive repeats of the real files. Length and repeats
//! depend on nothing else. The median gap between rows of a session is half a minute, and sessions
//! overlap; a user has three sessions on average. Sessions start on all days equally, few by night.
//! Rows that would fall after the last midnight are moved to the second before it, and the last
//! session is cut so that the file has exactly the requested rows. A third of the categories have
//! no `category_code`, 14 % of the items no `brand`; one session in ten thousand is a single row
//! without `user_session`.
//!
//! # The reachable Recall@20
//!
//! The law is known, so the best reachable Recall@20 is too: [`Reach`] draws sessions and predicts
//! the last item of each, as the evaluation of a model does. Its oracle knows the shop but not the
//! intent, which it infers exactly by Bayes' rule: no model can expect more than `whole_session`.
//! The same oracle, given the last item as if the session started with it, yields `first_order`;
//! counting pairs on unlimited data reaches the same value within 0.01.
//!
//! # Memory
//!
//! Memory is `O(items)` plus the sessions that are open at the same time, which grow with the rows
//! *per day*, not with all rows. The same options give the same bytes on every machine.

mod reach;
mod rows;
mod session;
mod shop;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::io::{self, BufWriter, Write};

use bireme_base::user_error::{FAILED, REFUSED, UserError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::table::{self, Align};
pub use reach::Reach;
use rows::{EventType, Labels, Rows, Visitor};
use session::Visit;
use shop::Shop;

const MIN_ITEMS: u32 = 100;
const MIN_ROWS_PER_DAY: u64 = 500;
/// One session in this many is a single row without a session id.
const LOST_SESSION_ONE_IN: u32 = 10_000;
/// Mean over users.
const SESSIONS_PER_USER: f64 = 3.0;
/// The standard error of the estimated Recall@20 is at most 0.0036.
const REACH_SESSIONS: u32 = 20_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthOptions {
    /// Rows of the file, without the header.
    pub events: u64,
    /// Items of the shop on its last day.
    pub items: u32,
    /// Whole days, the first of them 2019-10-01.
    pub days: u32,
    /// The same options and seed give the same bytes.
    pub seed: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// An option is out of range.
    #[error("`{option} {given}` is too {fault}: {why}")]
    Option {
        /// As on the command line.
        option: &'static str,
        /// The value given.
        given: u64,
        /// `few` or `many`.
        fault: &'static str,
        /// The range.
        why: String,
    },
    /// The events could not be written.
    #[error("cannot write the events")]
    Write(#[from] io::Error),
}

impl UserError for SynthError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Option { .. } => REFUSED,
            Self::Write(_) => FAILED,
        }
    }
}

/// Size of the generated file, and the Recall@20 that can be reached on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SynthReport {
    /// Rows written, without the header.
    pub rows: u64,
    /// Sessions that have an id.
    pub sessions: u64,
    /// Largest number of sessions open at the same time, which bounds memory.
    pub most_live_sessions: usize,
    /// The reachable Recall@20.
    pub reach: Reach,
}

impl fmt::Display for SynthReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = [
            ("rows", self.rows.to_string()),
            ("sessions", self.sessions.to_string()),
            ("recall@20, the most popular items", format!("{:.4}", self.reach.popularity)),
            ("recall@20, best from the last item alone", format!("{:.4}", self.reach.first_order)),
            ("recall@20, best from the whole session", format!("{:.4}", self.reach.whole_session)),
        ];
        let rows: Vec<_> =
            lines.map(|(name, value)| [name.to_owned(), format!("{value:>12}")]).into();
        f.write_str(&table::aligned([Align::Left, Align::Right], &rows).join("\n"))
    }
}

impl SynthOptions {
    /// # Errors
    /// Returns the first option out of range.
    pub fn check(&self) -> Result<(), SynthError> {
        let few = |option, given, why| Err(SynthError::Option { option, given, fault: "few", why });
        let Self { events, items, days, .. } = *self;
        if items < MIN_ITEMS {
            return few("--items", items.into(), format!("the least is {MIN_ITEMS}"));
        }
        if days == 0 {
            return few("--days", 0, "the least is 1".into());
        }
        let most_born = items / 2;
        if days > most_born {
            let why = format!(
                "each day after the first releases at least one item, and at most {most_born} of \
                 {items} items are released later"
            );
            return Err(SynthError::Option {
                option: "--days",
                given: days.into(),
                fault: "many",
                why,
            });
        }
        let least = MIN_ROWS_PER_DAY * u64::from(days);
        if events < least {
            return few("--events", events, format!("{days} days need at least {least}"));
        }
        Ok(())
    }
}

/// An open session, ordered by the second of its next row, then by its start.
struct LiveSession {
    due: Reverse<(u64, u64)>,
    visit: Visit,
    visitor: Visitor,
    event_type: EventType,
}

impl PartialEq for LiveSession {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for LiveSession {}

impl PartialOrd for LiveSession {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for LiveSession {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}

/// Writes the events of a shop to `out`, in order of time.
///
/// # Errors
/// Returns an error if an option is out of range (before writing anything) or a write fails.
pub fn synth(options: &SynthOptions, out: &mut dyn Write) -> Result<SynthReport, SynthError> {
    options.check()?;
    // Separate streams of random numbers, so that a change to one part leaves the others unchanged.
    let stream = |number| {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        rng.set_stream(number);
        rng
    };
    let mut rng = stream(0);
    let shop = Shop::draw(options.items, options.days, &mut rng);
    let labels = Labels::draw(&shop, &mut rng)?;
    let mut out = BufWriter::with_capacity(1 << 18, out);
    let rows = Rows::begin(labels, &mut out)?;
    let WrittenSessions { with_id, most_live } =
        write_events(options, &shop, rows, &mut stream(1))?;
    out.flush()?;
    let reach = Reach::estimate(&shop, REACH_SESSIONS, &mut stream(2));
    Ok(SynthReport {
        rows: options.events,
        sessions: with_id,
        most_live_sessions: most_live,
        reach,
    })
}

struct WrittenSessions {
    with_id: u64,
    most_live: usize,
}

/// Starts sessions until they have the requested rows, and interleaves their rows by time.
fn write_events(
    options: &SynthOptions,
    shop: &Shop,
    mut rows: Rows<'_>,
    rng: &mut ChaCha8Rng,
) -> io::Result<WrittenSessions> {
    let SynthOptions { events, days, .. } = *options;
    let last_second = u64::from(days) * 86_400 - 1;
    let n_users = (events as f64 / session::ROWS.mean() / SESSIONS_PER_USER).clamp(1.0, 3e9) as u32;
    let mut live: BinaryHeap<LiveSession> = BinaryHeap::new();
    let (mut begun_rows, mut n_begun, mut n_sessions, mut most_live) = (0, 0u64, 0, 0);
    loop {
        let begins = (begun_rows < events).then(|| rows::begin_second(begun_rows, events, days));
        let due = live.peek().map(|next| next.due.0.0);
        if let Some(second) = begins.filter(|&begins| due.is_none_or(|due| begins <= due)) {
            let has_session = rng.random_range(0..LOST_SESSION_ONE_IN) != 0;
            let mut visit = Visit::begin(shop, (second / 86_400) as u32, rng);
            let left = events - begun_rows - 1;
            visit.cut(if has_session { left.min(u32::MAX.into()) as u32 } else { 0 });
            let visitor = Visitor::draw(n_users, has_session, rng);
            rows.write(second, EventType::View, visit.item(), &visitor)?;
            begun_rows += 1 + u64::from(visit.rows_left());
            n_begun += 1;
            n_sessions += u64::from(has_session);
            if visit.rows_left() > 0 {
                let next = second + u64::from(session::GAP_SECONDS.draw(rng));
                // Rows after the last midnight move to the second before it.
                let due = Reverse((next.min(last_second), n_begun));
                live.push(LiveSession { due, visit, visitor, event_type: EventType::View });
                most_live = most_live.max(live.len());
            }
        } else if let Some(mut next) = live.peek_mut() {
            let Reverse((second, serial)) = next.due;
            next.event_type = if next.visit.advance(shop, rng) {
                EventType::View
            } else {
                next.event_type.after(rng)
            };
            rows.write(second, next.event_type, next.visit.item(), &next.visitor)?;
            if next.visit.rows_left() > 0 {
                let gap = u64::from(session::GAP_SECONDS.draw(rng));
                next.due = Reverse(((second + gap).min(last_second), serial));
            } else {
                std::collections::binary_heap::PeekMut::pop(next);
            }
        } else {
            return Ok(WrittenSessions { with_id: n_sessions, most_live });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    const SMALL: SynthOptions = SynthOptions { events: 40_000, items: 1000, days: 3, seed: 7 };

    fn make(options: &SynthOptions) -> (String, SynthReport) {
        let mut bytes = Vec::new();
        let report = synth(options, &mut bytes).unwrap();
        (String::from_utf8(bytes).unwrap(), report)
    }

    fn rows(text: &str) -> Vec<[&str; 9]> {
        let columns = |line: &'_ str| line.split(',').count();
        assert!(text.lines().all(|line| columns(line) == 9));
        text.lines()
            .skip(1)
            .map(|line| std::array::from_fn(|at| line.split(',').nth(at).unwrap()))
            .collect()
    }

    fn share(rows: &[[&str; 9]], holds: impl Fn(&[&str; 9]) -> bool) -> f64 {
        rows.iter().filter(|&row| holds(row)).count() as f64 / rows.len() as f64
    }

    #[test]
    fn the_same_options_give_the_same_bytes_on_every_machine() {
        let (text, report) = make(&SMALL);
        assert_eq!(format!("{:016x}", xxh3_64(text.as_bytes())), "585d0392f1014d24");
        assert_eq!(make(&SMALL), (text.clone(), report));
        assert_ne!(make(&SynthOptions { seed: 8, ..SMALL }).0, text);
    }

    #[test]
    fn rows_are_as_many_as_asked_for_and_sorted_by_time() {
        for events in [1500, 40_000, 40_001] {
            let (text, report) = make(&SynthOptions { events, ..SMALL });
            assert_eq!(text.lines().next(), Some(rows::HEADER.trim_end()));
            let rows = rows(&text);
            assert_eq!((rows.len() as u64, report.rows), (events, events));
            assert!(rows.is_sorted_by_key(|row| row[0]));
            assert_eq!(rows[0][0], "2019-10-01 00:00:00 UTC");
            let days: BTreeSet<&str> = rows.iter().map(|row| &row[0][..10]).collect();
            assert!(days.into_iter().eq(["2019-10-01", "2019-10-02", "2019-10-03"]));
        }
    }

    #[test]
    fn what_a_row_says_about_an_item_never_changes() {
        let (text, _) = make(&SMALL);
        let rows = rows(&text);
        let mut items = BTreeMap::new();
        let mut codes = BTreeMap::new();
        for row in &rows {
            assert_eq!(*items.entry(row[2]).or_insert(&row[3..7]), &row[3..7]);
            assert_eq!(*codes.entry(row[3]).or_insert(row[4]), row[4]);
            assert!(row[6].parse::<f64>().unwrap() > 0.0);
        }
        let unbranded = items.values().filter(|labels| labels[2].is_empty()).count();
        assert!((0.1..0.18).contains(&(unbranded as f64 / items.len() as f64)), "{unbranded}");
        let uncoded = codes.values().filter(|code| code.is_empty()).count();
        assert!((0.3..0.4).contains(&(uncoded as f64 / codes.len() as f64)), "{uncoded}");
    }

    #[test]
    fn events_look_like_those_of_a_shop() {
        let (text, report) = make(&SynthOptions { events: 300_000, ..SMALL });
        let rows = rows(&text);
        assert!((0.93..0.98).contains(&share(&rows, |row| row[1] == "view")));
        assert!(share(&rows, |row| row[1] == "cart") > 0.01);
        assert!(share(&rows, |row| row[1] == "purchase") > 0.01);
        let lost = rows.iter().filter(|row| row[8].is_empty()).count();
        assert!((1..20).contains(&lost), "{lost}");

        let mut sessions: BTreeMap<&str, Vec<&[&str; 9]>> = BTreeMap::new();
        for row in rows.iter().filter(|row| !row[8].is_empty()) {
            sessions.entry(row[8]).or_default().push(row);
        }
        assert_eq!(sessions.len() as u64, report.sessions);
        let mut users: BTreeMap<&str, u32> = BTreeMap::new();
        for session in sessions.values() {
            assert!(session.iter().all(|row| row[7] == session[0][7]));
            *users.entry(session[0][7]).or_default() += 1;
        }
        assert!(users.values().filter(|&&sessions| sessions > 1).count() * 2 > users.len());
        let lengths: Vec<usize> = sessions.values().map(Vec::len).collect();
        assert_eq!(lengths.iter().min(), Some(&1));
        assert!(lengths.iter().max() > Some(&100));
        let without_repeats = |session: &Vec<&[&str; 9]>| {
            1 + session.windows(2).filter(|pair| pair[0][2] != pair[1][2]).count()
        };
        let steps: usize = sessions.values().map(without_repeats).sum();
        let mean = steps as f64 / sessions.len() as f64;
        assert!((5.0..6.0).contains(&mean), "{mean}");
    }

    #[test]
    fn items_are_born_on_every_day() {
        let (text, _) = make(&SMALL);
        let mut first_days = BTreeMap::new();
        for row in rows(&text) {
            first_days.entry(row[2]).or_insert(&row[0][..10]);
        }
        for day in ["2019-10-02", "2019-10-03"] {
            // Ten are; an unpopular one of the first day may also be seen late.
            let born = first_days.values().filter(|&&first| first == day).count();
            assert!((8..100).contains(&born), "{born}");
        }
    }

    #[test]
    fn the_whole_session_tells_more_than_the_last_item() {
        let (_, SynthReport { reach, .. }) = make(&SMALL);
        assert!(reach.popularity > 0.1, "{reach:?}");
        assert!(reach.first_order > reach.popularity + 0.15, "{reach:?}");
        assert!(reach.whole_session > reach.first_order + 0.15, "{reach:?}");
    }

    #[test]
    fn sessions_under_way_grow_with_the_rows_a_day_alone() {
        let live =
            |events, days| make(&SynthOptions { events, days, ..SMALL }).1.most_live_sessions;
        let (short, long) = (live(20_000, 1), live(160_000, 8));
        assert!(long < 2 * short, "{short} {long}");
    }

    #[test]
    fn options_out_of_range_are_refused() {
        let refused = |options: SynthOptions| {
            let mut out = Vec::new();
            let error = synth(&options, &mut out).unwrap_err().to_string();
            assert!(out.is_empty());
            error
        };
        assert_eq!(
            refused(SynthOptions { items: 0, ..SMALL }),
            "`--items 0` is too few: the least is 100"
        );
        assert_eq!(
            refused(SynthOptions { days: 0, ..SMALL }),
            "`--days 0` is too few: the least is 1"
        );
        assert_eq!(
            refused(SynthOptions { days: 501, ..SMALL }),
            "`--days 501` is too many: each day after the first releases at least one item, and at \
             most 500 of 1000 items are released later"
        );
        assert_eq!(
            refused(SynthOptions { events: 1499, ..SMALL }),
            "`--events 1499` is too few: 3 days need at least 1500"
        );
    }
}
