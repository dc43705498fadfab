//! What can go wrong between ranks.

use thiserror::Error;

/// A collective call that failed; every text names the call and the rank.
#[derive(Debug, Error)]
pub enum CollectiveError {
    /// A tensor that this call cannot take: dtype, device, layout or size.
    #[error("`{call}` on rank {rank} of {world_size}: {problem}")]
    Refused {
        /// Method of `Collective`.
        call: &'static str,
        /// Rank that made the call.
        rank: usize,
        /// Ranks in the world.
        world_size: usize,
        /// What is wrong with the tensor.
        problem: String,
    },
    /// MPI or NCCL returned an error.
    #[error("`{call}` of {n_elements} elements failed on rank {rank} of {world_size} ({host}): {text}")]
    Library {
        /// Function of the library.
        call: &'static str,
        /// Elements this rank handed over.
        n_elements: usize,
        /// Rank that made the call.
        rank: usize,
        /// Ranks in the world.
        world_size: usize,
        /// Host of that rank.
        host: String,
        /// The library's own words.
        text: String,
    },
    /// libtorch could not copy or combine host tensors.
    #[error("`{call}` on rank {rank} of {world_size}: libtorch failed")]
    Torch {
        /// Method of `Collective`.
        call: &'static str,
        /// Rank that made the call.
        rank: usize,
        /// Ranks in the world.
        world_size: usize,
        /// libtorch's error.
        source: tch::TchError,
    },
    /// Some rank failed, and all ranks know.
    #[error("{message}")]
    Rank {
        /// The failing rank, the lowest when several failed.
        rank: usize,
        /// Its error, with its rank when there are others.
        message: String,
    },
    /// The processes were not started as one MPI job.
    #[error("{problem}")]
    Launch {
        /// What the launcher set and MPI did not find.
        problem: String,
        /// What to type instead.
        hint: &'static str,
    },
    /// NCCL, or what libtorch must offer for it, is not there.
    #[error("NCCL is not usable on rank {rank}: {problem}")]
    NcclMissing {
        /// Rank that looked for it.
        rank: usize,
        /// What was tried and what came of it.
        problem: String,
    },
}

impl CollectiveError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Launch { hint, .. } => Some(hint),
            _ => None,
        }
    }
}
