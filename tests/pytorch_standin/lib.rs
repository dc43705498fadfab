//! A stand-in for Triton's PyTorch backend, which no package carries: tests serve exported models
//! with it, on the CPU.
//!
//! `libtriton_pytorch.so` serves `platform: "pytorch_libtorch"` as the official backend does where
//! tests look: a TorchScript module in `model.pt`, inputs in the order of the configuration, a
//! tensor or a tuple of tensors in the order of its outputs, one execution for requests whose
//! shapes allow it.

use std::error::Error;
use std::fs;

use bireme_protocol::Tensor;
use bireme_serve::model_config::{CONFIG, from_text};
use bireme_serve::torchscript::{ModuleCall, ScriptModule};
use bireme_triton::{Backend, ModelFiles, Request, export_backend};
use tch::Device;

struct StandIn(ScriptModule);

impl Backend for StandIn {
    fn load(model: &ModelFiles) -> Result<Self, Box<dyn Error>> {
        let config = from_text(&fs::read_to_string(model.dir.join(CONFIG))?)?.config;
        Ok(Self(ScriptModule::load(&model.version_dir.join("model.pt"), &config, Device::Cpu)?))
    }

    fn execute(&self, requests: &[Request<'_>]) -> Vec<Result<Vec<Tensor>, String>> {
        let calls =
            requests.iter().map(|request| ModuleCall { inputs: request.inputs(), wanted: &[] });
        self.0.execute(&calls.collect::<Vec<_>>())
    }
}

export_backend!(StandIn);
