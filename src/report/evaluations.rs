//! Saves evaluations in the run directory, for reports.

use std::fs;
use std::path::{Path, PathBuf};

use bireme_base::console;
use bireme_base::output::OutputFile;
use bireme_tools::report::evaluation_file::{self, EvaluationFacts, SessionOutcome};
use bireme_tools::run_dir::EVALUATIONS;

use super::ReportError;
use crate::collective::Root;
use crate::data::Split;
use crate::metrics::{Evaluation, Outcome};

/// The footer of a saved evaluation.
pub struct Facts(EvaluationFacts);

impl Facts {
    /// Facts of the evaluation of part `split` of `eval_day`, after training to `train_day`.
    pub fn new(
        title: &str,
        (train_day, eval_day, split): (i64, i64, Split),
        evaluation: &Evaluation,
    ) -> Self {
        let finite = |value: f64| value.is_finite().then_some(value);
        Self(EvaluationFacts {
            format: 1,
            title: title.to_owned(),
            train_day,
            eval_day,
            split: split.name().to_owned(),
            loss: finite(evaluation.metrics.loss),
            coverage_at_20: finite(evaluation.coverage_at_20),
        })
    }
}

/// The file of an evaluation.
pub fn path(run_dir: &Path, eval_day: i64, split: Split) -> PathBuf {
    evaluation_file::path(run_dir, eval_day, split.name())
}

/// Writes an evaluation, replacing an earlier one of the same day and split.
///
/// # Errors
/// Returns an error if a write fails.
pub fn write(_: Root, run_dir: &Path, Facts(facts): &Facts, outcomes: &[Outcome]) -> Result<(), ReportError> {
    let path = evaluation_file::path(run_dir, facts.eval_day, &facts.split);
    let outcomes: Vec<SessionOutcome> = (outcomes.iter())
        .map(|&Outcome { rank, n_known, target, decile }| SessionOutcome { rank, n_known, target, decile })
        .collect();
    let written = fs::create_dir_all(run_dir.join(EVALUATIONS)).and_then(|()| {
        let file = OutputFile::create(&path, &mut console::log)?;
        Ok(evaluation_file::write(file, facts, &outcomes)?.publish()?)
    });
    written.map_err(|source| ReportError { path, source })
}
