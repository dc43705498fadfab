//! The best reachable Recall@20, from the law of the shop.
//!
//! An oracle that knows the shop, but not the intent of a session, updates the posterior over
//! intents by Bayes' rule after each item and ranks the items by their exact probability of being
//! the next. No model can expect a higher Recall@20.
//!
//! Categories without an observed item are equally likely given the observations, so the filter
//! keeps one likelihood for all intents that differ in such categories only.

use rand_chacha::ChaCha8Rng;

use super::session::Visit;
use super::shop::{INTENT_PERCENT, NEIGHBOUR_PERCENT, NEIGHBOUR_PERCENTS, SWITCH_PERCENT, Shop};

/// K of Recall@K.
const CUTOFF: usize = 20;
/// Sessions are cut to this many items, as in the evaluation of a model.
const MAX_LENGTH: usize = 20;

const P_NEIGHBOUR: f64 = NEIGHBOUR_PERCENT as f64 / 100.0;
const P_INTENT: f64 = INTENT_PERCENT as f64 / 100.0;
const P_ANY: f64 = 1.0 - P_NEIGHBOUR - P_INTENT;
const P_SWITCH: f64 = SWITCH_PERCENT as f64 / 100.0;

/// Recall@20 of predicting the last item of a session from the items before it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reach {
    /// Sessions drawn for the estimate; its standard error is at most `0.5 / sqrt(sessions)`.
    pub sessions: u32,
    /// Recommends the 20 most popular items to every session.
    pub popularity: f64,
    /// The oracle, given only the last item, as if the session started with it.
    pub first_order: f64,
    /// The oracle, given all items: an upper bound for every model.
    pub whole_session: f64,
}

impl Reach {
    /// Draws `n_sessions` sessions of two items or more and predicts the last item of each (the
    /// 20th of longer ones).
    pub(super) fn estimate(shop: &Shop, n_sessions: u32, rng: &mut ChaCha8Rng) -> Self {
        let mut items = Vec::with_capacity(MAX_LENGTH);
        let mut hits = [0u32; 3];
        let mut drawn = 0;
        while drawn < n_sessions {
            let day = drawn % shop.n_days();
            draw_items(shop, day, &mut items, rng);
            let [history @ .., target] = &items[..] else { continue };
            let [.., last] = history else { continue };
            drawn += 1;

            let popular = shop.by_rank().iter().filter(|&&item| shop.is_alive(item, day));
            let finds = |history: &[u32]| {
                Next::after(shop, history, day).is_some_and(|next| next.finds(*target))
            };
            let found = [
                popular.take(CUTOFF).any(|item| item == target),
                finds(std::slice::from_ref(last)),
                finds(history),
            ];
            for (hits, found) in hits.iter_mut().zip(found) {
                *hits += u32::from(found);
            }
        }
        let recall = |hits: u32| f64::from(hits) / f64::from(n_sessions);
        let [popularity, first_order, whole_session] = hits.map(recall);
        Self { sessions: n_sessions, popularity, first_order, whole_session }
    }
}

/// Replaces `items` by the first 20 of a new session on `day`, without consecutive repeats.
fn draw_items(shop: &Shop, day: u32, items: &mut Vec<u32>, rng: &mut ChaCha8Rng) {
    let mut visit = Visit::begin(shop, day, rng);
    items.clear();
    items.push(visit.item());
    while items.len() < MAX_LENGTH && visit.rows_left() > 0 {
        if visit.advance(shop, rng) {
            items.push(visit.item());
        }
    }
}

/// One of the two categories of an intent, with all categories without an observed item merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// Index into [`Filter::seen`].
    Seen(usize),
    Unseen,
}

/// Probability that a step by the intent goes to category `to` (for `Unseen`: to any of them) after
/// an item of category `from`; `from` is `None` at the first item.
fn p_category(intent: [Slot; 2], from: Option<Slot>, to: Slot) -> f64 {
    let chances = match intent.map(|category| Some(category) == from) {
        [true, false] => [1.0 - P_SWITCH, P_SWITCH],
        [false, true] => [P_SWITCH, 1.0 - P_SWITCH],
        _ => [0.5, 0.5],
    };
    intent.iter().zip(chances).filter(|&(&category, _)| category == to).map(|(_, p)| p).sum()
}

/// The part of the next item's law that does not depend on the intent.
struct IntentFreeLaw {
    neighbours: [u32; NEIGHBOUR_PERCENTS.len()],
    /// Probability per unit of an item's weight of being drawn as "any item".
    any: f64,
}

impl IntentFreeLaw {
    fn chance(&self, shop: &Shop, item: u32) -> f64 {
        let percents =
            self.neighbours.iter().zip(NEIGHBOUR_PERCENTS).filter(|&(&other, _)| other == item);
        let beside: u32 = percents.map(|(_, percent)| percent).sum();
        P_NEIGHBOUR * f64::from(beside) / 100.0 + self.any * shop.weight(item) as f64
    }
}

/// The exact Bayesian filter over the intents of a session.
struct Filter<'a> {
    shop: &'a Shop,
    day: u32,
    /// Categories of the observed items, with the summed weight of their released items.
    seen: Vec<(u32, f64)>,
    /// Unnormalised posterior of every intent.
    intents: Vec<([Slot; 2], f64)>,
}

impl<'a> Filter<'a> {
    /// The prior on `day`, ready to observe the items of `history`.
    fn new(shop: &'a Shop, day: u32, history: &[u32]) -> Self {
        let mut categories: Vec<u32> = history.iter().map(|&item| shop.category(item)).collect();
        categories.sort_unstable();
        categories.dedup();
        let alive = |category| {
            let items = shop.shelf(category).iter().filter(|&&item| shop.is_alive(item, day));
            items.map(|&item| shop.weight(item) as f64).sum()
        };
        let seen: Vec<(u32, f64)> =
            categories.into_iter().map(|category| (category, alive(category))).collect();
        let all_alive = shop.alive_weight(day) as f64;
        let mut slots: Vec<(Slot, f64)> = seen
            .iter()
            .enumerate()
            .map(|(index, &(_, weight))| (Slot::Seen(index), weight / all_alive))
            .collect();
        let unseen = 1.0 - slots.iter().map(|(_, p)| p).sum::<f64>();
        slots.push((Slot::Unseen, unseen.max(0.0)));
        let pairs =
            slots.iter().flat_map(|&(a, p)| slots.iter().map(move |&(b, q)| ([a, b], p * q)));
        Self { shop, day, intents: pairs.collect(), seen }
    }

    fn slot(&self, item: u32) -> Slot {
        let category = self.shop.category(item);
        let index = self.seen.iter().position(|&(seen, _)| seen == category);
        index.map_or(Slot::Unseen, Slot::Seen)
    }

    /// Probability of `item` given its category, which must be in `seen`.
    fn share(&self, item: u32) -> f64 {
        match self.slot(item) {
            Slot::Seen(index) => self.shop.weight(item) as f64 / self.seen[index].1,
            Slot::Unseen => 0.0,
        }
    }

    fn intent_free(&self, last: u32) -> IntentFreeLaw {
        let any = P_ANY / self.shop.alive_weight(self.day) as f64;
        IntentFreeLaw { neighbours: self.shop.neighbours(last, self.day), any }
    }

    /// Updates the posterior with the first item of a session.
    fn observe_first(&mut self, item: u32) {
        let any = P_ANY * self.shop.weight(item) as f64 / self.shop.alive_weight(self.day) as f64;
        let intended = (1.0 - P_ANY) * self.share(item);
        let slot = self.slot(item);
        for (intent, p) in &mut self.intents {
            *p *= any + intended * p_category(*intent, None, slot);
        }
    }

    /// Updates the posterior with `item` after `last`.
    fn observe(&mut self, last: u32, item: u32) {
        let chance = self.intent_free(last).chance(self.shop, item);
        let intended = P_INTENT * self.share(item);
        let (from, to) = (self.slot(last), self.slot(item));
        self.weigh_draws(last);
        for (intent, p) in &mut self.intents {
            *p *= chance + intended * p_category(*intent, Some(from), to);
        }
    }

    /// Redrawing until the item differs from `last` divides each probability by that of leaving
    /// `last`, which depends on the intent.
    fn weigh_draws(&mut self, last: u32) {
        let others = 1.0 - self.intent_free(last).chance(self.shop, last);
        let intended = P_INTENT * self.share(last);
        let slot = self.slot(last);
        for (intent, p) in &mut self.intents {
            *p /= others - intended * p_category(*intent, Some(slot), slot);
        }
    }
}

/// Distribution of the item after a history.
struct Next<'a> {
    filter: Filter<'a>,
    last: u32,
    intent_free: IntentFreeLaw,
    /// Sum of the intents' weights.
    intents: f64,
    /// Probability by intent per unit of an item's weight, for each category of `Filter::seen`.
    seen: Vec<f64>,
    /// The same for the items of all other categories.
    unseen: f64,
}

impl<'a> Next<'a> {
    /// None where `history` is empty.
    fn after(shop: &'a Shop, history: &[u32], day: u32) -> Option<Self> {
        let (&first, &last) = (history.first()?, history.last()?);
        let mut filter = Filter::new(shop, day, history);
        filter.observe_first(first);
        for pair in history.windows(2) {
            filter.observe(pair[0], pair[1]);
        }
        let all: f64 = filter.intents.iter().map(|(_, p)| p).sum();
        filter.intents.iter_mut().for_each(|(_, p)| *p /= all);
        filter.weigh_draws(last);

        let from = filter.slot(last);
        let given_to = |to| -> f64 {
            let given =
                filter.intents.iter().map(|&(intent, p)| p * p_category(intent, Some(from), to));
            P_INTENT * given.sum::<f64>()
        };
        let seen = filter.seen.iter().enumerate();
        let seen = seen.map(|(index, &(_, alive))| given_to(Slot::Seen(index)) / alive).collect();
        let seen_alive: f64 = filter.seen.iter().map(|&(_, alive)| alive).sum();
        // Not zero where every category was seen.
        let unseen = given_to(Slot::Unseen) / (shop.alive_weight(day) as f64 - seen_alive).max(1.0);
        let intents = filter.intents.iter().map(|&(_, p)| p).sum();
        Some(Self { last, intent_free: filter.intent_free(last), intents, seen, unseen, filter })
    }

    /// Probability that `item`, released and not the last, is the next.
    fn chance(&self, item: u32) -> f64 {
        let by_intent = match self.filter.slot(item) {
            Slot::Seen(index) => self.seen[index],
            Slot::Unseen => self.unseen,
        };
        let shop = self.filter.shop;
        self.intents * self.intent_free.chance(shop, item) + by_intent * shop.weight(item) as f64
    }

    /// Whether `target` is among the 20 most probable items.
    fn finds(&self, target: u32) -> bool {
        let Filter { shop, day, .. } = self.filter;
        // Within unseen categories, probability grows with popularity, so the top 20 suffice.
        let unseen =
            |&&item: &&u32| shop.is_alive(item, day) && self.filter.slot(item) == Slot::Unseen;
        let unseen = shop.by_rank().iter().filter(unseen).take(CUTOFF);
        let seen = self.filter.seen.iter().flat_map(|&(category, _)| shop.shelf(category));
        let seen = seen.filter(|&&item| shop.is_alive(item, day) && item != self.last);
        let of_target = self.chance(target);
        seen.chain(unseen).filter(|&&item| self.chance(item) > of_target).count() < CUTOFF
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    /// Probabilities sum to one, and the 20 most probable items occur as often as predicted.
    #[test]
    fn the_oracle_knows_how_often_it_is_right() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let shop = Shop::draw(300, 3, &mut rng);
        let (mut expected, mut hits, mut n_sessions) = (0.0, 0.0, 0.0);
        let mut items = Vec::new();
        for day in (0..3).cycle().take(20_000) {
            draw_items(&shop, day, &mut items, &mut rng);
            let [history @ .., target] = &items[..] else { continue };
            let Some(next) = Next::after(&shop, history, day) else { continue };
            let others = (0..300).filter(|&item| shop.is_alive(item, day) && item != next.last);
            let mut chances: Vec<f64> = others.map(|item| next.chance(item)).collect();
            assert!((chances.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            chances.sort_by(|a, b| b.total_cmp(a));
            expected += chances[..CUTOFF].iter().sum::<f64>();
            hits += f64::from(u8::from(next.finds(*target)));
            n_sessions += 1.0;
        }
        // Four standard errors of the mean of 0s and 1s.
        assert!(
            ((hits - expected) / n_sessions).abs() < 2.0 / f64::sqrt(n_sessions),
            "{hits} for {expected}"
        );
    }

    /// The filter treats the last item as the first of a session; counting pairs does no better.
    #[test]
    fn counting_pairs_comes_to_the_best_from_the_last_item() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let shop = Shop::draw(200, 1, &mut rng);
        let mut items = Vec::new();
        let mut counts = vec![[0u32; 200]; 200];
        for _ in 0..200_000 {
            draw_items(&shop, 0, &mut items, &mut rng);
            for pair in items.windows(2) {
                counts[pair[0] as usize][pair[1] as usize] += 1;
            }
        }
        let (mut counting, mut filter, mut n_sessions) = (0.0, 0.0, 0.0);
        for _ in 0..20_000 {
            draw_items(&shop, 0, &mut items, &mut rng);
            let [.., last, target] = items[..] else { continue };
            let row = &counts[last as usize];
            let ahead = row.iter().filter(|&&count| count > row[target as usize]).count();
            counting += f64::from(u8::from(ahead < CUTOFF));
            let next = Next::after(&shop, &[last], 0).unwrap();
            filter += f64::from(u8::from(next.finds(target)));
            n_sessions += 1.0;
        }
        assert!(
            (counting - filter).abs() / n_sessions < 0.01,
            "{counting} and {filter} of {n_sessions}"
        );
    }
}
