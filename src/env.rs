//! Environment variables that the program reads.
//!
//! | variable | effect | read by |
//! | --- | --- | --- |
//! | [`LOG`] | what `bireme serve` logs, as `info` or `debug` | [`bireme_serve::logs`] |
//! | [`MKL_AVX512`] | `0`: MKL chooses its instructions by the CPU's maker | `device::mkl` |
//! | `BIREME_FAULT` | for tests: one rank fails, `KIND@RANK:STEP` | `train::fault` |
//! | `RUST_BACKTRACE` | `1`: a fault of the program is logged with its stack | console |
//! | [`REQUIRED`] | set by the program itself | libraries |
//!
//! What launchers set:
//!
//! | variable | meaning | read by |
//! | --- | --- | --- |
//! | `OMPI_COMM_WORLD_RANK`, `PMIX_RANK`, `PMI_RANK` | it is a rank | `collective::world` |
//! | `OMPI_COMM_WORLD_SIZE`, `PMI_SIZE` | number of ranks | `collective::world` |
//! | `SLURM_STEP_NUM_TASKS` | number of tasks that `srun` started | `collective::world` |
//! | `SLURM_JOB_ID` | `bireme bench scaling` runs in an allocation | [`bireme_tools::launch`] |
//!
//! The scripts in `launch/` read further ones, which their headers list.

pub use bireme_serve::logs::VARIABLE as LOG;

/// `0`: MKL chooses its instructions by the CPU's maker, as in other programs. `mpirun` passes it
/// to other hosts only if asked: `-x BIREME_MKL_AVX512`.
pub const MKL_AVX512: &str = "BIREME_MKL_AVX512";

/// Variables that libraries read before `main`, with their values. The program starts itself again
/// with those that are not set.
pub const REQUIRED: [(&str, &str); 2] = [
    // OpenMP's threads wait for work by spinning, by default for milliseconds, in which they
    // keep other ranks from the cores.
    ("GOMP_SPINCOUNT", "10000"),
    // Without it cuBLAS may sum in another order each time.
    ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
];
