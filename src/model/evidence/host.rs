//! Candidates and their features on a CPU, session by session.
//!
//! The same as [`super::tables`] and [`super::candidates`] find with tensor operations, which a GPU
//! and a trace need and which take several times as long on a CPU. Counts are whole numbers in
//! both, so that both choose the same candidates; features differ by rounding.

use std::collections::HashMap;
use std::ops::Range;

use bireme_kernels::parallel::{in_parallel, part_len};
use tch::Tensor;

use super::candidates::Candidates;
use super::counts::{Counts, Pair, UNITS, WINDOW};
use super::shape::{PLACES, PREDECESSOR_WEIGHT, Shape, decays, priorities};
use crate::config::{CandidatesConfig, Reminders};
use crate::data::FIRST_ITEM;
use crate::model::attributes::Cells;

/// A session whose next item is looked for.
pub(in crate::model) struct Query {
    /// Its known events.
    pub known: Range<usize>,
    /// All of its events, if the counts contain them, and whether it is of the last day.
    pub counted: Option<(Range<usize>, bool)>,
}

/// The columns of a batch, with a padding event at the end.
pub(super) struct Columns {
    pub items: Vec<i64>,
    /// Codes of the attributes, each for all events.
    pub codes: Vec<Vec<i64>>,
    /// Values of the attributes, each for all events.
    pub values: Vec<Vec<f32>>,
}

/// The neighbours of each item, the heaviest first.
struct Neighbours {
    offsets: Vec<usize>,
    items: Vec<u32>,
    units: Vec<f32>,
    adjacent: Vec<f32>,
}

impl Neighbours {
    fn new(sorted: &[Pair], ends: fn(&Pair) -> (u32, u32), n_items: usize) -> Self {
        let mut offsets = vec![0; n_items + 1];
        sorted.iter().for_each(|pair| offsets[ends(pair).0 as usize + 1] += 1);
        for item in 0..n_items {
            offsets[item + 1] += offsets[item];
        }
        Self {
            offsets,
            items: sorted.iter().map(|pair| ends(pair).1).collect(),
            units: sorted.iter().map(Pair::units).collect(),
            adjacent: sorted.iter().map(Pair::adjacent).collect(),
        }
    }

    /// The first `k` neighbours of an item: item, weight, occurrences at distance 1.
    fn of(&self, item: i64, k: usize) -> impl Iterator<Item = (usize, f32, f32)> {
        let (start, end) = (self.offsets[item as usize], self.offsets[item as usize + 1]);
        let range = start..end.min(start + k);
        let (units, adjacent) = (&self.units[range.clone()], &self.adjacent[range.clone()]);
        let pairs = self.items[range].iter().zip(units).zip(adjacent);
        pairs.map(|((&item, &units), &adjacent)| (item as usize, units, adjacent))
    }
}

/// The most frequent items with the same codes of some attributes.
struct Alike {
    /// Which attributes, by their number among those with codes.
    attributes: Vec<usize>,
    by_codes: HashMap<Vec<i64>, Vec<usize>>,
}

/// The counts, indexed for lookups.
pub(super) struct HostTables {
    shape: Shape,
    n_neighbours: usize,
    successors: Neighbours,
    predecessors: Neighbours,
    occurrences: Vec<f32>,
    last_day_occurrences: Vec<f32>,
    codes: Vec<Vec<i64>>,
    values: Vec<Vec<f32>>,
    alike: Vec<Alike>,
    frequent: Vec<usize>,
    decays: Vec<f32>,
    priorities: Vec<f64>,
}

/// Memory of a thread.
struct Scratch {
    /// Place of each item among the found ones, or `u32::MAX`: `[V]`.
    place: Vec<u32>,
    /// The found items.
    items: Vec<usize>,
    /// Counts of each found item: `[found, C + 2]`.
    counts: Vec<f32>,
}

/// Candidates of some queries, to be filled.
struct Output<'a> {
    items: &'a mut [i64],
    features: &'a mut [f32],
    is_hidden: &'a mut [bool],
}

impl HostTables {
    pub fn new(counts: &Counts, config: &CandidatesConfig, shape: Shape) -> Self {
        let n_items = counts.items.len();
        let mut sorted = counts.pairs().to_vec();
        sorted.sort_unstable_by_key(Pair::by_first);
        let successors = Neighbours::new(&sorted, |pair| (pair.first, pair.second), n_items);
        sorted.sort_unstable_by_key(Pair::by_second);
        let predecessors = Neighbours::new(&sorted, |pair| (pair.second, pair.first), n_items);
        let (mut codes, mut values) = (Vec::new(), Vec::new());
        for attribute in &counts.attributes.0 {
            match &attribute.cells {
                Cells::Codes(of_items) => codes.push(of_items.clone()),
                Cells::Values(of_items) => values.push(of_items.clone()),
            }
        }
        let by_occurrence = counts.by_occurrence();
        let n_most = config.n_frequent as usize;
        let alike = shape.alike_attributes().into_iter().map(|attributes| {
            let mut by_codes: HashMap<Vec<i64>, Vec<usize>> = HashMap::new();
            for &item in &by_occurrence {
                let key = attributes.iter().map(|&attribute| codes[attribute][item]).collect();
                let list = by_codes.entry(key).or_default();
                if list.len() < n_most {
                    list.push(item);
                }
            }
            Alike { attributes, by_codes }
        });
        let floats = |counts: &[i64]| counts.iter().map(|&n| n as f32).collect();
        Self {
            n_neighbours: config.n_neighbours as usize,
            successors,
            predecessors,
            occurrences: floats(&counts.items),
            last_day_occurrences: floats(&counts.last_day_items),
            alike: alike.collect(),
            frequent: by_occurrence.iter().take(n_most).copied().collect(),
            decays: decays(shape.n_recent),
            priorities: priorities(shape.n_recent),
            codes,
            values,
            shape,
        }
    }

    /// The candidates of all queries.
    pub fn candidates(
        &self,
        columns: &Columns,
        queries: &[Query],
        reminders: Reminders,
    ) -> Candidates {
        let (n, n_each) = (queries.len(), self.shape.n_candidates as usize);
        let n_features = self.shape.n_features as usize;
        let mut items = vec![0i64; n * n_each];
        let mut features = vec![0f32; n * n_each * n_features];
        let mut is_hidden = vec![false; n * n_each];
        let n_part = part_len(n, 1);
        let parts = queries
            .chunks(n_part)
            .zip(items.chunks_mut(n_part * n_each))
            .zip(features.chunks_mut(n_part * n_each * n_features))
            .zip(is_hidden.chunks_mut(n_part * n_each));
        in_parallel(parts, |(((queries, items), features), is_hidden)| {
            let mut scratch = Scratch {
                place: vec![u32::MAX; self.occurrences.len()],
                items: Vec::new(),
                counts: Vec::new(),
            };
            let outputs = items
                .chunks_mut(n_each)
                .zip(features.chunks_mut(n_each * n_features))
                .zip(is_hidden.chunks_mut(n_each))
                .map(|((items, features), is_hidden)| Output { items, features, is_hidden });
            for (query, output) in queries.iter().zip(outputs) {
                self.fill(columns, query, reminders, &mut scratch, output);
            }
        });
        let (n, n_each) = (n as i64, n_each as i64);
        Candidates {
            items: Tensor::from_slice(&items).view([n, n_each]),
            features: Tensor::from_slice(&features).view([n, n_each, self.shape.n_features]),
            is_hidden: Tensor::from_slice(&is_hidden).view([n, n_each]),
        }
    }

    fn fill(
        &self,
        columns: &Columns,
        query: &Query,
        reminders: Reminders,
        scratch: &mut Scratch,
        output: Output<'_>,
    ) {
        let first = query.known.end.saturating_sub(self.shape.max_length).max(query.known.start);
        // The events, the most recent first.
        let mut events: Vec<usize> = (first..query.known.end).rev().collect();
        if events.is_empty() {
            // The padding event, whose item is 0.
            events.push(columns.items.len() - 1);
        }
        self.find(columns, &events, scratch);
        let chosen = self.choose(scratch);
        let own = query.counted.as_ref().map(|(events, is_last_day)| {
            let end = events.end.min(events.start + self.shape.max_length);
            (&columns.items[events.start..end], *is_last_day)
        });
        let context = Context::new(self, columns, &events, own);
        let n_columns = self.shape.n_columns();
        let n_features = self.shape.n_features as usize;
        for (place, found) in chosen.into_iter().enumerate() {
            let item = scratch.items[found];
            let counts = &mut scratch.counts[found * (n_columns + 2)..][..n_columns + 2];
            context.leave_out(item, &mut counts[..n_columns]);
            if counts.iter().all(|&count| count == 0.0) {
                continue;
            }
            output.items[place] = item as i64;
            let features = &mut output.features[place * n_features..][..n_features];
            context.features(item, &counts[..n_columns], features);
            output.is_hidden[place] = match reminders {
                Reminders::Auto | Reminders::All => false,
                Reminders::Earlier => columns.items[events[0]] == item as i64,
                Reminders::None => counts[n_columns] > 0.0,
            };
        }
        for &item in &scratch.items {
            scratch.place[item] = u32::MAX;
        }
    }

    /// Finds all items that count for the known `events`, with their counts.
    fn find(&self, columns: &Columns, events: &[usize], scratch: &mut Scratch) {
        let n_columns = self.shape.n_columns();
        let n_recent = self.shape.n_recent as usize;
        let Scratch { place, items, counts } = scratch;
        items.clear();
        counts.clear();
        let mut add = |item: usize, column: usize, n: f32| {
            if place[item] == u32::MAX {
                place[item] = items.len() as u32;
                items.push(item);
                counts.resize(items.len() * (n_columns + 2), 0.0);
            }
            counts[place[item] as usize * (n_columns + 2) + column] += n;
        };
        let is_item = |item: &i64| *item >= FIRST_ITEM;
        let recent = events.iter().take(n_recent).map(|&event| columns.items[event]);
        for (back, item) in recent.enumerate().filter(|(_, item)| is_item(item)) {
            for (other, units, adjacent) in self.successors.of(item, self.n_neighbours) {
                add(other, back, units);
                if back == 0 {
                    add(other, 2 * n_recent, adjacent);
                }
            }
            for (other, units, adjacent) in self.predecessors.of(item, self.n_neighbours) {
                add(other, n_recent + back, units);
                if back == 0 {
                    add(other, 2 * n_recent + 1, adjacent);
                }
            }
        }
        for item in events.iter().map(|&event| columns.items[event]).filter(is_item) {
            add(item as usize, n_columns, 1.0);
        }
        for Alike { attributes, by_codes } in &self.alike {
            let key: Vec<i64> =
                attributes.iter().map(|&attribute| columns.codes[attribute][events[0]]).collect();
            by_codes
                .get(&key)
                .into_iter()
                .flatten()
                .for_each(|&item| add(item, n_columns + 1, 1.0));
        }
        self.frequent.iter().for_each(|&item| add(item, n_columns + 1, 1.0));
    }

    /// The found items with the greatest priorities, as places; of equal ones the lowest items.
    fn choose(&self, scratch: &Scratch) -> Vec<usize> {
        let n_counts = self.shape.n_columns() + 2;
        let mut ranked: Vec<(f64, usize, usize)> = scratch
            .items
            .iter()
            .zip(scratch.counts.chunks_exact(n_counts))
            .enumerate()
            .map(|(place, (&item, counts))| {
                let terms = counts.iter().zip(&self.priorities);
                (-terms.map(|(&n, weight)| f64::from(n) * weight).sum::<f64>(), item, place)
            })
            .collect();
        let n_candidates = self.shape.n_candidates as usize;
        let order = |a: &(f64, usize, usize), b: &(f64, usize, usize)| {
            a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
        };
        if ranked.len() > n_candidates {
            ranked.select_nth_unstable_by(n_candidates - 1, order);
            ranked.truncate(n_candidates);
        }
        ranked.sort_unstable_by(order);
        ranked.into_iter().map(|(_, _, place)| place).collect()
    }
}

/// What the features of all candidates of a session have in common.
struct Context<'a> {
    tables: &'a HostTables,
    columns: &'a Columns,
    /// The known events, the most recent first.
    events: &'a [usize],
    /// Number of known events that are recommendable items, at least 1.
    n_known: f32,
    /// Occurrences of the last item elsewhere.
    of_last: f32,
    /// Means of the values of the known events.
    means: Vec<f32>,
    /// The items of the session, which the counts contain, and whether it is of the last day.
    own: Option<(&'a [i64], bool)>,
}

impl<'a> Context<'a> {
    fn new(
        tables: &'a HostTables,
        columns: &'a Columns,
        events: &'a [usize],
        own: Option<(&'a [i64], bool)>,
    ) -> Self {
        let is_item = |event: &usize| columns.items[*event] >= FIRST_ITEM;
        let n_known = events.iter().filter(|event| is_item(event)).count().max(1) as f32;
        let mean = |values: &Vec<f32>| {
            let known = events.iter().filter(|event| is_item(event));
            known.map(|&event| values[event]).sum::<f32>() / n_known
        };
        let means = columns.values.iter().map(mean).collect();
        let mut context = Self { tables, columns, events, n_known, of_last: 0.0, means, own };
        // An unknown last item has the occurrences of padding, 0.
        let last = if is_item(&events[0]) { columns.items[events[0]] as usize } else { 0 };
        context.of_last = (tables.occurrences[last] - context.n_own(last)).max(0.0);
        context
    }

    /// How often an item occurs in the session, if the counts contain it.
    fn n_own(&self, item: usize) -> f32 {
        let items = self.own.map_or(&[][..], |(items, _)| items);
        items.iter().filter(|&&own| own == item as i64).count() as f32
    }

    /// Subtracts what the session itself contributes to the pairs of a candidate.
    fn leave_out(&self, item: usize, counts: &mut [f32]) {
        let Some((own, _)) = self.own else { return };
        let n_recent = self.tables.shape.n_recent as usize;
        let window = WINDOW as usize;
        for (place, _) in own.iter().enumerate().filter(|(_, own)| **own == item as i64) {
            let nearby = place.saturating_sub(window)..own.len().min(place + window + 1);
            for other in nearby.filter(|&other| other != place) {
                let (distance, is_later) = (place.abs_diff(other), place > other);
                let units = (UNITS / distance as u32) as f32;
                let recent = self.events.iter().take(n_recent).enumerate();
                for (back, &event) in recent {
                    if own[other] < FIRST_ITEM || self.columns.items[event] != own[other] {
                        continue;
                    }
                    // The candidate follows the recent item, or precedes it.
                    counts[if is_later { back } else { n_recent + back }] -= units;
                    if back == 0 && distance == 1 {
                        counts[2 * n_recent + usize::from(!is_later)] -= 1.0;
                    }
                }
            }
        }
        counts.iter_mut().for_each(|count| *count = count.max(0.0));
    }

    /// The features of a candidate, in the order of [`super::candidates`].
    fn features(&self, item: usize, counts: &[f32], features: &mut [f32]) {
        let Self { tables, columns, events, .. } = *self;
        let n_recent = tables.shape.n_recent as usize;
        let (successors, rest) = counts.split_at(n_recent);
        let (predecessors, adjacent) = rest.split_at(n_recent);
        let weight = |units: f32| units / UNITS as f32;
        let decayed = |units: &[f32]| {
            units.iter().zip(&tables.decays).map(|(&n, decay)| weight(n) * decay).sum::<f32>()
        };
        let decayed = [decayed(successors), decayed(predecessors)];
        let mut next = features.iter_mut();
        let mut push = |value: f32| *next.next().expect("room for all features") = value;

        let n_places = n_recent.min(2);
        let of_recent = successors[..n_places].iter().chain(&predecessors[..n_places]);
        let pairs = of_recent.map(|&n| weight(n)).chain(adjacent.iter().copied()).chain(decayed);
        pairs.for_each(|value| push(log_1p(value * 20.0) / 4.0));

        let n_own = self.n_own(item);
        let is_last_day = f32::from(u8::from(self.own.is_some_and(|(_, is_last)| is_last)));
        let occurrences = (tables.occurrences[item] - n_own).max(0.0);
        let last_day = (tables.last_day_occurrences[item] - n_own * is_last_day).max(0.0);
        push(log_1p(occurrences) / 4.0);
        push(log_1p(last_day) / 4.0);
        push(f32::from(u8::from(occurrences < 0.5)));
        let of_pair = weight(successors[0]) + weight(predecessors[0]);
        push((of_pair / ((occurrences + 1.0) * (self.of_last + 1.0)).sqrt()).sqrt());
        let both = decayed[0] + decayed[1] * PREDECESSOR_WEIGHT as f32;
        push((both / (occurrences + 1.0).sqrt()).sqrt() / 2.0);

        let is_same = |event: &&usize| columns.items[**event] == item as i64;
        let latest = events.iter().position(|event| is_same(&event));
        for place in 0..=PLACES as usize {
            let is_there = latest.is_some_and(|latest| latest.min(PLACES as usize) == place);
            push(f32::from(u8::from(is_there)));
        }
        push(log_1p(events.iter().filter(is_same).count() as f32));

        // A known item has the attributes of its event: it may not have occurred in training.
        let of_event = latest.map(|place| events[place]);
        let is_item = |event: usize| columns.items[event] >= FIRST_ITEM;
        let mut is_all_same = true;
        for (of_items, of_events) in tables.codes.iter().zip(&columns.codes) {
            let code = of_event.map_or(of_items[item], |event| of_events[event]);
            let is_same = |event: usize| is_item(event) && of_events[event] == code;
            let n_same = events.iter().filter(|&&event| is_same(event)).count();
            push(f32::from(u8::from(is_same(events[0]))));
            push(n_same as f32 / self.n_known);
            is_all_same &= is_same(events[0]);
        }
        if tables.codes.len() > 1 {
            push(f32::from(u8::from(is_all_same)));
        }
        let of_values = tables.values.iter().zip(&columns.values).zip(&self.means);
        for ((of_items, of_events), mean) in of_values {
            let value = of_event.map_or(of_items[item], |event| of_events[event]);
            push((value - of_events[events[0]]).abs().min(3.0));
            push((value - mean).abs().min(3.0));
        }
        push(log_1p(self.of_last) / 4.0);
        push(self.n_known.ln() / 2.0);
    }
}

/// ln(1 + n); most counts are 0.
fn log_1p(n: f32) -> f32 {
    if n == 0.0 { 0.0 } else { n.ln_1p() }
}
