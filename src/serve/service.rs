//! What both protocols call: a repository with limits around it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bireme_etl::tensor::Tensor;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::fault::{Fault, Kind};
use crate::model::Model;
use crate::repository::{Repository, RepositoryError};
use crate::request::Request;
use crate::statistics::Metrics;

/// What a request may cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body: usize,
    /// Bytes of all bodies that are held at a time, of requests and of answers.
    pub bodies: usize,
    /// Rows of an input.
    pub rows: usize,
    /// Requests that wait or are being answered; more are told to come again.
    pub requests: usize,
    /// Open connections; more are closed at once.
    pub connections: usize,
    /// How long a request may take, from its first byte on.
    pub time: Duration,
    /// How long a connection may say nothing.
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

/// A repository in service.
pub struct Service {
    /// Its models.
    pub repository: Repository,
    /// What Prometheus collects.
    pub metrics: Arc<Metrics>,
    /// What a request may cost.
    pub limits: Limits,
    /// Bytes that bodies may still take.
    pub memory: Arc<Semaphore>,
    admitted: Semaphore,
    is_ending: AtomicBool,
}

/// An answer, and the memory that is kept for its body until this is dropped.
pub struct Answered {
    /// Who answered.
    pub model: Arc<Model>,
    /// The outputs.
    pub outputs: Vec<Tensor>,
    /// What is kept.
    pub held: Held,
}

/// Memory that is kept for a body.
#[derive(Clone)]
pub struct Held(#[expect(dead_code, reason = "dropping it is what it is for")] Arc<OwnedSemaphorePermit>);

/// As text a tensor takes up to so many times its bytes.
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

/// What to wait before trying again, in seconds, when too many requests are waiting.
pub const RETRY_AFTER: &str = "1";

impl Service {
    /// A service of a repository.
    pub fn new(repository: Repository, metrics: Arc<Metrics>, limits: Limits) -> Self {
        let admitted = Semaphore::new(limits.requests);
        let memory = Arc::new(Semaphore::new(limits.bodies.min(Semaphore::MAX_PERMITS)));
        Self { repository, metrics, limits, memory, admitted, is_ending: AtomicBool::new(false) }
    }

    /// Whether requests will be answered: not while the server is ending.
    pub fn is_ready(&self) -> bool {
        !self.is_ending.load(Ordering::Relaxed)
    }

    /// From now on the server says that it is not ready.
    pub fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    /// Answers a request.
    ///
    /// # Errors
    /// What is wrong with the request or the server.
    pub async fn infer(
        &self,
        (name, version): (&str, &str),
        mut request: Request,
        timeout: Option<Duration>,
    ) -> Result<Answered, Fault> {
        let full = || {
            let n = self.limits.requests;
            Fault::new(Kind::Full, format!("{n} requests are waiting already: try again in {RETRY_AFTER} s"))
        };
        let _admitted = self.admitted.try_acquire().map_err(|_| full())?;
        let model = self.repository.model(name, version)?;
        request.check(&model.config, self.limits.rows)?;
        request.max_answer = Some(self.limits.bodies / TEXT);
        let _in_flight = InFlight::new(&self.metrics);
        let time = timeout.map_or(self.limits.time, |timeout| timeout.min(self.limits.time));
        let begun = Instant::now();
        let answer = tokio::time::timeout(time, model.infer(request)).await;
        let outputs = answer.map_err(|_| timed_out(time))??;
        // The runtime's clock counts in milliseconds.
        if begun.elapsed() > time {
            return Err(timed_out(time));
        }
        let n_bytes = TEXT * outputs.iter().map(|tensor| tensor.data.len()).sum::<usize>();
        let held = Held(Arc::new(take(&self.memory, n_bytes)?));
        Ok(Answered { model, outputs, held })
    }

    /// Loads a model; see [`Repository::load`].
    ///
    /// # Errors
    /// Says why not.
    pub async fn load(self: &Arc<Self>, name: String) -> Result<(), Fault> {
        let service = self.clone();
        let loading = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let loaded = service.repository.load(&name);
            match &loaded {
                Ok(()) => tracing::info!(model = name, seconds = begun.elapsed().as_secs_f64(), "loaded"),
                Err(error) => tracing::error!(model = name, %error, "not loaded"),
            }
            loaded
        });
        loading.await.map_err(Fault::internal)?.map_err(|error: RepositoryError| error.into())
    }

    /// Forgets a model; see [`Repository::unload`].
    ///
    /// # Errors
    /// It is not loaded.
    pub async fn unload(self: &Arc<Self>, name: String, with_steps: bool) -> Result<(), Fault> {
        let service = self.clone();
        let unloading = tokio::task::spawn_blocking(move || {
            let unloaded = service.repository.unload(&name, with_steps);
            unloaded.inspect(|()| tracing::info!(model = name, "unloaded"))
        });
        unloading.await.map_err(Fault::internal)?
    }
}

/// Takes memory for a body, or a part of it.
///
/// # Errors
/// Other bodies have it.
pub fn take(memory: &Arc<Semaphore>, n_bytes: usize) -> Result<OwnedSemaphorePermit, Fault> {
    let permit = u32::try_from(n_bytes).ok().and_then(|n| memory.clone().try_acquire_many_owned(n).ok());
    let full = || Fault::new(Kind::Full, "other requests take all of the memory for bodies: try again");
    permit.ok_or_else(full)
}

/// A request that took too long.
pub fn timed_out(time: Duration) -> Fault {
    Fault::new(Kind::Timeout, format!("the request took longer than {time:?}"))
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
