//! One step of AdamW (Loshchilov & Hutter 2019) on flat buffers.

use tch::{Device, Tensor};

use crate::elements::{assert_disjoint, elements_mut};
use crate::parallel::{in_parallel, part_len};

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// Parameters and their state, each `[n]`, f32, contiguous and on one device.
pub struct AdamWBuffers {
    pub values: Tensor,
    pub gradients: Tensor,
    /// First moments.
    pub m: Tensor,
    /// Second moments.
    pub v: Tensor,
}

/// Scalars of one step.
#[derive(Clone, Copy)]
pub struct AdamWStep {
    pub learning_rate: f64,
    /// Steps including this one, `t` in the formula.
    pub n_steps: i32,
    /// Weight decay multiplies parameters by this factor.
    pub decay_factor: f64,
}

impl AdamWStep {
    /// Learning rate with the bias corrections of both moments, which start at zero.
    fn corrected_rate(&self) -> f64 {
        self.learning_rate * self.second_moment_correction() / (1.0 - BETA_1.powi(self.n_steps))
    }

    /// Root of the bias correction of the second moment.
    fn second_moment_correction(&self) -> f64 {
        (1.0 - BETA_2.powi(self.n_steps)).sqrt()
    }
}

/// Updates the values on the CPU by one step with the gradients times `scale: []`, and sets the
/// gradients to zero:
/// `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
/// `p ← (p − lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)) · decay_factor`.
///
/// # Panics
/// If the buffers differ in size or share memory, or are on a GPU.
pub fn adamw(buffers: &mut AdamWBuffers, scale: &Tensor, step: AdamWStep) {
    let AdamWBuffers { values, gradients, m, v } = buffers;
    let n = values.numel();
    assert!(
        [&*gradients, m, v].iter().all(|buffer| buffer.numel() == n),
        "the buffers differ in size"
    );
    assert_eq!(values.device(), Device::Cpu, "see `cuda::adamw` for GPUs");
    // One pass: separate operations would read and write about three times as much memory.
    let scale = scale.double_value(&[]) as f32;
    let n_each = part_len(n, BLOCK);
    assert_disjoint(&[values, gradients, m, v], &[]);
    // SAFETY: the buffers are disjoint, and only this function uses them during the call.
    let [values, gradients, m, v] =
        [values, gradients, m, v].map(|x| unsafe { elements_mut::<f32>(x) });
    let moments = m.chunks_mut(n_each).zip(v.chunks_mut(n_each));
    let parts = values.chunks_mut(n_each).zip(gradients.chunks_mut(n_each)).zip(moments);
    in_parallel(parts, |((values, gradients), (m, v))| {
        Part { values, gradients, m, v }.update(scale, step)
    });
}

/// Elements that are skipped together if gradient and moments are zero: about one row of a table.
const BLOCK: usize = 64;

/// Elements of one thread.
struct Part<'a> {
    values: &'a mut [f32],
    gradients: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
}

impl Part<'_> {
    fn update(self, scale: f32, step: AdamWStep) {
        let one_minus_beta_1 = (1.0 - BETA_1) as f32;
        let (beta_2, one_minus_beta_2) = (BETA_2 as f32, (1.0 - BETA_2) as f32);
        let (rate, decay_factor) = (step.corrected_rate() as f32, step.decay_factor as f32);
        let blocks = self.values.chunks_mut(BLOCK).zip(self.gradients.chunks_mut(BLOCK));
        let moments = self.m.chunks_mut(BLOCK).zip(self.v.chunks_mut(BLOCK));
        for ((values, gradients), (m, v)) in blocks.zip(moments) {
            // In a large table many rows have had no gradient yet. The step would not change them.
            let is_zero = |numbers: &[f32]| numbers.iter().all(|&number| number == 0.0);
            if decay_factor == 1.0 && is_zero(gradients) && is_zero(m) && is_zero(v) {
                continue;
            }
            for (((value, gradient), m), v) in values.iter_mut().zip(gradients).zip(m).zip(v) {
                let g = *gradient * scale;
                *m += one_minus_beta_1 * (g - *m);
                *v = beta_2 * *v + one_minus_beta_2 * g * g;
                *value = (*value - rate * *m / (v.sqrt() + EPSILON as f32)) * decay_factor;
                *gradient = 0.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    #[should_panic(expected = "shares memory")]
    fn buffers_that_share_memory_are_refused() {
        let x = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        let part = || x.shallow_clone();
        let mut buffers = AdamWBuffers { values: part(), gradients: part(), m: part(), v: part() };
        adamw(
            &mut buffers,
            &Tensor::from(1f32),
            AdamWStep { learning_rate: 0.1, n_steps: 1, decay_factor: 1.0 },
        );
    }
}
