//! Rows of matrices, by number.
//!
//! On the CPU libtorch adds rows up with `index_add_`, which is also the gradient of `index_select`, one by one, each an
//! operation of its own. `scatter_add_`, which is also the gradient of `gather`, does so in one.

use tch::{Kind, Tensor};

use crate::collective::exact::{from_multiples, multiples};

/// Adds rows `of: [N, ..]` to the rows `to: [N]` of `table: [V, ..]`, of which some may be the same. Exactly: what others
/// there are does not matter.
pub(super) fn add_rows(table: &mut Tensor, to: &Tensor, of: &Tensor, exactly: bool) {
    if !exactly || !table.device().is_cuda() {
        let _ = table.scatter_add_(0, &across(to, of), of);
        return;
    }
    // A GPU adds what is alike in groups, and how these are cut depends on all rows.
    let (rows, number, _) = to.internal_unique2(true, true, false);
    let size = [&[rows.size()[0]], &of.size()[1..]].concat();
    let sums =
        Tensor::zeros(size, (Kind::Int64, of.device())).scatter_add_(0, &across(&number, of), &multiples(of));
    let _ = table.scatter_add_(0, &across(&rows, &sums), &from_multiples(&sums));
}

/// The same, and to the last bit so on all ranks that add the same rows: a GPU adds in any order otherwise.
pub(super) fn add_rows_alike(table: &mut Tensor, to: &Tensor, of: &Tensor) {
    if table.device().is_cuda() {
        // Sorts.
        let _ = table.index_put_(&[Some(to)], of, true);
    } else {
        add_rows(table, to, of, false);
    }
}

/// Numbers of rows, one for each number of rows `of: [N, ..]`.
fn across(rows: &Tensor, of: &Tensor) -> Tensor {
    match of.dim() {
        1 => rows.shallow_clone(),
        _ => rows.unsqueeze(1).expand_as(of),
    }
}

/// The rows `at: [N]` of `of: [M, D, ..]`, of which some may be the same: `[N, D, ..]`. For what is learnt through.
pub(super) fn take_rows(of: &Tensor, at: &Tensor) -> Tensor {
    let rows = of.flatten(1, -1);
    let taken = rows.gather(0, &at.unsqueeze(1).expand([-1, rows.size()[1]], false), false);
    taken.view([&[-1], &of.size()[1..]].concat().as_slice())
}
