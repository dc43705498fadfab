//! Calls of C++ functions that report exceptions as messages, see `guarded.h`.

use std::ffi::{c_char, c_int};

/// Calls a C++ function with a message buffer and its length. The function returns 0 on success.
///
/// # Errors
/// The function fails; the error is its message, cut to `capacity` bytes.
pub(crate) fn guarded(
    capacity: usize,
    call: impl FnOnce(*mut c_char, usize) -> c_int,
) -> Result<(), String> {
    let mut message: Vec<c_char> = vec![0; capacity];
    if call(message.as_mut_ptr(), message.len()) == 0 { Ok(()) } else { Err(text(&message)) }
}

/// The text in the buffer, up to the terminating zero.
pub(crate) fn text(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
