//! From files of events to a folder of sessions, in two sweeps over the events and one over the days.
//!
//! 1. *Read*: check, code and deal the events by session to scratch files; note when each product was first seen and what was last said of it.
//! 2. *Fit*: file by file, sort the events, drop repeats, count and sum; keep the sessions, cut to length.
//! 3. *Apply*: day by day, encode the sessions with the fitted [`Workflow`] and write them.
//!
//! Memory holds the vocabularies, a few batches, two files' events for every thread, and a day's sessions for
//! every thread: it does not grow with the number of events otherwise. The output does not depend on the number
//! of threads or of scratch files.

use std::fmt;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use bireme_base::output::{FolderKind, OutputFolder};
use rayon::prelude::*;

use crate::buckets::{Buckets, read_events};
use crate::error::Error;
use crate::events::{self, BadRows, Batch, RowCounts};
use crate::extremes::Extremes;
use crate::fit::{Counts, Fit, Sums};
use crate::inputs::{check_distinct, check_output};
use crate::partition::{Day, DayWriter, FLOAT_COLUMNS, KeptSessions};
use crate::schema::{Domain, Feature, FloatRange, ITEM_ID_TAG, IntRange, Schema, ValueCount, session};
use crate::sessions::{DAY, Dictionaries, Event, sessions, sort_and_drop_repeats};
use crate::vocab::{Coded, Vocabulary};
use crate::workflow::{Product, STATISTICS, Settings, Workflow};

/// The folder of the days, in the output.
pub const SESSIONS_BY_DAY: &str = "sessions_by_day";
/// The folder of the fitted workflow, in the output.
pub const WORKFLOW: &str = "workflow";
/// The schema's file, in the output.
pub const SCHEMA: &str = "schema.pbtxt";

/// The schema is written last.
const SESSIONS: FolderKind =
    FolderKind { marker: SCHEMA, is_ours: |name| matches!(name, SESSIONS_BY_DAY | WORKFLOW | SCHEMA) };

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// CSV or parquet in the forms of `docs/data.md`, in the order of time or not.
    pub events: Vec<PathBuf>,
    /// The folder to write, which must not be there or be empty.
    pub out: PathBuf,
    /// Use the events of these days only: calendar days in UTC, 1 being that of the first event. When a product
    /// was first seen is known from all events all the same.
    pub days: Option<RangeInclusive<i64>>,
    /// What to do with a row that cannot be read.
    pub bad_rows: BadRows,
    /// How sessions are made.
    pub settings: Settings,
    /// Whether sessions that an earlier run left in `out` may be replaced.
    pub overwrite: bool,
    /// Whether `out` holds sessions to which those of later days are added. Its workflow's settings are used, and `settings`
    /// are not.
    pub extend: bool,
    /// Scratch files to deal the events to; the input's size decides if there is none given.
    pub n_buckets: Option<usize>,
}

impl Options {
    /// Defaults for everything but the input and the output.
    pub fn new(events: Vec<PathBuf>, out: PathBuf) -> Self {
        Self {
            events,
            out,
            days: None,
            bad_rows: BadRows::Refuse,
            settings: Settings::default(),
            overwrite: false,
            extend: false,
            n_buckets: None,
        }
    }

    /// Refuses what can be known before anything is read.
    fn check(&self) -> Result<(), Error> {
        let Settings { max_length, min_length, .. } = self.settings;
        let problem = match &self.days {
            _ if self.events.is_empty() => "no file of events is given".into(),
            _ if min_length == 0 => "`min_length` must be at least 1".into(),
            _ if max_length < min_length => {
                format!("`max_length` {max_length} is less than `min_length` {min_length}")
            }
            _ if self.n_buckets == Some(0) => "`n_buckets` must be at least 1".into(),
            Some(days) if *days.start() < 1 => format!("day {} is before day 1", days.start()),
            Some(days) if days.is_empty() => format!("no day is in {}..{}", days.start(), days.end()),
            _ => return Ok(()),
        };
        Err(Error::Settings(problem))
    }
}

/// What was done.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The rows of all files.
    pub rows: RowCounts,
    /// Events that repeat their predecessor's product.
    pub n_repeats: u64,
    /// Sessions of days that were there before.
    pub n_held: u64,
    /// Of these, sessions that were not.
    pub n_late: u64,
    /// Events of the fit, in the chosen days.
    pub n_events: u64,
    /// Sessions with such events.
    pub n_sessions: u64,
    /// Of these, sessions too short to be kept.
    pub n_short: u64,
    /// The days that have sessions.
    pub days: Vec<Day>,
    /// Distinct values of each encoded column, by [`Coded`].
    pub n_values: [usize; 7],
    /// Where the sessions are.
    pub out: PathBuf,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &dyn fmt::Display| writeln!(f, "{name:<22} {value:>12}");
        line("rows read", &self.rows.read)?;
        line("unreadable, left out", &self.rows.bad)?;
        line("without a session", &self.rows.without_session)?;
        line("repeats", &self.n_repeats)?;
        if self.n_held > 0 {
            line("of earlier days", &self.n_held)?;
            line("of these, not there", &self.n_late)?;
        }
        line("events", &self.n_events)?;
        line("sessions", &self.n_sessions)?;
        line("too short, left out", &self.n_short)?;
        for (column, n_values) in Coded::ALL.into_iter().zip(self.n_values) {
            line(&format!("distinct {}", column.name()), &n_values)?;
        }
        writeln!(f, "{:<22} {:>12} {:>12} {:>12}", "day", "train", "valid", "test")?;
        for Day { day_index, n_sessions: [train, valid, test], .. } in &self.days {
            writeln!(f, "{day_index:<22} {train:>12} {valid:>12} {test:>12}")?;
        }
        write!(f, "{:<22} {}", "written to", self.out.display())
    }
}

/// Makes sessions of events, and writes `out` with [`SESSIONS_BY_DAY`], [`WORKFLOW`] and [`SCHEMA`].
///
/// `out` appears at the end; an error leaves it as it was. `progress` is given a line for each part of
/// the work, and warnings. Work runs on rayon's current pool and on polars' own.
///
/// # Errors
/// Settings or input that are refused, and files that cannot be written: see [`Error`].
pub fn preprocess(options: &Options, progress: &mut dyn FnMut(&str)) -> Result<Report, Error> {
    options.check()?;
    check_distinct(&options.events)?;
    for entry in [SESSIONS_BY_DAY, WORKFLOW, SCHEMA] {
        check_output(&options.events, &options.out.join(entry))?;
    }
    if options.extend {
        Base::check(&options.out)?;
    } else if options.settings.min_length == 1 {
        progress(
            "warning: sessions of one event are kept: a model that predicts the next item cannot learn from them, and \
             `bireme train` refuses them",
        );
    }
    let overwrite = options.overwrite || options.extend;
    let output = OutputFolder::create(&options.out, SESSIONS, overwrite, progress)?;
    let base = if options.extend { Some(Base::open(&options.out)?) } else { None };
    let settings = base.as_ref().map_or(&options.settings, |base| &base.workflow.statistics.settings).clone();
    let options = &Options { settings, ..options.clone() };
    let read = Read::all((options, base.as_ref()), &output, progress)?;

    let n_buckets = read.buckets.len();
    progress(&format!("sorting and counting {} events in {n_buckets} parts", read.n_events));
    let (workflow, fitted) = read.fit((options, base.as_ref()), &output)?;

    let n_days = fitted.days.len();
    progress(&format!(
        "encoding and writing {} sessions of {n_days} days",
        fitted.n_sessions - fitted.n_short
    ));
    let sessions_by_day = output.path().join(SESSIONS_BY_DAY);
    fs::create_dir(&sessions_by_day).map_err(Error::io("create", &sessions_by_day))?;
    if let Some(base) = &base {
        base.link_days(&sessions_by_day)?;
    }
    let writer = DayWriter {
        dir: &sessions_by_day,
        kept: &fitted.kept,
        encoder: &workflow.encoder(),
        session_ids: workflow.vocabulary(Coded::Session).dictionary(),
        counts: &fitted.session_counts,
        seed: options.settings.seed,
    };
    let days = fitted.days.par_iter().map(|day| writer.write(*day)).collect::<Result<Vec<_>, _>>()?;

    progress("writing the workflow and the schema");
    let workflow_dir = output.path().join(WORKFLOW);
    fs::create_dir(&workflow_dir).map_err(Error::io("create", &workflow_dir))?;
    workflow.save(&workflow_dir)?;
    let mut schema = schema(&workflow, &days);
    if let Some(base) = &base {
        base.widen(&mut schema)?;
    }
    schema.write(output.path().join(SCHEMA))?;
    output.publish()?;
    Ok(Report {
        rows: fitted.rows,
        n_repeats: fitted.n_repeats,
        n_held: fitted.n_held,
        n_late: fitted.n_late,
        n_events: workflow.statistics.n_events,
        n_sessions: fitted.n_sessions,
        n_short: fitted.n_short,
        days,
        n_values: Coded::ALL.map(|column| workflow.vocabulary(column).len()),
        out: options.out.clone(),
    })
}

/// Sessions that are extended.
struct Base {
    dir: PathBuf,
    workflow: Workflow,
    last_day: i64,
}

impl Base {
    /// Refuses a folder without sessions.
    fn check(dir: &Path) -> Result<(), Error> {
        let workflow = format!("{WORKFLOW}/{STATISTICS}");
        let needed = [&workflow, SESSIONS_BY_DAY, SCHEMA];
        match needed.into_iter().find(|entry| !dir.join(entry).exists()) {
            Some(missing) => Err(Error::NotSessions { path: dir.into(), missing: missing.into() }),
            None => Ok(()),
        }
    }

    fn open(dir: &Path) -> Result<Self, Error> {
        let workflow = Workflow::load(&dir.join(WORKFLOW))?;
        let days = dir.join(SESSIONS_BY_DAY);
        let entries = fs::read_dir(&days).map_err(Error::io("read", &days))?;
        let days = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let last_day = days.max().unwrap_or(0);
        Ok(Self { dir: dir.to_owned(), workflow, last_day })
    }

    /// Puts the days that are there into a new folder: as links, which take no room, or as copies.
    fn link_days(&self, into: &Path) -> Result<(), Error> {
        let from = self.dir.join(SESSIONS_BY_DAY);
        for day in fs::read_dir(&from).map_err(Error::io("read", &from))?.flatten() {
            let to = into.join(day.file_name());
            fs::create_dir(&to).map_err(Error::io("create", &to))?;
            for file in fs::read_dir(day.path()).map_err(Error::io("read", &day.path()))?.flatten() {
                let to = to.join(file.file_name());
                let linked =
                    fs::hard_link(file.path(), &to).or_else(|_| fs::copy(file.path(), &to).map(drop));
                linked.map_err(Error::io("copy", &file.path()))?;
            }
        }
        Ok(())
    }

    /// Lets the ranges of floats hold those of the days that were there.
    fn widen(&self, schema: &mut Schema) -> Result<(), Error> {
        let before = Schema::read(self.dir.join(SCHEMA))?;
        for feature in &mut schema.features {
            let range = before.feature(&feature.name).map(|feature| &feature.domain);
            if let (Domain::Float(Some(now)), Some(Domain::Float(Some(then)))) = (&mut feature.domain, range)
            {
                *now = now.with(*then);
            }
        }
        Ok(())
    }
}

/// The events after the first sweep.
struct Read {
    rows: RowCounts,
    n_events: u64,
    dictionaries: Dictionaries,
    /// By their codes.
    products: Vec<Product>,
    first_event: i64,
    buckets: Vec<PathBuf>,
}

impl Read {
    fn all(
        (options, base): (&Options, Option<&Base>),
        output: &OutputFolder,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Self, Error> {
        let scratch = &output.scratch();
        let n_buckets = options.n_buckets.map_or_else(|| suitable_buckets(&options.events), Ok)?;
        let mut buckets = Buckets::create(scratch, n_buckets)?;
        let (mut dictionaries, mut products) = base
            .map_or_else(|| (Dictionaries::new(), vec![Product::UNSEEN]), |base| base.workflow.to_extend());
        let (mut first_event, mut n_events) = (i64::MAX, 0);
        let mut extremes = base.map_or_else(Extremes::default, |base| {
            let fitted = &base.workflow.statistics;
            Extremes::extending(fitted.n_events, fitted.first_event, base.last_day)
        });
        let mut rows = RowCounts::default();
        for (file, path) in options.events.iter().enumerate() {
            let name = path.display();
            progress(&format!("reading {name}"));
            let mut n_told = 0;
            let mut left_out = LeftOut::default();
            let counts = events::read(path, options.bad_rows, scratch, &mut |batch| {
                extremes.add(file, &batch);
                left_out.add(&batch);
                let events = dictionaries.code(&batch);
                products.resize(dictionaries.get(Coded::Product).len() + 1, Product::UNSEEN);
                for event in &events {
                    first_event = first_event.min(event.seconds);
                    products[event.code(Coded::Product) as usize].see(event);
                }
                n_events += events.len() as u64;
                if n_events - n_told >= 1_000_000 {
                    n_told = n_events;
                    progress(&format!("reading {name}: {n_events} events"));
                }
                buckets.push(events)
            })?;
            left_out.warning(path).iter().for_each(|warning| progress(warning));
            rows += counts;
        }
        if n_events == 0 {
            return Err(Error::Nothing(format!("none of {} rows is an event of a session", rows.read)));
        }
        if let Some(base) = base {
            first_event = base.workflow.statistics.first_event;
        }
        extremes.warnings(&options.events, first_event).iter().for_each(|warning| progress(warning));
        let buckets = buckets.finish()?;
        Ok(Self { rows, n_events, dictionaries, products, first_event, buckets })
    }

    fn fit(
        self,
        (options, base): (&Options, Option<&Base>),
        output: &OutputFolder,
    ) -> Result<(Workflow, Fitted), Error> {
        let counts = Counts::new(&self.dictionaries);
        let sweep = Sweep {
            options,
            products: &self.products,
            first_event: self.first_event,
            last_day: base.map_or(i64::MIN, |base| base.last_day),
            session_ids: base.map_or(&[], |base| base.workflow.vocabulary(Coded::Session).ids()),
            counts: &counts,
        };
        let mut sums = Sums::default();
        let mut fitted = Fitted { rows: self.rows, ..Fitted::default() };
        let parts: Vec<_> = self.buckets.iter().enumerate().collect();
        // Some at a time: sums are by category, and there may be many categories.
        for parts in parts.chunks(4 * rayon::current_num_threads()) {
            let sweep = |(i, bucket): &(usize, &PathBuf)| {
                sweep.bucket(bucket, output.scratch().join(format!("sessions-{i}")))
            };
            let swept = parts.par_iter().map(sweep).collect::<Result<Vec<_>, _>>()?;
            for Swept { sums: of_bucket, n_repeats, n_held, n_late, n_sessions, n_short, kept } in swept {
                sums.merge(&of_bucket);
                fitted.n_repeats += n_repeats;
                fitted.n_held += n_held;
                fitted.n_late += n_late;
                fitted.n_sessions += n_sessions;
                fitted.n_short += n_short;
                fitted.days.extend(kept.days());
                fitted.kept.push(kept);
            }
        }
        fitted.days.sort_unstable();
        fitted.days.dedup();
        if fitted.days.is_empty() {
            let n = options.settings.min_length;
            let days = match &options.days {
                Some(days) => format!(" in days {}..{}", days.start(), days.end()),
                None => String::new(),
            };
            let later = match base {
                Some(base) => format!(" and begins after day {}", base.last_day),
                None => String::new(),
            };
            return Err(Error::Nothing(format!("no session has {n} events or more{later}{days}")));
        }
        fitted.session_counts = counts.of(Coded::Session);
        let fit = Fit {
            base: base.map(|base| &base.workflow),
            settings: options.settings.clone(),
            first_event: self.first_event,
            days: options.days.as_ref().map(|days| (*days.start(), *days.end())),
            dictionaries: self.dictionaries,
            products: self.products,
        };
        let workflow = fit.workflow(counts, &sums);
        Ok((workflow, fitted))
    }
}

/// The bad rows of a file that are left out, the first of them by their place.
#[derive(Default)]
struct LeftOut {
    n_rows: usize,
    first: Vec<u64>,
    /// `line` or `row`.
    unit: &'static str,
}

impl LeftOut {
    /// Rows that are named.
    const NAMED: usize = 10;

    fn add(&mut self, batch: &Batch) {
        self.n_rows += batch.bad.len();
        self.unit = batch.unit;
        let room = Self::NAMED - self.first.len();
        self.first.extend(batch.bad.iter().take(room));
    }

    fn warning(&self, path: &Path) -> Option<String> {
        let n_more = self.n_rows - self.first.len();
        let places: Vec<String> = self.first.iter().map(u64::to_string).collect();
        let plural = if self.n_rows == 1 { "" } else { "s" };
        let more = if n_more == 0 { String::new() } else { format!(" and {n_more} more") };
        (self.n_rows > 0).then(|| {
            let unit = self.unit;
            format!("warning: `{}`: left out {unit}{plural} {}{more}", path.display(), places.join(", "))
        })
    }
}

fn suitable_buckets(events: &[PathBuf]) -> Result<usize, Error> {
    let (mut plain, mut compressed) = (0, 0);
    for path in events {
        let expected = events::expected_bytes(path)?;
        plain += expected.plain;
        compressed += expected.compressed;
    }
    Ok(Buckets::suitable(plain, compressed))
}

/// The events after the second sweep.
#[derive(Default)]
struct Fitted {
    rows: RowCounts,
    n_repeats: u64,
    n_held: u64,
    n_late: u64,
    n_sessions: u64,
    n_short: u64,
    days: Vec<i64>,
    kept: Vec<KeptSessions>,
    /// By the code of the session.
    session_counts: Vec<u32>,
}

/// What the second sweep does with every bucket.
struct Sweep<'a> {
    options: &'a Options,
    products: &'a [Product],
    first_event: i64,
    /// Sessions of this day and before are there already.
    last_day: i64,
    /// The ids of those, by code.
    session_ids: &'a [u32],
    counts: &'a Counts,
}

struct Swept {
    sums: Sums,
    n_repeats: u64,
    n_held: u64,
    n_late: u64,
    n_sessions: u64,
    n_short: u64,
    kept: KeptSessions,
}

impl Sweep<'_> {
    fn bucket(&self, bucket: &Path, sessions_path: PathBuf) -> Result<Swept, Error> {
        let mut events = read_events(bucket)?;
        fs::remove_file(bucket).map_err(Error::io("remove", bucket))?;
        let n_repeats = sort_and_drop_repeats(&mut events) as u64;
        // After the repeats: an event may repeat one of a day that is not used.
        events.retain(|event| self.is_used(event));

        let mut sums = Sums::default();
        let Settings { max_length, min_length, keep, .. } = self.options.settings;
        let (mut n_held, mut n_late) = (0, 0);
        let (mut n_sessions, mut n_short, mut kept) = (0, 0, Vec::new());
        for events in sessions(&events) {
            let day_index = (events[0].seconds - self.first_event).div_euclid(DAY) + 1;
            if day_index <= self.last_day {
                n_held += 1;
                let id = self.session_ids.get(events[0].code(Coded::Session) as usize);
                n_late += u64::from(id.is_none_or(|&id| id == Vocabulary::UNKNOWN));
                continue;
            }
            for event in events {
                sums.add(event, self.products, self.counts);
            }
            n_sessions += 1;
            if events.len() < min_length {
                n_short += 1;
            } else {
                kept.push((day_index, keep.cut(events, max_length)));
            }
        }
        let kept = KeptSessions::write(sessions_path, kept)?;
        Ok(Swept { sums, n_repeats, n_held, n_late, n_sessions, n_short, kept })
    }

    fn is_used(&self, event: &Event) -> bool {
        let calendar_day = event.seconds.div_euclid(DAY) - self.first_event.div_euclid(DAY) + 1;
        self.options.days.as_ref().is_none_or(|days| days.contains(&calendar_day))
    }
}

/// The schema of the sessions, with the features and the tags of the tutorial's.
fn schema(workflow: &Workflow, days: &[Day]) -> Schema {
    let Settings { max_length, min_length, .. } = workflow.statistics.settings;
    let value_count = Some(ValueCount { min: min_length as i64, max: max_length as i64 });
    let range = |column: Coded, min: u32, is_categorical: bool| {
        let max = workflow.vocabulary(column).cardinality() as i64 - 1;
        Domain::Int(Some(IntRange { min: i64::from(min), max, is_categorical }))
    };
    let tags = |tags: &[&str]| tags.iter().map(ToString::to_string).collect();
    let ids = |name: &str, column: Coded, of: &[&str]| Feature {
        name: name.into(),
        value_count,
        domain: range(column, 1, true),
        tags: tags(of),
    };
    let floats = |name: &str, of: &[&str]| {
        let place = FLOAT_COLUMNS.iter().position(|column| *column == name);
        let ranges = days.iter().filter_map(|day| day.ranges[place?]);
        let range = ranges.reduce(FloatRange::with);
        Feature { name: name.into(), value_count, domain: Domain::Float(range), tags: tags(of) }
    };
    Schema {
        warnings: Vec::new(),
        features: vec![
            Feature {
                name: session::SESSION.into(),
                value_count: None,
                domain: range(Coded::Session, 2, false),
                tags: tags(&["groupby_col"]),
            },
            ids(session::CATEGORY, Coded::Category, &["list", "categorical", "item"]),
            ids(session::CATEGORY_CODE, Coded::CategoryCode, &["list", "categorical", "item"]),
            ids(session::BRAND, Coded::Brand, &["list", "categorical", "item"]),
            ids(session::PRODUCT, Coded::Product, &[ITEM_ID_TAG, "list", "categorical", "item"]),
            floats(session::RECENCY, &["continuous", "list"]),
            floats(session::WEEKDAY_COS, &["continuous", "time", "list"]),
            floats(session::WEEKDAY_SIN, &["continuous", "time", "list"]),
            floats(session::RELATIVE_PRICE, &["continuous", "list"]),
            floats(session::PRICE, &["continuous", "list"]),
        ],
    }
}
