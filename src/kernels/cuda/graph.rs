//! CUDA graphs: the work of a whole training step as one launch.

use std::ffi::{c_char, c_int, c_void};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use bireme_base::console::{panic_text, without_panic_messages};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::guarded::guarded;

/// The shared object of graph.cpp.
const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libbireme_graph.so"));

/// Functions of graph.cpp, which return 0 or write a message.
struct Functions {
    enter_stream: unsafe extern "C" fn(c_int, *mut c_char, usize) -> c_int,
    begin: unsafe extern "C" fn(*mut *mut c_void, *mut c_char, usize) -> c_int,
    end: unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int,
    replay: unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int,
    free: unsafe extern "C" fn(*mut c_void),
}

/// Length of the messages of libtorch that are kept.
const MESSAGE_BYTES: usize = 1024;

fn functions() -> Result<&'static Functions, String> {
    static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
    FUNCTIONS.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// Loads the library behind libtorch's CUDA library, whose functions it calls.
fn load() -> Result<Functions, String> {
    // SAFETY: the name is a terminated text.
    let fd = unsafe { libc::memfd_create(c"bireme-graph".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(format!("memfd_create: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was opened above and has no other owner.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(LIBRARY).map_err(|error| error.to_string())?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: the library runs no code when it is loaded. All functions that it needs are looked up
    // here, so that a libtorch without one of them is an error.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    let library = library.map_err(|error| format!("libtorch's CUDA graphs: {error}"))?;
    // SAFETY: the types are those in graph.cpp, and the library is leaked below.
    let found = unsafe {
        (|| {
            Ok(Functions {
                enter_stream: *library.get(b"bireme_enter_stream\0")?,
                begin: *library.get(b"bireme_graph_begin\0")?,
                end: *library.get(b"bireme_graph_end\0")?,
                replay: *library.get(b"bireme_graph_replay\0")?,
                free: *library.get(b"bireme_graph_free\0")?,
            })
        })()
    };
    std::mem::forget(library);
    found.map_err(|error: libloading::Error| error.to_string())
}

/// Makes a stream that can be captured the calling thread's current stream on GPU number `gpu`, for
/// the rest of the process. libtorch's CUDA library is loaded.
///
/// # Errors
/// libtorch lacks a function, or has no stream.
pub fn enter_stream(gpu: usize) -> Result<(), String> {
    let functions = functions()?;
    // SAFETY: the type is that in graph.cpp.
    guarded(MESSAGE_BYTES, |error, n| unsafe { (functions.enter_stream)(gpu as c_int, error, n) })
}

/// Recorded work of a GPU. The memory that it writes to stays as it is until the graph is dropped.
pub struct Graph {
    /// Owned.
    graph: *mut c_void,
    functions: &'static Functions,
}

impl Graph {
    /// Records the work that `record` queues on the current stream, without running it. Nothing in
    /// it may wait for the GPU, copy from memory that is not pinned, or have a size that only the
    /// GPU knows.
    ///
    /// # Errors
    /// `record` panics, as tch does when libtorch refuses an operation, or libtorch cannot make a
    /// graph of the work; the message says why. Nothing was run.
    pub fn capture<T>(record: impl FnOnce() -> T) -> Result<(Self, T), String> {
        let functions = functions()?;
        let mut graph = std::ptr::null_mut();
        // SAFETY: the type is that in graph.cpp, and `graph` is writable.
        let begun =
            guarded(MESSAGE_BYTES, |error, n| unsafe { (functions.begin)(&mut graph, error, n) });
        let captured = Self { graph, functions };
        begun?;
        let recorded = without_panic_messages(|| catch_unwind(AssertUnwindSafe(record)));
        // SAFETY: `graph` is recording.
        let ended = guarded(MESSAGE_BYTES, |error, n| unsafe { (functions.end)(graph, error, n) });
        match recorded {
            Ok(result) => ended.map(|()| (captured, result)),
            Err(panic) => Err(refused_operation(panic_text(&*panic).unwrap_or_default())),
        }
    }

    /// Queues the recorded work on the current stream.
    ///
    /// # Errors
    /// The launch fails.
    pub fn replay(&self) -> Result<(), String> {
        let Self { graph, functions } = self;
        // SAFETY: the graph was captured, and is alive.
        guarded(MESSAGE_BYTES, |error, n| unsafe { (functions.replay)(*graph, error, n) })
    }
}

/// What libtorch says of an operation, from the text of tch's panic, without the stack.
fn refused_operation(panic: &str) -> String {
    let message = panic.split_once("Torch(\"").map_or(panic, |(_, message)| message);
    message.split("\\n").next().unwrap_or(message).to_owned()
}

impl Drop for Graph {
    fn drop(&mut self) {
        if !self.graph.is_null() {
            // SAFETY: the graph is owned, and not used again.
            unsafe { (self.functions.free)(self.graph) };
        }
    }
}
