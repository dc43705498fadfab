//! Models: their parameters, scores, losses and gradients. The training loop is in `train`.
//!
//! Every model is a [`Recommender`], so that evaluation and serving are the same for all. A neural
//! model ([`Network`]) is an input block from events to vectors ([`input`]), a body from vectors to
//! states ([`Gru`], [`Xlnet`]) and a softmax over the catalogue ([`head`]). The [`objective`]
//! chooses which events are hidden and which are predicted. Gradients of the tables do not go
//! through autograd: see [`head`].

mod attributes;
mod baseline;
mod body;
mod content;
mod encoder;
mod evidence;
mod gradient_hooks;
mod gru;
pub mod head;
pub mod import;
pub mod input;
mod item_table;
mod item_vectors;
mod loglinear;
mod neighbours;
mod network;
pub mod objective;
pub mod parameters;
mod prepare;
mod rows;
mod start;
mod xlnet;

use std::ops::Range;

use tch::{Device, Kind, Tensor};

pub use baseline::{Baseline, BaselineKind};
pub use body::Layout;
pub use evidence::{CandidateIndex, Candidates};
pub use gradient_hooks::{GradientHooks, NoHooks};
pub use gru::Gru;
pub use item_table::{ItemTable, LocalRows};
pub use loglinear::LogLinear;
pub use neighbours::Neighbours;
pub use network::{COUNTS, ITEM_TABLES, LossSum, Network, ParameterSizes};
pub use parameters::{Gradients, Parameters, RowList, View};
pub use prepare::{PreparedBatch, Preparer, SizeBounds, StepSizes};
pub use xlnet::Xlnet;

use network::ITEM_TABLE;

use crate::collective::CollectiveError;
pub use crate::config::{
    CandidatesConfig, Decay, EvidenceConfig, GruConfig, HeadConfig, InputConfig, LogLinearConfig,
    LossConfig, ModelConfig, NeighboursConfig, Neural, Objective, XlnetConfig,
};
use crate::data::{Batch, DataError, Features, SessionFile};

/// Largest catalogue whose pairs are counted: tables of neighbours hold i32.
const MAX_COUNTED_ITEMS: i64 = 1 << 31;

impl ModelConfig {
    /// Checks the keys that depend on the features.
    ///
    /// # Errors
    /// Returns the first key that does not fit the features.
    pub fn check_features(&self, features: &Features) -> Result<(), String> {
        let n_items = features.n_items();
        let candidates = self.candidates();
        // `Neighbours` stores item indices in 32 bits.
        if matches!(self, ModelConfig::Vsknn(_)) && n_items > 1 << 32 {
            return Err(format!("`kind` vsknn knows at most {} items, not {n_items}", 1u64 << 32));
        }
        if candidates.is_some() && n_items > MAX_COUNTED_ITEMS {
            return Err(format!(
                "`candidates` knows at most {MAX_COUNTED_ITEMS} items, not {n_items}"
            ));
        }
        if let Some(candidates) = candidates {
            evidence::check_attributes(candidates, features)?;
        }
        let Some(model) = self.neural() else { return Ok(()) };
        if let Some(content) = &model.input().content {
            content::content_columns(content, features)?;
        }
        model.input().aggregated_width(features).map(|_| ())
    }
}

/// A model that scores every item of the catalogue as the next item of a session.
pub trait Recommender {
    /// Rows of the catalogue `V`, padding (0) and unknown (1) included.
    fn n_items(&self) -> i64;

    /// Device of the batches and of the scores.
    fn device(&self) -> Device;

    /// Whether scores are logits, so that their cross entropy is meaningful.
    fn scores_are_logits(&self) -> bool;

    /// *All ranks*, if the item table is sharded. Encodes each session.
    ///
    /// # Errors
    /// A collective call fails.
    fn encode(&self, known: &Batch) -> Result<Encoded, CollectiveError>;

    /// Scores `[B, C]` of the items `items`, which this rank holds; higher is better. The scores of
    /// an item do not depend on the range, so that no caller needs all of `[B, V]` at once.
    fn scores(&self, encoded: &Encoded, items: Range<i64>) -> Tensor;
}

/// Sets the columns `[B, E]` of `x: [B, C]` to zero where `is_inside: [B, E]` is 1. A row has such
/// a column once.
fn clear(x: &Tensor, columns: &Tensor, is_inside: &Tensor) {
    let old = x.gather(1, columns, false) * is_inside.to_kind(x.kind());
    let _ = x.shallow_clone().scatter_add_(1, columns, &-old);
}

/// A recommender that counts day by day instead of learning by gradients.
pub trait CountingModel: Recommender {
    /// Counts the sessions of a day, which is later than all days before.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    fn add_day(&mut self, day: i64, file: &SessionFile) -> Result<(), DataError>;

    /// The counts, as saved in a checkpoint.
    fn tensors(&self) -> Vec<(String, Tensor)>;

    /// Restores what [`CountingModel::tensors`] returned into a new model.
    ///
    /// # Errors
    /// Returns the first tensor that is missing or does not fit.
    fn load(&mut self, tensors: &[(String, Tensor)]) -> Result<(), String>;
}

/// `B` encoded sessions, the input of [`Recommender::scores`].
pub struct Encoded {
    /// `[B, ..]`.
    pub vectors: Tensor,
    /// Scores of some items of each session, in place of those from the vectors.
    pub sparse: Option<SparseScores>,
}

impl Encoded {
    /// Applies `f` to all tensors, whose first dimension is the sessions.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn try_map<E>(&self, f: impl Fn(&Tensor) -> Result<Tensor, E>) -> Result<Self, E> {
        let sparse = self.sparse.as_ref().map(|sparse| {
            Ok(SparseScores { items: f(&sparse.items)?, scores: f(&sparse.scores)? })
        });
        Ok(Self { vectors: f(&self.vectors)?, sparse: sparse.transpose()? })
    }

    /// The sessions `rows`.
    pub fn rows(&self, rows: &Range<i64>) -> Self {
        let narrow = |x: &Tensor| Ok(x.narrow(0, rows.start, rows.end - rows.start));
        let Ok(narrowed) = self.try_map::<std::convert::Infallible>(narrow);
        narrowed
    }
}

/// Scores of some items of each session.
pub struct SparseScores {
    /// i64 `[B, E]`; 0, with any score, if a session has fewer.
    pub items: Tensor,
    /// `[B, E]`.
    pub scores: Tensor,
}

impl SparseScores {
    /// Whether each item is among `items`, bool `[B, E]`, and its column in scores `[B, C]` of
    /// them, i64 `[B, E]`; 0 for an item that is not.
    fn columns(&self, items: &Range<i64>) -> (Tensor, Tensor) {
        let is_inside = self.items.ge(items.start.max(1)).logical_and(&self.items.lt(items.end));
        let column = (&self.items - items.start).where_scalarother(&is_inside, 0);
        (is_inside, column)
    }

    /// Writes the scores, less `offset: [C]` of their items, into `scores: [B, C]` of `items`.
    pub fn write_to(&self, scores: &Tensor, offset: Option<&Tensor>, items: &Range<i64>) {
        let (is_inside, columns) = self.columns(items);
        let is_inside = is_inside.to_kind(self.scores.kind());
        let new = match offset {
            Some(offset) => {
                let offset = offset.index_select(0, &columns.reshape([-1]));
                &self.scores - offset.view_as(&columns)
            }
            None => self.scores.shallow_clone(),
        };
        // Additions, because items outside share a column with one inside.
        let mut scores = scores.shallow_clone();
        clear(&scores, &columns, &is_inside);
        let _ = scores.scatter_add_(1, &columns, &(new * is_inside).to_kind(scores.kind()));
    }

    /// Whether a score is that of the target of its row: f32 `[B, E]`. `targets: [B]`.
    fn is_target(&self, targets: &Tensor) -> Tensor {
        self.items.eq_tensor(&targets.unsqueeze(1)).to_kind(Kind::Float)
    }
}
