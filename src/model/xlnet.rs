//! XLNet: attention with relative positions (Yang et al. 2019; Dai et al. 2019 for the positions).
//!
//! Layer by layer the arithmetic is that of Hugging Face's `XLNetModel`, without segments and memories. With input `x`,
//! widths D = heads · D_h and positions i, j of a session, a layer computes, for every head,
//!
//! `score[i, j] = ((q_i + b_w) · k_j + (q_i + b_r) · r_{i−j}) / √D_h`, where `q, k, v = x W_q, x W_k, x W_v` and
//! `r_δ = (sin(δ f), cos(δ f)) W_r` with frequencies `f_m = 10000^(−2m/D)`, then
//! `h = norm(x + softmax(score) v W_oᵀ)` and `y = norm(h + W₂ gelu(W₁ h))`.
//!
//! Everything but the attention itself runs over packed positions, so padding costs nothing. What a position attends to
//! is computed for all positions of a layer (`Keys`), what attends either for all positions or for those alone that
//! are read: the last layer's, and a prediction's that must not see its own event (the second stream of the paper).
//! The table of positions is not dropped out; the original draws another dropout of it for every session.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::body::Layout;
use super::parameters::{LayerNorm, Linear, ParameterBuilder};
use super::rows::take_rows;
use super::{HeadConfig, InputConfig, MOST_LAYERS, Objective, Parameters};
use crate::config::{MOST_WIDTH, check_finite, check_width};
use crate::data::DropoutGenerator;

/// `[model]` with `kind = "xlnet"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct XlnetConfig {
    /// Width of the states.
    pub width: i64,
    /// Heads of attention; their widths add up to `width`.
    pub n_heads: i64,
    /// Layers.
    pub n_layers: i64,
    /// Dropout, wherever the original has it but for the table of positions.
    pub dropout: f64,
    /// Standard deviation of initial weights.
    pub init_std: f64,
    /// Epsilon of the layer norms.
    pub layer_norm_epsilon: f64,
    /// Whether sessions are padded to `data.max_length` and the padding attended to like events: the original's fault,
    /// to compare with it.
    pub attend_to_padding: bool,
    /// What goes in.
    pub input: InputConfig,
    /// What is learnt.
    pub objective: Objective,
    /// What comes out.
    pub head: HeadConfig,
}

impl Default for XlnetConfig {
    fn default() -> Self {
        Self {
            width: 192,
            n_heads: 4,
            n_layers: 2,
            dropout: 0.3,
            init_std: 0.01,
            layer_norm_epsilon: 0.03,
            attend_to_padding: false,
            input: InputConfig { projection_width: Some(192), ..InputConfig::default() },
            objective: Objective::Masked { probability: 0.15 },
            head: HeadConfig::default(),
        }
    }
}

/// Attention weights of a session for which dropout is drawn, at most: a GiB of numbers.
const MOST_WEIGHTS: u128 = 1 << 28;

impl XlnetConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        check_width("width", self.width, MOST_WIDTH)?;
        check_width("n_heads", self.n_heads, MOST_WIDTH)?;
        check_width("n_layers", self.n_layers, MOST_LAYERS)?;
        if self.width % self.n_heads != 0 || self.width % 2 != 0 {
            return Err(format!(
                "`width` {} is not an even number divisible by `n_heads` {}",
                self.width, self.n_heads
            ));
        }
        check_finite("init_std", self.init_std, f32::MIN_POSITIVE)?;
        check_finite("layer_norm_epsilon", self.layer_norm_epsilon, f32::MIN_POSITIVE)
    }

    /// Checks that the dropout of attention weights, `[H, L, L]` for the longest session, can be drawn.
    pub(super) fn check_length(&self, max_length: usize) -> Result<(), String> {
        let n_weights = self.n_heads.max(1) as u128 * (max_length as u128).pow(2);
        if self.dropout == 0.0 || n_weights <= MOST_WEIGHTS {
            return Ok(());
        }
        Err(format!(
            "`dropout` of attention over `data.max_length` {max_length} events by `n_heads` {} is drawn \
             for {n_weights} weights: at most {MOST_WEIGHTS}",
            self.n_heads
        ))
    }
}

/// The layers, and what they share.
pub struct Xlnet {
    layers: Vec<Layer>,
    shape: Shape,
}

#[derive(Clone, Copy)]
struct Shape {
    width: i64,
    n_heads: i64,
    dropout: f64,
}

impl Shape {
    fn head_width(self) -> i64 {
        self.width / self.n_heads
    }
}

/// A layer's parameters, by index: named and shaped as in Hugging Face's XLNet.
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

/// What the positions of a layer offer: keys and values `[B, H, L, D_h]`, what they ask with themselves, if they do, and `r_δ` for
/// δ from L down to 1 − L, as `[H, D_h, 2L]`.
struct Keys {
    q: Option<Tensor>,
    k: Tensor,
    v: Tensor,
    r: Tensor,
}

impl Xlnet {
    /// Appends the initial parameters.
    pub fn declare(config: &XlnetConfig, builder: &mut ParameterBuilder) -> Self {
        let &XlnetConfig { width, n_heads, dropout, init_std: std, layer_norm_epsilon: epsilon, .. } = config;
        let shape = Shape { width, n_heads, dropout };
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
        Self { layers: layers.collect(), shape }
    }

    /// Positions `x: [P, D]` → the states read, `[N, D]`. With a `query: [1, D]` these are of the second stream, in which
    /// a position knows of itself only the query.
    pub fn states(
        &self,
        parameters: &Parameters,
        (x, query): (Tensor, Option<Tensor>),
        layout: &Layout,
        mut dropout: Option<&mut DropoutGenerator<'_>>,
    ) -> Tensor {
        let table = position_table(layout.length, self.shape.width, x.device());
        let (hidden, hidden_from_reads) = (layout.hidden(), layout.hidden_from_reads());
        let (positions, reads) = (&layout.positions_by_segment, &layout.reads_by_segment);
        let mut h = apply_dropout(&mut dropout, x, self.shape.dropout, positions);
        // A row for each read: by lookup, as a trace does not know how many there are.
        let queries = |query: Tensor| take_rows(&query, &layout.reads.zeros_like());
        let mut read =
            query.map(|query| apply_dropout(&mut dropout, queries(query), self.shape.dropout, reads));
        for (number, layer) in self.layers.iter().enumerate() {
            let is_last = number + 1 == self.layers.len();
            if is_last && read.is_none() && !layout.reads_all {
                read = Some(take_rows(&h, &layout.reads));
            }
            let all_attend = !is_last || read.is_none();
            let keys = layer.keys(parameters, self.shape, (&h, all_attend), layout, &table);
            if let Some(states) = &mut read {
                let context = layer.attend_from_reads(
                    parameters,
                    self.shape,
                    (states, &keys),
                    layout,
                    &hidden_from_reads,
                    &mut dropout,
                );
                *states = layer.finish(parameters, self.shape, (&context, states), reads, &mut dropout);
            }
            if all_attend {
                let context = layer.attend(parameters, self.shape, &keys, layout, &hidden, &mut dropout);
                h = layer.finish(parameters, self.shape, (&context, &h), positions, &mut dropout);
            }
        }
        apply_dropout(&mut dropout, read.unwrap_or(h), self.shape.dropout, reads)
    }
}

impl Layer {
    fn keys(
        &self,
        parameters: &Parameters,
        shape: Shape,
        (h, all_attend): (&Tensor, bool),
        layout: &Layout,
        table: &Tensor,
    ) -> Keys {
        // At once: a GPU has more to do with each product then, and less to be told.
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
        Keys { k: next(), v: next(), q: all_attend.then(next), r }
    }

    /// What all positions find: `[P, D]`.
    fn attend(
        &self,
        parameters: &Parameters,
        shape: Shape,
        keys: &Keys,
        layout: &Layout,
        hidden: &Option<Tensor>,
        dropout: &mut Option<&mut DropoutGenerator<'_>>,
    ) -> Tensor {
        let q = keys.q.as_ref().expect("all attend");
        let bias = |index: usize| parameters.leaf(index).view([1, shape.n_heads, 1, shape.head_width()]);
        let by_content = (q + bias(self.r_w_bias)).matmul(&keys.k.transpose(2, 3));
        // `[B, H, L, 2L]`: column p belongs to δ = L − p, so that (i, j) wants column L + j − i. Reading the rows with a
        // stride one shorter shifts each by one more than the one before.
        let length = layout.length;
        let by_position = (q + bias(self.r_r_bias))
            .matmul(&keys.r.unsqueeze(0))
            .view([-1, shape.n_heads, 2 * length, length])
            .narrow(2, 1, 2 * length - 1)
            .reshape([-1, shape.n_heads, length, 2 * length - 1])
            .narrow(3, 0, length);
        let hidden = hidden.as_ref().map(|hidden| hidden.unsqueeze(1));
        let weights = weights(by_content + by_position, hidden, shape);
        let weights = dropout_weights(dropout, weights, shape.dropout, &layout.sessions_by_segment);
        let found = weights.matmul(&keys.v).transpose(1, 2).reshape([-1, length, shape.width]);
        layout.pack(&found).matmul(&matrix(parameters, self.o).tr())
    }

    /// What the positions that are read find, their states being `states: [N, D]`: `[N, D]`.
    fn attend_from_reads(
        &self,
        parameters: &Parameters,
        shape: Shape,
        (states, keys): (&Tensor, &Keys),
        layout: &Layout,
        hidden: &Option<Tensor>,
        dropout: &mut Option<&mut DropoutGenerator<'_>>,
    ) -> Tensor {
        let q = states.matmul(&matrix(parameters, self.q)).view([-1, shape.n_heads, shape.head_width()]);
        let asked = layout.by_read(&(&q + parameters.leaf(self.r_w_bias)));
        let by_content = layout.of_reads(&asked.matmul(&keys.k.transpose(2, 3)));
        let by_position =
            (&q + parameters.leaf(self.r_r_bias)).transpose(0, 1).matmul(&keys.r).transpose(0, 1);
        let to = Tensor::arange(layout.length, (Kind::Int64, states.device())).unsqueeze(0);
        let columns = to - layout.read_places().unsqueeze(1) + layout.length;
        let columns = columns.unsqueeze(1).expand([-1, shape.n_heads, layout.length], false);
        let by_position = by_position.gather(2, &columns, false);
        let hidden = hidden.as_ref().map(|hidden| hidden.unsqueeze(1));
        let weights = weights(by_content + by_position, hidden, shape);
        let weights = dropout_weights(dropout, weights, shape.dropout, &layout.reads_by_segment);
        let found = layout.of_reads(&layout.by_read(&weights).matmul(&keys.v)).reshape([-1, shape.width]);
        found.matmul(&matrix(parameters, self.o).tr())
    }

    /// What comes after attention, position by position: `context` and `h`, both `[N, D]` → `[N, D]`.
    fn finish(
        &self,
        parameters: &Parameters,
        shape: Shape,
        (context, h): (&Tensor, &Tensor),
        counts: &[i64],
        dropout: &mut Option<&mut DropoutGenerator<'_>>,
    ) -> Tensor {
        let mut drop = |x: Tensor| apply_dropout(dropout, x, shape.dropout, counts);
        let h = self.attention_norm.apply(parameters, &(drop(context.shallow_clone()) + h));
        let inner = drop(self.layer_1.apply(parameters, &h).gelu("none"));
        self.norm.apply(parameters, &(drop(self.layer_2.apply(parameters, &inner)) + h))
    }
}

/// A parameter `[D, H, D_h]` as the matrix `[D, H · D_h]`.
fn matrix(parameters: &Parameters, index: usize) -> Tensor {
    let parameter = parameters.leaf(index);
    parameter.view([parameter.size()[0], -1])
}

fn weights(scores: Tensor, hidden: Option<Tensor>, shape: Shape) -> Tensor {
    let scores = scores * (shape.head_width() as f64).powf(-0.5);
    let scores =
        hidden.map_or(scores.shallow_clone(), |hidden| scores.masked_fill(&hidden, f64::NEG_INFINITY));
    scores.softmax(-1, Kind::Float)
}

fn apply_dropout(
    dropout: &mut Option<&mut DropoutGenerator<'_>>,
    x: Tensor,
    p: f64,
    counts: &[i64],
) -> Tensor {
    match dropout {
        Some(dropout) => dropout.dropout(x, p, counts),
        None => x,
    }
}

fn dropout_weights(
    dropout: &mut Option<&mut DropoutGenerator<'_>>,
    x: Tensor,
    p: f64,
    counts: &[i64],
) -> Tensor {
    match dropout {
        Some(dropout) => dropout.dropout_weights(x, p, counts),
        None => x,
    }
}

/// `(sin(δ f), cos(δ f))` for δ from L down to 1 − L: `[2L, D]`.
fn position_table(length: i64, width: i64, device: Device) -> Tensor {
    let on = (Kind::Float, device);
    let distances = Tensor::arange_start_step(length, -length, -1, on);
    let exponents = Tensor::arange_start_step(0, width, 2, on) / width as f64;
    let frequencies = (exponents * -(10_000f64.ln())).exp();
    let angles = distances.unsqueeze(1) * frequencies.unsqueeze(0);
    Tensor::cat(&[angles.sin(), angles.cos()], 1)
}
