//! The elements of tensors in host memory as slices.

use std::ops::Range;

use tch::kind::Element;
use tch::{Device, Tensor};

/// The elements of a contiguous tensor on the CPU.
///
/// # Panics
/// If the tensor is not contiguous, not on the CPU or of another type.
///
/// # Safety
/// Nothing writes to the memory of the tensor while the slice exists.
pub(crate) unsafe fn elements<T: Element>(tensor: &Tensor) -> &[T] {
    match first_element(tensor) {
        // SAFETY: the memory holds `numel` initialised elements of this type and lives as long as
        // the tensor; the caller guarantees the rest.
        Some(first) => unsafe { std::slice::from_raw_parts(first, tensor.numel()) },
        None => &[],
    }
}

/// The elements of a contiguous tensor on the CPU, to change them.
///
/// # Panics
/// If the tensor is not contiguous, not on the CPU or of another type.
///
/// # Safety
/// While the slice exists, nothing reads or writes the memory of the tensor except through it.
pub(crate) unsafe fn elements_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    match first_element(tensor) {
        // SAFETY: as in `elements`.
        Some(first) => unsafe { std::slice::from_raw_parts_mut(first, tensor.numel()) },
        None => &mut [],
    }
}

/// `None` for an empty tensor: libtorch then returns a null pointer, which a slice must not have.
fn first_element<T: Element>(tensor: &Tensor) -> Option<*mut T> {
    let is_valid =
        tensor.kind() == T::KIND && tensor.device() == Device::Cpu && tensor.is_contiguous();
    assert!(is_valid, "{tensor:?} is not contiguous {:?} on the CPU", T::KIND);
    (tensor.numel() > 0).then(|| tensor.data_ptr().cast())
}

/// Checks that the tensors of `written` share no memory with each other or with those of `read`,
/// all contiguous.
///
/// # Panics
/// If they do.
pub(crate) fn assert_disjoint(written: &[&Tensor], read: &[&Tensor]) {
    for (i, tensor) in written.iter().enumerate() {
        let ours = addresses(tensor);
        for other in written[i + 1..].iter().chain(read) {
            let theirs = addresses(other);
            let overlap = ours.start < theirs.end && theirs.start < ours.end;
            assert!(!overlap, "a tensor that a loop writes to shares memory with another argument");
        }
    }
}

fn addresses(tensor: &Tensor) -> Range<usize> {
    let start = tensor.data_ptr().addr();
    start..start + tensor.numel() * tensor.kind().elt_size_in_bytes()
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn zeros(n: i64) -> Tensor {
        Tensor::zeros([n], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn elements_are_those_of_the_tensor_and_an_empty_tensor_has_none() {
        let mut x = zeros(3);
        // SAFETY: this test alone has the tensor.
        unsafe { elements_mut::<f32>(&mut x)[1] = 2.5 };
        assert_eq!(Vec::<f32>::try_from(&x).unwrap(), [0.0, 2.5, 0.0]);
        // SAFETY: as above.
        assert_eq!(unsafe { elements::<f32>(&x) }, [0.0, 2.5, 0.0]);
        let none = zeros(0);
        // SAFETY: as above.
        assert!(unsafe { elements::<f32>(&none) }.is_empty());
    }

    #[test]
    #[should_panic(expected = "is not contiguous")]
    fn another_type_is_refused() {
        // SAFETY: the call panics before it makes a slice.
        unsafe { elements::<i64>(&zeros(3)) };
    }

    #[test]
    #[should_panic(expected = "is not contiguous")]
    fn a_column_of_a_matrix_is_refused() {
        // SAFETY: the call panics before it makes a slice.
        unsafe { elements::<f32>(&zeros(6).view([3, 2]).select(1, 0)) };
    }

    #[test]
    fn neighbouring_and_empty_views_are_disjoint() {
        let x = zeros(6);
        let views = [x.narrow(0, 0, 3), x.narrow(0, 3, 3), x.narrow(0, 2, 0)];
        assert_disjoint(&[&views[0], &views[1], &views[2]], &[&zeros(6), &views[2]]);
        assert_disjoint(&[], &[&x, &views[0]]);
    }

    #[test]
    #[should_panic(expected = "shares memory")]
    fn overlapping_views_are_refused() {
        let x = zeros(6);
        assert_disjoint(&[&x.narrow(0, 0, 3)], &[&zeros(1), &x.narrow(0, 2, 3)]);
    }
}
