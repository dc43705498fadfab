//! Baselines, which count items instead of learning by gradients.

use std::ops::ControlFlow;

use tch::Tensor;

use super::{Day, Learner, TrainError};
use crate::checkpoint::{SharedCheckpoint, Tensors};
use crate::model::{CountingModel, Recommender};

/// A baseline that adds the counts of each day.
///
/// Every rank reads every session in file order: V-SkNN needs them all on every rank, and counting
/// takes less time than an evaluation. The counts are then the same on any number of ranks without
/// communication.
pub(super) struct BaselineLearner<M>(pub(super) M);

impl<M: CountingModel> Learner for BaselineLearner<M> {
    fn recommender(&self) -> &dyn Recommender {
        &self.0
    }

    /// Counts each session once, independent of `train.epochs_per_day` and `max_steps_per_day`.
    fn learn_day(&mut self, day: &mut Day<'_>) -> Result<ControlFlow<()>, TrainError> {
        self.0.add_day(day.plan.day, day.plan.window.today())?;
        Ok(ControlFlow::Continue(()))
    }

    fn tensors(&self) -> Tensors {
        Tensors { weights: self.0.tensors(), optimizer: Vec::new() }
    }

    fn optimizer_steps(&self) -> i32 {
        0
    }

    fn load_weights(&mut self, weights: &[(String, Tensor)]) -> Result<(), String> {
        self.0.load(weights)
    }

    fn resume(&mut self, from: &SharedCheckpoint<'_>) -> Result<(), TrainError> {
        let weights =
            from.weights().map(|saved| saved.map(|(name, tensor)| (name.to_owned(), tensor)));
        let weights = weights.collect::<Result<Vec<_>, _>>()?;
        Ok(self.load_weights(&weights).map_err(|problem| from.mismatch(problem))?)
    }
}
