//! The softmax of rows of logits, computed row by row while a row is in the nearest cache.
//!
//! libtorch passes over all rows once for the bias, once for the maximum and once for the softmax,
//! and most rows have left the cache by the next pass.

use tch::{Device, Kind, Tensor};

use crate::elements::{assert_disjoint, elements, elements_mut};
use crate::parallel::{in_parallel, part_len};
use crate::vectors::{self, Loop, exp};

/// Numbers that are reduced side by side: a multiple of the vector length of any CPU.
const LANES: usize = 32;

/// Adds `bias: [C]` to every row of the logits `z: [n, C]`, replaces the rows by their softmax, and
/// returns their `logsumexp`: `[n]`. All are f32 and on the CPU. A NaN makes its whole row NaN.
/// Logits more than 87 below the largest of their row are treated as 87 below it.
///
/// # Panics
/// If `z` is not contiguous or shares memory with `bias`.
pub fn softmax_rows(z: &mut Tensor, bias: &Tensor) -> Tensor {
    let (n_rows, n_columns) = (z.size()[0], z.size()[1] as usize);
    let mut logs = Tensor::empty([n_rows], (Kind::Float, Device::Cpu));
    let bias = bias.contiguous();
    assert_disjoint(&[z], &[&bias]);
    // SAFETY: `logs` was allocated here, `z` shares no memory with `bias`, and only this function
    // uses them during the call.
    let (z, bias, log_sums) =
        unsafe { (elements_mut(z), elements(&bias), elements_mut(&mut logs)) };
    vectors::run(Rows { z, n_columns, bias, logs: log_sums });
    logs
}

/// `logsumexp` of every row of `z: [n, C]`: `[n]`. On the CPU it allocates nothing of the size of
/// `z`.
pub fn logsumexp_rows(z: &Tensor) -> Tensor {
    if (z.device(), z.kind()) != (Device::Cpu, Kind::Float) {
        return z.logsumexp([1i64].as_slice(), false);
    }
    let (n_rows, n_columns) = (z.size()[0] as usize, z.size()[1] as usize);
    let (z, mut logs) =
        (z.contiguous(), Tensor::empty([n_rows as i64], (Kind::Float, Device::Cpu)));
    let n_each = part_len(n_rows, 1);
    // SAFETY: `logs` was allocated here, and nothing writes to `z` during the call.
    let (rows, log_sums) = unsafe { (elements::<f32>(&z), elements_mut(&mut logs)) };
    let parts = rows.chunks(n_each * n_columns).zip(log_sums.chunks_mut(n_each));
    in_parallel(parts, |(z, logs)| vectors::run(LogSums { z, n_columns, logs }));
    logs
}

/// Rows of logits, which are only read.
struct LogSums<'a> {
    z: &'a [f32],
    n_columns: usize,
    logs: &'a mut [f32],
}

impl Loop for LogSums<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        for (row, log) in self.z.chunks_exact(self.n_columns).zip(self.logs) {
            let mut largest = [f32::NEG_INFINITY; LANES];
            for row in row.chunks(LANES) {
                row.iter()
                    .zip(&mut largest)
                    .for_each(|(z, largest)| *largest = larger(*largest, *z));
            }
            let largest = largest.into_iter().fold(f32::NEG_INFINITY, larger);
            let mut sums = [0.0; LANES];
            for row in row.chunks(LANES) {
                row.iter().zip(&mut sums).for_each(|(z, sum)| *sum += exp::<FUSES>(*z - largest));
            }
            *log = largest + sums.iter().sum::<f32>().ln();
        }
    }
}

/// The larger of two numbers. If one is NaN, it returns the other.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Rows of logits, in place.
struct Rows<'a> {
    z: &'a mut [f32],
    n_columns: usize,
    bias: &'a [f32],
    logs: &'a mut [f32],
}

impl Loop for Rows<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        for (row, log) in self.z.chunks_exact_mut(self.n_columns).zip(self.logs) {
            let mut largest = [f32::NEG_INFINITY; LANES];
            for (row, bias) in row.chunks_mut(LANES).zip(self.bias.chunks(LANES)) {
                for ((z, bias), largest) in row.iter_mut().zip(bias).zip(&mut largest) {
                    *z += bias;
                    *largest = larger(*largest, *z);
                }
            }
            let largest = largest.into_iter().fold(f32::NEG_INFINITY, larger);
            let mut sums = [0.0; LANES];
            for row in row.chunks_mut(LANES) {
                for (z, sum) in row.iter_mut().zip(&mut sums) {
                    *z = exp::<FUSES>(*z - largest);
                    *sum += *z;
                }
            }
            let sum: f32 = sums.iter().sum();
            let factor = sum.recip();
            row.iter_mut().for_each(|z| *z *= factor);
            *log = largest + sum.ln();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_close(ours: &Tensor, theirs: &Tensor) -> bool {
        ours.allclose(&theirs.to_kind(Kind::Float), 1e-6, 1e-9, true)
    }

    #[test]
    fn rows_equal_those_of_libtorch() {
        for (n, n_columns, spread) in [(5, 1, 1.0), (3, 31, 0.1), (7, 32, 10.0), (4, 4100, 30.0)] {
            let wave = |size: &[i64], frequency: f64| {
                let n: i64 = size.iter().product();
                let angles = Tensor::arange(n, (Kind::Float, Device::Cpu)) * frequency;
                (angles.sin() * spread).view(size)
            };
            let (z, bias) = (wave(&[n, n_columns], 0.7), wave(&[n_columns], 1.3));
            let mut p = z.copy();
            let logs = softmax_rows(&mut p, &bias);
            let logits = z + bias;
            assert!(is_close(
                &logsumexp_rows(&logits),
                &logits.to_kind(Kind::Double).logsumexp([1i64].as_slice(), false)
            ));
            let logits = logits.to_kind(Kind::Double);
            assert!(is_close(&p, &logits.softmax(1, Kind::Double)), "{n_columns}");
            assert!(is_close(&logs, &logits.logsumexp([1i64].as_slice(), false)), "{n_columns}");
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_up_to_rounding() {
        let z: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin() * 20.0).collect();
        let bias = [0.25; 50];
        let (mut vector, mut scalar) = (z.clone(), z);
        let mut logs = [[0.0; 2]; 2];
        let [of_vector, of_scalar] = &mut logs;
        vectors::run(Rows { z: &mut vector, n_columns: 50, bias: &bias, logs: of_vector });
        Rows { z: &mut scalar, n_columns: 50, bias: &bias, logs: of_scalar }.run::<false>();
        let pairs = vector.iter().chain(&logs[0]).zip(scalar.iter().chain(&logs[1]));
        assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() <= 1e-6 * a.abs() + 1e-9));
    }

    #[test]
    fn a_nan_makes_its_row_nan_and_a_very_small_logit_does_not() {
        let mut z =
            Tensor::from_slice2(&[[0.0, f32::NAN], [0.0, -1e30], [0.0, f32::INFINITY], [0.0, 0.0]]);
        let logs = softmax_rows(&mut z, &Tensor::from_slice(&[0.0f32, 0.0]));
        let logs = Vec::<f32>::try_from(logs).unwrap();
        assert!(logs[0].is_nan() && logs[2].is_nan());
        assert_eq!((logs[1], logs[3]), (0.0, 2.0f32.ln()));
        assert_eq!(z.double_value(&[1, 0]), 1.0);
        assert!(z.double_value(&[1, 1]) < 1e-37);
    }
}
