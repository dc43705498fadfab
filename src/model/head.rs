//! The softmax over the catalogue and its gradients, some targets at a time.
//!
//! With states `h: [N, D]`, item table `E: [V, D]` and bias `b: [V]`, logits are `z = h Eᵀ + b` and the loss is
//! the sum over targets of `logsumexp(z) − z[target]`. Its gradients are known in closed form: with
//! `p = softmax(z) − onehot(target)`, they are `p E` for the states, `pᵀ h` for the table and the column sums of
//! `p` for the bias. Computing them right where `z` is at hand needs one `[n, V]` buffer for a few rows `n`
//! instead of about four for all `N` that autograd keeps, and no second pass (the idea of Liger and of "Cut Your
//! Losses", Wijmans et al. 2024). Autograd then goes on below from `(h · ∂h).sum()`, whose gradient is ∂h.

use tch::{Kind, Tensor};

/// What one call of [`cross_entropy`] gives besides the gradients it adds in place.
pub struct CrossEntropy {
    /// Summed over the targets, scalar f64.
    pub loss: Tensor,
    /// Its gradient by the states, `[N, D]`.
    pub state_gradient: Tensor,
}

/// Summed cross entropy of `targets: [N]` under `states: [N, D]`, with the gradients of the item table `[V, D]`
/// and the bias `[V]` added to `table_gradient` and `bias_gradient`. At most `max_logits` logits are held at once
/// (but always those of one target).
pub fn cross_entropy(
    states: &Tensor,
    targets: &Tensor,
    (table, bias): (&Tensor, &Tensor),
    (table_gradient, bias_gradient): (&mut Tensor, &mut Tensor),
    max_logits: i64,
) -> CrossEntropy {
    let (n_targets, n_items) = (states.size()[0], table.size()[0]);
    let rows = (max_logits / n_items).clamp(1, n_targets.max(1));
    let mut loss = Tensor::zeros([], (Kind::Double, states.device()));
    let mut state_gradients = Vec::new();
    for first in (0..n_targets).step_by(rows as usize) {
        let n = rows.min(n_targets - first);
        let (h, target) = (states.narrow(0, first, n), targets.narrow(0, first, n).unsqueeze(1));
        let mut p = bias.addmm(&h, &table.tr());
        let max = p.amax([1i64].as_slice(), true);
        let _ = p.subtract_(&max);
        let target_logits = p.gather(1, &target, false);
        let _ = p.exp_();
        let sum = p.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
        loss += (sum.log() - target_logits).sum(Kind::Double);
        let _ = p.divide_(&sum);
        let minus_one = Tensor::full([n, 1], -1.0, (p.kind(), p.device()));
        let _ = p.scatter_add_(1, &target, &minus_one);
        state_gradients.push(p.matmul(table));
        let _ = table_gradient.addmm_(&p.tr(), &h);
        *bias_gradient += p.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
    }
    let state_gradient =
        if state_gradients.is_empty() { states.zeros_like() } else { Tensor::cat(&state_gradients, 0) };
    CrossEntropy { loss, state_gradient }
}
