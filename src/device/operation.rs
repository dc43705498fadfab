//! Operations of our own in libtorch's autograd.

use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

use bireme_base::console::panic_text;
use tch::Tensor;
use torch_sys::C_tensor;

use super::guarded::guarded;

/// From the gradient of an output to those of the inputs, in order.
type Back = Box<dyn FnOnce(Tensor) -> Vec<Tensor> + Send>;

/// What libtorch keeps: a way back that has not been gone.
type Kept = Option<Back>;

unsafe extern "C" {
    fn bireme_follows(
        output: *mut C_tensor,
        inputs: *const *const C_tensor,
        n: usize,
        back: *mut c_void,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

/// Says that `output`, computed in whatever way from `inputs`, follows from them: where one of these is learnt, gradients go on
/// through `back`, which is called at most once.
pub fn follows(
    mut output: Tensor,
    inputs: &[&Tensor],
    back: impl FnOnce(Tensor) -> Vec<Tensor> + Send + 'static,
) -> Tensor {
    let inputs: Vec<*const C_tensor> = inputs.iter().map(|input| input.as_ptr()).collect();
    let back: Kept = Some(Box::new(back));
    let back = Box::into_raw(Box::new(back));
    let added = guarded(1024, |error, capacity| {
        let (output, n) = (output.as_mut_ptr(), inputs.len());
        // SAFETY: all pointers are to live tensors, as many as said, `back` is given away, and there is room for as
        // many characters as said.
        unsafe { bireme_follows(output, inputs.as_ptr(), n, back.cast(), error, capacity) }
    });
    added.unwrap_or_else(|problem| panic!("{problem}"));
    output
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bireme_go_back(
    back: *mut c_void,
    gradient: *mut C_tensor,
    of_inputs: *mut *mut C_tensor,
    n: usize,
    error: *mut c_char,
    capacity: usize,
) -> c_int {
    // SAFETY: `back` is what `follows` gave away, and nobody else looks at it meanwhile; the gradient is ours; there is room
    // for as many pointers and characters as said.
    let (back, gradient, of_inputs, error) = unsafe {
        (
            &mut *back.cast::<Kept>(),
            Tensor::from_ptr(gradient),
            slice::from_raw_parts_mut(of_inputs, n),
            slice::from_raw_parts_mut(error.cast::<u8>(), capacity),
        )
    };
    // A panic must not unwind into C++, which is undefined behaviour.
    let gradients = catch_unwind(AssertUnwindSafe(|| {
        let back = back.take().expect("gradients go back once, as nothing is kept for a second time");
        let gradients = back(gradient);
        assert_eq!(gradients.len(), n, "as many gradients as inputs");
        gradients
    }));
    match gradients {
        Ok(gradients) => {
            for (place, mut gradient) in of_inputs.iter_mut().zip(gradients) {
                *place = gradient.as_mut_ptr();
                // The caller frees it.
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
unsafe extern "C" fn bireme_forget(back: *mut c_void) {
    // SAFETY: `back` is what `follows` gave away, and this is called once.
    drop(unsafe { Box::from_raw(back.cast::<Kept>()) });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn product(a: &Tensor, b: &Tensor, witness: &Arc<()>) -> Tensor {
        let [kept_a, kept_b] = [a, b].map(Tensor::detach);
        let witness = Arc::clone(witness);
        let output = tch::no_grad(|| a * b);
        follows(output, &[a, b], move |gradient| {
            let _ = &witness;
            vec![&gradient * &kept_b, gradient * kept_a]
        })
    }

    #[test]
    fn gradients_are_those_that_libtorch_would_find() {
        let [a, b] = [[1f32, 2.0], [3.0, -4.0]].map(|x| Tensor::from_slice(&x).set_requires_grad(true));
        let witness = Arc::new(());
        let of = |product: &dyn Fn(&Tensor, &Tensor) -> Tensor| {
            let (a_squared, twice_b) = (&a * &a, &b * 2.0);
            let loss = product(&a_squared, &twice_b).exp().sum(tch::Kind::Float);
            Tensor::run_backward(&[loss], &[&a, &b], false, false)
        };
        let (ours, theirs) = (of(&|a, b| product(a, b, &witness)), of(&|a, b| a * b));
        assert!(ours.iter().zip(&theirs).all(|(ours, theirs)| ours.equal(theirs)), "{ours:?} {theirs:?}");
        assert_eq!(Arc::strong_count(&witness), 1, "a way back that was gone is kept");
    }

    #[test]
    fn a_panic_on_the_way_back_is_an_error_of_libtorch() {
        let a = Tensor::from_slice(&[1f32]).set_requires_grad(true);
        let output = follows(tch::no_grad(|| &a * 2.0), &[&a], |_| panic!("no way back"));
        let error = Tensor::f_run_backward(&[output], &[&a], false, false).unwrap_err();
        assert!(error.to_string().contains("no way back"), "{error}");
    }

    #[test]
    fn nothing_is_kept_where_nothing_is_learnt_or_nobody_asks() {
        let [a, b] = [1f32, 2.0].map(|x| Tensor::from_slice(&[x]));
        let witness = Arc::new(());
        assert!(!product(&a, &b, &witness).requires_grad());
        let a = a.set_requires_grad(true);
        assert!(!tch::no_grad(|| product(&a, &b, &witness)).requires_grad());
        assert_eq!(Arc::strong_count(&witness), 1);
        let learnt = product(&a, &b, &witness);
        assert!(learnt.requires_grad());
        assert_eq!(Arc::strong_count(&witness), 2);
        drop(learnt);
        assert_eq!(Arc::strong_count(&witness), 1);
    }
}
