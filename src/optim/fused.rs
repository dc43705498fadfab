//! libtorch's fused AdamW: all of a step in one operation, for GPUs.

use std::ffi::{c_char, c_int};

use tch::Tensor;
use torch_sys::C_tensor;

use super::{BETAS, EPSILON, Rates};
use crate::device::guarded::guarded;

unsafe extern "C" {
    fn bireme_fused_adamw(
        of: *const *const C_tensor,
        n_steps: f64,
        learning_rate: f64,
        betas: *const f64,
        epsilon: f64,
        scale: *const C_tensor,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

/// One step of `[values, gradients, m, v]`, decay aside: each `[n]`, f32 and contiguous. The gradients count times `scale: []`,
/// and what becomes of them is nobody's business.
///
/// # Panics
/// libtorch refuses.
pub(super) fn adamw(of: &[Tensor; 4], scale: &Tensor, rates: Rates) {
    // libtorch adds ε to the root of the corrected second moment, which is by this much larger.
    let epsilon = EPSILON / rates.second_correction();
    let (betas, divisor) = ([BETAS.0, BETAS.1], scale.reciprocal());
    let of = of.each_ref().map(Tensor::as_ptr);
    let n_steps = f64::from(rates.n_steps);
    let stepped = guarded(1024, |error, capacity| {
        let (of, betas, divisor) = (of.as_ptr(), betas.as_ptr(), divisor.as_ptr());
        // SAFETY: all pointers are to live values, four tensors, two numbers and as many characters as said among them.
        unsafe {
            bireme_fused_adamw(of, n_steps, rates.learning_rate, betas, epsilon, divisor, error, capacity)
        }
    });
    stepped.unwrap_or_else(|problem| panic!("{problem}"));
}
