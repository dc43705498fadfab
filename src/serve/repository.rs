//! A model repository on disk, and its loaded models.
//!
//! A model is loaded beside the one that serves, and then replaces it at once: requests in
//! execution finish with the models that they began with. An ensemble keeps the versions of its
//! steps that it was loaded with, so that no request meets the preprocessing of one version and the
//! network of another.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use bireme_base::message::{chain, quoted};
use bireme_etl::serving::Preprocessor;
use bireme_protocol::text;
use tch::Device;

use crate::model::{ServedModel, not_ready};
use crate::model_config::{CONFIG, ParsedConfig, from_text};
use crate::protocol::model_config::SchedulingChoice;
use crate::protocol::model_instance_group::Kind;
use crate::protocol::model_version_policy::PolicyChoice;
use crate::protocol::{ModelConfig, ModelInstanceGroup, ModelVersionPolicy};
use crate::request_error::{RequestError, RequestErrorKind};
use crate::statistics::Metrics;
use crate::torchscript::ScriptModule;

#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error("cannot read the model repository `{path}`")]
    Io {
        /// The repository, or an entry in it.
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{0}` holds no model: none of its folders has a `{CONFIG}`")]
    Empty(PathBuf),
    #[error("cannot load model `{model}`: {problem}")]
    Model { model: String, problem: String },
}

impl From<RepositoryError> for RequestError {
    fn from(error: RepositoryError) -> Self {
        let kind = if matches!(error, RepositoryError::Model { .. }) {
            RequestErrorKind::Invalid
        } else {
            RequestErrorKind::Internal
        };
        Self::new(kind, chain(&error))
    }
}

/// An entry of the repository's index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indexed {
    pub name: String,
    /// The newest loaded version.
    pub version: Option<u64>,
    /// The reason why no version is loaded.
    pub reason: String,
}

type Versions = BTreeMap<u64, Loaded>;

#[derive(Clone)]
struct Loaded {
    model: Arc<ServedModel>,
    files: Files,
}

/// Paths, sizes and times of a version's files; a version whose files are the same is not loaded
/// again.
type Files = Vec<(PathBuf, u64, Option<SystemTime>)>;

/// Where models run.
#[derive(Clone, Copy, Debug)]
pub struct Compute {
    /// Of networks; preprocessing runs on the CPU.
    pub device: Device,
    /// Threads of a model on the CPU, each of which runs a batch.
    pub n_threads: usize,
}

pub struct Repository {
    dir: PathBuf,
    compute: Compute,
    metrics: Arc<Metrics>,
    models: RwLock<BTreeMap<String, Versions>>,
    /// The reasons for which models are not loaded.
    reasons: Mutex<BTreeMap<String, String>>,
    /// Warnings that were logged, so that each is logged once.
    warned: Mutex<BTreeSet<String>>,
    /// Held while models are loaded or unloaded.
    changing: Mutex<()>,
}

impl Repository {
    /// Opens a repository without loading a model.
    ///
    /// # Errors
    /// The folder cannot be read, or holds no model.
    pub fn open(
        dir: &Path,
        compute: Compute,
        metrics: Arc<Metrics>,
    ) -> Result<Self, RepositoryError> {
        let repository = Self {
            dir: dir.to_owned(),
            compute,
            metrics,
            models: RwLock::default(),
            reasons: Mutex::default(),
            warned: Mutex::default(),
            changing: Mutex::default(),
        };
        if repository.names()?.is_empty() {
            return Err(RepositoryError::Empty(dir.to_owned()));
        }
        Ok(repository)
    }

    /// The names of all models, loaded or not.
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

    /// All models, loaded or not.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn index(&self) -> Result<Vec<Indexed>, RepositoryError> {
        let names = self.names()?;
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        // A model whose folder was removed may still be loaded.
        let all: BTreeSet<&String> = names.iter().chain(models.keys()).collect();
        let indexed = |name: &String| {
            let version =
                models.get(name).and_then(|versions| versions.keys().next_back().copied());
            let reason = reasons.get(name).cloned().unwrap_or_default();
            Indexed { name: name.clone(), version, reason }
        };
        Ok(all.into_iter().map(indexed).collect())
    }

    /// All loaded versions, sorted by name and number.
    pub fn loaded(&self) -> Vec<Arc<ServedModel>> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models.values().flat_map(BTreeMap::values).map(|loaded| loaded.model.clone()).collect()
    }

    /// A loaded version of a model; the newest if `version` is empty.
    ///
    /// # Errors
    /// The model or the version is not loaded.
    pub fn model(&self, name: &str, version: &str) -> Result<Arc<ServedModel>, RequestError> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let Some(versions) = models.get(name) else {
            drop(models);
            return Err(self.why_not(name));
        };
        let found = if version.is_empty() {
            versions.values().next_back()
        } else {
            let number: u64 = version.parse().map_err(|_| {
                RequestError::invalid(format!("a version is a number, not {}", quoted(version)))
            })?;
            versions.get(&number)
        };
        found.map(|loaded| loaded.model.clone()).ok_or_else(|| {
            let numbers = versions.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            not_ready(name, &format!("version {version} is not loaded, and {numbers} is"))
        })
    }

    fn why_not(&self, name: &str) -> RequestError {
        let reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = reasons.get(name) {
            return not_ready(name, reason);
        }
        match self.names() {
            Ok(names) if names.iter().any(|known| known == name) => {
                not_ready(name, "it has not been loaded")
            }
            _ => RequestError::new(
                RequestErrorKind::NotFound,
                format!("unknown model {}", quoted(name)),
            ),
        }
    }

    /// Loads a model, and with an ensemble its steps, unless its files are unchanged. Loaded
    /// ensembles that share its steps are loaded again.
    ///
    /// # Errors
    /// A model that cannot be loaded. The loaded version continues to serve.
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
        // Dropped without the lock, because freeing a large model takes time.
        drop(replaced);
        Ok(())
    }

    /// Loaded ensembles with a step that was just loaded.
    fn dependents(&self, fresh: &BTreeMap<String, Versions>) -> Vec<String> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let is_made_of_fresh = |loaded: &Loaded| {
            loaded.model.parts().any(|part| fresh.contains_key(&part.config.name))
        };
        let dependents =
            models.iter().filter(|(_, versions)| versions.values().any(is_made_of_fresh));
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
        let text =
            fs::read_to_string(&path).map_err(|error| format!("`{}`: {error}", path.display()))?;
        let read =
            from_text(&text).map_err(|problem| format!("`{}`: {problem}", path.display()))?;
        self.warn_of(&read, &path);
        let mut config = read.config;
        if config.name.is_empty() {
            name.clone_into(&mut config.name);
        }
        if config.name != name {
            return Err(format!(
                "`{}` is of a model named {}",
                path.display(),
                quoted(&config.name)
            ));
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
                    let model = ServedModel::ensemble(
                        config.clone(),
                        version,
                        scheduling,
                        find,
                        self.metrics.clone(),
                    );
                    Loaded { model: Arc::new(model.map_err(problem)?), files: Files::new() }
                }
                _ => self.load_version(&config, version, &version_dir).map_err(problem)?,
            };
            versions.insert(version, loaded);
        }
        fresh.insert(name.to_owned(), versions);
        Ok(())
    }

    /// Logs the settings that this server ignores, once each.
    fn warn_of(&self, ParsedConfig { config, ignored }: &ParsedConfig, path: &Path) {
        let path = path.display();
        let mut warnings = Vec::new();
        if !ignored.is_empty() {
            let fields = text::list(ignored);
            warnings
                .push(format!("`{path}`: ignored what this server does not implement: {fields}"));
        }
        let asks_for_gpu =
            |group: &ModelInstanceGroup| group.kind() == Kind::Gpu || !group.gpus.is_empty();
        if config.instance_group.iter().any(asks_for_gpu) {
            let device = if self.compute.device.is_cuda() {
                "the GPU that the server was started with"
            } else {
                "the CPU"
            };
            warnings.push(format!(
                "`{path}`: `instance_group` asks for GPUs; the model runs on {device}"
            ));
        }
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        for warning in warnings {
            if !warned.contains(&warning) {
                tracing::warn!("{warning}");
                warned.insert(warning);
            }
        }
    }

    /// Loads a version of a model with an executor.
    fn load_version(
        &self,
        config: &ModelConfig,
        version: u64,
        dir: &Path,
    ) -> Result<Loaded, String> {
        let mut files = Files::new();
        list_files(dir, &mut files).map_err(|error| error.to_string())?;
        files.sort();
        let before = {
            let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
            models.get(&config.name).and_then(|versions| versions.get(&version)).cloned()
        };
        if let Some(same) =
            before.filter(|before| before.files == files && before.model.config == *config)
        {
            return Ok(same);
        }
        let is_network = config.backend == "pytorch" || config.platform == "pytorch_libtorch";
        let executor: Arc<dyn crate::batcher::Executor> =
            match (config.backend.as_str(), config.platform.as_str()) {
                ("bireme", _) => Arc::new(Preprocessor::load(dir).map_err(|error| chain(&error))?),
                // Versions up to 0.1 could export preprocessing for Triton's Python backend; beside
                // it they wrote what this program reads.
                ("python", _) if dir.join("serving.json").is_file() => {
                    Arc::new(Preprocessor::load(dir).map_err(|error| chain(&error))?)
                }
                _ if is_network => {
                    let file = if config.default_model_filename.is_empty() {
                        "model.pt"
                    } else {
                        &config.default_model_filename
                    };
                    Arc::new(ScriptModule::load(&dir.join(file), config, self.compute.device)?)
                }
                (backend, platform) => {
                    let (backend, platform) = (quoted(backend), quoted(platform));
                    return Err(format!(
                        "this server has no backend {backend} for the platform {platform}"
                    ));
                }
            };
        // A GPU runs its batches one by one.
        let n_threads =
            if is_network && self.compute.device.is_cuda() { 1 } else { self.compute.n_threads };
        let model = ServedModel::that_runs(
            config.clone(),
            version,
            executor,
            n_threads,
            self.metrics.clone(),
        )?;
        Ok(Loaded { model: Arc::new(model), files })
    }

    /// Unloads a model and the ensembles that it is a step of; `with_steps` its own steps too.
    /// Requests in execution finish.
    ///
    /// # Errors
    /// The model is not loaded.
    pub fn unload(&self, name: &str, with_steps: bool) -> Result<(), RequestError> {
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
                parts
                    .find(|part| gone.contains_key(&part.config.name))
                    .map(|part| part.config.name.clone())
            };
            let others = models.iter().filter(|(name, _)| !gone.contains_key(*name));
            let next = others
                .filter_map(|(name, versions)| Some((name.clone(), is_made_of_gone(versions)?)))
                .next();
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

/// The versions that the policy chooses in a model's folder; the newest without a policy.
fn chosen_versions(policy: Option<&ModelVersionPolicy>, dir: &Path) -> Result<Vec<u64>, String> {
    let entries = fs::read_dir(dir).map_err(|error| format!("`{}`: {error}", dir.display()))?;
    let number = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.ok().filter(|entry| entry.path().is_dir())?;
        entry.file_name().to_str()?.parse::<u64>().ok()
    };
    let mut versions: Vec<u64> = entries.filter_map(number).collect();
    versions.sort_unstable();
    let newest =
        |n: usize, versions: Vec<u64>| versions[versions.len().saturating_sub(n)..].to_vec();
    let chosen = match policy.and_then(|policy| policy.policy_choice.as_ref()) {
        None => newest(1, versions),
        Some(PolicyChoice::Latest(latest)) => newest(latest.num_versions.max(1) as usize, versions),
        Some(PolicyChoice::All(_)) => versions,
        Some(PolicyChoice::Specific(specific)) => versions
            .into_iter()
            .filter(|&version| specific.versions.contains(&(version as i64)))
            .collect(),
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
        if about.is_dir() {
            list_files(&entry.path(), files)?;
        } else {
            files.push((entry.path(), about.len(), about.modified().ok()));
        }
    }
    Ok(())
}
