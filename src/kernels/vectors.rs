//! Loops compiled for several vector instruction sets and selected at run time, and functions for
//! them.

/// A loop. `run` and all functions that it calls must be `#[inline(always)]`: only inlined code is
/// compiled with the instructions of its caller.
pub(crate) trait Loop {
    /// `FUSES`: whether the CPU has fused multiply-add. Without it `mul_add` is a slow library
    /// call.
    fn run<const FUSES: bool>(self);
}

/// Runs the loop with the widest vectors of this CPU.
pub(crate) fn run(work: impl Loop) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has the instructions for which the function is compiled.
            return unsafe { with_avx512(work) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return unsafe { with_avx2(work) };
        }
    }
    work.run::<false>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn with_avx512(work: impl Loop) {
    work.run::<true>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2(work: impl Loop) {
    work.run::<true>();
}

/// `e^x` for `x <= 0`, with a relative error of 2e-7; `e^-87` below −87. Splits `x = n ln 2 + r`
/// and evaluates a polynomial for `e^r`, fitted to `|r| <= ln 2 / 2` (Moshier's Cephes library).
#[inline(always)]
pub(crate) fn exp<const FUSES: bool>(x: f32) -> f32 {
    let fused = |a: f32, b: f32, c: f32| if FUSES { a.mul_add(b, c) } else { a * b + c };
    // 1.5 · 2²³: near it floats are integers, so adding it rounds to an integer, which is in the
    // low bits.
    const ROUNDER: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = fused(x, std::f32::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    // ln 2 in two parts, so that `n` times the larger one is exact.
    let r = fused(n, 2.121_944_4e-4, fused(n, -0.693_359_4, x));
    let series = [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let series = series.into_iter().fold(1.987_569_2e-4, |sum, next| fused(sum, r, next));
    // 2ⁿ: the exponent field is n + 127.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    fused(series, r * r, r + 1.0) * power
}

/// `1 / (1 + e^-x)`, with an error of 2e-7.
#[inline(always)]
pub(crate) fn sigmoid<const FUSES: bool>(x: f32) -> f32 {
    let power = exp::<FUSES>(-x.abs());
    let reciprocal = (1.0 + power).recip();
    if x < 0.0 { power * reciprocal } else { reciprocal }
}

/// `tanh x`, with an error of 2e-7.
#[inline(always)]
pub(crate) fn tanh<const FUSES: bool>(x: f32) -> f32 {
    let power = exp::<FUSES>(-2.0 * x.abs());
    ((1.0 - power) / (1.0 + power)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Errors<'a> {
        xs: &'a [f32],
        /// Largest relative error of `exp`, and largest errors of `sigmoid` and `tanh`.
        largest: &'a mut [f64; 3],
    }

    impl Loop for Errors<'_> {
        #[inline(always)]
        fn run<const FUSES: bool>(self) {
            for &x in self.xs {
                let wide = f64::from(x);
                let exp_error = f64::from(exp::<FUSES>(-x.abs())) / (-wide.abs()).exp() - 1.0;
                let sigmoid_error = f64::from(sigmoid::<FUSES>(x)) - (1.0 + (-wide).exp()).recip();
                let tanh_error = f64::from(tanh::<FUSES>(x)) - wide.tanh();
                for (largest, error) in
                    self.largest.iter_mut().zip([exp_error, sigmoid_error, tanh_error])
                {
                    *largest = largest.max(error.abs());
                }
            }
        }
    }

    #[test]
    fn functions_keep_their_error_bounds_with_and_without_vector_instructions() {
        let xs: Vec<f32> = (-8700..=8700).map(|i| i as f32 / 100.0).collect();
        let (mut vector, mut scalar) = ([0.0; 3], [0.0; 3]);
        run(Errors { xs: &xs, largest: &mut vector });
        Errors { xs: &xs, largest: &mut scalar }.run::<false>();
        assert!(
            vector.into_iter().chain(scalar).all(|error| error < 2e-7),
            "{vector:?} {scalar:?}"
        );
    }

    #[test]
    fn functions_handle_infinity_nan_and_zero() {
        assert_eq!([sigmoid::<false>(f32::INFINITY), tanh::<false>(f32::INFINITY)], [1.0, 1.0]);
        assert_eq!(tanh::<false>(f32::NEG_INFINITY), -1.0);
        assert!(sigmoid::<false>(f32::NEG_INFINITY) < 1e-37);
        assert!(sigmoid::<false>(f32::NAN).is_nan() && tanh::<false>(f32::NAN).is_nan());
        assert_eq!((sigmoid::<false>(0.0), tanh::<false>(0.0)), (0.5, 0.0));
    }
}
