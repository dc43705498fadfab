//! The server's log on stderr.

use std::io::stderr;

use tracing_subscriber::EnvFilter;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// The environment variable with the filter of the log, such as `info` or `bireme_serve=debug`.
pub const VARIABLE: &str = "BIREME_LOG";

/// Starts the log, which includes panics. A second call in a process has no effect.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    let log =
        tracing_subscriber::fmt().with_writer(stderr).with_env_filter(filter).with_target(false);
    // tracing would report a failed write on stderr too, and panic.
    let log = log.log_internal_errors(false);
    let started = match format {
        LogFormat::Text => log.with_ansi(false).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    if started.is_ok() {
        std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "a thread failed")));
    }
}
