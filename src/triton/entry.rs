//! The entry points of the backend that [`export_backend`](crate::export_backend) exports.

use std::ffi::c_void;
use std::path::PathBuf;
use std::{ptr, slice};

use crate::backend_error::{BackendError, answer, check, guarded, text};
use crate::request::Incoming;
use crate::{Backend, ModelFiles, api};

/// A loaded model, which the server stores between calls.
struct Loaded<B> {
    backend: B,
    /// Whether the first dimension of tensors is the batch.
    has_batch_dimension: bool,
}

/// `TRITONBACKEND_Initialize`: refuses a server with another version of the interface.
///
/// # Safety
/// The server calls it.
pub unsafe fn initialize(_backend: *mut api::Backend) -> *mut api::Error {
    answer(|| {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: each pointer points to a different variable.
        unsafe { check(api::TRITONBACKEND_ApiVersion(&mut major, &mut minor)) }?;
        if major == 1 {
            return Ok(());
        }
        Err(BackendError::unsupported(format!(
            "the server's backend API is {major}.{minor}, and 1.x is needed"
        )))
    })
}

/// `TRITONBACKEND_ModelInitialize`: loads a model.
///
/// # Safety
/// The server calls it, with a model that it has made.
pub unsafe fn model_initialize<B: Backend>(model: *mut api::Model) -> *mut api::Error {
    answer(|| {
        // SAFETY: the model is alive.
        let files = unsafe { files(model) }?;
        let backend = B::load(&files).map_err(|error| BackendError::of(error.as_ref()))?;
        let has_batch_dimension =
            files.config["max_batch_size"].as_i64().is_some_and(|size| size > 0);
        let state = Box::into_raw(Box::new(Loaded { backend, has_batch_dimension }));
        // SAFETY: the model is alive, and from here on owns the box, up to `model_finalize`.
        unsafe { check(api::TRITONBACKEND_ModelSetState(model, state.cast())) }
    })
}

/// `TRITONBACKEND_ModelFinalize`: drops a model, also one that failed to load.
///
/// # Safety
/// The server calls it, with a model that it gave to [`model_initialize`] of the same `B`.
pub unsafe fn model_finalize<B: Backend>(model: *mut api::Model) -> *mut api::Error {
    answer(|| {
        // SAFETY: the model is alive.
        let state = unsafe { state_of(model) }?;
        if state.is_null() {
            return Ok(());
        }
        // SAFETY: the model is alive.
        unsafe { check(api::TRITONBACKEND_ModelSetState(model, ptr::null_mut())) }?;
        // SAFETY: the state comes from `Box::into_raw` in `model_initialize`, the model has
        // forgotten it, and the server executes nothing any more.
        drop(unsafe { Box::from_raw(state.cast::<Loaded<B>>()) });
        Ok(())
    })
}

/// `TRITONBACKEND_ModelInstanceExecute`: answers the requests of a batch.
///
/// # Safety
/// The server calls it, with an instance of a model that it gave to [`model_initialize`] of the
/// same `B`, and with `n_requests` requests.
pub unsafe fn execute<B: Backend>(
    instance: *mut api::Instance,
    requests: *mut *mut api::Request,
    n_requests: u32,
) -> *mut api::Error {
    let start = now();
    answer(|| {
        let mut model = ptr::null_mut();
        // SAFETY: the instance is alive, and with it the model.
        let state = unsafe {
            check(api::TRITONBACKEND_ModelInstanceModel(instance, &mut model))?;
            state_of(model)?
        };
        // SAFETY: the state is null or comes from `model_initialize`; it is dropped when nothing is
        // executed any more, and until then only borrowed, by as many threads as the model has
        // instances (`B: Sync`).
        let loaded = unsafe { state.cast::<Loaded<B>>().as_ref() };
        let loaded = loaded.ok_or_else(|| BackendError::internal("the model was not loaded"))?;
        // SAFETY: the server's array, of that many requests, lasts as long as the call.
        let requests = unsafe { slice::from_raw_parts(requests, n_requests as usize) };
        // An error above leaves the requests with the server. From here on the backend owns them:
        // this function must return success, or the server would release them a second time.
        // SAFETY: the server gives each request once, and takes none back when success is returned.
        let requests = requests.iter().map(|&request| unsafe { Incoming::take(request) }).collect();
        // SAFETY: the instance is alive.
        if let Err(fault) = guarded(|| unsafe { serve(loaded, instance, requests, start) }) {
            fault.log();
        }
        Ok(())
    })
}

/// Answers requests and reports their times. Each is answered independently: an invalid request, or
/// an error of the model, does not affect the others.
///
/// # Safety
/// `instance` is alive.
unsafe fn serve<B: Backend>(
    loaded: &Loaded<B>,
    instance: *mut api::Instance,
    incoming: Vec<Incoming>,
    start: u64,
) -> Result<(), BackendError> {
    let (mut requests, mut unread) = (Vec::new(), Vec::new());
    for request in &incoming {
        match guarded(|| request.read()) {
            Ok(request) => {
                requests.push(request);
                unread.push(None);
            }
            Err(fault) => unread.push(Some(fault)),
        }
    }
    let compute_start = now();
    let outcomes = guarded(|| {
        let outcomes = loaded.backend.execute(&requests);
        if outcomes.len() == requests.len() {
            return Ok(outcomes);
        }
        Err(BackendError::internal(format!(
            "the backend returned {} answers to {} requests",
            outcomes.len(),
            requests.len()
        )))
    });
    let compute_end = now();
    let rows =
        |request| if loaded.has_batch_dimension { crate::Request::n_rows(request) } else { 1 };
    let batch_size = requests.iter().map(rows).sum::<u64>();
    drop(requests);

    let mut outcomes = match outcomes {
        Ok(outcomes) => {
            outcomes.into_iter().map(|outcome| outcome.map_err(BackendError::invalid)).collect()
        }
        Err(fault) => vec![Err(fault); incoming.len()],
    }
    .into_iter();
    let respond = |(request, unread): (&Incoming, Option<BackendError>)| {
        let outcome = unread.map_or_else(|| outcomes.next().expect("as many as were read"), Err);
        request.respond(outcome)
    };
    let answered: Vec<bool> = incoming.iter().zip(unread).map(respond).collect();

    let end = now();
    for (request, success) in incoming.iter().zip(answered) {
        // SAFETY: instance and request are alive.
        unsafe {
            check(api::TRITONBACKEND_ModelInstanceReportStatistics(
                instance,
                request.raw(),
                success,
                start,
                compute_start,
                compute_end,
                end,
            ))?;
        }
    }
    // SAFETY: the instance is alive.
    unsafe {
        check(api::TRITONBACKEND_ModelInstanceReportBatchStatistics(
            instance,
            batch_size,
            start,
            compute_start,
            compute_end,
            end,
        ))
    }
}

/// # Safety
/// `model` is alive.
unsafe fn state_of(model: *mut api::Model) -> Result<*mut c_void, BackendError> {
    let mut state = ptr::null_mut();
    // SAFETY: the model is alive, and the pointer leads to a variable.
    unsafe { check(api::TRITONBACKEND_ModelState(model, &mut state)) }?;
    Ok(state)
}

/// # Safety
/// `model` is alive.
unsafe fn files(model: *mut api::Model) -> Result<ModelFiles, BackendError> {
    let (mut name, mut version) = (ptr::null(), 0);
    let (mut artifact, mut location) = (0, ptr::null());
    let mut message = ptr::null_mut();
    // SAFETY: the model is alive, the texts are its own and copied at once, and every pointer leads
    // to a variable.
    let (name, dir) = unsafe {
        check(api::TRITONBACKEND_ModelName(model, &mut name))?;
        check(api::TRITONBACKEND_ModelVersion(model, &mut version))?;
        check(api::TRITONBACKEND_ModelRepository(model, &mut artifact, &mut location))?;
        (text(name)?.to_owned(), PathBuf::from(text(location)?))
    };
    let (mut json, mut n_bytes) = (ptr::null(), 0);
    // SAFETY: the message is the caller's; its text lives up to its deletion, and is parsed before.
    let config = unsafe {
        check(api::TRITONBACKEND_ModelConfig(model, 1, &mut message))?;
        let config =
            check(api::TRITONSERVER_MessageSerializeToJson(message, &mut json, &mut n_bytes))
                .and_then(|()| {
                    serde_json::from_slice(slice::from_raw_parts(json.cast(), n_bytes))
                        .map_err(|error| BackendError::of(&error))
                });
        check(api::TRITONSERVER_MessageDelete(message))?;
        config?
    };
    Ok(ModelFiles { version_dir: dir.join(version.to_string()), name, version, dir, config })
}

/// Nanoseconds of the server's clock, C++'s `steady_clock`.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer leads to a variable. The call fails for unknown clocks only.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
