//! The configurations of a repository's models.
//!
//! | model | what it is |
//! | --- | --- |
//! | `<name>` | ensemble: events to `item_ids`, `item_scores` and `n_items` |
//! | `<name>_scores` | ensemble: events to `output`, the scores of the whole catalogue |
//! | `<name>_etl` | events to the model's inputs |
//! | `<name>_model` | TorchScript: those inputs to all of the outputs |

use std::collections::BTreeMap;

use bireme_serve::model_config::number;
use bireme_serve::protocol::model_config::SchedulingChoice;
use bireme_serve::protocol::model_ensembling::Step;
use bireme_serve::protocol::model_instance_group::Kind;
use bireme_serve::protocol::{
    ModelConfig, ModelDynamicBatching, ModelEnsembling, ModelInput, ModelInstanceGroup, ModelOutput,
    ModelParameter,
};

use super::script::{FALLBACK, ITEM_IDS, ITEM_SCORES, N_ITEMS, OUTPUT};
use crate::etl::serving::{INPUTS, Preprocessor, SESSION};
use crate::etl::tensor::DataType as Type;

/// The backend of `<name>_etl`: the library that this workspace builds, or the Python one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EtlBackend {
    /// `libtriton_bireme.so`, beside the model's versions.
    Library,
    /// `model.py`, in each version.
    Python,
}

impl EtlBackend {
    fn name(self) -> &'static str {
        match self {
            Self::Library => "bireme",
            Self::Python => "python",
        }
    }
}

/// The names of the four models.
#[derive(Clone, Debug)]
pub struct Names {
    /// Of the ensemble that recommends.
    pub ensemble: String,
    /// Of the ensemble that gives all scores.
    pub scores: String,
    /// Of the preprocessing.
    pub etl: String,
    /// Of the network.
    pub model: String,
}

impl Names {
    /// Those of the repository's model `name`.
    pub fn new(name: &str) -> Self {
        let with = |part: &str| format!("{name}_{part}");
        Self { ensemble: name.to_owned(), scores: with("scores"), etl: with("etl"), model: with("model") }
    }
}

/// The four configurations, the two ensembles last.
pub fn configs(names: &Names, etl: &Preprocessor, backend: EtlBackend, n_items: i64) -> [ModelConfig; 4] {
    let recommended = [
        (ITEM_IDS, Type::Int64, vec![-1, -1]),
        (ITEM_SCORES, Type::Fp32, vec![-1, -1]),
        (N_ITEMS, Type::Int32, vec![-1, 1]),
    ];
    let scored = [(OUTPUT, Type::Fp32, vec![-1, n_items])];
    [
        etl_config(&names.etl, etl, backend),
        model_config(&names.model, etl, n_items),
        ensemble_config(&names.scores, names, etl, &scored),
        ensemble_config(&names.ensemble, names, etl, &recommended),
    ]
}

fn input(name: &str, datatype: Type, dims: Vec<i64>) -> ModelInput {
    ModelInput { name: name.to_owned(), data_type: number(datatype), dims, ..Default::default() }
}

fn output(name: &str, datatype: Type, dims: Vec<i64>) -> ModelOutput {
    ModelOutput { name: name.to_owned(), data_type: number(datatype), dims, ..Default::default() }
}

/// What a request holds.
fn request() -> Vec<ModelInput> {
    INPUTS
        .iter()
        .map(|of| ModelInput { optional: of.optional, ..input(of.name, of.datatype, of.dims.to_vec()) })
        .collect()
}

fn etl_config(name: &str, etl: &Preprocessor, backend: EtlBackend) -> ModelConfig {
    let outputs = etl.outputs();
    ModelConfig {
        name: name.to_owned(),
        backend: backend.name().to_owned(),
        input: request(),
        output: outputs.into_iter().map(|(name, datatype, dims)| output(name, datatype, dims)).collect(),
        // One for each of a few cores: what an instance does takes a fraction of a millisecond.
        instance_group: vec![ModelInstanceGroup { count: 2, kind: Kind::Cpu.into(), ..Default::default() }],
        ..Default::default()
    }
}

/// Sessions that are worth waiting for, and how long.
const PREFERRED_BATCH: i32 = 64;
const QUEUE_DELAY_MICROSECONDS: u64 = 500;

fn model_config(name: &str, etl: &Preprocessor, n_items: i64) -> ModelConfig {
    // The first dimension, the sessions, is the server's to batch.
    let inputs = etl.outputs().into_iter().filter(|(name, ..)| *name != SESSION);
    let setting = |value: &str| ModelParameter { string_value: value.to_owned() };
    ModelConfig {
        name: name.to_owned(),
        platform: "pytorch_libtorch".to_owned(),
        max_batch_size: etl.settings().max_sessions as i32,
        input: inputs.map(|(name, datatype, dims)| input(name, datatype, dims[1..].to_vec())).collect(),
        output: vec![
            output(OUTPUT, Type::Fp32, vec![n_items]),
            output(ITEM_IDS, Type::Int64, vec![-1]),
            output(ITEM_SCORES, Type::Fp32, vec![-1]),
            output(FALLBACK, Type::Bool, vec![1]),
            output(N_ITEMS, Type::Int32, vec![1]),
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
    names: &Names,
    etl: &Preprocessor,
    outputs: &[(&str, Type, Vec<i64>)],
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
    let mut declared = vec![output(SESSION, Type::Bytes, vec![-1, 1])];
    declared.extend(outputs.iter().map(|(name, datatype, dims)| output(name, *datatype, dims.clone())));
    declared.push(output(FALLBACK, Type::Bool, vec![-1, 1]));
    ModelConfig {
        name: name.to_owned(),
        platform: "ensemble".to_owned(),
        input: request(),
        output: declared,
        scheduling_choice: Some(SchedulingChoice::EnsembleScheduling(ModelEnsembling { step: steps })),
        ..Default::default()
    }
}
