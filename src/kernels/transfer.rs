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

    fn bireme_copy_without_waiting(
        to: *const C_tensor,
        from: *const C_tensor,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

/// `n` bytes of pinned host memory, which a GPU reads without blocking the host.
///
/// # Panics
/// If libtorch returns an error.
pub(crate) fn pinned_bytes(n: i64) -> Tensor {
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
    Frame::default().send(tensors, device);
}

/// Device memory for tensors that are sent together again and again.
#[derive(Default)]
pub struct Frame {
    block: Option<Tensor>,
}

impl Frame {
    /// [`send_together`], to the same memory in every call: copies of earlier calls change. A frame
    /// that was dropped leaves the memory of its copies to them.
    ///
    /// # Panics
    /// If the tensors need more or less memory than in the first call.
    pub fn send(&mut self, tensors: Vec<&mut Tensor>, device: Device) {
        if device == Device::Cpu || tensors.is_empty() {
            return;
        }
        let (pinned, starts) = packed(&tensors);
        let block = match &self.block {
            Some(block) => {
                assert_eq!(block.size(), pinned.size(), "a frame has the same tensors every time");
                copy_without_waiting(block, &pinned);
                block
            }
            None => self.block.insert(send(&pinned, device)),
        };
        for (tensor, start) in tensors.into_iter().zip(starts) {
            let (kind, size, n) = (tensor.kind(), tensor.size(), n_bytes(tensor) as i64);
            let of_tensor = block.narrow(0, start as i64, n);
            *tensor = of_tensor.view_dtype(kind).view(size.as_slice());
        }
    }
}

fn n_bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// The bytes of CPU tensors in one block of pinned memory, and where each begins. libtorch keeps
/// the memory until copies from it are complete.
fn packed(tensors: &[&mut Tensor]) -> (Tensor, Vec<usize>) {
    let mut starts = Vec::with_capacity(tensors.len());
    let mut total = 0;
    for tensor in tensors {
        starts.push(total);
        total = (total + n_bytes(tensor)).next_multiple_of(ALIGNMENT);
    }
    let mut block = pinned_bytes(total as i64);
    // SAFETY: `block` was allocated here, so that only this function has it.
    let bytes = unsafe { elements_mut::<u8>(&mut block) };
    for (tensor, &start) in tensors.iter().zip(&starts) {
        tensor.contiguous().copy_data_u8(&mut bytes[start..], tensor.numel());
    }
    (block, starts)
}

/// Copies `from` to `to` without waiting for the device.
///
/// # Panics
/// If libtorch returns an error.
pub(crate) fn copy_without_waiting(to: &Tensor, from: &Tensor) {
    let done = guarded(1024, |error, capacity| {
        // SAFETY: the pointers are to live tensors, and `error` has room for `capacity` characters.
        unsafe { bireme_copy_without_waiting(to.as_ptr(), from.as_ptr(), error, capacity) }
    });
    done.unwrap_or_else(|problem| panic!("{problem}"));
}
