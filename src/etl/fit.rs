//! Counts and sums over the events, and the [`Workflow`] that follows from them.
//!
//! The results do not depend on the order of the events, nor on the numbers of buckets and threads:
//! counts are integers, and sums carry their rounding errors.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::sessions::{Dictionaries, Event};
use crate::vocab::{Coded, Dictionary, Vocabulary};
use crate::workflow::{Normal, Product, Settings, Statistics, Workflow, log, recency_days};
use crate::workflow_files::FORMAT;

/// A sum that keeps the rounding errors of its additions (Knuth's two-sum). It has about twice the
/// digits of an f64, so that its value does not depend on the order of the terms.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    high: f64,
    low: f64,
}

impl Sum {
    fn add(&mut self, term: f64) {
        let sum = self.high + term;
        let added = sum - self.high;
        self.low += (self.high - (sum - added)) + (term - added);
        self.high = sum;
    }

    fn merge(&mut self, other: Self) {
        self.add(other.high);
        self.add(other.low);
    }

    fn value(self) -> f64 {
        self.high + self.low
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    n: u64,
    sum: Sum,
    squares: Sum,
}

impl Moments {
    fn add(&mut self, x: f32) {
        let x = f64::from(x);
        self.n += 1;
        self.sum.add(x);
        self.squares.add(x * x);
    }

    fn merge(&mut self, other: Self) {
        self.n += other.n;
        self.sum.merge(other.sum);
        self.squares.merge(other.squares);
    }

    /// Mean, and deviation with n - 1; a single value deviates by 0.
    fn normal(self) -> Normal {
        let (n, sum) = (self.n as f64, self.sum.value());
        let variance = (self.squares.value() - sum * sum / n) / (n - 1.0).max(1.0);
        Normal { mean: sum / n, std: if self.n > 1 { variance.max(0.0).sqrt() } else { 0.0 } }
    }
}

/// Counts of every value of every column, filled by many threads at once.
#[derive(Debug)]
pub(crate) struct ColumnCounts([Vec<AtomicU32>; 7]);

impl ColumnCounts {
    pub fn new(dictionaries: &Dictionaries) -> Self {
        Self(Coded::ALL.map(|column| {
            let n_codes = dictionaries.get(column).len() + 1;
            std::iter::repeat_with(AtomicU32::default).take(n_codes).collect()
        }))
    }

    fn add(&self, event: &Event) {
        for (counts, code) in self.0.iter().zip(event.codes) {
            counts[code as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// By code.
    pub fn of(&self, column: Coded) -> Vec<u32> {
        self.0[column as usize].iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    fn into_values(self) -> [Vec<u32>; 7] {
        self.0.map(|counts| counts.into_iter().map(AtomicU32::into_inner).collect())
    }
}

/// Sums over some of the events.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sums {
    pub n_events: u64,
    price_log: Moments,
    recency_log: Moments,
    /// By the code of the category.
    prices: Vec<Sum>,
}

impl Sums {
    /// Adds an event. `products` are by code.
    pub fn add(&mut self, event: &Event, products: &[Product], counts: &ColumnCounts) {
        counts.add(event);
        self.n_events += 1;
        self.price_log.add(log(event.price));
        let first_seen = products[event.code(Coded::Product) as usize].first_seen;
        self.recency_log.add(log(recency_days(event.seconds, first_seen)));
        let category = event.code(Coded::Category) as usize;
        if self.prices.len() <= category {
            self.prices.resize(category + 1, Sum::default());
        }
        self.prices[category].add(event.price);
    }

    pub fn merge(&mut self, other: &Self) {
        self.n_events += other.n_events;
        self.price_log.merge(other.price_log);
        self.recency_log.merge(other.recency_log);
        if self.prices.len() < other.prices.len() {
            self.prices.resize(other.prices.len(), Sum::default());
        }
        for (sum, other) in self.prices.iter_mut().zip(&other.prices) {
            sum.merge(*other);
        }
    }
}

/// The inputs of a fit, beside the counts and sums.
#[derive(Debug)]
pub(crate) struct Fit<'a> {
    /// The fit that this one extends.
    pub base: Option<&'a Workflow>,
    pub settings: Settings,
    pub first_event: i64,
    pub days: Option<(i64, i64)>,
    pub dictionaries: Dictionaries,
    /// By the code of the product.
    pub products: Vec<Product>,
}

impl Fit<'_> {
    /// The fitted workflow. One that extends a base keeps its ids, means and deviations, because
    /// models were trained with them. New values get the next ids, and new categories the mean of
    /// their own events.
    pub fn workflow(self, counts: ColumnCounts, sums: &Sums) -> Workflow {
        let counts = counts.into_values();
        let mean_price =
            counts[Coded::Category as usize].iter().enumerate().map(|(code, count)| {
                let known = code as u32 != Dictionary::NULL && *count > 0;
                let mean =
                    if known { sums.prices[code].value() / f64::from(*count) } else { f64::NAN };
                let before = self.base.and_then(|base| base.mean_price_of_code(code));
                before.unwrap_or(mean)
            });
        let mean_price = mean_price.collect();
        let mut of_columns = self.dictionaries.0.into_iter().zip(counts);
        let vocabularies = Coded::ALL.map(|column| {
            let (dictionary, counts) = of_columns.next().expect("a dictionary for every column");
            match self.base {
                None => Vocabulary::fit(column, dictionary, &counts),
                Some(base) => base.vocabulary(column).extended(dictionary, &counts),
            }
        });
        let base = self.base.map(|base| &base.statistics);
        let statistics = Statistics {
            format: FORMAT,
            written_by: concat!("bireme-etl ", env!("CARGO_PKG_VERSION")).into(),
            settings: self.settings,
            first_event: self.first_event,
            days: base.map_or(self.days, |base| base.days),
            n_events: base.map_or(0, |base| base.n_events) + sums.n_events,
            price_log: base.map_or_else(|| sums.price_log.normal(), |base| base.price_log),
            recency_log: base.map_or_else(|| sums.recency_log.normal(), |base| base.recency_log),
        };
        Workflow { statistics, vocabularies, products: self.products, mean_price }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_depend_on_the_order() {
        // From 2^-20 to 2^30, none a sum of few bits.
        let mut terms: Vec<f64> =
            (1..5000).map(|i| (f64::from(i * 37 % 501) / 10.0 - 20.0).exp2() / 3.0).collect();
        let sum = |terms: &[f64], n: usize| {
            let parts = terms.chunks(n).map(|chunk| {
                let mut sum = Sum::default();
                chunk.iter().for_each(|term| sum.add(*term));
                sum
            });
            parts.fold(Sum::default(), |mut sum, part| {
                sum.merge(part);
                sum
            })
        };
        let forwards = sum(&terms, 5000).value();
        assert_eq!(sum(&terms, 7).value(), forwards);
        terms.reverse();
        assert_eq!(sum(&terms, 5000).value(), forwards);
        terms.sort_by(f64::total_cmp);
        assert_eq!(sum(&terms, 100).value(), forwards);
    }

    #[test]
    fn one_value_and_equal_values_do_not_deviate() {
        let mut moments = Moments::default();
        moments.add(3.0);
        assert_eq!(moments.normal(), Normal { mean: 3.0, std: 0.0 });
        moments.add(3.0);
        assert_eq!(moments.normal(), Normal { mean: 3.0, std: 0.0 });
        moments.add(6.0);
        assert_eq!(moments.normal(), Normal { mean: 4.0, std: 3.0_f64.sqrt() });
    }
}
