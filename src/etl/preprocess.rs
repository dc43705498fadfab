//! From files of events to a folder of sessions, in three stages.
//!
//! 1. *Read*: check and code the events, and deal them by session to scratch files (buckets); note
//!    each product's first and latest event.
//! 2. *Fit*: bucket by bucket, sort the events, drop repeats, count and sum; keep the sessions, cut
//!    to length.
//! 3. *Write*: day by day, encode the sessions with the fitted [`Workflow`] and write them.
//!
//! Memory holds the vocabularies, a few batches, and per thread the events of two buckets and the
//! sessions of a day; otherwise it does not grow with the number of events. The output does not
//! depend on the number of threads or buckets.

use std::fmt;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use bireme_base::output::{FolderKind, OutputFolder};
use rayon::prelude::*;

use crate::buckets::{Buckets, read_events};
use crate::error::Error;
use crate::events::{self, BadRows, EventBatch, RowCounts};
use crate::extremes::Extremes;
use crate::fit::{ColumnCounts, Fit, Sums};
use crate::inputs::{check_distinct, check_output};
use crate::partition::{Day, DayWriter, FLOAT_COLUMNS, KeptSessions};
use crate::schema::{
    Domain, Feature, FloatRange, ITEM_ID_TAG, IntRange, Schema, ValueCount, session,
};
use crate::sessions::{DAY, Dictionaries, Event, sessions, sort_and_drop_repeats};
use crate::vocab::{Coded, Vocabulary};
use crate::workflow::{Product, Settings, Statistics, Workflow};
use crate::workflow_files::{STATISTICS, write_table};

/// The folder of the days, in the output.
pub const SESSIONS_BY_DAY: &str = "sessions_by_day";
/// The folder of the fitted workflow, in the output.
pub const WORKFLOW: &str = "workflow";
pub const SCHEMA: &str = "schema.pbtxt";
/// The catalogue: what describes each item, in the output.
pub const ITEMS: &str = "items.parquet";

/// The schema is written last.
const SESSIONS: FolderKind = FolderKind {
    marker: SCHEMA,
    is_ours: |name| matches!(name, SESSIONS_BY_DAY | WORKFLOW | SCHEMA | ITEMS),
};

#[derive(Clone, Debug)]
pub struct PreprocessOptions {
    /// CSV or parquet in the forms of `docs/data.md`, in any order of time.
    pub events: Vec<PathBuf>,
    /// The folder to write, which must be absent or empty.
    pub out: PathBuf,
    /// The days whose events are used: calendar days in UTC, from 1, the day of the first event.
    /// The recency of a product counts from its first event on any day.
    pub days: Option<RangeInclusive<i64>>,
    pub bad_rows: BadRows,
    pub settings: Settings,
    /// Whether sessions of an earlier run in `out` may be replaced.
    pub overwrite: bool,
    /// Whether to add later days to the sessions in `out`. The settings of their workflow are then
    /// used in place of `settings`.
    pub extend: bool,
    /// The number of scratch files; by default it follows from the input's size.
    pub n_buckets: Option<usize>,
}

impl PreprocessOptions {
    /// Defaults for all but the input and the output.
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

    /// Refuses settings that contradict each other, before any file is read.
    fn check(&self) -> Result<(), Error> {
        let Settings { max_length, min_length, .. } = self.settings;
        let refuse = |problem: String| Err(Error::Settings(problem));
        if self.events.is_empty() {
            return refuse("no file of events is given".into());
        }
        if min_length == 0 {
            return refuse("`min_length` must be at least 1".into());
        }
        if max_length < min_length {
            return refuse(format!(
                "`max_length` {max_length} is less than `min_length` {min_length}"
            ));
        }
        if self.n_buckets == Some(0) {
            return refuse("`n_buckets` must be at least 1".into());
        }
        match &self.days {
            Some(days) if *days.start() < 1 => {
                refuse(format!("day {} is before day 1", days.start()))
            }
            Some(days) if days.is_empty() => {
                refuse(format!("no day is in {}..{}", days.start(), days.end()))
            }
            _ => Ok(()),
        }
    }
}

/// The counts of a run of [`preprocess`].
#[derive(Clone, Debug, PartialEq)]
pub struct PreprocessReport {
    /// Over all files.
    pub rows: RowCounts,
    /// Events dropped because they repeat their predecessor's product.
    pub n_repeats: u64,
    /// Sessions of days that the extended folder holds already. They are left out.
    pub n_held: u64,
    /// Of these, sessions that the extended folder lacks.
    pub n_late: u64,
    /// Events of the fit, in the chosen days.
    pub n_events: u64,
    /// Sessions with such events.
    pub n_sessions: u64,
    /// Of these, sessions too short to be kept.
    pub n_short: u64,
    pub days: Vec<Day>,
    /// Distinct values of each encoded column, by [`Coded`].
    pub n_values: [usize; 7],
    pub out: PathBuf,
}

impl fmt::Display for PreprocessReport {
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

/// Turns events into sessions, and writes [`SESSIONS_BY_DAY`], [`WORKFLOW`], [`ITEMS`] and
/// [`SCHEMA`] to `out`.
///
/// `out` appears at the end; an error leaves it unchanged. `progress` receives lines about the
/// progress, and warnings. The work runs on rayon's current pool and on polars' own.
///
/// # Errors
/// Settings or input that are refused, and files that cannot be written: see [`Error`].
pub fn preprocess(
    options: &PreprocessOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<PreprocessReport, Error> {
    options.check()?;
    check_distinct(&options.events)?;
    for entry in [SESSIONS_BY_DAY, WORKFLOW, SCHEMA, ITEMS] {
        check_output(&options.events, &options.out.join(entry))?;
    }
    if options.extend {
        Base::check(&options.out)?;
    } else if options.settings.min_length == 1 {
        progress(
            "warning: sessions of one event are kept: a model that predicts the next item cannot \
             learn from them, and `bireme train` refuses them",
        );
    }
    let overwrite = options.overwrite || options.extend;
    let output = OutputFolder::create(&options.out, SESSIONS, overwrite, progress)?;
    let base = if options.extend { Some(Base::open(&options.out)?) } else { None };
    let settings = match &base {
        Some(base) => base.workflow.statistics.settings.clone(),
        None => options.settings.clone(),
    };
    let stages = Stages { options, settings, base, output: &output };

    let read = stages.read(progress)?;
    let n_parts = read.buckets.len();
    progress(&format!("sorting and counting {} events in {n_parts} parts", read.n_events));
    let fitted = stages.fit(read)?;
    let Fitted { n_sessions, n_short, days, .. } = &fitted;
    let (n_kept, n_days) = (n_sessions - n_short, days.len());
    progress(&format!("encoding and writing {n_kept} sessions of {n_days} days"));
    let days = stages.write_days(&fitted)?;
    progress("writing the workflow and the schema");
    stages.write_workflow(&fitted.workflow, &days)?;
    output.publish()?;
    let workflow = &fitted.workflow;
    Ok(PreprocessReport {
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

/// The folder that is extended.
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

    /// Puts the existing days into a new folder: as links, which take no room, or as copies.
    fn link_days(&self, into: &Path) -> Result<(), Error> {
        let from = self.dir.join(SESSIONS_BY_DAY);
        for day in fs::read_dir(&from).map_err(Error::io("read", &from))?.flatten() {
            let to = into.join(day.file_name());
            fs::create_dir(&to).map_err(Error::io("create", &to))?;
            for file in fs::read_dir(day.path()).map_err(Error::io("read", &day.path()))?.flatten()
            {
                let to = to.join(file.file_name());
                let linked = fs::hard_link(file.path(), &to)
                    .or_else(|_| fs::copy(file.path(), &to).map(drop));
                linked.map_err(Error::io("copy", &file.path()))?;
            }
        }
        Ok(())
    }

    /// Extends the ranges of floats by those of the existing days.
    fn widen(&self, schema: &mut Schema) -> Result<(), Error> {
        let before = Schema::read(self.dir.join(SCHEMA))?;
        for feature in &mut schema.features {
            let range = before.feature(&feature.name).map(|feature| &feature.domain);
            if let (Domain::Float(Some(now)), Some(Domain::Float(Some(then)))) =
                (&mut feature.domain, range)
            {
                *now = now.with(*then);
            }
        }
        Ok(())
    }
}

/// The three stages, in the order of their methods.
struct Stages<'a> {
    options: &'a PreprocessOptions,
    /// Those of `base` where it is extended.
    settings: Settings,
    base: Option<Base>,
    output: &'a OutputFolder,
}

struct ReadEvents {
    rows: RowCounts,
    n_events: u64,
    dictionaries: Dictionaries,
    /// By their codes.
    products: Vec<Product>,
    /// Seconds since 1970.
    first_event: i64,
    buckets: Vec<PathBuf>,
}

struct Fitted {
    workflow: Workflow,
    rows: RowCounts,
    n_repeats: u64,
    n_held: u64,
    n_late: u64,
    n_sessions: u64,
    n_short: u64,
    days: Vec<i64>,
    kept: Vec<KeptSessions>,
    /// By the session's code.
    session_counts: Vec<u32>,
}

impl Stages<'_> {
    /// Reads, checks and codes all events, and deals them to buckets by session.
    fn read(&self, progress: &mut dyn FnMut(&str)) -> Result<ReadEvents, Error> {
        let Self { options, base, .. } = self;
        let scratch = &self.output.scratch();
        let n_buckets = match options.n_buckets {
            Some(n_buckets) => n_buckets,
            None => suitable_buckets(&options.events)?,
        };
        let mut buckets = Buckets::create(scratch, n_buckets)?;
        let (mut dictionaries, mut products, mut extremes) = match base {
            Some(Base { workflow, last_day, .. }) => {
                let Statistics { n_events, first_event, .. } = workflow.statistics;
                let extremes = Extremes::extending(n_events, first_event, *last_day);
                (workflow.dictionaries(), workflow.products.clone(), extremes)
            }
            None => (Dictionaries::new(), vec![Product::UNSEEN], Extremes::default()),
        };
        let (mut first_event, mut n_events) = (i64::MAX, 0);
        let mut rows = RowCounts::default();
        for (file, path) in options.events.iter().enumerate() {
            let name = path.display();
            progress(&format!("reading {name}"));
            let mut n_reported = 0;
            let mut left_out = LeftOut::default();
            rows += events::read(path, options.bad_rows, scratch, &mut |batch| {
                extremes.add(file, &batch);
                left_out.add(&batch);
                let events = dictionaries.code(&batch);
                products.resize(dictionaries.get(Coded::Product).len() + 1, Product::UNSEEN);
                for event in &events {
                    first_event = first_event.min(event.seconds);
                    products[event.code(Coded::Product) as usize].see(event);
                }
                n_events += events.len() as u64;
                if n_events - n_reported >= 1_000_000 {
                    n_reported = n_events;
                    progress(&format!("reading {name}: {n_events} events"));
                }
                buckets.push(events)
            })?;
            if let Some(warning) = left_out.warning(path) {
                progress(&warning);
            }
        }
        if n_events == 0 {
            let problem = format!("none of {} rows is an event of a session", rows.read);
            return Err(Error::Nothing(problem));
        }
        if let Some(base) = base {
            first_event = base.workflow.statistics.first_event;
        }
        for warning in extremes.warnings(&options.events, first_event) {
            progress(&warning);
        }
        let buckets = buckets.finish()?;
        Ok(ReadEvents { rows, n_events, dictionaries, products, first_event, buckets })
    }

    /// Sorts the events bucket by bucket, counts and sums them, and keeps the sessions.
    fn fit(&self, read: ReadEvents) -> Result<Fitted, Error> {
        let ReadEvents { rows, dictionaries, products, first_event, buckets, .. } = read;
        let base = self.base.as_ref();
        let days = self.options.days.as_ref();
        let counts = ColumnCounts::new(&dictionaries);
        let sweep = Sweep {
            days,
            settings: &self.settings,
            products: &products,
            first_event,
            last_day: base.map_or(i64::MIN, |base| base.last_day),
            session_ids: base.map_or(&[], |base| base.workflow.vocabulary(Coded::Session).ids()),
            counts: &counts,
        };
        let mut total = Swept::default();
        let mut kept = Vec::with_capacity(buckets.len());
        let buckets: Vec<_> = buckets.iter().enumerate().collect();
        // A few at a time: each has sums by category, and there may be many categories.
        for buckets in buckets.chunks(4 * rayon::current_num_threads()) {
            let swept = buckets.par_iter().map(|(number, bucket)| {
                sweep.bucket(bucket, self.output.scratch().join(format!("sessions-{number}")))
            });
            for (swept, sessions) in swept.collect::<Result<Vec<_>, _>>()? {
                total.merge(&swept);
                kept.push(sessions);
            }
        }
        let mut days_with_sessions: Vec<i64> = kept.iter().flat_map(KeptSessions::days).collect();
        days_with_sessions.sort_unstable();
        days_with_sessions.dedup();
        if days_with_sessions.is_empty() {
            return Err(self.no_session());
        }
        let session_counts = counts.of(Coded::Session);
        let fit = Fit {
            base: base.map(|base| &base.workflow),
            settings: self.settings.clone(),
            first_event,
            days: days.map(|days| (*days.start(), *days.end())),
            dictionaries,
            products,
        };
        let Swept { sums, n_repeats, n_held, n_late, n_sessions, n_short } = total;
        Ok(Fitted {
            workflow: fit.workflow(counts, &sums),
            rows,
            n_repeats,
            n_held,
            n_late,
            n_sessions,
            n_short,
            days: days_with_sessions,
            kept,
            session_counts,
        })
    }

    fn no_session(&self) -> Error {
        let n = self.settings.min_length;
        let days = match &self.options.days {
            Some(days) => format!(" in days {}..{}", days.start(), days.end()),
            None => String::new(),
        };
        let later = match &self.base {
            Some(base) => format!(" and begins after day {}", base.last_day),
            None => String::new(),
        };
        Error::Nothing(format!("no session has {n} events or more{later}{days}"))
    }

    /// Encodes the sessions and writes them day by day.
    fn write_days(&self, fitted: &Fitted) -> Result<Vec<Day>, Error> {
        let dir = self.output.path().join(SESSIONS_BY_DAY);
        fs::create_dir(&dir).map_err(Error::io("create", &dir))?;
        if let Some(base) = &self.base {
            base.link_days(&dir)?;
        }
        let workflow = &fitted.workflow;
        let writer = DayWriter {
            dir: &dir,
            kept: &fitted.kept,
            encoder: &workflow.encoder(),
            session_ids: workflow.vocabulary(Coded::Session).dictionary(),
            counts: &fitted.session_counts,
            seed: self.settings.seed,
        };
        fitted.days.par_iter().map(|day| writer.write(*day)).collect()
    }

    fn write_workflow(&self, workflow: &Workflow, days: &[Day]) -> Result<(), Error> {
        let dir = self.output.path().join(WORKFLOW);
        fs::create_dir(&dir).map_err(Error::io("create", &dir))?;
        workflow.save(&dir)?;
        write_table(workflow.item_table()?, &self.output.path().join(ITEMS))?;
        let mut schema = schema(workflow, days);
        if let Some(base) = &self.base {
            base.widen(&mut schema)?;
        }
        Ok(schema.write(self.output.path().join(SCHEMA))?)
    }
}

/// The bad rows of a file that are left out, and the numbers of the first of them.
#[derive(Default)]
struct LeftOut {
    n_rows: usize,
    first: Vec<u64>,
    /// `line` or `row`.
    unit: &'static str,
}

impl LeftOut {
    /// Rows that the warning names.
    const NAMED: usize = 10;

    fn add(&mut self, batch: &EventBatch) {
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
            format!(
                "warning: `{}`: left out {unit}{plural} {}{more}",
                path.display(),
                places.join(", ")
            )
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

/// The second stage's work on each bucket.
struct Sweep<'a> {
    /// Calendar days in UTC, from 1; `None`: all.
    days: Option<&'a RangeInclusive<i64>>,
    settings: &'a Settings,
    /// By code.
    products: &'a [Product],
    first_event: i64,
    /// Sessions up to this day are in the extended folder already.
    last_day: i64,
    /// The ids of the sessions in the extended folder, by code.
    session_ids: &'a [u32],
    counts: &'a ColumnCounts,
}

/// Sums and counts over one or more buckets; the counts are those of [`PreprocessReport`].
#[derive(Default)]
struct Swept {
    sums: Sums,
    n_repeats: u64,
    n_held: u64,
    n_late: u64,
    n_sessions: u64,
    n_short: u64,
}

impl Swept {
    fn merge(&mut self, other: &Self) {
        self.sums.merge(&other.sums);
        self.n_repeats += other.n_repeats;
        self.n_held += other.n_held;
        self.n_late += other.n_late;
        self.n_sessions += other.n_sessions;
        self.n_short += other.n_short;
    }
}

impl Sweep<'_> {
    /// Reads a bucket and removes it. Writes the sessions that are kept to `sessions_path`.
    fn bucket(
        &self,
        bucket: &Path,
        sessions_path: PathBuf,
    ) -> Result<(Swept, KeptSessions), Error> {
        let mut events = read_events(bucket)?;
        fs::remove_file(bucket).map_err(Error::io("remove", bucket))?;
        let n_repeats = sort_and_drop_repeats(&mut events) as u64;
        // After the repeats, because an event may repeat one of a day that is not used.
        events.retain(|event| self.is_used(event));

        let mut swept = Swept { n_repeats, ..Swept::default() };
        let mut kept = Vec::new();
        let &Settings { max_length, min_length, keep, .. } = self.settings;
        for events in sessions(&events) {
            let day_index = (events[0].seconds - self.first_event).div_euclid(DAY) + 1;
            if day_index <= self.last_day {
                swept.n_held += 1;
                let id = self.session_ids.get(events[0].code(Coded::Session) as usize);
                swept.n_late += u64::from(id.is_none_or(|&id| id == Vocabulary::UNKNOWN));
                continue;
            }
            for event in events {
                swept.sums.add(event, self.products, self.counts);
            }
            swept.n_sessions += 1;
            if events.len() < min_length {
                swept.n_short += 1;
            } else {
                kept.push((day_index, keep.cut(events, max_length)));
            }
        }
        Ok((swept, KeptSessions::write(sessions_path, kept)?))
    }

    fn is_used(&self, event: &Event) -> bool {
        let calendar_day = event.seconds.div_euclid(DAY) - self.first_event.div_euclid(DAY) + 1;
        self.days.is_none_or(|days| days.contains(&calendar_day))
    }
}

/// The schema of the sessions, with the features and tags of the tutorial's schema.
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
