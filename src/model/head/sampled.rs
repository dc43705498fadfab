//! The loss over the target and sampled negatives.

use tch::{Kind, Tensor};

use super::{CrossEntropy, SampledLoss, ScoringTable, draw};
use crate::collective::CollectiveError;

/// *All ranks*, if the table is sharded. See [`super::cross_entropy`]. All ranks have sampled the
/// same `items: [M]`; those that equal a target are not negatives of it.
pub(super) fn sampled(
    states: &Tensor,
    targets: &Tensor,
    scored: &mut ScoringTable<'_>,
    items: &Tensor,
    loss: &SampledLoss,
    uniform: Option<&Tensor>,
) -> Result<CrossEntropy, CollectiveError> {
    let width = states.size()[1];
    let vectors = |rows: &Tensor| rows.narrow(1, 0, width);
    let (item_table, counts) = (scored.item_table, scored.counts);

    // Vectors and biases of the negatives, `[M, D + 1]`, and of the targets, `[N, D + 1]`.
    let located = item_table.locate(items);
    let negatives = item_table.sum(located.mask(scored.vectors_and_bias(&located.rows)))?;
    let request = item_table.request(targets, counts)?;
    let positives = request.fetch(|rows| scored.vectors_and_bias(rows))?;

    let negative_logits = negatives.select(1, width).addmm(states, &vectors(&negatives).tr());
    let is_target = targets.unsqueeze(1).eq_tensor(&items.unsqueeze(0));
    let negative_logits = negative_logits.masked_fill(&is_target, f64::NEG_INFINITY);
    let target_logits =
        (states * vectors(&positives)).sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
            + positives.narrow(1, width, 1);
    let (loss, [by_target, by_negatives]) = loss.with_gradients(&target_logits, &negative_logits);
    let drawn = uniform.map(|uniform| {
        let logits = Tensor::cat(&[target_logits, negative_logits], 1);
        let column = draw(&logits.softmax(1, Kind::Float), uniform);
        let negative = items.index_select(0, &(&column - 1).clamp_min(0));
        negative.where_self(&column.gt(0), targets)
    });

    // A column of ones makes the product with the states the gradient of the bias, too.
    let ones = states.new_ones([states.size()[0], 1], (states.kind(), states.device()));
    let with_one = Tensor::cat(&[states, &ones], 1);
    for of_negatives in item_table.sum_or_terms(by_negatives.tr().matmul(&with_one))? {
        scored.add_gradients(&located.rows, &located.mask(of_negatives));
        (scored.group_added)();
    }
    request.scatter_gradients(item_table, &(&by_target * with_one), |rows, gradients| {
        scored.add_gradients(rows, gradients);
        (scored.group_added)();
    })?;
    let state_gradient =
        by_negatives.matmul(&vectors(&negatives)) + by_target * vectors(&positives);
    Ok(CrossEntropy { loss, state_gradient, drawn })
}

impl SampledLoss {
    /// The summed loss, f64, and its gradients by the logits of the target `[N, 1]` and of the
    /// negatives `[N, M]`, some of which are −∞.
    fn with_gradients(&self, target: &Tensor, negatives: &Tensor) -> (Tensor, [Tensor; 2]) {
        match self {
            // The logQ correction: a negative's logit is lowered by the logarithm of its expected
            // count, so that the sampled sum estimates the sum over the catalogue.
            SampledLoss::Softmax { log_expected } => {
                let p = Tensor::cat(&[target, &(negatives - log_expected)], 1)
                    .log_softmax(1, Kind::Float);
                let loss = -p.narrow(1, 0, 1).sum(Kind::Double);
                let p = p.exp();
                (loss, [p.narrow(1, 0, 1) - 1.0, p.narrow(1, 1, negatives.size()[1])])
            }
            // All logits are raised by the logit of an item of average popularity, which leaves the
            // ranking as it is. Otherwise training would first have to lower all logits to it, with
            // gradients so large that Adagrad's step sizes are used up.
            SampledLoss::Binary { target_weight } => {
                let average = (target_weight / negatives.size()[1] as f64).ln();
                let (target, negatives) = (target + average, negatives + average);
                let of_target = target.neg().softplus().sum(Kind::Double) * *target_weight;
                let loss = of_target + negatives.softplus().sum(Kind::Double);
                (loss, [(target.sigmoid() - 1.0) * *target_weight, negatives.sigmoid()])
            }
        }
    }
}
