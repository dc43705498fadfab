//! An exported model, loaded to be evaluated like a trained one.

use std::ops::Range;
use std::path::Path;

use tch::{CModule, Device, IValue, Kind, Tensor};

use super::{ModelNames, rules};
use crate::collective::CollectiveError;
use crate::data::Batch;
use crate::model::{Encoded, Recommender};

/// The TorchScript module of a version.
pub struct ScriptedModel {
    module: CModule,
    n_items: i64,
    device: Device,
}

impl ScriptedModel {
    /// Loads the newest version of the model `name` in a repository.
    ///
    /// # Errors
    /// The model has no version, or libtorch cannot load it.
    pub fn load(
        repository: &Path,
        name: &str,
        n_items: i64,
        device: Device,
    ) -> Result<Self, String> {
        let names = ModelNames::new(name);
        let dir = repository.join(&names.model);
        let versions = std::fs::read_dir(&dir)
            .map_err(|error| format!("cannot read `{}`: {error}", dir.display()))?;
        let numbers =
            versions.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u64>().ok());
        let newest =
            numbers.max().ok_or_else(|| format!("`{}` holds no version", dir.display()))?;
        let path = dir.join(newest.to_string()).join(rules::FILE);
        let module = CModule::load_on_device(&path, device).map_err(|error| error.to_string())?;
        Ok(Self { module, n_items, device })
    }

    /// All outputs for the module's inputs, in their order: see [`super`].
    ///
    /// # Errors
    /// An error of libtorch.
    pub fn run(&self, inputs: Vec<Tensor>) -> Result<Vec<Tensor>, String> {
        let inputs: Vec<IValue> = inputs.into_iter().map(IValue::Tensor).collect();
        let outputs =
            tch::no_grad(|| self.module.forward_is(&inputs)).map_err(|error| error.to_string())?;
        let IValue::Tuple(outputs) = outputs else {
            return Err("the module does not return a tuple".to_owned());
        };
        let tensor = |output| {
            if let IValue::Tensor(tensor) = output {
                Ok(tensor)
            } else {
                Err("a value is not a tensor")
            }
        };
        Ok(outputs.into_iter().map(tensor).collect::<Result<_, _>>()?)
    }

    /// Padded columns `[B, L]` and the lengths `[B, 1]`.
    fn inputs(&self, known: &Batch) -> Vec<Tensor> {
        let longest = known.lengths.iter().copied().max().unwrap_or(0) as i64;
        let n_sessions = known.n_sessions() as i64;
        let cells: Vec<i64> = (known.lengths.iter().zip(0..))
            .flat_map(|(&length, session)| {
                (0..length as i64).map(move |place| session * longest + place)
            })
            .collect();
        let cells = Tensor::from_slice(&cells).to_device(self.device);
        let padded = |column: &Tensor| {
            let cells_of_all =
                column.new_zeros([n_sessions * longest], (column.kind(), self.device));
            cells_of_all.index_copy(0, &cells, column).view([n_sessions, longest])
        };
        let lengths: Vec<i64> = known.lengths.iter().map(|&length| length as i64).collect();
        let mut inputs: Vec<Tensor> = known.columns.iter().map(padded).collect();
        inputs.push(Tensor::from_slice(&lengths).view([-1, 1]).to_device(self.device));
        // Nothing is hidden, and the recommendations are not used.
        let one = Tensor::zeros([n_sessions, 1], (Kind::Int64, self.device));
        inputs.extend([one.shallow_clone(), one]);
        inputs
    }
}

impl Recommender for ScriptedModel {
    fn n_items(&self) -> i64 {
        self.n_items
    }

    fn device(&self) -> Device {
        self.device
    }

    fn scores_are_logits(&self) -> bool {
        true
    }

    /// All scores: `[B, V]`.
    fn encode(&self, known: &Batch) -> Result<Encoded, CollectiveError> {
        let outputs = self.run(self.inputs(known)).expect("the module ran when it was exported");
        Ok(Encoded { vectors: outputs[0].shallow_clone(), sparse: None })
    }

    fn scores(&self, encoded: &Encoded, items: Range<i64>) -> Tensor {
        encoded.vectors.narrow(1, items.start, items.end - items.start)
    }
}
