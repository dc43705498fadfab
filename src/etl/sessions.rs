//! Coded events: sorted by session and time, without repeats, cut to sessions.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use crate::events::{Cells, EventBatch, columns_at_once};
use crate::time::EventTime;
use crate::vocab::{Coded, ColumnValue, Dictionary, Vocabulary};

/// An event as it is sorted, counted and kept in scratch files: 48 bytes, whatever its texts.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Event {
    /// Of the event's time. The nanoseconds matter only for the order of events.
    pub seconds: i64,
    pub price: f64,
    /// Codes of [`Dictionaries`], by [`Coded`].
    pub codes: [u32; 7],
    /// Of the event's time.
    pub nanos: u32,
}

impl Event {
    pub fn time(&self) -> EventTime {
        EventTime { seconds: self.seconds, nanos: self.nanos }
    }

    pub fn code(&self, column: Coded) -> u32 {
        self.codes[column as usize]
    }
}

pub(crate) const DAY: i64 = 86_400;

/// The values behind the codes of events, by [`Coded`].
#[derive(Debug)]
pub(crate) struct Dictionaries(pub [Dictionary; 7]);

impl Dictionaries {
    pub fn new() -> Self {
        // Session ids are text here; the fit turns them into integers if all are.
        Self(Coded::ALL.map(|column| Dictionary::new(column.is_int())))
    }

    /// Contains the values and codes of fitted vocabularies.
    pub fn of(vocabularies: &[Vocabulary; 7]) -> Self {
        Self(vocabularies.each_ref().map(Vocabulary::dictionary_of_files))
    }

    pub fn get(&self, column: Coded) -> &Dictionary {
        &self.0[column as usize]
    }

    /// Codes a batch, all columns in parallel. The codes depend only on the order of the rows.
    pub fn code(&mut self, batch: &EventBatch) -> Vec<Event> {
        let n_rows = batch.time.len();
        let codes: Vec<Vec<u32>> = (self.0.par_iter_mut().zip(&batch.cells))
            .with_min_len(columns_at_once(n_rows))
            .map(|(dictionary, cells)| match cells {
                None => vec![Dictionary::NULL; n_rows],
                Some(Cells::Int(cells)) => cells
                    .iter()
                    .map(|cell| {
                        cell.map_or(Dictionary::NULL, |value| {
                            dictionary.intern(ColumnValue::Int(value))
                        })
                    })
                    .collect(),
                Some(Cells::Text(cells)) => cells
                    .iter()
                    .map(|cell| match cell {
                        None | Some("") => Dictionary::NULL,
                        Some(text) => dictionary.intern(ColumnValue::Text(text)),
                    })
                    .collect(),
            })
            .collect();
        (0..n_rows)
            .map(|row| Event {
                seconds: batch.time[row].seconds,
                price: batch.price[row],
                codes: std::array::from_fn(|column| codes[column][row]),
                nanos: batch.time[row].nanos,
            })
            .collect()
    }
}

/// Sorts events by (session, time), those of the same time in file order, and drops every event
/// whose predecessor in the session is of the same product. Returns the number of dropped events.
///
/// The type of event does not matter: of a view, a cart and a purchase of one product in a row, the
/// view remains.
pub(crate) fn sort_and_drop_repeats(events: &mut Vec<Event>) -> usize {
    // A stable sort, because the events are in file order.
    events.sort_by_key(|event| (event.code(Coded::Session), event.time()));
    let n_before = events.len();
    events.dedup_by(|next, kept| {
        next.code(Coded::Session) == kept.code(Coded::Session)
            && next.code(Coded::Product) == kept.code(Coded::Product)
    });
    n_before - events.len()
}

/// The sessions among sorted events.
pub(crate) fn sessions(events: &[Event]) -> impl Iterator<Item = &[Event]> {
    events.chunk_by(|a, b| a.code(Coded::Session) == b.code(Coded::Session))
}

/// The events that are kept of a session longer than the limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Keep {
    /// The first events, as in the tutorial.
    #[default]
    First,
    /// The last events, as in serving.
    Last,
}

impl Keep {
    /// At most `max_length` of them.
    pub(crate) fn cut<T>(self, events: &[T], max_length: usize) -> &[T] {
        let n = events.len().min(max_length);
        match self {
            Self::First => &events[..n],
            Self::Last => &events[events.len() - n..],
        }
    }
}
