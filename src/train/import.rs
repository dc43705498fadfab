//! Imports weights that another program has trained.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Device;

use super::{RankContext, TrainError, learner, weights_file};
use crate::checkpoint::{CheckpointError, Checkpoints, Position, State, Tensors};
use crate::collective::Root;
use crate::collective::solo::Solo;
use crate::config::Config;
use crate::data::{Days, Split, occurrences};
use crate::device::memory::set_phase;
use crate::model::{ItemTable, import};

/// Weights saved by Transformers4Rec, as the state of a run after the last step of a day.
pub struct ImportedWeights {
    state: State,
    tensors: Tensors,
    occurrences: Vec<i64>,
}

impl ImportedWeights {
    /// Reads `weights` for the model of `config`, last trained on `day` of the data in `data_dir`.
    ///
    /// # Errors
    /// The file cannot be read, its weights do not fit the model, or [`Days::open`] fails.
    pub fn read(
        (weights, day): (&Path, i64),
        data_dir: &Path,
        config: &Config,
    ) -> Result<Self, TrainError> {
        let days = Days::open(data_dir, &config.data)?;
        let features = days.features();
        let imported = weights_file::read(weights)?;
        set_phase("setting the model up");
        let place = RankContext { collective: &Solo, device: Device::Cpu };
        let item_table = ItemTable::replicated(features.n_items());
        let mut learner = learner(config, features, place, item_table)?;
        let names: Vec<String> =
            learner.tensors().weights.into_iter().map(|(name, _)| name).collect();
        let wanted = |name: &str| names.iter().any(|other| other == name);
        import::rename(imported, &features.columns()[0].name, wanted)
            .and_then(|renamed| learner.load_weights(&renamed))
            .map_err(|problem| CheckpointError::Mismatch { path: weights.to_owned(), problem })?;
        let first_day = config.data.training_days().start;
        let mut total = vec![0; features.n_items() as usize];
        for trained in days.days().filter(|&trained| first_day <= trained && trained <= day) {
            let counts = occurrences(&days.file(trained, Split::Train)?, features, (0, 1))?;
            total.iter_mut().zip(counts).for_each(|(total, n)| *total += n);
        }
        let mut state = State::new(config, features.n_items(), BTreeMap::new());
        state.position = Position { day, ..Position::default() };
        Ok(Self { state, tensors: learner.tensors(), occurrences: total })
    }

    /// Writes the weights as a checkpoint of the run in `run_dir`.
    ///
    /// # Errors
    /// See [`Checkpoints::write`].
    pub fn write(&self, root: Root, run_dir: &Path) -> Result<(), CheckpointError> {
        Checkpoints::of(run_dir).write(root, &self.state, &self.tensors, &self.occurrences)
    }
}
