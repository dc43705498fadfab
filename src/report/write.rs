//! A report as a folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::charts::{ChartError, charts};
use super::compare::Comparison;
use super::{RESULTS, pages};

/// The page to open first.
pub const PAGE: &str = "index.html";

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
    /// The path does not end in a name.
    #[error("`{0}` names no folder that could be made: choose another `--out`")]
    Unnamed(PathBuf),
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
            Self::Taken(_) | Self::Foreign(_) | Self::Unnamed(_) => 2,
            Self::Io { .. } | Self::Chart(_) => 1,
        }
    }
}

/// Writes a report into the folder `out`: `results.txt`, `report.md`, `report.json`, `index.html`, and every chart as
/// SVG and PNG. They are written aside and take their place together.
///
/// # Errors
/// See [`WriteError`]; the folder is then what it was before.
pub fn write(out: &Path, comparison: &Comparison, overwrite: bool) -> Result<(), WriteError> {
    let name = out.file_name().ok_or_else(|| WriteError::Unnamed(out.to_owned()))?;
    let holds_something = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => out.exists(),
    };
    if holds_something && !out.join(FIGURES).is_file() {
        return Err(WriteError::Foreign(out.to_owned()));
    }
    if holds_something && !overwrite {
        return Err(WriteError::Taken(out.to_owned()));
    }
    let charts = charts(comparison)?;
    let mut files: Vec<(String, Vec<u8>)> = vec![
        (RESULTS.to_owned(), pages::results_txt(comparison).into_bytes()),
        ("report.md".to_owned(), pages::markdown(comparison, &charts).into_bytes()),
        (FIGURES.to_owned(), pages::json(comparison).into_bytes()),
        (PAGE.to_owned(), pages::html(comparison, &charts).into_bytes()),
    ];
    for chart in charts {
        files.push((format!("{}.svg", chart.name), chart.svg.into_bytes()));
        files.push((format!("{}.png", chart.name), chart.png));
    }
    let mut aside = name.to_owned();
    aside.push(".partial");
    let aside = out.with_file_name(aside);
    let written = write_files(&aside, &files).and_then(|()| put_in_place(&aside, out));
    if written.is_err() {
        // What cannot be removed now was not worth more either.
        let _ = fs::remove_dir_all(&aside);
    }
    written
}

fn write_files(folder: &Path, files: &[(String, Vec<u8>)]) -> Result<(), WriteError> {
    if folder.exists() {
        io_at(folder, fs::remove_dir_all(folder))?;
    }
    io_at(folder, fs::create_dir_all(folder))?;
    for (name, content) in files {
        let path = folder.join(name);
        io_at(&path, fs::write(&path, content))?;
    }
    Ok(())
}

fn put_in_place(aside: &Path, out: &Path) -> Result<(), WriteError> {
    if out.exists() {
        io_at(out, fs::remove_dir_all(out))?;
    }
    io_at(out, fs::rename(aside, out))
}

fn io_at<T>(path: &Path, result: io::Result<T>) -> Result<T, WriteError> {
    result.map_err(|source| WriteError::Io { path: path.to_owned(), source })
}
