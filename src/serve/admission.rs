//! Checks for every request of both protocols: the API key, compression, the length of its body,
//! the memory of all bodies, and the time.

use std::collections::HashSet;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::{BoxError, Router};
use bireme_base::message::quoted;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tower_http::compression::CompressionLayer;
use tower_http::decompression::RequestDecompressionLayer;

use crate::request_error::{RequestError, RequestErrorKind};
use crate::service::{Held, Service, reserve, timed_out};
use crate::{grpc, http};

/// The API keys of a file as their SHA-256, so that the time of a look-up reveals nothing of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKeys(HashSet<[u8; 32]>);

impl ApiKeys {
    /// Reads a file with one key per line. Empty lines and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// The file cannot be read, or holds no key.
    pub fn read(path: &Path) -> std::io::Result<Self> {
        let text = std::fs::read_to_string(path)?;
        let lines =
            text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys: HashSet<_> = lines.map(digest).collect();
        if keys.is_empty() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "it holds no key"));
        }
        Ok(Self(keys))
    }

    fn allow(&self, request: &Request) -> bool {
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let key = header.and_then(|header| header.strip_prefix("Bearer "));
        key.is_some_and(|key| self.0.contains(&digest(key.trim())))
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

pub struct Admission {
    service: Arc<Service>,
    keys: Option<ApiKeys>,
}

impl Admission {
    /// Requires one of `keys`, if there are any.
    pub fn new(service: Arc<Service>, keys: Option<ApiKeys>) -> Arc<Self> {
        Arc::new(Self { service, keys })
    }

    /// Puts the admission in front of a router.
    ///
    /// Bodies are measured as the handlers read them, decompressed.
    pub fn in_front_of(self: &Arc<Self>, router: Router) -> Router {
        let measured = router.layer(from_fn_with_state(self.clone(), measure));
        // gRPC compresses its messages itself; these layers leave them alone.
        let compressed =
            measured.layer(CompressionLayer::new()).layer(RequestDecompressionLayer::new());
        compressed.layer(from_fn_with_state(self.clone(), admit))
    }
}

fn is_grpc(request: &Request) -> bool {
    let content_type = request.headers().get(CONTENT_TYPE);
    content_type.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

fn refuse(fault: RequestError, is_grpc: bool) -> Response {
    tracing::debug!(kind = fault.kind.name(), %fault, "refused");
    if is_grpc { tonic::Status::from(fault).into_http() } else { fault.into_response() }
}

/// Checks the key and the compression of a request.
async fn admit(
    State(admission): State<Arc<Admission>>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    let is_grpc = is_grpc(&request);
    let is_open = path.starts_with(http::HEALTH) || grpc::HEALTH.contains(&path);
    if !is_open && admission.keys.as_ref().is_some_and(|keys| !keys.allow(&request)) {
        let wanted = "`Authorization: Bearer` must hold one of the server's API keys";
        return refuse(RequestError::new(RequestErrorKind::Unauthorized, wanted), is_grpc);
    }
    let headers = request.headers_mut();
    if is_grpc {
        // gRPC clients list all compressions that they know. Only those that compress their
        // requests get compressed responses.
        if headers.get("grpc-encoding").is_none_or(|encoding| encoding == "identity") {
            headers.remove("grpc-accept-encoding");
        }
    } else if let Err(fault) = normalise_encoding(headers) {
        return refuse(fault, is_grpc);
    }
    next.run(request).await
}

/// Replaces `Content-Encoding` by the name that the decompression layer expects.
///
/// # Errors
/// A compression that this server does not read, or several.
fn normalise_encoding(headers: &mut HeaderMap) -> Result<(), RequestError> {
    let encodings: Vec<String> = headers
        .get_all(CONTENT_ENCODING)
        .iter()
        .flat_map(|value| {
            String::from_utf8_lossy(value.as_bytes())
                .to_ascii_lowercase()
                .split(',')
                .map(|encoding| encoding.trim().to_owned())
                .collect::<Vec<_>>()
        })
        .filter(|encoding| !matches!(encoding.as_str(), "" | "identity"))
        .collect();
    headers.remove(CONTENT_ENCODING);
    let encoding = match &encodings[..] {
        [] => return Ok(()),
        [one] if one == "gzip" || one == "x-gzip" => "gzip",
        [one] if one == "deflate" => "deflate",
        others => {
            let others = quoted(&others.join(", "));
            let problem = format!(
                "the body is encoded with {others}; this server reads `gzip` and `deflate`"
            );
            return Err(RequestError::new(RequestErrorKind::Encoding, problem));
        }
    };
    headers.insert(CONTENT_ENCODING, HeaderValue::from_static(encoding));
    Ok(())
}

/// Limits the body and the time of a request.
async fn measure(
    State(admission): State<Arc<Admission>>,
    request: Request,
    next: Next,
) -> Response {
    let is_grpc = is_grpc(&request);
    let refused = |fault| refuse(fault, is_grpc);
    if request.uri().path() == grpc::STREAM {
        // A stream has no time limit, and its messages are limited where they are decoded.
        return next.run(request).await;
    }
    let limits = &admission.service.limits;
    let memory = admission.service.memory.clone();
    let meter = Arc::new(Meter { memory, max: limits.body, taken: Mutex::default() });
    let request =
        request.map(|body| Body::new(Metered { body, meter: meter.clone(), linger: None }));
    let answered = tokio::time::timeout(limits.time, next.run(request)).await;
    // The meter's error comes first: the handler saw only a body that broke off.
    let fault = meter.taken().fault.take();
    let mut response = match (fault, answered) {
        (Some(fault), _) => refused(fault),
        (None, Ok(response)) => response,
        (None, Err(_)) => refused(timed_out(limits.time)),
    };
    match response.extensions_mut().remove::<Held>() {
        Some(held) => response.map(|body| Body::new(Kept { body, _held: held })),
        None => response,
    }
}

/// Measures the body of a request.
struct Meter {
    memory: Arc<Semaphore>,
    max: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    n_bytes: usize,
    permit: Option<OwnedSemaphorePermit>,
    fault: Option<RequestError>,
}

impl Meter {
    /// Counts the next `n` bytes.
    fn take(&self, n: usize) {
        let mut taken = self.taken();
        taken.n_bytes += n;
        if taken.fault.is_some() {
            return;
        }
        if taken.n_bytes > self.max {
            let problem = format!("the body of the request is longer than {} bytes", self.max);
            taken.fault = Some(RequestError::new(RequestErrorKind::TooLarge, problem));
            return;
        }
        match reserve(&self.memory, n) {
            Ok(permit) => match &mut taken.permit {
                Some(all) => all.merge(permit),
                none => *none = Some(permit),
            },
            Err(fault) => taken.fault = Some(fault),
        }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time for which the rest of a refused body is read.
const LINGER: Duration = Duration::from_secs(2);

/// A body whose bytes are counted as they arrive. After an error, the rest is read and discarded,
/// up to twice the largest body and for a limited time: if the connection closed while the client
/// is still sending, the client would see a reset and not the refusal.
struct Metered {
    body: Body,
    meter: Arc<Meter>,
    /// Ends the reading after a fault.
    linger: Option<Pin<Box<Sleep>>>,
}

impl http_body::Body for Metered {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Self { body, meter, linger } = &mut *self;
        loop {
            let frame = match Pin::new(&mut *body).poll_frame(context) {
                Poll::Ready(frame) => frame.transpose()?,
                Poll::Pending => match linger {
                    Some(linger) => {
                        ready!(linger.as_mut().poll(context));
                        None
                    }
                    None => return Poll::Pending,
                },
            };
            meter.take(frame.as_ref().and_then(Frame::data_ref).map_or(0, Bytes::len));
            let taken = meter.taken();
            match &taken.fault {
                None => return Poll::Ready(frame.map(Ok)),
                Some(_) if frame.is_some() && taken.n_bytes <= 2 * meter.max => {
                    linger.get_or_insert_with(|| Box::pin(sleep(LINGER)));
                }
                Some(fault) => return Poll::Ready(Some(Err(fault.clone().into()))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A body whose memory stays reserved until it was sent.
struct Kept {
    body: Body,
    _held: Held,
}

impl http_body::Body for Kept {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
