//! Ranks of the targets in the full catalogue, and the items in the top of each session.

use std::ops::Range;

use bireme_kernels::softmax::logsumexp_rows;
use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, CollectiveError};
use crate::data::FIRST_ITEM;
use crate::model::ItemTable;

/// Ranks and losses of `B` sessions over a catalogue of `V` items.
pub struct Ranking {
    /// Rank of each session's target among the recommendable items, from 1: i64 `[B]`.
    pub ranks: Tensor,
    /// Cross entropy of each target: f64 `[B]`.
    pub losses: Tensor,
    /// Whether each local item is in the top `k` of at least one session: bool `[V]`.
    pub in_top: Tensor,
}

/// *All ranks*, if the item table is sharded. Ranks targets (i64 `[B]`) and finds the top `k` of
/// every session from the scores of at most `chunk` items at a time. Each rank scores its local
/// items; the sessions are the same on all ranks.
///
/// A target's rank is one more than the number of items with a better score; among equal scores the
/// lower index is better. Targets that are not recommendable rank after all other items: padding,
/// unknown, and the session's `hidden` items (i64 `[B, E]`, padded with −1). Losses include the
/// hidden items.
///
/// A first round over the catalogue finds each target's score and the `k`-th best score of each
/// session; a second round compares all scores with them. Both need only the scores of a chunk at a
/// time.
///
/// # Errors
/// A collective call fails.
pub fn rank_targets(
    scores: impl Fn(Range<i64>) -> Tensor,
    (targets, hidden): (&Tensor, &Tensor),
    item_table: &ItemTable<'_>,
    chunk: i64,
    k: i64,
) -> Result<Ranking, CollectiveError> {
    let Range { start: first, end } = item_table.rows;
    let chunk = item_table.chunk_rows(chunk);
    let chunks: Vec<Range<i64>> =
        (first..end).step_by(chunk as usize).map(|start| start..(start + chunk).min(end)).collect();
    let target = targets.unsqueeze(1);
    // The target scores come from the same matrix product as the scores that they are compared
    // with; a separate dot product could differ in the last bit.
    let mut target_scores = None;
    let mut log_sums = Vec::new();
    let mut top_scores = TopScores::new(k);
    let mut only_chunk = None;
    for items in &chunks {
        let chunk = scores(items.clone());
        let in_chunk = target.ge(items.start).logical_and(&target.lt(items.end));
        let column = (&target - items.start).clamp(0, items.end - items.start - 1);
        let found = chunk
            .gather(1, &column, false)
            .where_self(&in_chunk, &chunk.new_zeros([1], (chunk.kind(), chunk.device())));
        target_scores =
            Some(target_scores.map_or_else(|| found.shallow_clone(), |sum: Tensor| sum + &found));
        log_sums.push(logsumexp_rows(&chunk).unsqueeze(0));
        if let Some((_, recommendable)) = recommendable_part(items, &chunk, hidden) {
            top_scores.add(&recommendable);
        }
        // A single chunk is kept for the second round.
        only_chunk = Some(chunk).filter(|_| chunks.len() == 1);
    }
    let mut target_scores = target_scores.expect("every rank has a row");
    let n_chunks = item_table.n_chunks_by_rank(chunk);
    // The logarithm of the normaliser is the logsumexp of those of all chunks of all ranks.
    let log_sums = item_table.gather_rows(&Tensor::cat(&log_sums, 0), &n_chunks)?;
    let log_sum = log_sums.logsumexp([0i64].as_slice(), false).unsqueeze(1);
    target_scores = item_table.sum(target_scores)?;
    if let Some(ranks) = item_table.ranks() {
        top_scores.merge(ranks, item_table.n_items - FIRST_ITEM)?;
    }
    let losses = (log_sum - target_scores.to_kind(Kind::Double)).squeeze_dim(1);

    let mut threshold = top_scores.threshold();
    let mut n_better = Tensor::zeros_like(targets);
    let in_top = Tensor::zeros([item_table.len()], (Kind::Bool, targets.device()));
    let rescore = |items: &Range<i64>| {
        only_chunk.as_ref().map_or_else(|| scores(items.clone()), Tensor::shallow_clone)
    };
    if let (Some(threshold), Some(ranks)) = (&mut threshold, item_table.ranks()) {
        let local = chunks.iter().map(|items| recommendable_part(items, &rescore(items), hidden));
        threshold.reserve_for_lower_ranks(local.flatten().map(|(_, chunk)| chunk), ranks)?;
    }
    for items in &chunks {
        let chunk = rescore(items);
        let Some((items, chunk)) = recommendable_part(items, &chunk, hidden) else { continue };
        let indices = Tensor::arange_start(items.start, items.end, (Kind::Int64, targets.device()));
        let tied_before =
            chunk.eq_tensor(&target_scores).logical_and(&indices.unsqueeze(0).lt_tensor(&target));
        let better = chunk.gt_tensor(&target_scores).logical_or(&tied_before);
        n_better += better.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
        let threshold = threshold.as_mut().expect("the first round has seen this chunk");
        let members = threshold.members(&chunk);
        // A session with fewer than `k` recommendable items has the threshold −∞, which hidden
        // items reach.
        let members = if hidden.numel() > 0 {
            members.logical_and(&chunk.isneginf().logical_not())
        } else {
            members
        };
        in_top
            .narrow(0, items.start - first, items.end - items.start)
            .copy_(&members.any_dim(0, false));
    }
    let n_better = item_table.sum(n_better)?;
    let worst = Tensor::full_like(targets, item_table.n_items + 1);
    let is_hidden = hidden.eq_tensor(&target).any_dim(1, false);
    let is_recommendable = targets.ge(FIRST_ITEM).logical_and(&is_hidden.logical_not());
    Ok(Ranking { ranks: (n_better + 1).where_self(&is_recommendable, &worst), losses, in_top })
}

/// Returns the recommendable items of a chunk and their scores, `[B, C]`. Sets the scores of hidden
/// items to −∞ in place.
fn recommendable_part(
    items: &Range<i64>,
    chunk: &Tensor,
    hidden: &Tensor,
) -> Option<(Range<i64>, Tensor)> {
    let first = items.start.max(FIRST_ITEM);
    if first >= items.end {
        return None;
    }
    if hidden.numel() > 0 {
        let is_outside = hidden.lt(items.start).logical_or(&hidden.ge(items.end));
        let columns = (hidden - items.start).masked_fill(&is_outside, 0);
        // Sums, because items outside share a column with an item inside.
        let lowest = Tensor::full(hidden.size(), f64::NEG_INFINITY, (chunk.kind(), chunk.device()));
        let terms = lowest.masked_fill(&is_outside, 0.0);
        let _ = chunk.shallow_clone().scatter_add_(1, &columns, &terms);
    }
    Some((first..items.end, chunk.narrow(1, first - items.start, items.end - first)))
}

/// The best scores of every session, from the first round over the catalogue.
struct TopScores {
    k: i64,
    /// The best scores so far, descending: `[B, at most k + 1]`. The last one shows whether items
    /// outside the top have the score of its last item.
    scores: Option<Tensor>,
}

impl TopScores {
    fn new(k: i64) -> Self {
        Self { k, scores: None }
    }

    /// Adds the scores `[B, C]` of a chunk.
    fn add(&mut self, chunk: &Tensor) {
        let best =
            |scores: &Tensor| scores.topk((self.k + 1).min(scores.size()[1]), 1, true, true).0;
        let chunk = best(chunk);
        self.scores = Some(match &self.scores {
            None => chunk,
            Some(scores) => best(&Tensor::cat(&[scores, &chunk], 1)),
        });
    }

    /// *All ranks.* Merges the best scores of all ranks. `n_items`: recommendable items of all
    /// ranks.
    fn merge(&mut self, ranks: &dyn Collective, n_items: i64) -> Result<(), CollectiveError> {
        let scores = self.scores.take().expect("every rank has a recommendable item");
        // A rank may have fewer than k + 1 items; the exchange needs equal sizes.
        let missing = self.k + 1 - scores.size()[1];
        let padding = scores.new_full(
            [scores.size()[0], missing],
            f64::NEG_INFINITY,
            (scores.kind(), scores.device()),
        );
        let all = ranks.stack_ranks(&Tensor::cat(&[scores, padding], 1))?;
        let all = all.permute([1, 0, 2]).reshape([all.size()[1], -1]);
        self.scores = Some(all.topk((self.k + 1).min(n_items), 1, true, true).0);
        Ok(())
    }

    /// Returns the threshold for the second round, or `None` without a recommendable item.
    fn threshold(self) -> Option<TopThreshold> {
        let scores = self.scores?;
        let k = self.k.min(scores.size()[1]);
        let last = scores.narrow(1, k - 1, 1);
        let tied_sessions = match scores.device() {
            Device::Cpu if scores.size()[1] > k => {
                let is_tied = scores.narrow(1, k, 1).eq_tensor(&last).squeeze_dim(1);
                Some(is_tied.nonzero().squeeze_dim(1))
            }
            Device::Cpu => Some(Tensor::zeros([0], (Kind::Int64, Device::Cpu))),
            // The number of ties would be a wait, which costs more than the ties of all sessions.
            _ => None,
        };
        let n_open = n_true(&scores.narrow(1, 0, k).eq_tensor(&last));
        let threshold = TopThreshold { last, tied_sessions, n_open };
        Some(TopThreshold { n_open: threshold.of_tied(&threshold.n_open), ..threshold })
    }
}

/// Decides which items are in the top `k` of each session. Of the items tied at the `k`-th best
/// score, those with the lowest indices are in, as in the ranks of targets; no sort order decides.
struct TopThreshold {
    /// The `k`-th best score of each session: `[B, 1]`.
    last: Tensor,
    /// The sessions with more items tied at `last` than the top has room for: i64 `[tied]`, mostly
    /// empty. `None` if all sessions are treated like these.
    tied_sessions: Option<Tensor>,
    /// Number of tied items that are still to be included, for each of these sessions: i64
    /// `[tied, 1]`.
    n_open: Tensor,
}

impl TopThreshold {
    /// The rows of `x: [B, ..]` of tied sessions.
    fn of_tied(&self, x: &Tensor) -> Tensor {
        match &self.tied_sessions {
            Some(sessions) => x.index_select(0, sessions),
            None => x.shallow_clone(),
        }
    }

    /// Whether no session is tied.
    fn is_untied(&self) -> bool {
        self.tied_sessions.as_ref().is_some_and(|sessions| sessions.numel() == 0)
    }

    /// *All ranks.* Subtracts the tied items of lower ranks, which have lower indices, from
    /// `n_open`. `chunks`: scores `[B, C]` of all local items.
    fn reserve_for_lower_ranks(
        &mut self,
        chunks: impl Iterator<Item = Tensor>,
        ranks: &dyn Collective,
    ) -> Result<(), CollectiveError> {
        // The merged scores are the same on all ranks, so all ranks return here or none.
        if self.is_untied() {
            return Ok(());
        }
        let last = self.of_tied(&self.last);
        let n_tied = chunks.map(|chunk| n_true(&self.of_tied(&chunk).eq_tensor(&last)));
        let n_tied = n_tied.fold(self.n_open.zeros_like(), |sum, n| sum + n);
        let on_lower_ranks = ranks.stack_ranks(&n_tied)?.narrow(0, 0, ranks.rank() as i64);
        let on_lower_ranks = on_lower_ranks.sum_dim_intlist([0i64].as_slice(), false, Kind::Int64);
        self.n_open = (&self.n_open - on_lower_ranks).clamp_min(0);
        Ok(())
    }

    /// Returns which items of a chunk `[B, C]` are in the top of each session: bool `[B, C]`.
    /// Chunks must come in ascending order of items.
    fn members(&mut self, chunk: &Tensor) -> Tensor {
        if self.is_untied() {
            return chunk.ge_tensor(&self.last);
        }
        let [of_tied, last] = [chunk, &self.last].map(|scores| self.of_tied(scores));
        let of_all = chunk;
        let chunk = of_tied;
        let tied = chunk.eq_tensor(&last);
        let included = tied.logical_and(&tied.cumsum(1, Kind::Int).le_tensor(&self.n_open));
        self.n_open = (&self.n_open - n_true(&tied)).clamp_min(0);
        let members = chunk.gt_tensor(&last).logical_or(&included);
        match &self.tied_sessions {
            Some(sessions) => of_all.ge_tensor(&self.last).index_copy(0, sessions, &members),
            None => members,
        }
    }
}

/// Counts the true values of each row: bool `[B, C]` to i64 `[B, 1]`.
fn n_true(mask: &Tensor) -> Tensor {
    mask.sum_dim_intlist([1i64].as_slice(), true, Kind::Int64)
}
