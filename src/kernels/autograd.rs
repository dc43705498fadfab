//! Autograd operations with a backward pass in Rust.

use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

use bireme_base::console::panic_text;
use tch::Tensor;
use torch_sys::C_tensor;

use crate::guarded::guarded;

/// Computes the gradients of the inputs, in order, from the gradient of the output.
type Backward = Box<dyn FnOnce(Tensor) -> Vec<Tensor> + Send>;

/// Value that the autograd node owns. `None` after the backward pass.
type Slot = Option<Backward>;

unsafe extern "C" {
    fn bireme_attach_backward(
        output: *mut C_tensor,
        inputs: *const *const C_tensor,
        n: usize,
        backward: *mut c_void,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

/// Adds an autograd node that computes `output` from `inputs`. If an input requires a gradient, the
/// backward pass calls `backward` at most once.
pub fn with_backward(
    mut output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(Tensor) -> Vec<Tensor> + Send + 'static,
) -> Tensor {
    let inputs: Vec<*const C_tensor> = inputs.iter().map(|input| input.as_ptr()).collect();
    let slot: Slot = Some(Box::new(backward));
    let slot = Box::into_raw(Box::new(slot));
    let attached = guarded(1024, |error, capacity| {
        let (output, n) = (output.as_mut_ptr(), inputs.len());
        // SAFETY: `output` and the `n` inputs point to live tensors, `error` has room for
        // `capacity` characters, and C++ takes ownership of `slot`, also if it fails.
        unsafe { bireme_attach_backward(output, inputs.as_ptr(), n, slot.cast(), error, capacity) }
    });
    attached.unwrap_or_else(|problem| panic!("{problem}"));
    output
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bireme_run_backward(
    slot: *mut c_void,
    gradient: *mut C_tensor,
    input_gradients: *mut *mut C_tensor,
    n: usize,
    error: *mut c_char,
    capacity: usize,
) -> c_int {
    // SAFETY: `slot` is the pointer from `with_backward`, and nothing else uses it during the call.
    // The caller passes ownership of the gradient, and room for `n` pointers and `capacity`
    // characters.
    let (slot, gradient, input_gradients, error) = unsafe {
        (
            &mut *slot.cast::<Slot>(),
            Tensor::from_ptr(gradient),
            slice::from_raw_parts_mut(input_gradients, n),
            slice::from_raw_parts_mut(error.cast::<u8>(), capacity),
        )
    };
    // A panic must not unwind into C++, which is undefined behaviour.
    let gradients = catch_unwind(AssertUnwindSafe(|| {
        let backward =
            slot.take().expect("the backward pass runs once, because it frees its inputs");
        let gradients = backward(gradient);
        assert_eq!(gradients.len(), n, "one gradient per input");
        gradients
    }));
    match gradients {
        Ok(gradients) => {
            for (pointer, mut gradient) in input_gradients.iter_mut().zip(gradients) {
                *pointer = gradient.as_mut_ptr();
                // The caller owns the tensor now.
                std::mem::forget(gradient);
            }
            0
        }
        Err(panic) => {
            let text = panic_text(&*panic).unwrap_or("a panic without a message").as_bytes();
            let n = text.len().min(capacity - 1);
            error[..n].copy_from_slice(&text[..n]);
            error[n] = 0;
            1
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bireme_free_backward(slot: *mut c_void) {
    // SAFETY: `slot` is the pointer from `with_backward`, and this function is called once for it.
    drop(unsafe { Box::from_raw(slot.cast::<Slot>()) });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn product(a: &Tensor, b: &Tensor, witness: &Arc<()>) -> Tensor {
        let [saved_a, saved_b] = [a, b].map(Tensor::detach);
        let witness = Arc::clone(witness);
        let output = tch::no_grad(|| a * b);
        with_backward(output, &[a, b], move |gradient| {
            let _ = &witness;
            vec![&gradient * &saved_b, gradient * saved_a]
        })
    }

    #[test]
    fn gradients_equal_those_of_libtorch() {
        let [a, b] =
            [[1f32, 2.0], [3.0, -4.0]].map(|x| Tensor::from_slice(&x).set_requires_grad(true));
        let witness = Arc::new(());
        let gradients = |product: &dyn Fn(&Tensor, &Tensor) -> Tensor| {
            let (a_squared, twice_b) = (&a * &a, &b * 2.0);
            let loss = product(&a_squared, &twice_b).exp().sum(tch::Kind::Float);
            Tensor::run_backward(&[loss], &[&a, &b], false, false)
        };
        let (ours, theirs) = (gradients(&|a, b| product(a, b, &witness)), gradients(&|a, b| a * b));
        assert!(
            ours.iter().zip(&theirs).all(|(ours, theirs)| ours.equal(theirs)),
            "{ours:?} {theirs:?}"
        );
        assert_eq!(
            Arc::strong_count(&witness),
            1,
            "the closure is not freed after the backward pass"
        );
    }

    #[test]
    fn a_panic_in_the_backward_pass_is_an_error_of_libtorch() {
        let a = Tensor::from_slice(&[1f32]).set_requires_grad(true);
        let output = with_backward(tch::no_grad(|| &a * 2.0), &[&a], |_| panic!("no gradient"));
        let error = Tensor::f_run_backward(&[output], &[&a], false, false).unwrap_err();
        assert!(error.to_string().contains("no gradient"), "{error}");
    }

    #[test]
    fn the_closure_is_freed_if_no_gradient_is_recorded_or_the_output_is_dropped() {
        let [a, b] = [1f32, 2.0].map(|x| Tensor::from_slice(&[x]));
        let witness = Arc::new(());
        assert!(!product(&a, &b, &witness).requires_grad());
        let a = a.set_requires_grad(true);
        assert!(!tch::no_grad(|| product(&a, &b, &witness)).requires_grad());
        assert_eq!(Arc::strong_count(&witness), 1);
        let recorded = product(&a, &b, &witness);
        assert!(recorded.requires_grad());
        assert_eq!(Arc::strong_count(&witness), 2);
        drop(recorded);
        assert_eq!(Arc::strong_count(&witness), 1);
    }
}
