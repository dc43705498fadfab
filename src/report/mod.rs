//! The log of a run: `metrics.jsonl`, `results.txt`, `evaluations/`, and lines or a progress bar on
//! the terminal. Rank 0 writes; on all other ranks every call does nothing.

pub mod evaluations;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bireme_base::user_error::{FAILED, UserError};
use bireme_base::{console, output};
use bireme_tools::report::results_text;
use bireme_tools::run_dir::{METRICS, RESULTS};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::collective::Root;
use crate::data::Split;
use crate::metrics::Metrics;

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// Every `train.log_every_steps` steps.
    Step {
        /// Day trained on.
        day: i64,
        /// From 0.
        epoch: usize,
        /// Finished steps of the day.
        step: usize,
        /// Mean cross entropy over the targets of the global batch.
        loss: f64,
        /// Targets of the global batch.
        n_targets: usize,
        /// Learning rate of this step.
        lr: f64,
        /// Over all ranks, since the last such line.
        sessions_per_s: f64,
    },
    /// With every `Step`, if `train.time_phases`.
    Phases {
        /// Day trained on.
        day: i64,
        /// Finished steps of the day.
        step: usize,
        /// Mean seconds per step of rank 0 since the last such line, by phase.
        #[serde(flatten)]
        seconds: BTreeMap<&'static str, f64>,
    },
    /// After each day of training.
    Day {
        /// Day trained on.
        day: i64,
        /// Sessions of all epochs and ranks.
        n_sessions: usize,
        /// Wall time of training, without evaluation.
        seconds: f64,
        /// Over all ranks.
        sessions_per_s: f64,
    },
    /// On a GPU, how the steps of a day run.
    Graph {
        /// Day trained on.
        day: i64,
        /// Whether a step is one CUDA graph.
        captured: bool,
        /// Why it is not.
        #[serde(skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// A step that was skipped because its loss or gradient was not finite.
    Skipped {
        /// Day trained on.
        day: i64,
        /// Step of the day, from 1.
        step: usize,
        /// Mean over targets.
        loss: f64,
        /// Norm of the gradient.
        norm: f64,
    },
    /// The start of a checkpoint.
    Checkpoint {
        /// Day trained on.
        day: i64,
        /// Finished steps of the day.
        step: usize,
        /// Time for which training was blocked.
        waited_seconds: f64,
    },
    /// An evaluation.
    Eval {
        /// Last day trained on.
        train_day: i64,
        /// Day evaluated on.
        eval_day: i64,
        /// Part of that day.
        split: Split,
        /// Means over its sessions.
        #[serde(flatten)]
        metrics: Metrics,
        /// Share of the catalogue that is in the top 20 of at least one session.
        coverage_at_20: f64,
        /// Wall time of the evaluation.
        seconds: f64,
    },
}

/// The records or results could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write `{path}`")]
pub struct ReportError {
    pub(crate) path: PathBuf,
    pub(crate) source: io::Error,
}

impl UserError for ReportError {
    fn exit_code(&self) -> i32 {
        FAILED
    }
}

/// The log of a run: active on the root, silent elsewhere.
pub struct Report {
    root: Option<RootReport>,
}

struct RootReport {
    path: PathBuf,
    records: File,
    bar: Option<ProgressBar>,
    day: DayProgress,
}

/// For the estimate of the remaining time.
struct DayProgress {
    start: Instant,
    /// Steps finished before `start`, by the run that is resumed.
    n_before: usize,
    n_steps: usize,
}

impl Report {
    /// Opens `run_dir/metrics.jsonl` on the root and truncates it to `n_bytes`.
    ///
    /// # Errors
    /// Returns an error if the file cannot be opened or is shorter.
    pub fn open(root: Option<Root>, run_dir: &Path, n_bytes: u64) -> Result<Self, ReportError> {
        let Some(_) = root else { return Ok(Self { root: None }) };
        let path = run_dir.join(METRICS);
        let open = || {
            let records = OpenOptions::new().create(true).append(true).open(&path)?;
            if records.metadata()?.len() < n_bytes {
                let problem =
                    format!("it is shorter than the {n_bytes} bytes that the checkpoint recorded");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, problem));
            }
            records.set_len(n_bytes).map(|()| records)
        };
        let records = open().map_err(|source| ReportError { path: path.clone(), source })?;
        let day = DayProgress { start: Instant::now(), n_before: 0, n_steps: 0 };
        Ok(Self { root: Some(RootReport { path, records, bar: None, day }) })
    }

    /// Forces the records to disk and returns their size in bytes, 0 on other ranks.
    ///
    /// # Errors
    /// Returns an error if the sync fails.
    pub fn sync(&self) -> Result<u64, ReportError> {
        let Some(root) = &self.root else { return Ok(0) };
        let synced = root.records.sync_all().and_then(|()| root.records.metadata());
        let metadata = synced.map_err(|source| ReportError { path: root.path.clone(), source })?;
        Ok(metadata.len())
    }

    /// Starts a day, of whose `n_steps` steps `n_done` are finished.
    pub fn begin_day(&mut self, day: i64, (n_done, n_steps): (usize, usize), n_sessions: usize) {
        let done = if n_done > 0 { format!(", {n_done} of them done") } else { String::new() };
        self.print(&format!("day {day}: {n_sessions} sessions, {n_steps} steps{done}"));
        let Some(root) = &mut self.root else { return };
        root.day = DayProgress { start: Instant::now(), n_before: n_done, n_steps };
        if io::stderr().is_terminal() {
            let bar =
                ProgressBar::with_draw_target(Some(n_steps as u64), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(
                "day {prefix} {wide_bar} {pos}/{len}  {msg}  {eta} left",
            )
            .expect("a valid template");
            bar.set_style(style);
            bar.set_prefix(day.to_string());
            bar.enable_steady_tick(Duration::from_secs(1));
            bar.set_position(n_done as u64);
            bar.reset_eta();
            root.bar = Some(bar);
        }
    }

    /// Counts a finished step.
    pub fn tick(&self) {
        if let Some(bar) = self.root.as_ref().and_then(|root| root.bar.as_ref()) {
            bar.inc(1);
        }
    }

    /// Removes the progress bar of the day.
    pub fn end_day(&mut self) {
        if let Some(bar) = self.root.as_mut().and_then(|root| root.bar.take()) {
            bar.finish_and_clear();
        }
    }

    /// Writes a record, and logs it as text.
    ///
    /// # Errors
    /// Returns an error if the write fails.
    pub fn record(&mut self, record: &Record) -> Result<(), ReportError> {
        let Some(root) = &mut self.root else { return Ok(()) };
        let mut line = serde_json::to_string(record).expect("a record is JSON");
        line.push('\n');
        let written = root.records.write_all(line.as_bytes());
        written.map_err(|source| ReportError { path: root.path.clone(), source })?;
        match record {
            Record::Step { day, epoch, step, loss, lr, sessions_per_s, .. } => {
                let figures =
                    format!("loss {loss:7.4}  lr {lr:.2e}  {sessions_per_s:7.0} sessions/s");
                if let Some(bar) = &root.bar {
                    bar.set_message(figures);
                } else {
                    let DayProgress { start, n_before, n_steps } = root.day;
                    let step_seconds = start.elapsed().as_secs_f64() / (step - n_before) as f64;
                    let left = step_seconds * (n_steps - step) as f64;
                    self.print(&format!(
                        "day {day}  epoch {epoch}  step {step:5}  {figures}  {left:5.0} s left"
                    ));
                }
            }
            Record::Day { day, n_sessions, seconds, sessions_per_s } => {
                self.print(&format!(
                    "day {day}: trained on {n_sessions} sessions in {seconds:.1} s, \
                     {sessions_per_s:.0} sessions/s"
                ));
            }
            Record::Phases { seconds, .. } => {
                let of = |(name, seconds): (&&str, &f64)| format!("{name} {:.2}", seconds * 1e3);
                let all: Vec<String> = seconds.iter().map(of).collect();
                self.print(&format!("ms a step: {}", all.join("  ")));
            }
            Record::Skipped { day, step, loss, norm } => {
                self.print(&format!(
                    "day {day}  step {step:5}  left out: loss {loss}, norm of its gradient {norm}"
                ));
            }
            Record::Graph { captured: true, .. } => {
                self.print("the steps of the day run as one CUDA graph");
            }
            Record::Graph { why, .. } => {
                let why = why.as_deref().unwrap_or("unknown");
                self.print(&format!("steps run without a CUDA graph: {why}"));
            }
            Record::Checkpoint { .. } => {}
            Record::Eval { train_day, eval_day, split, metrics, coverage_at_20, seconds } => {
                self.print(&format!(
                    "after day {train_day}, on day {eval_day} ({}): {}  coverage@20 \
                     {coverage_at_20:.4}  {seconds:.1} s",
                    split.name(),
                    figures(metrics)
                ));
            }
        }
        Ok(())
    }

    /// Logs a line.
    pub fn print(&self, line: &str) {
        match &self.root {
            Some(RootReport { bar: Some(bar), .. }) => bar.suspend(|| console::log(line)),
            Some(_) => console::log(line),
            None => {}
        }
    }
}

/// The metrics of an evaluation on one line.
pub fn figures(metrics: &Metrics) -> String {
    let Metrics { n_sessions, loss, .. } = metrics;
    let Metrics { ndcg_at_10, ndcg_at_20, recall_at_10, recall_at_20, mrr_at_20, .. } = metrics;
    let loss = if loss.is_nan() { "  none".to_owned() } else { format!("{loss:.4}") };
    format!(
        "loss {loss}  NDCG@10 {ndcg_at_10:.4}  NDCG@20 {ndcg_at_20:.4}  Recall@10 \
         {recall_at_10:.4}  Recall@20 {recall_at_20:.4}  MRR@20 {mrr_at_20:.4}  ({n_sessions} \
         sessions)"
    )
}

/// Writes `run_dir/results.txt`, the metrics of the last evaluation.
///
/// # Errors
/// Returns an error if a write fails.
pub fn write_results(
    _: Root,
    run_dir: &Path,
    title: &str,
    metrics: &Metrics,
) -> Result<(), ReportError> {
    let path = run_dir.join(RESULTS);
    let &Metrics { ndcg_at_10, ndcg_at_20, recall_at_10, recall_at_20, .. } = metrics;
    let text = results_text(title, [ndcg_at_10, ndcg_at_20, recall_at_10, recall_at_20]);
    output::write(&path, text.as_bytes())
        .map_err(|error| ReportError { path, source: error.into() })
}
