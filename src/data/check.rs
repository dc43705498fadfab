//! The rows of all files that a run reads, checked before a fault on a late day can cost hours.

use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::{DataError, SessionFile};

/// Sessions of a rank's part that are checked before the first step: less than a second. The others are checked beside
/// the training, so that large data begins as soon as small data.
pub const AT_THE_START: usize = 1 << 20;

/// One row group of one file.
type Group = (Arc<SessionFile>, usize);

/// What is left to check of a rank's part of the files.
#[derive(Default)]
pub struct RowCheck {
    left: Vec<Group>,
    background: Option<JoinHandle<Result<(), DataError>>>,
}

impl RowCheck {
    /// Checks the first row groups of this rank's part of `files`, those of `at_the_start` sessions, on `n_threads`
    /// threads. Ranks share the row groups out, so that together they check all.
    ///
    /// # Errors
    /// That of the first row that no model can use.
    pub fn begin(
        files: &[Arc<SessionFile>],
        (rank, world_size): (usize, usize),
        n_threads: usize,
        at_the_start: usize,
    ) -> Result<Self, DataError> {
        let groups = files
            .iter()
            .flat_map(|file| (0..file.group_rows().len()).map(move |group| (Arc::clone(file), group)));
        let mut left: Vec<Group> = groups.skip(rank).step_by(world_size).collect();
        let mut n_sessions = 0;
        let n_first = left
            .iter()
            .take_while(|(file, group)| {
                let is_first = n_sessions < at_the_start;
                n_sessions += file.group_rows()[*group];
                is_first
            })
            .count();
        let later = left.split_off(n_first);
        check(&left, n_threads)?;
        Ok(Self { left: later, background: None })
    }

    /// Sessions of this rank's part that are not checked yet.
    pub fn n_left(&self) -> usize {
        self.left.iter().map(|(file, group)| file.group_rows()[*group]).sum()
    }

    /// Begins to check what is left on a thread of its own.
    pub fn continue_in_background(&mut self) {
        let left = std::mem::take(&mut self.left);
        if !left.is_empty() {
            self.background = Some(thread::spawn(move || check(&left, 1)));
        }
    }

    /// The error that the background has met, as soon as it has.
    ///
    /// # Errors
    /// That of a row that no model can use.
    pub fn poll(&mut self) -> Result<(), DataError> {
        match self.background.take_if(|background| background.is_finished()) {
            Some(ended) => ended.join().unwrap_or_else(|payload| panic::resume_unwind(payload)),
            None => Ok(()),
        }
    }
}

/// Checks row groups on `n_threads` threads. Of several errors the first in order is returned, whichever thread is
/// faster.
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
                // Groups before this one have been taken, and are still checked to their end.
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
