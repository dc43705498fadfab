//! The softmax of rows of logits on a CPU, row by row while a row is in the nearest cache.
//!
//! libtorch would look at all rows once for the bias, once for each maximum and once for the softmax itself, and most of
//! them are then no longer near.

use tch::{Device, Kind, Tensor};

use crate::device::host::{in_parallel, numbers, part_len};
use crate::device::vectors::{self, Loop, exp};

/// Numbers that are worked on side by side: whole vectors of any CPU.
const LANES: usize = 32;

/// Adds `bias: [C]` to every row of the logits `z: [n, C]`, which become their softmax, and returns their `logsumexp`, `[n]`.
/// All are f32 and on the CPU. A NaN makes its row NaN; what is below the largest by more than 87 counts as if it were not.
pub(super) fn softmax_rows(z: &mut Tensor, bias: &Tensor) -> Tensor {
    let (n_rows, n_columns) = (z.size()[0], z.size()[1] as usize);
    let mut logs = Tensor::empty([n_rows], (Kind::Float, Device::Cpu));
    let mut bias = bias.contiguous();
    vectors::run(Rows { z: numbers(z), n_columns, bias: numbers(&mut bias), logs: numbers(&mut logs) });
    logs
}

/// `logsumexp` of every row of `z: [n, C]`: `[n]`, without anything as large as `z`.
pub(crate) fn logsumexp_rows(z: &Tensor) -> Tensor {
    if (z.device(), z.kind()) != (Device::Cpu, Kind::Float) {
        return z.logsumexp([1i64].as_slice(), false);
    }
    let (n_rows, n_columns) = (z.size()[0] as usize, z.size()[1] as usize);
    let (mut z, mut logs) = (z.contiguous(), Tensor::empty([n_rows as i64], (Kind::Float, Device::Cpu)));
    let n_each = part_len(n_rows, 1);
    let parts = numbers::<f32>(&mut z).chunks(n_each * n_columns).zip(numbers(&mut logs).chunks_mut(n_each));
    in_parallel(parts, |(z, logs)| vectors::run(LogSums { z, n_columns, logs }));
    logs
}

/// Rows of logits, which stay.
struct LogSums<'a> {
    z: &'a [f32],
    n_columns: usize,
    logs: &'a mut [f32],
}

impl Loop for LogSums<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        for (row, log) in self.z.chunks_exact(self.n_columns).zip(self.logs) {
            let mut most = [f32::NEG_INFINITY; LANES];
            for row in row.chunks(LANES) {
                row.iter().zip(&mut most).for_each(|(z, most)| *most = larger(*most, *z));
            }
            let most = most.into_iter().fold(f32::NEG_INFINITY, larger);
            let mut sums = [0.0; LANES];
            for row in row.chunks(LANES) {
                row.iter().zip(&mut sums).for_each(|(z, sum)| *sum += exp::<FUSES>(*z - most));
            }
            *log = most + sums.iter().sum::<f32>().ln();
        }
    }
}

/// The larger of two numbers; of a number and NaN, the number.
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
            let mut most = [f32::NEG_INFINITY; LANES];
            for (row, bias) in row.chunks_mut(LANES).zip(self.bias.chunks(LANES)) {
                for ((z, bias), most) in row.iter_mut().zip(bias).zip(&mut most) {
                    *z += bias;
                    *most = larger(*most, *z);
                }
            }
            let most = most.into_iter().fold(f32::NEG_INFINITY, larger);
            let mut sums = [0.0; LANES];
            for row in row.chunks_mut(LANES) {
                for (z, sum) in row.iter_mut().zip(&mut sums) {
                    *z = exp::<FUSES>(*z - most);
                    *sum += *z;
                }
            }
            let sum: f32 = sums.iter().sum();
            let share = sum.recip();
            row.iter_mut().for_each(|z| *z *= share);
            *log = most + sum.ln();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::with_seed;

    fn is_close(ours: &Tensor, theirs: &Tensor) -> bool {
        ours.allclose(&theirs.to_kind(Kind::Float), 1e-6, 1e-9, true)
    }

    #[test]
    fn rows_are_those_of_libtorch() {
        for (n, n_columns, spread) in [(5, 1, 1.0), (3, 31, 0.1), (7, 32, 10.0), (4, 4100, 30.0)] {
            let [z, bias] = with_seed(1, || {
                [&[n, n_columns][..], &[n_columns]]
                    .map(|size| Tensor::randn(size, (Kind::Float, Device::Cpu)) * spread)
            });
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
    fn every_cpu_finds_the_same_but_for_rounding() {
        let z: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin() * 20.0).collect();
        let bias = [0.25; 50];
        let (mut here, mut plain) = (z.clone(), z);
        let mut logs = [[0.0; 2]; 2];
        let [of_here, of_plain] = &mut logs;
        vectors::run(Rows { z: &mut here, n_columns: 50, bias: &bias, logs: of_here });
        Rows { z: &mut plain, n_columns: 50, bias: &bias, logs: of_plain }.run::<false>();
        let pairs = here.iter().chain(&logs[0]).zip(plain.iter().chain(&logs[1]));
        assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() <= 1e-6 * a.abs() + 1e-9));
    }

    #[test]
    fn what_is_no_number_shows_and_what_is_far_below_does_no_harm() {
        let mut z = Tensor::from_slice2(&[[0.0, f32::NAN], [0.0, -1e30], [0.0, f32::INFINITY], [0.0, 0.0]]);
        let logs = softmax_rows(&mut z, &Tensor::from_slice(&[0.0f32, 0.0]));
        let logs = Vec::<f32>::try_from(logs).unwrap();
        assert!(logs[0].is_nan() && logs[2].is_nan());
        assert_eq!((logs[1], logs[3]), (0.0, 2.0f32.ln()));
        assert_eq!(z.double_value(&[1, 0]), 1.0);
        assert!(z.double_value(&[1, 1]) < 1e-37);
    }
}
