//! Selects the backend.

use std::env;

use tch::Device;

use super::host_name;
use super::mpi::Mpi;
use super::nccl::Nccl;
use super::solo::Solo;
use super::{Collective, CollectiveError};
use crate::device::Place;

/// *All ranks.* Joins the job of this process: an MPI job if a launcher started it, otherwise a
/// single process, which does not initialise MPI.
///
/// In an MPI job, a panic on any thread prints the rank and ends the job with exit code 1.
///
/// # Errors
/// [`CollectiveError::Launch`] if the launcher started several processes that MPI does not see as
/// one job.
pub fn join() -> Result<Box<dyn Collective>, CollectiveError> {
    match launched(|name| env::var(name).ok())? {
        Launched::Alone => Ok(Box::new(Solo)),
        Launched::Ranks(expected) => {
            let mpi = Mpi::join()?;
            match expected {
                Some(expected) if expected != mpi.world_size() => Err(CollectiveError::Launch {
                    problem: format!(
                        "{expected} processes were started, but MPI sees a job of {}",
                        mpi.world_size()
                    ),
                    hint: "start with the `mpirun` of the MPI this program was built with",
                }),
                _ => Ok(Box::new(mpi)),
            }
        }
    }
}

/// *All ranks.* Returns a collective over the same ranks for tensors on the device of `place`. For
/// a GPU it adds NCCL, because MPI carries host memory only.
///
/// # Errors
/// Only some ranks are on GPUs, two ranks are on one GPU, or NCCL is missing or does not start. All
/// ranks return the error.
pub fn on_device(
    host: Box<dyn Collective>,
    place: &Place,
) -> Result<Box<dyn Collective>, CollectiveError> {
    let device = place.device;
    let on_gpu = host.gather(&[u8::from(device.is_cuda())])?;
    if let Some(other) = on_gpu.iter().position(|other| *other != on_gpu[0]) {
        let name = |on_gpu| if on_gpu == 1 { "a GPU" } else { "the CPU" };
        return Err(CollectiveError::Launch {
            problem: format!(
                "rank 0 is on {}, rank {other} on {}",
                name(on_gpu[0]),
                name(on_gpu[other])
            ),
            hint: "choose one with `--set run.device=cpu` or `--set run.device=cuda`",
        });
    }
    match device {
        Device::Cuda(gpu) if host.backend() != Solo.backend() => {
            refuse_shared_gpus(&*host, place)?;
            Ok(Box::new(Nccl::join(host, gpu)?))
        }
        _ => Ok(host),
    }
}

/// *All ranks.* Refuses ranks that share a GPU, which NCCL would refuse without naming them.
/// Different values of `NCCL_HOSTID` make NCCL, and so this check, take ranks for remote ones.
fn refuse_shared_gpus(host: &dyn Collective, place: &Place) -> Result<(), CollectiveError> {
    let host_name = env::var("NCCL_HOSTID").unwrap_or_else(|_| host_name());
    let gpu = place.gpu_address.as_ref().map(|address| format!("{address} of {host_name}"));
    let gpus = host.gather_bytes(gpu.unwrap_or_default().as_bytes())?;
    let n_ranks = |gpu: &Vec<u8>| gpus.iter().filter(|other| *other == gpu).count();
    let shared = gpus.iter().find(|gpu| !gpu.is_empty() && n_ranks(gpu) > 1);
    let Some(shared) = shared else { return Ok(()) };
    let ranks = (0..gpus.len()).filter(|&rank| gpus[rank] == *shared);
    let ranks = ranks.map(|rank| rank.to_string()).collect::<Vec<_>>().join(", ");
    Err(CollectiveError::Launch {
        problem: format!("ranks {ranks} share the GPU {}", String::from_utf8_lossy(shared)),
        hint: "start at most one rank for each GPU of a host (`mpirun --map-by ppr:N:node`)",
    })
}

/// Whether a launcher started this process.
pub fn is_launched() -> bool {
    !matches!(launched(|name| env::var(name).ok()), Ok(Launched::Alone))
}

#[derive(Debug, PartialEq)]
enum Launched {
    Alone,
    /// By a launcher, with the number of ranks if the launcher sets it.
    Ranks(Option<usize>),
}

/// Reads the environment variables of `mpirun` (Open MPI, MPICH) and `srun` (PMIx, PMI).
fn launched(variable: impl Fn(&str) -> Option<String>) -> Result<Launched, CollectiveError> {
    let number = |name| variable(name)?.parse::<usize>().ok();
    let by_mpi = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"]
        .into_iter()
        .any(|name| variable(name).is_some());
    if by_mpi {
        let sizes = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];
        return Ok(Launched::Ranks(sizes.into_iter().find_map(number)));
    }
    // Otherwise every task of the step would train alone and overwrite the files of the other
    // tasks.
    match number("SLURM_STEP_NUM_TASKS") {
        Some(n_tasks) if n_tasks > 1 => Err(CollectiveError::Launch {
            problem: format!("`srun` started {n_tasks} tasks without MPI"),
            hint: "use `srun --mpi=pmix`, or `mpirun` inside the allocation",
        }),
        _ => Ok(Launched::Alone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launched_with(variables: &[(&str, &str)]) -> Result<Launched, String> {
        let find = |name: &str| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
        };
        launched(find).map_err(|error| error.to_string())
    }

    #[test]
    fn the_launcher_is_detected_by_its_variables() {
        assert_eq!(launched_with(&[]), Ok(Launched::Alone));
        assert_eq!(
            launched_with(&[("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_PROCID", "0")]),
            Ok(Launched::Alone)
        );
        let mpirun = [
            ("OMPI_COMM_WORLD_RANK", "0"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("SLURM_STEP_NUM_TASKS", "2"),
        ];
        assert_eq!(launched_with(&mpirun), Ok(Launched::Ranks(Some(4))));
        assert_eq!(
            launched_with(&[("PMIX_RANK", "1"), ("SLURM_STEP_NUM_TASKS", "2")]),
            Ok(Launched::Ranks(Some(2)))
        );
        assert_eq!(
            launched_with(&[("PMI_RANK", "1"), ("PMI_SIZE", "3")]),
            Ok(Launched::Ranks(Some(3)))
        );
        assert_eq!(launched_with(&[("PMIX_RANK", "1")]), Ok(Launched::Ranks(None)));
        assert_eq!(
            launched_with(&[("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", "2")]),
            Err("`srun` started 4 tasks without MPI".to_owned())
        );
    }
}
