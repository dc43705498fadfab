//! The configurations of a repository's models.
//!
//! | model | what it is |
//! | --- | --- |
//! | `<name>` | ensemble: events to `item_ids`, `item_scores` and `n_items` |
//! | `<name>_scores` | ensemble: events to `output`, the scores of the whole catalogue |
//! | `<name>_etl` | events to the model's inputs |
//! | `<name>_model` | TorchScript: those inputs to all of the outputs |

use std::collections::BTreeMap;

use bireme_protocol::DataType;
use bireme_serve::protocol::model_config::SchedulingChoice;
use bireme_serve::protocol::model_ensembling::Step;
use bireme_serve::protocol::model_instance_group::Kind;
use bireme_serve::protocol::{
    ModelConfig, ModelDynamicBatching, ModelEnsembling, ModelInput, ModelInstanceGroup,
    ModelOutput, ModelParameter,
};

use super::script::{FALLBACK, ITEM_IDS, ITEM_SCORES, N_ITEMS, OUTPUT};
use crate::etl::serving::{INPUTS, Preprocessor, SESSION};

/// The names of the four models in the repository.
#[derive(Clone, Debug)]
pub struct ModelNames {
    /// The ensemble that recommends.
    pub ensemble: String,
    /// The ensemble that returns all scores.
    pub scores: String,
    /// Preprocessing.
    pub etl: String,
    /// The network.
    pub model: String,
}

impl ModelNames {
    pub fn new(name: &str) -> Self {
        let with = |part: &str| format!("{name}_{part}");
        Self {
            ensemble: name.to_owned(),
            scores: with("scores"),
            etl: with("etl"),
            model: with("model"),
        }
    }
}

/// The four configurations, the two ensembles last.
pub fn configs(names: &ModelNames, etl: &Preprocessor, n_items: i64) -> [ModelConfig; 4] {
    let recommended = [
        (ITEM_IDS, DataType::Int64, vec![-1, -1]),
        (ITEM_SCORES, DataType::Fp32, vec![-1, -1]),
        (N_ITEMS, DataType::Int32, vec![-1, 1]),
    ];
    let scored = [(OUTPUT, DataType::Fp32, vec![-1, n_items])];
    [
        etl_config(&names.etl, etl),
        model_config(&names.model, etl, n_items),
        ensemble_config(&names.scores, names, etl, &scored),
        ensemble_config(&names.ensemble, names, etl, &recommended),
    ]
}

fn input(name: &str, datatype: DataType, dims: Vec<i64>) -> ModelInput {
    ModelInput { name: name.to_owned(), data_type: datatype.number(), dims, ..Default::default() }
}

fn output(name: &str, datatype: DataType, dims: Vec<i64>) -> ModelOutput {
    ModelOutput { name: name.to_owned(), data_type: datatype.number(), dims, ..Default::default() }
}

/// The inputs of a request.
fn request() -> Vec<ModelInput> {
    INPUTS
        .iter()
        .map(|of| ModelInput {
            optional: of.optional,
            ..input(of.name, of.datatype, of.dims.to_vec())
        })
        .collect()
}

fn etl_config(name: &str, etl: &Preprocessor) -> ModelConfig {
    let outputs = etl.outputs();
    ModelConfig {
        name: name.to_owned(),
        backend: "bireme".to_owned(),
        input: request(),
        output: outputs
            .into_iter()
            .map(|(name, datatype, dims)| output(name, datatype, dims))
            .collect(),
        // For a few cores: an execution takes a fraction of a millisecond.
        instance_group: vec![ModelInstanceGroup {
            count: 2,
            kind: Kind::Cpu.into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// The number of sessions to wait for, and the longest time to wait.
const PREFERRED_BATCH: i32 = 64;
const QUEUE_DELAY_MICROSECONDS: u64 = 500;

fn model_config(name: &str, etl: &Preprocessor, n_items: i64) -> ModelConfig {
    // The configuration leaves out the first dimension, the sessions, which the server batches.
    let inputs = etl.outputs().into_iter().filter(|(name, ..)| *name != SESSION);
    let setting = |value: &str| ModelParameter { string_value: value.to_owned() };
    ModelConfig {
        name: name.to_owned(),
        platform: "pytorch_libtorch".to_owned(),
        max_batch_size: etl.settings().max_sessions as i32,
        input: inputs
            .map(|(name, datatype, dims)| input(name, datatype, dims[1..].to_vec()))
            .collect(),
        output: vec![
            output(OUTPUT, DataType::Fp32, vec![n_items]),
            output(ITEM_IDS, DataType::Int64, vec![-1]),
            output(ITEM_SCORES, DataType::Fp32, vec![-1]),
            output(FALLBACK, DataType::Bool, vec![1]),
            output(N_ITEMS, DataType::Int32, vec![1]),
        ],
        scheduling_choice: Some(SchedulingChoice::DynamicBatching(ModelDynamicBatching {
            preferred_batch_size: vec![PREFERRED_BATCH],
            max_queue_delay_microseconds: QUEUE_DELAY_MICROSECONDS,
            ..Default::default()
        })),
        parameters: BTreeMap::from([("INFERENCE_MODE".to_owned(), setting("true"))]),
        ..Default::default()
    }
}

fn ensemble_config(
    name: &str,
    names: &ModelNames,
    etl: &Preprocessor,
    outputs: &[(&str, DataType, Vec<i64>)],
) -> ModelConfig {
    let same = |names: &mut dyn Iterator<Item = &str>| -> BTreeMap<String, String> {
        names.map(|name| (name.to_owned(), name.to_owned())).collect()
    };
    let passed_on = etl.outputs();
    let step = |model: &str, inputs, outputs| Step {
        model_name: model.to_owned(),
        model_version: -1,
        input_map: inputs,
        output_map: outputs,
    };
    let of_model = outputs.iter().map(|(name, ..)| *name).chain([FALLBACK]);
    let steps = vec![
        step(
            &names.etl,
            same(&mut INPUTS.iter().map(|input| input.name)),
            same(&mut passed_on.iter().map(|(name, ..)| *name)),
        ),
        step(
            &names.model,
            same(&mut passed_on.iter().map(|(name, ..)| *name).filter(|name| *name != SESSION)),
            same(&mut of_model.clone()),
        ),
    ];
    let mut declared = vec![output(SESSION, DataType::Bytes, vec![-1, 1])];
    declared
        .extend(outputs.iter().map(|(name, datatype, dims)| output(name, *datatype, dims.clone())));
    declared.push(output(FALLBACK, DataType::Bool, vec![-1, 1]));
    ModelConfig {
        name: name.to_owned(),
        platform: "ensemble".to_owned(),
        input: request(),
        output: declared,
        scheduling_choice: Some(SchedulingChoice::EnsembleScheduling(ModelEnsembling {
            step: steps,
        })),
        ..Default::default()
    }
}
