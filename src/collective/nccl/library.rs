//! Bindings of the functions of `libnccl.so.2` that the backend calls.
//!
//! cudarc provides NCCL's types. Its loader is not used: it searches for `libnccl.so` only, which
//! the Python wheels do not contain, and panics if the search fails.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs;
use std::path::PathBuf;

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::Library;

/// `ncclResult_t` as an integer, because a newer NCCL may return values that an enum lacks.
type Code = c_int;

/// The loaded NCCL. It is never unloaded.
pub(super) struct Nccl {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> Code,
    get_version: unsafe extern "C" fn(*mut c_int) -> Code,
    get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    get_last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    pub comm_init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> Code,
    pub comm_destroy: unsafe extern "C" fn(ncclComm_t) -> Code,
    pub comm_get_async_error: unsafe extern "C" fn(ncclComm_t, *mut Code) -> Code,
    pub all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        cudaStream_t,
    ) -> Code,
    pub broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        c_int,
        ncclComm_t,
        cudaStream_t,
    ) -> Code,
    pub all_gather: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclComm_t,
        cudaStream_t,
    ) -> Code,
    pub reduce_scatter: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        cudaStream_t,
    ) -> Code,
}

impl Nccl {
    /// Finds the NCCL that libtorch has loaded, the system's, or the one installed next to
    /// libtorch.
    ///
    /// # Errors
    /// No library is found, and the error holds the loader's message for each path; or the library
    /// is older than [`OLDEST`].
    pub fn load() -> Result<&'static Self, String> {
        let mut errors = Vec::new();
        for path in [Some(PathBuf::from("libnccl.so.2")), wheel_library()].into_iter().flatten() {
            // SAFETY: loading NCCL has no precondition.
            let library = unsafe { Library::new(&path) };
            match library.and_then(|library| Self::bind(Box::leak(Box::new(library)))) {
                Ok(nccl) => match nccl.version() {
                    Some(version) if version < OLDEST => errors.push(format!(
                        "NCCL {} is too old: {} or newer is needed",
                        version_text(version),
                        version_text(OLDEST)
                    )),
                    _ => return Ok(Box::leak(Box::new(nccl))),
                },
                Err(error) => errors.push(error.to_string()),
            }
        }
        Err(errors.join("; "))
    }

    fn bind(library: &'static Library) -> Result<Self, libloading::Error> {
        // SAFETY: the types of the fields match nccl.h 2.28, and NCCL keeps them within version 2.
        // The library is leaked, so the functions outlive the struct.
        unsafe {
            Ok(Self {
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
                get_version: *library.get(b"ncclGetVersion\0")?,
                get_error_string: *library.get(b"ncclGetErrorString\0")?,
                get_last_error: *library.get(b"ncclGetLastError\0")?,
                comm_init_rank: *library.get(b"ncclCommInitRank\0")?,
                comm_destroy: *library.get(b"ncclCommDestroy\0")?,
                comm_get_async_error: *library.get(b"ncclCommGetAsyncError\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
                broadcast: *library.get(b"ncclBroadcast\0")?,
                all_gather: *library.get(b"ncclAllGather\0")?,
                reduce_scatter: *library.get(b"ncclReduceScatter\0")?,
            })
        }
    }

    /// The version as NCCL returns it.
    fn version(&self) -> Option<c_int> {
        let mut version = 0;
        // SAFETY: NCCL writes one integer.
        let code = unsafe { (self.get_version)(&mut version) };
        (code == 0).then_some(version)
    }

    /// The version, such as `2.28.9`.
    pub fn version_name(&self) -> String {
        self.version().map_or("of an unknown version".to_owned(), version_text)
    }

    /// Creates the id of a new communicator. One rank creates it and sends it to all. Needs no GPU.
    pub fn unique_id(&self) -> Result<ncclUniqueId, String> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: `id` is writable and has the size that NCCL fills.
        match unsafe { (self.get_unique_id)(&mut id) } {
            0 => Ok(id),
            code => Err(self.error_text(code, std::ptr::null_mut())),
        }
    }

    /// NCCL's message for an error, with the detail that it keeps for `comm`, which may be null.
    pub fn error_text(&self, code: Code, comm: ncclComm_t) -> String {
        // SAFETY: both functions return null or a terminated text that NCCL keeps. `comm` is null
        // or a communicator that the caller keeps alive.
        let [name, detail] =
            unsafe { [(self.get_error_string)(code), (self.get_last_error)(comm)] }.map(|text| {
                if text.is_null() {
                    return String::new();
                }
                // SAFETY: not null, so a terminated text, as above.
                unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
            });
        if detail.is_empty() { name } else { format!("{name}: {detail}") }
    }
}

/// The first version whose calls can be captured in a CUDA graph.
const OLDEST: c_int = 20_906;

/// `10000 major + 100 minor + patch` since version 2.9, which changed the format.
fn version_text(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// Path of NCCL in a Python installation, in which `torch/lib` and `nvidia/nccl/lib` have one
/// parent.
fn wheel_library() -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    let libtorch = PathBuf::from(&line[line.find('/')?..]);
    Some(libtorch.ancestors().nth(3)?.join("nvidia/nccl/lib/libnccl.so.2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::print_stdout, reason = "a skipped test prints the reason")]
    fn nccl_creates_ids_without_a_gpu_or_the_error_names_the_searched_paths() {
        match Nccl::load() {
            Ok(nccl) => {
                let ids = [nccl.unique_id().unwrap(), nccl.unique_id().unwrap()];
                assert_ne!(ids[0], ids[1]);
                assert!(nccl.version_name().starts_with("2."), "{}", nccl.version_name());
                assert!(nccl.error_text(4, std::ptr::null_mut()).starts_with("invalid argument"));
            }
            Err(errors) => {
                println!("skipped: no NCCL on this host");
                assert!(errors.contains("libnccl.so.2"), "{errors}");
            }
        }
    }
}
