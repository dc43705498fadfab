//! Memory that a rank may use, and the errors of memory that was refused.

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

/// Memory that is left, and what limits it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available {
    /// How much.
    pub bytes: u64,
    /// As a message names it.
    pub what: &'static str,
}

/// What the processes of this host can still get together: its free memory, within the limits of the cgroup.
pub fn of_host() -> Option<Available> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok().and_then(|text| of_meminfo(&text));
    let machine = meminfo.map(|bytes| Available { bytes, what: "free on the host" });
    let cgroup =
        fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| of_cgroup(&text, Path::new("/")));
    let cgroup = cgroup.map(|bytes| Available { bytes, what: "left of the cgroup's memory limit" });
    machine.into_iter().chain(cgroup).min_by_key(|available| available.bytes)
}

/// What this process can still get by itself: what is left of its address space (`ulimit -v`).
pub fn of_process() -> Option<Available> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let bytes = of_limits(&limits)?.saturating_sub(kib_of(&status, "VmSize:")?);
    Some(Available { bytes, what: "left of the address space (`ulimit -v`)" })
}

/// What is free on a GPU.
pub fn of_device(device: Device) -> Option<Available> {
    let Device::Cuda(gpu) = device else { return None };
    let context = CudaContext::new(gpu).ok()?;
    let (free, _) = context.mem_get_info().ok()?;
    Some(Available { bytes: free as u64, what: "free on the GPU" })
}

/// The bytes of a line `name N kB`.
fn kib_of(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

fn of_meminfo(text: &str) -> Option<u64> {
    let swap = kib_of(text, "SwapFree:").unwrap_or(0);
    Some(kib_of(text, "MemAvailable:")?.saturating_add(swap))
}

fn of_limits(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix("Max address space"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// What is left of the tightest limit of the cgroup that `text`, a `/proc/self/cgroup`, names, or one above it; none
/// without a limit. `root`: where `/sys` lies.
fn of_cgroup(text: &str, root: &Path) -> Option<u64> {
    let mut left = None;
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
        // In a container the path may be that of the host, which is not mounted here: then the mount itself is ours.
        let ours = mount.join(path.trim_start_matches('/'));
        for folder in ours.ancestors().take_while(|folder| folder.starts_with(&mount)) {
            left = left.into_iter().chain(left_of(folder, names)).min();
        }
    }
    left
}

fn left_of(folder: &Path, [limit, usage, cache]: [&str; 3]) -> Option<u64> {
    let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    let limit = number(limit)?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    // Files that nobody reads just now are given up first.
    let cache = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse().ok()).unwrap_or(0);
    let used = number(usage)?.saturating_sub(cache);
    // The first kind of cgroup writes no limit as nearly 2^63.
    (limit < 1 << 62).then(|| limit.saturating_sub(used))
}

/// Bytes as a message names them.
pub fn in_words(bytes: u128) -> String {
    let gib = bytes as f64 / (1u64 << 30) as f64;
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{:.1} MiB", gib * 1024.0) }
}

/// What the process is doing, for a message about memory that was refused.
static PHASE: Mutex<String> = Mutex::new(String::new());

/// Notes what the process does from now on, as `training on day 3`.
pub fn set_phase(phase: impl Into<String>) {
    *PHASE.lock().unwrap_or_else(PoisonError::into_inner) = phase.into();
}

/// The phase as the end of a message: empty, or ` while training on day 3`.
pub fn phase() -> String {
    let phase = PHASE.lock().unwrap_or_else(PoisonError::into_inner);
    if phase.is_empty() { String::new() } else { format!(" while {phase}") }
}

/// What a panic says if memory was refused, on one line with the bytes that were asked for and the phase; none of any
/// other panic. libtorch throws where memory is refused, and tch panics with the text.
pub fn refused(payload: &(dyn Any + Send)) -> Option<String> {
    refused_text(panic_text(payload)?).map(|refused| refused + &phase())
}

/// Runs a command. A panic that says that memory was refused, on whichever thread, becomes an error with what it says.
///
/// # Errors
/// Memory was refused.
pub fn catch<T, E>(command: impl FnOnce() -> Result<T, E>) -> Result<Result<T, E>, String> {
    static REFUSED: Mutex<Option<String>> = Mutex::new(None);
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| match refused(info.payload()) {
        Some(text) => *REFUSED.lock().unwrap_or_else(PoisonError::into_inner) = Some(text),
        None => before(info),
    }));
    // What the command was working on is not looked at again.
    let done = panic::catch_unwind(AssertUnwindSafe(command));
    let noted = REFUSED.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (done, noted) {
        (Ok(Ok(value)), _) => Ok(Ok(value)),
        // A thread that panicked has left the others without what they waited for.
        (_, Some(refused)) => Err(refused),
        (Ok(Err(error)), None) => Ok(Err(error)),
        (Err(payload), None) => panic::resume_unwind(payload),
    }
}

/// Ends the process, which was refused `n_bytes`, with exit code 1 and a message for which it needs no memory. A
/// launcher then ends the other ranks.
pub fn end_process(n_bytes: usize) -> ! {
    static ENDS: AtomicBool = AtomicBool::new(false);
    // The message may be refused memory as well.
    if !ENDS.swap(true, Ordering::Relaxed) {
        let gib = n_bytes as f64 / (1u64 << 30) as f64;
        let mut stderr = io::stderr();
        let _ = write!(stderr, "error: cannot allocate memory: {gib:.1} GiB asked for");
        if let Ok(phase) = PHASE.try_lock()
            && !phase.is_empty()
        {
            let _ = write!(stderr, " while {phase}");
        }
        for variable in [c"OMPI_COMM_WORLD_RANK", c"SLURM_PROCID"] {
            // SAFETY: the name is terminated; nothing sets variables while the process ends.
            let rank = unsafe { libc::getenv(variable.as_ptr()) };
            if !rank.is_null() {
                // SAFETY: variables are terminated texts.
                let rank = unsafe { CStr::from_ptr(rank) }.to_str().unwrap_or_default();
                let _ = write!(stderr, ", on rank {rank}");
                break;
            }
        }
        let _ = writeln!(stderr);
    }
    // SAFETY: it takes any number. Handlers of libraries are left out, as they would ask for memory.
    unsafe { libc::_exit(1) }
}

fn refused_text(text: &str) -> Option<String> {
    let after = |mark: &str| text.split_once(mark).map(|(_, after)| after);
    if let Some(rest) = after("can't allocate memory") {
        let asked = rest.split_once("tried to allocate ").map(|(_, after)| after).unwrap_or_default();
        let digits: String = asked.chars().take_while(char::is_ascii_digit).collect();
        let asked = digits.parse().map_or(String::new(), |bytes| format!(": {} asked for", in_words(bytes)));
        return Some(format!("cannot allocate memory{asked}"));
    }
    if let Some(rest) = after("CUDA out of memory") {
        // `. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 10.00 MiB is free. …`
        let line = rest.lines().next().unwrap_or_default();
        let facts: Vec<&str> = line.split(". ").filter(|fact| !fact.is_empty()).take(2).collect();
        return Some(format!(
            "cannot allocate memory of the GPU: {}",
            facts.join(", ").trim_end_matches('.')
        ));
    }
    // Sizes that are no longer numbers, as of a tensor of 2^62 items.
    let overflows = ["Storage size calculation overflowed", "numel: integer multiplication overflow"];
    let is_refused =
        ["std::bad_alloc", "Cannot allocate memory", "CUDA error: out of memory", "out of memory"];
    let is_overflow = overflows.iter().any(|mark| text.contains(mark));
    (is_overflow || is_refused.iter().any(|mark| text.contains(mark)))
        .then(|| "cannot allocate memory".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_within_all_limits() {
        let meminfo = "MemTotal: 100 kB\nMemAvailable:    70 kB\nSwapFree:  5 kB\n";
        assert_eq!(of_meminfo(meminfo), Some(75 << 10));
        let limits =
            |soft: &str| format!("Limit  Soft\nMax address space         {soft}   unlimited  bytes\n");
        assert_eq!((of_limits(&limits("4096")), of_limits(&limits("unlimited"))), (Some(4096), None));
    }

    #[test]
    fn a_cgroup_is_bound_by_those_above_it() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        // The second kind: a job of a slice, of which the slice has less left.
        write("sys/fs/cgroup/slice/memory.max", "1000\n");
        write("sys/fs/cgroup/slice/memory.current", "900\n");
        write("sys/fs/cgroup/slice/memory.stat", "anon 5\ninactive_file 300\n");
        write("sys/fs/cgroup/slice/job/memory.max", "max\n");
        assert_eq!(of_cgroup("0::/slice/job\n", dir.path()), Some(400));
        assert_eq!(of_cgroup("0::/other\n", dir.path()), None);
        // The first kind, in a container that sees its own cgroup as the root.
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "5000\n");
        write("sys/fs/cgroup/memory/memory.usage_in_bytes", "4999\n");
        write("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 99\n");
        assert_eq!(of_cgroup("4:cpu,memory:/docker/abc\n", dir.path()), Some(100));
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(of_cgroup("4:memory:/docker/abc\n", dir.path()), None);
    }

    #[test]
    fn refused_memory_is_told_from_other_errors() {
        let cpu = "called `Result::unwrap()` on an `Err` value: Torch(\"[enforce fail at alloc_cpu.cpp:124] err == 0. \
                   DefaultCPUAllocator: can't allocate memory: you tried to allocate 4398046511104 bytes. Error code 12 \
                   (Cannot allocate memory)\\nException raised from alloc_cpu\")";
        assert_eq!(refused_text(cpu).unwrap(), "cannot allocate memory: 4096.0 GiB asked for");
        let gpu = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 10.00 \
                   MiB is free. Process 1 has 79 GiB memory in use.\nException raised from malloc";
        assert_eq!(
            refused_text(gpu).unwrap(),
            "cannot allocate memory of the GPU: Tried to allocate 20.00 MiB, GPU 0 has a total capacity of 79.11 GiB of \
             which 10.00 MiB is free"
        );
        assert_eq!(refused_text("std::bad_alloc").unwrap(), "cannot allocate memory");
        assert_eq!(refused_text("index out of range"), None);
    }
}
