//! Errors that clients of the server receive.

use std::fmt;

use bireme_base::message::single_line;

/// Each kind has a status of HTTP and one of gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestErrorKind {
    Invalid,
    Unauthorized,
    /// The model, the version or the endpoint does not exist.
    NotFound,
    /// The body, or the response to it, is larger than allowed.
    TooLarge,
    /// The body has a compression that this server does not read.
    Encoding,
    /// The server does not implement it.
    Unsupported,
    /// Too many requests: try again later.
    Full,
    /// The server is ending, or the model was unloaded.
    Unavailable,
    Timeout,
    Internal,
}

impl RequestErrorKind {
    pub const ALL: [Self; 10] = [
        Self::Invalid,
        Self::Unauthorized,
        Self::NotFound,
        Self::TooLarge,
        Self::Encoding,
        Self::Unsupported,
        Self::Full,
        Self::Unavailable,
        Self::Timeout,
        Self::Internal,
    ];

    pub fn http(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Unauthorized => 401,
            Self::NotFound => 404,
            Self::TooLarge => 413,
            Self::Encoding => 415,
            Self::Unsupported => 501,
            Self::Full | Self::Unavailable => 503,
            Self::Timeout => 504,
            Self::Internal => 500,
        }
    }

    pub fn grpc(self) -> tonic::Code {
        match self {
            Self::Invalid => tonic::Code::InvalidArgument,
            Self::Unauthorized => tonic::Code::Unauthenticated,
            Self::NotFound => tonic::Code::NotFound,
            Self::TooLarge | Self::Full => tonic::Code::ResourceExhausted,
            Self::Encoding | Self::Unsupported => tonic::Code::Unimplemented,
            Self::Unavailable => tonic::Code::Unavailable,
            Self::Timeout => tonic::Code::DeadlineExceeded,
            Self::Internal => tonic::Code::Internal,
        }
    }

    /// The name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Unauthorized => "unauthorized",
            Self::NotFound => "not_found",
            Self::TooLarge => "too_large",
            Self::Encoding => "encoding",
            Self::Unsupported => "unsupported",
            Self::Full => "full",
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Internal => "internal",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    pub kind: RequestErrorKind,
    /// One line for the client.
    pub message: String,
}

impl RequestError {
    pub fn new(kind: RequestErrorKind, message: impl fmt::Display) -> Self {
        // Only the first line: messages of libtorch contain a stack trace.
        let message = message.to_string();
        Self { kind, message: single_line(message.lines().next().unwrap_or_default()) }
    }

    pub fn invalid(message: impl fmt::Display) -> Self {
        Self::new(RequestErrorKind::Invalid, message)
    }

    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(RequestErrorKind::Internal, message)
    }
}

impl From<RequestError> for tonic::Status {
    fn from(RequestError { kind, message }: RequestError) -> Self {
        Self::new(kind.grpc(), message)
    }
}
