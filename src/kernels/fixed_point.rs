//! Fixed-point sums, for the reproducible mode.
//!
//! Adding f32 numbers rounds after every addition, so the result depends on the order of the terms,
//! and with it on the number of ranks. Here each term is rounded once, to an integer number of
//! units, and the integers are added: integer addition is associative.

use tch::{Device, Kind, Tensor};

use crate::elements::{assert_disjoint, elements_mut};
use crate::parallel::{in_parallel, part_len};
use crate::vectors::{self, Loop};

/// The unit of the integers. Divided by a thousand targets it is an error of 10⁻¹⁴ in the mean
/// gradient, far below the ε of 10⁻⁸ that AdamW adds to the root of the second moment.
const UNIT: f64 = 1.0 / (1u64 << 36) as f64;

/// Largest term: the loss of a large micro-batch. 64 bits hold the sum of 128 such terms, and
/// gradients are far smaller.
const MAX_TERM: f64 = (1u64 << 20) as f64;

/// Fixed-point sum of f32 vectors, the same for any order of the terms.
///
/// The buffer is kept from step to step and is zero between steps, because allocating a buffer of
/// the size of all parameters takes longer than filling it. Most terms are zero, since a
/// micro-batch touches few rows of the tables; a block of zeros is read and skipped.
pub struct FixedPointSum {
    /// The sums in units of [`UNIT`], then the number of terms that were NaN, infinite or larger
    /// than [`MAX_TERM`]: i64 `[n + 1]`.
    total: Tensor,
}

impl FixedPointSum {
    /// A sum of zero for terms of the size and device of `like: [n]`.
    pub fn new(like: &Tensor) -> Self {
        Self { total: Tensor::zeros([like.size()[0] + 1], (Kind::Int64, like.device())) }
    }

    /// Adds `terms: [n]` and sets them to zero.
    pub fn add_and_clear(&mut self, terms: &mut Tensor) {
        let n = terms.size()[0];
        if terms.device() != Device::Cpu {
            // Counted by `<=`, because every comparison with a NaN is false.
            let mut n_bad = self.total.narrow(0, n, 1);
            n_bad += n - terms.abs().le(MAX_TERM).sum(Kind::Int64);
            let mut total = self.total.narrow(0, 0, n);
            total += to_fixed_point(terms);
            let _ = terms.zero_();
            return;
        }
        assert_disjoint(&[&self.total, terms], &[]);
        // SAFETY: the tensors are disjoint, and only this function uses them during the call.
        let (total, terms) =
            unsafe { (elements_mut::<i64>(&mut self.total), elements_mut::<f32>(terms)) };
        let (n_bad, total) =
            total.split_last_mut().expect("the total is one longer than the terms");
        let n_each = part_len(terms.len(), BLOCK);
        let parts = total.chunks_mut(n_each).zip(terms.chunks_mut(n_each));
        let n_bad_by_part = in_parallel(parts, |(total, terms)| {
            let mut n_bad = 0;
            vectors::run(AddTerms { total, terms, n_bad: &mut n_bad });
            n_bad
        });
        *n_bad += n_bad_by_part.into_iter().sum::<i64>();
    }

    /// The sums as integers, then the number of terms that were out of range: i64 `[n + 1]`. An
    /// all-reduce of this tensor adds the terms of all ranks, and all ranks agree on both.
    pub fn total_mut(&mut self) -> &mut Tensor {
        &mut self.total
    }

    /// Moves the sum to `sums: [n]` and starts again from zero. All values are NaN if any term was
    /// out of range.
    pub fn move_into(&mut self, sums: &mut Tensor) {
        let n = sums.size()[0];
        if sums.device() != Device::Cpu {
            let total = from_fixed_point(&self.total.narrow(0, 0, n));
            let is_bad = self.total.narrow(0, n, 1).ne(0);
            sums.copy_(&total.masked_fill(&is_bad, f64::NAN));
            let _ = self.total.zero_();
            return;
        }
        assert_disjoint(&[&self.total, sums], &[]);
        // SAFETY: the tensors are disjoint, and only this function uses them during the call.
        let (total, sums) =
            unsafe { (elements_mut::<i64>(&mut self.total), elements_mut::<f32>(sums)) };
        let (n_bad, total) =
            total.split_last_mut().expect("the total is one longer than the terms");
        let unit = if *n_bad == 0 { UNIT } else { f64::NAN };
        *n_bad = 0;
        let n_each = part_len(sums.len(), BLOCK);
        let parts = total.chunks_mut(n_each).zip(sums.chunks_mut(n_each));
        in_parallel(parts, |(total, sums)| vectors::run(MoveSums { total, sums, unit }));
    }
}

/// Rounds small terms to units of 2⁻³⁶, i64; [`from_fixed_point`] converts their sums back.
///
/// NaN and infinity have no integer and give an arbitrary one. The loss of the same step is not
/// finite then, and the caller checks the loss.
pub fn to_fixed_point(terms: &Tensor) -> Tensor {
    (terms.to_kind(Kind::Double) / UNIT).round().to_kind(Kind::Int64)
}

/// Converts sums of [`to_fixed_point`] to f32.
pub fn from_fixed_point(sums: &Tensor) -> Tensor {
    (sums.to_kind(Kind::Double) * UNIT).to_kind(Kind::Float)
}

/// Numbers that are skipped together if all are zero: about one row of a table.
const BLOCK: usize = 64;

/// Rounds by one addition. The spacing of f64 numbers near 1.5 · 2⁵² is one, so `x + ROUNDER`
/// rounds any `|x| <= 2⁵¹` to the nearest integer, ties to even, and its bits less those of
/// `ROUNDER` are that integer. A conversion from f64 to i64 is one AVX-512 or scalar instruction;
/// this works on AVX2 too.
const ROUNDER: f64 = 1.5 * (1u64 << 52) as f64;

/// Adds terms to the totals, sets them to zero and counts those that are out of range.
struct AddTerms<'a> {
    total: &'a mut [i64],
    terms: &'a mut [f32],
    n_bad: &'a mut i64,
}

impl Loop for AddTerms<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        // 2¹⁴ is 2⁵⁰ units, within the range of `ROUNDER`.
        const MAX_SMALL: f32 = (1u32 << 14) as f32;
        for (total, terms) in self.total.chunks_mut(BLOCK).zip(self.terms.chunks_mut(BLOCK)) {
            // Without the sign bit, the bits of floats compare as the floats do, and a NaN is above
            // infinity. An integer maximum vectorises, and it does not lose a NaN.
            let largest = terms.iter().fold(0, |largest, term| term.abs().to_bits().max(largest));
            if largest == 0 {
                continue;
            }
            if largest > MAX_SMALL.to_bits() {
                *self.n_bad += add_large(total, terms);
                continue;
            }
            for (total, term) in total.iter_mut().zip(terms) {
                let rounded = f64::from(*term) / UNIT + ROUNDER;
                let units = rounded.to_bits().wrapping_sub(ROUNDER.to_bits()).cast_signed();
                *total = total.wrapping_add(units);
                *term = 0.0;
            }
        }
    }
}

/// Adds and clears terms of any size. Returns the number of terms that were out of range.
fn add_large(total: &mut [i64], terms: &mut [f32]) -> i64 {
    let mut n_bad = 0;
    for (total, term) in total.iter_mut().zip(terms) {
        // False for a NaN.
        let is_in_range = f64::from(term.abs()) <= MAX_TERM;
        n_bad += i64::from(!is_in_range);
        *total = total.wrapping_add((f64::from(*term) / UNIT).round_ties_even() as i64);
        *term = 0.0;
    }
    n_bad
}

/// Multiplies totals by the unit, stores them as f32 and sets them to zero.
struct MoveSums<'a> {
    total: &'a mut [i64],
    sums: &'a mut [f32],
    unit: f64,
}

impl Loop for MoveSums<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        for (total, sums) in self.total.chunks_mut(BLOCK).zip(self.sums.chunks_mut(BLOCK)) {
            if total.iter().fold(0, |any, total| any | total) == 0 {
                sums.fill((0.0 * self.unit) as f32);
                continue;
            }
            // `x ^ (x >> 63)` is x, or −x − 1 if x is negative: its bits show the magnitude.
            let magnitudes = total.iter().fold(0, |bits, total| bits | (total ^ (total >> 63)));
            let is_small = magnitudes < 1 << 51;
            for (total, sum) in total.iter_mut().zip(sums) {
                let units = if is_small {
                    // The rounding trick in reverse.
                    let bits = total.wrapping_add(ROUNDER.to_bits().cast_signed()).cast_unsigned();
                    f64::from_bits(bits) - ROUNDER
                } else {
                    *total as f64
                };
                *sum = (units * self.unit) as f32;
                *total = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_depend_on_the_order_and_the_grouping_of_the_terms() {
        let term =
            |i: i32| Tensor::from_slice(&[1e-9f32, 0.1, 3.7, -123.4]) * f64::from(i * i - 40) / 7.0;
        let in_groups = |n_groups: usize| {
            let mut whole = FixedPointSum::new(&term(0));
            for group in (0..n_groups).rev() {
                let mut part = FixedPointSum::new(&term(0));
                (0..12)
                    .skip(group)
                    .step_by(n_groups)
                    .for_each(|i| part.add_and_clear(&mut term(i)));
                *whole.total_mut() += part.total;
            }
            let mut sums = Tensor::zeros([4], (Kind::Float, Device::Cpu));
            whole.move_into(&mut sums);
            Vec::<f32>::try_from(sums).unwrap()
        };
        let alone = in_groups(1);
        for n_groups in [2, 3, 5] {
            assert_eq!(in_groups(n_groups), alone);
        }
        let plain: f64 = (0..12).map(|i| 3.7 * f64::from(i * i - 40) / 7.0).sum();
        assert!((f64::from(alone[2]) - plain).abs() < 1e-4, "{} {plain}", alone[2]);
    }

    #[test]
    fn a_term_out_of_range_makes_all_sums_nan_once() {
        let sums_of = |sum: &mut FixedPointSum| {
            let mut sums = Tensor::zeros([2], (Kind::Float, Device::Cpu));
            sum.move_into(&mut sums);
            Vec::<f32>::try_from(sums).unwrap()
        };
        for bad in [f32::NAN, f32::INFINITY, 1e9] {
            let mut sum = FixedPointSum::new(&Tensor::from_slice(&[0f32, 0.0]));
            sum.add_and_clear(&mut Tensor::from_slice(&[1.0, bad]));
            assert!(sums_of(&mut sum).iter().all(|value| value.is_nan()));
            // The next step starts from zero again.
            sum.add_and_clear(&mut Tensor::from_slice(&[1f32, 0.0]));
            assert_eq!(sums_of(&mut sum), [1.0, 0.0]);
        }
    }

    #[test]
    fn terms_are_rounded_as_libtorch_rounds_them_and_cleared() {
        let unit = UNIT as f32;
        let terms = [0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1.4999, 1e3].map(|n: f32| n * unit);
        let large = [
            0.1f32,
            -3.7e-3,
            2.0f32.powi(-12),
            2.0f32.powi(-13) * 1.000_001,
            123.456,
            -1e6,
            1_048_576.0,
        ];
        let terms: Vec<f32> = terms.into_iter().chain(large).cycle().take(100_000).collect();
        let expected =
            (Tensor::from_slice(&terms).to_kind(Kind::Double) / UNIT).round().to_kind(Kind::Int64);
        let (mut sum, mut cleared) =
            (FixedPointSum::new(&Tensor::from_slice(&terms)), Tensor::from_slice(&terms));
        sum.add_and_clear(&mut cleared);
        assert!(sum.total.narrow(0, 0, 100_000).equal(&expected));
        let mut sums = Tensor::zeros([100_000], (Kind::Float, Device::Cpu));
        FixedPointSum { total: sum.total.copy() }.move_into(&mut sums);
        assert!(sums.equal(&from_fixed_point(&expected)));
        assert_eq!(
            (sum.total.int64_value(&[100_000]), cleared.count_nonzero(None).int64_value(&[])),
            (0, 0)
        );
    }
}
