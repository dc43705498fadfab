//! Events to sessions.

pub mod schema;

pub use schema::{Domain, Feature, FloatRange, IntRange, Schema, SchemaError, ValueCount};
