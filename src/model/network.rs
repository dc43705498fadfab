//! A neural next-item model: input block, body, softmax over the catalogue.

use std::cell::RefCell;
use std::ops::Range;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Reduction, Tensor};

use super::body::{Body, Layout};
use super::head::{CrossEntropy, HeadConfig, Rivals, Scored, Workspace, cross_entropy};
use super::input::{Input, Lookup};
use super::objective::{Objective, Plan, Visible};
use super::parameters::{Initial, Linear};
use super::rows::add_rows;
use super::{Gru, Neural, Parameters, Recommender, Share, View, Xlnet};
use crate::collective::CollectiveError;
use crate::collective::exact::ExactSum;
use crate::data::plan::derive_seed;
use crate::data::{Batch, Features, Noise, with_seed};
use crate::device::laps::Laps;
use crate::device::send;
use crate::optim::squares;

/// The item table is parameter 0, the bias of its scores parameter 1; other tables follow, then the rest.
pub(super) const ITEM_TABLE: usize = 0;
const ITEM_BIAS: usize = 1;

/// Names of the tables of items, of which a rank may have a share.
pub const ITEM_TABLES: [&str; 3] = ["item_table.weight", "item_table.bias", "head.table.weight"];

/// Loss of a pass, as a sum: division comes last, over all ranks.
pub struct LossSum {
    /// Summed cross entropy, scalar f64 on the device.
    pub loss: Tensor,
    /// Number of targets.
    pub n_targets: usize,
}

/// A model with its parameters, of which the tables of items may be a share.
pub struct Network<'a> {
    parameters: Parameters,
    input: Input,
    body: Body,
    objective: Objective,
    head: HeadConfig,
    /// Width of the states.
    width: i64,
    /// From states to vectors that are scored against items.
    to_item: Linear,
    /// Tells original events from replaced ones.
    detector: Option<Linear>,
    /// The table that items are scored against.
    scored_table: usize,
    /// Number of tables and their like, which come first among the parameters.
    n_tables: usize,
    share: Share<'a>,
    /// Length that sessions are padded to where the padding is attended to.
    padded_length: Option<usize>,
    workspace: Workspace,
    /// What gradients of the tables that are shared out are added up in, if in whole numbers.
    own_sum: Option<RefCell<ExactSum>>,
}

/// Takes what gradients have been added to the tables that are shared out, if sums are exact.
fn settle(own_sum: &Option<RefCell<ExactSum>>, parameters: &Parameters) {
    if let Some(sum) = own_sum {
        sum.borrow_mut().take(&mut parameters.own_gradients());
    }
}

impl Network<'static> {
    /// Draws initial parameters; the same on every rank for the same `seed`.
    ///
    /// # Errors
    /// A configuration that does not fit the features.
    pub fn new(
        config: &Neural<'_>,
        features: &Features,
        max_length: usize,
        random: (u64, Device),
    ) -> Result<Self, String> {
        Network::with_share(config, features, max_length, random, Share::whole(features.n_items()))
    }
}

impl<'a> Network<'a> {
    /// The same with some rows only of the tables of items. Where a share has company, passes and scores are made by *all
    /// ranks* together.
    ///
    /// # Errors
    /// A configuration that does not fit the features.
    pub fn with_share(
        config: &Neural<'_>,
        features: &Features,
        max_length: usize,
        (seed, device): (u64, Device),
        share: Share<'a>,
    ) -> Result<Self, String> {
        with_seed(seed, || Self::declare(config, features, max_length, device, share))
    }

    fn declare(
        config: &Neural<'_>,
        features: &Features,
        max_length: usize,
        device: Device,
        share: Share<'a>,
    ) -> Result<Self, String> {
        let (input, head, objective) = (config.input(), config.head(), config.objective());
        let width = config.width();
        let mut initial = Initial::default();
        initial.table(ITEM_TABLES[0], input.item_width, input.init_std, &share);
        initial.column(ITEM_TABLES[1], 0.0, &share);
        let scored_table = if head.tied {
            ITEM_TABLE
        } else {
            initial.table(ITEM_TABLES[2], input.item_width, input.init_std, &share)
        };
        let first_table = initial.len();
        Input::declare_tables(input, features, &mut initial);
        let n_tables = initial.len();
        let attends = matches!(config, Neural::Xlnet(_));
        let part = (first_table, objective.masks(attends), width);
        let input_block = Input::declare(input, features, part, &mut initial)?;
        let (body, attends_to_padding) = match config {
            Neural::Gru(gru) => (Body::Gru(Gru::declare(gru, &mut initial)), false),
            Neural::Xlnet(xlnet) => {
                (Body::Xlnet(Xlnet::declare(xlnet, &mut initial)), xlnet.attend_to_padding)
            }
        };
        let to_item = initial.linear("head.projection", width, input.item_width);
        let detector =
            matches!(objective, Objective::Replaced { .. }).then(|| initial.linear("detector", width, 1));
        let parameters = Parameters::new(initial, device);
        let own_sum = share.is_exact().then(|| RefCell::new(ExactSum::new(&parameters.own_gradients())));
        Ok(Self {
            parameters,
            own_sum,
            input: input_block,
            body,
            objective: objective.clone(),
            head: head.clone(),
            width,
            to_item,
            detector,
            scored_table,
            n_tables,
            share,
            padded_length: attends_to_padding.then_some(max_length),
            workspace: Workspace::default(),
        })
    }

    /// The parameters.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The parameters, to be changed by an optimizer or a checkpoint.
    pub fn parameters_mut(&mut self) -> &mut Parameters {
        &mut self.parameters
    }

    /// The tables, which lie first in the flat buffers and of which a step touches few rows.
    pub fn tables(&self) -> &[View] {
        &self.parameters.views()[..self.n_tables]
    }

    /// *All ranks* of the share. Completes the gradients of the tables that are shared out, and returns the sum of their
    /// squares on all ranks, `[]`.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn complete_own_gradients(&mut self) -> Result<Tensor, CollectiveError> {
        let mut own = self.parameters.own_gradients();
        let Some(sum) = &mut self.own_sum else {
            return Ok(self.share.of_each_rank(&squares(&own))?.sum(Kind::Float));
        };
        sum.get_mut().move_into(&mut own);
        // Band by band, lest it matter which rank adds what.
        let band = self.share.band();
        let n_bands = self.share.n_tiles_by_rank(band);
        let mut all = Tensor::zeros([], (Kind::Float, own.device()));
        for index in self.parameters.own() {
            let of_rows = self.parameters.gradient(index).reshape([self.share.len(), -1]).square();
            let of_rows = of_rows.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            let missing = (band - self.share.len() % band) % band;
            let of_bands = of_rows.constant_pad_nd([0, missing]).view([-1, band]);
            let of_bands = of_bands.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            all += self.share.gather_rows(&of_bands, &n_bands)?.sum(Kind::Float);
        }
        Ok(all)
    }

    /// The rows of the tables of items that are here.
    pub fn share(&self) -> &Share<'a> {
        &self.share
    }

    /// Adds the gradients of a pass over `batch` and returns its loss. A batch without sessions gives zeros.
    ///
    /// # Errors
    /// Those of the collective, where the tables are shared out.
    pub fn backward(
        &mut self,
        batch: &Batch,
        noise: &mut Noise<'_>,
        rivals: &Rivals,
        laps: &mut Laps,
    ) -> Result<LossSum, CollectiveError> {
        let plan = self.objective.training(batch, self.attends());
        self.backward_as_planned(batch, plan, noise, rivals, laps)
    }

    /// The same with what is hidden and predicted given.
    ///
    /// # Errors
    /// See [`Network::backward`].
    pub fn backward_as_planned(
        &mut self,
        batch: &Batch,
        plan: Plan,
        noise: &mut Noise<'_>,
        rivals: &Rivals,
        laps: &mut Laps,
    ) -> Result<LossSum, CollectiveError> {
        let device = self.device();
        let n_targets = plan.targets.len();
        let counts = self.share.counts(n_targets as i64)?;
        if counts.iter().sum::<i64>() == 0 {
            return Ok(LossSum { loss: Tensor::zeros([], (Kind::Double, device)), n_targets: 0 });
        }
        let columns = self.input.columns(batch, true);
        let lookups = self.input.look_up(&self.parameters, &columns, &self.share, true)?;
        let predicted = send(&Tensor::from_slice(&plan.targets), device);
        let targets = batch.items().index_select(0, &predicted);
        let uniform = self.detector.map(|_| self.uniform(batch, &plan));
        let plan = self.lay_out(plan);
        let states = self.states(&columns, &lookups, (&plan, batch), Some(noise));
        let sessions = self.session_vectors(&states);
        laps.end("forward");
        let CrossEntropy { mut loss, state_gradient, drawn } = tch::no_grad(|| {
            let (own_sum, parameters) = (&self.own_sum, &self.parameters);
            let mut scored = Scored {
                table: &self.parameters.leaf(self.scored_table).detach(),
                bias: &self.parameters.leaf(ITEM_BIAS).detach(),
                table_gradient: self.parameters.gradient(self.scored_table),
                bias_gradient: self.parameters.gradient(ITEM_BIAS),
                share: &self.share,
                counts: &counts,
                settle: &|| settle(own_sum, parameters),
            };
            let (states, workspace) = (sessions.detach(), &mut self.workspace);
            cross_entropy(&states, &targets, &mut scored, rivals, uniform.as_ref(), workspace)
        })?;
        laps.end("loss");
        self.backward_from((&sessions * &state_gradient).sum(Kind::Float), &lookups)?;
        if let (Some(detector), Some(drawn), Objective::Replaced { weight, .. }) =
            (self.detector, drawn, &self.objective)
        {
            loss += self.detect(detector, *weight, batch, (&predicted, &drawn), noise)?;
        }
        laps.end("backward");
        Ok(LossSum { loss, n_targets })
    }

    /// Replaced-item detection: the events `predicted: [N]` become the items `drawn: [N]`; every event is judged. Adds
    /// the gradients and returns the weighted loss.
    fn detect(
        &self,
        detector: Linear,
        weight: f64,
        batch: &Batch,
        (predicted, drawn): (&Tensor, &Tensor),
        noise: &mut Noise<'_>,
    ) -> Result<Tensor, CollectiveError> {
        let mut replaced = batch.with_columns(batch.columns.iter().map(Tensor::shallow_clone).collect());
        replaced.columns[0] = batch.items().index_copy(0, predicted, drawn);
        let is_replaced = replaced.items().ne_tensor(batch.items()).to_kind(Kind::Float);
        // A body that reads forward only judges by what came before, one that attends by all.
        let plan = self.lay_out(Plan::all(&batch.lengths, Visible::All));
        let columns = self.input.columns(&replaced, true);
        let lookups = self.input.look_up(&self.parameters, &columns, &self.share, true)?;
        let states = self.states(&columns, &lookups, (&plan, batch), Some(noise));
        let verdicts = detector.apply(&self.parameters, &states).squeeze_dim(1);
        let no_weight = None::<&Tensor>;
        let loss = weight
            * verdicts.binary_cross_entropy_with_logits(&is_replaced, no_weight, no_weight, Reduction::Sum);
        self.backward_from(loss.shallow_clone(), &lookups)?;
        Ok(loss.detach().to_kind(Kind::Double))
    }

    /// Goes back from the scalar `from` and adds the gradients of all that is not a table, and those of looked-up rows.
    fn backward_from(&self, from: Tensor, lookups: &[Lookup<'_>]) -> Result<(), CollectiveError> {
        let rest = self.n_tables..self.parameters.views().len();
        let leaves = rest.clone().map(|index| self.parameters.leaf(index));
        let inputs: Vec<&Tensor> = leaves.chain(lookups.iter().map(|lookup| &lookup.vectors)).collect();
        let gradients = Tensor::run_backward(&[from], &inputs, false, false);
        tch::no_grad(|| {
            let (of_rest, of_lookups) = gradients.split_at(rest.len());
            // What a pass did not use has no gradient.
            for (index, gradient) in rest.zip(of_rest).filter(|(_, gradient)| gradient.defined()) {
                let _ = self.parameters.gradient(index).g_add_(gradient);
            }
            for (lookup, gradient) in lookups.iter().zip(of_lookups) {
                let gradient =
                    if gradient.defined() { gradient } else { &lookup.vectors.detach().zeros_like() };
                // The padding row is read but never learnt from reading it.
                let read = gradient * lookup.rows.unsqueeze(1).ne(0).to_kind(Kind::Float);
                let mut of_table = self.parameters.gradient(lookup.table);
                lookup.asked.give_back(&self.share, &read, |places, all| {
                    add_rows(&mut of_table, places, all, self.share.is_exact());
                    settle(&self.own_sum, &self.parameters);
                })?;
            }
            Ok(())
        })
    }

    /// The states that `plan` reads, `[N, D]`.
    fn states(
        &self,
        columns: &[Tensor],
        lookups: &[Lookup<'_>],
        (plan, batch): (&Plan, &Batch),
        noise: Option<&mut Noise<'_>>,
    ) -> Tensor {
        if plan.reads.is_empty() {
            return Tensor::zeros([0, self.width], (Kind::Float, self.device()));
        }
        self.laid_out_states(columns, lookups, &Layout::new(plan, batch, self.device()), noise)
    }

    fn laid_out_states(
        &self,
        columns: &[Tensor],
        lookups: &[Lookup<'_>],
        layout: &Layout,
        noise: Option<&mut Noise<'_>>,
    ) -> Tensor {
        let (x, mask) = self.input.positions(&self.parameters, columns, lookups, &layout.shown);
        let query = mask.filter(|_| self.objective.two_streams());
        self.body.states(&self.parameters, (x, query), layout, noise)
    }

    /// The states that `plan` reads of `batch`, nothing being learnt: `[N, D]`.
    ///
    /// # Errors
    /// Those of the collective, where the tables are shared out.
    pub fn read(&self, batch: &Batch, plan: Plan) -> Result<Tensor, CollectiveError> {
        tch::no_grad(|| {
            let plan = self.lay_out(plan);
            let columns = self.input.columns(batch, false);
            let lookups = self.input.look_up(&self.parameters, &columns, &self.share, false)?;
            Ok(self.states(&columns, &lookups, (&plan, batch), None))
        })
    }

    /// Scores `[B, V]` of what follows sessions that lie in rectangles: `columns` each `[B, width]`, events first, and
    /// `lengths: [B]`. The same arithmetic as [`Recommender::encode`] and [`Recommender::scores`], with nothing in it
    /// that depends on how many sessions there are, so that it can be traced.
    pub fn next_scores(&self, columns: &[Tensor], lengths: &Tensor, width: i64) -> Tensor {
        tch::no_grad(|| {
            let columns: Vec<Tensor> =
                columns.iter().map(|column| column.reshape([-1]).constant_pad_nd([0, 1])).collect();
            let looked_up = self.input.look_up(&self.parameters, &columns, &self.share, false);
            let lookups = looked_up.expect("an exported model has all rows, and asks nobody");
            let padded_length = self.padded_length.map(|length| length as i64);
            let layout = Layout::next(&self.objective, self.attends(), lengths, (width, padded_length));
            let states = self.laid_out_states(&columns, &lookups, &layout, None);
            self.scores(&self.session_vectors(&states), 0..self.share.n_items)
        })
    }

    /// Events of a session that can be read in service.
    pub fn served_length(&self, max_length: usize) -> usize {
        // Where padding is attended to, the model knows sessions of one length only, the mask included.
        self.padded_length
            .map_or(max_length, |length| length - usize::from(self.objective.masks(self.attends())))
    }

    /// Ends learning, and keeps tables of vectors in type `kind`: they are nearly all of a model. Items are then scored in
    /// that type; the rest stays float32.
    pub fn serve_with_tables_in(&mut self, kind: Kind) {
        for index in 0..self.parameters.views().len() {
            let is_table = index < self.n_tables && index != ITEM_BIAS;
            self.parameters.freeze(index, if is_table { kind } else { Kind::Float });
        }
    }

    /// Whether the body attends to positions in any order, or reads forward only.
    fn attends(&self) -> bool {
        matches!(self.body, Body::Xlnet(_))
    }

    fn lay_out(&self, plan: Plan) -> Plan {
        match self.padded_length {
            Some(length) => plan.padded(length),
            None => plan,
        }
    }

    /// States `[N, D]` → vectors `[N, item_width]`, whose products with those of items are their scores.
    fn session_vectors(&self, states: &Tensor) -> Tensor {
        let vectors = self.to_item.apply(&self.parameters, states);
        let vectors = if self.head.relu { vectors.relu() } else { vectors };
        if self.head.temperature == 1.0 { vectors } else { vectors / self.head.temperature }
    }

    /// A number in 0..1 for each target, from its session's seed.
    fn uniform(&self, batch: &Batch, plan: &Plan) -> Tensor {
        let numbers: Vec<f32> = batch
            .session_seeds
            .iter()
            .zip(&plan.reads_per_session)
            .flat_map(|(&seed, &n)| {
                let mut generator = ChaCha8Rng::seed_from_u64(derive_seed(seed, "replaced", &[]));
                (0..n).map(move |_| generator.random())
            })
            .collect();
        send(&Tensor::from_slice(&numbers), self.device())
    }
}

impl Recommender for Network<'_> {
    fn n_items(&self) -> i64 {
        self.share.n_items
    }

    fn share(&self) -> Share<'_> {
        self.share.clone()
    }

    fn device(&self) -> Device {
        self.parameters.values().device()
    }

    fn scores_are_logits(&self) -> bool {
        true
    }

    fn encode(&self, known: &Batch) -> Result<Tensor, CollectiveError> {
        let states = self.read(known, self.objective.next(&known.lengths, self.attends()))?;
        Ok(tch::no_grad(|| self.session_vectors(&states)))
    }

    fn scores(&self, encoded: &Tensor, items: Range<i64>) -> Tensor {
        tch::no_grad(|| {
            let first = items.start - self.share.rows.start;
            let rows = |index: usize| self.parameters.leaf(index).narrow(0, first, items.end - items.start);
            let table = rows(self.scored_table);
            if table.kind() == Kind::Float {
                return rows(ITEM_BIAS).addmm(encoded, &table.tr());
            }
            encoded.to_kind(table.kind()).matmul(&table.tr()).to_kind(Kind::Float) + rows(ITEM_BIAS)
        })
    }
}
