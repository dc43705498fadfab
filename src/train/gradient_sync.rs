//! Sums gradients and step scalars over the ranks.

use std::ops::Range;

use bireme_kernels::fixed_point::FixedPointSum;
use tch::{Kind, Tensor};

use crate::collective::{Collective, CollectiveError, Reduce, communicate_as};
use crate::config::Reduction;
use crate::model::{GradientHooks, Gradients, ItemTable, LossSum, Network, RowList};
use crate::optim::sum_of_squares;

/// Requests to this rank, which take effect on all ranks after the step that they are made before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Requests {
    pub stop: bool,
    pub save: bool,
}

impl Requests {
    /// f32 `[2]` in host memory.
    pub fn to_tensor(self) -> Tensor {
        Tensor::from_slice(&[self.stop, self.save].map(|is_set| f32::from(u8::from(is_set))))
    }
}

/// Sums the gradients of a step over micro-batches and ranks. The table lists what is summed when;
/// the work of the third column overlaps with the backward pass of the encoder:
///
/// | reduction | item table | during the backward pass | in `finish` |
/// | --- | --- | --- | --- |
/// | fast, bf16 | replicated | all-reduce of scoring gradients, gather of late rows | all others |
/// | fast, bf16 | sharded | exchange of rows with the ranks that hold them | replicated |
/// | reproducible | replicated | nothing | all, in fixed point |
/// | reproducible | sharded | exchange of rows, in fixed point | replicated, in fixed point |
/// | any | replicated, gradients listed by row | nothing | gather of the lists, all-reduce of the
/// rest |
///
/// The scalars of the step (summed loss, number of targets, requests) are reduced together with the
/// gradients, so that one call does both.
pub(super) struct GradientSync<'a> {
    collective: &'a dyn Collective,
    item_table: ItemTable<'a>,
    /// Type in which f32 gradients are sent.
    wire: Kind,
    /// Replicated gradients and scalars of the micro-batches so far, if sums are reproducible.
    replicated_sum: Option<FixedPointSum>,
    /// Sharded gradients so far, if sums are reproducible.
    sharded_sum: Option<FixedPointSum>,
    /// Whether the scoring gradients are reduced during the backward pass. With several
    /// micro-batches a step they would be reduced several times.
    overlaps: bool,
    /// Numbers of the scoring parameters.
    scoring: Range<usize>,
    /// Summed loss of this rank's micro-batches, f32 `[1]`.
    own_loss: Tensor,
}

impl<'a> GradientSync<'a> {
    pub fn new(
        network: &Network<'a>,
        reduction: Reduction,
        collective: &'a dyn Collective,
    ) -> Self {
        let item_table = network.item_table().clone();
        let gradients = network.gradients();
        let is_reproducible = reduction == Reduction::Reproducible;
        let is_sharded = item_table.is_sharded();
        Self {
            wire: if reduction == Reduction::Bf16 { Kind::BFloat16 } else { Kind::Float },
            replicated_sum: is_reproducible
                .then(|| FixedPointSum::new(&gradients.replicated_and_scalars())),
            sharded_sum: (is_reproducible && is_sharded)
                .then(|| FixedPointSum::new(&gradients.sharded())),
            overlaps: collective.world_size() > 1
                && gradients.n_listed() == 0
                && !is_reproducible
                && !is_sharded
                && network.scores_once(),
            scoring: network.scoring_parameters(),
            own_loss: Tensor::zeros([1], (Kind::Float, gradients.all().device())),
            item_table,
            collective,
        }
    }

    /// Adds the scalars of a micro-batch, and in the reproducible mode moves its gradients into the
    /// fixed-point sum. `requests`: f32 `[2]`.
    pub fn accumulate(&mut self, gradients: &mut Gradients, sums: &LossSum, requests: &Tensor) {
        let loss = sums.loss.view([1]);
        let _ = self.own_loss.g_add_(&loss);
        let mut scalars = gradients.scalars();
        let loss = loss.to_kind(Kind::Float);
        scalars += Tensor::cat(&[&loss, &sums.n_targets, requests], 0);
        if let Some(sum) = &mut self.replicated_sum {
            sum.add_and_clear(&mut gradients.replicated_and_scalars());
        }
    }

    /// *All ranks.* Completes the sums of all micro-batches of all ranks, of the step with the seed
    /// `step_seed`, i64 `[]`.
    pub fn finish(
        &mut self,
        network: &mut Network<'_>,
        step_seed: &Tensor,
    ) -> Result<SyncedStep, CollectiveError> {
        let gradients = network.gradients_mut();
        if let Some(sum) = &mut self.sharded_sum {
            sum.move_into(&mut gradients.sharded());
        }
        let lists = self.gather_lists(gradients.take_lists())?;
        // Behind the scoring parameters, if these are reduced already, or behind listed tables.
        let mut rest = if self.overlaps {
            gradients.from(self.scoring.end)
        } else if gradients.n_listed() > 0 {
            gradients.from(gradients.n_listed())
        } else {
            gradients.replicated_and_scalars()
        };
        match &mut self.replicated_sum {
            Some(sum) => {
                self.collective.all_reduce(sum.total_mut(), Reduce::Sum)?;
                sum.move_into(&mut rest);
            }
            None => self.all_reduce_rest(&mut rest, gradients)?,
        }
        network.finish_gradients(step_seed)?;
        let sharded_squares = self.sharded_squares(network.gradients())?;
        Ok(SyncedStep { lists, sharded_squares, own_loss: self.own_loss.shallow_clone() })
    }

    /// *All ranks.* The rows and gradients of all ranks for each table. Steps have the same sizes
    /// on all ranks where gradients are listed.
    fn gather_lists(&self, lists: Vec<RowList>) -> Result<Vec<RowList>, CollectiveError> {
        if self.collective.world_size() == 1 {
            return Ok(lists);
        }
        let gather = |list: RowList| {
            let mut gathered = RowList::default();
            if let Some((rows, gradients)) = list.joined() {
                let counts = vec![rows.size()[0]; self.collective.world_size()];
                let of_all = |local: &Tensor| self.collective.gather_rows(local, &counts);
                gathered.add(&of_all(&rows)?, &of_all(&gradients)?);
            }
            Ok(gathered)
        };
        lists.into_iter().map(gather).collect()
    }

    /// *All ranks.* `rest: [n]` ends with the scalars.
    fn all_reduce_rest(
        &self,
        rest: &mut Tensor,
        gradients: &Gradients,
    ) -> Result<(), CollectiveError> {
        if self.wire == Kind::Float {
            return self.collective.all_reduce(rest, Reduce::Sum);
        }
        if self.collective.world_size() == 1 {
            return Ok(());
        }
        // Counts are not exact in bf16, so the scalars are sent as f32.
        let mut scalars = gradients.scalars();
        let mut without_scalars = rest.narrow(0, 0, rest.size()[0] - scalars.size()[0]);
        communicate_as(&mut without_scalars, self.wire, |sums| {
            self.collective.all_reduce(sums, Reduce::Sum)
        })?;
        self.collective.all_reduce(&mut scalars, Reduce::Sum)
    }

    /// *All ranks*, if the item table is sharded. The sum of the squares of the gradients of the
    /// sharded rows, over all ranks: `[]`.
    fn sharded_squares(&self, gradients: &Gradients) -> Result<Option<Tensor>, CollectiveError> {
        let item_table = &self.item_table;
        if !item_table.is_sharded() {
            return Ok(None);
        }
        let sharded = gradients.sharded();
        if self.sharded_sum.is_none() {
            let squares = item_table.stack(&sum_of_squares(&sharded))?.sum(Kind::Float);
            return Ok(Some(squares));
        }
        // Squares are summed per row block, so that the norm does not depend on the number of
        // ranks.
        let block_rows = item_table.block_rows();
        let n_blocks = item_table.n_chunks_by_rank(block_rows);
        let sum_columns = |x: Tensor| x.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        let mut total = Tensor::zeros([], (Kind::Float, sharded.device()));
        for index in gradients.sharded_parameters() {
            let of_rows = sum_columns(gradients.of(index).reshape([item_table.len(), -1]).square());
            let missing = (block_rows - item_table.len() % block_rows) % block_rows;
            let of_blocks =
                sum_columns(of_rows.constant_pad_nd([0, missing]).view([-1, block_rows]));
            total += item_table.gather_rows(&of_blocks, &n_blocks)?.sum(Kind::Float);
        }
        Ok(Some(total))
    }
}

impl GradientHooks for GradientSync<'_> {
    fn scoring_complete(
        &mut self,
        gradients: &mut Gradients,
        work: &mut dyn FnMut(),
    ) -> Result<(), CollectiveError> {
        if !self.overlaps {
            work();
            return Ok(());
        }
        let mut scoring = gradients.of_range(self.scoring.clone());
        communicate_as(&mut scoring, self.wire, |sums| {
            self.collective.reduce_during(sums, Reduce::Sum, work)
        })
    }

    fn gather_late_rows(
        &mut self,
        rows: &Tensor,
        gradients: &Tensor,
        are_equal: bool,
    ) -> Result<Option<(Tensor, Tensor)>, CollectiveError> {
        if !self.overlaps {
            return Ok(None);
        }
        // A pass looks up few rows of the table, so gathering them is cheaper than a second
        // reduction of the whole gradient.
        let n = rows.size()[0];
        let counts = match are_equal {
            true => vec![n; self.collective.world_size()],
            false => self.collective.gather(&[n])?,
        };
        let gather = |local: &Tensor| self.collective.gather_rows(local, &counts);
        Ok(Some((gather(rows)?, gather(gradients)?)))
    }

    fn shard_updated(&mut self, gradients: &mut Gradients) {
        if let Some(sum) = &mut self.sharded_sum {
            sum.add_and_clear(&mut gradients.sharded());
        }
    }
}

/// What is known of a step besides the sums in the gradients.
pub(super) struct SyncedStep {
    /// Gradients of all ranks that are listed by row, of the first tables.
    pub lists: Vec<RowList>,
    /// Sum of squares of the sharded gradients of all ranks, f32 `[]`; `None` without sharding.
    pub sharded_squares: Option<Tensor>,
    /// Summed loss of this rank, f32 `[1]`, to be set to zero when it was read.
    pub own_loss: Tensor,
}
