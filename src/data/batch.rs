//! Packed batches: the events of all sessions one after the other, without padding.

use std::sync::{Mutex, PoisonError};

use rand::{RngCore, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use tch::{Device, Tensor};

use super::plan::derive_seed;
use super::{Features, Sessions};
use crate::device::host::{in_parallel, numbers, part_len};
use crate::device::operation::with_backward;
use crate::device::send;
use crate::device::vectors::{self, Loop};

/// One micro-batch of a [`Batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Seed of the random numbers of the whole micro-batch (dropout masks, swap noise): a function
    /// of (seed, day, epoch, step, stream).
    pub seed: u64,
    /// Number of its sessions, which are consecutive in the batch.
    pub n_sessions: usize,
}

/// `B` sessions with `T` events in total, packed one after the other.
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
                let values: Vec<i64> = rows.flat_map(|(file, row)| file.ids(column, *row)).copied().collect();
                Tensor::from_slice(&values)
            } else {
                let values: Vec<f32> =
                    rows.flat_map(|(file, row)| file.values(column, *row)).copied().collect();
                Tensor::from_slice(&values)
            }
        });
        Self {
            columns: columns.collect(),
            lengths: sessions.iter().map(|(file, row)| file.span(*row).len()).collect(),
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

    /// Copies the columns to a device.
    pub fn to_device(&self, device: Device) -> Self {
        self.with_columns(self.columns.iter().map(|column| send(column, device)).collect())
    }

    /// Replaces the columns of the same sessions.
    pub fn with_columns(&self, columns: Vec<Tensor>) -> Self {
        Self {
            columns,
            lengths: self.lengths.clone(),
            session_seeds: self.session_seeds.clone(),
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
            let columns = self.columns.iter().map(|column| column.narrow(0, event, n_events)).collect();
            (session, event) = (sessions.end, event + n_events);
            Self {
                columns,
                lengths,
                session_seeds: self.session_seeds[sessions].to_vec(),
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
        let device = self.items().device();
        let [kept, last] = [kept, last].map(|indices| send(&Tensor::from_slice(&indices), device));
        let mut known =
            self.with_columns(self.columns.iter().map(|column| column.index_select(0, &kept)).collect());
        known.lengths.iter_mut().for_each(|length| *length -= 1);
        (known, self.items().index_select(0, &last))
    }

    /// Sums `per_session: [B]` over the sessions of each micro-batch.
    pub fn by_segment(&self, per_session: &[usize]) -> Vec<i64> {
        let mut rest = per_session;
        let take = |segment: &Segment| {
            let (own, after) = rest.split_at(segment.n_sessions);
            rest = after;
            own.iter().sum::<usize>() as i64
        };
        self.segments.iter().map(take).collect()
    }
}

/// Draws the dropout masks of a backward pass.
///
/// The mask of a micro-batch is drawn from the micro-batch's seed. If its shape depends on the
/// longest session of the batch, it is drawn for the longest session that the run allows and then
/// cut. It therefore does not depend on which micro-batches are in the batch.
pub struct DropoutGenerator<'a> {
    segments: &'a [Segment],
    max_length: usize,
    n_draws: u64,
}

impl<'a> DropoutGenerator<'a> {
    /// `max_length`: largest number of events in any session of the run.
    pub fn new(batch: &'a Batch, max_length: usize) -> Self {
        Self { segments: &batch.segments, max_length, n_draws: 0 }
    }

    /// Makes a generator for a part of the batch that starts at the same draw.
    pub fn of_part<'b>(&self, part: &'b Batch) -> DropoutGenerator<'b> {
        DropoutGenerator { segments: &part.segments, ..*self }
    }

    /// Number of masks drawn so far.
    pub fn n_draws(&self) -> u64 {
        self.n_draws
    }

    /// Continues after the draws that the generators of the parts have made.
    pub fn set_n_draws(&mut self, n_draws: u64) {
        self.n_draws = n_draws;
    }

    /// Applies dropout (Srivastava et al. 2014) to `x: [N, ..]` with probability `p`, scaled to
    /// keep the mean. The first `counts[0]` rows belong to the first micro-batch, and so on.
    pub fn dropout(&mut self, x: Tensor, p: f64, counts: &[i64]) -> Tensor {
        let sizes = x.size();
        self.apply(x, p, counts, &sizes[1..])
    }

    /// Applies dropout to attention weights `x: [N, H, .., L]`, where all sizes after the heads `H`
    /// are the length of the batch's longest session.
    pub fn dropout_weights(&mut self, x: Tensor, p: f64, counts: &[i64]) -> Tensor {
        let mut sizes = x.size()[1..].to_vec();
        sizes[1..].fill(self.max_length as i64);
        self.apply(x, p, counts, &sizes)
    }

    /// `drawn`: shape in which the mask of one row is drawn.
    fn apply(&mut self, x: Tensor, p: f64, counts: &[i64], drawn: &[i64]) -> Tensor {
        if p == 0.0 {
            return x;
        }
        self.n_draws += 1;
        let seeds: Vec<u64> = self
            .segments
            .iter()
            .map(|segment| derive_seed(segment.seed, "dropout", &[self.n_draws]))
            .collect();
        let mask = DropoutMask::new(&x.size(), drawn, &seeds, counts);
        match x.device() {
            Device::Cpu => mask.apply_on_cpu(&x, p),
            device => x * mask.to_tensor(device, p),
        }
    }
}

/// A dropout mask `[N, ..]` from a counter-based generator: one odd number per row, drawn from the
/// seed of the row's micro-batch, and one per column. The high bits of their wrapping product
/// decide whether a value is kept, so that a CPU and a GPU compute the same mask and none is
/// stored.
struct DropoutMask {
    size: Vec<i64>,
    rows: Vec<i32>,
    columns: Vec<i32>,
}

impl DropoutMask {
    /// Draws a mask of the shape `size`: its first `counts[0]` rows from the first seed, and so on.
    /// Each row is the leading part of a row of the shape `drawn`.
    fn new(size: &[i64], drawn: &[i64], seeds: &[u64], counts: &[i64]) -> Self {
        let draw = |seed: u64, n: usize| {
            let mut generator = Xoshiro256PlusPlus::seed_from_u64(seed);
            std::iter::repeat_with(move || (generator.next_u32() | 1).cast_signed()).take(n)
        };
        // The columns have the same seed everywhere; the rows make the masks of micro-batches
        // differ.
        let mut columns: Vec<i32> = draw(0, drawn.iter().product::<i64>() as usize).collect();
        if size[1..] != *drawn {
            let whole = Tensor::from_slice(&columns).view(drawn);
            let part = size[1..].iter().zip(0..).fold(whole, |part, (&n, dim)| part.narrow(dim, 0, n));
            columns = numbers(&mut part.contiguous()).to_vec();
        }
        Self {
            size: size.to_vec(),
            rows: seeds.iter().zip(counts).flat_map(|(&seed, &n)| draw(seed, n as usize)).collect(),
            columns,
        }
    }

    /// Multiplies `x` by the mask, which is 0 with probability `p`, else `1 / (1 − p)`. The
    /// backward pass computes the mask again instead of storing it.
    fn apply_on_cpu(self, x: &Tensor, p: f64) -> Tensor {
        let output = self.times(x, p);
        with_backward(output, &[x], move |gradient| vec![self.times(&gradient, p)])
    }

    fn times(&self, x: &Tensor, p: f64) -> Tensor {
        let mut x = x.detach().contiguous();
        let mut output = x.empty_like();
        let n_columns = self.columns.len().max(1);
        let n_rows = part_len(self.rows.len(), 1);
        let values = numbers(&mut x).chunks(n_rows * n_columns);
        let parts =
            values.zip(numbers(&mut output).chunks_mut(n_rows * n_columns)).zip(self.rows.chunks(n_rows));
        in_parallel(parts, |((x, output), rows)| {
            let (threshold, kept) = (threshold(p), (1.0 / (1.0 - p)) as f32);
            vectors::run(DropRows { x, output, rows, columns: &self.columns, threshold, kept });
        });
        output
    }

    /// Computes the mask as a tensor of the shape `size`.
    fn to_tensor(&self, device: Device, p: f64) -> Tensor {
        let numbers = send(&Tensor::from_slice(&[&self.rows[..], &self.columns].concat()), device);
        let (n_rows, n_columns) = (self.rows.len() as i64, self.columns.len() as i64);
        let products = numbers.narrow(0, 0, n_rows).unsqueeze(1) * numbers.narrow(0, n_rows, n_columns);
        (products.ge(i64::from(threshold(p))) * (1.0 / (1.0 - p))).view(self.size.as_slice())
    }
}

/// Applies the mask to some rows of `x`.
struct DropRows<'a> {
    x: &'a [f32],
    output: &'a mut [f32],
    rows: &'a [i32],
    columns: &'a [i32],
    threshold: i32,
    /// Factor of the values that are kept.
    kept: f32,
}

impl Loop for DropRows<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        let n_columns = self.columns.len().max(1);
        let outputs = self.output.chunks_exact_mut(n_columns);
        let rows = self.x.chunks_exact(n_columns).zip(outputs).zip(self.rows);
        for ((x, output), row) in rows {
            for ((x, output), column) in x.iter().zip(output).zip(self.columns) {
                let mask = if row.wrapping_mul(*column) < self.threshold { 0.0 } else { self.kept };
                *output = x * mask;
            }
        }
    }
}

/// The smallest product that is kept: a fraction `p` of all 32-bit numbers is below it.
fn threshold(p: f64) -> i32 {
    ((p - 0.5) * 2f64.powi(32)) as i32
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

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn mask(size: &[i64], p: f64, seeds: &[u64], counts: &[i64]) -> Tensor {
        let mask = DropoutMask::new(size, &size[1..], seeds, counts);
        // The formula for a GPU, computed on the CPU.
        let on_gpu = mask.to_tensor(Device::Cpu, p);
        let ones = Tensor::ones(size, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let on_cpu = mask.apply_on_cpu(&ones, p);
        assert!(on_cpu.equal(&on_gpu));
        let weights = Tensor::arange(on_cpu.numel() as i64, (Kind::Float, Device::Cpu)).view(size);
        let loss = (&on_cpu * &weights).sum(Kind::Float);
        let gradient = Tensor::run_backward(&[loss], &[&ones], false, false);
        assert!(gradient[0].equal(&(on_gpu * weights)));
        on_cpu.detach()
    }

    #[test]
    fn dropout_keeps_the_mean_and_each_micro_batch_has_its_own_mask() {
        let (p, counts) = (0.3, [300, 0, 500]);
        let drawn = mask(&[800, 101], p, &[1, 2, 3], &counts);
        let mean = drawn.mean(Kind::Double).double_value(&[]);
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert!(((drawn.max().double_value(&[])) - 1.0 / 0.7).abs() < 1e-6);
        let alone = mask(&[500, 101], p, &[3], &[500]);
        assert!(drawn.narrow(0, 300, 500).equal(&alone));
        assert!(!drawn.narrow(0, 0, 300).equal(&alone.narrow(0, 0, 300)));
        assert_eq!(mask(&[0, 4], p, &[5], &[0]).size(), [0, 4]);
        assert_eq!(mask(&[2, 4, 3], 0.0, &[5], &[2]).sum(Kind::Float).double_value(&[]), 24.0);
    }

    #[test]
    fn shorter_sessions_get_the_leading_part_of_the_mask_of_longer_ones() {
        let mask = |length: i64| {
            let ones = Tensor::ones([3, 2, length, length], (Kind::Float, Device::Cpu));
            DropoutMask::new(&ones.size(), &[2, 6, 6], &[4], &[3]).apply_on_cpu(&ones, 0.4)
        };
        assert!(mask(4).equal(&mask(6).narrow(2, 0, 4).narrow(3, 0, 4)));
    }

    #[test]
    fn dropped_values_are_uncorrelated_across_rows_and_columns() {
        let (n, d, p) = (2000, 768, 0.3);
        let dropped = mask(&[n, d], p, &[7], &[n]).eq(0.0).to_kind(Kind::Double);
        let spread = (p * (1.0 - p)).sqrt();
        let x = (&dropped - p) / spread;
        // The means of rows and of columns vary as much as the means of independent numbers.
        for (dim, n_values) in [(0, n), (1, d)] {
            let means = x.mean_dim([dim].as_slice(), false, Kind::Double) * (n_values as f64).sqrt();
            let variance = means.square().mean(Kind::Double).double_value(&[]);
            assert!((variance - 1.0).abs() < 0.2, "along {dim}: {variance}");
        }
        // Neighbours share a row number or a column number, and yet their products have mean zero.
        let shifted = |row: i64, column: i64| x.narrow(0, row, n - 3).narrow(1, column, d - 3);
        for (row, column) in [(0, 1), (1, 0), (1, 1), (0, 3), (3, 0)] {
            let correlation = (shifted(0, 0) * shifted(row, column)).mean(Kind::Double).double_value(&[]);
            assert!(correlation.abs() < 5e-3, "{row}, {column}: {correlation}");
        }
        let squares = shifted(0, 0) * shifted(0, 1) * shifted(1, 0) * shifted(1, 1);
        assert!(squares.mean(Kind::Double).double_value(&[]).abs() < 5e-3);
    }
}
