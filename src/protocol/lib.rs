//! Formats of other programs.
//!
//! | module | purpose |
//! | --- | --- |
//! | [`text`] | protobuf's text format: model configurations of Triton, schemas of `tensorflow_metadata` |
//! | [`schema`] | the messages of a schema |

pub mod schema;
pub mod text;

pub use prost_reflect;
