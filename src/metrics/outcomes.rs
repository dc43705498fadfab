//! What became of each session evaluated, so that models can be compared session by session.

use tch::{Device, Tensor};

use super::ranking::FIRST_ITEM;
use crate::collective::{Collective, CollectiveError};

/// Tenths of the catalogue by popularity.
const N_DECILES: usize = 10;

/// One session's held-out item and where it was ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Exact rank of the item among those that may be recommended, from 1; beyond all of them for one that may not.
    pub rank: i64,
    /// Events that the model knew.
    pub n_known: i64,
    /// Index of the item.
    pub target: i64,
    /// Its popularity in training: see [`deciles`].
    pub decile: i64,
}

/// The popularity decile of every item, `[V]`: 1 for the tenth of the items that occurred most often, 10 for the tenth
/// that occurred least, 0 for items that never occurred and for those that may not be recommended.
///
/// The items that occurred are sorted by occurrences, ties by the lower index first, and cut into ten groups of
/// equal numbers of items (to one).
pub fn deciles(occurrences: &[i64]) -> Vec<i64> {
    let mut seen: Vec<usize> =
        (FIRST_ITEM as usize..occurrences.len()).filter(|&item| occurrences[item] > 0).collect();
    seen.sort_by_key(|&item| (-occurrences[item], item));
    let mut deciles = vec![0; occurrences.len()];
    for (place, &item) in seen.iter().enumerate() {
        deciles[item] = (1 + place * N_DECILES / seen.len()) as i64;
    }
    deciles
}

/// Outcomes of this rank's sessions, before anyone knows how popular the items are.
#[derive(Default)]
pub(super) struct Outcomes {
    /// Rank, known events and target of each session.
    numbers: Vec<[i64; 3]>,
}

impl Outcomes {
    /// Adds a block of sessions, of each its target's rank, its known events and its target: `[B]`.
    pub(super) fn add(&mut self, ranks: &Tensor, n_known: &[usize], targets: &Tensor) {
        let [ranks, targets] = [ranks, targets]
            .map(|tensor| Vec::<i64>::try_from(tensor.to_device(Device::Cpu)).expect("numbers are i64 [B]"));
        let n_known = n_known.iter().map(|&n| n as i64);
        let rows = ranks.into_iter().zip(n_known).zip(targets);
        self.numbers.extend(rows.map(|((rank, n_known), target)| [rank, n_known, target]));
    }

    /// *All ranks.* Those of all sessions on the root, none elsewhere. Ranks evaluate consecutive blocks, so
    /// that their outcomes, one rank after the other, are in the order of the file.
    pub(super) fn gather(
        self,
        occurrences: &[i64],
        collective: &dyn Collective,
    ) -> Result<Vec<Outcome>, CollectiveError> {
        let bytes: Vec<u8> = self.numbers.iter().flatten().flat_map(|number| number.to_le_bytes()).collect();
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
            Outcome { rank, n_known, target, decile: deciles[target as usize] }
        });
        Ok(outcomes.collect())
    }
}
