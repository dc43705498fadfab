//! Copies from host memory to a device.

use std::ffi::{c_char, c_int};

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::elements::elements_mut;
use crate::guarded::guarded;

/// Copies a CPU tensor to `device` without waiting. Later kernels on `device` read the copy.
pub fn send(tensor: &Tensor, device: Device) -> Tensor {
    // The source may be freed or changed afterwards: CUDA reads memory that is not pinned before it
    // returns.
    tensor.to_device_(device, tensor.kind(), true, false)
}

unsafe extern "C" {
    fn bireme_pinned_bytes(
        n: i64,
        block: *mut *mut C_tensor,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

/// `n` bytes of pinned host memory, which a GPU reads without blocking the host.
///
/// # Panics
/// If libtorch returns an error.
fn pinned_bytes(n: i64) -> Tensor {
    let mut block = std::ptr::null_mut();
    let done = guarded(1024, |error, capacity| {
        // SAFETY: `block` is writable, and `error` has room for `capacity` characters.
        unsafe { bireme_pinned_bytes(n, &mut block, error, capacity) }
    });
    done.unwrap_or_else(|problem| panic!("{problem}"));
    // SAFETY: C++ wrote a tensor and passes its ownership on.
    unsafe { Tensor::from_ptr(block) }
}

/// Alignment of each tensor in [`send_together`], in bytes.
const ALIGNMENT: usize = 16;

/// Replaces CPU tensors by copies on `device`, in one transfer from pinned memory and without
/// waiting. On the CPU this does nothing.
pub fn send_together(tensors: Vec<&mut Tensor>, device: Device) {
    if device == Device::Cpu || tensors.is_empty() {
        return;
    }
    let n_bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
    let mut starts = Vec::with_capacity(tensors.len());
    let mut total = 0;
    for tensor in &tensors {
        starts.push(total);
        total = (total + n_bytes(tensor)).next_multiple_of(ALIGNMENT);
    }
    let mut block = pinned_bytes(total as i64);
    // SAFETY: `block` was allocated here, so that only this function has it.
    let bytes = unsafe { elements_mut::<u8>(&mut block) };
    for (tensor, &start) in tensors.iter().zip(&starts) {
        tensor.contiguous().copy_data_u8(&mut bytes[start..], tensor.numel());
    }
    // libtorch reuses the pinned memory when the copy is complete.
    let block = send(&block, device);
    for (tensor, start) in tensors.into_iter().zip(starts) {
        let (kind, size, n) = (tensor.kind(), tensor.size(), n_bytes(tensor) as i64);
        let of_tensor = block.narrow(0, start as i64, n);
        *tensor = of_tensor.view_dtype(kind).view(size.as_slice());
    }
}
