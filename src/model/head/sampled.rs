//! The loss over the target and sampled negatives.

use tch::{Kind, Tensor};

use super::{CrossEntropy, InBatch, SampledLoss, ScoringTable, Targets, draw};
use crate::collective::CollectiveError;
use crate::model::{Encoded, SparseScores};

/// The negatives of a step, with the loss that contrasts targets with them.
pub(super) struct SampledNegatives<'a> {
    /// The same on all ranks, i64 `[M]`.
    pub items: &'a Tensor,
    pub loss: &'a SampledLoss,
    pub in_batch: Option<&'a InBatch>,
}

impl SampledNegatives<'_> {
    /// *All ranks*, if the table is sharded. See [`super::cross_entropy`]. Negatives that equal a
    /// target are left out. Items with sparse scores are negatives besides the sampled ones and the
    /// targets of the micro-batch, each in full, and samples and targets that equal them are left
    /// out.
    pub fn loss(
        &self,
        encoded: &Encoded,
        targets: &Targets,
        scored: &mut ScoringTable<'_>,
    ) -> Result<CrossEntropy, CollectiveError> {
        let Encoded { vectors: states, sparse } = encoded;
        let (sparse, items) = (sparse.as_ref(), self.items);
        let (n_items, width) = (items.size()[0], states.size()[1]);
        let vectors = |rows: &Tensor| rows.narrow(1, 0, width);
        let (item_table, counts) = (scored.item_table, scored.counts);

        // Vectors and biases of the sampled items, `[M, D + 1]`, and of the targets, `[N, D + 1]`.
        let located = item_table.locate(items);
        let of_items = item_table.sum(located.mask(scored.vectors_and_bias(&located.rows)))?;
        let request = item_table.request(&targets.items, counts)?;
        let of_targets = request.fetch(|rows| scored.vectors_and_bias(rows))?;
        // Of the negatives, `[M + N, D + 1]` if targets are among them.
        let negatives = match self.in_batch {
            Some(_) => Tensor::cat(&[&of_items, &of_targets], 0),
            None => of_items,
        };

        let negative_logits = negatives.select(1, width).addmm(states, &vectors(&negatives).tr());
        let is_near = self.in_batch.map(|_| is_near(targets));
        let is_no_negative = self.is_no_negative(targets, sparse, is_near.as_ref());
        let negative_logits = negative_logits.masked_fill(&is_no_negative, f64::NEG_INFINITY);
        let mut target_logits =
            (states * vectors(&of_targets)).sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
                + of_targets.narrow(1, width, 1);
        let candidates = sparse.map(|sparse| {
            let is_target = sparse.is_target(&targets.items);
            let sum = |x: &Tensor| x.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
            let has_vector_score = 1.0 - sum(&is_target);
            target_logits =
                &target_logits * &has_vector_score + sum(&(&sparse.scores * &is_target));
            let is_no_negative = is_target.gt(0.0).logical_or(&sparse.items.eq(0));
            let logits = sparse.scores.masked_fill(&is_no_negative, f64::NEG_INFINITY);
            SparseNegatives { logits, is_target, has_vector_score }
        });
        let log_expected = self.log_expected(&targets.items, is_near.as_ref());
        let (loss, LogitGradients { by_target, by_negatives, by_sparse }) =
            self.loss.with_gradients(
                &target_logits,
                &negative_logits,
                candidates.as_ref().map(|candidates| &candidates.logits),
                log_expected.as_ref(),
                targets.weights.as_ref().map(|weights| weights.unsqueeze(1)).as_ref(),
            );
        let drawn = targets.uniform.as_ref().map(|uniform| {
            let mut logits = vec![&target_logits, &negative_logits];
            let negatives = match self.in_batch {
                Some(_) => Tensor::cat(&[items, &targets.items], 0),
                None => items.shallow_clone(),
            };
            let negatives = negatives.unsqueeze(0).expand_as(&negative_logits);
            let mut all_items = vec![targets.items.unsqueeze(1), negatives];
            if let (Some(candidates), Some(sparse)) = (&candidates, sparse) {
                logits.push(&candidates.logits);
                all_items.push(sparse.items.shallow_clone());
            }
            let column = draw(&Tensor::cat(&logits, 1).softmax(1, Kind::Float), uniform);
            Tensor::cat(&all_items, 1).gather(1, &column.unsqueeze(1), false).squeeze_dim(1)
        });

        // A column of ones makes the product with the states the gradient of the bias, too.
        let ones = states.new_ones([states.size()[0], 1], (states.kind(), states.device()));
        let with_one = Tensor::cat(&[states, &ones], 1);
        let by_items = by_negatives.narrow(1, 0, n_items);
        for of_items in item_table.sum_or_terms(by_items.tr().matmul(&with_one))? {
            scored.add_gradients(&located.rows, &located.mask(of_items));
            (scored.group_added)();
        }
        let by_vector = match &candidates {
            Some(candidates) => &by_target * &candidates.has_vector_score,
            None => by_target.shallow_clone(),
        };
        let mut gradients = &by_vector * &with_one;
        if self.in_batch.is_some() {
            let n_targets = targets.items.size()[0];
            gradients += by_negatives.narrow(1, n_items, n_targets).tr().matmul(&with_one);
        }
        request.scatter_gradients(item_table, &gradients, |rows, gradients| {
            scored.add_gradients(rows, gradients);
            (scored.group_added)();
        })?;
        let state_gradient =
            by_negatives.matmul(&vectors(&negatives)) + by_vector * vectors(&of_targets);
        let sparse_gradient = candidates
            .zip(by_sparse)
            .map(|(candidates, by_sparse)| by_sparse + candidates.is_target * by_target);
        Ok(CrossEntropy { loss, state_gradient, sparse_gradient, drawn })
    }

    /// Which sampled items, and which targets if they are negatives, are none of a target: bool
    /// `[N, M]` or `[N, M + N]`.
    fn is_no_negative(
        &self,
        targets: &Targets,
        sparse: Option<&SparseScores>,
        is_near: Option<&Tensor>,
    ) -> Tensor {
        let items = &targets.items;
        let equal = |of: &Tensor, to: &Tensor| of.unsqueeze(1).eq_tensor(&to.unsqueeze(0));
        let is_left_out = |others: &Tensor| match sparse {
            Some(sparse) => equal(items, others).logical_or(&has_sparse_score(sparse, others)),
            None => equal(items, others),
        };
        let of_items = is_left_out(self.items);
        match is_near {
            None => of_items,
            Some(is_near) => {
                let of_targets = is_left_out(items).logical_or(&is_near.logical_not());
                Tensor::cat(&[of_items, of_targets], 1)
            }
        }
    }

    /// Logarithms of the expected counts of the negatives, `[N, M + N]`: an item is sampled, or
    /// target of the micro-batch. `None` if targets are no negatives. `is_near`: see [`is_near`].
    fn log_expected(&self, items: &Tensor, is_near: Option<&Tensor>) -> Option<Tensor> {
        let InBatch { log_expected, log_share } = self.in_batch?;
        let negatives = Tensor::cat(&[self.items, items], 0);
        let of = |x: &Tensor| x.index_select(0, &negatives).unsqueeze(0);
        let n_each = is_near?.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
        Some((of(log_share) + n_each.log()).logaddexp(&of(log_expected)))
    }
}

/// Which targets are of the same micro-batch: bool `[N, N]`.
fn is_near(targets: &Targets) -> Tensor {
    let numbers = &targets.micro_batches;
    numbers.unsqueeze(1).eq_tensor(&numbers.unsqueeze(0))
}

/// Which of the sampled `items: [M]` have a sparse score for a target: bool `[N, M]`.
fn has_sparse_score(sparse: &SparseScores, items: &Tensor) -> Tensor {
    // Equal items share the place of the first among the sorted ones. Distinct items would be
    // fewer, and their number unknown to the host.
    let (sorted, _) = items.sort(0, false);
    let last = sorted.size()[0] - 1;
    let place_of = |x: &Tensor| {
        x.contiguous().searchsorted(&sorted, false, false, "left", None::<&Tensor>).clamp_max(last)
    };
    let place = place_of(&sparse.items);
    let found = sorted.index_select(0, &place.reshape([-1])).reshape_as(&place);
    let is_found = found.eq_tensor(&sparse.items).to_kind(Kind::Float);
    let n_found = Tensor::zeros([sparse.items.size()[0], last + 1], (Kind::Float, items.device()));
    n_found.scatter_add(1, &place, &is_found).gt(0.0).index_select(1, &place_of(items))
}

/// Items with sparse scores as negatives.
struct SparseNegatives {
    /// `[N, E]`; −∞ for the target and for padding.
    logits: Tensor,
    /// 1 where the item is the target: `[N, E]`.
    is_target: Tensor,
    /// 0 if the target is among them, else 1: `[N, 1]`.
    has_vector_score: Tensor,
}

/// Gradients of a loss by logits.
struct LogitGradients {
    /// `[N, 1]`.
    by_target: Tensor,
    /// `[N, M]`.
    by_negatives: Tensor,
    /// `[N, E]`.
    by_sparse: Option<Tensor>,
}

impl SampledLoss {
    /// The summed loss, f64, and its gradients by the logits of the target `[N, 1]`, of the
    /// sampled negatives `[N, M]` and of the items with sparse scores `[N, E]`, of which some are
    /// −∞. `log_expected`: of the negatives, if targets are among them. `weights: [N, 1]`: factors
    /// of the losses of the targets, if not 1.
    fn with_gradients(
        &self,
        target: &Tensor,
        negatives: &Tensor,
        sparse: Option<&Tensor>,
        log_expected: Option<&Tensor>,
        weights: Option<&Tensor>,
    ) -> (Tensor, LogitGradients) {
        let weighted = |x: Tensor| match weights {
            Some(weights) => x * weights,
            None => x,
        };
        let split = |gradients: &Tensor| {
            let n_negatives = negatives.size()[1];
            let rest = gradients.size()[1] - n_negatives;
            let of_sparse = sparse.map(|_| gradients.narrow(1, n_negatives, rest));
            (gradients.narrow(1, 0, n_negatives), of_sparse)
        };
        match self {
            // The logQ correction: a negative's logit is lowered by the logarithm of its expected
            // count, so that the sampled sum estimates the sum over the catalogue. An item with a
            // sparse score is always in the sum.
            SampledLoss::Softmax { log_expected: of_items, label_smoothing } => {
                let corrected = negatives - log_expected.unwrap_or(of_items);
                let logits: Vec<&Tensor> = [target, &corrected].into_iter().chain(sparse).collect();
                let logs = Tensor::cat(&logits, 1).log_softmax(1, Kind::Float);
                let of_target = weighted(logs.narrow(1, 0, 1));
                let mut loss = of_target.sum(Kind::Double) * -(1.0 - label_smoothing);
                let mut gradient = logs.exp();
                let _ = gradient.narrow(1, 0, 1).g_sub_scalar_(1.0 - label_smoothing);
                if *label_smoothing > 0.0 {
                    let is_there = logs.isfinite();
                    let n_there = is_there.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
                    let share = is_there.to_kind(Kind::Float) / n_there * *label_smoothing;
                    let logs = logs.masked_fill(&is_there.logical_not(), 0.0);
                    loss -= weighted(logs * &share).sum(Kind::Double);
                    gradient -= share;
                }
                let gradient = weighted(gradient);
                let (by_negatives, by_sparse) =
                    split(&gradient.narrow(1, 1, gradient.size()[1] - 1));
                let by_target = gradient.narrow(1, 0, 1);
                (loss, LogitGradients { by_target, by_negatives, by_sparse })
            }
            // With s the softmax of the negatives' logits r, and r_t that of the target, the loss
            // is −log A + λ B, where A = Σ s σ(r_t − r) and B = Σ s r².
            SampledLoss::BprMax { score_penalty } => {
                let all: Vec<&Tensor> = [negatives].into_iter().chain(sparse).collect();
                let logits = Tensor::cat(&all, 1);
                let s = logits.softmax(1, Kind::Float);
                let logits = logits.masked_fill(&logits.isfinite().logical_not(), 0.0);
                let sum = |x: &Tensor| x.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
                let above = (target - &logits).sigmoid();
                // A tiny A would have a gradient without bounds.
                let a = sum(&(&s * &above)) + 1e-24;
                let b = sum(&(&s * logits.square()));
                let loss = (&b * *score_penalty - a.log()).to_kind(Kind::Double);
                let loss = weighted(loss).sum(Kind::Double);
                let slope = &s * &above * (1.0 - &above) / &a;
                let by_target = weighted(-sum(&slope));
                let of_a = &s * (&above / &a - 1.0);
                let of_b = &s * (logits.square() - b + &logits * 2.0);
                let by_all = weighted(slope - of_a + of_b * *score_penalty);
                let (by_negatives, by_sparse) = split(&by_all);
                (loss, LogitGradients { by_target, by_negatives, by_sparse })
            }
            // All logits are raised by the logit of an item of average popularity, which leaves the
            // ranking as it is. Otherwise training would first have to lower all logits to it, with
            // gradients so large that Adagrad's step sizes are used up.
            SampledLoss::Binary { target_weight } => {
                let average = (target_weight / negatives.size()[1] as f64).ln();
                let all: Vec<&Tensor> = [negatives].into_iter().chain(sparse).collect();
                let (target, negatives) = (target + average, Tensor::cat(&all, 1) + average);
                let of_target = weighted(target.neg().softplus());
                let of_negatives = weighted(negatives.softplus());
                let loss =
                    of_target.sum(Kind::Double) * *target_weight + of_negatives.sum(Kind::Double);
                let (by_negatives, by_sparse) = split(&weighted(negatives.sigmoid()));
                let by_target = weighted((target.sigmoid() - 1.0) * *target_weight);
                (loss, LogitGradients { by_target, by_negatives, by_sparse })
            }
        }
    }
}
