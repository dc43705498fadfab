//! The cross entropy over the whole catalogue, some targets and some items at a time.
//!
//! The catalogue is cut into tiles of items, few enough for their logits to stay in a CPU's caches. A first round takes the
//! softmax within each tile, `p_t`, and the logarithm of its sum, `l_t`; over the whole catalogue the probabilities of its
//! items are `w_t p_t` with `w_t = exp(l_t − logsumexp(l))`. So a second round needs no more than a weight for each target
//! and tile: it adds `p_tᵀ (w_t h)` to the table's gradient and `w_t (p_t E_t)` to the states'.
//!
//! Between the rounds the `p_t` are kept, of as many targets at a time as the memory for logits holds. Where that are so few
//! that the passes over the table would cost more than the arithmetic, all targets go at once, and the second round
//! computes `p_t` again: then memory does not depend on the size of the catalogue ("Cut Your Losses", Wijmans et al. 2024,
//! whose kernels do the same).

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{CrossEntropy, Scored, Share, add_rows, draw};
use crate::collective::{CollectiveError, Reduce};

/// Items of a tile on the CPU. A GPU does better with few large products.
const TILE: i64 = 4096;

/// Fewer targets at a time are not worth their passes over the table: measured on a CPU.
const LEAST_TARGETS: i64 = 32;

/// Memory for logits, kept from step to step: to be given pages anew takes as long as to compute what goes there.
#[derive(Default)]
pub struct Workspace(Option<Tensor>);

impl Workspace {
    /// Room for `n` numbers.
    fn room(&mut self, n: i64, device: Device) -> &Tensor {
        let fits = self.0.take().filter(|room| room.size()[0] >= n && room.device() == device);
        self.0.insert(fits.unwrap_or_else(|| Tensor::empty([n], (Kind::Float, device))))
    }
}

/// How the work is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    /// Targets at a time.
    n_targets: i64,
    /// Items of a tile.
    tile: i64,
    /// Whether the first round's probabilities are kept for the second.
    keeps: bool,
}

impl Cut {
    fn new((n_targets, n_items): (i64, i64), max_logits: i64, device: Device) -> Self {
        let tile = if device == Device::Cpu { TILE.min(n_items) } else { n_items };
        let fit = max_logits / n_items;
        if fit >= n_targets.min(LEAST_TARGETS) {
            // Into equal parts: a last one of few targets would be a pass over the table for little.
            let n_parts = div_ceil(n_targets, fit.min(n_targets));
            return Self { n_targets: div_ceil(n_targets, n_parts), tile, keeps: true };
        }
        Self { n_targets, tile: tile.min(max_logits / n_targets).max(1), keeps: false }
    }
}

fn div_ceil(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

/// See [`super::cross_entropy`].
pub(super) fn full(
    own_states: &Tensor,
    own_targets: &Tensor,
    scored: &mut Scored<'_>,
    (label_smoothing, max_logits): (f64, i64),
    own_uniform: Option<&Tensor>,
    workspace: &mut Workspace,
) -> Result<CrossEntropy, CollectiveError> {
    let (share, counts) = (scored.share, scored.counts);
    let of_all = |own: &Tensor| share.gather_rows(own, counts);
    let (h, targets) = (of_all(own_states)?, of_all(own_targets)?);
    let uniform = own_uniform.map(of_all).transpose()?;
    let n_targets = targets.size()[0];
    let mut state_gradient = h.zeros_like();
    let drawn = uniform.as_ref().map(|_| targets.zeros_like());
    let mut log_sums = Vec::new();
    let cut = Cut::new((n_targets, share.most_rows()), max_logits, h.device());
    for first in (0..n_targets).step_by(cut.n_targets as usize) {
        let of = |x: &Tensor| x.narrow(0, first, cut.n_targets.min(n_targets - first));
        let draws = uniform.as_ref().zip(drawn.as_ref()).map(|(uniform, drawn)| (of(uniform), of(drawn)));
        log_sums.push(part(&of(&h), &mut of(&state_gradient), scored, cut, draws, workspace)?);
    }

    // What the targets themselves have of it, where their rows are.
    let (places, here) = share.places(&targets);
    let kept = 1.0 - label_smoothing;
    let Scored { table, bias, table_gradient, bias_gradient, .. } = scored;
    let wanted = table.index_select(0, &places) * here.unsqueeze(1);
    let logits = (&h * &wanted).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
        + bias.index_select(0, &places) * &here;
    let minus = here * -kept;
    add_rows(table_gradient, &places, &(&h * minus.unsqueeze(1)));
    add_rows(bias_gradient, &places, &minus);
    state_gradient -= wanted * kept;

    let [state_gradient, log_sums] = [state_gradient, Tensor::cat(&log_sums, 0)];
    let mut loss = share.own_of(&log_sums, counts).sum(Kind::Double) - logits.sum(Kind::Double) * kept;
    let back = |of_all: Tensor| match share.company() {
        Some(company) => company.scatter_rows(&of_all, counts),
        None => Ok(of_all),
    };
    let mut state_gradient = back(state_gradient)?;
    if label_smoothing > 0.0 {
        // The mean logit is linear in the mean row.
        let (row, mean_bias) = mean_row(table, bias, share)?;
        let sum = column_sums(own_states);
        let mean = mean_bias * own_states.size()[0] as f64 + (&row * sum).sum(Kind::Float);
        loss -= mean.to_kind(Kind::Double) * label_smoothing;
        let each = label_smoothing / share.n_items as f64;
        *table_gradient -= column_sums(&h) * each;
        let _ = bias_gradient.g_sub_scalar_(each * n_targets as f64);
        state_gradient -= row * label_smoothing;
    }
    let drawn = drawn.map(back).transpose()?;
    Ok(CrossEntropy { loss, state_gradient, drawn })
}

/// The mean of all rows of the catalogue, `[D]`, and that of its biases, `[]`.
fn mean_row(table: &Tensor, bias: &Tensor, share: &Share<'_>) -> Result<(Tensor, Tensor), CollectiveError> {
    let mut sums = Tensor::cat(&[column_sums(table), bias.sum(Kind::Float).view([1])], 0);
    if let Some(company) = share.company() {
        company.all_reduce(&mut sums, Reduce::Sum)?;
    }
    let means = sums / share.n_items as f64;
    let width = table.size()[1];
    Ok((means.narrow(0, 0, width), means.get(width)))
}

/// `[N, D]` → `[D]`.
fn column_sums(x: &Tensor) -> Tensor {
    x.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
}

/// `logsumexp(z)` of each target, `[n]`; its gradients are added to those of `scored` and to `state_gradient: [n, D]`, as far
/// as the rows that are here have a part in them. Items are drawn as `(uniform, drawn)`, both `[n]`, say.
fn part(
    h: &Tensor,
    state_gradient: &mut Tensor,
    Scored { table, bias, table_gradient, bias_gradient, share, .. }: &mut Scored<'_>,
    cut: Cut,
    draws: Option<(Tensor, Tensor)>,
    workspace: &mut Workspace,
) -> Result<Tensor, CollectiveError> {
    let (n, n_items) = (h.size()[0], table.size()[0]);
    let tiles: Vec<Range<i64>> =
        (0..n_items).step_by(cut.tile as usize).map(|start| start..(start + cut.tile).min(n_items)).collect();
    let room = workspace.room(n * if cut.keeps { n_items } else { cut.tile }, h.device());
    let rows = |x: &Tensor, tile: &Range<i64>| x.narrow(0, tile.start, tile.end - tile.start);
    // `p_t` and `l_t: [n, 1]`. The softmax has `exp(0)` over its sum where the largest logit is.
    let softmax = |tile: &Range<i64>| {
        let p = probabilities(room, n, tile, cut);
        let _ = rows(bias, tile).addmm_out(&p, h, &rows(table, tile).tr());
        let largest = p.amax([1i64].as_slice(), true);
        let _ = p.softmax_int_out(&p, 1, None);
        p.amax([1i64].as_slice(), true).log().neg() + largest
    };
    let logs = Tensor::cat(&tiles.iter().map(softmax).collect::<Vec<_>>(), 1);
    // Of every rank, `[ranks, n]`: one where there are no others.
    let by_rank = logs.logsumexp([1i64].as_slice(), false).unsqueeze(0);
    let by_rank = match share.company() {
        Some(company) => company.gather_rows(&by_rank, &vec![1; company.world_size()])?,
        None => by_rank,
    };
    let log_sums = by_rank.logsumexp([0i64].as_slice(), false);
    let weights = (&logs - log_sums.unsqueeze(1)).exp();
    let draws = draws.map(|(uniform, drawn)| {
        let before = share.company().map(|company| company.rank() as i64).filter(|&rank| rank > 0);
        // What the ranks before this one have of all.
        let before = before.map(|rank| column_sums(&(by_rank.narrow(0, 0, rank) - &log_sums).exp()));
        let is_last = share.rows.end == share.n_items;
        Draws::new(
            &weights,
            &before.map_or(uniform.shallow_clone(), |before| uniform - before),
            drawn,
            is_last,
        )
    });
    for (number, tile) in tiles.iter().enumerate() {
        if !cut.keeps {
            let _ = softmax(tile);
        }
        let p = probabilities(room, n, tile, cut);
        let weight = weights.narrow(1, number as i64, 1);
        if let Some(draws) = &draws {
            draws.draw_from(&p, number as i64, share.rows.start + tile.start);
        }
        let _ = rows(table_gradient, tile).addmm_(&p.tr(), &(h * &weight));
        let _ = rows(bias_gradient, tile).addmv_(&p.tr(), &weight.squeeze_dim(1));
        *state_gradient += p.matmul(&rows(table, tile)) * weight;
    }
    Ok(log_sums)
}

/// Where the probabilities `[n, C]` of a tile lie.
fn probabilities(room: &Tensor, n: i64, tile: &Range<i64>, cut: Cut) -> Tensor {
    let width = tile.end - tile.start;
    room.narrow(0, if cut.keeps { n * tile.start } else { 0 }, n * width).view([n, width])
}

/// Items drawn by the probabilities of the whole catalogue: first a tile by its weight, then an item of it.
struct Draws {
    /// The tile of each target, i64 `[n]`; −1 where another rank draws.
    tile: Tensor,
    /// What is left of its uniform number there: `[n]`.
    uniform: Tensor,
    /// i64 `[n]`, zero where another rank draws.
    drawn: Tensor,
    /// Whether there is one tile only.
    is_one: bool,
}

impl Draws {
    /// For tiles whose weights `[n, tiles]` are what is here of all; `uniform: [n]` begins with the first. `is_last`: whether
    /// nobody has items behind these.
    fn new(weights: &Tensor, uniform: &Tensor, drawn: Tensor, is_last: bool) -> Self {
        let sums = weights.cumsum(1, Kind::Float);
        let n_tiles = weights.size()[1];
        let n_below =
            sums.le_tensor(&uniform.unsqueeze(1)).sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
        // Rounding may leave a little behind the last of all.
        let tile = if is_last { n_below.clamp_max(n_tiles - 1) } else { n_below };
        let is_here = uniform.ge(0.0).logical_and(&tile.lt(n_tiles));
        let of_tile =
            |x: &Tensor| x.gather(1, &tile.clamp_max(n_tiles - 1).unsqueeze(1), false).squeeze_dim(1);
        let (upto, weight) = (of_tile(&sums), of_tile(weights));
        let uniform = (uniform - (upto - &weight)) / weight;
        let tile = tile.where_scalarother(&is_here, -1);
        let is_one = n_tiles == 1 && is_last && bool::try_from(is_here.all()).unwrap_or(false);
        Self { tile, uniform, drawn, is_one }
    }

    /// Draws for the targets whose tile is `number`, with probabilities `p: [n, C]` and its first item at `first`.
    fn draw_from(&self, p: &Tensor, number: i64, first: i64) {
        let mut drawn = self.drawn.shallow_clone();
        if self.is_one {
            drawn.copy_(&(draw(p, &self.uniform) + first));
            return;
        }
        let targets = self.tile.eq(number).nonzero().squeeze_dim(1);
        if targets.numel() > 0 {
            let of = |x: &Tensor| x.index_select(0, &targets);
            let _ = drawn.index_copy_(0, &targets, &(draw(&of(p), &of(&self.uniform)) + first));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_cut_into_equal_parts_that_fit() {
        let cut = |sizes, max_logits| Cut::new(sizes, max_logits, Device::Cpu);
        assert_eq!(cut((100, 1000), 1 << 20), Cut { n_targets: 100, tile: 1000, keeps: true });
        // 167 fit: eight parts of 154 rather than seven of 167 and one of 59.
        assert_eq!(cut((1228, 100_000), 16 << 20), Cut { n_targets: 154, tile: 4096, keeps: true });
        // One fits: all at once, twice.
        assert_eq!(cut((1228, 10_000_000), 16 << 20), Cut { n_targets: 1228, tile: 4096, keeps: false });
        assert_eq!(cut((10_000, 10_000_000), 16 << 20), Cut { n_targets: 10_000, tile: 1677, keeps: false });
        // No room at all, and still something is done.
        assert_eq!(cut((10, 1000), 1), Cut { n_targets: 10, tile: 1, keeps: false });
        let on_gpu = Cut::new((1228, 100_000), 16 << 20, Device::Cuda(0));
        assert_eq!(on_gpu, Cut { n_targets: 154, tile: 100_000, keeps: true });
    }

    #[test]
    fn draws_follow_the_probabilities_whatever_the_tiles() {
        // Probabilities of six items for a target, in one tile or in three.
        let p = Tensor::from_slice(&[0.05f32, 0.15, 0.3, 0.1, 0.25, 0.15]).unsqueeze(0);
        let uniform: Vec<f32> = (0..1000).map(|i| (i as f32 + 0.5) / 1000.0).collect();
        let n = uniform.len() as i64;
        let uniform = Tensor::from_slice(&uniform);
        let count = |width: i64| {
            let sums: Vec<Tensor> =
                (0..6 / width).map(|t| p.narrow(1, t * width, width).sum(Kind::Float).view([1, 1])).collect();
            let weights = Tensor::cat(&sums, 1).expand([n, -1], false);
            let drawn = Tensor::zeros([n], (Kind::Int64, Device::Cpu));
            let draws = Draws::new(&weights, &uniform, drawn, true);
            for (t, sum) in (0..).zip(&sums) {
                let within = (p.narrow(1, t * width, width) / sum).expand([n, -1], false);
                draws.draw_from(&within, t, t * width);
            }
            Vec::<i64>::try_from(draws.drawn.bincount(None::<&Tensor>, 6)).unwrap()
        };
        for width in [6, 2] {
            let counts = count(width);
            let expected = [50, 150, 300, 100, 250, 150];
            assert!(counts.iter().zip(expected).all(|(a, b): (&i64, i64)| (a - b).abs() <= 1), "{counts:?}");
        }
    }
}
