//! The loss over the target and a few drawn items.

use tch::{Kind, Tensor};

use super::{Contest, CrossEntropy, Scored, draw};
use crate::collective::{CollectiveError, Reduce};
use crate::model::share::if_here;

/// Drawn items that are the target itself are left out. Rows that other ranks hold come from there, and their gradients go
/// back.
pub(super) fn sampled(
    h: &Tensor,
    targets: &Tensor,
    scored: &mut Scored<'_>,
    (items, contest): (&Tensor, &Contest),
    uniform: Option<&Tensor>,
) -> Result<CrossEntropy, CollectiveError> {
    let width = h.size()[1];
    let vectors = |rows: &Tensor| rows.narrow(1, 0, width);
    let (share, counts) = (scored.share, scored.counts);
    let over_ranks = |mut rows: Tensor| match share.company() {
        Some(company) => company.all_reduce(&mut rows, Reduce::Sum).map(|()| rows),
        None => Ok(rows),
    };
    // All ranks have drawn the same rivals.
    let (places, here) = share.places(items);
    let rivals = over_ranks(if_here(scored.rows(&places), here.as_ref()))?;
    let asked = share.ask(targets, counts)?;
    let wanted = asked.fetch(|places| scored.rows(places))?;
    let rival_logits = rivals.select(1, width).addmm(h, &vectors(&rivals).tr());
    let itself = targets.unsqueeze(1).eq_tensor(&items.unsqueeze(0));
    let rival_logits = rival_logits.masked_fill(&itself, f64::NEG_INFINITY);
    let target_logits = (h * vectors(&wanted)).sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
        + wanted.narrow(1, width, 1);
    let (loss, [by_target, by_rivals]) = contest.judge(&target_logits, &rival_logits);
    let drawn = uniform.map(|uniform| {
        let logits = Tensor::cat(&[target_logits, rival_logits], 1);
        let place = draw(&logits.softmax(1, Kind::Float), uniform);
        let rival = items.index_select(0, &(&place - 1).clamp_min(0));
        rival.where_self(&place.gt(0), targets)
    });
    let with_one = Tensor::cat(&[h, &h.new_ones([h.size()[0], 1], (h.kind(), h.device()))], 1);
    let of_rivals = by_rivals.tr().matmul(&with_one);
    let of_rivals = match share.company().filter(|_| share.is_exact()) {
        Some(company) => company.of_each_rank(&of_rivals)?.unbind(0),
        None => vec![over_ranks(of_rivals)?],
    };
    for of_rivals in of_rivals {
        scored.add(&places, &if_here(of_rivals, here.as_ref()));
        (scored.settle)();
    }
    asked.give_back(share, &(&by_target * with_one), |places, all| {
        scored.add(places, all);
        (scored.settle)();
    })?;
    let state_gradient = by_rivals.matmul(&vectors(&rivals)) + by_target * vectors(&wanted);
    Ok(CrossEntropy { loss, state_gradient, drawn })
}

impl Contest {
    /// The summed loss, f64, and its gradients by the target's logits `[N, 1]` and by the rivals' `[N, M]`, of which some
    /// are −∞.
    fn judge(&self, target: &Tensor, rivals: &Tensor) -> (Tensor, [Tensor; 2]) {
        match self {
            // A rival's logit is lowered by the logarithm of how often it was expected, so that its share of the sum stands
            // for all that it was drawn from.
            Contest::Softmax { log_expected } => {
                let p = Tensor::cat(&[target, &(rivals - log_expected)], 1).log_softmax(1, Kind::Float);
                let loss = -p.narrow(1, 0, 1).sum(Kind::Double);
                let p = p.exp();
                (loss, [p.narrow(1, 0, 1) - 1.0, p.narrow(1, 1, rivals.size()[1])])
            }
            // Scores are compared as if each were higher by what an item of average popularity comes to, which costs nothing,
            // as only their differences rank. All items would have to fall there first otherwise, by gradients so large that
            // Adagrad has no steps left for anything else.
            Contest::Binary { target_weight } => {
                let average = (target_weight / rivals.size()[1] as f64).ln();
                let (target, rivals) = (target + average, rivals + average);
                let of_target = target.neg().softplus().sum(Kind::Double) * *target_weight;
                let loss = of_target + rivals.softplus().sum(Kind::Double);
                (loss, [(target.sigmoid() - 1.0) * *target_weight, rivals.sigmoid()])
            }
        }
    }
}
