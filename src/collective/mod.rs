//! What ranks do together: reductions, broadcasts, gathers, and one end for all.
//!
//! Code above this module sees the trait [`Collective`] and never which backend runs:
//!
//! | backend | ranks are | carries | when |
//! | --- | --- | --- | --- |
//! | [`solo`] | this process alone | any tensor | started without a launcher |
//! | [`threads`] | threads of one process | any tensor | tests |
//! | [`mpi`] | processes | host memory | started by `mpirun` or `srun` |
//! | [`nccl`] | processes, a GPU each | device memory; host memory through MPI | more than one rank, on GPUs |
//!
//! The choice falls once: [`join`] finds the launcher, the local rank then chooses a GPU
//! ([`crate::device::place`], before the first call here, as calls make tensors), and [`on_device`] adds NCCL where
//! there is one.
//!
//! Whoever joined keeps the collective until the work is done: dropping it is the orderly goodbye that waits for
//! the other ranks. After an error on this rank alone call [`Collective::abort`] instead.

mod bf16;
mod call;
mod error;
pub mod fixed_point;
pub mod mpi;
pub mod nccl;
pub mod phase_timer;
pub mod rows;
pub mod solo;
pub mod threads;
pub mod topology;
pub mod watch;
mod world;

use std::error::Error;

use tch::kind::Element;
use tch::{Kind, Tensor};

pub use bireme_base::lock::host_name;
use call::Call;
pub use error::CollectiveError;
use watch::Watch;
pub use world::{is_launched, join, on_device};

/// How the values of all ranks become one. Sums of integers wrap; a NaN makes a minimum or maximum undefined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Added up.
    Sum,
    /// The smallest.
    Min,
    /// The largest.
    Max,
}

/// What is done beside a call.
pub type Work<'a> = &'a mut dyn FnMut();

/// The ranks of one job, seen from one of them.
///
/// Tensors are contiguous f32, f64, bf16, i64 or u8, of the same kind and size on every rank, and any shape: only their
/// flat order counts. Every rank makes the same calls in the same order. Results are the same bits on every rank.
pub trait Collective {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;

    /// Ranks in the job.
    fn world_size(&self) -> usize;

    /// This rank among the ranks of its host, `0..local_size`.
    fn local_rank(&self) -> usize;

    /// Ranks on this host.
    fn local_size(&self) -> usize;

    /// `solo`, `threads`, `mpi` or `nccl`.
    fn backend(&self) -> &'static str;

    /// *All ranks.* Combines `tensor` element by element over ranks, in place.
    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) -> Result<(), CollectiveError>;

    /// *All ranks.* As `all_reduce`, while this thread does `work`, which does not touch `tensor` and makes no call. On a
    /// GPU that is what `work` queues.
    fn reduce_during(&self, tensor: &mut Tensor, op: Reduce, work: Work<'_>) -> Result<(), CollectiveError> {
        work();
        self.all_reduce(tensor, op)
    }

    /// *All ranks.* Every rank's `tensor` becomes that of rank `root`.
    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError>;

    /// *All ranks.* `whole: [world_size * n]` becomes every rank's `part: [n]`, in rank order.
    /// The two may not overlap.
    fn all_gather(&self, part: &Tensor, whole: &mut Tensor) -> Result<(), CollectiveError>;

    /// *All ranks.* Combines `whole: [world_size * n]` over ranks; rank r keeps elements `r*n..(r+1)*n` as
    /// `part: [n]`. The two may not overlap.
    fn reduce_scatter(&self, whole: &Tensor, part: &mut Tensor, op: Reduce) -> Result<(), CollectiveError>;

    /// *All ranks.* Returns when every rank has come here.
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// The clock on this rank's calls; none where no process could keep others waiting.
    fn watch(&self) -> Option<&Watch> {
        None
    }

    /// Ends the whole job at once with exit code `code`, whatever the other ranks are doing.
    fn abort(&self, code: i32) -> !;
}

/// Lets `numbers` travel as numbers of this kind, rounded to them on the way out and where they arrive.
///
/// # Errors
/// Those of `travel`.
pub fn rounded(
    numbers: &mut Tensor,
    kind: Kind,
    travel: impl FnOnce(&mut Tensor) -> Result<(), CollectiveError>,
) -> Result<(), CollectiveError> {
    let mut travelling = numbers.to_kind(kind);
    travel(&mut travelling)?;
    if kind != numbers.kind() {
        numbers.copy_(&travelling);
    }
    Ok(())
}

/// Held by rank 0 alone: work that one rank does for all takes a `Root`.
#[derive(Clone, Copy, Debug)]
pub struct Root(());

/// Host values, in terms of the calls above.
impl dyn Collective + '_ {
    /// The token of rank 0, and `None` elsewhere.
    pub fn root(&self) -> Option<Root> {
        (self.rank() == 0).then_some(Root(()))
    }

    /// *All ranks.* Combines host values (f32, f64, i64 or u8) element by element, in place.
    pub fn reduce<T: Element>(&self, values: &mut [T], op: Reduce) -> Result<(), CollectiveError> {
        let mut tensor = Tensor::from_slice(values);
        self.all_reduce(&mut tensor, op)?;
        tensor.copy_data(values, values.len());
        Ok(())
    }

    /// *All ranks.* Adds up counts over ranks, in place.
    pub fn sum_i64(&self, values: &mut [i64]) -> Result<(), CollectiveError> {
        self.reduce(values, Reduce::Sum)
    }

    /// *All ranks.* Adds up sums over ranks, in place.
    pub fn sum_f64(&self, values: &mut [f64]) -> Result<(), CollectiveError> {
        self.reduce(values, Reduce::Sum)
    }

    /// *All ranks.* The bytes of rank `root`, on every rank; what other ranks pass is dropped.
    pub fn broadcast_bytes(&self, bytes: Vec<u8>, root: usize) -> Result<Vec<u8>, CollectiveError> {
        let mut n_bytes = Tensor::from_slice(&[bytes.len() as i64]);
        self.broadcast(&mut n_bytes, root)?;
        let mut bytes = bytes;
        bytes.resize(n_bytes.int64_value(&[0]) as usize, 0);
        let mut tensor = Tensor::from_slice(&bytes);
        self.broadcast(&mut tensor, root)?;
        tensor.copy_data(&mut bytes, tensor.numel());
        Ok(bytes)
    }

    /// *All ranks.* Every rank's bytes in rank order, on every rank; lengths may differ.
    pub fn gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let lengths: Vec<usize> =
            self.gather(&[bytes.len() as i64])?.into_iter().map(|length| length as usize).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut padded = bytes.to_vec();
        padded.resize(longest, 0);
        let all = self.gather(&padded)?;
        Ok(lengths.iter().enumerate().map(|(rank, n)| all[rank * longest..][..*n].to_vec()).collect())
    }

    /// *All ranks.* Every rank's `values: [n]` in rank order; the same n everywhere.
    pub fn gather<T: Element>(&self, values: &[T]) -> Result<Vec<T>, CollectiveError> {
        let part = Tensor::from_slice(values);
        let n_values = values.len() * self.world_size();
        let mut whole = Tensor::empty([n_values as i64], (part.kind(), tch::Device::Cpu));
        self.all_gather(&part, &mut whole)?;
        let mut all = vec![T::ZERO; n_values];
        whole.copy_data(&mut all, n_values);
        Ok(all)
    }

    /// *All ranks.* Work that each rank tried by itself: `Ok` when it went well everywhere, otherwise the error
    /// of the lowest failing rank, with its sources, on every rank. No rank goes on while another has failed.
    pub fn agree<T, E: Error>(&self, tried: Result<T, E>) -> Result<T, CollectiveError> {
        let world_size = self.world_size();
        let mut failing = [if tried.is_ok() { world_size as i64 } else { self.rank() as i64 }];
        self.reduce(&mut failing, Reduce::Min)?;
        let rank = failing[0] as usize;
        let mine = match tried {
            Ok(value) if rank == world_size => return Ok(value),
            Ok(_) => String::new(),
            Err(error) => bireme_base::message::chain(&error),
        };
        let message = self.broadcast_bytes(mine.into_bytes(), rank)?;
        let message = String::from_utf8_lossy(&message).into_owned();
        let message =
            if world_size == 1 { message } else { format!("rank {rank} of {world_size}: {message}") };
        Err(CollectiveError::Rank { rank, message })
    }
}
