//! Training: trains on day t and evaluates on day t + 1.

mod baseline;
mod dataset;
mod day;
mod error;
mod evaluation;
mod fault;
mod fit;
mod gradient;
mod gradient_sync;
mod import;
mod memory;
mod signals;
mod step_graph;
mod trained;
mod weights_file;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use tch::{Device, Tensor};

use crate::checkpoint::{SharedCheckpoint, Tensors};
use crate::collective::Collective;
use crate::config::{Config, Reduction, TableLayout};
use crate::data::Features;
use crate::model::{
    Baseline, BaselineKind, ItemTable, LogLinear, ModelConfig, Neighbours, Neural, Recommender,
};

use baseline::BaselineLearner;
pub use dataset::Dataset;
use day::Day;
pub use error::TrainError;
pub use fit::{Ended, Training};
use gradient::GradientLearner;
pub use import::ImportedWeights;
pub use memory::{NotEnoughMemory, Purpose, check_memory};
pub use signals::Signals;
pub use trained::TrainedRun;
pub use weights_file::WeightsError;

/// A model that is trained day by day.
trait Learner {
    fn recommender(&self) -> &dyn Recommender;

    /// The item table of the recommender.
    fn item_table(&self) -> ItemTable<'_> {
        ItemTable::replicated(self.recommender().n_items())
    }

    /// *All ranks.* Trains on the remaining steps of a day; breaks if a stop was requested.
    fn learn_day(&mut self, day: &mut Day<'_>) -> Result<ControlFlow<()>, TrainError>;

    /// The state that a checkpoint holds.
    fn tensors(&self) -> Tensors;

    /// Steps of the optimizer.
    fn optimizer_steps(&self) -> i32;

    /// Loads the weights that [`Learner::tensors`] of another run returned; the error names the
    /// tensor that does not fit.
    fn load_weights(&mut self, weights: &[(String, Tensor)]) -> Result<(), String>;

    /// *All ranks.* Loads weights and optimizer state.
    fn resume(&mut self, from: &SharedCheckpoint<'_>) -> Result<(), TrainError>;
}

fn learner<'a>(
    config: &Config,
    features: &Features,
    place: RankContext<'a>,
    item_table: ItemTable<'a>,
) -> Result<Box<dyn Learner + 'a>, TrainError> {
    let neural = |model: Neural<'_>| {
        let learner = GradientLearner::new(&model, config, features, place, item_table);
        learner.map(|learner| Box::new(learner) as Box<dyn Learner + 'a>).map_err(TrainError::Model)
    };
    let n_items = features.n_items();
    let kind = match &config.model {
        ModelConfig::Gru(gru) => return neural(Neural::Gru(gru)),
        ModelConfig::Xlnet(xlnet) => return neural(Neural::Xlnet(xlnet)),
        ModelConfig::Popularity {} => BaselineKind::None,
        ModelConfig::Recent {} => BaselineKind::LastDay(vec![0; n_items as usize]),
        ModelConfig::Markov {} => BaselineKind::Successors(BTreeMap::new()),
        ModelConfig::Loglinear(loglinear) => {
            let (reminders, max_length) = (config.evaluate.reminders, config.data.max_length);
            let model = LogLinear::new(loglinear, features, reminders, max_length);
            return Ok(Box::new(BaselineLearner(model.map_err(TrainError::Model)?)));
        }
        ModelConfig::Vsknn(vsknn) => BaselineKind::Neighbours(Neighbours::new(vsknn, n_items)),
    };
    Ok(Box::new(BaselineLearner(Baseline::new(kind, n_items))))
}

/// Collective and device of a rank.
#[derive(Clone, Copy)]
pub struct RankContext<'a> {
    pub collective: &'a dyn Collective,
    pub device: Device,
}

/// The item table as this rank holds it.
pub fn item_table<'a>(
    config: &Config,
    n_items: i64,
    collective: &'a dyn Collective,
) -> ItemTable<'a> {
    match (config.parallel.item_table, config.run.reduction) {
        (TableLayout::Replicated, _) => ItemTable::replicated(n_items),
        (TableLayout::Sharded, Reduction::Reproducible) => {
            ItemTable::sharded(n_items, collective).reproducible()
        }
        (TableLayout::Sharded, Reduction::Fast | Reduction::Bf16) => {
            ItemTable::sharded(n_items, collective)
        }
    }
}
