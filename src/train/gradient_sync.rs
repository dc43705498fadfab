//! Sums gradients and step scalars over the ranks.

use std::ops::Range;

use bireme_kernels::fixed_point::FixedPointSum;
use bireme_kernels::transfer::send;
use tch::{Kind, Tensor};

use crate::collective::{Collective, CollectiveError, Reduce, communicate_as};
use crate::config::Reduction;
use crate::model::{GradientHooks, Gradients, ItemTable, LossSum, Network};
use crate::optim::{average_and_clip, sum_of_squares};

/// Requests to this rank, which take effect on all ranks after the same step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Requests {
    pub stop: bool,
    pub save: bool,
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
    /// fixed-point sum.
    pub fn accumulate(&mut self, gradients: &mut Gradients, sums: &LossSum) {
        let _ = self.own_loss.g_add_(&sums.loss);
        self.add_scalars(gradients, &sums.loss, [sums.n_targets as f32, 0.0, 0.0]);
    }

    fn add_scalars(&mut self, gradients: &mut Gradients, loss: &Tensor, others: [f32; 3]) {
        let mut scalars = gradients.scalars();
        let others = send(&Tensor::from_slice(&others), scalars.device());
        scalars += Tensor::cat(&[loss.view([1]), others], 0);
        if let Some(sum) = &mut self.replicated_sum {
            sum.add_and_clear(&mut gradients.replicated_and_scalars());
        }
    }

    /// *All ranks.* Completes the sums of all micro-batches of all ranks, of the step with the seed
    /// `step_seed`.
    pub fn finish(
        &mut self,
        network: &mut Network<'_>,
        step_seed: u64,
        requests: Requests,
        clip_norm: f64,
    ) -> Result<StepOutcome, CollectiveError> {
        let gradients = network.gradients_mut();
        let no_loss = self.own_loss.zeros_like();
        if requests.stop || requests.save {
            let [stop, save] =
                [requests.stop, requests.save].map(|is_set| f32::from(u8::from(is_set)));
            self.add_scalars(gradients, &no_loss, [0.0, stop, save]);
        }
        if let Some(sum) = &mut self.sharded_sum {
            sum.move_into(&mut gradients.sharded());
        }
        // Behind the scoring parameters, if these are reduced already.
        let mut rest = if self.overlaps {
            gradients.from(self.scoring.end)
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
        let gradients = network.gradients();
        let sharded_squares = self.sharded_squares(gradients)?;
        let scalars = gradients.scalars();
        let (scale, norm) =
            average_and_clip(&gradients.replicated(), &sharded_squares, &scalars.get(1), clip_norm);
        let own_loss = std::mem::replace(&mut self.own_loss, no_loss);
        let scalars = Tensor::cat(&[&scalars, &norm.view([1])], 0);
        // The scalars of the next step are added from zero.
        let _ = gradients.scalars().zero_();
        Ok(StepOutcome { scalars, own_loss, scale })
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
    fn sharded_squares(&self, gradients: &Gradients) -> Result<Tensor, CollectiveError> {
        let sharded = gradients.sharded();
        let item_table = &self.item_table;
        if self.sharded_sum.is_none() {
            return Ok(item_table.stack(&sum_of_squares(&sharded))?.sum(Kind::Float));
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
        Ok(total)
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
    ) -> Result<Option<(Tensor, Tensor)>, CollectiveError> {
        if !self.overlaps {
            return Ok(None);
        }
        // A pass looks up few rows of the table, so gathering them is cheaper than a second
        // reduction of the whole gradient.
        let counts = self.collective.gather(&[rows.size()[0]])?;
        let gather = |local: &Tensor| self.collective.gather_rows(local, &counts);
        Ok(Some((gather(rows)?, gather(gradients)?)))
    }

    fn shard_updated(&mut self, gradients: &mut Gradients) {
        if let Some(sum) = &mut self.sharded_sum {
            sum.add_and_clear(&mut gradients.sharded());
        }
    }
}

/// What all ranks know after a step, on the device: reading it waits for the step there.
pub(super) struct StepOutcome {
    /// `[loss, n_targets, n_stop, n_save, norm]`, over all ranks.
    scalars: Tensor,
    /// Summed loss of this rank, `[1]`.
    own_loss: Tensor,
    /// Factor that turns summed gradients into the clipped mean gradient: `[]`.
    pub scale: Tensor,
}

impl StepOutcome {
    pub fn read(&self) -> StepValues {
        let scalars =
            Vec::<f64>::try_from(self.scalars.to_kind(Kind::Double)).expect("five scalars");
        let [loss, n_targets, n_stop, n_save, norm] = scalars[..] else {
            unreachable!("five scalars")
        };
        StepValues {
            loss: loss / n_targets,
            n_targets: n_targets as usize,
            norm,
            requests: Requests { stop: n_stop > 0.0, save: n_save > 0.0 },
        }
    }

    /// Whether this rank's own loss is finite.
    pub fn is_own_loss_finite(&self) -> bool {
        self.own_loss.double_value(&[0]).is_finite()
    }
}

/// A [`StepOutcome`] in host memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepValues {
    /// Mean over the targets of all ranks.
    pub loss: f64,
    pub n_targets: usize,
    /// Norm of the gradient of the mean loss before clipping.
    pub norm: f64,
    /// Requests to any rank.
    pub requests: Requests,
}

impl StepValues {
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.norm.is_finite()
    }
}
