//! Co-occurrence counts as features of candidates, and a term of the scores from them.
//!
//! Items that followed or preceded the last items of a session in other sessions, the items of the
//! session itself, and frequent items with the attributes of its last item are its *candidates*. A
//! candidate has features from counts: weights of its pairs with the last items, its occurrences,
//! its place in the session, and its attributes beside theirs. A network of two hidden layers,
//! which also reads the state of the body, turns them into a term of the candidate's score. All
//! other items have no such term.
//!
//! The counts contain the sessions that are trained on. In training, each session's own
//! contributions are subtracted from the features of its targets, so that a target that occurs
//! nowhere else looks as unseen as it will be on the next day.

mod attributes;
mod candidates;
mod counts;
mod shape;
mod tables;

use std::slice;

use bireme_kernels::transfer::send;
use tch::{Device, Kind, Tensor};

use super::parameters::{Linear, ParameterBuilder};
use super::{Parameters, SparseScores};
use crate::config::{CandidatesConfig, EvidenceConfig, Reminders};
use crate::data::{Batch, DataError, Features, SessionFile};

use attributes::Attributes;
pub use candidates::Candidates;
use candidates::{CountedSessions, Known};
use counts::Counts;
use shape::{n_candidates, n_features};
use tables::Tables;

/// Pairs of an item that are kept from day to day, for each that is looked up: a pair that is
/// rare today may be frequent tomorrow.
const KEPT_PER_NEIGHBOUR: i64 = 2;

/// Score of an item that may not be recommended. It is finite, so that no difference of scores is
/// NaN.
const HIDDEN: f64 = -1e4;

/// Finds the candidates of sessions by the counts of all days so far.
pub struct CandidateIndex {
    config: CandidatesConfig,
    counts: Counts,
    tables: Tables,
    /// Which known items may be recommended.
    reminders: Reminders,
    /// Largest number of events of a session.
    max_length: usize,
    device: Device,
}

impl CandidateIndex {
    /// An index without counts.
    ///
    /// # Errors
    /// An attribute is not among the features.
    pub fn new(
        config: &CandidatesConfig,
        features: &Features,
        reminders: Reminders,
        max_length: usize,
        device: Device,
    ) -> Result<Self, String> {
        let attributes = Attributes::new(config, features)?;
        let n_kept = KEPT_PER_NEIGHBOUR * config.n_neighbours;
        let counts = Counts::new(features.n_items(), n_kept as usize, attributes);
        let tables = Tables::new(&counts, config, max_length, device);
        Ok(Self { config: config.clone(), counts, tables, reminders, max_length, device })
    }

    /// Number of features of a candidate.
    pub fn n_features(&self) -> i64 {
        let attributes = &self.counts.attributes;
        let n_codes = attributes.n_codes();
        n_features(&self.config, n_codes, attributes.0.len() - n_codes)
    }

    /// Occurrences of each item on all days so far, f32 `[V]`.
    pub fn occurrences(&self) -> &Tensor {
        &self.tables.occurrences
    }

    /// Counts the sessions of a day, which is later than all days before. Every rank reads the
    /// whole file, so that the counts are the same on all without communication. Row groups are
    /// read one at a time.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn add_day(&mut self, day: i64, file: &SessionFile) -> Result<(), DataError> {
        self.counts.begin_day(day);
        for span in file.spans(0..file.n_sessions()) {
            self.counts.add(&file.read(slice::from_ref(&span))?);
        }
        self.counts.end_day();
        self.update_tables();
        Ok(())
    }

    fn update_tables(&mut self) {
        self.tables = Tables::new(&self.counts, &self.config, self.max_length, self.device);
    }

    /// The counts as a checkpoint holds them.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.counts.tensors()
    }

    /// Restores what [`CandidateIndex::tensors`] returned, perhaps of a smaller catalogue.
    ///
    /// # Errors
    /// Returns the first tensor that is missing or does not fit.
    pub fn load(&mut self, tensors: &[(String, Tensor)]) -> Result<(), String> {
        self.counts.load(tensors)?;
        self.update_tables();
        Ok(())
    }

    /// Candidates for the next item of each session.
    pub fn of_next(&self, known: &Batch) -> Candidates {
        let mut end = 0;
        let sessions = known.lengths.iter().map(|&length| {
            let first = end;
            end += length;
            (first, end)
        });
        let rows = self.rows_before(sessions, known.n_events());
        self.find(&columns_with_padding(known), &rows, None)
    }

    /// Candidates for the events `targets` of a batch, whose sessions the counts contain. The known
    /// items are the events before a target in time, whatever the body reads.
    pub fn of_targets(&self, targets: &[i64], batch: &Batch) -> Candidates {
        let (mut first, mut sessions) = (0, Vec::with_capacity(batch.n_sessions()));
        for &length in &batch.lengths {
            sessions.push(first..first + length);
            first += length;
        }
        let session_of_event: Vec<usize> = (0..batch.n_sessions())
            .flat_map(|session| std::iter::repeat_n(session, batch.lengths[session]))
            .collect();
        let of_targets: Vec<usize> =
            targets.iter().map(|&target| session_of_event[target as usize]).collect();
        let known = targets
            .iter()
            .zip(&of_targets)
            .map(|(&target, &session)| (sessions[session].start, target as usize));
        let padding = batch.n_events();
        let rows = self.rows_before(known, padding);
        let whole: Vec<i64> = of_targets
            .iter()
            .flat_map(|&session| {
                let events = sessions[session].clone().map(|event| event as i64);
                let n_missing = self.max_length.saturating_sub(events.len());
                events.take(self.max_length).chain(std::iter::repeat_n(padding as i64, n_missing))
            })
            .collect();
        let is_last_day: Vec<f32> = of_targets
            .iter()
            .map(|&session| f32::from(u8::from(batch.days[session] == self.tables.last_day)))
            .collect();
        let columns = columns_with_padding(batch);
        let whole = Tensor::from_slice(&whole).view([-1, self.max_length as i64]);
        let counted = CountedSessions {
            items: gather(&columns[0], &send(&whole, self.device)),
            is_last_day: send(&Tensor::from_slice(&is_last_day).view([-1, 1]), self.device),
        };
        self.find(&columns, &rows, Some(counted))
    }

    /// Candidates for the next item of sessions in padded columns `[B, width]`, of `lengths: [B]`.
    /// No operation depends on the number of sessions, so that they can be traced.
    pub(super) fn of_padded(&self, columns: &[Tensor], lengths: &Tensor, width: i64) -> Candidates {
        let columns: Vec<Tensor> =
            columns.iter().map(|column| column.reshape([-1]).constant_pad_nd([0, 1])).collect();
        let session = (lengths.ones_like().cumsum(0, Kind::Int64) - 1).unsqueeze(1);
        let place = Tensor::arange(width, (Kind::Int64, lengths.device())).unsqueeze(0);
        let lengths = lengths.unsqueeze(1);
        let padding = lengths.ones_like().sum(Kind::Int64) * width;
        let rows = (session * width + &lengths - 1 - &place)
            .where_self(&place.lt_tensor(&lengths), &padding);
        self.find(&columns, &rows, None)
    }

    /// Rows of the events `first..end` of each session, the last first: i64 `[N, max_length]`.
    fn rows_before(
        &self,
        sessions: impl Iterator<Item = (usize, usize)>,
        padding: usize,
    ) -> Tensor {
        let rows: Vec<i64> = sessions
            .flat_map(|(first, end)| {
                let events = (first..end).rev().map(|event| event as i64);
                let n_missing = self.max_length.saturating_sub(end - first);
                events.take(self.max_length).chain(std::iter::repeat_n(padding as i64, n_missing))
            })
            .collect();
        send(&Tensor::from_slice(&rows).view([-1, self.max_length as i64]), self.device)
    }

    /// `columns: [T + 1]`, with a padding event at the end; `rows: [N, L]`.
    fn find(
        &self,
        columns: &[Tensor],
        rows: &Tensor,
        counted: Option<CountedSessions>,
    ) -> Candidates {
        let n_codes = self.counts.attributes.n_codes();
        if rows.size()[0] == 0 {
            let n_candidates = n_candidates(&self.config, n_codes, self.max_length);
            let zeros = |size: &[i64], kind| Tensor::zeros(size, (kind, self.device));
            return Candidates {
                items: zeros(&[0, n_candidates], Kind::Int64),
                features: zeros(&[0, n_candidates, self.n_features()], Kind::Float),
                is_hidden: zeros(&[0, n_candidates], Kind::Bool),
            };
        }
        let (mut codes, mut values) = (Vec::new(), Vec::new());
        for attribute in &self.counts.attributes.0 {
            let column = gather(&columns[attribute.column], rows);
            let into = if column.kind() == Kind::Int64 { &mut codes } else { &mut values };
            into.push(column);
        }
        let known = Known { items: gather(&columns[0], rows), codes, values, counted };
        tch::no_grad(|| self.tables.candidates(&known, &self.config, self.reminders))
    }
}

/// Checks that the attributes are among the features.
///
/// # Errors
/// Names the first that is not.
pub(super) fn check_attributes(
    config: &CandidatesConfig,
    features: &Features,
) -> Result<(), String> {
    Attributes::new(config, features).map(|_| ())
}

/// Parameters of the network that scores candidates, by index.
#[derive(Clone, Copy)]
pub(super) struct CandidateScorer {
    from_features: Linear,
    from_state: Linear,
    hidden: Linear,
    /// `[hidden_width]`, 0 at first.
    of_hidden: usize,
    /// `[F]`, 0 at first.
    of_features: usize,
}

impl CandidateScorer {
    /// `width`: of the states.
    ///
    /// # Errors
    /// An attribute is not among the features.
    pub fn declare(
        config: &EvidenceConfig,
        features: &Features,
        width: i64,
        builder: &mut ParameterBuilder,
    ) -> Result<Self, String> {
        let attributes = Attributes::new(&config.candidates, features)?;
        let n_codes = attributes.n_codes();
        let n_features = n_features(&config.candidates, n_codes, attributes.0.len() - n_codes);
        let hidden = config.hidden_width;
        Ok(Self {
            from_features: builder.linear("head.evidence.features", n_features, hidden),
            from_state: builder.linear("head.evidence.state", width, hidden),
            hidden: builder.linear("head.evidence.hidden", hidden, hidden),
            of_hidden: builder.constant("head.evidence.of_hidden", &[hidden], 0.0),
            of_features: builder.constant("head.evidence.of_features", &[n_features], 0.0),
        })
    }

    /// Terms of the scores of candidates, given the states `[N, width]`: `[N, E]`.
    pub fn scores(
        self,
        parameters: &Parameters,
        candidates: &Candidates,
        states: &Tensor,
    ) -> SparseScores {
        let Candidates { items, features, is_hidden } = candidates;
        let from_state = self.from_state.apply(parameters, states).unsqueeze(1);
        let hidden = (self.from_features.apply(parameters, features) + from_state).gelu("none");
        let hidden = self.hidden.apply(parameters, &hidden).gelu("none");
        let scores = hidden.matmul(parameters.leaf(self.of_hidden))
            + features.matmul(parameters.leaf(self.of_features));
        let scores = scores * items.gt(0).to_kind(Kind::Float);
        SparseScores { items: items.shallow_clone(), scores: scores.masked_fill(is_hidden, HIDDEN) }
    }
}

/// The columns of a batch, each with a padding event at the end: `[T + 1]`.
fn columns_with_padding(batch: &Batch) -> Vec<Tensor> {
    batch.columns.iter().map(|column| column.constant_pad_nd([0, 1])).collect()
}

/// `column: [T + 1]` at `rows: [N, L]`.
fn gather(column: &Tensor, rows: &Tensor) -> Tensor {
    column.index_select(0, &rows.reshape([-1])).reshape_as(rows)
}
