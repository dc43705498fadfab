//! Rows of which every rank has a number of its own.

use std::ops::Range;

use tch::Tensor;

use super::{Collective, CollectiveError, Reduce};

/// Tensors whose first sizes differ from rank to rank: `counts` says them for all ranks, see [`Collective`] on `gather`.
impl dyn Collective + '_ {
    /// *All ranks.* Every rank's `rows: [n, ..]`, one rank's after the other's: `[sum of counts, ..]`.
    pub fn gather_rows(&self, rows: &Tensor, counts: &[i64]) -> Result<Tensor, CollectiveError> {
        let longest = longest(counts);
        if counts.len() == 1 || longest == 0 {
            return Ok(rows.detach());
        }
        let part = padded(rows, longest);
        let mut whole = part.new_empty(with_rows(&part, longest * counts.len() as i64), of(&part));
        self.all_gather(&part, &mut whole)?;
        if counts.iter().all(|&n| n == longest) {
            return Ok(whole);
        }
        let starts = (0..).step_by(longest as usize);
        Ok(Tensor::cat(
            &starts.zip(counts).map(|(start, &n)| whole.narrow(0, start, n)).collect::<Vec<_>>(),
            0,
        ))
    }

    /// *All ranks.* Adds `rows: [sum of counts, ..]` up over ranks, and leaves each rank its own: `[n, ..]`.
    pub fn scatter_rows(&self, rows: &Tensor, counts: &[i64]) -> Result<Tensor, CollectiveError> {
        let longest = longest(counts);
        if counts.len() == 1 || longest == 0 {
            return Ok(rows.detach());
        }
        let part = |of: Range<i64>| padded(&rows.narrow(0, of.start, of.end - of.start), longest);
        let parts: Vec<Tensor> = by_rank(counts).map(part).collect();
        let mut own = rows.new_empty(with_rows(rows, longest), of(rows));
        self.reduce_scatter(&Tensor::cat(&parts, 0), &mut own, Reduce::Sum)?;
        Ok(own.narrow(0, 0, counts[self.rank()]))
    }

    /// *All ranks.* `[..]` of every rank: `[ranks, ..]`.
    pub fn of_each_rank(&self, own: &Tensor) -> Result<Tensor, CollectiveError> {
        self.gather_rows(&own.unsqueeze(0), &vec![1; self.world_size()])
    }
}

/// Which of the rows of all ranks, one rank's after the other's, are each rank's.
pub fn by_rank(counts: &[i64]) -> impl Iterator<Item = Range<i64>> {
    counts.iter().scan(0, |end, &n| {
        *end += n;
        Some(*end - n..*end)
    })
}

fn longest(counts: &[i64]) -> i64 {
    counts.iter().copied().max().unwrap_or(0)
}

fn of(tensor: &Tensor) -> (tch::Kind, tch::Device) {
    (tensor.kind(), tensor.device())
}

/// The size of `tensor` with another number of rows.
fn with_rows(tensor: &Tensor, n: i64) -> Vec<i64> {
    let mut size = tensor.size();
    size[0] = n;
    size
}

/// `[n, ..]` with zeros behind it up to `longest` rows, contiguous.
fn padded(rows: &Tensor, longest: i64) -> Tensor {
    let missing = longest - rows.size()[0];
    let rows = rows.detach();
    if missing == 0 {
        return rows.contiguous();
    }
    Tensor::cat(&[&rows, &rows.new_zeros(with_rows(&rows, missing), of(&rows))], 0)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::collective::threads;

    /// Row `i` of rank `r` is `[10 r + i, −(10 r + i)]`.
    fn rows(rank: usize, n: i64) -> Tensor {
        let first = (10 * rank) as i64;
        let values = Tensor::arange_start(first, first + n, (Kind::Int64, Device::Cpu));
        Tensor::stack(&[&values, &values.neg()], 1)
    }

    #[test]
    fn rows_of_all_ranks_come_together_and_go_back_as_sums() {
        for counts in [vec![2, 0, 3], vec![1, 1], vec![0, 0], vec![4]] {
            let results = threads::spawn(counts.len(), |collective| {
                let mine = rows(collective.rank(), counts[collective.rank()]);
                let all = collective.gather_rows(&mine, &counts).unwrap();
                (all.copy(), collective.scatter_rows(&all, &counts).unwrap(), mine)
            });
            let expected: Vec<Tensor> = (0..).zip(&counts).map(|(rank, &n)| rows(rank, n)).collect();
            let expected = Tensor::cat(&expected, 0);
            for (all, back, mine) in results {
                assert_eq!((all.size(), back.size()), (expected.size(), mine.size()));
                assert!(all.equal(&expected));
                assert!(back.equal(&(mine * counts.len() as i64)));
            }
        }
    }
}
