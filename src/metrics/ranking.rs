//! Where the held-out item stands among all items, and which items stand at the top.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::collective::{Collective, CollectiveError};
use crate::model::ItemTable;
use crate::model::head::logsumexp_rows;

/// First item index that may be recommended: padding (0) and unknown (1) never are.
pub(crate) const FIRST_ITEM: i64 = 2;

/// What the scores of `B` sessions say about them, over a catalogue of `V` items.
pub struct Ranking {
    /// Rank of each session's target among the items that may be recommended, from 1: i64 `[B]`.
    pub ranks: Tensor,
    /// Cross entropy of each target: f64 `[B]`.
    pub losses: Tensor,
    /// Whether an item that is scored here is in the top `k` of at least one of the sessions: bool `[V]`.
    pub in_top: Tensor,
}

/// *All ranks*, if the item table is sharded. Ranks targets (i64 `[B]`) and finds the top `k` of every
/// session, by the scores of at most `chunk` items at a time. Each rank scores its local items; the
/// sessions are the same on all.
///
/// A target's rank is one more than the number of items with a better score; among equal scores the
/// lower index is better. A target that may not be recommended gets a rank beyond all others:
/// padding, unknown, and the session's `hidden` items (i64 `[B, E]`, padded with −1). Losses take
/// hidden items into account.
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
    // First the targets' own scores, taken from the very product that they are compared with in the second
    // round: a score computed in another way could differ in its last bit.
    let mut target_scores = None;
    let mut log_sums = Vec::new();
    let mut best = Best::new(k);
    let mut only = None;
    for items in &chunks {
        let chunk = scores(items.clone());
        let inside = target.ge(items.start).logical_and(&target.lt(items.end));
        let place = (&target - items.start).clamp(0, items.end - items.start - 1);
        let found = chunk
            .gather(1, &place, false)
            .where_self(&inside, &chunk.new_zeros([1], (chunk.kind(), chunk.device())));
        target_scores = Some(target_scores.map_or_else(|| found.shallow_clone(), |sum: Tensor| sum + &found));
        log_sums.push(logsumexp_rows(&chunk).unsqueeze(0));
        if let Some((_, recommendable)) = recommendable(items, &chunk, hidden) {
            best.add(&recommendable);
        }
        // Not to be scored again, if it is all.
        only = Some(chunk).filter(|_| chunks.len() == 1);
    }
    let mut target_scores = target_scores.expect("a catalogue");
    let n_chunks = item_table.n_chunks_by_rank(chunk);
    let log_sums = item_table.gather_rows(&Tensor::cat(&log_sums, 0), &n_chunks)?;
    let log_sum = log_sums.logsumexp([0i64].as_slice(), false).unsqueeze(1);
    target_scores = item_table.sum(target_scores)?;
    if let Some(ranks) = item_table.ranks() {
        best.merge(ranks, item_table.n_items - FIRST_ITEM)?;
    }
    let losses = (log_sum - target_scores.to_kind(Kind::Double)).squeeze_dim(1);

    let mut top = best.top();
    let mut n_better = Tensor::zeros_like(targets);
    let in_top = Tensor::zeros([item_table.len()], (Kind::Bool, targets.device()));
    let again =
        |items: &Range<i64>| only.as_ref().map_or_else(|| scores(items.clone()), Tensor::shallow_clone);
    if let (Some(top), Some(ranks)) = (&mut top, item_table.ranks()) {
        let here = chunks.iter().map(|items| recommendable(items, &again(items), hidden));
        top.yield_to_lower_ranks(here.flatten().map(|(_, chunk)| chunk), ranks)?;
    }
    for items in &chunks {
        let chunk = again(items);
        let Some((items, chunk)) = recommendable(items, &chunk, hidden) else { continue };
        let indices = Tensor::arange_start(items.start, items.end, (Kind::Int64, targets.device()));
        let tied_before =
            chunk.eq_tensor(&target_scores).logical_and(&indices.unsqueeze(0).lt_tensor(&target));
        let better = chunk.gt_tensor(&target_scores).logical_or(&tied_before);
        n_better += better.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
        let members = top.as_mut().expect("the first round has seen this chunk").members(&chunk);
        // Where a session has fewer than `k` items left, hidden ones would fill up its top.
        let members =
            if hidden.numel() > 0 { members.logical_and(&chunk.isneginf().logical_not()) } else { members };
        in_top.narrow(0, items.start - first, items.end - items.start).copy_(&members.any_dim(0, false));
    }
    let n_better = item_table.sum(n_better)?;
    let beyond = Tensor::full_like(targets, item_table.n_items + 1);
    let is_hidden = hidden.eq_tensor(&target).any_dim(1, false);
    let in_running = targets.ge(FIRST_ITEM).logical_and(&is_hidden.logical_not());
    Ok(Ranking { ranks: (n_better + 1).where_self(&in_running, &beyond), losses, in_top })
}

/// The part of a chunk `[B, C]` of scores, and of its items, that may be recommended; what is hidden from a session
/// scores −∞ from now on.
fn recommendable(items: &Range<i64>, chunk: &Tensor, hidden: &Tensor) -> Option<(Range<i64>, Tensor)> {
    let first = items.start.max(FIRST_ITEM);
    if first >= items.end {
        return None;
    }
    if hidden.numel() > 0 {
        let rows =
            Tensor::arange(chunk.size()[0], (Kind::Int64, chunk.device())).unsqueeze(1).expand_as(hidden);
        let inside = hidden.ge(items.start).logical_and(&hidden.lt(items.end));
        let [rows, columns] = [rows, hidden - items.start].map(|of_all| of_all.masked_select(&inside));
        let nothing = chunk.new_full([1], f64::NEG_INFINITY, (chunk.kind(), chunk.device()));
        let _ = chunk.shallow_clone().index_put_(&[Some(rows), Some(columns)], &nothing, false);
    }
    Some((first..items.end, chunk.narrow(1, first - items.start, items.end - first)))
}

/// The scores that bound the `k` best items of every session, found in a first round over the catalogue. A second
/// round compares with them, so that nobody needs a list of the items.
struct Best {
    k: i64,
    /// The best scores so far, descending, one more than `k` of them where there are as many: `[B, at most k + 1]`.
    scores: Option<Tensor>,
}

impl Best {
    fn new(k: i64) -> Self {
        Self { k, scores: None }
    }

    /// Takes the scores `[B, C]` of a chunk.
    fn add(&mut self, chunk: &Tensor) {
        let best_of = |scores: &Tensor| scores.topk((self.k + 1).min(scores.size()[1]), 1, true, true).0;
        let of_chunk = best_of(chunk);
        self.scores = Some(match &self.scores {
            None => of_chunk,
            Some(scores) => best_of(&Tensor::cat(&[scores, &of_chunk], 1)),
        });
    }

    /// *All ranks.* The best of all ranks, of so many items in all.
    fn merge(&mut self, ranks: &dyn Collective, n_items: i64) -> Result<(), CollectiveError> {
        let scores = self.scores.take().expect("every rank has an item that may be recommended");
        // A rank may have fewer items than are asked for.
        let missing = self.k + 1 - scores.size()[1];
        let nothing =
            scores.new_full([scores.size()[0], missing], f64::NEG_INFINITY, (scores.kind(), scores.device()));
        let all = ranks.of_each_rank(&Tensor::cat(&[scores, nothing], 1))?;
        let all = all.permute([1, 0, 2]).reshape([all.size()[1], -1]);
        self.scores = Some(all.topk((self.k + 1).min(n_items), 1, true, true).0);
        Ok(())
    }

    /// What the second round needs; none without an item that may be recommended.
    fn top(self) -> Option<Top> {
        let scores = self.scores?;
        let k = self.k.min(scores.size()[1]);
        let last = scores.narrow(1, k - 1, 1);
        let is_crowded = match scores.size()[1] > k {
            true => scores.narrow(1, k, 1).eq_tensor(&last).squeeze_dim(1),
            false => Tensor::zeros([scores.size()[0]], (Kind::Bool, scores.device())),
        };
        let crowded = is_crowded.nonzero().squeeze_dim(1);
        let n_free = n_true(&scores.narrow(1, 0, k).eq_tensor(&last)).index_select(0, &crowded);
        Some(Top { last, crowded, n_free })
    }
}

/// Tells which items are among the `k` best of which session. Which of several items with just the last score are in
/// does not depend on a sort's habits: those with the lowest indices, as in a rank.
struct Top {
    /// The score of each session's last item that is in: `[B, 1]`.
    last: Tensor,
    /// The sessions with more items of that score than are in: i64 `[crowded]`. Mostly there are none.
    crowded: Tensor,
    /// How many items of that score are still to come in, in each of them: i64 `[crowded, 1]`.
    n_free: Tensor,
}

impl Top {
    /// *All ranks.* Of items with just the last score, those of the ranks before this one come first. `chunks` `[B, C]`: all that
    /// are here.
    fn yield_to_lower_ranks(
        &mut self,
        chunks: impl Iterator<Item = Tensor>,
        ranks: &dyn Collective,
    ) -> Result<(), CollectiveError> {
        if self.crowded.numel() == 0 {
            return Ok(());
        }
        let last = self.last.index_select(0, &self.crowded);
        let tied = chunks.map(|chunk| n_true(&chunk.index_select(0, &self.crowded).eq_tensor(&last)));
        let n_tied = tied.fold(self.n_free.zeros_like(), |sum, n| sum + n);
        let before = ranks.of_each_rank(&n_tied)?.narrow(0, 0, ranks.rank() as i64);
        let before = before.sum_dim_intlist([0i64].as_slice(), false, Kind::Int64);
        self.n_free = (&self.n_free - before).clamp_min(0);
        Ok(())
    }

    /// Which items of a chunk `[B, C]` are in whose top, bool `[B, C]`; chunks come in ascending order.
    fn members(&mut self, chunk: &Tensor) -> Tensor {
        let members = chunk.ge_tensor(&self.last);
        if self.crowded.numel() == 0 {
            return members;
        }
        let (chunk, last) = (chunk.index_select(0, &self.crowded), self.last.index_select(0, &self.crowded));
        let tied = chunk.eq_tensor(&last);
        let first = tied.logical_and(&tied.cumsum(1, Kind::Int).le_tensor(&self.n_free));
        self.n_free = (&self.n_free - n_true(&tied)).clamp_min(0);
        members.index_copy(0, &self.crowded, &chunk.gt_tensor(&last).logical_or(&first))
    }
}

/// How many are true in each row: bool `[B, C]` to i64 `[B, 1]`.
fn n_true(mask: &Tensor) -> Tensor {
    mask.sum_dim_intlist([1i64].as_slice(), true, Kind::Int64)
}
