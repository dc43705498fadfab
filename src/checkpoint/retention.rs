//! Retention of checkpoints.

use std::collections::BTreeMap;

use super::CheckpointConfig;

/// Identifies a checkpoint of a run. Newer checkpoints are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CheckpointId {
    pub day: i64,
    /// Steps since the run began.
    pub global_step: usize,
}

/// Returns the checkpoints of `saved`, oldest first, that are no longer kept. `evaluated`: the
/// metric of `keep_best` after each day.
///
/// The last `keep_last` checkpoints are kept, with `keep_days` the last one of every day, and with
/// `keep_best` the last one of the best day so far.
pub(super) fn superseded(
    saved: &[CheckpointId],
    config: &CheckpointConfig,
    evaluated: &BTreeMap<i64, f64>,
) -> Vec<CheckpointId> {
    let best = evaluated.iter().max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(&day, _)| day);
    let first_newest = saved.len().saturating_sub(config.keep_last.max(1));
    // The newest checkpoint may not be the last of its day, but it is one of the `keep_last`.
    let is_last_of_day = |i: usize| saved.get(i + 1).is_some_and(|next| next.day != saved[i].day);
    let is_kept = |i: usize| {
        let is_best_day = config.keep_best.is_some() && best == Some(saved[i].day);
        i >= first_newest || is_last_of_day(i) && (config.keep_days || is_best_day)
    };
    (0..saved.len()).filter(|&i| !is_kept(i)).map(|i| saved[i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bireme_tools::measure::Measure;

    const SAVED: [(i64, usize); 7] = [(1, 5), (1, 10), (2, 15), (2, 20), (3, 25), (3, 30), (4, 35)];

    fn kept(config: &CheckpointConfig, evaluated: &[(i64, f64)]) -> Vec<usize> {
        let saved = SAVED.map(|(day, global_step)| CheckpointId { day, global_step });
        let removed = superseded(&saved, config, &evaluated.iter().copied().collect());
        saved.iter().filter(|id| !removed.contains(id)).map(|id| id.global_step).collect()
    }

    #[test]
    fn the_last_checkpoints_are_kept() {
        let config = |keep_last| CheckpointConfig { keep_last, ..CheckpointConfig::default() };
        assert_eq!(kept(&config(2), &[]), [30, 35]);
        assert_eq!(kept(&config(100), &[]), [5, 10, 15, 20, 25, 30, 35]);
        // At least one is kept.
        assert_eq!(kept(&config(0), &[]), [35]);
    }

    #[test]
    fn the_last_checkpoint_of_every_day_is_kept() {
        let config =
            CheckpointConfig { keep_last: 1, keep_days: true, ..CheckpointConfig::default() };
        assert_eq!(kept(&config, &[]), [10, 20, 30, 35]);
    }

    #[test]
    fn the_last_checkpoint_of_the_best_day_is_kept() {
        let config = CheckpointConfig {
            keep_last: 1,
            keep_best: Some(Measure::NdcgAt20),
            ..CheckpointConfig::default()
        };
        assert_eq!(kept(&config, &[]), [35]);
        assert_eq!(kept(&config, &[(1, 0.2), (2, 0.3), (3, 0.1)]), [20, 35]);
        // Of two equally good days the later one.
        assert_eq!(kept(&config, &[(1, 0.3), (2, 0.3)]), [20, 35]);
    }
}
