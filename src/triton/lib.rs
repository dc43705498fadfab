//! Backends of Triton Inference Server, written as a [`Backend`] and exported with [`export_backend`].
//!
//! A library of the type `cdylib` with that in it, named `libtriton_<name>.so`, serves the models whose `config.pbtxt`
//! says `backend: "<name>"`. It lies in a folder `<name>` among the server's backends, or in a model's own folder.
//!
//! The part of Triton's C interface that this needs is declared here by hand, so that nothing of Triton is needed to
//! build. Everything unsafe about it stays here: a request is answered once and given back once, a panic becomes an
//! error of the server, and tensors are lent out only while the server keeps them. Tensors lie in the host's memory.

pub mod api;
#[doc(hidden)]
pub mod entry;
mod fault;
mod request;

use std::error::Error;
use std::path::PathBuf;

use bireme_etl::tensor::Tensor;

pub use request::Request;

/// A model that answers requests.
///
/// Its instances, as `instance_group` of the configuration counts them, share one value and run in threads of their own.
pub trait Backend: Sized + Send + Sync {
    /// Loads a version of a model.
    ///
    /// # Errors
    /// Why the model cannot be served.
    fn load(model: &ModelFiles) -> Result<Self, Box<dyn Error>>;

    /// Answers a batch of requests, each with the model's outputs or with what is wrong with it, in their order.
    fn execute(&self, requests: &[Request<'_>]) -> Vec<Result<Vec<Tensor>, String>>;
}

/// A model as the server found it.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    /// Its name.
    pub name: String,
    /// The version that is to be loaded.
    pub version: u64,
    /// The model's folder, with `config.pbtxt`.
    pub dir: PathBuf,
    /// The version's folder in it.
    pub version_dir: PathBuf,
    /// `config.pbtxt` as the server completed it.
    pub config: serde_json::Value,
}

/// Makes the library that this stands in a backend of Triton. Once in a library.
///
/// `TRITONBACKEND_ModelInstanceInitialize`, `TRITONBACKEND_ModelInstanceFinalize` and `TRITONBACKEND_Finalize` are
/// optional and absent: an instance has nothing of its own.
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
            // SAFETY: the server calls this function, with a model of its own.
            unsafe { $crate::entry::model_initialize::<$backend>(model) }
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn TRITONBACKEND_ModelFinalize(
            model: *mut $crate::api::Model,
        ) -> *mut $crate::api::Error {
            // SAFETY: the server calls this function, after the one above, which has the same backend.
            unsafe { $crate::entry::model_finalize::<$backend>(model) }
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn TRITONBACKEND_ModelInstanceExecute(
            instance: *mut $crate::api::Instance,
            requests: *mut *mut $crate::api::Request,
            n_requests: u32,
        ) -> *mut $crate::api::Error {
            // SAFETY: the server calls this function, between the two above, which have the same backend.
            unsafe { $crate::entry::execute::<$backend>(instance, requests, n_requests) }
        }
    };
}
