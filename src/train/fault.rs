//! Faults that tests plant into a running job: `BIREME_FAULT=KIND@RANK:STEP`.

use std::thread;
use std::time::Duration;

use tch::Tensor;

use crate::model::{Gradients, LossSum, Parameters};

/// At most one fault, on one rank, before it reduces the gradients of one step of the run.
#[derive(Debug, Default)]
pub(super) struct Fault(Option<Planted>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Planted {
    kind: Kind,
    rank: usize,
    /// Counted from 0 over all days.
    step: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The loss and the gradients are NaN.
    Nan,
    /// A weight of this rank changes.
    Desync,
    Panic,
    /// The rank sleeps forever.
    Hang,
    /// SIGKILL.
    Kill,
    /// SIGSTOP.
    Stop,
    /// The rank allocates more memory than any machine has.
    Memory,
}

impl Fault {
    const VARIABLE: &str = "BIREME_FAULT";

    /// The fault that the environment names; none in a build without debug assertions.
    ///
    /// # Panics
    /// The variable does not name a fault.
    pub fn planted() -> Self {
        if !cfg!(debug_assertions) {
            return Self::default();
        }
        Self(std::env::var(Self::VARIABLE).ok().map(|text| {
            Planted::parse(&text).unwrap_or_else(|| {
                panic!("`{}={text}` names no fault; expected KIND@RANK:STEP", Self::VARIABLE)
            })
        }))
    }

    pub fn is_planted(&self) -> bool {
        self.0.is_some()
    }

    /// Called after each backward pass of a step.
    pub fn before_reduction(
        &self,
        rank: usize,
        step: usize,
        gradients: &mut Gradients,
        sums: &mut LossSum,
    ) {
        let Some(kind) = self.at(rank, step) else { return };
        let raise = |signal| signal_hook::low_level::raise(signal).expect("the signal exists");
        match kind {
            Kind::Nan => {
                let _ = gradients.all().fill_(f64::NAN);
                sums.loss = &sums.loss * f64::NAN;
            }
            Kind::Panic => panic!("a planted panic"),
            Kind::Hang => loop {
                thread::sleep(Duration::from_secs(1));
            },
            Kind::Kill => raise(signal_hook::consts::SIGKILL),
            Kind::Stop => raise(signal_hook::consts::SIGSTOP),
            Kind::Memory => drop(Tensor::zeros([1 << 50], (tch::Kind::Float, tch::Device::Cpu))),
            Kind::Desync => {}
        }
    }

    /// Called after the optimizer's step.
    pub fn after_step(&self, rank: usize, step: usize, parameters: &Parameters) {
        if self.at(rank, step) == Some(Kind::Desync) {
            let _ = parameters.replicated_values().get(7).g_add_scalar_(1e-3);
        }
    }

    fn at(&self, rank: usize, step: usize) -> Option<Kind> {
        let planted = self.0?;
        ((planted.rank, planted.step) == (rank, step)).then_some(planted.kind)
    }
}

impl Planted {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_has_a_rank_and_a_step() {
        let fault = Fault(Planted::parse("nan@1:5"));
        assert_eq!((fault.at(1, 4), fault.at(0, 5), fault.at(1, 5)), (None, None, Some(Kind::Nan)));
        for text in ["nan", "nan@1", "nan@x:1", "what@1:5"] {
            assert!(Planted::parse(text).is_none(), "{text}");
        }
    }
}
