//! Models: their parameters, scores, losses and gradients. The training loop is in `train`.
//!
//! Every model is a [`Recommender`], so that evaluation and serving are the same for all. A neural
//! model ([`Network`]) is an input block from events to vectors ([`input`]), a body from vectors to
//! states ([`Gru`], [`Xlnet`]) and a softmax over the catalogue ([`head`]). The [`objective`]
//! chooses which events are hidden and which are predicted. Gradients of the tables do not go
//! through autograd: see [`head`].

mod baseline;
mod body;
mod encoder;
mod gradient_hooks;
mod gru;
pub mod head;
pub mod import;
pub mod input;
mod item_table;
mod neighbours;
mod network;
pub mod objective;
pub mod parameters;
mod rows;
mod xlnet;

use std::ops::Range;

use tch::{Device, Tensor};

pub use baseline::{Baseline, BaselineKind};
pub use body::Layout;
pub use gradient_hooks::{GradientHooks, NoHooks};
pub use gru::Gru;
pub use item_table::{ItemTable, LocalRows};
pub use neighbours::Neighbours;
pub use network::{ITEM_TABLES, LossSum, Network, ParameterSizes};
pub use parameters::{Gradients, Parameters, View};
pub use xlnet::Xlnet;

use network::ITEM_TABLE;

use crate::collective::CollectiveError;
pub use crate::config::{
    Decay, GruConfig, HeadConfig, InputConfig, LossConfig, ModelConfig, NeighboursConfig, Neural,
    Objective, XlnetConfig,
};
use crate::data::{Batch, Features};

impl ModelConfig {
    /// Checks the keys that depend on the features.
    ///
    /// # Errors
    /// Returns the first key that does not fit the features.
    pub fn check_features(&self, features: &Features) -> Result<(), String> {
        let n_items = features.n_items();
        match self {
            // `Neighbours` stores item indices in 32 bits.
            ModelConfig::Vsknn(_) if n_items > 1 << 32 => {
                Err(format!("`kind` vsknn knows at most {} items, not {n_items}", 1u64 << 32))
            }
            _ => self
                .neural()
                .map_or(Ok(()), |model| model.input().aggregated_width(features).map(|_| ())),
        }
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

    /// *All ranks*, if the item table is sharded. Encodes each session: `[B, ..]`, the
    /// input of [`Recommender::scores`].
    ///
    /// # Errors
    /// A collective call fails.
    fn encode(&self, known: &Batch) -> Result<Tensor, CollectiveError>;

    /// Scores `[B, C]` of the items `items`, which this rank holds; higher is better. The scores of
    /// an item do not depend on the range, so that no caller needs all of `[B, V]` at once.
    fn scores(&self, encoded: &Tensor, items: Range<i64>) -> Tensor;
}
