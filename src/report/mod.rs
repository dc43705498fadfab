//! What a run says of itself, and what several runs say beside each other.
//!
//! [`Report`] writes `metrics.jsonl` and lines or a bar on the terminal while a run goes on, [`write_results`] and
//! [`evaluations`] what it leaves behind. Only rank 0 speaks; on the others every call does nothing.
//!
//! `bireme report` reads what finished runs left: run directories → [`runs`] → [`compare`] (figures, with intervals
//! by [`bootstrap`]) → `charts`, `tables` and `pages` → a folder, written by [`write()`].

pub mod evaluations;
pub mod runs;
pub mod bootstrap;
pub mod compare;
mod charts;
mod tables;
mod pages;
mod write;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bireme_base::{console, output};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::collective::Root;
use crate::data::Split;
use crate::metrics::Metrics;

pub use charts::ChartError;
pub(crate) use charts::{Line, rates};
pub use write::{PAGE, WriteError, create, write};

/// File of a run directory: its records, one JSON object a line.
pub(crate) const METRICS: &str = "metrics.jsonl";

/// File of a run directory, and of a report: the metrics of the last evaluation.
pub(crate) const RESULTS: &str = "results.txt";

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// Now and then while training.
    Step {
        /// The day trained on.
        day: i64,
        /// Pass over the day, from 0.
        epoch: usize,
        /// Steps of the day that are done.
        step: usize,
        /// Mean cross entropy over the targets of this step's global batch.
        loss: f64,
        /// Those targets.
        n_targets: usize,
        /// Learning rate of this step.
        lr: f64,
        /// Sessions of all ranks a second, since the last such line.
        sessions_per_s: f64,
    },
    /// With each step's line, if `train.time_phases`: what rank 0 spent the time on since the last one.
    Phases {
        /// The day trained on.
        day: i64,
        /// Steps of the day that are done.
        step: usize,
        /// Seconds of each phase in a step, on average.
        #[serde(flatten)]
        seconds: BTreeMap<&'static str, f64>,
    },
    /// After training on a day.
    Day {
        /// The day trained on.
        day: i64,
        /// Sessions trained on, those of all epochs and ranks.
        n_sessions: usize,
        /// Wall time of training, without evaluation.
        seconds: f64,
        /// Sessions of all ranks a second.
        sessions_per_s: f64,
    },
    /// A step whose loss or gradient was not finite, and which was left out.
    Skipped {
        /// The day trained on.
        day: i64,
        /// The step of the day, from 1.
        step: usize,
        /// Its mean loss.
        loss: f64,
        /// Norm of its gradient.
        norm: f64,
    },
    /// A checkpoint was begun.
    Checkpoint {
        /// The day trained on.
        day: i64,
        /// Steps of the day that are done.
        step: usize,
        /// How long training waited for it.
        waited_seconds: f64,
    },
    /// After every day.
    Eval {
        /// The day trained on last.
        train_day: i64,
        /// The day evaluated on.
        eval_day: i64,
        /// Which of its parts.
        split: Split,
        /// The figures.
        #[serde(flatten)]
        metrics: Metrics,
        /// Share of the items that may be recommended that are in the top 20 of at least one session.
        coverage_at_20: f64,
        /// Wall time of the evaluation.
        seconds: f64,
    },
}

/// The log could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write `{path}`")]
pub struct ReportError {
    pub(crate) path: PathBuf,
    pub(crate) source: io::Error,
}

/// Where a run's records go.
pub struct Report {
    root: Option<RootReport>,
}

struct RootReport {
    path: PathBuf,
    records: File,
    bar: Option<ProgressBar>,
    /// When the day began here, the steps done then, and all its steps.
    day: (Instant, usize, usize),
}

impl Report {
    /// Opens `run_dir/metrics.jsonl` on the root and leaves the first `n_bytes` of it; silent elsewhere.
    ///
    /// # Errors
    /// The file cannot be opened, or is shorter.
    pub fn open(root: Option<Root>, run_dir: &Path, n_bytes: u64) -> Result<Self, ReportError> {
        let Some(_) = root else { return Ok(Self { root: None }) };
        let path = run_dir.join(METRICS);
        let open = || {
            let records = OpenOptions::new().create(true).append(true).open(&path)?;
            if records.metadata()?.len() < n_bytes {
                let problem = format!("the checkpoint was written after {n_bytes} bytes of it, it has fewer");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, problem));
            }
            records.set_len(n_bytes).map(|()| records)
        };
        let records = open().map_err(|source| ReportError { path: path.clone(), source })?;
        Ok(Self { root: Some(RootReport { path, records, bar: None, day: (Instant::now(), 0, 0) }) })
    }

    /// Forces the records to disk, and returns how many bytes they are; 0 where there are none.
    ///
    /// # Errors
    /// The disk is full, say.
    pub fn sync(&self) -> Result<u64, ReportError> {
        let Some(root) = &self.root else { return Ok(0) };
        let synced = root.records.sync_all().and_then(|()| root.records.metadata());
        let metadata = synced.map_err(|source| ReportError { path: root.path.clone(), source })?;
        Ok(metadata.len())
    }

    /// A day begins, of whose `n_steps` steps `n_done` are done.
    pub fn begin_day(&mut self, day: i64, (n_done, n_steps): (usize, usize), n_sessions: usize) {
        let done = if n_done > 0 { format!(", {n_done} of them done") } else { String::new() };
        self.say(&format!("day {day}: {n_sessions} sessions, {n_steps} steps{done}"));
        let Some(root) = &mut self.root else { return };
        root.day = (Instant::now(), n_done, n_steps);
        if io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(n_steps as u64), ProgressDrawTarget::stderr());
            let style =
                ProgressStyle::with_template("day {prefix} {wide_bar} {pos}/{len}  {msg}  {eta} left")
                    .expect("a valid template");
            bar.set_style(style);
            bar.set_prefix(day.to_string());
            bar.enable_steady_tick(Duration::from_secs(1));
            bar.set_position(n_done as u64);
            bar.reset_eta();
            root.bar = Some(bar);
        }
    }

    /// A step is done.
    pub fn tick(&self) {
        if let Some(bar) = self.root.as_ref().and_then(|root| root.bar.as_ref()) {
            bar.inc(1);
        }
    }

    /// The day is done.
    pub fn end_day(&mut self) {
        if let Some(bar) = self.root.as_mut().and_then(|root| root.bar.take()) {
            bar.finish_and_clear();
        }
    }

    /// Writes a record, and says it.
    ///
    /// # Errors
    /// The disk is full, say.
    pub fn record(&mut self, record: &Record) -> Result<(), ReportError> {
        let Some(root) = &mut self.root else { return Ok(()) };
        let mut line = serde_json::to_string(record).expect("a record is JSON");
        line.push('\n');
        let written = root.records.write_all(line.as_bytes());
        written.map_err(|source| ReportError { path: root.path.clone(), source })?;
        match record {
            Record::Step { day, epoch, step, loss, lr, sessions_per_s, .. } => {
                let figures = format!("loss {loss:7.4}  lr {lr:.2e}  {sessions_per_s:7.0} sessions/s");
                if let Some(bar) = &root.bar {
                    bar.set_message(figures);
                } else {
                    let (begun, n_before, n_steps) = root.day;
                    let seconds_a_step = begun.elapsed().as_secs_f64() / (step - n_before) as f64;
                    let left = seconds_a_step * (n_steps - step) as f64;
                    self.say(&format!(
                        "day {day}  epoch {epoch}  step {step:5}  {figures}  {left:5.0} s left"
                    ));
                }
            }
            Record::Day { day, n_sessions, seconds, sessions_per_s } => {
                self.say(&format!(
                    "day {day}: trained on {n_sessions} sessions in {seconds:.1} s, {sessions_per_s:.0} sessions/s"
                ));
            }
            Record::Phases { seconds, .. } => {
                let of = |(name, seconds): (&&str, &f64)| format!("{name} {:.2}", seconds * 1e3);
                let all: Vec<String> = seconds.iter().map(of).collect();
                self.say(&format!("ms a step: {}", all.join("  ")));
            }
            Record::Skipped { day, step, loss, norm } => {
                self.say(&format!(
                    "day {day}  step {step:5}  left out: loss {loss}, norm of its gradient {norm}"
                ));
            }
            Record::Checkpoint { .. } => {}
            Record::Eval { train_day, eval_day, split, metrics, coverage_at_20, seconds } => {
                self.say(&format!(
                    "after day {train_day}, on day {eval_day} ({}): {}  coverage@20 {coverage_at_20:.4}  {seconds:.1} s",
                    split.name(),
                    figures(metrics)
                ));
            }
        }
        Ok(())
    }

    /// Logs a line.
    pub fn say(&self, line: &str) {
        match &self.root {
            Some(RootReport { bar: Some(bar), .. }) => bar.suspend(|| console::log(line)),
            Some(_) => console::log(line),
            None => {}
        }
    }
}

/// The figures of an evaluation on one line.
pub fn figures(metrics: &Metrics) -> String {
    let Metrics { n_sessions, loss, ndcg_at_10, ndcg_at_20, recall_at_10, recall_at_20, mrr_at_20 } = metrics;
    let loss = if loss.is_nan() { "  none".to_owned() } else { format!("{loss:.4}") };
    format!(
        "loss {loss}  NDCG@10 {ndcg_at_10:.4}  NDCG@20 {ndcg_at_20:.4}  Recall@10 {recall_at_10:.4}  \
         Recall@20 {recall_at_20:.4}  MRR@20 {mrr_at_20:.4}  ({n_sessions} sessions)"
    )
}

/// Writes `run_dir/results.txt`: a title, then the metrics of the last evaluation as `key:value`.
///
/// # Errors
/// The disk is full, say.
pub fn write_results(_: Root, run_dir: &Path, title: &str, metrics: &Metrics) -> Result<(), ReportError> {
    let path = run_dir.join(RESULTS);
    output::write(&path, results(title, metrics).as_bytes())
        .map_err(|error| ReportError { path, source: error.into() })
}

/// A title, then metrics as `key:value`, a line each.
pub(crate) fn results(title: &str, metrics: &Metrics) -> String {
    format!(
        "{title} accuracy results:\nnext-item/ndcg_at_10:{}\nnext-item/ndcg_at_20:{}\n\
         next-item/recall_at_10:{}\nnext-item/recall_at_20:{}\n",
        metrics.ndcg_at_10, metrics.ndcg_at_20, metrics.recall_at_10, metrics.recall_at_20
    )
}
