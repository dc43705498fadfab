//! A model repository with limits, which both protocols call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bireme_protocol::Tensor;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::model::ServedModel;
use crate::repository::{Repository, RepositoryError};
use crate::request::InferRequest;
use crate::request_error::{RequestError, RequestErrorKind};
use crate::statistics::Metrics;

/// The resources that requests may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body: usize,
    /// Bytes of all bodies in memory, of requests and of responses.
    pub bodies: usize,
    /// Rows of an input.
    pub rows: usize,
    /// Requests in the queues and in execution. Further ones are refused with a time to retry.
    pub requests: usize,
    /// Open connections. Further ones are closed at once.
    pub connections: usize,
    /// The time of a request, from its first byte.
    pub time: Duration,
    /// The time that a connection may be silent.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 16 << 20,
            bodies: 256 << 20,
            rows: 65_536,
            requests: 1024,
            connections: 1024,
            time: Duration::from_secs(10),
            idle: Duration::from_secs(60),
        }
    }
}

pub struct Service {
    pub repository: Repository,
    pub metrics: Arc<Metrics>,
    pub limits: Limits,
    /// One permit per byte that bodies may still take.
    pub memory: Arc<Semaphore>,
    admitted: Semaphore,
    is_ending: AtomicBool,
}

pub struct Answered {
    pub model: Arc<ServedModel>,
    pub outputs: Vec<Tensor>,
    /// Reserves memory for the body of the response until it is dropped.
    pub held: Held,
}

/// Memory that is reserved for a body.
#[derive(Clone)]
pub struct Held(#[expect(dead_code, reason = "held to be dropped")] Arc<OwnedSemaphorePermit>);

/// The largest ratio of a tensor's size as JSON text to its size in bytes.
const TEXT: usize = 4;

/// The extensions of the protocol that this server has.
pub const EXTENSIONS: [&str; 6] = [
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    "statistics",
    "binary_tensor_data",
    "parameters",
];

/// A model as a request names it.
#[derive(Clone, Copy, Debug)]
pub struct ModelRef<'a> {
    pub name: &'a str,
    /// Empty: the newest.
    pub version: &'a str,
}

/// Seconds after which a client should retry a request that was refused for its number.
pub const RETRY_AFTER: &str = "1";

impl Service {
    pub fn new(repository: Repository, metrics: Arc<Metrics>, limits: Limits) -> Self {
        let admitted = Semaphore::new(limits.requests);
        let memory = Arc::new(Semaphore::new(limits.bodies.min(Semaphore::MAX_PERMITS)));
        Self { repository, metrics, limits, memory, admitted, is_ending: AtomicBool::new(false) }
    }

    /// False while the server shuts down.
    pub fn is_ready(&self) -> bool {
        !self.is_ending.load(Ordering::Relaxed)
    }

    /// Makes the server report that it is not ready.
    pub fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    /// Runs a request on a model.
    ///
    /// # Errors
    /// A request that is refused, or a failure of the model.
    pub async fn infer(
        &self,
        of: ModelRef<'_>,
        mut request: InferRequest,
        timeout: Option<Duration>,
    ) -> Result<Answered, RequestError> {
        let full = || {
            let n = self.limits.requests;
            RequestError::new(
                RequestErrorKind::Full,
                format!("{n} requests are waiting already: try again in {RETRY_AFTER} s"),
            )
        };
        let _admitted = self.admitted.try_acquire().map_err(|_| full())?;
        let model = self.repository.model(of.name, of.version)?;
        request.check(&model.config, self.limits.rows)?;
        request.max_answer = Some(self.limits.bodies / TEXT);
        let _in_flight = InFlight::new(&self.metrics);
        let time = timeout.map_or(self.limits.time, |timeout| timeout.min(self.limits.time));
        let begun = Instant::now();
        let answer = tokio::time::timeout(time, model.infer(request)).await;
        let outputs = answer.map_err(|_| timed_out(time))??;
        // tokio's clock counts in milliseconds, so that a shorter limit needs a separate check.
        if begun.elapsed() > time {
            return Err(timed_out(time));
        }
        let n_bytes = TEXT * outputs.iter().map(|tensor| tensor.data.len()).sum::<usize>();
        let held = Held(Arc::new(reserve(&self.memory, n_bytes)?));
        Ok(Answered { model, outputs, held })
    }

    /// Loads a model in a separate thread. Errors as [`Repository::load`].
    pub async fn load(self: &Arc<Self>, name: String) -> Result<(), RequestError> {
        let service = self.clone();
        let loading = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let loaded = service.repository.load(&name);
            match &loaded {
                Ok(()) => {
                    tracing::info!(model = name, seconds = begun.elapsed().as_secs_f64(), "loaded")
                }
                Err(error) => tracing::error!(model = name, %error, "not loaded"),
            }
            loaded
        });
        loading
            .await
            .map_err(RequestError::internal)?
            .map_err(|error: RepositoryError| error.into())
    }

    /// Unloads a model in a separate thread. Errors as [`Repository::unload`].
    pub async fn unload(
        self: &Arc<Self>,
        name: String,
        with_steps: bool,
    ) -> Result<(), RequestError> {
        let service = self.clone();
        let unloading = tokio::task::spawn_blocking(move || {
            let unloaded = service.repository.unload(&name, with_steps);
            unloaded.inspect(|()| tracing::info!(model = name, "unloaded"))
        });
        unloading.await.map_err(RequestError::internal)?
    }
}

/// Reserves memory for a body, or for a part of it.
///
/// # Errors
/// Other bodies take the memory.
pub fn reserve(
    memory: &Arc<Semaphore>,
    n_bytes: usize,
) -> Result<OwnedSemaphorePermit, RequestError> {
    let permit =
        u32::try_from(n_bytes).ok().and_then(|n| memory.clone().try_acquire_many_owned(n).ok());
    let full = || {
        RequestError::new(
            RequestErrorKind::Full,
            "other requests take all of the memory for bodies: try again",
        )
    };
    permit.ok_or_else(full)
}

pub fn timed_out(time: Duration) -> RequestError {
    RequestError::new(RequestErrorKind::Timeout, format!("the request took longer than {time:?}"))
}

struct InFlight<'a>(&'a Metrics);

impl<'a> InFlight<'a> {
    fn new(metrics: &'a Metrics) -> Self {
        metrics.in_flight.inc();
        Self(metrics)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.dec();
    }
}
