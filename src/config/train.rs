//! Sections `[train]` and `[parallel]`, and `run.reduction`.

pub use bireme_tools::scaling::TableLayout;
use serde::{Deserialize, Serialize};

use super::{check_count, check_finite};

/// Section `[train]`: steps, optimizers and the loss. Ignored by baselines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Passes over the training window of each day; at least 1.
    pub epochs_per_day: usize,
    /// Sessions of a step, over all ranks; a multiple of `micro_batch`.
    pub global_batch: usize,
    /// Sessions of a micro-batch. Ranks divide the global batch by whole micro-batches, each of
    /// which has sessions of all lengths, so that ranks have about equal work.
    pub micro_batch: usize,
    /// Learning rate of AdamW at the start of each day.
    pub learning_rate: f64,
    /// The loss of a target.
    pub loss: LossConfig,
    /// Optimizer of the embedding tables.
    pub tables: TableOptimizer,
    /// Order of the sessions of a day.
    pub order: SessionOrder,
    /// Course of the learning rates over a day.
    pub schedule: Schedule,
    /// Decoupled weight decay of AdamW.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm, taken over all parameters.
    pub clip_norm: f64,
    /// Limit of the steps of a day, at least 1; absent: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps_per_day: Option<usize>,
    /// Reaction to a step whose loss or gradient is NaN or infinite.
    pub non_finite: NonFinite,
    /// Steps between two `step` records in `metrics.jsonl`; at least 1.
    pub log_every_steps: usize,
    /// Whether `phases` records are written too. A GPU is then synchronised between phases, which
    /// takes time.
    pub time_phases: bool,
    /// Memory for the logits of the softmax, in MiB, whatever the size of the catalogue. Absent:
    /// 192 on a CPU, 1024 on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits_mib: Option<usize>,
}

/// Largest number of micro-batches in a global batch. Each reads its own part of a day's file.
const MAX_MICRO_BATCHES: usize = 1 << 16;

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs_per_day: 3,
            global_batch: 256,
            micro_batch: 32,
            learning_rate: 7.1e-4,
            loss: LossConfig::default(),
            tables: TableOptimizer::default(),
            order: SessionOrder::default(),
            schedule: Schedule::default(),
            weight_decay: 0.0,
            clip_norm: 1.0,
            max_steps_per_day: None,
            non_finite: NonFinite::default(),
            log_every_steps: 10,
            time_phases: false,
            logits_mib: None,
        }
    }
}

/// `train.non_finite`: the reaction to a step whose loss or gradient is NaN or infinite, the same
/// on all ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum NonFinite {
    /// End the run. On a GPU it is noticed at the next record.
    #[default]
    Stop,
    /// Skip the step and count it. On a GPU the host then waits for every step.
    Skip {
        /// Skipped steps after which the run ends.
        limit: usize,
    },
}

/// Section `[parallel]`: what is divided among ranks besides the sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// Placement of the item table, its gradient and its optimizer state.
    #[cfg_attr(test, schemars(schema_with = "super::page::table_layouts"))]
    pub item_table: TableLayout,
}

impl TrainConfig {
    /// Checks the ranges of values.
    ///
    /// # Errors
    /// Names the first key with an invalid value.
    pub fn check(&self) -> Result<(), String> {
        let positive = [
            ("epochs_per_day", self.epochs_per_day, 1 << 20),
            ("micro_batch", self.micro_batch, 1 << 20),
            ("global_batch", self.global_batch, usize::MAX),
            ("log_every_steps", self.log_every_steps, usize::MAX),
            ("logits_mib", self.logits_mib.unwrap_or(1), 1 << 24),
            ("max_steps_per_day", self.max_steps_per_day.unwrap_or(1), usize::MAX),
        ];
        positive.into_iter().try_for_each(|(key, value, most)| check_count(key, value, most))?;
        if !self.global_batch.is_multiple_of(self.micro_batch) {
            return Err(format!(
                "`global_batch` {} is not a whole number of micro-batches of {} (`micro_batch`)",
                self.global_batch, self.micro_batch
            ));
        }
        let n_micro_batches = self.global_batch / self.micro_batch;
        if n_micro_batches > MAX_MICRO_BATCHES {
            return Err(format!(
                "`global_batch` {} is {n_micro_batches} micro-batches of `micro_batch` {}: at most \
                 {MAX_MICRO_BATCHES}",
                self.global_batch, self.micro_batch
            ));
        }
        self.loss.check()?;
        let (of_tables, momentum) = match self.tables {
            TableOptimizer::Adamw | TableOptimizer::LazyAdamw => (0.0, 0.0),
            TableOptimizer::Adagrad { learning_rate, momentum } => (learning_rate, momentum),
        };
        if !(0.0..1.0).contains(&momentum) {
            return Err(format!("`tables.momentum` {momentum:?} is not within 0 <= p < 1"));
        }
        let finite = [
            ("learning_rate", self.learning_rate),
            ("tables.learning_rate", of_tables),
            ("weight_decay", self.weight_decay),
            ("clip_norm", self.clip_norm),
        ];
        finite.into_iter().try_for_each(|(key, value)| check_finite(key, value, 0.0))
    }
}

/// `run.reduction`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// Sums in f32, all micro-batches of a rank in one pass. Results depend on the number of ranks
    /// by rounding: about 1e-7 at first, which training amplifies.
    Fast,
    /// As `fast`, but gradients are sent as bfloat16: half the bytes, sums to three digits. For
    /// slow networks. Gradients of sharded tables are not sent at all.
    Bf16,
    /// Fixed-point sums, one pass for each micro-batch: bitwise equal weights on any number of
    /// CPU ranks with equally many threads.
    Reproducible,
}

/// `train.loss`: the loss of a target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LossConfig {
    /// Full softmax: cross entropy over the whole catalogue.
    Softmax {
        /// Share of the target's probability that is spread evenly over the catalogue (Szegedy et
        /// al. 2016); 0 <= share < 1.
        #[serde(default)]
        label_smoothing: f64,
    },
    /// Sampled softmax: cross entropy over the target and negatives sampled by popularity, with
    /// logQ correction (Bengio and Senécal 2008). All targets of a step share the negatives.
    Sampled {
        /// Negatives of a step; at least 1, at most the catalogue.
        n_negatives: i64,
        /// An item with n occurrences is sampled in proportion to `(n + 1)^power`; -10 to 10.
        #[serde(default = "default_power")]
        power: f64,
        /// Share of the samples that are drawn uniformly instead; 0 <= share <= 1.
        #[serde(default)]
        uniform_share: f64,
        /// Share of the target's probability that is spread evenly over the target and the
        /// negatives; 0 <= share < 1.
        #[serde(default)]
        label_smoothing: f64,
        /// Whether the targets of the other sessions of a micro-batch are negatives, too.
        #[serde(default)]
        in_batch: bool,
    },
    /// BPR-max (Hidasi and Karatzoglou 2018): the probability that the target scores above the
    /// negatives, each weighed by its softmax among them. All targets of a step share the
    /// negatives.
    BprMax {
        /// Negatives of a step; at least 1, at most the catalogue.
        n_negatives: i64,
        /// An item with n occurrences is sampled in proportion to `(n + 1)^power`; -10 to 10.
        #[serde(default = "default_power")]
        power: f64,
        /// Share of the samples that are drawn uniformly instead; 0 <= share <= 1.
        #[serde(default)]
        uniform_share: f64,
        /// Weight of the squared scores of negatives, each weighed by its softmax among them; 0 or
        /// more.
        #[serde(default = "default_score_penalty")]
        score_penalty: f64,
        /// Whether the targets of the other sessions of a micro-batch are negatives, too.
        #[serde(default)]
        in_batch: bool,
    },
    /// gBCE (Petrov and Macdonald 2023, gSASRec): binary cross entropy of the target and of
    /// uniformly sampled negatives, calibrated for the sampling rate. All targets of a step share
    /// the negatives.
    Gbce {
        /// Negatives of a step; at least 1, at most the catalogue.
        n_negatives: i64,
        /// From 0, plain binary cross entropy, to 1, probabilities as if no item were left out.
        #[serde(default = "default_calibration")]
        calibration: f64,
    },
}

fn default_calibration() -> f64 {
    0.75
}

fn default_score_penalty() -> f64 {
    1.0
}

fn default_power() -> f64 {
    0.75
}

impl Default for LossConfig {
    fn default() -> Self {
        Self::Softmax { label_smoothing: 0.0 }
    }
}

impl LossConfig {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Says which key is wrong.
    pub fn check(&self) -> Result<(), String> {
        if let Some(n_negatives) = self.n_negatives()
            && n_negatives < 1
        {
            return Err(format!("`loss.n_negatives` cannot be {n_negatives}"));
        }
        match *self {
            Self::Softmax { label_smoothing } | Self::Sampled { label_smoothing, .. }
                if !(0.0..1.0).contains(&label_smoothing) =>
            {
                Err(format!(
                    "`loss.label_smoothing` {label_smoothing:?} is not within 0 <= share < 1"
                ))
            }
            // Beyond, a power of an occurrence is infinite or 0.
            Self::Sampled { power, .. } | Self::BprMax { power, .. }
                if !(-10.0..=10.0).contains(&power) =>
            {
                Err(format!("`loss.power` cannot be {power:?}"))
            }
            Self::Sampled { uniform_share, .. } | Self::BprMax { uniform_share, .. }
                if !(0.0..=1.0).contains(&uniform_share) =>
            {
                Err(format!("`loss.uniform_share` {uniform_share:?} is not within 0 to 1"))
            }
            Self::BprMax { score_penalty, .. } => {
                check_finite("loss.score_penalty", score_penalty, 0.0)
            }
            Self::Gbce { calibration, .. } if !(0.0..=1.0).contains(&calibration) => {
                Err(format!("`loss.calibration` {calibration:?} is not within 0 to 1"))
            }
            _ => Ok(()),
        }
    }

    /// `None` for the full softmax.
    fn n_negatives(&self) -> Option<i64> {
        match *self {
            Self::Softmax { .. } => None,
            Self::Sampled { n_negatives, .. }
            | Self::BprMax { n_negatives, .. }
            | Self::Gbce { n_negatives, .. } => Some(n_negatives),
        }
    }

    /// Checks what depends on the rows of the item table.
    ///
    /// # Errors
    /// Says which key is wrong.
    pub fn check_items(&self, n_items: i64) -> Result<(), String> {
        let n_recommendable = (n_items - 2).max(0);
        match self.n_negatives() {
            Some(n_negatives) if n_negatives > n_recommendable => Err(format!(
                "`loss.n_negatives` {n_negatives} is more than the {n_recommendable} items of the \
                 catalogue"
            )),
            _ => Ok(()),
        }
    }
}

/// `train.tables`: the optimizer of embedding tables. All other parameters use AdamW.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TableOptimizer {
    /// AdamW (Loshchilov and Hutter 2019), as for all other parameters.
    #[default]
    Adamw,
    /// AdamW that leaves rows without a gradient, and their moments, unchanged (TensorFlow's
    /// LazyAdam). Results differ from `adamw`; saves time with sampled losses only, because a full
    /// softmax has gradients for every row.
    LazyAdamw,
    /// Adagrad (Duchi et al. 2011): the steps of a row shrink with its past gradients.
    Adagrad {
        /// Learning rate at the start of each day; it follows `train.schedule`.
        learning_rate: f64,
        /// Part of its last step that a row's next step repeats, as in GRU4Rec; 0 <= p < 1.
        #[serde(default)]
        momentum: f64,
    },
}

/// `train.order`: the order in which the sessions of a day are trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SessionOrder {
    /// Another random order in every epoch.
    #[default]
    Shuffled,
    /// That of the file, as GRU4Rec trains on sessions in order of time. Days of a window follow
    /// each other.
    File,
}

/// `train.schedule`: the course of the learning rate over a day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Falls linearly to zero.
    #[default]
    Linear,
    /// Stays constant.
    Constant,
}

impl Schedule {
    /// Factor of the learning rate at step `step` (from 0) of `n_steps`.
    pub fn factor(self, step: usize, n_steps: usize) -> f64 {
        match self {
            Schedule::Linear => (n_steps - step) as f64 / n_steps as f64,
            Schedule::Constant => 1.0,
        }
    }
}
