//! What lies between vectors and states: a GRU or an XLNet, over the same layout of positions.

use tch::{Device, Kind, Tensor};

use super::objective::{Objective, Plan, Shown, Visible};
use super::rows::take_rows;
use super::{Gru, Parameters, Xlnet};
use crate::data::{Batch, DropoutGenerator};
use crate::device::send_all;

/// A sequence model.
pub enum Body {
    /// Recurrent.
    Gru(Gru),
    /// Attention with relative positions.
    Xlnet(Xlnet),
}

impl Body {
    /// Positions `x: [P, D]` → the states that `layout` reads, `[N, D]`. `query: [1, D]`: what a position that is
    /// predicted knows of itself, where the objective has two streams.
    pub(super) fn states(
        &self,
        parameters: &Parameters,
        (x, query): (Tensor, Option<Tensor>),
        layout: &Layout,
        dropout: Option<&mut DropoutGenerator<'_>>,
    ) -> Tensor {
        match self {
            Body::Gru(gru) => gru.states(parameters, x, layout, dropout),
            Body::Xlnet(xlnet) => xlnet.states(parameters, (x, query), layout, dropout),
        }
    }
}

/// Where positions lie in a `[B, L]` rectangle, what stands there, and what each may attend to.
///
/// Made from a [`Plan`], positions are packed: only those that hold something are computed. Made from lengths that are
/// a tensor themselves, as in a trace that must serve any number of sessions, positions fill the rectangle; every size
/// that depends on the batch is then −1, and the rest of the model does not tell the difference.
pub struct Layout {
    /// `B`, or −1.
    n_sessions: i64,
    /// Longest session in positions, `L`.
    pub length: i64,
    /// What stands at each position, as a row of the events `[T]`, the padding `T` or the mask `T + 1`: i64 `[P]`.
    pub(super) shown: Tensor,
    /// Cell `session * L + position` of each position, i64 `[P]`; none if there is a position in every cell.
    cells: Option<Tensor>,
    /// Positions of each session, i64 `[B]`; none if all have `L`.
    lengths: Option<Tensor>,
    visible: Sight,
    /// Cell of each position that is read: i64 `[N]`.
    pub read_cells: Tensor,
    /// Number of the position that is read: i64 `[N]`.
    pub reads: Tensor,
    /// Positions read of the session that most are read of, `R`.
    most_reads: i64,
    /// Slot `session * R + number` of each read, i64 `[N]`; none if `R` are read of every session.
    read_slots: Option<Tensor>,
    /// Whether every position is read.
    pub reads_all: bool,
    /// Positions of each micro-batch.
    pub positions_by_segment: Vec<i64>,
    /// The positions step by step, if it is known which there are.
    pub(super) by_step: Option<BySteps>,
    /// Reads of each micro-batch.
    pub reads_by_segment: Vec<i64>,
    /// Sessions of each micro-batch.
    pub sessions_by_segment: Vec<i64>,
}

/// The first positions of all sessions, longest session first, then the second ones of those that have one, and so on: what a
/// recurrence computes step by step, without padding.
pub(super) struct BySteps {
    /// Number of each position, i64 `[P]`.
    pub positions: Tensor,
    /// Sessions that have so many positions, for each of the `L`.
    pub n_sessions: Vec<i64>,
    /// Where in this order the positions are that are read: i64 `[N]`.
    pub reads: Tensor,
}

/// [`BySteps`] in numbers.
struct Steps {
    positions: Vec<i64>,
    n_sessions: Vec<i64>,
    reads: Vec<i64>,
}

impl Steps {
    fn new(plan: &Plan) -> Self {
        let mut sessions: Vec<(usize, usize)> = Vec::with_capacity(plan.lengths.len());
        let mut first = 0;
        for &length in &plan.lengths {
            sessions.push((length, first));
            first += length;
        }
        sessions.sort_by_key(|&(length, _)| std::cmp::Reverse(length));
        let (mut positions, mut n_sessions) = (Vec::with_capacity(first), Vec::new());
        let mut place = vec![0i64; first];
        for step in 0..sessions.first().map_or(0, |&(longest, _)| longest) {
            let n = sessions.partition_point(|&(length, _)| length > step);
            for (_, first) in &sessions[..n] {
                place[first + step] = positions.len() as i64;
                positions.push((first + step) as i64);
            }
            n_sessions.push(n as i64);
        }
        Self { positions, n_sessions, reads: plan.reads.iter().map(|&read| place[read as usize]).collect() }
    }
}

/// [`Visible`] in tensors.
enum Sight {
    All,
    Before,
    /// i64 `[B, L]`.
    Order(Tensor),
}

impl Layout {
    /// Lays the positions of `plan` out, whose sessions are those of `batch`.
    pub fn new(plan: &Plan, batch: &Batch, device: Device) -> Self {
        let length = plan.lengths.iter().copied().max().unwrap_or(0);
        let cells: Vec<i64> = plan
            .lengths
            .iter()
            .enumerate()
            .flat_map(|(session, &n)| (0..n).map(move |position| (session * length + position) as i64))
            .collect();
        let read_cells: Vec<i64> = plan.reads.iter().map(|&read| cells[read as usize]).collect();
        let padding = batch.n_events() as i64;
        let shown: Vec<i64> = plan
            .shown
            .iter()
            .map(|shown| match shown {
                Shown::Event(event) => *event,
                Shown::Padding => padding,
                Shown::Mask => padding + 1,
            })
            .collect();
        let steps = Steps::new(plan);
        let most_reads = plan.reads_per_session.iter().copied().max().unwrap_or(0);
        let slots = plan.reads_per_session.iter().enumerate();
        let slots: Vec<i64> = slots
            .flat_map(|(session, &n)| (0..n).map(move |number| (session * most_reads + number) as i64))
            .collect();
        let fills_slots = slots.len() == plan.lengths.len() * most_reads;
        let are_equal = plan.lengths.iter().all(|&n| n == length);
        let lengths: Vec<i64> = plan.lengths.iter().map(|&n| n as i64).collect();
        let order = match &plan.visible {
            Visible::Order(order) => &order[..],
            Visible::All | Visible::Before => &[],
        };
        let numbers = [
            &shown,
            &cells,
            &lengths,
            &read_cells,
            &plan.reads,
            &slots,
            &steps.positions,
            &steps.reads,
            order,
        ];
        let mut sent = send_all(&numbers, device).into_iter();
        let mut next = || sent.next().expect("as many as were sent");
        let (shown, cells, lengths) = (next(), next(), next());
        let mut layout = Self {
            n_sessions: plan.lengths.len() as i64,
            length: length as i64,
            shown,
            cells: (!are_equal).then_some(cells),
            lengths: (!are_equal).then_some(lengths),
            visible: Sight::All,
            read_cells: next(),
            reads: next(),
            most_reads: most_reads as i64,
            read_slots: Some(next()).filter(|_| !fills_slots),
            reads_all: plan.reads.len() == plan.shown.len(),
            positions_by_segment: batch.by_segment(&plan.lengths),
            by_step: Some(BySteps { positions: next(), n_sessions: steps.n_sessions, reads: next() }),
            reads_by_segment: batch.by_segment(&plan.reads_per_session),
            sessions_by_segment: batch.segments.iter().map(|segment| segment.n_sessions as i64).collect(),
        };
        layout.visible = match &plan.visible {
            Visible::All => Sight::All,
            Visible::Before => Sight::Before,
            Visible::Order(_) => Sight::Order(layout.pad(&next().unsqueeze(1)).squeeze_dim(2)),
        };
        layout
    }

    /// Lays sessions out whose next event is predicted, as [`Objective::next`] does, from lengths (i64 `[B]`, none of
    /// them zero) that are known only when the model runs. Events fill a rectangle `[B, width]`; positions behind a session
    /// show padding, which is attended to if there is a `padded_length` for it.
    pub fn next(
        objective: &Objective,
        attends: bool,
        lengths: &Tensor,
        (width, padded_length): (i64, Option<i64>),
    ) -> Self {
        let masks = objective.masks(attends);
        let length = (width + i64::from(masks)).max(padded_length.unwrap_or(0));
        let own = lengths.unsqueeze(1);
        let session = lengths.ones_like().cumsum(0, Kind::Int64) - 1;
        let places = Tensor::arange(length, (Kind::Int64, lengths.device())).unsqueeze(0);
        let event = session.unsqueeze(1) * width + &places;
        let padding = lengths.ones_like().sum(Kind::Int64) * width;
        let behind =
            if masks { (&padding + 1).where_self(&places.eq_tensor(&own), &padding) } else { padding };
        let shown = event.where_self(&places.lt_tensor(&own), &behind).reshape([-1]);
        let read_places = if masks { lengths.shallow_clone() } else { lengths - 1 };
        let read_cells = session * length + read_places;
        let visible = match objective.sight_of_next(attends) {
            Visible::All => Sight::All,
            Visible::Before => Sight::Before,
            // Only the mask has a place in the order: the first.
            Visible::Order(_) => Sight::Order(places.eq_tensor(&own).to_kind(Kind::Int64) - 1),
        };
        Self {
            n_sessions: -1,
            length,
            shown,
            cells: None,
            lengths: padded_length.is_none().then(|| lengths + i64::from(masks)),
            visible,
            reads: read_cells.shallow_clone(),
            most_reads: 1,
            read_slots: None,
            read_cells,
            reads_all: false,
            positions_by_segment: Vec::new(),
            by_step: None,
            reads_by_segment: Vec::new(),
            sessions_by_segment: Vec::new(),
        }
    }

    /// `x: [P, D]` → `[B, L, D]`, zero where there is no position.
    pub fn pad(&self, x: &Tensor) -> Tensor {
        let padded = spread(x, &self.cells, self.n_sessions * self.length);
        padded.view([self.n_sessions, self.length, x.size()[1]])
    }

    /// `x: [B, L, D]` → `[P, D]`.
    pub fn pack(&self, x: &Tensor) -> Tensor {
        picked(x.reshape([-1, x.size()[2]]), &self.cells)
    }

    /// Reads `x: [N, H, D]` session by session: `[B, H, R, D]`, zero where fewer are read.
    pub fn by_read(&self, x: &Tensor) -> Tensor {
        let slots = spread(x, &self.read_slots, self.n_sessions * self.most_reads);
        slots.view([-1, self.most_reads, x.size()[1], x.size()[2]]).transpose(1, 2)
    }

    /// The other way round: `x: [B, H, R, D]` → `[N, H, D]`.
    pub fn of_reads(&self, x: &Tensor) -> Tensor {
        picked(x.transpose(1, 2).flatten(0, 1), &self.read_slots)
    }

    /// What must not be attended to, bool `[B or 1, L, L]` as (session, from, to); a position always sees itself. `None`
    /// where everything is visible.
    pub fn hidden(&self) -> Option<Tensor> {
        let places = Tensor::arange(self.length, (Kind::Int64, self.shown.device()));
        let (from, to) = (places.view([1, -1, 1]), places.view([1, 1, -1]));
        let hidden = match &self.visible {
            Sight::All => self.beyond()?.unsqueeze(1),
            // Whatever is behind the session is behind all its positions.
            Sight::Before => to.gt_tensor(&from),
            Sight::Order(order) => {
                let later = Self::not_before(&order.unsqueeze(1), &order.unsqueeze(2));
                let hidden = later.logical_and(&to.ne_tensor(&from));
                self.beyond().map_or(hidden.shallow_clone(), |beyond| hidden.logical_or(&beyond.unsqueeze(1)))
            }
        };
        Some(hidden.expand([-1, self.length, self.length], false))
    }

    /// What the positions that are read must not attend to, bool `[N, L]`. Where predictions have an order, a position
    /// does not see itself.
    pub fn hidden_from_reads(&self) -> Option<Tensor> {
        let sessions = self.read_sessions();
        let beyond = self.beyond().map(|beyond| beyond.index_select(0, &sessions));
        match &self.visible {
            Sight::All => beyond,
            Sight::Before => {
                let to = Tensor::arange(self.length, (Kind::Int64, self.shown.device())).unsqueeze(0);
                Some(to.gt_tensor(&self.read_places().unsqueeze(1)))
            }
            Sight::Order(order) => {
                let own = order.reshape([-1]).index_select(0, &self.read_cells).unsqueeze(1);
                let hidden = Self::not_before(&order.index_select(0, &sessions), &own);
                Some(beyond.map_or(hidden.shallow_clone(), |beyond| hidden.logical_or(&beyond)))
            }
        }
    }

    /// Session of each position that is read, i64 `[N]`.
    pub fn read_sessions(&self) -> Tensor {
        self.read_cells.divide_scalar_mode(self.length.max(1), "floor")
    }

    /// Place in its session of each position that is read, i64 `[N]`.
    pub fn read_places(&self) -> Tensor {
        self.read_cells.remainder(self.length.max(1))
    }

    /// Places behind the sessions, bool `[B, L]`; `None` if all are equally long.
    fn beyond(&self) -> Option<Tensor> {
        let lengths = self.lengths.as_ref()?;
        let places = Tensor::arange(self.length, (Kind::Int64, lengths.device()));
        Some(places.unsqueeze(0).ge_tensor(&lengths.unsqueeze(1)))
    }

    /// Whether `of` is predicted, and not before `own`.
    fn not_before(of: &Tensor, own: &Tensor) -> Tensor {
        of.ge(0).logical_and(&of.ge_tensor(own))
    }
}

/// Rows `x: [P, ..]` at their places among `n`, zero where there is none: `[n, ..]`. Without places there is a row for each.
fn spread(x: &Tensor, places: &Option<Tensor>, n: i64) -> Tensor {
    let Some(places) = places else { return x.shallow_clone() };
    let size = [&[n], &x.size()[1..]].concat();
    x.new_zeros(size, (x.kind(), x.device())).index_copy_(0, places, x)
}

/// The other way round: `x: [n, ..]` → `[P, ..]`.
fn picked(x: Tensor, places: &Option<Tensor>) -> Tensor {
    match places {
        Some(places) => take_rows(&x, places),
        None => x,
    }
}
