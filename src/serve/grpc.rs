//! The protocol over gRPC.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use bireme_base::message::quoted;
use bireme_etl::serving::Parameter;
use bireme_etl::tensor::{DataType, Tensor};
use tokio::sync::Semaphore;
use tokio_stream::{Stream, StreamExt};
use tonic::codec::CompressionEncoding;
use tonic::{Request as Call, Response, Status, Streaming};

use crate::fault::{Fault, Kind};
use crate::model::Model;
use crate::model_config::datatype;
use crate::protocol::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};
use crate::protocol::infer_parameter::ParameterChoice;
use crate::protocol::model_infer_request::InferInputTensor;
use crate::protocol::model_infer_response::InferOutputTensor;
use crate::protocol::model_metadata_response::TensorMetadata;
use crate::protocol::model_repository_parameter::ParameterChoice as RepositoryChoice;
use crate::protocol::repository_index_response::ModelIndex;
use crate::protocol::{
    InferParameter, InferTensorContents, ModelConfigRequest, ModelConfigResponse, ModelInferRequest,
    ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse,
    ModelStatisticsRequest, ModelStatisticsResponse, ModelStreamInferResponse, RepositoryIndexRequest,
    RepositoryIndexResponse, RepositoryModelLoadRequest, RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest, RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse,
    ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
};
use crate::request::{self, Request};
use crate::service::{Answered, EXTENSIONS, Held, Service};

/// What may be asked without an API key.
pub const HEALTH: [&str; 2] =
    ["/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady"];
/// Its requests come one after the other for as long as a client likes.
pub const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";
/// Streams that are open at most.
const MAX_STREAMS: usize = 64;

/// All calls of the server.
pub fn router(service: Arc<Service>) -> Router {
    let max_body = service.limits.body;
    let calls = Calls { service, streams: Arc::new(Semaphore::new(MAX_STREAMS)) };
    let mut calls = GrpcInferenceServiceServer::new(calls).max_decoding_message_size(max_body);
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Deflate] {
        calls = calls.accept_compressed(encoding).send_compressed(encoding);
    }
    tonic::service::Routes::new(calls.max_encoding_message_size(usize::MAX)).into_axum_router()
}

#[derive(Clone)]
struct Calls {
    service: Arc<Service>,
    streams: Arc<Semaphore>,
}

/// A model as its metadata show it.
pub fn metadata(model: &Model) -> ModelMetadataResponse {
    let config = &model.config;
    let tensor = |name: &String, number: i32, dims: &[i64]| TensorMetadata {
        name: name.clone(),
        datatype: datatype(number).map_or("", DataType::name).to_owned(),
        shape: (config.max_batch_size > 0).then_some(-1).into_iter().chain(dims.iter().copied()).collect(),
    };
    ModelMetadataResponse {
        name: config.name.clone(),
        versions: vec![model.version.to_string()],
        platform: if config.platform.is_empty() { config.backend.clone() } else { config.platform.clone() },
        inputs: config.input.iter().map(|input| tensor(&input.name, input.data_type, &input.dims)).collect(),
        outputs: config
            .output
            .iter()
            .map(|output| tensor(&output.name, output.data_type, &output.dims))
            .collect(),
    }
}

/// Reads a request, and its own limit of time.
///
/// # Errors
/// Says what is wrong where.
pub fn read(message: ModelInferRequest) -> Result<(Request, Option<Duration>), Fault> {
    let ModelInferRequest { parameters, inputs, outputs, raw_input_contents: raw, .. } = message;
    if !raw.is_empty() && raw.len() != inputs.len() {
        let n = inputs.len();
        return Err(Fault::invalid(format!(
            "`raw_input_contents` holds {} tensors for {n} inputs",
            raw.len()
        )));
    }
    let mut raw = raw.into_iter();
    let read = |InferInputTensor { name, datatype, shape, contents, .. }| {
        let datatype = DataType::parse(&datatype).ok_or_else(|| request::unknown_type(&name, &datatype))?;
        let data = match (raw.next(), contents) {
            (Some(bytes), None) => bytes.into(),
            (None, Some(contents)) => contained(&name, datatype, &contents)?,
            (Some(_), Some(_)) => {
                let name = quoted(&name);
                return Err(Fault::invalid(format!("input {name} is given both raw and in `contents`")));
            }
            (None, None) => Vec::new(),
        };
        Ok(Tensor { name, datatype, shape, data })
    };
    let inputs = inputs.into_iter().map(read).collect::<Result<_, _>>()?;
    if let Some(output) = outputs.iter().find(|output| output.parameters.contains_key("classification")) {
        return Err(request::no_classes(&output.name));
    }
    let mut timeout = None;
    let mut others = Vec::new();
    for (name, InferParameter { parameter_choice }) in parameters {
        let value = match parameter_choice {
            None => return Err(Fault::invalid(format!("parameter {} has no value", quoted(&name)))),
            Some(ParameterChoice::BoolParam(value)) => Parameter::Bool(value),
            Some(ParameterChoice::Int64Param(value)) => Parameter::Int(value),
            Some(ParameterChoice::StringParam(value)) => Parameter::Text(value),
            Some(ParameterChoice::DoubleParam(value)) => Parameter::Float(value),
            Some(ParameterChoice::Uint64Param(value)) => i64::try_from(value)
                .map(Parameter::Int)
                .map_err(|_| Fault::invalid(format!("parameter {} is too large", quoted(&name))))?,
        };
        if name == request::TIMEOUT {
            timeout = request::timeout(&value)?;
        } else {
            request::check_parameter(&name)?;
            others.push((name, value));
        }
    }
    let outputs = outputs.into_iter().map(|output| output.name).collect();
    Ok((Request { inputs, outputs, parameters: others, max_answer: None }, timeout))
}

/// Typed contents as the protocol's bytes.
fn contained(name: &str, datatype: DataType, contents: &InferTensorContents) -> Result<Vec<u8>, Fault> {
    fn narrowed<T: Copy + std::fmt::Display, N: TryFrom<T>, const B: usize>(
        values: &[T],
        bytes: fn(N) -> [u8; B],
    ) -> Result<Vec<u8>, String> {
        let mut data = Vec::with_capacity(values.len() * B);
        for &value in values {
            data.extend(bytes(N::try_from(value).map_err(|_| value.to_string())?));
        }
        Ok(data)
    }
    let data = match datatype {
        DataType::Bool => Ok(contents.bool_contents.iter().map(|&value| value.into()).collect()),
        DataType::Int8 => narrowed(&contents.int_contents, i8::to_le_bytes),
        DataType::Int16 => narrowed(&contents.int_contents, i16::to_le_bytes),
        DataType::Int32 => narrowed(&contents.int_contents, i32::to_le_bytes),
        DataType::Int64 => narrowed(&contents.int64_contents, i64::to_le_bytes),
        DataType::Uint8 => narrowed(&contents.uint_contents, u8::to_le_bytes),
        DataType::Uint16 => narrowed(&contents.uint_contents, u16::to_le_bytes),
        DataType::Uint32 => narrowed(&contents.uint_contents, u32::to_le_bytes),
        DataType::Uint64 => narrowed(&contents.uint64_contents, u64::to_le_bytes),
        DataType::Fp32 => narrowed(&contents.fp32_contents, f32::to_le_bytes),
        DataType::Fp64 => narrowed(&contents.fp64_contents, f64::to_le_bytes),
        DataType::Bytes => {
            let mut data = Vec::new();
            for bytes in &contents.bytes_contents {
                data.extend((bytes.len() as u32).to_le_bytes());
                data.extend(bytes);
            }
            Ok(data)
        }
        DataType::Fp16 | DataType::Bf16 => {
            let name = quoted(name);
            return Err(Fault::invalid(format!("input {name}: {datatype} must be given raw")));
        }
    };
    data.map_err(|value| Fault::invalid(format!("input {}: {value} is no {datatype}", quoted(name))))
}

impl Calls {
    async fn infer(&self, message: ModelInferRequest) -> Result<(ModelInferResponse, Held), Fault> {
        let named = (message.model_name.clone(), message.model_version.clone());
        let id = message.id.clone();
        let (request, timeout) = read(message)?;
        let answered = self.service.infer((&named.0, &named.1), request, timeout).await?;
        let Answered { model, outputs, held } = answered;
        let mut response = ModelInferResponse {
            model_name: model.config.name.clone(),
            model_version: model.version.to_string(),
            id,
            ..Default::default()
        };
        for Tensor { name, datatype, shape, data } in outputs {
            let datatype = datatype.name().to_owned();
            response.outputs.push(InferOutputTensor { name, datatype, shape, ..Default::default() });
            response.raw_output_contents.push(data);
        }
        Ok((response, held))
    }

    fn model(&self, name: &str, version: &str) -> Result<Arc<Model>, Status> {
        Ok(self.service.repository.model(name, version)?)
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl GrpcInferenceService for Calls {
    async fn server_live(&self, _: Call<ServerLiveRequest>) -> Answer<ServerLiveResponse> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Call<ServerReadyRequest>) -> Answer<ServerReadyResponse> {
        Ok(Response::new(ServerReadyResponse { ready: self.service.is_ready() }))
    }

    async fn model_ready(&self, call: Call<ModelReadyRequest>) -> Answer<ModelReadyResponse> {
        let ModelReadyRequest { name, version } = call.into_inner();
        Ok(Response::new(ModelReadyResponse { ready: self.model(&name, &version).is_ok() }))
    }

    async fn server_metadata(&self, _: Call<ServerMetadataRequest>) -> Answer<ServerMetadataResponse> {
        Ok(Response::new(ServerMetadataResponse {
            name: "bireme".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: EXTENSIONS.map(str::to_owned).into(),
        }))
    }

    async fn model_metadata(&self, call: Call<ModelMetadataRequest>) -> Answer<ModelMetadataResponse> {
        let ModelMetadataRequest { name, version } = call.into_inner();
        Ok(Response::new(metadata(&*self.model(&name, &version)?)))
    }

    async fn model_infer(&self, call: Call<ModelInferRequest>) -> Answer<ModelInferResponse> {
        let (message, held) = self.infer(call.into_inner()).await?;
        let mut response = Response::new(message);
        response.extensions_mut().insert(held);
        Ok(response)
    }

    type ModelStreamInferStream =
        Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    /// Answers one request after the other, in their order.
    async fn model_stream_infer(
        &self,
        call: Call<Streaming<ModelInferRequest>>,
    ) -> Answer<Self::ModelStreamInferStream> {
        let permit = self.streams.clone().try_acquire_owned();
        let permit = permit.map_err(|_| {
            Fault::new(Kind::Full, format!("{MAX_STREAMS} streams are open already: try again"))
        })?;
        let calls = self.clone();
        let answers = call.into_inner().then(move |message| {
            let calls = calls.clone();
            let _open = &permit;
            async move {
                let (error_message, infer_response) = match calls.infer(message?).await {
                    // The stream takes one answer at a time.
                    Ok((response, _)) => (String::new(), Some(response)),
                    Err(fault) => (fault.message, None),
                };
                Ok(ModelStreamInferResponse { error_message, infer_response })
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn model_config(&self, call: Call<ModelConfigRequest>) -> Answer<ModelConfigResponse> {
        let ModelConfigRequest { name, version } = call.into_inner();
        let config = self.model(&name, &version)?.config.clone();
        Ok(Response::new(ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(&self, call: Call<ModelStatisticsRequest>) -> Answer<ModelStatisticsResponse> {
        let ModelStatisticsRequest { name, version } = call.into_inner();
        let models = match name.is_empty() {
            true => self.service.repository.loaded(),
            false => vec![self.model(&name, &version)?],
        };
        let model_stats = models.iter().map(|model| model.statistics()).collect();
        Ok(Response::new(ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(&self, call: Call<RepositoryIndexRequest>) -> Answer<RepositoryIndexResponse> {
        let only_ready = call.into_inner().ready;
        let models = self.service.repository.index().map_err(Fault::from)?;
        let models = models.into_iter().filter(|model| !only_ready || model.version.is_some());
        let models = models.map(|model| ModelIndex {
            name: model.name,
            version: model.version.map(|version| version.to_string()).unwrap_or_default(),
            state: if model.version.is_some() { "READY" } else { "UNAVAILABLE" }.to_owned(),
            reason: if model.version.is_some() { String::new() } else { model.reason },
        });
        Ok(Response::new(RepositoryIndexResponse { models: models.collect() }))
    }

    async fn repository_model_load(
        &self,
        call: Call<RepositoryModelLoadRequest>,
    ) -> Answer<RepositoryModelLoadResponse> {
        let RepositoryModelLoadRequest { model_name, parameters, .. } = call.into_inner();
        if let Some(name) = parameters.keys().next() {
            let problem =
                format!("this server loads what lies in its repository: no parameter {}", quoted(name));
            return Err(Fault::invalid(problem).into());
        }
        self.service.load(model_name).await?;
        Ok(Response::new(RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        call: Call<RepositoryModelUnloadRequest>,
    ) -> Answer<RepositoryModelUnloadResponse> {
        let RepositoryModelUnloadRequest { model_name, parameters, .. } = call.into_inner();
        let parameters: BTreeMap<_, _> = parameters;
        let with_steps =
            parameters.get("unload_dependents").and_then(|value| value.parameter_choice.as_ref());
        let with_steps = matches!(with_steps, Some(RepositoryChoice::BoolParam(true)));
        self.service.unload(model_name, with_steps).await?;
        Ok(Response::new(RepositoryModelUnloadResponse {}))
    }
}
