//! Serves a model repository over HTTP and gRPC: the KServe v2 protocol with Triton's extensions.
//!
//! A request passes through these modules in this order:
//!
//! | module | what it does |
//! | --- | --- |
//! | [`server`] | accepts connections, and shuts down without losing a request |
//! | [`admission`] | checks the API key, the size of the body, the memory of all bodies, the time |
//! | [`http`] with [`json`], or [`grpc`] | reads requests and writes responses |
//! | [`service`] | counts requests, and refuses those beyond the limit |
//! | [`request`] | checks a request against the model's configuration |
//! | [`model`] | executes a model, or the steps of an ensemble |
//! | [`batcher`] | the queue and the threads of a model |
//! | [`torchscript`] | runs the network; preprocessing is [`bireme_etl::serving`]'s |
//!
//! [`repository`] loads models, [`statistics`] counts, [`logs`] writes the log, [`request_error`]
//! holds the errors for clients, and [`protocol`] and [`model_config`] hold the protocol's
//! messages.

#![allow(missing_docs, reason = "most names say what a doc would repeat")]

pub mod batcher;
pub mod admission;
pub mod grpc;
pub mod http;
pub mod json;
pub mod logs;
pub mod model;
pub mod model_config;
pub mod protocol;
pub mod repository;
pub mod request;
pub mod request_error;
pub mod server;
pub mod service;
pub mod statistics;
pub mod torchscript;

pub use request_error::RequestError;
pub use server::{Addresses, ServeError, ServeOptions, serve};
