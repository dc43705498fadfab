//! Opens a run directory: starts a run in it, or resumes the run that it holds.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bireme_base::lock::{Lock, LockError};
use bireme_base::output;
use bireme_base::user_error::{FAILED, REFUSED, UserError};
use bireme_tools::run_dir::{
    CHECKPOINTS, CONFIG, DATA, DATA_ASIDE, EVALUATIONS, LOCK, METRICS, RESULTS, RUN,
};
use clap::ValueEnum;
use serde_json::{Map, Value};

use crate::checkpoint::{Checkpoint, CheckpointError, Checkpoints};
use crate::collective::{Collective, Root};
use crate::config::{Config, ConfigError};
use crate::device;
use crate::etl;
use crate::train::Dataset;

/// What to do with the run that a run directory holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Resume {
    /// Resume it if configuration and data are unchanged
    #[default]
    Auto,
    /// Resume it despite changed configuration or data
    Anyway,
    /// Refuse to start
    Never,
}

/// A run directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    #[error(
        "`{0}` already holds a run: choose another `--run-dir`, or replace it with `--overwrite`"
    )]
    Taken(PathBuf),
    #[error(
        "`{path}` holds a run of another configuration: {difference}; choose another `--run-dir`, \
         replace the run with `--overwrite`, or resume it with `--resume=anyway`"
    )]
    OtherConfig { path: PathBuf, difference: String },
    #[error(
        "`{path}` holds a run on other data: the file of day and part `{file}` has changed; choose \
         another `--run-dir`, replace the run with `--overwrite`, or resume it with \
         `--resume=anyway`"
    )]
    OtherData { path: PathBuf, file: String },
    #[error("`{0}` exists: replace it with `--overwrite`")]
    Evaluated(PathBuf),
    #[error(
        "the run directory `{path}` is {problem}: wait for it to end, or choose another run \
         directory"
    )]
    InUse { path: PathBuf, problem: LockError },
    #[error("cannot write to the run directory `{path}`")]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Workflow(#[from] etl::Error),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl UserError for RunDirError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Io { .. } => FAILED,
            Self::Workflow(error) => error.exit_code(),
            Self::Checkpoint(error) => error.exit_code(),
            _ => REFUSED,
        }
    }
}

/// Makes the run directory where it is missing, and locks it until the process ends.
///
/// Reading needs no lock: a checkpoint appears whole.
pub fn lock_run_dir(_: Root, run_dir: &Path) -> Result<Lock, RunDirError> {
    let io = |source| RunDirError::Io { path: run_dir.to_owned(), source };
    output::create_folder(run_dir).map_err(io)?;
    Lock::acquire(&run_dir.join(LOCK)).map_err(|error| match error {
        LockError::Io { source, .. } => io(source),
        problem => RunDirError::InUse { path: run_dir.to_owned(), problem },
    })
}

/// A requested run.
pub struct RunRequest<'a> {
    /// Its directory.
    pub run_dir: &'a Path,
    /// The configuration file, as given.
    pub config_file: &'a Path,
    /// The folder of its data, as given.
    pub data_dir: &'a Path,
    /// Whether to replace the run that the directory holds.
    pub overwrite: bool,
    /// The configuration as resolved.
    pub config: &'a Config,
    /// The ranks.
    pub collective: &'a dyn Collective,
    /// Where rank 0 computes.
    pub place: &'a device::Place,
}

/// A run directory that was locked and searched.
#[derive(Default)]
pub struct OpenedRun {
    /// The right to write to it; none where nothing is left to write.
    pub lock: Option<Lock>,
    /// The checkpoint to resume from.
    pub checkpoint: Option<Checkpoint>,
    /// Incomplete checkpoints, each with its fault.
    pub skipped: Vec<String>,
    /// Whether the run is finished.
    pub is_done: bool,
    /// Whether the directory holds no run, or one to replace.
    pub is_new: bool,
}

/// What only a run leaves behind.
const OF_A_RUN: [&str; 5] = [CONFIG, METRICS, RESULTS, EVALUATIONS, CHECKPOINTS];

/// What a start that was cut short may leave behind too.
const OF_A_START: [&str; 2] = [RUN, DATA];

impl RunRequest<'_> {
    /// Locks the run directory and looks for the run that it holds; changes nothing else.
    pub fn open(
        &self,
        root: Root,
        resume: Resume,
        data: &Dataset,
    ) -> Result<OpenedRun, RunDirError> {
        let lock = lock_run_dir(root, self.run_dir);
        if let Err(in_use @ RunDirError::InUse { .. }) = lock {
            return Err(in_use);
        }
        let opened = self.find_run(resume, data)?;
        // A finished run may be on a read-only file system.
        if opened.is_done {
            return Ok(OpenedRun { lock: lock.ok(), ..opened });
        }
        Ok(OpenedRun { lock: Some(lock?), ..opened })
    }

    fn find_run(&self, resume: Resume, data: &Dataset) -> Result<OpenedRun, RunDirError> {
        let path = self.run_dir;
        let holds_run = path.join(CONFIG).exists();
        if self.overwrite || resume == Resume::Never || !holds_run {
            self.check_free()?;
            return Ok(OpenedRun { is_new: true, ..OpenedRun::default() });
        }
        let earlier = Config::load(&path.join(CONFIG), &[])?;
        let is_strict = resume == Resume::Auto;
        if let Some(difference) = self.config.difference(&earlier).filter(|_| is_strict) {
            return Err(RunDirError::OtherConfig { path: path.to_owned(), difference });
        }
        let (checkpoint, skipped) = match Checkpoints::of(path).newest() {
            Ok((checkpoint, skipped)) => (Some(checkpoint), skipped),
            Err(CheckpointError::None { skipped, .. }) => (None, skipped),
            Err(error) => return Err(error.into()),
        };
        let state = checkpoint.as_ref().map(|checkpoint| &checkpoint.state);
        let changed = state.and_then(|state| data.changed_since(state)).filter(|_| is_strict);
        if let Some(file) = changed {
            return Err(RunDirError::OtherData { path: path.to_owned(), file: file.to_owned() });
        }
        let end_day = self.config.data.training_days().end;
        let is_end = state.is_some_and(|state| {
            state.position.day + 1 == end_day && state.position.is_end_of_day()
        });
        let is_done = is_end && path.join(RESULTS).exists();
        Ok(OpenedRun { checkpoint, skipped, is_done, is_new: false, lock: None })
    }

    /// Makes the run directory, or prepares the run that it holds to be resumed.
    pub fn begin(&self, root: Root, is_new: bool) -> Result<(), RunDirError> {
        if is_new {
            return self.create(root);
        }
        // The results are those of a run that ended, and this one is resumed.
        remove(&self.run_dir.join(RESULTS)).map_err(|source| self.io_error(source))?;
        Checkpoints::of(self.run_dir).clear_partial(root)?;
        // The catalogue may have grown.
        self.keep_data()?;
        self.write_facts()
    }

    /// Makes the run directory and writes what describes the run.
    pub fn create(&self, _: Root) -> Result<(), RunDirError> {
        output::create_folder(self.run_dir).map_err(|source| self.io_error(source))?;
        self.check_free()?;
        for left in OF_A_RUN.iter().chain(&OF_A_START) {
            remove(&self.run_dir.join(left)).map_err(|source| self.io_error(source))?;
        }
        self.keep_data()?;
        self.write_facts()
    }

    fn check_free(&self) -> Result<(), RunDirError> {
        let holds_run = OF_A_RUN.iter().any(|left| self.run_dir.join(left).exists());
        if holds_run && !self.overwrite {
            return Err(RunDirError::Taken(self.run_dir.to_owned()));
        }
        Ok(())
    }

    /// Keeps what serving needs of the data, so that a run is complete without its data.
    fn keep_data(&self) -> Result<(), RunDirError> {
        let at = |source| self.io_error(source);
        let (data, kept) = (self.data_dir, self.run_dir.join(DATA));
        let is_same =
            fs::read(data.join(etl::SCHEMA)).ok() == fs::read(kept.join(etl::SCHEMA)).ok();
        if kept.is_dir() && is_same {
            return Ok(());
        }
        let aside = self.run_dir.join(DATA_ASIDE);
        for path in [&aside, &kept] {
            remove(path).map_err(at)?;
        }
        fs::create_dir(&aside).map_err(at)?;
        fs::copy(data.join(etl::SCHEMA), aside.join(etl::SCHEMA)).map_err(at)?;
        let (workflow, copy) = (data.join(etl::WORKFLOW), aside.join(etl::WORKFLOW));
        if workflow.is_dir() {
            fs::create_dir(&copy).map_err(at)?;
            etl::copy_without_visitors(&workflow, &copy)?;
        }
        fs::rename(&aside, &kept).map_err(at)
    }

    /// Writes the resolved configuration, and `run.json`: this start, and the earlier ones.
    fn write_facts(&self) -> Result<(), RunDirError> {
        let path = self.run_dir.join(RUN);
        let run = serde_json::json!({
            "bireme": env!("CARGO_PKG_VERSION"),
            "libtorch": device::LIBTORCH,
            "world_size": self.collective.world_size(),
            "backend": self.collective.backend(),
            "device": self.place.device_name(),
            "threads_per_rank": self.place.n_threads,
            "config": self.config_file,
            "data": self.data_dir,
            "earlier": earlier_starts(&path),
        });
        let write_whole = |path: &Path, text: String| {
            output::write(path, text.as_bytes()).map_err(|error| self.io_error(error.into()))
        };
        write_whole(&path, format!("{run:#}\n"))?;
        // The configuration last: a directory without it holds no run.
        write_whole(&self.run_dir.join(CONFIG), self.config.to_toml())
    }

    fn io_error(&self, source: io::Error) -> RunDirError {
        RunDirError::Io { path: self.run_dir.to_owned(), source }
    }
}

/// The starts that a `run.json` records, oldest first.
fn earlier_starts(path: &Path) -> Vec<Value> {
    let text = fs::read(path).ok();
    let last = text.and_then(|text| serde_json::from_slice::<Map<String, Value>>(&text).ok());
    let Some(mut last) = last else { return Vec::new() };
    let mut starts = match last.remove("earlier") {
        Some(Value::Array(starts)) => starts,
        _ => Vec::new(),
    };
    starts.push(Value::Object(last));
    starts
}

/// Removes a file or a folder, if it exists.
fn remove(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.or_else(|error| if path.exists() { Err(error) } else { Ok(()) })
}
