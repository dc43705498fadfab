//! Confidence intervals over sessions: percentile bootstrap.
//!
//! Sessions are resampled with replacement and a figure is computed from each resample; the
//! interval spans the middle 95 % of the resampled figures (Efron & Tibshirani, *An Introduction to
//! the Bootstrap*, 1993, chapter 13). All figures here depend only on the number of sessions in
//! each cell, a rank or a pair of ranks of two models. Resampling n sessions and counting cells is
//! a multinomial draw, so a resample costs one binomial draw per cell for any number of sessions.

use std::fmt;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Binomial, Distribution};
use serde::Serialize;

/// Level of the intervals.
pub const CONFIDENCE: f64 = 0.95;

/// Fixed, so that equal counts give equal intervals.
const SEED: u64 = 1993;

/// A figure and its interval; NaN (`null` in JSON) without sessions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Of all sessions.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// `0.1948 [0.1800, 0.2100]`, with the signs of positive numbers under `{:+}`; `none` for NaN.
impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { value, low, high } = self;
        match value {
            _ if value.is_nan() => f.write_str("none"),
            _ if f.sign_plus() => write!(f, "{value:+.4} [{low:+.4}, {high:+.4}]"),
            _ => write!(f, "{value:.4} [{low:.4}, {high:.4}]"),
        }
    }
}

/// Estimates `M` figures, which are functions of the number of sessions in each cell.
pub fn bootstrap<const M: usize>(
    counts: &[i64],
    n_resamples: u32,
    figures: impl Fn(&[i64]) -> [f64; M],
) -> [Estimate; M] {
    let values = figures(counts);
    let mut generator = ChaCha8Rng::seed_from_u64(SEED);
    let mut resampled: [Vec<f64>; M] =
        std::array::from_fn(|_| Vec::with_capacity(n_resamples as usize));
    let mut resample = vec![0; counts.len()];
    for _ in 0..n_resamples {
        draw(counts, &mut resample, &mut generator);
        for (figures, figure) in resampled.iter_mut().zip(figures(&resample)) {
            figures.push(figure);
        }
    }
    std::array::from_fn(|figure| {
        let sorted = &mut resampled[figure];
        sorted.sort_by(f64::total_cmp);
        let tail = (1.0 - CONFIDENCE) / 2.0;
        Estimate {
            value: values[figure],
            low: quantile(sorted, tail),
            high: quantile(sorted, 1.0 - tail),
        }
    })
}

/// Draws a resample: given the cells before it, the number of sessions in a cell is binomial.
fn draw(counts: &[i64], resample: &mut [i64], generator: &mut ChaCha8Rng) {
    let mut sessions_left: i64 = counts.iter().sum();
    let mut to_draw = sessions_left as u64;
    for (drawn, &count) in resample.iter_mut().zip(counts) {
        *drawn = 0;
        if count > 0 {
            let share = count as f64 / sessions_left as f64;
            let n =
                Binomial::new(to_draw, share).expect("a share is a probability").sample(generator);
            (*drawn, to_draw) = (n as i64, to_draw - n);
        }
        sessions_left -= count;
    }
}

/// Linear between neighbours.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}
