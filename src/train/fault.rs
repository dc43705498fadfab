//! Faults that tests plant into a running job, to see how it ends: `BIREME_FAULT=KIND@RANK:STEP`.

use std::thread;
use std::time::Duration;

/// Something that goes wrong on one rank before it reduces the gradients of one step.
pub(super) struct Fault {
    kind: Kind,
    rank: usize,
    step: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Its loss is NaN.
    Nan,
    /// One of its weights becomes another.
    Desync,
    /// It panics.
    Panic,
    /// It never comes to the next call.
    Hang,
    /// It is killed.
    Kill,
    /// It is stopped, as by a debugger.
    Stop,
    /// It asks for more memory than there is.
    Memory,
}

impl Fault {
    const VARIABLE: &str = "BIREME_FAULT";

    /// What the environment plants, if anything.
    ///
    /// # Panics
    /// It plants what does not exist.
    pub fn planted() -> Option<Self> {
        let text = std::env::var(Self::VARIABLE).ok()?;
        let fault = Self::parse(&text);
        Some(fault.unwrap_or_else(|| panic!("`{}={text}` is no fault", Self::VARIABLE)))
    }

    fn parse(text: &str) -> Option<Self> {
        let (kind, place) = text.split_once('@')?;
        let (rank, step) = place.split_once(':')?;
        let kind = match kind {
            "nan" => Kind::Nan,
            "desync" => Kind::Desync,
            "panic" => Kind::Panic,
            "hang" => Kind::Hang,
            "kill" => Kind::Kill,
            "stop" => Kind::Stop,
            "memory" => Kind::Memory,
            _ => return None,
        };
        Some(Self { kind, rank: rank.parse().ok()?, step: step.parse().ok()? })
    }

    /// What happens on `rank` in step `step` of the run (from 0), if anything; what ends or stops the process has happened
    /// then.
    pub fn strike(&self, rank: usize, step: usize) -> Option<Kind> {
        if (rank, step) != (self.rank, self.step) {
            return None;
        }
        let raise = |signal| signal_hook::low_level::raise(signal).expect("a signal that exists");
        match self.kind {
            Kind::Panic => panic!("a planted panic"),
            Kind::Hang => loop {
                thread::sleep(Duration::from_secs(1));
            },
            Kind::Kill => raise(signal_hook::consts::SIGKILL),
            Kind::Stop => raise(signal_hook::consts::SIGSTOP),
            Kind::Memory => {
                let too_much = tch::Tensor::zeros([1 << 50], (tch::Kind::Float, tch::Device::Cpu));
                drop(too_much);
            }
            Kind::Nan | Kind::Desync => {}
        }
        Some(self.kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_has_its_rank_and_step() {
        let fault = Fault::parse("nan@1:5").unwrap();
        assert_eq!(
            (fault.strike(1, 4), fault.strike(0, 5), fault.strike(1, 5)),
            (None, None, Some(Kind::Nan))
        );
        for text in ["nan", "nan@1", "nan@x:1", "what@1:5"] {
            assert!(Fault::parse(text).is_none(), "{text}");
        }
    }
}
