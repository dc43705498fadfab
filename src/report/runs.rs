//! What finished runs left in their directories, read back to be compared.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::evaluations::{self, EVALUATIONS, EvaluationFileError, Facts};
use super::{METRICS, RESULTS};
use crate::data::Split;
use crate::metrics::Outcome;

/// File of a run directory: the configuration as resolved.
pub(crate) const CONFIG: &str = "config.toml";

/// File of a run directory: with what and on what it ran.
pub(crate) const RUN: &str = "run.json";

/// File of a run directory: locked by the process that writes to it.
pub(crate) const LOCK: &str = ".lock";

/// Models that only count: what the others have to beat.
const BASELINES: [&str; 4] = ["popularity", "recent", "markov", "vsknn"];

/// A finished run.
pub struct Run {
    /// Its directory, as given.
    pub path: PathBuf,
    /// What it is called beside the others: the model's name, and the directory's where several share it.
    pub label: String,
    /// The model's name.
    pub title: String,
    /// `model.kind` of its configuration.
    pub kind: String,
    /// Its configuration as resolved, in TOML.
    pub config: String,
    /// `run.json`.
    pub machine: serde_json::Value,
    /// What it evaluated: by day, and within a day train before valid before test.
    pub evaluations: Vec<(Facts, Vec<Outcome>)>,
    /// Records of its steps; none for a model that only counts.
    pub steps: Vec<Step>,
    /// Records of its training days.
    pub days: Vec<TrainedDay>,
}

impl Run {
    /// Whether its model only counts.
    pub fn is_baseline(&self) -> bool {
        BASELINES.contains(&self.kind.as_str())
    }
}

/// A step that was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Step {
    /// The day trained on.
    pub day: i64,
    /// Steps of the day that were done.
    pub step: usize,
    /// Mean loss of a target.
    pub loss: f64,
}

/// A day that was trained on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainedDay {
    /// The day.
    pub day: i64,
    /// Sessions trained on, those of all epochs and ranks.
    pub n_sessions: usize,
    /// Wall time of training, without evaluation.
    pub seconds: f64,
    /// Sessions of all ranks a second.
    pub sessions_per_s: f64,
}

/// The lines of `metrics.jsonl` that a report reads.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Line {
    Step(Step),
    Day(TrainedDay),
    #[serde(other)]
    Other,
}

/// A path that holds no finished run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No run at all.
    #[error("`{0}` holds no run: it has no `{CONFIG}`")]
    NoRun(PathBuf),
    /// The same run again.
    #[error("run `{0}` was given twice")]
    Twice(PathBuf),
    /// It stopped before its last evaluation, or was made before evaluations were kept.
    #[error("run `{run}` is not finished, or older than this version: `{missing}` is missing")]
    Unfinished {
        /// Its directory.
        run: PathBuf,
        /// The file that a finished run has.
        missing: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The configuration lacks what a report needs.
    #[error("`{path}` is no configuration of a run: {problem}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file is not the JSON it should be.
    #[error("`{path}`, line {line}: {problem}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Which of its lines, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// Outcomes that cannot be read.
    #[error(transparent)]
    Evaluation(#[from] EvaluationFileError),
    /// Outcomes under another name than their own.
    #[error("`{path}` says that it is of day {} ({})", facts.eval_day, facts.split.name())]
    Misnamed {
        /// The file.
        path: PathBuf,
        /// What it says.
        facts: Box<Facts>,
    },
}

/// Reads finished runs, in this order.
///
/// # Errors
/// See [`RunError`].
pub fn read(paths: &[PathBuf]) -> Result<Vec<Run>, RunError> {
    let mut seen = HashSet::new();
    for path in paths {
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        if !seen.insert(real) {
            return Err(RunError::Twice(path.clone()));
        }
    }
    let mut runs: Vec<Run> = paths.iter().map(|path| read_run(path)).collect::<Result<_, _>>()?;
    label(&mut runs);
    Ok(runs)
}

fn read_run(path: &Path) -> Result<Run, RunError> {
    let config_path = path.join(CONFIG);
    if !config_path.is_file() {
        return Err(RunError::NoRun(path.to_owned()));
    }
    let config = read_text(&config_path)?;
    let (kind, mut parts) =
        read_config(&config).map_err(|problem| RunError::Config { path: config_path.clone(), problem })?;
    if !path.join(RESULTS).is_file() {
        return Err(RunError::Unfinished { run: path.to_owned(), missing: RESULTS.into() });
    }
    parts.extend(saved_parts(path)?);
    let mut read_evaluations = Vec::new();
    for &(day, split) in &parts {
        let split = Split::ALL[split];
        let file = evaluations::path(path, day, split);
        if !file.is_file() {
            let missing = file.strip_prefix(path).unwrap_or(&file).to_owned();
            return Err(RunError::Unfinished { run: path.to_owned(), missing });
        }
        let (facts, outcomes) = evaluations::read(&file)?;
        if (facts.eval_day, facts.split) != (day, split) {
            return Err(RunError::Misnamed { path: file, facts: Box::new(facts) });
        }
        read_evaluations.push((facts, outcomes));
    }
    let (steps, days) = read_records(&path.join(METRICS))?;
    let machine_path = path.join(RUN);
    let machine = serde_json::from_str(&read_text(&machine_path)?);
    let machine = machine.map_err(|error| invalid_json(&machine_path, error.line(), &error))?;
    let title = read_evaluations.first().map_or_else(|| kind.clone(), |(facts, _)| facts.title.clone());
    Ok(Run {
        path: path.to_owned(),
        label: title.clone(),
        title,
        kind,
        config,
        machine,
        evaluations: read_evaluations,
        steps,
        days,
    })
}

fn read_text(path: &Path) -> Result<String, RunError> {
    fs::read_to_string(path).map_err(|source| RunError::Read { path: path.to_owned(), source })
}

/// A day and the place of a part of it in [`Split::ALL`].
type Part = (i64, usize);

/// `model.kind`, and what a run with this configuration has evaluated when it is done. The rest is not looked at, so
/// that runs of models which this version does not know can be reported too.
fn read_config(text: &str) -> Result<(String, BTreeSet<Part>), String> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| error.message().to_owned())?;
    let value = |section: &str, key: &str| {
        table.get(section).and_then(|section| section.get(key)).ok_or(format!("`{section}.{key}` is missing"))
    };
    let day = |key: &str| value("data", key)?.as_integer().ok_or(format!("`data.{key}` is not a number"));
    let kind = value("model", "kind")?.as_str().ok_or("`model.kind` is not a string")?;
    let parts = (day("first_day")? + 1..=day("last_day")?).map(|day| (day, Split::Valid as usize));
    Ok((kind.to_owned(), parts.collect()))
}

/// What else was evaluated and saved.
fn saved_parts(run: &Path) -> Result<Vec<Part>, RunError> {
    let folder = run.join(EVALUATIONS);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(RunError::Read { path: folder, source }),
    };
    let mut parts = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| RunError::Read { path: folder.clone(), source })?;
        let name = entry.file_name();
        let named = name.to_str().and_then(|name| name.strip_prefix("day-")?.strip_suffix(".parquet"));
        parts.extend(named.and_then(|name| {
            let (day, split) = name.rsplit_once('-')?;
            let split = Split::ALL.iter().position(|part| part.name() == split)?;
            Some((day.parse::<i64>().ok()?, split))
        }));
    }
    Ok(parts)
}

/// The error without its own line number, which is that of a text that may be one line of the file.
fn invalid_json(path: &Path, line: usize, error: &serde_json::Error) -> RunError {
    let text = error.to_string();
    let problem = text.rsplit_once(" at line ").map_or(&*text, |(problem, _)| problem).to_owned();
    RunError::Json { path: path.to_owned(), line, problem }
}

fn read_records(path: &Path) -> Result<(Vec<Step>, Vec<TrainedDay>), RunError> {
    let (mut steps, mut days) = (Vec::new(), Vec::new());
    for (line, text) in read_text(path)?.lines().enumerate() {
        match serde_json::from_str(text) {
            Ok(Line::Step(step)) => steps.push(step),
            Ok(Line::Day(day)) => days.push(day),
            Ok(Line::Other) => {}
            Err(error) => return Err(invalid_json(path, line + 1, &error)),
        }
    }
    Ok((steps, days))
}

/// Names come from files and folders, and go into pictures, where a letter must be one that can be seen.
fn visible(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }).collect()
}

/// Gives every run a name of its own: the model's; where several have it, with the directory's name; where even that
/// is shared, with the path.
fn label(runs: &mut [Run]) {
    let with_name = |run: &Run| {
        let name = run.path.file_name().map(|name| name.to_string_lossy().into_owned());
        format!("{} ({})", run.title, name.unwrap_or_else(|| run.path.display().to_string()))
    };
    for more in [with_name, |run: &Run| format!("{} ({})", run.title, run.path.display())] {
        let labels: Vec<String> = runs.iter().map(|run| run.label.clone()).collect();
        for (run, label) in runs.iter_mut().zip(&labels) {
            if labels.iter().filter(|other| *other == label).count() > 1 {
                run.label = more(run);
            }
        }
    }
    runs.iter_mut().for_each(|run| run.label = visible(&run.label));
}
