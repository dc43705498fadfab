//! How gradients of micro-batches are added up over ranks.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::collective::{Collective, CollectiveError, Reduce};

/// `run.reduction`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// A rank's micro-batches are one pass, and its sums are f32: other numbers of ranks round otherwise, by about
    /// 10⁻⁷ at first, which training amplifies.
    Fast,
    /// Every micro-batch is a pass of its own, and sums are whole numbers, whose order does not matter: the same
    /// weights to the last bit on any number of ranks of equally many threads.
    Reproducible,
}

/// Gradients are added up as whole multiples of 2⁻³⁶. Over a thousand targets that is 10⁻¹⁴ of a mean gradient,
/// far below the 10⁻⁸ that AdamW adds to its root.
const UNIT: f64 = 1.0 / (1u64 << 36) as f64;

/// Largest term: the loss of a large micro-batch. 64 bits hold the sum of 128 of these, and gradients are far smaller.
const MOST: f64 = (1u64 << 20) as f64;

/// A sum that does not depend on the order of its terms.
pub(super) struct ExactSum {
    /// Multiples of [`UNIT`], i64 `[n]`.
    total: Tensor,
    /// 1 once a term was NaN, infinite or beyond [`MOST`]: i64 `[1]`.
    overflow: Tensor,
}

impl ExactSum {
    /// Zero, for terms like `like: [n]`.
    pub(super) fn new(like: &Tensor) -> Self {
        let on = (Kind::Int64, like.device());
        Self { total: Tensor::zeros(like.size(), on), overflow: Tensor::zeros([1], on) }
    }

    /// Adds `terms: [n]`.
    pub(super) fn add(&mut self, terms: &Tensor) {
        // Not `>`: a NaN is neither larger nor smaller than anything.
        let within = terms.abs().le(MOST).all().to_kind(Kind::Int64);
        self.overflow += 1 - within;
        self.total += (terms.to_kind(Kind::Double) / UNIT).round().to_kind(Kind::Int64);
    }

    /// *All ranks.* The sum over ranks, f32 `[n]`; NaN throughout if any term was out of range.
    pub(super) fn all_reduce(self, collective: &dyn Collective) -> Result<Tensor, CollectiveError> {
        let mut sum = Tensor::cat(&[self.total, self.overflow], 0);
        collective.all_reduce(&mut sum, Reduce::Sum)?;
        let n = sum.size()[0] - 1;
        let total = (sum.narrow(0, 0, n).to_kind(Kind::Double) * UNIT).to_kind(Kind::Float);
        let overflow = sum.narrow(0, n, 1).ne(0);
        Ok(total.masked_fill(&overflow, f64::NAN))
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
                let mut sum = ExactSum::new(&term(0));
                (0..12).skip(collective.rank()).step_by(world_size).for_each(|i| sum.add(&term(i)));
                Vec::<f32>::try_from(sum.all_reduce(collective).unwrap()).unwrap()
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
                let mut sum = ExactSum::new(&Tensor::from_slice(&[0f32, 0.0]));
                let mine = if collective.rank() == 1 { bad } else { 1.0 };
                sum.add(&Tensor::from_slice(&[1.0, mine]));
                Vec::<f32>::try_from(sum.all_reduce(collective).unwrap()).unwrap()
            });
            assert!(sums.iter().flatten().all(|value| value.is_nan()));
        }
    }
}
