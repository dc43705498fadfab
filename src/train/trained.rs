//! Models that have been trained: evaluated, read from a run, taken from elsewhere.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tch::Device;

use super::{Learner, Place, TrainError, check_shares, learner, weights_file};
use crate::checkpoint::{Checkpoint, CheckpointError, Checkpoints, Position, State, Tensors};
use crate::collective::{Collective, Root};
use crate::config;
use crate::data::{AT_THE_START, Days, Features, RowCheck, SessionFile, Split, occurrences};
use crate::device::memory::set_phase;
use crate::export::ScriptedModel;
use crate::metrics::{Evaluation, evaluate};
use crate::model::{Recommender, Share, import};
use crate::report::Record;
use crate::report::evaluations::{self, Facts};

/// What a model is evaluated on, and after what.
pub(super) struct EvaluationTask<'a> {
    pub file: &'a SessionFile,
    pub features: &'a Features,
    /// Of each item in training so far, `[V]`.
    pub occurrences: &'a [i64],
    pub train_day: i64,
    pub eval_day: i64,
    pub split: Split,
}

impl EvaluationTask<'_> {
    /// *All ranks.*
    pub fn evaluate(
        &self,
        recommender: &dyn Recommender,
        config: &config::Config,
        collective: &dyn Collective,
    ) -> Result<(Record, Evaluation), TrainError> {
        let Self { file, features, occurrences, train_day, eval_day, split } = *self;
        let begun = Instant::now();
        let evaluation = evaluate(recommender, file, features, &config.evaluate, occurrences, collective)?;
        let (metrics, coverage_at_20) = (evaluation.metrics.clone(), evaluation.coverage_at_20);
        let seconds = begun.elapsed().as_secs_f64();
        Ok((Record::Eval { train_day, eval_day, split, metrics, coverage_at_20, seconds }, evaluation))
    }

    /// Leaves the outcomes in the run directory, on rank 0.
    pub fn save(
        &self,
        run_dir: &Path,
        config: &config::Config,
        evaluation: &Evaluation,
        collective: &dyn Collective,
    ) -> Result<(), TrainError> {
        let Some(root) = collective.root() else { return Ok(()) };
        let &Self { train_day, eval_day, split, .. } = self;
        let facts = Facts::new(&config.title(), (train_day, eval_day, split), evaluation);
        Ok(evaluations::write(root, run_dir, &facts, &evaluation.outcomes)?)
    }
}

/// Weights that Transformers4Rec saved, as if a run had been trained to the end of a day.
pub struct ImportedWeights {
    state: State,
    tensors: Tensors,
    occurrences: Vec<i64>,
}

impl ImportedWeights {
    /// Reads `weights` for the model of `config`, last trained on `day` of the data in `data_dir`.
    ///
    /// # Errors
    /// A file that is no safetensors file, weights of another model or of other sizes, or what [`Days::open`] says.
    pub fn read(
        (weights, day): (&Path, i64),
        data_dir: &Path,
        config: &config::Config,
    ) -> Result<Self, TrainError> {
        let days = Days::open(data_dir, &config.data)?;
        let features = days.features();
        let original = weights_file::read(weights)?;
        set_phase("setting the model up");
        let mut learner = learner(config, features, Device::Cpu, Share::whole(features.n_items()))?;
        let names: Vec<String> = learner.tensors().weights.into_iter().map(|(name, _)| name).collect();
        let wanted = |name: &str| names.iter().any(|other| other == name);
        import::rename(original, &features.columns()[0].name, wanted)
            .and_then(|renamed| learner.load_weights(&renamed))
            .map_err(|problem| CheckpointError::Mismatch { path: weights.to_owned(), problem })?;
        let first_day = config.data.training_days().start;
        let mut occurred = vec![0; features.n_items() as usize];
        for trained in days.days().filter(|&trained| first_day <= trained && trained <= day) {
            let of_day = occurrences(&days.file(trained, Split::Train)?, features, (0, 1))?;
            occurred.iter_mut().zip(of_day).for_each(|(total, n)| *total += n);
        }
        let mut state = State::new(config, features.n_items(), BTreeMap::new());
        state.position = Position { day, ..Position::default() };
        Ok(Self { state, tensors: learner.tensors(), occurrences: occurred })
    }

    /// Writes them as a checkpoint of the run in `run_dir`.
    ///
    /// # Errors
    /// See [`Checkpoints::write`].
    pub fn write(&self, root: Root, run_dir: &Path) -> Result<(), CheckpointError> {
        Checkpoints::of(run_dir).write(root, &self.state, &self.tensors, &self.occurrences)
    }
}

/// The newest checkpoint of a run, and what it is to be evaluated on.
pub struct TrainedRun<'a> {
    learner: Box<dyn Learner + 'a>,
    /// What is evaluated in the learner's place.
    exported: Option<ScriptedModel>,
    skipped: Vec<String>,
    features: Features,
    file: Arc<SessionFile>,
    occurrences: Vec<i64>,
    train_day: i64,
    eval_day: i64,
    split: Split,
}

impl<'a> TrainedRun<'a> {
    /// Opens one part of `day`, or of the day after the last trained on.
    ///
    /// # Errors
    /// No complete checkpoint, one of another catalogue, or what [`Days::file`] says.
    pub fn open(
        run_dir: &Path,
        data_dir: &Path,
        config: &config::Config,
        (day, split): (Option<i64>, Split),
        place: Place<'a>,
    ) -> Result<Self, TrainError> {
        let days = Days::open(data_dir, &config.data)?;
        let (checkpoint, skipped) = Checkpoints::of(run_dir).newest()?;
        checkpoint.check_items(days.features().n_items())?;
        let Checkpoint { state, tensors, path, occurrences } = checkpoint;
        let train_day = state.position.day;
        let eval_day = day.unwrap_or(train_day + 1);
        let file = Arc::new(days.file(eval_day, split)?);
        let ranks = (place.collective.rank(), place.collective.world_size());
        RowCheck::begin(std::slice::from_ref(&file), ranks, 1, AT_THE_START)?;
        set_phase("setting the model up");
        let n_items = days.features().n_items();
        check_shares(config, n_items, place.collective.world_size())?;
        let share = config.parallel.share(n_items, config.run.reduction, place.collective);
        let mut learner = learner(config, days.features(), place.device, share)?;
        let mismatch = |problem| CheckpointError::Mismatch { path: path.clone(), problem };
        learner.load_weights(&tensors.weights).map_err(mismatch)?;
        let features = days.features().clone();
        Ok(Self { learner, exported: None, skipped, features, file, occurrences, train_day, eval_day, split })
    }

    /// Evaluates the newest version of the model `name` in a repository in place of the checkpoint.
    ///
    /// # Errors
    /// It cannot be loaded, or is of another catalogue.
    pub fn with_exported(
        mut self,
        repository: &Path,
        name: &str,
        device: Device,
    ) -> Result<Self, TrainError> {
        let n_items = self.features.n_items();
        let loaded = ScriptedModel::load(repository, name, n_items, device);
        let mismatch = |problem| CheckpointError::Mismatch { path: repository.to_owned(), problem };
        self.exported = Some(loaded.map_err(mismatch)?);
        Ok(self)
    }

    /// Newer checkpoints that are not whole, and what is wrong with each.
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// Where `save` of [`TrainedRun::evaluate`] leaves the outcomes.
    pub fn evaluation_file(&self, run_dir: &Path) -> PathBuf {
        evaluations::path(run_dir, self.eval_day, self.split)
    }

    /// *All ranks.* Evaluates, and leaves the outcomes in the run directory `save`, if given.
    ///
    /// # Errors
    /// See [`evaluate`].
    pub fn evaluate(
        &self,
        config: &config::Config,
        save: Option<&Path>,
        collective: &dyn Collective,
    ) -> Result<Record, TrainError> {
        let Self { ref file, ref features, ref occurrences, train_day, eval_day, split, .. } = *self;
        let task = EvaluationTask { file, features, occurrences, train_day, eval_day, split };
        let exported = self.exported.as_ref().map(|exported| exported as &dyn Recommender);
        let recommender = exported.unwrap_or_else(|| self.learner.recommender());
        let (record, evaluation) = task.evaluate(recommender, config, collective)?;
        if let Some(run_dir) = save {
            task.save(run_dir, config, &evaluation, collective)?;
        }
        Ok(record)
    }
}
