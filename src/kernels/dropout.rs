//! Dropout masks (Srivastava et al. 2014) from a counter-based generator.

use rand::{RngCore, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use tch::{Device, Tensor};

use crate::autograd::with_backward;
use crate::elements::{elements, elements_mut};
use crate::parallel::{in_parallel, part_len};
use crate::transfer::send;
use crate::vectors::{self, Loop};

/// A dropout mask `[N, ..]` from a counter-based generator: one odd number per row, drawn from the
/// seed of the row's micro-batch, and one per column. The high bits of their wrapping product
/// decide whether a value is kept, so that a CPU and a GPU compute the same mask and none is
/// stored.
pub struct DropoutMask {
    size: Vec<i64>,
    rows: Vec<i32>,
    columns: Vec<i32>,
}

impl DropoutMask {
    /// Draws a mask of the shape `size`: its first `counts[0]` rows from the first seed, and so on.
    /// Each row is the leading part of a row of the shape `drawn`.
    pub fn new(size: &[i64], drawn: &[i64], seeds: &[u64], counts: &[i64]) -> Self {
        let draw = |seed: u64, n: usize| {
            let mut generator = Xoshiro256PlusPlus::seed_from_u64(seed);
            std::iter::repeat_with(move || (generator.next_u32() | 1).cast_signed()).take(n)
        };
        // The columns have the same seed everywhere; the rows make the masks of micro-batches
        // differ.
        let mut columns: Vec<i32> = draw(0, drawn.iter().product::<i64>() as usize).collect();
        if size[1..] != *drawn {
            let whole = Tensor::from_slice(&columns).view(drawn);
            let part =
                size[1..].iter().zip(0..).fold(whole, |part, (&n, dim)| part.narrow(dim, 0, n));
            columns = Vec::try_from(part.reshape([-1])).expect("i32 numbers on the CPU");
        }
        Self {
            size: size.to_vec(),
            rows: seeds.iter().zip(counts).flat_map(|(&seed, &n)| draw(seed, n as usize)).collect(),
            columns,
        }
    }

    /// Multiplies `x`, of the shape of the mask, by the mask, which is 0 with probability `p`, else
    /// `1 / (1 − p)`. On the CPU the backward pass computes the mask again instead of storing it.
    pub fn apply(self, x: Tensor, p: f64) -> Tensor {
        match x.device() {
            Device::Cpu => self.apply_on_cpu(&x, p),
            device => x * self.to_tensor(device, p),
        }
    }

    fn apply_on_cpu(self, x: &Tensor, p: f64) -> Tensor {
        let output = self.times(x, p);
        with_backward(output, &[x], move |gradient| vec![self.times(&gradient, p)])
    }

    fn times(&self, x: &Tensor, p: f64) -> Tensor {
        let x = x.detach().contiguous();
        let mut output = x.empty_like();
        let n_columns = self.columns.len().max(1);
        let n_rows = part_len(self.rows.len(), 1);
        // SAFETY: `output` was allocated here, so that only this function has it, and nothing
        // writes to `x` during the call.
        let (values, outputs) = unsafe { (elements(&x), elements_mut(&mut output)) };
        let values = values.chunks(n_rows * n_columns);
        let parts =
            values.zip(outputs.chunks_mut(n_rows * n_columns)).zip(self.rows.chunks(n_rows));
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
        let products =
            numbers.narrow(0, 0, n_rows).unsqueeze(1) * numbers.narrow(0, n_rows, n_columns);
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
            let means =
                x.mean_dim([dim].as_slice(), false, Kind::Double) * (n_values as f64).sqrt();
            let variance = means.square().mean(Kind::Double).double_value(&[]);
            assert!((variance - 1.0).abs() < 0.2, "along {dim}: {variance}");
        }
        // Neighbours share a row number or a column number, and yet their products have mean zero.
        let shifted = |row: i64, column: i64| x.narrow(0, row, n - 3).narrow(1, column, d - 3);
        for (row, column) in [(0, 1), (1, 0), (1, 1), (0, 3), (3, 0)] {
            let correlation =
                (shifted(0, 0) * shifted(row, column)).mean(Kind::Double).double_value(&[]);
            assert!(correlation.abs() < 5e-3, "{row}, {column}: {correlation}");
        }
        let squares = shifted(0, 0) * shifted(0, 1) * shifted(1, 0) * shifted(1, 1);
        assert!(squares.mean(Kind::Double).double_value(&[]).abs() < 5e-3);
    }
}
