//! Reductions of bf16 for MPI, which has no such type: numbers are sent as 16-bit integers, and
//! these user-defined operations interpret them.

use std::ffi::{c_int, c_void};

use mpi::collective::UnsafeUserOperation;
use mpi::ffi;
use mpi::traits::AsRaw;

use super::Reduce;

/// MPI operations on bf16. Dropping them frees them in MPI.
pub(super) struct Operations {
    sum: UnsafeUserOperation,
    min: UnsafeUserOperation,
    max: UnsafeUserOperation,
}

impl Operations {
    pub(super) fn new() -> Self {
        // SAFETY: the functions are commutative operations on 16-bit elements, do not unwind, and
        // are used with 16-bit elements only.
        unsafe {
            Self {
                sum: UnsafeUserOperation::commutative(combine_all::<SUM>),
                min: UnsafeUserOperation::commutative(combine_all::<MIN>),
                max: UnsafeUserOperation::commutative(combine_all::<MAX>),
            }
        }
    }

    pub(super) fn operation(&self, op: Reduce) -> ffi::MPI_Op {
        match op {
            Reduce::Sum => self.sum.as_raw(),
            Reduce::Min => self.min.as_raw(),
            Reduce::Max => self.max.as_raw(),
        }
    }
}

const SUM: u8 = 0;
const MIN: u8 = 1;
const MAX: u8 = 2;

/// Callback of MPI: combines `n` elements of `from` into `to`.
unsafe extern "C" fn combine_all<const OP: u8>(
    from: *mut c_void,
    to: *mut c_void,
    n: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: MPI passes two buffers of `n` elements that do not overlap and that nothing else uses
    // during the call.
    let (from, to) = unsafe {
        let n = usize::try_from(*n).unwrap_or(0);
        (
            std::slice::from_raw_parts(from.cast::<u16>(), n),
            std::slice::from_raw_parts_mut(to.cast::<u16>(), n),
        )
    };
    for (to, from) in to.iter_mut().zip(from) {
        *to = combine::<OP>(*from, *to);
    }
}

fn combine<const OP: u8>(a: u16, b: u16) -> u16 {
    let [a, b] = [a, b].map(|bits| f32::from_bits(u32::from(bits) << 16));
    rounded(match OP {
        SUM => a + b,
        MIN => a.min(b),
        _ => a.max(b),
    })
}

/// Rounds to the nearest bf16, ties to even.
fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        // Cutting the mantissa of a NaN could leave the bits of infinity: set one of the remaining
        // bits.
        return (bits >> 16) as u16 | 0x40;
    }
    // Just below half a unit, plus one if the last kept bit is odd: so ties round to even.
    let half = 0x7fff + (bits >> 16 & 1);
    (bits.wrapping_add(half) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    #[test]
    fn numbers_are_rounded_as_libtorch_rounds_them() {
        let numbers = [
            0.0,
            -0.0,
            1.0,
            1.0 + 1.0 / 256.0,
            1.0 + 3.0 / 256.0,
            -2.6,
            1e-40,
            3.4e38,
            f32::INFINITY,
            f32::NAN,
        ];
        let rounded: Vec<u16> = numbers.iter().map(|&x| rounded(x)).collect();
        let expected = Tensor::from_slice(&numbers).to_kind(Kind::BFloat16).view_dtype(Kind::Int16);
        let expected: Vec<i16> = expected.try_into().unwrap();
        for ((x, a), b) in numbers.iter().zip(rounded).zip(expected) {
            let is_nan = |bits: u16| f32::from_bits(u32::from(bits) << 16).is_nan();
            assert!(a == b as u16 || x.is_nan() && is_nan(a), "{x}: {a:x} {b:x}");
        }
    }

    #[test]
    fn sum_minimum_and_maximum_are_those_of_f32() {
        let bits = |x: f32| rounded(x);
        let (a, b) = (bits(1.5), bits(-2.25));
        assert_eq!(combine::<SUM>(a, b), bits(-0.75));
        assert_eq!(combine::<MIN>(a, b), b);
        assert_eq!(combine::<MAX>(a, b), a);
    }
}
