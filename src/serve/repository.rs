//! A model repository on disk, and the models of it that are loaded.
//!
//! Loading builds what is new beside what serves, and puts it in its place at once: requests under way end with the
//! models that they began with. An ensemble keeps the very versions of its steps that it was loaded with, so that a
//! request never meets the preprocessing of one version and the network of another.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use bireme_base::message::{chain, quoted};
use bireme_etl::serving::Preprocessor;
use bireme_protocol::text;
use tch::Device;

use crate::fault::{self, Fault};
use crate::model::{Model, not_ready};
use crate::model_config::{CONFIG, Read, from_text};
use crate::protocol::model_config::SchedulingChoice;
use crate::protocol::model_instance_group::Kind;
use crate::protocol::model_version_policy::PolicyChoice;
use crate::protocol::{ModelConfig, ModelInstanceGroup, ModelVersionPolicy};
use crate::statistics::Metrics;
use crate::torchscript::Module;

/// A repository cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// It cannot be read.
    #[error("cannot read the model repository `{path}`")]
    Io {
        /// The repository, or something in it.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// There is no model in it.
    #[error("`{0}` holds no model: none of its folders has a `{CONFIG}`")]
    Empty(PathBuf),
    /// A model cannot be loaded.
    #[error("cannot load model `{model}`: {problem}")]
    Model {
        /// Which.
        model: String,
        /// Why not.
        problem: String,
    },
}

impl From<RepositoryError> for Fault {
    fn from(error: RepositoryError) -> Self {
        let kind = if matches!(error, RepositoryError::Model { .. }) {
            fault::Kind::Invalid
        } else {
            fault::Kind::Internal
        };
        Self::new(kind, chain(&error))
    }
}

/// A model of the repository, as its index shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indexed {
    /// Its name.
    pub name: String,
    /// The version that is loaded.
    pub version: Option<u64>,
    /// Why none is.
    pub reason: String,
}

/// The loaded versions of a model.
type Versions = BTreeMap<u64, Loaded>;

#[derive(Clone)]
struct Loaded {
    model: Arc<Model>,
    files: Files,
}

/// What a version was loaded from: a version whose files are the same need not be loaded again.
type Files = Vec<(PathBuf, u64, Option<SystemTime>)>;

/// A model repository.
pub struct Repository {
    dir: PathBuf,
    device: Device,
    n_threads: usize,
    metrics: Arc<Metrics>,
    models: RwLock<BTreeMap<String, Versions>>,
    /// Why models that somebody tried to load are not.
    reasons: Mutex<BTreeMap<String, String>>,
    /// Warnings that were logged, once each.
    warned: Mutex<BTreeSet<String>>,
    /// One change at a time.
    changing: Mutex<()>,
}

impl Repository {
    /// A repository, with nothing loaded. What runs on the CPU runs on `n_threads` threads, a batch on each.
    ///
    /// # Errors
    /// The folder cannot be read, or holds no model.
    pub fn open(
        dir: &Path,
        (device, n_threads): (Device, usize),
        metrics: Arc<Metrics>,
    ) -> Result<Self, RepositoryError> {
        let repository = Self {
            dir: dir.to_owned(),
            device,
            n_threads,
            metrics,
            models: RwLock::default(),
            reasons: Mutex::default(),
            warned: Mutex::default(),
            changing: Mutex::default(),
        };
        match repository.names()?.is_empty() {
            true => Err(RepositoryError::Empty(dir.to_owned())),
            false => Ok(repository),
        }
    }

    /// The names of its models, loaded or not.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn names(&self) -> Result<Vec<String>, RepositoryError> {
        let at = |source| RepositoryError::Io { path: self.dir.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(at)? {
            let entry = entry.map_err(at)?;
            if let Ok(name) = entry.file_name().into_string()
                && !name.starts_with('.')
                && entry.path().join(CONFIG).is_file()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Its models.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn index(&self) -> Result<Vec<Indexed>, RepositoryError> {
        let names = self.names()?;
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        // A model whose folder is gone may still be loaded.
        let all: BTreeSet<&String> = names.iter().chain(models.keys()).collect();
        let indexed = |name: &String| {
            let version = models.get(name).and_then(|versions| versions.keys().next_back().copied());
            let reason = reasons.get(name).cloned().unwrap_or_default();
            Indexed { name: name.clone(), version, reason }
        };
        Ok(all.into_iter().map(indexed).collect())
    }

    /// All loaded versions, by name and number.
    pub fn loaded(&self) -> Vec<Arc<Model>> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models.values().flat_map(BTreeMap::values).map(|loaded| loaded.model.clone()).collect()
    }

    /// A loaded model: a version of it, or the newest if `version` is empty.
    ///
    /// # Errors
    /// There is none.
    pub fn model(&self, name: &str, version: &str) -> Result<Arc<Model>, Fault> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let Some(versions) = models.get(name) else {
            drop(models);
            return Err(self.why_not(name));
        };
        let found = if version.is_empty() {
            versions.values().next_back()
        } else {
            let number: u64 = version
                .parse()
                .map_err(|_| Fault::invalid(format!("a version is a number, not {}", quoted(version))))?;
            versions.get(&number)
        };
        found.map(|loaded| loaded.model.clone()).ok_or_else(|| {
            let numbers = versions.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            not_ready(name, &format!("version {version} is not loaded, and {numbers} is"))
        })
    }

    fn why_not(&self, name: &str) -> Fault {
        let reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = reasons.get(name) {
            return not_ready(name, reason);
        }
        match self.names() {
            Ok(names) if names.iter().any(|known| known == name) => not_ready(name, "it has not been loaded"),
            _ => Fault::new(fault::Kind::NotFound, format!("there is no model {}", quoted(name))),
        }
    }

    /// Loads a model, the steps of an ensemble with it, or loads it again if its files have changed. What else is
    /// loaded and made of the same steps follows.
    ///
    /// # Errors
    /// Says what is wrong; what was loaded before goes on serving.
    pub fn load(&self, name: &str) -> Result<(), RepositoryError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut fresh = BTreeMap::new();
        let loaded = self.load_into(name, &mut fresh, &mut Vec::new()).and_then(|()| {
            let dependents = self.dependents(&fresh);
            dependents.iter().try_for_each(|name| self.load_into(name, &mut fresh, &mut Vec::new()))
        });
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(problem) = loaded {
            reasons.insert(name.to_owned(), problem.clone());
            return Err(RepositoryError::Model { model: name.to_owned(), problem });
        }
        fresh.keys().for_each(|name| drop(reasons.remove(name)));
        let replaced = {
            let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
            let put = |(name, versions)| models.insert(name, versions);
            fresh.into_iter().filter_map(put).collect::<Vec<_>>()
        };
        // Outside of the lock: a large model takes its time to go.
        drop(replaced);
        Ok(())
    }

    /// Ensembles that are loaded, and made of what has just been loaded.
    fn dependents(&self, fresh: &BTreeMap<String, Versions>) -> Vec<String> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let is_made_of_fresh =
            |loaded: &Loaded| loaded.model.parts().any(|part| fresh.contains_key(&part.config.name));
        let dependents = models.iter().filter(|(_, versions)| versions.values().any(is_made_of_fresh));
        dependents.map(|(name, _)| name.clone()).filter(|name| !fresh.contains_key(name)).collect()
    }

    fn load_into(
        &self,
        name: &str,
        fresh: &mut BTreeMap<String, Versions>,
        around: &mut Vec<String>,
    ) -> Result<(), String> {
        if fresh.contains_key(name) {
            return Ok(());
        }
        if around.iter().any(|outer| outer == name) {
            return Err(format!("`{name}` is a step of itself"));
        }
        let is_plain = Path::new(name).components().count() == 1 && !name.starts_with('.');
        let dir = self.dir.join(name);
        let path = dir.join(CONFIG);
        if !is_plain || !path.is_file() {
            return Err(format!("the repository has no model {}", quoted(name)));
        }
        let text = fs::read_to_string(&path).map_err(|error| format!("`{}`: {error}", path.display()))?;
        let read = from_text(&text).map_err(|problem| format!("`{}`: {problem}", path.display()))?;
        self.warn_of(&read, &path);
        let mut config = read.config;
        if config.name.is_empty() {
            name.clone_into(&mut config.name);
        }
        if config.name != name {
            return Err(format!("`{}` is of a model named {}", path.display(), quoted(&config.name)));
        }
        let mut versions = Versions::new();
        for version in chosen_versions(config.version_policy.as_ref(), &dir)? {
            let version_dir = dir.join(version.to_string());
            let problem = |problem| format!("`{}`: {problem}", version_dir.display());
            let loaded = match &config.scheduling_choice {
                Some(SchedulingChoice::EnsembleScheduling(scheduling)) => {
                    around.push(name.to_owned());
                    for step in &scheduling.step {
                        self.load_into(&step.model_name, fresh, around)?;
                    }
                    around.pop();
                    let find = |name: &str, version: i64| {
                        let versions = &fresh[name];
                        let found = match u64::try_from(version) {
                            Ok(version) => versions.get(&version),
                            Err(_) => versions.values().next_back(),
                        };
                        let found = found.map(|loaded| loaded.model.clone());
                        found.ok_or(format!("step `{name}` has no version {version}"))
                    };
                    let model =
                        Model::ensemble(config.clone(), version, scheduling, find, self.metrics.clone());
                    Loaded { model: Arc::new(model.map_err(problem)?), files: Files::new() }
                }
                _ => self.load_version(&config, version, &version_dir).map_err(problem)?,
            };
            versions.insert(version, loaded);
        }
        fresh.insert(name.to_owned(), versions);
        Ok(())
    }

    /// Logs what a configuration asks for in vain, once.
    fn warn_of(&self, Read { config, ignored }: &Read, path: &Path) {
        let path = path.display();
        let mut warnings = Vec::new();
        if !ignored.is_empty() {
            let fields = text::list(ignored);
            warnings.push(format!("`{path}`: ignored what this server does not implement: {fields}"));
        }
        let asks_for_gpu = |group: &ModelInstanceGroup| group.kind() == Kind::Gpu || !group.gpus.is_empty();
        if config.instance_group.iter().any(asks_for_gpu) {
            let device =
                if self.device.is_cuda() { "the GPU that the server was started with" } else { "the CPU" };
            warnings.push(format!("`{path}`: `instance_group` asks for GPUs; the model runs on {device}"));
        }
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        for warning in warnings {
            if !warned.contains(&warning) {
                tracing::warn!("{warning}");
                warned.insert(warning);
            }
        }
    }

    /// A version of a model that runs.
    fn load_version(&self, config: &ModelConfig, version: u64, dir: &Path) -> Result<Loaded, String> {
        let mut files = Files::new();
        list_files(dir, &mut files).map_err(|error| error.to_string())?;
        files.sort();
        let before = {
            let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
            models.get(&config.name).and_then(|versions| versions.get(&version)).cloned()
        };
        if let Some(same) = before.filter(|before| before.files == files && before.model.config == *config) {
            return Ok(same);
        }
        let is_network = config.backend == "pytorch" || config.platform == "pytorch_libtorch";
        let executor: Arc<dyn crate::batcher::Executor> =
            match (config.backend.as_str(), config.platform.as_str()) {
                ("bireme", _) => Arc::new(Preprocessor::load(dir).map_err(|error| chain(&error))?),
                // Preprocessing that was exported for Python lies beside what this program reads.
                ("python", _) if dir.join("serving.json").is_file() => {
                    Arc::new(Preprocessor::load(dir).map_err(|error| chain(&error))?)
                }
                _ if is_network => {
                    let file = if config.default_model_filename.is_empty() {
                        "model.pt"
                    } else {
                        &config.default_model_filename
                    };
                    Arc::new(Module::load(&dir.join(file), config, self.device)?)
                }
                (backend, platform) => {
                    let (backend, platform) = (quoted(backend), quoted(platform));
                    return Err(format!("this server has no backend {backend} for the platform {platform}"));
                }
            };
        // A GPU runs one batch after the other anyway.
        let n_threads = if is_network && self.device.is_cuda() { 1 } else { self.n_threads };
        let model = Model::that_runs(config.clone(), version, executor, n_threads, self.metrics.clone())?;
        Ok(Loaded { model: Arc::new(model), files })
    }

    /// Forgets a model; ensembles that it is a step of go with it, and `with_steps` its own steps too. Requests under
    /// way are answered.
    ///
    /// # Errors
    /// It is not loaded.
    pub fn unload(&self, name: &str, with_steps: bool) -> Result<(), Fault> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        let Some(versions) = models.get(name) else {
            drop(models);
            return Err(self.why_not(name));
        };
        let mut gone = BTreeMap::from([(name.to_owned(), "unloaded".to_owned())]);
        if with_steps {
            let parts = versions.values().flat_map(|loaded| loaded.model.parts());
            gone.extend(parts.map(|part| (part.config.name.clone(), "unloaded".to_owned())));
        }
        loop {
            let is_made_of_gone = |versions: &Versions| {
                let mut parts = versions.values().flat_map(|loaded| loaded.model.parts());
                parts.find(|part| gone.contains_key(&part.config.name)).map(|part| part.config.name.clone())
            };
            let others = models.iter().filter(|(name, _)| !gone.contains_key(*name));
            let next =
                others.filter_map(|(name, versions)| Some((name.clone(), is_made_of_gone(versions)?))).next();
            let Some((name, part)) = next else { break };
            gone.insert(name, format!("its step `{part}` was unloaded"));
        }
        let removed: Vec<_> = gone.keys().filter_map(|name| models.remove(name)).collect();
        drop(models);
        self.reasons.lock().unwrap_or_else(PoisonError::into_inner).extend(gone);
        drop(removed);
        Ok(())
    }
}

/// The versions in a model's folder that its policy chooses: the newest, if it does not say.
fn chosen_versions(policy: Option<&ModelVersionPolicy>, dir: &Path) -> Result<Vec<u64>, String> {
    let entries = fs::read_dir(dir).map_err(|error| format!("`{}`: {error}", dir.display()))?;
    let number = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.ok().filter(|entry| entry.path().is_dir())?;
        entry.file_name().to_str()?.parse::<u64>().ok()
    };
    let mut versions: Vec<u64> = entries.filter_map(number).collect();
    versions.sort_unstable();
    let newest = |n: usize, versions: Vec<u64>| versions[versions.len().saturating_sub(n)..].to_vec();
    let chosen = match policy.and_then(|policy| policy.policy_choice.as_ref()) {
        None => newest(1, versions),
        Some(PolicyChoice::Latest(latest)) => newest(latest.num_versions.max(1) as usize, versions),
        Some(PolicyChoice::All(_)) => versions,
        Some(PolicyChoice::Specific(specific)) => {
            versions.into_iter().filter(|&version| specific.versions.contains(&(version as i64))).collect()
        }
    };
    if chosen.is_empty() {
        return Err(format!("`{}` has no version to load", dir.display()));
    }
    Ok(chosen)
}

fn list_files(dir: &Path, files: &mut Files) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let about = entry.metadata()?;
        match about.is_dir() {
            true => list_files(&entry.path(), files)?,
            false => files.push((entry.path(), about.len(), about.modified().ok())),
        }
    }
    Ok(())
}
