//! The protocol over HTTP, and the metrics for Prometheus.

use std::io::ErrorKind;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER as RETRY_AFTER_HEADER};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bireme_base::message::quoted;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::json::{self, HEADER_LENGTH};
use crate::model::ServedModel;
use crate::model_config;
use crate::protocol::model_metadata_response::TensorMetadata;
use crate::protocol::{ModelStatistics, StatisticDuration};
use crate::request_error::{RequestError, RequestErrorKind};
use crate::service::{Answered, EXTENSIONS, ModelRef, RETRY_AFTER, Service};

type ServiceState = State<Arc<Service>>;
type HttpResult = Result<Response, RequestError>;

/// The path of the metrics.
pub const METRICS: &str = "/metrics";
/// The prefix of paths that need no API key.
pub const HEALTH: &str = "/v2/health/";

impl IntoResponse for RequestError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.kind.http()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(json!({ "error": self.message }))).into_response();
        if matches!(self.kind, RequestErrorKind::Full | RequestErrorKind::Unavailable) {
            response
                .headers_mut()
                .insert(RETRY_AFTER_HEADER, HeaderValue::from_static(RETRY_AFTER));
        }
        response
    }
}

pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/v2/health/live", get(StatusCode::OK))
        .route("/v2/health/ready", get(ready))
        .route("/v2", get(server_metadata))
        .route("/v2/models/stats", get(all_statistics))
        .route("/v2/models/{model}", get(metadata))
        .route("/v2/models/{model}/versions/{version}", get(metadata))
        .route("/v2/models/{model}/ready", get(model_ready))
        .route("/v2/models/{model}/versions/{version}/ready", get(model_ready))
        .route("/v2/models/{model}/config", get(config))
        .route("/v2/models/{model}/versions/{version}/config", get(config))
        .route("/v2/models/{model}/stats", get(statistics))
        .route("/v2/models/{model}/versions/{version}/stats", get(statistics))
        .route("/v2/models/{model}/infer", post(infer))
        .route("/v2/models/{model}/versions/{version}/infer", post(infer))
        .route("/v2/repository/index", post(index))
        .route("/v2/repository/models/{model}/load", post(load))
        .route("/v2/repository/models/{model}/unload", post(unload))
        .route(METRICS, get(metrics))
        .fallback(|| async { RequestError::new(RequestErrorKind::NotFound, "unknown endpoint") })
        .with_state(service)
}

/// The model in a path, and its version if one is given.
#[derive(Deserialize)]
struct Named {
    model: String,
    #[serde(default)]
    version: String,
}

fn find(
    service: &Service,
    Named { model, version }: &Named,
) -> Result<Arc<ServedModel>, RequestError> {
    service.repository.model(model, version)
}

async fn ready(State(service): ServiceState) -> StatusCode {
    if service.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn server_metadata() -> Response {
    let about =
        json!({ "name": "bireme", "version": env!("CARGO_PKG_VERSION"), "extensions": EXTENSIONS });
    axum::Json(about).into_response()
}

async fn model_ready(State(service): ServiceState, Path(named): Path<Named>) -> HttpResult {
    find(&service, &named).map(|_| StatusCode::OK.into_response())
}

fn tensor_json(TensorMetadata { name, datatype, shape }: TensorMetadata) -> Value {
    json!({ "name": name, "datatype": datatype, "shape": shape })
}

async fn metadata(State(service): ServiceState, Path(named): Path<Named>) -> HttpResult {
    let message = crate::grpc::metadata(&*find(&service, &named)?);
    let tensors =
        |tensors: Vec<TensorMetadata>| tensors.into_iter().map(tensor_json).collect::<Vec<_>>();
    Ok(axum::Json(json!({
        "name": message.name,
        "versions": message.versions,
        "platform": message.platform,
        "inputs": tensors(message.inputs),
        "outputs": tensors(message.outputs),
    }))
    .into_response())
}

async fn config(State(service): ServiceState, Path(named): Path<Named>) -> HttpResult {
    Ok(axum::Json(model_config::to_json(&find(&service, &named)?.config)).into_response())
}

fn statistics_json(of: &ModelStatistics) -> Value {
    let duration = |duration: Option<StatisticDuration>| {
        let StatisticDuration { count, ns } = duration.unwrap_or_default();
        json!({ "count": count, "ns": ns })
    };
    let inference = of.inference_stats.unwrap_or_default();
    let batches = of.batch_stats.iter().map(|batch| {
        json!({
            "batch_size": batch.batch_size,
            "compute_input": duration(batch.compute_input),
            "compute_infer": duration(batch.compute_infer),
            "compute_output": duration(batch.compute_output),
        })
    });
    json!({
        "name": of.name,
        "version": of.version,
        "last_inference": of.last_inference,
        "inference_count": of.inference_count,
        "execution_count": of.execution_count,
        "inference_stats": {
            "success": duration(inference.success),
            "fail": duration(inference.fail),
            "queue": duration(inference.queue),
            "compute_input": duration(inference.compute_input),
            "compute_infer": duration(inference.compute_infer),
            "compute_output": duration(inference.compute_output),
            "cache_hit": duration(inference.cache_hit),
            "cache_miss": duration(inference.cache_miss),
        },
        "batch_stats": batches.collect::<Vec<_>>(),
    })
}

async fn statistics(State(service): ServiceState, Path(named): Path<Named>) -> HttpResult {
    let of_model = statistics_json(&find(&service, &named)?.statistics());
    Ok(axum::Json(json!({ "model_stats": [of_model] })).into_response())
}

async fn all_statistics(State(service): ServiceState) -> Response {
    let models = service.repository.loaded();
    let models: Vec<Value> =
        models.iter().map(|model| statistics_json(&model.statistics())).collect();
    axum::Json(json!({ "model_stats": models })).into_response()
}

async fn infer(
    State(service): ServiceState,
    Path(Named { model, version }): Path<Named>,
    headers: HeaderMap,
    body: Body,
) -> HttpResult {
    let body = read(body).await?;
    let header_length = headers.get(HEADER_LENGTH).map(text_of_header).transpose()?;
    let mut asked = json::read(&body, header_length)?;
    drop(body);
    let request = std::mem::take(&mut asked.request);
    let of = ModelRef { name: &model, version: &version };
    let Answered { model, outputs, held } = service.infer(of, request, asked.timeout).await?;
    let json::WrittenBody { body, header_length } = asked.answer(&model, &outputs)?;
    let kind =
        if header_length.is_some() { "application/octet-stream" } else { "application/json" };
    let mut response = Response::new(Body::from(body));
    response.extensions_mut().insert(held);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    if let Some(length) = header_length {
        headers.insert(HEADER_LENGTH, length.into());
    }
    Ok(response)
}

fn text_of_header(value: &HeaderValue) -> Result<&str, RequestError> {
    value.to_str().map_err(|_| {
        RequestError::invalid(format!(
            "`{HEADER_LENGTH}` must be a number of bytes in ASCII digits"
        ))
    })
}

/// Reads a whole body. Its length and time are limited by the admission.
async fn read(body: Body) -> Result<Bytes, RequestError> {
    axum::body::to_bytes(body, usize::MAX).await.map_err(|error| {
        let mut source: Option<&dyn std::error::Error> = Some(&error);
        while let Some(cause) = source {
            let kind = cause.downcast_ref().map(std::io::Error::kind);
            if let Some(ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::Other) = kind
            {
                return RequestError::invalid("the body does not match its `Content-Encoding`");
            }
            source = cause.source();
        }
        RequestError::invalid("the body of the request is incomplete")
    })
}

/// Reads a body of JSON; null if it is empty.
async fn read_json(body: Body) -> Result<Value, RequestError> {
    let body = read(body).await?;
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&body).map_err(|error| {
        RequestError::invalid(format!(
            "the body is not JSON, at line {}, column {}",
            error.line(),
            error.column()
        ))
    })
}

async fn index(State(service): ServiceState, body: Body) -> HttpResult {
    let only_ready = read_json(body).await?["ready"] == true;
    let models = service.repository.index()?;
    let models = models.into_iter().filter(|model| !only_ready || model.version.is_some());
    let models = models.map(|model| match model.version {
        Some(version) => {
            let version = version.to_string();
            json!({ "name": model.name, "version": version, "state": "READY", "reason": "" })
        }
        None => json!({ "name": model.name, "state": "UNAVAILABLE", "reason": model.reason }),
    });
    Ok(axum::Json(models.collect::<Vec<_>>()).into_response())
}

async fn load(
    State(service): ServiceState,
    Path(Named { model, .. }): Path<Named>,
    body: Body,
) -> HttpResult {
    let parameters = read_json(body).await?;
    let parameters = parameters["parameters"].as_object();
    if let Some((name, _)) = parameters.and_then(|parameters| parameters.iter().next()) {
        return Err(RequestError::invalid(format!(
            "models are loaded from the server's repository alone: unknown parameter {}",
            quoted(name)
        )));
    }
    service.load(model).await?;
    Ok(StatusCode::OK.into_response())
}

async fn unload(
    State(service): ServiceState,
    Path(Named { model, .. }): Path<Named>,
    body: Body,
) -> HttpResult {
    let with_steps = read_json(body).await?["parameters"]["unload_dependents"] == true;
    service.unload(model, with_steps).await?;
    Ok(StatusCode::OK.into_response())
}

async fn metrics(State(service): ServiceState) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, HeaderValue::from_static(kind))], service.metrics.text()).into_response()
}
