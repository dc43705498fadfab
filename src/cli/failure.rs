//! How a command ends early.

use std::io;

use bireme_base::user_error::{FAILED, REFUSED, STOPPED, UserError};
use bireme_base::{console, message};

/// Reason for which a command ends early.
pub(super) struct Failure {
    pub exit_code: i32,
    /// The error and perhaps a hint; none on a rank whose error rank 0 reports.
    pub message: Option<String>,
}

impl<E: UserError> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::with_code(error.exit_code(), &error)
    }
}

impl Failure {
    /// The run stopped on request.
    pub const STOPPED: Self = Self { exit_code: STOPPED, message: None };

    /// An error before any output was changed.
    pub fn refused(error: impl UserError) -> Self {
        Self::with_code(REFUSED, &error)
    }

    fn with_code(exit_code: i32, error: &dyn UserError) -> Self {
        Self { exit_code, message: Some(with_hint(message::chain(error), error.hint())) }
    }
}

/// A message as [`console::error`] takes it.
pub(super) fn with_hint(message: String, hint: Option<String>) -> String {
    match hint {
        Some(hint) => format!("{message}\nhint: {hint}"),
        None => message,
    }
}

/// An error of the operating system.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub(super) struct SystemError {
    action: &'static str,
    source: io::Error,
    exit_code: i32,
}

impl SystemError {
    /// Before the command changed anything.
    pub fn refused(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { action, source, exit_code: REFUSED }
    }
}

impl UserError for SystemError {
    fn exit_code(&self) -> i32 {
        self.exit_code
    }
}

/// Prints the result of a command.
pub(super) fn print(text: &str) -> Result<(), SystemError> {
    let action = "write to the standard output";
    console::print(text).map_err(|source| SystemError { action, source, exit_code: FAILED })
}
