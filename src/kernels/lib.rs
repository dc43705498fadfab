//! Computations on the memory of tensors: what libtorch would split into several passes is one loop
//! here. The package also adds the parts of libtorch that tch lacks.
//!
//! | module | computes |
//! | --- | --- |
//! | [`adamw`] | one step of AdamW on flat buffers |
//! | [`autograd`] | autograd operations with a backward pass in Rust, and sums of many tensors |
//! | [`dropout`] | dropout masks from a counter-based generator |
//! | [`fixed_point`] | sums that do not depend on the order of the terms |
//! | [`gru`] | one GRU layer over packed sessions |
//! | [`mapped_file`] | a file as a tensor |
//! | [`parallel`] | parts of a loop on several threads |
//! | [`softmax`] | the softmax and `logsumexp` of rows |
//! | [`torchscript`] | traces of modules with several outputs |
//! | [`transfer`] | copies to a GPU |
//!
//! The functions are safe to call. They panic if a tensor that a loop writes to shares memory with
//! another argument. As with every function of tch, no other thread may write to a tensor during
//! the call.

pub mod adamw;
pub mod autograd;
pub mod counter;
pub mod cuda;
pub mod dropout;
mod elements;
pub mod fixed_point;
pub mod gru;
mod guarded;
pub mod mapped_file;
pub mod parallel;
pub mod softmax;
pub mod torchscript;
pub mod transfer;
mod vectors;
