//! How gradients of micro-batches are added up over ranks.

use serde::{Deserialize, Serialize};

/// `run.reduction`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// A rank's micro-batches are one pass, and its sums are f32: other numbers of ranks round otherwise, by about
    /// 10⁻⁷ at first, which training amplifies.
    Fast,
    /// As `fast`, but gradients travel as bf16: half as many bytes, and sums to three digits. Of tables that are shared out none
    /// travel.
    Bf16,
    /// Every micro-batch is a pass of its own, and sums are whole numbers, whose order does not matter: the same
    /// weights to the last bit on any number of ranks of equally many threads.
    Reproducible,
}
