//! Available memory, settings of the memory allocator, and the handling of failed allocations.

use std::any::Any;
use std::ffi::CStr;
use std::fs;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use bireme_base::console::panic_text;
use cudarc::driver::CudaContext;
use tch::Device;

/// Available memory and its limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available {
    pub bytes: u64,
    /// The limit, for messages.
    pub what: &'static str,
}

/// Memory that all processes of this host can still allocate together: the free memory, within the
/// limits of the cgroup.
pub fn available_on_host() -> Option<Available> {
    let meminfo =
        fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_in_meminfo(&text));
    let machine = meminfo.map(|bytes| Available { bytes, what: "free on the host" });
    let cgroup = fs::read_to_string("/proc/self/cgroup")
        .ok()
        .and_then(|text| available_in_cgroup(&text, Path::new("/")));
    let cgroup = cgroup.map(|bytes| Available { bytes, what: "left of the cgroup's memory limit" });
    machine.into_iter().chain(cgroup).min_by_key(|available| available.bytes)
}

/// Memory that this process can still allocate within the limit of its address space (`ulimit -v`).
pub fn available_to_process() -> Option<Available> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let bytes = address_space_limit(&limits)?.saturating_sub(bytes_in_line(&status, "VmSize:")?);
    Some(Available { bytes, what: "left of the address space (`ulimit -v`)" })
}

/// Free memory of a GPU; `None` for the CPU.
pub fn available_on_device(device: Device) -> Option<Available> {
    let Device::Cuda(gpu) = device else { return None };
    let context = CudaContext::new(gpu).ok()?;
    let (free, _) = context.mem_get_info().ok()?;
    Some(Available { bytes: free as u64, what: "free on the GPU" })
}

/// Bytes in the line `name N kB`.
fn bytes_in_line(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

fn available_in_meminfo(text: &str) -> Option<u64> {
    let swap = bytes_in_line(text, "SwapFree:").unwrap_or(0);
    Some(bytes_in_line(text, "MemAvailable:")?.saturating_add(swap))
}

fn address_space_limit(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix("Max address space"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Smallest remaining memory of a cgroup and its ancestors; `None` without a limit. `text` is the
/// content of `/proc/self/cgroup`, and `root` is the folder that contains `sys`.
fn available_in_cgroup(text: &str, root: &Path) -> Option<u64> {
    let mut available = None;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mount, names) = if controllers.is_empty() {
            ("sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file "])
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (
                "sys/fs/cgroup/memory",
                ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "],
            )
        } else {
            continue;
        };
        let mount = root.join(mount);
        // In a container the path may be the host's, which is not mounted. Then no file is found
        // below the mount, and the mount itself is the container's cgroup.
        let cgroup = mount.join(path.trim_start_matches('/'));
        for folder in cgroup.ancestors().take_while(|folder| folder.starts_with(&mount)) {
            available = available.into_iter().chain(available_in_folder(folder, names)).min();
        }
    }
    available
}

fn available_in_folder(folder: &Path, [limit, usage, cache]: [&str; 3]) -> Option<u64> {
    let number =
        |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    let limit = number(limit)?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    // The kernel reclaims inactive page cache before it refuses memory, so it counts as available.
    let cache =
        stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse().ok()).unwrap_or(0);
    let used = number(usage)?.saturating_sub(cache);
    // Version 1 of cgroups writes nearly 2^63 for a group without a limit.
    (limit < 1 << 62).then(|| limit.saturating_sub(used))
}

/// Bytes in GiB or MiB, for messages.
pub fn format_bytes(bytes: u128) -> String {
    let gib = bytes as f64 / (1u64 << 30) as f64;
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{:.1} MiB", gib * 1024.0) }
}

/// Makes glibc keep freed memory for later allocations. By default it returns large blocks to the
/// system at once, and faulting in zeroed pages again for every operation takes a quarter of a
/// step's time.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX)] {
        // SAFETY: `mallopt` takes numbers, only changes when memory is returned, and may be called
        // at any time.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Returns freed memory to the system. Call it after freeing large buffers that are not allocated
/// again.
pub fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` may be called at any time.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Current phase of the program, for messages about failed allocations.
static PHASE: Mutex<String> = Mutex::new(String::new());

/// Sets the current phase, such as `training on day 3`.
pub fn set_phase(phase: impl Into<String>) {
    *PHASE.lock().unwrap_or_else(PoisonError::into_inner) = phase.into();
}

/// The phase as a suffix of a message: empty, or ` while training on day 3`.
pub fn phase() -> String {
    let phase = PHASE.lock().unwrap_or_else(PoisonError::into_inner);
    if phase.is_empty() { String::new() } else { format!(" while {phase}") }
}

/// One-line message with the requested bytes and the phase if a panic was caused by a failed
/// allocation; `None` for other panics. libtorch throws when an allocation fails, and tch panics
/// with the message.
pub fn allocation_failure(payload: &(dyn Any + Send)) -> Option<String> {
    allocation_message(panic_text(payload)?).map(|message| message + &phase())
}

/// Runs a command. A panic of any thread that was caused by a failed allocation becomes an error
/// with its message.
///
/// # Errors
/// An allocation failed.
pub fn catch<T, E>(command: impl FnOnce() -> Result<T, E>) -> Result<Result<T, E>, String> {
    static FAILURE: Mutex<Option<String>> = Mutex::new(None);
    let previous_hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| match allocation_failure(info.payload()) {
        Some(message) => *FAILURE.lock().unwrap_or_else(PoisonError::into_inner) = Some(message),
        None => previous_hook(info),
    }));
    // Unwind safe: values that the command was changing are not used again.
    let result = panic::catch_unwind(AssertUnwindSafe(command));
    let failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (result, failure) {
        (Ok(Ok(value)), _) => Ok(Ok(value)),
        // If the allocation failed on another thread, the error or panic here is only its
        // consequence.
        (_, Some(failure)) => Err(failure),
        (Ok(Err(error)), None) => Ok(Err(error)),
        (Err(payload), None) => panic::resume_unwind(payload),
    }
}

/// Ends the process after a failed allocation of `n_bytes`, with exit code 1 and a message that is
/// written without allocating. The launcher then ends the other ranks.
pub fn end_process(n_bytes: usize) -> ! {
    static IS_ENDING: AtomicBool = AtomicBool::new(false);
    // An allocation for the message may fail too: then skip the message.
    if !IS_ENDING.swap(true, Ordering::Relaxed) {
        let gib = n_bytes as f64 / (1u64 << 30) as f64;
        let mut stderr = io::stderr();
        let _ = write!(stderr, "error: cannot allocate memory: {gib:.1} GiB asked for");
        if let Ok(phase) = PHASE.try_lock()
            && !phase.is_empty()
        {
            let _ = write!(stderr, " while {phase}");
        }
        for variable in [c"OMPI_COMM_WORLD_RANK", c"SLURM_PROCID"] {
            // SAFETY: the name is terminated, and nothing sets variables while the process ends.
            let rank = unsafe { libc::getenv(variable.as_ptr()) };
            if !rank.is_null() {
                // SAFETY: values of environment variables are terminated.
                let rank = unsafe { CStr::from_ptr(rank) }.to_str().unwrap_or_default();
                let _ = write!(stderr, ", on rank {rank}");
                break;
            }
        }
        let _ = writeln!(stderr);
    }
    // SAFETY: `_exit` takes any number. It skips the exit handlers of libraries, which would
    // allocate.
    unsafe { libc::_exit(1) }
}

/// The message of a failed allocation, from the text of libtorch's, CUDA's or the C++ library's
/// error.
fn allocation_message(text: &str) -> Option<String> {
    let after = |mark: &str| text.split_once(mark).map(|(_, after)| after);
    if let Some(rest) = after("can't allocate memory") {
        let size =
            rest.split_once("tried to allocate ").map(|(_, after)| after).unwrap_or_default();
        let digits: String = size.chars().take_while(char::is_ascii_digit).collect();
        let size = digits
            .parse()
            .map_or(String::new(), |bytes| format!(": {} asked for", format_bytes(bytes)));
        return Some(format!("cannot allocate memory{size}"));
    }
    if let Some(rest) = after("CUDA out of memory") {
        // `. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which …`: the
        // first two sentences hold the numbers.
        let line = rest.lines().next().unwrap_or_default();
        let facts: Vec<&str> = line.split(". ").filter(|fact| !fact.is_empty()).take(2).collect();
        return Some(format!(
            "cannot allocate memory of the GPU: {}",
            facts.join(", ").trim_end_matches('.')
        ));
    }
    // The size of the tensor overflows 64 bits, for example with 2^62 items.
    let overflows =
        ["Storage size calculation overflowed", "numel: integer multiplication overflow"];
    let failures =
        ["std::bad_alloc", "Cannot allocate memory", "CUDA error: out of memory", "out of memory"];
    let is_overflow = overflows.iter().any(|mark| text.contains(mark));
    (is_overflow || failures.iter().any(|mark| text.contains(mark)))
        .then(|| "cannot allocate memory".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_and_the_address_space_limit_are_parsed() {
        let meminfo = "MemTotal: 100 kB\nMemAvailable:    70 kB\nSwapFree:  5 kB\n";
        assert_eq!(available_in_meminfo(meminfo), Some(75 << 10));
        let limits = |soft: &str| {
            format!("Limit  Soft\nMax address space         {soft}   unlimited  bytes\n")
        };
        assert_eq!(
            (address_space_limit(&limits("4096")), address_space_limit(&limits("unlimited"))),
            (Some(4096), None)
        );
    }

    #[test]
    fn a_cgroup_is_limited_by_its_ancestors() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        // Version 2: a job in a slice, and the slice has less memory left.
        write("sys/fs/cgroup/slice/memory.max", "1000\n");
        write("sys/fs/cgroup/slice/memory.current", "900\n");
        write("sys/fs/cgroup/slice/memory.stat", "anon 5\ninactive_file 300\n");
        write("sys/fs/cgroup/slice/job/memory.max", "max\n");
        assert_eq!(available_in_cgroup("0::/slice/job\n", dir.path()), Some(400));
        assert_eq!(available_in_cgroup("0::/other\n", dir.path()), None);
        // Version 1, in a container whose mount is its own cgroup.
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "5000\n");
        write("sys/fs/cgroup/memory/memory.usage_in_bytes", "4999\n");
        write("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 99\n");
        assert_eq!(available_in_cgroup("4:cpu,memory:/docker/abc\n", dir.path()), Some(100));
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(available_in_cgroup("4:memory:/docker/abc\n", dir.path()), None);
    }

    #[test]
    fn failed_allocations_are_distinguished_from_other_errors() {
        let cpu = "called `Result::unwrap()` on an `Err` value: Torch(\"[enforce fail at \
                   alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you \
                   tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate \
                   memory)\\nException raised from alloc_cpu\")";
        assert_eq!(
            allocation_message(cpu).unwrap(),
            "cannot allocate memory: 4096.0 GiB asked for"
        );
        let gpu = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of \
                   79.11 GiB of which 10.00 MiB is free. Process 1 has 79 GiB memory in use.\n\
                   Exception raised from malloc";
        assert_eq!(
            allocation_message(gpu).unwrap(),
            "cannot allocate memory of the GPU: Tried to allocate 20.00 MiB, GPU 0 has a total \
             capacity of 79.11 GiB of which 10.00 MiB is free"
        );
        assert_eq!(allocation_message("std::bad_alloc").unwrap(), "cannot allocate memory");
        assert_eq!(allocation_message("index out of range"), None);
    }
}
