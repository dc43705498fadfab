//! Where the time of a step goes.

use std::time::{Duration, Instant};

use tch::{Cuda, Device};

use crate::collective::watch::{Times, Watch};

/// A clock whose laps have names. What calls of the ranks took in a lap counts as `waiting` for those that came last, and as
/// `communication`; what of both went on beside a lap's work is `hidden`, and no time of its own. On a GPU, the end of a lap waits for what is queued, so that its time is the GPU's too; a clock that is off
/// costs nothing.
pub struct Laps {
    device: Device,
    is_on: bool,
    watch: Option<Watch>,
    since: Instant,
    /// Seconds of each name, in the order in which they first came.
    laps: Vec<(&'static str, f64)>,
}

impl Laps {
    /// Begins the first lap. `watch`: on the calls of this rank, where there are others.
    pub fn new(device: Device, is_on: bool, watch: Option<&Watch>) -> Self {
        let watch = watch.filter(|_| is_on).cloned();
        if let Some(watch) = &watch {
            watch.time_calls();
            watch.take_times();
        }
        Self { device, is_on, watch, since: Instant::now(), laps: Vec::new() }
    }

    /// A clock that measures nothing.
    pub fn off() -> Self {
        Self::new(Device::Cpu, false, None)
    }

    /// Ends a lap, and begins the next.
    pub fn end(&mut self, name: &'static str) {
        if !self.is_on {
            return;
        }
        if let Device::Cuda(gpu) = self.device {
            Cuda::synchronize(gpu as i64);
        }
        let now = Instant::now();
        let mut took = now - self.since;
        if let Some(Times { waiting, moving, hidden }) = self.watch.as_ref().map(Watch::take_times) {
            took = took.saturating_sub(waiting + moving);
            self.add("waiting", waiting);
            self.add("communication", moving);
            self.add("hidden", hidden);
        }
        self.add(name, took);
        self.since = now;
    }

    fn add(&mut self, name: &'static str, took: Duration) {
        let seconds = took.as_secs_f64();
        match self.laps.iter_mut().find(|(of, _)| *of == name) {
            Some((_, sum)) => *sum += seconds,
            None => self.laps.push((name, seconds)),
        }
    }

    /// The seconds of each name since they were last taken; none if the clock is off.
    pub fn take(&mut self) -> Option<Vec<(&'static str, f64)>> {
        self.is_on.then(|| std::mem::take(&mut self.laps))
    }
}
