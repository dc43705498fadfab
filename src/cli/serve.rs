//! `bireme serve`.

use std::path::PathBuf;
use std::time::Duration;

use bireme_base::console;
use bireme_serve::service::Limits;
use bireme_serve::{Addresses, logs};
use clap::Args;

use super::args::place_alone;
use super::failure::Failure;
use crate::device::{DeviceChoice, Place};

/// Limits are per process.
#[derive(Args)]
pub(super) struct ServeArgs {
    /// Model repository of `bireme export`
    #[arg(long, value_name = "REPO")]
    repository: PathBuf,
    /// Model to load at the start, with the steps of an ensemble; may be repeated [default: all]
    #[arg(long = "load", value_name = "NAME")]
    models: Vec<String>,
    /// HTTP address: `127.0.0.1:8000`, `[::1]:8000` or a host name; the first address of a name
    /// that this machine has is used, IPv4 before IPv6; port 0 selects a free port
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8000")]
    http: String,
    /// gRPC address
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8001")]
    grpc: String,
    /// Require `Authorization: Bearer KEY` with a key from this file, one per line; health checks
    /// need no key
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// Device of the network
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Threads that read requests and write responses, and as many that preprocess and score
    /// [default: the number of cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Maximum size of a request body, in MiB
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().body >> 20)]
    max_body_mib: usize,
    /// Memory for the bodies of all requests and responses, in MiB
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().bodies >> 20)]
    max_bodies_mib: usize,
    /// Maximum number of events in a request
    #[arg(long, value_name = "N", default_value_t = Limits::default().rows)]
    max_rows: usize,
    /// Maximum number of concurrent requests; further ones get 503 and `Retry-After`
    #[arg(long, value_name = "N", default_value_t = Limits::default().requests)]
    max_requests: usize,
    /// Maximum number of open connections; further ones are closed
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections)]
    max_connections: usize,
    /// Time limit of a request, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = Limits::default().time.as_millis() as u64)]
    timeout_ms: u64,
    /// Idle time after which a connection is closed, in seconds
    #[arg(long, value_name = "S", default_value_t = Limits::default().idle.as_secs())]
    idle_seconds: u64,
    /// Time for running requests after SIGTERM, in seconds
    #[arg(long, value_name = "S", default_value_t = 30)]
    drain_seconds: u64,
    /// Log format; BIREME_LOG sets the level, such as `info` or `debug`
    #[arg(long, value_enum, default_value_t = logs::LogFormat::Text)]
    log: logs::LogFormat,
}

impl ServeArgs {
    fn limits(&self) -> Limits {
        Limits {
            body: self.max_body_mib << 20,
            bodies: self.max_bodies_mib << 20,
            rows: self.max_rows,
            requests: self.max_requests,
            connections: self.max_connections,
            time: Duration::from_millis(self.timeout_ms),
            idle: Duration::from_secs(self.idle_seconds),
        }
    }

    fn options(&self, place: &Place) -> bireme_serve::ServeOptions {
        bireme_serve::ServeOptions {
            repository: self.repository.clone(),
            models: self.models.clone(),
            http: self.http.clone(),
            grpc: self.grpc.clone(),
            api_keys: self.api_keys.clone(),
            limits: self.limits(),
            drain: Duration::from_secs(self.drain_seconds),
            device: place.device,
            n_threads: place.n_threads,
        }
    }
}

pub(super) fn run(args: &ServeArgs) -> Result<(), Failure> {
    let place = place_alone(args.device, args.threads.unwrap_or(0))?;
    logs::start(args.log);
    let listening = |Addresses { http, grpc }| console::note(&format!("http {http}\ngrpc {grpc}"));
    Ok(bireme_serve::serve(&args.options(&place), listening)?)
}
