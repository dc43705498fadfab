//! The cross entropy over the target and a few drawn items.

use tch::{Kind, Tensor};

use super::{CrossEntropy, Scored, add_rows, draw};

/// `z` of a drawn item is lowered by the logarithm of how often it was expected, so that its share of the sum stands for
/// all that it was drawn from; drawn items that are the target itself are left out.
pub(super) fn sampled(
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
    add_rows(table_gradient, items, &p_rivals.tr().matmul(h));
    add_rows(table_gradient, targets, &(&p_target * h));
    add_rows(bias_gradient, items, &p_rivals.sum_dim_intlist([0i64].as_slice(), false, Kind::Float));
    add_rows(bias_gradient, targets, &p_target.squeeze_dim(1));
    CrossEntropy { loss, state_gradient: p_rivals.matmul(&rivals) + p_target * wanted, drawn }
}
