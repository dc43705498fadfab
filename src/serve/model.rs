//! A version of a model, ready to answer: one that runs, or an ensemble of several.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bireme_etl::serving::Preprocessor;
use bireme_etl::tensor::{Tensor, TensorView};

use crate::batcher::{Answer, Batcher, Coming, Executor, Policy};
use crate::fault::{Fault, Kind};
use crate::protocol::model_config::SchedulingChoice;
use crate::protocol::{ModelConfig, ModelEnsembling};
use crate::request::Request;
use crate::statistics::{Metrics, Statistics};
use crate::torchscript::{Call, Module};

/// A version of a model.
pub struct Model {
    /// Its configuration.
    pub config: ModelConfig,
    /// Its number.
    pub version: u64,
    work: Work,
    statistics: Arc<Statistics>,
    metrics: Arc<Metrics>,
}

enum Work {
    Runs(Batcher),
    Ensemble(Vec<Step>),
}

/// A step of an ensemble.
struct Step {
    model: Arc<Model>,
    /// The step's inputs, and the ensemble's tensors that they are.
    inputs: Vec<(String, String)>,
    /// The step's outputs, and the ensemble's tensors that they become.
    outputs: Vec<(String, String)>,
}

impl Model {
    /// A model that runs, on so many threads or more if its configuration asks for them.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn that_runs(
        config: ModelConfig,
        version: u64,
        executor: Arc<dyn Executor>,
        n_threads: usize,
        metrics: Arc<Metrics>,
    ) -> Result<Self, String> {
        let statistics = Arc::new(Statistics::default());
        let observe = {
            let (name, statistics, metrics) = (config.name.clone(), statistics.clone(), metrics.clone());
            Box::new(move |queued: &[Duration], n_rows: usize, took: Duration| {
                statistics.ran(n_rows, took);
                metrics.ran(&name, queued, n_rows);
            })
        };
        let policy = policy(&config);
        let policy = Policy { n_instances: policy.n_instances.max(n_threads), ..policy };
        let batcher = Batcher::start(&config.name, policy, executor, observe);
        let work = Work::Runs(batcher.map_err(|error| format!("cannot start a thread: {error}"))?);
        Ok(Self { config, version, work, statistics, metrics })
    }

    /// An ensemble of models that are loaded.
    ///
    /// # Errors
    /// Steps that do not fit together.
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
            waiting.push(Step { model, inputs: pairs(&step.input_map), outputs: pairs(&step.output_map) });
        }
        // In an order in which each finds what it needs.
        let mut known: Vec<String> = config.input.iter().map(|input| input.name.clone()).collect();
        let mut steps: Vec<Step> = Vec::new();
        while !waiting.is_empty() {
            let is_ready = |step: &Step| step.inputs.iter().all(|(_, tensor)| known.contains(tensor));
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
        Ok(Self { config, version, work: Work::Ensemble(steps), statistics: Arc::default(), metrics })
    }

    /// The steps' models, of an ensemble.
    pub fn parts(&self) -> impl Iterator<Item = &Arc<Self>> {
        let steps = if let Work::Ensemble(steps) = &self.work { &steps[..] } else { &[] };
        steps.iter().map(|step| &step.model)
    }

    /// Its counts, as the protocol's message.
    pub fn statistics(&self) -> crate::protocol::ModelStatistics {
        self.statistics.message(&self.config.name, self.version)
    }

    /// Answers a request that was checked.
    ///
    /// # Errors
    /// What is wrong with it, or with the server.
    pub async fn infer(&self, request: Request) -> Result<Vec<Tensor>, Fault> {
        self.answer(request, self.announce()).await
    }

    /// The same for a caller who has nothing else to do, outside of any runtime.
    ///
    /// # Errors
    /// As [`Model::infer`], and a request that does not fit the model.
    pub fn infer_and_wait(&self, request: Request) -> Result<Vec<Tensor>, Fault> {
        request.check(&self.config, usize::MAX)?;
        let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(Fault::internal)?;
        runtime.block_on(self.infer(request))
    }

    fn announce(&self) -> Option<Coming> {
        if let Work::Runs(batcher) = &self.work { Some(batcher.announce()) } else { None }
    }

    async fn answer(&self, request: Request, coming: Option<Coming>) -> Result<Vec<Tensor>, Fault> {
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

    async fn run(&self, steps: &[Step], request: Request) -> Result<Answer, Fault> {
        let Request { inputs, outputs, parameters, max_answer } = request;
        let wanted: Vec<&str> = match outputs.is_empty() {
            true => self.config.output.iter().map(|output| output.name.as_str()).collect(),
            false => outputs.iter().map(String::as_str).collect(),
        };
        // All at once: a model's threads shall wait for what is still with the one before.
        let coming: Vec<Option<Coming>> = steps.iter().map(|step| step.model.announce()).collect();
        let mut tensors: HashMap<String, Tensor> =
            inputs.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        for (number, (step, coming)) in steps.iter().zip(coming).enumerate() {
            let later = &steps[number + 1..];
            let is_used_later = |tensor: &str| {
                wanted.contains(&tensor)
                    || later.iter().any(|step| step.inputs.iter().any(|(_, input)| input == tensor))
            };
            // What is optional may be absent; the step's model knows.
            let inputs = step.inputs.iter().filter_map(|(name, tensor)| {
                let found = match is_used_later(tensor) {
                    true => tensors.get(tensor).cloned(),
                    false => tensors.remove(tensor),
                };
                found.map(|found| Tensor { name: name.clone(), ..found })
            });
            let inputs = inputs.collect();
            let outputs = step.outputs.iter().filter(|(_, tensor)| is_used_later(tensor));
            let outputs = outputs.map(|(name, _)| name.clone()).collect();
            let request = Request { inputs, outputs, parameters: parameters.clone(), max_answer };
            // A step is rarely an ensemble itself; then its future must have a known size.
            for made in Box::pin(step.model.answer(request, coming)).await? {
                let of_ensemble = step.outputs.iter().find(|(name, _)| *name == made.name);
                if let Some((_, tensor)) = of_ensemble {
                    tensors.insert(tensor.clone(), Tensor { name: tensor.clone(), ..made });
                }
            }
        }
        let outputs = wanted.iter().map(|name| {
            let found = tensors.remove(*name);
            found.ok_or_else(|| Fault::internal(format!("no step made the output `{name}`")))
        });
        Ok(Answer {
            outputs: outputs.collect::<Result<_, _>>()?,
            queued: Duration::ZERO,
            computed: Duration::ZERO,
        })
    }
}

/// Checks, before anything is computed, that an answer is not larger than allowed.
fn check_answer(config: &ModelConfig, n_rows: usize, request: &Request) -> Result<(), Fault> {
    let Some(max) = request.max_answer.filter(|_| config.max_batch_size > 0) else { return Ok(()) };
    let is_wanted = |name: &String| request.outputs.is_empty() || request.outputs.contains(name);
    let outputs = config.output.iter().filter(|output| is_wanted(&output.name));
    // What depends on the request is small.
    let of_row = outputs.map(|output| output.dims.iter().map(|&dim| dim.max(1) as usize).product::<usize>());
    let n_bytes = of_row.sum::<usize>().saturating_mul(4).saturating_mul(n_rows);
    if n_bytes <= max {
        return Ok(());
    }
    let message = format!(
        "the answer would take {} MiB, and at most {} are given: ask for fewer sessions at once",
        n_bytes >> 20,
        max >> 20
    );
    Err(Fault::new(Kind::TooLarge, message))
}

/// How a configuration wants its requests brought together.
fn policy(config: &ModelConfig) -> Policy {
    let batching = match &config.scheduling_choice {
        Some(SchedulingChoice::DynamicBatching(batching)) => Some(batching),
        _ => None,
    };
    // In larger batches than are preferred, those who came first would wait for the last.
    let preferred = batching.and_then(|batching| batching.preferred_batch_size.iter().max().copied());
    let max_batch = batching.map_or(0, |_| preferred.unwrap_or(config.max_batch_size).max(0) as usize);
    let queue = batching.and_then(|batching| batching.default_queue_policy.as_ref());
    let delay = batching.map_or(0, |batching| batching.max_queue_delay_microseconds);
    Policy {
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
    fn execute(&self, requests: &[&Request]) -> Vec<Result<Vec<Tensor>, String>> {
        let answer = |request: &&Request| self.apply(&views(request), &request.parameters);
        requests.iter().map(answer).collect()
    }
}

impl Executor for Module {
    fn execute(&self, requests: &[&Request]) -> Vec<Result<Vec<Tensor>, String>> {
        let calls = requests.iter().map(|&request| Call { inputs: views(request), wanted: &request.outputs });
        Self::execute(self, &calls.collect::<Vec<_>>())
    }
}

fn views(request: &Request) -> Vec<TensorView<'_>> {
    request.inputs.iter().map(Tensor::view).collect()
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} version {}", self.config.name, self.version)
    }
}

/// A fault about a model that is not there.
pub(crate) fn not_ready(name: &str, reason: &str) -> Fault {
    Fault::new(Kind::NotFound, format!("model {} is not ready: {reason}", bireme_base::message::quoted(name)))
}
