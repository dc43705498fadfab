//! How training scales with ranks: measured, and predicted by a calibrated model of a step.

pub mod measured;
pub mod gpu;
pub mod predict;
mod write;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use gpu::GpuEstimate;
use predict::{Prediction, StepModel};
pub use write::{ScalingWriteError, TABLE, write};

/// Placement of the item table, its gradient and its optimizer state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TableLayout {
    /// Every rank holds the whole table.
    #[default]
    Replicated,
    /// Every rank holds a shard of the rows.
    Sharded,
}

impl TableLayout {
    pub const ALL: [Self; 2] = [Self::Replicated, Self::Sharded];

    /// As in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Replicated => "replicated",
            Self::Sharded => "sharded",
        }
    }
}

/// What grows with the number of ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Growth {
    /// Nothing: the ranks divide the sessions of a step.
    Strong,
    /// The sessions of a step.
    Weak,
}

impl Growth {
    pub fn name(self) -> &'static str {
        match self {
            Self::Strong => "strong",
            Self::Weak => "weak",
        }
    }
}

/// A measured number of ranks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ScalingPoint {
    pub ranks: usize,
    pub growth: Growth,
    pub item_table: TableLayout,
    /// Sessions per step of all ranks.
    pub global_batch: usize,
    /// Median over steps.
    pub step_seconds: f64,
    /// Of all ranks, from the median step.
    pub sessions_per_s: f64,
    /// Throughput relative to as many independent single ranks, 0 to 1.
    pub efficiency: f64,
    /// Median seconds per step of rank 0, by phase.
    pub phases: BTreeMap<String, f64>,
    /// Sessions per second of the evaluation of the next day.
    pub evaluated_per_s: f64,
    /// Step time by the calibrated model.
    pub predicted_seconds: f64,
    /// As typed in a shell.
    pub command: String,
}

/// Measurements and predictions.
#[derive(Clone, Debug, Serialize)]
pub struct Scaling {
    /// The model's name.
    pub title: String,
    /// Device type of the ranks.
    pub device: String,
    /// CPU threads per rank; 0: all cores of the rank.
    pub threads_per_rank: usize,
    /// The first is a single rank.
    pub points: Vec<ScalingPoint>,
    pub model: StepModel,
    /// For the sessions per rank of the single-rank measurement.
    pub predictions: Vec<Prediction>,
    /// For a model whose steps were counted on a GPU; else empty.
    pub gpu_estimates: Vec<GpuEstimate>,
}
