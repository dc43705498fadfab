//! Listens, serves, and ends without losing a request.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use bireme_base::message::quoted;
use bireme_base::user_error::{FAILED, REFUSED, UserError};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tch::Device;
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};

use crate::admission::{Admission, ApiKeys};
use crate::repository::{Compute, Repository, RepositoryError};
use crate::service::{Limits, Service};
use crate::statistics::Metrics;
use crate::{grpc, http};

#[derive(Clone, Debug)]
pub struct ServeOptions {
    pub repository: PathBuf,
    /// Models to load at the start; empty: all.
    pub models: Vec<String>,
    /// The address of HTTP, `HOST:PORT`.
    pub http: String,
    /// The address of gRPC, `HOST:PORT`.
    pub grpc: String,
    pub api_keys: Option<PathBuf>,
    pub limits: Limits,
    /// The time for requests in execution to finish after the signal to end.
    pub drain: Duration,
    /// The device of networks.
    pub device: Device,
    /// Threads of the protocols, and threads per model on the CPU.
    pub n_threads: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("cannot read API keys from `{path}`")]
    ApiKeys { path: PathBuf, source: std::io::Error },
    #[error(
        "{} is not an address to listen on, such as `127.0.0.1:8000`, `[::1]:8000` or \
         `localhost:8000`",
        quoted(address)
    )]
    Address { address: String, source: std::io::Error },
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("the system refused the server")]
    System(#[source] std::io::Error),
    #[error("{0} requests were still under way after the time for ending, and are lost")]
    Drain(i64),
}

impl UserError for ServeError {
    fn exit_code(&self) -> i32 {
        if matches!(self, Self::System(_) | Self::Drain(_)) { FAILED } else { REFUSED }
    }
}

/// The addresses on which a server listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
}

/// Serves until SIGTERM or SIGINT, and then finishes the requests in execution; a second signal
/// ends the server at once. SIGHUP reloads models whose files have changed. `listening` is called
/// when all models are loaded and the server listens.
///
/// # Errors
/// See [`ServeError`].
pub fn serve(options: &ServeOptions, listening: impl FnOnce(Addresses)) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(options.n_threads.max(1))
        .enable_all()
        .build()
        .map_err(ServeError::System)?;
    let served = runtime.block_on(run(options, listening));
    runtime.shutdown_background();
    served
}

async fn run(options: &ServeOptions, listening: impl FnOnce(Addresses)) -> Result<(), ServeError> {
    let metrics = Arc::new(Metrics::default());
    let keys = match &options.api_keys {
        Some(path) => {
            let keys = ApiKeys::read(path)
                .map_err(|source| ServeError::ApiKeys { path: path.clone(), source })?;
            Some(keys)
        }
        None => None,
    };
    let mut terminated = signal(SignalKind::terminate()).map_err(ServeError::System)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(ServeError::System)?;
    let mut hung_up = signal(SignalKind::hangup()).map_err(ServeError::System)?;
    // Bind before loading models, so that an address in use is reported at once.
    let of_http = listen(&options.http).await?;
    let of_grpc = listen(&options.grpc).await?;
    let address = |listener: &TcpListener| listener.local_addr().map_err(ServeError::System);
    let addresses = Addresses { http: address(&of_http)?, grpc: address(&of_grpc)? };

    // Threads that share a batch wait for each other, so each runs its own batch.
    tch::set_num_threads(1);
    keep_freed_memory();
    let loading = {
        let (dir, models, metrics) =
            (options.repository.clone(), options.models.clone(), metrics.clone());
        let compute = Compute { device: options.device, n_threads: options.n_threads.max(1) };
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
        loaded = loading => {
            loaded.map_err(|error| ServeError::System(std::io::Error::other(error)))??
        }
        // No request has been accepted yet.
        _ = terminated.recv() => return Ok(()),
        _ = interrupted.recv() => return Ok(()),
    };
    let service = Arc::new(Service::new(repository, metrics, options.limits.clone()));
    if options.api_keys.is_none() {
        for address in [addresses.http, addresses.grpc] {
            if !address.ip().is_loopback() {
                tracing::warn!(%address, "without API keys, any client that reaches this address \
                                          may infer, load and unload");
            }
        }
    }
    let admission = Admission::new(service.clone(), keys);
    let (end, ended) = watch::channel(());
    let connections = Arc::new(Semaphore::new(options.limits.connections));
    let accept = |listener, version, router| {
        let acceptor = Acceptor {
            listener,
            version,
            router: admission.in_front_of(router),
            service: service.clone(),
            connections: connections.clone(),
        };
        tokio::spawn(acceptor.run(ended.clone()))
    };
    let accepting = [
        accept(of_http, HttpVersion::Http1, http::router(service.clone())),
        accept(of_grpc, HttpVersion::Http2, grpc::router(service.clone())),
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
    tracing::info!(
        seconds = options.drain.as_secs_f64(),
        "ending: requests under way are answered"
    );
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

/// Keeps freed memory in the process. The scores of a large catalogue are allocated for every
/// batch; glibc returns blocks of a few MiB to the system, and to fetch zeroed pages again would
/// take longer than to compute the scores.
fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for threshold in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: `mallopt` takes numbers, changes only when memory is returned, and may be called
        // at any time.
        unsafe { libc::mallopt(threshold, 256 << 20) };
    }
}

/// Listens on the first of a name's addresses that this machine has, IPv4 before IPv6.
async fn listen(name: &str) -> Result<TcpListener, ServeError> {
    let not_found = |source| ServeError::Address { address: name.to_owned(), source };
    let mut addresses: Vec<SocketAddr> = lookup_host(name).await.map_err(not_found)?.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    let mut last = not_found(std::io::Error::new(ErrorKind::NotFound, "the name has no address"));
    for address in addresses {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(source) => {
                // If the port is in use at one address, another address of the same name would
                // lead clients to different servers.
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

/// Reloads the loaded models whose files have changed.
fn reload(service: &Arc<Service>) {
    let service = service.clone();
    tokio::spawn(async move {
        let names: std::collections::BTreeSet<String> =
            service.repository.loaded().iter().map(|model| model.config.name.clone()).collect();
        for name in names {
            // A failure has been logged, and the loaded version continues to serve.
            let _ = service.load(name).await;
        }
    });
}

/// The version of HTTP at an address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum HttpVersion {
    Http1,
    Http2,
}

/// Serves the connections of one address.
struct Acceptor {
    listener: TcpListener,
    version: HttpVersion,
    router: Router,
    service: Arc<Service>,
    /// One permit per connection, over all addresses.
    connections: Arc<Semaphore>,
}

impl Acceptor {
    /// Accepts connections until the server ends, then waits for the open ones.
    async fn run(self, mut ended: watch::Receiver<()>) {
        let Self { listener, version, router, service, connections } = self;
        let graceful = GracefulShutdown::new();
        let idle = service.limits.idle;
        let builder = builder(version, idle);
        let handler = TowerToHyperService::new(router);
        loop {
            let stream = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // For example, too many open files: a temporary condition.
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
            let (builder, handler, watcher) =
                (builder.clone(), handler.clone(), graceful.watcher());
            let metrics = service.metrics.clone();
            tokio::spawn(async move {
                metrics.connections.inc();
                if version == HttpVersion::Http1 || sends_preface(&stream, idle).await {
                    let connection =
                        builder.serve_connection(TokioIo::new(stream), handler).into_owned();
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
}

fn builder(version: HttpVersion, idle: Duration) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(idle).max_buf_size(64 << 10);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(idle)
        .keep_alive_timeout(idle)
        .max_concurrent_streams(256)
        .max_header_list_size(16 << 10);
    // Detecting the version would read from the connection without a time limit.
    match version {
        HttpVersion::Http1 => builder.http1_only(),
        HttpVersion::Http2 => builder.http2_only(),
    }
}

/// Waits for the preface of HTTP/2, for which hyper has no time limit.
async fn sends_preface(stream: &TcpStream, idle: Duration) -> bool {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let preface = async {
        let mut read = [0; PREFACE.len()];
        loop {
            match stream.peek(&mut read).await {
                Ok(n) if n == read.len() => return read == PREFACE,
                Ok(n) if n > 0 && read[..n] == PREFACE[..n] => {
                    tokio::time::sleep(Duration::from_millis(5)).await
                }
                _ => return false,
            }
        }
    };
    tokio::time::timeout(idle, preface).await.unwrap_or(false)
}

/// Sends small responses at once, and closes connections whose peer stops reading.
fn prepare(stream: &TcpStream, idle: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    socket.set_keepalive(true)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(idle))?;
    Ok(())
}
