//! The day loop: train on day t, evaluate on day t + 1.

mod counting;
mod gradient;
mod reduction;
mod trained;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::Device;

use crate::checkpoint::{CheckpointError, Checkpoints, Position, State, Tensors};
use crate::collective::{Collective, CollectiveError};
use crate::config;
use crate::data::plan::Shape;
use crate::data::{DataError, DayPlan, Days, Features, SessionFile, Split, Window, occurrences};
use crate::metrics::EvaluateError;
use crate::model::{self, Counts, Evidence, LossConfig, Neighbours, Neural, Recommender};
use crate::optim::{Schedule, TableOptimizer};
use crate::report::{Record, Report, ReportError, write_results};

use counting::CountLearner;
use gradient::GradientLearner;
pub use reduction::Reduction;
use trained::EvaluationTask;
pub use trained::{ImportedWeights, TrainedRun};

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
    /// Steps between two records.
    pub log_every_steps: usize,
    /// Memory for logits, in MiB: the softmax is computed for as many targets at a time as this holds.
    pub logits_mib: usize,
}

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
            log_every_steps: 10,
            logits_mib: 64,
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
            ("epochs_per_day", self.epochs_per_day),
            ("micro_batch", self.micro_batch),
            ("global_batch", self.global_batch),
            ("log_every_steps", self.log_every_steps),
            ("logits_mib", self.logits_mib),
            ("max_steps_per_day", self.max_steps_per_day.unwrap_or(1)),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("`{key}` must be at least 1"));
        }
        if !self.global_batch.is_multiple_of(self.micro_batch) {
            return Err(format!(
                "`global_batch` {} is not a whole number of micro-batches of {}",
                self.global_batch, self.micro_batch
            ));
        }
        self.loss.check()?;
        let of_tables = match self.tables {
            TableOptimizer::Adamw => 0.0,
            TableOptimizer::Adagrad { learning_rate } => learning_rate,
        };
        let finite = [
            ("learning_rate", self.learning_rate),
            ("tables.learning_rate", of_tables),
            ("weight_decay", self.weight_decay),
            ("clip_norm", self.clip_norm),
        ];
        match finite.iter().find(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
            Some((key, value)) => Err(format!("`{key}` cannot be {value}")),
            None => Ok(()),
        }
    }

    fn shape(&self) -> Shape {
        Shape { n_lanes: self.global_batch / self.micro_batch, micro_batch: self.micro_batch }
    }

    fn max_logits(&self) -> i64 {
        (self.logits_mib << 20) as i64 / 4
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
    /// The loss is NaN or infinite, on all ranks alike.
    #[error("the loss is {loss} at day {day}, step {step}")]
    NotFinite {
        /// As logged.
        loss: f64,
        /// The day trained on.
        day: i64,
        /// Steps of the day that are done.
        step: usize,
    },
    /// A model that does not fit the data's features.
    #[error("section `[model]` of the configuration: {0}")]
    Model(String),
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

/// Something that learns day by day.
trait Learner {
    /// What it predicts with.
    fn recommender(&self) -> &dyn Recommender;

    /// *All ranks.* Learns from one day.
    fn learn_day(&mut self, day: &mut Day<'_>) -> Result<(), TrainError>;

    /// Its state.
    fn tensors(&self) -> Tensors;

    /// Steps that the optimizer has counted.
    fn optimizer_steps(&self) -> i32;

    /// Takes what [`Learner::tensors`] of another run gave; the error says what does not fit.
    fn load_weights(&mut self, weights: &[(String, tch::Tensor)]) -> Result<(), String>;
}

fn learner(
    config: &config::Config,
    features: &Features,
    device: Device,
) -> Result<Box<dyn Learner>, TrainError> {
    let neural = |model: Neural<'_>| {
        let learner = GradientLearner::new(&model, config, features, device);
        learner.map(|learner| Box::new(learner) as Box<dyn Learner>).map_err(TrainError::Model)
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
    days: Vec<(i64, Window, SessionFile)>,
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
        let n_lanes = config.train.shape().n_lanes;
        if world_size > n_lanes {
            let limit = format!(
                "the {n_lanes} micro-batches of a global batch: lower `train.micro_batch` or start fewer ranks"
            );
            return Err(DataError::TooManyRanks { world_size, limit }.into());
        }
        let mut trained = Vec::new();
        let mut steps = Vec::new();
        for day in config.data.first_day..config.data.last_day {
            trained.push(Arc::new(days.file(day, Split::Train)?));
            let window = trained[trained.len().saturating_sub(config.data.window_days)..].to_vec();
            steps.push((day, Window::new(window), days.file(day + 1, Split::Valid)?));
        }
        let n_sessions: usize = trained.iter().map(|file| file.n_sessions()).sum();
        if world_size > n_sessions {
            let limit = format!(
                "the {n_sessions} training sessions of days {} to {}",
                config.data.first_day,
                config.data.last_day - 1
            );
            return Err(DataError::TooManyRanks { world_size, limit }.into());
        }
        Ok(Self { features: days.features().clone(), days: steps })
    }
}

/// *All ranks.* Trains on every day, evaluates each on the next; rank 0 leaves checkpoints and results.
///
/// # Errors
/// See [`TrainError`].
pub fn fit(
    config: &config::Config,
    data: &RunData,
    run_dir: &Path,
    place: Place<'_>,
    report: &mut Report,
) -> Result<(), TrainError> {
    let mut learner = learner(config, &data.features, place.device)?;
    let checkpoints = Checkpoints::new(run_dir, config.checkpoint.keep_last);
    let mut global_step = 0;
    let mut last_metrics = None;
    let mut occurred = vec![0; data.features.n_items() as usize];
    for (day, window, valid) in &data.days {
        add_occurrences(&mut occurred, window.today(), &data.features, place.collective)?;
        let plan = DayPlan {
            window: window.clone(),
            day: *day,
            n_epochs: config.train.epochs_per_day,
            shape: config.train.shape(),
            seed: config.run.seed,
            max_steps: config.train.max_steps_per_day,
            pass_by_pass: config.run.reduction == Reduction::Reproducible,
        };
        report.begin_day(*day, plan.n_steps(), window.n_sessions());
        let mut context = Day {
            config,
            plan,
            features: &data.features,
            place,
            report: &mut *report,
            checkpoints: &checkpoints,
            occurrences: &occurred,
            global_step: &mut global_step,
            n_trained: 0,
            last_log: (Instant::now(), 0),
        };
        let begun = Instant::now();
        learner.learn_day(&mut context)?;
        let seconds = begun.elapsed().as_secs_f64();
        // A learner without steps counts each session once.
        let n_sessions = if context.n_trained > 0 { context.n_trained } else { window.today().n_sessions() };
        context.save(&*learner, context.plan.n_steps())?;
        report.end_day();
        let sessions_per_s = n_sessions as f64 / seconds;
        report.record(&Record::Day { day: *day, n_sessions, seconds, sessions_per_s })?;

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
        last_metrics = Some(evaluation.metrics);
    }
    if let (Some(root), Some(metrics)) = (place.collective.root(), last_metrics) {
        write_results(root, run_dir, &config.title(), &metrics)?;
    }
    Ok(())
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

fn state(config: &config::Config, features: &Features, learner: &dyn Learner, position: Position) -> State {
    State {
        format: 1,
        bireme: env!("CARGO_PKG_VERSION").to_owned(),
        position,
        optimizer_steps: learner.optimizer_steps(),
        n_items: features.n_items(),
        config: config.clone(),
    }
}

/// What a learner is given to learn one day.
struct Day<'a> {
    config: &'a config::Config,
    plan: DayPlan,
    features: &'a Features,
    place: Place<'a>,
    report: &'a mut Report,
    checkpoints: &'a Checkpoints,
    /// How often each item occurred in training so far, this day included, on all ranks: `[V]`.
    occurrences: &'a [i64],
    global_step: &'a mut usize,
    /// Sessions of the steps done today, over all ranks.
    n_trained: usize,
    /// When the last record was written, and how many steps were done then.
    last_log: (Instant, usize),
}

impl Day<'_> {
    /// Step number `step` (from 0) is done: `loss` reads its mean loss, which waits for the device, so it is asked
    /// for only where it is logged.
    fn step_done(
        &mut self,
        learner: &dyn Learner,
        step: usize,
        lr: f64,
        loss: impl FnOnce() -> f64,
    ) -> Result<(), TrainError> {
        *self.global_step += 1;
        self.n_trained += self.plan.sessions_in_step(step);
        self.report.tick();
        let (done, n_steps) = (step + 1, self.plan.n_steps());
        if done.is_multiple_of(self.config.train.log_every_steps) || done == n_steps {
            let (loss, day) = (loss(), self.plan.day);
            if !loss.is_finite() {
                return Err(TrainError::NotFinite { loss, day, step: done });
            }
            let (since, logged) = self.last_log;
            let seconds = since.elapsed().as_secs_f64();
            let n_sessions: usize = (logged..done).map(|step| self.plan.sessions_in_step(step)).sum();
            self.last_log = (Instant::now(), done);
            let epoch = step / self.plan.steps_per_epoch();
            let sessions_per_s = n_sessions as f64 / seconds;
            self.report.record(&Record::Step { day, epoch, step: done, loss, lr, sessions_per_s })?;
        }
        let every = self.config.checkpoint.every_steps;
        if every > 0 && done.is_multiple_of(every) && done < n_steps {
            self.save(learner, done)?;
        }
        Ok(())
    }

    /// Writes a checkpoint on rank 0.
    fn save(&self, learner: &dyn Learner, day_step: usize) -> Result<(), TrainError> {
        let Some(root) = self.place.collective.root() else { return Ok(()) };
        let position = Position {
            day: self.plan.day,
            day_step,
            day_steps: self.plan.n_steps(),
            global_step: *self.global_step,
        };
        let state = state(self.config, self.features, learner, position);
        self.checkpoints.write(root, &state, &learner.tensors(), self.occurrences)?;
        Ok(())
    }
}
