//! The standard output and the standard error.
//!
//! A reader that went away, a closed descriptor or a full disk never ends work: lines of a log are
//! lost without a word, and only a command whose output is its result learns that the output
//! failed.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, ErrorKind, Write};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::message;

/// Writes a line to the log on stderr; a failure is ignored.
pub fn log(line: &str) {
    // One write, so that lines of several processes do not mix.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Writes why the command ends to stderr: a line, and a second one for a hint after `\nhint: `.
pub fn error(message: &str) {
    let (message, hint) =
        message.split_once("\nhint: ").map_or((message, None), |(m, h)| (m, Some(h)));
    let mut lines = format!("error: {}", message::single_line(message));
    if let Some(hint) = hint {
        lines += &format!("\nhint: {}", message::single_line(hint));
    }
    log(&lines);
}

/// Writes a line to stdout; a failure is ignored.
pub fn note(line: &str) {
    let _ = print(line);
}

/// Writes the result of a command to stdout. A pipe that its reader has closed is not a failure.
///
/// # Errors
/// The disk is full, for example.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(format!("{text}\n").as_bytes()).and_then(|()| stdout.flush());
    unless_closed(written)
}

/// `written` without the failure of a pipe that its reader has closed.
///
/// # Errors
/// Any other failure.
pub fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Logs a panic, which is a fault of this program, as one line with the place in the sources, a
/// request to report it, and the backtrace if `RUST_BACKTRACE` asks for one. `place` says where in
/// a job it happened, and may be empty.
pub fn internal_error(place: &str, panic: &PanicHookInfo<'_>) {
    let at = panic.location().map_or(String::new(), |location| {
        format!(" ({}:{})", source_path(location.file()), location.line())
    });
    let place = if place.is_empty() { String::new() } else { format!("{place}: ") };
    let payload =
        message::single_line(panic.payload_as_str().unwrap_or("a panic without a message"));
    let backtrace = Backtrace::capture();
    let more = match backtrace.status() {
        BacktraceStatus::Captured => format!("\n{backtrace}"),
        _ => {
            "\nhint: this is a fault of bireme: please report it, with what `RUST_BACKTRACE=1` adds"
                .to_owned()
        }
    };
    log(&format!("error: internal error: {place}{payload}{at}{more}"));
}

/// Whether panics are results that the program expects.
static EXPECTS_PANICS: AtomicBool = AtomicBool::new(false);

/// Runs code whose panics are caught and handled: a panic hook must do nothing meanwhile, on any
/// thread.
pub fn without_panic_messages<T>(work: impl FnOnce() -> T) -> T {
    EXPECTS_PANICS.store(true, Ordering::SeqCst);
    let result = work();
    EXPECTS_PANICS.store(false, Ordering::SeqCst);
    result
}

/// Whether [`without_panic_messages`] runs.
pub fn expects_panics() -> bool {
    EXPECTS_PANICS.load(Ordering::SeqCst)
}

/// The message of a panic that was caught, if it has one.
pub fn panic_text(payload: &(dyn Any + Send)) -> Option<&str> {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied())
}

/// A path in the sources without the folder of the registry that a library was built in.
fn source_path(path: &str) -> &str {
    let in_registry =
        path.split_once("/registry/src/").and_then(|(_, inside)| inside.split_once('/'));
    in_registry.map_or(path, |(_, inside)| inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_went_away_is_no_failure_and_a_full_disk_is() {
        let failed = |kind| unless_closed(Err(ErrorKind::into(kind)));
        assert!(failed(ErrorKind::BrokenPipe).is_ok());
        assert!(failed(ErrorKind::StorageFull).is_err());
    }

    #[test]
    fn libraries_are_named_without_the_registry() {
        let path =
            "/home/me/.cargo/registry/src/index.crates.io-1949cf8c6b5b557f/tch-0.24.0/src/lib.rs";
        assert_eq!(source_path(path), "tch-0.24.0/src/lib.rs");
        assert_eq!(source_path("src/main.rs"), "src/main.rs");
    }
}
