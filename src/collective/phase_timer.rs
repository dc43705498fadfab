//! Measures the time of the phases of a step.

use std::time::{Duration, Instant};

use tch::{Cuda, Device};

use super::watch::{CallTimes, Watch};

/// Sums wall-clock seconds by phase.
///
/// Time in collective calls is subtracted from the phase and added to `waiting` (for the slowest
/// rank to make the call) and `communication`. Calls overlapped with computation add to `hidden`,
/// which is not subtracted. On a GPU, `end` waits for the queued operations. A timer that is off
/// costs nothing.
pub struct PhaseTimer {
    device: Device,
    is_on: bool,
    watch: Option<Watch>,
    since: Instant,
    /// Seconds by phase, in the order of first occurrence.
    phases: Vec<(&'static str, f64)>,
}

impl PhaseTimer {
    /// Starts the first phase. `watch`: the watchdog over this rank's collective calls; `None` for
    /// a single process.
    pub fn new(device: Device, is_on: bool, watch: Option<&Watch>) -> Self {
        let watch = watch.filter(|_| is_on).cloned();
        if let Some(watch) = &watch {
            watch.start_timing();
            watch.take_times();
        }
        Self { device, is_on, watch, since: Instant::now(), phases: Vec::new() }
    }

    pub fn off() -> Self {
        Self::new(Device::Cpu, false, None)
    }

    /// Ends the phase `name` and starts the next one.
    pub fn end(&mut self, name: &'static str) {
        if !self.is_on {
            return;
        }
        if let Device::Cuda(gpu) = self.device {
            Cuda::synchronize(gpu as i64);
        }
        let now = Instant::now();
        let mut elapsed = now - self.since;
        if let Some(times) = self.watch.as_ref().map(Watch::take_times) {
            let CallTimes { waiting, communication, hidden } = times;
            elapsed = elapsed.saturating_sub(waiting + communication);
            self.add("waiting", waiting);
            self.add("communication", communication);
            self.add("hidden", hidden);
        }
        self.add(name, elapsed);
        self.since = now;
    }

    fn add(&mut self, name: &'static str, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        match self.phases.iter_mut().find(|(phase, _)| *phase == name) {
            Some((_, sum)) => *sum += seconds,
            None => self.phases.push((name, seconds)),
        }
    }

    /// Seconds by phase since the last call; `None` if the timer is off.
    pub fn take(&mut self) -> Option<Vec<(&'static str, f64)>> {
        self.is_on.then(|| std::mem::take(&mut self.phases))
    }
}
