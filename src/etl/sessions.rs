//! Events to sessions: coded, sorted by time, without repeats.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use crate::events::{Batch, Cells, columns_at_once};
use crate::time::EventTime;
use crate::vocab::{Coded, Dictionary, Value, Vocabulary};

/// One event in the form that is sorted, counted and kept on disk in between: 48 bytes whatever its texts.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Event {
    /// Of the event's time: all that is not the order of events is derived from these.
    pub seconds: i64,
    pub price: f64,
    /// Codes of [`Dictionaries`], by [`Coded`].
    pub codes: [u32; 7],
    /// Of the event's time, after its seconds.
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

/// Seconds in a day.
pub(crate) const DAY: i64 = 86_400;

/// What the codes of events mean.
#[derive(Debug)]
pub(crate) struct Dictionaries(pub [Dictionary; 7]);

impl Dictionaries {
    pub fn new() -> Self {
        // Session ids are kept as they stand in the files; the fit looks whether they are integers.
        Self(Coded::ALL.map(|column| Dictionary::new(column.is_int())))
    }

    /// With the values and codes of fitted vocabularies.
    pub fn of(vocabularies: &[Vocabulary; 7]) -> Self {
        Self(vocabularies.each_ref().map(Vocabulary::dictionary_of_files))
    }

    pub fn get(&self, column: Coded) -> &Dictionary {
        &self.0[column as usize]
    }

    /// Codes a batch, column by column and all columns at once: codes depend on the order of the rows alone.
    pub fn code(&mut self, batch: &Batch) -> Vec<Event> {
        let n_rows = batch.time.len();
        let codes: Vec<Vec<u32>> = (self.0.par_iter_mut().zip(&batch.cells))
            .with_min_len(columns_at_once(n_rows))
            .map(|(dictionary, cells)| match cells {
                None => vec![Dictionary::NULL; n_rows],
                Some(Cells::Int(cells)) => cells
                    .iter()
                    .map(|cell| cell.map_or(Dictionary::NULL, |value| dictionary.intern(Value::Int(value))))
                    .collect(),
                Some(Cells::Text(cells)) => cells
                    .iter()
                    .map(|cell| match cell {
                        None | Some("") => Dictionary::NULL,
                        Some(text) => dictionary.intern(Value::Text(text)),
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
/// whose predecessor in the session is of the same product. Returns how many were dropped.
///
/// The type of the event is not looked at: a view, a cart and a purchase of one product in a row become the view.
pub(crate) fn sort_and_drop_repeats(events: &mut Vec<Event>) -> usize {
    // Stable: the events come in file order.
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

/// Which events of a session stay that is longer than the longest length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// The session's start, as in the tutorial.
    #[default]
    First,
    /// The session's end, as a model in service sees it.
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
