//! What the official `pytorch_libtorch` backend asks of a model, checked before it is published: that server completes
//! no configuration, and finds some faults only when the first request comes.
//!
//! The rules are those of the backend's documentation and source as of release 24.10.

use std::path::Path;

use bireme_serve::protocol::{DataType, ModelConfig};
use tch::{CModule, Device, IValue, Kind, Tensor};

use super::trace::arguments;

/// The file that the backend loads, unless the configuration names another.
pub const FILE: &str = "model.pt";

/// Checks the module `path` and its configuration.
///
/// # Errors
/// Says which rule is broken.
pub fn check(config: &ModelConfig, path: &Path) -> Result<(), String> {
    check_config(config, &arguments(path)?)?;
    let module = CModule::load(path).map_err(|error| error.to_string())?;
    // Sizes other than those of the trace, and each other than 1, so that one that was baked in shows.
    for (n_sessions, any) in [(5, 4), (1, 7)] {
        let inputs = config.input.iter().map(|input| {
            let mut size = vec![n_sessions];
            size.extend(input.dims.iter().map(|&dim| if dim < 0 { any } else { dim }));
            IValue::Tensor(Tensor::ones(size, (kind(input.data_type()).expect("checked"), Device::Cpu)))
        });
        let outputs = module.forward_is(&inputs.collect::<Vec<_>>()).map_err(|error| error.to_string())?;
        check_outputs(config, &outputs, n_sessions)?;
    }
    Ok(())
}

fn check_config(config: &ModelConfig, arguments: &[String]) -> Result<(), String> {
    if config.platform != "pytorch_libtorch" && config.backend != "pytorch" {
        return Err("the platform must be `pytorch_libtorch`".to_owned());
    }
    if config.input.is_empty() || config.output.is_empty() {
        return Err("the configuration must name all inputs and outputs".to_owned());
    }
    if config.input.len() != arguments.len() {
        return Err(format!(
            "`forward` takes {} arguments, the configuration has {} inputs",
            arguments.len(),
            config.input.len()
        ));
    }
    let names = config.input.iter().map(|input| input.name.as_str());
    match names.clone().find(|name| !arguments.iter().any(|argument| argument == name)) {
        // Inputs are then found by the names of arguments, whatever their order.
        None => {}
        Some(name) => {
            let numbers: Option<Vec<usize>> = names.map(index_of).collect();
            if numbers.is_none_or(|numbers| !is_permutation(numbers)) {
                return Err(format!(
                    "input `{name}` is neither an argument of `forward` nor numbered as `<name>__<number>`"
                ));
            }
        }
    }
    let outputs = config.output.iter().map(|output| output.name.as_str());
    let numbers: Vec<Option<usize>> = outputs.map(index_of).collect();
    // Numbered all or none: then the order of the configuration is that of the tuple.
    if numbers.iter().any(Option::is_some)
        && !numbers.into_iter().collect::<Option<Vec<_>>>().is_some_and(is_permutation)
    {
        return Err("some outputs are numbered and others are not".to_owned());
    }
    let inputs = config.input.iter().map(|input| (&input.name, input.data_type(), &input.dims));
    let outputs = config.output.iter().map(|output| (&output.name, output.data_type(), &output.dims));
    for (name, datatype, dims) in inputs.chain(outputs) {
        if kind(datatype).is_none() {
            return Err(format!("`{name}`: the backend has no tensors of {}", datatype.as_str_name()));
        }
        if dims.is_empty() || dims.iter().any(|&dim| dim == 0 || dim < -1) {
            return Err(format!("`{name}` cannot have the dims {dims:?}"));
        }
    }
    Ok(())
}

fn check_outputs(config: &ModelConfig, outputs: &IValue, n_sessions: i64) -> Result<(), String> {
    let IValue::Tuple(outputs) = outputs else {
        return Err("`forward` must return a tuple of tensors".to_owned());
    };
    if outputs.len() != config.output.len() {
        return Err(format!(
            "`forward` returns {} tensors, the configuration has {} outputs",
            outputs.len(),
            config.output.len()
        ));
    }
    for (output, value) in config.output.iter().zip(outputs) {
        let IValue::Tensor(tensor) = value else {
            return Err(format!("output `{}` is no tensor", output.name));
        };
        if Some(tensor.kind()) != kind(output.data_type()) {
            return Err(format!("output `{}` is of type {:?}", output.name, tensor.kind()));
        }
        let size = tensor.size();
        let fits = size.len() == output.dims.len() + 1
            && size[0] == n_sessions
            && size[1..].iter().zip(&output.dims).all(|(size, dim)| *dim < 0 || size == dim);
        if !fits {
            return Err(format!(
                "output `{}` has the shape {size:?} for {n_sessions} sessions, the configuration {:?}",
                output.name, output.dims
            ));
        }
    }
    Ok(())
}

/// The number in `<name>__<number>`.
fn index_of(name: &str) -> Option<usize> {
    name.rsplit_once("__").and_then(|(_, number)| number.parse().ok())
}

fn is_permutation(mut numbers: Vec<usize>) -> bool {
    numbers.sort_unstable();
    numbers.into_iter().eq(0..).then_some(()).is_some()
}

/// The tensors that the backend has.
fn kind(datatype: DataType) -> Option<Kind> {
    Some(match datatype {
        DataType::TypeBool => Kind::Bool,
        DataType::TypeUint8 => Kind::Uint8,
        DataType::TypeInt8 => Kind::Int8,
        DataType::TypeInt16 => Kind::Int16,
        DataType::TypeInt32 => Kind::Int,
        DataType::TypeInt64 => Kind::Int64,
        DataType::TypeFp16 => Kind::Half,
        DataType::TypeFp32 => Kind::Float,
        DataType::TypeFp64 => Kind::Double,
        _ => return None,
    })
}
