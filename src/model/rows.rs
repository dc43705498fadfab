//! Rows of matrices, by number.
//!
//! On the CPU libtorch adds rows up with `index_add_`, which is also the gradient of `index_select`, one by one, each an
//! operation of its own. `scatter_add_`, which is also the gradient of `gather`, does so in one.

use tch::Tensor;

/// Adds rows `of: [N, ..]` to the rows `to: [N]` of `table: [V, ..]`, of which some may be the same.
pub(super) fn add_rows(table: &mut Tensor, to: &Tensor, of: &Tensor) {
    let to = match of.dim() {
        1 => to.shallow_clone(),
        _ => to.unsqueeze(1).expand_as(of),
    };
    let _ = table.scatter_add_(0, &to, of);
}

/// The rows `at: [N]` of `of: [M, D, ..]`, of which some may be the same: `[N, D, ..]`. For what is learnt through.
pub(super) fn take_rows(of: &Tensor, at: &Tensor) -> Tensor {
    let rows = of.flatten(1, -1);
    let taken = rows.gather(0, &at.unsqueeze(1).expand([-1, rows.size()[1]], false), false);
    taken.view([&[-1], &of.size()[1..]].concat().as_slice())
}
