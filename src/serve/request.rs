//! A request for inference, and whether it fits a model.

use bireme_etl::serving::Parameter;
use bireme_etl::tensor::Tensor;

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
                return Err(Fault::invalid(format!(
                    "there is no input `{}`; inputs are `{names}`",
                    tensor.name
                )));
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
            let fits = |(&dim, &size): (&i64, &i64)| size >= 0 && (dim < 0 || dim == size);
            if dims.len() != tensor.shape.len() || !dims.iter().zip(&tensor.shape).all(fits) {
                return Err(Fault::invalid(format!(
                    "input `{name}` must have the shape {dims:?}, not {:?}",
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
        missing.map_or(Ok(()), |name| Err(Fault::invalid(format!("there is no output `{name}`"))))
    }
}
