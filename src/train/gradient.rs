//! Learning by gradients: the step that one rank and many, CPU and GPU share.

use tch::{Device, Tensor};

use super::reduction::{ExactSum, Reduction};
use super::{Day, Learner, TrainError};
use crate::checkpoint::Tensors;
use crate::collective::Reduce;
use crate::config::Config;
use crate::data::{Batch, Features, Loader, Noise};
use crate::model::head::{Rivals, Sampler};
use crate::model::{LossConfig, LossSum, Network, Neural, Recommender};
use crate::optim::{Optimizer, average_and_clip};

/// A network and its optimizer. The optimizer's state goes on from day to day, the learning rate starts anew.
pub(super) struct GradientLearner {
    network: Network,
    optimizer: Optimizer,
}

impl GradientLearner {
    pub(super) fn new(
        model: &Neural<'_>,
        config: &Config,
        features: &Features,
        device: Device,
    ) -> Result<Self, String> {
        let network = Network::new(model, features, config.data.max_length, (config.run.seed, device))?;
        let rates = (config.train.learning_rate, config.train.weight_decay);
        let values = network.parameters().values();
        let optimizer = Optimizer::new(&values, network.tables(), config.train.tables, rates);
        Ok(Self { network, optimizer })
    }

    /// *All ranks.* One step: gradients of this rank's micro-batches, summed over ranks, averaged over all
    /// targets, clipped, applied. Returns the summed loss and number of targets of the global batch, `[2]`.
    fn train_step(
        &mut self,
        passes: &[Batch],
        day: &Day<'_>,
        rivals: &Rivals,
        share: f64,
    ) -> Result<Tensor, TrainError> {
        let config = &day.config.train;
        let mut exact = match day.config.run.reduction {
            Reduction::Fast => None,
            Reduction::Reproducible => Some(ExactSum::new(&self.network.parameters().reduced())),
        };
        self.network.parameters_mut().zero_gradients();
        for batch in passes {
            let mut noise = Noise::new(batch, day.config.data.max_length);
            let LossSum { loss, n_targets } = self.network.backward(batch, &mut noise, rivals);
            let parameters = self.network.parameters_mut();
            let mut tail = parameters.tail();
            tail += Tensor::stack(&[loss, Tensor::from(n_targets as f64).to_device(day.place.device)], 0);
            if let Some(exact) = &mut exact {
                exact.add(&parameters.reduced());
                parameters.zero_gradients();
            }
        }

        let parameters = self.network.parameters_mut();
        let mut sums = parameters.reduced();
        match exact {
            None => day.place.collective.all_reduce(&mut sums, Reduce::Sum)?,
            Some(exact) => sums.copy_(&exact.all_reduce(day.place.collective)?),
        }
        let tail = parameters.tail();
        let gradients = parameters.gradients();
        let (scale, _) = average_and_clip(&gradients, &tail.get(1), config.clip_norm);
        self.optimizer.step(&parameters.values(), &gradients, &scale, share);
        Ok(tail)
    }
}

impl Learner for GradientLearner {
    fn recommender(&self) -> &dyn Recommender {
        &self.network
    }

    fn learn_day(&mut self, day: &mut Day<'_>) -> Result<(), TrainError> {
        let n_steps = day.plan.n_steps();
        let collective = day.place.collective;
        let steps = Loader::start(&day.plan, day.features, collective.rank(), collective.world_size());
        let train = &day.config.train;
        let rivals: Box<dyn Fn(u64) -> Rivals> = match train.loss {
            LossConfig::Softmax { label_smoothing } => {
                let max_logits = train.max_logits();
                Box::new(move |_| Rivals::All { label_smoothing, max_logits })
            }
            LossConfig::Sampled { n_negatives, power } => {
                let sampler = Sampler::new(day.occurrences, n_negatives, power, day.place.device);
                Box::new(move |step_seed| sampler.draw(step_seed))
            }
        };
        let mut n_done = 0;
        for passes in steps {
            let passes: Vec<Batch> = passes?.iter().map(|batch| batch.to_device(day.place.device)).collect();
            let share = train.schedule.share(n_done, n_steps);
            // All micro-batches of a step have its seed, and every rank owns one at least.
            let sums = self.train_step(&passes, day, &rivals(passes[0].step_seed), share)?;
            let lr = train.learning_rate * share;
            let mean = || sums.double_value(&[0]) / sums.double_value(&[1]);
            day.step_done(self, n_done, lr, mean)?;
            n_done += 1;
        }
        if n_done < n_steps {
            return Err(TrainError::LoaderEnded { day: day.plan.day, n_done, n_steps });
        }
        Ok(())
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
        let parameters = self.network.parameters();
        parameters.assign(&parameters.values(), weights)
    }
}
