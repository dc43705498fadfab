//! Co-occurrence counts as features of candidates, and the scores of candidates from them.
//!
//! Items that followed or preceded the last items of a session in other sessions, the items of the
//! session itself, and frequent items with the attributes of its last item are its *candidates*. A
//! candidate has features from counts: weights of its pairs with the last items, its occurrences,
//! its place in the session, and its attributes beside theirs. A network of two hidden layers,
//! which also reads the state of the body, turns them into the candidate's score. All other
//! items are scored by their vectors.
//!
//! A model that trains on a day sees the counts of the days before, as it will when it recommends.
//! Only on its first day, and for sessions of earlier days, the counts contain the sessions that
//! are trained on. What such a session contributes is subtracted from the features of its targets,
//! so that a target that occurs nowhere else looks as unseen as it will be on the next day.

mod candidates;
mod counts;
mod host;
mod shape;
mod tables;

use std::cell::OnceCell;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::attributes::{Attribute, Attributes, Cells, attribute_columns};
use super::parameters::{Linear, ParameterBuilder};
use super::prepare::StepSizes;
use super::{Parameters, SparseScores};
use crate::config::{CandidatesConfig, EvidenceConfig, Reminders};
use crate::data::{Batch, DataError, Features, SessionFile};

pub use candidates::Candidates;
use candidates::{CountedSessions, Known};
pub(super) use counts::Counts;
use host::{Columns, HostTables, Query};
use shape::Shape;
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
    shape: Shape,
    counts: Counts,
    /// For lookups on a CPU.
    host: Option<HostTables>,
    /// For lookups on a GPU and in a trace, made when they are first needed.
    tables: OnceCell<Tables>,
    /// Which known items may be recommended.
    reminders: Reminders,
    device: Device,
}

impl CandidateIndex {
    /// An index without counts, for sessions of at most `max_length` events.
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
        let attributes = Attributes::new(columns_of_attributes(config, features)?, features);
        let (n_codes, n_attributes) = (attributes.n_codes(), attributes.0.len());
        let shape = Shape::new(config, n_codes, n_attributes, max_length);
        let n_kept = KEPT_PER_NEIGHBOUR * config.n_neighbours;
        let counts = Counts::new(features.n_items(), n_kept as usize, attributes);
        let (host, tables) = (None, OnceCell::new());
        let config = config.clone();
        let mut index = Self { config, shape, counts, host, tables, reminders, device };
        index.update_tables();
        Ok(index)
    }

    /// Number of features of a candidate.
    pub fn n_features(&self) -> i64 {
        self.shape.n_features
    }

    /// Occurrences of each item on all days so far, `[V]`.
    pub fn occurrences(&self) -> &[i64] {
        &self.counts.items
    }

    /// The last day that was counted.
    pub fn last_day(&self) -> Option<i64> {
        (self.counts.last_day > i64::MIN).then_some(self.counts.last_day)
    }

    /// Counts the sessions of a day, which is later than all days before. Every rank reads the
    /// whole file, so that the counts are the same on all without communication.
    ///
    /// # Errors
    /// See [`SessionFile::read`].
    pub fn add_day(&mut self, day: i64, file: &SessionFile) -> Result<(), DataError> {
        self.counts.add_day(day, file)?;
        self.update_tables();
        Ok(())
    }

    /// Indexes the counts anew.
    fn update_tables(&mut self) {
        let on_host = self.device == Device::Cpu;
        self.host = on_host.then(|| HostTables::new(&self.counts, &self.config, self.shape));
        self.tables = OnceCell::new();
    }

    /// Makes what a trace reads: a trace does not record the values of new tensors.
    pub(super) fn prepare_trace(&self) {
        self.tables();
    }

    fn tables(&self) -> &Tables {
        self.tables.get_or_init(|| Tables::new(&self.counts, &self.config, self.shape, self.device))
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

    /// Candidates for the next item of each session, for an index on the CPU.
    pub fn of_next(&self, known: &Batch) -> Candidates {
        self.find(&self.preparer().of_next(known), &known.columns_with_padding())
    }

    /// Candidates for events of a batch, for an index on the CPU: see
    /// `CandidatePreparer::of_targets`.
    pub fn of_targets(&self, targets: &[i64], batch: &Batch) -> Candidates {
        self.find(&self.preparer().of_targets(targets, batch, None), &batch.columns_with_padding())
    }

    /// Prepares searches in this index.
    pub(super) fn preparer(&self) -> CandidatePreparer {
        CandidatePreparer {
            max_length: self.shape.max_length,
            last_day: self.last_day(),
            is_on_gpu: self.host.is_none(),
        }
    }

    /// Candidates for the next item of sessions of `lengths: [B]`. `columns: [B · width + 1]`: each
    /// session padded to `width` events, and a padding event at the end. No operation depends on
    /// the number of sessions, so that they can be traced.
    pub(super) fn of_padded(&self, columns: &[Tensor], lengths: &Tensor, width: i64) -> Candidates {
        let session = (lengths.ones_like().cumsum(0, Kind::Int64) - 1).unsqueeze(1);
        let place = Tensor::arange(width, (Kind::Int64, lengths.device())).unsqueeze(0);
        let lengths = lengths.unsqueeze(1);
        let padding = lengths.ones_like().sum(Kind::Int64) * width;
        let rows = (session * width + &lengths - 1 - &place)
            .where_self(&place.lt_tensor(&lengths), &padding);
        self.find_rows(columns, &rows, None)
    }

    /// The candidates of a prepared search. `columns: [T + 1]`: of the batch that it was prepared
    /// for, with a padding event at the end.
    pub(super) fn find(&self, search: &CandidateSearch, columns: &[Tensor]) -> Candidates {
        match search {
            CandidateSearch::Queries(queries) => {
                let Shape { n_candidates, n_features, .. } = self.shape;
                let zeros = |size: &[i64], kind| Tensor::zeros(size, (kind, Device::Cpu));
                if queries.is_empty() {
                    return Candidates {
                        items: zeros(&[0, n_candidates], Kind::Int64),
                        features: zeros(&[0, n_candidates, n_features], Kind::Float),
                        is_hidden: zeros(&[0, n_candidates], Kind::Bool),
                    };
                }
                let host = self.host.as_ref().expect("searches on a CPU");
                host.candidates(&self.host_columns(columns), queries, self.reminders)
            }
            CandidateSearch::Rows { known, counted } => {
                let counted = counted.as_ref().map(|counted| CountedSessions {
                    items: gather(&columns[0], &counted.rows),
                    is_last_day: counted.is_last_day.shallow_clone(),
                });
                self.find_rows(columns, known, counted)
            }
        }
    }

    /// `columns: [T + 1]`, with a padding event at the end; `rows: [N, L]`: the known events, the
    /// most recent first.
    fn find_rows(
        &self,
        columns: &[Tensor],
        rows: &Tensor,
        counted: Option<CountedSessions>,
    ) -> Candidates {
        let (mut codes, mut values) = (Vec::new(), Vec::new());
        for Attribute { column, cells, .. } in &self.counts.attributes.0 {
            let of_rows = gather(&columns[*column], rows);
            match cells {
                Cells::Codes(_) => codes.push(of_rows),
                Cells::Values(_) => values.push(of_rows),
            }
        }
        let known = Known { items: gather(&columns[0], rows), codes, values, counted };
        tch::no_grad(|| self.tables().candidates(&known, &self.config, self.reminders))
    }

    fn host_columns(&self, columns: &[Tensor]) -> Columns {
        let (mut codes, mut values) = (Vec::new(), Vec::new());
        for Attribute { column, cells, .. } in &self.counts.attributes.0 {
            let column = &columns[*column];
            match cells {
                Cells::Codes(_) => codes.push(column.try_into().expect("codes are i64 [T + 1]")),
                Cells::Values(_) => values.push(column.try_into().expect("values are f32 [T + 1]")),
            }
        }
        let items = (&columns[0]).try_into().expect("items are i64 [T + 1]");
        Columns { items, codes, values }
    }
}

/// Prepares searches for candidates in host memory, without the counts.
#[derive(Clone)]
pub(super) struct CandidatePreparer {
    max_length: usize,
    /// The last day that was counted.
    last_day: Option<i64>,
    is_on_gpu: bool,
}

impl CandidatePreparer {
    /// A search for the next item of each session.
    pub fn of_next(&self, known: &Batch) -> CandidateSearch {
        let sessions = event_ranges(known).into_iter();
        let queries = sessions.map(|known| Query { known, counted: None });
        self.search(queries.collect(), known.n_events() as i64, false)
    }

    /// A search for the events `targets` of a batch in training. A session of a day that was
    /// counted is left out of the counts for its own targets. The known items are the events before
    /// a target in time, whatever the body reads. A target behind the last event has none.
    pub fn of_targets(
        &self,
        targets: &[i64],
        batch: &Batch,
        sizes: Option<&StepSizes>,
    ) -> CandidateSearch {
        let sessions = event_ranges(batch);
        let query = |&target: &i64| {
            let target = target as usize;
            let session = sessions.partition_point(|events| events.end <= target);
            let Some(events) = sessions.get(session).cloned() else {
                return Query { known: 0..0, counted: None };
            };
            let known = events.start..target;
            let day = Some(batch.days[session]);
            let counted = (day <= self.last_day).then_some((events, day == self.last_day));
            Query { known, counted }
        };
        let queries: Vec<Query> = targets.iter().map(query).collect();
        let includes_counted = match sizes {
            Some(sizes) => sizes.includes_counted,
            None => queries.iter().any(|query| query.counted.is_some()),
        };
        let padding = sizes.map_or(batch.n_events() as i64, |sizes| sizes.n_events);
        self.search(queries, padding, includes_counted)
    }

    /// Whether sessions of `day` are left out of the counts.
    pub fn leaves_out(&self, day: i64) -> bool {
        Some(day) <= self.last_day
    }

    fn search(&self, queries: Vec<Query>, padding: i64, includes_counted: bool) -> CandidateSearch {
        if !self.is_on_gpu {
            return CandidateSearch::Queries(queries);
        }
        let padded = |events: &mut dyn Iterator<Item = usize>| {
            let mut rows: Vec<i64> =
                events.take(self.max_length).map(|event| event as i64).collect();
            rows.resize(self.max_length, padding);
            rows
        };
        let rows = |of: &dyn Fn(&Query) -> Vec<i64>| {
            let rows: Vec<i64> = queries.iter().flat_map(of).collect();
            Tensor::from_slice(&rows).view([-1, self.max_length as i64])
        };
        let known = rows(&|query| padded(&mut query.known.clone().rev()));
        let counted = includes_counted.then(|| {
            let whole = |query: &Query| query.counted.clone().unwrap_or_default();
            let is_last_day = queries.iter().map(|query| f32::from(u8::from(whole(query).1)));
            let is_last_day = Tensor::from_slice(&is_last_day.collect::<Vec<_>>()).view([-1, 1]);
            CountedRows { rows: rows(&|query| padded(&mut whole(query).0)), is_last_day }
        });
        CandidateSearch::Rows { known, counted }
    }
}

/// A search for candidates, prepared in host memory.
pub(super) enum CandidateSearch {
    /// For a search on a CPU.
    Queries(Vec<Query>),
    /// Rows of the batch's columns, for a search on a GPU.
    Rows {
        /// The known events of each target, the most recent first, then padding: i64 `[N, L]`.
        known: Tensor,
        counted: Option<CountedRows>,
    },
}

/// The sessions of targets that the counts contain.
pub(super) struct CountedRows {
    /// Their events, i64 `[N, L]`.
    rows: Tensor,
    /// 1 for a session of the last day, else 0: f32 `[N, 1]`.
    is_last_day: Tensor,
}

impl CandidateSearch {
    /// All tensors, to be sent to a device together.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        match self {
            Self::Queries(_) => Vec::new(),
            Self::Rows { known, counted } => {
                let counted = counted.iter_mut();
                let counted =
                    counted.flat_map(|CountedRows { rows, is_last_day }| [rows, is_last_day]);
                std::iter::once(known).chain(counted).collect()
            }
        }
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
    columns_of_attributes(config, features).map(|_| ())
}

fn columns_of_attributes(
    config: &CandidatesConfig,
    features: &Features,
) -> Result<Vec<usize>, String> {
    attribute_columns(config.attributes.as_deref(), "candidates.attributes", features)
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
        // No value of an item is needed: memory for them is not checked yet.
        let columns = columns_of_attributes(&config.candidates, features)?;
        let has_codes = |column: &&usize| features.columns()[**column].is_categorical();
        let n_codes = columns.iter().filter(has_codes).count();
        // The number of features does not depend on the length of sessions.
        let n_features = Shape::new(&config.candidates, n_codes, columns.len(), 1).n_features;
        let hidden = config.hidden_width;
        Ok(Self {
            from_features: builder.linear("head.evidence.features", n_features, hidden),
            from_state: builder.linear("head.evidence.state", width, hidden),
            hidden: builder.linear("head.evidence.hidden", hidden, hidden),
            of_hidden: builder.constant("head.evidence.of_hidden", &[hidden], 0.0),
            of_features: builder.constant("head.evidence.of_features", &[n_features], 0.0),
        })
    }

    /// Scores of candidates, given the states `[N, width]`: `[N, E]`.
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

/// The events of each session of a batch.
fn event_ranges(batch: &Batch) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |&length: &usize| {
        end += length;
        end - length..end
    };
    batch.lengths.iter().map(next).collect()
}

/// `column: [T + 1]` at `rows: [N, L]`.
fn gather(column: &Tensor, rows: &Tensor) -> Tensor {
    column.index_select(0, &rows.reshape([-1])).reshape_as(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Segment;

    const N_ITEMS: i64 = 30;

    /// Sessions with the code and the value of each event; an item's are not always the same.
    fn batch(seed: u64, n_sessions: u64) -> Batch {
        let mut state = seed;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let lengths: Vec<usize> = (0..n_sessions).map(|_| 2 + below(9) as usize).collect();
        let n_events = lengths.iter().sum::<usize>();
        let items: Vec<i64> = (0..n_events).map(|_| 1 + below(N_ITEMS as u64 - 1) as i64).collect();
        let codes: Vec<i64> = items.iter().map(|item| 1 + (item + below(2) as i64) % 3).collect();
        let values: Vec<f32> = items.iter().map(|&item| item as f32 / 9.0).collect();
        Batch {
            columns: vec![
                Tensor::from_slice(&items),
                Tensor::from_slice(&codes),
                Tensor::from_slice(&values),
                Tensor::from_slice(&codes),
            ],
            session_seeds: vec![0; lengths.len()],
            days: (0..lengths.len() as i64).map(|session| session % 3).collect(),
            step_seed: 0,
            segments: vec![Segment { seed: 0, n_sessions: lengths.len() }],
            lengths,
        }
    }

    /// An index of the sessions of days 0 and 1 of a batch.
    fn index(batch: &Batch, config: &CandidatesConfig, reminders: Reminders) -> CandidateIndex {
        let numbers = |column: usize| Vec::<i64>::try_from(&batch.columns[column]).unwrap();
        let mut codes = vec![0; N_ITEMS as usize];
        numbers(0).into_iter().zip(numbers(1)).for_each(|(item, code)| codes[item as usize] = code);
        let values = (0..N_ITEMS).map(|item| item as f32 / 9.0).collect();
        let attribute = |column, cells| Attribute { column, name: String::new(), cells };
        let attributes = Attributes(vec![
            attribute(1, Cells::Codes(codes.clone())),
            attribute(2, Cells::Values(values)),
            attribute(3, Cells::Codes(codes)),
        ]);
        let shape = Shape::new(config, 2, 3, 8);
        let mut counts = Counts::new(N_ITEMS, 100, attributes);
        counts.begin_day(1);
        for (session, items) in batch.sessions().iter().enumerate() {
            if batch.days[session] <= 1 {
                counts.add_items(items, batch.days[session] == 1);
            }
        }
        counts.end_day();
        let (config, tables) = (config.clone(), OnceCell::new());
        let (host, device) = (None, Device::Cpu);
        let mut index = CandidateIndex { config, shape, counts, host, tables, reminders, device };
        index.update_tables();
        index
    }

    #[test]
    fn lookups_on_the_host_are_those_with_tensors() {
        let batch = batch(3, 40);
        let n_events = batch.n_events() as i64;
        for (n_candidates, n_neighbours, n_frequent, reminders) in [
            (200, 6, 2, Reminders::All),
            (12, 6, 2, Reminders::Earlier),
            (5, 6, 2, Reminders::None),
            (200, 6, 0, Reminders::All),
            (200, 0, 2, Reminders::All),
            (200, 0, 0, Reminders::All),
        ] {
            let config = CandidatesConfig {
                n_candidates,
                n_recent: 3,
                n_neighbours,
                n_frequent,
                attributes: None,
            };
            let mut index = index(&batch, &config, reminders);
            let targets: Vec<i64> = (0..n_events).collect();
            let find = |index: &CandidateIndex| {
                [index.of_targets(&targets, &batch), index.of_next(&batch)]
            };
            let on_host = find(&index);
            index.host = None;
            let with_tensors = find(&index);
            for (a, b) in on_host.iter().zip(&with_tensors) {
                assert_eq!(a.items, b.items, "{n_candidates}");
                assert_eq!(a.is_hidden, b.is_hidden, "{n_candidates}");
                assert!(a.items.gt(0).sum(Kind::Int64).int64_value(&[]) > a.items.size()[0]);
                let is_item = a.items.gt(0).unsqueeze(2).to_kind(Kind::Float);
                let difference = ((&a.features - &b.features) * is_item).abs().max();
                assert!(difference.double_value(&[]) < 1e-5, "{difference:?}");
            }
        }
    }
}
