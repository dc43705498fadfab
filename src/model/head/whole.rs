//! The softmax cross entropy with the logits of the whole catalogue in memory, for some targets at
//! a time: few large operations, which suit a GPU.

use tch::{Device, Kind, Tensor};

use super::full::Workspace;
use super::{CrossEntropy, Logits, ScoringTable, Targets};
use crate::model::item_table::div_ceil;
use crate::model::rows::joined;
use crate::model::{Encoded, SparseScores, clear};

/// The loss over the whole catalogue, on a rank that holds all rows.
pub(super) struct WholeSoftmax<'a> {
    pub label_smoothing: f64,
    pub logits: Logits,
    pub workspace: &'a mut Workspace,
}

/// Fewer targets at a time would read the table too often.
const MIN_TARGETS: i64 = 32;

impl WholeSoftmax<'_> {
    /// Whether this loss computes what [`super::FullSoftmax`] would, and faster.
    pub fn suits(logits: Logits, targets: &Targets, scored: &ScoringTable<'_>) -> bool {
        let table = scored.item_table;
        let n_targets = targets.items.size()[0];
        scored.weights.device() != Device::Cpu
            && !table.is_sharded()
            && !table.is_reproducible()
            && targets.uniform.is_none()
            && logits.kind == Kind::Float
            && logits.most / table.n_items >= n_targets.min(MIN_TARGETS)
    }

    /// See [`super::cross_entropy`].
    pub fn loss(
        self,
        encoded: &Encoded,
        targets: &Targets,
        scored: &mut ScoringTable<'_>,
    ) -> CrossEntropy {
        let n_items = scored.item_table.n_items;
        let n_targets = targets.items.size()[0];
        let n_parts = div_ceil(n_targets, (self.logits.most / n_items).min(n_targets));
        let n_each = div_ceil(n_targets, n_parts);
        let device = scored.weights.device();
        let room = self.workspace.room(n_each * n_items, Kind::Float, device);
        let (mut losses, mut state_gradients, mut sparse_gradients) = (vec![], vec![], vec![]);
        for first in (0..n_targets).step_by(n_each as usize) {
            let n = n_each.min(n_targets - first);
            let rows = |x: &Tensor| x.narrow(0, first, n);
            let part = Part {
                states: rows(&encoded.vectors),
                sparse: encoded.sparse.as_ref().map(|sparse| SparseScores {
                    items: rows(&sparse.items),
                    scores: rows(&sparse.scores),
                }),
                targets: rows(&targets.items).unsqueeze(1),
                weights: targets.weights.as_ref().map(|weights| rows(weights).unsqueeze(1)),
                logits: room.narrow(0, 0, n * n_items).view([n, n_items]),
            };
            losses.push(part.loss_and_gradients(self.label_smoothing, scored));
            sparse_gradients.extend(part.take_sparse_gradients(scored));
            state_gradients.push(part.weighted(part.logits.matmul(&scored.weights)));
            part.add_table_gradients(scored);
        }
        let loss = losses.into_iter().reduce(|sum, loss| sum + loss);
        CrossEntropy {
            loss: loss.expect("there are targets"),
            state_gradient: joined(state_gradients),
            sparse_gradient: encoded.sparse.as_ref().map(|_| joined(sparse_gradients)),
            drawn: None,
        }
    }
}

/// Some targets, `n`.
struct Part {
    /// `[n, D]`.
    states: Tensor,
    sparse: Option<SparseScores>,
    /// i64 `[n, 1]`.
    targets: Tensor,
    /// f32 `[n, 1]`.
    weights: Option<Tensor>,
    /// Memory for logits, and then for the gradients by them: f32 `[n, V]`.
    logits: Tensor,
}

impl Part {
    /// Rows `[n, ..]` times the weights of the targets, if any. The gradients by the logits are not
    /// multiplied by them, because their products are smaller than they are.
    fn weighted(&self, x: Tensor) -> Tensor {
        match &self.weights {
            Some(weights) => x * weights,
            None => x,
        }
    }

    /// Returns the summed loss, f64, and leaves the gradients by the logits in their memory,
    /// without weights. Those of sparse scores are the gradients by these.
    fn loss_and_gradients(&self, label_smoothing: f64, scored: &ScoringTable<'_>) -> Tensor {
        let mut logits = self.logits.shallow_clone();
        let _ = scored.bias.addmm_out(&logits, &self.states, &scored.weights.tr());
        if let Some(sparse) = &self.sparse {
            sparse.write_to(&logits, None, &(0..scored.item_table.n_items));
        }
        // Row by row, so that the result may be written over its argument.
        let _ = logits.internal_log_softmax_out(&logits, 1, false);
        let on_target = 1.0 - label_smoothing;
        let of_targets = self.weighted(logits.gather(1, &self.targets, false));
        let mut loss = of_targets.sum(Kind::Double) * -on_target;
        let each = label_smoothing / scored.item_table.n_items as f64;
        if label_smoothing > 0.0 {
            let of_all = logits.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
            loss -= self.weighted(of_all).sum(Kind::Double) * each;
        }
        let _ = logits.exp_();
        let _ = logits.scatter_value_reduce_(1, &self.targets, -on_target, "add");
        if label_smoothing > 0.0 {
            logits -= each;
        }
        loss
    }

    /// Moves the gradients by the sparse scores, `[n, E]`, out of those by the logits.
    fn take_sparse_gradients(&self, scored: &ScoringTable<'_>) -> Option<Tensor> {
        let sparse = self.sparse.as_ref()?;
        let (is_inside, columns) = sparse.columns(&(0..scored.item_table.n_items));
        let is_inside = is_inside.to_kind(Kind::Float);
        let gradients = self.logits.gather(1, &columns, false) * &is_inside;
        clear(&self.logits, &columns, &is_inside);
        Some(self.weighted(gradients))
    }

    fn add_table_gradients(&self, scored: &mut ScoringTable<'_>) {
        let n = self.states.size()[0];
        let weights = match &self.weights {
            Some(weights) => weights.squeeze_dim(1),
            None => self.states.new_ones([n], (Kind::Float, self.states.device())),
        };
        let by_item = self.logits.tr();
        let states = self.weighted(self.states.shallow_clone());
        let _ = scored.weight_gradient.addmm_(&by_item, &states);
        let _ = scored.bias_gradient.addmv_(&by_item, &weights);
    }
}

#[cfg(test)]
mod tests {
    use super::super::full::FullSoftmax;
    use super::*;
    use crate::model::ItemTable;

    const N_ITEMS: i64 = 37;

    struct Gradients {
        loss: f64,
        /// By states, sparse scores, weights and biases.
        tensors: Vec<Tensor>,
    }

    fn computed(
        is_whole: bool,
        label_smoothing: f64,
        has_sparse: bool,
        has_weights: bool,
    ) -> Gradients {
        let wave = |size: &[i64], frequency: f64| {
            let n = size.iter().product::<i64>();
            (Tensor::arange(n, (Kind::Float, Device::Cpu)) * frequency).sin().view(size)
        };
        let (n, width) = (9, 8);
        let item_table = ItemTable::replicated(N_ITEMS);
        let (weight_gradient, bias_gradient) =
            (wave(&[N_ITEMS, width], 0.1), wave(&[N_ITEMS], 0.2));
        let mut scored = ScoringTable {
            weights: wave(&[N_ITEMS, width], 0.7),
            bias: wave(&[N_ITEMS], 1.3),
            items: None,
            weight_gradient: weight_gradient.shallow_clone(),
            bias_gradient: bias_gradient.shallow_clone(),
            row_lists: None,
            item_table: &item_table,
            counts: &[n],
            group_added: &mut || (),
        };
        let targets = Targets {
            items: (Tensor::arange(n, (Kind::Int64, Device::Cpu)) * 5).remainder(N_ITEMS - 2) + 2,
            micro_batches: Tensor::zeros([n], (Kind::Int64, Device::Cpu)),
            weights: has_weights.then(|| wave(&[n], 0.4).abs()),
            uniform: None,
        };
        let first = Tensor::arange(n, (Kind::Int64, Device::Cpu)).unsqueeze(1);
        let others = Tensor::from_slice(&[0i64, 5, 11]).unsqueeze(0);
        let items = first * (&others * 3).clamp_max(1) + others;
        let encoded = Encoded {
            vectors: wave(&[n, width], 0.9),
            sparse: has_sparse.then(|| SparseScores { items, scores: wave(&[n, 3], 2.1) }),
        };
        let (mut workspace, logits) =
            (Workspace::default(), Logits { kind: Kind::Float, most: 150 });
        let CrossEntropy { loss, state_gradient, sparse_gradient, .. } = if is_whole {
            let whole = WholeSoftmax { label_smoothing, logits, workspace: &mut workspace };
            whole.loss(&encoded, &targets, &mut scored)
        } else {
            let full = FullSoftmax { label_smoothing, logits, workspace: &mut workspace };
            full.loss(&encoded, &targets, &mut scored).unwrap()
        };
        let mut tensors = vec![state_gradient, weight_gradient, bias_gradient];
        tensors.extend(sparse_gradient);
        Gradients { loss: loss.double_value(&[]), tensors }
    }

    #[test]
    fn the_loss_and_its_gradients_are_those_of_the_chunked_softmax() {
        for (label_smoothing, has_sparse, has_weights) in
            [0.0, 0.1].into_iter().flat_map(|label_smoothing| {
                [(false, false), (true, false), (false, true), (true, true)]
                    .map(|(has_sparse, has_weights)| (label_smoothing, has_sparse, has_weights))
            })
        {
            let [whole, chunked] = [true, false]
                .map(|is_whole| computed(is_whole, label_smoothing, has_sparse, has_weights));
            let losses = (whole.loss, chunked.loss);
            assert!(
                (losses.0 - losses.1).abs() < 1e-4,
                "{label_smoothing} {has_sparse} {losses:?}"
            );
            for (a, b) in whole.tensors.iter().zip(&chunked.tensors) {
                let error = (a - b).abs().max().double_value(&[]);
                assert!(error < 1e-5, "{label_smoothing} {has_sparse} {has_weights} {error}");
            }
        }
    }
}
