//! The data of a run, opened and checked before the first step.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::TrainError;
use crate::checkpoint::State;
use crate::collective::Collective;
use crate::config::{Config, TableLayout, TrainConfig};
use crate::data::plan::StepShape;
use crate::data::{AT_THE_START, DataError, Days, Features, RowCheck, SessionFile, Split, Window};
use crate::model::ItemTable;

/// The data of a run, opened and checked.
pub struct Dataset {
    pub(super) features: Features,
    /// (day, the train files up to it, the next day's valid file).
    pub(super) days: Vec<(i64, Window, Arc<SessionFile>)>,
    /// Each of these files once, in the order in which they are read.
    pub(super) files: Vec<Arc<SessionFile>>,
    /// What each of these files is, by day and part.
    pub(super) fingerprints: BTreeMap<String, String>,
}

impl Dataset {
    /// Opens every file that the run will read, so that what is missing is known before the first step.
    ///
    /// # Errors
    /// A missing day, unreadable file, unknown feature, features that do not suit the model, or more ranks than there
    /// is work for.
    pub fn open(dir: &Path, config: &Config, world_size: usize) -> Result<Self, TrainError> {
        let days = Days::open(dir, &config.data)?;
        config.model.check_features(days.features()).map_err(TrainError::Model)?;
        let n_items = days.features().n_items();
        if config.model.neural().is_some() {
            config.train.loss.check_items(n_items).map_err(TrainError::Loss)?;
        }
        let n_micro_batches = step_shape(&config.train).n_streams;
        if world_size > n_micro_batches {
            let limit = format!(
                "the {n_micro_batches} micro-batches of a global batch: lower `train.micro_batch` or start fewer ranks"
            );
            return Err(DataError::TooManyRanks { world_size, limit }.into());
        }
        let mut trained = Vec::new();
        let mut steps = Vec::new();
        let mut fingerprints = BTreeMap::new();
        let mut files = Vec::new();
        let mut open = |day, split: Split| {
            let file = Arc::new(days.file(day, split)?);
            fingerprints.insert(format!("{day}/{}", split.name()), file.fingerprint()?);
            files.push(Arc::clone(&file));
            Ok::<_, DataError>(file)
        };
        let training_days = config.data.training_days();
        for day in training_days.clone() {
            trained.push(open(day, Split::Train)?);
            let window = trained[trained.len().saturating_sub(config.data.window_days)..].to_vec();
            steps.push((day, Window::new(window), open(day + 1, Split::Valid)?));
        }
        check_shards(config, n_items, world_size)?;
        let n_sessions: usize = trained.iter().map(|file| file.n_sessions()).sum();
        if world_size > n_sessions {
            let limit = format!(
                "the {n_sessions} training sessions of days {} to {}",
                training_days.start,
                training_days.end - 1
            );
            return Err(DataError::TooManyRanks { world_size, limit }.into());
        }
        Ok(Self { features: days.features().clone(), days: steps, files, fingerprints })
    }

    /// The columns that are read.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Sessions of all files.
    pub fn n_sessions(&self) -> usize {
        self.files.iter().map(|file| file.n_sessions()).sum()
    }

    /// Begins to check all rows: see [`RowCheck`].
    ///
    /// # Errors
    /// Names the first row that no model can use.
    pub fn check_rows(&self, ranks: (usize, usize), n_threads: usize) -> Result<RowCheck, TrainError> {
        Ok(RowCheck::begin(&self.files, ranks, n_threads, AT_THE_START)?)
    }

    /// Rows of the catalogue `V`.
    pub fn n_items(&self) -> i64 {
        self.features.n_items()
    }

    /// What the schema holds that this version does not know.
    pub fn warnings(&self) -> &[String] {
        self.features.warnings()
    }

    /// *All ranks.* Whether all of them see the same data.
    ///
    /// # Errors
    /// Names the first rank that sees other data than rank 0.
    pub fn compare_ranks(&self, collective: &dyn Collective) -> Result<(), TrainError> {
        let mine = serde_json::to_vec(&self.fingerprints).expect("texts are JSON");
        let all = collective.gather_bytes(&mine)?;
        match all.iter().position(|other| *other != all[0]) {
            Some(rank) => Err(TrainError::OtherData { rank }),
            None => Ok(()),
        }
    }

    /// A file that is another than when a checkpoint was written, by day and part, if one is.
    pub fn changed_since<'s>(&self, state: &'s State) -> Option<&'s str> {
        let is_other =
            |(file, then): (&String, &String)| self.fingerprints.get(file).is_some_and(|now| now != then);
        let changed = state.data.iter().find(|&entry| is_other(entry));
        changed.map(|(file, _)| file.as_str())
    }
}

/// Whether every rank has rows of an item table of so many, if ranks share it out.
pub(super) fn check_shards(config: &Config, n_items: i64, world_size: usize) -> Result<(), DataError> {
    let is_sharded = config.parallel.item_table == TableLayout::Sharded && config.model.neural().is_some();
    let n_shards = ItemTable::max_shards(n_items);
    if is_sharded && world_size > n_shards {
        let limit = format!("the {n_shards} shards that an item table of {n_items} rows has at most");
        return Err(DataError::TooManyRanks { world_size, limit });
    }
    Ok(())
}

/// How the sessions of a step are divided into micro-batches.
pub(super) fn step_shape(config: &TrainConfig) -> StepShape {
    StepShape { n_streams: config.global_batch / config.micro_batch, micro_batch: config.micro_batch }
}
