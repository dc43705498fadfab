//! The functions of Triton's C interface that this package uses, as `tritonbackend.h` 1.19 and
//! `tritonserver.h` declare them.
//!
//! The linker does not find them: they are resolved in the server when it loads the library.

use std::ffi::{c_char, c_int, c_void};

/// Declares types whose contents only the server knows.
macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $($(#[$doc])*
        #[derive(Debug)]
        #[repr(C)]
        pub struct $name {
            _private: [u8; 0],
        })*
    };
}

opaque! {
    /// `TRITONSERVER_Error`; a null pointer to one is success.
    Error;
    /// `TRITONSERVER_Message`
    Message;
    /// `TRITONBACKEND_Backend`
    Backend;
    /// `TRITONBACKEND_Model`
    Model;
    /// `TRITONBACKEND_ModelInstance`
    Instance;
    /// `TRITONBACKEND_Request`
    Request;
    /// `TRITONBACKEND_Input`
    Input;
    /// `TRITONBACKEND_Response`
    Response;
    /// `TRITONBACKEND_Output`
    Output;
}

pub(crate) const ERROR_INTERNAL: c_int = 1;
pub(crate) const ERROR_INVALID_ARG: c_int = 3;
pub(crate) const ERROR_UNSUPPORTED: c_int = 5;
pub(crate) const LOG_ERROR: c_int = 2;
pub(crate) const MEMORY_CPU: c_int = 0;
pub(crate) const MEMORY_GPU: c_int = 2;
pub(crate) const PARAMETER_STRING: c_int = 0;
pub(crate) const PARAMETER_INT: c_int = 1;
pub(crate) const PARAMETER_BOOL: c_int = 2;
pub(crate) const RELEASE_ALL: u32 = 1;
pub(crate) const COMPLETE_FINAL: u32 = 1;

unsafe extern "C" {
    pub(crate) fn TRITONSERVER_ErrorNew(code: c_int, message: *const c_char) -> *mut Error;
    pub(crate) fn TRITONSERVER_ErrorDelete(error: *mut Error);
    pub(crate) fn TRITONSERVER_ErrorCode(error: *mut Error) -> c_int;
    pub(crate) fn TRITONSERVER_ErrorMessage(error: *mut Error) -> *const c_char;
    pub(crate) fn TRITONSERVER_LogMessage(
        level: c_int,
        file: *const c_char,
        line: c_int,
        message: *const c_char,
    ) -> *mut Error;
    pub(crate) fn TRITONSERVER_MessageSerializeToJson(
        message: *mut Message,
        text: *mut *const c_char,
        size: *mut usize,
    ) -> *mut Error;
    pub(crate) fn TRITONSERVER_MessageDelete(message: *mut Message) -> *mut Error;

    pub(crate) fn TRITONBACKEND_ApiVersion(major: *mut u32, minor: *mut u32) -> *mut Error;

    pub(crate) fn TRITONBACKEND_ModelName(
        model: *mut Model,
        name: *mut *const c_char,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ModelVersion(model: *mut Model, version: *mut u64) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ModelRepository(
        model: *mut Model,
        artifact: *mut c_int,
        location: *mut *const c_char,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ModelConfig(
        model: *mut Model,
        format: u32,
        config: *mut *mut Message,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ModelState(
        model: *mut Model,
        state: *mut *mut c_void,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ModelSetState(model: *mut Model, state: *mut c_void) -> *mut Error;

    pub(crate) fn TRITONBACKEND_ModelInstanceModel(
        instance: *mut Instance,
        model: *mut *mut Model,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ModelInstanceReportStatistics(
        instance: *mut Instance,
        request: *mut Request,
        success: bool,
        start_ns: u64,
        compute_start_ns: u64,
        compute_end_ns: u64,
        end_ns: u64,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ModelInstanceReportBatchStatistics(
        instance: *mut Instance,
        batch_size: u64,
        start_ns: u64,
        compute_start_ns: u64,
        compute_end_ns: u64,
        end_ns: u64,
    ) -> *mut Error;

    pub(crate) fn TRITONBACKEND_RequestInputCount(
        request: *mut Request,
        count: *mut u32,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_RequestInputByIndex(
        request: *mut Request,
        index: u32,
        input: *mut *mut Input,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_RequestOutputCount(
        request: *mut Request,
        count: *mut u32,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_RequestOutputName(
        request: *mut Request,
        index: u32,
        name: *mut *const c_char,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_RequestParameterCount(
        request: *mut Request,
        count: *mut u32,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_RequestParameter(
        request: *mut Request,
        index: u32,
        key: *mut *const c_char,
        kind: *mut c_int,
        value: *mut *const c_void,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_RequestRelease(request: *mut Request, flags: u32) -> *mut Error;

    pub(crate) fn TRITONBACKEND_InputProperties(
        input: *mut Input,
        name: *mut *const c_char,
        datatype: *mut c_int,
        shape: *mut *const i64,
        n_dims: *mut u32,
        n_bytes: *mut u64,
        n_buffers: *mut u32,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_InputBuffer(
        input: *mut Input,
        index: u32,
        buffer: *mut *const c_void,
        n_bytes: *mut u64,
        memory: *mut c_int,
        memory_id: *mut i64,
    ) -> *mut Error;

    pub(crate) fn TRITONBACKEND_ResponseNew(
        response: *mut *mut Response,
        request: *mut Request,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ResponseDelete(response: *mut Response) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ResponseOutput(
        response: *mut Response,
        output: *mut *mut Output,
        name: *const c_char,
        datatype: c_int,
        shape: *const i64,
        n_dims: u32,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_OutputBuffer(
        output: *mut Output,
        buffer: *mut *mut c_void,
        n_bytes: u64,
        memory: *mut c_int,
        memory_id: *mut i64,
    ) -> *mut Error;
    pub(crate) fn TRITONBACKEND_ResponseSend(
        response: *mut Response,
        flags: u32,
        error: *mut Error,
    ) -> *mut Error;
}
