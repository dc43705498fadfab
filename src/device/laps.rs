//! Where the time of a step goes.

use std::time::Instant;

use tch::{Cuda, Device};

/// A clock whose laps have names. On a GPU, the end of a lap waits for what is queued, so that its time is the GPU's too; a
/// clock that is off costs nothing.
pub struct Laps {
    device: Device,
    is_on: bool,
    since: Instant,
    /// Seconds of each name, in the order in which they first came.
    laps: Vec<(&'static str, f64)>,
}

impl Laps {
    /// Begins the first lap.
    pub fn new(device: Device, is_on: bool) -> Self {
        Self { device, is_on, since: Instant::now(), laps: Vec::new() }
    }

    /// A clock that measures nothing.
    pub fn off() -> Self {
        Self::new(Device::Cpu, false)
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
        let seconds = (now - self.since).as_secs_f64();
        match self.laps.iter_mut().find(|(of, _)| *of == name) {
            Some((_, sum)) => *sum += seconds,
            None => self.laps.push((name, seconds)),
        }
        self.since = now;
    }

    /// The seconds of each name since they were last taken; none if the clock is off.
    pub fn take(&mut self) -> Option<Vec<(&'static str, f64)>> {
        self.is_on.then(|| std::mem::take(&mut self.laps))
    }
}
