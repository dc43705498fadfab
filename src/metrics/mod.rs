//! Ranking metrics over the full catalogue: NDCG@K, Recall@K, MRR@K and the catalogue coverage.
//!
//! With one relevant item at rank r (from 1), NDCG@K is `1 / log2(r + 1)`, Recall@K is 1 and MRR@K
//! is `1 / r` if r ≤ K, and 0 otherwise. They depend only on the number of sessions at each rank.
//! The ranks of a job sum these integer counts, so that the metrics are the same to the last digit
//! on any number of ranks.
//!
//! The catalogue coverage at K is the fraction of the recommendable items that are in the top K of
//! at least one session: 1 if every item is recommended to some session, near 0 if all sessions get
//! the same items.

mod outcomes;
mod ranking;

use std::path::Path;
use std::slice;

use bireme_kernels::transfer::send_together;
use bireme_tools::measure::{K_MAX, Measure, RankCounts, rank_bin};
use bireme_tools::report::evaluation_file::SessionOutcome;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, CollectiveError, Reduce};
pub use crate::config::{EvaluateConfig, Reminders};
use crate::data::{
    Batch, DataConfig, DataError, Days, FIRST_ITEM, Features, SessionFile, Split,
    evaluation_batches,
};
use crate::model::{ItemTable, Recommender};

use outcomes::Outcomes;
pub use outcomes::deciles;
pub use ranking::{Ranking, rank_targets};

/// Losses are summed in fixed point, in units of 2⁻³⁰, so that their order does not matter. An i64
/// has room for the losses of 10⁸ sessions.
const LOSS_UNIT: f64 = (1u64 << 30) as f64;

impl Reminders {
    /// Items that are not recommended to each session: i64 `[B, E]`, padded with −1.
    fn hidden(self, known: &Batch) -> Tensor {
        let hidden: Vec<Vec<i64>> = match self {
            Reminders::Auto | Reminders::All => Vec::new(),
            Reminders::Earlier => known
                .sessions()
                .iter()
                .map(|session| session[session.len() - 1..].to_vec())
                .collect(),
            Reminders::None => known.sessions(),
        };
        let max_hidden = hidden.iter().map(Vec::len).max().unwrap_or(0);
        let padding = |session: &Vec<i64>| std::iter::repeat_n(-1, max_hidden - session.len());
        let rows: Vec<i64> = hidden
            .iter()
            .flat_map(|session| session.iter().copied().chain(padding(session)))
            .collect();
        Tensor::from_slice(&rows).view([known.n_sessions() as i64, max_hidden as i64])
    }
}

/// Sessions that [`EvaluateConfig::resolve_reminders`] reads at most.
const MAX_SESSIONS_READ: usize = 100_000;

impl EvaluateConfig {
    /// Replaces `reminders = "auto"` by what the first training day of the data in `dir` suggests.
    ///
    /// # Errors
    /// The day is missing, or its sessions cannot be read.
    pub fn resolve_reminders(&mut self, dir: &Path, data: &DataConfig) -> Result<(), DataError> {
        if self.reminders != Reminders::Auto {
            return Ok(());
        }
        let file = Days::open(dir, data)?.file(data.training_days().start, Split::Train)?;
        self.reminders = Reminders::Earlier;
        for span in file.spans(0..file.n_sessions().min(MAX_SESSIONS_READ)) {
            let sessions = file.read(slice::from_ref(&span))?;
            let follows_itself = |pair: &[i64]| pair[0] == pair[1] && pair[0] >= FIRST_ITEM;
            let mut rows = 0..sessions.len();
            if rows.any(|row| sessions.ids(0, row).windows(2).any(follows_itself)) {
                self.reminders = Reminders::All;
                break;
            }
        }
        Ok(())
    }
}

/// An error of an evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error("`{path}`: the model's scores are not finite")]
    NotFinite {
        /// The evaluated file.
        path: std::path::PathBuf,
    },
}

/// Means over cases, which are sessions or prefixes of sessions; NaN (`null` in JSON) without a
/// case or a loss.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metrics {
    /// Number of cases.
    pub n_sessions: i64,
    /// Cross entropy of the target; NaN if the model's scores are not logits.
    pub loss: f64,
    pub ndcg_at_10: f64,
    pub ndcg_at_20: f64,
    pub recall_at_10: f64,
    pub recall_at_20: f64,
    pub mrr_at_20: f64,
}

impl Metrics {
    pub fn get(&self, measure: Measure) -> f64 {
        match measure {
            Measure::NdcgAt10 => self.ndcg_at_10,
            Measure::NdcgAt20 => self.ndcg_at_20,
            Measure::RecallAt10 => self.recall_at_10,
            Measure::RecallAt20 => self.recall_at_20,
            Measure::MrrAt20 => self.mrr_at_20,
        }
    }
}

/// Number of sessions at each rank of their target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    at_rank: RankCounts,
    /// Summed loss in units of [`LOSS_UNIT`].
    loss: i64,
}

impl Tally {
    /// `at_rank`: number of sessions at each [`rank_bin`]. The tally has no losses.
    pub fn of_counts(at_rank: RankCounts) -> Self {
        Self { at_rank, loss: 0 }
    }

    /// Adds target ranks, of which 1 is best, and losses.
    pub fn add(&mut self, ranks: &[i64], losses: Option<&[f64]>) {
        for &rank in ranks {
            self.at_rank[rank_bin(rank)] += 1;
        }
        // libtorch and this loop round halves to even.
        let in_units = |loss: &f64| (loss * LOSS_UNIT).round_ties_even() as i64;
        self.loss += losses.iter().flat_map(|losses| losses.iter()).map(in_units).sum::<i64>();
    }

    /// *All ranks.* Sums the tallies of all ranks.
    ///
    /// # Errors
    /// A collective call fails.
    pub fn all_reduce(mut self, collective: &dyn Collective) -> Result<Self, CollectiveError> {
        let mut counts = [&self.at_rank[..], &[self.loss]].concat();
        collective.sum_i64(&mut counts)?;
        self.at_rank.copy_from_slice(&counts[..=K_MAX]);
        self.loss = counts[K_MAX + 1];
        Ok(self)
    }

    /// Divides the sums. `has_loss`: whether losses were added.
    pub fn metrics(&self, has_loss: bool) -> Metrics {
        let n_sessions: i64 = self.at_rank.iter().sum();
        Metrics {
            n_sessions,
            loss: if has_loss {
                self.loss as f64 / LOSS_UNIT / n_sessions as f64
            } else {
                f64::NAN
            },
            ndcg_at_10: Measure::NdcgAt10.mean(&self.at_rank),
            ndcg_at_20: Measure::NdcgAt20.mean(&self.at_rank),
            recall_at_10: Measure::RecallAt10.mean(&self.at_rank),
            recall_at_20: Measure::RecallAt20.mean(&self.at_rank),
            mrr_at_20: Measure::MrrAt20.mean(&self.at_rank),
        }
    }
}

/// Results of an evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Means over the sessions of all ranks, the same on every rank.
    pub metrics: Metrics,
    /// Fraction of the recommendable items that are in the top 20 of at least one session.
    pub coverage_at_20: f64,
    /// On the root one for each case, in the order of the file; empty on other ranks.
    pub outcomes: Vec<SessionOutcome>,
}

/// *All ranks.* Evaluates a file: the last event of every session, or every event but the first
/// (`config.cases`), is predicted from the events before it. `item_table`: the rows that the
/// recommender scores on this rank. `occurrences`: how often each item occurred in training, `[V]`.
///
/// # Errors
/// Sessions cannot be read, scores are not finite, or a collective call fails.
pub fn evaluate(
    recommender: &dyn Recommender,
    item_table: &ItemTable<'_>,
    file: &SessionFile,
    features: &Features,
    config: &EvaluateConfig,
    occurrences: &[i64],
    collective: &dyn Collective,
) -> Result<Evaluation, EvaluateError> {
    let (mut tally, mut outcomes) = (Tally::default(), Outcomes::default());
    let mut in_top = Tensor::zeros([item_table.len()], (Kind::Bool, recommender.device()));
    // Scores are f32.
    let max_scores = (config.scores_mib << 20) as i64 / 4;
    let ranks = (collective.rank(), collective.world_size());
    let mut batches = evaluation_batches(file, features, config, ranks)?;
    // With a sharded item table each rank scores its rows for the sessions of all ranks, so every
    // rank takes part until the last block of any rank.
    let n_blocks =
        item_table.gather_counts(batches.len() as i64, false)?.into_iter().max().unwrap_or(0);
    for _ in 0..n_blocks {
        // On a GPU a wait for the device may be a wait for another rank.
        let _block = collective.watch().map(|watch| watch.begin("an evaluation block".to_owned()));
        let batch = batches.next().unwrap_or_else(|| Batch::new(&[], features));
        let (known, own_targets) = batch.split_last();
        let counts = item_table.gather_counts(own_targets.size()[0], false)?;
        let encoded = recommender.encode(&known)?;
        let (mut hidden, mut targets) =
            (config.reminders.hidden(&known), own_targets.shallow_clone());
        send_together(vec![&mut hidden, &mut targets], recommender.device());
        let max_hidden =
            item_table.gather_counts(hidden.size()[1], false)?.into_iter().max().unwrap_or(0);
        let hidden = hidden.pad([0, max_hidden - hidden.size()[1]], "constant", -1.0);
        let gather = |local: &Tensor| item_table.gather_rows(local, &counts);
        let (encoded, hidden, all_targets) =
            (encoded.try_map(gather)?, gather(&hidden)?, gather(&targets)?);
        let (mut ranks, mut losses) = (Vec::new(), Vec::new());
        for group in item_table.target_groups(&counts) {
            let n = group.end - group.start;
            let group_rows = |x: &Tensor| x.narrow(0, group.start, n);
            let encoded = encoded.rows(&group);
            let ranking = rank_targets(
                |items| recommender.scores(&encoded, items),
                (&group_rows(&all_targets), &group_rows(&hidden)),
                item_table,
                max_scores / n.max(1),
                K_MAX as i64,
            )?;
            in_top = in_top.logical_or(&ranking.in_top);
            ranks.push(ranking.ranks);
            losses.push(ranking.losses);
        }
        let [ranks, losses] = [ranks, losses]
            .map(|groups| item_table.local_rows_of(&Tensor::cat(&groups, 0), &counts));
        // One wait for the device in a block. Ranks are exact in f64.
        let both = Tensor::stack(&[ranks.to_kind(Kind::Double), losses], 0).reshape([-1]);
        let both = Vec::<f64>::try_from(both).expect("numbers are f64 [2 B]");
        let (ranks, losses) = both.split_at(both.len() / 2);
        let ranks: Vec<i64> = ranks.iter().map(|&rank| rank as i64).collect();
        if !losses.iter().all(|loss| loss.is_finite()) {
            return Err(EvaluateError::NotFinite { path: file.path().to_owned() });
        }
        tally.add(&ranks, recommender.scores_are_logits().then_some(losses));
        outcomes.add(&ranks, &known, &own_targets);
    }
    Ok(Evaluation {
        metrics: tally.all_reduce(collective)?.metrics(recommender.scores_are_logits()),
        coverage_at_20: coverage(&in_top, item_table, collective)?,
        outcomes: outcomes.gather(occurrences, collective)?,
    })
}

/// *All ranks.* Returns the fraction of recommendable items that are `in_top` for a session of any
/// rank. `in_top`: bool `[V]`, for the local rows.
fn coverage(
    in_top: &Tensor,
    item_table: &ItemTable<'_>,
    collective: &dyn Collective,
) -> Result<f64, CollectiveError> {
    let in_top = in_top.to_kind(Kind::Uint8).to_device(Device::Cpu);
    let mut in_top = Vec::<u8>::try_from(in_top).expect("truth values [V]");
    let n_covered = |in_top: &[u8]| in_top.iter().map(|&covered| i64::from(covered)).sum();
    let n_covered = match item_table.ranks() {
        // Each rank has its own rows, so their counts add up.
        Some(ranks) => {
            let mut total = [n_covered(&in_top)];
            ranks.sum_i64(&mut total)?;
            total[0]
        }
        None => {
            collective.reduce(&mut in_top, Reduce::Max)?;
            n_covered(&in_top)
        }
    };
    Ok(n_covered as f64 / (item_table.n_items - FIRST_ITEM).max(0) as f64)
}
