//! TorchScript modules on the tensors of the protocol, as the `pytorch_libtorch` backend of Triton
//! runs them.

use std::path::Path;

use bireme_base::message::single_line;
use bireme_protocol::{DataType, Tensor, TensorView};
use tch::{CModule, Device, IValue, Kind, Tensor as Torch, no_grad};

use crate::protocol::ModelConfig;

/// A module with the inputs and outputs of its configuration.
#[derive(Debug)]
pub struct ScriptModule {
    module: CModule,
    device: Device,
    /// In the order of the arguments.
    inputs: Vec<Declared>,
    /// In the order of the results.
    outputs: Vec<Declared>,
    /// Whether the first dimension counts sessions, so that requests may be run together.
    is_batched: bool,
}

/// An input or an output as the configuration declares it.
#[derive(Debug)]
struct Declared {
    name: String,
    datatype: DataType,
    kind: Kind,
}

impl Declared {
    fn new(name: &str, number: i32) -> Result<Self, String> {
        let datatype = DataType::from_number(number);
        match datatype.and_then(|datatype| Some((datatype, kind(datatype)?))) {
            Some((datatype, kind)) => Ok(Self { name: name.to_owned(), datatype, kind }),
            None => Err(format!("`{name}` has no `data_type` that libtorch supports")),
        }
    }

    /// The kind that holds the protocol's bytes: libtorch has undefined behaviour where a Bool
    /// tensor holds bytes other than 0 and 1.
    fn kind_of_bytes(&self) -> Kind {
        if self.kind == Kind::Bool { Kind::Uint8 } else { self.kind }
    }
}

/// Calls whose rows are equally long.
#[derive(Debug)]
struct Group {
    /// The sizes of a row of each input.
    row_shapes: Vec<Vec<i64>>,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    /// The index among the calls.
    call: usize,
    inputs: Vec<Torch>,
}

/// Rows of one execution. More would not be faster, and the scores of a large catalogue take
/// memory.
const CHUNK: i64 = 64;

#[derive(Clone, Debug)]
pub struct ModuleCall<'a> {
    /// In any order.
    pub inputs: Vec<TensorView<'a>>,
    /// Names of the outputs to return; empty: all.
    pub wanted: &'a [String],
}

impl ScriptModule {
    /// Loads a module whose inputs and outputs are in the order of the configuration.
    ///
    /// # Errors
    /// A file that libtorch cannot load, or a type that libtorch does not have.
    pub fn load(path: &Path, config: &ModelConfig, device: Device) -> Result<Self, String> {
        let inputs = config.input.iter().map(|input| Declared::new(&input.name, input.data_type));
        let outputs =
            config.output.iter().map(|output| Declared::new(&output.name, output.data_type));
        Ok(Self {
            module: CModule::load_on_device(path, device).map_err(one_line)?,
            device,
            inputs: inputs.collect::<Result<_, _>>()?,
            outputs: outputs.collect::<Result<_, _>>()?,
            is_batched: config.max_batch_size > 0,
        })
    }

    /// Answers calls in their order. Calls whose rows are equally long run as one batch.
    pub fn execute(&self, calls: &[ModuleCall<'_>]) -> Vec<Result<Vec<Tensor>, String>> {
        let mut answers: Vec<Option<Result<Vec<Tensor>, String>>> = vec![None; calls.len()];
        let mut groups: Vec<Group> = Vec::new();
        for (call, ModuleCall { inputs, .. }) in calls.iter().enumerate() {
            let inputs = match self.read(inputs) {
                Ok(inputs) => inputs,
                Err(problem) => {
                    answers[call] = Some(Err(problem));
                    continue;
                }
            };
            let row_shape = |tensor: &Torch| tensor.size().get(1..).unwrap_or_default().to_vec();
            let row_shapes: Vec<Vec<i64>> = inputs.iter().map(row_shape).collect();
            let member = Member { call, inputs };
            let mut known = groups.iter_mut();
            match known.find(|group| self.is_batched && group.row_shapes == row_shapes) {
                Some(group) => group.members.push(member),
                None => groups.push(Group { row_shapes, members: vec![member] }),
            }
        }
        for Group { members, .. } in groups {
            let batched =
                if members.len() > 1 { self.run_batch(&members, calls).ok() } else { None };
            let answered = batched.unwrap_or_else(|| {
                // One request may have failed the batch: run each alone, so that only it fails.
                let alone = |Member { call, inputs }: &Member| {
                    let wanted = calls[*call].wanted;
                    let outputs = self.run_in_chunks(inputs, |name| is_wanted(wanted, name))?;
                    self.answer(&outputs, wanted)
                };
                members.iter().map(alone).collect()
            });
            for (member, answer) in members.iter().zip(answered) {
                answers[member.call] = Some(answer);
            }
        }
        answers
            .into_iter()
            .map(|answer| answer.expect("every call is in a group or refused"))
            .collect()
    }

    /// The tensors of a request, in the order of the configuration.
    fn read(&self, views: &[TensorView<'_>]) -> Result<Vec<Torch>, String> {
        let read = |declared: &Declared| {
            let Declared { name, datatype, kind } = declared;
            let view = views.iter().find(|view| view.name == *name);
            let view = view.ok_or_else(|| format!("input `{name}` is missing"))?;
            view.check()?;
            if view.datatype != *datatype {
                return Err(format!(
                    "input `{name}` must be of type {datatype}, not {}",
                    view.datatype
                ));
            }
            Torch::f_from_data_size(view.data, view.shape, declared.kind_of_bytes())
                .and_then(|tensor| tensor.f_to_kind(*kind))
                .and_then(|tensor| tensor.f_to_device(self.device))
                .map_err(one_line)
        };
        self.inputs.iter().map(read).collect()
    }

    fn run(&self, inputs: &[Torch]) -> Result<Vec<Torch>, String> {
        let inputs: Vec<_> =
            inputs.iter().map(|input| IValue::Tensor(input.shallow_clone())).collect();
        let tensor = |value| match value {
            IValue::Tensor(tensor) => Ok(tensor),
            _ => Err("`forward` returned something other than tensors".to_owned()),
        };
        // The setting is thread-local. Optimizing gains little, and each new shape costs it again.
        tch::jit::f_set_graph_executor_optimize(false).map_err(one_line)?;
        let outputs: Vec<Torch> = match no_grad(|| self.module.forward_is(&inputs))
            .map_err(one_line)?
        {
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

    /// Runs all rows, a chunk at a time. Outputs that are not wanted keep their first chunk only.
    fn run_in_chunks(
        &self,
        inputs: &[Torch],
        is_wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<Torch>, String> {
        let n = inputs.first().map_or(0, |input| input.size().first().copied().unwrap_or(0));
        if !self.is_batched || n <= CHUNK {
            return self.run(inputs);
        }
        let mut chunks: Vec<Vec<Torch>> = self.outputs.iter().map(|_| Vec::new()).collect();
        for start in (0..n).step_by(CHUNK as usize) {
            let rows = inputs.iter().map(|input| input.f_narrow(0, start, CHUNK.min(n - start)));
            let outputs = self.run(&rows.collect::<Result<Vec<_>, _>>().map_err(one_line)?)?;
            for ((kept, output), declared) in chunks.iter_mut().zip(outputs).zip(&self.outputs) {
                if kept.is_empty() || is_wanted(&declared.name) {
                    kept.push(output);
                }
            }
        }
        chunks.iter().map(|chunks| Torch::f_cat(chunks, 0).map_err(one_line)).collect()
    }

    /// Runs several calls as one batch, and splits the outputs by call.
    fn run_batch(
        &self,
        members: &[Member],
        calls: &[ModuleCall<'_>],
    ) -> Result<Vec<Result<Vec<Tensor>, String>>, String> {
        let column = |number: usize| {
            let parts: Vec<&Torch> = members.iter().map(|member| &member.inputs[number]).collect();
            Torch::f_cat(&parts, 0).map_err(one_line)
        };
        let inputs = (0..self.inputs.len()).map(column).collect::<Result<Vec<_>, _>>()?;
        let is_wanted_by_any =
            |name: &str| members.iter().any(|member| is_wanted(calls[member.call].wanted, name));
        let outputs = self.run_in_chunks(&inputs, is_wanted_by_any)?;
        let mut start = 0;
        let mut answers = Vec::with_capacity(members.len());
        for Member { call, inputs } in members {
            let n = inputs[0].size()[0];
            let wanted = calls[*call].wanted;
            let own = outputs.iter().zip(&self.outputs).map(|(output, declared)| {
                if is_wanted(wanted, &declared.name) {
                    output.f_narrow(0, start, n)
                } else {
                    Ok(output.shallow_clone())
                }
            });
            answers
                .push(self.answer(&own.collect::<Result<Vec<_>, _>>().map_err(one_line)?, wanted));
            start += n;
        }
        Ok(answers)
    }

    fn answer(&self, outputs: &[Torch], wanted: &[String]) -> Result<Vec<Tensor>, String> {
        let outputs = self.outputs.iter().zip(outputs);
        let outputs = outputs.filter(|(declared, _)| is_wanted(wanted, &declared.name));
        outputs.map(|(declared, output)| to_tensor(declared, output)).collect()
    }
}

fn is_wanted(wanted: &[String], name: &str) -> bool {
    wanted.is_empty() || wanted.iter().any(|wanted| wanted == name)
}

fn to_tensor(declared: &Declared, output: &Torch) -> Result<Tensor, String> {
    let &Declared { ref name, datatype, kind } = declared;
    if output.kind() != kind {
        return Err(format!(
            "output `{name}` has the kind {:?}, and the configuration declares {datatype}",
            output.kind()
        ));
    }
    let stored = declared.kind_of_bytes();
    let on_host = output.f_to_device(Device::Cpu).and_then(|output| output.f_to_kind(stored));
    let on_host = on_host.and_then(|output| output.f_contiguous()).map_err(one_line)?;
    let mut data = vec![0; on_host.numel() * stored.elt_size_in_bytes()];
    on_host.f_copy_data_u8(&mut data, on_host.numel()).map_err(one_line)?;
    Ok(Tensor { name: name.to_owned(), datatype, shape: on_host.size(), data })
}

/// The kind of libtorch's tensors of this type; `None` where it has none.
pub fn kind(datatype: DataType) -> Option<Kind> {
    Some(match datatype {
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
        DataType::Uint16 | DataType::Uint32 | DataType::Uint64 | DataType::Bytes => return None,
    })
}

/// libtorch's message without its stack trace.
fn one_line(error: impl ToString) -> String {
    single_line(error.to_string().lines().next().unwrap_or_default())
}
