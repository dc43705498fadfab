//! Counts the occurrences of items.

use std::slice;

use super::{DataError, Features, SessionFile};

/// Counts the occurrences of each item, `[V]`, in this rank's part of the sessions of a file. The
/// sum over ranks counts each session once, for any number of epochs. Row groups are read one
/// at a time, so that memory holds only one of them.
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
