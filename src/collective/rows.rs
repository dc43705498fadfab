//! Collectives on rows, of which each rank has a different number.

use std::ops::Range;

use tch::Tensor;

use super::{Collective, CollectiveError, Reduce};

/// Collectives on tensors whose first size differs between ranks. `counts` holds the first size on
/// each rank; `gather` collects it. Rows are padded to the largest count, because `all_gather` and
/// `reduce_scatter` need equal parts.
impl dyn Collective + '_ {
    /// *All ranks.* Concatenates every rank's `rows: [n, ..]` in rank order: `[sum of counts, ..]`.
    pub fn gather_rows(&self, rows: &Tensor, counts: &[i64]) -> Result<Tensor, CollectiveError> {
        let longest = longest(counts);
        if counts.len() == 1 || longest == 0 {
            return Ok(rows.detach());
        }
        let part = padded(rows, longest);
        let mut whole =
            part.new_empty(with_rows(&part, longest * counts.len() as i64), options(&part));
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

    /// *All ranks.* Sums `rows: [sum of counts, ..]` over the ranks. Each rank keeps its rows:
    /// `[n, ..]`.
    pub fn scatter_rows(&self, rows: &Tensor, counts: &[i64]) -> Result<Tensor, CollectiveError> {
        let longest = longest(counts);
        if counts.len() == 1 || longest == 0 {
            return Ok(rows.detach());
        }
        let part = |range: Range<i64>| {
            padded(&rows.narrow(0, range.start, range.end - range.start), longest)
        };
        let parts: Vec<Tensor> = by_rank(counts).map(part).collect();
        let mut local = rows.new_empty(with_rows(rows, longest), options(rows));
        self.reduce_scatter(&Tensor::cat(&parts, 0), &mut local, Reduce::Sum)?;
        Ok(local.narrow(0, 0, counts[self.rank()]))
    }

    /// *All ranks.* Stacks the `local: [..]` of all ranks: `[ranks, ..]`.
    pub fn stack_ranks(&self, local: &Tensor) -> Result<Tensor, CollectiveError> {
        self.gather_rows(&local.unsqueeze(0), &vec![1; self.world_size()])
    }
}

/// The range of each rank in the concatenated rows of all ranks.
pub fn by_rank(counts: &[i64]) -> impl Iterator<Item = Range<i64>> {
    counts.iter().scan(0, |end, &n| {
        *end += n;
        Some(*end - n..*end)
    })
}

fn longest(counts: &[i64]) -> i64 {
    counts.iter().copied().max().unwrap_or(0)
}

fn options(tensor: &Tensor) -> (tch::Kind, tch::Device) {
    (tensor.kind(), tensor.device())
}

/// The size of `tensor` with `n` rows.
fn with_rows(tensor: &Tensor, n: i64) -> Vec<i64> {
    let mut size = tensor.size();
    size[0] = n;
    size
}

/// Pads `rows: [n, ..]` with zeros to `longest` rows, contiguous.
fn padded(rows: &Tensor, longest: i64) -> Tensor {
    let missing = longest - rows.size()[0];
    let rows = rows.detach();
    if missing == 0 {
        return rows.contiguous();
    }
    Tensor::cat(&[&rows, &rows.new_zeros(with_rows(&rows, missing), options(&rows))], 0)
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
    fn gathered_rows_are_concatenated_and_scattered_rows_are_sums() {
        for counts in [vec![2, 0, 3], vec![1, 1], vec![0, 0], vec![4]] {
            let results = threads::spawn(counts.len(), |collective| {
                let local = rows(collective.rank(), counts[collective.rank()]);
                let all = collective.gather_rows(&local, &counts).unwrap();
                (all.copy(), collective.scatter_rows(&all, &counts).unwrap(), local)
            });
            let expected: Vec<Tensor> =
                (0..).zip(&counts).map(|(rank, &n)| rows(rank, n)).collect();
            let expected = Tensor::cat(&expected, 0);
            for (all, scattered, local) in results {
                assert_eq!((all.size(), scattered.size()), (expected.size(), local.size()));
                assert!(all.equal(&expected));
                assert!(scattered.equal(&(local * counts.len() as i64)));
            }
        }
    }
}
