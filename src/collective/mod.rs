//! Collective operations: reductions, broadcasts, gathers, barriers, and the end of the job.
//!
//! Code above this module uses the trait [`Collective`] and does not know the backend:
//!
//! | backend | ranks are | carries | when |
//! | --- | --- | --- | --- |
//! | [`solo`] | a single process | any tensor | started without a launcher |
//! | [`threads`] | threads of one process | any tensor | tests |
//! | [`mpi`] | processes | host memory | started by `mpirun` or `srun` |
//! | [`nccl`] | processes, one GPU each | device memory (MPI: host memory) | ranks on GPUs |
//!
//! The backend is chosen once. [`join`] detects the launcher, the local rank selects a GPU
//! ([`crate::device::place`], before the first collective call, because calls create tensors), and
//! [`on_device`] adds NCCL if the rank computes on a GPU.
//!
//! Keep the collective until the work is done: dropping it waits for the other ranks. After an
//! error on this rank alone, call [`Collective::abort`] instead.

mod bf16;
mod call;
mod error;
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

/// Reduction over ranks. Sums of integers wrap; with a NaN, the minimum and maximum are undefined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Min,
    Max,
}

/// Computation that a collective call overlaps.
pub type Work<'a> = &'a mut dyn FnMut();

/// The ranks of one job, as seen by one rank.
///
/// Tensors are contiguous f32, f64, bf16, i64 or u8, with the same kind and number of elements on
/// every rank. Their shapes are ignored: elements are combined in flat order. Every rank makes the
/// same calls in the same order. Results are identical bits on every rank.
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

    /// *All ranks.* Reduces `tensor` element-wise over the ranks, in place.
    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) -> Result<(), CollectiveError>;

    /// *All ranks.* `all_reduce` overlapped with `work`, which neither uses `tensor` nor makes a
    /// collective call. On a GPU the reduction overlaps the kernels that `work` queues.
    fn reduce_during(
        &self,
        tensor: &mut Tensor,
        op: Reduce,
        work: Work<'_>,
    ) -> Result<(), CollectiveError> {
        work();
        self.all_reduce(tensor, op)
    }

    /// *All ranks.* Copies the `tensor` of rank `root` to all ranks.
    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError>;

    /// *All ranks.* Concatenates every rank's `part: [n]` in rank order into
    /// `whole: [world_size * n]`. The two may not overlap in memory.
    fn all_gather(&self, part: &Tensor, whole: &mut Tensor) -> Result<(), CollectiveError>;

    /// *All ranks.* Reduces `whole: [world_size * n]` over the ranks; rank r keeps elements
    /// `r*n..(r+1)*n` as `part: [n]`. The two may not overlap in memory.
    fn reduce_scatter(
        &self,
        whole: &Tensor,
        part: &mut Tensor,
        op: Reduce,
    ) -> Result<(), CollectiveError>;

    /// *All ranks.* Returns when every rank has called it.
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// The watchdog over this rank's calls; `None` if the ranks are not separate processes.
    fn watch(&self) -> Option<&Watch> {
        None
    }

    /// Ends the whole job at once with exit code `code`, whatever the other ranks are doing.
    fn abort(&self, code: i32) -> !;
}

/// Communicates `numbers` as elements of type `kind`: `call` gets a converted copy, and its result
/// is converted back.
///
/// # Errors
/// `call` fails.
pub fn communicate_as(
    numbers: &mut Tensor,
    kind: Kind,
    call: impl FnOnce(&mut Tensor) -> Result<(), CollectiveError>,
) -> Result<(), CollectiveError> {
    // Without a conversion `converted` is `numbers` itself, and the call works in place.
    let mut converted = numbers.to_kind(kind);
    call(&mut converted)?;
    if kind != numbers.kind() {
        numbers.copy_(&converted);
    }
    Ok(())
}

/// Token that only rank 0 can obtain. Functions that one rank runs for all take a `Root`.
#[derive(Clone, Copy, Debug)]
pub struct Root(());

/// Collectives on host values, built on the tensor calls.
impl dyn Collective + '_ {
    /// The token on rank 0; `None` on other ranks.
    pub fn root(&self) -> Option<Root> {
        (self.rank() == 0).then_some(Root(()))
    }

    /// *All ranks.* Reduces host values (f32, f64, i64 or u8) element-wise, in place.
    pub fn reduce<T: Element>(&self, values: &mut [T], op: Reduce) -> Result<(), CollectiveError> {
        let mut tensor = Tensor::from_slice(values);
        self.all_reduce(&mut tensor, op)?;
        tensor.copy_data(values, values.len());
        Ok(())
    }

    /// *All ranks.* Sums counts over the ranks, in place.
    pub fn sum_i64(&self, values: &mut [i64]) -> Result<(), CollectiveError> {
        self.reduce(values, Reduce::Sum)
    }

    /// *All ranks.* Sums `values` over the ranks, in place.
    pub fn sum_f64(&self, values: &mut [f64]) -> Result<(), CollectiveError> {
        self.reduce(values, Reduce::Sum)
    }

    /// *All ranks.* Returns the bytes of rank `root` on every rank. The bytes of other ranks are
    /// ignored.
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

    /// *All ranks.* Returns every rank's bytes in rank order, on every rank. Lengths may differ.
    pub fn gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let lengths: Vec<usize> =
            self.gather(&[bytes.len() as i64])?.into_iter().map(|length| length as usize).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut padded = bytes.to_vec();
        padded.resize(longest, 0);
        let all = self.gather(&padded)?;
        Ok(lengths
            .iter()
            .enumerate()
            .map(|(rank, n)| all[rank * longest..][..*n].to_vec())
            .collect())
    }

    /// *All ranks.* Concatenates every rank's `values: [n]` in rank order; n is the same on every
    /// rank.
    pub fn gather<T: Element>(&self, values: &[T]) -> Result<Vec<T>, CollectiveError> {
        let part = Tensor::from_slice(values);
        let n_values = values.len() * self.world_size();
        let mut whole = Tensor::empty([n_values as i64], (part.kind(), tch::Device::Cpu));
        self.all_gather(&part, &mut whole)?;
        let mut all = vec![T::ZERO; n_values];
        whole.copy_data(&mut all, n_values);
        Ok(all)
    }

    /// *All ranks.* Combines the results of local work: `Ok` if all ranks succeeded, otherwise on
    /// every rank the error of the lowest failing rank, with its sources. So no rank continues to a
    /// collective call that a failed rank will never make.
    pub fn agree<T, E: Error>(&self, result: Result<T, E>) -> Result<T, CollectiveError> {
        let world_size = self.world_size();
        let mut failing = [if result.is_ok() { world_size as i64 } else { self.rank() as i64 }];
        self.reduce(&mut failing, Reduce::Min)?;
        let rank = failing[0] as usize;
        let local_message = match result {
            Ok(value) if rank == world_size => return Ok(value),
            Ok(_) => String::new(),
            Err(error) => bireme_base::message::chain(&error),
        };
        let message = self.broadcast_bytes(local_message.into_bytes(), rank)?;
        let message = String::from_utf8_lossy(&message).into_owned();
        let message = if world_size == 1 {
            message
        } else {
            format!("rank {rank} of {world_size}: {message}")
        };
        Err(CollectiveError::Rank { rank, message })
    }
}
