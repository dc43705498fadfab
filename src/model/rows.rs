//! Scatter and gather of matrix rows.
//!
//! On a CPU, libtorch's `index_add_` (also the gradient of `index_select`) adds one row per
//! operation. `scatter_add_` (also the gradient of `gather`) adds all rows in one operation.

use bireme_kernels::cuda;
use tch::Tensor;

/// Adds `values: [N, ..]` to the rows `indices: [N]` of `table: [V, ..]`; indices may repeat. If
/// `reproducible`, the sum of a row does not depend on the other rows.
pub(super) fn add_rows(table: &mut Tensor, indices: &Tensor, values: &Tensor, reproducible: bool) {
    if !reproducible || !table.device().is_cuda() {
        let _ = table.scatter_add_(0, &expand_indices(indices, values), values);
        return;
    }
    // `scatter_add_` on a GPU adds equal indices in any order.
    let rows = cuda::summed_by_row(indices, values);
    let added = rows.and_then(|rows| cuda::add_rows(table, &rows));
    added.unwrap_or_else(|problem| panic!("{problem}"));
}

/// As [`add_rows`], with bitwise equal results on all ranks that add the same rows in the same
/// order.
pub(super) fn add_rows_deterministically(table: &mut Tensor, indices: &Tensor, values: &Tensor) {
    add_rows(table, indices, values, true);
}

/// Rows `[n, ..]` of several tensors behind each other, without a copy if there is one.
pub(super) fn joined(mut parts: Vec<Tensor>) -> Tensor {
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0) }
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
