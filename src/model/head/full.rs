//! The softmax cross entropy over the whole catalogue, some targets and some items at a time.
//!
//! The catalogue is cut into chunks of items, small enough for their logits to stay in a CPU's
//! caches. A first pass computes the softmax within each chunk, `p_c`, and the logarithm of its
//! sum, `l_c`; over the whole catalogue the probabilities of its items are `w_c p_c` with `w_c =
//! exp(l_c − logsumexp(l))`. The second pass therefore needs one weight for each target and chunk:
//! it adds `p_cᵀ (w_c h)` to the table's gradient and `w_c (p_c E_c)` to the states'.
//!
//! Each thread of a CPU works on different chunks, as each rank of a sharded table works on
//! different rows.
//!
//! The `p_c` are kept between the passes for as many targets at a time as the memory for logits
//! holds. If these are so few that reading the table costs more than the arithmetic, all targets go
//! at once and the second pass computes `p_c` again: memory then does not depend on the size of the
//! catalogue ("Cut Your Losses", Wijmans et al. 2024, whose kernels do the same).

use std::ops::Range;

use bireme_kernels::fixed_point;
use bireme_kernels::parallel::torch_in_parallel;
use bireme_kernels::softmax::softmax_rows;
use tch::{Device, Kind, Tensor};

use super::{CrossEntropy, Logits, ScoringTable, Targets, draw};
use crate::collective::{Collective, CollectiveError};
use crate::model::item_table::div_ceil;
use crate::model::{Encoded, ItemTable, SparseScores, clear};

/// Items of a chunk on the CPU. A GPU is faster with few large products.
const CHUNK_ITEMS: i64 = 4096;

/// Fewer items do not occupy a thread.
const MIN_ITEMS_PER_THREAD: i64 = 1024;

/// Chunks are multiples of this many items, the width of a CPU's vectors.
const CHUNK_MULTIPLE: i64 = 16;

/// With fewer targets at a time the passes over the table cost more than the arithmetic: an
/// estimate from the rates of a CPU and its memory.
const MIN_TARGETS: i64 = 32;

/// Memory for logits, kept from step to step because the system zeroes new pages.
#[derive(Default)]
pub struct Workspace(Option<Tensor>);

impl Workspace {
    /// At least `n` numbers.
    pub(super) fn room(&mut self, n: i64, kind: Kind, device: Device) -> &Tensor {
        let fits =
            |room: &Tensor| room.size()[0] >= n && (room.kind(), room.device()) == (kind, device);
        let kept = self.0.take().filter(fits);
        self.0.insert(kept.unwrap_or_else(|| Tensor::empty([n], (kind, device))))
    }
}

/// How the `[N, V]` logits are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Blocking {
    /// Targets at a time.
    n_targets: i64,
    /// Items of a chunk.
    chunk_items: i64,
    /// Whether the probabilities of the first pass are kept for the second.
    keeps_probabilities: bool,
    /// Type of logits and probabilities.
    kind: Kind,
}

impl Blocking {
    /// `n_items`: of the largest shard.
    fn new(n_targets: i64, n_items: i64, logits: Logits, device: Device, n_threads: i64) -> Self {
        let Logits { kind, most } = logits;
        let chunk_items = if device == Device::Cpu {
            // Every thread gets as many chunks as the others.
            let n_threads = n_threads.min(n_items / MIN_ITEMS_PER_THREAD).max(1);
            let n_chunks = div_ceil(div_ceil(n_items, CHUNK_ITEMS), n_threads) * n_threads;
            div_ceil(div_ceil(n_items, n_chunks), CHUNK_MULTIPLE) * CHUNK_MULTIPLE
        } else {
            n_items
        };
        let fitting = most / n_items;
        if fitting >= n_targets.min(MIN_TARGETS) {
            // Equal parts: a small last part would read the whole table for few targets.
            let n_parts = div_ceil(n_targets, fitting.min(n_targets));
            let n_targets = div_ceil(n_targets, n_parts);
            return Self { n_targets, chunk_items, keeps_probabilities: true, kind };
        }
        let chunk_items = chunk_items.min(most / n_targets / n_threads).max(1);
        Self { n_targets, chunk_items, keeps_probabilities: false, kind }
    }

    /// The same blocking for any number of ranks: all targets at a time, a chunk for each row
    /// block.
    fn reproducible(n_targets: i64, item_table: &ItemTable<'_>, logits: Logits) -> Self {
        let Logits { kind, most } = logits;
        let keeps_probabilities = n_targets * item_table.max_rows() <= most;
        Self { n_targets, chunk_items: item_table.block_rows(), keeps_probabilities, kind }
    }
}

/// The loss over the whole catalogue.
pub(super) struct FullSoftmax<'a> {
    pub label_smoothing: f64,
    pub logits: Logits,
    pub workspace: &'a mut Workspace,
}

impl FullSoftmax<'_> {
    /// *All ranks*, if the table is sharded. See [`super::cross_entropy`].
    pub fn loss(
        mut self,
        own: &Encoded,
        targets: &Targets,
        scored: &mut ScoringTable<'_>,
    ) -> Result<CrossEntropy, CollectiveError> {
        let Targets { items: own_targets, uniform: own_uniform, weights: own_weights, .. } =
            targets;
        let Encoded { vectors: own_states, sparse: own_sparse } = own;
        let (item_table, counts) = (scored.item_table, scored.counts);
        let gather = |own: &Tensor| item_table.gather_rows(own, counts);
        let (states, targets) = (gather(own_states)?, gather(own_targets)?);
        let uniform = own_uniform.as_ref().map(gather).transpose()?;
        let weights = own_weights.as_ref().map(gather).transpose()?;
        let smoothing = self.label_smoothing / item_table.n_items as f64;
        let sparse = own_sparse.as_ref().map(|own| {
            let scores = gather(&own.scores)?;
            let gradients = scores.zeros_like();
            let scores = SparseScores { items: gather(&own.items)?, scores };
            let smoothing = (smoothing > 0.0).then(|| {
                let each =
                    Tensor::full([states.size()[0], 1], smoothing, (Kind::Float, states.device()));
                weighted(each, weights.as_ref())
            });
            Ok::<_, CollectiveError>(SparseTerms { scores, gradients, smoothing })
        });
        let sparse = sparse.transpose()?;
        let drawn = uniform.as_ref().map(|_| targets.zeros_like());
        let state_gradients = StateGradients::new(&states, item_table.is_reproducible());
        let mean_row = if self.label_smoothing > 0.0 { Some(mean_row(scored)?) } else { None };

        let (mut log_sums, mut target_logits) = (Vec::new(), Vec::new());
        let mut replaced_logits = Vec::new();
        for group in item_table.target_groups(counts) {
            let of_group = |x: &Tensor| x.narrow(0, group.start, group.end - group.start);
            let group = TargetGroup {
                states: of_group(&states),
                targets: of_group(&targets),
                state_gradients: state_gradients.rows(group.start, group.end - group.start),
                sparse: sparse.as_ref().map(|sparse| sparse.rows(&group)),
                weights: weights.as_ref().map(of_group),
                draws: uniform
                    .as_ref()
                    .zip(drawn.as_ref())
                    .map(|(u, d)| (of_group(u), of_group(d))),
            };
            self.add_softmax(&group, scored, &mut log_sums)?;
            target_logits.push(self.subtract_targets(&group, scored));
            if let Some(sparse) = group.sparse.as_ref().filter(|_| smoothing > 0.0) {
                replaced_logits.push(sparse.replaced_logits(&group.states, scored));
            }
            (scored.group_added)();
        }

        let reduce_scatter = |all: &Tensor| item_table.reduce_scatter_rows(all, counts);
        let mut state_gradient = state_gradients.finish(reduce_scatter)?;
        let target_logits = reduce_scatter(&Tensor::cat(&target_logits, 0))?;
        let log_sums = item_table.local_rows_of(&Tensor::cat(&log_sums, 0), counts);
        let on_target = 1.0 - self.label_smoothing;
        let log_sums = weighted(log_sums, own_weights.as_ref());
        let mut loss = log_sums.sum(Kind::Double) - target_logits.sum(Kind::Double) * on_target;
        if let Some((row, bias)) = mean_row {
            // The mean logit over the catalogue is the product with the mean row.
            let own_states = weighted(own_states.shallow_clone(), own_weights.as_ref());
            let mean = bias * sum_of_weights(&own_states, own_weights.as_ref())
                + (&row * column_sums(&own_states)).sum(Kind::Float);
            loss -= mean.to_kind(Kind::Double) * self.label_smoothing;
            let of_rows = (row * self.label_smoothing).expand_as(&state_gradient);
            state_gradient -= weighted(of_rows, own_weights.as_ref());
            if sparse.is_some() {
                let replaced = reduce_scatter(&Tensor::cat(&replaced_logits, 0))?;
                let replaced = weighted(replaced, own_weights.as_ref());
                loss += replaced.sum(Kind::Double) * smoothing;
            }
        }
        let drawn = drawn.as_ref().map(reduce_scatter).transpose()?;
        let mut sparse_gradient =
            sparse.map(|sparse| reduce_scatter(&sparse.gradients)).transpose()?;
        if let (Some(sparse), Some(gradient)) = (own_sparse, &mut sparse_gradient) {
            let is_target = weighted(sparse.is_target(own_targets), own_weights.as_ref());
            let of_target = (&sparse.scores * &is_target).sum(Kind::Double);
            loss -= of_target * on_target;
            *gradient -= is_target * on_target;
            if smoothing > 0.0 {
                let is_item = sparse.items.gt(0).to_kind(Kind::Float);
                let is_item = weighted(is_item, own_weights.as_ref());
                loss -= (&sparse.scores * &is_item).sum(Kind::Double) * smoothing;
                *gradient -= is_item * smoothing;
            }
        }
        Ok(CrossEntropy { loss, state_gradient, sparse_gradient, drawn })
    }

    /// *All ranks*, if the table is sharded. Adds the gradients of `logsumexp(z)` of a group, and
    /// appends `logsumexp(z)` of its targets to `log_sums`.
    fn add_softmax(
        &mut self,
        group: &TargetGroup,
        scored: &mut ScoringTable<'_>,
        log_sums: &mut Vec<Tensor>,
    ) -> Result<(), CollectiveError> {
        let (n_targets, device) = (group.states.size()[0], group.states.device());
        let item_table = scored.item_table;
        let blocking = if item_table.is_reproducible() {
            Blocking::reproducible(n_targets, item_table, self.logits)
        } else {
            Blocking::new(n_targets, item_table.max_rows(), self.logits, device, n_threads(device))
        };
        for first in (0..n_targets).step_by(blocking.n_targets as usize) {
            let part = group.rows(first, blocking.n_targets.min(n_targets - first));
            log_sums.push(softmax_gradients(part, scored, blocking, self.workspace)?);
        }
        Ok(())
    }

    /// Adds the gradients of `−z[target]`, and of the mean logit under label smoothing, for the
    /// local rows. Returns `z[target]`, zero where another rank holds the target: `[n]`.
    fn subtract_targets(&self, group: &TargetGroup, scored: &mut ScoringTable<'_>) -> Tensor {
        let states = &group.states;
        let n_targets = states.size()[0];
        // The score of a target among the sparse ones is not that of its vector.
        let mut on_target = states.new_ones([n_targets], (Kind::Float, states.device()));
        if let Some(sparse) = &group.sparse {
            let is_sparse = sparse.scores.is_target(&group.targets);
            on_target -= is_sparse.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        }
        let located = scored.item_table.locate(&group.targets);
        let vectors = located.mask(scored.weights.index_select(0, &located.rows));
        let logits = (states * &vectors).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
            + located.mask(scored.bias.index_select(0, &located.rows));
        let on_target = weighted(on_target, group.weights.as_ref());
        let logits = logits * &on_target;
        let by_logit = on_target * -(1.0 - self.label_smoothing);
        let of_bias = located.mask(by_logit.shallow_clone());
        let by_logit = by_logit.unsqueeze(1);
        let of_weights = located.mask(states * &by_logit);
        scored.add_weight_and_bias(&located.rows, &of_weights, &of_bias);
        group.state_gradients.add(&(vectors * by_logit));
        if self.label_smoothing > 0.0 {
            let each = self.label_smoothing / scored.item_table.n_items as f64;
            let weighted_states = weighted(states.shallow_clone(), group.weights.as_ref());
            scored.weight_gradient -= column_sums(&weighted_states) * each;
            scored.bias_gradient -= sum_of_weights(states, group.weights.as_ref()) * each;
        }
        logits
    }
}

/// Targets whose gradients are added together.
struct TargetGroup {
    /// `[n, D]`.
    states: Tensor,
    /// `[n]`.
    targets: Tensor,
    state_gradients: StateGradients,
    sparse: Option<SparseTerms>,
    /// Factors of the losses, f32 `[n]`; `None` if all are 1.
    weights: Option<Tensor>,
    /// Uniform numbers, `[n]`, and the items that are drawn by them, `[n]`.
    draws: Option<(Tensor, Tensor)>,
}

/// `x: [n, ..]` with rows multiplied by `weights: [n]`, if any.
fn weighted(x: Tensor, weights: Option<&Tensor>) -> Tensor {
    match weights {
        Some(weights) if x.dim() > 1 => x * weights.unsqueeze(1),
        Some(weights) => x * weights,
        None => x,
    }
}

/// The sum of the weights of the rows of `x: [n, ..]`: `[]`.
fn sum_of_weights(x: &Tensor, weights: Option<&Tensor>) -> Tensor {
    let n = x.size()[0] as f64;
    match weights {
        Some(weights) => weights.sum(Kind::Float),
        None => Tensor::full([], n, (Kind::Float, x.device())),
    }
}

impl TargetGroup {
    /// The `n` targets from number `first` on.
    fn rows(&self, first: i64, n: i64) -> Self {
        let of_part = |x: &Tensor| x.narrow(0, first, n);
        Self {
            states: of_part(&self.states),
            targets: of_part(&self.targets),
            state_gradients: self.state_gradients.rows(first, n),
            sparse: self.sparse.as_ref().map(|sparse| sparse.rows(&(first..first + n))),
            weights: self.weights.as_ref().map(of_part),
            draws: self.draws.as_ref().map(|(uniform, drawn)| (of_part(uniform), of_part(drawn))),
        }
    }
}

/// Sparse scores of targets, and their gradients.
struct SparseTerms {
    /// `[n, E]`.
    scores: SparseScores,
    /// `[n, E]`, to which the chunk with the item adds. One rank has that chunk, so that the sum
    /// over ranks is exact.
    gradients: Tensor,
    /// Probability of an item by label smoothing, times the weight of the target: `[n, 1]`.
    smoothing: Option<Tensor>,
}

/// Targets whose candidates' vectors are in memory at once.
const BLOCK: i64 = 64;

/// Smallest weight of a chunk that probabilities are divided by.
const MIN_WEIGHT: f64 = 1e-30;

impl SparseTerms {
    /// Views of the targets `rows`.
    fn rows(&self, rows: &Range<i64>) -> Self {
        let of_rows = |x: &Tensor| x.narrow(0, rows.start, rows.end - rows.start);
        let SparseScores { items, scores } = &self.scores;
        let scores = SparseScores { items: of_rows(items), scores: of_rows(scores) };
        let smoothing = self.smoothing.as_ref().map(of_rows);
        Self { scores, gradients: of_rows(&self.gradients), smoothing }
    }

    /// Moves the probabilities `p: [n, C]` of the sparse items among `items`, times `weight:
    /// [n, 1]`, to `gradients: [n, E]`: those of the logits of their vectors are zero.
    fn move_gradients(&self, gradients: &Tensor, p: &Tensor, weight: &Tensor, items: &Range<i64>) {
        let (is_inside, column) = self.scores.columns(items);
        let is_inside = is_inside.to_kind(Kind::Float);
        let of_items = p.gather(1, &column, false).to_kind(Kind::Float) * weight;
        let _ = gradients.shallow_clone().g_add_(&(of_items * &is_inside));
        clear(p, &column, &is_inside);
        if let Some(smoothing) = &self.smoothing {
            // What label smoothing subtracts from the gradients of all rows is added to these.
            let each = is_inside / weight.clamp_min(MIN_WEIGHT) * smoothing;
            let _ = p.shallow_clone().scatter_add_(1, &column, &each.to_kind(p.kind()));
        }
    }

    /// Sums of the logits that the sparse scores replace, of the local rows: `[n]`.
    fn replaced_logits(&self, states: &Tensor, scored: &ScoringTable<'_>) -> Tensor {
        // Some targets at a time: `[n, E, D]` may be large.
        let (states, items) = (states.split(BLOCK, 0), self.scores.items.split(BLOCK, 0));
        let sums = states.iter().zip(&items).map(|(states, items)| {
            let located = scored.item_table.locate(&items.reshape([-1]));
            let of_rows = |x: &Tensor| located.mask(x.index_select(0, &located.rows));
            let (n, n_each) = items.size2().expect("sparse scores are [n, E]");
            let vectors = of_rows(&scored.weights).view([n, n_each, -1]);
            let logits = vectors.matmul(&states.unsqueeze(2)).squeeze_dim(2)
                + of_rows(&scored.bias).view([n, n_each]);
            let is_item = items.gt(0).to_kind(Kind::Float);
            (logits * is_item).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
        });
        Tensor::cat(&sums.collect::<Vec<_>>(), 0)
    }
}

/// Gradients of states `[N, D]`, to which every chunk and every rank adds: f32, or fixed point in
/// i64 if sums are reproducible.
struct StateGradients(Tensor);

impl StateGradients {
    fn new(states: &Tensor, is_reproducible: bool) -> Self {
        let zeros = states.zeros_like();
        Self(if is_reproducible { zeros.to_kind(Kind::Int64) } else { zeros })
    }

    /// A view of the gradients of `n` states from number `first` on.
    fn rows(&self, first: i64, n: i64) -> Self {
        Self(self.0.narrow(0, first, n))
    }

    fn add(&self, terms: &Tensor) {
        let mut sums = self.0.shallow_clone();
        if sums.kind() == Kind::Int64 {
            sums += fixed_point::to_fixed_point(terms);
        } else {
            sums += terms;
        }
    }

    /// Adds sums of the same type.
    fn add_sums(&self, sums: &Self) {
        let _ = self.0.shallow_clone().g_add_(&sums.0);
    }

    /// *All ranks*, if the table is sharded. Sums over ranks by `reduce_scatter`: f32 `[n, D]`.
    fn finish(
        self,
        reduce_scatter: impl FnOnce(&Tensor) -> Result<Tensor, CollectiveError>,
    ) -> Result<Tensor, CollectiveError> {
        let own = reduce_scatter(&self.0)?;
        Ok(if own.kind() == Kind::Int64 { fixed_point::from_fixed_point(&own) } else { own })
    }
}

/// *All ranks*, if the table is sharded. The mean row of the catalogue, `[D]`, and its mean bias,
/// `[]`.
fn mean_row(scored: &ScoringTable<'_>) -> Result<(Tensor, Tensor), CollectiveError> {
    let (weights, bias, item_table) = (&scored.weights, &scored.bias, scored.item_table);
    let sums = |items: Range<i64>| {
        let bias = rows(bias, &items).sum(Kind::Float).view([1]);
        Tensor::cat(&[column_sums(&rows(weights, &items)), bias], 0).unsqueeze(0)
    };
    // Sums per row block do not depend on the number of ranks.
    let chunk_rows = item_table.chunk_rows(item_table.max_rows());
    let by_chunk: Vec<Tensor> =
        chunks(item_table.len(), chunk_rows).into_iter().map(sums).collect();
    let counts = item_table.n_chunks_by_rank(chunk_rows);
    let by_chunk = item_table.gather_rows(&Tensor::cat(&by_chunk, 0), &counts)?;
    let means = column_sums(&by_chunk) / item_table.n_items as f64;
    let width = weights.size()[1];
    Ok((means.narrow(0, 0, width), means.get(width)))
}

/// `n_items` cut into chunks.
fn chunks(n_items: i64, chunk_items: i64) -> Vec<Range<i64>> {
    (0..n_items)
        .step_by(chunk_items as usize)
        .map(|start| start..(start + chunk_items).min(n_items))
        .collect()
}

/// `[N, D]` → `[D]`.
fn column_sums(x: &Tensor) -> Tensor {
    x.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
}

/// Threads that chunks are divided over; operations on a GPU are parallel by themselves.
fn n_threads(device: Device) -> i64 {
    if device == Device::Cpu { i64::from(tch::get_num_threads().max(1)) } else { 1 }
}

/// *All ranks*, if the table is sharded. Adds the gradients of `logsumexp(z)` by the local rows and
/// by the states; returns `logsumexp(z)` of each target, `[n]`.
fn softmax_gradients(
    part: TargetGroup,
    scored: &ScoringTable<'_>,
    blocking: Blocking,
    workspace: &mut Workspace,
) -> Result<Tensor, CollectiveError> {
    let item_table = scored.item_table;
    let workers = Worker::split(&part, scored, blocking, workspace);
    let first_pass =
        torch_in_parallel(workers, |worker| (tch::no_grad(|| worker.log_sums()), worker));
    let (logs, workers): (Vec<Tensor>, Vec<Worker>) = first_pass.into_iter().unzip();
    let logs = Tensor::cat(&logs, 0);

    // `w_c`: `[n, chunks]`.
    let weights = |logs: &Tensor, log_sums: &Tensor| (logs - log_sums).exp().tr().contiguous();
    let (log_sums, draws) = if item_table.is_reproducible() || part.draws.is_some() {
        // Chunk by chunk: the order of the sum, or the chunk that an item is drawn from, matters.
        // Ranks may have different numbers of chunks, as they may have different numbers of
        // threads.
        let counts = if item_table.is_reproducible() {
            item_table.n_chunks_by_rank(blocking.chunk_items)
        } else {
            item_table.gather_counts(logs.size()[0], false)?
        };
        let all_logs = item_table.gather_rows(&logs, &counts)?;
        let log_sums = log_sum_exp(&all_logs);
        let first_chunk = counts[..item_table.ranks().map_or(0, Collective::rank)].iter().sum();
        let draws = part.draws.map(|(uniform, drawn)| {
            Draws::new(&weights(&all_logs, &log_sums), &uniform, drawn, first_chunk)
        });
        (log_sums, draws)
    } else {
        (item_table.log_sum_exp(log_sum_exp(&logs))?, None)
    };

    let weights = weights(&logs, &log_sums);
    let weights = weighted(weights, part.weights.as_ref());
    let (mut first_chunk, mut work) = (0, Vec::with_capacity(workers.len()));
    for worker in workers {
        let n_chunks = worker.chunks.len() as i64;
        let draws = draws.as_ref().map(|draws| WorkerDraws {
            draws: draws.share(),
            first_chunk,
            first_row: item_table.rows.start + worker.first_row,
        });
        work.push((worker, weights.narrow(1, first_chunk, n_chunks), draws));
        first_chunk += n_chunks;
    }
    let second_pass = torch_in_parallel(work, |(mut worker, weights, draws)| {
        tch::no_grad(|| worker.gradients(&weights, draws.as_ref()))
    });
    for (sums, sparse_gradients) in &second_pass {
        part.state_gradients.add_sums(sums);
        if let (Some(sparse), Some(gradients)) = (&part.sparse, sparse_gradients) {
            let _ = sparse.gradients.shallow_clone().g_add_(gradients);
        }
    }
    Ok(log_sums)
}

/// Consecutive chunks of the local rows, for one thread.
struct Worker {
    /// Counted from the first local row.
    first_row: i64,
    /// Counted from `first_row`.
    chunks: Vec<Range<i64>>,
    keeps_probabilities: bool,
    is_reproducible: bool,
    /// f32 `[n, D]`.
    states: Tensor,
    /// The states in the type of the logits.
    factors: Tensor,
    sparse: Option<SparseTerms>,
    /// The item of the first row.
    first_item: i64,
    /// Of the worker's rows, like the three below.
    weights: Tensor,
    bias: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    /// Memory for logits.
    room: Tensor,
}

impl Worker {
    /// One for each thread, with equally many chunks, as far as there are enough.
    fn split(
        part: &TargetGroup,
        scored: &ScoringTable<'_>,
        blocking: Blocking,
        workspace: &mut Workspace,
    ) -> Vec<Self> {
        let states = &part.states;
        let Blocking { chunk_items, keeps_probabilities, kind, .. } = blocking;
        let (n, n_items) = (states.size()[0], scored.weights.size()[0]);
        let factors = states.to_kind(kind);
        let n_chunks = div_ceil(n_items, chunk_items);
        let rows_each = div_ceil(n_chunks, n_threads(states.device())) * chunk_items;
        let n_workers = div_ceil(n_items, rows_each);
        let n_logits = n * if keeps_probabilities { n_items } else { chunk_items * n_workers };
        let room = workspace.room(n_logits, kind, states.device());
        let worker = |number: i64| {
            let first_row = number * rows_each;
            let local = first_row..(first_row + rows_each).min(n_items);
            let (start, size) = if keeps_probabilities {
                (n * first_row, n * (local.end - local.start))
            } else {
                (n * chunk_items * number, n * chunk_items)
            };
            Self {
                first_row,
                chunks: chunks(local.end - local.start, chunk_items),
                keeps_probabilities,
                is_reproducible: scored.item_table.is_reproducible(),
                states: states.shallow_clone(),
                factors: factors.shallow_clone(),
                sparse: part.sparse.as_ref().map(|sparse| sparse.rows(&(0..n))),
                first_item: scored.item_table.rows.start + first_row,
                weights: rows(&scored.weights, &local),
                bias: rows(&scored.bias, &local),
                weight_gradient: rows(&scored.weight_gradient, &local),
                bias_gradient: rows(&scored.bias_gradient, &local),
                room: room.narrow(0, start, size),
            }
        };
        (0..n_workers).map(worker).collect()
    }

    /// The first pass: `l_c` of every chunk, `[chunks, n]`.
    fn log_sums(&self) -> Tensor {
        Tensor::cat(&self.chunks.iter().map(|chunk| self.softmax(chunk)).collect::<Vec<_>>(), 0)
    }

    /// Writes `p_c` to the worker's memory and returns `l_c: [1, n]`.
    fn softmax(&self, chunk: &Range<i64>) -> Tensor {
        let mut p = self.probabilities(chunk);
        let bias = rows(&self.bias, chunk);
        if (p.device(), p.kind()) == (Device::Cpu, Kind::Float) {
            let _ = self.factors.mm_out(&p, &self.vectors(chunk).tr());
            // The bias is added last.
            self.write_sparse(&p, Some(&bias), chunk);
            return softmax_rows(&mut p, &bias).unsqueeze(0);
        }
        let _ = bias.to_kind(p.kind()).addmm_out(&p, &self.factors, &self.vectors(chunk).tr());
        self.write_sparse(&p, None, chunk);
        // The largest probability is `exp(0)` over the sum, which gives the sum's logarithm.
        let max = || p.amax([1i64].as_slice(), false).to_kind(Kind::Float);
        let max_logit = max();
        let _ = p.softmax_int_out(&p, 1, None);
        (max_logit - max().log()).unsqueeze(0)
    }

    /// Writes the sparse scores, less the bias of their items, into the logits `[n, C]` of a chunk.
    fn write_sparse(&self, logits: &Tensor, bias: Option<&Tensor>, chunk: &Range<i64>) {
        if let Some(sparse) = &self.sparse {
            sparse.scores.write_to(logits, bias, &self.items(chunk));
        }
    }

    /// The items of a chunk.
    fn items(&self, chunk: &Range<i64>) -> Range<i64> {
        self.first_item + chunk.start..self.first_item + chunk.end
    }

    /// Item vectors of a chunk in the type of the logits: `[C, D]`.
    fn vectors(&self, chunk: &Range<i64>) -> Tensor {
        rows(&self.weights, chunk).to_kind(self.factors.kind())
    }

    /// The second pass, with `w_c: [n, chunks]`: adds to the gradients of the worker's rows and
    /// returns what it contributes to those of the states and of the sparse scores.
    fn gradients(
        &mut self,
        weights: &Tensor,
        draws: Option<&WorkerDraws>,
    ) -> (StateGradients, Option<Tensor>) {
        let sums = StateGradients::new(&self.states, self.is_reproducible);
        let sparse_gradients = self.sparse.as_ref().map(|sparse| sparse.gradients.zeros_like());
        for (number, chunk) in (0..).zip(&self.chunks) {
            if !self.keeps_probabilities {
                let _ = self.softmax(chunk);
            }
            let p = self.probabilities(chunk);
            // A copy, because MKL may sum in another order at another alignment.
            let weight = weights.narrow(1, number, 1).copy();
            if let Some(draws) = draws {
                draws.draw_from(&p, number, chunk.start);
            }
            if let (Some(sparse), Some(gradients)) = (&self.sparse, &sparse_gradients) {
                sparse.move_gradients(gradients, &p, &weight, &self.items(chunk));
            }
            let weighted = &self.states * &weight;
            let mut of_weights = rows(&self.weight_gradient, chunk);
            let mut of_bias = rows(&self.bias_gradient, chunk);
            if p.kind() == Kind::Float {
                let _ = of_weights.addmm_(&p.tr(), &weighted);
                let _ = of_bias.addmv_(&p.tr(), &weight.squeeze_dim(1));
            } else {
                let with_one = Tensor::cat(&[&weighted, &weight], 1).to_kind(p.kind());
                let products = p.tr().matmul(&with_one);
                of_weights += products.narrow(1, 0, weighted.size()[1]);
                of_bias += products.select(1, weighted.size()[1]);
            }
            sums.add(&(p.matmul(&self.vectors(chunk)) * weight));
        }
        (sums, sparse_gradients)
    }

    /// The memory of a chunk's probabilities, `[n, C]`.
    fn probabilities(&self, chunk: &Range<i64>) -> Tensor {
        let (n, width) = (self.states.size()[0], chunk.end - chunk.start);
        let start = if self.keeps_probabilities { n * chunk.start } else { 0 };
        self.room.narrow(0, start, n * width).view([n, width])
    }
}

/// Rows of `x: [V, ..]`.
fn rows(x: &Tensor, range: &Range<i64>) -> Tensor {
    x.narrow(0, range.start, range.end - range.start)
}

/// `[M, n]` → `[n]`.
fn log_sum_exp(logs: &Tensor) -> Tensor {
    // A GPU has one chunk; the reduction would take as long as all other work on it.
    if logs.size()[0] == 1 { logs.squeeze_dim(0) } else { logs.logsumexp([0i64].as_slice(), false) }
}

/// Items drawn from the model's distribution: first a chunk by its weight, then an item in it.
struct Draws {
    /// The chunk of each target, counted from the first local one: i64 `[n]`.
    chunk: Tensor,
    /// The target's uniform number, rescaled to the chunk: `[n]`.
    uniform: Tensor,
    /// i64 `[n]`; stays zero where another rank draws.
    drawn: Tensor,
    /// Whether the catalogue is one chunk.
    is_one_chunk: bool,
}

impl Draws {
    /// `weights: [n, chunks]`: of the chunks of all ranks, of which number `first_chunk` is the
    /// first local one.
    fn new(weights: &Tensor, uniform: &Tensor, drawn: Tensor, first_chunk: i64) -> Self {
        let chunk = draw(weights, uniform);
        let of_chunk = |x: &Tensor| x.gather(1, &chunk.unsqueeze(1), false).squeeze_dim(1);
        let (end, weight) = (of_chunk(&weights.cumsum(1, Kind::Float)), of_chunk(weights));
        let uniform = (uniform - (end - &weight)) / weight;
        Self { chunk: chunk - first_chunk, uniform, drawn, is_one_chunk: weights.size()[1] == 1 }
    }

    /// The same draws for another thread.
    fn share(&self) -> Self {
        let [chunk, uniform, drawn] =
            [&self.chunk, &self.uniform, &self.drawn].map(Tensor::shallow_clone);
        Self { chunk, uniform, drawn, is_one_chunk: self.is_one_chunk }
    }

    /// Draws for the targets of chunk `number`, whose first item is `first`, with probabilities
    /// `p: [n, C]`.
    fn draw_from(&self, p: &Tensor, number: i64, first: i64) {
        let mut drawn = self.drawn.shallow_clone();
        if self.is_one_chunk {
            drawn.copy_(&(draw(p, &self.uniform) + first));
            return;
        }
        let targets = self.chunk.eq(number).nonzero().squeeze_dim(1);
        if targets.numel() > 0 {
            let of = |x: &Tensor| x.index_select(0, &targets);
            let _ = drawn.index_copy_(0, &targets, &(draw(&of(p), &of(&self.uniform)) + first));
        }
    }
}

/// [`Draws`] as one worker makes them.
struct WorkerDraws {
    draws: Draws,
    /// Number of the worker's first chunk among the local ones.
    first_chunk: i64,
    /// The worker's first item.
    first_row: i64,
}

impl WorkerDraws {
    /// `number` and `start` of a chunk are counted from the worker's first.
    fn draw_from(&self, p: &Tensor, number: i64, start: i64) {
        self.draws.draw_from(p, self.first_chunk + number, self.first_row + start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_cut_into_equal_parts_that_fit() {
        let kind = Kind::Float;
        let blocking =
            |n, n_items, most| Blocking::new(n, n_items, Logits { kind, most }, Device::Cpu, 1);
        assert_eq!(
            blocking(100, 1000, 1 << 20),
            Blocking { n_targets: 100, chunk_items: 1008, keeps_probabilities: true, kind }
        );
        // 167 fit: eight parts of 154 rather than seven of 167 and one of 59.
        assert_eq!(
            blocking(1228, 100_000, 16 << 20),
            Blocking { n_targets: 154, chunk_items: 4000, keeps_probabilities: true, kind }
        );
        // One fits: all at once, and probabilities are computed twice.
        assert_eq!(
            blocking(1228, 10_000_000, 16 << 20),
            Blocking { n_targets: 1228, chunk_items: 4096, keeps_probabilities: false, kind }
        );
        assert_eq!(
            blocking(10_000, 10_000_000, 16 << 20),
            Blocking { n_targets: 10_000, chunk_items: 1677, keeps_probabilities: false, kind }
        );
        // Each of three threads has equally many chunks and its own memory.
        let on_three =
            |n, n_items, most| Blocking::new(n, n_items, Logits { kind, most }, Device::Cpu, 3);
        assert_eq!(on_three(100, 10_000, 1 << 20).chunk_items, 3344);
        assert_eq!(on_three(10_000, 10_000_000, 16 << 20).chunk_items, 559);
        // With memory for one logit, chunks have one item.
        assert_eq!(
            blocking(10, 1000, 1),
            Blocking { n_targets: 10, chunk_items: 1, keeps_probabilities: false, kind }
        );
        let on_gpu =
            Blocking::new(1228, 100_000, Logits { kind, most: 16 << 20 }, Device::Cuda(0), 1);
        assert_eq!(
            on_gpu,
            Blocking { n_targets: 154, chunk_items: 100_000, keeps_probabilities: true, kind }
        );
    }

    #[test]
    fn draws_follow_the_probabilities_in_any_number_of_chunks() {
        // Probabilities of six items for a target, in one chunk or in three.
        let p = Tensor::from_slice(&[0.05f32, 0.15, 0.3, 0.1, 0.25, 0.15]).unsqueeze(0);
        let uniform: Vec<f32> = (0..1000).map(|i| (i as f32 + 0.5) / 1000.0).collect();
        let n = uniform.len() as i64;
        let uniform = Tensor::from_slice(&uniform);
        let count = |width: i64| {
            let sums: Vec<Tensor> = (0..6 / width)
                .map(|t| p.narrow(1, t * width, width).sum(Kind::Float).view([1, 1]))
                .collect();
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
            assert!(
                counts.iter().zip(expected).all(|(a, b): (&i64, i64)| (a - b).abs() <= 1),
                "{counts:?}"
            );
        }
    }
}
