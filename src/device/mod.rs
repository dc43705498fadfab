//! The device of a rank, the CPU or one GPU of its host, and its number of threads.
//!
//! One binary runs on hosts with and without GPUs. It is not linked with libtorch's CUDA library,
//! which is loaded at run time if the host has an NVIDIA driver. libtorch searches for it once, at
//! the first tensor or the first query for a GPU, so call [`place`] before both.

pub mod memory;
#[cfg(target_arch = "x86_64")]
mod mkl;

use std::fs;
use std::thread::available_parallelism;

use bireme_base::user_error::{REFUSED, UserError};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::Device;
use thiserror::Error;

pub use crate::config::{DeviceChoice, Precision};

/// Version of libtorch that this program is built against.
pub const LIBTORCH: &str = "2.11.0";

/// `run.device = "cuda"` on a host without a usable GPU.
#[derive(Debug, Error)]
#[error("`run.device` is `cuda`, but {reason}")]
pub struct NoGpu {
    reason: String,
}

impl UserError for NoGpu {
    fn exit_code(&self) -> i32 {
        REFUSED
    }

    fn hint(&self) -> Option<String> {
        Some(
            "use `--set run.device=cpu`, or run `./launch/setup.sh` again on the GPU host"
                .to_owned(),
        )
    }
}

/// Device and threads of one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub device: Device,
    /// Threads of this rank for computation on the CPU.
    pub n_threads: usize,
    /// Problems that do not stop the run, one line each.
    pub warnings: Vec<String>,
}

impl Place {
    /// `cpu`, or `cuda:` and the number of the GPU on its host.
    pub fn device_name(&self) -> String {
        match self.device {
            Device::Cuda(gpu) => format!("cuda:{gpu}"),
            _ => "cpu".to_owned(),
        }
    }
}

/// Selects the device and the number of threads of local rank `local_rank` of `local_size`, and
/// sets libtorch's thread count. `n_threads` 0 divides the host's cores among its ranks. Call it
/// before the first tensor is created, and so before the first collective call.
///
/// # Errors
/// `choice` is `Cuda`, but the host has no driver, no CUDA library for libtorch, or no GPU.
pub fn place(
    choice: DeviceChoice,
    n_threads: usize,
    local_rank: usize,
    local_size: usize,
) -> Result<Place, NoGpu> {
    let mut warnings = Vec::new();
    let device = match choice {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Auto | DeviceChoice::Cuda => match find_gpus() {
            Ok(n_gpus) => Device::Cuda(local_rank % n_gpus),
            Err(missing) if choice == DeviceChoice::Cuda => {
                return Err(NoGpu { reason: missing.into_reason() });
            }
            // A driver without a usable GPU is probably a mistake. A host without a driver is a CPU
            // host.
            Err(Missing::LibraryOrGpu(reason)) => {
                warnings.push(format!(
                    "running on the CPU: this host has an NVIDIA driver, but {reason}"
                ));
                Device::Cpu
            }
            Err(Missing::Driver(_)) => Device::Cpu,
        },
    };
    let (n_cores, warning) = cores_of_rank(local_size);
    let n_threads = if n_threads == 0 {
        warnings.extend(warning);
        n_cores
    } else {
        n_threads
    };
    tch::set_num_threads(n_threads as i32);
    Ok(Place { device, n_threads, warnings })
}

/// Why no GPU is usable.
enum Missing {
    Driver(String),
    LibraryOrGpu(String),
}

impl Missing {
    fn into_reason(self) -> String {
        match self {
            Self::Driver(reason) | Self::LibraryOrGpu(reason) => reason,
        }
    }
}

/// Number of GPUs that libtorch can use, at least one.
fn find_gpus() -> Result<usize, Missing> {
    load("libcuda.so.1").map_err(|error| {
        Missing::Driver(format!("there is no NVIDIA driver on this host: {error}"))
    })?;
    load("libtorch_cuda.so").map_err(|error| {
        Missing::LibraryOrGpu(format!("libtorch's CUDA library does not load: {error}"))
    })?;
    match tch::Cuda::device_count() {
        n_gpus if n_gpus > 0 => Ok(n_gpus as usize),
        _ => Err(Missing::LibraryOrGpu("libtorch finds no GPU".to_owned())),
    }
}

/// Loads a library with globally visible symbols and never unloads it. It is searched on the path
/// of this binary's libraries.
fn load(name: &str) -> Result<(), libloading::Error> {
    // SAFETY: loading the CUDA driver or libtorch has no precondition, and loading it again does
    // nothing.
    let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(library);
    Ok(())
}

/// Sets libtorch's precision on GPUs, and whether it prefers deterministic operations. The default
/// operations are faster but add in the order in which threads finish, so repeated runs differ in
/// the last bits.
///
/// # Errors
/// This libtorch lacks one of the settings.
pub fn tune(is_deterministic: bool, precision: Precision) -> Result<(), NoGpu> {
    type Context = *mut std::ffi::c_void;
    let missing = |error| NoGpu {
        reason: format!("this libtorch lacks a setting of its precision: {error}"),
    };
    let this = Library::this();
    // SAFETY: the types match libtorch 2.11. `at::globalContext()` returns a reference that is
    // valid as long as the process lives. `at::Context::setDeterministicAlgorithms(bool, bool)` and
    // `at::Context::setAllowTF32CuBLAS(bool)` are member functions, which take it as first
    // argument.
    unsafe {
        let context = this.get::<unsafe extern "C" fn() -> Context>(b"_ZN2at13globalContextEv\0");
        let deterministic = this.get::<unsafe extern "C" fn(Context, bool, bool)>(
            b"_ZN2at7Context26setDeterministicAlgorithmsEbb\0",
        );
        let tf32 = this
            .get::<unsafe extern "C" fn(Context, bool)>(b"_ZN2at7Context18setAllowTF32CuBLASEb\0");
        let context = context.map_err(missing)?();
        // The last argument makes libtorch warn instead of failing if an operation has no
        // deterministic version.
        deterministic.map_err(missing)?(context, is_deterministic, true);
        tf32.map_err(missing)?(context, precision != Precision::F32);
    }
    Ok(())
}

/// Whether libtorch uses fewer threads than this rank has cores. `local_size` ranks share the host.
pub fn has_free_core(local_size: usize) -> bool {
    cores_of_rank(local_size).0 > tch::get_num_threads() as usize
}

/// Cores per rank if `local_size` ranks share the host, and a warning if the launcher leaves cores
/// unused.
fn cores_of_rank(local_size: usize) -> (usize, Option<String>) {
    let usable = available_parallelism().map_or(1, |n| n.get());
    cores_per_rank(usable, cores_of_host().unwrap_or(usable), local_size)
}

/// [`cores_of_rank`] for a rank whose affinity mask has `usable` of the host's `cores`.
fn cores_per_rank(usable: usize, cores: usize, local_size: usize) -> (usize, Option<String>) {
    // A mask smaller than the number of ranks means that the launcher has bound each rank to
    // different cores; otherwise the ranks share the mask.
    if usable >= local_size || usable == cores {
        return ((usable / local_size).max(1), None);
    }
    let warning = (cores / local_size > usable).then(|| {
        format!(
            "each rank is bound to {usable} of this host's {cores} cores; `mpirun --bind-to none` \
             lets the ranks use all"
        )
    });
    (usable, warning)
}

/// Cores of the host, including cores outside the affinity mask of this process.
pub fn n_cores() -> usize {
    let usable = available_parallelism().map_or(1, |n| n.get());
    cores_of_host().unwrap_or(usable).max(usable)
}

/// Cores in `/proc/cpuinfo`; `None` if it is not readable.
fn cores_of_host() -> Option<usize> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    Some(cpuinfo.lines().filter(|line| line.starts_with("processor")).count())
        .filter(|cores| *cores > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_the_cores_of_their_host() {
        assert_eq!(cores_per_rank(64, 64, 1), (64, None));
        assert_eq!(cores_per_rank(64, 64, 4), (16, None));
        assert_eq!(cores_per_rank(7, 64, 4), (1, None));
        assert_eq!(cores_per_rank(2, 2, 3), (1, None));
        assert_eq!(cores_per_rank(1, 2, 2), (1, None));
        let (n_cores, warning) = cores_per_rank(1, 64, 2);
        assert_eq!(n_cores, 1);
        assert!(warning.unwrap().starts_with("each rank is bound to 1 of this host's 64 cores"));
    }

    #[test]
    fn devices_are_lower_case_in_a_configuration() {
        assert_eq!(serde_json::from_str::<DeviceChoice>("\"cuda\"").unwrap(), DeviceChoice::Cuda);
        assert_eq!(serde_json::to_string(&DeviceChoice::Auto).unwrap(), "\"auto\"");
    }
}
