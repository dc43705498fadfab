//! The fitted preprocessing, and its application to events.
//!
//! [`preprocess`](crate::preprocess) fits; everything here only applies. Training and serving
//! encode sessions through the same `Encoder`.

use std::borrow::Cow;
use std::path::Path;

use polars::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::events::{BadRows, RowCounts, clean};
use crate::schema::session;
use crate::sessions::{DAY, Dictionaries, Event, Keep, sessions, sort_and_drop_repeats};
use crate::time::EventTime;
use crate::vocab::{Coded, ColumnValue, Dictionary, Vocabulary};

/// How sessions are made; a workflow keeps what it was fitted with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The most events of a session that are kept.
    pub max_length: usize,
    /// The fewest events, without repeats, of a session that is kept.
    pub min_length: usize,
    /// Which events of a longer session are kept.
    pub keep: Keep,
    /// Seed of the hash that assigns sessions to train, valid and test.
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
    pub mean: f64,
    /// With n - 1; 0 for a single value.
    pub std: f64,
}

impl Normal {
    /// `(x - mean) / std`, or `x - mean` where the deviation is zero.
    fn apply(self, x: f32) -> f32 {
        let centred = f64::from(x) - self.mean;
        (if self.std > 0.0 { centred / self.std } else { centred }) as f32
    }
}

/// The counts and means of a fit: `statistics.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// The version of the files' layout.
    pub format: u32,
    /// The version of this program that wrote them.
    pub written_by: String,
    pub settings: Settings,
    /// Seconds since 1970 of the first event of a session; `day_index` counts from here.
    pub first_event: i64,
    /// First and last day of `--days`; `None` if all days were used.
    pub days: Option<(i64, i64)>,
    /// The number of events, without repeats, in the statistics.
    pub n_events: u64,
    /// Of ln(price + 1).
    pub price_log: Normal,
    /// Of ln(days since the product was first seen + 1).
    pub recency_log: Normal,
}

#[derive(Clone, Debug)]
pub struct Workflow {
    pub statistics: Statistics,
    /// By [`Coded`].
    pub(crate) vocabularies: [Vocabulary; 7],
    /// By the product's code in its vocabulary, also of products outside the fitted days.
    pub(crate) products: Vec<Product>,
    /// By the category's code in its vocabulary; NaN where it has no events.
    pub(crate) mean_price: Vec<f64>,
}

/// The columns that identify people. A workflow may lack their values.
pub(crate) const VISITORS: [Coded; 2] = [Coded::User, Coded::Session];

/// A product's first event, and its description by its latest event.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    /// Seconds since 1970; [`NEVER_SEEN`] of a product without events.
    pub first_seen: i64,
    pub last_seen: EventTime,
    pub price: f64,
    /// By [`DESCRIBED`].
    pub codes: [u32; 3],
}

/// The columns whose latest values a workflow keeps for each product.
pub(crate) const DESCRIBED: [Coded; 3] = [Coded::Category, Coded::CategoryCode, Coded::Brand];

impl Product {
    pub const UNSEEN: Self = Self {
        first_seen: NEVER_SEEN,
        last_seen: EventTime::MIN,
        price: f64::NAN,
        codes: [Dictionary::NULL; 3],
    };

    /// Takes in one of the product's events. Of several events of the same time, the last call
    /// describes the product.
    pub fn see(&mut self, event: &Event) {
        self.first_seen = self.first_seen.min(event.seconds);
        if event.time() >= self.last_seen {
            self.last_seen = event.time();
            self.price = event.price;
            self.codes = DESCRIBED.map(|column| event.code(column));
        }
    }
}

/// A product as its latest event describes it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProductInWords<'a> {
    pub product_id: i64,
    pub category_code: Option<&'a str>,
    pub brand: Option<&'a str>,
    pub price: f64,
}

/// Encoded sessions, as a model reads them.
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
    /// Removes the ids of sessions and users, which neither models nor servers need.
    pub fn without_visitors(mut self) -> Self {
        for column in VISITORS {
            self.vocabularies[column as usize] = Vocabulary::empty(column);
        }
        self
    }

    pub fn vocabulary(&self, column: Coded) -> &Vocabulary {
        &self.vocabularies[column as usize]
    }

    /// Seconds since 1970 of a product's first event, on any day.
    pub fn first_seen(&self, product: i64) -> Option<i64> {
        let code = self.vocabulary(Coded::Product).code(ColumnValue::Int(product))?;
        Some(self.products[code as usize].first_seen)
    }

    /// The description of a product with an event on any day.
    pub fn product(&self, product_id: i64) -> Option<ProductInWords<'_>> {
        let code = self.vocabulary(Coded::Product).code(ColumnValue::Int(product_id))?;
        let Product { price, codes: [_, category_code, brand], .. } = self.products[code as usize];
        let text = |column: Coded, code: u32| {
            self.vocabulary(column).dictionary().cell(code).and_then(ColumnValue::as_text)
        };
        Some(ProductInWords {
            product_id,
            category_code: text(Coded::CategoryCode, category_code),
            brand: text(Coded::Brand, brand),
            price,
        })
    }

    /// The mean price over a category's events.
    pub fn mean_price(&self, category: i64) -> Option<f64> {
        let code = self.vocabulary(Coded::Category).code(ColumnValue::Int(category))?;
        self.mean_price_of_code(code as usize)
    }

    /// [`Workflow::mean_price`] by the category's code in its vocabulary.
    pub(crate) fn mean_price_of_code(&self, code: usize) -> Option<f64> {
        self.mean_price.get(code).copied().filter(|mean| !mean.is_nan())
    }

    /// The dictionaries with which to code new events, so that they extend the fit.
    pub(crate) fn dictionaries(&self) -> Dictionaries {
        Dictionaries::of(&self.vocabularies)
    }

    /// Encodes new events. Rows without a session and repeats are dropped, and sessions are sorted
    /// by time and cut or left out by `settings`. The sessions are in the order of their first
    /// rows. Values outside the fit get id 1, a recency of 0 and a relative price of 0.
    ///
    /// `events` has the columns of [`crate::schema::event`], as text or in their own types.
    ///
    /// # Errors
    /// A missing column, a column of a wrong type, or a row that cannot be read.
    pub fn apply(&self, events: &DataFrame, settings: &Settings) -> Result<Applied, Error> {
        let batch = clean(events, Path::new("events"), BadRows::Refuse, &mut RowCounts::default())?;
        let mut dictionaries = Dictionaries::new();
        let mut events = dictionaries.code(&batch);
        sort_and_drop_repeats(&mut events);
        let &Settings { max_length, min_length, keep, .. } = settings;
        let whole: Vec<&[Event]> =
            sessions(&events).filter(|events| events.len() >= min_length).collect();
        let kept = whole
            .iter()
            .map(|events| CutSession { count: events.len(), events: keep.cut(events, max_length) });
        let kept: Vec<CutSession<'_>> = kept.collect();
        let encoder = self.encoder_for(&dictionaries);
        let session_ids = kept.iter().map(|session| {
            match dictionaries.get(Coded::Session).value(session.events[0].code(Coded::Session)) {
                ColumnValue::Text(id) => id.to_owned(),
                ColumnValue::Int(id) => id.to_string(),
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

    /// An encoder of events that were coded with this workflow's own dictionaries.
    pub(crate) fn encoder(&self) -> Encoder<'_> {
        Encoder {
            statistics: &self.statistics,
            ids: self.vocabularies.each_ref().map(|vocabulary| Cow::Borrowed(vocabulary.ids())),
            first_seen: self.products.iter().map(|product| product.first_seen).collect(),
            mean_price: Cow::Borrowed(&self.mean_price),
        }
    }

    /// What describes each item, by ascending index: its columns of [`crate::schema::session`] by
    /// its latest event, also of items whose events are in no session of training.
    pub(crate) fn item_table(&self) -> PolarsResult<DataFrame> {
        let (encoder, items) = (self.encoder(), self.vocabulary(Coded::Product).ids());
        let event = |(code, product): (usize, &Product)| {
            let mut codes = [Dictionary::NULL; 7];
            codes[Coded::Product as usize] = code as u32;
            for (column, of_product) in DESCRIBED.into_iter().zip(product.codes) {
                codes[column as usize] = of_product;
            }
            let EventTime { seconds, nanos } = product.last_seen;
            Event { seconds, price: product.price, codes, nanos }
        };
        let is_item = |(code, product): &(usize, &Product)| {
            items[*code] > Vocabulary::UNKNOWN && product.first_seen != NEVER_SEEN
        };
        let mut events: Vec<Event> =
            self.products.iter().enumerate().filter(is_item).map(event).collect();
        events.sort_unstable_by_key(|event| encoder.id(event, Coded::Product));
        let ids = |name: &str, column: Coded| {
            let ids = events.iter().map(|event| i64::from(encoder.id(event, column)));
            Column::new(name.into(), ids.collect::<Vec<_>>())
        };
        let prices = events.iter().map(|event| self.statistics.price_log.apply(log(event.price)));
        let relative = events.iter().map(|event| {
            relative_price(event.price, self.mean_price[event.code(Coded::Category) as usize])
        });
        let columns = vec![
            ids(session::PRODUCT, Coded::Product),
            ids(session::CATEGORY_CODE, Coded::CategoryCode),
            ids(session::BRAND, Coded::Brand),
            ids(session::CATEGORY, Coded::Category),
            Column::new(session::PRICE.into(), prices.collect::<Vec<_>>()),
            Column::new(session::RELATIVE_PRICE.into(), relative.collect::<Vec<_>>()),
        ];
        DataFrame::new(events.len(), columns)
    }

    /// An encoder of events that were coded with other dictionaries.
    fn encoder_for(&self, dictionaries: &Dictionaries) -> Encoder<'_> {
        // Each distinct value is looked up once, not once per event.
        let own_codes = Coded::ALL.map(|column| -> Vec<Option<u32>> {
            let (dictionary, vocabulary) = (dictionaries.get(column), self.vocabulary(column));
            let codes =
                (1..=dictionary.len() as u32).map(|code| vocabulary.code(dictionary.value(code)));
            std::iter::once(None).chain(codes).collect()
        });
        fn by_code<T: Copy>(own_codes: &[Option<u32>], values: &[T], unknown: T) -> Vec<T> {
            own_codes
                .iter()
                .map(|code| code.map_or(unknown, |code| values[code as usize]))
                .collect()
        }
        let products =
            by_code(&own_codes[Coded::Product as usize], &self.products, Product::UNSEEN);
        Encoder {
            statistics: &self.statistics,
            ids: Coded::ALL.map(|column| {
                let ids = self.vocabulary(column).ids();
                Cow::Owned(by_code(&own_codes[column as usize], ids, Vocabulary::UNKNOWN))
            }),
            first_seen: products.iter().map(|product| product.first_seen).collect(),
            mean_price: Cow::Owned(by_code(
                &own_codes[Coded::Category as usize],
                &self.mean_price,
                f64::NAN,
            )),
        }
    }
}

/// The first time of a product without events: later than any event, so that its recency is 0.
pub(crate) const NEVER_SEEN: i64 = i64::MAX;

/// ln(x + 1), in float32 throughout, as the original workflow computes it.
pub(crate) fn log(x: f64) -> f32 {
    (x as f32 + 1.0).ln()
}

/// Days since a product's first event; 0 for earlier events.
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

/// The price's distance from its category's mean as a fraction of the mean; 0 without a mean.
fn relative_price(price: f64, mean: f64) -> f64 {
    if mean > 0.0 { (price - mean) / (mean + 1e-5) } else { 0.0 }
}

/// A session to encode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CutSession<'a> {
    /// The events that are kept, at least one.
    pub events: &'a [Event],
    /// The number of events before the session was cut.
    pub count: usize,
}

/// Turns coded events into a model's columns.
#[derive(Debug)]
pub(crate) struct Encoder<'a> {
    statistics: &'a Statistics,
    /// By [`Coded`], then by code.
    ids: [Cow<'a, [u32]>; 7],
    /// By the product's code.
    first_seen: Vec<i64>,
    /// By the category's code.
    mean_price: Cow<'a, [f64]>,
}

impl Encoder<'_> {
    /// The id of an event's value.
    pub fn id(&self, event: &Event, column: Coded) -> u32 {
        self.ids[column as usize][event.code(column) as usize]
    }

    /// One row per session, with the columns of [`crate::schema::session`].
    pub fn sessions(&self, rows: &[CutSession<'_>]) -> PolarsResult<DataFrame> {
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
            Column::new(
                session::COUNT.into(),
                rows.iter().map(|row| row.count as i64).collect::<Vec<_>>(),
            ),
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
    rows: &[CutSession<'_>],
    n_values: usize,
    value: impl Fn(&Event) -> T::Native,
) -> Column {
    let mut lists = ListPrimitiveChunkedBuilder::<T>::new(
        name.into(),
        rows.len(),
        n_values,
        T::get_static_dtype(),
    );
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
        assert!(
            (sin - 0.974_927_7).abs() < 1e-6 && (cos + 0.222_521_8).abs() < 1e-6,
            "{sin} {cos}"
        );
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
