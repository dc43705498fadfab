//! Errors of preprocessing.

use std::path::{Path, PathBuf};

use bireme_base::output::OutputError;
use bireme_base::user_error::{FAILED, REFUSED, UserError};
use polars::prelude::PolarsError;
use thiserror::Error;

use crate::schema::SchemaError;

/// An error of preprocessing. It leaves nothing behind in the output folder.
#[derive(Debug, Error)]
pub enum Error {
    #[error("{0}")]
    Settings(String),
    #[error("`{}` exists and is not empty", path.display())]
    OutputExists { path: PathBuf },
    #[error(transparent)]
    Output(OutputError),
    #[error(
        "`{}` and `{}` are the same file: its events would count twice",
        first.display(),
        second.display()
    )]
    SameInput { first: PathBuf, second: PathBuf },
    #[error("`{}` holds events and cannot be the output too", path.display())]
    OutputIsInput { path: PathBuf },
    #[error("`{}` was not written by `bireme preprocess`: it has no `{missing}`", path.display())]
    NotSessions { path: PathBuf, missing: String },
    #[error("cannot open the events `{}`", path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("cannot read the events `{}`", path.display())]
    Unreadable { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("cannot read the events `{}`: it is {what}", path.display())]
    Format {
        path: PathBuf,
        what: String,
        /// How to get a file in a format that can be read.
        hint: &'static str,
    },
    #[error("`{}`, line {line}: the header cannot be read: {problem}", path.display())]
    Header {
        path: PathBuf,
        /// Counted from 1.
        line: u64,
        problem: String,
    },
    #[error(
        "`{}` has {lines} lines, and {read} were read: a fault of this program",
        path.display()
    )]
    Miscounted {
        path: PathBuf,
        /// Counted by line ends.
        lines: u64,
        /// Counted by records.
        read: u64,
    },
    #[error("`{}` has the column {column} twice", path.display())]
    ColumnTwice { path: PathBuf, column: String },
    #[error("`{}` has no column `{column}`; {found}", path.display())]
    MissingColumn { path: PathBuf, column: &'static str, found: String },
    #[error(
        "`{}`, column `{column}`: {needed} is needed, and the column holds {found}",
        path.display()
    )]
    ColumnType { path: PathBuf, column: &'static str, needed: &'static str, found: String },
    #[error("`{}`, {place} {number}, column `{column}`: {problem}", path.display())]
    BadRow {
        path: PathBuf,
        /// `line` of a CSV file, `row` of a parquet file.
        place: &'static str,
        /// Counted from 1; a CSV file's header is line 1.
        number: u64,
        column: String,
        problem: String,
    },
    #[error("{0}")]
    Nothing(String),
    #[error("`{}` is not part of a workflow that this version can read: {problem}", path.display())]
    Workflow { path: PathBuf, problem: String },
    #[error(transparent)]
    Schema(#[from] SchemaError),
    #[error("cannot {action} `{}`", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot {action} `{}`", path.display())]
    Parquet { action: &'static str, path: PathBuf, source: PolarsError },
    #[error("cannot build a table of sessions")]
    Table(#[from] PolarsError),
}

impl UserError for Error {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Output(error) => error.exit_code(),
            Self::Schema(_)
            | Self::Io { .. }
            | Self::Miscounted { .. }
            | Self::Parquet { .. }
            | Self::Table(_) => FAILED,
            _ => REFUSED,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::OutputExists { .. } => {
                "name another folder, or replace this one with `--overwrite`"
            }
            Self::Format { hint, .. } => hint,
            Self::BadRow { .. } => "`--skip-bad-rows` leaves such rows out, and counts them",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.into(), source }
    }

    pub(crate) fn parquet(action: &'static str, path: &Path) -> impl FnOnce(PolarsError) -> Self {
        move |source| Self::Parquet { action, path: path.into(), source }
    }

    pub(crate) fn unreadable(
        path: &Path,
    ) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> Self {
        move |source| Self::Unreadable { path: path.into(), source }
    }
}

impl From<OutputError> for Error {
    fn from(error: OutputError) -> Self {
        match error {
            OutputError::Exists { path, .. } => Self::OutputExists { path },
            error => Self::Output(error),
        }
    }
}
