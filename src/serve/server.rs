//! Listens, serves, and ends without losing a request.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use bireme_base::message::quoted;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tch::Device;
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};

use crate::gate::{Gate, Keys};
use crate::repository::{Repository, RepositoryError};
use crate::service::{Limits, Service};
use crate::statistics::Metrics;
use crate::{grpc, http};

/// What to serve, where and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The model repository.
    pub repository: PathBuf,
    /// Models to load at the start; empty: all.
    pub models: Vec<String>,
    /// Where to listen for HTTP, `HOST:PORT`.
    pub http: String,
    /// Where to listen for gRPC, `HOST:PORT`.
    pub grpc: String,
    /// A file with API keys.
    pub api_keys: Option<PathBuf>,
    /// What a request may cost.
    pub limits: Limits,
    /// How long requests under way have when the server is told to end.
    pub drain: Duration,
    /// Where networks run.
    pub device: Device,
    /// Threads that read requests and write answers, and as many on which what runs on the CPU runs.
    pub n_threads: usize,
}

/// Why the server does not start, or does not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The repository.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The file with API keys.
    #[error("cannot read API keys from `{path}`")]
    Keys {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// An address has another form, or its name has no address.
    #[error(
        "{} is not an address to listen on, such as `127.0.0.1:8000`, `[::1]:8000` or `localhost:8000`",
        quoted(address)
    )]
    Address {
        /// The address.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// An address is taken, or not this machine's.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// Threads or signals.
    #[error("the system refused the server")]
    System(#[source] std::io::Error),
    /// Requests were still under way when the time was over.
    #[error("{0} requests were still under way after the time for ending, and are lost")]
    Drain(i64),
}

impl ServeError {
    /// 2 where nothing was served, 1 otherwise.
    pub fn exit_code(&self) -> i32 {
        if matches!(self, Self::System(_) | Self::Drain(_)) { 1 } else { 2 }
    }
}

/// Where a server listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// For HTTP.
    pub http: SocketAddr,
    /// For gRPC.
    pub grpc: SocketAddr,
}

/// Serves until SIGTERM or SIGINT, and then answers what it has begun; a second one ends it at
/// once. SIGHUP loads again what has changed. `listening` is called when models are loaded and
/// clients may come.
///
/// # Errors
/// See [`ServeError`].
pub fn serve(options: &Options, listening: impl FnOnce(Addresses)) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(options.n_threads.max(1))
        .enable_all()
        .build()
        .map_err(ServeError::System)?;
    let served = runtime.block_on(run(options, listening));
    runtime.shutdown_background();
    served
}

async fn run(options: &Options, listening: impl FnOnce(Addresses)) -> Result<(), ServeError> {
    let metrics = Arc::new(Metrics::default());
    let keys = match &options.api_keys {
        Some(path) => {
            let keys = Keys::read(path).map_err(|source| ServeError::Keys { path: path.clone(), source })?;
            Some(keys)
        }
        None => None,
    };
    let mut terminated = signal(SignalKind::terminate()).map_err(ServeError::System)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(ServeError::System)?;
    let mut hung_up = signal(SignalKind::hangup()).map_err(ServeError::System)?;
    // Before models are loaded, which takes longer than to see that an address is taken.
    let of_http = listen(&options.http).await?;
    let of_grpc = listen(&options.grpc).await?;
    let address = |listener: &TcpListener| listener.local_addr().map_err(ServeError::System);
    let addresses = Addresses { http: address(&of_http)?, grpc: address(&of_grpc)? };

    // Threads that share a batch wait for each other: each has a batch of its own instead.
    tch::set_num_threads(1);
    keep_freed_memory();
    let loading = {
        let (dir, models, metrics) = (options.repository.clone(), options.models.clone(), metrics.clone());
        let compute = (options.device, options.n_threads.max(1));
        tokio::task::spawn_blocking(move || {
            let repository = Repository::open(&dir, compute, metrics)?;
            for name in if models.is_empty() { repository.names()? } else { models } {
                repository.load(&name)?;
                tracing::info!(model = name, "loaded");
            }
            Ok::<_, RepositoryError>(repository)
        })
    };
    let repository = tokio::select! {
        loaded = loading => loaded.map_err(|error| ServeError::System(std::io::Error::other(error)))??,
        // No request is lost before the first is taken.
        _ = terminated.recv() => return Ok(()),
        _ = interrupted.recv() => return Ok(()),
    };
    let service = Arc::new(Service::new(repository, metrics, options.limits.clone()));
    if options.api_keys.is_none() {
        for address in [addresses.http, addresses.grpc] {
            if !address.ip().is_loopback() {
                tracing::warn!(%address, "whoever reaches this address may ask, load and unload: there are no API keys");
            }
        }
    }
    let gate = Gate::new(service.clone(), keys);
    let (end, ended) = watch::channel(());
    let connections = Arc::new(Semaphore::new(options.limits.connections));
    let accept = |listener, speaks, router| {
        let router = gate.in_front_of(router);
        tokio::spawn(accept((listener, speaks), router, service.clone(), connections.clone(), ended.clone()))
    };
    let accepting = [
        accept(of_http, Speaks::Http1, http::router(service.clone())),
        accept(of_grpc, Speaks::Http2, grpc::router(service.clone())),
    ];
    tracing::info!(http = %addresses.http, grpc = %addresses.grpc, "listening");
    listening(addresses);
    loop {
        tokio::select! {
            _ = terminated.recv() => break,
            _ = interrupted.recv() => break,
            _ = hung_up.recv() => reload(&service),
        }
    }
    tracing::info!(seconds = options.drain.as_secs_f64(), "ending: requests under way are answered");
    service.end();
    drop(ended);
    let _ = end.send(());
    let drained = async {
        for accepting in accepting {
            let _ = accepting.await;
        }
    };
    tokio::select! {
        _ = drained => {}
        _ = tokio::time::sleep(options.drain) => {
            let left = service.metrics.in_flight.get();
            // Connections that merely stay open lose nothing.
            if left > 0 {
                return Err(ServeError::Drain(left));
            }
        }
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    tracing::info!("ended");
    Ok(())
}

/// The scores of a large catalogue are allocated for every batch. If they went back to the system each time, which is what
/// glibc does from a few MiB on, fetching zeroed pages would take longer than to compute them.
fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for threshold in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: `mallopt` takes numbers, changes only when memory is returned, and may be called at any time.
        unsafe { libc::mallopt(threshold, 256 << 20) };
    }
}

/// Listens on the first address of a name that this machine has, IPv4 before IPv6.
async fn listen(name: &str) -> Result<TcpListener, ServeError> {
    let not_found = |source| ServeError::Address { address: name.to_owned(), source };
    let mut addresses: Vec<SocketAddr> = lookup_host(name).await.map_err(not_found)?.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    let mut last = not_found(std::io::Error::new(ErrorKind::NotFound, "the name has no address"));
    for address in addresses {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(source) => {
                // A port that another server has must not lead clients to different servers.
                let is_absent = source.kind() == ErrorKind::AddrNotAvailable
                    || source.raw_os_error() == Some(libc::EAFNOSUPPORT);
                last = ServeError::Listen { address, source };
                if !is_absent {
                    break;
                }
            }
        }
    }
    Err(last)
}

/// Loads again what is loaded and has changed.
fn reload(service: &Arc<Service>) {
    let service = service.clone();
    tokio::spawn(async move {
        let names: std::collections::BTreeSet<String> =
            service.repository.loaded().iter().map(|model| model.config.name.clone()).collect();
        for name in names {
            // It has been logged, and what was loaded goes on.
            let _ = service.load(name).await;
        }
    });
}

/// What is spoken at an address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Speaks {
    Http1,
    Http2,
}

/// Takes connections until the server ends, then waits for those that are open.
async fn accept(
    (listener, speaks): (TcpListener, Speaks),
    router: Router,
    service: Arc<Service>,
    connections: Arc<Semaphore>,
    mut ended: watch::Receiver<()>,
) {
    let graceful = GracefulShutdown::new();
    let idle = service.limits.idle;
    let builder = builder(speaks, idle);
    let handler = TowerToHyperService::new(router);
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Too many open files, for one: it will pass.
                    tracing::warn!(%error, "cannot take a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            _ = ended.changed() => break,
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            service.metrics.connections_refused.inc();
            continue;
        };
        if let Err(error) = prepare(&stream, idle) {
            tracing::debug!(%error, "cannot prepare a connection");
        }
        let (builder, handler, watcher) = (builder.clone(), handler.clone(), graceful.watcher());
        let metrics = service.metrics.clone();
        tokio::spawn(async move {
            metrics.connections.inc();
            if speaks == Speaks::Http1 || greets(&stream, idle).await {
                let connection = builder.serve_connection(TokioIo::new(stream), handler).into_owned();
                if let Err(error) = watcher.watch(connection).await {
                    tracing::debug!(error, "a connection broke off");
                }
            }
            metrics.connections.dec();
            drop(permit);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

fn builder(speaks: Speaks, idle: Duration) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(idle).max_buf_size(64 << 10);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(idle)
        .keep_alive_timeout(idle)
        .max_concurrent_streams(256)
        .max_header_list_size(16 << 10);
    // To guess which it is, a connection would be read without a limit of time.
    match speaks {
        Speaks::Http1 => builder.http1_only(),
        Speaks::Http2 => builder.http2_only(),
    }
}

/// Waits for the words that HTTP/2 begins with, which nothing else limits.
async fn greets(stream: &TcpStream, idle: Duration) -> bool {
    const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let greeting = async {
        let mut read = [0; GREETING.len()];
        loop {
            match stream.peek(&mut read).await {
                Ok(n) if n == read.len() => return read == GREETING,
                Ok(n) if n > 0 && read[..n] == GREETING[..n] => {
                    tokio::time::sleep(Duration::from_millis(5)).await
                }
                _ => return false,
            }
        }
    };
    tokio::time::timeout(idle, greeting).await.unwrap_or(false)
}

/// Small answers go out at once, and a peer that takes nothing in loses its connection.
fn prepare(stream: &TcpStream, idle: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    socket.set_keepalive(true)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(idle))?;
    Ok(())
}
