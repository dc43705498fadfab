//! Operations of our own in libtorch's autograd.

use std::ffi::c_void;
use std::slice;

use tch::Tensor;
use torch_sys::C_tensor;

/// From the gradient of an output to those of the inputs, in order.
type Back = Box<dyn FnOnce(Tensor) -> Vec<Tensor> + Send>;

/// What libtorch keeps: a way back that has not been gone.
type Kept = Option<Back>;

unsafe extern "C" {
    fn bireme_follows(output: *mut C_tensor, inputs: *const *const C_tensor, n: usize, back: *mut c_void);
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
    // SAFETY: all pointers are to live tensors, as many as said, and `back` is given away.
    unsafe { bireme_follows(output.as_mut_ptr(), inputs.as_ptr(), inputs.len(), back.cast()) };
    output
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bireme_go_back(
    back: *mut c_void,
    gradient: *mut C_tensor,
    of_inputs: *mut *mut C_tensor,
    n: usize,
) {
    // SAFETY: `back` is what `follows` gave away, and nobody else looks at it meanwhile; the gradient is ours; there is room
    // for as many pointers as said.
    let (back, gradient, of_inputs) = unsafe {
        (&mut *back.cast::<Kept>(), Tensor::from_ptr(gradient), slice::from_raw_parts_mut(of_inputs, n))
    };
    let back = back.take().expect("gradients go back once, as nothing is kept for a second time");
    let gradients = back(gradient);
    assert_eq!(gradients.len(), n, "as many gradients as inputs");
    for (place, mut gradient) in of_inputs.iter_mut().zip(gradients) {
        *place = gradient.as_mut_ptr();
        // It is the caller's now.
        std::mem::forget(gradient);
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
