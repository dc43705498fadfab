//! How training and evaluation scale with ranks: measured by running them, and predicted for ranks that are not here.
//!
//! Each measured point is a command of this program that can be typed again; see [`Launch`]. One of a single rank with fewer
//! sessions a step, and one of `bireme doctor`, calibrate the [`Model`]. What comes out is a [`Scaling`], as JSON, a table and a
//! chart.

mod launch;
pub mod predict;
mod write;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bireme_base::output::{self, FolderKind, OutputError, OutputFolder};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{CheckpointError, Checkpoints};
use crate::config::TableLayout;
use crate::config::{Config, ConfigError};
use crate::data::{DataError, Days, Split};
use crate::device::DeviceChoice;
use crate::doctor::Findings;
use crate::model::ItemTable;
use crate::report::{ChartError, METRICS};

pub use launch::{Launch, LaunchError, Launcher};
use predict::{Job, Line, Link, Model, Prediction};
pub use write::TABLE;

/// Steps that are run before those that count.
const WARM_UP: usize = 3;

/// Ranks that are predicted.
const PREDICTED_RANKS: [usize; 3] = [8, 64, 512];

/// Rows of item tables that are predicted.
const PREDICTED_ITEMS: [f64; 4] = [1e5, 1e6, 1e7, 1e8];

/// What to measure.
pub struct Options {
    /// The run's TOML file.
    pub config: PathBuf,
    /// What `bireme preprocess` wrote.
    pub data: PathBuf,
    /// Overrides, as `section.key=value`.
    pub set: Vec<String>,
    /// Numbers of ranks; one rank is measured in any case.
    pub ranks: Vec<usize>,
    /// Who holds the item table.
    pub item_tables: Vec<TableLayout>,
    /// How ranks are started.
    pub launch: Launch,
    /// Steps of each run that count.
    pub steps: usize,
    /// Ranks of a node, in predictions.
    pub ranks_per_node: usize,
    /// What lies between nodes, in predictions. None: what was measured between the ranks, be it within a node or across.
    pub across: Option<Link>,
    /// The folder to write.
    pub out: PathBuf,
}

/// A measurement that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ScalingError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Ranks that a step cannot be divided over.
    #[error(
        "{ranks} ranks cannot share {lanes} micro-batches of a step: set `train.global_batch` or `train.micro_batch`"
    )]
    Ranks {
        /// As asked for.
        ranks: usize,
        /// Micro-batches of a step.
        lanes: usize,
    },
    /// A model that does not learn by steps.
    #[error("a model that only counts has no steps to measure")]
    Counts,
    /// Ranks cannot start ranks.
    #[error("a launcher started this as a rank: start it by itself, it starts its ranks")]
    Launched,
    /// The folder holds something.
    #[error("`{0}` is not empty: choose another `--out`")]
    Taken(PathBuf),
    /// The folder cannot be written to.
    #[error(transparent)]
    Output(OutputError),
    /// A run.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// What a run left.
    #[error("`{path}` does not say what a run of {WARM_UP} steps and more should: {problem}")]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The parameters that a run left.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The file system refused.
    #[error("cannot write `{path}`")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The chart failed.
    #[error(transparent)]
    Chart(#[from] ChartError),
}

impl ScalingError {
    /// What to look at.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Launch(error) => error.hint(),
            _ => None,
        }
    }

    /// 2 where nothing was begun, 1 otherwise.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Output(error) => error.exit_code().into(),
            Self::Config(_)
            | Self::Data(_)
            | Self::Ranks { .. }
            | Self::Counts
            | Self::Launched
            | Self::Taken(_) => 2,
            Self::Launch(error) if error.is_refusal() => 2,
            Self::Launch(_)
            | Self::Record { .. }
            | Self::Checkpoint(_)
            | Self::Io { .. }
            | Self::Chart(_) => 1,
        }
    }
}

/// What grows with the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Growth {
    /// Nothing: they share the sessions of a step.
    Strong,
    /// The sessions of a step.
    Weak,
}

impl Growth {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Strong => "strong",
            Self::Weak => "weak",
        }
    }
}

/// A number of ranks, measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Ranks.
    pub ranks: usize,
    /// What grew with them.
    pub growth: Growth,
    /// Who held the item table.
    pub item_table: TableLayout,
    /// Sessions of a step, over all ranks.
    pub global_batch: usize,
    /// The median step's.
    pub step_seconds: f64,
    /// By that.
    pub sessions_per_s: f64,
    /// Beside as many single ranks, 0 to 1.
    pub efficiency: f64,
    /// What rank 0 spent the median step on, in seconds.
    pub phases: BTreeMap<String, f64>,
    /// Of evaluating the next day.
    pub evaluated_per_s: f64,
    /// What the model would have said.
    pub predicted_seconds: f64,
    /// As typed.
    pub command: String,
}

/// What was measured, and what follows from it.
#[derive(Clone, Debug, Serialize)]
pub struct Scaling {
    /// What the model is called.
    pub title: String,
    /// What the ranks computed on.
    pub device: String,
    /// CPU threads of each rank; 0: as many as there are cores for it.
    pub threads_per_rank: usize,
    /// Measured.
    pub points: Vec<Point>,
    /// Calibrated.
    pub model: Model,
    /// By the model, with as many sessions for each rank as one rank had.
    pub predictions: Vec<Prediction>,
}

/// What a run of this program left.
struct Measured {
    global_batch: usize,
    step_seconds: f64,
    phases: BTreeMap<String, f64>,
    targets: f64,
    evaluated_per_s: f64,
    /// Parameters of tables of items, and others.
    numbers: (f64, f64),
    command: String,
}

/// A run to be made.
#[derive(Clone, Copy)]
struct Run {
    ranks: usize,
    growth: Growth,
    item_table: TableLayout,
    global_batch: usize,
}

/// What a measurement leaves in its folder.
const SCALING: FolderKind = FolderKind {
    marker: TABLE,
    is_ours: |name| name == "runs" || name.starts_with("doctor.") || name.starts_with("scaling."),
};

/// Runs training on all numbers of ranks, and writes `scaling.md`, `scaling.json`, `scaling.svg` and
/// `scaling.png`. `tell` is given a line for each.
///
/// # Errors
/// See [`ScalingError`].
pub fn scaling(options: &Options, tell: &mut dyn FnMut(&str)) -> Result<Scaling, ScalingError> {
    if crate::collective::is_launched() {
        return Err(ScalingError::Launched);
    }
    let config = Config::load(&options.config, &options.set)?;
    let days = Days::open(&options.data, &config.data)?;
    let first_day = config.data.first_day.unwrap_or(days.first());
    let day = days.file(first_day, Split::Train)?;
    let Some(neural) = config.model.neural() else { return Err(ScalingError::Counts) };
    let (batch, lanes) = (config.train.global_batch, config.train.global_batch / config.train.micro_batch);
    if let Some(&ranks) = options.ranks.iter().find(|&&ranks| ranks > lanes || ranks == 0) {
        return Err(ScalingError::Ranks { ranks, lanes });
    }
    let mut ranks = options.ranks.clone();
    ranks.push(1);
    ranks.sort_unstable();
    ranks.dedup();
    options.launch.check()?;
    output::check_outside(&options.out, &options.data).map_err(ScalingError::Output)?;
    let folder = OutputFolder::in_place(&options.out, SCALING, tell).map_err(|error| match error {
        OutputError::Exists { path, .. } => ScalingError::Taken(path),
        error => ScalingError::Output(error),
    })?;

    let most = ranks[ranks.len() - 1];
    let n_cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    if options.launch.launcher == Launcher::Mpirun && options.launch.hosts.is_none() && most > n_cores {
        tell(&format!("warning: {most} ranks share {n_cores} cores if all start on this host"));
    }
    let found = options.examine(most, config.run.device)?;
    let link = Link::fit(&found);
    let threads_per_rank = match found.device.as_str() {
        // On one machine, all ranks of all runs are given what the many have.
        "CPU" if options.launch.hosts.is_none() && config.run.threads_per_rank == 0 => {
            (std::thread::available_parallelism().map_or(1, |n| n.get()) / most).max(1)
        }
        _ => config.run.threads_per_rank,
    };
    let alone =
        Run { ranks: 1, growth: Growth::Strong, item_table: TableLayout::Replicated, global_batch: batch };
    let mut tell = |run: &Run, measured: &Measured| {
        let rate = measured.global_batch as f64 / measured.step_seconds;
        tell(&format!("{}: {:.1} ms a step, {rate:.0} sessions/s", run.name(), measured.step_seconds * 1e3));
    };
    let mut measure = |run: Run| -> Result<Measured, ScalingError> {
        let measured = options.measure(run, threads_per_rank)?;
        tell(&run, &measured);
        Ok(measured)
    };
    let whole = measure(alone)?;
    let few = lanes.div_ceil(4) * config.train.micro_batch;
    let fewer = Run { global_batch: few, ..alone };
    let part = match few < batch {
        true => Some(measure(fewer)?),
        false => None,
    };
    let occurrences = crate::data::occurrences(&day, days.features(), (0, 1))?;
    let events = occurrences.iter().sum::<i64>() as f64 / day.n_sessions() as f64;
    let width = neural.input().item_width as f64;
    let n_items = days.features().n_items() as f64;
    let model = calibrate(
        options,
        (part.as_ref().unwrap_or(&whole), &whole),
        (whole.numbers, n_items, width),
        events,
        link,
    );

    let mut runs = Vec::new();
    for ranks in ranks.into_iter().filter(|&ranks| ranks > 1) {
        for &item_table in &options.item_tables {
            let strong = Run { ranks, item_table, ..alone };
            runs.push(strong);
            runs.push(Run { growth: Growth::Weak, global_batch: batch * ranks, ..strong });
        }
    }
    let point = |run: Run, measured: Measured| -> Point {
        let sessions = run.global_batch as f64 / run.ranks as f64;
        let job = Job { ranks: run.ranks, item_table: run.item_table, n_items, sessions };
        let sessions_per_s = run.global_batch as f64 / measured.step_seconds;
        Point {
            ranks: run.ranks,
            growth: run.growth,
            item_table: run.item_table,
            global_batch: run.global_batch,
            step_seconds: measured.step_seconds,
            sessions_per_s,
            efficiency: sessions_per_s / (run.ranks as f64 * batch as f64 / whole.step_seconds),
            phases: measured.phases,
            evaluated_per_s: measured.evaluated_per_s,
            predicted_seconds: model.predict(job).step_seconds,
            command: measured.command,
        }
    };
    let mut points = Vec::new();
    for run in runs {
        points.push(point(run, measure(run)?));
    }
    let predictions = PREDICTED_ITEMS.into_iter().flat_map(|n_items| {
        let jobs = PREDICTED_RANKS.into_iter().flat_map(move |ranks| {
            [TableLayout::Replicated, TableLayout::Sharded].map(|item_table| Job {
                ranks,
                item_table,
                n_items,
                sessions: batch as f64,
            })
        });
        jobs.collect::<Vec<_>>()
    });
    let predictions = predictions.map(|job| model.predict(job)).collect();
    let first = Measured { phases: whole.phases.clone(), command: whole.command.clone(), ..whole };
    points.insert(0, point(alone, first));
    let scaling =
        Scaling { title: config.title(), device: found.device, threads_per_rank, points, model, predictions };
    write::write(&folder.path(), &scaling)?;
    folder.publish().map_err(ScalingError::Output)?;
    Ok(scaling)
}

fn calibrate(
    options: &Options,
    (part, whole): (&Measured, &Measured),
    ((of_items, others), n_items, width): ((f64, f64), f64, f64),
    events: f64,
    link: Link,
) -> Model {
    let sum = |of: &Measured, is_of: fn(&str) -> bool| -> f64 {
        of.phases.iter().filter(|(name, _)| is_of(name)).map(|(_, seconds)| seconds).sum()
    };
    let sessions = |of: &Measured| of.global_batch as f64;
    let line = |is_of: fn(&str) -> bool| {
        Line::through((sessions(part), sum(part, is_of)), (sessions(whole), sum(whole, is_of)))
    };
    Model {
        arithmetic: line(|name| matches!(name, "data" | "forward" | "backward" | "records")),
        loss: line(|name| name == "loss"),
        optimizer: sum(whole, |name| name == "optimizer"),
        sessions: sessions(whole),
        targets: whole.targets / sessions(whole),
        events,
        width,
        n_items,
        numbers_per_item: of_items / n_items,
        other_numbers: others,
        within: link,
        across: options.across.unwrap_or(link),
        ranks_per_node: options.ranks_per_node as f64,
    }
}

impl Run {
    fn name(&self) -> String {
        let Self { ranks, growth, item_table, global_batch } = self;
        format!("{}-{}-{ranks}-ranks-{global_batch}-sessions", growth.name(), item_table.name())
    }
}

impl Options {
    fn run_dir(&self, run: Run) -> PathBuf {
        self.out.join("runs").join(run.name())
    }

    /// Looks at what lies between so many ranks.
    fn examine(&self, ranks: usize, device: DeviceChoice) -> Result<Findings, ScalingError> {
        let file = self.out.join("doctor.json");
        let path = |path: &Path| path.display().to_string();
        let arguments =
            ["doctor", "--device", device.name(), "--dir", &path(&self.out), "--json", &path(&file)];
        let arguments = arguments.map(str::to_owned);
        self.launch.run(ranks, &arguments, &self.out.join("doctor.log"))?;
        let problem = |problem: String| ScalingError::Record { path: file.clone(), problem };
        let text = fs::read_to_string(&file).map_err(|error| problem(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| problem(error.to_string()))
    }

    fn measure(&self, run: Run, threads_per_rank: usize) -> Result<Measured, ScalingError> {
        let run_dir = self.run_dir(run);
        io_at(&run_dir, fs::create_dir_all(self.out.join("runs")))?;
        let mut arguments = vec!["train".to_owned()];
        let paths = [("--config", &self.config), ("--data", &self.data), ("--run-dir", &run_dir)];
        arguments.extend(
            paths.iter().flat_map(|(option, path)| [(*option).to_owned(), path.display().to_string()]),
        );
        let Run { item_table, global_batch, .. } = run;
        let config = Config::load(&self.config, &self.set)?;
        let days = Days::open(&self.data, &config.data)?;
        let first_day = config.data.first_day.unwrap_or(days.first());
        let keys = [
            format!("run.threads_per_rank={threads_per_rank}"),
            format!("data.first_day={first_day}"),
            format!("data.last_day={}", first_day + 1),
            format!("parallel.item_table={}", item_table.name()),
            format!("train.global_batch={global_batch}"),
            format!("train.max_steps_per_day={}", WARM_UP + self.steps),
            // Days may have few steps.
            format!("train.epochs_per_day={}", WARM_UP + self.steps),
            "train.log_every_steps=1".to_owned(),
            "train.time_phases=true".to_owned(),
        ];
        arguments.extend(self.set.iter().chain(&keys).flat_map(|key| ["--set".to_owned(), key.clone()]));
        let command = self.launch.run(run.ranks, &arguments, &run_dir.with_extension("log"))?;
        let path = run_dir.join(METRICS);
        let problem = |problem: String| ScalingError::Record { path: path.clone(), problem };
        let text = fs::read_to_string(&path).map_err(|error| problem(error.to_string()))?;
        let measured = read(&text, run, command).map_err(problem)?;
        Ok(Measured { numbers: self.take_parameters(run)?, ..measured })
    }

    /// Parameters of tables of items, and others, that a run left. Nobody goes on from it, and it may be large: it goes.
    fn take_parameters(&self, run: Run) -> Result<(f64, f64), ScalingError> {
        let run_dir = self.run_dir(run);
        let (checkpoint, _) = Checkpoints::of(&run_dir).newest()?;
        let checkpoints = run_dir.join("checkpoints");
        io_at(&checkpoints, fs::remove_dir_all(&checkpoints))?;
        let count = |of_items: bool| {
            let weights = checkpoint.tensors.weights.iter();
            weights
                .filter(|(name, _)| ItemTable::is_item_table(name) == of_items)
                .map(|(_, tensor)| tensor.numel())
                .sum::<usize>()
        };
        Ok((count(true) as f64, count(false) as f64))
    }
}

/// A line of a run's records.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Record {
    Step {
        n_targets: usize,
        sessions_per_s: f64,
    },
    Phases(BTreeMap<String, f64>),
    Eval {
        n_sessions: f64,
        seconds: f64,
    },
    #[serde(other)]
    Other,
}

fn read(text: &str, run: Run, command: String) -> Result<Measured, String> {
    let (mut seconds, mut targets, mut phases) =
        (Vec::new(), Vec::new(), BTreeMap::<String, Vec<f64>>::new());
    let mut evaluated_per_s = None;
    for line in text.lines() {
        match serde_json::from_str(line).map_err(|error| error.to_string())? {
            Record::Step { n_targets, sessions_per_s } => {
                seconds.push(run.global_batch as f64 / sessions_per_s);
                targets.push(n_targets as f64);
            }
            Record::Phases(of_step) => {
                let of_step = of_step.into_iter().filter(|(name, _)| name != "day" && name != "step");
                of_step.for_each(|(name, seconds)| phases.entry(name).or_default().push(seconds));
            }
            Record::Eval { n_sessions, seconds } => evaluated_per_s = Some(n_sessions / seconds),
            Record::Other => {}
        }
    }
    let median = |of: &[f64]| {
        let mut counted = of.get(WARM_UP..).unwrap_or_default().to_vec();
        counted.sort_by(f64::total_cmp);
        counted.get(counted.len() / 2).copied()
    };
    Ok(Measured {
        global_batch: run.global_batch,
        step_seconds: median(&seconds).ok_or("it has too few steps")?,
        phases: phases.iter().filter_map(|(name, of)| Some((name.clone(), median(of)?))).collect(),
        targets: median(&targets).ok_or("it has too few steps")?,
        evaluated_per_s: evaluated_per_s.ok_or("it has no evaluation")?,
        numbers: (0.0, 0.0),
        command,
    })
}

fn io_at<T>(path: &Path, result: io::Result<T>) -> Result<T, ScalingError> {
    result.map_err(|source| ScalingError::Io { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_become_medians_without_the_first_steps() {
        let run = Run { ranks: 2, growth: Growth::Weak, item_table: TableLayout::Sharded, global_batch: 100 };
        assert_eq!(run.name(), "weak-sharded-2-ranks-100-sessions");
        let mut text = String::new();
        for (step, rate) in [1.0, 1.0, 1.0, 200.0, 50.0, 100.0].iter().enumerate() {
            text += &format!("{{\"kind\":\"step\",\"n_targets\":{step},\"sessions_per_s\":{rate}}}\n");
            text +=
                &format!("{{\"kind\":\"phases\",\"day\":1,\"step\":{step},\"loss\":{rate},\"data\":0.5}}\n");
        }
        assert_eq!(read(&text, run, String::new()).err(), Some("it has no evaluation".to_owned()));
        text += "{\"kind\":\"day\",\"seconds\":1}\n{\"kind\":\"eval\",\"n_sessions\":50,\"seconds\":0.5}\n";
        let Measured { step_seconds, targets, phases, evaluated_per_s, .. } =
            read(&text, run, String::new()).unwrap();
        assert_eq!((step_seconds, targets, evaluated_per_s), (1.0, 4.0, 100.0));
        assert_eq!(phases, BTreeMap::from([("data".to_owned(), 0.5), ("loss".to_owned(), 100.0)]));
        let few = text.lines().filter(|line| !line.contains("phases")).skip(3).collect::<Vec<_>>().join("\n");
        assert_eq!(read(&few, run, String::new()).err(), Some("it has too few steps".to_owned()));
    }
}
