//! Parallel loops over tensors in host memory, for computations that libtorch would split into
//! several passes; and settings of the memory allocator.

use std::thread;

use tch::kind::Element;
use tch::{Device, Tensor};

/// The elements of a contiguous tensor on the CPU as a slice.
///
/// # Panics
/// If the tensor is not contiguous, not on the CPU or of another type.
pub fn numbers<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    let is_valid = tensor.kind() == T::KIND && tensor.device() == Device::Cpu && tensor.is_contiguous();
    assert!(is_valid, "{tensor:?} is not contiguous {:?} on the CPU", T::KIND);
    if tensor.numel() == 0 {
        // libtorch returns a null pointer for an empty tensor, which a slice must not have.
        return &mut [];
    }
    // SAFETY: the memory holds `numel` initialised elements of this type and lives as long as the
    // tensor. Views of it belong to this thread, which does not use them while the slice is
    // borrowed.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

/// Makes glibc keep freed memory for later allocations. By default it returns large blocks to the
/// system at once, and faulting in zeroed pages again for every operation takes a quarter of a
/// step's time.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX)] {
        // SAFETY: `mallopt` takes numbers, only changes when memory is returned, and may be called
        // at any time.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Returns freed memory to the system. Call it after freeing large buffers that are not allocated
/// again.
pub fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` may be called at any time.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Length of a part if `n` elements are split into one part per libtorch thread. It is a multiple
/// of `block`.
pub fn part_len(n: usize, block: usize) -> usize {
    let n_threads = tch::get_num_threads().max(1) as usize;
    n.div_ceil(n_threads).next_multiple_of(block).max(block)
}

/// Runs `work` on all parts in parallel, one thread per part, and returns the results in order.
pub fn in_parallel<P: Send, R: Send>(parts: impl Iterator<Item = P>, work: impl Fn(P) -> R + Sync) -> Vec<R> {
    let mut parts = parts;
    let Some(first) = parts.next() else { return Vec::new() };
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || work(part))).collect();
        // This thread takes the first part.
        let mut results = vec![work(first)];
        results.extend(
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))),
        );
        results
    })
}

/// [`in_parallel`] for libtorch operations. libtorch's threads are divided among the parts: many
/// short operations are faster that way than one after the other on all threads. New threads record
/// gradients, whatever the mode of this thread, so `work` sets the mode.
pub fn torch_in_parallel<P: Send, R: Send>(parts: Vec<P>, work: impl Fn(P) -> R + Sync) -> Vec<R> {
    if parts.len() < 2 {
        return parts.into_iter().map(work).collect();
    }
    let n_threads = tch::get_num_threads();
    let threads_per_part = (n_threads / parts.len() as i32).max(1);
    let results = in_parallel(parts.into_iter(), |part| {
        // The thread count and the gradient mode are thread-local in libtorch.
        tch::set_num_threads(threads_per_part);
        work(part)
    });
    // The first part ran on this thread and changed its count.
    tch::set_num_threads(n_threads);
    results
}
