//! Sessions as tensors, one event after the other: nothing is padded.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Tensor};

use super::plan::derive_seed;
use super::{Features, Sessions};

/// One micro-batch within a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Seed of what its sessions share: a function of (seed, day, epoch, step, lane).
    pub seed: u64,
    /// Its sessions, consecutive in the batch.
    pub n_sessions: usize,
}

/// `B` sessions of `T` events in all, packed: those of the second session follow those of the first.
#[derive(Debug)]
pub struct Batch {
    /// One tensor a feature, in the order of [`Features::columns`]: `[T]`, i64 codes or f32 values.
    pub columns: Vec<Tensor>,
    /// Events in each session, `[B]`.
    pub lengths: Vec<usize>,
    /// Seed of what is drawn for one session alone, `[B]`: a function of (seed, day, epoch, session).
    pub session_seeds: Vec<u64>,
    /// Seed of what all ranks draw alike: a function of (seed, day, epoch, step).
    pub step_seed: u64,
    /// The micro-batches in it.
    pub segments: Vec<Segment>,
}

impl Batch {
    /// Takes rows `rows` of `sessions`, in this order, as one micro-batch in which nothing is drawn.
    pub fn new(sessions: &[(&Sessions, usize)], features: &Features) -> Self {
        let columns = features.columns().iter().enumerate().map(|(column, feature)| {
            let rows = sessions.iter();
            if feature.is_categorical() {
                let values: Vec<i64> = rows.flat_map(|(of, row)| of.ids(column, *row)).copied().collect();
                Tensor::from_slice(&values)
            } else {
                let values: Vec<f32> = rows.flat_map(|(of, row)| of.values(column, *row)).copied().collect();
                Tensor::from_slice(&values)
            }
        });
        Self {
            columns: columns.collect(),
            lengths: sessions.iter().map(|(of, row)| of.span(*row).len()).collect(),
            session_seeds: vec![0; sessions.len()],
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

    /// Item indices of each session.
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

    /// The batch on a device.
    pub fn to_device(&self, device: Device) -> Self {
        self.with_columns(self.columns.iter().map(|column| column.to_device(device)).collect())
    }

    /// The same sessions with other columns.
    pub fn with_columns(&self, columns: Vec<Tensor>) -> Self {
        Self {
            columns,
            lengths: self.lengths.clone(),
            session_seeds: self.session_seeds.clone(),
            step_seed: self.step_seed,
            segments: self.segments.clone(),
        }
    }

    /// Splits each session into its known part and the event to be predicted: the batch without every
    /// session's last event, and the item indices `[B]` of those.
    pub fn split_last(&self) -> (Self, Tensor) {
        let (mut kept, mut last, mut end) = (Vec::with_capacity(self.n_events()), Vec::new(), 0i64);
        for &length in &self.lengths {
            kept.extend(end..end + length as i64 - 1);
            end += length as i64;
            last.push(end - 1);
        }
        let device = self.items().device();
        let [kept, last] = [kept, last].map(|places| Tensor::from_slice(&places).to_device(device));
        let mut known =
            self.with_columns(self.columns.iter().map(|column| column.index_select(0, &kept)).collect());
        known.lengths.iter_mut().for_each(|length| *length -= 1);
        (known, self.items().index_select(0, &last))
    }

    /// Adds up one number a session over the sessions of each micro-batch.
    pub fn by_segment(&self, per_session: &[usize]) -> Vec<i64> {
        let mut rest = per_session;
        let take = |segment: &Segment| {
            let (mine, after) = rest.split_at(segment.n_sessions);
            rest = after;
            mine.iter().sum::<usize>() as i64
        };
        self.segments.iter().map(take).collect()
    }
}

/// Randomness of one pass over a batch, for dropout and its like.
///
/// Each draw is made micro-batch by micro-batch from the micro-batch's own seed, and where a shape depends on the
/// longest session, for the longest that a run can have: so it does not depend on which micro-batches share a pass.
pub struct Noise<'a> {
    segments: &'a [Segment],
    max_length: usize,
    n_draws: u64,
}

impl<'a> Noise<'a> {
    /// For a pass over `batch` in a run whose sessions are at most `max_length` long.
    pub fn new(batch: &'a Batch, max_length: usize) -> Self {
        Self { segments: &batch.segments, max_length, n_draws: 0 }
    }

    /// Dropout (Srivastava et al. 2014) of `x: [N, ..]` with probability `p`, scaled to keep its mean. The first
    /// `counts[0]` rows belong to the first micro-batch, and so on.
    pub fn dropout(&mut self, x: Tensor, p: f64, counts: &[i64]) -> Tensor {
        let sizes = x.size();
        self.drop(x, p, counts, &sizes[1..])
    }

    /// Dropout of attention weights `x: [N, H, .., L]`, whose sizes behind the heads are those of the longest session.
    pub fn dropout_weights(&mut self, x: Tensor, p: f64, counts: &[i64]) -> Tensor {
        let mut sizes = x.size()[1..].to_vec();
        sizes[1..].fill(self.max_length as i64);
        self.drop(x, p, counts, &sizes)
    }

    fn drop(&mut self, x: Tensor, p: f64, counts: &[i64], drawn: &[i64]) -> Tensor {
        if p == 0.0 {
            return x;
        }
        self.n_draws += 1;
        let masks: Vec<Tensor> = self
            .segments
            .iter()
            .zip(counts)
            .map(|(segment, &count)| {
                let seed = derive_seed(segment.seed, "dropout", &[self.n_draws]);
                let size = [&[count], drawn].concat();
                let kept = with_seed(seed, x.device(), || {
                    Tensor::empty(size, (x.kind(), x.device())).bernoulli_float_(1.0 - p)
                });
                x.size()[1..].iter().zip(1..).fold(kept, |kept, (&size, dim)| kept.narrow(dim, 0, size))
            })
            .collect();
        x * (Tensor::cat(&masks, 0) * (1.0 / (1.0 - p)))
    }
}

/// Draws with libtorch's generator for `device`, seeded with `seed`.
///
/// The generator is one for the whole process: the lock keeps ranks that are threads out of each other's draws.
pub fn with_seed<T>(seed: u64, device: Device, draw: impl FnOnce() -> T) -> T {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _only = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    match device {
        Device::Cuda(_) => tch::Cuda::manual_seed_all(seed),
        _ => tch::manual_seed(seed as i64),
    }
    draw()
}
