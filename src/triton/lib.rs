//! Backends of Triton Inference Server, written as a [`Backend`] and exported with
//! [`export_backend`].
//!
//! A `cdylib` that exports one, named `libtriton_<name>.so`, serves the models whose `config.pbtxt`
//! contains `backend: "<name>"`. It lies in a folder `<name>` among the server's backends, or in
//! the model's own folder.
//!
//! The declarations of Triton's C interface are written by hand, so that nothing of Triton is
//! needed to build. All unsafe code stays in this package: each request is answered and released
//! exactly once, a panic becomes an error of the server, and tensors are borrowed only while the
//! server keeps them. Tensors must be in host memory.

#![allow(missing_docs, reason = "most names say what a doc would repeat")]

pub mod api;
#[doc(hidden)]
pub mod entry;
mod backend_error;
mod request;

use std::error::Error;
use std::path::PathBuf;

use bireme_protocol::Tensor;

pub use request::Request;

/// The instances that `instance_group` configures share one value, and each runs in its own thread.
pub trait Backend: Sized + Send + Sync {
    /// Loads a version of a model.
    ///
    /// # Errors
    /// The model cannot be served.
    fn load(model: &ModelFiles) -> Result<Self, Box<dyn Error>>;

    /// Answers a batch of requests in their order, each with the model's outputs or with a message
    /// of what is wrong with it.
    fn execute(&self, requests: &[Request<'_>]) -> Vec<Result<Vec<Tensor>, String>>;
}

/// The files of a model.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    pub name: String,
    /// The version to load.
    pub version: u64,
    /// The model's folder, which contains `config.pbtxt`.
    pub dir: PathBuf,
    /// The folder of the version.
    pub version_dir: PathBuf,
    /// `config.pbtxt` as the server completed it.
    pub config: serde_json::Value,
}

/// Exports a [`Backend`] from this library. At most once per library.
///
/// `TRITONBACKEND_ModelInstanceInitialize`, `TRITONBACKEND_ModelInstanceFinalize` and
/// `TRITONBACKEND_Finalize` are optional and absent, because instances have no state.
#[macro_export]
macro_rules! export_backend {
    ($backend:ty) => {
        #[unsafe(no_mangle)]
        unsafe extern "C" fn TRITONBACKEND_Initialize(
            backend: *mut $crate::api::Backend,
        ) -> *mut $crate::api::Error {
            // SAFETY: the server calls this function.
            unsafe { $crate::entry::initialize(backend) }
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn TRITONBACKEND_ModelInitialize(
            model: *mut $crate::api::Model,
        ) -> *mut $crate::api::Error {
            // SAFETY: the server calls this function with one of its models.
            unsafe { $crate::entry::model_initialize::<$backend>(model) }
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn TRITONBACKEND_ModelFinalize(
            model: *mut $crate::api::Model,
        ) -> *mut $crate::api::Error {
            // SAFETY: the server calls this function, after the one above, which has the same
            // backend.
            unsafe { $crate::entry::model_finalize::<$backend>(model) }
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn TRITONBACKEND_ModelInstanceExecute(
            instance: *mut $crate::api::Instance,
            requests: *mut *mut $crate::api::Request,
            n_requests: u32,
        ) -> *mut $crate::api::Error {
            // SAFETY: the server calls this function, between the two above, which have the same
            // backend.
            unsafe { $crate::entry::execute::<$backend>(instance, requests, n_requests) }
        }
    };
}
