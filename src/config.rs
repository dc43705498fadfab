//! One TOML file a run: as written, with `--set key=value` on top → as resolved.
//!
//! Each component owns its section and the defaults of its fields; here they are gathered, and
//! every key that no component knows is refused with the nearest that one does.

mod checkpoint;
mod data;
mod evaluate;
mod model;
#[cfg(test)]
mod page;
mod problem;
mod run;
mod train;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bireme_base::message::{quoted, single_line};
use bireme_base::user_error::{REFUSED, UserError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use checkpoint::CheckpointConfig;
pub use data::{ALL_FEATURES, DataConfig};
pub use evaluate::{Cases, EvaluateConfig, Reminders, UnknownTargets};
pub use model::{
    Aggregation, CandidatesConfig, ContentConfig, Continuous, Decay, EvidenceConfig, GruConfig,
    HeadConfig, InputConfig, LogLinearConfig, ModelConfig, NeighboursConfig, Neural, Objective,
    StartConfig, XlnetConfig,
};
pub use run::{CudaGraph, DeviceChoice, Precision};
pub use train::{
    LossConfig, NonFinite, ParallelConfig, Reduction, Schedule, SessionOrder, TableLayout,
    TableOptimizer, TrainConfig,
};

/// Section `[run]`: where a run computes and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Device of all ranks.
    pub device: DeviceChoice,
    /// Seed of everything random.
    pub seed: u64,
    /// How gradients are summed over ranks.
    pub reduction: Reduction,
    /// Number format of matrix products. Weights, gradients and optimizer state are always f32,
    /// and evaluation on a CPU is too.
    pub precision: Precision,
    /// Whether a training step on a GPU is recorded as a CUDA graph and launched as one: the host
    /// then has almost no work in a step.
    pub cuda_graph: CudaGraph,
    /// CPU threads of each rank; 0 divides the host's cores among its ranks.
    pub threads_per_rank: usize,
    /// Steps between two bitwise comparisons of the ranks' weights; 0 disables them.
    pub compare_ranks_every: usize,
    /// Seconds that a rank waits in a collective call before it names the missing ranks and ends
    /// the job; three times as many in the first step. 0.1 to 1e9.
    pub patience_seconds: f64,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            seed: 42,
            reduction: Reduction::Fast,
            precision: Precision::F32,
            cuda_graph: CudaGraph::Auto,
            threads_per_rank: 0,
            compare_ranks_every: 1000,
            patience_seconds: 600.0,
        }
    }
}

/// A run as resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where and with which seed.
    pub run: RunConfig,
    /// Which days and columns.
    pub data: DataConfig,
    /// What ranks share out among them.
    pub parallel: ParallelConfig,
    /// Which model.
    pub model: ModelConfig,
    /// How it learns.
    pub train: TrainConfig,
    /// How it is evaluated.
    pub evaluate: EvaluateConfig,
    /// When its state is saved.
    pub checkpoint: CheckpointConfig,
}

/// The sections, in the order of [`Config`].
const SECTIONS: [&str; 7] = ["run", "data", "parallel", "model", "train", "evaluate", "checkpoint"];

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
    #[error("`{path}` is not valid TOML: line {line}, column {column}: {problem}")]
    Toml {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// What is wrong there.
        problem: String,
    },
    /// What is wrong in a file.
    #[error("`{path}`: {source}")]
    In {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<Self>,
    },
    /// A section or key that does not exist.
    #[error(
        "unknown key `{key}` in the configuration{}",
        nearest.as_ref().map(|n| format!(": did you mean `{n}`?")).unwrap_or_default()
    )]
    UnknownKey {
        /// As written.
        key: String,
        /// The nearest key that exists, if any is near.
        nearest: Option<String>,
    },
    /// A key with a value of another type, or that is none of the key's, or a required one that is
    /// missing.
    #[error("`{key}` {problem}")]
    Key {
        /// With its section, or the section itself.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A section whose keys do not fit each other, or a number out of its range.
    #[error("section `[{section}]` of the configuration: {problem}")]
    Value {
        /// The section.
        section: String,
        /// What is wrong.
        problem: String,
    },
    /// `--set` without `section.key=value`.
    #[error("{} is not of the form `section.key=value`", set_option(.0))]
    Set(String),
}

impl UserError for ConfigError {
    fn exit_code(&self) -> i32 {
        REFUSED
    }
}

impl ConfigError {
    /// The section or key that is wrong, if one is.
    fn key(&self) -> Option<&str> {
        match self {
            Self::UnknownKey { key, .. } | Self::Key { key, .. } => Some(key),
            Self::Value { section, .. } => Some(section),
            _ => None,
        }
    }
}

impl Config {
    /// Reads a file and applies `--set` assignments, later ones over earlier ones.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: &Path, assignments: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut table: Table = text.parse().map_err(|error| invalid_toml(path, &text, &error))?;
        let assigned: Vec<&str> = assignments
            .iter()
            .map(|assignment| assign(&mut table, assignment))
            .collect::<Result<_, _>>()?;
        let is_assigned = |key: &str| {
            let is_inside = |inner: &str, outer: &str| {
                inner
                    .strip_prefix(outer)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            };
            assigned.iter().any(|assigned| is_inside(assigned, key) || is_inside(key, assigned))
        };
        Self::resolve(table).map_err(|error| match error.key() {
            Some(key) if !is_assigned(key) => {
                ConfigError::In { path: path.to_owned(), source: Box::new(error) }
            }
            _ => error,
        })
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
            return Err(ConfigError::UnknownKey {
                key: key.clone(),
                nearest: nearest(key, SECTIONS),
            });
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let refuse = |section: &str, problem: String| {
            Err(ConfigError::Value { section: section.to_owned(), problem })
        };
        if !(0.1..=1e9).contains(&self.run.patience_seconds) {
            return refuse(
                "run",
                format!("`patience_seconds` cannot be {:?}", self.run.patience_seconds),
            );
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
        let problem = format!(
            "`threads_per_rank` cannot be {n_threads}: at most {most} on a host of {n_cores} cores"
        );
        Err(ConfigError::Value { section: "run".to_owned(), problem })
    }

    /// The first key that differs from `earlier` and changes the results of the run, with its two
    /// values; `None` if the run can be resumed. Devices, threads, records, kept checkpoints and
    /// the last day may change.
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
        let value = |of: &BTreeMap<String, String>| {
            of.get(key).cloned().unwrap_or_else(|| "absent".to_owned())
        };
        Some(format!("`{key}` was {}, and is {} now", value(&then), value(&now)))
    }

    /// The name results are reported under.
    pub fn title(&self) -> String {
        // The item id may be among the features, and a star stands for all.
        let features = &self.data.features;
        let has_more = features.len() > 1 || features.iter().any(|name| name == ALL_FEATURES);
        let head = self.model.neural().map(Neural::head);
        let has_evidence = head.is_some_and(|head| head.evidence.is_some());
        let with = match (has_more, has_evidence) {
            (false, false) => "",
            (true, false) => " with side information",
            (false, true) => " with evidence",
            (true, true) => " with side information and evidence",
        };
        format!("{}{with}", self.model.title())
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
    if rounded.is_finite() && rounded >= least {
        Ok(())
    } else {
        Err(format!("`{key}` cannot be {value:?}"))
    }
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
    value
        .clone()
        .try_into()
        .map_err(|error: toml::de::Error| problem::find::<T>(name, &value, error.message()))
}

/// Where a text is not TOML, and why, on one line.
fn invalid_toml(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start);
    let before = text.get(..at).unwrap_or(text);
    let (line, start) =
        (before.matches('\n').count() + 1, before.rfind('\n').map_or(0, |end| end + 1));
    let column = before[start..].chars().count() + 1;
    ConfigError::Toml { path: path.to_owned(), line, column, problem: single_line(error.message()) }
}

/// `--set` with its assignment, as a message quotes it.
fn set_option(assignment: &str) -> String {
    quoted(&format!("--set {assignment}"))
}

fn nearest<'a>(key: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(key, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(similarity, _)| *similarity > 0.7)
        .map(|(_, candidate)| candidate.to_owned())
}

/// Applies `section.key=value`, where a key may have further dots; a value that is not TOML is
/// taken as a string. Returns the key.
fn assign<'a>(table: &mut Table, assignment: &'a str) -> Result<&'a str, ConfigError> {
    let malformed = || ConfigError::Set(assignment.to_owned());
    let (whole, value) = assignment.split_once('=').ok_or_else(malformed)?;
    let whole = whole.trim();
    let (path, key) = whole.rsplit_once('.').ok_or_else(malformed)?;
    if whole.split('.').any(str::is_empty) {
        return Err(malformed());
    }
    // A line break would begin another key.
    let parsed =
        format!("value = {value}").parse::<Table>().ok().filter(|parsed| parsed.len() == 1);
    let value = parsed
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    let mut inner = table;
    let mut end = 0;
    for part in path.split('.') {
        end += part.len();
        let entry = inner.entry(part.to_owned()).or_insert_with(|| Value::Table(Table::new()));
        let found = problem::describe(entry);
        inner = entry.as_table_mut().ok_or_else(|| ConfigError::Key {
            key: path[..end].to_owned(),
            problem: format!("is {found}, and {} sets a key in it", set_option(assignment)),
        })?;
        end += 1;
    }
    inner.insert(key.to_owned(), value);
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "[data]\nfirst_day = 1\nlast_day = 3\n[model]\nkind = \"gru\"\n";

    fn load(text: &str, assignments: &[&str]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        let assignments: Vec<String> = assignments.iter().map(|&text| text.to_owned()).collect();
        Config::load(&path, &assignments).map_err(|error| {
            bireme_base::message::chain(&error).replace(path.to_str().unwrap(), "c.toml")
        })
    }

    #[track_caller]
    fn refused(text: &str, assignments: &[&str]) -> String {
        load(text, assignments).unwrap_err()
    }

    #[test]
    fn a_value_of_another_type_is_named_with_its_key_and_what_it_may_be() {
        for (assignment, message) in [
            (
                "train.micro_batch=x",
                "`train.micro_batch` must be a whole number from 0 on, not the string `x`",
            ),
            (
                "train.micro_batch=-1",
                "`train.micro_batch` must be a whole number from 0 on, not the number -1",
            ),
            (
                "train.micro_batch=8.0",
                "`train.micro_batch` must be a whole number from 0 on, not the number 8.0",
            ),
            (
                "run.seed=99999999999999999999",
                "`run.seed` is too large for a 64-bit integer: `99999999999999999999`",
            ),
            ("train.learning_rate={a=1}", "`train.learning_rate` must be a number, not a table"),
            (
                "train.time_phases=1",
                "`train.time_phases` must be `true` or `false`, not the number 1",
            ),
            ("data.features=3", "`data.features` must be a list, not the number 3"),
            ("data.features=[3]", "`data.features` is a list with a value that is not a string"),
            ("run.device=gpu", "`run.device` cannot be `gpu`; it is one of `auto`, `cpu`, `cuda`"),
            ("run.device=3", "`run.device` must be one of `auto`, `cpu`, `cuda`, not the number 3"),
            ("run.device=[]", "`run.device` must be one of `auto`, `cpu`, `cuda`, not a list"),
            (
                "train.tables=3",
                "`train.tables` must be a table like `{ kind = \"adamw\" }` with one of `adamw`, \
                 `lazy_adamw`, `adagrad`, not the number 3",
            ),
            (
                "train.loss={kind=\"x\"}",
                "`train.loss.kind` cannot be `x`; it is one of `softmax`, `sampled`, \
                 `bpr_max`, `gbce`",
            ),
            ("train.loss={kind=\"sampled\"}", "`train.loss.n_negatives` is missing"),
            (
                "train.loss={}",
                "`train.loss.kind` is missing; it is one of `softmax`, `sampled`, `bpr_max`, \
                 `gbce`",
            ),
            (
                "train.loss={kind=\"sampled\", n_negatives=\"x\"}",
                "`train.loss.n_negatives` must be a whole number, not the string `x`",
            ),
            (
                "model.input.continuous.width=3",
                "`c.toml`: `model.input.continuous.kind` is missing; it is one of `raw`, \
                 `projected`, `soft_one_hot`",
            ),
            (
                "model.input.item_width=a",
                "`model.input.item_width` must be a whole number, not the string `a`",
            ),
            (
                "model.kind=lstm",
                "`model.kind` cannot be `lstm`; it is one of `gru`, `xlnet`, `popularity`, \
                 `recent`, `markov`, `vsknn`, `loglinear`",
            ),
            (
                "model.inptu.item_width=3",
                "unknown key `model.inptu` in the configuration: did you mean `model.input`?",
            ),
            (
                "model.input.item_with=3",
                "unknown key `model.input.item_with` in the configuration: did you mean \
                 `model.input.item_width`?",
            ),
            ("run..x=3", "`--set run..x=3` is not of the form `section.key=value`"),
            ("run=3", "`--set run=3` is not of the form `section.key=value`"),
            (
                "train.micro_batch=8\ntrain.x=3",
                "`train.micro_batch` must be a whole number from 0 on, not the string \
                 `8\\ntrain.x=3`",
            ),
            (
                "checkpoint.keep_best=loss",
                "`checkpoint.keep_best` cannot be `loss`; it is one of `ndcg_at_10`, `ndcg_at_20`, \
                 `recall_at_10`, `recall_at_20`, `mrr_at_20`",
            ),
        ] {
            assert_eq!(refused(LEAST, &[assignment]), message);
        }
        let text = format!("[run]\ndevice = \"cpu\"\n{LEAST}");
        assert_eq!(
            refused(&text, &["run.device.x=3"]),
            "`run.device` is the string `cpu`, and `--set run.device.x=3` sets a key in it"
        );
    }

    #[test]
    fn what_is_wrong_in_the_file_is_named_with_the_file() {
        for (text, message) in [
            ("model = 5\n", "`model` must be a table like"),
            ("[[model]]\n", "`model` must be a table like"),
            ("train = \"x\"\n", "`train` must be a table, not the string `x`"),
            ("[model]\nn_layers = 3\n", "`model.kind` is missing; it is one of `gru`"),
            (
                "[train]\nmicro_batch = \"a\"\nglobal_batch = \"a\"\n",
                "`train.global_batch` must be a whole number",
            ),
            (
                "[run]\ndevice = 1979-05-27\n",
                "`run.device` must be one of `auto`, `cpu`, `cuda`, not a date",
            ),
        ] {
            let lacking = if text.contains("model") {
                "[data]\nfirst_day = 1\nlast_day = 3\n"
            } else {
                LEAST
            };
            let refusal = refused(&format!("{text}{lacking}"), &[]);
            assert!(refusal.starts_with(&format!("`c.toml`: {message}")), "{refusal}");
        }
        let refusal = refused(&format!("{LEAST}[train]\nx = 1"), &["train.micro_batch=8"]);
        assert!(
            refusal.starts_with("`c.toml`: unknown key `train.x` in the configuration"),
            "{refusal}"
        );
    }

    #[test]
    fn what_is_not_toml_is_named_with_line_and_column() {
        for (text, place) in [
            ("[run\n", "line 1, column 5: "),
            ("[run]\nseed = \n", "line 2, column 8: "),
            ("# größer\n[run]\nseed 1\n", "line 3, column 6: "),
            ("[run]\nseed = 1\nseed = 2\n", "line 3, column 1: duplicate key"),
        ] {
            let refusal = refused(text, &[]);
            assert!(
                refusal.starts_with(&format!("`c.toml` is not valid TOML: {place}")),
                "{refusal}"
            );
            assert!(!refusal.contains('\n'), "{refusal}");
        }
    }

    #[test]
    fn no_key_is_refused_in_words_of_serde() {
        let wrong = [
            "\"x\"",
            "-1",
            "1.5",
            "true",
            "[\"x\"]",
            "[{}]",
            "{ a = 1 }",
            "{ kind = 1 }",
            "{ kind = \"x\" }",
            "1979-05-27",
        ];
        let of_serde = [
            "invalid", "struct", "enum", "usize", "u64", "i64", "f64", "variant", "sequence",
            "map", "expected",
        ];
        for kind in ["gru", "xlnet", "vsknn"] {
            let config = load(LEAST, &[&format!("model.kind={kind}")]).unwrap();
            let text = config.to_toml();
            let mut keys = BTreeMap::new();
            flatten("", &Value::try_from(&config).unwrap(), &mut keys);
            let optional = [
                "train.max_steps_per_day",
                "train.logits_mib",
                "checkpoint.keep_best",
                "train.non_finite",
            ];
            for key in keys.keys().map(String::as_str).chain(optional) {
                for value in wrong {
                    let Err(refusal) = load(&text, &[&format!("{key}={value}")]) else { continue };
                    let last = key.rsplit('.').next().unwrap();
                    assert!(
                        refusal.contains(last) || refusal.contains(key),
                        "{key}={value}: {refusal}"
                    );
                    let words: Vec<&str> = refusal.split(|c: char| !c.is_alphanumeric()).collect();
                    assert!(
                        !of_serde.iter().any(|word| words.contains(word)),
                        "{key}={value}: {refusal}"
                    );
                    assert!(refusal.chars().count() <= 300, "{refusal}");
                }
            }
        }
    }
}
