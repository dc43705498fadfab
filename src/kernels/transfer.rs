//! Copies from host memory to a device.

use tch::{Device, Tensor};

/// Copies a CPU tensor to `device` without waiting. Later kernels on `device` read the copy.
pub fn send(tensor: &Tensor, device: Device) -> Tensor {
    // The source may be freed or changed afterwards: CUDA reads memory that is not pinned before it
    // returns.
    tensor.to_device_(device, tensor.kind(), true, false)
}

/// [`send`] for several slices in one transfer.
pub fn send_all(numbers: &[&[i64]], device: Device) -> Vec<Tensor> {
    let all = send(&Tensor::from_slice(&numbers.concat()), device);
    let lengths: Vec<i64> = numbers.iter().map(|numbers| numbers.len() as i64).collect();
    all.split_with_sizes(lengths.as_slice(), 0)
}
