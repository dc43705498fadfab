//! What can go wrong between the events and the sessions.

use std::path::{Path, PathBuf};

use polars::prelude::PolarsError;
use thiserror::Error;

use crate::schema::SchemaError;

/// Why no sessions were written. Nothing is left behind in the place where they would have been.
#[derive(Debug, Error)]
pub enum Error {
    /// A setting that makes no sense.
    #[error("{0}")]
    Settings(String),
    /// There is something where the sessions should go.
    #[error("`{}` is there already and is not empty", path.display())]
    OutputExists {
        /// The folder that was asked for.
        path: PathBuf,
    },
    /// A file of events that cannot be opened.
    #[error("cannot open the events `{}`", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of events that stops making sense in a place that cannot be named more closely.
    #[error("cannot read the events `{}`", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What its reader said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file in a format that is not read.
    #[error("cannot read the events `{}`: it is {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format.
        what: String,
        /// How to get a file that is read.
        hint: &'static str,
    },
    /// A header of a CSV file that cannot be read.
    #[error("`{}`, line {line}: the header cannot be read: {problem}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: u64,
        /// What is wrong there.
        problem: String,
    },
    /// Lines of a file have been lost or read twice: a fault of this program.
    #[error("`{}` has {lines} lines, and {read} were read: a fault of this program", path.display())]
    Miscounted {
        /// The file.
        path: PathBuf,
        /// By its line ends.
        lines: u64,
        /// By its records.
        read: u64,
    },
    /// A column is there more than once.
    #[error("`{}` has the column {column} twice", path.display())]
    ColumnTwice {
        /// The file.
        path: PathBuf,
        /// The column, quoted.
        column: String,
    },
    /// A required column is not there.
    #[error("`{}` has no column `{column}`; {found}", path.display())]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// The column that is needed.
        column: &'static str,
        /// The columns that are there, or why none is found.
        found: String,
    },
    /// A column of a parquet file holds something else.
    #[error("`{}`, column `{column}`: {needed} is needed, and the column holds {found}", path.display())]
    ColumnType {
        /// The file.
        path: PathBuf,
        /// The column.
        column: &'static str,
        /// What can be read.
        needed: &'static str,
        /// What is there.
        found: String,
    },
    /// A row that cannot be read.
    #[error("`{}`, {place} {number}, column `{column}`: {problem}", path.display())]
    BadRow {
        /// The file.
        path: PathBuf,
        /// `line` of a CSV file, `row` of a parquet file.
        place: &'static str,
        /// Counted from 1; a CSV file's header is line 1.
        number: u64,
        /// The column.
        column: String,
        /// What is wrong there.
        problem: String,
    },
    /// All is well, and there is nothing.
    #[error("{0}")]
    Nothing(String),
    /// A fitted workflow that cannot be read back.
    #[error("`{}` is no workflow that this version reads: {problem}", path.display())]
    Workflow {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The schema cannot be written.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// A file of ours that cannot be written, read back, renamed or removed.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A parquet file of ours that cannot be written or read back.
    #[error("cannot {action} `{}`", path.display())]
    Parquet {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What polars said.
        source: PolarsError,
    },
    /// A table that polars refuses to build: a fault of this program.
    #[error("cannot build a table of sessions")]
    Table(#[from] PolarsError),
}

impl Error {
    /// The process's exit code: 2 where the input or the settings are refused, 1 where the work failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Schema(_)
            | Self::Io { .. }
            | Self::Miscounted { .. }
            | Self::Parquet { .. }
            | Self::Table(_) => 1,
            _ => 2,
        }
    }

    /// What to do about it, where that can be said.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::OutputExists { .. } => Some("name another folder, or replace this one with `--overwrite`"),
            Self::Format { hint, .. } => Some(hint),
            Self::BadRow { .. } => Some("`--skip-bad-rows` leaves such rows out, and counts them"),
            _ => None,
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.into(), source }
    }

    pub(crate) fn parquet(action: &'static str, path: &Path) -> impl FnOnce(PolarsError) -> Self {
        move |source| Self::Parquet { action, path: path.into(), source }
    }

    pub(crate) fn unreadable(path: &Path) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> Self {
        move |source| Self::Unreadable { path: path.into(), source }
    }
}
