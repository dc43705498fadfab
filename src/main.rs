//! Arguments in, exit code out.

use std::alloc::{GlobalAlloc, Layout, System};
use std::env;
use std::ffi::{CStr, CString, OsStr, c_char, c_int};
use std::os::unix::ffi::OsStrExt;

use clap::Parser;

use bireme::cli::Cli;
use bireme::device::memory;

/// The system's allocator. Where it has no memory, Rust would abort without a word of what the process was doing.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn allocated(memory: *mut u8, n_bytes: usize) -> *mut u8 {
    if memory.is_null() { memory::end_process(n_bytes) } else { memory }
}

// SAFETY: each call is passed on to the system's allocator as it is, and what that returns is returned.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        allocated(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        allocated(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, n_bytes: usize) -> *mut u8 {
        // SAFETY: as above.
        allocated(unsafe { System.realloc(memory, layout, n_bytes) }, n_bytes)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// What libraries read from the environment as they are loaded, where it is not set.
const ENVIRONMENT: [&CStr; 2] = [
    // OpenMP's threads wait for work by spinning, by default for milliseconds, in which they keep others from the cores.
    c"GOMP_SPINCOUNT=10000",
    // Without it cuBLAS may give other bits each time.
    c"CUBLAS_WORKSPACE_CONFIG=:4096:8",
];

/// Called before the initialisers of libraries, of which libtorch's take a quarter of a second.
#[used]
#[unsafe(link_section = ".preinit_array")]
static BEFORE_LIBRARIES: extern "C" fn(c_int, Texts, Texts) = before_libraries;

/// Terminated texts, and a null pointer behind the last.
type Texts = *const *const c_char;

/// Who asks for help, or mistypes, is answered at once; then the program starts once more where the environment lacks something.
extern "C" fn before_libraries(_: c_int, arguments: Texts, variables: Texts) {
    keep_output_from_ending_work();
    let words = texts(arguments).into_iter().map(|word| {
        // SAFETY: it is a terminated text.
        OsStr::from_bytes(unsafe { CStr::from_ptr(word) }.to_bytes())
    });
    if let Err(answer) = Cli::try_parse_from(words) {
        std::process::exit(bireme::cli::answer(&answer));
    }
    let mut environment = texts(variables);
    let n_given = environment.len();
    for variable in ENVIRONMENT {
        let name = variable.to_bytes().split_inclusive(|&byte| byte == b'=').next().unwrap_or_default();
        // SAFETY: they are terminated texts.
        let is_set = environment.iter().any(|&of| unsafe { CStr::from_ptr(of) }.to_bytes().starts_with(name));
        if !is_set {
            environment.push(variable.as_ptr());
        }
    }
    let program = env::current_exe().ok().and_then(|path| CString::new(path.as_os_str().as_bytes()).ok());
    if let (Some(program), true) = (program, environment.len() > n_given) {
        environment.push(std::ptr::null());
        // SAFETY: texts, terminated as they should be. Where it fails the program goes on as it is.
        unsafe { libc::execve(program.as_ptr(), arguments, environment.as_ptr()) };
    }
}

/// Output that cannot be written is an error of a call and not a signal, and libraries open none of their files in the
/// place of a standard stream that was closed at the start.
fn keep_output_from_ending_work() {
    for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
        // SAFETY: no handler is installed, and no other thread runs yet.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    for stream in 0..3 {
        // SAFETY: the first call only asks; the second opens the lowest free descriptor, which is this one.
        unsafe {
            if libc::fcntl(stream, libc::F_GETFD) == -1 {
                libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            }
        }
    }
}

fn texts(of: Texts) -> Vec<*const c_char> {
    // SAFETY: the loader gives what `main` of a C program is given, which is there to the end.
    (0..).map(|i| unsafe { *of.add(i) }).take_while(|text| !text.is_null()).collect()
}

fn main() {
    std::process::exit(bireme::cli::run(Cli::parse()));
}
