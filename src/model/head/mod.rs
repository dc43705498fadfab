//! From states to a loss over the catalogue, with its gradients.
//!
//! With states `h: [N, D]`, item table `E: [V, D]` and bias `b: [V]`, logits are `z = h Eᵀ + b` and the loss is
//! the sum over targets of `logsumexp(z) − z[target]`. Its gradients are known in closed form: with
//! `p = softmax(z) − onehot(target)`, they are `p E` for the states, `pᵀ h` for the table and the column sums of
//! `p` for the bias. They are computed right where `z` is at hand, without autograd, which would keep about four
//! `[N, V]` buffers. Autograd then goes on below from `(h · ∂h).sum()`, whose gradient is ∂h.

mod sampled;
mod tiles;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::data::with_seed;

use sampled::sampled;
pub use tiles::Workspace;

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
    workspace: &mut Workspace,
) -> CrossEntropy {
    match rivals {
        &Rivals::All { label_smoothing, max_logits } => {
            tiles::full(states, targets, scored, (label_smoothing, max_logits), uniform, workspace)
        }
        Rivals::Drawn { items, log_expected } => {
            sampled(states, targets, scored, (items, log_expected), uniform)
        }
    }
}

/// Adds rows `of: [N, ..]` to the rows `to: [N]` of `table: [V, ..]`, of which some may be the same.
pub(super) fn add_rows(table: &mut Tensor, to: &Tensor, of: &Tensor) {
    // Not `index_add_`, which on the CPU goes from row to row, each an operation of its own.
    let to = match of.dim() {
        1 => to.shallow_clone(),
        _ => to.unsqueeze(1).expand_as(of),
    };
    let _ = table.scatter_add_(0, &to, of);
}

/// A column of each row of probabilities `p: [n, C]`, by the uniform numbers `[n]`: i64 `[n]`.
fn draw(p: &Tensor, uniform: &Tensor) -> Tensor {
    let sums = p.cumsum(1, Kind::Float);
    let below = sums.le_tensor(&uniform.unsqueeze(1)).sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
    below.clamp_max(p.size()[1] - 1)
}
