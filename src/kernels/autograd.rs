//! Autograd operations with a backward pass in Rust, backward passes from given gradients, and sums
//! of many tensors at once.

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

unsafe extern "C" {
    fn bireme_backward(
        outputs: *const *const C_tensor,
        output_gradients: *const *const C_tensor,
        n_outputs: usize,
        inputs: *const *const C_tensor,
        n_inputs: usize,
        input_gradients: *mut *mut C_tensor,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;

    fn bireme_add_all(
        sums: *const *const C_tensor,
        terms: *const *const C_tensor,
        n: usize,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

fn pointers<'t>(tensors: impl IntoIterator<Item = &'t Tensor>) -> Vec<*const C_tensor> {
    tensors.into_iter().map(|tensor| tensor.as_ptr()).collect()
}

/// Gradients by `inputs`, given those of `outputs`; undefined where no output depends on an input.
///
/// # Panics
/// If libtorch returns an error.
pub fn backward(outputs: &[(&Tensor, &Tensor)], inputs: &[&Tensor]) -> Vec<Tensor> {
    let of_outputs = pointers(outputs.iter().map(|(output, _)| *output));
    let of_gradients = pointers(outputs.iter().map(|(_, gradient)| *gradient));
    let of_inputs = pointers(inputs.iter().copied());
    let mut results = vec![std::ptr::null_mut(); inputs.len()];
    let done = guarded(1024, |error, capacity| {
        // SAFETY: the pointers are to live tensors, as many as the counts say; `results` has room
        // for one pointer per input, and `error` for `capacity` characters.
        unsafe {
            bireme_backward(
                of_outputs.as_ptr(),
                of_gradients.as_ptr(),
                of_outputs.len(),
                of_inputs.as_ptr(),
                of_inputs.len(),
                results.as_mut_ptr(),
                error,
                capacity,
            )
        }
    });
    done.unwrap_or_else(|problem| panic!("{problem}"));
    // SAFETY: C++ wrote one tensor per input and passes their ownership on.
    results.into_iter().map(|result| unsafe { Tensor::from_ptr(result) }).collect()
}

/// Adds each of `terms` to the tensor of the same size at its place in `sums`: on a GPU in one
/// kernel.
///
/// # Panics
/// If libtorch returns an error.
pub fn add_all(sums: &[Tensor], terms: &[&Tensor]) {
    if sums.is_empty() {
        return;
    }
    assert_eq!(sums.len(), terms.len(), "one term per sum");
    let (sums, terms) = (pointers(sums), pointers(terms.iter().copied()));
    let done = guarded(1024, |error, capacity| {
        // SAFETY: the pointers are to as many live tensors as `sums` has, and `error` has room for
        // `capacity` characters.
        unsafe { bireme_add_all(sums.as_ptr(), terms.as_ptr(), sums.len(), error, capacity) }
    });
    done.unwrap_or_else(|problem| panic!("{problem}"));
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
    fn backward_passes_start_from_given_gradients() {
        let [a, b, c] = [[1f32, 2.0], [3.0, -4.0], [0.5, 0.5]]
            .map(|x| Tensor::from_slice(&x).set_requires_grad(true));
        let (product, square) = (&a * &b, a.square());
        let [by_product, by_square] = [[2f32, -1.0], [1.0, 1.0]].map(|x| Tensor::from_slice(&x));
        let gradients = backward(&[(&product, &by_product), (&square, &by_square)], &[&a, &b, &c]);
        let numbers = |x: &Tensor| Vec::<f32>::try_from(x).unwrap();
        assert_eq!(numbers(&gradients[0]), [2.0 * 3.0 + 2.0, 4.0 + 4.0]);
        assert_eq!(numbers(&gradients[1]), [2.0, -2.0]);
        assert!(!gradients[2].defined(), "nothing depends on it");
    }

    #[test]
    fn sums_of_many_tensors_are_those_of_each() {
        let terms = [[1f32, 2.0], [3.0, 4.0]].map(|x| Tensor::from_slice(&x));
        let sums = [Tensor::from_slice(&[10f32, 20.0]), Tensor::from_slice(&[30f32, 40.0])];
        add_all(&sums, &[&terms[0], &terms[1]]);
        let numbers = sums.map(|sum| Vec::<f32>::try_from(sum).unwrap());
        assert_eq!(numbers, [[11.0, 22.0], [33.0, 44.0]]);
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
