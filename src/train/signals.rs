//! Signals to a running job: requests for a checkpoint or a stop.
//!
//! | signal | request |
//! | --- | --- |
//! | SIGUSR1 | a checkpoint |
//! | SIGUSR2 | a checkpoint, then a stop |
//! | SIGTERM, SIGINT, SIGHUP | the same |
//!
//! A second SIGTERM or SIGINT ends a process without a launcher at once.
//!
//! SIGINT and SIGHUP stay ignored if they were ignored at the start, as under `nohup` and for
//! background jobs of a script.
//!
//! A signal only sets a flag. The flags of all ranks are summed with the gradients, so that all
//! ranks act after the same step, whichever rank got the signal.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bireme_base::{console, signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::flag::register;
use signal_hook::iterator::Signals as Incoming;
use signal_hook::low_level::emulate_default_handler;

use crate::collective;

/// Signals within this time count as one request: `timeout` signals the process and then its group.
const SAME_REQUEST: Duration = Duration::from_millis(100);

/// The flags of this rank.
#[derive(Clone, Debug, Default)]
pub struct Signals {
    save: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Signals {
    /// Starts listening to signals.
    ///
    /// # Errors
    /// A handler cannot be registered, or the thread cannot be started.
    pub fn listen() -> io::Result<Self> {
        let signals = Self::default();
        register(SIGUSR1, signals.save.clone())?;
        register(SIGUSR2, signals.stop.clone())?;
        let handled = [SIGTERM, SIGINT, SIGHUP].into_iter();
        let handled = handled.filter(|&signal| signal == SIGTERM || !signal::is_ignored(signal));
        let incoming = Incoming::new(handled)?;
        let stop = signals.stop.clone();
        // A launcher signals its ranks several times and kills them itself.
        let is_alone = !collective::is_launched();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || wait(incoming, &stop, is_alone))?;
        Ok(signals)
    }

    pub(super) fn save_requested(&self) -> bool {
        self.save.load(Ordering::Relaxed)
    }

    /// Clears the request for a checkpoint.
    pub(super) fn clear_save(&self) {
        self.save.store(false, Ordering::Relaxed);
    }

    pub(super) fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Sets the flag `stop` at the first signal. A second SIGTERM or SIGINT, to a process without a
/// launcher, has the default effect and ends the process.
fn wait(mut incoming: Incoming, stop: &AtomicBool, is_alone: bool) {
    let mut first: Option<Instant> = None;
    for signal in incoming.forever() {
        stop.store(true, Ordering::Relaxed);
        // A terminal that closes sends SIGHUP, and then its shell sends it again.
        if signal == SIGHUP || !is_alone {
            continue;
        }
        match first {
            None => {
                first = Some(Instant::now());
                console::log("stopping after a checkpoint; a second signal ends the run at once");
            }
            Some(first) if first.elapsed() > SAME_REQUEST => {
                // On success this does not return; otherwise the run stops after a checkpoint.
                let _ = emulate_default_handler(signal);
            }
            Some(_) => {}
        }
    }
}
