//! The files of a run, opened and checked before the first step.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::TrainError;
use crate::checkpoint::State;
use crate::collective::Collective;
use crate::config::{Config, StartConfig, TableLayout, TrainConfig};
use crate::data::plan::StepShape;
use crate::data::{
    Catalogue, DataError, Days, Features, N_CHECKED_AT_START, Pretrained, RowCheck, SessionFile,
    Split, Window,
};
use crate::model::ItemTable;

/// The data of a run.
pub struct Dataset {
    pub(super) features: Features,
    /// Attributes of all items, if there is such a file.
    pub(super) catalogue: Option<Catalogue>,
    /// Vectors that items begin with, if the configuration names a file.
    pub(super) pretrained: Option<Pretrained>,
    pub(super) days: Vec<TrainingDay>,
    /// All files of `days`, each once, in reading order.
    pub(super) files: Vec<Arc<SessionFile>>,
    /// Fingerprint of each file, by day and split.
    pub(super) fingerprints: BTreeMap<String, String>,
}

/// The files of a training day.
pub(super) struct TrainingDay {
    pub day: i64,
    /// Train files of the day and of the days before it that are trained on again.
    pub window: Window,
    /// Valid file of the next day.
    pub valid: Arc<SessionFile>,
}

impl Dataset {
    /// Opens every file that the run will read, so that missing files are reported before the first
    /// step.
    ///
    /// # Errors
    /// A day is missing, a file cannot be read, a feature is unknown, the features do not fit the
    /// model, or there are more ranks than micro-batches, shards or sessions.
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
                "the {n_micro_batches} micro-batches of a global batch: lower `train.micro_batch` \
                 or start fewer ranks"
            );
            return Err(DataError::TooManyRanks { world_size, limit }.into());
        }
        let mut train_files = Vec::new();
        let mut training_days = Vec::new();
        let mut fingerprints = BTreeMap::new();
        let mut files = Vec::new();
        let mut open = |day, split: Split| {
            let file = Arc::new(days.file(day, split)?);
            fingerprints.insert(format!("{day}/{}", split.name()), file.fingerprint()?);
            files.push(Arc::clone(&file));
            Ok::<_, DataError>(file)
        };
        let day_numbers = config.data.training_days();
        for day in day_numbers.clone() {
            train_files.push(open(day, Split::Train)?);
            let first = train_files.len().saturating_sub(config.data.window_days);
            let window = Window::new(train_files[first..].to_vec());
            training_days.push(TrainingDay { day, window, valid: open(day + 1, Split::Valid)? });
        }
        check_shards(config, n_items, world_size)?;
        let n_sessions: usize = train_files.iter().map(|file| file.n_sessions()).sum();
        if world_size > n_sessions {
            let limit = format!(
                "the {n_sessions} training sessions of days {} to {}",
                day_numbers.start,
                day_numbers.end - 1
            );
            return Err(DataError::TooManyRanks { world_size, limit }.into());
        }
        let features = days.features().clone();
        let reads_catalogue =
            config.model.neural().is_some_and(|model| model.input().content.is_some());
        let catalogue = if reads_catalogue { Catalogue::open(dir, &features)? } else { None };
        let start = config.model.neural().and_then(|model| model.input().start.as_ref());
        let pretrained = match start {
            Some(StartConfig::File { path, .. }) => Some(Pretrained::read(path, &features)?),
            _ => None,
        };
        Ok(Self { features, catalogue, pretrained, days: training_days, files, fingerprints })
    }

    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Number of sessions in all files.
    pub fn n_sessions(&self) -> usize {
        self.files.iter().map(|file| file.n_sessions()).sum()
    }

    /// Starts checking all rows: see [`RowCheck`].
    ///
    /// # Errors
    /// A file cannot be read, or a row is invalid.
    pub fn check_rows(
        &self,
        ranks: (usize, usize),
        n_threads: usize,
    ) -> Result<RowCheck, TrainError> {
        Ok(RowCheck::begin(&self.files, ranks, n_threads, N_CHECKED_AT_START)?)
    }

    /// Size of the catalogue `V`.
    pub fn n_items(&self) -> i64 {
        self.features.n_items()
    }

    /// Descriptions of the schema's parts that this version does not know.
    pub fn warnings(&self) -> &[String] {
        self.features.warnings()
    }

    /// *All ranks.* Checks that all ranks see the same files.
    ///
    /// # Errors
    /// Returns the first rank whose files differ from those of rank 0.
    pub fn compare_ranks(&self, collective: &dyn Collective) -> Result<(), TrainError> {
        let own = serde_json::to_vec(&self.fingerprints).expect("texts are JSON");
        let all = collective.gather_bytes(&own)?;
        match all.iter().position(|other| *other != all[0]) {
            Some(rank) => Err(TrainError::OtherData { rank }),
            None => Ok(()),
        }
    }

    /// Returns a file (day and split) that has changed since a checkpoint was written, if any.
    pub fn changed_since<'s>(&self, state: &'s State) -> Option<&'s str> {
        let has_changed = |file: &String, saved: &String| {
            self.fingerprints.get(file).is_some_and(|fingerprint| fingerprint != saved)
        };
        let changed = state.data.iter().find(|&(file, saved)| has_changed(file, saved));
        changed.map(|(file, _)| file.as_str())
    }
}

/// Checks that every rank gets rows of the item table, if it is sharded.
pub(super) fn check_shards(
    config: &Config,
    n_items: i64,
    world_size: usize,
) -> Result<(), DataError> {
    let is_sharded =
        config.parallel.item_table == TableLayout::Sharded && config.model.neural().is_some();
    let n_shards = ItemTable::max_shards(n_items);
    if is_sharded && world_size > n_shards {
        let limit =
            format!("the largest number of shards, {n_shards}, of an item table of {n_items} rows");
        return Err(DataError::TooManyRanks { world_size, limit });
    }
    Ok(())
}

pub(super) fn step_shape(config: &TrainConfig) -> StepShape {
    StepShape {
        n_streams: config.global_batch / config.micro_batch,
        micro_batch: config.micro_batch,
    }
}
