//! Errors of a run.

use bireme_base::user_error::{FAILED, REFUSED, UserError};

use super::memory::NotEnoughMemory;
use super::weights_file::WeightsError;
use crate::checkpoint::CheckpointError;
use crate::collective::CollectiveError;
use crate::data::DataError;
use crate::metrics::EvaluateError;
use crate::report::ReportError;

/// An error that ends a run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The loss or its gradient is NaN or infinite; all ranks return this error.
    #[error(
        "the loss is {loss} and the norm of its gradient {norm} at day {day}, step {step}{}{}",
        ranks.iter().map(|rank| format!(", from rank {rank}")).collect::<String>(),
        if *n_skipped > 0 { format!(", after {n_skipped} skipped steps") } else { String::new() }
    )]
    NotFinite {
        /// Mean over the global batch.
        loss: f64,
        /// Norm of the gradient before clipping.
        norm: f64,
        day: i64,
        /// Step of the day, from 1.
        step: usize,
        /// The ranks whose own loss is not finite.
        ranks: Vec<usize>,
        /// Steps that were skipped before.
        n_skipped: usize,
    },
    /// The weights of some ranks differ; all ranks return this error.
    #[error(
        "after day {day}, step {step}, the weights of {} differ from those of the other ranks{}: \
         run again from the last checkpoint",
        ranks
            .iter()
            .map(|(rank, host)| format!("rank {rank} on {host}"))
            .collect::<Vec<_>>()
            .join(" and "),
        if *is_tie { ", or theirs are wrong" } else { "" }
    )]
    Desync {
        day: i64,
        /// Finished steps of the day.
        step: usize,
        /// The ranks that differ from the majority, and their hosts.
        ranks: Vec<(usize, String)>,
        /// Whether no majority of the ranks agrees.
        is_tie: bool,
    },
    /// `run.cuda_graph` is `require`, and the step cannot be recorded; all ranks return this error.
    #[error("`run.cuda_graph` is `require`, but {0}")]
    GraphRequired(String),
    /// A CUDA graph cannot be launched.
    #[error("the CUDA graph of the training step: {0}")]
    GraphLaunch(String),
    /// The data files of some ranks differ.
    #[error(
        "the data files of rank {rank} differ from those of rank 0: all ranks need the same files, \
         on a shared file system or as complete copies"
    )]
    OtherData {
        /// The first rank that differs from rank 0.
        rank: usize,
    },
    /// The model does not fit the features of the data.
    #[error("section `[model]` of the configuration: {0}")]
    Model(String),
    /// The loss does not fit the catalogue.
    #[error("section `[train]` of the configuration: {0}")]
    Loss(String),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Memory(#[from] NotEnoughMemory),
}

impl UserError for TrainError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Data(error) => error.exit_code(),
            Self::Collective(error) => error.exit_code(),
            Self::Checkpoint(error) => error.exit_code(),
            Self::OtherData { .. } | Self::Model(_) | Self::Loss(_) => REFUSED,
            Self::Weights(error) => error.exit_code(),
            Self::Memory(error) => error.exit_code(),
            Self::Evaluate(_)
            | Self::Report(_)
            | Self::NotFinite { .. }
            | Self::Desync { .. }
            | Self::GraphRequired(_)
            | Self::GraphLaunch(_) => FAILED,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Memory(error) => error.hint(),
            Self::Weights(error) => error.hint(),
            _ => None,
        }
    }
}
