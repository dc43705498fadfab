//! Serves a model repository over HTTP and gRPC: the KServe v2 protocol with Triton's extensions.
//!
//! A request passes, in this order:
//!
//! | module | what it does |
//! | --- | --- |
//! | [`server`] | takes connections, and ends without losing a request |
//! | [`gate`] | API keys, the length of bodies and the memory of all of them, the clock |
//! | [`http`] with [`json`], or [`grpc`] | reads requests and writes answers |
//! | [`service`] | counts requests, and refuses those beyond the limit |
//! | [`request`] | checks a request against the model's configuration |
//! | [`model`] | runs a model, or the steps of an ensemble |
//! | [`batcher`] | the queue in front of a model that runs, and its threads |
//! | [`torchscript`] | runs the network; preprocessing is [`bireme_etl::serving`]'s |
//!
//! [`repository`] loads models, [`statistics`] counts, [`logs`] tells, [`fault`] says what a client is told, [`protocol`] and
//! [`model_config`] are the protocol's messages.

pub mod batcher;
pub mod fault;
pub mod gate;
pub mod grpc;
pub mod http;
pub mod json;
pub mod logs;
pub mod model;
pub mod model_config;
pub mod protocol;
pub mod repository;
pub mod request;
pub mod server;
pub mod service;
pub mod statistics;
pub mod torchscript;

pub use fault::Fault;
pub use server::{Addresses, Options, ServeError, serve};
