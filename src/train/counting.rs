//! Learning by counting, over the same days.

use std::ops::ControlFlow;

use tch::Tensor;

use super::{Day, Learner, TrainError};
use crate::checkpoint::{Shared, Tensors};
use crate::model::{Counts, Recommender};

/// Counts that grow day by day.
///
/// Every rank reads every session, in file order: neighbours need all of them on every rank, the others' counts
/// take less time than one evaluation, and what is learnt is the same on any number of ranks without a word
/// between them.
pub(super) struct CountLearner(pub(super) Counts);

impl Learner for CountLearner {
    fn recommender(&self) -> &dyn Recommender {
        &self.0
    }

    /// Each session counts once, whatever the epochs and steps of the configuration.
    fn learn_day(&mut self, day: &mut Day<'_>) -> Result<ControlFlow<()>, TrainError> {
        let file = day.plan.window.today();
        let sessions = file.read(&file.spans(0..file.n_sessions()))?;
        self.0.add_day((0..sessions.len()).map(|row| sessions.ids(0, row)));
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

    fn go_on(&mut self, from: &Shared<'_>) -> Result<(), TrainError> {
        let weights = from.weights().map(|saved| saved.map(|(name, tensor)| (name.to_owned(), tensor)));
        let weights = weights.collect::<Result<Vec<_>, _>>()?;
        Ok(self.load_weights(&weights).map_err(|problem| from.mismatch(problem))?)
    }
}
