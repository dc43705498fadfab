//! One step of AdamW (Loshchilov & Hutter 2019) on flat buffers.

use std::ffi::{c_char, c_int};

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::elements::{assert_disjoint, elements_mut};
use crate::guarded::guarded;
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

/// Updates the values by one step with the gradients times `scale: []`, and sets the gradients to
/// zero:
/// `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
/// `p ← (p − lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)) · decay_factor`.
///
/// # Panics
/// If the buffers differ in size or share memory, or libtorch returns an error.
pub fn adamw(buffers: &mut AdamWBuffers, scale: &Tensor, step: AdamWStep) {
    let AdamWBuffers { values, gradients, m, v } = buffers;
    let n = values.numel();
    assert!(
        [&*gradients, m, v].iter().all(|buffer| buffer.numel() == n),
        "the buffers differ in size"
    );
    if values.device() != Device::Cpu {
        fused_by_libtorch(buffers, scale, step);
        if step.decay_factor < 1.0 {
            let _ = buffers.values.g_mul_scalar_(step.decay_factor);
        }
        let _ = buffers.gradients.zero_();
        return;
    }
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

unsafe extern "C" {
    fn bireme_fused_adamw(
        buffers: *const *const C_tensor,
        n_steps: f64,
        learning_rate: f64,
        betas: *const f64,
        epsilon: f64,
        scale: *const C_tensor,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

/// The step without weight decay in one kernel of libtorch. The contents of the gradients are
/// unspecified afterwards.
///
/// # Panics
/// If libtorch returns an error.
fn fused_by_libtorch(buffers: &AdamWBuffers, scale: &Tensor, step: AdamWStep) {
    // libtorch adds ε to the root of the corrected second moment, this function to the root of the
    // uncorrected one: √(v / c²) + ε / c = (√v + ε) / c.
    let epsilon = EPSILON / step.second_moment_correction();
    let (betas, divisor) = ([BETA_1, BETA_2], scale.reciprocal());
    let AdamWBuffers { values, gradients, m, v } = buffers;
    let buffers = [values, gradients, m, v].map(Tensor::as_ptr);
    let n_steps = f64::from(step.n_steps);
    let result = guarded(1024, |error, capacity| {
        let (buffers, betas, divisor) = (buffers.as_ptr(), betas.as_ptr(), divisor.as_ptr());
        // SAFETY: the pointers are to four live tensors, two numbers, a live tensor, and room for
        // `capacity` characters.
        unsafe {
            bireme_fused_adamw(
                buffers,
                n_steps,
                step.learning_rate,
                betas,
                epsilon,
                divisor,
                error,
                capacity,
            )
        }
    });
    result.unwrap_or_else(|problem| panic!("{problem}"));
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn the_fused_step_equals_the_step_on_the_cpu() {
        let wave =
            |frequency: f64| (Tensor::arange(1000, (Kind::Float, Device::Cpu)) * frequency).sin();
        let buffers = || {
            let zeros = || Tensor::zeros([1000], (Kind::Float, Device::Cpu));
            AdamWBuffers { values: wave(0.7), gradients: zeros(), m: zeros(), v: zeros() }
        };
        let (mut on_cpu, mut by_libtorch) = (buffers(), buffers());
        for n_steps in 1..=5 {
            let step = AdamWStep { learning_rate: 0.01, n_steps, decay_factor: 1.0 };
            let gradients = wave(f64::from(n_steps)) * 1e-3;
            on_cpu.gradients.copy_(&gradients);
            by_libtorch.gradients.copy_(&gradients);
            let scale = Tensor::from(0.25f32);
            adamw(&mut on_cpu, &scale, step);
            fused_by_libtorch(&by_libtorch, &scale, step);
            assert_eq!(on_cpu.gradients.count_nonzero(None).int64_value(&[]), 0);
            let pairs = [
                (&on_cpu.values, &by_libtorch.values),
                (&on_cpu.m, &by_libtorch.m),
                (&on_cpu.v, &by_libtorch.v),
            ];
            for (ours, theirs) in pairs {
                let largest = |x: &Tensor| x.abs().max().double_value(&[]);
                let error = largest(&(ours - theirs)) / largest(ours);
                assert!(error < 1e-6, "{n_steps}: {error}");
            }
        }
    }

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
