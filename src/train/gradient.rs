//! Learning by gradients: the step that one rank and many, CPU and GPU share.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use super::fault::{self, Fault};
use super::reduction::Reduction;
use super::{Day, Learner, NonFinite, Status, TrainError};
use crate::checkpoint::{Shared, Tensors};
use crate::collective::exact::ExactSum;
use crate::collective::{Collective, CollectiveError, Reduce, rounded};
use crate::config::Config;
use crate::data::{Batch, Features, Loader, Noise};
use crate::device::send;
use crate::model::head::{Contestants, Rivals};
use crate::model::parameters::copy_rows;
use crate::model::{LossSum, Network, Neural, Recommender, Share};
use crate::optim::{Optimizer, average_and_clip};

/// A network and its optimizer. The optimizer's state goes on from day to day, the learning rate starts anew.
pub(super) struct GradientLearner<'a> {
    network: Network<'a>,
    optimizer: Optimizer,
    /// What gradients of micro-batches are added up in, if in whole numbers.
    exact: Option<ExactSum>,
    fault: Option<Fault>,
}

impl<'a> GradientLearner<'a> {
    pub(super) fn new(
        model: &Neural<'_>,
        config: &Config,
        features: &Features,
        device: Device,
        share: Share<'a>,
    ) -> Result<Self, String> {
        let random = (config.run.seed, device);
        let network = Network::with_share(model, features, config.data.max_length, random, share)?;
        let rates = (config.train.learning_rate, config.train.weight_decay);
        let values = network.parameters().values();
        let optimizer = Optimizer::new(&values, network.tables(), config.train.tables, rates);
        let exact = match config.run.reduction {
            Reduction::Fast | Reduction::Bf16 => None,
            Reduction::Reproducible => Some(ExactSum::new(&network.parameters().reduced())),
        };
        Ok(Self { network, optimizer, exact, fault: Fault::planted() })
    }

    /// *All ranks.* One step: gradients of this rank's micro-batches, summed over ranks, averaged over all targets,
    /// clipped, applied.
    fn train_step(
        &mut self,
        passes: &[Batch],
        day: &mut Day<'_>,
        rivals: &Rivals,
        share: f64,
    ) -> Result<Status, TrainError> {
        let config = &day.config.train;
        let device = day.place.device;
        // The optimizer has left the gradients zero.
        let _ = self.network.parameters().tail().zero_();
        let own_loss = Tensor::zeros([1], (Kind::Float, device));
        // Told once in a step, with its first pass.
        let mut wishes = day.wishes().map(|asked| f64::from(u8::from(asked)));
        // Ranks that score for each other make as many passes as the one with most.
        let n_passes = match (self.network.share().company(), &self.exact) {
            (Some(company), Some(_)) => {
                (config.global_batch / config.micro_batch).div_ceil(company.world_size())
            }
            _ => passes.len(),
        };
        let nothing = Batch::new(&[], day.features).to_device(device);
        let none_left = std::iter::repeat_n(&nothing, n_passes - passes.len());
        for batch in passes.iter().chain(none_left) {
            let mut noise = Noise::new(batch, day.config.data.max_length);
            let LossSum { loss, n_targets } =
                self.network.backward(batch, &mut noise, rivals, &mut day.laps)?;
            let _ = own_loss.shallow_clone().g_add_(&loss);
            let [stop, save] = std::mem::take(&mut wishes);
            let counts = send(&Tensor::from_slice(&[n_targets as f32, stop as f32, save as f32]), device);
            let parameters = self.network.parameters_mut();
            let mut tail = parameters.tail();
            tail += Tensor::cat(&[loss.view([1]), counts], 0);
            if let Some(exact) = &mut self.exact {
                exact.take(&mut parameters.reduced());
            }
        }

        let own_squares = self.network.complete_own_gradients()?;
        let mut sums = self.network.to_reduce();
        let parameters = self.network.parameters_mut();
        let fault =
            self.fault.as_ref().and_then(|fault| fault.strike(day.rank(), day.state.position.global_step));
        if fault == Some(fault::Kind::Nan) {
            let _ = own_loss.shallow_clone().fill_(f64::NAN);
            let _ = sums.fill_(f64::NAN);
            if let Some(exact) = &mut self.exact {
                exact.take(&mut sums);
            }
        }
        day.laps.end("backward");
        match (&mut self.exact, day.config.run.reduction) {
            (Some(exact), _) => exact.reduce_into(&mut sums, day.place.collective)?,
            (None, Reduction::Bf16) => add_up_in_bf16(&mut sums, &parameters.tail(), day.place.collective)?,
            (None, _) => day.place.collective.all_reduce(&mut sums, Reduce::Sum)?,
        }
        day.laps.end("communication");
        let (tail, reduced) = (parameters.tail(), parameters.reduced());
        let common = reduced.narrow(0, 0, reduced.size()[0] - tail.size()[0]);
        let (scale, norm) = average_and_clip(&common, &own_squares, &tail.get(1), config.clip_norm);
        let status = Status::new(&tail, &norm, &own_loss);
        if config.non_finite == NonFinite::Stop || status.read().is_finite() {
            self.optimizer.step(&parameters.values(), &parameters.gradients(), &scale, share);
        } else {
            parameters.zero_gradients();
        }
        if fault == Some(fault::Kind::Desync) {
            let _ = parameters.common_values().get(7).g_add_scalar_(1e-3);
        }
        day.laps.end("optimizer");
        Ok(status)
    }

    /// *All ranks.* Whether what all have is the same to the last bit.
    fn compare_ranks(&self, day: &Day<'_>, n_done: usize) -> Result<(), TrainError> {
        let bits = self.network.parameters().common_values().view_dtype(Kind::Int).to_kind(Kind::Int64);
        let sums = [bits.sum(Kind::Int64), (&bits * &bits).sum(Kind::Int64)];
        let mine = sums.map(|sum| sum.int64_value(&[]));
        let all = day.place.collective.gather(&mine)?;
        let all: Vec<&[i64]> = all.chunks_exact(2).collect();
        let n_like = |sums: &[i64]| all.iter().filter(|other| **other == sums).count();
        // Of two groups that are equally large, that of the lowest rank is taken for the right one.
        let most = all.iter().map(|sums| n_like(sums)).max().unwrap_or(0);
        let right = all.iter().find(|sums| n_like(sums) == most).copied().unwrap_or_default();
        if most == all.len() {
            return Ok(());
        }
        let hosts = day.place.collective.gather_bytes(crate::collective::host_name().as_bytes())?;
        let differing = (0..all.len()).filter(|&rank| all[rank] != right);
        let ranks = differing.map(|rank| (rank, String::from_utf8_lossy(&hosts[rank]).into_owned()));
        let is_tie = 2 * most <= all.len();
        Err(TrainError::Desync { day: day.plan.day, step: n_done, ranks: ranks.collect(), is_tie })
    }
}

/// *All ranks.* Adds `sums: [n]` up over ranks, in bf16 all but their tail, which holds counts.
fn add_up_in_bf16(
    sums: &mut Tensor,
    tail: &Tensor,
    collective: &dyn Collective,
) -> Result<(), CollectiveError> {
    if collective.world_size() == 1 {
        return Ok(());
    }
    let mut gradients = sums.narrow(0, 0, sums.size()[0] - tail.size()[0]);
    rounded(&mut gradients, Kind::BFloat16, |sums| collective.all_reduce(sums, Reduce::Sum))?;
    collective.all_reduce(&mut tail.shallow_clone(), Reduce::Sum)
}

impl Learner for GradientLearner<'_> {
    fn recommender(&self) -> &dyn Recommender {
        &self.network
    }

    fn learn_day(&mut self, day: &mut Day<'_>) -> Result<ControlFlow<()>, TrainError> {
        let n_steps = day.plan.n_steps();
        let collective = day.place.collective;
        let mut n_done = day.state.position.day_step;
        let ranks = (collective.rank(), collective.world_size());
        let steps = Loader::start(&day.plan, day.features, ranks, n_done);
        let train = &day.config.train;
        let contestants = Contestants::new(
            train.loss,
            day.occurrences,
            train.logits(day.config.run.precision.of_logits(), day.place.device),
            day.place.device,
        );
        for passes in steps {
            if let Some(watch) = collective.watch() {
                watch.at(day.plan.day, n_done + 1);
            }
            let passes = passes?;
            // On a GPU, what waits for the device may wait for another rank.
            let _step = collective.watch().map(|watch| watch.begin("a step".to_owned()));
            let passes: Vec<Batch> = passes.iter().map(|batch| batch.to_device(day.place.device)).collect();
            let share = train.schedule.share(n_done, n_steps);
            day.laps.end("data");
            // All micro-batches of a step have its seed, and every rank owns one at least.
            let status = self.train_step(&passes, day, &contestants.of_step(passes[0].step_seed), share)?;
            n_done += 1;
            let every = day.config.run.compare_ranks_every;
            if every > 0 && (day.state.position.global_step + 1).is_multiple_of(every) {
                self.compare_ranks(day, n_done)?;
            }
            if day.step_done(self, train.learning_rate * share, &status)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            day.laps.end("records");
        }
        self.network.end_passes();
        if n_done < n_steps {
            return Err(TrainError::LoaderEnded { day: day.plan.day, n_done, n_steps });
        }
        Ok(ControlFlow::Continue(()))
    }

    fn tensors(&self) -> Tensors {
        let parameters = self.network.parameters();
        let state = self.optimizer.state().into_iter().flat_map(|(of, first, flat)| {
            let named = parameters.named_from(flat, first);
            named.into_iter().map(move |(name, tensor)| (format!("{of}.{name}"), tensor))
        });
        Tensors { weights: parameters.named(&parameters.values()), optimizer: state.collect() }
    }

    fn optimizer_steps(&self) -> i32 {
        self.optimizer.n_steps()
    }

    fn load_weights(&mut self, weights: &[(String, Tensor)]) -> Result<(), String> {
        let (parameters, share) = (self.network.parameters(), self.network.share());
        let own = weights.iter().map(|(name, tensor)| (name.clone(), share.own_rows(name, tensor)));
        parameters.assign(&parameters.values(), &own.collect::<Vec<_>>(), &[])
    }

    fn go_on(&mut self, from: &Shared<'_>) -> Result<(), TrainError> {
        let mismatch = |problem| from.mismatch(problem);
        let (parameters, tables) = (self.network.parameters(), self.network.tables());
        parameters.check_names(from.weight_names()).map_err(mismatch)?;
        let state = self.optimizer.state().into_iter().flat_map(|(of, first, flat)| {
            let named = parameters.named_from(flat, first).into_iter();
            named.map(move |(name, tensor)| {
                let may_grow = tables.iter().any(|table| table.name == name);
                (format!("{of}.{name}"), tensor, may_grow)
            })
        });
        let state: Vec<_> = state.collect();
        let is_saved = |name: &str| from.optimizer_names().any(|saved| saved == name);
        if let Some((name, ..)) = state.iter().find(|(name, ..)| !is_saved(name)) {
            return Err(mismatch(format!("`{name}` is missing")).into());
        }
        // A catalogue may have grown: its new rows are as they were made, without a past.
        for saved in from.weights() {
            let (name, tensor) = saved?;
            parameters.assign_one(&parameters.values(), (name, &tensor), tables).map_err(mismatch)?;
        }
        for saved in from.optimizer() {
            let (name, saved) = saved?;
            if let Some((_, tensor, may_grow)) = state.iter().find(|(wanted, ..)| wanted == name) {
                copy_rows(name, &saved, tensor, *may_grow).map_err(mismatch)?;
            }
        }
        self.optimizer.set_n_steps(from.state().optimizer_steps);
        Ok(())
    }
}
