//! The day loop: train on day t, evaluate on day t + 1.

mod counting;
mod fault;
mod gradient;
mod memory;
mod reduction;
mod signals;
mod trained;
mod weights_file;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{
    CheckpointError, Checkpoints, Position, Saver, Shared, State, Tensors, counts_other_items,
};
use crate::collective::{Collective, CollectiveError};
use crate::config::{self, check_count, check_finite};
use crate::data::plan::Shape;
use crate::data::{
    AT_THE_START, DataError, DayPlan, Days, Features, RowCheck, SessionFile, Split, Window, occurrences,
};
use crate::device::laps::Laps;
use crate::device::memory::set_phase;
use crate::metrics::EvaluateError;
use crate::model::head::Logits;
use crate::model::{self, Counts, Evidence, LossConfig, Neighbours, Neural, Recommender, Share};
use crate::optim::{Schedule, TableOptimizer};
use crate::report::{Record, Report, ReportError, write_results};

use counting::CountLearner;
use gradient::GradientLearner;
pub use memory::{NotEnoughMemory, Purpose, check_memory};
pub use reduction::Reduction;
pub use signals::Signals;
use trained::EvaluationTask;
pub use trained::{ImportedWeights, TrainedRun};
pub use weights_file::WeightsError;

/// Section `[train]` of a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Passes over each day.
    pub epochs_per_day: usize,
    /// Sessions of a step, over all ranks.
    pub global_batch: usize,
    /// Sessions of a micro-batch: the global batch is made of whole ones, and ranks share it by them.
    pub micro_batch: usize,
    /// Learning rate that each day starts with.
    pub learning_rate: f64,
    /// What a target competes with.
    pub loss: LossConfig,
    /// How tables learn.
    pub tables: TableOptimizer,
    /// The learning rate over a day.
    pub schedule: Schedule,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest norm of the gradient of all parameters.
    pub clip_norm: f64,
    /// At most so many steps a day; absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps_per_day: Option<usize>,
    /// What becomes of a step whose loss or gradient is not finite.
    pub non_finite: NonFinite,
    /// Steps between two records.
    pub log_every_steps: usize,
    /// Whether what the time of steps is spent on is recorded too. A GPU is then waited for between phases, which takes time.
    pub time_phases: bool,
    /// Memory for logits, in MiB: the softmax is computed for as many targets at a time as this holds. Absent: 192 on the CPU,
    /// whose caches are small, and 1024 on a GPU, which does better with large products.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits_mib: Option<usize>,
}

/// Micro-batches of a global batch at most: each has its own order and its own part of every day's file.
const MOST_LANES: usize = 1 << 16;

impl Default for Config {
    fn default() -> Self {
        Self {
            epochs_per_day: 3,
            global_batch: 256,
            micro_batch: 32,
            learning_rate: 7.1e-4,
            loss: LossConfig::default(),
            tables: TableOptimizer::default(),
            schedule: Schedule::default(),
            weight_decay: 0.0,
            clip_norm: 1.0,
            max_steps_per_day: None,
            non_finite: NonFinite::default(),
            log_every_steps: 10,
            time_phases: false,
            logits_mib: None,
        }
    }
}

/// `train.non_finite`: what becomes of a step whose loss or gradient is NaN or infinite, on all ranks alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum NonFinite {
    /// The run ends. On a GPU this shows at the next record.
    #[default]
    Stop,
    /// The step is left out; a run that leaves out more than so many ends. On a GPU every step is waited for.
    Skip {
        /// Steps that may be left out.
        limit: usize,
    },
}

/// Section `[parallel]` of a configuration: what the ranks share out among them, besides the sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    /// Who holds the item table.
    pub item_table: ItemTable,
}

/// `parallel.item_table`: who holds the item table, its gradient and its optimizer's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ItemTable {
    /// Every rank all of it.
    #[default]
    Replicated,
    /// Every rank some of its rows: memory falls with the number of ranks, and what travels in a step does not grow with the
    /// catalogue.
    Sharded,
}

impl ItemTable {
    /// As a configuration writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Replicated => "replicated",
            Self::Sharded => "sharded",
        }
    }
}

impl Parallel {
    /// The rows of the tables of items that this rank holds.
    pub fn share<'a>(&self, n_items: i64, reduction: Reduction, collective: &'a dyn Collective) -> Share<'a> {
        match (self.item_table, reduction) {
            (ItemTable::Replicated, Reduction::Fast) => Share::copy(n_items, collective, Kind::Float),
            (ItemTable::Replicated, Reduction::Bf16) => Share::copy(n_items, collective, Kind::BFloat16),
            (ItemTable::Replicated, Reduction::Reproducible) => Share::whole(n_items),
            (ItemTable::Sharded, Reduction::Fast | Reduction::Bf16) => Share::of_rank(n_items, collective),
            (ItemTable::Sharded, Reduction::Reproducible) => Share::of_rank(n_items, collective).exactly(),
        }
    }
}

impl Config {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Says which key is wrong.
    pub fn check(&self) -> Result<(), String> {
        let positive = [
            ("epochs_per_day", self.epochs_per_day, 1 << 20),
            ("micro_batch", self.micro_batch, 1 << 20),
            ("global_batch", self.global_batch, usize::MAX),
            ("log_every_steps", self.log_every_steps, usize::MAX),
            ("logits_mib", self.logits_mib.unwrap_or(1), 1 << 24),
            ("max_steps_per_day", self.max_steps_per_day.unwrap_or(1), usize::MAX),
        ];
        positive.into_iter().try_for_each(|(key, value, most)| check_count(key, value, most))?;
        if !self.global_batch.is_multiple_of(self.micro_batch) {
            return Err(format!(
                "`global_batch` {} is not a whole number of micro-batches of {} (`micro_batch`)",
                self.global_batch, self.micro_batch
            ));
        }
        let n_lanes = self.global_batch / self.micro_batch;
        if n_lanes > MOST_LANES {
            return Err(format!(
                "`global_batch` {} is {n_lanes} micro-batches of `micro_batch` {}: at most {MOST_LANES}",
                self.global_batch, self.micro_batch
            ));
        }
        self.loss.check()?;
        let of_tables = match self.tables {
            TableOptimizer::Adamw | TableOptimizer::LazyAdamw => 0.0,
            TableOptimizer::Adagrad { learning_rate } => learning_rate,
        };
        let finite = [
            ("learning_rate", self.learning_rate),
            ("tables.learning_rate", of_tables),
            ("weight_decay", self.weight_decay),
            ("clip_norm", self.clip_norm),
        ];
        finite.into_iter().try_for_each(|(key, value)| check_finite(key, value, 0.0))
    }

    fn shape(&self) -> Shape {
        Shape { n_lanes: self.global_batch / self.micro_batch, micro_batch: self.micro_batch }
    }

    fn logits(&self, kind: Kind, device: Device) -> Logits {
        let by_default = if device == Device::Cpu { 192 } else { 1024 };
        Logits::in_bytes(kind, self.logits_mib.unwrap_or(by_default) << 20)
    }
}

/// What can end a run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Reading sessions.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Talking to the other ranks.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Saving or loading state.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Evaluating.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// Writing the log.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The loss or its gradient is NaN or infinite, on all ranks alike.
    #[error(
        "the loss is {loss} and the norm of its gradient {norm} at day {day}, step {step}{}{}",
        ranks.iter().map(|rank| format!(", from rank {rank}")).collect::<String>(),
        if *n_skipped > 0 { format!(", after {n_skipped} steps that were left out") } else { String::new() }
    )]
    NotFinite {
        /// As logged.
        loss: f64,
        /// Before clipping.
        norm: f64,
        /// The day trained on.
        day: i64,
        /// The step of the day, from 1.
        step: usize,
        /// Whose own losses are not finite.
        ranks: Vec<usize>,
        /// Steps left out before.
        n_skipped: usize,
    },
    /// Ranks whose weights are no longer the same, on all ranks alike.
    #[error("after day {day}, step {step}, the weights of {} are not those of the others: run again from the last checkpoint{}",
        ranks.iter().map(|(rank, host)| format!("rank {rank} on {host}")).collect::<Vec<_>>().join(" and "),
        if *is_tie { ", or theirs are wrong" } else { "" })]
    Desync {
        /// The day trained on.
        day: i64,
        /// Steps of the day that are done.
        step: usize,
        /// The ranks that differ from most, and their hosts.
        ranks: Vec<(usize, String)>,
        /// Whether no more ranks agree with each other than differ.
        is_tie: bool,
    },
    /// Ranks whose data files are not the same.
    #[error(
        "rank {rank} sees other data than rank 0: all need the same files, on a shared file system or copied whole"
    )]
    OtherData {
        /// The first that differs.
        rank: usize,
    },
    /// A model that does not fit the data's features.
    #[error("section `[model]` of the configuration: {0}")]
    Model(String),
    /// A loss that does not fit the catalogue.
    #[error("section `[train]` of the configuration: {0}")]
    Loss(String),
    /// Weights of elsewhere that cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A model that does not fit into memory.
    #[error(transparent)]
    Memory(#[from] NotEnoughMemory),
    /// The loader stopped before its last step.
    #[error("the loader of day {day} ended after {n_done} of {n_steps} steps")]
    LoaderEnded {
        /// The day trained on.
        day: i64,
        /// Steps it gave.
        n_done: usize,
        /// Steps it owed.
        n_steps: usize,
    },
}

impl TrainError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Memory(error) => Some(error.hint()),
            Self::Weights(error) => error.hint(),
            _ => None,
        }
    }
}

/// Something that learns day by day.
trait Learner {
    /// What it predicts with.
    fn recommender(&self) -> &dyn Recommender;

    /// *All ranks.* Learns from what is left of a day; breaks off where it was asked to.
    fn learn_day(&mut self, day: &mut Day<'_>) -> Result<ControlFlow<()>, TrainError>;

    /// Its state.
    fn tensors(&self) -> Tensors;

    /// Steps that the optimizer has counted.
    fn optimizer_steps(&self) -> i32;

    /// Takes the weights of what [`Learner::tensors`] of another run gave; the error says what does not fit.
    fn load_weights(&mut self, weights: &[(String, Tensor)]) -> Result<(), String>;

    /// *All ranks.* Takes all that a checkpoint holds of it.
    fn go_on(&mut self, from: &Shared<'_>) -> Result<(), TrainError>;
}

fn learner<'a>(
    config: &config::Config,
    features: &Features,
    device: Device,
    share: Share<'a>,
) -> Result<Box<dyn Learner + 'a>, TrainError> {
    let neural = |model: Neural<'_>| {
        let learner = GradientLearner::new(&model, config, features, device, share);
        learner.map(|learner| Box::new(learner) as Box<dyn Learner + 'a>).map_err(TrainError::Model)
    };
    let n_items = features.n_items();
    let evidence = match &config.model {
        model::Config::Gru(gru) => return neural(Neural::Gru(gru)),
        model::Config::Xlnet(xlnet) => return neural(Neural::Xlnet(xlnet)),
        model::Config::Popularity {} => Evidence::None,
        model::Config::Recent {} => Evidence::LastDay(vec![0; n_items as usize]),
        model::Config::Markov {} => Evidence::Successors(BTreeMap::new()),
        model::Config::Vsknn(vsknn) => Evidence::Neighbours(Neighbours::new(vsknn, n_items)),
    };
    Ok(Box::new(CountLearner(Counts::new(evidence, n_items))))
}

/// Where and with whom a run takes place.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The ranks.
    pub collective: &'a dyn Collective,
    /// This rank's device.
    pub device: Device,
}

/// The data of a run, opened and checked.
pub struct RunData {
    features: Features,
    /// (day, the train files up to it, the next day's valid file).
    days: Vec<(i64, Window, Arc<SessionFile>)>,
    /// Each of these files once, in the order in which they are read.
    files: Vec<Arc<SessionFile>>,
    /// What each of these files is, by day and part.
    fingerprints: BTreeMap<String, String>,
}

impl RunData {
    /// Opens every file that the run will read, so that what is missing is known before the first step.
    ///
    /// # Errors
    /// A missing day, unreadable file, unknown feature, features that do not suit the model, or more ranks than there
    /// is work for.
    pub fn open(dir: &Path, config: &config::Config, world_size: usize) -> Result<Self, TrainError> {
        let days = Days::open(dir, &config.data)?;
        config.model.check_features(days.features()).map_err(TrainError::Model)?;
        let n_items = days.features().n_items();
        if config.model.neural().is_some() {
            config.train.loss.check_items(n_items).map_err(TrainError::Loss)?;
        }
        let n_lanes = config.train.shape().n_lanes;
        if world_size > n_lanes {
            let limit = format!(
                "the {n_lanes} micro-batches of a global batch: lower `train.micro_batch` or start fewer ranks"
            );
            return Err(DataError::TooManyRanks { world_size, limit }.into());
        }
        let mut trained = Vec::new();
        let mut steps = Vec::new();
        let mut fingerprints = BTreeMap::new();
        let mut files = Vec::new();
        let mut open = |day, split: Split| {
            let file = Arc::new(days.file(day, split)?);
            fingerprints.insert(format!("{day}/{}", split.name()), file.fingerprint()?);
            files.push(Arc::clone(&file));
            Ok::<_, DataError>(file)
        };
        let training_days = config.data.training_days();
        for day in training_days.clone() {
            trained.push(open(day, Split::Train)?);
            let window = trained[trained.len().saturating_sub(config.data.window_days)..].to_vec();
            steps.push((day, Window::new(window), open(day + 1, Split::Valid)?));
        }
        check_shares(config, n_items, world_size)?;
        let n_sessions: usize = trained.iter().map(|file| file.n_sessions()).sum();
        if world_size > n_sessions {
            let limit = format!(
                "the {n_sessions} training sessions of days {} to {}",
                training_days.start,
                training_days.end - 1
            );
            return Err(DataError::TooManyRanks { world_size, limit }.into());
        }
        Ok(Self { features: days.features().clone(), days: steps, files, fingerprints })
    }

    /// The columns that are read.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Sessions of all files.
    pub fn n_sessions(&self) -> usize {
        self.files.iter().map(|file| file.n_sessions()).sum()
    }

    /// Begins to check all rows: see [`RowCheck`].
    ///
    /// # Errors
    /// Names the first row that no model can use.
    pub fn check_rows(&self, ranks: (usize, usize), n_threads: usize) -> Result<RowCheck, TrainError> {
        Ok(RowCheck::begin(&self.files, ranks, n_threads, AT_THE_START)?)
    }

    /// Rows of the catalogue `V`.
    pub fn n_items(&self) -> i64 {
        self.features.n_items()
    }

    /// What the schema holds that this version does not know.
    pub fn warnings(&self) -> &[String] {
        self.features.warnings()
    }

    /// *All ranks.* Whether all of them see the same data.
    ///
    /// # Errors
    /// Names the first rank that sees other data than rank 0.
    pub fn compare_ranks(&self, collective: &dyn Collective) -> Result<(), TrainError> {
        let mine = serde_json::to_vec(&self.fingerprints).expect("texts are JSON");
        let all = collective.gather_bytes(&mine)?;
        match all.iter().position(|other| *other != all[0]) {
            Some(rank) => Err(TrainError::OtherData { rank }),
            None => Ok(()),
        }
    }

    /// A file that is another than when a checkpoint was written, by day and part, if one is.
    pub fn changed_since<'s>(&self, state: &'s State) -> Option<&'s str> {
        let is_other =
            |(file, then): (&String, &String)| self.fingerprints.get(file).is_some_and(|now| now != then);
        let changed = state.data.iter().find(|&entry| is_other(entry));
        changed.map(|(file, _)| file.as_str())
    }
}

/// Whether every rank has rows of an item table of so many, if ranks share it out.
fn check_shares(config: &config::Config, n_items: i64, world_size: usize) -> Result<(), DataError> {
    let is_sharded = config.parallel.item_table == ItemTable::Sharded && config.model.neural().is_some();
    let n_shares = Share::most_ranks(n_items);
    if is_sharded && world_size > n_shares {
        let limit = format!("the {n_shares} shares that an item table of {n_items} rows can be cut into");
        return Err(DataError::TooManyRanks { world_size, limit });
    }
    Ok(())
}

/// How a run ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It has trained on all days.
    Done,
    /// It was asked to stop, and a checkpoint holds all it had done.
    Stopped(Position),
}

/// A run that is ready to go: at its beginning, or where an earlier part of it left off.
pub struct Training<'a> {
    config: &'a config::Config,
    data: &'a RunData,
    place: Place<'a>,
    learner: Box<dyn Learner + 'a>,
    state: State,
    /// How often each item occurred in training so far, on all ranks: `[V]`.
    occurred: Vec<i64>,
    /// Where the earlier part left off.
    begin: Option<Position>,
}

impl<'a> Training<'a> {
    /// A run of this configuration on this data. `from`: where an earlier part of it left off. The catalogue may have grown
    /// since.
    ///
    /// # Errors
    /// The model does not fit the data, or the checkpoint does not fit the model or the data.
    pub fn new(
        config: &'a config::Config,
        data: &'a RunData,
        place: Place<'a>,
        from: Option<Shared<'_>>,
    ) -> Result<Self, TrainError> {
        set_phase("setting the model up");
        let n_items = data.features.n_items();
        let share = config.parallel.share(n_items, config.run.reduction, place.collective);
        let mut learner = learner(config, &data.features, place.device, share)?;
        let mut state = State::new(config, n_items, data.fingerprints.clone());
        let mut occurred = vec![0; n_items as usize];
        let begin = from.as_ref().map(|from| from.state().position);
        if let Some(from) = from {
            let n_counted = from.occurrences().len();
            if n_counted as i64 > n_items {
                return Err(from.mismatch(counts_other_items(n_counted, n_items)).into());
            }
            let &State { position, n_skipped, .. } = from.state();
            let Position { day, day_steps, .. } = position;
            let Some((_, window, _)) = data.days.iter().find(|(other, ..)| *other == day) else {
                let problem = format!("it is of day {day}, which the configuration does not train on");
                return Err(from.mismatch(problem).into());
            };
            let n_steps = plan(config, day, window).n_steps();
            if !position.is_end_of_day() && day_steps != n_steps {
                let problem = format!("its day {day} has {day_steps} steps, and now it would have {n_steps}");
                return Err(from.mismatch(problem).into());
            }
            learner.go_on(&from)?;
            occurred[..n_counted].copy_from_slice(from.occurrences());
            // Another metric's values are none of this one's.
            let is_same_metric = from.state().config.checkpoint.keep_best == config.checkpoint.keep_best;
            let evaluated = if is_same_metric { from.state().evaluated.clone() } else { BTreeMap::new() };
            state = State { position, n_skipped, evaluated, ..state };
        }
        Ok(Self { config, data, place, learner, state, occurred, begin })
    }

    /// *All ranks.* Trains on every day, evaluates each on the next; rank 0 leaves checkpoints and results.
    ///
    /// # Errors
    /// See [`TrainError`].
    pub fn fit(
        self,
        run_dir: &Path,
        report: &mut Report,
        signals: &Signals,
        rows: &mut RowCheck,
    ) -> Result<Ended, TrainError> {
        let Self { config, data, place, mut learner, mut state, mut occurred, begin } = self;
        let root = place.collective.root();
        let checkpoints = Checkpoints::of(run_dir);
        let mut saver = root.map(|root| Saver::new(root, checkpoints.clone())).transpose()?;
        let mut last_metrics = None;
        for (day, window, valid) in
            data.days.iter().filter(|(day, ..)| begin.is_none_or(|begin| begin.day <= *day))
        {
            let plan = plan(config, *day, window);
            set_phase(format!("training on day {day}"));
            if begin.is_none_or(|begin| begin.day != *day) {
                add_occurrences(&mut occurred, window.today(), &data.features, place.collective)?;
                let global_step = state.position.global_step;
                state.position = Position { day: *day, day_step: 0, day_steps: plan.n_steps(), global_step };
            }
            let is_trained = begin.is_some_and(|begin| begin.day == *day && begin.is_end_of_day());
            if !is_trained {
                let mut context = Day {
                    config,
                    plan,
                    features: &data.features,
                    place,
                    report: &mut *report,
                    signals,
                    rows: &mut *rows,
                    checkpoints: &checkpoints,
                    saver: &mut saver,
                    occurrences: &occurred,
                    n_trained: 0,
                    last_log: (Instant::now(), state.position.day_step),
                    laps: Laps::new(place.device, config.train.time_phases, place.collective.watch()),
                    state: &mut state,
                };
                if context.train(&mut *learner)?.is_break() {
                    if let Some(saver) = &mut saver {
                        saver.finish()?;
                    }
                    return Ok(Ended::Stopped(state.position));
                }
            }

            rows.poll()?;
            set_phase(format!("evaluating on day {}", day + 1));
            let task = EvaluationTask {
                file: valid,
                features: &data.features,
                occurrences: &occurred,
                train_day: *day,
                eval_day: day + 1,
                split: Split::Valid,
            };
            let (record, evaluation) = task.evaluate(learner.recommender(), config, place.collective)?;
            report.record(&record)?;
            task.save(run_dir, config, &evaluation, place.collective)?;
            let value = config.checkpoint.keep_best.map(|measure| measure.of(&evaluation.metrics));
            state.evaluated.extend(value.filter(|value| value.is_finite()).map(|value| (*day, value)));
            last_metrics = Some(evaluation.metrics);
        }
        if let Some(saver) = &mut saver {
            saver.finish()?;
        }
        if let (Some(root), Some(metrics)) = (root, last_metrics) {
            write_results(root, run_dir, &config.title(), &metrics)?;
        }
        Ok(Ended::Done)
    }
}

fn plan(config: &config::Config, day: i64, window: &Window) -> DayPlan {
    DayPlan {
        window: window.clone(),
        day,
        n_epochs: config.train.epochs_per_day,
        shape: config.train.shape(),
        seed: config.run.seed,
        max_steps: config.train.max_steps_per_day,
        pass_by_pass: config.run.reduction == Reduction::Reproducible,
    }
}

/// *All ranks.* Adds the occurrences of the items of a whole file, `[V]`.
fn add_occurrences(
    total: &mut [i64],
    file: &SessionFile,
    features: &Features,
    collective: &dyn Collective,
) -> Result<(), TrainError> {
    let mut of_file = occurrences(file, features, (collective.rank(), collective.world_size()))?;
    collective.sum_i64(&mut of_file)?;
    total.iter_mut().zip(of_file).for_each(|(total, n)| *total += n);
    Ok(())
}

/// What all ranks know after a step, where it is to be read: `[loss, n_targets, n_stop, n_save, norm]`; and this rank's
/// own summed loss, `[1]`. On a GPU, reading waits for the step.
struct Status {
    of_all: Tensor,
    own_loss: Tensor,
}

impl Status {
    /// Of sums `[loss, n_targets, n_stop, n_save]` over ranks, which the next step overwrites.
    fn new(tail: &Tensor, norm: &Tensor, own_loss: &Tensor) -> Self {
        Self {
            of_all: Tensor::cat(&[&tail.narrow(0, 0, 4), &norm.view([1])], 0),
            own_loss: own_loss.shallow_clone(),
        }
    }

    fn read(&self) -> Read {
        let numbers = Vec::<f64>::try_from(self.of_all.to_kind(Kind::Double)).expect("five numbers");
        let [loss, n_targets, n_stop, n_save, norm] = numbers[..] else { unreachable!("five numbers") };
        Read {
            loss: loss / n_targets,
            n_targets: n_targets as usize,
            norm,
            is_stop: n_stop > 0.0,
            is_save: n_save > 0.0,
        }
    }
}

/// A [`Status`] that has been read.
struct Read {
    /// Of a target, on average.
    loss: f64,
    n_targets: usize,
    /// Of the mean loss's gradient, before clipping.
    norm: f64,
    /// Whether a rank was asked to stop.
    is_stop: bool,
    /// Whether a rank was asked for a checkpoint.
    is_save: bool,
}

impl Read {
    fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.norm.is_finite()
    }
}

/// What a learner is given to learn one day.
struct Day<'a> {
    config: &'a config::Config,
    plan: DayPlan,
    features: &'a Features,
    place: Place<'a>,
    report: &'a mut Report,
    signals: &'a Signals,
    rows: &'a mut RowCheck,
    checkpoints: &'a Checkpoints,
    /// On rank 0.
    saver: &'a mut Option<Saver>,
    /// How often each item occurred in training so far, this day included, on all ranks: `[V]`.
    occurrences: &'a [i64],
    /// Of the run as far as it has come.
    state: &'a mut State,
    /// Sessions of the steps done today by this process, over all ranks.
    n_trained: usize,
    /// When the last record was written, and how many steps were done then.
    last_log: (Instant, usize),
    /// What time is spent on.
    laps: Laps,
}

impl Day<'_> {
    fn rank(&self) -> usize {
        self.place.collective.rank()
    }

    /// *All ranks.* Trains on what is left of the day; breaks off where a rank was asked to. Either way a checkpoint holds
    /// what was done.
    fn train(&mut self, learner: &mut dyn Learner) -> Result<ControlFlow<()>, TrainError> {
        let (day, n_steps) = (self.plan.day, self.plan.n_steps());
        let day_step = self.state.position.day_step;
        self.report.begin_day(day, (day_step, n_steps), self.plan.window.n_sessions());
        let begun = Instant::now();
        let went = learner.learn_day(self)?;
        if went.is_break() {
            return Ok(went);
        }
        let seconds = begun.elapsed().as_secs_f64();
        // A learner without steps counts each session once.
        let (n_sessions, n_here) = match self.n_trained {
            0 => (self.plan.window.today().n_sessions(), self.plan.window.today().n_sessions()),
            n_here => ((0..n_steps).map(|step| self.plan.sessions_in_step(step)).sum(), n_here),
        };
        self.report.end_day();
        let sessions_per_s = n_here as f64 / seconds;
        self.report.record(&Record::Day { day, n_sessions, seconds, sessions_per_s })?;
        self.state.position.day_step = n_steps;
        self.save(learner)?;
        // An evaluation may take longer than whoever asked will wait.
        let mut is_stop = [i64::from(self.signals.stop())];
        self.place.collective.sum_i64(&mut is_stop)?;
        Ok(if is_stop[0] > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Whether this rank was asked to stop, and for a checkpoint, be it by the time that has passed.
    fn wishes(&self) -> [bool; 2] {
        let every = self.config.checkpoint.every_minutes;
        let minutes = self.saver.as_ref().map_or(0.0, |saver| saver.since_last().as_secs_f64() / 60.0);
        let is_time = every > 0.0 && minutes >= every;
        [self.signals.stop(), self.signals.save() || is_time]
    }

    /// *All ranks.* The next step is done, at this learning rate. Breaks where a rank was asked to stop.
    ///
    /// On a GPU the status is read only where it is needed, as that waits for the device.
    fn step_done(
        &mut self,
        learner: &dyn Learner,
        lr: f64,
        status: &Status,
    ) -> Result<ControlFlow<()>, TrainError> {
        self.rows.poll()?;
        let config = self.config;
        let step = self.state.position.day_step;
        let (done, n_steps) = (step + 1, self.plan.n_steps());
        self.state.position.day_step = done;
        self.state.position.global_step += 1;
        self.n_trained += self.plan.sessions_in_step(step);
        self.report.tick();
        let is_logged = done.is_multiple_of(config.train.log_every_steps) || done == n_steps;
        let every = config.checkpoint.every_steps;
        let is_due = every > 0 && done.is_multiple_of(every);
        let may_skip = config.train.non_finite != NonFinite::Stop;
        if !(is_logged || is_due || may_skip || self.place.device == Device::Cpu) {
            return Ok(ControlFlow::Continue(()));
        }
        let read = status.read();
        if read.is_save {
            self.signals.saved();
        }
        if !read.is_finite() {
            self.not_finite(&read, status, done)?;
        }
        let Read { loss, n_targets, is_stop, is_save, .. } = read;
        if is_logged {
            let (day, (since, logged)) = (self.plan.day, self.last_log);
            let seconds = since.elapsed().as_secs_f64();
            let n_sessions: usize = (logged..done).map(|step| self.plan.sessions_in_step(step)).sum();
            self.last_log = (Instant::now(), done);
            let n_steps = (done - logged) as f64;
            let epoch = step / self.plan.steps_per_epoch();
            let sessions_per_s = n_sessions as f64 / seconds;
            self.report.record(&Record::Step {
                day,
                epoch,
                step: done,
                loss,
                n_targets,
                lr,
                sessions_per_s,
            })?;
            if let Some(laps) = self.laps.take() {
                let seconds = laps.into_iter().map(|(name, seconds)| (name, seconds / n_steps)).collect();
                self.report.record(&Record::Phases { day, step: done, seconds })?;
            }
        }
        // At its end the day saves itself.
        if done < n_steps && (is_due || is_save || is_stop) {
            self.save(learner)?;
        }
        match self.saver {
            Some(saver) if saver.has_failed() => saver.finish()?,
            _ => {}
        }
        Ok(if is_stop && done < n_steps { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// *All ranks.* A step whose loss or gradient is not finite: left out, or the end.
    fn not_finite(&mut self, read: &Read, status: &Status, step: usize) -> Result<(), TrainError> {
        let (n_skipped, day) = (self.state.n_skipped, self.plan.day);
        let &Read { loss, norm, .. } = read;
        match self.config.train.non_finite {
            NonFinite::Skip { limit } if n_skipped < limit => {
                self.state.n_skipped += 1;
                Ok(self.report.record(&Record::Skipped { day, step, loss, norm })?)
            }
            NonFinite::Skip { .. } | NonFinite::Stop => {
                let is_mine = u8::from(!status.own_loss.double_value(&[0]).is_finite());
                let all = self.place.collective.gather(&[is_mine])?;
                let ranks = (0..all.len()).filter(|&rank| all[rank] == 1).collect();
                Err(TrainError::NotFinite { loss, norm, day, step, ranks, n_skipped })
            }
        }
    }

    /// *All ranks.* Takes a checkpoint: rank 0 begins one in the background, unless tables are shared out, where all take part
    /// until it is written.
    fn save(&mut self, learner: &dyn Learner) -> Result<(), TrainError> {
        let share = learner.recommender().share();
        if share.company().is_none() && self.saver.is_none() {
            return Ok(());
        }
        let state = State {
            optimizer_steps: learner.optimizer_steps(),
            log_bytes: self.report.sync()?,
            ..self.state.clone()
        };
        let (tensors, occurrences) = (learner.tensors(), self.occurrences);
        let begun = Instant::now();
        if share.company().is_some() {
            self.checkpoints.write_shared(&state, &tensors, occurrences, &share, self.place.collective)?;
            self.saver.iter_mut().for_each(Saver::saved);
        } else if let Some(saver) = &mut self.saver {
            saver.save(state, &tensors, occurrences)?;
        }
        let waited_seconds = begun.elapsed().as_secs_f64();
        let Position { day, day_step: step, .. } = self.state.position;
        Ok(self.report.record(&Record::Checkpoint { day, step, waited_seconds })?)
    }
}
