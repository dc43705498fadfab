//! A GRU along the session (Hidasi et al. 2016, "Session-based recommendations with recurrent neural networks").

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::body::Layout;
use super::parameters::ParameterBuilder;
use super::recurrence::recurrence;
use super::rows::take_rows;
use super::{HeadConfig, InputConfig, MOST_LAYERS, Objective, Parameters};
use crate::config::{MOST_WIDTH, check_width};
use crate::data::DropoutGenerator;

/// `[model]` with `kind = "gru"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GruConfig {
    /// Width of the recurrent state.
    pub hidden_width: i64,
    /// Recurrent layers.
    pub n_layers: i64,
    /// Dropout before and after the recurrence.
    pub dropout: f64,
    /// What goes in.
    pub input: InputConfig,
    /// What is learnt.
    pub objective: Objective,
    /// What comes out.
    pub head: HeadConfig,
}

impl Default for GruConfig {
    fn default() -> Self {
        Self {
            hidden_width: 128,
            n_layers: 1,
            dropout: 0.0,
            input: InputConfig::default(),
            objective: Objective::causal(),
            head: HeadConfig::default(),
        }
    }
}

impl GruConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        check_width("hidden_width", self.hidden_width, MOST_WIDTH)?;
        check_width("n_layers", self.n_layers, MOST_LAYERS)
    }
}

/// Four parameters a layer.
pub struct Gru {
    n_layers: i64,
    width: i64,
    dropout: f64,
    first: usize,
}

impl Gru {
    /// Appends the initial parameters.
    pub(super) fn declare(config: &GruConfig, builder: &mut ParameterBuilder) -> Self {
        let &GruConfig { hidden_width: width, n_layers, dropout, .. } = config;
        let first = builder.len();
        for layer in 0..n_layers {
            builder.uniform(format!("gru.weight_ih_l{layer}"), &[3 * width, width], width);
            builder.uniform(format!("gru.weight_hh_l{layer}"), &[3 * width, width], width);
            builder.uniform(format!("gru.bias_ih_l{layer}"), &[3 * width], width);
            builder.uniform(format!("gru.bias_hh_l{layer}"), &[3 * width], width);
        }
        Self { n_layers, width, dropout, first }
    }

    /// Positions `x: [P, D]` → the states read, `[N, D]`. A state has seen its position and those before it, hence never
    /// what is behind the session.
    pub(super) fn states(
        &self,
        parameters: &Parameters,
        x: Tensor,
        layout: &Layout,
        dropout: Option<&mut DropoutGenerator<'_>>,
    ) -> Tensor {
        let layers = self.first..self.first + 4 * self.n_layers as usize;
        let layers: Vec<&Tensor> = layers.map(|index| parameters.leaf(index)).collect();
        // cuDNN goes back only through what was computed to learn.
        let learns = dropout.is_some();
        let run = |x: &Tensor| match &layout.by_step {
            Some(steps) => {
                let x = take_rows(x, &steps.positions);
                let states = match x.device() {
                    Device::Cpu => {
                        layers.chunks(4).fold(x, |x, layer| recurrence(&x, &steps.n_sessions, layer))
                    }
                    _ => self.of_cudnn(&x, &steps.n_sessions, &layers, learns),
                };
                take_rows(&states, &steps.reads)
            }
            // In a trace, where the number of sessions is not known.
            None => {
                let x = layout.pad(x);
                let h0 = x.select(1, 0).zeros_like().expand([self.n_layers, -1, -1], false).contiguous();
                let (states, _) = x.gru(&h0, &layers, true, self.n_layers, 0.0, learns, false, true);
                take_rows(&states.reshape([-1, self.width]), &layout.read_cells)
            }
        };
        match dropout {
            Some(dropout) => {
                let states = run(&dropout.dropout(x, self.dropout, &layout.positions_by_segment));
                dropout.dropout(states, self.dropout, &layout.reads_by_segment)
            }
            None => run(&x),
        }
    }

    /// The states of positions step by step: `[P, D]` → `[P, D]`.
    fn of_cudnn(&self, x: &Tensor, n_sessions: &[i64], layers: &[&Tensor], learns: bool) -> Tensor {
        let n = n_sessions.first().copied().unwrap_or(0);
        let h0 = x.new_zeros([self.n_layers, n, self.width], (x.kind(), x.device()));
        let sizes = Tensor::from_slice(n_sessions);
        Tensor::gru_data(x, &sizes, &h0, &side_by_side(layers), true, self.n_layers, 0.0, learns, false).0
    }
}

/// A GRU's parameters, four a layer, in memory of their own, matrices first: where cuDNN looks for them, which would copy them
/// otherwise, and say so each time.
fn side_by_side(layers: &[&Tensor]) -> Vec<Tensor> {
    let is_matrix = |number: &usize| number % 4 < 2;
    let (matrices, biases): (Vec<usize>, Vec<usize>) = (0..layers.len()).partition(is_matrix);
    let order = [matrices, biases].concat();
    let flat: Vec<Tensor> = order.iter().map(|&number| layers[number].reshape([-1])).collect();
    let flat = Tensor::cat(&flat, 0);
    let mut placed: Vec<(usize, Tensor)> = Vec::with_capacity(order.len());
    let mut first = 0;
    for number in order {
        let size = layers[number].size();
        let n = size.iter().product();
        placed.push((number, flat.narrow(0, first, n).view(size.as_slice())));
        first += n;
    }
    placed.sort_by_key(|(number, _)| *number);
    placed.into_iter().map(|(_, parameter)| parameter).collect()
}
