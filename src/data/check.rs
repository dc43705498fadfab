//! Checks the rows of all files of a run early, so that a bad row of a late day does not cost hours
//! of training.

use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::{DataError, SessionFile};

/// Number of sessions of each rank that are checked before the first step, which takes less than a
/// second. The rest is checked during training, so that large data does not delay the start.
pub const N_CHECKED_AT_START: usize = 1 << 20;

/// A file and the index of one of its row groups.
type Group = (Arc<SessionFile>, usize);

/// The row groups that a rank has yet to check.
#[derive(Default)]
pub struct RowCheck {
    unchecked: Vec<Group>,
    background: Option<JoinHandle<Result<(), DataError>>>,
}

impl RowCheck {
    /// Checks the first `n_at_start` sessions of this rank's row groups, on `n_threads` threads.
    /// The ranks divide the row groups of `files` among them.
    ///
    /// # Errors
    /// A file cannot be read, or a row is invalid; the first such row is returned.
    pub fn begin(
        files: &[Arc<SessionFile>],
        (rank, world_size): (usize, usize),
        n_threads: usize,
        n_at_start: usize,
    ) -> Result<Self, DataError> {
        let groups = files.iter().flat_map(|file| {
            (0..file.group_rows().len()).map(move |group| (Arc::clone(file), group))
        });
        let mut first: Vec<Group> = groups.skip(rank).step_by(world_size).collect();
        let mut n_sessions = 0;
        let n_first = first
            .iter()
            .take_while(|(file, group)| {
                let is_first = n_sessions < n_at_start;
                n_sessions += file.group_rows()[*group];
                is_first
            })
            .count();
        let unchecked = first.split_off(n_first);
        check(&first, n_threads)?;
        Ok(Self { unchecked, background: None })
    }

    /// Number of sessions that this rank has yet to check.
    pub fn n_left(&self) -> usize {
        self.unchecked.iter().map(|(file, group)| file.group_rows()[*group]).sum()
    }

    /// Starts a thread that checks the remaining row groups.
    pub fn continue_in_background(&mut self) {
        let unchecked = std::mem::take(&mut self.unchecked);
        if !unchecked.is_empty() {
            self.background = Some(thread::spawn(move || check(&unchecked, 1)));
        }
    }

    /// Returns the result of the background thread once it has ended, without waiting for it.
    ///
    /// # Errors
    /// A file cannot be read, or a row is invalid.
    pub fn poll(&mut self) -> Result<(), DataError> {
        match self.background.take_if(|background| background.is_finished()) {
            Some(ended) => ended.join().unwrap_or_else(|payload| panic::resume_unwind(payload)),
            None => Ok(()),
        }
    }
}

/// Checks row groups on `n_threads` threads. Of several errors it returns the one of the first row
/// group, whichever thread is faster.
fn check(groups: &[Group], n_threads: usize) -> Result<(), DataError> {
    let (next, end) = (AtomicUsize::new(0), AtomicUsize::new(groups.len()));
    let first: Mutex<Option<(usize, DataError)>> = Mutex::new(None);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= end.load(Ordering::Relaxed) {
                return;
            }
            let (file, group) = &groups[index];
            if let Err(error) = file.check(*group) {
                // Threads take groups in order, so all groups before this one are still checked.
                end.fetch_min(index, Ordering::Relaxed);
                let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                if first.as_ref().is_none_or(|(other, _)| index < *other) {
                    *first = Some((index, error));
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..n_threads.min(groups.len()) {
            scope.spawn(work);
        }
        work();
    });
    match first.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}
