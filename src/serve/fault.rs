//! Why a request is not answered as it wishes.

use std::fmt;

use bireme_base::message::single_line;

/// Kinds of faults, each with a status of HTTP and of gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request makes no sense.
    Invalid,
    /// The API key is missing or wrong.
    Unauthorized,
    /// There is no such model, version or page.
    NotFound,
    /// The body is longer than allowed.
    TooLarge,
    /// The body is compressed in a way that this server does not read.
    Encoding,
    /// This server cannot do that.
    Unsupported,
    /// More requests are waiting than allowed: try again.
    Full,
    /// The server is ending, or the model is gone.
    Unavailable,
    /// It took longer than allowed.
    Timeout,
    /// The server's own fault.
    Internal,
}

impl Kind {
    /// All of them.
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

    /// The status code of HTTP.
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

    /// The status code of gRPC.
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

    /// A word for logs and metrics.
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

/// A kind and one line for whoever asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// What kind of fault.
    pub kind: Kind,
    /// One line.
    pub message: String,
}

impl Fault {
    /// A fault of a kind.
    pub fn new(kind: Kind, message: impl fmt::Display) -> Self {
        // Messages of libraries may bring their stack along.
        let message = message.to_string();
        Self { kind, message: single_line(message.lines().next().unwrap_or_default()) }
    }

    /// The request makes no sense.
    pub fn invalid(message: impl fmt::Display) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// The server's own fault.
    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(Kind::Internal, message)
    }
}

impl From<Fault> for tonic::Status {
    fn from(Fault { kind, message }: Fault) -> Self {
        Self::new(kind.grpc(), message)
    }
}
