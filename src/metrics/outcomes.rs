//! Outcomes of single sessions, so that models can be compared session by session.

use bireme_tools::report::evaluation_file::SessionOutcome;
use tch::Tensor;

use crate::collective::{Collective, CollectiveError};
use crate::data::Batch;
use crate::data::FIRST_ITEM;

/// Number of popularity groups of the catalogue.
const N_DECILES: usize = 10;

/// Returns the popularity decile of every item, `[V]`: 1 for the most frequent tenth of the items,
/// 10 for the least frequent tenth, and 0 for items that never occurred or are not recommendable.
///
/// Items are sorted by descending occurrences, ties by ascending index, and cut into ten groups
/// whose sizes differ by one item at most.
pub fn deciles(occurrences: &[i64]) -> Vec<i64> {
    let mut seen: Vec<usize> =
        (FIRST_ITEM as usize..occurrences.len()).filter(|&item| occurrences[item] > 0).collect();
    seen.sort_by_key(|&item| (-occurrences[item], item));
    let mut deciles = vec![0; occurrences.len()];
    for (index, &item) in seen.iter().enumerate() {
        deciles[item] = (1 + index * N_DECILES / seen.len()) as i64;
    }
    deciles
}

/// Outcomes of this rank's sessions, without deciles and support.
#[derive(Default)]
pub(super) struct Outcomes {
    /// Rank, number of known events, target and number of its repeats of each session.
    numbers: Vec<[i64; 4]>,
}

impl Outcomes {
    /// Adds a block of sessions: the ranks of the targets, the known events and the targets, i64
    /// `[B]` in host memory.
    pub(super) fn add(&mut self, ranks: &[i64], known: &Batch, targets: &Tensor) {
        let targets = Vec::<i64>::try_from(targets).expect("targets are i64 [B]");
        let rows = ranks.iter().copied().zip(known.sessions()).zip(targets);
        self.numbers.extend(rows.map(|((rank, known), target)| {
            [rank, known.len() as i64, target, n_repeats(&known, target)]
        }));
    }

    /// *All ranks.* Gathers the outcomes of all sessions on the root; other ranks get none. Ranks
    /// evaluate consecutive blocks, so that the outcomes in rank order are in the order of the
    /// file.
    pub(super) fn gather(
        self,
        occurrences: &[i64],
        collective: &dyn Collective,
    ) -> Result<Vec<SessionOutcome>, CollectiveError> {
        let bytes: Vec<u8> =
            self.numbers.iter().flatten().flat_map(|number| number.to_le_bytes()).collect();
        let bytes = collective.gather_bytes(&bytes)?.concat();
        if collective.root().is_none() {
            return Ok(Vec::new());
        }
        let deciles = deciles(occurrences);
        let numbers: Vec<i64> = bytes
            .chunks_exact(8)
            .map(|bytes| i64::from_le_bytes(bytes.try_into().expect("eight bytes")))
            .collect();
        let outcomes = numbers.chunks_exact(4).map(|numbers| {
            let [rank, n_known, target, n_repeats] = numbers.try_into().expect("four numbers");
            let (decile, support) = (deciles[target as usize], support(occurrences, target));
            SessionOutcome { rank, n_known, target, decile, n_repeats, support }
        });
        Ok(outcomes.collect())
    }
}

/// Counts how often the target occurs among the known events of its session; 0 for an unknown item,
/// because all unknown items have the same index.
fn n_repeats(known: &[i64], target: i64) -> i64 {
    if target < FIRST_ITEM {
        return 0;
    }
    known.iter().filter(|&&item| item == target).count() as i64
}

/// Returns how often the target occurred in training; 0 for an unknown item.
fn support(occurrences: &[i64], target: i64) -> i64 {
    if target < FIRST_ITEM { 0 } else { occurrences[target as usize] }
}
