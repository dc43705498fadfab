//! Outcomes of single sessions, so that models can be compared session by session.

use bireme_tools::report::evaluation_file::SessionOutcome;
use tch::{Device, Tensor};

use super::ranking::FIRST_ITEM;
use crate::collective::{Collective, CollectiveError};

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

/// Outcomes of this rank's sessions, without the deciles.
#[derive(Default)]
pub(super) struct Outcomes {
    /// Rank, number of known events and target of each session.
    numbers: Vec<[i64; 3]>,
}

impl Outcomes {
    /// Adds a block of sessions: the rank of each target, the number of known events and the
    /// target, all `[B]`.
    pub(super) fn add(&mut self, ranks: &Tensor, n_known: &[usize], targets: &Tensor) {
        let [ranks, targets] = [ranks, targets].map(|tensor| {
            Vec::<i64>::try_from(tensor.to_device(Device::Cpu)).expect("numbers are i64 [B]")
        });
        let n_known = n_known.iter().map(|&n| n as i64);
        let rows = ranks.into_iter().zip(n_known).zip(targets);
        self.numbers.extend(rows.map(|((rank, n_known), target)| [rank, n_known, target]));
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
        let outcomes = numbers.chunks_exact(3).map(|numbers| {
            let [rank, n_known, target] = numbers.try_into().expect("three numbers");
            SessionOutcome { rank, n_known, target, decile: deciles[target as usize] }
        });
        Ok(outcomes.collect())
    }
}
