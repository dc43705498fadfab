//! Signals to a command that writes an output and cannot be resumed.

use std::io;
use std::thread;

use bireme_base::{output, signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::failure::SystemError;

/// From now on, a signal that ends the process removes what the command has written aside first.
pub(super) fn clean_up_on_signals() -> Result<(), SystemError> {
    start().map_err(SystemError::refused("listen to signals"))
}

fn start() -> io::Result<()> {
    let signals =
        [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|&signal| !signal::is_ignored(signal));
    let mut signals = Signals::new(signals)?;
    let wait = move || {
        if let Some(signal) = signals.forever().next() {
            output::interrupt();
            // The shell is to see which signal it was.
            let _ = emulate_default_handler(signal);
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait).map(drop)
}

/// Once a signal has removed what the command had written, its errors are consequences of that, and
/// the process is about to end.
pub(super) fn end_if_interrupted() {
    while output::is_interrupted() {
        thread::park();
    }
}
