//! A GRU over the events of a session (Hidasi et al. 2016, "Session-based recommendations with
//! recurrent neural networks").

use bireme_kernels::gru::gru_layer;
use tch::Tensor;

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
        dropout: Option<&mut DropoutGenerator>,
    ) -> Tensor {
        let indices = self.first..self.first + 4 * self.n_layers as usize;
        let layers: Vec<&Tensor> = indices.map(|index| parameters.leaf(index)).collect();
        // cuDNN supports the backward pass only after a forward pass in training mode.
        let training = dropout.is_some();
        let run = |x: &Tensor| match &layout.packed_sequence {
            Some(sequence) => {
                let x = take_rows(x, &sequence.positions);
                let states =
                    layers.chunks(4).fold(x, |x, layer| gru_layer(&x, &sequence.n_sessions, layer));
                take_rows(&states, &sequence.outputs)
            }
            // A GPU is fastest with rectangles, for which cuDNN has a persistent kernel. A trace
            // does not know the number of sessions.
            None => {
                let x = layout.pad(x);
                let h0 =
                    x.select(1, 0).zeros_like().expand([self.n_layers, -1, -1], false).contiguous();
                let (states, _) =
                    x.gru(&h0, &layers, true, self.n_layers, 0.0, training, false, true);
                take_rows(&states.reshape([-1, self.width]), &layout.output_cells)
            }
        };
        match dropout.zip(layout.row_keys.as_ref()) {
            Some((dropout, keys)) => {
                let states = run(&dropout.dropout(x, self.dropout, &keys.positions));
                dropout.dropout(states, self.dropout, &keys.outputs)
            }
            None => run(&x),
        }
    }
}
