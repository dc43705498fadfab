//! A log-linear model of co-occurrence counts: the baseline for models that learn vectors.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{CandidateIndex, Candidates, CountingModel, Encoded, Recommender, SparseScores};
use crate::collective::CollectiveError;
use crate::config::{LogLinearConfig, Reminders};
use crate::data::{Batch, DataError, Features, SessionFile};

/// Name of the weights in a checkpoint.
const WEIGHTS: &str = "weights";

/// Sessions whose candidates are found together.
const BLOCK: usize = 256;

/// Largest number of steps of Newton's method.
const MAX_STEPS: usize = 20;

/// The fit ends when a step lowers the loss by less.
const TOLERANCE: f64 = 1e-7;

/// Added to the scores of candidates, so that they rank before all other items.
const CANDIDATE_SCORE: f64 = 1e4;

/// Score of a candidate that may not be recommended: it ranks behind all items.
const HIDDEN: f64 = -2.0 * CANDIDATE_SCORE;

/// Scores of candidates that are linear in their features. The weights minimise the cross entropy
/// of the last items of sessions among their candidates. Other items rank behind the candidates, by
/// occurrences.
pub struct LogLinear {
    config: LogLinearConfig,
    features: Features,
    index: CandidateIndex,
    /// f32 `[F]`.
    weights: Tensor,
    /// More than the occurrences of any item.
    most_occurrences: f64,
}

impl LogLinear {
    /// A model without counts.
    ///
    /// # Errors
    /// An attribute is not among the features.
    pub fn new(
        config: &LogLinearConfig,
        features: &Features,
        reminders: Reminders,
        max_length: usize,
    ) -> Result<Self, String> {
        let index =
            CandidateIndex::new(&config.candidates, features, reminders, max_length, Device::Cpu)?;
        let weights = Tensor::zeros([index.n_features()], (Kind::Float, Device::Cpu));
        let (config, features) = (config.clone(), features.clone());
        Ok(Self { config, features, index, weights, most_occurrences: 1.0 })
    }

    fn update_most_occurrences(&mut self) {
        let most = self.index.occurrences().iter().max().copied().unwrap_or_default();
        self.most_occurrences = most as f64 + 1.0;
    }

    /// Fits the weights on sessions of a file, by the counts of the days before or, for the first
    /// day, of this day.
    fn fit(&mut self, file: &SessionFile) -> Result<(), DataError> {
        let _no_grad = tch::no_grad_guard();
        let sessions = file.read(&file.spans(0..file.n_sessions()))?;
        let n_fitted = self.config.n_fitted.min(sessions.len());
        let rows: Vec<_> =
            (0..n_fitted).map(|number| (&sessions, number * sessions.len() / n_fitted)).collect();
        let examples: Vec<Examples> = rows
            .chunks(BLOCK)
            .map(|rows| {
                let batch = Batch::new(rows, &self.features);
                let ends = batch.lengths.iter().scan(0, |end, &length| {
                    *end += length as i64;
                    Some(*end - 1)
                });
                let last: Vec<i64> = ends.collect();
                let targets = batch.items().index_select(0, &Tensor::from_slice(&last));
                Examples::new(self.index.of_targets(&last, &batch), &targets)
            })
            .collect();
        self.weights = fit(&examples, self.index.n_features(), self.config.l2);
        Ok(())
    }
}

/// Candidates of some sessions whose target is among them.
struct Examples {
    /// f32 `[n, E, F]`.
    features: Tensor,
    /// 0 for a candidate, −∞ for none: `[n, E]`.
    mask: Tensor,
    /// 1 for the target, else 0: `[n, E]`.
    is_target: Tensor,
}

impl Examples {
    fn new(candidates: Candidates, targets: &Tensor) -> Self {
        let Candidates { items, features, is_hidden } = candidates;
        let is_none = items.eq(0).logical_or(&is_hidden);
        let is_target = items.eq_tensor(&targets.unsqueeze(1)).logical_and(&is_none.logical_not());
        let rows = is_target.any_dim(1, false).nonzero().squeeze_dim(1);
        let mask = items.zeros_like().to_kind(Kind::Float);
        let mask = mask.masked_fill(&is_none, f64::NEG_INFINITY);
        let [features, mask, is_target] =
            [features, mask, is_target.to_kind(Kind::Float)].map(|x| x.index_select(0, &rows));
        Self { features, mask, is_target }
    }

    /// Log probabilities of the candidates, `[n, E]`.
    fn log_probabilities(&self, weights: &Tensor) -> Tensor {
        (self.features.matmul(&weights.to_kind(Kind::Float)) + &self.mask)
            .log_softmax(1, Kind::Float)
    }

    /// Summed cross entropy of the targets.
    fn loss(&self, weights: &Tensor) -> f64 {
        let logs = self.log_probabilities(weights).masked_fill(&self.is_target.eq(0.0), 0.0);
        -logs.sum(Kind::Double).double_value(&[])
    }

    /// Gradient `[F]` and Hessian `[F, F]` of the summed cross entropy, f64.
    fn derivatives(&self, weights: &Tensor) -> (Tensor, Tensor) {
        let p = self.log_probabilities(weights).exp();
        let features = &self.features;
        let weighted = features * p.unsqueeze(2);
        let means = weighted.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        let of_targets = self.is_target.unsqueeze(1).matmul(features).squeeze_dim(1);
        let gradient =
            (&means - of_targets).sum_dim_intlist([0i64].as_slice(), false, Kind::Double);
        let hessian =
            weighted.flatten(0, 1).tr().matmul(&features.flatten(0, 1)) - means.tr().matmul(&means);
        (gradient, hessian.to_kind(Kind::Double))
    }
}

/// Minimises the mean cross entropy plus `l2` times the squared weights by Newton's method: f32
/// `[F]`.
fn fit(examples: &[Examples], n_features: i64, l2: f64) -> Tensor {
    let n: i64 = examples.iter().map(|block| block.mask.size()[0]).sum();
    let mut weights = Tensor::zeros([n_features], (Kind::Double, Device::Cpu));
    if n == 0 {
        return weights.to_kind(Kind::Float);
    }
    let loss = |weights: &Tensor| {
        let summed: f64 = examples.iter().map(|block| block.loss(weights)).sum();
        summed / n as f64 + l2 * weights.dot(weights).double_value(&[])
    };
    let mut least = loss(&weights);
    for _ in 0..MAX_STEPS {
        let mut gradient = &weights * (2.0 * l2);
        // Features that never differ between candidates have no curvature of their own.
        let mut hessian =
            Tensor::eye(n_features, (Kind::Double, Device::Cpu)) * (2.0 * l2).max(1e-9);
        for block in examples {
            let (of_block, curvature) = block.derivatives(&weights);
            gradient += of_block / n as f64;
            hessian += curvature / n as f64;
        }
        let step = Tensor::linalg_solve(&hessian, &gradient, true);
        // The loss is convex: a step that is short enough lowers it.
        let shorter =
            (0..MAX_STEPS).map(|halvings| &weights - &step * 0.5f64.powi(halvings as i32));
        let lower = shorter
            .map(|next| (loss(&next), next))
            .find(|(next_loss, _)| *next_loss < least - TOLERANCE);
        let Some((next_loss, next)) = lower else { break };
        (least, weights) = (next_loss, next);
    }
    weights.to_kind(Kind::Float)
}

impl CountingModel for LogLinear {
    /// Libtorch works on one thread meanwhile, so that the weights are the same for any number of
    /// threads.
    fn add_day(&mut self, day: i64, file: &SessionFile) -> Result<(), DataError> {
        let n_threads = tch::get_num_threads();
        tch::set_num_threads(1);
        let result = if self.index.last_day().is_none() {
            self.index.add_day(day, file).and_then(|()| self.fit(file))
        } else {
            self.fit(file).and_then(|()| self.index.add_day(day, file))
        };
        tch::set_num_threads(n_threads);
        self.update_most_occurrences();
        result
    }

    fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = self.index.tensors();
        tensors.push((WEIGHTS.to_owned(), self.weights.shallow_clone()));
        tensors
    }

    fn load(&mut self, tensors: &[(String, Tensor)]) -> Result<(), String> {
        let saved = tensors.iter().find(|(name, _)| name == WEIGHTS);
        let (_, saved) = saved.ok_or_else(|| format!("tensor `{WEIGHTS}` is missing"))?;
        if saved.size() != self.weights.size() {
            return Err(format!(
                "`{WEIGHTS}` has the shape {:?}, the model's is {:?}",
                saved.size(),
                self.weights.size()
            ));
        }
        self.weights = saved.copy();
        self.index.load(tensors)?;
        self.update_most_occurrences();
        Ok(())
    }
}

impl Recommender for LogLinear {
    fn n_items(&self) -> i64 {
        self.features.n_items()
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn scores_are_logits(&self) -> bool {
        false
    }

    /// Only sparse scores, f64.
    fn encode(&self, known: &Batch) -> Result<Encoded, CollectiveError> {
        let Candidates { items, features, is_hidden } = self.index.of_next(known);
        let scores = features.matmul(&self.weights).masked_fill(&is_hidden, HIDDEN);
        let scores = scores.to_kind(Kind::Double) + CANDIDATE_SCORE;
        let vectors = Tensor::zeros([items.size()[0], 0], (Kind::Float, Device::Cpu));
        Ok(Encoded { vectors, sparse: Some(SparseScores { items, scores }) })
    }

    fn scores(&self, encoded: &Encoded, items: Range<i64>) -> Tensor {
        let sparse = encoded.sparse.as_ref().expect("this model encodes sparse scores");
        let occurrences = &self.index.occurrences()[items.start as usize..items.end as usize];
        let base = Tensor::from_slice(occurrences).to_kind(Kind::Double) / self.most_occurrences;
        let scores = base.unsqueeze(0).repeat([sparse.items.size()[0], 1]);
        sparse.write_to(&scores, None, &items);
        scores
    }
}
