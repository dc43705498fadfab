//! Sessions as tensors, one event after the other: nothing is padded.

use std::sync::{Mutex, PoisonError};

use rand::{RngCore, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use tch::{Device, Kind, Tensor};

use super::plan::derive_seed;
use super::{Features, Sessions};
use crate::device::host::{in_parallel, numbers};

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
        let seeds: Vec<u64> = self
            .segments
            .iter()
            .map(|segment| derive_seed(segment.seed, "dropout", &[self.n_draws]))
            .collect();
        let size = [&[x.size()[0]], drawn].concat();
        let mask = match x.device() {
            Device::Cpu => mask_here(&size, p, &seeds, counts),
            device => mask_on(device, &size, p, &seeds, counts),
        };
        let mask = x.size()[1..].iter().zip(1..).fold(mask, |mask, (&size, dim)| mask.narrow(dim, 0, size));
        x * mask
    }
}

/// Zero with probability `p`, else `1 / (1 − p)`: as `size`, of whose rows the first `counts[0]` follow from the first seed,
/// and so on. libtorch's own generator for the CPU gives one number at a time, on one thread.
fn mask_here(size: &[i64], p: f64, seeds: &[u64], counts: &[i64]) -> Tensor {
    let mut mask = Tensor::empty(size, (Kind::Float, Device::Cpu));
    let of_row: usize = size[1..].iter().product::<i64>() as usize;
    let n_each = seeds.len().div_ceil(tch::get_num_threads().max(1) as usize).max(1);
    let mut rest = numbers::<f32>(&mut mask);
    let mut parts: Vec<(u64, &mut [f32])> = Vec::with_capacity(seeds.len());
    for (&seed, &count) in seeds.iter().zip(counts) {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(count as usize * of_row);
        rest = after;
        parts.push((seed, part));
    }
    let most_kept = ((1.0 - p) * 2f64.powi(32)) as u32;
    let value = |bits: u32| if bits < most_kept { (1.0 / (1.0 - p)) as f32 } else { 0.0 };
    in_parallel(parts.chunks_mut(n_each), |parts| {
        for (seed, part) in parts {
            let mut generator = Xoshiro256PlusPlus::seed_from_u64(*seed);
            for two in part.chunks_mut(2) {
                let bits = generator.next_u64();
                for (value_of, bits) in two.iter_mut().zip([bits as u32, (bits >> 32) as u32]) {
                    *value_of = value(bits);
                }
            }
        }
    });
    mask
}

/// The same on a GPU, by its own generator.
fn mask_on(device: Device, size: &[i64], p: f64, seeds: &[u64], counts: &[i64]) -> Tensor {
    let masks: Vec<Tensor> = seeds
        .iter()
        .zip(counts)
        .map(|(&seed, &count)| {
            let size = [&[count], &size[1..]].concat();
            with_seed(seed, device, || Tensor::empty(size, (Kind::Float, device)).bernoulli_float_(1.0 - p))
        })
        .collect();
    Tensor::cat(&masks, 0) * (1.0 / (1.0 - p))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_keeps_the_mean_and_each_micro_batch_has_its_own() {
        let (p, counts) = (0.3, [300, 0, 500]);
        let mask = mask_here(&[800, 101], p, &[1, 2, 3], &counts);
        let mean = mask.mean(Kind::Double).double_value(&[]);
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        let kept = mask.gt(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((kept - 0.7).abs() < 0.01, "{kept}");
        assert!(((mask.max().double_value(&[])) - 1.0 / 0.7).abs() < 1e-6);
        let alone = mask_here(&[500, 101], p, &[3], &[500]);
        assert!(mask.narrow(0, 300, 500).equal(&alone));
        assert!(!mask.narrow(0, 0, 300).equal(&alone.narrow(0, 0, 300)));
        assert_eq!(mask_here(&[0, 4], p, &[5], &[0]).size(), [0, 4]);
    }
}
