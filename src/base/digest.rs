//! Digests of files, to detect files that changed after they were written.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

/// xxh3 of 128 bits in hexadecimal: fast, against damage by disks and interrupted copies.
///
/// # Errors
/// The file cannot be read.
pub fn xxh3_of_file(path: &Path) -> io::Result<String> {
    let mut hash = Xxh3::new();
    each_block(path, |bytes| hash.update(bytes))?;
    Ok(format!("{:032x}", hash.digest128()))
}

/// SHA-256 in hexadecimal, which other programs can check (`sha256sum`).
///
/// # Errors
/// The file cannot be read.
pub fn sha256_of_file(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    each_block(path, |bytes| hash.update(bytes))?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn each_block(path: &Path, mut update: impl FnMut(&[u8])) -> io::Result<()> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    loop {
        let bytes = file.fill_buf()?;
        if bytes.is_empty() {
            return Ok(());
        }
        update(bytes);
        let n = bytes.len();
        file.consume(n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_other_programs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        // Of `sha256sum` and `xxh128sum`.
        for (bytes, sha256, xxh3) in [
            (
                "",
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
                "99aa06d3014798d86001c324468d497f",
            ),
            (
                "abc",
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
                "06b05ab6733a618578af5f94892f3950",
            ),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(sha256_of_file(&path).unwrap(), sha256);
            assert_eq!(xxh3_of_file(&path).unwrap(), xxh3);
        }
    }
}
