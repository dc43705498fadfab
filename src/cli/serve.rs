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
    /// What `bireme export` wrote
    #[arg(long, value_name = "REPO")]
    repository: PathBuf,
    /// Load this model at the start, and the steps of an ensemble; may be given several times
    /// [default: all]
    #[arg(long = "load", value_name = "NAME")]
    models: Vec<String>,
    /// Where to listen for HTTP: `127.0.0.1:8000`, `[::1]:8000`, or a name, of whose addresses the
    /// first is taken that this machine has, IPv4 before IPv6; port 0 stands for any that is free
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8000")]
    http: String,
    /// Where to listen for gRPC
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8001")]
    grpc: String,
    /// Ask for `Authorization: Bearer KEY` with a key of this file, one in a line; health checks
    /// need none
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// Where the network runs
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Threads that read requests and write answers, and as many that preprocess and score
    /// [default: the cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Largest body of a request, in MiB
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().body >> 20)]
    max_body_mib: usize,
    /// Memory for the bodies of all requests and answers, in MiB
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().bodies >> 20)]
    max_bodies_mib: usize,
    /// Rows of events in a request at most
    #[arg(long, value_name = "N", default_value_t = Limits::default().rows)]
    max_rows: usize,
    /// Requests under way at most; more are answered with 503 and `Retry-After`
    #[arg(long, value_name = "N", default_value_t = Limits::default().requests)]
    max_requests: usize,
    /// Open connections at most; more are closed at once
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections)]
    max_connections: usize,
    /// How long a request may take, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = Limits::default().time.as_millis() as u64)]
    timeout_ms: u64,
    /// How long a connection may stay idle, in seconds
    #[arg(long, value_name = "S", default_value_t = Limits::default().idle.as_secs())]
    idle_seconds: u64,
    /// How long requests under way have after SIGTERM, in seconds
    #[arg(long, value_name = "S", default_value_t = 30)]
    drain_seconds: u64,
    /// The form of the log; BIREME_LOG says what is logged, as `info` or `debug`
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
