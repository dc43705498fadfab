//! Files as tensors.

use std::fs;
use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use crate::elements::elements;

/// Maps a file into memory: `[bytes of the file]`, u8. `parse` reads the bytes before anything else
/// has the tensor. Pages are read on access, and the system can reclaim them. The file must not be
/// modified while the tensor exists; it may be removed.
///
/// # Errors
/// The file cannot be read or mapped, or `parse` fails.
pub fn map<T>(
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, TchError>,
) -> Result<(Tensor, T), TchError> {
    let n_bytes = fs::metadata(path)?.len();
    if n_bytes == 0 {
        // An empty file cannot be mapped.
        return Ok((Tensor::empty([0], (Kind::Uint8, Device::Cpu)), parse(&[])?));
    }
    let name =
        path.to_str().ok_or_else(|| TchError::FileFormat("its path is not UTF-8".to_owned()))?;
    let file = Tensor::f_from_file(name, false, n_bytes as i64, (Kind::Uint8, Device::Cpu))?;
    // SAFETY: only this function has the tensor, and `parse` cannot keep the slice.
    let parsed = parse(unsafe { elements(&file) })?;
    Ok((file, parsed))
}
