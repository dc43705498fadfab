//! Models: what they compute, not how they are trained.
//!
//! Every model is a [`Recommender`], so that one evaluator and one server read them all. A neural model is an
//! item table at both ends, looked up below and scored against above, with a body between, a body
//! being what lies between vectors and states ([`Gru`]). The table's two gradients do not go through autograd: see [`head`].

mod counts;
mod gru;
pub mod head;
mod neighbours;
mod network;
mod parameters;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

pub use counts::{Counts, Evidence};
pub use gru::{Gru, GruConfig};
pub use neighbours::{Decay, Neighbours, NeighboursConfig, Reminders};
pub use network::{LossSum, Network};
pub use parameters::{Parameters, View};

use crate::data::Batch;

/// Section `[model]` of a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Config {
    /// GRU over the session, causal (Hidasi et al. 2016).
    Gru(GruConfig),
    /// The most frequent items of all days so far.
    Popularity {},
    /// The most frequent items of the last day, then of all days so far.
    Recent {},
    /// First-order counts: what followed the last item most often, then popularity.
    Markov {},
    /// V-SkNN: the items of similar sessions, then popularity (Ludewig and Jannach 2018).
    Vsknn(NeighboursConfig),
}

impl Config {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Says which key is wrong.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Config::Gru(gru) => gru.check(),
            Config::Vsknn(neighbours) => neighbours.check(),
            Config::Popularity {} | Config::Recent {} | Config::Markov {} => Ok(()),
        }
    }

    /// The name results are reported under.
    pub fn title(&self) -> &'static str {
        match self {
            Config::Gru(_) => "GRU",
            Config::Popularity {} => "Popularity",
            Config::Recent {} => "Popularity of the last day",
            Config::Markov {} => "Markov",
            Config::Vsknn(_) => "V-SkNN",
        }
    }
}

/// Scores every item of the catalogue as the next of a session.
pub trait Recommender {
    /// Rows of the catalogue `V`, padding (0) and unknown (1) included.
    fn n_items(&self) -> i64;

    /// Where batches are to lie, and scores will.
    fn device(&self) -> Device;

    /// Whether scores are logits, so that their cross entropy means something.
    fn scores_are_logits(&self) -> bool;

    /// What the whole of each session comes to: `[B, ..]`, read by [`Recommender::scores`] alone.
    fn encode(&self, known: &Batch) -> Tensor;

    /// Scores `[B, C]` of the items `items`; higher is better. Calls for other ranges give the same numbers,
    /// so that no caller needs all of `[B, V]` at once.
    fn scores(&self, encoded: &Tensor, items: Range<i64>) -> Tensor;
}
