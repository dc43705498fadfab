//! Counts of requests and batches: the protocol's statistics, and metrics for Prometheus.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::batcher::ModelAnswer;
use crate::protocol;
use crate::request_error::RequestError;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfModel {
    model: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOutcome {
    model: String,
    outcome: &'static str,
}

type Histograms = Family<OfModel, Histogram, fn() -> Histogram>;

pub struct Metrics {
    registry: Registry,
    requests: Family<OfOutcome, Counter>,
    seconds: Histograms,
    queued: Histograms,
    batches: Histograms,
    /// Requests in execution.
    pub in_flight: Gauge,
    pub connections: Gauge,
    /// Connections closed at once because of their number.
    pub connections_refused: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("bireme");
        // From 0.1 ms to 26 s.
        let seconds = || Histogram::new(exponential_buckets(1e-4, 2.0, 18));
        let rows = || Histogram::new(exponential_buckets(1.0, 2.0, 14));
        let metrics = Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(seconds),
            queued: Family::new_with_constructor(seconds),
            batches: Family::new_with_constructor(rows),
            in_flight: Gauge::default(),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            registry: Registry::default(),
        };
        registry.register("requests", "Requests by model and outcome", metrics.requests.clone());
        let (seconds, queued, batches) =
            (metrics.seconds.clone(), metrics.queued.clone(), metrics.batches.clone());
        registry.register_with_unit("request", "Time to answer a request", Unit::Seconds, seconds);
        registry.register_with_unit(
            "queue",
            "Time that a request waited for its model",
            Unit::Seconds,
            queued,
        );
        registry.register("batch_rows", "Rows of the batches that a model ran", batches);
        registry.register(
            "requests_in_flight",
            "Requests that are being answered",
            metrics.in_flight.clone(),
        );
        registry.register("connections", "Open connections", metrics.connections.clone());
        let refused = metrics.connections_refused.clone();
        registry.register("connections_refused", "Connections beyond the largest number", refused);
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// All metrics in the text format of OpenMetrics.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }

    pub fn answered(&self, model: &str, took: Duration, fault: Option<&RequestError>) {
        let outcome = fault.map_or("success", |fault| fault.kind.name());
        let model = model.to_owned();
        self.seconds.get_or_create(&OfModel { model: model.clone() }).observe(took.as_secs_f64());
        self.requests.get_or_create(&OfOutcome { model, outcome }).inc();
    }

    pub fn ran(&self, model: &str, queued: &[Duration], n_rows: usize) {
        let of_model = OfModel { model: model.to_owned() };
        self.batches.get_or_create(&of_model).observe(n_rows as f64);
        let of_queue = self.queued.get_or_create(&of_model);
        queued.iter().for_each(|waited| of_queue.observe(waited.as_secs_f64()));
    }
}

/// A count and the total time.
#[derive(Clone, Copy, Debug, Default)]
struct Times(u64, Duration);

impl Times {
    fn add(&mut self, took: Duration) {
        self.0 += 1;
        self.1 += took;
    }

    fn message(self) -> Option<protocol::StatisticDuration> {
        Some(protocol::StatisticDuration { count: self.0, ns: self.1.as_nanos() as u64 })
    }
}

#[derive(Debug, Default)]
struct ModelCounts {
    /// Milliseconds since 1970.
    last: u64,
    n_rows: u64,
    n_executions: u64,
    success: Times,
    fail: Times,
    queue: Times,
    infer: Times,
    batches: BTreeMap<u64, Times>,
}

#[derive(Debug, Default)]
pub struct Statistics(Mutex<ModelCounts>);

impl Statistics {
    fn with<T>(&self, change: impl FnOnce(&mut ModelCounts) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn answered(
        &self,
        took: Duration,
        answer: Result<&ModelAnswer, &RequestError>,
        n_rows: usize,
    ) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.with(|counts| match answer {
            Ok(answer) => {
                counts.last = now.as_millis() as u64;
                counts.n_rows += n_rows as u64;
                counts.success.add(took);
                counts.queue.add(answer.queued);
                counts.infer.add(answer.computed);
            }
            Err(_) => counts.fail.add(took),
        });
    }

    pub fn ran(&self, n_rows: usize, took: Duration) {
        self.with(|counts| {
            counts.n_executions += 1;
            counts.batches.entry(n_rows as u64).or_default().add(took);
        });
    }

    pub fn message(&self, name: &str, version: u64) -> protocol::ModelStatistics {
        self.with(|counts| {
            let none = Times::default();
            let of_batch = |(&batch_size, times): (&u64, &Times)| protocol::InferBatchStatistics {
                batch_size,
                compute_input: none.message(),
                compute_infer: times.message(),
                compute_output: none.message(),
            };
            protocol::ModelStatistics {
                name: name.to_owned(),
                version: version.to_string(),
                last_inference: counts.last,
                inference_count: counts.n_rows,
                execution_count: counts.n_executions,
                inference_stats: Some(protocol::InferStatistics {
                    success: counts.success.message(),
                    fail: counts.fail.message(),
                    queue: counts.queue.message(),
                    compute_input: none.message(),
                    compute_infer: counts.infer.message(),
                    compute_output: none.message(),
                    cache_hit: none.message(),
                    cache_miss: none.message(),
                }),
                batch_stats: counts.batches.iter().map(of_batch).collect(),
            }
        })
    }
}
