//! The output is the same, to the byte, for any number of threads and of scratch files.

use rayon::ThreadPoolBuilder;

use crate::support::{bytes, run, scratch, shop};

#[test]
fn threads_and_buckets_leave_no_trace() {
    let csv = shop(1500);
    let output = |threads: usize, n_buckets: Option<usize>| {
        let dir = scratch();
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(dir.path(), &csv, |options| options.n_buckets = n_buckets)).unwrap();
        bytes(&dir.path().join("out"))
    };
    let one = output(1, Some(1));
    assert!(one.keys().any(|path| path.ends_with("train.parquet")));
    for (threads, n_buckets) in [(1, None), (3, Some(1)), (1, Some(7)), (4, Some(64))] {
        let other = output(threads, n_buckets);
        assert!(one.keys().eq(other.keys()));
        for (path, bytes) in &one {
            assert!(
                bytes == &other[path],
                "{} differs with {threads} threads, {n_buckets:?} buckets",
                path.display()
            );
        }
    }
}
