//! States to go on from: `RUN/checkpoints/day-<day>-step-<step>/`.
//!
//! | file | holds |
//! | --- | --- |
//! | `weights.safetensors` | what the model predicts with |
//! | `optimizer.safetensors` | what only further training needs |
//! | `occurrences.safetensors` | how often each item occurred in training so far |
//! | `state.json` | everything else, a [`State`] |
//! | `manifest.json` | size and hash of each of these |
//!
//! A checkpoint is written aside, forced to disk, its manifest last, and then renamed: a reader that finds the manifest,
//! and what it lists, has found it whole, whenever the writer was stopped. No generator has a state of its own: all that
//! is random is a function of the configuration's seed and the position.

mod manifest;
mod retention;
mod saver;
mod shared;
mod tensor_file;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::collective::{Collective, CollectiveError, Root};
use crate::config::{Config, check_finite};
use crate::metrics::Measure;
use crate::model::ItemTable;

use manifest::{MANIFEST, Manifest};
use retention::{Place, superseded};
pub use saver::Saver;
pub use shared::SharedCheckpoint;
use tensor_file::{TensorFile, stream};

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const OCCURRENCES: &str = "occurrences.safetensors";
const STATE: &str = "state.json";

/// Ends the name of a folder that is being written.
const ASIDE: &str = ".partial";

/// Layout of the folder that this version writes and reads.
const FORMAT: u32 = 2;

/// Section `[checkpoint]` of a configuration. A checkpoint is written at the end of every day in any case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Also every so many steps; 0: not by steps.
    pub every_steps: usize,
    /// Also when so many minutes have passed since the last; 0: not by time.
    pub every_minutes: f64,
    /// How many of the newest are kept.
    pub keep_last: usize,
    /// Also keep the last of every day.
    pub keep_days: bool,
    /// Also keep that of the day after which this metric was best; absent: not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_best: Option<Measure>,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_steps: 0, every_minutes: 0.0, keep_last: 2, keep_days: false, keep_best: None }
    }
}

impl CheckpointConfig {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Says which key is wrong.
    pub fn check(&self) -> Result<(), String> {
        check_finite("every_minutes", self.every_minutes, 0.0)
    }
}

/// Where in a run a checkpoint was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

impl Position {
    /// Whether the day has been trained on to its end.
    pub fn is_end_of_day(&self) -> bool {
        self.day_step == self.day_steps
    }
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
    /// Steps left out so far, as their gradients were not finite.
    pub n_skipped: usize,
    /// Rows of the item table.
    pub n_items: i64,
    /// Bytes of the run's `metrics.jsonl` until here.
    pub log_bytes: u64,
    /// What `checkpoint.keep_best` was after each day so far.
    pub evaluated: BTreeMap<i64, f64>,
    /// What the run's data files were, by day and part.
    pub data: BTreeMap<String, String>,
    /// The resolved configuration.
    pub config: Config,
}

impl State {
    /// Of a run at its very beginning.
    pub fn new(config: &Config, n_items: i64, data: BTreeMap<String, String>) -> Self {
        Self {
            format: FORMAT,
            bireme: env!("CARGO_PKG_VERSION").to_owned(),
            position: Position::default(),
            optimizer_steps: 0,
            n_skipped: 0,
            n_items,
            log_bytes: 0,
            evaluated: BTreeMap::new(),
            data,
            config: config.clone(),
        }
    }
}

/// Named tensors of a model and of its optimizer.
#[derive(Debug, Default)]
pub struct Tensors {
    /// What the model predicts with.
    pub weights: Vec<(String, Tensor)>,
    /// What only further training needs.
    pub optimizer: Vec<(String, Tensor)>,
}

/// A whole checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// What is not a tensor.
    pub state: State,
    /// The model's and the optimizer's.
    pub tensors: Tensors,
    /// How often each item occurred in training so far, `[V]`.
    pub occurrences: Vec<i64>,
}

impl Checkpoint {
    /// Whether it is of a catalogue whose item table has `n_items` rows.
    ///
    /// # Errors
    /// Says that it is not.
    pub fn check_items(&self, n_items: i64) -> Result<(), CheckpointError> {
        let counted = self.occurrences.len();
        if counted as i64 == n_items {
            return Ok(());
        }
        let problem = counts_other_items(counted, n_items);
        Err(CheckpointError::Mismatch { path: self.path.clone(), problem })
    }
}

/// What is wrong with one that counts so many items.
pub(crate) fn counts_other_items(n_counted: usize, n_items: i64) -> String {
    format!("it counts {n_counted} items, the schema has {n_items}")
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
    #[error("`{path}` is not the state of a checkpoint of this version")]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// No complete checkpoint.
    #[error("`{dir}` holds no complete checkpoint{}", skipped.iter().map(|s| format!("; {s}")).collect::<String>())]
    None {
        /// Where it was looked for.
        dir: PathBuf,
        /// The others there, and what is wrong with each.
        skipped: Vec<String>,
    },
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
    /// The thread that writes could not be started, or panicked.
    #[error("checkpoints cannot be written in the background: {0}")]
    Background(String),
}

/// The checkpoints of a run.
#[derive(Clone)]
pub struct Checkpoints {
    dir: PathBuf,
}

impl Checkpoints {
    /// Those under `run_dir`.
    pub fn of(run_dir: &Path) -> Self {
        Self { dir: run_dir.join("checkpoints") }
    }

    /// Writes one and then removes those that are no longer kept.
    ///
    /// # Errors
    /// What the file system says; the earlier checkpoints are then still there.
    pub fn write(
        &self,
        root: Root,
        state: &State,
        tensors: &Tensors,
        occurrences: &[i64],
    ) -> Result<(), CheckpointError> {
        let mut writing = Writing::begin(self, root, state, tensors, &ItemTable::replicated(state.n_items))?;
        for (file, named) in writing.files.iter_mut().zip([&tensors.weights, &tensors.optimizer]) {
            named.iter().for_each(|(_, tensor)| file.put(tensor));
        }
        writing.finish(occurrences)
    }

    /// *All ranks.* Writes one of tensors that are shared out, on rank 0.
    ///
    /// # Errors
    /// What the file system says to rank 0, on all ranks, or those of the collective.
    pub fn write_shared(
        &self,
        state: &State,
        tensors: &Tensors,
        occurrences: &[i64],
        item_table: &ItemTable<'_>,
        collective: &dyn Collective,
    ) -> Result<(), CollectiveError> {
        let begun =
            collective.root().map(|root| Writing::begin(self, root, state, tensors, item_table)).transpose();
        let mut writing = collective.agree(begun)?;
        for (which, named) in [&tensors.weights, &tensors.optimizer].into_iter().enumerate() {
            stream(named, item_table, |numbers| {
                writing.iter_mut().for_each(|writing| writing.files[which].put(numbers));
            })?;
        }
        collective.agree(writing.map_or(Ok(()), |writing| writing.finish(occurrences)))
    }

    /// The newest complete one, and what is wrong with each newer one.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn newest(&self) -> Result<(Checkpoint, Vec<String>), CheckpointError> {
        loop {
            let (mut skipped, mut is_outdated) = (Vec::new(), false);
            for (_, path) in self.folders()?.into_iter().rev() {
                let found: Result<(), String> = match Manifest::problem(&path) {
                    Some(problem) => Err(problem),
                    None => match read(path.clone()) {
                        Err(error) if !path.exists() => Err(error.to_string()),
                        found => return Ok((found?, skipped)),
                    },
                };
                // A running training removes old checkpoints, each only after it has written a newer one.
                is_outdated |= !path.exists();
                skipped.extend(found.err().map(|problem| format!("`{}`: {problem}", path.display())));
            }
            if !is_outdated {
                return Err(CheckpointError::None { dir: self.dir.clone(), skipped });
            }
        }
    }

    /// The complete one whose folder has this name.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn named(&self, name: &str) -> Result<Checkpoint, CheckpointError> {
        let folders = self.folders()?.into_iter().map(|(_, path)| path);
        let (named, others): (Vec<_>, Vec<_>) =
            folders.partition(|path| path.file_name().is_some_and(|file| file == name));
        let is_complete = |path: &&PathBuf| Manifest::problem(path).is_none();
        match named.iter().find(is_complete) {
            Some(path) => read(path.clone()),
            None => {
                let names = others.iter().filter(is_complete).filter_map(|path| path.file_name());
                let have = names.map(|name| format!("`{}`", name.display())).collect::<Vec<_>>().join(", ");
                Err(CheckpointError::Unknown { name: name.to_owned(), dir: self.dir.clone(), have })
            }
        }
    }

    /// Removes what a writer that was stopped has left half done.
    ///
    /// # Errors
    /// What the file system says.
    pub fn clear_partial(&self, _: Root) -> Result<(), CheckpointError> {
        for path in self.entries()? {
            if path.as_os_str().to_string_lossy().ends_with(ASIDE) {
                io_at("remove", &path, fs::remove_dir_all(&path))?;
            }
        }
        Ok(())
    }

    fn path(&self, (day, global_step): Place) -> PathBuf {
        self.dir.join(format!("day-{day:04}-step-{global_step:08}"))
    }

    /// Folders with the name of a checkpoint, oldest first.
    fn folders(&self) -> Result<Vec<(Place, PathBuf)>, CheckpointError> {
        let place = |path: PathBuf| {
            let (day, step) = path.file_name()?.to_str()?.strip_prefix("day-")?.split_once("-step-")?;
            Some(((day.parse().ok()?, step.parse().ok()?), path))
        };
        let mut folders: Vec<_> = self.entries()?.into_iter().filter_map(place).collect();
        folders.sort_unstable();
        Ok(folders)
    }

    fn entries(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        match fs::read_dir(&self.dir) {
            Ok(entries) => Ok(entries.filter_map(Result::ok).map(|entry| entry.path()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(CheckpointError::Io { action: "read", path: self.dir.clone(), source }),
        }
    }
}

/// A checkpoint that is being written aside.
struct Writing<'a> {
    checkpoints: &'a Checkpoints,
    state: &'a State,
    aside: Aside,
    path: PathBuf,
    /// Weights and optimizer.
    files: [TensorFile; 2],
}

/// A folder that is removed if it comes to nothing.
struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        // Renamed, it is not there any more; what cannot be removed now was not worth more either.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl<'a> Writing<'a> {
    fn begin(
        checkpoints: &'a Checkpoints,
        _: Root,
        state: &'a State,
        tensors: &Tensors,
        item_table: &ItemTable<'_>,
    ) -> Result<Self, CheckpointError> {
        let path = checkpoints.path((state.position.day, state.position.global_step));
        let mut aside = path.clone().into_os_string();
        aside.push(ASIDE);
        let aside = PathBuf::from(aside);
        // A folder of that name is what an interrupted run left: complete or not, this one replaces it.
        for stale in [&aside, &path] {
            if stale.exists() {
                io_at("remove", stale, fs::remove_dir_all(stale))?;
            }
        }
        io_at("create", &aside, fs::create_dir_all(&aside))?;
        let aside = Aside(aside);
        let create = |file: &str, named| {
            let path = aside.0.join(file);
            io_at("write", &path, TensorFile::create(&path, named, item_table))
        };
        let files = [create(WEIGHTS, &tensors.weights)?, create(OPTIMIZER, &tensors.optimizer)?];
        Ok(Self { checkpoints, state, aside, path, files })
    }

    fn finish(self, occurrences: &[i64]) -> Result<(), CheckpointError> {
        let Self { checkpoints, state, aside, path, files } = self;
        let folder = &aside.0;
        for (name, file) in [WEIGHTS, OPTIMIZER].into_iter().zip(files) {
            io_at("write", &folder.join(name), file.finish())?;
        }
        let of_items = vec![("occurrences".to_owned(), Tensor::from_slice(occurrences))];
        let path_of = folder.join(OCCURRENCES);
        let written = TensorFile::create(&path_of, &of_items, &ItemTable::replicated(state.n_items))
            .and_then(|mut file| {
                file.put(&of_items[0].1);
                file.finish()
            });
        io_at("write", &path_of, written)?;
        write_json(&folder.join(STATE), state)?;
        let manifest_path = folder.join(MANIFEST);
        let manifest = Manifest::of(folder, &[WEIGHTS, OPTIMIZER, OCCURRENCES, STATE]);
        write_json(&manifest_path, &io_at("write", &manifest_path, manifest)?)?;
        sync(folder)?;
        io_at("rename", folder, fs::rename(folder, &path))?;
        sync(&checkpoints.dir)?;
        // Later ones are of a past that this run has left: not whole, or it would have gone on from there.
        let place = (state.position.day, state.position.global_step);
        let have = checkpoints.folders()?.into_iter().map(|(other, _)| other).filter(|&other| other <= place);
        let have: Vec<Place> = have.collect();
        for place in superseded(&have, &state.config.checkpoint, &state.evaluated) {
            let path = checkpoints.path(place);
            io_at("remove", &path, fs::remove_dir_all(&path))?;
        }
        Ok(())
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), CheckpointError> {
    let text = serde_json::to_string_pretty(value).expect("a state is JSON");
    io_at("write", path, fs::write(path, text))?;
    sync(path)
}

fn read(path: PathBuf) -> Result<Checkpoint, CheckpointError> {
    let state_path = path.join(STATE);
    let text = io_at("read", &state_path, fs::read_to_string(&state_path))?;
    let state: State = serde_json::from_str(&text)
        .map_err(|source| CheckpointError::State { path: state_path.clone(), source })?;
    if state.format != FORMAT {
        let problem = format!("its format is {}, and this version knows {FORMAT}", state.format);
        return Err(CheckpointError::Mismatch { path, problem });
    }
    let tensors = |file: &str| read_tensors(&path.join(file));
    let found = tensors(OCCURRENCES)?.into_iter().find(|(name, _)| name == "occurrences");
    let occurrences = found.and_then(|(_, tensor)| Vec::try_from(tensor).ok()).unwrap_or_default();
    let tensors = Tensors { weights: tensors(WEIGHTS)?, optimizer: tensors(OPTIMIZER)? };
    Ok(Checkpoint { path, state, tensors, occurrences })
}

/// The named tensors of a safetensors file, each read when it is looked at.
///
/// # Errors
/// It cannot be read.
pub fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    tensor_file::map(path).map_err(|source| CheckpointError::Tensors {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

fn io_at<T>(action: &'static str, path: &Path, result: io::Result<T>) -> Result<T, CheckpointError> {
    result.map_err(|source| CheckpointError::Io { action, path: path.to_owned(), source })
}

fn sync(path: &Path) -> Result<(), CheckpointError> {
    io_at("force to disk", path, File::open(path).and_then(|file| file.sync_all()))
}
