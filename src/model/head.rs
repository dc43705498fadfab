//! The softmax over the catalogue and its gradients, some targets at a time.
//!
//! With states `h: [N, D]`, item table `E: [V, D]` and bias `b: [V]`, logits are `z = h Eᵀ + b` and the loss is
//! the sum over targets of `logsumexp(z) − z[target]`. Its gradients are known in closed form: with
//! `p = softmax(z) − onehot(target)`, they are `p E` for the states, `pᵀ h` for the table and the column sums of
//! `p` for the bias. Computing them right where `z` is at hand needs one `[n, V]` buffer for a few rows `n`
//! instead of about four for all `N` that autograd keeps, and no second pass (the idea of Liger and of "Cut Your
//! Losses", Wijmans et al. 2024). Autograd then goes on below from `(h · ∂h).sum()`, whose gradient is ∂h.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::data::with_seed;

/// `[model.head]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeadConfig {
    /// Whether states pass a ReLU before they are scored, as in Transformers4Rec.
    pub relu: bool,
    /// Whether items are scored against the table that they are looked up in, or against one of their own.
    pub tied: bool,
    /// Scores are `h · e / temperature + b`.
    pub temperature: f64,
}

impl Default for HeadConfig {
    fn default() -> Self {
        Self { relu: true, tied: true, temperature: 1.0 }
    }
}

/// `train.loss`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LossConfig {
    /// Cross entropy over the whole catalogue.
    Softmax {
        /// Share of the target that is spread evenly over the catalogue (Szegedy et al. 2016).
        #[serde(default)]
        label_smoothing: f64,
    },
    /// Cross entropy over the target and items drawn by how often they occurred, with their logits corrected for it
    /// (Bengio & Senécal 2008, "logQ correction"): all of a step share the drawn items.
    Sampled {
        /// Items drawn a step.
        n_negatives: i64,
        /// An item that occurred n times is drawn in proportion to `(n + 1)^power`.
        #[serde(default = "default_power")]
        power: f64,
    },
}

fn default_power() -> f64 {
    0.75
}

impl Default for LossConfig {
    fn default() -> Self {
        Self::Softmax { label_smoothing: 0.0 }
    }
}

impl LossConfig {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Says which key is wrong.
    pub fn check(&self) -> Result<(), String> {
        match *self {
            Self::Softmax { label_smoothing } if !(0.0..1.0).contains(&label_smoothing) => {
                Err(format!("`loss.label_smoothing` {label_smoothing} is not within 0 <= share < 1"))
            }
            Self::Sampled { n_negatives, .. } if n_negatives < 1 => {
                Err(format!("`loss.n_negatives` cannot be {n_negatives}"))
            }
            Self::Sampled { power, .. } if !power.is_finite() => {
                Err(format!("`loss.power` cannot be {power}"))
            }
            _ => Ok(()),
        }
    }
}

/// What the targets of a pass compete with.
pub enum Rivals {
    /// The whole catalogue.
    All {
        /// See [`LossConfig::Softmax`].
        label_smoothing: f64,
        /// At most so many logits are held at once (but always those of one target).
        max_logits: i64,
    },
    /// Items drawn with replacement.
    Drawn {
        /// Item indices, i64 `[M]`.
        items: Tensor,
        /// Logarithm of how often each is expected among the drawn: f32 `[M]`.
        log_expected: Tensor,
    },
}

/// Draws rivals by how often items occurred.
pub struct Sampler {
    /// Probability of each item, f32 `[V]`: 0 for padding and unknown.
    probabilities: Tensor,
    n_negatives: i64,
}

impl Sampler {
    /// For items that occurred `occurrences: [V]` times.
    pub fn new(occurrences: &[i64], n_negatives: i64, power: f64, device: Device) -> Self {
        let weights = (Tensor::from_slice(occurrences).to_kind(Kind::Double) + 1.0).pow_tensor_scalar(power);
        let recommendable = Tensor::ones_like(&weights);
        let _ = recommendable.narrow(0, 0, 2).zero_();
        let weights = weights * recommendable;
        let probabilities = &weights / weights.sum(Kind::Double);
        Self { probabilities: probabilities.to_kind(Kind::Float).to_device(device), n_negatives }
    }

    /// The same for the same seed.
    pub fn draw(&self, seed: u64) -> Rivals {
        let items = with_seed(seed, self.probabilities.device(), || {
            self.probabilities.multinomial(self.n_negatives, true)
        });
        let log_expected = (self.probabilities.index_select(0, &items) * self.n_negatives as f64).log();
        Rivals::Drawn { items, log_expected }
    }
}

/// The table that items are scored against and its bias, with the gradients to be added to.
pub struct Scored<'a> {
    /// `[V, D]`.
    pub table: &'a Tensor,
    /// `[V]`.
    pub bias: &'a Tensor,
    /// `[V, D]`.
    pub table_gradient: Tensor,
    /// `[V]`.
    pub bias_gradient: Tensor,
}

/// What one call of [`cross_entropy`] gives besides the gradients it adds in place.
pub struct CrossEntropy {
    /// Summed over the targets, scalar f64.
    pub loss: Tensor,
    /// Its gradient by the states, `[N, D]`.
    pub state_gradient: Tensor,
    /// An item drawn for each target from what the model predicts there, i64 `[N]`, if uniform numbers were given.
    pub drawn: Option<Tensor>,
}

/// Summed cross entropy of `targets: [N]` under `states: [N, D]`, its gradients added to those of `scored`.
/// `uniform: [N]`: numbers in 0..1 by which an item is drawn for each target.
pub fn cross_entropy(
    states: &Tensor,
    targets: &Tensor,
    scored: &mut Scored<'_>,
    rivals: &Rivals,
    uniform: Option<&Tensor>,
) -> CrossEntropy {
    match rivals {
        Rivals::All { label_smoothing, max_logits } => {
            let n_items = scored.table.size()[0];
            let n_targets = targets.size()[0];
            let rows = (max_logits / n_items).clamp(1, n_targets.max(1));
            let mut loss = Tensor::zeros([], (Kind::Double, states.device()));
            let (mut state_gradients, mut drawn) = (Vec::new(), Vec::new());
            for first in (0..n_targets).step_by(rows as usize) {
                let of = |x: &Tensor| x.narrow(0, first, rows.min(n_targets - first));
                let part =
                    full(&of(states), &of(targets), scored, *label_smoothing, uniform.map(of).as_ref());
                loss += part.loss;
                state_gradients.push(part.state_gradient);
                drawn.extend(part.drawn);
            }
            if state_gradients.is_empty() {
                return CrossEntropy { loss, state_gradient: states.zeros_like(), drawn: None };
            }
            let state_gradient = Tensor::cat(&state_gradients, 0);
            let drawn = uniform.map(|_| Tensor::cat(&drawn, 0));
            CrossEntropy { loss, state_gradient, drawn }
        }
        Rivals::Drawn { items, log_expected } => {
            sampled(states, targets, scored, (items, log_expected), uniform)
        }
    }
}

fn full(
    h: &Tensor,
    targets: &Tensor,
    Scored { table, bias, table_gradient, bias_gradient }: &mut Scored<'_>,
    label_smoothing: f64,
    uniform: Option<&Tensor>,
) -> CrossEntropy {
    let target = targets.unsqueeze(1);
    let mut p = bias.addmm(h, &table.tr());
    let max = p.amax([1i64].as_slice(), true);
    let _ = p.subtract_(&max);
    let mut wanted = p.gather(1, &target, false);
    if label_smoothing > 0.0 {
        let mean = p.mean_dim([1i64].as_slice(), true, Kind::Float);
        wanted = wanted * (1.0 - label_smoothing) + mean * label_smoothing;
    }
    let _ = p.exp_();
    let sum = p.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
    let loss = (sum.log() - wanted).sum(Kind::Double);
    let _ = p.divide_(&sum);
    let drawn = uniform.map(|uniform| draw(&p, uniform));
    let n = targets.size()[0];
    let minus_target = Tensor::full([n, 1], label_smoothing - 1.0, (p.kind(), p.device()));
    let _ = p.scatter_add_(1, &target, &minus_target);
    if label_smoothing > 0.0 {
        let _ = p.g_sub_scalar_(label_smoothing / table.size()[0] as f64);
    }
    let _ = table_gradient.addmm_(&p.tr(), h);
    *bias_gradient += p.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
    CrossEntropy { loss, state_gradient: p.matmul(table), drawn }
}

/// The same over the target and the drawn items: `z` of a drawn item is lowered by the logarithm of how often it was
/// expected, so that its share of the sum stands for all that it was drawn from; drawn items that are the target itself
/// are left out.
fn sampled(
    h: &Tensor,
    targets: &Tensor,
    Scored { table, bias, table_gradient, bias_gradient }: &mut Scored<'_>,
    (items, log_expected): (&Tensor, &Tensor),
    uniform: Option<&Tensor>,
) -> CrossEntropy {
    let (rivals, wanted) = (table.index_select(0, items), table.index_select(0, targets));
    let rival_logits = (bias.index_select(0, items) - log_expected).addmm(h, &rivals.tr());
    let itself = targets.unsqueeze(1).eq_tensor(&items.unsqueeze(0));
    let rival_logits = rival_logits.masked_fill(&itself, f64::NEG_INFINITY);
    let target_logits = (h * &wanted).sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
        + bias.index_select(0, targets).unsqueeze(1);
    let logits = Tensor::cat(&[&target_logits, &rival_logits], 1);
    let p = logits.log_softmax(1, Kind::Float);
    let loss = -p.narrow(1, 0, 1).sum(Kind::Double);
    let p = p.exp();
    let drawn = uniform.map(|uniform| {
        let place = draw(&p, uniform);
        let rival = items.index_select(0, &(&place - 1).clamp_min(0));
        rival.where_self(&place.gt(0), targets)
    });
    let (p_target, p_rivals) = (p.narrow(1, 0, 1) - 1.0, p.narrow(1, 1, items.size()[0]));
    let _ = table_gradient.index_add_(0, items, &p_rivals.tr().matmul(h));
    let _ = table_gradient.index_add_(0, targets, &(&p_target * h));
    let _ =
        bias_gradient.index_add_(0, items, &p_rivals.sum_dim_intlist([0i64].as_slice(), false, Kind::Float));
    let _ = bias_gradient.index_add_(0, targets, &p_target.squeeze_dim(1));
    CrossEntropy { loss, state_gradient: p_rivals.matmul(&rivals) + p_target * wanted, drawn }
}

/// A column of each row of probabilities `p: [n, C]`, by the uniform numbers `[n]`: i64 `[n]`.
fn draw(p: &Tensor, uniform: &Tensor) -> Tensor {
    let sums = p.cumsum(1, Kind::Float);
    let below = sums.le_tensor(&uniform.unsqueeze(1)).sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
    below.clamp_max(p.size()[1] - 1)
}
