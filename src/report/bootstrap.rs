//! How far a figure could be off, had other sessions come: percentile bootstrap.
//!
//! Sessions are drawn anew with replacement, as many as there are, and the figure is computed from each such resample;
//! the interval spans the middle 95 % of the resampled figures (Efron & Tibshirani, *An Introduction to the
//! Bootstrap*, 1993, chapter 13). Our figures depend on nothing but how many sessions fell into which cell, a rank or
//! a pair of ranks of two models. Drawing n sessions and counting cells is drawing the counts from a multinomial
//! distribution, so a resample is a binomial draw a cell, however many sessions there are.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Binomial, Distribution};
use serde::Serialize;

/// Share of the resamples that an interval spans.
pub const CONFIDENCE: f64 = 0.95;

/// Every interval starts from the same state of the generator: equal input, equal intervals.
const SEED: u64 = 1993;

/// A figure and its interval; NaN (`null` in JSON) where there is no session.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The figure of the sessions there are.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// `M` figures of counts of sessions by cell, with an interval each, from `n_resamples` resamples.
pub fn bootstrap<const M: usize>(
    counts: &[i64],
    n_resamples: u32,
    figures: impl Fn(&[i64]) -> [f64; M],
) -> [Estimate; M] {
    let values = figures(counts);
    let mut generator = ChaCha8Rng::seed_from_u64(SEED);
    let mut resampled: [Vec<f64>; M] = std::array::from_fn(|_| Vec::with_capacity(n_resamples as usize));
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
        Estimate { value: values[figure], low: quantile(sorted, tail), high: quantile(sorted, 1.0 - tail) }
    })
}

/// Draws as many sessions as `counts` counts, with replacement, and counts their cells: what is left for a cell is
/// binomial, given the cells before it.
fn draw(counts: &[i64], resample: &mut [i64], generator: &mut ChaCha8Rng) {
    let mut sessions_left: i64 = counts.iter().sum();
    let mut to_draw = sessions_left as u64;
    for (drawn, &count) in resample.iter_mut().zip(counts) {
        *drawn = 0;
        if count > 0 {
            let share = count as f64 / sessions_left as f64;
            let n = Binomial::new(to_draw, share).expect("a share is a probability").sample(generator);
            (*drawn, to_draw) = (n as i64, to_draw - n);
        }
        sessions_left -= count;
    }
}

/// The value that `share` of the sorted values lie below, linear between neighbours.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}
