//! Writes sessions to `sessions_by_day/<day_index>/{train,valid,test}.parquet`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::ops::Range;
use std::path::{Path, PathBuf};

use polars::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::buckets::{read_events_at, write_events};
use crate::error::Error;
use crate::schema::{FloatRange, session};
use crate::sessions::{Event, sessions};
use crate::vocab::{Coded, ColumnValue, Dictionary};
use crate::workflow::{CutSession, Encoder};

/// The three parts of a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// 80 % of the sessions.
    Train,
    /// 10 %.
    Valid,
    /// 10 %.
    Test,
}

impl Split {
    pub const ALL: [Self; 3] = [Self::Train, Self::Valid, Self::Test];

    /// The split of a session: by a seeded hash (xxh3, 64 bits) of its original id alone.
    pub fn of(session_id: &str, seed: u64) -> Self {
        // Compared in tenths of 2^64, without rounding.
        match (u128::from(xxh3_64_with_seed(session_id.as_bytes(), seed)) * 10) >> 64 {
            0..8 => Self::Train,
            8 => Self::Valid,
            _ => Self::Test,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Valid => "valid",
            Self::Test => "test",
        }
    }

    pub fn file(self) -> &'static str {
        match self {
            Self::Train => "train.parquet",
            Self::Valid => "valid.parquet",
            Self::Test => "test.parquet",
        }
    }
}

/// A file with the sessions of a bucket that are kept, cut to length and grouped by day.
#[derive(Debug)]
pub(crate) struct KeptSessions {
    path: PathBuf,
    /// The range of each day's events in the file, counted in events.
    days: BTreeMap<i64, Range<usize>>,
}

impl KeptSessions {
    /// Writes sessions with their days.
    pub fn write(path: PathBuf, mut kept: Vec<(i64, &[Event])>) -> Result<Self, Error> {
        kept.sort_by_key(|(day, _)| *day);
        let mut days: BTreeMap<i64, Range<usize>> = BTreeMap::new();
        let mut end = 0;
        for (day, events) in &kept {
            days.entry(*day).or_insert(end..end).end += events.len();
            end += events.len();
        }
        write_events(&path, kept.iter().map(|(_, events)| *events))?;
        Ok(Self { path, days })
    }

    pub fn days(&self) -> impl Iterator<Item = i64> {
        self.days.keys().copied()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Day {
    /// Spans of 24 hours from the first event, counted from 1.
    pub day_index: i64,
    /// Sessions in train, valid and test.
    pub n_sessions: [usize; 3],
    /// Smallest and largest value of the float columns, by [`FLOAT_COLUMNS`].
    pub(crate) ranges: [Option<FloatRange>; 5],
}

/// The columns whose range depends on the data.
pub(crate) const FLOAT_COLUMNS: [&str; 5] = [
    session::RECENCY,
    session::WEEKDAY_COS,
    session::WEEKDAY_SIN,
    session::RELATIVE_PRICE,
    session::PRICE,
];

/// Writes days of sessions.
#[derive(Debug)]
pub(crate) struct DayWriter<'a> {
    pub dir: &'a Path,
    pub kept: &'a [KeptSessions],
    pub encoder: &'a Encoder<'a>,
    /// The sessions' original ids.
    pub session_ids: &'a Dictionary,
    /// The number of events of each session before it was cut, by the session's code.
    pub counts: &'a [u32],
    pub seed: u64,
}

impl DayWriter<'_> {
    /// Writes a day. Its sessions are sorted by encoded id, so that the longest come first.
    pub fn write(&self, day_index: i64) -> Result<Day, Error> {
        let mut events = Vec::new();
        for kept in self.kept {
            if let Some(places) = kept.days.get(&day_index) {
                read_events_at(&kept.path, places.clone(), &mut events)?;
            }
        }
        let mut rows: Vec<CutSession<'_>> = sessions(&events)
            .map(|events| CutSession {
                events,
                count: self.counts[events[0].code(Coded::Session) as usize] as usize,
            })
            .collect();
        rows.sort_unstable_by_key(|row| self.encoder.id(&row.events[0], Coded::Session));
        let mut splits = [const { Vec::new() }; 3];
        for row in rows {
            splits[self.split(row.events[0].code(Coded::Session)) as usize].push(row);
        }

        let dir = self.dir.join(day_index.to_string());
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let n_sessions = splits.each_ref().map(Vec::len);
        let mut day = Day { day_index, n_sessions, ranges: [None; 5] };
        for (split, rows) in Split::ALL.into_iter().zip(&splits) {
            self.write_file(&dir.join(split.file()), rows, &mut day.ranges)?;
        }
        Ok(day)
    }

    fn split(&self, session_code: u32) -> Split {
        match self.session_ids.value(session_code) {
            ColumnValue::Text(id) => Split::of(id, self.seed),
            ColumnValue::Int(id) => Split::of(&id.to_string(), self.seed),
        }
    }

    fn write_file(
        &self,
        path: &Path,
        rows: &[CutSession<'_>],
        ranges: &mut [Option<FloatRange>; 5],
    ) -> Result<(), Error> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        let schema = self.encoder.sessions(&[])?.schema().clone();
        let mut writer = ParquetWriter::new(BufWriter::new(file))
            .with_compression(ParquetCompression::Zstd(None))
            .set_parallel(false)
            .batched(&schema)
            .map_err(Error::parquet("write", path))?;
        for rows in rows.chunks(rows_per_group(rows.len())) {
            let table = self.encoder.sessions(rows)?;
            for (range, column) in ranges.iter_mut().zip(FLOAT_COLUMNS) {
                let values = table.column(column)?.list()?.get_inner();
                if let (Some(min), Some(max)) = (values.min::<f64>()?, values.max::<f64>()?) {
                    let of_group = FloatRange { min, max };
                    *range = Some(range.map_or(of_group, |known| known.with(of_group)));
                }
            }
            writer.write_batch(&table).map_err(Error::parquet("write", path))?;
        }
        writer.finish().map(drop).map_err(Error::parquet("write", path))
    }
}

/// Sessions of a row group: few enough that a file of any size has a group for each of 64 ranks,
/// and enough that the metadata of a group stays small beside its data.
fn rows_per_group(n_rows: usize) -> usize {
    n_rows.div_ceil(64).clamp(256, 8192)
}
