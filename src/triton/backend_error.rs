//! Errors of the backend and of the server.

use std::any::Any;
use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use bireme_base::console::panic_text;
use bireme_base::message::chain;

use crate::api;

/// An error with the server's code, from which the client's status follows (400 for `INVALID_ARG`),
/// and a message.
#[derive(Clone, Debug)]
pub(crate) struct BackendError {
    code: c_int,
    message: String,
}

impl BackendError {
    /// An error of this library or the model.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { code: api::ERROR_INTERNAL, message: message.into() }
    }

    /// An invalid request.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self { code: api::ERROR_INVALID_ARG, message: message.into() }
    }

    /// A request for something that is not implemented.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self { code: api::ERROR_UNSUPPORTED, message: message.into() }
    }

    /// An internal error with its causes in one line.
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        Self::internal(chain(error))
    }

    /// Converts into an error of the server, which the receiver must delete.
    pub fn into_raw(self) -> *mut api::Error {
        let message = c_text(&self.message);
        // SAFETY: the text is terminated and is copied by the function.
        unsafe { api::TRITONSERVER_ErrorNew(self.code, message.as_ptr()) }
    }

    /// Writes the error to the server's log, where no client can receive it.
    pub fn log(&self) {
        let message = c_text(&self.message);
        // SAFETY: both texts are terminated and outlive the call, which keeps neither.
        let error = unsafe {
            api::TRITONSERVER_LogMessage(
                api::LOG_ERROR,
                c"bireme-triton".as_ptr(),
                0,
                message.as_ptr(),
            )
        };
        // SAFETY: the call gave the error to this caller. A log that cannot be written to is
        // nothing to log.
        let _ = unsafe { check(error) };
    }
}

/// A C string of the text up to its first NUL.
pub(crate) fn c_text(text: &str) -> CString {
    let end = text.find('\0').unwrap_or(text.len());
    CString::new(&text[..end]).unwrap_or_default()
}

/// Converts and deletes the error that a call to the server returned.
///
/// # Safety
/// `error` is null, or an error that belongs to the caller.
pub(crate) unsafe fn check(error: *mut api::Error) -> Result<(), BackendError> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: the error is alive up to its deletion, and so is its text, which is copied before.
    unsafe {
        let code = api::TRITONSERVER_ErrorCode(error);
        let message = text(api::TRITONSERVER_ErrorMessage(error)).unwrap_or_default().to_owned();
        api::TRITONSERVER_ErrorDelete(error);
        Err(BackendError { code, message })
    }
}

/// A text of the server; empty if the pointer is null.
///
/// # Safety
/// `text` is null or terminated, and lives as long as `'a`.
pub(crate) unsafe fn text<'a>(text: *const c_char) -> Result<&'a str, BackendError> {
    if text.is_null() {
        return Ok("");
    }
    // SAFETY: not null, so terminated and alive, as the caller promises.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| BackendError::invalid(format!("the name {text:?} is not UTF-8")))
}

/// Runs `f` and turns a panic into an error, because a panic must not unwind into the server.
///
/// Shared state must be valid after a panic. Models are only borrowed immutably.
pub(crate) fn guarded<T>(f: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
    catch_unwind(AssertUnwindSafe(f))
        .unwrap_or_else(|panic| Err(BackendError::internal(message_of(panic.as_ref()))))
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    format!("the backend panicked: {}", panic_text(panic).unwrap_or("no message"))
}

/// The return value of an entry point.
pub(crate) fn answer(f: impl FnOnce() -> Result<(), BackendError>) -> *mut api::Error {
    match guarded(f) {
        Ok(()) => ptr::null_mut(),
        Err(fault) => fault.into_raw(),
    }
}
