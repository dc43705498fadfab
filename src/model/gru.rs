//! A GRU along the session (Hidasi et al. 2016, "Session-based recommendations with recurrent neural networks").

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::Parameters;
use crate::data::Noise;

/// Parameters of a GRU model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GruConfig {
    /// Width of an item's vector, at the input and in the tied softmax.
    pub item_width: i64,
    /// Width of the recurrent state.
    pub hidden_width: i64,
    /// Recurrent layers.
    pub n_layers: i64,
    /// Dropout before and after the recurrence.
    pub dropout: f64,
    /// Standard deviation that item vectors start with.
    pub item_init_std: f64,
    /// Whether the state is passed through a ReLU before it is scored, as in Transformers4Rec.
    pub head_relu: bool,
}

impl Default for GruConfig {
    fn default() -> Self {
        Self {
            item_width: 64,
            hidden_width: 128,
            n_layers: 1,
            dropout: 0.0,
            item_init_std: 0.05,
            head_relu: true,
        }
    }
}

impl GruConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        let widths = [
            ("item_width", self.item_width),
            ("hidden_width", self.hidden_width),
            ("n_layers", self.n_layers),
        ];
        if let Some((key, value)) = widths.iter().find(|(_, value)| *value < 1) {
            return Err(format!("`{key}` cannot be {value}"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!("`dropout` {} is not within 0 <= p < 1", self.dropout));
        }
        if !(self.item_init_std.is_finite() && self.item_init_std >= 0.0) {
            return Err(format!("`item_init_std` cannot be {}", self.item_init_std));
        }
        Ok(())
    }
}

/// Indices of the body's parameters: the input projection, then four a layer, then the head's projection.
pub struct Gru {
    config: GruConfig,
    first: usize,
}

impl Gru {
    /// Appends the initial parameters; those of a layer are uniform in ±1/√fan_in, as in PyTorch.
    pub fn declare(config: &GruConfig, parameters: &mut Vec<(String, Tensor)>) -> Self {
        let first = parameters.len();
        let (items, hidden) = (config.item_width, config.hidden_width);
        let mut uniform = |name: String, size: &[i64], fan_in: i64| {
            let bound = (fan_in as f64).powf(-0.5);
            let tensor = Tensor::empty(size, (tch::Kind::Float, tch::Device::Cpu)).uniform_(-bound, bound);
            parameters.push((name, tensor));
        };
        uniform("projection.weight".into(), &[hidden, items], items);
        uniform("projection.bias".into(), &[hidden], items);
        for layer in 0..config.n_layers {
            uniform(format!("gru.weight_ih_l{layer}"), &[3 * hidden, hidden], hidden);
            uniform(format!("gru.weight_hh_l{layer}"), &[3 * hidden, hidden], hidden);
            uniform(format!("gru.bias_ih_l{layer}"), &[3 * hidden], hidden);
            uniform(format!("gru.bias_hh_l{layer}"), &[3 * hidden], hidden);
        }
        uniform("head.projection.weight".into(), &[items, hidden], hidden);
        uniform("head.projection.bias".into(), &[items], hidden);
        Self { config: config.clone(), first }
    }

    /// Indices of the body's parameters.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.first..self.first + 4 + 4 * self.config.n_layers as usize
    }

    /// Item vectors `[B, L, item_width]` → states after each event `[B, L, hidden_width]`. A state has seen its
    /// event and those before it, hence never the padding behind.
    pub fn states(&self, parameters: &Parameters, items: &Tensor, noise: Option<&mut Noise<'_>>) -> Tensor {
        let leaf = |offset: usize| parameters.leaf(self.first + offset);
        let (n_sessions, ..) = items.size3().expect("item vectors are [B, L, D]");
        let h0 = Tensor::zeros(
            [self.config.n_layers, n_sessions, self.config.hidden_width],
            (items.kind(), items.device()),
        );
        let layers: Vec<&Tensor> = (2..2 + 4 * self.config.n_layers as usize).map(leaf).collect();
        let run = |x: &Tensor| x.gru(&h0, &layers, true, self.config.n_layers, 0.0, false, false, true).0;
        let projected = items.linear(leaf(0), Some(leaf(1))).relu();
        match noise {
            Some(noise) => {
                let states = run(&noise.dropout(projected, self.config.dropout));
                noise.dropout(states, self.config.dropout)
            }
            None => run(&projected),
        }
    }

    /// States `[N, hidden_width]` → session vectors `[N, item_width]`, which are scored against the item table.
    pub fn session_vectors(&self, parameters: &Parameters, states: &Tensor) -> Tensor {
        let projection = self.range().end - 2;
        let vectors = states.linear(parameters.leaf(projection), Some(parameters.leaf(projection + 1)));
        if self.config.head_relu { vectors.relu() } else { vectors }
    }
}
