//! Runs a program on several MPI ranks, within a time limit.

use std::process::Command;
use std::time::Duration;

use super::process::{Finished, run_within};
use super::requirements::has_mpirun;

/// Runs a command on `n_ranks` ranks, if need be more than cores, and ends all of them after
/// `limit`.
///
/// `None` where there is no `mpirun`: see [`has_mpirun`].
pub fn mpirun(n_ranks: usize, program: &Command, limit: Duration) -> Option<Finished> {
    if !has_mpirun(&format!("nothing ran on {n_ranks} ranks")) {
        return None;
    }
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "--bind-to", "none", "-np", &n_ranks.to_string()])
        .arg(program.get_program())
        .args(program.get_args())
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        // Waiting ranks leave the core to the others.
        .envs([("OMPI_MCA_mpi_yield_when_idle", "1"), ("OMP_NUM_THREADS", "1")])
        .envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Some(run_within(&mut command, limit))
}

/// Like [`mpirun`], with ranks that share the host's one GPU.
pub fn mpirun_on_one_gpu(n_ranks: usize, program: &Command, limit: Duration) -> Option<Finished> {
    // NCCL takes ranks of different host names to be on different hosts, which may share a GPU.
    let name_host = r#"NCCL_HOSTID="rank-$OMPI_COMM_WORLD_RANK" exec "$0" "$@""#;
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", name_host])
        .arg(program.get_program())
        .args(program.get_args())
        .envs([("NCCL_ALGO", "Ring"), ("NCCL_PROTO", "Simple"), ("NCCL_IB_DISABLE", "1")])
        .envs([("NCCL_NVLS_ENABLE", "0"), ("NCCL_MNNVL_ENABLE", "0")])
        .envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    mpirun(n_ranks, &shell, limit)
}
