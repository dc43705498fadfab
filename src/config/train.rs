//! Sections `[train]` and `[parallel]`, and `run.reduction`.

use serde::{Deserialize, Serialize};

use super::{LossConfig, Schedule, TableOptimizer, check_count, check_finite};

/// Section `[train]` of a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Epochs on each day.
    pub epochs_per_day: usize,
    /// Sessions of a step, over all ranks; a multiple of `micro_batch`.
    pub global_batch: usize,
    /// Sessions of a micro-batch. The ranks divide the micro-batches of a global batch.
    pub micro_batch: usize,
    /// Learning rate at the start of each day.
    pub learning_rate: f64,
    /// The loss and its negatives.
    pub loss: LossConfig,
    /// Optimizer of the embedding tables.
    pub tables: TableOptimizer,
    /// Schedule of the learning rate over a day.
    pub schedule: Schedule,
    /// Decoupled weight decay (AdamW).
    pub weight_decay: f64,
    /// Largest norm of the gradient; longer gradients are scaled down.
    pub clip_norm: f64,
    /// Largest number of steps a day; all if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps_per_day: Option<usize>,
    /// What to do with a step whose loss or gradient is not finite.
    pub non_finite: NonFinite,
    /// Steps between two records of the log.
    pub log_every_steps: usize,
    /// Record the time of each phase of a step. On a GPU this waits for the device after each phase.
    pub time_phases: bool,
    /// Memory for logits in MiB: the softmax is computed for as many targets at a time as fit. 192 on
    /// a CPU and 1024 on a GPU if absent.
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

/// `train.non_finite`: what to do with a step whose loss or gradient is NaN or infinite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum NonFinite {
    /// End the run. On a GPU the step is noticed at the next record.
    #[default]
    Stop,
    /// Skip the step. On a GPU this waits for the device after each step.
    Skip {
        /// Number of steps of a run that may be skipped before it ends.
        limit: usize,
    },
}

/// Section `[parallel]` of a configuration: what is divided over the ranks besides the sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// Layout of the item table.
    pub item_table: TableLayout,
}

/// `parallel.item_table`: where the item table, its gradient and its optimizer state are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TableLayout {
    /// Every rank holds all rows.
    #[default]
    Replicated,
    /// Each rank holds a shard of the rows: memory falls with the number of ranks, and the traffic of a
    /// step does not grow with the catalogue.
    Sharded,
}

impl TableLayout {
    /// As a configuration writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Replicated => "replicated",
            Self::Sharded => "sharded",
        }
    }
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
                "`global_batch` {} is {n_micro_batches} micro-batches of `micro_batch` {}: at most {MAX_MICRO_BATCHES}",
                self.global_batch, self.micro_batch
            ));
        }
        self.loss.check()?;
        let of_tables = match self.tables {
            TableOptimizer::Adamw | TableOptimizer::LazyAdamw => 0.0,
            TableOptimizer::Adagrad { learning_rate } => learning_rate,
        };
        let finite = [
            ("learning_rate", self.learning_rate),
            ("tables.learning_rate", of_tables),
            ("weight_decay", self.weight_decay),
            ("clip_norm", self.clip_norm),
        ];
        finite.into_iter().try_for_each(|(key, value)| check_finite(key, value, 0.0))
    }
}

/// `run.reduction`: how gradients are summed over micro-batches and ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// In f32, all micro-batches of a rank in one batch. Another number of ranks rounds differently, by
    /// about 1e-7 in the first step.
    Fast,
    /// As `fast`, with gradients sent as bf16: half the bytes, three significant digits. Gradients of
    /// sharded tables are not sent.
    Bf16,
    /// In fixed point, each micro-batch in a batch of its own: the same bits on any number of ranks
    /// with equally many threads each.
    Reproducible,
}
