//! From states to a loss over the catalogue, with its gradients.
//!
//! With states `h: [N, D]`, item table `E: [V, D]` and bias `b: [V]`, logits are `z = h Eᵀ + b` and the loss is
//! the sum over targets of `logsumexp(z) − z[target]`. Its gradients are known in closed form: with
//! `p = softmax(z) − onehot(target)`, they are `p E` for the states, `pᵀ h` for the table and the column sums of
//! `p` for the bias. They are computed right where `z` is at hand, without autograd, which would keep about four
//! `[N, V]` buffers. Autograd then goes on below from `(h · ∂h).sum()`, whose gradient is ∂h.

mod sampled;
mod softmax;
mod tiles;

use rand::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::Share;
use super::rows::add_rows;
use crate::collective::CollectiveError;
use crate::device::send;

use sampled::sampled;
pub(crate) use softmax::logsumexp_rows;
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
    /// Binary cross entropy of the target and of items drawn evenly, with the target's weighed so that scores come to
    /// probabilities although few of the other items are seen: gBCE (Petrov and Macdonald 2023, gSASRec). All of a step
    /// share the drawn items.
    Gbce {
        /// Items drawn a step.
        n_negatives: i64,
        /// From 0, plain binary cross entropy, to 1, probabilities as if all items were seen.
        #[serde(default = "default_calibration")]
        calibration: f64,
    },
}

fn default_calibration() -> f64 {
    0.75
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
                Err(format!("`loss.label_smoothing` {label_smoothing:?} is not within 0 <= share < 1"))
            }
            Self::Sampled { n_negatives, .. } | Self::Gbce { n_negatives, .. } if n_negatives < 1 => {
                Err(format!("`loss.n_negatives` cannot be {n_negatives}"))
            }
            // Beyond, a power of an occurrence is infinite or 0.
            Self::Sampled { power, .. } if !(-10.0..=10.0).contains(&power) => {
                Err(format!("`loss.power` cannot be {power:?}"))
            }
            Self::Gbce { calibration, .. } if !(0.0..=1.0).contains(&calibration) => {
                Err(format!("`loss.calibration` {calibration:?} is not within 0 to 1"))
            }
            _ => Ok(()),
        }
    }
}

impl LossConfig {
    /// Checks what depends on the rows of the item table.
    ///
    /// # Errors
    /// Says which key is wrong.
    pub fn check_items(&self, n_items: i64) -> Result<(), String> {
        let n_recommendable = (n_items - 2).max(0);
        match *self {
            Self::Sampled { n_negatives, .. } | Self::Gbce { n_negatives, .. }
                if n_negatives > n_recommendable =>
            {
                Err(format!(
                    "`loss.n_negatives` {n_negatives} is more than the {n_recommendable} items of the catalogue"
                ))
            }
            _ => Ok(()),
        }
    }
}

/// How logits of the whole catalogue are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logits {
    /// f32 or bf16: what they, their probabilities and the factors of their products are rounded to. What these add up to is
    /// f32.
    pub kind: Kind,
    /// At most so many at once (but always those of one target).
    pub most: i64,
}

impl Logits {
    /// As many of type `kind` as so many bytes hold.
    pub fn in_bytes(kind: Kind, n_bytes: usize) -> Self {
        Self { kind, most: (n_bytes / kind.elt_size_in_bytes()) as i64 }
    }
}

/// What the targets of a pass compete with.
pub enum Rivals {
    /// The whole catalogue.
    All {
        /// See [`LossConfig::Softmax`].
        label_smoothing: f64,
        /// How their logits are held.
        logits: Logits,
    },
    /// Items drawn with replacement.
    Drawn {
        /// Item indices, i64 `[M]`.
        items: Tensor,
        /// How the target and they compete.
        contest: Contest,
    },
}

/// How a target and drawn items compete.
pub enum Contest {
    /// See [`LossConfig::Sampled`].
    Softmax {
        /// Logarithm of how often each is expected among the drawn: f32 `[M]`.
        log_expected: Tensor,
    },
    /// See [`LossConfig::Gbce`].
    Binary {
        /// What the target's own cross entropy is weighed with.
        target_weight: f64,
    },
}

/// Says what the targets of each step compete with.
pub enum Contestants {
    /// Always the whole catalogue.
    All {
        /// See [`LossConfig::Softmax`].
        label_smoothing: f64,
        /// See [`Rivals::All`].
        logits: Logits,
    },
    /// Others in each step.
    Drawn(Sampler),
}

impl Contestants {
    /// For items that occurred `occurrences: [V]` times.
    pub fn new(loss: LossConfig, occurrences: &[i64], logits: Logits, device: Device) -> Self {
        match loss {
            LossConfig::Softmax { label_smoothing } => Self::All { label_smoothing, logits },
            LossConfig::Sampled { n_negatives, power } => {
                Self::Drawn(Sampler::new(occurrences, n_negatives, power, None, device))
            }
            LossConfig::Gbce { n_negatives, calibration } => {
                Self::Drawn(Sampler::new(occurrences, n_negatives, 0.0, Some(calibration), device))
            }
        }
    }

    /// The same for the same seed.
    pub fn of_step(&self, seed: u64) -> Rivals {
        match self {
            &Self::All { label_smoothing, logits } => Rivals::All { label_smoothing, logits },
            Self::Drawn(sampler) => sampler.draw(seed),
        }
    }
}

/// Draws rivals by how often items occurred.
pub struct Sampler {
    /// Logarithm of how often each item is expected among the drawn, f32 `[V]`: −∞ for padding and unknown.
    log_expected: Tensor,
    /// Probability that an item or one before it is drawn, f64 `[V]`.
    cumulative: Tensor,
    n_negatives: i64,
    /// Of gBCE, if that is what they are drawn for.
    target_weight: Option<f64>,
}

impl Sampler {
    /// Draws an item that occurred n times in proportion to `(n + 1)^power`. `calibration`: of gBCE, if that is the loss.
    pub fn new(
        occurrences: &[i64],
        n_negatives: i64,
        power: f64,
        calibration: Option<f64>,
        device: Device,
    ) -> Self {
        let weights = (Tensor::from_slice(occurrences).to_kind(Kind::Double) + 1.0).pow_tensor_scalar(power);
        let recommendable = Tensor::ones_like(&weights);
        let _ = recommendable.narrow(0, 0, 2).zero_();
        let weights = weights * recommendable;
        let probabilities = &weights / weights.sum(Kind::Double);
        // With α, the share of the other items that is drawn: α (t (1 − 1/α) + 1/α).
        let n_others = (occurrences.len() as f64 - 3.0).max(1.0);
        let sampled = (n_negatives as f64 / n_others).min(1.0);
        let expected = &probabilities * n_negatives as f64;
        Self {
            log_expected: expected.log().to_kind(Kind::Float).to_device(device),
            cumulative: probabilities.cumsum(0, Kind::Double).to_device(device),
            n_negatives,
            target_weight: calibration.map(|t| t * (sampled - 1.0) + 1.0),
        }
    }

    /// The same for the same seed.
    pub fn draw(&self, seed: u64) -> Rivals {
        let mut generator = Xoshiro256PlusPlus::seed_from_u64(seed);
        let uniform: Vec<f64> = (0..self.n_negatives).map(|_| generator.random()).collect();
        let uniform = send(&Tensor::from_slice(&uniform), self.cumulative.device());
        let items = uniform.searchsorted(&self.cumulative, false, true, "right", None::<&Tensor>);
        // The last sum may be less than 1 by its rounding.
        let items = items.clamp_max(self.cumulative.size()[0] - 1);
        let contest = match self.target_weight {
            Some(target_weight) => Contest::Binary { target_weight },
            None => Contest::Softmax { log_expected: self.log_expected.index_select(0, &items) },
        };
        Rivals::Drawn { items, contest }
    }
}

/// The table that items are scored against and its bias, with the gradients to be added to. `V` are the rows of the share.
pub struct Scored<'a> {
    /// `[V, D]`.
    pub table: &'a Tensor,
    /// `[V]`.
    pub bias: &'a Tensor,
    /// `[V, D]`.
    pub table_gradient: Tensor,
    /// `[V]`.
    pub bias_gradient: Tensor,
    /// Which rows they are, and who has the others.
    pub share: &'a Share<'a>,
    /// Targets of each rank; alone, only its own.
    pub counts: &'a [i64],
    /// Called when the gradients of the targets of one rank, or of all, are added: see [`Share::exactly`].
    pub settle: &'a dyn Fn(),
}

impl Scored<'_> {
    /// Vectors and biases of the rows at `places: [n]`, side by side: `[n, D + 1]`.
    fn rows(&self, places: &Tensor) -> Tensor {
        let bias = self.bias.index_select(0, places).unsqueeze(1);
        Tensor::cat(&[self.table.index_select(0, places), bias], 1)
    }

    /// Adds gradients `[n, D + 1]` to those of the rows at `places: [n]`.
    fn add(&mut self, places: &Tensor, gradients: &Tensor) {
        let (width, exactly) = (self.table.size()[1], self.share.is_exact());
        add_rows(&mut self.table_gradient, places, &gradients.narrow(1, 0, width), exactly);
        add_rows(&mut self.bias_gradient, places, &gradients.select(1, width), exactly);
    }
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

/// *All ranks* of the share. Summed cross entropy of `targets: [N]` under `states: [N, D]`, its gradients added to those of
/// `scored`. `uniform: [N]`: numbers in 0..1 by which an item is drawn for each target.
///
/// Where others have rows of the table, states and targets of all ranks come together, each rank scores them against its own
/// rows, and what they add to the softmax's sum and to the states' gradients is added up over ranks: vocabulary-parallel, as
/// in Megatron-LM (Shoeybi et al. 2019). What travels grows with targets and width, not with the catalogue, and the gradient
/// of a row is complete where the row is. The loss is then split in another way: this rank's is its targets' `logsumexp(z)`
/// less the `z[target]` of all targets that it has the rows of.
///
/// # Errors
/// Those of the collective.
pub fn cross_entropy(
    states: &Tensor,
    targets: &Tensor,
    scored: &mut Scored<'_>,
    rivals: &Rivals,
    uniform: Option<&Tensor>,
    workspace: &mut Workspace,
) -> Result<CrossEntropy, CollectiveError> {
    match rivals {
        &Rivals::All { label_smoothing, logits } => {
            tiles::full(states, targets, scored, (label_smoothing, logits), uniform, workspace)
        }
        Rivals::Drawn { items, contest } => sampled(states, targets, scored, (items, contest), uniform),
    }
}

/// A column of each row of probabilities `p: [n, C]`, by the uniform numbers `[n]`: i64 `[n]`.
fn draw(p: &Tensor, uniform: &Tensor) -> Tensor {
    let sums = p.cumsum(1, Kind::Float);
    let below = sums.le_tensor(&uniform.unsqueeze(1)).sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
    below.clamp_max(p.size()[1] - 1)
}
