//! `bireme bench scaling`: measures training on several numbers of ranks by starting
//! `bireme train`, and predicts other jobs.
//!
//! A run of one rank with fewer sessions per step, and one of `bireme doctor`, calibrate the
//! [`StepModel`]. The result is a [`Scaling`], as JSON, tables and a chart.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use bireme_base::output::{self, FolderKind, OutputError, OutputFolder};
use bireme_base::user_error::{FAILED, REFUSED, UserError};
use bireme_tools::findings::Findings;
use bireme_tools::launch::{Launch, LaunchError, Launcher};
use bireme_tools::run_dir::{CHECKPOINTS, METRICS};
use bireme_tools::scaling::measured::{StepMeasurement, WARM_UP_STEPS};
use bireme_tools::scaling::predict::{
    Calibration, Link, ParameterCounts, PredictedJob, Prediction, StepModel,
};
use bireme_tools::scaling::{self, Growth, Scaling, ScalingPoint, TABLE, TableLayout};

use crate::checkpoint::{CheckpointError, Checkpoints};
use crate::collective;
use crate::config::{Config, ConfigError};
use crate::data::{self, DataError, Days, SessionFile, Split};
use crate::model::ItemTable;

const PREDICTED_RANKS: [usize; 3] = [8, 64, 512];

/// Rows of item tables.
const PREDICTED_ITEMS: [f64; 4] = [1e5, 1e6, 1e7, 1e8];

/// What to measure and predict.
pub struct ScalingOptions {
    /// TOML file of the run.
    pub config: PathBuf,
    /// Output of `bireme preprocess`.
    pub data: PathBuf,
    /// Overrides, as `section.key=value`.
    pub set: Vec<String>,
    /// Numbers of ranks; one rank is always measured.
    pub ranks: Vec<usize>,
    pub item_tables: Vec<TableLayout>,
    pub launch: Launch,
    /// Measured steps of each run.
    pub steps: usize,
    /// Of predicted jobs.
    pub ranks_per_node: usize,
    /// Between nodes of predicted jobs; none: as measured between the ranks, whether these share a
    /// node or not.
    pub across: Option<Link>,
    /// The folder to write.
    pub out: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ScalingError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(
        "{ranks} ranks cannot share {n_micro_batches} micro-batches of a step: set \
         `train.global_batch` or `train.micro_batch`"
    )]
    Ranks {
        ranks: usize,
        /// Of a step.
        n_micro_batches: usize,
    },
    #[error("`model.kind` is a counting model, which has no training steps to measure")]
    Counts,
    #[error("`bireme bench scaling` starts its own ranks: run it without `mpirun` or `srun`")]
    Launched,
    #[error("`{0}` is not empty: choose another `--out`")]
    Taken(PathBuf),
    #[error(transparent)]
    Output(OutputError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("`{path}` is not the record of a measurement: {problem}")]
    Record { path: PathBuf, problem: String },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("cannot write `{path}`")]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Write(#[from] scaling::ScalingWriteError),
}

impl UserError for ScalingError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Output(error) => error.exit_code(),
            Self::Launch(error) => error.exit_code(),
            Self::Config(_)
            | Self::Data(_)
            | Self::Ranks { .. }
            | Self::Counts
            | Self::Launched
            | Self::Taken(_) => REFUSED,
            Self::Record { .. } | Self::Checkpoint(_) | Self::Io { .. } | Self::Write(_) => FAILED,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Launch(error) => error.hint(),
            _ => None,
        }
    }
}

/// What a measurement leaves in its folder.
const SCALING: FolderKind = FolderKind {
    marker: TABLE,
    is_ours: |name| name == "runs" || name.starts_with("doctor.") || name.starts_with("scaling."),
};

/// Measures all numbers of ranks and writes `scaling.md`, `scaling.json` and `scaling.svg`. `log`
/// is given a line per run.
///
/// # Errors
/// See [`ScalingError`].
pub fn scaling(
    options: &ScalingOptions,
    log: &mut dyn FnMut(&str),
) -> Result<Scaling, ScalingError> {
    let experiment = Experiment::prepare(options)?;
    output::check_outside(&options.out, &options.data).map_err(ScalingError::Output)?;
    let folder =
        OutputFolder::in_place(&options.out, SCALING, log).map_err(|error| match error {
            OutputError::Exists { path, .. } => ScalingError::Taken(path),
            error => ScalingError::Output(error),
        })?;
    experiment.warn_of_shared_cores(log);
    let findings = experiment.examine()?;
    let threads_per_rank = experiment.threads_per_rank(&findings);
    let mut measure = |run: ScalingRun| -> Result<MeasuredRun, ScalingError> {
        let measured = experiment.measure(run, threads_per_rank)?;
        let StepMeasurement { global_batch, step_seconds, .. } = measured.step;
        let (ms, rate) = (step_seconds * 1e3, global_batch as f64 / step_seconds);
        log(&format!("{}: {ms:.1} ms per step, {rate:.0} sessions/s", run.name()));
        Ok(measured)
    };
    let alone = experiment.single_rank();
    let whole = measure(alone)?;
    let part = experiment.partial_batch().map(&mut measure).transpose()?;
    let model =
        experiment.calibrate(part.as_ref().unwrap_or(&whole), &whole, Link::fit(&findings))?;

    let alone_seconds = whole.step.step_seconds;
    let point = |run, measured| experiment.point(run, measured, alone_seconds, &model);
    let mut points = vec![point(alone, whole)];
    for run in experiment.multi_rank_runs() {
        points.push(point(run, measure(run)?));
    }
    let scaling = Scaling {
        title: experiment.config.title(),
        device: findings.device,
        threads_per_rank,
        points,
        predictions: predictions(&model, experiment.config.train.global_batch),
        gpu_estimates: scaling::gpu::estimates(&counted_name(&options.config), &model),
        model,
    };
    scaling::write(&folder.path(), &scaling)?;
    folder.publish().map_err(ScalingError::Output)?;
    Ok(scaling)
}

/// The name of a configuration among the counted steps: its path below `configs`.
fn counted_name(config: &Path) -> String {
    let names: Vec<_> = config.iter().skip_while(|name| *name != "configs").skip(1).collect();
    let below: PathBuf = names.into_iter().collect();
    below.with_extension("").display().to_string().replace('/', "-")
}

/// All predicted jobs, with `sessions` per step and rank.
fn predictions(model: &StepModel, sessions: usize) -> Vec<Prediction> {
    let mut predictions = Vec::new();
    for n_items in PREDICTED_ITEMS {
        for ranks in PREDICTED_RANKS {
            for item_table in [TableLayout::Replicated, TableLayout::Sharded] {
                let job = PredictedJob { ranks, item_table, n_items, sessions: sessions as f64 };
                predictions.push(model.predict(job));
            }
        }
    }
    predictions
}

/// A run to measure.
#[derive(Clone, Copy)]
struct ScalingRun {
    ranks: usize,
    growth: Growth,
    item_table: TableLayout,
    global_batch: usize,
}

impl ScalingRun {
    fn name(&self) -> String {
        let Self { ranks, growth, item_table, global_batch } = self;
        format!("{}-{}-{ranks}-ranks-{global_batch}-sessions", growth.name(), item_table.name())
    }
}

struct MeasuredRun {
    step: StepMeasurement,
    parameters: ParameterCounts,
    command: String,
}

/// Checked options, with what all runs share.
struct Experiment<'a> {
    options: &'a ScalingOptions,
    config: Config,
    days: Days,
    first_day: i64,
    train_file: SessionFile,
    item_width: i64,
    /// Ascending from 1.
    ranks: Vec<usize>,
}

impl<'a> Experiment<'a> {
    fn prepare(options: &'a ScalingOptions) -> Result<Self, ScalingError> {
        if collective::is_launched() {
            return Err(ScalingError::Launched);
        }
        let config = Config::load(&options.config, &options.set)?;
        let days = Days::open(&options.data, &config.data)?;
        let first_day = config.data.first_day.unwrap_or(days.first());
        let train_file = days.file(first_day, Split::Train)?;
        let Some(neural) = config.model.neural() else { return Err(ScalingError::Counts) };
        let item_width = neural.input().item_width;
        let n_micro_batches = config.train.global_batch / config.train.micro_batch;
        if let Some(&ranks) =
            options.ranks.iter().find(|&&ranks| ranks > n_micro_batches || ranks == 0)
        {
            return Err(ScalingError::Ranks { ranks, n_micro_batches });
        }
        let mut ranks = options.ranks.clone();
        ranks.push(1);
        ranks.sort_unstable();
        ranks.dedup();
        options.launch.check()?;
        Ok(Self { options, config, days, first_day, train_file, item_width, ranks })
    }

    fn most_ranks(&self) -> usize {
        self.ranks[self.ranks.len() - 1]
    }

    fn warn_of_shared_cores(&self, log: &mut dyn FnMut(&str)) {
        let (most, n_cores) = (self.most_ranks(), n_cores());
        let Launch { launcher, hosts, .. } = &self.options.launch;
        if *launcher == Launcher::Mpirun && hosts.is_none() && most > n_cores {
            log(&format!("warning: {most} ranks share {n_cores} cores if all start on this host"));
        }
    }

    /// Runs `bireme doctor` on the largest number of ranks.
    fn examine(&self) -> Result<Findings, ScalingError> {
        let out = &self.options.out;
        let file = out.join("doctor.json");
        let path = |path: &Path| path.display().to_string();
        let device = self.config.run.device.name();
        let arguments = ["doctor", "--device", device, "--dir", &path(out), "--json", &path(&file)];
        let arguments = arguments.map(str::to_owned);
        self.options.launch.run(self.most_ranks(), &arguments, &out.join("doctor.log"))?;
        let problem = |problem: String| ScalingError::Record { path: file.clone(), problem };
        let text = fs::read_to_string(&file).map_err(|error| problem(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| problem(error.to_string()))
    }

    /// On one CPU host, every run gets the threads per rank of the largest run.
    fn threads_per_rank(&self, findings: &Findings) -> usize {
        let configured = self.config.run.threads_per_rank;
        if findings.device == "CPU" && self.options.launch.hosts.is_none() && configured == 0 {
            (n_cores() / self.most_ranks()).max(1)
        } else {
            configured
        }
    }

    fn single_rank(&self) -> ScalingRun {
        let global_batch = self.config.train.global_batch;
        ScalingRun {
            ranks: 1,
            growth: Growth::Strong,
            item_table: TableLayout::Replicated,
            global_batch,
        }
    }

    /// One rank with a quarter of the micro-batches, if these are fewer.
    fn partial_batch(&self) -> Option<ScalingRun> {
        let train = &self.config.train;
        let global_batch = (train.global_batch / train.micro_batch).div_ceil(4) * train.micro_batch;
        (global_batch < train.global_batch)
            .then(|| ScalingRun { global_batch, ..self.single_rank() })
    }

    fn multi_rank_runs(&self) -> Vec<ScalingRun> {
        let mut runs = Vec::new();
        for &ranks in &self.ranks[1..] {
            for &item_table in &self.options.item_tables {
                let strong = ScalingRun { ranks, item_table, ..self.single_rank() };
                let global_batch = strong.global_batch * ranks;
                runs.extend([strong, ScalingRun { growth: Growth::Weak, global_batch, ..strong }]);
            }
        }
        runs
    }

    fn calibrate(
        &self,
        part: &MeasuredRun,
        whole: &MeasuredRun,
        link: Link,
    ) -> Result<StepModel, ScalingError> {
        let occurrences = data::occurrences(&self.train_file, self.days.features(), (0, 1))?;
        let n_events = occurrences.iter().sum::<i64>() as f64;
        Ok(StepModel::calibrate(&Calibration {
            part: &part.step,
            whole: &whole.step,
            parameters: whole.parameters,
            n_items: self.days.features().n_items() as f64,
            width: self.item_width as f64,
            events_per_session: n_events / self.train_file.n_sessions() as f64,
            within: link,
            across: self.options.across.unwrap_or(link),
            ranks_per_node: self.options.ranks_per_node,
        }))
    }

    fn point(
        &self,
        run: ScalingRun,
        measured: MeasuredRun,
        alone_seconds: f64,
        model: &StepModel,
    ) -> ScalingPoint {
        let ScalingRun { ranks, growth, item_table, global_batch } = run;
        let MeasuredRun { step, command, .. } = measured;
        let n_items = self.days.features().n_items() as f64;
        let job = PredictedJob {
            ranks,
            item_table,
            n_items,
            sessions: global_batch as f64 / ranks as f64,
        };
        let sessions_per_s = global_batch as f64 / step.step_seconds;
        let alone_per_s = self.config.train.global_batch as f64 / alone_seconds;
        ScalingPoint {
            ranks,
            growth,
            item_table,
            global_batch,
            step_seconds: step.step_seconds,
            sessions_per_s,
            efficiency: sessions_per_s / (ranks as f64 * alone_per_s),
            phases: step.phases,
            evaluated_per_s: step.evaluated_per_s,
            predicted_seconds: model.predict(job).step_seconds,
            command,
        }
    }

    fn run_dir(&self, run: ScalingRun) -> PathBuf {
        self.options.out.join("runs").join(run.name())
    }

    /// Trains on the first day and evaluates on the next.
    fn measure(
        &self,
        run: ScalingRun,
        threads_per_rank: usize,
    ) -> Result<MeasuredRun, ScalingError> {
        let run_dir = self.run_dir(run);
        io_at(&run_dir, fs::create_dir_all(self.options.out.join("runs")))?;
        let arguments = self.arguments(run, threads_per_rank);
        let log = run_dir.with_extension("log");
        let command = self.options.launch.run(run.ranks, &arguments, &log)?;
        let path = run_dir.join(METRICS);
        let problem = |problem: String| ScalingError::Record { path: path.clone(), problem };
        let text = fs::read_to_string(&path).map_err(|error| problem(error.to_string()))?;
        let step = StepMeasurement::read(&text, run.global_batch).map_err(problem)?;
        Ok(MeasuredRun { step, parameters: self.take_parameters(run)?, command })
    }

    fn arguments(&self, run: ScalingRun, threads_per_rank: usize) -> Vec<String> {
        let ScalingOptions { config, data, set, steps, .. } = self.options;
        let run_dir = self.run_dir(run);
        let n_steps = WARM_UP_STEPS + steps;
        let keys = [
            format!("run.threads_per_rank={threads_per_rank}"),
            format!("data.first_day={}", self.first_day),
            format!("data.last_day={}", self.first_day + 1),
            format!("parallel.item_table={}", run.item_table.name()),
            format!("train.global_batch={}", run.global_batch),
            format!("train.max_steps_per_day={n_steps}"),
            // An epoch has at least one step.
            format!("train.epochs_per_day={n_steps}"),
            "train.log_every_steps=1".to_owned(),
            "train.time_phases=true".to_owned(),
        ];
        let paths = [("--config", config), ("--data", data), ("--run-dir", &run_dir)];
        let mut arguments = vec!["train".to_owned()];
        arguments.extend(
            paths
                .iter()
                .flat_map(|(option, path)| [(*option).to_owned(), path.display().to_string()]),
        );
        arguments.extend(set.iter().chain(&keys).flat_map(|key| ["--set".to_owned(), key.clone()]));
        arguments
    }

    /// Counts the parameters of the run's checkpoint, and removes it: nothing resumes the run, and
    /// checkpoints may be large.
    fn take_parameters(&self, run: ScalingRun) -> Result<ParameterCounts, ScalingError> {
        let run_dir = self.run_dir(run);
        let (checkpoint, _) = Checkpoints::of(&run_dir).newest()?;
        let checkpoints = run_dir.join(CHECKPOINTS);
        io_at(&checkpoints, fs::remove_dir_all(&checkpoints))?;
        let count = |of_items: bool| {
            let weights = checkpoint.tensors.weights.iter();
            let weights = weights.filter(|(name, _)| ItemTable::is_item_table(name) == of_items);
            weights.map(|(_, tensor)| tensor.numel()).sum::<usize>() as f64
        };
        Ok(ParameterCounts { of_items: count(true), others: count(false) })
    }
}

fn n_cores() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get())
}

fn io_at<T>(path: &Path, result: io::Result<T>) -> Result<T, ScalingError> {
    result.map_err(|source| ScalingError::Io { path: path.to_owned(), source })
}
