//! Inference requests, and the check that they fit a model.

use std::time::Duration;

use bireme_base::message::quoted;
use bireme_protocol::{DataType, Parameter, Tensor};

use crate::protocol::ModelConfig;
use crate::request_error::{RequestError, RequestErrorKind};

#[derive(Clone, Debug, Default)]
pub struct InferRequest {
    pub inputs: Vec<Tensor>,
    /// Names of the wanted outputs; empty: all.
    pub outputs: Vec<String>,
    pub parameters: Vec<(String, Parameter)>,
    /// The most bytes of all output tensors; `None`: any number.
    pub max_answer: Option<usize>,
}

/// The parameter with a request's own timeout in microseconds.
pub const TIMEOUT: &str = "timeout";

/// A request's own timeout; as in Triton, 0 and less mean none.
///
/// # Errors
/// The value is not a whole number.
pub fn timeout(value: &Parameter) -> Result<Option<Duration>, RequestError> {
    match value {
        Parameter::Int(microseconds @ 1..) => {
            Ok(Some(Duration::from_micros(microseconds.unsigned_abs())))
        }
        Parameter::Int(_) => Ok(None),
        other => Err(RequestError::invalid(format!(
            "parameter `{TIMEOUT}` must be a whole number of microseconds, not {other}"
        ))),
    }
}

/// Refuses a parameter whose name Triton reserves. Others that no model reads are ignored.
pub(crate) fn check_parameter(name: &str) -> Result<(), RequestError> {
    if name.starts_with("triton_") {
        let name = quoted(name);
        return Err(RequestError::invalid(format!(
            "parameter {name}: names that begin with `triton_` are reserved"
        )));
    }
    Ok(())
}

/// The error for a type that the protocol does not have.
pub(crate) fn unknown_type(input: &str, datatype: &str) -> RequestError {
    let (input, datatype) = (quoted(input), quoted(datatype));
    RequestError::invalid(format!(
        "input {input} is of an unknown type {datatype}; types are {}",
        DataType::names()
    ))
}

/// The error for Triton's classification extension.
pub(crate) fn no_classes(output: &str) -> RequestError {
    RequestError::invalid(format!("output {}: this server does not classify", quoted(output)))
}

impl InferRequest {
    /// Checks names, types, shapes and the amount of data against the configuration.
    ///
    /// # Errors
    /// The first tensor that does not fit.
    pub fn check(&self, config: &ModelConfig, max_rows: usize) -> Result<(), RequestError> {
        let known = config.input.iter().map(|input| input.name.as_str());
        for (number, tensor) in self.inputs.iter().enumerate() {
            if !known.clone().any(|name| name == tensor.name) {
                let names = known.collect::<Vec<_>>().join("`, `");
                let name = quoted(&tensor.name);
                return Err(RequestError::invalid(format!(
                    "unknown input {name}; inputs are `{names}`"
                )));
            }
            if self.inputs[..number].iter().any(|other| other.name == tensor.name) {
                return Err(RequestError::invalid(format!(
                    "input `{}` is given twice",
                    tensor.name
                )));
            }
        }
        let mut n_rows = None;
        for input in &config.input {
            let Some(tensor) = self.inputs.iter().find(|tensor| tensor.name == input.name) else {
                if input.optional {
                    continue;
                }
                return Err(RequestError::invalid(format!("input `{}` is missing", input.name)));
            };
            let name = &tensor.name;
            let declared = DataType::from_number(input.data_type);
            if declared != Some(tensor.datatype) {
                let wanted = declared.map_or("INVALID", DataType::name);
                return Err(RequestError::invalid(format!(
                    "input `{name}` must be of type {wanted}, not {}",
                    tensor.datatype
                )));
            }
            let is_batched = config.max_batch_size > 0;
            let mut dims = input.dims.clone();
            dims.splice(0..0, is_batched.then_some(-1));
            tensor.view().n_elements().map_err(RequestError::invalid)?;
            let fits = |(&dim, &size): (&i64, &i64)| dim < 0 || dim == size;
            if dims.len() != tensor.shape.len() || !dims.iter().zip(&tensor.shape).all(fits) {
                return Err(RequestError::invalid(format!(
                    "input `{name}` must have the shape {}, not {:?}",
                    shape_wanted(&dims),
                    tensor.shape
                )));
            }
            tensor.view().check().map_err(RequestError::invalid)?;
            let rows = tensor.shape.first().map_or(1, |&rows| rows as usize);
            if rows > max_rows {
                return Err(RequestError::new(
                    RequestErrorKind::TooLarge,
                    format!(
                        "input `{name}` has {rows} rows, and at most {max_rows} are served at once"
                    ),
                ));
            }
            if is_batched {
                let (first, n) = *n_rows.get_or_insert((name, rows));
                if n != rows {
                    return Err(RequestError::invalid(format!(
                        "input `{name}` has {rows} rows, input `{first}` {n}"
                    )));
                }
                if rows > config.max_batch_size as usize {
                    return Err(RequestError::invalid(format!(
                        "a batch of {rows} is larger than the model's {}",
                        config.max_batch_size
                    )));
                }
            }
        }
        let missing = self
            .outputs
            .iter()
            .find(|name| !config.output.iter().any(|output| output.name == **name));
        missing.map_or(Ok(()), |name| {
            let outputs: Vec<&str> =
                config.output.iter().map(|output| output.name.as_str()).collect();
            let (name, outputs) = (quoted(name), outputs.join("`, `"));
            Err(RequestError::invalid(format!("unknown output {name}; outputs are `{outputs}`")))
        })
    }
}

/// A shape for messages, with `any` for sizes that do not matter.
fn shape_wanted(dims: &[i64]) -> String {
    let size = |&dim: &i64| if dim < 0 { "any".to_owned() } else { dim.to_string() };
    format!("[{}]", dims.iter().map(size).collect::<Vec<_>>().join(", "))
}
