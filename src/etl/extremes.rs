//! Warns of a few events that are far before or after all others.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::events::EventBatch;
use crate::sessions::DAY;
use crate::time::EventTime;

/// The fewest days between outliers and all other events.
const FAR: i64 = 366;

/// The most outliers.
const FEW: usize = 10;

/// An event's time and place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct EventPlace {
    time: EventTime,
    /// Index of the file; `None` for an event of the fit that is extended.
    file: Option<usize>,
    number: u64,
    /// `line` or `row`.
    unit: &'static str,
}

/// The earliest and the latest events so far.
#[derive(Debug, Default)]
pub(crate) struct Extremes {
    n_events: u64,
    is_extension: bool,
    /// At most one more than [`FEW`].
    earliest: BTreeSet<EventPlace>,
    latest: BTreeSet<EventPlace>,
}

impl Extremes {
    /// Starts with the events of a fit, the last of them on the day `last_day`.
    pub fn extending(n_events: u64, first_event: i64, last_day: i64) -> Self {
        let time = EventTime { seconds: first_event + (last_day - 1) * DAY, nanos: 0 };
        let fitted = EventPlace { time, file: None, number: 0, unit: "" };
        Self { n_events, is_extension: true, latest: [fitted].into(), ..Self::default() }
    }

    /// Adds a batch of the file with the index `file`.
    pub fn add(&mut self, file: usize, batch: &EventBatch) {
        self.n_events += batch.time.len() as u64;
        let place = |row: usize| EventPlace {
            time: batch.time[row],
            file: Some(file),
            number: batch.number[row],
            unit: batch.unit,
        };
        let n = batch.time.len();
        // Start at the end with the earliest times, so that few events are inserted.
        let is_rising = batch.time.first() <= batch.time.last();
        for i in 0..n {
            let (early, late) = if is_rising { (i, n - 1 - i) } else { (n - 1 - i, i) };
            if self.earliest.len() <= FEW
                || self.earliest.last().is_some_and(|last| place(early) < *last)
            {
                self.earliest.insert(place(early));
                if self.earliest.len() > FEW + 1 {
                    self.earliest.pop_last();
                }
            }
            if self.latest.len() <= FEW
                || self.latest.first().is_some_and(|first| place(late) > *first)
            {
                self.latest.insert(place(late));
                if self.latest.len() > FEW + 1 {
                    self.latest.pop_first();
                }
            }
        }
    }

    /// A warning if a few events are more than a year before all others, and one if a few are more
    /// than a year after. Days count from `first_event`.
    pub fn warnings(&self, files: &[PathBuf], first_event: i64) -> Vec<String> {
        let day_index = |time: EventTime| (time.seconds - first_event).div_euclid(DAY) + 1;
        let mut warnings = Vec::new();
        let early = self.outliers(self.earliest.iter()).filter(|_| !self.is_extension);
        if let Some((outliers, next)) = early {
            warnings.push(format!(
                "{} before all others: `day_index` counts from there, and the others begin at {}",
                describe(&outliers, next, files),
                day_index(next.time),
            ));
        }
        if let Some((outliers, next)) = self.outliers(self.latest.iter().rev()) {
            warnings.push(format!(
                "{} after all others: its `day_index` is {}",
                describe(&outliers, next, files),
                day_index(outliers[0].time),
            ));
        }
        warnings
    }

    /// The events before the last wide gap in `places`, and the next event.
    fn outliers<'a>(
        &self,
        places: impl Iterator<Item = &'a EventPlace>,
    ) -> Option<(Vec<EventPlace>, EventPlace)> {
        let places: Vec<EventPlace> = places.copied().collect();
        let days = |n: usize| (places[n].time.seconds - places[n - 1].time.seconds).abs() / DAY;
        let n_outliers = (1..places.len())
            .rev()
            .find(|&n| days(n) > FAR && 3 * n as u64 <= self.n_events)
            .filter(|&n| places[..n].iter().all(|place| place.file.is_some()))?;
        Some((places[..n_outliers].to_vec(), places[n_outliers]))
    }
}

fn describe(outliers: &[EventPlace], next: EventPlace, files: &[PathBuf]) -> String {
    let EventPlace { time, file, number, unit } = outliers[0];
    let nearest = outliers[outliers.len() - 1];
    let days = (nearest.time.seconds - next.time.seconds).abs() / DAY;
    let name = file.map(|file| files[file].display().to_string()).unwrap_or_default();
    let (more, are) = match outliers.len() - 1 {
        0 => (String::new(), "is"),
        n => (format!(" and {n} more"), "are"),
    };
    format!("warning: `{name}`, {unit} {number}: the event of {time}{more} {are} {days} days")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(days: &[i64], first_row: u64) -> EventBatch {
        let time = |day: &i64| EventTime { seconds: day * DAY, nanos: 0 };
        EventBatch {
            time: days.iter().map(time).collect(),
            price: vec![0.0; days.len()],
            cells: [const { None }; 7],
            number: (first_row..).take(days.len()).collect(),
            unit: "row",
            bad: Vec::new(),
        }
    }

    fn warnings(batches: &[&[i64]]) -> Vec<String> {
        let mut extremes = Extremes::default();
        for (file, days) in batches.iter().enumerate() {
            extremes.add(file, &batch(days, 1));
        }
        let first = batches.concat().into_iter().min().unwrap_or_default() * DAY;
        extremes.warnings(&["a.csv".into(), "b.csv".into()], first)
    }

    #[test]
    fn few_events_far_from_all_others_are_named() {
        let days: Vec<i64> = (18_170..18_270).collect();
        assert_eq!(warnings(&[&days, &days]), [""; 0]);
        let early = "warning: `b.csv`, row 1: the event of 1970-01-01 00:00:00 UTC is 18170 days \
                     before all others: `day_index` counts from there, and the others begin at \
                     18171";
        assert_eq!(warnings(&[&days, &[0]]), [early]);
        let late = "warning: `b.csv`, row 2: the event of 2173-10-13 00:00:00 UTC and 1 more are \
                    20000 days after all others: its `day_index` is 56261";
        assert_eq!(warnings(&[&days, &[38_269, 74_430]]), [late]);
        assert_eq!(warnings(&[&[0], &days[..1]]), [""; 0], "either could be the outlier");
        let many: Vec<i64> = (0..11).collect();
        assert_eq!(warnings(&[&many, &days]), [""; 0]);
        assert_eq!(warnings(&[&many[..10], &days]).len(), 1);
        assert_eq!(warnings(&[&days, &[-700_000, 2_900_000]]).len(), 2);
    }
}
