//! Lines of the server's log, on the standard error.

use std::io::stderr;

use tracing_subscriber::EnvFilter;

/// The form of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// An object of JSON.
    Json,
}

/// The variable that says what is logged, as `info` or `bireme_serve=debug`.
pub const VARIABLE: &str = "BIREME_LOG";

/// Logs from now on, and what panics say too. Once in a process; a second call changes nothing.
pub fn start(format: Format) {
    let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_writer(stderr).with_env_filter(filter).with_target(false);
    // A line that cannot be written would be reported on the standard error too, which panics.
    let log = log.log_internal_errors(false);
    let started = match format {
        Format::Text => log.with_ansi(false).try_init(),
        Format::Json => log.json().flatten_event(true).try_init(),
    };
    if started.is_ok() {
        std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "a thread failed")));
    }
}
