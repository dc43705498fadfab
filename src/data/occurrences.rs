//! How often items occur.

use std::slice;

use super::{DataError, Features, SessionFile};

/// Occurrences of each item, `[V]`, in this rank's share of a file: consecutive sessions, each counted once,
/// however often a run trains on it. Summed over ranks they are those of the whole file. Row groups are read one after
/// the other, so that a day needs no more memory than one of them.
///
/// # Errors
/// See [`SessionFile::read`].
pub fn occurrences(
    file: &SessionFile,
    features: &Features,
    (rank, world_size): (usize, usize),
) -> Result<Vec<i64>, DataError> {
    let n_sessions = file.n_sessions();
    let mut counts = vec![0; features.n_items() as usize];
    for span in file.spans(rank * n_sessions / world_size..(rank + 1) * n_sessions / world_size) {
        let sessions = file.read(slice::from_ref(&span))?;
        for &item in (0..sessions.len()).flat_map(|row| sessions.ids(0, row)) {
            counts[item as usize] += 1;
        }
    }
    Ok(counts)
}
