//! The rules of the official `pytorch_libtorch` backend, checked before a model is published: the
//! server completes no configuration, and finds some errors only at the first request.
//!
//! The rules are those of the backend's documentation and source as of release 24.10.

use std::path::Path;

use bireme_kernels::torchscript::arguments;
use bireme_protocol::DataType;
use bireme_serve::protocol::ModelConfig;
use bireme_serve::torchscript;
use tch::{CModule, Device, IValue, Kind, Tensor};

/// The file that the backend loads, unless the configuration names another.
pub const FILE: &str = "model.pt";

/// Checks the module `path` and its configuration.
///
/// # Errors
/// The rule that is violated.
pub fn check(config: &ModelConfig, path: &Path) -> Result<(), String> {
    let arguments = arguments(path)?;
    check_config(config)?;
    let (inputs, outputs) = (input_positions(config, &arguments)?, output_positions(config)?);
    let module = CModule::load(path).map_err(|error| error.to_string())?;
    // Sizes other than 1 and those of the trace, to find a size that the trace holds as a constant.
    for (n_sessions, any) in [(5, 4), (1, 7)] {
        let mut values: Vec<(usize, IValue)> = Vec::with_capacity(inputs.len());
        for (input, &position) in config.input.iter().zip(&inputs) {
            let mut size = vec![n_sessions];
            size.extend(input.dims.iter().map(|&dim| if dim < 0 { any } else { dim }));
            let kind = kind_of_number(input.data_type).expect("`check_config` has accepted it");
            let options = (kind, Device::Cpu);
            values.push((position, IValue::Tensor(Tensor::ones(size, options))));
        }
        values.sort_by_key(|(position, _)| *position);
        let values: Vec<IValue> = values.into_iter().map(|(_, value)| value).collect();
        let results = module.forward_is(&values).map_err(|error| error.to_string())?;
        check_outputs(config, &outputs, &results, n_sessions)?;
    }
    Ok(())
}

fn check_config(config: &ModelConfig) -> Result<(), String> {
    if config.platform != "pytorch_libtorch" && config.backend != "pytorch" {
        return Err("the platform must be `pytorch_libtorch`".to_owned());
    }
    if config.input.is_empty() || config.output.is_empty() {
        return Err("the configuration must name all inputs and outputs".to_owned());
    }
    let inputs = config.input.iter().map(|input| (&input.name, input.data_type, &input.dims));
    let outputs = config.output.iter().map(|output| (&output.name, output.data_type, &output.dims));
    for (name, number, dims) in inputs.chain(outputs) {
        if kind_of_number(number).is_none() {
            let datatype = DataType::from_number(number).map_or("INVALID", DataType::name);
            return Err(format!("`{name}`: the backend has no tensors of TYPE_{datatype}"));
        }
        if dims.is_empty() || dims.iter().any(|&dim| dim == 0 || dim < -1) {
            return Err(format!("`{name}` cannot have the dims {dims:?}"));
        }
    }
    Ok(())
}

/// The index of each configured input among the arguments of `forward`: by name, or else by its
/// number.
fn input_positions(config: &ModelConfig, arguments: &[String]) -> Result<Vec<usize>, String> {
    if config.input.len() != arguments.len() {
        return Err(format!(
            "`forward` takes {} arguments, the configuration has {} inputs",
            arguments.len(),
            config.input.len()
        ));
    }
    let names: Vec<&str> = config.input.iter().map(|input| input.name.as_str()).collect();
    let place = |name: &&str| arguments.iter().position(|argument| argument == name);
    if let Some(positions) = names.iter().map(place).collect::<Option<Vec<_>>>() {
        return Ok(positions);
    }
    numbers_of(&names).ok_or_else(|| {
        let unknown = names.iter().find(|name| place(name).is_none()).unwrap_or(&names[0]);
        format!(
            "input `{unknown}` is neither an argument of `forward` nor numbered as \
             `<name>__<number>`"
        )
    })
}

/// The index of each configured output in the tuple that `forward` returns: its number, or else its
/// index in the configuration.
fn output_positions(config: &ModelConfig) -> Result<Vec<usize>, String> {
    let names: Vec<&str> = config.output.iter().map(|output| output.name.as_str()).collect();
    if names.iter().all(|name| number_of(name).is_none()) {
        return Ok((0..names.len()).collect());
    }
    numbers_of(&names).ok_or_else(|| {
        let listed: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
        format!(
            "the outputs {} are not numbered from 0 to {} without gaps",
            listed.join(", "),
            names.len() - 1
        )
    })
}

fn check_outputs(
    config: &ModelConfig,
    positions: &[usize],
    results: &IValue,
    n_sessions: i64,
) -> Result<(), String> {
    let IValue::Tuple(results) = results else {
        return Err("`forward` must return a tuple of tensors".to_owned());
    };
    if results.len() != config.output.len() {
        return Err(format!(
            "`forward` returns {} tensors, the configuration has {} outputs",
            results.len(),
            config.output.len()
        ));
    }
    for (output, &position) in config.output.iter().zip(positions) {
        let IValue::Tensor(tensor) = &results[position] else {
            return Err(format!("output `{}` is not a tensor", output.name));
        };
        if Some(tensor.kind()) != kind_of_number(output.data_type) {
            return Err(format!("output `{}` is of type {:?}", output.name, tensor.kind()));
        }
        let size = tensor.size();
        let fits = size.len() == output.dims.len() + 1
            && size[0] == n_sessions
            && size[1..].iter().zip(&output.dims).all(|(size, dim)| *dim < 0 || size == dim);
        if !fits {
            return Err(format!(
                "output `{}` has the shape {size:?} for {n_sessions} sessions, the configuration \
                 {:?}",
                output.name, output.dims
            ));
        }
    }
    Ok(())
}

/// The number in `<name>__<number>`.
fn number_of(name: &str) -> Option<usize> {
    name.rsplit_once("__").and_then(|(_, number)| number.parse().ok())
}

/// The numbers of all names, if they are a permutation of 0, 1, …
fn numbers_of(names: &[&str]) -> Option<Vec<usize>> {
    let numbers: Vec<usize> = names.iter().map(|name| number_of(name)).collect::<Option<_>>()?;
    let mut sorted = numbers.clone();
    sorted.sort_unstable();
    let is_permutation = sorted.iter().enumerate().all(|(place, &number)| number == place);
    is_permutation.then_some(numbers)
}

/// The kind of the backend's tensors of a type in `config.pbtxt`; `None` where it has none.
fn kind_of_number(number: i32) -> Option<Kind> {
    // libtorch has BF16, the backend does not.
    DataType::from_number(number).and_then(torchscript::kind).filter(|kind| *kind != Kind::BFloat16)
}

#[cfg(test)]
mod tests {
    use bireme_serve::protocol::{ModelInput, ModelOutput};

    use super::*;

    fn config(inputs: &[&str], outputs: &[&str]) -> ModelConfig {
        let input = |name: &&str| ModelInput { name: (*name).into(), ..ModelInput::default() };
        let output = |name: &&str| ModelOutput { name: (*name).into(), ..ModelOutput::default() };
        ModelConfig {
            input: inputs.iter().map(input).collect(),
            output: outputs.iter().map(output).collect(),
            ..ModelConfig::default()
        }
    }

    #[test]
    fn inputs_are_found_by_name_or_by_number() {
        let arguments = ["a".to_owned(), "b".to_owned()];
        let positions = |names: &[&str]| input_positions(&config(names, &[]), &arguments);
        assert_eq!(positions(&["b", "a"]), Ok(vec![1, 0]));
        assert_eq!(positions(&["x__1", "y__0"]), Ok(vec![1, 0]));
        for names in [&["x__0", "y__2"][..], &["a", "y__1"], &["x", "y"], &["x__0", "y__0"], &["a"]]
        {
            assert!(positions(names).is_err(), "{names:?}");
        }
    }

    #[test]
    fn outputs_are_numbered_without_gaps_or_not_at_all() {
        let positions = |names: &[&str]| output_positions(&config(&[], names));
        assert_eq!(positions(&["x__0", "y__1"]), Ok(vec![0, 1]));
        assert_eq!(positions(&["x__1", "y__0"]), Ok(vec![1, 0]));
        assert_eq!(positions(&["scores", "items"]), Ok(vec![0, 1]));
        for names in [&["x__0", "y__2"][..], &["x__0", "y"], &["x__1", "y__1"]] {
            assert!(positions(names).is_err(), "{names:?}");
        }
    }
}
