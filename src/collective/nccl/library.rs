//! The functions of `libnccl.so.2` that are used here.
//!
//! cudarc brings NCCL's types, but its own loader looks for `libnccl.so` alone, which the Python wheels do not
//! hold, and panics when it finds none.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs;
use std::path::PathBuf;

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::Library;

/// `ncclResult_t` as the integer it is: a newer NCCL may return values that this program does not know.
type Code = c_int;

/// NCCL, loaded for as long as the process lives.
pub(super) struct Nccl {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> Code,
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
    /// Takes the NCCL that libtorch has loaded, or the system's, or the one installed beside libtorch.
    ///
    /// # Errors
    /// What the loader said about each place.
    pub fn load() -> Result<&'static Self, String> {
        let mut tried = Vec::new();
        for place in [Some(PathBuf::from("libnccl.so.2")), beside_libtorch()].into_iter().flatten() {
            // SAFETY: NCCL's initialisers have no precondition.
            match unsafe { Library::new(&place) }.and_then(|library| Self::bind(Box::leak(Box::new(library))))
            {
                Ok(nccl) => return Ok(Box::leak(Box::new(nccl))),
                Err(error) => tried.push(error.to_string()),
            }
        }
        Err(tried.join("; "))
    }

    fn bind(library: &'static Library) -> Result<Self, libloading::Error> {
        // SAFETY: the types of the fields are those of nccl.h 2.28, which NCCL keeps within version 2; the library
        // is leaked, so the functions outlive the struct.
        unsafe {
            Ok(Self {
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
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

    /// A new name for a communicator, to be made by one rank and told to the others. Needs no GPU.
    pub fn unique_id(&self) -> Result<ncclUniqueId, String> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: `id` is writable and of the size that NCCL fills.
        match unsafe { (self.get_unique_id)(&mut id) } {
            0 => Ok(id),
            code => Err(self.text(code, std::ptr::null_mut())),
        }
    }

    /// NCCL's words for an error, with the detail it keeps for `comm`, which may be null.
    pub fn text(&self, code: Code, comm: ncclComm_t) -> String {
        // SAFETY: both return null or a terminated text that lives on in NCCL; `comm` is null or a communicator that
        // the caller keeps alive.
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

/// Where a Python installation keeps NCCL: `torch/lib` and `nvidia/nccl/lib` have one parent.
fn beside_libtorch() -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    let libtorch = PathBuf::from(&line[line.find('/')?..]);
    Some(libtorch.ancestors().nth(3)?.join("nvidia/nccl/lib/libnccl.so.2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::print_stdout, reason = "a skipped test says so")]
    fn nccl_names_communicators_without_a_gpu_or_says_where_it_was_sought() {
        match Nccl::load() {
            Ok(nccl) => {
                let ids = [nccl.unique_id().unwrap(), nccl.unique_id().unwrap()];
                assert_ne!(ids[0], ids[1]);
                assert!(nccl.text(4, std::ptr::null_mut()).starts_with("invalid argument"));
            }
            Err(tried) => {
                println!("skipped: no NCCL on this host, so none was asked for a name");
                assert!(tried.contains("libnccl.so.2"), "{tried}");
            }
        }
    }
}
