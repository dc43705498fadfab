//! Whether a file is still what was written.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

/// The hash (xxh3, 128 bits, in hexadecimal) of a file.
///
/// # Errors
/// It cannot be read.
pub fn hash_of(path: &Path) -> io::Result<String> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut hash = Xxh3::new();
    loop {
        let bytes = file.fill_buf()?;
        if bytes.is_empty() {
            return Ok(format!("{:032x}", hash.digest128()));
        }
        hash.update(bytes);
        let n = bytes.len();
        file.consume(n);
    }
}
