//! The softmax of rows of logits on a CPU, row by row while a row is in the nearest cache.
//!
//! libtorch would look at all rows once for the bias, once for each maximum and once for the softmax itself, and most of
//! them are then no longer near.

use tch::{Device, Kind, Tensor};

use crate::device::host::numbers;

/// Numbers that are worked on side by side: whole vectors of any CPU.
const LANES: usize = 32;

/// Adds `bias: [C]` to every row of the logits `z: [n, C]`, which become their softmax, and returns their `logsumexp`, `[n]`.
/// All are f32 and on the CPU. A NaN makes its row NaN; what is below the largest by more than 87 counts as if it were not.
pub(super) fn softmax_rows(z: &mut Tensor, bias: &Tensor) -> Tensor {
    let (n_rows, n_columns) = (z.size()[0], z.size()[1] as usize);
    let mut logs = Tensor::empty([n_rows], (Kind::Float, Device::Cpu));
    let mut bias = bias.contiguous();
    each_row(numbers(z), n_columns, numbers(&mut bias), numbers(&mut logs));
    logs
}

fn each_row(z: &mut [f32], n_columns: usize, bias: &[f32], logs: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has what the function was compiled for.
            return unsafe { with_avx512(z, n_columns, bias, logs) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return unsafe { with_avx2(z, n_columns, bias, logs) };
        }
    }
    rows::<false>(z, n_columns, bias, logs);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn with_avx512(z: &mut [f32], n_columns: usize, bias: &[f32], logs: &mut [f32]) {
    rows::<true>(z, n_columns, bias, logs);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2(z: &mut [f32], n_columns: usize, bias: &[f32], logs: &mut [f32]) {
    rows::<true>(z, n_columns, bias, logs);
}

/// `FUSES`: whether the CPU multiplies and adds at once.
#[inline(always)]
fn rows<const FUSES: bool>(z: &mut [f32], n_columns: usize, bias: &[f32], logs: &mut [f32]) {
    for (row, log) in z.chunks_exact_mut(n_columns).zip(logs) {
        let mut most = [f32::NEG_INFINITY; LANES];
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        for (row, bias) in row.chunks_mut(LANES).zip(bias.chunks(LANES)) {
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

/// `e^x` for `x` not above 0, to a relative 2e-7; below −87, `e^-87`. `x = n ln 2 + r`, and `e^r` by its series, the coefficients
/// fitted to `|r| <= ln 2 / 2` (Moshier's Cephes library).
#[inline(always)]
fn exp<const FUSES: bool>(x: f32) -> f32 {
    let fused = |a: f32, b: f32, c: f32| if FUSES { a.mul_add(b, c) } else { a * b + c };
    // Added to it, a number loses what is behind its point, and what is before it is in the last bits.
    const ROUNDS: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = fused(x, std::f32::consts::LOG2_E, ROUNDS);
    let n = shifted - ROUNDS;
    let r = fused(n, 2.121_944_4e-4, fused(n, -0.693_359_4, x));
    let series = [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let series = series.into_iter().fold(1.987_569_2e-4, |sum, next| fused(sum, r, next));
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    fused(series, r * r, r + 1.0) * power
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
            let logits = (z + bias).to_kind(Kind::Double);
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
        each_row(&mut here, 50, &bias, &mut logs[0]);
        rows::<false>(&mut plain, 50, &bias, &mut logs[1]);
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
