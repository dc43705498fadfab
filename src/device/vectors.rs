//! Loops over numbers, compiled for the widest vectors that a CPU may have, and functions to use in them.

/// A loop. Its `run` is to be `#[inline(always)]`, as everything that it calls.
pub trait Loop {
    /// `FUSES`: whether the CPU multiplies and adds at once.
    fn run<const FUSES: bool>(self);
}

/// Runs it with what this CPU has.
pub fn run(work: impl Loop) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has what the function was compiled for.
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

/// `e^x` for `x` not above 0, to a relative 2e-7; below −87, `e^-87`. `x = n ln 2 + r`, and `e^r` by its series, the coefficients
/// fitted to `|r| <= ln 2 / 2` (Moshier's Cephes library).
#[inline(always)]
pub fn exp<const FUSES: bool>(x: f32) -> f32 {
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

/// `1 / (1 + e^-x)`, to 2e-7.
#[inline(always)]
pub fn sigmoid<const FUSES: bool>(x: f32) -> f32 {
    let power = exp::<FUSES>(-x.abs());
    let share = (1.0 + power).recip();
    if x < 0.0 { power * share } else { share }
}

/// `tanh x`, to 2e-7.
#[inline(always)]
pub fn tanh<const FUSES: bool>(x: f32) -> f32 {
    let power = exp::<FUSES>(-2.0 * x.abs());
    ((1.0 - power) / (1.0 + power)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Errors<'a> {
        xs: &'a [f32],
        /// Of `exp`, relative, and of `sigmoid` and `tanh`.
        largest: &'a mut [f64; 3],
    }

    impl Loop for Errors<'_> {
        #[inline(always)]
        fn run<const FUSES: bool>(self) {
            for &x in self.xs {
                let exact = f64::from(x);
                let of_exp = f64::from(exp::<FUSES>(-x.abs())) / (-exact.abs()).exp() - 1.0;
                let of_sigmoid = f64::from(sigmoid::<FUSES>(x)) - (1.0 + (-exact).exp()).recip();
                let of_tanh = f64::from(tanh::<FUSES>(x)) - exact.tanh();
                for (largest, error) in self.largest.iter_mut().zip([of_exp, of_sigmoid, of_tanh]) {
                    *largest = largest.max(error.abs());
                }
            }
        }
    }

    #[test]
    fn functions_are_as_exact_as_they_say_on_every_cpu() {
        let xs: Vec<f32> = (-8700..=8700).map(|i| i as f32 / 100.0).collect();
        let (mut here, mut plain) = ([0.0; 3], [0.0; 3]);
        run(Errors { xs: &xs, largest: &mut here });
        Errors { xs: &xs, largest: &mut plain }.run::<false>();
        assert!(here.into_iter().chain(plain).all(|error| error < 2e-7), "{here:?} {plain:?}");
    }

    #[test]
    fn ends_and_no_numbers() {
        assert_eq!([sigmoid::<false>(f32::INFINITY), tanh::<false>(f32::INFINITY)], [1.0, 1.0]);
        assert_eq!(tanh::<false>(f32::NEG_INFINITY), -1.0);
        assert!(sigmoid::<false>(f32::NEG_INFINITY) < 1e-37);
        assert!(sigmoid::<false>(f32::NAN).is_nan() && tanh::<false>(f32::NAN).is_nan());
        assert_eq!((sigmoid::<false>(0.0), tanh::<false>(0.0)), (0.5, 0.0));
    }
}
