//! Which sessions make up which step: a function of (seed, day, epoch), never of the number of ranks.
//!
//! A global batch is a fixed number of micro-batches. Micro-batch `l` of every step is drawn from *stream* `l`:
//! the day's row groups, in an order shuffled per epoch, are laid end to end and cut into as many streams of
//! equal length (to one session) as a global batch has micro-batches, and each stream is shuffled in itself: so that its
//! micro-batches hold about equally many events, as ranks wait for the one that has most to do.
//! A rank owns whole streams, so it reads its share of the day's bytes (plus at most the two row groups that its
//! stream begins and ends in), while who owns a stream changes nothing about what is in it. All streams end within one
//! session of each other, so every rank runs the same number of steps, and nothing is dropped or seen twice.
//! The virtual shards of mosaicml/streaming serve the same end.

use std::ops::Range;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xxhash_rust::xxh3::xxh3_64;

/// Derives an independent seed for a purpose and a place in the run.
pub fn derive_seed(seed: u64, purpose: &str, place: &[u64]) -> u64 {
    let mut key = Vec::with_capacity(16 + purpose.len() + 8 * place.len());
    key.extend_from_slice(&seed.to_le_bytes());
    key.extend_from_slice(purpose.as_bytes());
    for part in place {
        key.extend_from_slice(&part.to_le_bytes());
    }
    xxh3_64(&key)
}

fn generator(seed: u64, purpose: &str, place: &[u64]) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(derive_seed(seed, purpose, place))
}

/// One stream of an epoch, and the rows it covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionStream {
    /// Position of its micro-batch in every step.
    pub index: usize,
    /// Row spans by row group.
    pub spans: Vec<(usize, Range<usize>)>,
    /// Of the order in which its sessions are seen.
    seed: u64,
}

impl SessionStream {
    /// The order in which its sessions are seen, which have so many events each and are numbered as in `spans` laid end to
    /// end. Sorted by length, sessions are cut into as many strata as a micro-batch has sessions; each micro-batch gets one
    /// of every stratum, drawn without replacement (stratified sampling).
    pub fn order(&self, lengths: &[usize], micro_batch: usize) -> Vec<usize> {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        let n = lengths.len();
        let mut sessions: Vec<usize> = (0..n).collect();
        sessions.shuffle(&mut generator);
        sessions.sort_by_key(|&session| lengths[session]);
        // Strata differ by one session at most; chance decides which have one more, and go into the last micro-batch.
        let shift = generator.random_range(0..micro_batch);
        let start = |stratum: usize| (stratum * n + shift) / micro_batch;
        let drawn = |stratum: usize| {
            let mut sessions = sessions[start(stratum)..start(stratum + 1)].to_vec();
            sessions.shuffle(&mut generator);
            sessions
        };
        let strata: Vec<Vec<usize>> = (0..micro_batch).map(drawn).collect();
        let of = |place: usize| strata.iter().filter_map(move |stratum| stratum.get(place).copied());
        (0..n.div_ceil(micro_batch)).flat_map(of).collect()
    }
}

/// What a day's steps are cut from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Micro-batches in a global batch, which is the number of streams.
    pub n_streams: usize,
    /// Sessions in a micro-batch.
    pub micro_batch: usize,
}

impl StepShape {
    /// Steps of one epoch over `n_sessions`.
    pub fn steps(&self, n_sessions: usize) -> usize {
        n_sessions.div_ceil(self.n_streams).div_ceil(self.micro_batch)
    }

    /// Sessions that stream `index` holds.
    fn stream_rows(&self, n_sessions: usize, index: usize) -> Range<usize> {
        index * n_sessions / self.n_streams..(index + 1) * n_sessions / self.n_streams
    }

    /// Sessions in the global batch of step `step` of an epoch.
    pub fn sessions_in_step(&self, n_sessions: usize, step: usize) -> usize {
        (0..self.n_streams)
            .map(|stream| self.micro_batch_rows(self.stream_rows(n_sessions, stream).len(), step).len())
            .sum()
    }

    /// Which of a stream's `n_rows` sessions are in its micro-batch of step `step`; none once the stream is used up.
    pub fn micro_batch_rows(&self, n_rows: usize, step: usize) -> Range<usize> {
        (step * self.micro_batch).min(n_rows)..((step + 1) * self.micro_batch).min(n_rows)
    }
}

/// The streams of an epoch that `rank` owns.
pub fn streams_of_rank(
    group_rows: &[usize],
    shape: StepShape,
    (seed, day, epoch): (u64, i64, usize),
    (rank, world_size): (usize, usize),
) -> Vec<SessionStream> {
    let place = [day as u64, epoch as u64];
    let mut groups: Vec<usize> = (0..group_rows.len()).collect();
    groups.shuffle(&mut generator(seed, "row groups", &place));
    let n_sessions: usize = group_rows.iter().sum();
    (rank..shape.n_streams)
        .step_by(world_size)
        .map(|index| {
            let spans = spans_in_order(group_rows, &groups, shape.stream_rows(n_sessions, index));
            let seed = derive_seed(seed, "lane", &[place[0], place[1], index as u64]);
            SessionStream { index, spans, seed }
        })
        .collect()
}

/// The spans of rows `rows` of the row groups laid end to end in the order `groups`.
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

    /// (group, row) of every session of every step, in stream order, put together from all ranks.
    fn epoch(group_rows: &[usize], shape: StepShape, world_size: usize) -> Vec<Vec<(usize, usize)>> {
        let n: usize = group_rows.iter().sum();
        let mut streams: Vec<SessionStream> = (0..world_size)
            .flat_map(|rank| streams_of_rank(group_rows, shape, (7, 3, 1), (rank, world_size)))
            .collect();
        streams.sort_by_key(|stream| stream.index);
        let rows: Vec<Vec<(usize, usize)>> = streams
            .iter()
            .map(|stream| stream.spans.iter().flat_map(|(g, rows)| rows.clone().map(|r| (*g, r))).collect())
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
                let of_lane = |(order, rows): (&Vec<usize>, &Vec<(usize, usize)>)| {
                    let taken = shape.micro_batch_rows(order.len(), step);
                    order[taken].iter().map(|&i| rows[i]).collect::<Vec<_>>()
                };
                orders.iter().zip(&rows).flat_map(of_lane).collect()
            })
            .collect()
    }

    /// Events of a session: 2 to 20, most have few.
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
    fn every_session_is_seen_once_in_steps_that_are_full_but_for_the_last() {
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
                assert!(i + 1 == steps.len() || i + 2 == steps.len() || step.len() == 4 * n_streams);
            }
        }
    }

    #[test]
    fn epochs_and_days_differ() {
        let shape = StepShape { n_streams: 2, micro_batch: 4 };
        let order = |day, epoch| {
            streams_of_rank(&[40], shape, (7, day, epoch), (0, 1))[0].order(&[2; 20], shape.micro_batch)
        };
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
    }

    #[test]
    fn micro_batches_hold_about_as_many_events() {
        let shape = StepShape { n_streams: 1, micro_batch: 32 };
        let n_events: Vec<usize> =
            epoch(&[32 * 100], shape, 1).iter().map(|step| step.iter().map(length).sum()).collect();
        let mean = n_events.iter().sum::<usize>() as f64 / 100.0;
        let largest = *n_events.iter().max().unwrap() as f64;
        // Drawn without regard to lengths, the fullest of a hundred holds half as many again as the mean.
        assert!(largest < 1.03 * mean, "{largest} beside {mean}");
    }

    #[test]
    fn a_rank_reads_about_its_share() {
        let shape = StepShape { n_streams: 8, micro_batch: 4 };
        let groups = vec![100; 64];
        let streams = streams_of_rank(&groups, shape, (7, 1, 0), (1, 4));
        let touched: usize = streams.iter().map(|stream| stream.spans.len()).sum();
        assert!(touched <= 64 / 4 + 2 * streams.len(), "{touched} of 64 row groups");
    }
}
