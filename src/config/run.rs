//! Device and number format of section `[run]`.

use serde::{Deserialize, Serialize};
use tch::Kind;

/// `run.device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// A GPU if the host has one, else the CPU.
    #[default]
    Auto,
    /// The CPU, even if the host has GPUs.
    Cpu,
    /// A GPU; a host without one is refused.
    Cuda,
}

impl DeviceChoice {
    /// The value in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// `run.precision`: the precision of matrix products. Parameters, gradients and the optimizer's
/// state are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision, 24 bits of significand.
    #[default]
    F32,
    /// On GPUs, factors with 11 bits and sums in f32: several times as fast on NVIDIA GPUs since
    /// Ampere. On CPUs as `f32`.
    Tf32,
    /// As `tf32`, and the logits of training are bfloat16 (8 bits). Faster on GPUs; on CPUs only
    /// those that multiply bfloat16 gain.
    Bf16,
}

/// `run.cuda_graph`: whether a training step on a GPU is recorded as a CUDA graph and launched as
/// one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum CudaGraph {
    /// Where the run allows it; the log says why not otherwise.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always; a run that does not allow it fails.
    Require,
}

impl Precision {
    /// Data type of the logits in training.
    pub fn logits_kind(self) -> Kind {
        if self == Self::Bf16 { Kind::BFloat16 } else { Kind::Float }
    }
}
