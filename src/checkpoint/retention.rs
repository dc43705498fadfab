//! Which checkpoints stay.

use std::collections::BTreeMap;

use super::CheckpointConfig;

/// Where a checkpoint stands in its run: day and steps since the run began. In this order they are older and newer.
pub(super) type Place = (i64, usize);

/// Those of `have`, oldest first, that are no longer kept. `evaluated`: by day, how good the model was after it.
///
/// The last `keep_last` stay; with `keep_days` every day's last; with `keep_best` the last of the best day so far.
pub(super) fn superseded(
    have: &[Place],
    config: &CheckpointConfig,
    evaluated: &BTreeMap<i64, f64>,
) -> Vec<Place> {
    let best = evaluated.iter().max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(&day, _)| day);
    let newest = have.len().saturating_sub(config.keep_last.max(1));
    // The day of the newest may go on: its last step is among the `keep_last` anyway.
    let is_days_last = |i: usize| have.get(i + 1).is_some_and(|next| next.0 != have[i].0);
    let stays = |i: usize| {
        let of_best = config.keep_best.is_some() && best == Some(have[i].0);
        i >= newest || is_days_last(i) && (config.keep_days || of_best)
    };
    (0..have.len()).filter(|&i| !stays(i)).map(|i| have[i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Measure;

    const HAVE: [Place; 7] = [(1, 5), (1, 10), (2, 15), (2, 20), (3, 25), (3, 30), (4, 35)];

    fn kept(config: &CheckpointConfig, evaluated: &[(i64, f64)]) -> Vec<usize> {
        let gone = superseded(&HAVE, config, &evaluated.iter().copied().collect());
        HAVE.iter().filter(|place| !gone.contains(place)).map(|place| place.1).collect()
    }

    #[test]
    fn the_last_stay() {
        let config = |keep_last| CheckpointConfig { keep_last, ..CheckpointConfig::default() };
        assert_eq!(kept(&config(2), &[]), [30, 35]);
        assert_eq!(kept(&config(100), &[]), [5, 10, 15, 20, 25, 30, 35]);
        // None is not a number of checkpoints to keep.
        assert_eq!(kept(&config(0), &[]), [35]);
    }

    #[test]
    fn every_days_last_stay() {
        let config = CheckpointConfig { keep_last: 1, keep_days: true, ..CheckpointConfig::default() };
        assert_eq!(kept(&config, &[]), [10, 20, 30, 35]);
    }

    #[test]
    fn the_best_day_stays() {
        let config = CheckpointConfig {
            keep_last: 1,
            keep_best: Some(Measure::NdcgAt20),
            ..CheckpointConfig::default()
        };
        assert_eq!(kept(&config, &[]), [35]);
        assert_eq!(kept(&config, &[(1, 0.2), (2, 0.3), (3, 0.1)]), [20, 35]);
        // The later of two that are equally good.
        assert_eq!(kept(&config, &[(1, 0.3), (2, 0.3)]), [20, 35]);
    }
}
