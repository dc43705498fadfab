//! Dropout (Srivastava et al. 2014) with masks from a counter-based generator.
//!
//! A mask is a function of the key of a row, of the site where dropout is applied, and of the
//! column. A CPU and a GPU compute the same one, forward and backward, and none is stored or sent.

use rand::{RngCore, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use tch::{Device, Tensor};

use crate::autograd::with_backward;
use crate::counter::{column_number, row_number};
use crate::cuda;
use crate::elements::{elements, elements_mut};
use crate::parallel::{in_parallel, part_len};
use crate::vectors::{self, Loop};

/// Keys of rows, `counts[0]` from the first seed, and so on.
pub fn row_keys(seeds: &[u64], counts: &[usize]) -> Vec<i32> {
    let draw = |(&seed, &n): (&u64, &usize)| {
        let mut generator = Xoshiro256PlusPlus::seed_from_u64(seed);
        std::iter::repeat_with(move || generator.next_u32().cast_signed()).take(n)
    };
    seeds.iter().zip(counts).flat_map(draw).collect()
}

/// The mask of one use of dropout.
struct Mask {
    /// Key of each row, i32 `[N]`.
    row_keys: Tensor,
    site: u32,
    /// Shape of a row whose leading part the rows are.
    drawn: Vec<i64>,
    p: f64,
}

/// Multiplies `x: [N, ..]` by a mask, which is 0 with probability `p`, else `1 / (1 − p)`. The mask
/// of a row follows from its key, `row_keys` i32 `[N]`, and from `site`; it is the leading part of
/// the mask of a row of the shape `drawn`.
///
/// # Panics
/// If `row_keys` is on another device, or a GPU cannot run the kernel.
pub fn dropout(x: &Tensor, row_keys: &Tensor, site: u32, drawn: &[i64], p: f64) -> Tensor {
    let row_keys = row_keys.shallow_clone();
    let mask = Mask { row_keys, site, drawn: drawn.to_vec(), p };
    let output = mask.times(x);
    with_backward(output, &[x], move |gradient| vec![mask.times(&gradient)])
}

impl Mask {
    fn times(&self, x: &Tensor) -> Tensor {
        let x = x.detach().contiguous();
        if x.device() == Device::Cpu { self.times_on_cpu(&x) } else { self.times_on_gpu(&x) }
    }

    fn times_on_cpu(&self, x: &Tensor) -> Tensor {
        let mut output = x.empty_like();
        let keys = Vec::<i32>::try_from(&self.row_keys).expect("row keys are i32 [N]");
        let rows: Vec<i32> = keys.into_iter().map(|key| row_number(key, self.site)).collect();
        let columns = self.column_numbers(&x.size()[1..]);
        let n_columns = columns.len().max(1);
        let n_rows = part_len(rows.len(), 1);
        // SAFETY: `output` was allocated here, so that only this function has it, and nothing
        // writes to `x` during the call.
        let (values, outputs) = unsafe { (elements(x), elements_mut(&mut output)) };
        let values = values.chunks(n_rows * n_columns);
        let parts = values.zip(outputs.chunks_mut(n_rows * n_columns)).zip(rows.chunks(n_rows));
        let (threshold, kept) = (threshold(self.p), kept(self.p));
        in_parallel(parts, |((x, output), rows)| {
            vectors::run(DropRows { x, output, rows, columns: &columns, threshold, kept });
        });
        output
    }

    /// Numbers of the columns of a row of the shape `size`.
    fn column_numbers(&self, size: &[i64]) -> Vec<i32> {
        let n = size.iter().product::<i64>();
        let column = |mut index: i64| {
            // Index of an element of a row in the shape that the row is a part of.
            let (mut place, mut stride) = (0, 1);
            for (n, n_drawn) in size.iter().zip(&self.drawn).rev() {
                place += index % n * stride;
                (index, stride) = (index / n, stride * n_drawn);
            }
            column_number(place as u32)
        };
        (0..n).map(column).collect()
    }

    fn times_on_gpu(&self, x: &Tensor) -> Tensor {
        let mask = cuda::DropoutMask {
            row_keys: &self.row_keys,
            site: self.site,
            drawn: &self.drawn,
            threshold: threshold(self.p),
            kept: kept(self.p),
        };
        cuda::dropout(x, &mask).unwrap_or_else(|problem| panic!("{problem}"))
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

/// Factor of the values that are kept.
fn kept(p: f64) -> f32 {
    (1.0 / (1.0 - p)) as f32
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// The mask of rows of the shape `size`, `counts` from each seed.
    fn mask(size: &[i64], p: f64, seeds: &[u64], counts: &[usize]) -> Tensor {
        let keys = Tensor::from_slice(&row_keys(seeds, counts));
        let ones = Tensor::ones(size, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let masked = dropout(&ones, &keys, 3, &size[1..], p);
        let weights = Tensor::arange(masked.numel() as i64, (Kind::Float, Device::Cpu)).view(size);
        let loss = (&masked * &weights).sum(Kind::Float);
        let gradient = Tensor::run_backward(&[loss], &[&ones], false, false);
        assert!(gradient[0].equal(&(masked.detach() * weights)));
        masked.detach()
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
        let keys = Tensor::from_slice(&row_keys(&[3], &[500]));
        let ones = Tensor::ones([500, 101], (Kind::Float, Device::Cpu));
        let [first, second] = [1, 2].map(|site| dropout(&ones, &keys, site, &[101], p));
        let both = (&first * &second).gt(0.0).to_kind(Kind::Float).mean(Kind::Float);
        assert!((both.double_value(&[]) - 0.49).abs() < 0.01, "sites have different masks");
    }

    #[test]
    fn shorter_sessions_get_the_leading_part_of_the_mask_of_longer_ones() {
        let mask = |length: i64| {
            let ones = Tensor::ones([3, 2, length, length], (Kind::Float, Device::Cpu));
            let keys = Tensor::from_slice(&row_keys(&[4], &[3]));
            dropout(&ones, &keys, 1, &[2, 6, 6], 0.4)
        };
        assert!(mask(4).equal(&mask(6).narrow(2, 0, 4).narrow(3, 0, 4)));
    }

    #[test]
    fn dropped_values_are_uncorrelated_across_rows_and_columns() {
        let (n, d, p) = (2000, 768, 0.3);
        let dropped = mask(&[n, d], p, &[7], &[2000]).eq(0.0).to_kind(Kind::Double);
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
