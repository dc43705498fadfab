//! The seam between a backward pass and the reduction of its gradients over ranks.

use tch::Tensor;

use super::Gradients;
use crate::collective::CollectiveError;

/// Reacts to the stages of a backward pass, so that gradients can be reduced while it runs.
/// [`NoHooks`] leaves all reductions to the caller.
pub trait GradientHooks {
    /// The gradients of the scoring parameters are complete. Runs `work`, the backward pass through
    /// the encoder, which adds no gradients to `gradients`; a reduction may run meanwhile.
    ///
    /// # Errors
    /// A collective call fails.
    fn scoring_complete(
        &mut self,
        gradients: &mut Gradients,
        work: &mut dyn FnMut(),
    ) -> Result<(), CollectiveError> {
        let _ = gradients;
        work();
        Ok(())
    }

    /// Called with gradients `[N, D]` of rows `[N]` of the item table after `scoring_complete`. If
    /// the gradient of the item table was reduced there, returns the late rows and gradients of all
    /// ranks, which every rank then adds by itself. `are_equal`: whether `N` is the same on all
    /// ranks.
    ///
    /// # Errors
    /// A collective call fails.
    fn gather_late_rows(
        &mut self,
        rows: &Tensor,
        gradients: &Tensor,
        are_equal: bool,
    ) -> Result<Option<(Tensor, Tensor)>, CollectiveError> {
        let _ = (rows, gradients, are_equal);
        Ok(None)
    }

    /// The gradients of one rank's targets or lookups were added to sharded rows.
    fn shard_updated(&mut self, gradients: &mut Gradients) {
        let _ = gradients;
    }
}

/// Reduces nothing.
pub struct NoHooks;

impl GradientHooks for NoHooks {}
