//! The protocol over gRPC.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use bireme_base::message::quoted;
use bireme_protocol::{DataType, Encoding, Parameter, Tensor};
use tokio::sync::Semaphore;
use tokio_stream::{Stream, StreamExt};
use tonic::codec::CompressionEncoding;
use tonic::{Request as Call, Response, Status, Streaming};

use crate::model::ServedModel;
use crate::protocol::grpc_inference_service_server::{
    GrpcInferenceService, GrpcInferenceServiceServer,
};
use crate::protocol::infer_parameter::ParameterChoice;
use crate::protocol::model_infer_request::InferInputTensor;
use crate::protocol::model_infer_response::InferOutputTensor;
use crate::protocol::model_metadata_response::TensorMetadata;
use crate::protocol::model_repository_parameter::ParameterChoice as RepositoryChoice;
use crate::protocol::repository_index_response::ModelIndex;
use crate::protocol::{
    InferParameter, InferTensorContents, ModelConfigRequest, ModelConfigResponse,
    ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse,
    ModelReadyRequest, ModelReadyResponse, ModelStatisticsRequest, ModelStatisticsResponse,
    ModelStreamInferResponse, RepositoryIndexRequest, RepositoryIndexResponse,
    RepositoryModelLoadRequest, RepositoryModelLoadResponse, RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
};
use crate::request::{self, InferRequest};
use crate::request_error::{RequestError, RequestErrorKind};
use crate::service::{Answered, EXTENSIONS, Held, ModelRef, Service};

/// Calls that need no API key.
pub const HEALTH: [&str; 2] =
    ["/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady"];
/// A call with a stream of requests of any length.
pub const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";
/// The most open streams.
const MAX_STREAMS: usize = 64;

pub fn router(service: Arc<Service>) -> Router {
    let max_body = service.limits.body;
    let calls = GrpcCalls { service, streams: Arc::new(Semaphore::new(MAX_STREAMS)) };
    let mut calls = GrpcInferenceServiceServer::new(calls).max_decoding_message_size(max_body);
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Deflate] {
        calls = calls.accept_compressed(encoding).send_compressed(encoding);
    }
    tonic::service::Routes::new(calls.max_encoding_message_size(usize::MAX)).into_axum_router()
}

#[derive(Clone)]
struct GrpcCalls {
    service: Arc<Service>,
    streams: Arc<Semaphore>,
}

/// The metadata of a model.
pub fn metadata(model: &ServedModel) -> ModelMetadataResponse {
    let config = &model.config;
    let tensor = |name: &String, number: i32, dims: &[i64]| TensorMetadata {
        name: name.clone(),
        datatype: DataType::from_number(number).map_or("", DataType::name).to_owned(),
        shape: (config.max_batch_size > 0)
            .then_some(-1)
            .into_iter()
            .chain(dims.iter().copied())
            .collect(),
    };
    ModelMetadataResponse {
        name: config.name.clone(),
        versions: vec![model.version.to_string()],
        platform: if config.platform.is_empty() {
            config.backend.clone()
        } else {
            config.platform.clone()
        },
        inputs: config
            .input
            .iter()
            .map(|input| tensor(&input.name, input.data_type, &input.dims))
            .collect(),
        outputs: config
            .output
            .iter()
            .map(|output| tensor(&output.name, output.data_type, &output.dims))
            .collect(),
    }
}

/// Reads a request and its timeout.
///
/// # Errors
/// The first thing wrong with the request, and its place.
pub fn read(message: ModelInferRequest) -> Result<(InferRequest, Option<Duration>), RequestError> {
    let ModelInferRequest { parameters, inputs, outputs, raw_input_contents: raw, .. } = message;
    if !raw.is_empty() && raw.len() != inputs.len() {
        let n = inputs.len();
        return Err(RequestError::invalid(format!(
            "`raw_input_contents` holds {} tensors for {n} inputs",
            raw.len()
        )));
    }
    let mut raw = raw.into_iter();
    let read = |InferInputTensor { name, datatype, shape, contents, .. }| {
        let datatype =
            DataType::parse(&datatype).ok_or_else(|| request::unknown_type(&name, &datatype))?;
        let data = match (raw.next(), contents) {
            (Some(bytes), None) => bytes.into(),
            (None, Some(contents)) => bytes_of(&name, datatype, &contents)?,
            (Some(_), Some(_)) => {
                let name = quoted(&name);
                return Err(RequestError::invalid(format!(
                    "input {name} is given both raw and in `contents`"
                )));
            }
            (None, None) => Vec::new(),
        };
        Ok(Tensor { name, datatype, shape, data })
    };
    let inputs = inputs.into_iter().map(read).collect::<Result<_, _>>()?;
    if let Some(output) =
        outputs.iter().find(|output| output.parameters.contains_key("classification"))
    {
        return Err(request::no_classes(&output.name));
    }
    let mut timeout = None;
    let mut others = Vec::new();
    for (name, InferParameter { parameter_choice }) in parameters {
        let value = match parameter_choice {
            None => {
                return Err(RequestError::invalid(format!(
                    "parameter {} has no value",
                    quoted(&name)
                )));
            }
            Some(ParameterChoice::BoolParam(value)) => Parameter::Bool(value),
            Some(ParameterChoice::Int64Param(value)) => Parameter::Int(value),
            Some(ParameterChoice::StringParam(value)) => Parameter::Text(value),
            Some(ParameterChoice::DoubleParam(value)) => Parameter::Float(value),
            Some(ParameterChoice::Uint64Param(value)) => {
                i64::try_from(value).map(Parameter::Int).map_err(|_| {
                    RequestError::invalid(format!("parameter {} is too large", quoted(&name)))
                })?
            }
        };
        if name == request::TIMEOUT {
            timeout = request::timeout(&value)?;
        } else {
            request::check_parameter(&name)?;
            others.push((name, value));
        }
    }
    let outputs = outputs.into_iter().map(|output| output.name).collect();
    Ok((InferRequest { inputs, outputs, parameters: others, max_answer: None }, timeout))
}

/// The bytes of a tensor whose elements are given in `contents`.
fn bytes_of(
    name: &str,
    datatype: DataType,
    contents: &InferTensorContents,
) -> Result<Vec<u8>, RequestError> {
    let InferTensorContents {
        bool_contents,
        int_contents,
        int64_contents,
        uint_contents,
        uint64_contents,
        fp32_contents,
        fp64_contents,
        bytes_contents,
    } = contents;
    match (datatype.encoding(), datatype.size()) {
        (Encoding::Bool, _) => Ok(bool_contents.iter().map(|&value| value.into()).collect()),
        (Encoding::Signed, Some(8)) => integers(name, datatype, int64_contents),
        (Encoding::Signed, _) => integers(name, datatype, int_contents),
        (Encoding::Unsigned, Some(8)) => integers(name, datatype, uint64_contents),
        (Encoding::Unsigned, _) => integers(name, datatype, uint_contents),
        (Encoding::Float, Some(4)) => {
            Ok(fp32_contents.iter().flat_map(|value| value.to_le_bytes()).collect())
        }
        (Encoding::Float, Some(8)) => {
            Ok(fp64_contents.iter().flat_map(|value| value.to_le_bytes()).collect())
        }
        (Encoding::Float, _) => Err(RequestError::invalid(format!(
            "input {}: {datatype} must be given raw",
            quoted(name)
        ))),
        (Encoding::Text, _) => {
            let mut data = Vec::new();
            for bytes in bytes_contents {
                data.extend((bytes.len() as u32).to_le_bytes());
                data.extend(bytes);
            }
            Ok(data)
        }
    }
}

fn integers<T: Copy + Into<i128>>(
    name: &str,
    datatype: DataType,
    values: &[T],
) -> Result<Vec<u8>, RequestError> {
    let mut data = Vec::with_capacity(values.len() * datatype.size().unwrap_or(1));
    for &value in values {
        let value: i128 = value.into();
        datatype.push_integer(value, &mut data).ok_or_else(|| {
            RequestError::invalid(format!(
                "input {}: {value} does not fit {datatype}",
                quoted(name)
            ))
        })?;
    }
    Ok(data)
}

impl GrpcCalls {
    async fn infer(
        &self,
        message: ModelInferRequest,
    ) -> Result<(ModelInferResponse, Held), RequestError> {
        let (name, version) = (message.model_name.clone(), message.model_version.clone());
        let id = message.id.clone();
        let (request, timeout) = read(message)?;
        let of = ModelRef { name: &name, version: &version };
        let answered = self.service.infer(of, request, timeout).await?;
        let Answered { model, outputs, held } = answered;
        let mut response = ModelInferResponse {
            model_name: model.config.name.clone(),
            model_version: model.version.to_string(),
            id,
            ..Default::default()
        };
        for Tensor { name, datatype, shape, data } in outputs {
            let datatype = datatype.name().to_owned();
            response.outputs.push(InferOutputTensor {
                name,
                datatype,
                shape,
                ..Default::default()
            });
            response.raw_output_contents.push(data);
        }
        Ok((response, held))
    }

    fn model(&self, name: &str, version: &str) -> Result<Arc<ServedModel>, Status> {
        Ok(self.service.repository.model(name, version)?)
    }
}

type GrpcResult<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl GrpcInferenceService for GrpcCalls {
    async fn server_live(&self, _: Call<ServerLiveRequest>) -> GrpcResult<ServerLiveResponse> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Call<ServerReadyRequest>) -> GrpcResult<ServerReadyResponse> {
        Ok(Response::new(ServerReadyResponse { ready: self.service.is_ready() }))
    }

    async fn model_ready(&self, call: Call<ModelReadyRequest>) -> GrpcResult<ModelReadyResponse> {
        let ModelReadyRequest { name, version } = call.into_inner();
        Ok(Response::new(ModelReadyResponse { ready: self.model(&name, &version).is_ok() }))
    }

    async fn server_metadata(
        &self,
        _: Call<ServerMetadataRequest>,
    ) -> GrpcResult<ServerMetadataResponse> {
        Ok(Response::new(ServerMetadataResponse {
            name: "bireme".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: EXTENSIONS.map(str::to_owned).into(),
        }))
    }

    async fn model_metadata(
        &self,
        call: Call<ModelMetadataRequest>,
    ) -> GrpcResult<ModelMetadataResponse> {
        let ModelMetadataRequest { name, version } = call.into_inner();
        Ok(Response::new(metadata(&*self.model(&name, &version)?)))
    }

    async fn model_infer(&self, call: Call<ModelInferRequest>) -> GrpcResult<ModelInferResponse> {
        let (message, held) = self.infer(call.into_inner()).await?;
        let mut response = Response::new(message);
        response.extensions_mut().insert(held);
        Ok(response)
    }

    type ModelStreamInferStream =
        Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    /// Answers the requests of a stream one by one, in their order.
    async fn model_stream_infer(
        &self,
        call: Call<Streaming<ModelInferRequest>>,
    ) -> GrpcResult<Self::ModelStreamInferStream> {
        let permit = self.streams.clone().try_acquire_owned();
        let permit = permit.map_err(|_| {
            RequestError::new(
                RequestErrorKind::Full,
                format!("{MAX_STREAMS} streams are open already: try again"),
            )
        })?;
        let calls = self.clone();
        let answers = call.into_inner().then(move |message| {
            let calls = calls.clone();
            let _open = &permit;
            async move {
                let (error_message, infer_response) = match calls.infer(message?).await {
                    // One response at a time is in memory, so that no memory is reserved for it.
                    Ok((response, _)) => (String::new(), Some(response)),
                    Err(fault) => (fault.message, None),
                };
                Ok(ModelStreamInferResponse { error_message, infer_response })
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn model_config(
        &self,
        call: Call<ModelConfigRequest>,
    ) -> GrpcResult<ModelConfigResponse> {
        let ModelConfigRequest { name, version } = call.into_inner();
        let config = self.model(&name, &version)?.config.clone();
        Ok(Response::new(ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(
        &self,
        call: Call<ModelStatisticsRequest>,
    ) -> GrpcResult<ModelStatisticsResponse> {
        let ModelStatisticsRequest { name, version } = call.into_inner();
        let models = if name.is_empty() {
            self.service.repository.loaded()
        } else {
            vec![self.model(&name, &version)?]
        };
        let model_stats = models.iter().map(|model| model.statistics()).collect();
        Ok(Response::new(ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        call: Call<RepositoryIndexRequest>,
    ) -> GrpcResult<RepositoryIndexResponse> {
        let only_ready = call.into_inner().ready;
        let models = self.service.repository.index().map_err(RequestError::from)?;
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
    ) -> GrpcResult<RepositoryModelLoadResponse> {
        let RepositoryModelLoadRequest { model_name, parameters, .. } = call.into_inner();
        if let Some(name) = parameters.keys().next() {
            let problem = format!(
                "models are loaded from the server's repository alone: unknown parameter {}",
                quoted(name)
            );
            return Err(RequestError::invalid(problem).into());
        }
        self.service.load(model_name).await?;
        Ok(Response::new(RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        call: Call<RepositoryModelUnloadRequest>,
    ) -> GrpcResult<RepositoryModelUnloadResponse> {
        let RepositoryModelUnloadRequest { model_name, parameters, .. } = call.into_inner();
        let parameters: BTreeMap<_, _> = parameters;
        let with_steps =
            parameters.get("unload_dependents").and_then(|value| value.parameter_choice.as_ref());
        let with_steps = matches!(with_steps, Some(RepositoryChoice::BoolParam(true)));
        self.service.unload(model_name, with_steps).await?;
        Ok(Response::new(RepositoryModelUnloadResponse {}))
    }
}
