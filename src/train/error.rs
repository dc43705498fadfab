//! Errors of a run.

use super::memory::NotEnoughMemory;
use super::weights_file::WeightsError;
use crate::checkpoint::CheckpointError;
use crate::collective::CollectiveError;
use crate::data::DataError;
use crate::metrics::EvaluateError;
use crate::report::ReportError;

/// What can end a run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Reading sessions.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Talking to the other ranks.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Saving or loading state.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Evaluating.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// Writing the log.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The loss or its gradient is NaN or infinite, on all ranks alike.
    #[error(
        "the loss is {loss} and the norm of its gradient {norm} at day {day}, step {step}{}{}",
        ranks.iter().map(|rank| format!(", from rank {rank}")).collect::<String>(),
        if *n_skipped > 0 { format!(", after {n_skipped} steps that were left out") } else { String::new() }
    )]
    NotFinite {
        /// As logged.
        loss: f64,
        /// Before clipping.
        norm: f64,
        /// The day trained on.
        day: i64,
        /// The step of the day, from 1.
        step: usize,
        /// Whose own losses are not finite.
        ranks: Vec<usize>,
        /// Steps left out before.
        n_skipped: usize,
    },
    /// Ranks whose weights are no longer the same, on all ranks alike.
    #[error("after day {day}, step {step}, the weights of {} are not those of the others: run again from the last checkpoint{}",
        ranks.iter().map(|(rank, host)| format!("rank {rank} on {host}")).collect::<Vec<_>>().join(" and "),
        if *is_tie { ", or theirs are wrong" } else { "" })]
    Desync {
        /// The day trained on.
        day: i64,
        /// Steps of the day that are done.
        step: usize,
        /// The ranks that differ from most, and their hosts.
        ranks: Vec<(usize, String)>,
        /// Whether no more ranks agree with each other than differ.
        is_tie: bool,
    },
    /// Ranks whose data files are not the same.
    #[error(
        "rank {rank} sees other data than rank 0: all need the same files, on a shared file system or copied whole"
    )]
    OtherData {
        /// The first that differs.
        rank: usize,
    },
    /// A model that does not fit the data's features.
    #[error("section `[model]` of the configuration: {0}")]
    Model(String),
    /// A loss that does not fit the catalogue.
    #[error("section `[train]` of the configuration: {0}")]
    Loss(String),
    /// Weights of elsewhere that cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A model that does not fit into memory.
    #[error(transparent)]
    Memory(#[from] NotEnoughMemory),
}

impl TrainError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Memory(error) => Some(error.hint()),
            Self::Weights(error) => error.hint(),
            _ => None,
        }
    }
}
