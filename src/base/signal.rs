//! Signals that end a process.

use std::mem::MaybeUninit;
use std::ptr;

/// Whether the process was started to ignore a signal, as `nohup` does with SIGHUP. A handler would
/// undo that.
pub fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: with a null pointer the action is not changed; the other pointer points to memory for
    // one action.
    if unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: the call succeeded and wrote the action.
    unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Lets a write beyond a limit on the size of files (`ulimit -f`) fail with an error, as on a full
/// disk, instead of ending the process. Rust's runtime does the same for closed pipes.
pub fn ignore_file_size_limit() {
    // SAFETY: no handler is installed, and the call may be made at any time.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rust_ignores_broken_pipes_alone() {
        assert!(is_ignored(libc::SIGPIPE));
        assert!(!is_ignored(libc::SIGUSR1) && !is_ignored(-1));
    }
}
