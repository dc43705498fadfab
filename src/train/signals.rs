//! What the outside asks of a running job.
//!
//! | signal | request |
//! | --- | --- |
//! | SIGUSR1 | a checkpoint |
//! | SIGUSR2 | a checkpoint, then the end |
//! | SIGTERM, SIGINT, SIGHUP | the same; a second SIGTERM or SIGINT ends a process without a launcher at once |
//!
//! SIGINT and SIGHUP that were ignored at the start stay ignored: `nohup`, and jobs in the background of a script.
//!
//! A signal only sets a flag. The ranks' flags are added up with the gradients, so that all act after the same step,
//! whichever rank got the signal.

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

/// Within this time a signal repeats the one before: `timeout` signals the process and then its group.
const SAME_REQUEST: Duration = Duration::from_millis(100);

/// The flags of this rank.
#[derive(Clone, Debug, Default)]
pub struct Signals {
    save: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Signals {
    /// Flags that the signals to this process set from now on.
    ///
    /// # Errors
    /// The system refuses.
    pub fn listen() -> io::Result<Self> {
        let signals = Self::default();
        register(SIGUSR1, signals.save.clone())?;
        register(SIGUSR2, signals.stop.clone())?;
        let heard = [SIGTERM, SIGINT, SIGHUP].into_iter();
        let heard = heard.filter(|&signal| signal == SIGTERM || !signal::is_ignored(signal));
        let incoming = Incoming::new(heard)?;
        let stop = signals.stop.clone();
        // A launcher signals its ranks several times, and ends them itself.
        let is_alone = !collective::is_launched();
        thread::Builder::new().name("signals".to_owned()).spawn(move || wait(incoming, &stop, is_alone))?;
        Ok(signals)
    }

    /// Whether a checkpoint was asked for.
    pub(super) fn save(&self) -> bool {
        self.save.load(Ordering::Relaxed)
    }

    /// The checkpoint that was asked for is made.
    pub(super) fn saved(&self) {
        self.save.store(false, Ordering::Relaxed);
    }

    /// Whether the end was asked for.
    pub(super) fn stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Sets the flag at the first signal. At a second one from a person the process ends as if nothing had been registered.
fn wait(mut incoming: Incoming, stop: &AtomicBool, is_alone: bool) {
    let mut first: Option<Instant> = None;
    for signal in incoming.forever() {
        stop.store(true, Ordering::Relaxed);
        // A terminal that closes sends SIGHUP, and its shell sends it again.
        if signal == SIGHUP || !is_alone {
            continue;
        }
        match first {
            None => {
                first = Some(Instant::now());
                console::log("stopping after a checkpoint; a second signal ends the run at once");
            }
            Some(first) if first.elapsed() > SAME_REQUEST => {
                // It returns only where the system refuses; the run then stops after a checkpoint.
                let _ = emulate_default_handler(signal);
            }
            Some(_) => {}
        }
    }
}
