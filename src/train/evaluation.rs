//! Evaluates a model on a day, records the metrics and writes the outcomes.

use std::path::Path;
use std::time::Instant;

use bireme_tools::report::evaluation_file::{self, EvaluationFacts};

use super::TrainError;
use crate::collective::Collective;
use crate::config::Config;
use crate::data::{Features, SessionFile, Split};
use crate::metrics::{Evaluation, evaluate};
use crate::model::{ItemTable, Recommender};
use crate::report::Record;
use crate::report::evaluations;

/// The data of an evaluation.
pub(super) struct EvaluationTask<'a> {
    pub file: &'a SessionFile,
    pub features: &'a Features,
    /// Occurrences of each item in training so far, `[V]`.
    pub occurrences: &'a [i64],
    /// Last day of the training.
    pub train_day: i64,
    pub eval_day: i64,
    pub split: Split,
}

impl EvaluationTask<'_> {
    /// *All ranks.* Returns the record of the log and the outcomes.
    pub fn evaluate(
        &self,
        recommender: &dyn Recommender,
        item_table: &ItemTable<'_>,
        config: &Config,
        collective: &dyn Collective,
    ) -> Result<(Record, Evaluation), TrainError> {
        let Self { file, features, occurrences, train_day, eval_day, split } = *self;
        let begun = Instant::now();
        let evaluation = evaluate(
            recommender,
            item_table,
            file,
            features,
            &config.evaluate,
            occurrences,
            collective,
        )?;
        let (metrics, coverage_at_20) = (evaluation.metrics.clone(), evaluation.coverage_at_20);
        let seconds = begun.elapsed().as_secs_f64();
        Ok((
            Record::Eval { train_day, eval_day, split, metrics, coverage_at_20, seconds },
            evaluation,
        ))
    }

    /// Writes the outcomes to the run directory, on rank 0.
    pub fn save(
        &self,
        run_dir: &Path,
        config: &Config,
        evaluation: &Evaluation,
        collective: &dyn Collective,
    ) -> Result<(), TrainError> {
        let Some(root) = collective.root() else { return Ok(()) };
        let &Self { train_day, eval_day, split, .. } = self;
        let finite = |value: f64| value.is_finite().then_some(value);
        let facts = EvaluationFacts {
            format: evaluation_file::FORMAT,
            title: config.title(),
            train_day,
            eval_day,
            split: split.name().to_owned(),
            loss: finite(evaluation.metrics.loss),
            coverage_at_20: finite(evaluation.coverage_at_20),
        };
        Ok(evaluations::write(root, run_dir, &facts, &evaluation.outcomes)?)
    }
}
