//! States to go on from: `RUN/checkpoints/day-<day>-step-<step>/`.
//!
//! A checkpoint holds `weights.safetensors`, `optimizer.safetensors`, `occurrences.safetensors` (how often each item
//! occurred in training so far), `state.json` with everything else, and an empty file `COMPLETE`. It is written
//! aside, forced to disk, renamed, and only then marked complete: a reader
//! that finds the mark finds the rest whole, whenever the writer was stopped.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::collective::Root;

const COMPLETE: &str = "COMPLETE";
const OCCURRENCES: &str = "occurrences.safetensors";

/// Section `[checkpoint]` of a configuration. A checkpoint is written at the end of every day in any case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Also every so many steps; 0: only at the end of a day.
    pub every_steps: usize,
    /// How many of the newest are kept.
    pub keep_last: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { every_steps: 0, keep_last: 2 }
    }
}

/// Where in a run a checkpoint was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The day being trained on.
    pub day: i64,
    /// Steps of that day that are done.
    pub day_step: usize,
    /// Steps that the day has.
    pub day_steps: usize,
    /// Steps since the run began.
    pub global_step: usize,
}

/// Everything about a checkpoint that is not a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Layout of the folder.
    pub format: u32,
    /// Version of the program that wrote it.
    pub bireme: String,
    /// Where the run was.
    pub position: Position,
    /// Steps that the optimizer has counted.
    pub optimizer_steps: i32,
    /// Rows of the item table.
    pub n_items: i64,
    /// The resolved configuration.
    pub config: crate::config::Config,
}

/// Named tensors of a model and of its optimizer.
#[derive(Default)]
pub struct Tensors {
    /// What the model predicts with.
    pub weights: Vec<(String, Tensor)>,
    /// What only further training needs.
    pub optimizer: Vec<(String, Tensor)>,
}

/// What can go wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("cannot {action} `{path}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A tensor file is not what it should be.
    #[error("cannot {action} `{path}`")]
    Tensors {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why not.
        source: tch::TchError,
    },
    /// The state is not what it should be.
    #[error("`{path}` is not the state of a checkpoint")]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// No complete checkpoint.
    #[error("`{0}` holds no complete checkpoint")]
    None(PathBuf),
    /// None of that name.
    #[error("`{dir}` holds no complete checkpoint `{name}`, only {have}")]
    Unknown {
        /// As asked for.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
        /// The complete ones.
        have: String,
    },
    /// It belongs to another model.
    #[error("checkpoint `{path}` does not fit: {problem}")]
    Mismatch {
        /// The checkpoint.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
}

/// The checkpoints of a run.
pub struct Checkpoints {
    dir: PathBuf,
    keep_last: usize,
}

impl Checkpoints {
    /// Those under `run_dir`.
    pub fn new(run_dir: &Path, keep_last: usize) -> Self {
        Self { dir: run_dir.join("checkpoints"), keep_last: keep_last.max(1) }
    }

    /// Writes one and then removes those that are no longer kept. Returns its folder. `occurrences`: of each item in
    /// training so far, `[V]`.
    ///
    /// # Errors
    /// What the file system says; the earlier checkpoints are then still there.
    pub fn write(
        &self,
        _: Root,
        state: &State,
        tensors: &Tensors,
        occurrences: &[i64],
    ) -> Result<PathBuf, CheckpointError> {
        let Position { day, global_step, .. } = state.position;
        let name = format!("day-{day:04}-step-{global_step:08}");
        let (aside, path) = (self.dir.join(format!(".{name}.partial")), self.dir.join(name));
        // A folder of that name is what an interrupted run left: complete or not, this one replaces it.
        for stale in [&aside, &path] {
            if stale.exists() {
                io_at("remove", stale, fs::remove_dir_all(stale))?;
            }
        }
        io_at("create", &aside, fs::create_dir_all(&aside))?;
        let written = self.write_aside(&aside, state, tensors, occurrences);
        if written.is_err() {
            let _ = fs::remove_dir_all(&aside);
        }
        written?;
        io_at("rename", &aside, fs::rename(&aside, &path))?;
        sync(&self.dir)?;
        let mark = path.join(COMPLETE);
        io_at("create", &mark, File::create(&mark).and_then(|file| file.sync_all()))?;
        sync(&path)?;
        for superseded in superseded(&self.complete()?, self.keep_last) {
            io_at("remove", superseded, fs::remove_dir_all(superseded))?;
        }
        Ok(path)
    }

    fn write_aside(
        &self,
        aside: &Path,
        state: &State,
        tensors: &Tensors,
        occurrences: &[i64],
    ) -> Result<(), CheckpointError> {
        let occurrences = vec![("occurrences".to_owned(), Tensor::from_slice(occurrences))];
        let files = [
            ("weights.safetensors", &tensors.weights),
            ("optimizer.safetensors", &tensors.optimizer),
            (OCCURRENCES, &occurrences),
        ];
        for (file, named) in files {
            let path = aside.join(file);
            Tensor::write_safetensors(named, &path).map_err(|source| CheckpointError::Tensors {
                action: "write",
                path: path.clone(),
                source,
            })?;
            sync(&path)?;
        }
        let path = aside.join("state.json");
        let text = serde_json::to_string_pretty(state).expect("a state is JSON");
        io_at("write", &path, fs::write(&path, text))?;
        sync(&path)?;
        sync(aside)
    }

    /// The newest complete one.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn newest(&self) -> Result<(State, Tensors, PathBuf), CheckpointError> {
        let path = self.complete()?.pop().ok_or_else(|| CheckpointError::None(self.dir.clone()))?;
        Self::read(path)
    }

    /// The complete one whose folder has this name.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn named(&self, name: &str) -> Result<(State, Tensors, PathBuf), CheckpointError> {
        let complete = self.complete()?;
        let is_named = |path: &PathBuf| path.file_name().is_some_and(|file| file == name);
        match complete.iter().find(|path| is_named(path)) {
            Some(path) => Self::read(path.clone()),
            None => {
                let names = complete.iter().filter_map(|path| path.file_name());
                let have = names.map(|name| format!("`{}`", name.display())).collect::<Vec<_>>().join(", ");
                Err(CheckpointError::Unknown { name: name.to_owned(), dir: self.dir.clone(), have })
            }
        }
    }

    fn read(path: PathBuf) -> Result<(State, Tensors, PathBuf), CheckpointError> {
        let state_path = path.join("state.json");
        let text = io_at("read", &state_path, fs::read_to_string(&state_path))?;
        let state: State = serde_json::from_str(&text)
            .map_err(|source| CheckpointError::State { path: state_path.clone(), source })?;
        let read = |file: &str| read_tensors(&path.join(file));
        let tensors =
            Tensors { weights: read("weights.safetensors")?, optimizer: read("optimizer.safetensors")? };
        Ok((state, tensors, path))
    }

    /// The complete ones, oldest first.
    fn complete(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let entries = io_at("read", &self.dir, fs::read_dir(&self.dir))?;
        let mut paths: Vec<PathBuf> =
            entries.filter_map(Result::ok).map(|e| e.path()).filter(|p| p.join(COMPLETE).exists()).collect();
        paths.sort();
        Ok(paths)
    }
}

/// How often each item occurred in what the run had been trained on by a checkpoint, `[V]`.
///
/// # Errors
/// It cannot be read, or is of another catalogue than one of `n_items` rows.
pub fn read_occurrences(checkpoint: &Path, n_items: i64) -> Result<Vec<i64>, CheckpointError> {
    let path = checkpoint.join(OCCURRENCES);
    let tensors = read_tensors(&path)?;
    let found = tensors.into_iter().find(|(name, _)| name == "occurrences");
    let occurrences = found.and_then(|(_, tensor)| Vec::<i64>::try_from(tensor).ok()).unwrap_or_default();
    if occurrences.len() as i64 != n_items {
        let problem = format!("it counts {} items, the schema has {n_items}", occurrences.len());
        return Err(CheckpointError::Mismatch { path, problem });
    }
    Ok(occurrences)
}

/// The named tensors of a safetensors file.
///
/// # Errors
/// It cannot be read.
pub fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let read = Tensor::read_safetensors(path);
    read.map_err(|source| CheckpointError::Tensors { action: "read", path: path.to_owned(), source })
}

/// Which of these, oldest first, are not among the last `keep_last`.
fn superseded(complete: &[PathBuf], keep_last: usize) -> &[PathBuf] {
    &complete[..complete.len().saturating_sub(keep_last)]
}

fn io_at<T>(action: &'static str, path: &Path, result: io::Result<T>) -> Result<T, CheckpointError> {
    result.map_err(|source| CheckpointError::Io { action, path: path.to_owned(), source })
}

fn sync(path: &Path) -> Result<(), CheckpointError> {
    io_at("force to disk", path, File::open(path).and_then(|file| file.sync_all()))
}
