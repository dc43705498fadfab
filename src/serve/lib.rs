//! Serves a model repository over HTTP and gRPC: the KServe v2 protocol with Triton's extensions.

pub mod model_config;
pub mod protocol;
