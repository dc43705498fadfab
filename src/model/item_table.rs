//! Which rank holds which rows of the item tables, and the exchanges that follow from it.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::ITEM_TABLES;
use crate::collective::{Collective, CollectiveError, Reduce, rows};

/// A catalogue has at most this many row blocks. Shards are whole blocks, so that sums over blocks
/// are the same on any number of ranks.
const MAX_BLOCKS: i64 = 1024;

/// A row block is a multiple of this many rows: a block then starts at the same alignment in memory
/// wherever a shard starts, and MKL sums it in the same order.
const BLOCK_MULTIPLE: i64 = 16;

/// The item tables of a model as one rank sees them: all rows (replicated), or a contiguous shard
/// of the rows (sharded).
///
/// Exchanges are the identity on a replicated table. On a sharded one every rank of the job takes
/// part in them.
#[derive(Clone)]
pub struct ItemTable<'a> {
    /// Rows that this rank holds.
    pub rows: Range<i64>,
    /// Rows of all ranks, `V`.
    pub n_items: i64,
    /// The ranks that hold the other rows.
    ranks: Option<&'a dyn Collective>,
    /// Whether sums over rows or targets must not depend on the number of ranks. They are then
    /// formed per row block, for the targets of one rank at a time, in fixed point.
    is_reproducible: bool,
}

impl<'a> ItemTable<'a> {
    /// Every rank holds all rows.
    pub fn replicated(n_items: i64) -> Self {
        Self { rows: 0..n_items, n_items, ranks: None, is_reproducible: false }
    }

    /// Each rank holds one shard. There are at most [`ItemTable::max_shards`].
    pub fn sharded(n_items: i64, ranks: &'a dyn Collective) -> Self {
        let rows = shard(n_items, ranks.rank(), ranks.world_size());
        Self { rows, n_items, ranks: Some(ranks), is_reproducible: false }
    }

    /// The same table, with sums that do not depend on the number of ranks.
    #[must_use]
    pub fn reproducible(self) -> Self {
        Self { is_reproducible: true, ..self }
    }

    pub fn is_reproducible(&self) -> bool {
        self.is_reproducible
    }

    pub fn is_sharded(&self) -> bool {
        self.ranks.is_some()
    }

    /// The ranks that hold the shards; `None` if the table is replicated.
    pub fn ranks(&self) -> Option<&'a dyn Collective> {
        self.ranks
    }

    /// Largest number of ranks that can shard a table of `n_items` rows.
    pub fn max_shards(n_items: i64) -> usize {
        n_blocks(n_items) as usize
    }

    /// Whether the tensor of this name, a parameter or its optimizer state, is an item table.
    pub fn is_item_table(name: &str) -> bool {
        ITEM_TABLES.iter().any(|table| {
            name.strip_suffix(table)
                .is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('.'))
        })
    }

    /// This rank's part of a whole tensor of this name.
    pub fn local_part(&self, name: &str, whole: &Tensor) -> Tensor {
        if self.is_sharded() && Self::is_item_table(name) && whole.size()[0] == self.n_items {
            whole.narrow(0, self.rows.start, self.len())
        } else {
            whole.shallow_clone()
        }
    }

    /// Number of local rows.
    pub fn len(&self) -> i64 {
        self.rows.end - self.rows.start
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows of each rank, in rank order.
    pub fn rows_by_rank(&self) -> Vec<Range<i64>> {
        let world_size = self.ranks.map_or(1, Collective::world_size);
        (0..world_size).map(|rank| shard(self.n_items, rank, world_size)).collect()
    }

    /// Rows of the largest shard.
    pub fn max_rows(&self) -> i64 {
        self.rows_by_rank().iter().map(|rows| rows.end - rows.start).max().unwrap_or(0)
    }

    /// Rows of a block.
    pub fn block_rows(&self) -> i64 {
        block_rows(self.n_items)
    }

    /// Rows of a catalogue chunk, the same on every rank: a row block if sums are reproducible,
    /// else at most `wanted`.
    pub fn chunk_rows(&self, wanted: i64) -> i64 {
        if self.is_reproducible { self.block_rows() } else { wanted.clamp(1, self.max_rows()) }
    }

    /// Number of chunks of `chunk_rows` rows on each rank.
    pub fn n_chunks_by_rank(&self, chunk_rows: i64) -> Vec<i64> {
        self.rows_by_rank()
            .into_iter()
            .map(|rows| div_ceil(rows.end - rows.start, chunk_rows))
            .collect()
    }

    /// Splits the targets of all ranks, `counts` of each, into the groups that are worked on
    /// together: one group, or one for each rank if sums are reproducible.
    pub fn target_groups(&self, counts: &[i64]) -> Vec<Range<i64>> {
        if self.is_reproducible {
            rows::by_rank(counts).filter(|group| !group.is_empty()).collect()
        } else {
            std::iter::once(0..counts.iter().sum()).collect()
        }
    }

    /// Finds items `[N]` among the local rows.
    pub fn locate(&self, items: &Tensor) -> LocalRows {
        if !self.is_sharded() {
            return LocalRows { rows: items.shallow_clone(), is_local: None };
        }
        let is_local =
            items.ge(self.rows.start).logical_and(&items.lt(self.rows.end)).to_kind(Kind::Float);
        let rows = (items - self.rows.start).clamp(0, self.len() - 1);
        LocalRows { rows, is_local: Some(is_local) }
    }

    /// *All ranks.* Every rank's `n`, in rank order; only this rank's on a replicated table.
    /// Nothing is communicated if the ranks `are_equal`.
    pub fn gather_counts(&self, n: i64, are_equal: bool) -> Result<Vec<i64>, CollectiveError> {
        match self.ranks {
            Some(ranks) if are_equal => Ok(vec![n; ranks.world_size()]),
            Some(ranks) => ranks.gather(&[n]),
            None => Ok(vec![n]),
        }
    }

    /// *All ranks.* Rows `[n, ..]` of all ranks, in rank order, `counts` of each.
    pub fn gather_rows(&self, local: &Tensor, counts: &[i64]) -> Result<Tensor, CollectiveError> {
        match self.ranks {
            Some(ranks) => ranks.gather_rows(local, counts),
            None => Ok(local.shallow_clone()),
        }
    }

    /// *All ranks.* Sums `all: [sum of counts, ..]` over ranks; each rank keeps its own rows.
    pub fn reduce_scatter_rows(
        &self,
        all: &Tensor,
        counts: &[i64],
    ) -> Result<Tensor, CollectiveError> {
        match self.ranks {
            Some(ranks) => ranks.scatter_rows(all, counts),
            None => Ok(all.shallow_clone()),
        }
    }

    /// *All ranks.* `[..]` of every rank: `[ranks, ..]`.
    pub fn stack(&self, local: &Tensor) -> Result<Tensor, CollectiveError> {
        match self.ranks {
            Some(ranks) => ranks.stack_ranks(local),
            None => Ok(local.unsqueeze(0)),
        }
    }

    /// *All ranks.* Sums `local` over the shards.
    pub fn sum(&self, mut local: Tensor) -> Result<Tensor, CollectiveError> {
        if let Some(ranks) = self.ranks {
            ranks.all_reduce(&mut local, Reduce::Sum)?;
        }
        Ok(local)
    }

    /// *All ranks.* The sum of `local` over the shards; if sums are reproducible the terms of all
    /// ranks, which the caller adds one by one in fixed point.
    pub fn sum_or_terms(&self, local: Tensor) -> Result<Vec<Tensor>, CollectiveError> {
        match self.ranks.filter(|_| self.is_reproducible) {
            Some(ranks) => Ok(ranks.stack_ranks(&local)?.unbind(0)),
            None => Ok(vec![self.sum(local)?]),
        }
    }

    /// *All ranks.* `log(sum over ranks of exp(logs))`, `[n]`.
    pub fn log_sum_exp(&self, logs: Tensor) -> Result<Tensor, CollectiveError> {
        let Some(ranks) = self.ranks else { return Ok(logs) };
        let mut max = logs.copy();
        ranks.all_reduce(&mut max, Reduce::Max)?;
        let sums = self.sum((logs - &max).exp())?;
        Ok(max + sums.log())
    }

    /// This rank's rows of `all: [sum of counts, ..]`.
    pub fn local_rows_of(&self, all: &Tensor, counts: &[i64]) -> Tensor {
        let Some(ranks) = self.ranks else { return all.shallow_clone() };
        let first = counts[..ranks.rank()].iter().sum();
        all.narrow(0, first, counts[ranks.rank()])
    }

    /// *All ranks.* Requests the rows of items `[N]`, `counts` of each rank.
    pub(super) fn request(
        &self,
        items: &Tensor,
        counts: &[i64],
    ) -> Result<RowRequest<'a>, CollectiveError> {
        let Some(ranks) = self.ranks else { return Ok(RowRequest::replicated(items)) };
        let located = self.locate(&ranks.gather_rows(items, counts)?);
        Ok(RowRequest { located, remote: Some(Remote { ranks, counts: counts.to_vec() }) })
    }
}

/// Items as rows of the local shard.
pub struct LocalRows {
    /// Row in the shard, i64 `[N]`; of an item that another rank holds, any valid row.
    pub rows: Tensor,
    /// 1 where the item is local, else 0: f32 `[N]`. `None` if the table is replicated.
    is_local: Option<Tensor>,
}

impl LocalRows {
    /// `values: [N, ..]`, with zeros for items that another rank holds.
    pub fn mask(&self, values: Tensor) -> Tensor {
        match &self.is_local {
            Some(is_local) if values.dim() > 1 => values * is_local.unsqueeze(1),
            Some(is_local) => values * is_local,
            None => values,
        }
    }
}

/// Rows of an item table that ranks have requested from the ranks that hold them.
pub(super) struct RowRequest<'a> {
    /// The requested rows of all ranks, in rank order.
    located: LocalRows,
    remote: Option<Remote<'a>>,
}

struct Remote<'a> {
    ranks: &'a dyn Collective,
    /// Number of rows that each rank requested.
    counts: Vec<i64>,
}

impl<'a> RowRequest<'a> {
    /// Rows of a table that every rank holds.
    pub fn replicated(rows: &Tensor) -> Self {
        Self { located: LocalRows { rows: rows.shallow_clone(), is_local: None }, remote: None }
    }

    /// *All ranks.* The values `[N, ..]` of the rows that this rank requested. `read` returns the
    /// values of the given local rows.
    pub fn fetch(&self, read: impl FnOnce(&Tensor) -> Tensor) -> Result<Tensor, CollectiveError> {
        let values = self.located.mask(read(&self.located.rows));
        match &self.remote {
            Some(Remote { ranks, counts }) => ranks.scatter_rows(&values, counts),
            None => Ok(values),
        }
    }

    /// *All ranks.* Sends gradients `[N, ..]` of the requested rows to the ranks that hold them.
    /// `add` adds gradients to the given local rows; if sums are reproducible it is called for the
    /// gradients of one rank at a time.
    pub fn scatter_gradients(
        &self,
        table: &ItemTable<'_>,
        gradients: &Tensor,
        mut add: impl FnMut(&Tensor, &Tensor),
    ) -> Result<(), CollectiveError> {
        let rows = &self.located.rows;
        let Some(Remote { ranks, counts }) = &self.remote else {
            add(rows, gradients);
            return Ok(());
        };
        let all = self.located.mask(ranks.gather_rows(gradients, counts)?);
        for Range { start, end } in table.target_groups(counts) {
            add(&rows.narrow(0, start, end - start), &all.narrow(0, start, end - start));
        }
        Ok(())
    }
}

/// Rows of the shard of `rank`.
fn shard(n_items: i64, rank: usize, world_size: usize) -> Range<i64> {
    let start = |rank: usize| {
        let block = rank as i64 * n_blocks(n_items) / world_size as i64;
        block.saturating_mul(block_rows(n_items)).min(n_items)
    };
    start(rank)..start(rank + 1)
}

fn block_rows(n_items: i64) -> i64 {
    div_ceil(div_ceil(n_items, MAX_BLOCKS), BLOCK_MULTIPLE) * BLOCK_MULTIPLE
}

fn n_blocks(n_items: i64) -> i64 {
    div_ceil(n_items, block_rows(n_items))
}

/// `a / b`, rounded up; both are positive.
pub(super) fn div_ceil(a: i64, b: i64) -> i64 {
    a / b + i64::from(a % b != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads;

    #[test]
    fn shards_cover_the_catalogue_in_whole_blocks() {
        for (n_items, world_size) in [(40, 3), (1000, 2), (1000, 7), (390_001, 8), (16, 1)] {
            let shards = threads::spawn(world_size, |collective| {
                let table = ItemTable::sharded(n_items, collective);
                (table.rows.clone(), table.max_rows())
            });
            assert_eq!((shards[0].0.start, shards[world_size - 1].0.end), (0, n_items));
            for (rows, most) in &shards {
                assert!(rows.start % block_rows(n_items) == 0 && !rows.is_empty());
                assert!(rows.end - rows.start <= *most);
            }
            assert!(shards.windows(2).all(|two| two[0].0.end == two[1].0.start));
        }
    }

    #[test]
    fn item_tables_are_recognized_by_name() {
        for name in [
            "item_table.weight",
            "m.item_table.weight",
            "sum.item_table.bias",
            "v.head.table.weight",
        ] {
            assert!(ItemTable::is_item_table(name));
        }
        for name in ["tables.item_table.weight.x", "xitem_table.weight", "head.projection.weight"] {
            assert!(!ItemTable::is_item_table(name), "{name}");
        }
    }
}
