//! Reads the directories of finished runs.

use bireme_base::user_error::{REFUSED, UserError};
use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::evaluation_file::{self, EvaluationFacts, EvaluationFileError, SPLITS, SessionOutcome};
use crate::run_dir::{CONFIG, EVALUATIONS, METRICS, RESULTS, RUN};
use crate::run_log::{self, InvalidLine, LoggedRecord, LoggedStep, TrainedDay};

/// `model.kind` of the models that count instead of learning.
const BASELINES: [&str; 5] = ["popularity", "recent", "markov", "vsknn", "loglinear"];

/// A finished run.
pub struct FinishedRun {
    /// Its directory, as given.
    pub path: PathBuf,
    /// Its name in the report: the model's, followed by the directory's where runs share a model.
    pub label: String,
    /// The model's name.
    pub title: String,
    /// `model.kind`.
    pub kind: String,
    /// Configuration as resolved, in TOML.
    pub config: String,
    /// Content of `run.json`.
    pub machine: serde_json::Value,
    /// Saved evaluations by day, and within a day in the order of [`SPLITS`].
    pub evaluations: Vec<(EvaluationFacts, Vec<SessionOutcome>)>,
    /// Recorded training steps; none for a baseline.
    pub steps: Vec<LoggedStep>,
    pub days: Vec<TrainedDay>,
}

impl FinishedRun {
    /// Whether its model counts instead of learning.
    pub fn is_baseline(&self) -> bool {
        BASELINES.contains(&self.kind.as_str())
    }
}

/// A path that does not hold a finished run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("`{0}` holds no run: it has no `{CONFIG}`")]
    NoRun(PathBuf),
    #[error("run `{0}` was given twice")]
    Twice(PathBuf),
    /// It stopped before its last evaluation, or its version did not save evaluations.
    #[error("run `{run}` is not finished, or older than this version: `{missing}` is missing")]
    Unfinished { run: PathBuf, missing: PathBuf },
    #[error("cannot read `{path}`")]
    Read { path: PathBuf, source: io::Error },
    #[error("`{path}` is not the configuration of a run: {problem}")]
    Config { path: PathBuf, problem: String },
    #[error("`{path}`, {invalid}")]
    Json { path: PathBuf, invalid: InvalidLine },
    #[error(transparent)]
    Evaluation(#[from] EvaluationFileError),
    /// Content and name of the file of an evaluation differ.
    #[error("`{path}` holds the evaluation of day {} ({})", facts.eval_day, facts.split)]
    Misnamed { path: PathBuf, facts: Box<EvaluationFacts> },
}

impl UserError for RunError {
    fn exit_code(&self) -> i32 {
        REFUSED
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Evaluation(error) => error.hint(),
            _ => None,
        }
    }
}

/// Reads finished runs and labels them.
///
/// # Errors
/// See [`RunError`].
pub fn read(paths: &[PathBuf]) -> Result<Vec<FinishedRun>, RunError> {
    let mut seen = HashSet::new();
    for path in paths {
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        if !seen.insert(real) {
            return Err(RunError::Twice(path.clone()));
        }
    }
    let mut runs: Vec<FinishedRun> =
        paths.iter().map(|path| read_run(path)).collect::<Result<_, _>>()?;
    label(&mut runs);
    Ok(runs)
}

fn read_run(path: &Path) -> Result<FinishedRun, RunError> {
    let config_path = path.join(CONFIG);
    if !config_path.is_file() {
        return Err(RunError::NoRun(path.to_owned()));
    }
    let config = read_text(&config_path)?;
    let RunConfig { kind, parts } = read_config(&config)
        .map_err(|problem| RunError::Config { path: config_path.clone(), problem })?;
    if !path.join(RESULTS).is_file() {
        return Err(RunError::Unfinished { run: path.to_owned(), missing: RESULTS.into() });
    }
    let evaluations = read_evaluations(path, parts)?;
    let (steps, days) = read_records(&path.join(METRICS))?;
    let machine_path = path.join(RUN);
    let machine = serde_json::from_str(&read_text(&machine_path)?).map_err(|error| {
        RunError::Json { path: machine_path, invalid: InvalidLine::new(error.line(), &error) }
    })?;
    let title = evaluations.first().map_or_else(|| kind.clone(), |(facts, _)| facts.title.clone());
    Ok(FinishedRun {
        path: path.to_owned(),
        label: title.clone(),
        title,
        kind,
        config,
        machine,
        evaluations,
        steps,
        days,
    })
}

fn read_text(path: &Path) -> Result<String, RunError> {
    fs::read_to_string(path).map_err(|source| RunError::Read { path: path.to_owned(), source })
}

/// Part of a day that was evaluated, in the order of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct DayPart {
    day: i64,
    /// Index in [`SPLITS`].
    split: usize,
}

struct RunConfig {
    kind: String,
    /// What a finished run with this configuration has evaluated.
    parts: BTreeSet<DayPart>,
}

/// Reads only the keys needed, so that runs of models unknown to this version can be reported.
fn read_config(text: &str) -> Result<RunConfig, String> {
    let table: toml::Table =
        text.parse().map_err(|error: toml::de::Error| error.message().to_owned())?;
    let value = |section: &str, key: &str| {
        let value = table.get(section).and_then(|section| section.get(key));
        value.ok_or(format!("`{section}.{key}` is missing"))
    };
    let day =
        |key: &str| value("data", key)?.as_integer().ok_or(format!("`data.{key}` is not a number"));
    let kind = value("model", "kind")?.as_str().ok_or("`model.kind` is not a string")?.to_owned();
    let valid = SPLITS.iter().position(|&split| split == "valid").expect("a name of a split");
    let days = day("first_day")? + 1..=day("last_day")?;
    Ok(RunConfig { kind, parts: days.map(|day| DayPart { day, split: valid }).collect() })
}

/// Reads the evaluations of `parts`, and all others that were saved.
fn read_evaluations(
    run: &Path,
    mut parts: BTreeSet<DayPart>,
) -> Result<Vec<(EvaluationFacts, Vec<SessionOutcome>)>, RunError> {
    parts.extend(saved_parts(run)?);
    let mut evaluations = Vec::new();
    for DayPart { day, split } in parts {
        let path = evaluation_file::path(run, day, SPLITS[split]);
        if !path.is_file() {
            let missing = path.strip_prefix(run).unwrap_or(&path).to_owned();
            return Err(RunError::Unfinished { run: run.to_owned(), missing });
        }
        let (facts, outcomes) = evaluation_file::read(&path)?;
        if (facts.eval_day, facts.split.as_str()) != (day, SPLITS[split]) {
            return Err(RunError::Misnamed { path, facts: Box::new(facts) });
        }
        evaluations.push((facts, outcomes));
    }
    Ok(evaluations)
}

fn saved_parts(run: &Path) -> Result<Vec<DayPart>, RunError> {
    let folder = run.join(EVALUATIONS);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(RunError::Read { path: folder, source }),
    };
    let mut parts = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| RunError::Read { path: folder.clone(), source })?;
        parts.extend(entry.file_name().to_str().and_then(part_of_name));
    }
    Ok(parts)
}

fn part_of_name(name: &str) -> Option<DayPart> {
    let (day, split) = name.strip_prefix("day-")?.strip_suffix(".parquet")?.rsplit_once('-')?;
    let split = SPLITS.iter().position(|&other| other == split)?;
    Some(DayPart { day: day.parse().ok()?, split })
}

fn read_records(path: &Path) -> Result<(Vec<LoggedStep>, Vec<TrainedDay>), RunError> {
    let records = run_log::parse(&read_text(path)?)
        .map_err(|invalid| RunError::Json { path: path.to_owned(), invalid })?;
    let (mut steps, mut days) = (Vec::new(), Vec::new());
    for record in records {
        match record {
            LoggedRecord::Step(step) => steps.push(step),
            LoggedRecord::Day(day) => days.push(day),
            LoggedRecord::Phases(_) | LoggedRecord::Eval(_) | LoggedRecord::Other => {}
        }
    }
    Ok((steps, days))
}

/// Replaces control characters, which XML forbids: labels come from names of files and go into SVG.
fn visible(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }).collect()
}

/// Makes labels unique: appends the name of the directory where runs share the model's name, and
/// the path where that is shared too.
fn label(runs: &mut [FinishedRun]) {
    let with_name = |run: &FinishedRun| {
        let name = run.path.file_name().map(|name| name.to_string_lossy().into_owned());
        format!("{} ({})", run.title, name.unwrap_or_else(|| run.path.display().to_string()))
    };
    for more in [with_name, |run: &FinishedRun| format!("{} ({})", run.title, run.path.display())] {
        let labels: Vec<String> = runs.iter().map(|run| run.label.clone()).collect();
        for (run, label) in runs.iter_mut().zip(&labels) {
            if labels.iter().filter(|other| *other == label).count() > 1 {
                run.label = more(run);
            }
        }
    }
    runs.iter_mut().for_each(|run| run.label = visible(&run.label));
}
