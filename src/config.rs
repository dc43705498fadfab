//! One TOML file a run: as written, with `--set key=value` on top → as resolved.
//!
//! Each component owns its section and the defaults of its fields; here they are gathered, and every key that no
//! component knows is refused with the nearest that one does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::device::{DeviceChoice, Precision};
use crate::train::Reduction;
use crate::{checkpoint, data, metrics, model, train};

/// Section `[run]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// `auto`, `cpu` or `cuda`.
    pub device: DeviceChoice,
    /// Everything random follows from it.
    pub seed: u64,
    /// Whether sums over ranks are fast, or the same to the last bit on any number of ranks.
    pub reduction: Reduction,
    /// How matrices are multiplied.
    pub precision: Precision,
    /// CPU threads of each rank; 0: the host's cores divided by its ranks.
    pub threads_per_rank: usize,
    /// Steps of the run between two comparisons of the ranks' weights; 0: never.
    pub compare_ranks_every: usize,
    /// How long a rank waits for the others before it ends the job; in the first step three times as long.
    pub patience_seconds: f64,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            seed: 42,
            reduction: Reduction::Fast,
            precision: Precision::F32,
            threads_per_rank: 0,
            compare_ranks_every: 1000,
            patience_seconds: 600.0,
        }
    }
}

/// A run as resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where and with which seed.
    pub run: RunConfig,
    /// Which days and columns.
    pub data: data::Config,
    /// What ranks share out among them.
    pub parallel: train::Parallel,
    /// Which model.
    pub model: model::Config,
    /// How it learns.
    pub train: train::Config,
    /// How it is evaluated.
    pub evaluate: metrics::Config,
    /// When its state is saved.
    pub checkpoint: checkpoint::Config,
}

/// A configuration that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("`{path}` is not valid TOML")]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A section or key that does not exist.
    #[error("unknown key `{key}` in the configuration{}", nearest.as_ref().map(|n| format!(": did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// As written.
        key: String,
        /// The nearest key that exists, if any is near.
        nearest: Option<String>,
    },
    /// A key that exists, with a value it cannot have, or a required one that is missing.
    #[error("section `[{section}]` of the configuration: {problem}")]
    Value {
        /// The section.
        section: String,
        /// What is wrong.
        problem: String,
    },
    /// `--set` without `section.key=value`.
    #[error("`--set {0}` is not of the form `section.key=value`")]
    Set(String),
}

impl Config {
    /// Reads a file and applies `--set` assignments, later ones over earlier ones.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: &Path, assignments: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut table: Table = text
            .parse()
            .map_err(|source| ConfigError::Toml { path: path.to_owned(), source: Box::new(source) })?;
        for assignment in assignments {
            assign(&mut table, assignment)?;
        }
        Self::resolve(table)
    }

    fn resolve(mut table: Table) -> Result<Self, ConfigError> {
        let config = Self {
            run: section(&mut table, "run")?,
            data: section(&mut table, "data")?,
            parallel: section(&mut table, "parallel")?,
            model: section(&mut table, "model")?,
            train: section(&mut table, "train")?,
            evaluate: section(&mut table, "evaluate")?,
            checkpoint: section(&mut table, "checkpoint")?,
        };
        if let Some(key) = table.keys().next() {
            let sections = ["run", "data", "parallel", "model", "train", "evaluate", "checkpoint"];
            return Err(ConfigError::UnknownKey { key: key.clone(), nearest: nearest(key, sections) });
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let refuse =
            |section: &str, problem: String| Err(ConfigError::Value { section: section.to_owned(), problem });
        if !(0.1..=1e9).contains(&self.run.patience_seconds) {
            return refuse("run", format!("`patience_seconds` cannot be {:?}", self.run.patience_seconds));
        }
        let checks = [
            ("data", self.data.check()),
            ("train", self.train.check()),
            ("model", self.model.check(self.data.max_length)),
            ("evaluate", self.evaluate.check()),
            ("checkpoint", self.checkpoint.check()),
        ];
        checks
            .into_iter()
            .try_for_each(|(section, checked)| checked.or_else(|problem| refuse(section, problem)))
    }

    /// Checks the threads of a rank against its host's cores.
    ///
    /// # Errors
    /// More threads than could be of use.
    pub fn check_threads(&self, n_cores: usize) -> Result<(), ConfigError> {
        let (n_threads, most) = (self.run.threads_per_rank, (4 * n_cores).clamp(16, 1024));
        if n_threads <= most {
            return Ok(());
        }
        let problem =
            format!("`threads_per_rank` cannot be {n_threads}: at most {most} on a host of {n_cores} cores");
        Err(ConfigError::Value { section: "run".to_owned(), problem })
    }

    /// A key that is other than in `earlier` and would make the run another, with its two values; none if the run could go
    /// on. Where and how fast it runs, what is recorded and kept, and how many days follow, may change.
    pub fn difference(&self, earlier: &Self) -> Option<String> {
        const MAY_CHANGE: [&str; 8] = [
            "run.device",
            "run.threads_per_rank",
            "run.compare_ranks_every",
            "run.patience_seconds",
            "parallel.item_table",
            "train.log_every_steps",
            "train.time_phases",
            "data.last_day",
        ];
        let is_less = self.data.last_day < earlier.data.last_day;
        let flat = |config: &Self| {
            let mut keys = BTreeMap::new();
            flatten("", &Value::try_from(config).expect("a configuration is TOML"), &mut keys);
            keys.retain(|key, _| {
                is_less && key == "data.last_day"
                    || !MAY_CHANGE.contains(&key.as_str()) && !key.starts_with("checkpoint.")
            });
            keys
        };
        let (now, then) = (flat(self), flat(earlier));
        let key = now.keys().chain(then.keys()).find(|&key| now.get(key) != then.get(key))?;
        let value =
            |of: &BTreeMap<String, String>| of.get(key).cloned().unwrap_or_else(|| "absent".to_owned());
        Some(format!("`{key}` was {}, and is {} now", value(&then), value(&now)))
    }

    /// The name results are reported under.
    pub fn title(&self) -> String {
        let side_information = if self.data.features.len() > 1 { " with side information" } else { "" };
        format!("{}{side_information}", self.model.title())
    }

    /// As TOML, defaults filled in.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a configuration is TOML")
    }
}

/// Checks a number of things of which there must be one at least.
///
/// # Errors
/// Names the key.
pub(crate) fn check_count(key: &str, value: usize, most: usize) -> Result<(), String> {
    match value {
        0 => Err(format!("`{key}` must be at least 1")),
        _ if value > most => Err(format!("`{key}` cannot be {value}: at most {most}")),
        _ => Ok(()),
    }
}

/// Checks a width or a number of layers, heads or vectors.
///
/// # Errors
/// Names the key.
pub(crate) fn check_width(key: &str, value: i64, most: i64) -> Result<(), String> {
    match value {
        ..1 => Err(format!("`{key}` cannot be {value}")),
        _ if value > most => Err(format!("`{key}` cannot be {value}: at most {most}")),
        _ => Ok(()),
    }
}

/// Largest width of anything: products of three of them are still numbers.
pub(crate) const MOST_WIDTH: i64 = 1 << 20;

/// Checks a number that is computed with as f32, not below `least`.
///
/// # Errors
/// Names the key.
pub(crate) fn check_finite(key: &str, value: f64, least: f32) -> Result<(), String> {
    let rounded = value as f32;
    if rounded.is_finite() && rounded >= least { Ok(()) } else { Err(format!("`{key}` cannot be {value:?}")) }
}

/// The values in `value` by their dotted keys, which begin with `prefix`.
fn flatten(prefix: &str, value: &Value, keys: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) if prefix.is_empty() || !table.is_empty() => {
            for (key, value) in table {
                let dot = if prefix.is_empty() { "" } else { "." };
                flatten(&format!("{prefix}{dot}{key}"), value, keys);
            }
        }
        value => {
            keys.insert(prefix.to_owned(), value.to_string());
        }
    }
}

fn section<T: DeserializeOwned>(table: &mut Table, name: &str) -> Result<T, ConfigError> {
    let value = table.remove(name).unwrap_or_else(|| Value::Table(Table::new()));
    value.clone().try_into().map_err(|error: toml::de::Error| {
        let message = error.message();
        let mut quoted = message.split('`').skip(1).step_by(2);
        match (message.starts_with("unknown field"), quoted.next()) {
            (true, Some(key)) => ConfigError::UnknownKey {
                key: format!("{name}.{key}"),
                nearest: nearest(key, quoted).map(|near| format!("{name}.{near}")),
            },
            _ => {
                let key = culprit::<T>(&value, message).map_or(String::new(), |key| format!("`{key}`: "));
                ConfigError::Value { section: name.to_owned(), problem: format!("{key}{message}") }
            }
        }
    })
}

/// The key of a section without which an error would be another: the key that it is about. Serde does not name it where
/// sections are enums.
fn culprit<T: DeserializeOwned>(section: &Value, message: &str) -> Option<String> {
    let mut keys = BTreeMap::new();
    flatten("", section, &mut keys);
    let mut keys: Vec<String> = keys.into_keys().collect();
    // Without the key that chooses a variant there is always another error.
    keys.sort_by_key(|key| key.rsplit('.').next() == Some("kind"));
    keys.into_iter().find(|key| {
        let mut without = section.clone();
        let path: Vec<&str> = key.split('.').collect();
        let (last, tables) = path.split_last().expect("a key has a part");
        let mut inner = Some(&mut without);
        for table in tables {
            inner = inner.and_then(|inner| inner.get_mut(*table));
        }
        let removed = inner.and_then(Value::as_table_mut).and_then(|table| table.remove(*last));
        let other = without.try_into::<T>().err();
        removed.is_some() && other.is_none_or(|other| other.message() != message)
    })
}

fn nearest<'a>(key: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(key, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(similarity, _)| *similarity > 0.7)
        .map(|(_, candidate)| candidate.to_owned())
}

/// Applies `section.key=value`, where a key may have further dots; a value that is not TOML is taken as a string.
fn assign(table: &mut Table, assignment: &str) -> Result<(), ConfigError> {
    let malformed = || ConfigError::Set(assignment.to_owned());
    let (key, value) = assignment.split_once('=').ok_or_else(malformed)?;
    let (path, key) = key.trim().rsplit_once('.').ok_or_else(malformed)?;
    let value = format!("value = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    let mut inner = table;
    for part in path.split('.') {
        let entry = inner.entry(part.to_owned()).or_insert_with(|| Value::Table(Table::new()));
        inner = entry.as_table_mut().ok_or_else(malformed)?;
    }
    inner.insert(key.to_owned(), value);
    Ok(())
}
