//! Requests of the server, read and answered.

use std::borrow::Cow;
use std::ffi::{c_char, c_int, c_void};
use std::{ptr, slice};

use bireme_protocol::{DataType, Parameter, Tensor, TensorView};

use crate::api;
use crate::backend_error::{BackendError, c_text, check, text};

/// A request: named tensors, and parameters beside them.
#[derive(Debug)]
pub struct Request<'r> {
    inputs: Vec<RequestInput<'r>>,
    parameters: Vec<(String, Parameter)>,
}

#[derive(Debug)]
struct RequestInput<'r> {
    name: &'r str,
    datatype: DataType,
    shape: &'r [i64],
    data: Cow<'r, [u8]>,
}

impl Request<'_> {
    /// The tensors as the client sent them: use the accessors of [`TensorView`], which check shapes
    /// and sizes.
    ///
    /// If the configuration has a `max_batch_size` above 0, the first dimension of tensors is the
    /// batch.
    pub fn inputs(&self) -> Vec<TensorView<'_>> {
        let view = |&RequestInput { name, datatype, shape, ref data }| TensorView {
            name,
            datatype,
            shape,
            data,
        };
        self.inputs.iter().map(view).collect()
    }

    /// The parameters, in no particular order.
    pub fn parameters(&self) -> &[(String, Parameter)] {
        &self.parameters
    }

    /// The request's share of the rows of a batch.
    pub(crate) fn n_rows(&self) -> u64 {
        self.inputs
            .first()
            .and_then(|input| input.shape.first())
            .map_or(1, |&rows| rows.max(1) as u64)
    }
}

/// A request owned by the backend. Dropping it releases it to the server, exactly once.
#[derive(Debug)]
pub(crate) struct Incoming(*mut api::Request);

impl Incoming {
    /// # Safety
    /// The server passed `request` to the backend, which owns it from now on; it is taken once.
    pub unsafe fn take(request: *mut api::Request) -> Self {
        Self(request)
    }

    pub fn raw(&self) -> *mut api::Request {
        self.0
    }

    /// Reads the tensors. Those in one buffer are not copied.
    pub fn read(&self) -> Result<Request<'_>, BackendError> {
        // SAFETY: the request is alive until `self` is dropped, and writes a number of its inputs
        // below.
        let n_inputs = unsafe { count(|n| api::TRITONBACKEND_RequestInputCount(self.0, n)) }?;
        // SAFETY: as above.
        let n_parameters =
            unsafe { count(|n| api::TRITONBACKEND_RequestParameterCount(self.0, n)) }?;
        Ok(Request {
            inputs: (0..n_inputs).map(|index| self.input(index)).collect::<Result<_, _>>()?,
            parameters: (0..n_parameters)
                .map(|index| self.parameter(index))
                .collect::<Result<_, _>>()?,
        })
    }

    fn input(&self, index: u32) -> Result<RequestInput<'_>, BackendError> {
        let mut input = ptr::null_mut();
        let (mut name, mut datatype, mut shape) = (ptr::null(), 0, ptr::null());
        let (mut n_dims, mut n_bytes, mut n_buffers) = (0, 0, 0);
        // SAFETY: the request is alive, and each pointer points to a different variable. An input
        // lives as long as its request, which `self` keeps.
        unsafe {
            check(api::TRITONBACKEND_RequestInputByIndex(self.0, index, &mut input))?;
            check(api::TRITONBACKEND_InputProperties(
                input,
                &mut name,
                &mut datatype,
                &mut shape,
                &mut n_dims,
                &mut n_bytes,
                &mut n_buffers,
            ))?;
        }
        // SAFETY: the name belongs to the input, which lives as long as `self`.
        let name = unsafe { text(name) }?;
        // SAFETY: `shape` leads to `n_dims` sizes of the input, which lives as long as `self`.
        let shape = unsafe { elements(shape, n_dims as usize) };
        let datatype = DataType::from_number(datatype).ok_or_else(|| {
            BackendError::invalid(format!("input `{name}` is of the unknown type {datatype}"))
        })?;
        let chunk = |index| {
            let (mut buffer, mut n_bytes) = (ptr::null(), 0);
            let (mut memory, mut memory_id) = (api::MEMORY_CPU, 0);
            // SAFETY: the input lives as long as `self`, and every pointer leads to a variable of
            // its own.
            unsafe {
                check(api::TRITONBACKEND_InputBuffer(
                    input,
                    index,
                    &mut buffer,
                    &mut n_bytes,
                    &mut memory,
                    &mut memory_id,
                ))?;
            }
            if memory == api::MEMORY_GPU {
                return Err(BackendError::unsupported(format!(
                    "input `{name}` is in the memory of a GPU"
                )));
            }
            // SAFETY: the buffer holds `n_bytes` bytes in the host's memory and lives as long as
            // the input.
            Ok(unsafe { elements::<u8>(buffer.cast(), n_bytes as usize) })
        };
        let data = match n_buffers {
            0 => Cow::Borrowed([].as_slice()),
            1 => Cow::Borrowed(chunk(0)?),
            _ => Cow::Owned((0..n_buffers).map(chunk).collect::<Result<Vec<_>, _>>()?.concat()),
        };
        Ok(RequestInput { name, datatype, shape, data })
    }

    fn parameter(&self, index: u32) -> Result<(String, Parameter), BackendError> {
        let (mut key, mut kind, mut value) = (ptr::null(), 0, ptr::null());
        // SAFETY: the request is alive, and each pointer points to a different variable.
        unsafe {
            check(api::TRITONBACKEND_RequestParameter(
                self.0, index, &mut key, &mut kind, &mut value,
            ))
        }?;
        // SAFETY: the key belongs to the request, and `value` leads to a value of its kind; both
        // are copied.
        unsafe { Ok((text(key)?.to_owned(), parameter(kind, value)?)) }
    }

    /// The names of the wanted outputs.
    fn wanted(&self) -> Result<Vec<&str>, BackendError> {
        // SAFETY: the request is alive until `self` is dropped.
        let n_outputs = unsafe { count(|n| api::TRITONBACKEND_RequestOutputCount(self.0, n)) }?;
        let name = |index| {
            let mut name = ptr::null();
            // SAFETY: as above; the name lives as long as the request.
            unsafe {
                check(api::TRITONBACKEND_RequestOutputName(self.0, index, &mut name))?;
                text(name)
            }
        };
        (0..n_outputs).map(name).collect()
    }

    /// Sends the only response to the request: the wanted tensors, or the error. Returns whether
    /// the tensors were sent.
    pub fn respond(&self, outcome: Result<Vec<Tensor>, BackendError>) -> bool {
        let response = match Response::new(self) {
            Ok(response) => response,
            Err(fault) => {
                fault.log();
                return false;
            }
        };
        let filled = outcome.and_then(|tensors| {
            for name in self.wanted()? {
                let tensor = tensors.iter().find(|tensor| tensor.name == name);
                response.add(tensor.ok_or_else(|| {
                    BackendError::internal(format!("the model returned no output `{name}`"))
                })?)?;
            }
            Ok(())
        });
        let success = filled.is_ok();
        response.send(filled.err());
        success
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // SAFETY: the request belongs to `self`; everything that was read from it borrowed `self`,
        // so nothing refers to it any more.
        let released =
            unsafe { check(api::TRITONBACKEND_RequestRelease(self.0, api::RELEASE_ALL)) };
        if let Err(fault) = released {
            fault.log();
        }
    }
}

/// A response that was not sent yet.
struct Response(*mut api::Response);

impl Response {
    fn new(request: &Incoming) -> Result<Self, BackendError> {
        let mut response = ptr::null_mut();
        // SAFETY: the request is alive.
        unsafe { check(api::TRITONBACKEND_ResponseNew(&mut response, request.0)) }?;
        Ok(Self(response))
    }

    fn add(&self, Tensor { name, datatype, shape, data }: &Tensor) -> Result<(), BackendError> {
        let c_name = c_text(name);
        let (mut output, mut buffer) = (ptr::null_mut(), ptr::null_mut());
        let (mut memory, mut memory_id) = (api::MEMORY_CPU, 0);
        // SAFETY: the response has not been sent; name and shape are copied by the function; every
        // other pointer points to a different variable.
        unsafe {
            check(api::TRITONBACKEND_ResponseOutput(
                self.0,
                &mut output,
                c_name.as_ptr(),
                datatype.number(),
                shape.as_ptr(),
                shape.len() as u32,
            ))?;
            check(api::TRITONBACKEND_OutputBuffer(
                output,
                &mut buffer,
                data.len() as u64,
                &mut memory,
                &mut memory_id,
            ))?;
        }
        if memory == api::MEMORY_GPU {
            return Err(BackendError::unsupported(format!(
                "output `{name}` is wanted in the memory of a GPU"
            )));
        }
        if !data.is_empty() {
            // SAFETY: the buffer was made for as many bytes, in the host's memory, and overlaps
            // nothing of ours.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr(), buffer.cast(), data.len()) };
        }
        Ok(())
    }

    fn send(self, fault: Option<BackendError>) {
        let error = fault.map_or(ptr::null_mut(), BackendError::into_raw);
        // SAFETY: the response has not been sent, and `forget` below keeps it from being deleted.
        // This function deletes the error.
        unsafe {
            let sent = check(api::TRITONBACKEND_ResponseSend(self.0, api::COMPLETE_FINAL, error));
            if !error.is_null() {
                api::TRITONSERVER_ErrorDelete(error);
            }
            if let Err(fault) = sent {
                fault.log();
            }
        }
        std::mem::forget(self);
    }
}

impl Drop for Response {
    fn drop(&mut self) {
        // SAFETY: the response belongs to `self` and was not sent.
        if let Err(fault) = unsafe { check(api::TRITONBACKEND_ResponseDelete(self.0)) } {
            fault.log();
        }
    }
}

/// # Safety
/// `ask` calls a function of the server that writes a number or returns an error that is the
/// caller's.
unsafe fn count(ask: impl FnOnce(&mut u32) -> *mut api::Error) -> Result<u32, BackendError> {
    let mut n = 0;
    // SAFETY: the error is the caller's.
    unsafe { check(ask(&mut n)) }?;
    Ok(n)
}

/// A slice of the server; empty if the pointer is null.
///
/// # Safety
/// `first` is null or leads to `n` elements that live, unchanged, as long as `'a`.
unsafe fn elements<'a, T>(first: *const T, n: usize) -> &'a [T] {
    if first.is_null() || n == 0 {
        return &[];
    }
    // SAFETY: as the caller promises.
    unsafe { slice::from_raw_parts(first, n) }
}

/// The value of a parameter. A kind that is not supported becomes a text that no reader accepts.
///
/// # Safety
/// `value` leads to a value of the kind that the server says.
unsafe fn parameter(kind: c_int, value: *const c_void) -> Result<Parameter, BackendError> {
    // SAFETY: the server keeps an `int64_t` or a `bool` in the place, or a terminated text begins
    // there.
    unsafe {
        Ok(match kind {
            api::PARAMETER_BOOL => Parameter::Bool(*value.cast()),
            api::PARAMETER_INT => Parameter::Int(*value.cast()),
            api::PARAMETER_STRING => Parameter::Text(text(value.cast::<c_char>())?.to_owned()),
            _ => Parameter::Text(format!("a value of kind {kind}")),
        })
    }
}
