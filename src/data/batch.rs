//! Packed batches: the events of all sessions one after the other, without padding.

use std::sync::{Mutex, PoisonError};

use bireme_kernels::dropout::{dropout, row_keys};
use tch::Tensor;

use super::plan::derive_seed;
use super::{Features, Sessions};

/// One micro-batch of a [`Batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Seed of the random numbers of the whole micro-batch (dropout masks, swap noise): a function
    /// of (seed, day, epoch, step, stream).
    pub seed: u64,
    /// Number of its sessions, which are consecutive in the batch.
    pub n_sessions: usize,
}

/// `B` sessions with `T` events in total, packed one after the other, in host memory.
#[derive(Debug)]
pub struct Batch {
    /// One tensor for each feature, in the order of [`Features::columns`]: `[T]`, i64 codes or f32
    /// values.
    pub columns: Vec<Tensor>,
    /// Number of events in each session, `[B]`.
    pub lengths: Vec<usize>,
    /// Seeds of the random numbers of single sessions, `[B]`: a function of (seed, day, epoch,
    /// session).
    pub session_seeds: Vec<u64>,
    /// Day of each session, `[B]`.
    pub days: Vec<i64>,
    /// Seed of the random numbers that all ranks share: a function of (seed, day, epoch, step).
    pub step_seed: u64,
    pub segments: Vec<Segment>,
}

impl Batch {
    /// Packs sessions, given as rows of [`Sessions`], in this order into one micro-batch. All seeds
    /// are 0.
    pub fn new(sessions: &[(&Sessions, usize)], features: &Features) -> Self {
        let columns = features.columns().iter().enumerate().map(|(column, feature)| {
            let rows = sessions.iter();
            if feature.is_categorical() {
                let values: Vec<i64> =
                    rows.flat_map(|(file, row)| file.ids(column, *row)).copied().collect();
                Tensor::from_slice(&values)
            } else {
                let values: Vec<f32> =
                    rows.flat_map(|(file, row)| file.values(column, *row)).copied().collect();
                Tensor::from_slice(&values)
            }
        });
        Self { columns: columns.collect(), ..Self::outline(sessions) }
    }

    /// [`Batch::new`] without columns.
    pub fn outline(sessions: &[(&Sessions, usize)]) -> Self {
        Self {
            columns: Vec::new(),
            lengths: sessions.iter().map(|(file, row)| file.span(*row).len()).collect(),
            session_seeds: vec![0; sessions.len()],
            days: sessions.iter().map(|(file, row)| file.day_row(*row).0).collect(),
            step_seed: 0,
            segments: vec![Segment { seed: 0, n_sessions: sessions.len() }],
        }
    }

    /// Number of sessions, `B`.
    pub fn n_sessions(&self) -> usize {
        self.lengths.len()
    }

    /// Number of events, `T`.
    pub fn n_events(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Item indices `[T]`.
    pub fn items(&self) -> &Tensor {
        &self.columns[0]
    }

    /// The columns, each with a padding event at the end: `[T + 1]`.
    pub fn columns_with_padding(&self) -> Vec<Tensor> {
        self.padded_columns(self.n_events() + 1)
    }

    /// The columns, filled up with padding events to the length `n`: `[n]`.
    pub fn padded_columns(&self, n: usize) -> Vec<Tensor> {
        let n_padding = n as i64 - self.n_events() as i64;
        self.columns.iter().map(|column| column.constant_pad_nd([0, n_padding])).collect()
    }

    /// Item indices, session by session.
    pub fn sessions(&self) -> Vec<Vec<i64>> {
        let items = Vec::<i64>::try_from(self.items()).expect("item indices are i64");
        let mut rest = &items[..];
        let take = |&length: &usize| {
            let (session, after) = rest.split_at(length);
            rest = after;
            session.to_vec()
        };
        self.lengths.iter().map(take).collect()
    }

    /// Replaces the columns of the same sessions.
    pub fn with_columns(&self, columns: Vec<Tensor>) -> Self {
        Self {
            columns,
            lengths: self.lengths.clone(),
            session_seeds: self.session_seeds.clone(),
            days: self.days.clone(),
            step_seed: self.step_seed,
            segments: self.segments.clone(),
        }
    }

    /// Splits the batch into `n_parts` consecutive parts with about equal numbers of whole
    /// micro-batches.
    pub fn split(&self, n_parts: usize) -> Vec<Self> {
        let n_parts = n_parts.clamp(1, self.segments.len().max(1));
        let (mut session, mut event) = (0, 0);
        let part = |number: usize| {
            let boundary = |number: usize| number * self.segments.len() / n_parts;
            let segments = &self.segments[boundary(number)..boundary(number + 1)];
            let n_sessions: usize = segments.iter().map(|segment| segment.n_sessions).sum();
            let sessions = session..session + n_sessions;
            let lengths = self.lengths[sessions.clone()].to_vec();
            let n_events = lengths.iter().sum::<usize>() as i64;
            let columns =
                self.columns.iter().map(|column| column.narrow(0, event, n_events)).collect();
            (session, event) = (sessions.end, event + n_events);
            Self {
                columns,
                lengths,
                session_seeds: self.session_seeds[sessions.clone()].to_vec(),
                days: self.days[sessions].to_vec(),
                step_seed: self.step_seed,
                segments: segments.to_vec(),
            }
        };
        (0..n_parts).map(part).collect()
    }

    /// Splits off the last event of each session as the target: returns the batch without these
    /// events, and their item indices `[B]`.
    pub fn split_last(&self) -> (Self, Tensor) {
        let (mut kept, mut last, mut end) = (Vec::with_capacity(self.n_events()), Vec::new(), 0i64);
        for &length in &self.lengths {
            kept.extend(end..end + length as i64 - 1);
            end += length as i64;
            last.push(end - 1);
        }
        let [kept, last] = [kept, last].map(|indices| Tensor::from_slice(&indices));
        let mut known = self.with_columns(
            self.columns.iter().map(|column| column.index_select(0, &kept)).collect(),
        );
        known.lengths.iter_mut().for_each(|length| *length -= 1);
        (known, self.items().index_select(0, &last))
    }

    /// Sums `per_session: [B]` over the sessions of each micro-batch.
    pub fn by_segment(&self, per_session: &[usize]) -> Vec<usize> {
        let mut rest = per_session;
        let take = |segment: &Segment| {
            let (own, after) = rest.split_at(segment.n_sessions);
            rest = after;
            own.iter().sum()
        };
        self.segments.iter().map(take).collect()
    }

    /// Keys of rows for [`DropoutGenerator`], of which each session has `per_session: [B]`: i32.
    pub fn row_keys(&self, per_session: &[usize]) -> Vec<i32> {
        let seeds = self.segments.iter();
        let seeds: Vec<u64> =
            seeds.map(|segment| derive_seed(segment.seed, "dropout", &[])).collect();
        row_keys(&seeds, &self.by_segment(per_session))
    }
}

/// Applies dropout in a backward pass.
///
/// The mask of a row follows from the row's key, which is drawn from the seed of its micro-batch.
/// If its shape depends on the longest session of the batch, it is the leading part of the mask for
/// the longest session that the run allows. It therefore does not depend on which micro-batches are
/// in the batch.
#[derive(Clone)]
pub struct DropoutGenerator {
    max_length: usize,
    /// Uses of dropout so far.
    n_sites: u32,
}

impl DropoutGenerator {
    /// `max_length`: largest number of events in any session of the run.
    pub fn new(max_length: usize) -> Self {
        Self { max_length, n_sites: 0 }
    }

    /// Number of uses so far.
    pub fn n_sites(&self) -> u32 {
        self.n_sites
    }

    /// Continues after the uses of the generators of all parts.
    pub fn set_n_sites(&mut self, n_sites: u32) {
        self.n_sites = n_sites;
    }

    /// Applies dropout (Srivastava et al. 2014) to `x: [N, ..]` with probability `p`, scaled to
    /// keep the mean. `row_keys`: i32 `[N]`.
    pub fn dropout(&mut self, x: Tensor, p: f64, row_keys: &Tensor) -> Tensor {
        let sizes = x.size();
        self.apply(x, p, row_keys, &sizes[1..])
    }

    /// Applies dropout to attention weights `x: [N, H, .., L]`, where all sizes after the heads `H`
    /// are the length of the batch's longest session.
    pub fn dropout_weights(&mut self, x: Tensor, p: f64, row_keys: &Tensor) -> Tensor {
        let mut sizes = x.size()[1..].to_vec();
        sizes[1..].fill(self.max_length as i64);
        self.apply(x, p, row_keys, &sizes)
    }

    /// `drawn`: shape of a row of the whole mask.
    fn apply(&mut self, x: Tensor, p: f64, row_keys: &Tensor, drawn: &[i64]) -> Tensor {
        if p == 0.0 {
            return x;
        }
        self.n_sites += 1;
        dropout(&x, row_keys, self.n_sites, drawn, p)
    }
}

/// Draws with libtorch's CPU generator, seeded with `seed`.
///
/// The process has one such generator. The lock keeps ranks that run as threads from drawing
/// numbers in between.
pub fn with_seed<T>(seed: u64, draw: impl FnOnce() -> T) -> T {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    draw()
}
