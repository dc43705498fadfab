//! The directory of a run: made, found again, told apart from that of another run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bireme_base::lock::{Lock, LockError};
use bireme_base::output;
use bireme_tools::run_dir::{CONFIG, LOCK, RUN};

use super::{Job, ResumeArg, TrainArgs, TrainCommand};
use crate::checkpoint::{Checkpoint, CheckpointError, Checkpoints};
use crate::collective::Root;
use crate::config::{Config, ConfigError};
use crate::device;
use crate::etl;
use crate::export;
use crate::report::{self, evaluations};
use crate::train::Dataset;

/// A run directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunDirError {
    #[error("`{0}` already holds a run: choose another `--run-dir`, or replace it with `--overwrite`")]
    Taken(PathBuf),
    #[error(
        "`{path}` holds a run of another configuration: {difference}; choose another `--run-dir`, replace the run with \
         `--overwrite`, or go on with it by `--resume=anyway`"
    )]
    OtherConfig { path: PathBuf, difference: String },
    #[error(
        "`{path}` holds a run on other data: the file of day and part `{file}` has changed; choose another `--run-dir`, \
         replace the run with `--overwrite`, or go on with it by `--resume=anyway`"
    )]
    OtherData { path: PathBuf, file: String },
    #[error("`{0}` exists: replace it with `--overwrite`")]
    Evaluated(PathBuf),
    #[error("the run directory `{path}` is {problem}: wait for it to end, or choose another run directory")]
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

/// Makes the run directory where it is missing, and locks it until the process ends.
///
/// One process at a time writes to a run directory. Reading it needs no lock: a checkpoint appears whole.
pub(super) fn lock_run_dir(_: Root, run_dir: &Path) -> Result<Lock, RunDirError> {
    let io = |source| RunDirError::Io { path: run_dir.to_owned(), source };
    output::create_folder(run_dir).map_err(io)?;
    Lock::acquire(&run_dir.join(LOCK)).map_err(|error| match error {
        LockError::Io { source, .. } => io(source),
        problem => RunDirError::InUse { path: run_dir.to_owned(), problem },
    })
}

/// A run directory that has been looked at.
#[derive(Default)]
pub(super) struct Opened {
    /// The right to write to it; none where nothing is left to write.
    pub lock: Option<Lock>,
    /// Where to go on from, if not from the beginning.
    pub from: Option<Checkpoint>,
    /// Checkpoints that are not whole, and what is wrong with each.
    pub skipped: Vec<String>,
    /// Whether there is nothing left to do.
    pub is_done: bool,
    /// Whether it holds no run, or one that is to be replaced.
    pub is_new: bool,
}

/// Locks the run directory and looks for the run that it holds, and changes nothing else.
pub(super) fn open_run(
    root: Root,
    command: &TrainCommand,
    job: &Job,
    data: &Dataset,
) -> Result<Opened, RunDirError> {
    let lock = lock_run_dir(root, &command.run.run_dir());
    if let Err(in_use @ RunDirError::InUse { .. }) = lock {
        return Err(in_use);
    }
    let opened = find_run(command, job, data)?;
    // A run that is done may lie where nothing can be written.
    if opened.is_done {
        return Ok(Opened { lock: lock.ok(), ..opened });
    }
    Ok(Opened { lock: Some(lock?), ..opened })
}

fn find_run(command: &TrainCommand, job: &Job, data: &Dataset) -> Result<Opened, RunDirError> {
    let args = &command.run;
    let path = args.run_dir();
    let holds_run = path.join(CONFIG).exists();
    if args.overwrite || command.resume == ResumeArg::Never || !holds_run {
        check_free(&path, args.overwrite)?;
        return Ok(Opened { is_new: true, ..Opened::default() });
    }
    let earlier = Config::load(&path.join(CONFIG), &[])?;
    let is_strict = command.resume == ResumeArg::Auto;
    if let Some(difference) = job.config.difference(&earlier).filter(|_| is_strict) {
        return Err(RunDirError::OtherConfig { path, difference });
    }
    let (from, skipped) = match Checkpoints::of(&path).newest() {
        Ok((from, skipped)) => (Some(from), skipped),
        Err(CheckpointError::None { skipped, .. }) => (None, skipped),
        Err(error) => return Err(error.into()),
    };
    let changed = from.as_ref().and_then(|from| data.changed_since(&from.state)).filter(|_| is_strict);
    if let Some(file) = changed {
        return Err(RunDirError::OtherData { path, file: file.to_owned() });
    }
    let position = from.as_ref().map(|from| from.state.position);
    let is_end =
        position.is_some_and(|at| at.day + 1 == job.config.data.training_days().end && at.is_end_of_day());
    let is_done = is_end && path.join(report::RESULTS).exists();
    Ok(Opened { from, skipped, is_done, is_new: false, lock: None })
}

/// Makes the run directory, or readies the run that it holds to go on.
pub(super) fn begin_run(root: Root, is_new: bool, args: &TrainArgs, job: &Job) -> Result<(), RunDirError> {
    let path = args.run_dir();
    if is_new {
        return prepare_run_dir(root, &path, args, job);
    }
    // They are of an end that is none any more.
    let removed = remove(&path.join(report::RESULTS));
    removed.map_err(|source| RunDirError::Io { path: path.clone(), source })?;
    Checkpoints::of(&path).clear_partial(root)?;
    // The catalogue may have grown.
    keep_data(&path, &args.data)?;
    write_facts(&path, args, job)
}

/// What only a run leaves behind, and what a start that was cut short may have.
const OF_A_RUN: [&str; 5] =
    [CONFIG, report::METRICS, report::RESULTS, evaluations::EVALUATIONS, "checkpoints"];
const OF_A_START: [&str; 2] = [RUN, export::DATA];

fn check_free(run_dir: &Path, overwrite: bool) -> Result<(), RunDirError> {
    match OF_A_RUN.iter().any(|left| run_dir.join(left).exists()) && !overwrite {
        true => Err(RunDirError::Taken(run_dir.to_owned())),
        false => Ok(()),
    }
}

/// Makes the run directory and writes into it what runs: the resolved configuration, and with what and on what.
pub(super) fn prepare_run_dir(
    _: Root,
    run_dir: &Path,
    args: &TrainArgs,
    job: &Job,
) -> Result<(), RunDirError> {
    let at = |source| RunDirError::Io { path: run_dir.to_owned(), source };
    output::create_folder(run_dir).map_err(at)?;
    check_free(run_dir, args.overwrite)?;
    for left in OF_A_RUN.iter().chain(&OF_A_START) {
        remove(&run_dir.join(left)).map_err(at)?;
    }
    keep_data(run_dir, &args.data)?;
    write_facts(run_dir, args, job)
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.or_else(|error| if path.exists() { Err(error) } else { Ok(()) })
}

/// Keeps what serving needs of the data, so that a run is whole by itself.
fn keep_data(run_dir: &Path, data: &Path) -> Result<(), RunDirError> {
    let at = |source| RunDirError::Io { path: run_dir.to_owned(), source };
    let kept = run_dir.join(export::DATA);
    let same = |file: &Path| fs::read(data.join(file)).ok() == fs::read(kept.join(file)).ok();
    if kept.is_dir() && same(Path::new(etl::SCHEMA)) {
        return Ok(());
    }
    let aside = run_dir.join(".data.partial");
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

/// Writes the resolved configuration, and `run.json`: with what and on what the run goes on, and did before.
fn write_facts(run_dir: &Path, args: &TrainArgs, job: &Job) -> Result<(), RunDirError> {
    let at = |source| RunDirError::Io { path: run_dir.to_owned(), source };
    let path = run_dir.join(RUN);
    let before =
        fs::read(&path).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    let before = before.map(|mut before| {
        let mut earlier = before["earlier"].take().as_array().cloned().unwrap_or_default();
        before.as_object_mut().map(|facts| facts.remove("earlier"));
        earlier.push(before);
        earlier
    });
    let run = serde_json::json!({
        "bireme": env!("CARGO_PKG_VERSION"),
        "libtorch": device::LIBTORCH,
        "world_size": job.collective.world_size(),
        "backend": job.collective.backend(),
        "device": job.place.device_name(),
        "threads_per_rank": job.place.n_threads,
        "config": args.config,
        "data": args.data,
        "earlier": before.unwrap_or_default(),
    });
    let write_whole =
        |path: &Path, text: String| output::write(path, text.as_bytes()).map_err(|error| at(error.into()));
    // The configuration last: a directory without it holds no run yet.
    write_whole(&path, format!("{run:#}\n"))?;
    write_whole(&run_dir.join(CONFIG), job.config.to_toml())
}
