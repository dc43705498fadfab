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
use bireme_kernels::cuda::graph::enter_stream;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::Device;
use thiserror::Error;

pub use crate::config::{DeviceChoice, Precision};

/// Version of libtorch that this program is built against.
pub const LIBTORCH: &str = "2.11.0";

/// Version of CUDA that libtorch is built with, in the driver's format.
const CUDA: i32 = 13_000;

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
    /// PCI address of the GPU on its host, such as `0000:41:00.0`. A rank that sees one GPU of
    /// several numbers it 0, so that the number does not identify it.
    pub gpu_address: Option<String>,
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
    let gpu_address = match device {
        Device::Cuda(gpu) => {
            // A training step is captured as a CUDA graph, which the default stream does not allow.
            enter_stream(gpu).map_err(|reason| NoGpu { reason })?;
            pci_address(gpu)
        }
        _ => None,
    };
    Ok(Place { device, gpu_address, n_threads, warnings })
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
        _ => Err(Missing::LibraryOrGpu(match driver_version() {
            Some(version) if version < CUDA => format!(
                "its driver supports CUDA {}, and libtorch needs CUDA {}: update the driver",
                version_text(version),
                version_text(CUDA)
            ),
            _ => "libtorch finds no GPU".to_owned(),
        })),
    }
}

/// The version of CUDA that the driver of this host supports, such as `13.0`; `None` without a
/// driver.
pub fn driver() -> Option<String> {
    load("libcuda.so.1").ok()?;
    driver_version().map(version_text)
}

/// `1000 major + 10 minor`. The driver is loaded.
fn driver_version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: `cuDriverGetVersion` writes an integer and returns 0 on success.
    let code = unsafe {
        let this = Library::this();
        let get = this.get::<unsafe extern "C" fn(*mut i32) -> i32>(b"cuDriverGetVersion\0");
        get.ok()?(&mut version)
    };
    (code == 0).then_some(version)
}

fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// PCI address of GPU number `gpu` of those that this process sees. The driver is loaded.
fn pci_address(gpu: usize) -> Option<String> {
    type GetDevice = unsafe extern "C" fn(*mut i32, i32) -> i32;
    type GetAddress = unsafe extern "C" fn(*mut u8, i32, i32) -> i32;
    let (mut device, mut text) = (0, [0_u8; 32]);
    let this = Library::this();
    // SAFETY: the types match cuda.h, the driver writes one integer and at most 32 characters with
    // a terminating zero, and all three functions return 0 on success.
    let codes = unsafe {
        let init = this.get::<unsafe extern "C" fn(u32) -> i32>(b"cuInit\0").ok()?;
        let get_device = this.get::<GetDevice>(b"cuDeviceGet\0").ok()?;
        let get_address = this.get::<GetAddress>(b"cuDeviceGetPCIBusId\0").ok()?;
        [
            init(0),
            get_device(&mut device, gpu as i32),
            get_address(text.as_mut_ptr(), text.len() as i32, device),
        ]
    };
    if codes != [0; 3] {
        return None;
    }
    let length = text.iter().position(|&character| character == 0)?;
    String::from_utf8(text[..length].to_vec()).ok().map(|address| address.to_lowercase())
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
    let allows_tf32 = precision != Precision::F32;
    // The last argument makes libtorch warn instead of failing if an operation has no deterministic
    // version.
    set_two(b"_ZN2at7Context26setDeterministicAlgorithmsEbb\0", is_deterministic, true)?;
    // libtorch would fill every new tensor with NaN in the deterministic mode, which is a third of
    // the kernels of a step.
    set_one(b"_ZN2at7Context39setDeterministicFillUninitializedMemoryEb\0", false)?;
    set_one(b"_ZN2at7Context18setAllowTF32CuBLASEb\0", allows_tf32)?;
    // A GRU runs in cuDNN, which has a setting of its own.
    set_one(b"_ZN2at7Context17setAllowTF32CuDNNEb\0", allows_tf32)?;
    // The parts of a product that is split along the summed dimension are added in f32.
    set_two(b"_ZN2at7Context27setAllowBF16ReductionCuBLASEbb\0", false, true)
}

type Context = *mut std::ffi::c_void;

/// Calls a setter of `at::Context` with one argument.
fn set_one(name: &[u8], value: bool) -> Result<(), NoGpu> {
    // SAFETY: in libtorch 2.11 the functions that `tune` names take the context, as member
    // functions do, and a bool.
    unsafe {
        let setter = find::<unsafe extern "C" fn(Context, bool)>(name)?;
        setter(context()?, value);
    }
    Ok(())
}

/// Calls a setter of `at::Context` with two arguments.
fn set_two(name: &[u8], first: bool, second: bool) -> Result<(), NoGpu> {
    // SAFETY: as in `set_one`, with two arguments of type bool.
    unsafe {
        let setter = find::<unsafe extern "C" fn(Context, bool, bool)>(name)?;
        setter(context()?, first, second);
    }
    Ok(())
}

/// libtorch's global context, which lives as long as the process.
fn context() -> Result<Context, NoGpu> {
    // SAFETY: `at::globalContext()` takes no argument and returns a reference.
    unsafe {
        let context = find::<unsafe extern "C" fn() -> Context>(b"_ZN2at13globalContextEv\0")?;
        Ok(context())
    }
}

/// A function of libtorch.
///
/// # Safety
/// `T` is the type of the function.
unsafe fn find<T: Copy>(name: &[u8]) -> Result<T, NoGpu> {
    // SAFETY: of the type, by the caller. libtorch is never unloaded.
    let found = unsafe { Library::this().get::<T>(name) };
    found.map(|function| *function).map_err(|error| NoGpu {
        reason: format!("this libtorch lacks a setting of its precision: {error}"),
    })
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
