//! A request for inference, and whether it fits a model.

use std::time::Duration;

use bireme_base::message::quoted;
use bireme_etl::serving::Parameter;
use bireme_etl::tensor::{DataType, Tensor};

use crate::fault::{Fault, Kind};
use crate::model_config::datatype;
use crate::protocol::ModelConfig;

/// What is asked of a model.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Tensors by their names.
    pub inputs: Vec<Tensor>,
    /// Names of the outputs that are wanted; empty: all.
    pub outputs: Vec<String>,
    /// Whatever else was said.
    pub parameters: Vec<(String, Parameter)>,
    /// Bytes of the answer's tensors at most; none: any number.
    pub max_answer: Option<usize>,
}

/// The parameter with a request's own limit of time, in microseconds.
pub const TIMEOUT: &str = "timeout";

/// A request's own limit of time: 0 and below are none, as in Triton.
///
/// # Errors
/// It is not a whole number.
pub fn timeout(value: &Parameter) -> Result<Option<Duration>, Fault> {
    match value {
        Parameter::Int(microseconds @ 1..) => Ok(Some(Duration::from_micros(microseconds.unsigned_abs()))),
        Parameter::Int(_) => Ok(None),
        other => Err(Fault::invalid(format!(
            "parameter `{TIMEOUT}` must be a whole number of microseconds, not {other}"
        ))),
    }
}

/// Refuses a parameter whose name Triton keeps for itself. Others that no model looks for are
/// ignored.
///
/// # Errors
/// Says so.
pub(crate) fn check_parameter(name: &str) -> Result<(), Fault> {
    if name.starts_with("triton_") {
        let name = quoted(name);
        return Err(Fault::invalid(format!(
            "parameter {name}: names that begin with `triton_` are reserved"
        )));
    }
    Ok(())
}

/// A type that the protocol does not have.
pub(crate) fn unknown_type(input: &str, datatype: &str) -> Fault {
    let (input, datatype) = (quoted(input), quoted(datatype));
    Fault::invalid(format!("input {input} is of an unknown type {datatype}; types are {}", DataType::names()))
}

/// Triton's classification extension.
pub(crate) fn no_classes(output: &str) -> Fault {
    Fault::invalid(format!("output {}: this server does not classify", quoted(output)))
}

impl Request {
    /// Checks names, types, sizes and the amount of data, so that a model need not.
    ///
    /// # Errors
    /// Names the tensor that does not fit.
    pub fn check(&self, config: &ModelConfig, max_rows: usize) -> Result<(), Fault> {
        let known = config.input.iter().map(|input| input.name.as_str());
        for (number, tensor) in self.inputs.iter().enumerate() {
            if !known.clone().any(|name| name == tensor.name) {
                let names = known.collect::<Vec<_>>().join("`, `");
                let name = quoted(&tensor.name);
                return Err(Fault::invalid(format!("there is no input {name}; inputs are `{names}`")));
            }
            if self.inputs[..number].iter().any(|other| other.name == tensor.name) {
                return Err(Fault::invalid(format!("input `{}` is given twice", tensor.name)));
            }
        }
        let mut n_rows = None;
        for input in &config.input {
            let Some(tensor) = self.inputs.iter().find(|tensor| tensor.name == input.name) else {
                if input.optional {
                    continue;
                }
                return Err(Fault::invalid(format!("input `{}` is missing", input.name)));
            };
            let name = &tensor.name;
            if datatype(input.data_type) != Some(tensor.datatype) {
                let wanted =
                    input.data_type().as_str_name().trim_start_matches("TYPE_").replace("STRING", "BYTES");
                return Err(Fault::invalid(format!(
                    "input `{name}` must be of type {wanted}, not {}",
                    tensor.datatype
                )));
            }
            let is_batched = config.max_batch_size > 0;
            let mut dims = input.dims.clone();
            dims.splice(0..0, is_batched.then_some(-1));
            tensor.view().n_elements().map_err(Fault::invalid)?;
            let fits = |(&dim, &size): (&i64, &i64)| dim < 0 || dim == size;
            if dims.len() != tensor.shape.len() || !dims.iter().zip(&tensor.shape).all(fits) {
                return Err(Fault::invalid(format!(
                    "input `{name}` must have the shape {}, not {:?}",
                    shape_wanted(&dims),
                    tensor.shape
                )));
            }
            tensor.view().check().map_err(Fault::invalid)?;
            let rows = tensor.shape.first().map_or(1, |&rows| rows as usize);
            if rows > max_rows {
                return Err(Fault::new(
                    Kind::TooLarge,
                    format!("input `{name}` has {rows} rows, and at most {max_rows} are served at once"),
                ));
            }
            if is_batched {
                let (first, n) = *n_rows.get_or_insert((name, rows));
                if n != rows {
                    return Err(Fault::invalid(format!(
                        "input `{name}` has {rows} rows, input `{first}` {n}"
                    )));
                }
                if rows > config.max_batch_size as usize {
                    return Err(Fault::invalid(format!(
                        "a batch of {rows} is larger than the model's {}",
                        config.max_batch_size
                    )));
                }
            }
        }
        let missing =
            self.outputs.iter().find(|name| !config.output.iter().any(|output| output.name == **name));
        missing.map_or(Ok(()), |name| {
            let outputs: Vec<&str> = config.output.iter().map(|output| output.name.as_str()).collect();
            let (name, outputs) = (quoted(name), outputs.join("`, `"));
            Err(Fault::invalid(format!("there is no output {name}; outputs are `{outputs}`")))
        })
    }
}

/// A shape in which `any` stands where the size does not matter.
fn shape_wanted(dims: &[i64]) -> String {
    let size = |&dim: &i64| if dim < 0 { "any".to_owned() } else { dim.to_string() };
    format!("[{}]", dims.iter().map(size).collect::<Vec<_>>().join(", "))
}
