//! Writes a report as a folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bireme_base::output::{self, FolderKind, OutputError, OutputFolder};
use bireme_base::user_error::{FAILED, REFUSED, UserError};

use super::charts::charts;
use super::compare::Comparison;
use super::pages;
use super::plot::ChartError;
use crate::run_dir::RESULTS;

pub const PAGE: &str = "index.html";

const MARKDOWN: &str = "report.md";

/// Written last: a folder with this file is a complete report.
const FIGURES: &str = "report.json";

#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(
        "`{0}` already holds a report: choose another `--out`, or replace it with `--overwrite`"
    )]
    Taken(PathBuf),
    #[error("`{0}` exists and was not written by `bireme report`: choose another `--out`")]
    Foreign(PathBuf),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error("cannot write `{path}`")]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Chart(#[from] ChartError),
}

impl UserError for WriteError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Output(error) => error.exit_code(),
            Self::Taken(_) | Self::Foreign(_) => REFUSED,
            Self::Io { .. } | Self::Chart(_) => FAILED,
        }
    }
}

/// PNG copies of the charts are files of older versions.
const REPORT: FolderKind = FolderKind {
    marker: FIGURES,
    is_ours: |name| {
        let is_chart = matches!(name.rsplit_once('.'), Some((_, "svg" | "png")));
        is_chart || matches!(name, RESULTS | MARKDOWN | FIGURES | PAGE)
    },
};

/// Prepares the folder `out` for a report on `runs`. `note` reports files removed after an
/// interrupted command.
///
/// # Errors
/// Returns an error if the folder is not empty, lies in a run, cannot be written, or is being
/// written by another process.
pub fn create(
    out: &Path,
    runs: &[PathBuf],
    overwrite: bool,
    note: &mut dyn FnMut(&str),
) -> Result<OutputFolder, WriteError> {
    for run in runs {
        output::check_outside(out, run)?;
    }
    OutputFolder::create(out, REPORT, overwrite, note).map_err(|error| match error {
        OutputError::Exists { path, is_replaceable: true } => WriteError::Taken(path),
        OutputError::Exists { path, .. } => WriteError::Foreign(path),
        error => WriteError::Output(error),
    })
}

/// Writes `results.txt`, `report.md`, `report.json`, `index.html` and an SVG file per chart, and
/// publishes the folder.
///
/// # Errors
/// Returns an error if a write fails; the folder is unchanged then.
pub fn write(folder: OutputFolder, comparison: &Comparison) -> Result<(), WriteError> {
    let charts = charts(comparison)?;
    let mut files: Vec<(String, String)> = vec![
        (RESULTS.to_owned(), pages::results_txt(comparison)),
        (MARKDOWN.to_owned(), pages::markdown(comparison, &charts)),
        (FIGURES.to_owned(), pages::json(comparison)),
        (PAGE.to_owned(), pages::html(comparison, &charts)),
    ];
    files.extend(charts.into_iter().map(|chart| (format!("{}.svg", chart.name), chart.svg)));
    for (name, content) in files {
        let path = folder.path().join(name);
        fs::write(&path, content).map_err(|source| WriteError::Io { path, source })?;
    }
    Ok(folder.publish()?)
}
