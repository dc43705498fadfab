//! Assigns sessions to steps as a function of (seed, day, epoch), independent of the number of
//! ranks.
//!
//! A global batch is a fixed number `L` of micro-batches. The day's row groups are shuffled per
//! epoch, concatenated and cut into `L` *streams* whose lengths differ by one session at most.
//! Micro-batch `l` of every step is taken from stream `l`.
//!
//! Each stream is shuffled such that its micro-batches have about the same number of events,
//! because the slowest rank determines the time of a step. A rank reads whole streams, that is its
//! part of the day's bytes plus at most the two row groups in which a stream begins and ends. All
//! streams end within one session of each other, so that every rank runs the same number of steps
//! and each session is seen once. The virtual shards of mosaicml/streaming have the same purpose.

use std::ops::Range;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xxhash_rust::xxh3::xxh3_64;

use crate::config::SessionOrder;

/// Derives an independent seed for a purpose and a position in the run.
pub fn derive_seed(seed: u64, purpose: &str, position: &[u64]) -> u64 {
    let mut key = Vec::with_capacity(16 + purpose.len() + 8 * position.len());
    key.extend_from_slice(&seed.to_le_bytes());
    key.extend_from_slice(purpose.as_bytes());
    for part in position {
        key.extend_from_slice(&part.to_le_bytes());
    }
    xxh3_64(&key)
}

/// The random numbers of an epoch are a function of these.
#[derive(Clone, Copy, Debug)]
pub struct EpochKey {
    /// Seed of the run.
    pub seed: u64,
    pub day: i64,
    pub epoch: usize,
    pub order: SessionOrder,
}

/// One stream of an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionStream {
    /// Index of its micro-batch in every step.
    pub index: usize,
    /// Its rows: row groups and spans of rows in them.
    pub spans: Vec<(usize, Range<usize>)>,
    /// Seed of the order of its sessions; `None` for that of `spans`.
    seed: Option<u64>,
}

impl SessionStream {
    /// Returns the training order of the stream's sessions, as indices into `lengths`: the number
    /// of events of each session, in the order of `spans`.
    ///
    /// Stratified sampling: the sessions are sorted by length and cut into `micro_batch` strata,
    /// and each micro-batch draws one session of every stratum without replacement.
    pub fn order(&self, lengths: &[usize], micro_batch: usize) -> Vec<usize> {
        let n = lengths.len();
        let mut sessions: Vec<usize> = (0..n).collect();
        let Some(seed) = self.seed else { return sessions };
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        sessions.shuffle(&mut generator);
        sessions.sort_by_key(|&session| lengths[session]);
        // Strata differ by one session at most. The last, shorter micro-batch gets the extra
        // sessions, so a random shift decides which strata have one.
        let shift = generator.random_range(0..micro_batch);
        let start = |stratum: usize| (stratum * n + shift) / micro_batch;
        let drawn = |stratum: usize| {
            let mut sessions = sessions[start(stratum)..start(stratum + 1)].to_vec();
            sessions.shuffle(&mut generator);
            sessions
        };
        let strata: Vec<Vec<usize>> = (0..micro_batch).map(drawn).collect();
        let micro_batch_sessions =
            |index: usize| strata.iter().filter_map(move |stratum| stratum.get(index).copied());
        (0..n.div_ceil(micro_batch)).flat_map(micro_batch_sessions).collect()
    }
}

/// Sizes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Number of streams: micro-batches in a global batch.
    pub n_streams: usize,
    /// Number of sessions in a micro-batch.
    pub micro_batch: usize,
}

impl StepShape {
    /// Number of steps of one epoch over `n_sessions`.
    pub fn steps(&self, n_sessions: usize) -> usize {
        n_sessions.div_ceil(self.n_streams).div_ceil(self.micro_batch)
    }

    /// Rows of stream `index` in the concatenated row groups.
    fn stream_rows(&self, n_sessions: usize, index: usize) -> Range<usize> {
        index * n_sessions / self.n_streams..(index + 1) * n_sessions / self.n_streams
    }

    /// Rows of stream `index` in each step, if the steps take the rows one after the other. A
    /// stream has as many as in [`StepShape::stream_rows`].
    fn rows_in_order(self, n_sessions: usize, index: usize) -> impl Iterator<Item = Range<usize>> {
        let mut first = 0;
        (0..self.steps(n_sessions)).map(move |step| {
            let n_rows = |stream| {
                self.micro_batch_rows(self.stream_rows(n_sessions, stream).len(), step).len()
            };
            let start = first + (0..index).map(n_rows).sum::<usize>();
            first += self.sessions_in_step(n_sessions, step);
            start..start + n_rows(index)
        })
    }

    /// Number of sessions in the global batch of step `step` of an epoch.
    pub fn sessions_in_step(&self, n_sessions: usize, step: usize) -> usize {
        (0..self.n_streams)
            .map(|stream| {
                self.micro_batch_rows(self.stream_rows(n_sessions, stream).len(), step).len()
            })
            .sum()
    }

    /// Range of a stream's `n_rows` sessions that micro-batch `step` takes; empty after the
    /// stream's end.
    pub fn micro_batch_rows(&self, n_rows: usize, step: usize) -> Range<usize> {
        (step * self.micro_batch).min(n_rows)..((step + 1) * self.micro_batch).min(n_rows)
    }
}

/// The streams of an epoch that `rank` reads.
pub fn streams_of_rank(
    group_rows: &[usize],
    shape: StepShape,
    key: EpochKey,
    rank: usize,
    world_size: usize,
) -> Vec<SessionStream> {
    let position = [key.day as u64, key.epoch as u64];
    let mut groups: Vec<usize> = (0..group_rows.len()).collect();
    let n_sessions: usize = group_rows.iter().sum();
    let of_rank = (rank..shape.n_streams).step_by(world_size);
    if key.order == SessionOrder::File {
        let in_step = |rows| spans_in_order(group_rows, &groups, rows);
        let spans = |index| shape.rows_in_order(n_sessions, index).flat_map(in_step).collect();
        return of_rank
            .map(|index| SessionStream { index, spans: spans(index), seed: None })
            .collect();
    }
    groups.shuffle(&mut ChaCha8Rng::seed_from_u64(derive_seed(key.seed, "row groups", &position)));
    of_rank
        .map(|index| {
            let spans = spans_in_order(group_rows, &groups, shape.stream_rows(n_sessions, index));
            let seed = derive_seed(key.seed, "lane", &[position[0], position[1], index as u64]);
            SessionStream { index, spans, seed: Some(seed) }
        })
        .collect()
}

/// Splits the rows `rows` of the row groups, concatenated in the order `groups`, into spans by row
/// group.
pub fn spans_in_order(
    group_rows: &[usize],
    groups: &[usize],
    rows: Range<usize>,
) -> Vec<(usize, Range<usize>)> {
    let mut spans = Vec::new();
    let mut first = 0;
    for &group in groups {
        let (start, end) = (rows.start.max(first), rows.end.min(first + group_rows[group]));
        if start < end {
            spans.push((group, start - first..end - first));
        }
        first += group_rows[group];
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (group, row) of every session of every step, in stream order, collected from all ranks.
    fn epoch(
        group_rows: &[usize],
        shape: StepShape,
        world_size: usize,
    ) -> Vec<Vec<(usize, usize)>> {
        epoch_in(SessionOrder::Shuffled, group_rows, shape, world_size)
    }

    fn epoch_in(
        order: SessionOrder,
        group_rows: &[usize],
        shape: StepShape,
        world_size: usize,
    ) -> Vec<Vec<(usize, usize)>> {
        let n: usize = group_rows.iter().sum();
        let key = EpochKey { seed: 7, day: 3, epoch: 1, order };
        let mut streams: Vec<SessionStream> = (0..world_size)
            .flat_map(|rank| streams_of_rank(group_rows, shape, key, rank, world_size))
            .collect();
        streams.sort_by_key(|stream| stream.index);
        let rows: Vec<Vec<(usize, usize)>> = streams
            .iter()
            .map(|stream| {
                stream.spans.iter().flat_map(|(g, rows)| rows.clone().map(|r| (*g, r))).collect()
            })
            .collect();
        let orders: Vec<Vec<usize>> = streams
            .iter()
            .zip(&rows)
            .map(|(stream, rows)| {
                stream.order(&rows.iter().map(length).collect::<Vec<_>>(), shape.micro_batch)
            })
            .collect();
        (0..shape.steps(n))
            .map(|step| {
                let micro_batch = |(order, rows): (&Vec<usize>, &Vec<(usize, usize)>)| {
                    let taken = shape.micro_batch_rows(order.len(), step);
                    order[taken].iter().map(|&i| rows[i]).collect::<Vec<_>>()
                };
                orders.iter().zip(&rows).flat_map(micro_batch).collect()
            })
            .collect()
    }

    /// Number of events of a session: 2 to 20, mostly few.
    fn length((group, row): &(usize, usize)) -> usize {
        2 + (derive_seed(9, "length", &[*group as u64, *row as u64]) % 1000).pow(3) as usize * 18
            / 1_000_000_000
    }

    #[test]
    fn global_batches_do_not_depend_on_the_number_of_ranks() {
        let shape = StepShape { n_streams: 8, micro_batch: 4 };
        let groups = [50, 1, 33, 17, 64, 9];
        let alone = epoch(&groups, shape, 1);
        for world_size in 2..=8 {
            assert_eq!(epoch(&groups, shape, world_size), alone);
        }
    }

    #[test]
    fn every_session_is_seen_once_and_all_steps_but_the_last_are_full() {
        for (n, n_streams) in [(0, 4), (3, 8), (8, 8), (100, 8), (1000, 7)] {
            let shape = StepShape { n_streams, micro_batch: 4 };
            let groups = [n / 3, n - n / 3];
            let steps = epoch(&groups, shape, 1);
            let mut seen: Vec<_> = steps.iter().flatten().copied().collect();
            seen.sort_unstable();
            let all: Vec<_> = (0..2).flat_map(|g| (0..groups[g]).map(move |r| (g, r))).collect();
            assert_eq!(seen, all);
            for (i, step) in steps.iter().enumerate() {
                assert_eq!(step.len(), shape.sessions_in_step(n, i));
                assert!(
                    i + 1 == steps.len() || i + 2 == steps.len() || step.len() == 4 * n_streams
                );
            }
        }
    }

    #[test]
    fn steps_follow_the_file_in_its_order() {
        for (groups, n_streams) in [(vec![3, 0, 50, 20], 4), (vec![5], 8), (vec![7, 94], 7)] {
            let shape = StepShape { n_streams, micro_batch: 4 };
            let in_file: Vec<_> =
                (0..groups.len()).flat_map(|g| (0..groups[g]).map(move |r| (g, r))).collect();
            for world_size in [1, 3] {
                let steps = epoch_in(SessionOrder::File, &groups, shape, world_size);
                assert_eq!(steps.concat(), in_file);
                let sizes: Vec<_> = steps.iter().map(Vec::len).collect();
                let expected = (0..steps.len()).map(|i| shape.sessions_in_step(in_file.len(), i));
                assert_eq!(sizes, expected.collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn each_epoch_and_day_has_its_own_order() {
        let shape = StepShape { n_streams: 2, micro_batch: 4 };
        let order = |day, epoch| {
            let key = EpochKey { seed: 7, day, epoch, order: SessionOrder::Shuffled };
            streams_of_rank(&[40], shape, key, 0, 1)[0].order(&[2; 20], shape.micro_batch)
        };
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
    }

    #[test]
    fn micro_batches_have_about_equal_numbers_of_events() {
        let shape = StepShape { n_streams: 1, micro_batch: 32 };
        let n_events: Vec<usize> =
            epoch(&[32 * 100], shape, 1).iter().map(|step| step.iter().map(length).sum()).collect();
        let mean = n_events.iter().sum::<usize>() as f64 / 100.0;
        let largest = *n_events.iter().max().unwrap() as f64;
        // Without strata the largest of a hundred micro-batches has 1.5 times the mean.
        assert!(largest < 1.03 * mean, "largest {largest}, mean {mean}");
    }

    #[test]
    fn a_rank_reads_only_the_row_groups_of_its_streams() {
        let shape = StepShape { n_streams: 8, micro_batch: 4 };
        let groups = vec![100; 64];
        let key = EpochKey { seed: 7, day: 1, epoch: 0, order: SessionOrder::Shuffled };
        let streams = streams_of_rank(&groups, shape, key, 1, 4);
        let touched: usize = streams.iter().map(|stream| stream.spans.len()).sum();
        assert!(touched <= 64 / 4 + 2 * streams.len(), "{touched} of 64 row groups");
    }
}
