//! Opens a trained run for an evaluation.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::dataset::check_shards;
use super::evaluation::EvaluationTask;
use super::{Learner, RankContext, TrainError, item_table, learner};
use crate::checkpoint::{Checkpoint, CheckpointError, Checkpoints};
use crate::collective::Collective;
use crate::config::Config;
use crate::data::{Days, Features, N_CHECKED_AT_START, RowCheck, SessionFile, Split};
use crate::device::memory::set_phase;
use crate::model::{ItemTable, Recommender};
use crate::report::Record;
use crate::report::evaluations;

/// The newest checkpoint of a run, and the file to evaluate it on.
pub struct TrainedRun<'a> {
    learner: Box<dyn Learner + 'a>,
    /// The exported model that is evaluated instead of the learner.
    exported: Option<Box<dyn Recommender>>,
    skipped: Vec<String>,
    features: Features,
    file: Arc<SessionFile>,
    occurrences: Vec<i64>,
    train_day: i64,
    eval_day: i64,
    split: Split,
}

impl<'a> TrainedRun<'a> {
    /// Opens the newest checkpoint and a split of `day`; the day defaults to the one after the last
    /// training day.
    ///
    /// # Errors
    /// No checkpoint is complete, it has another catalogue, or [`Days::file`] fails.
    pub fn open(
        run_dir: &Path,
        data_dir: &Path,
        config: &Config,
        (day, split): (Option<i64>, Split),
        place: RankContext<'a>,
    ) -> Result<Self, TrainError> {
        let days = Days::open(data_dir, &config.data)?;
        let (checkpoint, skipped) = Checkpoints::of(run_dir).newest()?;
        checkpoint.check_items(days.features().n_items())?;
        let Checkpoint { state, tensors, path, occurrences } = checkpoint;
        let train_day = state.position.day;
        let eval_day = day.unwrap_or(train_day + 1);
        let file = Arc::new(days.file(eval_day, split)?);
        let ranks = (place.collective.rank(), place.collective.world_size());
        RowCheck::begin(std::slice::from_ref(&file), ranks, 1, N_CHECKED_AT_START)?;
        set_phase("setting the model up");
        let n_items = days.features().n_items();
        check_shards(config, n_items, place.collective.world_size())?;
        let item_table = item_table(config, n_items, place.collective);
        let mut learner = learner(config, days.features(), place, item_table)?;
        let mismatch = |problem| CheckpointError::Mismatch { path: path.clone(), problem };
        learner.load_weights(&tensors.weights).map_err(mismatch)?;
        let features = days.features().clone();
        Ok(Self {
            learner,
            exported: None,
            skipped,
            features,
            file,
            occurrences,
            train_day,
            eval_day,
            split,
        })
    }

    /// Rows of the catalogue `V`.
    pub fn n_items(&self) -> i64 {
        self.features.n_items()
    }

    /// Evaluates `recommender`, a model of the same catalogue, instead of the checkpoint.
    #[must_use]
    pub fn with_recommender(self, recommender: Box<dyn Recommender>) -> Self {
        Self { exported: Some(recommender), ..self }
    }

    /// The problems of newer, incomplete checkpoints.
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// Path of the outcomes that [`TrainedRun::evaluate`] writes with `save`.
    pub fn evaluation_file(&self, run_dir: &Path) -> PathBuf {
        evaluations::path(run_dir, self.eval_day, self.split)
    }

    /// *All ranks.* Evaluates, and writes the outcomes to the run directory `save`, if given.
    ///
    /// # Errors
    /// The evaluation fails, or the outcomes cannot be written.
    pub fn evaluate(
        &self,
        config: &Config,
        save: Option<&Path>,
        collective: &dyn Collective,
    ) -> Result<Record, TrainError> {
        let Self { ref file, ref features, ref occurrences, train_day, eval_day, split, .. } =
            *self;
        let task = EvaluationTask { file, features, occurrences, train_day, eval_day, split };
        let (recommender, item_table): (&dyn Recommender, _) = match &self.exported {
            Some(exported) => (&**exported, ItemTable::replicated(exported.n_items())),
            None => (self.learner.recommender(), self.learner.item_table()),
        };
        let (record, evaluation) = task.evaluate(recommender, &item_table, config, collective)?;
        if let Some(run_dir) = save {
            task.save(run_dir, config, &evaluation, collective)?;
        }
        Ok(record)
    }
}
