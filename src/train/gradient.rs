//! Learning by gradients: the step that one rank and many, CPU and GPU share.

use tch::{Device, Tensor};

use super::reduction::{ExactSum, Reduction};
use super::{Day, Learner, TrainError};
use crate::checkpoint::Tensors;
use crate::collective::Reduce;
use crate::config::Config;
use crate::data::{Batch, Loader, Noise};
use crate::model::{GruConfig, LossSum, Network, Recommender};
use crate::optim::{AdamW, average_and_clip, linear_decay};

/// A network and its optimizer. The optimizer's moments go on from day to day, the learning rate starts anew.
pub(super) struct GradientLearner {
    network: Network,
    adamw: AdamW,
}

impl GradientLearner {
    pub(super) fn new(model: &GruConfig, config: &Config, n_items: i64, device: Device) -> Self {
        let network = Network::new(model, n_items, config.run.seed, device);
        let adamw = AdamW::new(&network.parameters().values(), config.train.weight_decay);
        Self { network, adamw }
    }

    /// *All ranks.* One step: gradients of this rank's micro-batches, summed over ranks, averaged over all
    /// targets, clipped, applied. Returns the summed loss and number of targets of the global batch, `[2]`.
    fn train_step(
        &mut self,
        passes: &[Batch],
        day: &Day<'_>,
        learning_rate: f64,
    ) -> Result<Tensor, TrainError> {
        let config = &day.config.train;
        let mut exact = match day.config.run.reduction {
            Reduction::Fast => None,
            Reduction::Reproducible => Some(ExactSum::new(&self.network.parameters().reduced())),
        };
        self.network.parameters_mut().zero_gradients();
        for batch in passes {
            let mut noise = Noise::new(batch, day.config.data.max_length);
            let LossSum { loss, n_targets } = self.network.backward(batch, &mut noise, config.max_logits());
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
        let mut gradients = parameters.gradients();
        let _ = average_and_clip(&mut gradients, &tail.get(1), config.clip_norm);
        self.adamw.step(&mut parameters.values(), &gradients, learning_rate);
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
        let mut n_done = 0;
        for passes in steps {
            let passes: Vec<Batch> = passes?.iter().map(|batch| batch.to_device(day.place.device)).collect();
            let lr = linear_decay(day.config.train.learning_rate, n_done, n_steps);
            let sums = self.train_step(&passes, day, lr)?;
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
        let (m, v) = self.adamw.moments();
        let moments = |of: &str, flat: &Tensor| {
            parameters
                .named(flat)
                .into_iter()
                .map(|(name, t)| (format!("{of}.{name}"), t))
                .collect::<Vec<_>>()
        };
        let mut optimizer = moments("m", m);
        optimizer.extend(moments("v", v));
        Tensors { weights: parameters.named(&parameters.values()), optimizer }
    }

    fn optimizer_steps(&self) -> i32 {
        self.adamw.n_steps()
    }

    fn load_weights(&mut self, weights: &[(String, Tensor)]) -> Result<(), String> {
        let parameters = self.network.parameters();
        parameters.assign(&parameters.values(), weights)
    }
}
