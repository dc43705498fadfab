//! Sums that do not depend on the order of their terms: they are added up as whole numbers.

use tch::{Device, Kind, Tensor};

use super::{Collective, CollectiveError, Reduce};
use crate::device::host::{in_parallel, numbers, part_len};
use crate::device::vectors::{self, Loop};

/// Gradients are added up as whole multiples of 2⁻³⁶. Over a thousand targets that is 10⁻¹⁴ of a mean gradient,
/// far below the 10⁻⁸ that AdamW adds to its root.
const UNIT: f64 = 1.0 / (1u64 << 36) as f64;

/// Largest term: the loss of a large micro-batch. 64 bits hold the sum of 128 of these, and gradients are far smaller.
const MOST: f64 = (1u64 << 20) as f64;

/// A sum that does not depend on the order of its terms.
///
/// It is kept from step to step, and zero in between: a buffer as long as all parameters takes longer to be made than to be
/// filled. Most terms are zero, as a micro-batch touches few rows of the tables, and cost no more than a look.
pub struct FixedPointSum {
    /// Multiples of [`UNIT`], and behind them how many terms were NaN, infinite or beyond [`MOST`]: i64 `[n + 1]`.
    total: Tensor,
}

impl FixedPointSum {
    /// Zero, for terms like `like: [n]`.
    pub fn new(like: &Tensor) -> Self {
        Self { total: Tensor::zeros([like.size()[0] + 1], (Kind::Int64, like.device())) }
    }

    /// Adds `terms: [n]`, which are zero afterwards.
    pub fn take(&mut self, terms: &mut Tensor) {
        let n = terms.size()[0];
        if terms.device() != Device::Cpu {
            // Not `>`: a NaN is neither larger nor smaller than anything.
            let mut n_bad = self.total.narrow(0, n, 1);
            n_bad += n - terms.abs().le(MOST).sum(Kind::Int64);
            let mut total = self.total.narrow(0, 0, n);
            total += to_fixed_point(terms);
            let _ = terms.zero_();
            return;
        }
        let (total, terms) = (numbers::<i64>(&mut self.total), numbers::<f32>(terms));
        let (n_bad, total) = total.split_last_mut().expect("one more than there are terms");
        let n_each = part_len(terms.len(), BLOCK);
        let parts = total.chunks_mut(n_each).zip(terms.chunks_mut(n_each));
        let taken = in_parallel(parts, |(total, terms)| {
            let mut n_bad = 0;
            vectors::run(Take { total, terms, n_bad: &mut n_bad });
            n_bad
        });
        *n_bad += taken.into_iter().sum::<i64>();
    }

    /// *All ranks.* Moves the sum over ranks to `sums: [n]`; NaN throughout if any term was out of range.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn reduce_into(
        &mut self,
        sums: &mut Tensor,
        collective: &dyn Collective,
    ) -> Result<(), CollectiveError> {
        collective.all_reduce(&mut self.total, Reduce::Sum)?;
        self.move_into(sums);
        Ok(())
    }

    /// Moves what this rank has added up to `sums: [n]`; NaN throughout if any term was out of range.
    pub fn move_into(&mut self, sums: &mut Tensor) {
        let n = sums.size()[0];
        if sums.device() != Device::Cpu {
            let total = from_fixed_point(&self.total.narrow(0, 0, n));
            let is_bad = self.total.narrow(0, n, 1).ne(0);
            sums.copy_(&total.masked_fill(&is_bad, f64::NAN));
            let _ = self.total.zero_();
            return;
        }
        let (total, sums) = (numbers::<i64>(&mut self.total), numbers::<f32>(sums));
        let (n_bad, total) = total.split_last_mut().expect("one more than there are terms");
        let unit = if *n_bad == 0 { UNIT } else { f64::NAN };
        *n_bad = 0;
        let n_each = part_len(sums.len(), BLOCK);
        let parts = total.chunks_mut(n_each).zip(sums.chunks_mut(n_each));
        in_parallel(parts, |(total, sums)| vectors::run(Move { total, sums, unit }));
    }
}

/// Small terms as whole multiples, i64: what they add up to is turned back by [`from_fixed_point`]. What is not finite has no
/// multiple; whoever adds up a loss beside it sees that.
pub fn to_fixed_point(terms: &Tensor) -> Tensor {
    (terms.to_kind(Kind::Double) / UNIT).round().to_kind(Kind::Int64)
}

/// Sums of [`to_fixed_point`] as f32.
pub fn from_fixed_point(sums: &Tensor) -> Tensor {
    (sums.to_kind(Kind::Double) * UNIT).to_kind(Kind::Float)
}

/// Numbers that are looked at together: a row of a table, usually.
const BLOCK: usize = 64;

/// Added to a number that is no larger than 2⁵¹, this leaves in the last bits of an f64 the whole number next to it, ties to even:
/// how many more than in its own.
const WHOLE: f64 = 1.5 * (1u64 << 52) as f64;

/// Adds terms to multiples of [`UNIT`], sets them to zero, and counts those that are out of range.
struct Take<'a> {
    total: &'a mut [i64],
    terms: &'a mut [f32],
    n_bad: &'a mut i64,
}

impl Loop for Take<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        // Multiples of 2⁵⁰ at most.
        const SMALL: f32 = (1u32 << 14) as f32;
        for (total, terms) in self.total.chunks_mut(BLOCK).zip(self.terms.chunks_mut(BLOCK)) {
            // Bits without their sign are in the order of the numbers, and those of a NaN above all.
            let largest = terms.iter().fold(0, |largest, term| term.abs().to_bits().max(largest));
            if largest == 0 {
                continue;
            }
            if largest > SMALL.to_bits() {
                *self.n_bad += take_large(total, terms);
                continue;
            }
            for (total, term) in total.iter_mut().zip(terms) {
                let whole = f64::from(*term) / UNIT + WHOLE;
                *total = total.wrapping_add(whole.to_bits().wrapping_sub(WHOLE.to_bits()).cast_signed());
                *term = 0.0;
            }
        }
    }
}

/// The same for terms of any size. Returns how many were out of range.
fn take_large(total: &mut [i64], terms: &mut [f32]) -> i64 {
    let mut n_bad = 0;
    for (total, term) in total.iter_mut().zip(terms) {
        // A NaN is not within anything. What is large enough to lose digits by being rounded is whole already.
        let is_within = f64::from(term.abs()) <= MOST;
        n_bad += i64::from(!is_within);
        *total = total.wrapping_add((f64::from(*term) / UNIT).round_ties_even() as i64);
        *term = 0.0;
    }
    n_bad
}

/// Moves sums of multiples out, times a unit.
struct Move<'a> {
    total: &'a mut [i64],
    sums: &'a mut [f32],
    unit: f64,
}

impl Loop for Move<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        for (total, sums) in self.total.chunks_mut(BLOCK).zip(self.sums.chunks_mut(BLOCK)) {
            if total.iter().fold(0, |any, total| any | total) == 0 {
                sums.fill((0.0 * self.unit) as f32);
                continue;
            }
            // All bits that differ from the sign, of all of them.
            let size = total.iter().fold(0, |size, total| size | (total ^ (total >> 63)));
            let is_small = size < 1 << 51;
            for (total, sum) in total.iter_mut().zip(sums) {
                let whole = match is_small {
                    true => {
                        f64::from_bits(total.wrapping_add(WHOLE.to_bits().cast_signed()).cast_unsigned())
                            - WHOLE
                    }
                    false => *total as f64,
                };
                *sum = (whole * self.unit) as f32;
                *total = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads;

    #[test]
    fn sums_do_not_depend_on_who_adds_what() {
        let term = |i: i32| Tensor::from_slice(&[1e-9f32, 0.1, 3.7, -123.4]) * f64::from(i * i - 40) / 7.0;
        let on_ranks = |world_size: usize| {
            threads::spawn(world_size, |collective| {
                let mut sum = FixedPointSum::new(&term(0));
                (0..12).skip(collective.rank()).step_by(world_size).for_each(|i| sum.take(&mut term(i)));
                reduced(&mut sum, collective)
            })
            .remove(0)
        };
        let alone = on_ranks(1);
        for world_size in [2, 3, 5] {
            assert_eq!(on_ranks(world_size), alone);
        }
        let plain: f64 = (0..12).map(|i| 3.7 * f64::from(i * i - 40) / 7.0).sum();
        assert!((f64::from(alone[2]) - plain).abs() < 1e-4, "{} {plain}", alone[2]);
    }

    #[test]
    fn what_does_not_fit_is_no_number() {
        for bad in [f32::NAN, f32::INFINITY, 1e9] {
            let sums = threads::spawn(2, |collective| {
                let mut sum = FixedPointSum::new(&Tensor::from_slice(&[0f32, 0.0]));
                let mine = if collective.rank() == 1 { bad } else { 1.0 };
                sum.take(&mut Tensor::from_slice(&[1.0, mine]));
                let first = reduced(&mut sum, collective);
                // The next step knows nothing of it.
                sum.take(&mut Tensor::from_slice(&[1f32, 0.0]));
                assert_eq!(reduced(&mut sum, collective), [2.0, 0.0]);
                first
            });
            assert!(sums.iter().flatten().all(|value| value.is_nan()));
        }
    }

    fn reduced(sum: &mut FixedPointSum, collective: &dyn Collective) -> Vec<f32> {
        let mut sums = Tensor::zeros([sum.total.size()[0] - 1], (Kind::Float, Device::Cpu));
        sum.reduce_into(&mut sums, collective).unwrap();
        Vec::try_from(sums).unwrap()
    }

    #[test]
    fn terms_are_rounded_as_libtorch_rounds_them_and_taken_away() {
        let unit = UNIT as f32;
        let terms = [0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1.4999, 1e3].map(|n: f32| n * unit);
        let large =
            [0.1f32, -3.7e-3, 2.0f32.powi(-12), 2.0f32.powi(-13) * 1.000_001, 123.456, -1e6, 1_048_576.0];
        let terms: Vec<f32> = terms.into_iter().chain(large).cycle().take(100_000).collect();
        let expected = (Tensor::from_slice(&terms).to_kind(Kind::Double) / UNIT).round().to_kind(Kind::Int64);
        let (mut sum, mut taken) =
            (FixedPointSum::new(&Tensor::from_slice(&terms)), Tensor::from_slice(&terms));
        sum.take(&mut taken);
        assert!(sum.total.narrow(0, 0, 100_000).equal(&expected));
        let mut sums = Tensor::zeros([100_000], (Kind::Float, Device::Cpu));
        FixedPointSum { total: sum.total.copy() }.move_into(&mut sums);
        assert!(sums.equal(&from_fixed_point(&expected)));
        assert_eq!((sum.total.int64_value(&[100_000]), taken.count_nonzero(None).int64_value(&[])), (0, 0));
    }
}
