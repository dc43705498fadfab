//! The shop: its items, their categories, and the law by which a session goes from item to item.
//!
//! What lasts as long as the shop is drawn once into tables of `O(items)`; all choices are made with
//! integers, so that a seed gives the same shop on every machine.

use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// Items of a category, on average.
const CATEGORY_ITEMS: u32 = 25;

/// Of a hundred steps to another item, how many go to a neighbour of the last one on its category's shelf.
pub(super) const NEIGHBOUR_PERCENT: u32 = 10;
/// Of a hundred steps, how many go to an item of a category that the session is after; the others go to any
/// item.
pub(super) const INTENT_PERCENT: u32 = 80;
/// The neighbours of an item, nearest first: of a hundred steps to a neighbour, how many go to each.
pub(super) const NEIGHBOUR_PERCENTS: [u32; 3] = [60, 25, 15];
/// Of a hundred steps by the intent from one of its two categories, how many go to the other.
pub(super) const SWITCH_PERCENT: u32 = 65;

/// The weight of the item of rank `r` is proportional to `1 / (r + FLATTENING)`: Zipf's law with Mandelbrot's
/// flat head.
const FLATTENING: u64 = 20;
/// On each day after the first, one item of so many is born.
const BORN_ONE_IN: u32 = 100;

/// What a session is after: two categories, which may be the same.
pub(super) type Intent = [u32; 2];

/// Every item's popularity, birthday and category.
pub(super) struct Shop {
    /// Popularity of an item, up to a common factor.
    weights: Vec<u64>,
    /// First day on which an item is seen, counted from 0.
    born: Vec<u32>,
    /// Items from the most to the least popular.
    by_rank: Vec<u32>,
    /// Sum of the weights of the items alive on each day.
    alive_weight: Vec<u64>,
    /// Items, category after category: shelf after shelf.
    shelves: Vec<u32>,
    /// Where an item stands in `shelves`.
    place: Vec<u32>,
    /// `cumulative[p]`: sum of the weights of `shelves[..p]`.
    cumulative: Vec<u64>,
    n_categories: u32,
}

impl Shop {
    /// Draws a shop of `n_items` items whose last items are born on day `n_days - 1`.
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

        // At least half of the items are there on the first day, however many days follow.
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

    /// Where a category begins in `shelves`; the one after the last begins at its end.
    fn begin(&self, category: u32) -> usize {
        (u64::from(category) * u64::from(self.n_items()) / u64::from(self.n_categories)) as usize
    }

    /// All items of a category, in the order of its shelf.
    pub(super) fn shelf(&self, category: u32) -> &[u32] {
        &self.shelves[self.begin(category)..self.begin(category + 1)]
    }

    /// The next items alive on the shelf of `item`, which is a ring: on a shelf of few living items they
    /// repeat, and come to include `item` itself.
    pub(super) fn neighbours(&self, item: u32, day: u32) -> [u32; NEIGHBOUR_PERCENTS.len()] {
        let category = self.category(item);
        let (before, from) =
            self.shelf(category).split_at(self.place[item as usize] as usize - self.begin(category));
        let ring = from[1..].iter().chain(before).chain(&from[..1]).cycle();
        let mut alive = ring.filter(|&&other| self.is_alive(other, day));
        std::array::from_fn(|_| alive.next().copied().unwrap_or(item))
    }

    /// An item of `shelves[begin..end]` alive on `day`, by popularity; there must be one.
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

    /// What a new session is after: the categories of two items drawn by popularity, so that what all
    /// sessions are after is as popular as the items themselves.
    pub(super) fn draw_intent(&self, day: u32, rng: &mut ChaCha8Rng) -> Intent {
        std::array::from_fn(|_| self.category(self.pick_any(day, rng)))
    }

    /// The first item of a session: of either category that it is after, or any.
    pub(super) fn first_item(&self, intent: Intent, day: u32, rng: &mut ChaCha8Rng) -> u32 {
        if rng.random_range(0..100u32) < NEIGHBOUR_PERCENT + INTENT_PERCENT {
            self.pick_from(intent[rng.random_range(0..2u32) as usize], day, rng)
        } else {
            self.pick_any(day, rng)
        }
    }

    /// The item after `last`: a neighbour of it, one by the intent, or any; drawn anew until it is another
    /// item.
    pub(super) fn next_item(&self, last: u32, intent: Intent, day: u32, rng: &mut ChaCha8Rng) -> u32 {
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
