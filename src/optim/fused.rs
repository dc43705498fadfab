//! libtorch's fused AdamW: all of a step in one operation, for GPUs.

use std::ffi::{CStr, c_char, c_int};

use tch::Tensor;
use torch_sys::C_tensor;

use super::{BETAS, EPSILON, Rates};

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
    let mut error = [0; 1024];
    // SAFETY: all pointers are to live values, four tensors, two numbers and as many characters as said among them.
    let failed = unsafe {
        bireme_fused_adamw(
            of.as_ptr(),
            f64::from(rates.n_steps),
            rates.learning_rate,
            betas.as_ptr(),
            epsilon,
            divisor.as_ptr(),
            error.as_mut_ptr(),
            error.len(),
        )
    };
    // SAFETY: it is a C string, empty or written by `snprintf`.
    assert!(failed == 0, "{}", unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy());
}
