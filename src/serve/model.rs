//! A loaded version of a model: an executor with its queue, or an ensemble.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bireme_etl::serving::Preprocessor;
use bireme_protocol::{Tensor, TensorView};

use crate::batcher::{Announcement, BatchPolicy, Batcher, Executor, ModelAnswer};
use crate::protocol::model_config::SchedulingChoice;
use crate::protocol::{ModelConfig, ModelEnsembling};
use crate::request::InferRequest;
use crate::request_error::{RequestError, RequestErrorKind};
use crate::statistics::{Metrics, Statistics};
use crate::torchscript::{ModuleCall, ScriptModule};

pub struct ServedModel {
    pub config: ModelConfig,
    pub version: u64,
    work: Work,
    statistics: Arc<Statistics>,
    metrics: Arc<Metrics>,
}

enum Work {
    Runs(Batcher),
    Ensemble(Vec<EnsembleStep>),
}

struct EnsembleStep {
    model: Arc<ServedModel>,
    /// Names of the step's inputs, each with the name of the ensemble's tensor.
    inputs: Vec<(String, String)>,
    /// Names of the step's outputs, each with the name of the ensemble's tensor.
    outputs: Vec<(String, String)>,
}

impl ServedModel {
    /// A model with an executor, on `n_threads` threads or the number in its configuration,
    /// whichever is larger.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn that_runs(
        config: ModelConfig,
        version: u64,
        executor: Arc<dyn Executor>,
        n_threads: usize,
        metrics: Arc<Metrics>,
    ) -> Result<Self, String> {
        let statistics = Arc::new(Statistics::default());
        let observe = {
            let (name, statistics, metrics) =
                (config.name.clone(), statistics.clone(), metrics.clone());
            Box::new(move |queued: &[Duration], n_rows: usize, took: Duration| {
                statistics.ran(n_rows, took);
                metrics.ran(&name, queued, n_rows);
            })
        };
        let policy = policy(&config);
        let policy = BatchPolicy { n_instances: policy.n_instances.max(n_threads), ..policy };
        let batcher = Batcher::start(&config.name, policy, executor, observe);
        let work = Work::Runs(batcher.map_err(|error| format!("cannot start a thread: {error}"))?);
        Ok(Self { config, version, work, statistics, metrics })
    }

    /// An ensemble of loaded models.
    ///
    /// # Errors
    /// A step's input or an output of the ensemble that no step makes.
    pub fn ensemble(
        config: ModelConfig,
        version: u64,
        scheduling: &ModelEnsembling,
        mut find: impl FnMut(&str, i64) -> Result<Arc<Self>, String>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, String> {
        let pairs = |map: &std::collections::BTreeMap<String, String>| -> Vec<(String, String)> {
            map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
        };
        let mut waiting = Vec::new();
        for step in &scheduling.step {
            let model = find(&step.model_name, step.model_version)?;
            waiting.push(EnsembleStep {
                model,
                inputs: pairs(&step.input_map),
                outputs: pairs(&step.output_map),
            });
        }
        // Sort the steps so that each follows those that make its inputs.
        let mut known: Vec<String> = config.input.iter().map(|input| input.name.clone()).collect();
        let mut steps: Vec<EnsembleStep> = Vec::new();
        while !waiting.is_empty() {
            let is_ready =
                |step: &EnsembleStep| step.inputs.iter().all(|(_, tensor)| known.contains(tensor));
            let ready = waiting.iter().position(is_ready).ok_or_else(|| {
                format!("nothing makes the inputs of step `{}`", waiting[0].model.config.name)
            })?;
            let step = waiting.remove(ready);
            known.extend(step.outputs.iter().map(|(_, tensor)| tensor.clone()));
            steps.push(step);
        }
        if let Some(output) = config.output.iter().find(|output| !known.contains(&output.name)) {
            return Err(format!("no step makes the output `{}`", output.name));
        }
        Ok(Self {
            config,
            version,
            work: Work::Ensemble(steps),
            statistics: Arc::default(),
            metrics,
        })
    }

    pub fn parts(&self) -> impl Iterator<Item = &Arc<Self>> {
        let steps = if let Work::Ensemble(steps) = &self.work { &steps[..] } else { &[] };
        steps.iter().map(|step| &step.model)
    }

    pub fn statistics(&self) -> crate::protocol::ModelStatistics {
        self.statistics.message(&self.config.name, self.version)
    }

    /// Runs a request that [`InferRequest::check`] has accepted.
    ///
    /// # Errors
    /// A request that the model refuses, or a failure of the model.
    pub async fn infer(&self, request: InferRequest) -> Result<Vec<Tensor>, RequestError> {
        self.answer(request, self.announce()).await
    }

    /// Checks and runs a request, outside of any runtime.
    ///
    /// # Errors
    /// As [`ServedModel::infer`], and a request that does not fit the model.
    pub fn infer_and_wait(&self, request: InferRequest) -> Result<Vec<Tensor>, RequestError> {
        request.check(&self.config, usize::MAX)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .map_err(RequestError::internal)?;
        runtime.block_on(self.infer(request))
    }

    fn announce(&self) -> Option<Announcement> {
        if let Work::Runs(batcher) = &self.work { Some(batcher.announce()) } else { None }
    }

    async fn answer(
        &self,
        request: InferRequest,
        coming: Option<Announcement>,
    ) -> Result<Vec<Tensor>, RequestError> {
        let begun = Instant::now();
        let n_rows = match (self.config.max_batch_size > 0, request.inputs.first()) {
            (true, Some(tensor)) => tensor.shape[0] as usize,
            _ => 1,
        };
        let answer = match (check_answer(&self.config, n_rows, &request), &self.work, coming) {
            (Err(fault), ..) => Err(fault),
            (Ok(()), Work::Ensemble(steps), _) => self.run(steps, request).await,
            (Ok(()), Work::Runs(_), Some(coming)) => coming.submit(request).await,
            (Ok(()), Work::Runs(batcher), None) => batcher.announce().submit(request).await,
        };
        let took = begun.elapsed();
        self.statistics.answered(took, answer.as_ref(), n_rows);
        self.metrics.answered(&self.config.name, took, answer.as_ref().err());
        answer.map(|answer| answer.outputs)
    }

    async fn run(
        &self,
        steps: &[EnsembleStep],
        request: InferRequest,
    ) -> Result<ModelAnswer, RequestError> {
        let InferRequest { inputs, outputs, parameters, max_answer } = request;
        let wanted: Vec<&str> = if outputs.is_empty() {
            self.config.output.iter().map(|output| output.name.as_str()).collect()
        } else {
            outputs.iter().map(String::as_str).collect()
        };
        // Announce to all steps at once, so that each model waits for requests that are still in
        // the step before.
        let coming: Vec<Option<Announcement>> =
            steps.iter().map(|step| step.model.announce()).collect();
        let mut tensors: HashMap<String, Tensor> =
            inputs.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        for (number, (step, coming)) in steps.iter().zip(coming).enumerate() {
            let later = &steps[number + 1..];
            let is_used_later = |tensor: &str| {
                wanted.contains(&tensor)
                    || later.iter().any(|step| step.inputs.iter().any(|(_, input)| input == tensor))
            };
            // Optional inputs may be absent; the step's model checks the others.
            let inputs = step.inputs.iter().filter_map(|(name, tensor)| {
                let found = if is_used_later(tensor) {
                    tensors.get(tensor).cloned()
                } else {
                    tensors.remove(tensor)
                };
                found.map(|found| Tensor { name: name.clone(), ..found })
            });
            let inputs = inputs.collect();
            let outputs = step.outputs.iter().filter(|(_, tensor)| is_used_later(tensor));
            let outputs = outputs.map(|(name, _)| name.clone()).collect();
            let request =
                InferRequest { inputs, outputs, parameters: parameters.clone(), max_answer };
            // Boxed, because a step may be an ensemble, whose future would contain itself.
            for made in Box::pin(step.model.answer(request, coming)).await? {
                let of_ensemble = step.outputs.iter().find(|(name, _)| *name == made.name);
                if let Some((_, tensor)) = of_ensemble {
                    tensors.insert(tensor.clone(), Tensor { name: tensor.clone(), ..made });
                }
            }
        }
        let outputs = wanted.iter().map(|name| {
            let found = tensors.remove(*name);
            found.ok_or_else(|| RequestError::internal(format!("no step made the output `{name}`")))
        });
        Ok(ModelAnswer {
            outputs: outputs.collect::<Result<_, _>>()?,
            queued: Duration::ZERO,
            computed: Duration::ZERO,
        })
    }
}

/// Refuses, before anything is computed, a request whose outputs would be larger than allowed.
fn check_answer(
    config: &ModelConfig,
    n_rows: usize,
    request: &InferRequest,
) -> Result<(), RequestError> {
    let Some(max) = request.max_answer.filter(|_| config.max_batch_size > 0) else { return Ok(()) };
    let is_wanted = |name: &String| request.outputs.is_empty() || request.outputs.contains(name);
    let outputs = config.output.iter().filter(|output| is_wanted(&output.name));
    // Dimensions that depend on the request (−1) are small.
    let of_row =
        outputs.map(|output| output.dims.iter().map(|&dim| dim.max(1) as usize).product::<usize>());
    let n_bytes = of_row.sum::<usize>().saturating_mul(4).saturating_mul(n_rows);
    if n_bytes <= max {
        return Ok(());
    }
    let message = format!(
        "the answer would take {} MiB, and at most {} are given: ask for fewer sessions at once",
        n_bytes >> 20,
        max >> 20
    );
    Err(RequestError::new(RequestErrorKind::TooLarge, message))
}

/// The batching of a configuration.
fn policy(config: &ModelConfig) -> BatchPolicy {
    let batching = match &config.scheduling_choice {
        Some(SchedulingChoice::DynamicBatching(batching)) => Some(batching),
        _ => None,
    };
    // Batches larger than preferred would make the first requests wait for the last.
    let preferred =
        batching.and_then(|batching| batching.preferred_batch_size.iter().max().copied());
    let max_batch =
        batching.map_or(0, |_| preferred.unwrap_or(config.max_batch_size).max(0) as usize);
    let queue = batching.and_then(|batching| batching.default_queue_policy.as_ref());
    let delay = batching.map_or(0, |batching| batching.max_queue_delay_microseconds);
    BatchPolicy {
        max_batch,
        max_delay: Duration::from_micros(delay),
        n_instances: config
            .instance_group
            .iter()
            .map(|group| group.count.max(1) as usize)
            .sum::<usize>()
            .max(1),
        max_queue: queue.map_or(0, |policy| policy.max_queue_size as usize),
    }
}

impl Executor for Preprocessor {
    fn execute(&self, requests: &[&InferRequest]) -> Vec<Result<Vec<Tensor>, String>> {
        let answer = |request: &&InferRequest| self.apply(&views(request), &request.parameters);
        requests.iter().map(answer).collect()
    }
}

impl Executor for ScriptModule {
    fn execute(&self, requests: &[&InferRequest]) -> Vec<Result<Vec<Tensor>, String>> {
        let calls = requests
            .iter()
            .map(|&request| ModuleCall { inputs: views(request), wanted: &request.outputs });
        Self::execute(self, &calls.collect::<Vec<_>>())
    }
}

fn views(request: &InferRequest) -> Vec<TensorView<'_>> {
    request.inputs.iter().map(Tensor::view).collect()
}

impl std::fmt::Debug for ServedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} version {}", self.config.name, self.version)
    }
}

/// The error for a model that is not loaded.
pub(crate) fn not_ready(name: &str, reason: &str) -> RequestError {
    RequestError::new(
        RequestErrorKind::NotFound,
        format!("model {} is not ready: {reason}", bireme_base::message::quoted(name)),
    )
}
