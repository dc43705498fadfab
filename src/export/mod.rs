//! Exports a trained run to a model repository for Triton or `bireme serve`.
//!
//! [`Preprocessor`] applies the transforms that made the training data, and the model is the traced
//! network (see `script`). [`export`] adds a new version of both, and of the two ensembles that
//! join them, to the repository; existing versions stay.

#![allow(missing_docs, reason = "most names say what a doc would repeat")]

mod manifest;
mod repository;
mod rules;
mod script;
mod scripted;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bireme_base::output::{self, OutputEntries, OutputError};
use bireme_base::user_error::{FAILED, REFUSED, UserError};
use bireme_tools::run_dir::{CONFIG, DATA};
use tch::{Device, Kind};

use crate::checkpoint::{Checkpoint, CheckpointError, Checkpoints, State};
use crate::config::{Config, ConfigError};
use crate::data::{DataError, Features};
use crate::etl::serving::{ModelColumn, Preprocessor, ServingSettings};
use crate::etl::{Coded, ColumnValue, SCHEMA, Schema, WORKFLOW, Workflow};
use crate::model::{ItemTable, Network, Neural};

pub use repository::ModelNames;
pub use script::{FALLBACK, ITEM_IDS, ITEM_SCORES, N_ITEMS, OUTPUT};
pub use scripted::ScriptedModel;

use script::Script;

/// The library that preprocesses in Triton, in the folder of `<name>_etl`.
pub const LIBRARY: &str = "libtriton_bireme.so";

#[derive(Clone, Debug)]
pub struct ExportOptions {
    pub run_dir: PathBuf,
    /// The folder name of a checkpoint; `None`: the newest.
    pub checkpoint: Option<String>,
    /// The repository, which is created if it is absent.
    pub out: PathBuf,
    /// The model's name in the repository.
    pub name: String,
    /// The type of the embedding tables, in which items are scored.
    pub tables: Kind,
    /// The file that is copied as [`LIBRARY`].
    pub library: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The new version of all four models.
    pub version: u64,
    /// Rows of the catalogue.
    pub n_items: i64,
    /// Incomplete newer checkpoints, each with its fault.
    pub skipped: Vec<String>,
}

/// Recommendations per session: by default, and at most.
const TOP_K: usize = 20;
const MAX_TOP_K: usize = 100;
/// The most sessions of a request, and the most memory for their scores of the catalogue.
const MAX_SESSIONS: usize = 16_384;
const MAX_SCORES_BYTES: usize = 2 << 30;

/// An error of [`export`]. It leaves the repository unchanged.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("`{0}` cannot be a model's name: letters, digits, `_`, `-` and `.` can")]
    Name(String),
    #[error(
        "`{run_dir}` holds a {model} model, which only counts: GRU and XLNet models can be exported"
    )]
    OnlyCounts { run_dir: PathBuf, model: String },
    #[error("`{0}` is missing: the run was trained on sessions without a fitted workflow")]
    NoWorkflow(PathBuf),
    #[error("`{0}` does not exist")]
    NoLibrary(PathBuf),
    #[error(
        "`{0}` is not a Triton backend: it is not a shared library that defines \
         `{BACKEND_FUNCTION}`"
    )]
    NotABackend(PathBuf),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Schema(#[from] crate::etl::SchemaError),
    #[error(transparent)]
    Workflow(#[from] crate::etl::Error),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("`{path}` does not fit the run: {problem}")]
    Mismatch { path: PathBuf, problem: String },
    #[error("cannot write `{path}` as TorchScript: {problem}")]
    Script { path: PathBuf, problem: String },
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error("cannot {action} `{path}`")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl UserError for ExportError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Output(error) => error.exit_code(),
            Self::Script { .. } | Self::Io { .. } => FAILED,
            _ => REFUSED,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NoLibrary(_) | Self::NotABackend(_) => {
                "`cargo build` makes it beside `bireme`, and `--backend-library` names another \
                 place"
            }
            Self::NoWorkflow(_) => "train on what `bireme preprocess` wrote",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// Checks the options before there is anything to export.
///
/// # Errors
/// An invalid name, a missing library, or a model without parameters.
pub fn check(options: &ExportOptions, config: &Config) -> Result<(), ExportError> {
    checked_options(options)?;
    neural(options, config).map(drop)
}

fn checked_options(options: &ExportOptions) -> Result<ModelNames, ExportError> {
    let names = checked_names(&options.name)?;
    output::check_folder(&options.out)?;
    if !options.library.is_file() {
        return Err(ExportError::NoLibrary(options.library.clone()));
    }
    let library = fs::read(&options.library).map_err(|source| ExportError::Io {
        action: "read",
        path: options.library.clone(),
        source,
    })?;
    if !is_backend(&library) {
        return Err(ExportError::NotABackend(options.library.clone()));
    }
    Ok(names)
}

/// A function that every backend of Triton exports.
const BACKEND_FUNCTION: &str = "TRITONBACKEND_ModelInstanceExecute";

/// Whether a file is an ELF library with the name of a backend's function in it. It is not loaded,
/// because Triton's own library, which it needs, is not on this host.
fn is_backend(file: &[u8]) -> bool {
    let name = BACKEND_FUNCTION.as_bytes();
    file.starts_with(b"\x7fELF") && file.windows(name.len()).any(|bytes| bytes == name)
}

/// The configuration of the network.
fn neural<'a>(options: &ExportOptions, config: &'a Config) -> Result<Neural<'a>, ExportError> {
    let only_counts = || ExportError::OnlyCounts {
        run_dir: options.run_dir.clone(),
        model: config.model.title(),
    };
    config.model.neural().ok_or_else(only_counts)
}

/// Writes a new version of the model `options.name` into the repository. `note` receives a line
/// about remains of an interrupted command that are removed.
///
/// # Errors
/// See [`ExportError`].
pub fn export(
    options: &ExportOptions,
    note: &mut dyn FnMut(&str),
) -> Result<Exported, ExportError> {
    let names = checked_options(options)?;
    let added = OutputEntries::create(&options.out, &options.name, note)?;
    let aside = added.path();
    let run = ServedRun::open(options)?;
    let n_items = run.features.n_items();
    let etl = run.preprocessor()?;
    let configs = repository::configs(&names, &etl, n_items);

    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| ExportError::Io { action, path, source }
    };
    let version = next_version(&options.out, &names).map_err(io("read", &options.out))?;
    for config in &configs {
        let dir = aside.join(&config.name).join(version.to_string());
        fs::create_dir_all(&dir).map_err(io("create", &dir))?;
        let path = aside.join(&config.name).join(bireme_serve::model_config::CONFIG);
        fs::write(&path, bireme_serve::model_config::to_text(config))
            .map_err(io("write", &path))?;
    }
    let folder = |name: &str| aside.join(name).join(version.to_string());

    etl.save(&folder(&names.etl))?;
    let path = aside.join(&names.etl).join(LIBRARY);
    fs::copy(&options.library, &path).map_err(io("write", &path))?;
    let path = folder(&names.model).join(rules::FILE);
    let failed = |problem| ExportError::Script { path: path.clone(), problem };
    run.script(&etl).save(&path).map_err(failed)?;
    rules::check(&configs[1], &path).map_err(failed)?;

    manifest::write(&run.facts(options, version), &aside, &folder(&names.ensemble))
        .map_err(io("write", &aside))?;
    // Git drops empty folders, and an ensemble without its version folder does not load.
    let path = folder(&names.scores).join("README");
    fs::write(&path, format!("See {}/{version}/{}\n", names.ensemble, manifest::FILE))
        .map_err(io("write", &path))?;
    added.publish(|aside| publish(aside, &options.out, &configs, version))?;
    Ok(Exported { version, n_items, skipped: run.skipped })
}

fn checked_names(name: &str) -> Result<ModelNames, ExportError> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(is_plain) {
        return Err(ExportError::Name(name.to_owned()));
    }
    Ok(ModelNames::new(name))
}

/// One more than the newest version of any of the four models.
fn next_version(out: &Path, names: &ModelNames) -> io::Result<u64> {
    let mut newest = 0;
    for name in [&names.ensemble, &names.scores, &names.etl, &names.model] {
        let dir = out.join(name);
        if !dir.exists() {
            continue;
        }
        for entry in fs::read_dir(dir)? {
            let version = entry?.file_name().to_str().and_then(|name| name.parse().ok());
            newest = newest.max(version.unwrap_or(0));
        }
    }
    Ok(newest + 1)
}

/// Moves all models into place, the ensembles last, so that a server finds the models that they
/// need.
fn publish(
    aside: &Path,
    out: &Path,
    configs: &[bireme_serve::protocol::ModelConfig],
    version: u64,
) -> io::Result<()> {
    for config in configs {
        let (from, to) = (aside.join(&config.name), out.join(&config.name));
        if !to.exists() {
            fs::rename(from, to)?;
            continue;
        }
        fs::rename(from.join(version.to_string()), to.join(version.to_string()))?;
        for file in [LIBRARY, bireme_serve::model_config::CONFIG] {
            if from.join(file).exists() {
                fs::rename(from.join(file), to.join(file))?;
            }
        }
    }
    Ok(())
}

/// The parts of a run that are exported.
struct ServedRun {
    dir: PathBuf,
    config: Config,
    state: State,
    checkpoint: PathBuf,
    skipped: Vec<String>,
    network: Network<'static>,
    features: Features,
    occurrences: Vec<i64>,
    workflow: Workflow,
    /// Product id of each item; −1 for padding and unknown, which are never recommended.
    product_ids: Vec<i64>,
    cardinalities: Vec<Option<i64>>,
    tables: Kind,
}

impl ServedRun {
    fn open(options: &ExportOptions) -> Result<Self, ExportError> {
        let dir = &options.run_dir;
        let config = Config::load(&dir.join(CONFIG), &[])?;
        let neural = neural(options, &config)?;
        let data = dir.join(DATA);
        let workflow_dir = data.join(WORKFLOW);
        if !workflow_dir.is_dir() {
            return Err(ExportError::NoWorkflow(workflow_dir));
        }
        let features = Features::select(&Schema::read(data.join(SCHEMA))?, &config.data.features)?;
        let workflow = Workflow::load(&workflow_dir)?;
        let checkpoints = Checkpoints::of(dir);
        let (checkpoint, skipped) = match &options.checkpoint {
            Some(name) => (checkpoints.named(name)?, Vec::new()),
            None => checkpoints.newest()?,
        };
        checkpoint.check_items(features.n_items())?;
        let Checkpoint { path: checkpoint, state, tensors, occurrences } = checkpoint;
        let mismatch = |path: &Path| {
            let path = path.to_owned();
            move |problem| ExportError::Mismatch { path, problem }
        };
        let Config { run, data, .. } = &config;
        let network = Network::with_item_table(
            &neural,
            &features,
            data.max_length,
            config.evaluate.reminders,
            run.seed,
            Device::Cpu,
            ItemTable::replicated(features.n_items()),
        );
        let mut network = network.map_err(mismatch(dir))?;
        network.load_weights(&tensors.weights).map_err(mismatch(&checkpoint))?;
        network.serve_with_tables_in(options.tables);
        let products = workflow.vocabulary(Coded::Product);
        if products.cardinality() as i64 != features.n_items() {
            let problem = format!(
                "it has {} items, and the schema has {}",
                products.cardinality(),
                features.n_items()
            );
            return Err(mismatch(&workflow_dir)(problem));
        }
        let product_ids =
            (0..products.cardinality() as u32).map(|item| match products.value(item) {
                Some(ColumnValue::Int(product)) => product,
                _ => -1,
            });
        let product_ids = product_ids.collect();
        let columns = features.columns().iter();
        let cardinalities =
            columns.map(|f| f.cardinality().filter(|_| f.is_categorical())).collect();
        Ok(Self {
            dir: dir.clone(),
            state,
            checkpoint,
            skipped,
            network,
            occurrences,
            workflow,
            product_ids,
            cardinalities,
            features,
            config,
            tables: options.tables,
        })
    }

    fn preprocessor(&self) -> Result<Preprocessor, ExportError> {
        let columns = self.features.columns().iter();
        let n_recommendable = (self.features.n_items() - crate::data::FIRST_ITEM).max(1) as usize;
        let settings = ServingSettings {
            max_length: self.network.served_length(self.config.data.max_length),
            columns: columns.map(|f| ModelColumn::new(&f.name, f.is_categorical())).collect(),
            top_k: TOP_K,
            max_top_k: MAX_TOP_K,
            max_sessions: (MAX_SCORES_BYTES / (4 * self.features.n_items() as usize))
                .clamp(1, MAX_SESSIONS),
            n_recommendable: Some(n_recommendable),
        };
        Ok(Preprocessor::new(self.workflow.clone(), settings))
    }

    fn script<'a>(&'a self, etl: &'a Preprocessor) -> Script<'a> {
        let settings = etl.settings();
        Script {
            network: &self.network,
            columns: &settings.columns,
            cardinalities: &self.cardinalities,
            max_length: settings.max_length as i64,
            max_top_k: settings.max_top_k.min(self.product_ids.len()) as i64,
            product_ids: &self.product_ids,
            occurrences: &self.occurrences,
        }
    }

    fn facts(&self, options: &ExportOptions, version: u64) -> manifest::ManifestFacts<'_> {
        manifest::ManifestFacts {
            name: options.name.clone(),
            version,
            run_dir: &self.dir,
            checkpoint: &self.checkpoint,
            state: &self.state,
            config: &self.config,
            tables: self.tables,
        }
    }
}
