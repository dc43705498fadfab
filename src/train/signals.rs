//! What the outside asks of a running job: SIGUSR1 asks for a checkpoint, SIGUSR2 and SIGTERM for a checkpoint and the end.
//!
//! A signal only sets a flag. The ranks' flags are added up with the gradients, so that all act after the same step,
//! whichever rank got the signal.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::flag::register;

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
        register(SIGTERM, signals.stop.clone())?;
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
