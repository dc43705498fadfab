//! libtorch's fused AdamW: a step in one kernel, for GPUs.

use std::ffi::{c_char, c_int};

use tch::Tensor;
use torch_sys::C_tensor;

use super::{AdamWStep, BETA_1, BETA_2, EPSILON};
use crate::device::guarded::guarded;

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

/// One step without weight decay on `[values, gradients, m, v]`, each `[n]`, f32 and contiguous.
/// The gradients are multiplied by `scale: []`; their contents afterwards are unspecified.
///
/// # Panics
/// If libtorch returns an error.
pub(super) fn adamw(buffers: &[Tensor; 4], scale: &Tensor, step: AdamWStep) {
    // libtorch adds ε to the root of the corrected second moment, this program to the root of the
    // uncorrected one: √(v / c²) + ε / c = (√v + ε) / c.
    let epsilon = EPSILON / step.second_moment_correction();
    let (betas, divisor) = ([BETA_1, BETA_2], scale.reciprocal());
    let buffers = buffers.each_ref().map(Tensor::as_ptr);
    let n_steps = f64::from(step.n_steps);
    let result = guarded(1024, |error, capacity| {
        let (buffers, betas, divisor) = (buffers.as_ptr(), betas.as_ptr(), divisor.as_ptr());
        // SAFETY: the pointers are to four live tensors, two numbers, a live tensor, and room for
        // `capacity` characters.
        unsafe {
            bireme_fused_adamw(buffers, n_steps, step.learning_rate, betas, epsilon, divisor, error, capacity)
        }
    });
    result.unwrap_or_else(|problem| panic!("{problem}"));
}
