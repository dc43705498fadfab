//! Training by gradients: the step is the same for one rank and many, on CPUs and GPUs.

use std::ops::ControlFlow;
use std::sync::mpsc::{Sender, channel};

use tch::{Device, Kind, Tensor};

use super::fault::Fault;
use super::gradient_sync::{GradientSync, Requests};
use super::step_graph::StepGraph;
use super::{Day, Learner, RankContext, TrainError};
use crate::checkpoint::{SharedCheckpoint, Tensors};
use crate::config::{Config, LossConfig, Reduction, StartConfig, TableOptimizer, TrainConfig};
use crate::data::{Batch, Features, Loader, Read};
use crate::model::head::{Logits, NegativeSampler, uniform_numbers};
use crate::model::parameters::copy_rows;
use crate::model::{
    COUNTS, ItemTable, Network, Neural, PreparedBatch, Preparer, Recommender, SizeBounds, StepSizes,
};
use crate::optim::{Optimizer, OptimizerConfig, StepOutcome, StepSums};

/// A network and its optimizer. The state of the optimizer is kept from day to day; the schedule of
/// the learning rate starts anew each day.
pub(super) struct GradientLearner<'a> {
    network: Network<'a>,
    sync: GradientSync<'a>,
    optimizer: Optimizer,
    fault: Fault,
}

impl<'a> GradientLearner<'a> {
    pub(super) fn new(
        model: &Neural<'_>,
        config: &Config,
        features: &Features,
        place: RankContext<'a>,
        item_table: ItemTable<'a>,
    ) -> Result<Self, String> {
        let Config { run, data, train, .. } = config;
        let mut network = Network::with_item_table(
            model,
            features,
            data.max_length,
            config.evaluate.reminders,
            run.seed,
            place.device,
            item_table,
        )?;
        let optimizer = Optimizer::new(
            &network.parameters().values(),
            network.tables(),
            OptimizerConfig {
                tables: train.tables,
                learning_rate: train.learning_rate,
                weight_decay: train.weight_decay,
            },
        );
        if lists_rows(config, &network) {
            let n_tables = network.tables().len();
            network.gradients_mut().list_rows(n_tables);
        }
        let sync = GradientSync::new(&network, run.reduction, place.collective);
        Ok(Self { network, sync, optimizer, fault: Fault::planted() })
    }

    /// *All ranks.* One backward pass, and the end of the step if the pass is its only one.
    fn pass(
        &mut self,
        pass: &PassInput,
        sampler: &NegativeSampler,
        day: &mut Day<'_>,
    ) -> Result<Option<StepOutcome>, TrainError> {
        let (rank, step) = (day.rank(), day.state.position.global_step);
        let negatives = sampler.negatives(&pass.uniform);
        let mut sums =
            self.network.backward(&pass.batch, &negatives, &mut self.sync, &mut day.timer)?;
        self.fault.before_reduction(rank, step, self.network.gradients_mut(), &mut sums);
        self.sync.accumulate(self.network.gradients_mut(), &sums, &pass.requests);
        if pass.is_only { self.finish(pass, day).map(Some) } else { Ok(None) }
    }

    /// *All ranks.* Ends a step after its last pass: sums gradients over the ranks and updates the
    /// parameters.
    ///
    /// Losses are summed over targets and divided by the targets of all ranks, so that any number
    /// of ranks takes the same step.
    fn finish(&mut self, last: &PassInput, day: &mut Day<'_>) -> Result<StepOutcome, TrainError> {
        day.timer.end("backward");
        let synced = self.sync.finish(&mut self.network, last.batch.step_seed())?;
        day.timer.end("communication");
        let sums = StepSums {
            lists: synced.lists,
            sharded_squares: synced.sharded_squares.as_ref(),
            own_loss: &synced.own_loss,
            rates: &last.rates,
            clip_norm: day.config.train.clip_norm,
        };
        let values = self.network.parameters().values();
        let outcome = self.optimizer.finish(&values, self.network.gradients_mut(), sums);
        let (rank, step) = (day.rank(), day.state.position.global_step);
        self.fault.after_step(rank, step, self.network.parameters());
        day.timer.end("optimizer");
        Ok(outcome)
    }

    /// Sets the vectors that items begin with before the first step, and freezes those that stay.
    fn begin_vectors(&mut self, day: &Day<'_>) -> Result<(), TrainError> {
        let Some(model) = day.config.model.neural() else { return Ok(()) };
        let (input, seed) = (model.input(), day.config.run.seed);
        if day.is_first && day.state.position.day_step == 0 {
            self.network.start_vectors(input, seed, day.plan.window.today(), day.pretrained)?;
        }
        if let (Some(StartConfig::File { frozen: true, .. }), Some(pretrained)) =
            (&input.start, day.pretrained)
        {
            self.network.freeze_items(&pretrained.items);
        }
        Ok(())
    }

    /// *All ranks.* Compares the replicated parameters of all ranks, bit by bit.
    fn compare_ranks(&self, day: &Day<'_>, n_done: usize) -> Result<(), TrainError> {
        let bits = self.network.parameters().replicated_values().view_dtype(Kind::Int);
        let sums = Tensor::zeros([2], (Kind::Int64, bits.device()));
        // Some parameters at a time: their 64-bit copies would need twice the memory of all.
        for bits in bits.split(COMPARED_AT_ONCE, 0) {
            let bits = bits.to_kind(Kind::Int64);
            let of_part = [bits.sum(Kind::Int64), (&bits * &bits).sum(Kind::Int64)];
            let _ = sums.shallow_clone().g_add_(&Tensor::stack(&of_part, 0));
        }
        let mine = Vec::<i64>::try_from(sums).expect("two sums");
        let all = day.place.collective.gather(&mine)?;
        let all: Vec<&[i64]> = all.chunks_exact(2).collect();
        let n_like = |sums: &[i64]| all.iter().filter(|other| **other == sums).count();
        // The majority is taken to be right; of two equally large groups, that of the lowest rank.
        let most = all.iter().map(|sums| n_like(sums)).max().unwrap_or(0);
        let right = all.iter().find(|sums| n_like(sums) == most).copied().unwrap_or_default();
        if most == all.len() {
            return Ok(());
        }
        let hosts = day.place.collective.gather_bytes(crate::collective::host_name().as_bytes())?;
        let differing = (0..all.len()).filter(|&rank| all[rank] != right);
        let ranks =
            differing.map(|rank| (rank, String::from_utf8_lossy(&hosts[rank]).into_owned()));
        let is_tie = 2 * most <= all.len();
        Err(TrainError::Desync { day: day.plan.day, step: n_done, ranks: ranks.collect(), is_tie })
    }
}

/// Whether the gradients of tables are listed by row: on a GPU, if few rows have a gradient and
/// only those change. All other steps form them in place.
fn lists_rows(config: &Config, network: &Network<'_>) -> bool {
    let Config { run, train, .. } = config;
    network.device() != Device::Cpu
        && train.tables != TableOptimizer::Adamw
        && !matches!(train.loss, LossConfig::Softmax { .. })
        && run.reduction != Reduction::Reproducible
        && network.items_are_rows()
        && network.scores_once()
        && !network.item_table().is_sharded()
}

/// What a backward pass reads that depends on its sessions and its step.
struct PassInput {
    batch: PreparedBatch,
    /// See [`NegativeSampler::negatives`].
    uniform: Tensor,
    /// See [`Requests::to_tensor`]; of the step in its first pass, else zero.
    requests: Tensor,
    /// See [`Optimizer::rates`], f64 `[2]`.
    rates: Tensor,
    /// Whether the step has no other pass on this rank.
    is_only: bool,
}

impl PassInput {
    /// All tensors, to be sent to a device together.
    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let of_batch = self.batch.tensors_mut().into_iter();
        of_batch.chain([&mut self.uniform, &mut self.requests, &mut self.rates]).collect()
    }
}

/// What the loader's thread sends.
enum Loaded {
    /// The sizes of the steps of the next epoch. The loader waits for those that all ranks agree
    /// on.
    Epoch(SizeBounds),
    /// The passes of a step in host memory, without requests and with rates of 0. Every rank has at
    /// least one.
    Step(Vec<PassInput>),
}

/// Prepares steps on the loader's thread.
#[derive(Clone)]
struct StepSource {
    preparer: Preparer,
    /// See [`NegativeSampler::n_sampled`].
    n_sampled: i64,
    /// Whether all steps have the same sizes.
    has_sizes: bool,
}

impl StepSource {
    /// Starts a loader at step `first_step` of the day, and returns where it waits for sizes.
    fn start(self, day: &Day<'_>, first_step: usize) -> (Loader<Loaded>, Sender<StepSizes>) {
        let (agreed, sizes_of_epoch) = channel();
        let (mut sizes, mut is_new_epoch) = (None, false);
        let prepare = move |read: Read<'_>| match read {
            Read::Epoch(_) if !self.has_sizes => None,
            Read::Epoch(steps) => {
                is_new_epoch = true;
                let bounds = steps.flatten().map(|outline| self.preparer.bounds(&outline));
                Some(Loaded::Epoch(bounds.reduce(|all, of| all.max(&of)).unwrap_or_default()))
            }
            Read::Step(micro_batches) => {
                if std::mem::take(&mut is_new_epoch) {
                    // Without an answer the training has ended.
                    sizes = Some(sizes_of_epoch.recv().ok()?);
                }
                Some(Loaded::Step(self.step(&micro_batches, sizes.as_ref())))
            }
        };
        let collective = day.place.collective;
        let ranks = (collective.rank(), collective.world_size());
        (Loader::preparing(&day.plan, day.features, ranks, first_step, prepare), agreed)
    }

    fn step(&self, micro_batches: &[Batch], sizes: Option<&StepSizes>) -> Vec<PassInput> {
        let pass = |batch: &Batch| PassInput {
            batch: self.preparer.prepare(batch, sizes),
            uniform: uniform_numbers(self.n_sampled, batch.step_seed),
            requests: Requests::default().to_tensor(),
            rates: Tensor::from_slice(&[0f64; 2]),
            is_only: micro_batches.len() == 1,
        };
        micro_batches.iter().map(pass).collect()
    }
}

/// Parameters whose bits are summed together.
const COMPARED_AT_ONCE: i64 = 1 << 24;

/// Type and memory of the logits.
fn logits(config: &TrainConfig, kind: Kind, device: Device) -> Logits {
    // A CPU's caches are small; a GPU is faster with large products.
    let default_mib = if device == Device::Cpu { 192 } else { 1024 };
    Logits::in_bytes(kind, config.logits_mib.unwrap_or(default_mib) << 20)
}

impl Learner for GradientLearner<'_> {
    fn recommender(&self) -> &dyn Recommender {
        &self.network
    }

    fn item_table(&self) -> ItemTable<'_> {
        self.network.item_table().clone()
    }

    fn learn_day(&mut self, day: &mut Day<'_>) -> Result<ControlFlow<()>, TrainError> {
        let n_steps = day.plan.n_steps();
        let collective = day.place.collective;
        self.begin_vectors(day)?;
        if day.state.position.day_step == 0 {
            // A checkpoint of a later step contains what this takes from the day.
            self.network.begin_day(day.plan.day, day.plan.window.today(), day.catalogue)?;
        }
        let mut n_done = day.state.position.day_step;
        let train = &day.config.train;
        let sampler = NegativeSampler::new(
            train.loss,
            day.occurrences,
            logits(train, day.config.run.precision.logits_kind(), day.place.device),
            day.place.device,
        );
        let mut graph = StepGraph::new(&self.network, self.fault.is_planted(), day)?;
        let source = StepSource {
            preparer: self.network.preparer(),
            n_sampled: sampler.n_sampled(),
            has_sizes: graph.has_sizes(),
        };
        let (steps, agreed_sizes) = source.clone().start(day, n_done);
        for item in steps {
            if let Some(watch) = collective.watch() {
                watch.begin_step(day.plan.day, n_done + 1);
            }
            let mut step = match item? {
                Loaded::Epoch(bounds) => {
                    let sizes = graph.agree_on_sizes(&bounds, &source.preparer, day)?;
                    // A loader that failed sends its error next.
                    let _ = agreed_sizes.send(sizes);
                    continue;
                }
                Loaded::Step(step) => step,
            };
            // On a GPU a wait for the device may be a wait for another rank.
            let _step = collective.watch().map(|watch| watch.begin("a step".to_owned()));
            let rates = self.optimizer.rates(train.schedule.factor(n_done, n_steps));
            let [learning_rate, _] = rates;
            step[0].requests = day.requests().to_tensor();
            let mut outcome = None;
            for pass in &mut step {
                pass.rates = Tensor::from_slice(&rates);
                graph.frame().send(pass.tensors_mut(), day.place.device);
                day.timer.end("data");
                outcome = graph.run(day, |day| self.pass(pass, &sampler, day))?;
            }
            let outcome = match (outcome, step.last()) {
                (None, Some(last)) => self.finish(last, day)?,
                (Some(outcome), _) => outcome,
                (None, None) => unreachable!("a step has a pass on every rank"),
            };
            n_done += 1;
            let every = day.config.run.compare_ranks_every;
            if every > 0 && (day.state.position.global_step + 1).is_multiple_of(every) {
                self.compare_ranks(day, n_done)?;
            }
            if day.step_done(self, learning_rate, &outcome)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            day.timer.end("records");
        }
        self.network.end_day(day.plan.day, day.plan.window.today())?;
        self.network.free_workspace();
        Ok(ControlFlow::Continue(()))
    }

    fn tensors(&self) -> Tensors {
        let parameters = self.network.parameters();
        let state = self.optimizer.state().into_iter().flat_map(|(of, first, flat)| {
            let named = parameters.named_from(flat, first);
            named.into_iter().map(move |(name, tensor)| (format!("{of}.{name}"), tensor))
        });
        Tensors { weights: self.network.weights(), optimizer: state.collect() }
    }

    fn optimizer_steps(&self) -> i32 {
        self.optimizer.n_steps()
    }

    fn load_weights(&mut self, weights: &[(String, Tensor)]) -> Result<(), String> {
        self.network.load_weights(weights)
    }

    fn resume(&mut self, from: &SharedCheckpoint<'_>) -> Result<(), TrainError> {
        let mismatch = |problem| from.mismatch(problem);
        let (parameters, tables) = (self.network.parameters(), self.network.tables());
        let is_count = |name: &str| name.starts_with(COUNTS);
        let names = from.weight_names().filter(|name| !is_count(name));
        parameters.check_names(names).map_err(mismatch)?;
        let state = self.optimizer.state().into_iter().flat_map(|(of, first, flat)| {
            let named = parameters.named_from(flat, first).into_iter();
            named.map(move |(name, tensor)| {
                let may_grow = tables.iter().any(|table| table.name == name);
                (format!("{of}.{name}"), tensor, may_grow)
            })
        });
        let state: Vec<_> = state.collect();
        let is_saved = |name: &str| from.optimizer_names().any(|saved| saved == name);
        if let Some((name, ..)) = state.iter().find(|(name, ..)| !is_saved(name)) {
            return Err(mismatch(format!("`{name}` is missing")).into());
        }
        // The catalogue may have grown: new rows keep their initial values and zero optimizer
        // state.
        let mut counts = Vec::new();
        for saved in from.weights() {
            let (name, tensor) = saved?;
            if is_count(name) {
                counts.push((name.to_owned(), tensor));
                continue;
            }
            parameters.assign_one(&parameters.values(), name, &tensor, tables).map_err(mismatch)?;
        }
        for saved in from.optimizer() {
            let (name, saved) = saved?;
            if let Some((_, tensor, may_grow)) = state.iter().find(|(wanted, ..)| wanted == name) {
                copy_rows(name, &saved, tensor, *may_grow).map_err(mismatch)?;
            }
        }
        self.network.load_counts(&counts).map_err(mismatch)?;
        self.optimizer.set_n_steps(from.state().optimizer_steps);
        Ok(())
    }
}
