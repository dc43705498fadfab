//! Scatter and gather of matrix rows.
//!
//! On a CPU, libtorch's `index_add_` (also the gradient of `index_select`) adds one row per
//! operation. `scatter_add_` (also the gradient of `gather`) adds all rows in one operation.

use bireme_kernels::fixed_point::{from_fixed_point, to_fixed_point};
use tch::{Kind, Tensor};

/// Adds `values: [N, ..]` to the rows `indices: [N]` of `table: [V, ..]`; indices may repeat. If
/// `reproducible`, the sum of a row does not depend on the other rows.
pub(super) fn add_rows(table: &mut Tensor, indices: &Tensor, values: &Tensor, reproducible: bool) {
    if !reproducible || !table.device().is_cuda() {
        let _ = table.scatter_add_(0, &expand_indices(indices, values), values);
        return;
    }
    // A GPU adds equal indices in groups whose boundaries depend on all rows, and f32 sums depend
    // on the grouping. Sums of fixed-point numbers do not.
    let (rows, row_of_value, _) = indices.internal_unique2(true, true, false);
    let size = [&[rows.size()[0]], &values.size()[1..]].concat();
    let sums = Tensor::zeros(size, (Kind::Int64, values.device())).scatter_add_(
        0,
        &expand_indices(&row_of_value, values),
        &to_fixed_point(values),
    );
    let _ = table.scatter_add_(0, &expand_indices(&rows, &sums), &from_fixed_point(&sums));
}

/// As [`add_rows`], with bitwise equal results on all ranks that add the same rows in the same
/// order. `scatter_add_` on a GPU adds in any order.
pub(super) fn add_rows_deterministically(table: &mut Tensor, indices: &Tensor, values: &Tensor) {
    if table.device().is_cuda() {
        // This operation sorts the indices first, so that its order of addition is fixed.
        let _ = table.index_put_(&[Some(indices)], values, true);
    } else {
        add_rows(table, indices, values, false);
    }
}

/// Row indices `[N]`, expanded to the shape of `values: [N, ..]`.
fn expand_indices(indices: &Tensor, values: &Tensor) -> Tensor {
    if values.dim() == 1 { indices.shallow_clone() } else { indices.unsqueeze(1).expand_as(values) }
}

/// The rows `indices: [N]` of `table: [M, D, ..]`: `[N, D, ..]`; indices may repeat. Its gradient
/// is a `scatter_add_`.
pub(super) fn take_rows(table: &Tensor, indices: &Tensor) -> Tensor {
    let rows = table.flatten(1, -1);
    let taken = rows.gather(0, &indices.unsqueeze(1).expand([-1, rows.size()[1]], false), false);
    taken.view([&[-1], &table.size()[1..]].concat().as_slice())
}
