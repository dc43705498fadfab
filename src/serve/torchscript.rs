//! TorchScript modules on the tensors of the protocol, as the `pytorch_libtorch` backend of Triton runs them.

use std::path::Path;

use bireme_base::message::single_line;
use bireme_etl::tensor::{DataType, Tensor, TensorView};
use tch::{CModule, Device, IValue, Kind, Tensor as Torch, no_grad};

use crate::model_config::datatype;
use crate::protocol::ModelConfig;

/// A module with the inputs and outputs of its configuration.
#[derive(Debug)]
pub struct Module {
    module: CModule,
    device: Device,
    /// Names and types, in the order of the arguments.
    inputs: Vec<(String, DataType)>,
    /// Names and types, in the order of the results.
    outputs: Vec<(String, DataType)>,
    /// Whether the first dimension counts sessions, so that requests may be run together.
    is_batched: bool,
}

/// Requests whose rows are equally long.
#[derive(Debug)]
struct Group {
    /// The sizes of a row of each input.
    rows: Vec<Vec<i64>>,
    /// Each one's place among the calls, and its inputs.
    members: Vec<(usize, Vec<Torch>)>,
}

/// Rows that a module is given at once: more would not be faster, and their scores of a large catalogue take memory.
const PIECE: i64 = 64;

/// A request as a module sees it.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// Its tensors, in any order.
    pub inputs: Vec<TensorView<'a>>,
    /// The outputs that somebody waits for; empty: all.
    pub wanted: &'a [String],
}

impl Module {
    /// Loads a module whose inputs and outputs are in the order of the configuration.
    ///
    /// # Errors
    /// What libtorch says, or a type that it does not have.
    pub fn load(path: &Path, config: &ModelConfig, device: Device) -> Result<Self, String> {
        let declared = |name: &String, number: i32| {
            let datatype = datatype(number).filter(|&datatype| kind(datatype).is_ok());
            datatype
                .map(|datatype| (name.clone(), datatype))
                .ok_or(format!("`{name}` has no `data_type` that libtorch has"))
        };
        let inputs = config.input.iter().map(|input| declared(&input.name, input.data_type));
        let outputs = config.output.iter().map(|output| declared(&output.name, output.data_type));
        Ok(Self {
            module: CModule::load_on_device(path, device).map_err(one_line)?,
            device,
            inputs: inputs.collect::<Result<_, _>>()?,
            outputs: outputs.collect::<Result<_, _>>()?,
            is_batched: config.max_batch_size > 0,
        })
    }

    /// Answers calls, in their order; those whose rows are equally long are run as one.
    pub fn execute(&self, calls: &[Call<'_>]) -> Vec<Result<Vec<Tensor>, String>> {
        let mut answers: Vec<Option<Result<Vec<Tensor>, String>>> = vec![None; calls.len()];
        let mut groups: Vec<Group> = Vec::new();
        for (place, call) in calls.iter().enumerate() {
            match self.read(&call.inputs) {
                Err(problem) => answers[place] = Some(Err(problem)),
                Ok(inputs) => {
                    let row = |tensor: &Torch| tensor.size().get(1..).unwrap_or_default().to_vec();
                    let rows: Vec<Vec<i64>> = inputs.iter().map(row).collect();
                    match groups.iter_mut().find(|group| self.is_batched && group.rows == rows) {
                        Some(group) => group.members.push((place, inputs)),
                        None => groups.push(Group { rows, members: vec![(place, inputs)] }),
                    }
                }
            }
        }
        for Group { members, .. } in groups {
            let together = if members.len() > 1 { self.run_together(&members, calls).ok() } else { None };
            let answered = together.unwrap_or_else(|| {
                // One request among them may be at fault, which the others must not feel.
                let alone = |(place, inputs): &(usize, Vec<Torch>)| {
                    let wanted = calls[*place].wanted;
                    self.answer(&self.run_in_pieces(inputs, |name| is_wanted(wanted, name))?, wanted)
                };
                members.iter().map(alone).collect()
            });
            for ((place, _), answer) in members.iter().zip(answered) {
                answers[*place] = Some(answer);
            }
        }
        answers.into_iter().map(|answer| answer.expect("every call is in a group or refused")).collect()
    }

    /// The tensors of a request, in the order of the configuration.
    fn read(&self, views: &[TensorView<'_>]) -> Result<Vec<Torch>, String> {
        let read = |(name, datatype): &(String, DataType)| {
            let view = views.iter().find(|view| view.name == *name);
            let view = view.ok_or_else(|| format!("input `{name}` is missing"))?;
            view.check()?;
            if view.datatype != *datatype {
                return Err(format!("input `{name}` must be of type {datatype}, not {}", view.datatype));
            }
            // Bytes other than 0 and 1 are no truth values to C++.
            let stored = if *datatype == DataType::Bool { Kind::Uint8 } else { kind(*datatype)? };
            let tensor = Torch::f_from_data_size(view.data, view.shape, stored).map_err(one_line)?;
            tensor
                .f_to_kind(kind(*datatype)?)
                .and_then(|tensor| tensor.f_to_device(self.device))
                .map_err(one_line)
        };
        self.inputs.iter().map(read).collect()
    }

    fn run(&self, inputs: &[Torch]) -> Result<Vec<Torch>, String> {
        let inputs: Vec<_> = inputs.iter().map(|input| IValue::Tensor(input.shallow_clone())).collect();
        let tensor = |value| match value {
            IValue::Tensor(tensor) => Ok(tensor),
            _ => Err("`forward` returned something other than tensors".to_owned()),
        };
        // Of this thread. What it would gain is little, and lost again with each new shape that it is adapted to.
        tch::jit::f_set_graph_executor_optimize(false).map_err(one_line)?;
        let outputs: Vec<Torch> = match no_grad(|| self.module.forward_is(&inputs)).map_err(one_line)? {
            IValue::Tuple(values) => values.into_iter().map(tensor).collect::<Result<_, _>>()?,
            value => vec![tensor(value)?],
        };
        if outputs.len() != self.outputs.len() {
            return Err(format!(
                "`forward` returned {} outputs instead of {}",
                outputs.len(),
                self.outputs.len()
            ));
        }
        Ok(outputs)
    }

    /// Runs all rows, a piece at a time. Of outputs that nobody waits for, the first piece must do.
    fn run_in_pieces(
        &self,
        inputs: &[Torch],
        is_wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<Torch>, String> {
        let n = inputs.first().map_or(0, |input| input.size().first().copied().unwrap_or(0));
        if !self.is_batched || n <= PIECE {
            return self.run(inputs);
        }
        let mut pieces: Vec<Vec<Torch>> = self.outputs.iter().map(|_| Vec::new()).collect();
        for start in (0..n).step_by(PIECE as usize) {
            let rows = inputs.iter().map(|input| input.f_narrow(0, start, PIECE.min(n - start)));
            let outputs = self.run(&rows.collect::<Result<Vec<_>, _>>().map_err(one_line)?)?;
            for ((kept, output), (name, _)) in pieces.iter_mut().zip(outputs).zip(&self.outputs) {
                if kept.is_empty() || is_wanted(name) {
                    kept.push(output);
                }
            }
        }
        pieces.iter().map(|pieces| Torch::f_cat(pieces, 0).map_err(one_line)).collect()
    }

    fn run_together(
        &self,
        members: &[(usize, Vec<Torch>)],
        calls: &[Call<'_>],
    ) -> Result<Vec<Result<Vec<Tensor>, String>>, String> {
        let column = |number: usize| {
            let parts: Vec<&Torch> = members.iter().map(|(_, inputs)| &inputs[number]).collect();
            Torch::f_cat(&parts, 0).map_err(one_line)
        };
        let inputs = (0..self.inputs.len()).map(column).collect::<Result<Vec<_>, _>>()?;
        let wanted = |name: &str| members.iter().any(|(place, _)| is_wanted(calls[*place].wanted, name));
        let outputs = self.run_in_pieces(&inputs, wanted)?;
        let mut start = 0;
        let mut answers = Vec::with_capacity(members.len());
        for (place, inputs) in members {
            let n = inputs[0].size()[0];
            let wanted = calls[*place].wanted;
            let own = outputs.iter().zip(&self.outputs).map(|(output, (name, _))| {
                if is_wanted(wanted, name) {
                    output.f_narrow(0, start, n)
                } else {
                    Ok(output.shallow_clone())
                }
            });
            answers.push(self.answer(&own.collect::<Result<Vec<_>, _>>().map_err(one_line)?, wanted));
            start += n;
        }
        Ok(answers)
    }

    fn answer(&self, outputs: &[Torch], wanted: &[String]) -> Result<Vec<Tensor>, String> {
        let outputs = self.outputs.iter().zip(outputs).filter(|((name, _), _)| is_wanted(wanted, name));
        outputs.map(|((name, datatype), output)| to_tensor(name, *datatype, output)).collect()
    }
}

fn is_wanted(wanted: &[String], name: &str) -> bool {
    wanted.is_empty() || wanted.iter().any(|wanted| wanted == name)
}

fn to_tensor(name: &str, datatype: DataType, output: &Torch) -> Result<Tensor, String> {
    if output.kind() != kind(datatype)? {
        return Err(format!("output `{name}` is not of the type {datatype} that the configuration says"));
    }
    let stored = if datatype == DataType::Bool { Kind::Uint8 } else { output.kind() };
    let on_host = output.f_to_device(Device::Cpu).and_then(|output| output.f_to_kind(stored));
    let on_host = on_host.and_then(|output| output.f_contiguous()).map_err(one_line)?;
    let mut data = vec![0; on_host.numel() * stored.elt_size_in_bytes()];
    on_host.f_copy_data_u8(&mut data, on_host.numel()).map_err(one_line)?;
    Ok(Tensor { name: name.to_owned(), datatype, shape: on_host.size(), data })
}

fn kind(datatype: DataType) -> Result<Kind, String> {
    Ok(match datatype {
        DataType::Bool => Kind::Bool,
        DataType::Uint8 => Kind::Uint8,
        DataType::Int8 => Kind::Int8,
        DataType::Int16 => Kind::Int16,
        DataType::Int32 => Kind::Int,
        DataType::Int64 => Kind::Int64,
        DataType::Fp16 => Kind::Half,
        DataType::Bf16 => Kind::BFloat16,
        DataType::Fp32 => Kind::Float,
        DataType::Fp64 => Kind::Double,
        other => return Err(format!("libtorch has no tensors of {other}")),
    })
}

/// What libtorch says, without its stack.
fn one_line(error: impl ToString) -> String {
    single_line(error.to_string().lines().next().unwrap_or_default())
}
