//! Formats that Bireme shares with other programs.
//!
//! | module | purpose |
//! | --- | --- |
//! | [`data_type`] | element types: names of KServe v2, numbers of `config.pbtxt`, sizes |
//! | [`tensor`] | named tensors of inference requests and responses |
//! | [`parameter`] | parameters of inference requests |
//! | [`text`] | protobuf's text format, of `config.pbtxt` and of schemas |
//! | [`schema`] | the messages of a `tensorflow_metadata` schema |

#![allow(missing_docs, reason = "most names say what a doc would repeat")]

pub mod data_type;
pub mod parameter;
pub mod schema;
pub mod tensor;
pub mod text;

pub use data_type::{DataType, Encoding};
pub use parameter::Parameter;
pub use prost_reflect;
pub use tensor::{Tensor, TensorView};
