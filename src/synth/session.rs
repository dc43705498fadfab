//! Sessions: how long they are, how fast they go, and the walk of one through the shop.

use std::sync::LazyLock;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::shop::{Intent, Shop};

/// Of a hundred rows after a session's first, how many stay with the item of the row before.
const STAY_PERCENT: u32 = 30;

/// Rows of a session: half have at most 4, one in a thousand over 100.
pub(super) static ROWS: LazyLock<LogNormal> = LazyLock::new(|| LogNormal::new(4.2, 1.05, 400));
/// Seconds between two rows of a session.
pub(super) static GAP_SECONDS: LazyLock<LogNormal> = LazyLock::new(|| LogNormal::new(33.0, 0.95, 1800));
/// Prices in hundredths.
pub(super) static PRICE: LazyLock<LogNormal> = LazyLock::new(|| LogNormal::new(16_000.0, 1.2, 260_000));

/// A lognormal variable rounded to the whole numbers from 1 to a largest one.
pub(super) struct LogNormal {
    /// `below[k]`: how many of 2^32 draws are at most `k + 1`.
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
        // The mean of a positive whole number is the sum over k >= 0 of the chance to exceed k.
        1.0 + self.below.iter().map(|&below| 1.0 - below as f64 / (1u64 << 32) as f64).sum::<f64>()
    }
}

/// A session's walk: which item each of its rows shows.
///
/// Whether a row stays with the item depends on nothing else, so the number of different items in a row is
/// independent of which they are, and says nothing about the intent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Visit {
    intent: Intent,
    day: u32,
    item: u32,
    rows_left: u32,
}

impl Visit {
    /// A session's first row.
    pub(super) fn begin(shop: &Shop, day: u32, rng: &mut ChaCha8Rng) -> Self {
        let intent = shop.draw_intent(day, rng);
        let item = shop.first_item(intent, day, rng);
        Self { intent, day, item, rows_left: ROWS.draw(rng) - 1 }
    }

    /// Goes to the next row; whether it shows another item.
    pub(super) fn advance(&mut self, shop: &Shop, rng: &mut ChaCha8Rng) -> bool {
        self.rows_left -= 1;
        let moves = rng.random_range(0..100u32) >= STAY_PERCENT;
        if moves {
            self.item = shop.next_item(self.item, self.intent, self.day, rng);
        }
        moves
    }

    /// Lets the session end after at most `rows` further rows.
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
