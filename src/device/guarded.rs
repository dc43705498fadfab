//! Calls of the C++ functions that `guarded.h` keeps from throwing.

use std::ffi::{c_char, c_int};

/// Calls a function that takes a buffer for a message and its length, and returns 0 or fails.
///
/// # Errors
/// The message, as far as `capacity` bytes hold it.
pub(crate) fn guarded(capacity: usize, call: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<(), String> {
    let mut message: Vec<c_char> = vec![0; capacity];
    if call(message.as_mut_ptr(), message.len()) == 0 { Ok(()) } else { Err(text(&message)) }
}

/// The text in a buffer up to the first zero.
pub(crate) fn text(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
