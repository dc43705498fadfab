//! A stand-in for Triton's PyTorch backend, which no package carries: tests serve exported models with it, on the CPU.
//!
//! `libtriton_pytorch.so` serves `platform: "pytorch_libtorch"` as the official backend does where tests look: a
//! TorchScript module in `model.pt`, inputs in the order of the configuration, a tensor or a tuple of tensors in the
//! order of its outputs, one execution for requests whose shapes allow it.

use std::error::Error;

use bireme_etl::tensor::{DataType, Tensor, TensorView};
use bireme_triton::{Backend, ModelFiles, Request, export_backend};
use serde_json::Value;
use tch::{CModule, IValue, Kind, Tensor as Torch, no_grad};

struct Module {
    module: CModule,
    inputs: Vec<Declared>,
    outputs: Vec<Declared>,
}

/// An input or output of the configuration.
struct Declared {
    name: String,
    datatype: DataType,
}

impl Backend for Module {
    fn load(model: &ModelFiles) -> Result<Self, Box<dyn Error>> {
        Ok(Self {
            module: CModule::load(model.version_dir.join("model.pt"))?,
            inputs: declared(&model.config["input"])?,
            outputs: declared(&model.config["output"])?,
        })
    }

    fn execute(&self, requests: &[Request<'_>]) -> Vec<Result<Vec<Tensor>, String>> {
        let inputs: Vec<_> = requests.iter().map(|request| self.read(&request.inputs())).collect();
        let together = inputs.iter().map(|inputs| inputs.as_deref().ok()).collect::<Option<Vec<_>>>();
        if let Some(outputs) = together.and_then(|inputs| self.run_together(&inputs)) {
            return outputs;
        }
        inputs.into_iter().map(|inputs| self.answer(&self.run(inputs?)?)).collect()
    }
}

impl Module {
    /// The tensors of a request, in the order of the configuration.
    fn read(&self, views: &[TensorView<'_>]) -> Result<Vec<Torch>, String> {
        let read = |Declared { name, datatype }: &Declared| {
            let view = views.iter().find(|view| view.name == *name);
            let view = view.ok_or_else(|| format!("input `{name}` is missing"))?;
            view.check()?;
            if view.datatype != *datatype {
                return Err(format!("input `{name}` must be of type {datatype}, not {}", view.datatype));
            }
            // Bytes other than 0 and 1 are no truth values to C++.
            let stored = if *datatype == DataType::Bool { Kind::Uint8 } else { kind(*datatype)? };
            let tensor = Torch::f_from_data_size(view.data, view.shape, stored);
            tensor.map_err(one_line)?.f_to_kind(kind(*datatype)?).map_err(one_line)
        };
        self.inputs.iter().map(read).collect()
    }

    fn run(&self, inputs: Vec<Torch>) -> Result<Vec<Torch>, String> {
        let inputs: Vec<_> = inputs.into_iter().map(IValue::Tensor).collect();
        let tensor = |value| match value {
            IValue::Tensor(tensor) => Ok(tensor),
            other => Err(format!("`forward` returned {other:?} among its outputs")),
        };
        match no_grad(|| self.module.forward_is(&inputs)).map_err(one_line)? {
            IValue::Tuple(values) => values.into_iter().map(tensor).collect(),
            value => Ok(vec![tensor(value)?]),
        }
    }
}

impl Module {
    /// The answers to requests that can be joined along their first dimension; none if they cannot.
    fn run_together(&self, requests: &[&[Torch]]) -> Option<Vec<Result<Vec<Tensor>, String>>> {
        let (first, rest) = requests.split_first()?;
        let row = |tensor: &Torch| tensor.size().get(1..).map(<[i64]>::to_vec);
        let alike = |request: &&[Torch]| request.iter().zip(*first).all(|(a, b)| row(a) == row(b));
        if rest.is_empty() || !rest.iter().all(alike) {
            return None;
        }
        let column =
            |i: usize| Torch::cat(&requests.iter().map(|request| &request[i]).collect::<Vec<_>>(), 0);
        let outputs = self.run((0..first.len()).map(column).collect()).ok()?;
        let mut start = 0;
        let answer = |request: &&[Torch]| {
            let n = request[0].size()[0];
            let own: Vec<Torch> = outputs.iter().map(|output| output.narrow(0, start, n)).collect();
            start += n;
            self.answer(&own)
        };
        Some(requests.iter().map(answer).collect())
    }

    fn answer(&self, outputs: &[Torch]) -> Result<Vec<Tensor>, String> {
        let tensor = |(Declared { name, datatype }, output): (&Declared, &Torch)| {
            if output.kind() != kind(*datatype)? {
                return Err(format!("output `{name}` is of type {:?}, not {datatype}", output.kind()));
            }
            let output = output.contiguous();
            let mut data = vec![0; output.numel() * output.kind().elt_size_in_bytes()];
            let stored = if *datatype == DataType::Bool { output.to_kind(Kind::Uint8) } else { output };
            stored.f_copy_data_u8(&mut data, stored.numel()).map_err(one_line)?;
            Ok(Tensor { name: name.clone(), datatype: *datatype, shape: stored.size(), data })
        };
        self.outputs.iter().zip(outputs).map(tensor).collect()
    }
}

/// The names and types of the configuration's inputs or outputs.
fn declared(tensors: &Value) -> Result<Vec<Declared>, String> {
    let of = |tensor: &Value| {
        let name = tensor["name"].as_str().unwrap_or_default().to_owned();
        let text = tensor["data_type"].as_str().unwrap_or_default().trim_start_matches("TYPE_");
        let datatype = DataType::parse(text).ok_or_else(|| format!("`{name}` has the type {text}"))?;
        Ok(Declared { name, datatype })
    };
    tensors.as_array().map_or(&[][..], Vec::as_slice).iter().map(of).collect()
}

fn kind(datatype: DataType) -> Result<Kind, String> {
    match datatype {
        DataType::Bool => Ok(Kind::Bool),
        DataType::Int32 => Ok(Kind::Int),
        DataType::Int64 => Ok(Kind::Int64),
        DataType::Fp32 => Ok(Kind::Float),
        DataType::Fp64 => Ok(Kind::Double),
        other => Err(format!("the stand-in has no tensors of {other}")),
    }
}

/// What libtorch says, without its stack.
fn one_line(error: impl ToString) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

export_backend!(Module);
