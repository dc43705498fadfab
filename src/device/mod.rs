//! Where a rank computes: the CPU or one GPU of its host, and with how many threads.
//!
//! One binary serves hosts with and without GPUs. The linker leaves libtorch's CUDA library out, so it is loaded here
//! at run time, where an NVIDIA driver is: libtorch looks for it once, at the first tensor or the first question for a
//! GPU, so [`place`] comes before both.

pub(crate) mod guarded;
pub mod host;
pub mod memory;
pub mod operation;
pub mod vectors;

use std::fs;
use std::thread::available_parallelism;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use thiserror::Error;

/// The libtorch that this program is built against.
pub const LIBTORCH: &str = "2.11.0";

/// What a run asks for, as `run.device` writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// A GPU where there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU, also where there are GPUs.
    Cpu,
    /// A GPU, or nothing.
    Cuda,
}

impl DeviceChoice {
    /// As a configuration writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// `run.device = "cuda"` on a host where that cannot be.
#[derive(Debug, Error)]
#[error("`run.device` is `cuda`, but {reason}")]
pub struct NoGpu {
    reason: String,
}

impl NoGpu {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        "use `--set run.device=cpu`, or run `./launch/setup.sh` again on the GPU host"
    }
}

/// Where one rank computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The CPU, or the GPU that the local rank chose.
    pub device: Device,
    /// Threads of this rank for CPU work.
    pub n_threads: usize,
    /// What works, but not as the user will have meant it; one line each.
    pub warnings: Vec<String>,
}

impl Place {
    /// `cpu`, or `cuda:` and the GPU's number on its host.
    pub fn device_name(&self) -> String {
        match self.device {
            Device::Cuda(gpu) => format!("cuda:{gpu}"),
            _ => "cpu".to_owned(),
        }
    }
}

/// Chooses the device and the number of threads of rank `local_rank` of `local_size` on this host, and tells
/// libtorch. `n_threads` 0 stands for this rank's share of the host's cores. To be called before the first tensor,
/// so before the first collective call too.
///
/// # Errors
/// A GPU was asked for, and there is no driver, no CUDA library for libtorch, or no GPU.
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
            // A driver without the rest is a mistake worth a word; a host without a driver is just a CPU host.
            Err(Missing::BehindDriver(reason)) => {
                warnings.push(format!("running on the CPU: there is an NVIDIA driver, but {reason}"));
                Device::Cpu
            }
            Err(Missing::Driver(_)) => Device::Cpu,
        },
    };
    let (share, warning) = cores_of_rank(local_size);
    let n_threads = if n_threads == 0 {
        warnings.extend(warning);
        share
    } else {
        n_threads
    };
    tch::set_num_threads(n_threads as i32);
    Ok(Place { device, n_threads, warnings })
}

enum Missing {
    Driver(String),
    BehindDriver(String),
}

impl Missing {
    fn into_reason(self) -> String {
        match self {
            Self::Driver(reason) | Self::BehindDriver(reason) => reason,
        }
    }
}

/// The number of GPUs of this host that libtorch can use, one or more.
fn find_gpus() -> Result<usize, Missing> {
    load("libcuda.so.1")
        .map_err(|error| Missing::Driver(format!("there is no NVIDIA driver on this host: {error}")))?;
    load("libtorch_cuda.so")
        .map_err(|error| Missing::BehindDriver(format!("libtorch's CUDA library does not load: {error}")))?;
    match tch::Cuda::device_count() {
        n_gpus if n_gpus > 0 => Ok(n_gpus as usize),
        _ => Err(Missing::BehindDriver("libtorch finds no GPU".to_owned())),
    }
}

/// Loads a library for all others to see, for as long as the process lives. Found as this binary's own libraries are.
fn load(name: &str) -> Result<(), libloading::Error> {
    // SAFETY: the initialisers of the CUDA driver and of libtorch have no precondition; a second load does nothing.
    let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(library);
    Ok(())
}

/// `run.precision`: how matrices are multiplied. Parameters, gradients and the optimizer's state are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// With all 24 binary digits.
    #[default]
    F32,
    /// On GPUs with 11 digits of the factors, and sums of f32: several times as fast on NVIDIA's since Ampere.
    Tf32,
    /// The same, and the scores of all items that training compares with 8 digits of the factors and the products: bfloat16.
    /// Faster again, and faster on CPUs that multiply it.
    Bf16,
}

impl Precision {
    /// What the logits of training are rounded to.
    pub fn of_logits(self) -> Kind {
        if self == Self::Bf16 { Kind::BFloat16 } else { Kind::Float }
    }
}

/// Tells libtorch how to compute on GPUs. Deterministic is what gives the same bits each time, as far as there are such
/// operations: the fastest sum in whatever order threads come.
///
/// # Errors
/// This libtorch has no such switch.
pub fn tune(is_deterministic: bool, precision: Precision) -> Result<(), NoGpu> {
    type Context = *mut std::ffi::c_void;
    let missing = |error| NoGpu { reason: format!("this libtorch cannot be told how to compute: {error}") };
    let this = Library::this();
    // SAFETY: the types are those of libtorch 2.11: `at::globalContext()` returns a reference to what lives as long as the
    // process, `at::Context::setDeterministicAlgorithms(bool, bool)` and `at::Context::setAllowTF32CuBLAS(bool)` take it first.
    unsafe {
        let context = this.get::<unsafe extern "C" fn() -> Context>(b"_ZN2at13globalContextEv\0");
        let deterministic = this.get::<unsafe extern "C" fn(Context, bool, bool)>(
            b"_ZN2at7Context26setDeterministicAlgorithmsEbb\0",
        );
        let tf32 = this.get::<unsafe extern "C" fn(Context, bool)>(b"_ZN2at7Context18setAllowTF32CuBLASEb\0");
        let context = context.map_err(missing)?();
        // Where there is no such operation, libtorch warns and goes on.
        deterministic.map_err(missing)?(context, is_deterministic, true);
        tf32.map_err(missing)?(context, precision != Precision::F32);
    }
    Ok(())
}

/// A copy of what lies on the CPU, for later work on `device` to read. Nothing waits for it.
pub fn send(tensor: &Tensor, device: Device) -> Tensor {
    // CUDA has read memory that is not pinned when this returns.
    tensor.to_device_(device, tensor.kind(), true, false)
}

/// The same of many numbers, in one transfer.
pub fn send_all(numbers: &[&[i64]], device: Device) -> Vec<Tensor> {
    let all = send(&Tensor::from_slice(&numbers.concat()), device);
    let lengths: Vec<i64> = numbers.iter().map(|numbers| numbers.len() as i64).collect();
    all.split_with_sizes(lengths.as_slice(), 0)
}

/// Whether one of the cores of this rank, one of `local_size` on this host, has no thread of libtorch.
pub fn has_free_core(local_size: usize) -> bool {
    cores_of_rank(local_size).0 > tch::get_num_threads() as usize
}

/// The cores of one of `local_size` ranks, and a warning where they are few.
fn cores_of_rank(local_size: usize) -> (usize, Option<String>) {
    let usable = available_parallelism().map_or(1, |n| n.get());
    share_of_cores(usable, cores_of_host().unwrap_or(usable), local_size)
}

/// Threads for one of `local_size` ranks that may use `usable` of the host's `cores`.
fn share_of_cores(usable: usize, cores: usize, local_size: usize) -> (usize, Option<String>) {
    // Fewer cores than ranks, on a host with more: the launcher has bound every rank to cores of its own.
    if usable >= local_size || usable == cores {
        return ((usable / local_size).max(1), None);
    }
    let warning = (cores / local_size > usable).then(|| {
        format!(
            "each rank is bound to {usable} of this host's {cores} cores; `mpirun --bind-to none` shares them out"
        )
    });
    (usable, warning)
}

/// Cores that this process may use, or its host has, whichever are more.
pub fn n_cores() -> usize {
    let usable = available_parallelism().map_or(1, |n| n.get());
    cores_of_host().unwrap_or(usable).max(usable)
}

/// Cores of this host, also those this process may not use.
fn cores_of_host() -> Option<usize> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    Some(cpuinfo.lines().filter(|line| line.starts_with("processor")).count()).filter(|cores| *cores > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_the_cores_of_their_host() {
        assert_eq!(share_of_cores(64, 64, 1), (64, None));
        assert_eq!(share_of_cores(64, 64, 4), (16, None));
        assert_eq!(share_of_cores(7, 64, 4), (1, None));
        assert_eq!(share_of_cores(2, 2, 3), (1, None));
        assert_eq!(share_of_cores(1, 2, 2), (1, None));
        let (share, warning) = share_of_cores(1, 64, 2);
        assert_eq!(share, 1);
        assert!(warning.unwrap().starts_with("each rank is bound to 1 of this host's 64 cores"));
    }

    #[test]
    fn the_config_writes_a_device_in_lower_case() {
        assert_eq!(serde_json::from_str::<DeviceChoice>("\"cuda\"").unwrap(), DeviceChoice::Cuda);
        assert_eq!(serde_json::to_string(&DeviceChoice::Auto).unwrap(), "\"auto\"");
    }
}
