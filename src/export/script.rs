//! The TorchScript module of a trained network, from padded sessions to recommendations.
//!
//! The network itself is traced, so that serving runs the same program as training. The code around
//! it reads no sizes of the batch either, so that any number of sessions of any length up to the
//! limit can be served.

use std::path::Path;

use bireme_kernels::torchscript::trace;
use tch::{Device, Kind, Tensor};

use crate::data::FIRST_ITEM;
use crate::etl::serving::{HIDDEN, LENGTH, ModelColumn, PLACES};
use crate::model::Network;

/// Scores of all items: FP32 `[B, V]`.
pub const OUTPUT: &str = "output";
/// Product ids, the best first: INT64 `[B, K]`. Beyond the first [`N_ITEMS`] they are −1.
pub const ITEM_IDS: &str = "item_ids";
/// The scores of [`ITEM_IDS`]: FP32 `[B, K]`. Beyond the first [`N_ITEMS`] they are the lowest
/// float.
pub const ITEM_SCORES: &str = "item_scores";
/// The number of items recommended to each session: INT32 `[B, 1]`.
pub const N_ITEMS: &str = "n_items";
/// Whether the most popular items are recommended, because no item of the session is known: BOOL
/// `[B, 1]`.
pub const FALLBACK: &str = "fallback";

/// The parts of a module.
pub struct Script<'a> {
    /// With its tables in the exported type.
    pub network: &'a Network<'a>,
    /// The columns that the network reads, in its order, the items first.
    pub columns: &'a [ModelColumn],
    /// Rows of each column's table; `None` for a column of values.
    pub cardinalities: &'a [Option<i64>],
    /// The most events of a session that are read.
    pub max_length: i64,
    /// The most recommendations per session.
    pub max_top_k: i64,
    /// Product id of each item, −1 for padding and unknown: `[V]`.
    pub product_ids: &'a [i64],
    /// Occurrences of each item in training: `[V]`.
    pub occurrences: &'a [i64],
}

/// The score beyond the last recommendation. JSON has no infinity.
const LOWEST: f64 = f32::MIN as f64;

impl Script<'_> {
    /// Writes the module. Inputs: the columns `[B, L]`, [`LENGTH`], [`HIDDEN`], [`PLACES`] as
    /// [`crate::etl::serving`] gives them; outputs: [`OUTPUT`], [`ITEM_IDS`], [`ITEM_SCORES`],
    /// [`FALLBACK`], [`N_ITEMS`].
    ///
    /// # Errors
    /// An error of libtorch.
    pub fn save(&self, path: &Path) -> Result<(), String> {
        let popularity = self.popularity();
        let product_ids = Tensor::from_slice(self.product_ids);
        let ranking = Ranking::new(self.product_ids.len() as i64, self.max_top_k);
        // An arbitrary example: two sessions of three events, the second of an unknown item.
        let ints = |values: &[i64]| Tensor::from_slice(values).view([2, -1]);
        let example = |column: &ModelColumn| {
            if column.is_categorical {
                ints(&[2, 2, 2, 1, 0, 0])
            } else {
                Tensor::zeros([2, 3], (Kind::Float, Device::Cpu))
            }
        };
        let mut inputs: Vec<(&str, Tensor)> =
            self.columns.iter().map(|column| (column.input.as_str(), example(column))).collect();
        inputs.push((LENGTH, ints(&[3, 1])));
        inputs.push((HIDDEN, ints(&[0, 2, 0, 0])));
        inputs.push((PLACES, ints(&[0, 0])));
        tch::no_grad(|| {
            trace(path, &inputs, |inputs| {
                let (columns, [length, hidden, places]) = inputs.split_at(self.columns.len())
                else {
                    unreachable!("three inputs follow the columns")
                };
                let columns: Vec<Tensor> = columns
                    .iter()
                    .zip(self.cardinalities)
                    .map(|(column, n)| self.fit(column, *n))
                    .collect();
                let lengths = length.reshape([-1]).clamp(1, self.max_length);
                let scores = self.network.next_scores(&columns, &lengths, self.max_length);
                let fallback = columns[0].lt(FIRST_ITEM).all_dim(1, false);
                let _ = set_rows(&scores, &fallback, &popularity);
                let Ranked { items, scores: item_scores, is_valid } =
                    ranking.best(&scores, hidden, places);
                let ids = product_ids.index_select(0, &items.reshape([-1])).reshape_as(&items);
                let is_padding = is_valid.logical_not();
                let ids = ids.masked_fill(&is_padding, -1);
                let item_scores = item_scores.masked_fill(&is_padding, LOWEST);
                let n_items = is_valid.sum_dim_intlist([1i64].as_slice(), true, Kind::Int);
                vec![scores, ids, item_scores, fallback.unsqueeze(1), n_items]
            })
        })
    }

    /// Pads or cuts a column to the network's length. Codes without an embedding become the nearest
    /// code that has one.
    fn fit(&self, column: &Tensor, cardinality: Option<i64>) -> Tensor {
        let column = column.constant_pad_nd([0, self.max_length]).narrow(1, 0, self.max_length);
        cardinality.map_or(column.shallow_clone(), |n| column.clamp(0, n - 1))
    }

    /// Scores of all items by their occurrences, `[V]`: ln of (n + 1), divided by its sum.
    fn popularity(&self) -> Tensor {
        let counts = Tensor::from_slice(self.occurrences).to_kind(Kind::Double) + 1.0;
        (&counts / counts.sum(Kind::Double)).log().to_kind(Kind::Float)
    }
}

/// Puts `row: [V]` into those rows of `x: [B, V]` that are chosen (bool `[B]`).
fn set_rows(x: &Tensor, chosen: &Tensor, row: &Tensor) -> Tensor {
    let places = chosen.nonzero().squeeze_dim(1);
    let rows = row.unsqueeze(0).index_select(0, &places.zeros_like());
    x.shallow_clone().index_copy_(0, &places, &rows)
}

/// The first items of each session's ranking: `[B, K]`.
struct Ranked {
    items: Tensor,
    scores: Tensor,
    /// Whether the item may be recommended. Valid items come first.
    is_valid: Tensor,
}

/// Finds the best of many scores. The best `k` items are in the `k` blocks with the highest maxima,
/// so that only these blocks need sorting: one pass over memory finds the maxima.
struct Ranking {
    n_items: i64,
    /// Items per block; 1: all items are sorted.
    block: i64,
}

impl Ranking {
    /// For up to `k` items.
    fn new(n_items: i64, k: i64) -> Self {
        let best = (n_items as f64 / k as f64).sqrt().log2().round().exp2() as i64;
        // With fewer blocks than `k`, all of them would be sorted.
        let block = if best >= 8 && n_items / best > k { best } else { 1 };
        Self { n_items, block }
    }

    /// The first K items of each session's ranking by `scores: [B, V]` and `places: [B, K]`. Items
    /// in `hidden: [B, H]`, padding and unknown come last and are not valid.
    fn best(&self, scores: &Tensor, hidden: &Tensor, places: &Tensor) -> Ranked {
        let first = hidden.narrow(1, 0, 1).zeros_like();
        let hidden = Tensor::cat(&[&hidden.clamp(0, self.n_items - 1), &first, &(&first + 1)], 1);
        // Hide in place and restore, because copying the scores would take longer than all the
        // rest.
        let kept = scores.gather(1, &hidden, false);
        let _ = scores.shallow_clone().scatter_value_(1, &hidden, f64::NEG_INFINITY);
        let (values, items) = self.top(scores, places.size()[1]);
        let _ = scores.shallow_clone().scatter_(1, &hidden, &kept);
        // Validity follows from membership in `hidden`, because a valid score may be −∞ too. The
        // added last element keeps `place` in range.
        let (sorted, _) = Tensor::cat(&[&hidden, &(&first + self.n_items)], 1).sort(1, false);
        let place = items.searchsorted(&sorted, false, false, "left", None::<&Tensor>);
        let is_valid = sorted.gather(1, &place, false).ne_tensor(&items);
        // Valid items come first even where their score is −∞.
        let order = is_valid.logical_not().to_kind(Kind::Int).argsort_stable(true, 1, false);
        Ranked {
            items: items.gather(1, &order, false),
            scores: values.gather(1, &order, false),
            is_valid: is_valid.gather(1, &order, false),
        }
    }

    fn top(&self, scores: &Tensor, k: i64) -> (Tensor, Tensor) {
        if self.block == 1 {
            return scores.topk(k, 1, true, true);
        }
        let n_blocks = self.n_items / self.block;
        let whole = n_blocks * self.block;
        let maxima = scores
            .narrow(1, 0, whole)
            .view([-1, n_blocks, self.block])
            .amax([2i64].as_slice(), false);
        let (_, blocks) = maxima.topk(k, 1, true, false);
        let inside = Tensor::arange(self.block, (Kind::Int64, Device::Cpu));
        let mut items = (blocks.unsqueeze(2) * self.block + inside).flatten(1, 2);
        if whole < self.n_items {
            let rest = Tensor::arange_start(whole, self.n_items, (Kind::Int64, Device::Cpu));
            let rest = rest.unsqueeze(0) + blocks.narrow(1, 0, 1).zeros_like();
            items = Tensor::cat(&[items, rest], 1);
        }
        let (values, places) = scores.gather(1, &items, false).topk(k, 1, true, true);
        (values, items.gather(1, &places, false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ints(rows: &[&[i64]]) -> Tensor {
        Tensor::from_slice2(rows)
    }

    #[test]
    fn what_is_hidden_is_never_valid_whatever_the_scores_are() {
        let (low, none) = (f32::MIN, f32::NEG_INFINITY);
        // Items 0 and 1 are padding and unknown.
        let scores = Tensor::from_slice2(&[[9.0, 8.0, 1.0, 3.0, 2.0], [0.0, 0.0, low, none, none]]);
        let before = scores.copy();
        let hidden = ints(&[&[3, 0, 0], &[2, 0, 0]]);
        let Ranked { items, is_valid, .. } =
            Ranking::new(5, 5).best(&scores, &hidden, &ints(&[&[0, 1, 2, 3, 4], &[0, 1, 2, 3, 4]]));
        let n_valid: Vec<i64> =
            is_valid.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64).try_into().unwrap();
        assert_eq!(n_valid, [2, 2]);
        let valid = |row: i64| Vec::<i64>::try_from(items.get(row).narrow(0, 0, 2)).unwrap();
        assert_eq!(valid(0), [4, 2]);
        let mut second = valid(1);
        second.sort_unstable();
        assert_eq!(second, [3, 4]);
        assert!(scores == before, "scores are as they were");
    }
}
