//! Sessions: their length, the gaps between their rows, and the item of each row.

use std::sync::LazyLock;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::shop::{Intent, Shop};

/// Percentage of rows after the first that repeat the item of the row before.
const STAY_PERCENT: u32 = 30;

/// Rows of a session: half have at most 4, one in a thousand over 100.
pub(super) static ROWS: LazyLock<LogNormal> = LazyLock::new(|| LogNormal::new(4.2, 1.05, 400));
/// Seconds between two rows of a session.
pub(super) static GAP_SECONDS: LazyLock<LogNormal> =
    LazyLock::new(|| LogNormal::new(33.0, 0.95, 1800));
/// Prices in hundredths.
pub(super) static PRICE: LazyLock<LogNormal> =
    LazyLock::new(|| LogNormal::new(16_000.0, 1.2, 260_000));

/// A lognormal variable rounded to the whole numbers from 1 to a largest one.
pub(super) struct LogNormal {
    /// `below[k]`: the number of values of a `u32` that are mapped to at most `k + 1`.
    below: Vec<u64>,
}

impl LogNormal {
    fn new(median: f64, deviation: f64, largest: usize) -> Self {
        let cdf = |x: f64| {
            let z = (libm::log(x) - libm::log(median)) / deviation;
            0.5 * libm::erfc(-z * std::f64::consts::FRAC_1_SQRT_2)
        };
        let top = cdf(largest as f64 + 0.5);
        let share = |k: usize| (cdf(k as f64 + 0.5) / top * (1u64 << 32) as f64) as u64;
        let mut below: Vec<u64> = (1..largest).map(share).collect();
        below.push(1 << 32);
        Self { below }
    }

    pub(super) fn draw(&self, rng: &mut ChaCha8Rng) -> u32 {
        let at = u64::from(rng.random::<u32>());
        1 + self.below.partition_point(|&below| below <= at) as u32
    }

    pub(super) fn mean(&self) -> f64 {
        // E[X] = sum over k >= 0 of P(X > k).
        1.0 + self.below.iter().map(|&below| 1.0 - below as f64 / (1u64 << 32) as f64).sum::<f64>()
    }
}

/// A session in progress.
///
/// Repeats are independent of everything else, so that the number of items in a session carries no
/// information about the intent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Visit {
    intent: Intent,
    day: u32,
    item: u32,
    rows_left: u32,
}

impl Visit {
    /// Draws the intent, the first item and the number of rows.
    pub(super) fn begin(shop: &Shop, day: u32, rng: &mut ChaCha8Rng) -> Self {
        let intent = shop.draw_intent(day, rng);
        let item = shop.first_item(intent, day, rng);
        Self { intent, day, item, rows_left: ROWS.draw(rng) - 1 }
    }

    /// Moves to the next row; returns whether the item changed.
    pub(super) fn advance(&mut self, shop: &Shop, rng: &mut ChaCha8Rng) -> bool {
        self.rows_left -= 1;
        let moves = rng.random_range(0..100u32) >= STAY_PERCENT;
        if moves {
            self.item = shop.next_item(self.item, self.intent, self.day, rng);
        }
        moves
    }

    /// Limits the session to `rows` further rows.
    pub(super) fn cut(&mut self, rows: u32) {
        self.rows_left = self.rows_left.min(rows);
    }

    pub(super) fn item(&self) -> u32 {
        self.item
    }

    pub(super) fn rows_left(&self) -> u32 {
        self.rows_left
    }
}
