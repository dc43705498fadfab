//! What a fit has learnt from the events, and its application to the same or to new ones.
//!
//! [`preprocess`](crate::preprocess) fits; everything here only applies. What training and serving encode goes
//! through the same `Encoder`, whether the events were just fitted or came in a request.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

use polars::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::events::{BadRows, RowCounts, clean};
use crate::hash::hash_of;
use crate::schema::{event, session};
use crate::sessions::{DAY, Dictionaries, Event, Keep, sessions, sort_and_drop_repeats};
use crate::time::EventTime;
use crate::vocab::{Coded, Dictionary, Value, Vocabulary, ints, read_parquet};

/// How sessions are made; a workflow keeps what it was fitted with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Events of a session that are kept at most.
    pub max_length: usize,
    /// Events that a session needs, repeats not counted, to be kept at all.
    pub min_length: usize,
    /// Which events of a longer session are kept.
    pub keep: Keep,
    /// Seed of the hash that deals sessions to train, valid and test.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { max_length: 20, min_length: 2, keep: Keep::First, seed: 42 }
    }
}

/// Mean and standard deviation of a column's logarithms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Normal {
    /// The mean.
    pub mean: f64,
    /// The standard deviation with n - 1; 0 when there is nothing to deviate from.
    pub std: f64,
}

impl Normal {
    /// `(x - mean) / std`, or `x - mean` where the deviation is zero.
    fn apply(self, x: f32) -> f32 {
        let centred = f64::from(x) - self.mean;
        (if self.std > 0.0 { centred / self.std } else { centred }) as f32
    }
}

/// What a fit has counted and averaged: `statistics.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// The version of the files' layout.
    pub format: u32,
    /// The version of this program that wrote them.
    pub written_by: String,
    /// What the sessions were made with.
    pub settings: Settings,
    /// Seconds since 1970 of the first event that belongs to a session: `day_index` counts from here.
    pub first_event: i64,
    /// First and last day of `--days`, if only these were used.
    pub days: Option<(i64, i64)>,
    /// Events that the statistics are over, repeats not counted.
    pub n_events: u64,
    /// Of ln(price + 1).
    pub price_log: Normal,
    /// Of ln(days since the product was first seen + 1).
    pub recency_log: Normal,
}

/// The layout of the files that this version writes and reads.
pub(crate) const FORMAT: u32 = 3;
pub(crate) const STATISTICS: &str = "statistics.json";
const PRODUCTS: &str = "products.parquet";
const CATEGORIES: &str = "categories.parquet";
const FIRST_SEEN: &str = "first_event_time_ts";
const LAST_SEEN: &str = "last_event_time_ts";
/// Only in tables of data whose times have fractions of a second.
const LAST_SEEN_NANOS: &str = "last_event_time_nanos";
const MEAN_PRICE: &str = "price_mean";

/// A fitted workflow.
#[derive(Clone, Debug)]
pub struct Workflow {
    /// What was counted and averaged.
    pub statistics: Statistics,
    vocabularies: [Vocabulary; 7],
    /// By the code of the product in its vocabulary, also of products outside the fitted days.
    products: Vec<Product>,
    /// By the code of the category in its vocabulary; NaN where there is none.
    mean_price: Vec<f64>,
}

/// When a product was first seen, and what its latest event said of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    /// Seconds since 1970; [`NEVER_SEEN`] of a product without events.
    pub first_seen: i64,
    last_seen: EventTime,
    price: f64,
    /// Codes of [`Coded::Category`], [`Coded::CategoryCode`] and [`Coded::Brand`].
    codes: [u32; 3],
}

/// The columns behind [`Product::codes`].
const DESCRIBED: [Coded; 3] = [Coded::Category, Coded::CategoryCode, Coded::Brand];

impl Product {
    /// Nothing is known of it.
    pub const UNSEEN: Self = Self {
        first_seen: NEVER_SEEN,
        last_seen: EventTime::MIN,
        price: f64::NAN,
        codes: [Dictionary::NULL; 3],
    };

    /// Takes in one of its events; of several of the same time the later call counts.
    pub fn see(&mut self, event: &Event) {
        self.first_seen = self.first_seen.min(event.seconds);
        if event.time() >= self.last_seen {
            self.last_seen = event.time();
            self.price = event.price;
            self.codes = DESCRIBED.map(|column| event.code(column));
        }
    }
}

/// A product in words, as its latest event described it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProductInWords<'a> {
    /// Its id in the events.
    pub product_id: i64,
    /// Its category's path, where there is one.
    pub category_code: Option<&'a str>,
    /// Its brand, where there is one.
    pub brand: Option<&'a str>,
    /// Its price.
    pub price: f64,
}

/// Sessions in the form that a model reads.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The original id of each row's session.
    pub session_ids: Vec<String>,
    /// One row per session, columns as [`crate::schema::session`].
    pub sessions: DataFrame,
    /// The distinct items of each session, those of events that were cut off included.
    pub seen: Vec<Vec<i64>>,
}

impl Workflow {
    pub(crate) fn new(
        statistics: Statistics,
        vocabularies: [Vocabulary; 7],
        products: Vec<Product>,
        mean_price: Vec<f64>,
    ) -> Self {
        Self { statistics, vocabularies, products, mean_price }
    }

    /// The same without the ids of sessions and users, which no model reads and a server has no use for.
    pub fn without_visitors(mut self) -> Self {
        for column in VISITORS {
            self.vocabularies[column as usize] = Vocabulary::empty(column);
        }
        self
    }

    /// A column's values and ids.
    pub fn vocabulary(&self, column: Coded) -> &Vocabulary {
        &self.vocabularies[column as usize]
    }

    /// Seconds since 1970 of a product's first event, whatever the fitted days.
    pub fn first_seen(&self, product: i64) -> Option<i64> {
        let code = self.vocabulary(Coded::Product).code(Value::Int(product))?;
        Some(self.products[code as usize].first_seen)
    }

    /// What is known of a product, whatever the fitted days.
    pub fn product(&self, product_id: i64) -> Option<ProductInWords<'_>> {
        let code = self.vocabulary(Coded::Product).code(Value::Int(product_id))?;
        let Product { price, codes: [_, category_code, brand], .. } = self.products[code as usize];
        let text = |column: Coded, code: u32| match code {
            Dictionary::NULL => None,
            code => match self.vocabulary(column).dictionary().value(code) {
                Value::Text(text) => Some(text),
                Value::Int(_) => None,
            },
        };
        Some(ProductInWords {
            product_id,
            category_code: text(Coded::CategoryCode, category_code),
            brand: text(Coded::Brand, brand),
            price,
        })
    }

    /// The mean price of a category's events.
    pub fn mean_price(&self, category: i64) -> Option<f64> {
        let code = self.vocabulary(Coded::Category).code(Value::Int(category))?;
        self.mean_price_of_code(code as usize)
    }

    /// The same by the category's code in its vocabulary.
    pub(crate) fn mean_price_of_code(&self, code: usize) -> Option<f64> {
        self.mean_price.get(code).copied().filter(|mean| !mean.is_nan())
    }

    /// The dictionaries that new events are coded with to extend the fit, and the products by their codes.
    pub(crate) fn to_extend(&self) -> (Dictionaries, Vec<Product>) {
        (Dictionaries::of(&self.vocabularies), self.products.clone())
    }

    /// Encodes new events: rows without a session are dropped, sessions sorted by time, repeats dropped, longer
    /// ones cut and shorter ones left out as `settings` say. Sessions come in the order in which they first appear. What the fit has not seen gets id 1, a recency of 0 and a relative price of 0.
    ///
    /// `events` has the columns of [`crate::schema::event`], as text or in their own types.
    ///
    /// # Errors
    /// A missing column, one of a wrong type, a row that cannot be read.
    pub fn apply(&self, events: &DataFrame, settings: &Settings) -> Result<Applied, Error> {
        let batch = clean(events, Path::new("events"), BadRows::Refuse, &mut RowCounts::default())?;
        let mut dictionaries = Dictionaries::new();
        let mut events = dictionaries.code(&batch);
        sort_and_drop_repeats(&mut events);
        let &Settings { max_length, min_length, keep, .. } = settings;
        let whole: Vec<&[Event]> = sessions(&events).filter(|events| events.len() >= min_length).collect();
        let kept =
            whole.iter().map(|events| Session { count: events.len(), events: keep.cut(events, max_length) });
        let kept: Vec<Session<'_>> = kept.collect();
        let encoder = self.encoder_for(&dictionaries);
        let session_ids = kept.iter().map(|session| {
            match dictionaries.get(Coded::Session).value(session.events[0].code(Coded::Session)) {
                Value::Text(id) => id.to_owned(),
                Value::Int(id) => id.to_string(),
            }
        });
        let seen = whole.iter().map(|events| {
            let mut items: Vec<i64> =
                events.iter().map(|event| i64::from(encoder.id(event, Coded::Product))).collect();
            items.sort_unstable();
            items.dedup();
            items
        });
        Ok(Applied {
            session_ids: session_ids.collect(),
            sessions: encoder.sessions(&kept)?,
            seen: seen.collect(),
        })
    }

    /// An encoder of events that are coded by this workflow's own dictionaries.
    pub(crate) fn encoder(&self) -> Encoder<'_> {
        Encoder {
            statistics: &self.statistics,
            ids: self.vocabularies.each_ref().map(|vocabulary| Cow::Borrowed(vocabulary.ids())),
            first_seen: self.products.iter().map(|product| product.first_seen).collect(),
            mean_price: Cow::Borrowed(&self.mean_price),
        }
    }

    /// An encoder of events that are coded by other dictionaries.
    fn encoder_for(&self, dictionaries: &Dictionaries) -> Encoder<'_> {
        // Every distinct value is looked up once, not every event.
        let own_codes = Coded::ALL.map(|column| -> Vec<Option<u32>> {
            let (dictionary, vocabulary) = (dictionaries.get(column), self.vocabulary(column));
            let codes = (1..=dictionary.len() as u32).map(|code| vocabulary.code(dictionary.value(code)));
            std::iter::once(None).chain(codes).collect()
        });
        fn by_code<T: Copy>(own_codes: &[Option<u32>], values: &[T], unknown: T) -> Vec<T> {
            own_codes.iter().map(|code| code.map_or(unknown, |code| values[code as usize])).collect()
        }
        let products = by_code(&own_codes[Coded::Product as usize], &self.products, Product::UNSEEN);
        Encoder {
            statistics: &self.statistics,
            ids: Coded::ALL.map(|column| {
                let ids = self.vocabulary(column).ids();
                Cow::Owned(by_code(&own_codes[column as usize], ids, Vocabulary::UNKNOWN))
            }),
            first_seen: products.iter().map(|product| product.first_seen).collect(),
            mean_price: Cow::Owned(by_code(&own_codes[Coded::Category as usize], &self.mean_price, f64::NAN)),
        }
    }

    /// Writes the workflow into a folder, which must be there: `statistics.json`, `vocabulary/<column>.parquet`,
    /// `products.parquet` (when each was first seen, and what its latest event said) and `categories.parquet` (mean
    /// prices).
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        let vocabularies = dir.join("vocabulary");
        fs::create_dir_all(&vocabularies).map_err(Error::io("create", &vocabularies))?;
        for vocabulary in self.vocabularies.iter().filter(|vocabulary| !is_left_out(vocabulary)) {
            vocabulary.write(&vocabulary_path(dir, vocabulary.column()))?;
        }
        let products = self.table::<Product>(Coded::Product, &self.products, |products| {
            let value = |number: usize, product: &Product| {
                let code = product.codes[number];
                (code != Dictionary::NULL)
                    .then(|| self.vocabulary(DESCRIBED[number]).dictionary().value(code))
            };
            let texts = |number: usize| {
                let texts = products.iter().map(|product| value(number, product).map(text));
                StringChunked::from_iter_options(DESCRIBED[number].name().into(), texts).into_column()
            };
            let categories = products.iter().map(|product| value(0, product).map(int));
            let numbers = |name: &str, number: fn(&Product) -> i64| {
                Column::new(name.into(), products.iter().map(number).collect::<Vec<_>>())
            };
            let prices: Vec<f64> = products.iter().map(|product| product.price).collect();
            let mut columns = vec![
                numbers(FIRST_SEEN, |product| product.first_seen),
                numbers(LAST_SEEN, |product| product.last_seen.seconds),
                Int64Chunked::from_iter_options(event::CATEGORY.into(), categories).into_column(),
                texts(1),
                texts(2),
                Column::new(event::PRICE.into(), prices),
            ];
            if products.iter().any(|product| product.last_seen.nanos > 0) {
                columns.push(numbers(LAST_SEEN_NANOS, |product| i64::from(product.last_seen.nanos)));
            }
            columns
        })?;
        write_parquet(products, &dir.join(PRODUCTS))?;
        let mean_price = |means| vec![Column::new(MEAN_PRICE.into(), means)];
        let categories = self.table::<f64>(Coded::Category, &self.mean_price, mean_price)?;
        write_parquet(categories, &dir.join(CATEGORIES))?;
        let path = dir.join(STATISTICS);
        let mut files = BTreeMap::new();
        for file in files_of_tables().filter(|file| dir.join(file).exists()) {
            let path = dir.join(&file);
            let hash = hash_of(&path).map_err(Error::io("read", &path))?;
            files.insert(file, hash);
        }
        let saved = Saved { statistics: &self.statistics, files };
        let text = serde_json::to_string_pretty(&saved).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text + "\n")).map_err(Error::io("write", &path))
    }

    /// A table of a column's values in ascending order, beside what is known of each.
    fn table<T: Copy>(
        &self,
        column: Coded,
        known: &[T],
        beside: impl FnOnce(Vec<T>) -> Vec<Column>,
    ) -> PolarsResult<DataFrame> {
        let dictionary = self.vocabulary(column).dictionary();
        let mut rows: Vec<(i64, T)> = (1..=dictionary.len() as u32)
            .map(|code| (int(dictionary.value(code)), known[code as usize]))
            .collect();
        rows.sort_unstable_by_key(|(value, _)| *value);
        let (values, known): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        let n_rows = values.len();
        let mut columns = vec![Column::new(column.name().into(), values)];
        columns.extend(beside(known));
        DataFrame::new(n_rows, columns)
    }

    /// Reads what [`Workflow::save`] wrote.
    ///
    /// # Errors
    /// A file that is missing or broken, or of a version that this program does not know.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(STATISTICS);
        let broken = |problem: String| Error::Workflow { path: path.clone(), problem };
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| broken(e.to_string()))?;
        // The version first: another version's file may have other keys.
        let Versioned { format } = Versioned::deserialize(&json).map_err(|e| broken(e.to_string()))?;
        if format != FORMAT {
            return Err(broken(format!("its format is {format}, and this version knows {FORMAT}")));
        }
        let Saved { statistics, files } = Saved::deserialize(json).map_err(|e| broken(e.to_string()))?;
        for file in files_of_tables() {
            let path = dir.join(&file);
            let is_left_out = VISITORS.iter().any(|&column| file == file_of(column)) && !path.exists();
            // The reader of parquet takes metadata on trust: what a disk has changed might stop the program.
            let hash = || hash_of(&path).map_err(Error::io("read", &path));
            if !is_left_out && files.get(&file) != Some(&hash()?) {
                let problem = "it is not what was saved: its hash is another".to_owned();
                return Err(Error::Workflow { path, problem });
            }
        }
        let mut vocabularies = Vec::with_capacity(Coded::ALL.len());
        for column in Coded::ALL {
            let path = vocabulary_path(dir, column);
            vocabularies.push(match VISITORS.contains(&column) && !path.exists() {
                true => Vocabulary::empty(column),
                false => Vocabulary::read(&path, column)?,
            });
        }
        let mut vocabularies: [_; 7] = vocabularies.try_into().unwrap_or_else(|_| unreachable!());

        let path = dir.join(PRODUCTS);
        let table = read_parquet(&path)?;
        let described = read_products(&table, &path, &mut vocabularies)?;
        let ids = ints(&table, event::PRODUCT, &path)?;
        let products = by_code(&mut vocabularies[Coded::Product as usize], &ids, described, Product::UNSEEN);

        let path = dir.join(CATEGORIES);
        let table = read_parquet(&path)?;
        let means = floats(&table, MEAN_PRICE, &path)?;
        let categories = ints(&table, event::CATEGORY, &path)?;
        let mean_price = by_code(&mut vocabularies[Coded::Category as usize], &categories, means, f64::NAN);
        Ok(Self { statistics, vocabularies, products, mean_price })
    }
}

/// The rows of `products.parquet`; values without an id get their codes now.
fn read_products(
    table: &DataFrame,
    path: &Path,
    vocabularies: &mut [Vocabulary; 7],
) -> Result<Vec<Product>, Error> {
    let mut codes = Vec::with_capacity(DESCRIBED.len());
    for column in DESCRIBED {
        let vocabulary = &mut vocabularies[column as usize];
        let mut code =
            |value: Option<Value<'_>>| value.map_or(Dictionary::NULL, |value| vocabulary.add_unknown(value));
        let mut read = || -> PolarsResult<Vec<u32>> {
            let cells = table.column(column.name())?;
            Ok(if column.is_int() {
                cells.i64()?.iter().map(|cell| code(cell.map(Value::Int))).collect()
            } else {
                cells.str()?.iter().map(|cell| code(cell.map(Value::Text))).collect()
            })
        };
        codes.push(read().map_err(|e| Error::Workflow { path: path.into(), problem: e.to_string() })?);
    }
    let (first, last) = (ints(table, FIRST_SEEN, path)?, ints(table, LAST_SEEN, path)?);
    let nanos = match table.column(LAST_SEEN_NANOS) {
        Ok(_) => ints(table, LAST_SEEN_NANOS, path)?,
        Err(_) => vec![0; last.len()],
    };
    let prices = floats(table, event::PRICE, path)?;
    let row = |row: usize| Product {
        first_seen: first[row],
        last_seen: EventTime { seconds: last[row], nanos: nanos[row] as u32 },
        price: prices[row],
        codes: [codes[0][row], codes[1][row], codes[2][row]],
    };
    Ok((0..first.len()).map(row).collect())
}

/// A column of a table of ours that holds floats; NaN for null.
fn floats(table: &DataFrame, name: &str, path: &Path) -> Result<Vec<f64>, Error> {
    let values = table.column(name).and_then(|column| {
        Ok(column.f64()?.iter().map(|value| value.unwrap_or(f64::NAN)).collect::<Vec<_>>())
    });
    values.map_err(|e| Error::Workflow { path: path.into(), problem: e.to_string() })
}

/// The columns that tell who it was. A workflow may be without their values.
const VISITORS: [Coded; 2] = [Coded::User, Coded::Session];

fn is_left_out(vocabulary: &Vocabulary) -> bool {
    VISITORS.contains(&vocabulary.column()) && vocabulary.is_empty()
}

/// Copies what [`Workflow::save`] wrote into a folder, which must be there, but not the visitors' ids.
///
/// # Errors
/// A file that cannot be read or written.
pub fn copy_without_visitors(from: &Path, to: &Path) -> Result<(), Error> {
    let vocabularies = to.join("vocabulary");
    fs::create_dir_all(&vocabularies).map_err(Error::io("create", &vocabularies))?;
    let of_visitors = VISITORS.map(file_of);
    let files = files_of_tables().filter(|file| !of_visitors.contains(file));
    for file in files.chain([STATISTICS.to_owned()]) {
        fs::copy(from.join(&file), to.join(&file)).map_err(Error::io("copy", &from.join(&file)))?;
    }
    Ok(())
}

#[derive(Deserialize)]
struct Versioned {
    format: u32,
}

/// `statistics.json`.
#[derive(Serialize, Deserialize)]
struct Saved<S> {
    #[serde(flatten)]
    statistics: S,
    /// Each table's hash, by its path in the folder.
    files: BTreeMap<String, String>,
}

fn file_of(column: Coded) -> String {
    format!("vocabulary/{}.parquet", column.name())
}

/// The paths of all tables, in the folder.
fn files_of_tables() -> impl Iterator<Item = String> {
    Coded::ALL.into_iter().map(file_of).chain([PRODUCTS, CATEGORIES].map(str::to_owned))
}

/// Spreads a table's column over the codes of its values; a value that has no id gets its code now.
fn by_code<T: Copy>(vocabulary: &mut Vocabulary, values: &[i64], known: Vec<T>, unknown: T) -> Vec<T> {
    let mut spread = vec![unknown; vocabulary.ids().len()];
    for (value, known) in values.iter().zip(known) {
        let code = vocabulary.add_unknown(Value::Int(*value)) as usize;
        spread.resize(spread.len().max(code + 1), unknown);
        spread[code] = known;
    }
    spread
}

fn vocabulary_path(dir: &Path, column: Coded) -> std::path::PathBuf {
    dir.join(file_of(column))
}

fn write_parquet(mut table: DataFrame, path: &Path) -> Result<(), Error> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    let written = ParquetWriter::new(BufWriter::new(file)).finish(&mut table);
    written.map(drop).map_err(Error::parquet("write", path))
}

fn int(value: Value<'_>) -> i64 {
    match value {
        Value::Int(value) => value,
        Value::Text(_) => unreachable!("products and categories are integers"),
    }
}

fn text(value: Value<'_>) -> &str {
    match value {
        Value::Text(value) => value,
        Value::Int(_) => unreachable!("category codes and brands are texts"),
    }
}

/// The first time of a product that was never seen: then its events are its first, and its age is 0.
pub(crate) const NEVER_SEEN: i64 = i64::MAX;

/// ln(x + 1), in float32 throughout, as the original does it.
pub(crate) fn log(x: f64) -> f32 {
    (x as f32 + 1.0).ln()
}

/// Days since a product was first seen; 0 for events before that.
pub(crate) fn recency_days(time: i64, first_seen: i64) -> f64 {
    if time > first_seen { (time - first_seen) as f64 / DAY as f64 } else { 0.0 }
}

/// Sine and cosine of the weekday of a time, Monday first.
fn weekday(time: i64) -> (f32, f32) {
    // 1 January 1970 was a Thursday.
    let monday_based = (time.div_euclid(DAY) + 3).rem_euclid(7);
    let angle = std::f64::consts::TAU * ((monday_based + 1) as f64 + 1e-6) / 7.0;
    (angle.sin() as f32, angle.cos() as f32)
}

/// The price's distance from its category's mean, in means; 0 where no mean is known.
fn relative_price(price: f64, mean: f64) -> f64 {
    if mean > 0.0 { (price - mean) / (mean + 1e-5) } else { 0.0 }
}

/// A session that is to be encoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Session<'a> {
    /// What is kept of it, at least one event.
    pub events: &'a [Event],
    /// How many events it had before it was cut.
    pub count: usize,
}

/// Coded events to what a model reads.
#[derive(Debug)]
pub(crate) struct Encoder<'a> {
    statistics: &'a Statistics,
    /// By [`Coded`], then by code.
    ids: [Cow<'a, [u32]>; 7],
    /// By the code of the product.
    first_seen: Vec<i64>,
    /// By the code of the category.
    mean_price: Cow<'a, [f64]>,
}

impl Encoder<'_> {
    /// The id of an event's value.
    pub fn id(&self, event: &Event, column: Coded) -> u32 {
        self.ids[column as usize][event.code(column) as usize]
    }

    /// One row per session, in their order, columns as [`crate::schema::session`].
    pub fn sessions(&self, rows: &[Session<'_>]) -> PolarsResult<DataFrame> {
        let n_values = rows.iter().map(|row| row.events.len()).sum();
        let Statistics { price_log, recency_log, .. } = *self.statistics;
        let weekdays: [(f32, f32); 7] = std::array::from_fn(|day| weekday(day as i64 * DAY));
        let weekday = |e: &Event| weekdays[e.seconds.div_euclid(DAY).rem_euclid(7) as usize];
        let ids = |name: &str, column: Coded| {
            list::<Int64Type>(name, rows, n_values, |e| i64::from(self.id(e, column)))
        };
        let session_ids = rows.iter().map(|row| i64::from(self.id(&row.events[0], Coded::Session)));
        let columns = vec![
            Column::new(session::SESSION.into(), session_ids.collect::<Vec<_>>()),
            Column::new(session::COUNT.into(), rows.iter().map(|row| row.count as i64).collect::<Vec<_>>()),
            ids(session::PRODUCT, Coded::Product),
            ids(session::CATEGORY_CODE, Coded::CategoryCode),
            ids(session::EVENT_TYPE, Coded::EventType),
            ids(session::BRAND, Coded::Brand),
            ids(session::CATEGORY, Coded::Category),
            list::<Float32Type>(session::WEEKDAY_SIN, rows, n_values, |e| weekday(e).0),
            list::<Float32Type>(session::WEEKDAY_COS, rows, n_values, |e| weekday(e).1),
            list::<Float32Type>(session::PRICE, rows, n_values, |e| price_log.apply(log(e.price))),
            list::<Float64Type>(session::RELATIVE_PRICE, rows, n_values, |e| {
                relative_price(e.price, self.mean_price[e.code(Coded::Category) as usize])
            }),
            list::<Float32Type>(session::RECENCY, rows, n_values, |e| {
                let first_seen = self.first_seen[e.code(Coded::Product) as usize];
                recency_log.apply(log(recency_days(e.seconds, first_seen)))
            }),
        ];
        DataFrame::new(rows.len(), columns)
    }
}

/// A column with one value for each event of each session.
fn list<T: PolarsNumericType>(
    name: &str,
    rows: &[Session<'_>],
    n_values: usize,
    value: impl Fn(&Event) -> T::Native,
) -> Column {
    let mut lists =
        ListPrimitiveChunkedBuilder::<T>::new(name.into(), rows.len(), n_values, T::get_static_dtype());
    let mut values = Vec::new();
    for row in rows {
        values.clear();
        values.extend(row.events.iter().map(&value));
        lists.append_slice(&values);
    }
    lists.finish().into_column()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weekdays_start_on_monday_at_one_seventh() {
        // 2019-10-01 was a Tuesday, 2019-10-06 a Sunday.
        let (sin, cos) = weekday(1_569_888_000);
        assert!((sin - 0.974_927_7).abs() < 1e-6 && (cos + 0.222_521_8).abs() < 1e-6, "{sin} {cos}");
        let (sin, cos) = weekday(1_570_320_000);
        assert!((sin - 8.975_979e-7).abs() < 1e-9 && (cos - 1.0).abs() < 1e-6, "{sin} {cos}");
    }

    #[test]
    fn what_is_unknown_is_neutral() {
        assert_eq!(relative_price(10.0, f64::NAN), 0.0);
        assert_eq!(relative_price(10.0, 0.0), 0.0);
        assert_eq!(recency_days(5, NEVER_SEEN), 0.0);
        assert_eq!(recency_days(5, 6).to_bits(), 0.0_f64.to_bits());
        assert_eq!(Normal { mean: 1.0, std: 0.0 }.apply(3.0), 2.0);
    }
}
