//! Checkpoints, from which a run resumes: `RUN/checkpoints/day-<day>-step-<step>/`.
//!
//! | file | contents |
//! | --- | --- |
//! | `weights.safetensors` | the weights of the model |
//! | `optimizer.safetensors` | the state of the optimizer |
//! | `occurrences.safetensors` | occurrences of each item in training so far |
//! | `state.json` | everything else, a [`State`] |
//! | `manifest.json` | size and hash of each of these files |
//!
//! A checkpoint is written to a staging folder, the manifest last, flushed to disk, and then
//! renamed. A folder whose files match its manifest is therefore complete, whenever the writer was
//! stopped. Random generators need no saved state: all random numbers are functions of the
//! configuration's seed and the position.

mod manifest;
mod retention;
mod saver;
mod shared;
mod tensor_file;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bireme_base::user_error::{FAILED, REFUSED, UserError};
use bireme_tools::run_dir::{CHECKPOINTS, MANIFEST, OCCURRENCES, OPTIMIZER, STATE, WEIGHTS};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::collective::{Collective, CollectiveError, Root};
pub use crate::config::CheckpointConfig;
use crate::config::Config;
use crate::model::ItemTable;

use manifest::Manifest;
use retention::{CheckpointId, superseded};
pub use saver::Saver;
pub use shared::SharedCheckpoint;
use tensor_file::{TensorFile, stream};

/// Suffix of the staging folder of a checkpoint.
const STAGING_SUFFIX: &str = ".partial";

/// Version of the folder layout that this program writes and reads.
const FORMAT: u32 = 2;

/// Position in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Training day.
    pub day: i64,
    /// Finished steps of that day.
    pub day_step: usize,
    /// All steps of that day.
    pub day_steps: usize,
    /// Steps since the run began.
    pub global_step: usize,
}

impl Position {
    /// Whether all steps of the day are finished.
    pub fn is_end_of_day(&self) -> bool {
        self.day_step == self.day_steps
    }
}

/// Everything about a checkpoint that is not a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of the folder layout.
    pub format: u32,
    /// Version of the program.
    pub bireme: String,
    pub position: Position,
    /// Steps of the optimizer.
    pub optimizer_steps: i32,
    /// Steps that were skipped because their gradients were not finite.
    pub n_skipped: usize,
    /// Size of the catalogue.
    pub n_items: i64,
    /// Size of the run's `metrics.jsonl` at this position, in bytes.
    pub log_bytes: u64,
    /// The metric of `checkpoint.keep_best` after each day so far.
    pub evaluated: BTreeMap<i64, f64>,
    /// Fingerprints of the run's data files, by day and split.
    pub data: BTreeMap<String, String>,
    /// The resolved configuration.
    pub config: Config,
}

impl State {
    /// The state before the first step of a run.
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

    fn id(&self) -> CheckpointId {
        let Position { day, global_step, .. } = self.position;
        CheckpointId { day, global_step }
    }
}

/// Named tensors of a model and its optimizer.
#[derive(Debug, Default)]
pub struct Tensors {
    pub weights: Vec<(String, Tensor)>,
    pub optimizer: Vec<(String, Tensor)>,
}

/// A checkpoint that was read.
#[derive(Debug)]
pub struct Checkpoint {
    /// Folder of the checkpoint.
    pub path: PathBuf,
    pub state: State,
    pub tensors: Tensors,
    /// Occurrences of each item in training so far, `[V]`.
    pub occurrences: Vec<i64>,
}

impl Checkpoint {
    /// Checks that the checkpoint has a catalogue of `n_items` items.
    ///
    /// # Errors
    /// It has another number of items.
    pub fn check_items(&self, n_items: i64) -> Result<(), CheckpointError> {
        let n_counted = self.occurrences.len();
        if n_counted as i64 == n_items {
            return Ok(());
        }
        let problem = counts_other_items(n_counted, n_items);
        Err(CheckpointError::Mismatch { path: self.path.clone(), problem })
    }
}

/// The problem of a checkpoint whose catalogue does not fit the schema.
pub(crate) fn counts_other_items(n_counted: usize, n_items: i64) -> String {
    format!("it counts {n_counted} items, the schema has {n_items}")
}

/// An error of reading or writing a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot {action} `{path}`")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// A file of tensors cannot be read.
    #[error("cannot {action} `{path}`")]
    Tensors { action: &'static str, path: PathBuf, source: tch::TchError },
    /// The state cannot be parsed.
    #[error("`{path}` is not the state of a checkpoint of this version")]
    State { path: PathBuf, source: serde_json::Error },
    #[error(
        "`{dir}` holds no complete checkpoint{}",
        skipped.iter().map(|s| format!("; {s}")).collect::<String>()
    )]
    None {
        dir: PathBuf,
        /// The incomplete checkpoints in `dir`, each with its problem.
        skipped: Vec<String>,
    },
    /// No complete checkpoint has the requested name.
    #[error("`{dir}` holds no complete checkpoint `{name}`, only {have}")]
    Unknown {
        name: String,
        dir: PathBuf,
        /// The complete checkpoints in `dir`.
        have: String,
    },
    /// The checkpoint belongs to another model or to other data.
    #[error("checkpoint `{path}` does not fit: {problem}")]
    Mismatch { path: PathBuf, problem: String },
    /// The writer thread could not be started, or it panicked.
    #[error("checkpoints cannot be written in the background: {0}")]
    Background(String),
}

impl UserError for CheckpointError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Io { .. } | Self::Tensors { .. } | Self::Background(_) => FAILED,
            Self::State { .. }
            | Self::None { .. }
            | Self::Unknown { .. }
            | Self::Mismatch { .. } => REFUSED,
        }
    }
}

/// The checkpoints of a run.
#[derive(Clone)]
pub struct Checkpoints {
    dir: PathBuf,
}

impl Checkpoints {
    /// The checkpoints under `run_dir`.
    pub fn of(run_dir: &Path) -> Self {
        Self { dir: run_dir.join(CHECKPOINTS) }
    }

    /// Writes a checkpoint and then removes those that are no longer kept.
    ///
    /// # Errors
    /// A file operation fails; if the checkpoint was not written, the earlier ones are kept.
    pub fn write(
        &self,
        root: Root,
        state: &State,
        tensors: &Tensors,
        occurrences: &[i64],
    ) -> Result<(), CheckpointError> {
        let item_table = ItemTable::replicated(state.n_items);
        let mut writer = CheckpointWriter::new(self, root, state, tensors, &item_table)?;
        for (file, named) in writer.files.iter_mut().zip([&tensors.weights, &tensors.optimizer]) {
            named.iter().for_each(|(_, tensor)| file.put(tensor));
        }
        writer.finish(occurrences)
    }

    /// *All ranks.* Writes a checkpoint with a sharded item table; rank 0 writes the files.
    ///
    /// # Errors
    /// A file operation of rank 0 fails, or a collective call; all ranks get the error.
    pub fn write_shared(
        &self,
        state: &State,
        tensors: &Tensors,
        occurrences: &[i64],
        item_table: &ItemTable<'_>,
        collective: &dyn Collective,
    ) -> Result<(), CollectiveError> {
        let root = collective.root();
        let writer = root.map(|root| CheckpointWriter::new(self, root, state, tensors, item_table));
        let mut writer = collective.agree(writer.transpose())?;
        for (index, named) in [&tensors.weights, &tensors.optimizer].into_iter().enumerate() {
            stream(named, item_table, |elements| {
                writer.iter_mut().for_each(|writer| writer.files[index].put(elements));
            })?;
        }
        collective.agree(writer.map_or(Ok(()), |writer| writer.finish(occurrences)))
    }

    /// Reads the newest complete checkpoint; also returns the problems of the incomplete newer
    /// ones.
    ///
    /// # Errors
    /// No checkpoint is complete, or the newest complete one cannot be read.
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
                // A training run removed this checkpoint meanwhile, after it wrote a newer one:
                // look again.
                is_outdated |= !path.exists();
                skipped
                    .extend(found.err().map(|problem| format!("`{}`: {problem}", path.display())));
            }
            if !is_outdated {
                return Err(CheckpointError::None { dir: self.dir.clone(), skipped });
            }
        }
    }

    /// Reads the complete checkpoint whose folder has this name.
    ///
    /// # Errors
    /// The checkpoint does not exist or cannot be read.
    pub fn named(&self, name: &str) -> Result<Checkpoint, CheckpointError> {
        let folders = self.folders()?.into_iter().map(|(_, path)| path);
        let (matching, others): (Vec<_>, Vec<_>) =
            folders.partition(|path| path.file_name().is_some_and(|file| file == name));
        let is_complete = |path: &&PathBuf| Manifest::problem(path).is_none();
        match matching.iter().find(is_complete) {
            Some(path) => read(path.clone()),
            None => {
                let names = others.iter().filter(is_complete).filter_map(|path| path.file_name());
                let have = names
                    .map(|name| format!("`{}`", name.display()))
                    .collect::<Vec<_>>()
                    .join(", ");
                Err(CheckpointError::Unknown { name: name.to_owned(), dir: self.dir.clone(), have })
            }
        }
    }

    /// Removes the staging folders of interrupted writers.
    ///
    /// # Errors
    /// A folder cannot be removed.
    pub fn clear_partial(&self, _: Root) -> Result<(), CheckpointError> {
        for path in self.entries()? {
            if path.as_os_str().to_string_lossy().ends_with(STAGING_SUFFIX) {
                io_at("remove", &path, fs::remove_dir_all(&path))?;
            }
        }
        Ok(())
    }

    fn path(&self, id: CheckpointId) -> PathBuf {
        let CheckpointId { day, global_step } = id;
        self.dir.join(format!("day-{day:04}-step-{global_step:08}"))
    }

    /// Folders with the name of a checkpoint, oldest first.
    fn folders(&self) -> Result<Vec<(CheckpointId, PathBuf)>, CheckpointError> {
        let with_id = |path: PathBuf| {
            let (day, step) =
                path.file_name()?.to_str()?.strip_prefix("day-")?.split_once("-step-")?;
            Some((CheckpointId { day: day.parse().ok()?, global_step: step.parse().ok()? }, path))
        };
        let mut folders: Vec<_> = self.entries()?.into_iter().filter_map(with_id).collect();
        folders.sort_unstable();
        Ok(folders)
    }

    fn entries(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        match fs::read_dir(&self.dir) {
            Ok(entries) => Ok(entries.filter_map(Result::ok).map(|entry| entry.path()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => {
                Err(CheckpointError::Io { action: "read", path: self.dir.clone(), source })
            }
        }
    }
}

/// Writes a checkpoint to a staging folder.
struct CheckpointWriter<'a> {
    checkpoints: &'a Checkpoints,
    state: &'a State,
    staging: StagingFolder,
    /// Final folder of the checkpoint.
    path: PathBuf,
    /// Weights and optimizer.
    files: [TensorFile; 2],
}

/// A folder that is removed unless it is renamed.
struct StagingFolder(PathBuf);

impl Drop for StagingFolder {
    fn drop(&mut self) {
        // After the rename the path no longer exists. Folders that cannot be removed are left to
        // `clear_partial`.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl<'a> CheckpointWriter<'a> {
    fn new(
        checkpoints: &'a Checkpoints,
        _: Root,
        state: &'a State,
        tensors: &Tensors,
        item_table: &ItemTable<'_>,
    ) -> Result<Self, CheckpointError> {
        let path = checkpoints.path(state.id());
        let mut staging = path.clone().into_os_string();
        staging.push(STAGING_SUFFIX);
        let staging = PathBuf::from(staging);
        // An interrupted run may have left folders of these names; complete or not, they are
        // replaced.
        for stale in [&staging, &path] {
            if stale.exists() {
                io_at("remove", stale, fs::remove_dir_all(stale))?;
            }
        }
        io_at("create", &staging, fs::create_dir_all(&staging))?;
        let staging = StagingFolder(staging);
        let create = |file: &str, named| {
            let path = staging.0.join(file);
            io_at("write", &path, TensorFile::create(&path, named, item_table))
        };
        let files = [create(WEIGHTS, &tensors.weights)?, create(OPTIMIZER, &tensors.optimizer)?];
        Ok(Self { checkpoints, state, staging, path, files })
    }

    fn finish(self, occurrences: &[i64]) -> Result<(), CheckpointError> {
        let Self { checkpoints, state, staging, path, files } = self;
        let folder = &staging.0;
        for (name, file) in [WEIGHTS, OPTIMIZER].into_iter().zip(files) {
            io_at("write", &folder.join(name), file.finish())?;
        }
        let counts = vec![("occurrences".to_owned(), Tensor::from_slice(occurrences))];
        let counts_path = folder.join(OCCURRENCES);
        let written =
            TensorFile::create(&counts_path, &counts, &ItemTable::replicated(state.n_items))
                .and_then(|mut file| {
                    file.put(&counts[0].1);
                    file.finish()
                });
        io_at("write", &counts_path, written)?;
        write_json(&folder.join(STATE), state)?;
        let manifest_path = folder.join(MANIFEST);
        let manifest = Manifest::of(folder, &[WEIGHTS, OPTIMIZER, OCCURRENCES, STATE]);
        write_json(&manifest_path, &io_at("write", &manifest_path, manifest)?)?;
        sync(folder)?;
        io_at("rename", folder, fs::rename(folder, &path))?;
        sync(&checkpoints.dir)?;
        // Later checkpoints are incomplete, or this run would have resumed from them; they do not
        // count.
        let saved =
            checkpoints.folders()?.into_iter().map(|(id, _)| id).filter(|&id| id <= state.id());
        let saved: Vec<CheckpointId> = saved.collect();
        for id in superseded(&saved, &state.config.checkpoint, &state.evaluated) {
            let path = checkpoints.path(id);
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
        let problem = format!("its format is {}, this version reads {FORMAT}", state.format);
        return Err(CheckpointError::Mismatch { path, problem });
    }
    let tensors = |file: &str| read_tensors(&path.join(file));
    let counts = tensors(OCCURRENCES)?.into_iter().find(|(name, _)| name == "occurrences");
    let occurrences = counts.and_then(|(_, tensor)| Vec::try_from(tensor).ok()).unwrap_or_default();
    let tensors = Tensors { weights: tensors(WEIGHTS)?, optimizer: tensors(OPTIMIZER)? };
    Ok(Checkpoint { path, state, tensors, occurrences })
}

/// Maps the named tensors of a safetensors file; their data is read on access.
///
/// # Errors
/// The file cannot be read.
pub fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    tensor_file::map(path).map_err(|source| CheckpointError::Tensors {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

fn io_at<T>(
    action: &'static str,
    path: &Path,
    result: io::Result<T>,
) -> Result<T, CheckpointError> {
    result.map_err(|source| CheckpointError::Io { action, path: path.to_owned(), source })
}

fn sync(path: &Path) -> Result<(), CheckpointError> {
    io_at("force to disk", path, File::open(path).and_then(|file| file.sync_all()))
}
