//! Losses over the catalogue and their gradients.
//!
//! With states `h: [N, D]`, item table `E: [V, D]` and bias `b: [V]`, logits are `z = h Eᵀ + b` and
//! the loss is the sum over targets of `logsumexp(z) − z[target]`. Its gradients have a closed
//! form: with `p = softmax(z) − onehot(target)`, they are `p E` for the states, `pᵀ h` for the
//! table and the column sums of `p` for the bias. They are computed while `z` is in memory, without
//! autograd, which would keep about four `[N, V]` buffers. The backward pass through the encoder
//! then starts from `(h · ∂h).sum()`, whose gradient by `h` is `∂h`.

mod full;
mod sampled;
mod whole;

use rand::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use tch::{Device, Kind, Tensor};

use super::item_vectors::ItemVectors;
use super::rows::add_rows;
use super::{Encoded, ItemTable, RowList};
use crate::collective::CollectiveError;
use crate::config::LossConfig;

use full::FullSoftmax;
pub use full::Workspace;
use sampled::SampledNegatives;
use whole::WholeSoftmax;

/// Type and memory of the logits of the whole catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logits {
    /// Type of logits, probabilities and factors of their products, f32 or bf16; sums are f32.
    pub kind: Kind,
    /// Largest number of logits in memory at once; those of one target are always allowed.
    pub most: i64,
}

impl Logits {
    /// As many logits of type `kind` as `n_bytes` hold.
    pub fn in_bytes(kind: Kind, n_bytes: usize) -> Self {
        Self { kind, most: (n_bytes / kind.elt_size_in_bytes()) as i64 }
    }
}

/// The negatives of a backward pass, with the loss that contrasts targets with them.
pub enum Negatives {
    /// The whole catalogue, with the softmax cross entropy.
    Full {
        /// See [`LossConfig::Softmax`].
        label_smoothing: f64,
        logits: Logits,
    },
    /// Items sampled with replacement.
    Sampled {
        /// Item indices, i64 `[M]`.
        items: Tensor,
        loss: SampledLoss,
        /// Set if the targets of a micro-batch are negatives of each other.
        in_batch: Option<InBatch>,
    },
}

/// How often items are expected among the negatives.
pub struct InBatch {
    /// Logarithm of each item's expected count in a sample: f32 `[V]`.
    pub log_expected: Tensor,
    /// Logarithm of each item's share of the events in training: f32 `[V]`.
    pub log_share: Tensor,
}

/// A loss over the target and sampled negatives.
pub enum SampledLoss {
    /// See [`LossConfig::Sampled`].
    Softmax {
        /// Logarithm of each item's expected count in a sample: f32 `[M]`.
        log_expected: Tensor,
        label_smoothing: f64,
    },
    /// See [`LossConfig::BprMax`].
    BprMax { score_penalty: f64 },
    /// See [`LossConfig::Gbce`].
    Binary {
        /// Weight of the target's binary cross entropy.
        target_weight: f64,
    },
}

/// Gives the negatives of each step.
pub enum NegativeSampler {
    Full {
        /// See [`LossConfig::Softmax`].
        label_smoothing: f64,
        logits: Logits,
    },
    Sampled(ItemSampler),
}

impl NegativeSampler {
    /// `occurrences: [V]`: how often each item occurred in training.
    pub fn new(loss: LossConfig, occurrences: &[i64], logits: Logits, device: Device) -> Self {
        match loss {
            LossConfig::Softmax { label_smoothing } => Self::Full { label_smoothing, logits },
            _ => Self::Sampled(ItemSampler::new(loss, occurrences, device)),
        }
    }

    /// Items that are sampled in each step.
    pub fn n_sampled(&self) -> i64 {
        match self {
            Self::Full { .. } => 0,
            Self::Sampled(sampler) => sampler.n_sampled(),
        }
    }

    /// The negatives that follow from the numbers of [`uniform_numbers`] on the device.
    pub fn negatives(&self, uniform: &Tensor) -> Negatives {
        match self {
            &Self::Full { label_smoothing, logits } => Negatives::Full { label_smoothing, logits },
            Self::Sampled(sampler) => sampler.negatives(uniform),
        }
    }
}

/// `n` random numbers in 0..1, the same for the same seed, and so on every rank: f64 `[n]` in host
/// memory.
pub fn uniform_numbers(n: i64, seed: u64) -> Tensor {
    let mut generator = Xoshiro256PlusPlus::seed_from_u64(seed);
    let uniform: Vec<f64> = (0..n).map(|_| generator.random()).collect();
    Tensor::from_slice(&uniform)
}

/// Samples items in proportion to a power of their frequency.
pub struct ItemSampler {
    /// Logarithm of each item's expected count in a sample, f32 `[V]`: −∞ for padding and unknown.
    log_expected: Tensor,
    /// Logarithm of each item's share of the events in training: f32 `[V]`; `None` if targets are
    /// no negatives of each other.
    log_share: Option<Tensor>,
    /// Cumulative distribution over items, f64 `[V]`.
    cumulative: Tensor,
    n_negatives: i64,
    loss: LossConfig,
}

impl ItemSampler {
    /// A sampler for a loss with negatives. `occurrences: [V]`.
    pub fn new(loss: LossConfig, occurrences: &[i64], device: Device) -> Self {
        let (n_negatives, power, uniform_share, in_batch) = match loss {
            LossConfig::Softmax { .. } => unreachable!("the full softmax samples nothing"),
            LossConfig::Sampled { n_negatives, power, uniform_share, in_batch, .. }
            | LossConfig::BprMax { n_negatives, power, uniform_share, in_batch, .. } => {
                (n_negatives, power, uniform_share, in_batch)
            }
            LossConfig::Gbce { n_negatives, .. } => (n_negatives, 0.0, 0.0, false),
        };
        let log_share = in_batch.then(|| {
            let occurrences = Tensor::from_slice(occurrences).to_kind(Kind::Double);
            let share = &occurrences / occurrences.sum(Kind::Double);
            share.log().to_kind(Kind::Float).to_device(device)
        });
        let weights =
            (Tensor::from_slice(occurrences).to_kind(Kind::Double) + 1.0).pow_tensor_scalar(power);
        let recommendable = Tensor::ones_like(&weights);
        let _ = recommendable.narrow(0, 0, 2).zero_();
        let probabilities = |weights: Tensor| {
            let weights = weights * &recommendable;
            &weights / weights.sum(Kind::Double)
        };
        let mut mixed = probabilities(weights);
        if uniform_share > 0.0 {
            let uniform = probabilities(recommendable.shallow_clone());
            mixed = mixed * (1.0 - uniform_share) + uniform * uniform_share;
        }
        let expected = &mixed * n_negatives as f64;
        Self {
            log_expected: expected.log().to_kind(Kind::Float).to_device(device),
            log_share,
            cumulative: mixed.cumsum(0, Kind::Double).to_device(device),
            n_negatives,
            loss,
        }
    }

    /// Items of a sample, `M`.
    pub fn n_sampled(&self) -> i64 {
        self.n_negatives
    }

    /// The sample that follows from random numbers, f64 `[M]` on the device.
    pub fn negatives(&self, uniform: &Tensor) -> Negatives {
        let items = uniform.searchsorted(&self.cumulative, false, true, "right", None::<&Tensor>);
        // Rounding may leave the last cumulative probability below 1.
        let items = items.clamp_max(self.cumulative.size()[0] - 1);
        let loss = match self.loss {
            LossConfig::Gbce { n_negatives, calibration } => {
                // gBCE weighs the target by α (t (1 − 1/α) + 1/α) = t (α − 1) + 1, where α is the
                // fraction of the other items that is sampled.
                let n_others = (self.log_expected.size()[0] as f64 - 3.0).max(1.0);
                let sampled = (n_negatives as f64 / n_others).min(1.0);
                SampledLoss::Binary { target_weight: calibration * (sampled - 1.0) + 1.0 }
            }
            LossConfig::BprMax { score_penalty, .. } => SampledLoss::BprMax { score_penalty },
            LossConfig::Softmax { label_smoothing }
            | LossConfig::Sampled { label_smoothing, .. } => SampledLoss::Softmax {
                log_expected: self.log_expected.index_select(0, &items),
                label_smoothing,
            },
        };
        let in_batch = self.log_share.as_ref().map(|log_share| InBatch {
            log_expected: self.log_expected.shallow_clone(),
            log_share: log_share.shallow_clone(),
        });
        Negatives::Sampled { items, loss, in_batch }
    }
}

/// The table that items are scored against. `V` counts the local rows.
pub struct ScoringTable<'a> {
    /// `[V, D]`.
    pub weights: Tensor,
    /// `[V]`.
    pub bias: Tensor,
    /// Composes vectors of rows, where `weights` and `bias` are those of ids.
    pub items: Option<ItemVectors<'a>>,
    /// `[V, D]`; gradients are added to it.
    pub weight_gradient: Tensor,
    /// `[V]`; gradients are added to it.
    pub bias_gradient: Tensor,
    /// Of weights and biases, instead of the gradients above, if few rows have gradients.
    pub row_lists: Option<[RowList; 2]>,
    pub item_table: &'a ItemTable<'a>,
    /// Number of targets of each rank; only this rank's if the table is replicated.
    pub counts: &'a [i64],
    /// Called after the gradients of a group of targets are added: see
    /// [`ItemTable::target_groups`].
    pub group_added: &'a mut dyn FnMut(),
}

impl ScoringTable<'_> {
    /// Vectors and biases of `rows: [n]`, side by side: `[n, D + 1]`.
    fn vectors_and_bias(&self, rows: &Tensor) -> Tensor {
        let bias = self.bias.index_select(0, rows).unsqueeze(1);
        let of_ids = Tensor::cat(&[self.weights.index_select(0, rows), bias], 1);
        match &self.items {
            Some(items) => items.compose(rows, &of_ids),
            None => of_ids,
        }
    }

    /// Adds gradients `[n, D + 1]` of `rows: [n]`.
    fn add_gradients(&mut self, rows: &Tensor, gradients: &Tensor) {
        let width = self.weights.size()[1];
        self.add_weight_and_bias(rows, &gradients.narrow(1, 0, width), &gradients.select(1, width));
    }

    /// Adds gradients `[n, D]` and `[n]` of `rows: [n]`.
    fn add_weight_and_bias(&mut self, rows: &Tensor, of_weights: &Tensor, of_bias: &Tensor) {
        if let Some([weights, bias]) = &mut self.row_lists {
            weights.add(rows, of_weights);
            bias.add(rows, of_bias);
            return;
        }
        let is_reproducible = self.item_table.is_reproducible();
        add_rows(&mut self.weight_gradient, rows, of_weights, is_reproducible);
        add_rows(&mut self.bias_gradient, rows, of_bias, is_reproducible);
    }
}

/// What is predicted.
pub struct Targets {
    /// i64 `[N]`.
    pub items: Tensor,
    /// Number of the micro-batch of each target, i64 `[N]`: targets are negatives of each other
    /// within a micro-batch only, so that a step does not depend on the number of ranks.
    pub micro_batches: Tensor,
    /// Factor of the loss of each target, f32 `[N]`; `None` if all are 1.
    pub weights: Option<Tensor>,
    /// Numbers in 0..1 by which an item is drawn for each target, `[N]`, if items are drawn.
    pub uniform: Option<Tensor>,
}

/// Result of [`cross_entropy`], which also adds the gradients of the scoring table in place.
pub struct CrossEntropy {
    /// Summed over the targets, scalar f64.
    pub loss: Tensor,
    /// Gradient of the loss by the states, `[N, D]`.
    pub state_gradient: Tensor,
    /// Gradient of the loss by the sparse scores, `[N, E]`; `None` without them.
    pub sparse_gradient: Option<Tensor>,
    /// An item sampled from the model's distribution for each target, i64 `[N]`; `None` without
    /// `uniform`.
    pub drawn: Option<Tensor>,
}

/// *All ranks*, if the table is sharded. Summed cross entropy of targets under `encoded`, states
/// `[N, D]` and the scores of some items of each target, `[N, E]`, in place of those from the
/// states; adds its gradients to `scored`.
///
/// On a sharded table the computation is vocabulary-parallel, as in Megatron-LM (Shoeybi et al.
/// 2019): the states and targets of all ranks are gathered, each rank scores them against its rows,
/// and the partial softmax sums and state gradients are summed over ranks. The traffic grows with
/// the number of targets and the width, not with the catalogue, and the gradient of a row is
/// complete on the rank that holds it. The loss is then split over ranks in another way: a rank's
/// part is `logsumexp(z)` of its own targets less `z[target]` of all targets whose rows it holds.
///
/// # Errors
/// A collective call fails.
pub fn cross_entropy(
    encoded: &Encoded,
    targets: &Targets,
    scored: &mut ScoringTable<'_>,
    negatives: &Negatives,
    workspace: &mut Workspace,
) -> Result<CrossEntropy, CollectiveError> {
    match negatives {
        &Negatives::Full { label_smoothing, logits }
            if WholeSoftmax::suits(logits, targets, scored) =>
        {
            let whole = WholeSoftmax { label_smoothing, logits, workspace };
            let loss = whole.loss(encoded, targets, scored);
            (scored.group_added)();
            Ok(loss)
        }
        &Negatives::Full { label_smoothing, logits } => {
            let full = FullSoftmax { label_smoothing, logits, workspace };
            full.loss(encoded, targets, scored)
        }
        Negatives::Sampled { items, loss, in_batch } => {
            let negatives = SampledNegatives { items, loss, in_batch: in_batch.as_ref() };
            negatives.loss(encoded, targets, scored)
        }
    }
}

/// Samples a column from each row of probabilities `p: [n, C]` by inverting its cumulative sums at
/// `uniform: [n]`: i64 `[n]`.
fn draw(p: &Tensor, uniform: &Tensor) -> Tensor {
    let sums = p.cumsum(1, Kind::Float);
    let below = sums.le_tensor(&uniform.unsqueeze(1)).sum_dim_intlist(
        [1i64].as_slice(),
        false,
        Kind::Int64,
    );
    below.clamp_max(p.size()[1] - 1)
}
