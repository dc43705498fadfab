//! Parts of a loop, or of many short libtorch operations, on several threads.

use std::thread;

/// Length of a part if `n` elements are split into one part per libtorch thread. It is a multiple
/// of `block`.
pub fn part_len(n: usize, block: usize) -> usize {
    let n_threads = tch::get_num_threads().max(1) as usize;
    n.div_ceil(n_threads).next_multiple_of(block).max(block)
}

/// Runs `work` on all parts in parallel, one thread per part, and returns the results in order.
pub fn in_parallel<P: Send, R: Send>(
    parts: impl Iterator<Item = P>,
    work: impl Fn(P) -> R + Sync,
) -> Vec<R> {
    let mut parts = parts;
    let Some(first) = parts.next() else { return Vec::new() };
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || work(part))).collect();
        // This thread takes the first part.
        let mut results = vec![work(first)];
        results.extend(
            threads.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }),
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
