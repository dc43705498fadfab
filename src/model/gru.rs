//! A GRU over the events of a session (Hidasi et al. 2016, "Session-based recommendations with
//! recurrent neural networks").

use bireme_kernels::gru::gru_layer;
use tch::{Device, Tensor};

use super::Parameters;
use super::body::Layout;
use super::parameters::ParameterBuilder;
use super::rows::take_rows;
use crate::config::GruConfig;
use crate::data::DropoutGenerator;

/// A GRU of `n_layers` layers with four parameters each.
pub struct Gru {
    n_layers: i64,
    width: i64,
    dropout: f64,
    /// Index of the first parameter.
    first: usize,
}

impl Gru {
    /// Declares the parameters.
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

    /// Positions `x: [P, D]` → the output states of `layout`, `[N, D]`. A state depends on its
    /// position and the ones before it, hence never on the padding after its session.
    pub(super) fn states(
        &self,
        parameters: &Parameters,
        x: Tensor,
        layout: &Layout,
        dropout: Option<&mut DropoutGenerator<'_>>,
    ) -> Tensor {
        let indices = self.first..self.first + 4 * self.n_layers as usize;
        let layers: Vec<&Tensor> = indices.map(|index| parameters.leaf(index)).collect();
        // cuDNN supports the backward pass only after a forward pass in training mode.
        let training = dropout.is_some();
        let run = |x: &Tensor| match &layout.packed_sequence {
            Some(sequence) => {
                let x = take_rows(x, &sequence.positions);
                let states = if x.device() == Device::Cpu {
                    layers.chunks(4).fold(x, |x, layer| gru_layer(&x, &sequence.n_sessions, layer))
                } else {
                    self.cudnn_states(&x, &sequence.n_sessions, &layers, training)
                };
                take_rows(&states, &sequence.outputs)
            }
            // A trace does not know the number of sessions and computes the padding as well.
            None => {
                let x = layout.pad(x);
                let h0 =
                    x.select(1, 0).zeros_like().expand([self.n_layers, -1, -1], false).contiguous();
                let (states, _) =
                    x.gru(&h0, &layers, true, self.n_layers, 0.0, training, false, true);
                take_rows(&states.reshape([-1, self.width]), &layout.output_cells)
            }
        };
        match dropout {
            Some(dropout) => {
                let states = run(&dropout.dropout(x, self.dropout, &layout.positions_by_segment));
                dropout.dropout(states, self.dropout, &layout.outputs_by_segment)
            }
            None => run(&x),
        }
    }

    /// All layers over packed positions on a GPU: `[P, D]` → `[P, D]`.
    fn cudnn_states(
        &self,
        x: &Tensor,
        n_sessions: &[i64],
        layers: &[&Tensor],
        training: bool,
    ) -> Tensor {
        let n = n_sessions.first().copied().unwrap_or(0);
        let h0 = x.new_zeros([self.n_layers, n, self.width], (x.kind(), x.device()));
        let sizes = Tensor::from_slice(n_sessions);
        let layers = flatten_parameters(layers);
        Tensor::gru_data(x, &sizes, &h0, &layers, true, self.n_layers, 0.0, training, false).0
    }
}

/// Copies the parameters of a GRU, four per layer, into one buffer, all matrices before all biases,
/// and returns views of it. cuDNN requires this layout; otherwise it copies the weights in every
/// call and warns each time.
fn flatten_parameters(layers: &[&Tensor]) -> Vec<Tensor> {
    let is_matrix = |index: &usize| index % 4 < 2;
    let (matrices, biases): (Vec<usize>, Vec<usize>) = (0..layers.len()).partition(is_matrix);
    let order = [matrices, biases].concat();
    let flat: Vec<Tensor> = order.iter().map(|&index| layers[index].reshape([-1])).collect();
    let flat = Tensor::cat(&flat, 0);
    let mut views: Vec<(usize, Tensor)> = Vec::with_capacity(order.len());
    let mut first = 0;
    for index in order {
        let size = layers[index].size();
        let n = size.iter().product();
        views.push((index, flat.narrow(0, first, n).view(size.as_slice())));
        first += n;
    }
    views.sort_by_key(|(index, _)| *index);
    views.into_iter().map(|(_, view)| view).collect()
}
