//! Loops of our own over tensors in host memory, where libtorch has no operation that does all in one pass.

use std::thread;

use tch::kind::Element;
use tch::{Device, Tensor};

/// What Intel's MKL, which libtorch multiplies matrices with, asks before it chooses its instructions. By its own answer a CPU
/// of another maker gets those of older ones, which costs an AMD EPYC with AVX-512 a fifth of its speed; it looks at what the CPU
/// can do in any case.
#[unsafe(no_mangle)]
extern "C" fn mkl_serv_intel_cpu_true() -> i32 {
    1
}

/// The numbers of a contiguous tensor on the CPU.
///
/// # Panics
/// It is another tensor.
pub fn numbers<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    let is_fit = tensor.kind() == T::KIND && tensor.device() == Device::Cpu && tensor.is_contiguous();
    assert!(is_fit, "{tensor:?} is not contiguous {:?} on the CPU", T::KIND);
    if tensor.numel() == 0 {
        // Of which libtorch gives no address.
        return &mut [];
    }
    // SAFETY: the memory holds `numel` numbers of this type, initialised, and lives as long as the tensor. Nobody else
    // reads or writes it meanwhile: views of it belong to this thread, which does nothing else.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

/// Keeps memory that libtorch frees for what it asks for next. Glibc returns large pieces to the system at once, and to fetch
/// zeroed pages anew for every operation takes a quarter of a step's time.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX)] {
        // SAFETY: `mallopt` takes numbers, changes only when memory is returned, and may be called at any time.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Returns what is free to the system after all: what was large and is not needed again.
pub fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` may be called at any time.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// How many of `n` numbers are a part, so that there are as many parts as libtorch has threads. Parts are whole multiples of
/// `block`.
pub fn part_len(n: usize, block: usize) -> usize {
    let n_threads = tch::get_num_threads().max(1) as usize;
    n.div_ceil(n_threads).next_multiple_of(block).max(block)
}

/// Works on all parts at once, and returns what came of each, in order.
pub fn in_parallel<P: Send, R: Send>(parts: impl Iterator<Item = P>, work: impl Fn(P) -> R + Sync) -> Vec<R> {
    let mut parts = parts;
    let Some(first) = parts.next() else { return Vec::new() };
    let work = &work;
    thread::scope(|scope| {
        let others: Vec<_> = parts.map(|part| scope.spawn(move || work(part))).collect();
        let mut results = vec![work(first)];
        results.extend(
            others
                .into_iter()
                .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))),
        );
        results
    })
}

/// The same for work of libtorch, each part on a thread of its own, or several where there are more threads than parts: many
/// short operations are quicker so than each on all threads. Whether gradients are to be had is for the work to say.
pub fn each_alone<P: Send, R: Send>(parts: Vec<P>, work: impl Fn(P) -> R + Sync) -> Vec<R> {
    if parts.len() < 2 {
        return parts.into_iter().map(work).collect();
    }
    let n_threads = tch::get_num_threads();
    let n_each = (n_threads / parts.len() as i32).max(1);
    let results = in_parallel(parts.into_iter(), |part| {
        // Each thread has its own number, and its own mind about gradients.
        tch::set_num_threads(n_each);
        work(part)
    });
    tch::set_num_threads(n_threads);
    results
}
