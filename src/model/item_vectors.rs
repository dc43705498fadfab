//! The vectors of items, by which events are read and items are scored: the rows of the item table,
//! with vectors of attributes added and lengths normalised if the configuration says so.
//!
//! The composed vector `e` is not a parameter. Losses and lookups form the gradient by `e` in the
//! place of that of the item table. Once a step, after it was summed over the ranks, it becomes the
//! gradients of the parameters: for a given step these are linear in it.

use tch::{Device, Kind, Tensor};

use super::content::Content;
use super::network::{ITEM_BIAS, ITEM_TABLE};
use super::{Gradients, ItemTable, Parameters};
use crate::collective::CollectiveError;

/// Added to the squared length of a vector that is normalised: a vector of zeros stays one.
const EPSILON: f64 = 1e-6;

/// `x / √(|x|² + ε)` for each row: `[.., D]`.
pub(super) fn normalise(x: &Tensor) -> Tensor {
    x / lengths(x)
}

/// `[.., D]` → `[.., 1]`.
fn lengths(x: &Tensor) -> Tensor {
    (x.square().sum_dim_intlist([-1i64].as_slice(), true, Kind::Float) + EPSILON).sqrt()
}

/// How the vectors of items follow from the parameters.
#[derive(Default)]
pub(super) struct Composition {
    /// Attributes of the items.
    pub content: Option<Content>,
    /// Whether vectors have the length 1.
    pub is_normalised: bool,
    /// 0 for local rows of the item table that are not learnt, else 1: f32 `[V]`.
    pub is_learnt: Option<Tensor>,
}

/// The gradient by `x: [N, D]` from that by [`normalise`] of it.
fn through_normalise(gradient: &Tensor, x: &Tensor) -> Tensor {
    let (lengths, unit) = (lengths(x), normalise(x));
    let along = (gradient * &unit).sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
    (gradient - unit * along) / lengths
}

/// The vectors of items, in a step of training or outside.
#[derive(Clone, Copy)]
pub struct ItemVectors<'n> {
    pub(super) parameters: &'n Parameters,
    composition: &'n Composition,
    /// Item of the first local row.
    first_item: i64,
    /// Seed of the step, i64 `[]`; outside training `None`.
    step_seed: Option<&'n Tensor>,
}

impl<'n> ItemVectors<'n> {
    /// `step_seed`: of the step of training, if any, i64 `[]`.
    pub(super) fn new(
        parameters: &'n Parameters,
        composition: &'n Composition,
        item_table: &ItemTable<'_>,
        step_seed: Option<&'n Tensor>,
    ) -> Self {
        Self { parameters, composition, first_item: item_table.rows.start, step_seed }
    }

    /// Whether vectors are the rows of the item table.
    pub(super) fn are_rows(&self) -> bool {
        self.composition.content.is_none() && !self.composition.is_normalised
    }

    /// Vectors of local rows `[N]`: `[N, D]`.
    pub(super) fn vectors(&self, rows: &Tensor) -> Tensor {
        let of_ids = self.parameters.leaf(ITEM_TABLE).detach().index_select(0, rows);
        if self.are_rows() {
            return of_ids;
        }
        let width = of_ids.size()[1];
        self.compose(rows, &of_ids.constant_pad_nd([0, 1])).narrow(1, 0, width)
    }

    /// Vectors and biases of local rows `[N]`, given those of their ids: `[N, D + 1]`.
    pub(super) fn compose(&self, rows: &Tensor, of_ids: &Tensor) -> Tensor {
        let sum = self.sum(rows, of_ids);
        if !self.composition.is_normalised {
            return sum;
        }
        let width = sum.size()[1] - 1;
        Tensor::cat(&[normalise(&sum.narrow(1, 0, width)), sum.narrow(1, width, 1)], 1)
    }

    /// [`ItemVectors::compose`] before the lengths are normalised.
    fn sum(&self, rows: &Tensor, of_ids: &Tensor) -> Tensor {
        match &self.composition.content {
            Some(content) => {
                let items = rows + self.first_item;
                content.add_to(self.parameters, &items, of_ids, self.step_seed)
            }
            None => of_ids.shallow_clone(),
        }
    }

    /// Vectors `[n, D]` and biases `[n]` of consecutive local rows from `first` on, given those of
    /// their ids.
    pub(super) fn of_range(&self, first: i64, of_ids: Tensor, bias: Tensor) -> (Tensor, Tensor) {
        if self.are_rows() {
            return (of_ids, bias);
        }
        let (n, width) = of_ids.size2().expect("item vectors are [n, D]");
        let rows = Tensor::arange_start(first, first + n, (Kind::Int64, of_ids.device()));
        let whole = self.compose(&rows, &Tensor::cat(&[of_ids, bias.unsqueeze(1)], 1));
        (whole.narrow(1, 0, width).contiguous(), whole.select(1, width).contiguous())
    }

    /// *All ranks*, if the item table is sharded. Turns the gradients by the vectors, which are
    /// complete, into those of the parameters.
    ///
    /// # Errors
    /// A collective call fails.
    pub(super) fn finish_gradients(
        &self,
        gradients: &mut Gradients,
        item_table: &ItemTable<'_>,
    ) -> Result<(), CollectiveError> {
        let Composition { content, is_normalised, is_learnt } = self.composition;
        if self.are_rows() && is_learnt.is_none() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let (mut of_vectors, mut of_bias) = (gradients.of(ITEM_TABLE), gradients.of(ITEM_BIAS));
        let rows = if of_vectors.device() == Device::Cpu {
            let norms = of_vectors.norm_scalaropt_dim(2.0, [1i64].as_slice(), false);
            // A NaN is not zero, so that it is passed on.
            (norms + of_bias.abs()).nonzero().squeeze_dim(1)
        } else {
            // All rows: the host does not wait to learn which have a gradient.
            Tensor::arange(of_bias.size()[0], (Kind::Int64, of_bias.device()))
        };
        let items = &rows + self.first_item;
        let mut by_vectors = of_vectors.index_select(0, &rows);
        let mut by_bias = of_bias.index_select(0, &rows);
        if *is_normalised {
            let row = |index: usize| self.parameters.leaf(index).detach().index_select(0, &rows);
            let of_ids = Tensor::cat(&[row(ITEM_TABLE), row(ITEM_BIAS).unsqueeze(1)], 1);
            let sums = self.sum(&rows, &of_ids);
            let sums = sums.narrow(1, 0, by_vectors.size()[1]);
            by_vectors = through_normalise(&by_vectors, &sums);
        }
        if let Some(content) = content {
            let both = Tensor::cat(&[&by_vectors, &by_bias.unsqueeze(1)], 1);
            content.add_gradients(gradients, item_table, &items, &both)?;
            if let Some(keeps_id) = self.step_seed.and_then(|seed| content.keeps_id(&items, seed)) {
                by_vectors *= keeps_id.unsqueeze(1);
                by_bias *= keeps_id;
            }
        }
        if let Some(is_learnt) = is_learnt {
            by_vectors *= is_learnt.index_select(0, &rows).unsqueeze(1);
        }
        let _ = of_vectors.index_copy_(0, &rows, &by_vectors);
        let _ = of_bias.index_copy_(0, &rows, &by_bias);
        Ok(())
    }
}
