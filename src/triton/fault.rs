//! Errors on their way between Rust and the server.

use std::any::Any;
use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use bireme_base::console::panic_text;
use bireme_base::message::chain;

use crate::api;

/// An error as the server knows it: a code, from which follows what a client is told (400 for `INVALID_ARG`), and a text.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    code: c_int,
    message: String,
}

impl Fault {
    /// Of this program or the model.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { code: api::ERROR_INTERNAL, message: message.into() }
    }

    /// Of the request.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self { code: api::ERROR_INVALID_ARG, message: message.into() }
    }

    /// Of what was asked for, which is not done here.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self { code: api::ERROR_UNSUPPORTED, message: message.into() }
    }

    /// An error with its causes, in one line.
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        Self::internal(chain(error))
    }

    /// The server's own form of it, which the receiver must delete.
    pub fn into_raw(self) -> *mut api::Error {
        let message = c_text(&self.message);
        // SAFETY: the text is terminated and is copied by the function.
        unsafe { api::TRITONSERVER_ErrorNew(self.code, message.as_ptr()) }
    }

    /// Writes it into the server's log, for want of anybody who could be told.
    pub fn log(&self) {
        let message = c_text(&self.message);
        // SAFETY: both texts are terminated and outlive the call, which keeps neither.
        let error = unsafe {
            api::TRITONSERVER_LogMessage(api::LOG_ERROR, c"bireme-triton".as_ptr(), 0, message.as_ptr())
        };
        // SAFETY: the call gave the error to this caller. A log that cannot be written to is nothing to log.
        let _ = unsafe { check(error) };
    }
}

/// A text for C, up to its first NUL.
pub(crate) fn c_text(text: &str) -> CString {
    let end = text.find('\0').unwrap_or(text.len());
    CString::new(&text[..end]).unwrap_or_default()
}

/// What a call to the server returned, which is deleted.
///
/// # Safety
/// `error` is null, or an error that belongs to the caller.
pub(crate) unsafe fn check(error: *mut api::Error) -> Result<(), Fault> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: the error is alive up to its deletion, and so is its text, which is copied before.
    unsafe {
        let code = api::TRITONSERVER_ErrorCode(error);
        let message = text(api::TRITONSERVER_ErrorMessage(error)).unwrap_or_default().to_owned();
        api::TRITONSERVER_ErrorDelete(error);
        Err(Fault { code, message })
    }
}

/// A text of the server's; null is empty.
///
/// # Safety
/// `text` is null or terminated, and lives as long as `'a`.
pub(crate) unsafe fn text<'a>(text: *const c_char) -> Result<&'a str, Fault> {
    if text.is_null() {
        return Ok("");
    }
    // SAFETY: not null, so terminated and alive, as the caller promises.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Fault::invalid(format!("the name {text:?} is not UTF-8")))
}

/// Runs `f` and makes a fault of a panic, which must not reach the server's frames.
///
/// What `f` shares must make sense after a panic. The models do: they are borrowed immutably, by every request anew.
pub(crate) fn guarded<T>(f: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| Err(Fault::internal(message_of(panic.as_ref()))))
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    format!("the backend panicked: {}", panic_text(panic).unwrap_or("no message"))
}

/// What an entry point returns to the server.
pub(crate) fn answer(f: impl FnOnce() -> Result<(), Fault>) -> *mut api::Error {
    match guarded(f) {
        Ok(()) => ptr::null_mut(),
        Err(fault) => fault.into_raw(),
    }
}
