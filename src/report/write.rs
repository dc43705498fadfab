//! A report as a folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bireme_base::output::{self, FolderKind, OutputError, OutputFolder};

use super::charts::{ChartError, charts};
use super::compare::Comparison;
use super::{RESULTS, pages};

/// The page to open first.
pub const PAGE: &str = "index.html";

/// The tables as text.
const MARKDOWN: &str = "report.md";

/// The figures as numbers; a folder that has it is a report.
const FIGURES: &str = "report.json";

/// A report that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// There is one already.
    #[error("`{0}` already holds a report: choose another `--out`, or replace it with `--overwrite`")]
    Taken(PathBuf),
    /// There is something else.
    #[error("`{0}` holds something that is no report: choose another `--out`")]
    Foreign(PathBuf),
    /// The folder cannot be written to.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The file system refused.
    #[error("cannot write `{path}`")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A picture failed.
    #[error(transparent)]
    Chart(#[from] ChartError),
}

impl WriteError {
    /// 2 where nothing was begun, 1 otherwise.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Output(error) => error.exit_code().into(),
            Self::Taken(_) | Self::Foreign(_) => 2,
            Self::Io { .. } | Self::Chart(_) => 1,
        }
    }
}

/// A report; [`FIGURES`] is written last.
const REPORT: FolderKind = FolderKind {
    marker: FIGURES,
    is_ours: |name| {
        let is_chart = matches!(name.rsplit_once('.'), Some((_, "svg" | "png")));
        is_chart || matches!(name, RESULTS | MARKDOWN | FIGURES | PAGE)
    },
};

/// Prepares the folder `out` for a report on `runs`. `note` is given a line where what an interrupted
/// command left is removed.
///
/// # Errors
/// The folder holds something, lies in a run, cannot be written to, or another process writes it.
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

/// Writes a report: `results.txt`, `report.md`, `report.json`, `index.html`, and every chart as SVG and
/// PNG. They take their places together.
///
/// # Errors
/// See [`WriteError`]; the folder is then what it was before.
pub fn write(folder: OutputFolder, comparison: &Comparison) -> Result<(), WriteError> {
    let charts = charts(comparison)?;
    let mut files: Vec<(String, Vec<u8>)> = vec![
        (RESULTS.to_owned(), pages::results_txt(comparison).into_bytes()),
        (MARKDOWN.to_owned(), pages::markdown(comparison, &charts).into_bytes()),
        (FIGURES.to_owned(), pages::json(comparison).into_bytes()),
        (PAGE.to_owned(), pages::html(comparison, &charts).into_bytes()),
    ];
    for chart in charts {
        files.push((format!("{}.svg", chart.name), chart.svg.into_bytes()));
        files.push((format!("{}.png", chart.name), chart.png));
    }
    for (name, content) in files {
        let path = folder.path().join(name);
        fs::write(&path, content).map_err(|source| WriteError::Io { path, source })?;
    }
    Ok(folder.publish()?)
}
