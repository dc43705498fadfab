//! What the command line needs of an error besides its message.

use std::error::Error;

/// Exit code of a run that failed.
pub const FAILED: i32 = 1;

/// Exit code of a command that was refused before it changed anything.
pub const REFUSED: i32 = 2;

/// Exit code of a run that stopped on request, after a checkpoint.
pub const STOPPED: i32 = 3;

/// An error that can end a command.
pub trait UserError: Error {
    /// [`FAILED`] or [`REFUSED`].
    fn exit_code(&self) -> i32;

    /// What the user can do about it.
    fn hint(&self) -> Option<String> {
        None
    }
}
