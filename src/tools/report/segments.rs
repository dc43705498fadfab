//! Splits the sessions of an evaluation into segments.

use serde::Serialize;

use super::evaluation_file::SessionOutcome;

/// A range of numbers, both ends included.
type Range = (i64, i64);

/// Ranges of known events.
const LENGTHS: [Range; 6] = [(1, 1), (2, 2), (3, 3), (4, 5), (6, 10), (11, i64::MAX)];

/// Ranges of the support.
const SUPPORTS: [Range; 6] = [(0, 0), (1, 1), (2, 3), (4, 10), (11, 50), (51, i64::MAX)];

/// Deciles in the order of tables; 0 stands for items that did not occur in training.
const DECILES: [i64; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0];

/// A property of sessions that splits them into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SegmentBy {
    /// Whether the target is among the known events and, if not, whether it occurred in training.
    TargetKind,
    /// Occurrences of the target in training; only of targets that are not among the known events.
    TargetSupport,
    /// Number of known events.
    KnownEvents,
    /// Popularity decile of the target.
    PopularityDecile,
}

/// Sessions with one value, or one range of values, of a property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub by: SegmentBy,
    pub label: String,
    /// Rows of the evaluated file.
    pub rows: Vec<usize>,
}

impl SegmentBy {
    /// The property as text.
    pub fn name(self) -> &'static str {
        match self {
            Self::TargetKind => "kind of target",
            Self::TargetSupport => "support of the target",
            Self::KnownEvents => "known events",
            Self::PopularityDecile => "popularity decile",
        }
    }

    /// Splits sessions into segments. Returns those that have sessions.
    pub fn segments(self, outcomes: &[SessionOutcome]) -> Vec<Segment> {
        let of_label = |label| Segment { by: self, label, rows: Vec::new() };
        let mut segments: Vec<Segment> = self.labels().into_iter().map(of_label).collect();
        for (row, outcome) in outcomes.iter().enumerate() {
            if let Some(segment) = self.segment_of(outcome) {
                segments[segment].rows.push(row);
            }
        }
        segments.retain(|segment| !segment.rows.is_empty());
        segments
    }

    /// Labels of all segments.
    fn labels(self) -> Vec<String> {
        match self {
            Self::TargetKind => ["repeat", "seen", "never seen"].map(str::to_owned).into(),
            Self::TargetSupport => SUPPORTS.map(range_label).into(),
            Self::KnownEvents => LENGTHS.map(range_label).into(),
            Self::PopularityDecile => DECILES
                .map(|decile| match decile {
                    0 => "never seen".to_owned(),
                    _ => decile.to_string(),
                })
                .into(),
        }
    }

    /// Index of the segment of a session in [`Self::labels`].
    fn segment_of(self, outcome: &SessionOutcome) -> Option<usize> {
        let is_repeat = outcome.n_repeats > 0;
        let range = |ranges: &[Range], number: i64| {
            ranges.iter().position(|&(from, to)| (from..=to).contains(&number))
        };
        match self {
            Self::TargetKind if is_repeat => Some(0),
            Self::TargetKind => Some(if outcome.support > 0 { 1 } else { 2 }),
            Self::TargetSupport if is_repeat => None,
            Self::TargetSupport => range(&SUPPORTS, outcome.support),
            Self::KnownEvents => range(&LENGTHS, outcome.n_known),
            Self::PopularityDecile => DECILES.iter().position(|&decile| decile == outcome.decile),
        }
    }
}

/// The segments in which a run is compared with the reference: by kind of target, by support and
/// by known events. Support 0 is left out, because its sessions are those of `never seen`.
pub fn compared_segments(outcomes: &[SessionOutcome]) -> Vec<Segment> {
    let mut segments = SegmentBy::TargetKind.segments(outcomes);
    let by_support = SegmentBy::TargetSupport.segments(outcomes).into_iter();
    segments.extend(by_support.filter(|segment| segment.label != range_label((0, 0))));
    segments.extend(SegmentBy::KnownEvents.segments(outcomes));
    segments
}

fn range_label((from, to): Range) -> String {
    match to {
        _ if from == to => from.to_string(),
        i64::MAX => format!("{from} or more"),
        _ => format!("{from} to {to}"),
    }
}
