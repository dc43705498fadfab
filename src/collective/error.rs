//! Errors of collective calls.

use bireme_base::user_error::{FAILED, REFUSED, UserError};
use thiserror::Error;

/// A failed collective call.
#[derive(Debug, Error)]
pub enum CollectiveError {
    /// The call does not support the tensor's data type, device, layout or size.
    #[error("`{call}` on rank {rank} of {world_size}: {problem}")]
    Refused {
        /// The method of [`Collective`](super::Collective).
        call: &'static str,
        rank: usize,
        world_size: usize,
        problem: String,
    },
    /// MPI or NCCL returned an error.
    #[error(
        "`{call}` of {n_elements} elements failed on rank {rank} of {world_size} ({host}): {text}"
    )]
    Library {
        /// The function of the library.
        call: &'static str,
        /// Elements that this rank passed.
        n_elements: usize,
        rank: usize,
        world_size: usize,
        host: String,
        /// The library's message.
        text: String,
    },
    /// libtorch could not copy or combine host tensors.
    #[error("`{call}` on rank {rank} of {world_size}: libtorch failed")]
    Torch {
        /// The method of [`Collective`](super::Collective).
        call: &'static str,
        rank: usize,
        world_size: usize,
        source: tch::TchError,
    },
    /// A rank failed, and all ranks return its error.
    #[error("{message}")]
    Rank {
        /// The failing rank, the lowest when several failed.
        rank: usize,
        /// Its error, prefixed with the rank if the job has several.
        message: String,
    },
    /// The processes were not started as one MPI job.
    #[error("{problem}")]
    Launch {
        problem: String,
        /// How to start the job instead.
        hint: &'static str,
    },
    /// NCCL cannot be loaded, or libtorch lacks the CUDA functions that it needs.
    #[error("NCCL is not usable on rank {rank}: {problem}")]
    NcclMissing {
        rank: usize,
        /// The failed attempts.
        problem: String,
    },
}

impl UserError for CollectiveError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Launch { .. } | Self::NcclMissing { .. } => REFUSED,
            _ => FAILED,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Launch { hint, .. } => Some((*hint).to_owned()),
            _ => None,
        }
    }
}
