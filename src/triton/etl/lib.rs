//! `libtriton_bireme.so`: the backend of Triton Inference Server that turns the events of a request
//! into the inputs of a model, with the transforms of the model's training data.
//!
//! A model consists of a version folder that [`Preprocessor::save`] wrote, and a `config.pbtxt`
//! with `backend: "bireme"` and `max_batch_size: 0`, because a request has fewer sessions than rows
//! of events. The library lies in the model's folder, or with the server's other backends.

use std::error::Error;

use bireme_etl::serving::Preprocessor;
use bireme_protocol::Tensor;
use bireme_triton::{Backend, ModelFiles, Request, export_backend};

struct Events(Preprocessor);

impl Backend for Events {
    fn load(model: &ModelFiles) -> Result<Self, Box<dyn Error>> {
        Ok(Self(Preprocessor::load(&model.version_dir)?))
    }

    fn execute(&self, requests: &[Request<'_>]) -> Vec<Result<Vec<Tensor>, String>> {
        requests
            .iter()
            .map(|request| self.0.apply(&request.inputs(), request.parameters()))
            .collect()
    }
}

export_backend!(Events);
