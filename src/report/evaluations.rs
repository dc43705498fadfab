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

/// The file of an evaluation.
pub fn path(run_dir: &Path, eval_day: i64, split: Split) -> PathBuf {
    evaluation_file::path(run_dir, eval_day, split.name())
}

/// Writes an evaluation, replacing an earlier one of the same day and split.
///
/// # Errors
/// Returns an error if a write fails.
pub fn write(
    _: Root,
    run_dir: &Path,
    facts: &EvaluationFacts,
    outcomes: &[SessionOutcome],
) -> Result<(), ReportError> {
    let path = evaluation_file::path(run_dir, facts.eval_day, &facts.split);
    let written = fs::create_dir_all(run_dir.join(EVALUATIONS)).and_then(|()| {
        let file = OutputFile::create(&path, &mut console::log)?;
        Ok(evaluation_file::write(file, facts, outcomes)?.publish()?)
    });
    written.map_err(|source| ReportError { path, source })
}
