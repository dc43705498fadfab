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
mod recurrence;
mod rows;
mod xlnet;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

pub use baseline::{Baseline, BaselineKind};
pub use body::Layout;
pub use gradient_hooks::{GradientHooks, NoHooks};
pub use gru::{Gru, GruConfig};
pub use head::{HeadConfig, LossConfig};
pub use input::InputConfig;
pub use item_table::{ItemTable, LocalRows};
pub use neighbours::{Decay, Neighbours, NeighboursConfig};
pub use network::{ITEM_TABLES, LossSum, Network, ParameterSizes};
pub use objective::Objective;
pub use parameters::{Gradients, Parameters, View};
pub use xlnet::{Xlnet, XlnetConfig};

use network::ITEM_TABLE;

use crate::collective::CollectiveError;
use crate::config::check_finite;
use crate::data::{Batch, Features};

/// Largest number of layers of a body.
const MAX_LAYERS: i64 = 1000;

/// Section `[model]`: which model; `kind` is required.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum ModelConfig {
    /// GRU over the session (Hidasi et al. 2016).
    Gru(GruConfig),
    /// Attention over the session with relative positions (Yang et al. 2019).
    Xlnet(XlnetConfig),
    /// Baseline: the most frequent items of all days so far.
    Popularity {},
    /// Baseline: the most frequent items of the last day, then of all days so far.
    Recent {},
    /// Baseline: the items that followed the last item most often, then popularity.
    Markov {},
    /// Baseline: V-SkNN, the items of similar sessions, then popularity (Ludewig and Jannach 2018).
    Vsknn(NeighboursConfig),
}

/// The configuration of a model that is trained by gradient descent.
#[derive(Clone, Copy, Debug)]
pub enum Neural<'a> {
    Gru(&'a GruConfig),
    Xlnet(&'a XlnetConfig),
}

impl ModelConfig {
    /// Checks the ranges of the values, for sessions of at most `max_length` events.
    ///
    /// # Errors
    /// Returns the first invalid key.
    pub fn check(&self, max_length: usize) -> Result<(), String> {
        match self {
            ModelConfig::Vsknn(neighbours) => neighbours.check(),
            ModelConfig::Xlnet(xlnet) => {
                xlnet.check_length(max_length).and_then(|()| Neural::Xlnet(xlnet).check())
            }
            _ => self.neural().map_or(Ok(()), Neural::check),
        }
    }

    /// `None` for a baseline.
    pub fn neural(&self) -> Option<Neural<'_>> {
        match self {
            ModelConfig::Gru(gru) => Some(Neural::Gru(gru)),
            ModelConfig::Xlnet(xlnet) => Some(Neural::Xlnet(xlnet)),
            ModelConfig::Popularity {}
            | ModelConfig::Recent {}
            | ModelConfig::Markov {}
            | ModelConfig::Vsknn(_) => None,
        }
    }

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
            _ => self.neural().map_or(Ok(()), |model| model.input().aggregated_width(features).map(|_| ())),
        }
    }

    /// Name for people, with the objective if it is not the model's usual one.
    pub fn title(&self) -> String {
        match self {
            ModelConfig::Gru(gru) => match gru.objective {
                // The usual objective of a GRU.
                Objective::Causal { .. } => "GRU".to_owned(),
                _ => format!("GRU-{}", gru.objective.short_name()),
            },
            ModelConfig::Xlnet(xlnet) => format!("XLNet-{}", xlnet.objective.short_name()),
            ModelConfig::Popularity {} => "Popularity".to_owned(),
            ModelConfig::Recent {} => "Popularity of the last day".to_owned(),
            ModelConfig::Markov {} => "Markov".to_owned(),
            ModelConfig::Vsknn(_) => "V-SkNN".to_owned(),
        }
    }
}

impl<'a> Neural<'a> {
    pub fn input(self) -> &'a InputConfig {
        match self {
            Neural::Gru(gru) => &gru.input,
            Neural::Xlnet(xlnet) => &xlnet.input,
        }
    }

    pub fn objective(self) -> &'a Objective {
        match self {
            Neural::Gru(gru) => &gru.objective,
            Neural::Xlnet(xlnet) => &xlnet.objective,
        }
    }

    pub fn head(self) -> &'a HeadConfig {
        match self {
            Neural::Gru(gru) => &gru.head,
            Neural::Xlnet(xlnet) => &xlnet.head,
        }
    }

    /// Width of the body's states.
    pub fn width(self) -> i64 {
        match self {
            Neural::Gru(gru) => gru.hidden_width,
            Neural::Xlnet(xlnet) => xlnet.width,
        }
    }

    fn dropout(self) -> f64 {
        match self {
            Neural::Gru(gru) => gru.dropout,
            Neural::Xlnet(xlnet) => xlnet.dropout,
        }
    }

    fn check(self) -> Result<(), String> {
        match self {
            Neural::Gru(gru) => gru.check()?,
            Neural::Xlnet(xlnet) => xlnet.check()?,
        }
        if !(0.0..1.0).contains(&self.dropout()) {
            return Err(format!("`dropout` {:?} is not within 0 <= p < 1", self.dropout()));
        }
        check_finite("head.temperature", self.head().temperature, f32::MIN_POSITIVE)?;
        self.input().check()?;
        self.objective().check()
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
