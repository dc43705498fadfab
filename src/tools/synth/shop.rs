//! The shop: its items, their categories, and the law of the next item of a session.
//!
//! The tables are drawn once and take `O(items)` memory. All choices are made with integers, so
//! that a seed gives the same shop on every machine.

use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// Items of a category, on average.
const CATEGORY_ITEMS: u32 = 25;

/// Percentage of steps to a neighbour of the last item on the shelf of its category.
pub(super) const NEIGHBOUR_PERCENT: u32 = 10;
/// Percentage of steps to an item of the intent's categories; the remaining steps go to any item.
pub(super) const INTENT_PERCENT: u32 = 80;
/// Percentages of the steps to a neighbour, nearest neighbour first.
pub(super) const NEIGHBOUR_PERCENTS: [u32; 3] = [60, 25, 15];
/// Percentage of steps by the intent that switch from one of its categories to the other.
pub(super) const SWITCH_PERCENT: u32 = 65;

/// The weight of the item of rank `r` is proportional to `1 / (r + FLATTENING)` (Zipf-Mandelbrot).
const FLATTENING: u64 = 20;
/// On each day after the first, one item in this many is released.
const BORN_ONE_IN: u32 = 100;

/// The two categories of interest of a session, which may be equal.
pub(super) type Intent = [u32; 2];

/// Popularity, day of release and category of every item.
pub(super) struct Shop {
    /// Popularity of an item, up to a common factor.
    weights: Vec<u64>,
    /// Day of release of an item, counted from 0.
    born: Vec<u32>,
    /// Items from the most to the least popular.
    by_rank: Vec<u32>,
    /// Summed weight of the items released by each day.
    alive_weight: Vec<u64>,
    /// Items, grouped by category.
    shelves: Vec<u32>,
    /// Index of an item in `shelves`.
    place: Vec<u32>,
    /// `cumulative[p]`: sum of the weights of `shelves[..p]`.
    cumulative: Vec<u64>,
    n_categories: u32,
}

impl Shop {
    /// Draws a shop of `n_items` items, the last of them released on day `n_days - 1`.
    pub(super) fn draw(n_items: u32, n_days: u32, rng: &mut ChaCha8Rng) -> Self {
        let mut shuffled = || {
            let mut items: Vec<u32> = (0..n_items).collect();
            items.shuffle(rng);
            items
        };
        let by_rank = shuffled();
        let mut weights = vec![0; by_rank.len()];
        for (rank, &item) in by_rank.iter().enumerate() {
            weights[item as usize] = (1 << 40) / (rank as u64 + FLATTENING);
        }

        // At least half of the items are released on the first day, for any number of days.
        let later_days = n_days - 1;
        let per_day = (n_items / BORN_ONE_IN).max(1).min(n_items / 2 / later_days.max(1));
        let mut born = vec![0; by_rank.len()];
        for (at, item) in shuffled().into_iter().take((per_day * later_days) as usize).enumerate() {
            born[item as usize] = 1 + at as u32 / per_day;
        }
        let mut alive_weight = vec![0; n_days as usize];
        for (&day, &weight) in born.iter().zip(&weights) {
            alive_weight[day as usize] += weight;
        }
        for day in 1..alive_weight.len() {
            alive_weight[day] += alive_weight[day - 1];
        }

        let shelves = shuffled();
        let mut place = vec![0; shelves.len()];
        let mut cumulative = Vec::with_capacity(shelves.len() + 1);
        let mut sum = 0;
        for (at, &item) in shelves.iter().enumerate() {
            place[item as usize] = at as u32;
            cumulative.push(sum);
            sum += weights[item as usize];
        }
        cumulative.push(sum);
        let n_categories = n_items / CATEGORY_ITEMS;
        Self { weights, born, by_rank, alive_weight, shelves, place, cumulative, n_categories }
    }

    pub(super) fn n_items(&self) -> u32 {
        self.weights.len() as u32
    }

    pub(super) fn n_days(&self) -> u32 {
        self.alive_weight.len() as u32
    }

    pub(super) fn by_rank(&self) -> &[u32] {
        &self.by_rank
    }

    pub(super) fn weight(&self, item: u32) -> u64 {
        self.weights[item as usize]
    }

    pub(super) fn is_alive(&self, item: u32, day: u32) -> bool {
        self.born[item as usize] <= day
    }

    pub(super) fn alive_weight(&self, day: u32) -> u64 {
        self.alive_weight[day as usize]
    }

    pub(super) fn category(&self, item: u32) -> u32 {
        let place = u64::from(self.place[item as usize]);
        (((place + 1) * u64::from(self.n_categories) - 1) / u64::from(self.n_items())) as u32
    }

    /// Start of a category in `shelves`; for `n_categories` the end of `shelves`.
    fn begin(&self, category: u32) -> usize {
        (u64::from(category) * u64::from(self.n_items()) / u64::from(self.n_categories)) as usize
    }

    /// All items of a category, in the order that defines neighbours.
    pub(super) fn shelf(&self, category: u32) -> &[u32] {
        &self.shelves[self.begin(category)..self.begin(category + 1)]
    }

    /// The next released items on the shelf of `item`, taken as a ring: they repeat, and include
    /// `item`, where the shelf has few released items.
    pub(super) fn neighbours(&self, item: u32, day: u32) -> [u32; NEIGHBOUR_PERCENTS.len()] {
        let category = self.category(item);
        let (before, from) = self
            .shelf(category)
            .split_at(self.place[item as usize] as usize - self.begin(category));
        let ring = from[1..].iter().chain(before).chain(&from[..1]).cycle();
        let mut alive = ring.filter(|&&other| self.is_alive(other, day));
        std::array::from_fn(|_| alive.next().copied().unwrap_or(item))
    }

    /// Draws an item of `shelves[begin..end]` by popularity; at least one must be released by
    /// `day`.
    fn pick(&self, begin: usize, end: usize, day: u32, rng: &mut ChaCha8Rng) -> u32 {
        loop {
            let at = rng.random_range(self.cumulative[begin]..self.cumulative[end]);
            let above = self.cumulative[begin..=end].partition_point(|&below| below <= at);
            let item = self.shelves[begin + above - 1];
            if self.is_alive(item, day) {
                return item;
            }
        }
    }

    fn pick_any(&self, day: u32, rng: &mut ChaCha8Rng) -> u32 {
        self.pick(0, self.shelves.len(), day, rng)
    }

    fn pick_from(&self, category: u32, day: u32, rng: &mut ChaCha8Rng) -> u32 {
        self.pick(self.begin(category), self.begin(category + 1), day, rng)
    }

    /// Draws the categories of two items by popularity, so that intents are distributed like items.
    pub(super) fn draw_intent(&self, day: u32, rng: &mut ChaCha8Rng) -> Intent {
        std::array::from_fn(|_| self.category(self.pick_any(day, rng)))
    }

    /// Draws the first item of a session: of either category of the intent, or any.
    pub(super) fn first_item(&self, intent: Intent, day: u32, rng: &mut ChaCha8Rng) -> u32 {
        if rng.random_range(0..100u32) < NEIGHBOUR_PERCENT + INTENT_PERCENT {
            self.pick_from(intent[rng.random_range(0..2u32) as usize], day, rng)
        } else {
            self.pick_any(day, rng)
        }
    }

    /// Draws the item after `last`: a neighbour, one by the intent, or any, until it is not `last`.
    pub(super) fn next_item(
        &self,
        last: u32,
        intent: Intent,
        day: u32,
        rng: &mut ChaCha8Rng,
    ) -> u32 {
        loop {
            let kind = rng.random_range(0..100u32);
            let item = if kind < NEIGHBOUR_PERCENT {
                let mut at = rng.random_range(0..100u32);
                let mut nearest = 0;
                while at >= NEIGHBOUR_PERCENTS[nearest] {
                    at -= NEIGHBOUR_PERCENTS[nearest];
                    nearest += 1;
                }
                self.neighbours(last, day)[nearest]
            } else if kind < NEIGHBOUR_PERCENT + INTENT_PERCENT {
                let here = self.category(last);
                let to_second = match intent.map(|category| category == here) {
                    [true, false] => rng.random_range(0..100u32) < SWITCH_PERCENT,
                    [false, true] => rng.random_range(0..100u32) >= SWITCH_PERCENT,
                    _ => rng.random_range(0..2u32) == 1,
                };
                self.pick_from(intent[usize::from(to_second)], day, rng)
            } else {
                self.pick_any(day, rng)
            };
            if item != last {
                return item;
            }
        }
    }
}
