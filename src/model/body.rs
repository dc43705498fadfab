//! What lies between vectors and states: a GRU or an XLNet, over the same layout of positions.

use tch::{Device, Kind, Tensor};

use super::objective::{Plan, Visible};
use super::{Gru, Parameters, Xlnet};
use crate::data::{Batch, Noise};

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
        layout: &Layout<'_>,
        noise: Option<&mut Noise<'_>>,
    ) -> Tensor {
        match self {
            Body::Gru(gru) => gru.states(parameters, x, layout, noise),
            Body::Xlnet(xlnet) => xlnet.states(parameters, (x, query), layout, noise),
        }
    }
}

/// Where the packed positions of a plan lie in a `[B, L]` rectangle, and what each may attend to.
pub struct Layout<'a> {
    plan: &'a Plan,
    device: Device,
    /// Longest session, `L`.
    pub length: i64,
    /// Cell `session * L + position` of each packed position: i64 `[P]`.
    cells: Tensor,
    /// Cell of each position that is read: i64 `[N]`.
    pub read_cells: Tensor,
    /// Number of the packed position that is read: i64 `[N]`.
    pub reads: Tensor,
    /// Packed positions of each micro-batch.
    pub positions_by_segment: Vec<i64>,
    /// Reads of each micro-batch.
    pub reads_by_segment: Vec<i64>,
    /// Sessions of each micro-batch.
    pub sessions_by_segment: Vec<i64>,
}

impl<'a> Layout<'a> {
    /// Lays the positions of `plan` out, whose sessions are those of `batch`.
    pub fn new(plan: &'a Plan, batch: &Batch, device: Device) -> Self {
        let length = plan.lengths.iter().copied().max().unwrap_or(0);
        let cells: Vec<i64> = plan
            .lengths
            .iter()
            .enumerate()
            .flat_map(|(session, &n)| (0..n).map(move |position| (session * length + position) as i64))
            .collect();
        let read_cells: Vec<i64> = plan.reads.iter().map(|&read| cells[read as usize]).collect();
        let on_device = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(device);
        Self {
            plan,
            device,
            length: length as i64,
            cells: on_device(&cells),
            read_cells: on_device(&read_cells),
            reads: on_device(&plan.reads),
            positions_by_segment: batch.by_segment(&plan.lengths),
            reads_by_segment: batch.by_segment(&plan.reads_per_session),
            sessions_by_segment: batch.segments.iter().map(|segment| segment.n_sessions as i64).collect(),
        }
    }

    /// Number of sessions, `B`.
    pub fn n_sessions(&self) -> i64 {
        self.plan.lengths.len() as i64
    }

    /// Whether every position is read.
    pub fn reads_all(&self) -> bool {
        self.plan.reads.len() == self.plan.shown.len()
    }

    /// `x: [P, D]` → `[B, L, D]`, zero where there is no position.
    pub fn pad(&self, x: &Tensor) -> Tensor {
        let width = x.size()[1];
        let n_cells = self.n_sessions() * self.length;
        let padded = if x.size()[0] == n_cells {
            x.shallow_clone()
        } else {
            x.new_zeros([n_cells, width], (x.kind(), x.device())).index_copy(0, &self.cells, x)
        };
        padded.view([self.n_sessions(), self.length, width])
    }

    /// `x: [B, L, D]` → `[P, D]`.
    pub fn pack(&self, x: &Tensor) -> Tensor {
        x.reshape([-1, x.size()[2]]).index_select(0, &self.cells)
    }

    /// What must not be attended to, bool `[B, L, L]` as (session, from, to); a position always sees itself. `None` where
    /// everything is visible.
    pub fn hidden(&self) -> Option<Tensor> {
        let places = Tensor::arange(self.length, (Kind::Int64, self.device));
        let (from, to) = (places.view([1, -1, 1]), places.view([1, 1, -1]));
        let hidden = match &self.plan.visible {
            Visible::All => self.beyond()?.unsqueeze(1),
            // Whatever is behind the session is behind all its positions.
            Visible::Before => to.gt_tensor(&from),
            Visible::Order(order) => {
                let order = self.order(order);
                let later = Self::not_before(&order.unsqueeze(1), &order.unsqueeze(2));
                let hidden = later.logical_and(&to.ne_tensor(&from));
                self.beyond().map_or(hidden.shallow_clone(), |beyond| hidden.logical_or(&beyond.unsqueeze(1)))
            }
        };
        Some(hidden.expand([self.n_sessions(), self.length, self.length], false))
    }

    /// What the positions that are read must not attend to, bool `[N, L]`. Where predictions have an order, a position
    /// does not see itself.
    pub fn hidden_from_reads(&self) -> Option<Tensor> {
        let sessions = self.read_sessions();
        let beyond = self.beyond().map(|beyond| beyond.index_select(0, &sessions));
        match &self.plan.visible {
            Visible::All => beyond,
            Visible::Before => {
                let to = Tensor::arange(self.length, (Kind::Int64, self.device)).unsqueeze(0);
                Some(to.gt_tensor(&self.read_places().unsqueeze(1)))
            }
            Visible::Order(order) => {
                let order = self.order(order);
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
        if self.plan.lengths.iter().all(|&n| n as i64 == self.length) {
            return None;
        }
        let lengths: Vec<i64> = self.plan.lengths.iter().map(|&n| n as i64).collect();
        let lengths = Tensor::from_slice(&lengths).to_device(self.device);
        let places = Tensor::arange(self.length, (Kind::Int64, self.device));
        Some(places.unsqueeze(0).ge_tensor(&lengths.unsqueeze(1)))
    }

    fn order(&self, order: &[i64]) -> Tensor {
        let order = Tensor::from_slice(order).to_device(self.device).unsqueeze(1);
        self.pad(&order).squeeze_dim(2)
    }

    /// Whether `of` is predicted, and not before `own`.
    fn not_before(of: &Tensor, own: &Tensor) -> Tensor {
        of.ge(0).logical_and(&of.ge_tensor(own))
    }
}
