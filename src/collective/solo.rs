//! A single process without communication.

use tch::Tensor;

use super::{Call, Collective, CollectiveError, Reduce};

/// The only rank of the job. It makes the checks of the other backends, so that a wrong call fails
/// on one rank already.
#[derive(Debug, Default)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn local_rank(&self) -> usize {
        0
    }

    fn local_size(&self) -> usize {
        1
    }

    fn backend(&self) -> &'static str {
        "solo"
    }

    fn all_reduce(&self, tensor: &mut Tensor, _op: Reduce) -> Result<(), CollectiveError> {
        Call::new("all_reduce", self).check(tensor)
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError> {
        Call::new("broadcast", self).check_root(tensor, root)
    }

    fn all_gather(&self, part: &Tensor, whole: &mut Tensor) -> Result<(), CollectiveError> {
        let call = Call::new("all_gather", self);
        call.check_parts(part, whole)?;
        call.copy(whole, part)
    }

    fn reduce_scatter(
        &self,
        whole: &Tensor,
        part: &mut Tensor,
        _op: Reduce,
    ) -> Result<(), CollectiveError> {
        let call = Call::new("reduce_scatter", self);
        call.check_parts(part, whole)?;
        call.copy(part, whole)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}
