//! A neural next-item model: input block, body, softmax over the catalogue.

use std::cell::RefCell;
use std::ops::Range;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Reduction, Tensor};

use super::encoder::{Encoder, Passage};
use super::head::{CrossEntropy, Rivals, Scored, Workspace, cross_entropy};
use super::input::{Input, Lookup};
use super::objective::{Objective, Plan, Visible};
use super::parameters::{Initial, Linear};
use super::rows::{add_rows, add_rows_alike};
use super::{Neural, Parameters, Recommender, Share, View};
use crate::collective::exact::ExactSum;
use crate::collective::{Collective, CollectiveError, Reduce, rounded};
use crate::data::plan::derive_seed;
use crate::data::{Batch, Features, Noise, with_seed};
use crate::device::host::each_alone;
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
    encoder: Encoder,
    objective: Objective,
    /// Tells original events from replaced ones.
    detector: Option<Linear>,
    /// The table that items are scored against.
    scored_table: usize,
    /// Number of tables and their like, which come first among the parameters.
    n_tables: usize,
    share: Share<'a>,
    /// With whom the gradients of what items are scored with are added up as soon as they are there, beside going back through
    /// the body, and as what they travel. Those of what was looked up, which are there last, are few rows.
    ahead: Option<(&'a dyn Collective, Kind)>,
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

/// Goes back from the scalar `from`: its gradients by the parameters `rest`, of which those that it does not follow from are
/// undefined, and by what was looked up.
fn back(from: &Tensor, parameters: &Parameters, rest: Range<usize>, looked_up: &[Tensor]) -> Vec<Tensor> {
    let leaves = rest.clone().map(|index| parameters.leaf(index));
    let inputs: Vec<&Tensor> = leaves.chain(looked_up).collect();
    let mut gradients = Tensor::run_backward(&[from], &inputs, false, false);
    for (gradient, vectors) in gradients[rest.len()..].iter_mut().zip(looked_up) {
        if !gradient.defined() {
            *gradient = vectors.detach().zeros_like();
        }
    }
    gradients
}

/// Rows of consecutive parts, without the padding between them: its row ends each part.
fn joined<'a>(parts: impl ExactSizeIterator<Item = &'a Tensor>) -> Tensor {
    let last = parts.len() - 1;
    let own_rows = |(number, part): (usize, &Tensor)| match number {
        _ if number == last => part.shallow_clone(),
        _ => part.narrow(0, 0, part.size()[0] - 1),
    };
    let mut rows: Vec<Tensor> = parts.enumerate().map(own_rows).collect();
    if last == 0 { rows.remove(0) } else { Tensor::cat(&rows, 0) }
}

/// A model's parameters, by index, and what knows where they are.
struct Declared {
    scored_table: usize,
    n_tables: usize,
    encoder: Encoder,
    detector: Option<Linear>,
}

fn declare_parameters(
    config: &Neural<'_>,
    features: &Features,
    max_length: usize,
    share: &Share<'_>,
    initial: &mut Initial,
) -> Result<Declared, String> {
    let (input, head, objective) = (config.input(), config.head(), config.objective());
    initial.table(ITEM_TABLES[0], input.item_width, input.init_std, share);
    initial.column(ITEM_TABLES[1], 0.0, share);
    let scored_table = if head.tied {
        ITEM_TABLE
    } else {
        initial.table(ITEM_TABLES[2], input.item_width, input.init_std, share)
    };
    let first_table = initial.len();
    Input::declare_tables(input, features, initial);
    let n_tables = initial.len();
    let encoder = Encoder::declare(config, features, (first_table, max_length), initial)?;
    let is_replaced = matches!(objective, Objective::Replaced { .. });
    let detector = is_replaced.then(|| initial.linear("detector", config.width(), 1));
    Ok(Declared { scored_table, n_tables, encoder, detector })
}

/// Names and sizes of a model's parameters.
pub struct ParameterSizes {
    /// In the order of the flat buffers: tables first.
    pub named: Vec<(String, Vec<i64>)>,
    /// How many of them are tables and their like.
    pub n_tables: usize,
}

impl ParameterSizes {
    /// Of the parameters that [`Network::with_share`] would make.
    ///
    /// # Errors
    /// A configuration that does not fit the features.
    pub fn new(
        config: &Neural<'_>,
        features: &Features,
        max_length: usize,
        share: &Share<'_>,
    ) -> Result<Self, String> {
        let mut initial = Initial::sizes_only();
        let n_tables = declare_parameters(config, features, max_length, share, &mut initial)?.n_tables;
        Ok(Self { named: initial.into_sizes(), n_tables })
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
        let mut initial = Initial::default();
        let Declared { scored_table, n_tables, encoder, detector } =
            declare_parameters(config, features, max_length, &share, &mut initial)?;
        let parameters = Parameters::new(initial, device);
        let own_sum = share.is_exact().then(|| RefCell::new(ExactSum::new(&parameters.own_gradients())));
        // What is judged is looked up by itself.
        let ahead = share.copies().filter(|_| detector.is_none());
        Ok(Self {
            parameters,
            own_sum,
            encoder,
            objective: config.objective().clone(),
            detector,
            scored_table,
            n_tables,
            share,
            ahead,
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

    /// What the ranks have yet to sum after a pass, with the tail: flat.
    pub fn to_reduce(&self) -> Tensor {
        match self.ahead {
            Some(_) => self.parameters.gradients_from(self.scored().end),
            None => self.parameters.reduced(),
        }
    }

    /// The parameters that items are scored with, which lie side by side.
    fn scored(&self) -> Range<usize> {
        self.scored_table.min(ITEM_BIAS)..self.scored_table.max(ITEM_BIAS) + 1
    }

    /// *All ranks*, if they reduce ahead: adds the gradients of what items are scored with up, and does `work` meanwhile.
    fn reduce_scored(&self, work: &mut dyn FnMut()) -> Result<(), CollectiveError> {
        let Some((ranks, kind)) = self.ahead else {
            work();
            return Ok(());
        };
        let mut gradients = self.parameters.gradients_of(self.scored());
        rounded(&mut gradients, kind, |sums| ranks.reduce_during(sums, Reduce::Sum, work))
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

    /// Lets go of memory that only passes need, until the next one.
    pub fn end_passes(&mut self) {
        self.workspace = Workspace::default();
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
        let plan = |part: &Batch| self.objective.training(part, self.encoder.attends());
        let parts = batch.split(self.n_parts(batch)).into_iter();
        let parts = parts.map(|part| (plan(&part), part)).collect();
        self.backward_in_parts(batch, parts, noise, rivals, laps)
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
        let whole = batch.split(1).into_iter().map(|whole| (plan.clone(), whole)).collect();
        self.backward_in_parts(batch, whole, noise, rivals, laps)
    }

    /// Micro-batches go through the encoder in so many parts, each on threads of its own: its operations are small for many.
    fn n_parts(&self, batch: &Batch) -> usize {
        match self.device() {
            // What is judged as a whole is drawn as a whole.
            Device::Cpu if self.detector.is_none() => {
                batch.segments.len().min(tch::get_num_threads().max(1) as usize)
            }
            _ => 1,
        }
    }

    fn backward_in_parts(
        &mut self,
        batch: &Batch,
        parts: Vec<(Plan, Batch)>,
        noise: &mut Noise<'_>,
        rivals: &Rivals,
        laps: &mut Laps,
    ) -> Result<LossSum, CollectiveError> {
        let device = self.device();
        let n_targets: Vec<usize> = parts.iter().map(|(plan, _)| plan.targets.len()).collect();
        let counts = self.share.counts(n_targets.iter().sum::<usize>() as i64)?;
        if counts.iter().sum::<i64>() == 0 {
            self.reduce_scored(&mut || ())?;
            // Others may have read something.
            let nothing = Tensor::zeros([0], (Kind::Int64, device));
            let none = self.parameters.leaf(ITEM_TABLE).narrow(0, 0, 0).detach();
            self.give_to_all(&nothing, &none)?;
            return Ok(LossSum { loss: Tensor::zeros([], (Kind::Double, device)), n_targets: 0 });
        }
        let uniform = self.detector.map(|_| self.uniform(&parts));
        let (encoder, parameters) = (&self.encoder, &self.parameters);
        let columns = encoder.input.columns(batch, true);
        let lookups = encoder.input.look_up(parameters, &columns, &self.share)?;
        let whole = Passage::whole(columns, &lookups);
        let (mut work, mut predicted, mut first) = (Vec::with_capacity(parts.len()), Vec::new(), 0);
        for (plan, part) in parts {
            let n_events = part.n_events() as i64;
            predicted.extend(plan.targets.iter().map(|target| first + target));
            work.push((parameters.handle(), whole.part(first, n_events).into_leaves(), plan, part));
            first += n_events;
        }
        let predicted = send(&Tensor::from_slice(&predicted), device);
        let targets = batch.items().index_select(0, &predicted);
        let drawn_before = &*noise;
        let encoded = each_alone(work, |(parameters, passage, plan, part)| {
            let mut noise = drawn_before.of_part(&part);
            let states = encoder.states(&parameters, &passage, (plan, &part), Some(&mut noise));
            (encoder.vectors(&parameters, &states), parameters, passage.vectors, noise.n_draws())
        });
        laps.end("forward");
        let vectors =
            Tensor::cat(&encoded.iter().map(|(vectors, ..)| vectors.detach()).collect::<Vec<_>>(), 0);
        let CrossEntropy { mut loss, state_gradient, drawn } = tch::no_grad(|| {
            let own_sum = &self.own_sum;
            let mut scored = Scored {
                table: &parameters.leaf(self.scored_table).detach(),
                bias: &parameters.leaf(ITEM_BIAS).detach(),
                table_gradient: parameters.gradient(self.scored_table),
                bias_gradient: parameters.gradient(ITEM_BIAS),
                share: &self.share,
                counts: &counts,
                settle: &|| settle(own_sum, parameters),
            };
            cross_entropy(&vectors, &targets, &mut scored, rivals, uniform.as_ref(), &mut self.workspace)
        })?;
        laps.end("loss");
        let sizes: Vec<i64> = n_targets.iter().map(|&n| n as i64).collect();
        let gradients = state_gradient.split_with_sizes(sizes.as_slice(), 0);
        let n_draws = encoded.iter().map(|(.., n_draws)| *n_draws).max().unwrap_or(0);
        let rest = self.rest();
        let mut work: Vec<_> = encoded.into_iter().zip(gradients).collect();
        let mut gradients = Vec::new();
        self.reduce_scored(&mut || {
            gradients =
                each_alone(std::mem::take(&mut work), |((vectors, parameters, looked_up, _), gradient)| {
                    back(&(vectors * gradient).sum(Kind::Float), &parameters, rest.clone(), &looked_up)
                });
        })?;
        self.add_gradients(&gradients, &lookups)?;
        noise.go_on_from(n_draws);
        if let (Some(detector), Some(drawn), Objective::Replaced { weight, .. }) =
            (self.detector, drawn, &self.objective)
        {
            loss += self.detect(detector, *weight, batch, (&predicted, &drawn), noise)?;
        }
        laps.end("backward");
        Ok(LossSum { loss, n_targets: n_targets.iter().sum() })
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
        let plan = Plan::all(&batch.lengths, Visible::All);
        let columns = self.encoder.input.columns(&replaced, true);
        let lookups = self.encoder.input.look_up(&self.parameters, &columns, &self.share)?;
        let passage = Passage::whole(columns, &lookups).into_leaves();
        let states = self.encoder.states(&self.parameters, &passage, (plan, batch), Some(noise));
        let verdicts = detector.apply(&self.parameters, &states).squeeze_dim(1);
        let no_weight = None::<&Tensor>;
        let loss = weight
            * verdicts.binary_cross_entropy_with_logits(&is_replaced, no_weight, no_weight, Reduction::Sum);
        let gradients = back(&loss, &self.parameters, self.rest(), &passage.vectors);
        self.add_gradients(&[gradients], &lookups)?;
        Ok(loss.detach().to_kind(Kind::Double))
    }

    /// All parameters but the tables.
    fn rest(&self) -> Range<usize> {
        self.n_tables..self.parameters.views().len()
    }

    /// Adds what [`back`] gave for each part of a batch.
    fn add_gradients(&self, of_parts: &[Vec<Tensor>], lookups: &[Lookup<'_>]) -> Result<(), CollectiveError> {
        let rest = self.rest();
        tch::no_grad(|| {
            for of_part in of_parts {
                // What a pass did not use has no gradient.
                for (index, gradient) in rest.clone().zip(of_part).filter(|(_, gradient)| gradient.defined())
                {
                    let _ = self.parameters.gradient(index).g_add_(gradient);
                }
            }
            for (lookup, number) in lookups.iter().zip(rest.len()..) {
                let gradient = joined(of_parts.iter().map(|of_part| &of_part[number]));
                // The padding row is read but never learnt from reading it.
                let read = gradient * lookup.rows.unsqueeze(1).ne(0).to_kind(Kind::Float);
                if lookup.table == ITEM_TABLE && self.ahead.is_some() {
                    self.give_to_all(&lookup.rows, &read)?;
                    continue;
                }
                let mut of_table = self.parameters.gradient(lookup.table);
                lookup.asked.give_back(&self.share, &read, |places, all| {
                    add_rows(&mut of_table, places, all, self.share.is_exact());
                    settle(&self.own_sum, &self.parameters);
                })?;
            }
            Ok(())
        })
    }

    /// *All ranks*, if they reduce ahead: adds gradients `[N, D]` of rows `[N]` of the item table, which every rank has some of,
    /// to that of the table on all of them.
    fn give_to_all(&self, rows: &Tensor, gradients: &Tensor) -> Result<(), CollectiveError> {
        let Some((ranks, _)) = self.ahead else { return Ok(()) };
        let counts = ranks.gather(&[rows.size()[0]])?;
        let (rows, gradients) = (ranks.gather_rows(rows, &counts)?, ranks.gather_rows(gradients, &counts)?);
        add_rows_alike(&mut self.parameters.gradient(ITEM_TABLE), &rows, &gradients);
        Ok(())
    }

    /// The states that `plan` reads of `batch`, nothing being learnt: `[N, D]`.
    ///
    /// # Errors
    /// Those of the collective, where the tables are shared out.
    pub fn read(&self, batch: &Batch, plan: Plan) -> Result<Tensor, CollectiveError> {
        tch::no_grad(|| {
            let columns = self.encoder.input.columns(batch, false);
            let lookups = self.encoder.input.look_up(&self.parameters, &columns, &self.share)?;
            let passage = Passage::whole(columns, &lookups);
            Ok(self.encoder.states(&self.parameters, &passage, (plan, batch), None))
        })
    }

    /// Scores `[B, V]` of what follows sessions that lie in rectangles: `columns` each `[B, width]`, events first, and
    /// `lengths: [B]`. The same arithmetic as [`Recommender::encode`] and [`Recommender::scores`], with nothing in it
    /// that depends on how many sessions there are, so that it can be traced.
    pub fn next_scores(&self, columns: &[Tensor], lengths: &Tensor, width: i64) -> Tensor {
        tch::no_grad(|| {
            let (encoder, parameters) = (&self.encoder, &self.parameters);
            let columns: Vec<Tensor> =
                columns.iter().map(|column| column.reshape([-1]).constant_pad_nd([0, 1])).collect();
            let looked_up = encoder.input.look_up(parameters, &columns, &self.share);
            let lookups = looked_up.expect("an exported model has all rows, and asks nobody");
            let passage = Passage::whole(columns, &lookups);
            let vectors = encoder.next_vectors(parameters, &passage, &self.objective, (lengths, width));
            self.scores(&vectors, 0..self.share.n_items)
        })
    }

    /// Events of a session that can be read in service.
    pub fn served_length(&self, max_length: usize) -> usize {
        // Where padding is attended to, the model knows sessions of one length only, the mask included.
        self.encoder
            .padded_length
            .map_or(max_length, |length| length - usize::from(self.objective.masks(self.encoder.attends())))
    }

    /// Ends learning, and keeps tables of vectors in type `kind`: they are nearly all of a model. Items are then scored in
    /// that type; the rest stays float32.
    pub fn serve_with_tables_in(&mut self, kind: Kind) {
        for index in 0..self.parameters.views().len() {
            let is_table = index < self.n_tables && index != ITEM_BIAS;
            self.parameters.freeze(index, if is_table { kind } else { Kind::Float });
        }
    }

    /// A number in 0..1 for each target, from its session's seed.
    fn uniform(&self, parts: &[(Plan, Batch)]) -> Tensor {
        let numbers: Vec<f32> = parts
            .iter()
            .flat_map(|(plan, batch)| batch.session_seeds.iter().zip(&plan.reads_per_session))
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
        let states = self.read(known, self.objective.next(&known.lengths, self.encoder.attends()))?;
        Ok(tch::no_grad(|| self.encoder.vectors(&self.parameters, &states)))
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
