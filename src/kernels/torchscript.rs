//! Traces TorchScript modules with several inputs and outputs, which tch cannot.

use std::ffi::{CStr, CString, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use tch::Tensor;
use torch_sys::{C_tensor, CModule_};

use crate::guarded::{guarded, text};

unsafe extern "C" {
    fn bireme_end_tracing(
        module: *mut CModule_,
        outputs: *const *const C_tensor,
        n_outputs: usize,
        arguments: *const *const c_char,
        n_arguments: usize,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;
    fn bireme_abandon_tracing();
    fn bireme_arguments(
        path: *const c_char,
        names: *mut c_char,
        names_capacity: usize,
        error: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

/// Bytes for an error's message, and for the names of arguments.
const CAPACITY: usize = 1 << 16;

/// A module of a trace, freed when dropped.
struct Module(*mut CModule_);

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `atm_create_for_tracing` and is freed nowhere else.
        unsafe { torch_sys::atm_free(self.0) }
    }
}

/// Runs `forward` on example inputs, named as its arguments, and writes the trace as the
/// TorchScript module `path`, whose `forward` takes the inputs in this order and returns the
/// outputs as a tuple. Other tensors become constants, and so do sizes that `forward` reads, except
/// those passed to `topk`: these become the width of the last input, or the number of scores where
/// that is smaller.
///
/// # Errors
/// An error of libtorch.
pub fn trace(
    path: &Path,
    inputs: &[(&str, Tensor)],
    forward: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
) -> Result<(), String> {
    let c_string = |text: &[u8]| CString::new(text).map_err(|error| error.to_string());
    let file = c_string(path.as_os_str().as_bytes())?;
    let names =
        inputs.iter().map(|(name, _)| c_string(name.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    let inputs: Vec<Tensor> = inputs.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
    let mut pointers: Vec<*mut C_tensor> =
        inputs.iter().map(|tensor| tensor.as_ptr().cast_mut()).collect();
    let mut name = c_string(b"Recommender")?.into_bytes_with_nul();
    let count = |n: usize| c_int::try_from(n).map_err(|error| error.to_string());
    // SAFETY: `name` is a C string and `pointers` holds as many live tensors as passed; neither is
    // kept.
    let module = unsafe {
        torch_sys::atm_create_for_tracing(
            name.as_mut_ptr().cast(),
            pointers.as_mut_ptr(),
            count(inputs.len())?,
        )
    };
    last_error()?;
    let module = Module(module);
    // Ends the tracing however this function returns.
    let tracing = Tracing;
    let outputs = forward(&inputs);
    let outputs: Vec<*const C_tensor> = outputs.iter().map(Tensor::as_ptr).collect();
    let ended = guarded(CAPACITY, |error, capacity| {
        let (n_outputs, n_names) = (outputs.len(), names.len());
        let (outputs, names) = (outputs.as_ptr(), names.as_ptr());
        // SAFETY: all pointers are to live values of as many elements as passed, and the buffer has
        // the length passed.
        unsafe { bireme_end_tracing(module.0, outputs, n_outputs, names, n_names, error, capacity) }
    });
    drop(tracing);
    ended?;
    // SAFETY: the module is alive, and the path a C string.
    unsafe { torch_sys::atm_save(module.0, file.as_ptr()) };
    last_error()
}

/// The names of the arguments of a saved module's `forward`.
///
/// # Errors
/// A file that libtorch cannot load.
pub fn arguments(path: &Path) -> Result<Vec<String>, String> {
    let file = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    let mut names = vec![0; CAPACITY];
    guarded(CAPACITY, |error, capacity| {
        // SAFETY: the path is a C string, and both buffers have the lengths passed.
        unsafe { bireme_arguments(file.as_ptr(), names.as_mut_ptr(), names.len(), error, capacity) }
    })?;
    Ok(text(&names).split_whitespace().map(str::to_owned).collect())
}

/// While this exists, libtorch records the operations of this thread.
struct Tracing;

impl Drop for Tracing {
    fn drop(&mut self) {
        // SAFETY: it only clears a thread-local pointer.
        unsafe { bireme_abandon_tracing() }
    }
}

/// The error that libtorch stored in this thread, if any.
fn last_error() -> Result<(), String> {
    // SAFETY: it returns a C string that the caller frees, or null.
    let message = unsafe { torch_sys::get_and_reset_last_err() };
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: as above; it is read before it is freed.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: it was allocated with malloc and is freed once.
    unsafe { libc::free(message.cast()) };
    Err(text)
}
