//! XLNet: attention with relative positions (Yang et al. 2019; Dai et al. 2019 for the positions).
//!
//! The arithmetic of a layer is that of Hugging Face's `XLNetModel`, without segments and memories.
//! With input `x`, widths D = heads · D_h and positions i, j of a session, a layer computes, for
//! every head,
//!
//! `score[i, j] = ((q_i + b_w) · k_j + (q_i + b_r) · r_{i−j}) / √D_h`, where
//! `q, k, v = x W_q, x W_k, x W_v` and `r_δ = (sin(δ f), cos(δ f)) W_r` with frequencies
//! `f_m = 10000^(−2m/D)`, then `h = norm(x + softmax(score) v W_oᵀ)` and
//! `y = norm(h + W₂ gelu(W₁ h))`.
//!
//! Everything except the attention itself runs over packed positions, so padding costs nothing.
//! Keys and values are computed for all positions of a layer. Queries are computed for all
//! positions or for the output positions only: the latter in the last layer, and in the second
//! stream of the paper, whose states do not depend on their own events. The position table has no
//! dropout; the original draws a dropout mask of it for every session.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::Parameters;
use super::body::Layout;
use super::parameters::{LayerNorm, Linear, ParameterBuilder};
use super::rows::take_rows;
use crate::config::XlnetConfig;
use crate::data::DropoutGenerator;

/// The layers, and their common shape.
pub struct Xlnet {
    layers: Vec<Layer>,
    shape: XlnetShape,
    /// The position table of the last length: the steps of a day mostly have one.
    table: Mutex<Option<Tensor>>,
}

#[derive(Clone, Copy)]
struct XlnetShape {
    width: i64,
    n_heads: i64,
    dropout: f64,
}

impl XlnetShape {
    fn head_width(self) -> i64 {
        self.width / self.n_heads
    }
}

/// Indices of a layer's parameters, which have the names and shapes of Hugging Face's XLNet.
struct Layer {
    q: usize,
    k: usize,
    v: usize,
    o: usize,
    r: usize,
    r_r_bias: usize,
    r_w_bias: usize,
    attention_norm: LayerNorm,
    norm: LayerNorm,
    layer_1: Linear,
    layer_2: Linear,
}

/// The inputs that all layers share.
#[derive(Clone, Copy)]
struct LayerContext<'a> {
    parameters: &'a Parameters,
    shape: XlnetShape,
    layout: &'a Layout,
}

/// Projections of the positions of a layer.
struct Projections {
    /// `[B, H, L, D_h]`, if all positions attend.
    q: Option<Tensor>,
    /// `[B, H, L, D_h]`.
    k: Tensor,
    /// `[B, H, L, D_h]`.
    v: Tensor,
    /// `r_δ` for δ from L down to 1 − L: `[H, D_h, 2L]`.
    r: Tensor,
}

impl Xlnet {
    /// Declares the parameters.
    pub fn declare(config: &XlnetConfig, builder: &mut ParameterBuilder) -> Self {
        let &XlnetConfig {
            width,
            n_heads,
            dropout,
            init_std: std,
            layer_norm_epsilon: epsilon,
            ..
        } = config;
        let shape = XlnetShape { width, n_heads, dropout };
        let matrix = [width, n_heads, shape.head_width()];
        let layers = (0..config.n_layers).map(|layer| {
            let name = |part: &str| format!("xlnet.layer.{layer}.{part}");
            Layer {
                q: builder.normal(name("rel_attn.q"), &matrix, std),
                k: builder.normal(name("rel_attn.k"), &matrix, std),
                v: builder.normal(name("rel_attn.v"), &matrix, std),
                o: builder.normal(name("rel_attn.o"), &matrix, std),
                r: builder.normal(name("rel_attn.r"), &matrix, std),
                r_r_bias: builder.normal(name("rel_attn.r_r_bias"), &matrix[1..], std),
                r_w_bias: builder.normal(name("rel_attn.r_w_bias"), &matrix[1..], std),
                attention_norm: builder.layer_norm(&name("rel_attn.layer_norm"), width, epsilon),
                norm: builder.layer_norm(&name("ff.layer_norm"), width, epsilon),
                layer_1: builder.normal_linear(&name("ff.layer_1"), width, 4 * width, std),
                layer_2: builder.normal_linear(&name("ff.layer_2"), 4 * width, width, std),
            }
        });
        Self { layers: layers.collect(), shape, table: Mutex::new(None) }
    }

    /// [`position_table`] for the positions of `layout`.
    fn position_table(&self, layout: &Layout, device: Device) -> Tensor {
        let (length, width) = (layout.length, self.shape.width);
        if layout.is_traced() {
            // A trace would keep the numbers as constants of this device.
            return position_table(length, width, device);
        }
        let mut kept = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let table = kept
            .take()
            .filter(|table| table.size()[0] == 2 * length && table.device() == device)
            .unwrap_or_else(|| position_table(length, width, device));
        kept.insert(table).shallow_clone()
    }

    /// Positions `x: [P, D]` → the output states of `layout`, `[N, D]`. With a `query: [1, D]`
    /// these are the states of the second stream, which starts from the query at every output
    /// position.
    pub fn states(
        &self,
        parameters: &Parameters,
        x: Tensor,
        query: Option<Tensor>,
        layout: &Layout,
        mut dropout: Option<&mut DropoutGenerator>,
    ) -> Tensor {
        let context = LayerContext { parameters, shape: self.shape, layout };
        let p = self.shape.dropout;
        let table = self.position_table(layout, x.device());
        let (mask, output_mask) = (layout.attention_mask(), layout.output_mask());
        let keys = layout.row_keys.as_ref();
        let (positions, outputs) =
            (keys.map(|keys| &keys.positions), keys.map(|keys| &keys.outputs));
        let mut h = apply_dropout(&mut dropout, x, p, positions);
        // The query at each output position. A lookup, because a trace does not know their number.
        let repeat = |query: Tensor| take_rows(&query, &layout.outputs.zeros_like());
        // States of the output positions: of the second stream, or in the last layer.
        let mut output_states =
            query.map(|query| apply_dropout(&mut dropout, repeat(query), p, outputs));
        for (number, layer) in self.layers.iter().enumerate() {
            let is_last = number + 1 == self.layers.len();
            // Nothing attends to the states of the last layer, so only output positions need them.
            if is_last && output_states.is_none() && !layout.all_are_outputs {
                output_states = Some(take_rows(&h, &layout.outputs));
            }
            let all_attend = !is_last || output_states.is_none();
            let projections = layer.project(context, &h, all_attend, &table);
            if let Some(states) = &mut output_states {
                let attended = layer.attend_from_outputs(
                    context,
                    states,
                    &projections,
                    &output_mask,
                    &mut dropout,
                );
                *states = layer.feed_forward(context, attended, states, outputs, &mut dropout);
            }
            if all_attend {
                let attended = layer.attend(context, &projections, &mask, &mut dropout);
                h = layer.feed_forward(context, attended, &h, positions, &mut dropout);
            }
        }
        apply_dropout(&mut dropout, output_states.unwrap_or(h), p, outputs)
    }
}

impl Layer {
    /// Projects the states `h: [P, D]`, and the position table to `r`. Queries only if
    /// `all_attend`.
    fn project(
        &self,
        context: LayerContext<'_>,
        h: &Tensor,
        all_attend: bool,
        table: &Tensor,
    ) -> Projections {
        let LayerContext { parameters, shape, layout } = context;
        // One product for all projections: a GPU launches fewer and larger kernels.
        let parts = [self.k, self.v, self.q];
        let parts = if all_attend { &parts[..] } else { &parts[..2] };
        let weights: Vec<Tensor> = parts.iter().map(|&index| matrix(parameters, index)).collect();
        let x = layout.pad(&h.matmul(&Tensor::cat(&weights, 1)));
        let size = [-1, x.size()[1], parts.len() as i64, shape.n_heads, shape.head_width()];
        let x = x.view(size.as_slice()).permute([2, 0, 3, 1, 4]).contiguous();
        let r = table.matmul(&matrix(parameters, self.r));
        let r = r.view([-1, shape.n_heads, shape.head_width()]).permute([1, 2, 0]);
        let mut x = x.unbind(0).into_iter();
        let mut next = || x.next().expect("as many as were multiplied");
        Projections { k: next(), v: next(), q: all_attend.then(next), r }
    }

    /// Attention from all positions: `[P, D]`.
    fn attend(
        &self,
        context: LayerContext<'_>,
        projections: &Projections,
        mask: &Option<Tensor>,
        dropout: &mut Option<&mut DropoutGenerator>,
    ) -> Tensor {
        let LayerContext { parameters, shape, layout } = context;
        let q = projections.q.as_ref().expect("all attend");
        let bias =
            |index: usize| parameters.leaf(index).view([1, shape.n_heads, 1, shape.head_width()]);
        let by_content = (q + bias(self.r_w_bias)).matmul(&projections.k.transpose(2, 3));
        // The relative shift of Dai et al. 2019. The product is `[B, H, L, 2L]`. Its column p
        // belongs to δ = L − p, so the score (i, j) is in column L + j − i. Reading the same memory
        // with rows of one number less shifts each row by one more than the row before.
        let length = layout.length;
        let by_position = (q + bias(self.r_r_bias))
            .matmul(&projections.r.unsqueeze(0))
            .view([-1, shape.n_heads, 2 * length, length])
            .narrow(2, 1, 2 * length - 1)
            .reshape([-1, shape.n_heads, length, 2 * length - 1])
            .narrow(3, 0, length);
        let mask = mask.as_ref().map(|mask| mask.unsqueeze(1));
        let weights = attention_weights(by_content + by_position, mask, shape);
        let keys = layout.row_keys.as_ref().map(|keys| &keys.sessions);
        let weights = dropout_weights(dropout, weights, shape.dropout, keys);
        let attended =
            weights.matmul(&projections.v).transpose(1, 2).reshape([-1, length, shape.width]);
        layout.pack(&attended).matmul(&matrix(parameters, self.o).tr())
    }

    /// Attention from the output positions with `states: [N, D]` to all positions: `[N, D]`.
    fn attend_from_outputs(
        &self,
        context: LayerContext<'_>,
        states: &Tensor,
        projections: &Projections,
        mask: &Option<Tensor>,
        dropout: &mut Option<&mut DropoutGenerator>,
    ) -> Tensor {
        let LayerContext { parameters, shape, layout } = context;
        let q = states.matmul(&matrix(parameters, self.q)).view([
            -1,
            shape.n_heads,
            shape.head_width(),
        ]);
        // Queries are grouped by session for one batched product with the session's keys.
        let queries = layout.pad_outputs(&(&q + parameters.leaf(self.r_w_bias)));
        let by_content = layout.pack_outputs(&queries.matmul(&projections.k.transpose(2, 3)));
        let by_position = (&q + parameters.leaf(self.r_r_bias))
            .transpose(0, 1)
            .matmul(&projections.r)
            .transpose(0, 1);
        // Few rows: a gather of column L + j − i replaces the relative shift.
        let length = layout.length;
        let key = Tensor::arange_start(length, 2 * length, (Kind::Int64, states.device()));
        let columns = key.unsqueeze(0) - layout.output_offsets().unsqueeze(1);
        let columns = columns.unsqueeze(1).expand([-1, shape.n_heads, layout.length], false);
        let by_position = by_position.gather(2, &columns, false);
        let mask = mask.as_ref().map(|mask| mask.unsqueeze(1));
        let weights = attention_weights(by_content + by_position, mask, shape);
        let keys = layout.row_keys.as_ref().map(|keys| &keys.outputs);
        let weights = dropout_weights(dropout, weights, shape.dropout, keys);
        let attended = layout.pack_outputs(&layout.pad_outputs(&weights).matmul(&projections.v));
        attended.reshape([-1, shape.width]).matmul(&matrix(parameters, self.o).tr())
    }

    /// The rest of a layer after attention, with residual connections: `attended` and `h`, both
    /// `[N, D]` → `[N, D]`. `row_keys`: i32 `[N]`, for dropout.
    fn feed_forward(
        &self,
        context: LayerContext<'_>,
        attended: Tensor,
        h: &Tensor,
        row_keys: Option<&Tensor>,
        dropout: &mut Option<&mut DropoutGenerator>,
    ) -> Tensor {
        let LayerContext { parameters, shape, .. } = context;
        let mut drop = |x: Tensor| apply_dropout(dropout, x, shape.dropout, row_keys);
        let h = self.attention_norm.apply(parameters, &(drop(attended) + h));
        let inner = drop(self.layer_1.apply(parameters, &h).gelu("none"));
        self.norm.apply(parameters, &(drop(self.layer_2.apply(parameters, &inner)) + h))
    }
}

/// A parameter `[D, H, D_h]` as the matrix `[D, H · D_h]`.
fn matrix(parameters: &Parameters, index: usize) -> Tensor {
    let parameter = parameters.leaf(index);
    parameter.view([parameter.size()[0], -1])
}

fn attention_weights(scores: Tensor, mask: Option<Tensor>, shape: XlnetShape) -> Tensor {
    let scores = scores * (shape.head_width() as f64).powf(-0.5);
    let scores = match mask {
        Some(mask) => scores.masked_fill(&mask, f64::NEG_INFINITY),
        None => scores,
    };
    scores.softmax(-1, Kind::Float)
}

fn apply_dropout(
    dropout: &mut Option<&mut DropoutGenerator>,
    x: Tensor,
    p: f64,
    row_keys: Option<&Tensor>,
) -> Tensor {
    match dropout.as_mut().zip(row_keys) {
        Some((dropout, keys)) => dropout.dropout(x, p, keys),
        None => x,
    }
}

fn dropout_weights(
    dropout: &mut Option<&mut DropoutGenerator>,
    x: Tensor,
    p: f64,
    row_keys: Option<&Tensor>,
) -> Tensor {
    match dropout.as_mut().zip(row_keys) {
        Some((dropout, keys)) => dropout.dropout_weights(x, p, keys),
        None => x,
    }
}

/// `(sin(δ f), cos(δ f))` for δ from L down to 1 − L: `[2L, D]`.
fn position_table(length: i64, width: i64, device: Device) -> Tensor {
    let options = (Kind::Float, device);
    let distances = Tensor::arange_start_step(length, -length, -1, options);
    let exponents = Tensor::arange_start_step(0, width, 2, options) / width as f64;
    let frequencies = (exponents * -(10_000f64.ln())).exp();
    let angles = distances.unsqueeze(1) * frequencies.unsqueeze(0);
    Tensor::cat(&[angles.sin(), angles.cos()], 1)
}
