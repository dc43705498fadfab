//! Reads `metrics.jsonl`, the records of a run.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A line of `metrics.jsonl`, as far as tools read it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum LoggedRecord {
    /// A training step.
    Step(LoggedStep),
    /// Mean seconds per step of each phase, beside `day` and `step`.
    Phases(BTreeMap<String, f64>),
    /// A day of training.
    Day(TrainedDay),
    /// An evaluation.
    Eval(LoggedEvaluation),
    /// Any other kind.
    #[serde(other)]
    Other,
}

/// A training step. What older versions did not record has a default.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct LoggedStep {
    /// Day trained on.
    pub day: i64,
    /// Finished steps of the day.
    pub step: usize,
    /// Mean over the targets of the global batch.
    pub loss: f64,
    /// Targets of the global batch.
    #[serde(default)]
    pub n_targets: usize,
    /// Over all ranks.
    #[serde(default)]
    pub sessions_per_s: Option<f64>,
}

/// A day of training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainedDay {
    /// Day trained on.
    pub day: i64,
    /// Sessions of all epochs and ranks.
    pub n_sessions: usize,
    /// Wall time of training, without evaluation.
    pub seconds: f64,
    /// Over all ranks.
    pub sessions_per_s: f64,
}

/// An evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct LoggedEvaluation {
    /// Sessions evaluated.
    pub n_sessions: f64,
    /// Wall time.
    #[serde(default)]
    pub seconds: Option<f64>,
}

/// A line that is not the JSON expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidLine {
    /// From 1.
    pub line: usize,
    /// The message of the parser.
    pub problem: String,
}

impl InvalidLine {
    /// Drops the line number from the parser's message: it counts lines of the parsed text, which
    /// may be one line of a file.
    pub fn new(line: usize, error: &serde_json::Error) -> Self {
        let text = error.to_string();
        let problem =
            text.rsplit_once(" at line ").map_or(&*text, |(problem, _)| problem).to_owned();
        Self { line, problem }
    }
}

impl fmt::Display for InvalidLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.problem)
    }
}

/// Parses the text of `metrics.jsonl`.
///
/// # Errors
/// Returns the first line that is not a record.
pub fn parse(text: &str) -> Result<Vec<LoggedRecord>, InvalidLine> {
    let record = |(line, text)| {
        serde_json::from_str(text).map_err(|error| InvalidLine::new(line + 1, &error))
    };
    text.lines().enumerate().map(record).collect()
}
