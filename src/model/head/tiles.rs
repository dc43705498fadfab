//! The cross entropy over the whole catalogue, some targets and some items at a time.
//!
//! The catalogue is cut into tiles of items, few enough for their logits to stay in a CPU's caches. A first round takes the
//! softmax within each tile, `p_t`, and the logarithm of its sum, `l_t`; over the whole catalogue the probabilities of its
//! items are `w_t p_t` with `w_t = exp(l_t − logsumexp(l))`. So a second round needs no more than a weight for each target
//! and tile: it adds `p_tᵀ (w_t h)` to the table's gradient and `w_t (p_t E_t)` to the states'.
//!
//! Each thread of a CPU has tiles of its own, as ranks have rows of their own.
//!
//! Between the rounds the `p_t` are kept, of as many targets at a time as the memory for logits holds. Where that are so few
//! that the passes over the table would cost more than the arithmetic, all targets go at once, and the second round
//! computes `p_t` again: then memory does not depend on the size of the catalogue ("Cut Your Losses", Wijmans et al. 2024,
//! whose kernels do the same).

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::softmax::softmax_rows;
use super::{CrossEntropy, Logits, Scored, Share, draw};
use crate::collective::{Collective, CollectiveError, exact};
use crate::device::host::each_alone;
use crate::model::rows::add_rows;
use crate::model::share::{div_ceil, if_here};

/// Items of a tile on the CPU. A GPU does better with few large products.
const TILE: i64 = 4096;

/// Fewer items are not worth a thread.
const LEAST_ITEMS: i64 = 1024;

/// Tiles are whole multiples of so many items, as vectors of a CPU are.
const ALIGNED: i64 = 16;

/// Fewer targets at a time are not worth their passes over the table: an estimate from the rates of a CPU and its memory.
const LEAST_TARGETS: i64 = 32;

/// Memory for logits, kept from step to step, as to be given pages anew takes time.
#[derive(Default)]
pub struct Workspace(Option<Tensor>);

impl Workspace {
    /// Room for `n` numbers.
    fn room(&mut self, n: i64, of: (Kind, Device)) -> &Tensor {
        let is_fit = |room: &Tensor| room.size()[0] >= n && (room.kind(), room.device()) == of;
        let fits = self.0.take().filter(is_fit);
        self.0.insert(fits.unwrap_or_else(|| Tensor::empty([n], of)))
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
    /// What they are rounded to.
    kind: Kind,
}

impl Cut {
    fn new(
        (n_targets, n_items): (i64, i64),
        Logits { kind, most }: Logits,
        (device, n_threads): (Device, i64),
    ) -> Self {
        let tile = match device {
            // As many for each thread.
            Device::Cpu => {
                let n_threads = n_threads.min(n_items / LEAST_ITEMS).max(1);
                let n_tiles = div_ceil(div_ceil(n_items, TILE), n_threads) * n_threads;
                div_ceil(div_ceil(n_items, n_tiles), ALIGNED) * ALIGNED
            }
            _ => n_items,
        };
        let fit = most / n_items;
        if fit >= n_targets.min(LEAST_TARGETS) {
            // Into equal parts: a last one of few targets would be a pass over the table for little.
            let n_parts = div_ceil(n_targets, fit.min(n_targets));
            return Self { n_targets: div_ceil(n_targets, n_parts), tile, keeps: true, kind };
        }
        Self { n_targets, tile: tile.min(most / n_targets / n_threads).max(1), keeps: false, kind }
    }

    /// The same for any share: all targets at a time, and tiles that are bands.
    fn exact(n_targets: i64, share: &Share<'_>, Logits { kind, most }: Logits) -> Self {
        Self { n_targets, tile: share.band(), keeps: n_targets * share.most_rows() <= most, kind }
    }
}

/// See [`super::cross_entropy`].
pub(super) fn full(
    own_states: &Tensor,
    own_targets: &Tensor,
    scored: &mut Scored<'_>,
    (label_smoothing, logits): (f64, Logits),
    own_uniform: Option<&Tensor>,
    workspace: &mut Workspace,
) -> Result<CrossEntropy, CollectiveError> {
    let (share, counts) = (scored.share, scored.counts);
    let of_all = |own: &Tensor| share.gather_rows(own, counts);
    let (h, targets) = (of_all(own_states)?, of_all(own_targets)?);
    let uniform = own_uniform.map(of_all).transpose()?;
    let sums = StateGradients::new(&h, share.is_exact());
    let drawn = uniform.as_ref().map(|_| targets.zeros_like());
    let mean_row = match label_smoothing > 0.0 {
        true => Some(mean_row(scored.table, scored.bias, share)?),
        false => None,
    };
    let kept = 1.0 - label_smoothing;
    let (mut log_sums, mut wanted_logits) = (Vec::new(), Vec::new());
    for group in share.groups(counts) {
        let n_targets = group.end - group.start;
        let cut = match share.is_exact() {
            true => Cut::exact(n_targets, share, logits),
            false => Cut::new((n_targets, share.most_rows()), logits, (h.device(), n_threads(h.device()))),
        };
        for first in (group.start..group.end).step_by(cut.n_targets as usize) {
            let n = cut.n_targets.min(group.end - first);
            let of = |x: &Tensor| x.narrow(0, first, n);
            let draws = uniform.as_ref().zip(drawn.as_ref()).map(|(uniform, drawn)| (of(uniform), of(drawn)));
            log_sums.push(part(&of(&h), &mut sums.of(first, n), scored, cut, draws, workspace)?);
        }

        // What the targets themselves have of it, where their rows are.
        let of_group = |x: &Tensor| x.narrow(0, group.start, n_targets);
        let (h, (places, here)) = (of_group(&h), share.places(&of_group(&targets)));
        let Scored { table, bias, table_gradient, bias_gradient, .. } = scored;
        let here = here.as_ref();
        let wanted = if_here(table.index_select(0, &places), here);
        wanted_logits.push(
            (&h * &wanted).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
                + if_here(bias.index_select(0, &places), here),
        );
        let minus = if_here(h.new_full([n_targets], -kept, (Kind::Float, h.device())), here);
        add_rows(table_gradient, &places, &if_here(&h * -kept, here), share.is_exact());
        add_rows(bias_gradient, &places, &minus, share.is_exact());
        sums.of(group.start, n_targets).add(&(wanted * -kept));
        if label_smoothing > 0.0 {
            let each = label_smoothing / share.n_items as f64;
            *table_gradient -= column_sums(&h) * each;
            let _ = bias_gradient.g_sub_scalar_(each * n_targets as f64);
        }
        (scored.settle)();
    }

    let back = |of_all: Tensor| share.scatter_rows(&of_all, counts);
    let mut state_gradient = sums.back(back)?;
    let wanted_logits = back(Tensor::cat(&wanted_logits, 0))?;
    let log_sums = share.own_of(&Tensor::cat(&log_sums, 0), counts);
    let mut loss = log_sums.sum(Kind::Double) - wanted_logits.sum(Kind::Double) * kept;
    if let Some((row, bias)) = mean_row {
        // The mean logit is linear in the mean row.
        let mean = bias * own_states.size()[0] as f64 + (&row * column_sums(own_states)).sum(Kind::Float);
        loss -= mean.to_kind(Kind::Double) * label_smoothing;
        state_gradient -= row * label_smoothing;
    }
    let drawn = drawn.map(back).transpose()?;
    Ok(CrossEntropy { loss, state_gradient, drawn })
}

/// Gradients of states `[N, D]` to which every tile and every rank adds.
struct StateGradients(Tensor);

impl StateGradients {
    fn new(h: &Tensor, is_exact: bool) -> Self {
        Self(if is_exact { h.zeros_like().to_kind(Kind::Int64) } else { h.zeros_like() })
    }

    /// Those of `n` targets from `first` on.
    fn of(&self, first: i64, n: i64) -> Self {
        Self(self.0.narrow(0, first, n))
    }

    fn add(&mut self, part: &Tensor) {
        match self.0.kind() {
            Kind::Int64 => self.0 += exact::multiples(part),
            _ => self.0 += part,
        }
    }

    /// Adds what others of the same kind have added up.
    fn add_sums(&mut self, sums: Tensor) {
        self.0 += sums;
    }

    /// *All ranks.* This rank's, added up over ranks by `back`.
    fn back(
        self,
        back: impl FnOnce(Tensor) -> Result<Tensor, CollectiveError>,
    ) -> Result<Tensor, CollectiveError> {
        let own = back(self.0)?;
        Ok(if own.kind() == Kind::Int64 { exact::from_multiples(&own) } else { own })
    }
}

/// *All ranks.* The mean of all rows of the catalogue, `[D]`, and that of its biases, `[]`.
fn mean_row(table: &Tensor, bias: &Tensor, share: &Share<'_>) -> Result<(Tensor, Tensor), CollectiveError> {
    let sums = |rows: Range<i64>| {
        let of = |x: &Tensor| x.narrow(0, rows.start, rows.end - rows.start);
        Tensor::cat(&[column_sums(&of(table)), of(bias).sum(Kind::Float).view([1])], 0).unsqueeze(0)
    };
    // Band by band, lest it matter which rank adds what.
    let band = if share.is_exact() { share.band() } else { share.most_rows() };
    let by_tile: Vec<Tensor> = tiles(share.len(), band).into_iter().map(sums).collect();
    let by_tile = share.gather_rows(&Tensor::cat(&by_tile, 0), &share.n_tiles_by_rank(band))?;
    let means = column_sums(&by_tile) / share.n_items as f64;
    let width = table.size()[1];
    Ok((means.narrow(0, 0, width), means.get(width)))
}

/// `n_items` cut into tiles.
fn tiles(n_items: i64, tile: i64) -> Vec<Range<i64>> {
    (0..n_items).step_by(tile as usize).map(|start| start..(start + tile).min(n_items)).collect()
}

/// `[N, D]` → `[D]`.
fn column_sums(x: &Tensor) -> Tensor {
    x.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
}

/// Threads that take tiles: a GPU has its own.
fn n_threads(device: Device) -> i64 {
    if device == Device::Cpu { i64::from(tch::get_num_threads().max(1)) } else { 1 }
}

/// *All ranks* of the share. `logsumexp(z)` of each target, `[n]`; its gradients are added to those of `scored` and to
/// `state_gradients: [n, D]`, as far as the rows that are here have a part in them. Items are drawn as `(uniform, drawn)`, both
/// `[n]`, say.
fn part(
    h: &Tensor,
    state_gradients: &mut StateGradients,
    scored: &mut Scored<'_>,
    cut: Cut,
    draws: Option<(Tensor, Tensor)>,
    workspace: &mut Workspace,
) -> Result<Tensor, CollectiveError> {
    let share = scored.share;
    let lanes = Lane::cut(h, scored, cut, workspace);
    let logs = each_alone(lanes, |lane| (tch::no_grad(|| lane.logs()), lane));
    let (logs, lanes): (Vec<Tensor>, Vec<Lane>) = logs.into_iter().unzip();
    let logs = Tensor::cat(&logs, 0);
    // Of all ranks: tile by tile where it matters which there are, else their sum alone, as they may be many.
    let weights = |logs: &Tensor, log_sums: &Tensor| (logs - log_sums).exp().tr().contiguous();
    let (log_sums, draws) = if share.is_exact() || draws.is_some() {
        // Ranks of more threads may have cut theirs into more.
        let n_tiles = share.counts(logs.size()[0])?;
        let all_logs = share.gather_rows(&logs, &n_tiles)?;
        let log_sums = sum_of_logs(&all_logs);
        let first = n_tiles[..share.company().map_or(0, Collective::rank)].iter().sum();
        let of = |(uniform, drawn)| Draws::new(&weights(&all_logs, &log_sums), &uniform, drawn, first);
        let draws = draws.map(of);
        (log_sums, draws)
    } else {
        (share.sum_of_logs(sum_of_logs(&logs))?, None)
    };
    let weights = weights(&logs, &log_sums);
    let (mut first_tile, mut work) = (0, Vec::with_capacity(lanes.len()));
    for lane in lanes {
        let n_tiles = lane.tiles.len() as i64;
        let of_lane = weights.narrow(1, first_tile, n_tiles);
        work.push((lane, of_lane, first_tile, draws.as_ref().map(Draws::share)));
        first_tile += n_tiles;
    }
    let first_row = share.rows.start;
    let sums = each_alone(work, |(mut lane, weights, first_tile, draws)| {
        let draws = draws.as_ref().map(|draws| (draws, first_tile, first_row));
        tch::no_grad(|| lane.gradients(&weights, draws))
    });
    sums.into_iter().for_each(|sum| state_gradients.add_sums(sum));
    Ok(log_sums)
}

/// Tiles of the rows that are here, one after the other, for one thread.
struct Lane {
    /// In the share.
    first_row: i64,
    /// Counted from there.
    tiles: Vec<Range<i64>>,
    keeps: bool,
    is_exact: bool,
    /// `[n, D]`, f32.
    h: Tensor,
    /// The same, as it is multiplied with the table.
    factors: Tensor,
    /// Of the lane's rows, as are these.
    table: Tensor,
    bias: Tensor,
    table_gradient: Tensor,
    bias_gradient: Tensor,
    /// For logits.
    room: Tensor,
}

impl Lane {
    /// One for each thread, with as many tiles, as far as there are.
    fn cut(h: &Tensor, scored: &Scored<'_>, cut: Cut, workspace: &mut Workspace) -> Vec<Self> {
        let (n, n_items) = (h.size()[0], scored.table.size()[0]);
        let factors = h.to_kind(cut.kind);
        let n_tiles = div_ceil(n_items, cut.tile);
        let tiles_each = div_ceil(n_tiles, n_threads(h.device()));
        let rows_each = tiles_each * cut.tile;
        let n_lanes = div_ceil(n_items, rows_each);
        let n_logits = n * if cut.keeps { n_items } else { cut.tile * n_lanes };
        let room = workspace.room(n_logits, (cut.kind, h.device()));
        let lane = |number: i64| {
            let first_row = number * rows_each;
            let n_rows = rows_each.min(n_items - first_row);
            let (start, size) = match cut.keeps {
                true => (n * first_row, n * n_rows),
                false => (n * cut.tile * number, n * cut.tile),
            };
            let rows = |x: &Tensor| x.narrow(0, first_row, n_rows);
            Self {
                first_row,
                tiles: tiles(n_rows, cut.tile),
                keeps: cut.keeps,
                is_exact: scored.share.is_exact(),
                h: h.shallow_clone(),
                factors: factors.shallow_clone(),
                table: rows(scored.table),
                bias: rows(scored.bias),
                table_gradient: rows(&scored.table_gradient),
                bias_gradient: rows(&scored.bias_gradient),
                room: room.narrow(0, start, size),
            }
        };
        (0..n_lanes).map(lane).collect()
    }

    /// The first round: `l_t` of every tile, `[tiles, n]`.
    fn logs(&self) -> Tensor {
        Tensor::cat(&self.tiles.iter().map(|tile| self.softmax(tile)).collect::<Vec<_>>(), 0)
    }

    /// `p_t` into its place, and `l_t: [1, n]`. The softmax has `exp(0)` over its sum where the largest logit is.
    fn softmax(&self, tile: &Range<i64>) -> Tensor {
        let mut p = self.probabilities(tile);
        let bias = rows(&self.bias, tile);
        if (p.device(), p.kind()) == (Device::Cpu, Kind::Float) {
            let _ = self.factors.mm_out(&p, &self.vectors(tile).tr());
            return softmax_rows(&mut p, &bias).unsqueeze(0);
        }
        let _ = bias.to_kind(p.kind()).addmm_out(&p, &self.factors, &self.vectors(tile).tr());
        let largest = || p.amax([1i64].as_slice(), false).to_kind(Kind::Float);
        let largest_logit = largest();
        let _ = p.softmax_int_out(&p, 1, None);
        (largest_logit - largest().log()).unsqueeze(0)
    }

    /// The vectors of a tile's items, as they are multiplied: `[C, D]`.
    fn vectors(&self, tile: &Range<i64>) -> Tensor {
        rows(&self.table, tile).to_kind(self.factors.kind())
    }

    /// The second round, with `w_t: [n, tiles]`: adds to the gradients of the lane's rows and returns what it adds to those of
    /// the states. Draws come with the number of the first tile, and the first row of the share.
    fn gradients(&mut self, weights: &Tensor, draws: Option<(&Draws, i64, i64)>) -> Tensor {
        let mut sums = StateGradients::new(&self.h, self.is_exact);
        for (number, tile) in (0..).zip(&self.tiles) {
            if !self.keeps {
                let _ = self.softmax(tile);
            }
            let p = self.probabilities(tile);
            // In memory of its own: where numbers lie may change how MKL adds them up.
            let weight = weights.narrow(1, number, 1).copy();
            if let Some((draws, first_tile, first_row)) = draws {
                draws.draw_from(&p, first_tile + number, first_row + self.first_row + tile.start);
            }
            let weighed = &self.h * &weight;
            let (mut of_table, mut of_bias) =
                (rows(&self.table_gradient, tile), rows(&self.bias_gradient, tile));
            if p.kind() == Kind::Float {
                let _ = of_table.addmm_(&p.tr(), &weighed);
                let _ = of_bias.addmv_(&p.tr(), &weight.squeeze_dim(1));
            } else {
                let with_one = Tensor::cat(&[&weighed, &weight], 1).to_kind(p.kind());
                let products = p.tr().matmul(&with_one);
                of_table += products.narrow(1, 0, weighed.size()[1]);
                of_bias += products.select(1, weighed.size()[1]);
            }
            sums.add(&(p.matmul(&self.vectors(tile)) * weight));
        }
        sums.0
    }

    /// Where the probabilities `[n, C]` of a tile lie.
    fn probabilities(&self, tile: &Range<i64>) -> Tensor {
        let (n, width) = (self.h.size()[0], tile.end - tile.start);
        self.room.narrow(0, if self.keeps { n * tile.start } else { 0 }, n * width).view([n, width])
    }
}

/// A tile of `x: [V, ..]`.
fn rows(x: &Tensor, tile: &Range<i64>) -> Tensor {
    x.narrow(0, tile.start, tile.end - tile.start)
}

/// The logarithm of the sum of what logarithms `[M, n]` are of: `[n]`.
fn sum_of_logs(logs: &Tensor) -> Tensor {
    match logs.size()[0] {
        // For a GPU, most often: to find that out would take as long as all the rest.
        1 => logs.squeeze_dim(0),
        _ => logs.logsumexp([0i64].as_slice(), false),
    }
}

/// Items drawn by the probabilities of the whole catalogue: first a tile by its weight, then an item of it.
struct Draws {
    /// The tile of each target, counted from the first that is here: i64 `[n]`.
    tile: Tensor,
    /// What is left of its uniform number there: `[n]`.
    uniform: Tensor,
    /// i64 `[n]`, zero where another rank draws.
    drawn: Tensor,
    /// Whether there is one tile in all.
    is_one: bool,
}

impl Draws {
    /// For the weights `[n, tiles]` of the tiles of all ranks, of which number `first` is the first that is here.
    fn new(weights: &Tensor, uniform: &Tensor, drawn: Tensor, first: i64) -> Self {
        let tile = draw(weights, uniform);
        let of_tile = |x: &Tensor| x.gather(1, &tile.unsqueeze(1), false).squeeze_dim(1);
        let (upto, weight) = (of_tile(&weights.cumsum(1, Kind::Float)), of_tile(weights));
        let uniform = (uniform - (upto - &weight)) / weight;
        Self { tile: tile - first, uniform, drawn, is_one: weights.size()[1] == 1 }
    }

    /// The same, for another thread.
    fn share(&self) -> Self {
        let [tile, uniform, drawn] = [&self.tile, &self.uniform, &self.drawn].map(Tensor::shallow_clone);
        Self { tile, uniform, drawn, is_one: self.is_one }
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
        let kind = Kind::Float;
        let cut = |sizes, most| Cut::new(sizes, Logits { kind, most }, (Device::Cpu, 1));
        assert_eq!(cut((100, 1000), 1 << 20), Cut { n_targets: 100, tile: 1008, keeps: true, kind });
        // 167 fit: eight parts of 154 rather than seven of 167 and one of 59.
        assert_eq!(cut((1228, 100_000), 16 << 20), Cut { n_targets: 154, tile: 4000, keeps: true, kind });
        // One fits: all at once, twice.
        assert_eq!(
            cut((1228, 10_000_000), 16 << 20),
            Cut { n_targets: 1228, tile: 4096, keeps: false, kind }
        );
        assert_eq!(
            cut((10_000, 10_000_000), 16 << 20),
            Cut { n_targets: 10_000, tile: 1677, keeps: false, kind }
        );
        // Each of three threads has as many tiles, and its own room.
        let on_three = |sizes, most| Cut::new(sizes, Logits { kind, most }, (Device::Cpu, 3));
        assert_eq!(on_three((100, 10_000), 1 << 20).tile, 3344);
        assert_eq!(on_three((10_000, 10_000_000), 16 << 20).tile, 559);
        // No room at all, and still something is done.
        assert_eq!(cut((10, 1000), 1), Cut { n_targets: 10, tile: 1, keeps: false, kind });
        let on_gpu = Cut::new((1228, 100_000), Logits { kind, most: 16 << 20 }, (Device::Cuda(0), 1));
        assert_eq!(on_gpu, Cut { n_targets: 154, tile: 100_000, keeps: true, kind });
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
            let draws = Draws::new(&weights, &uniform, drawn, 0);
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
