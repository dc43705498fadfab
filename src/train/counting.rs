//! Learning by counting, over the same days, loaders and ranks.

use tch::Tensor;

use super::{Day, Learner, TrainError};
use crate::checkpoint::Tensors;
use crate::data::{DayPlan, Loader};
use crate::model::{Counts, Order, Recommender};

/// Counts that grow day by day.
pub(super) struct CountLearner {
    order: Order,
    counts: Counts,
}

impl CountLearner {
    pub(super) fn new(order: Order, n_items: i64) -> Self {
        Self { order, counts: Counts::new(order, n_items) }
    }
}

impl Learner for CountLearner {
    fn recommender(&self) -> &dyn Recommender {
        &self.counts
    }

    /// Each session counts once, whatever the epochs and steps of the configuration.
    fn learn_day(&mut self, day: &mut Day<'_>) -> Result<(), TrainError> {
        let collective = day.place.collective;
        let plan = DayPlan { n_epochs: 1, max_steps: None, pass_by_pass: false, ..day.plan.clone() };
        let mut mine = Counts::new(self.order, self.counts.n_items());
        for passes in Loader::start(&plan, day.features, collective.rank(), collective.world_size()) {
            passes?.iter().for_each(|batch| mine.count(batch));
            day.report.tick();
        }
        let mut items = mine.items().to_vec();
        collective.sum_i64(&mut items)?;
        let pairs: Vec<i64> = mine.pairs().flat_map(|((item, next), n)| [item, next, n]).collect();
        let bytes: Vec<u8> = pairs.iter().flat_map(|number| number.to_le_bytes()).collect();
        let of_all: Vec<i64> = collective
            .gather_bytes(&bytes)?
            .concat()
            .chunks_exact(8)
            .map(|bytes| i64::from_le_bytes(bytes.try_into().expect("eight bytes")))
            .collect();
        self.counts.add(&items, of_all.chunks_exact(3).map(|entry| ((entry[0], entry[1]), entry[2])));
        Ok(())
    }

    fn tensors(&self) -> Tensors {
        let pairs: Vec<i64> = self.counts.pairs().flat_map(|((item, next), n)| [item, next, n]).collect();
        Tensors {
            weights: vec![
                ("items".to_owned(), Tensor::from_slice(self.counts.items())),
                ("pairs".to_owned(), Tensor::from_slice(&pairs).view([-1, 3])),
            ],
            optimizer: Vec::new(),
        }
    }

    fn optimizer_steps(&self) -> i32 {
        0
    }

    fn load_weights(&mut self, weights: &[(String, Tensor)]) -> Result<(), String> {
        let numbers = |name: &str| -> Result<Vec<i64>, String> {
            let found = weights.iter().find(|(weight, _)| weight == name);
            let (_, tensor) = found.ok_or_else(|| format!("tensor `{name}` is missing"))?;
            Vec::try_from(tensor.reshape([-1])).map_err(|error| format!("tensor `{name}`: {error}"))
        };
        let (items, pairs) = (numbers("items")?, numbers("pairs")?);
        if items.len() as i64 != self.counts.n_items() {
            return Err(format!("it counts {} items, the schema has {}", items.len(), self.counts.n_items()));
        }
        self.counts.add(&items, pairs.chunks_exact(3).map(|entry| ((entry[0], entry[1]), entry[2])));
        Ok(())
    }
}
