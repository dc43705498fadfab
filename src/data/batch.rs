//! Sessions as padded tensors.

use std::sync::{Mutex, PoisonError};

use tch::kind::Element;
use tch::{Device, Kind, Tensor};

use super::plan::derive_seed;
use super::{Features, Sessions};

/// One micro-batch within a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Seed of everything random about it: a function of (seed, day, epoch, step, lane).
    pub seed: u64,
    /// Its sessions, consecutive rows of the batch.
    pub rows: usize,
}

/// Sessions right-padded with zeros to the longest of them. `B` sessions, `L` positions.
#[derive(Debug)]
pub struct Batch {
    /// One tensor a feature, in the order of [`Features::columns`]: `[B, L]`, i64 codes or f32 values.
    pub columns: Vec<Tensor>,
    /// Events in each session: `[B]`, i64.
    pub lengths: Tensor,
    /// The micro-batches in it.
    pub segments: Vec<Segment>,
    /// Number of targets when every event but the first is one: the sum of lengths − 1.
    pub n_next_items: usize,
}

impl Batch {
    /// Takes rows `rows` of `sessions`, in this order.
    pub fn new(sessions: &[(&Sessions, usize)], features: &Features, segments: Vec<Segment>) -> Self {
        let lengths: Vec<i64> = sessions.iter().map(|(of, row)| of.span(*row).len() as i64).collect();
        let (n_rows, length) = (sessions.len(), lengths.iter().copied().max().unwrap_or(0) as usize);
        let columns = features.columns().iter().enumerate().map(|(column, feature)| {
            let rows = sessions.iter();
            if feature.is_categorical() {
                pad(rows.map(|(of, row)| of.ids(column, *row)), n_rows, length)
            } else {
                pad(rows.map(|(of, row)| of.values(column, *row)), n_rows, length)
            }
        });
        let n_next_items = lengths.iter().map(|&length| length as usize - 1).sum();
        Self { columns: columns.collect(), lengths: Tensor::from_slice(&lengths), segments, n_next_items }
    }

    /// Number of sessions, `B`.
    pub fn n_sessions(&self) -> usize {
        self.lengths.size()[0] as usize
    }

    /// Item indices `[B, L]`, 0 where there is no event.
    pub fn items(&self) -> &Tensor {
        &self.columns[0]
    }

    /// The item indices of each session.
    pub fn sessions(&self) -> Vec<Vec<i64>> {
        let items: Vec<i64> = self.items().reshape([-1]).try_into().expect("item indices are i64");
        let lengths: Vec<i64> = (&self.lengths).try_into().expect("lengths are i64");
        let longest = self.items().size()[1].max(1) as usize;
        items.chunks_exact(longest).zip(lengths).map(|(row, n)| row[..n as usize].to_vec()).collect()
    }

    /// The batch on a device.
    pub fn to_device(&self, device: Device) -> Self {
        Self {
            columns: self.columns.iter().map(|column| column.to_device(device)).collect(),
            lengths: self.lengths.to_device(device),
            segments: self.segments.clone(),
            n_next_items: self.n_next_items,
        }
    }

    /// Splits each session into its known part and the event to be predicted: the batch without every
    /// session's last event, and the item indices `[B]` of those.
    pub fn split_last(&self) -> (Self, Tensor) {
        let last = (&self.lengths - 1).unsqueeze(1);
        let targets = self.items().gather(1, &last, false).squeeze_dim(1);
        let longest = (self.items().size()[1] - 1).max(0);
        let columns =
            self.columns.iter().map(|column| column.scatter_value(1, &last, 0).narrow(1, 0, longest));
        let known = Self {
            columns: columns.collect(),
            lengths: &self.lengths - 1,
            segments: self.segments.clone(),
            n_next_items: self.n_next_items - self.n_sessions(),
        };
        (known, targets)
    }
}

/// Lists of at most `length` values, right-padded with zeros: `[n_rows, length]`.
fn pad<'a, T: Element + Copy + Default + 'a>(
    lists: impl Iterator<Item = &'a [T]>,
    n_rows: usize,
    length: usize,
) -> Tensor {
    let mut padded = vec![T::default(); n_rows * length];
    // Without sessions there is nothing to pad, but a chunk must have a length.
    for (row, list) in padded.chunks_exact_mut(length.max(1)).zip(lists) {
        row[..list.len()].copy_from_slice(list);
    }
    Tensor::from_slice(&padded).view([n_rows as i64, length as i64])
}

/// Randomness of one pass over a batch, for dropout and its like.
///
/// Each draw is made micro-batch by micro-batch from the micro-batch's own seed and for the longest session a
/// run can have, so that it depends neither on which micro-batches share a pass nor on their padding.
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

    /// Dropout (Srivastava et al. 2014) of `x: [B, L, D]` with probability `p`, scaled to keep its mean.
    pub fn dropout(&mut self, x: Tensor, p: f64) -> Tensor {
        if p == 0.0 {
            return x;
        }
        let (_, length, width) = x.size3().expect("dropout takes [B, L, D]");
        self.n_draws += 1;
        let masks: Vec<Tensor> = self
            .segments
            .iter()
            .map(|segment| {
                let seed = derive_seed(segment.seed, "dropout", &[self.n_draws]);
                let size = [segment.rows as i64, self.max_length as i64, width];
                let draw = || Tensor::rand(size, (Kind::Float, x.device()));
                with_seed(seed, x.device(), draw).narrow(1, 0, length)
            })
            .collect();
        let keep = Tensor::cat(&masks, 0).ge(p).to_kind(x.kind());
        x * keep * (1.0 / (1.0 - p))
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
