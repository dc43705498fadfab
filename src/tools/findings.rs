//! The findings of `bireme doctor`, and checks that need no other rank.

use std::fs;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use bireme_base::user_error::{REFUSED, UserError};
use serde::{Deserialize, Serialize};

/// Bytes written to and read from the file system.
const FILE_BYTES: usize = 128 << 20;

/// What `bireme doctor` prints, and writes as JSON.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// Printed on stdout.
    pub lines: Vec<String>,
    /// Suggested fixes, printed as warnings.
    pub advice: Vec<String>,
    pub ranks: usize,
    /// `CPU` or `GPU`.
    pub device: String,
    /// FLOP/s of f32 matrix products, by rank.
    pub multiply_rates: Vec<f64>,
    /// By ascending size.
    pub all_reduces: Vec<AllReduce>,
}

/// A measured all-reduce.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllReduce {
    pub bytes: f64,
    /// Of the slowest rank.
    pub seconds: f64,
}

impl Findings {
    /// Adds a line with a name and a value.
    pub fn add(&mut self, name: &str, value: &str) {
        self.lines.push(format!("{name:24} {value}"));
    }
}

#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("cannot open the folder `{path}`")]
    Open { path: PathBuf, source: io::Error },
    #[error("`{0}` is not a folder")]
    NotAFolder(PathBuf),
    #[error("cannot write to the folder `{path}`")]
    Write { path: PathBuf, source: io::Error },
}

impl UserError for FolderError {
    fn exit_code(&self) -> i32 {
        REFUSED
    }
}

/// Checks that `dir` is a folder and can be written to.
///
/// # Errors
/// Returns an error if not.
pub fn check_folder(dir: &Path) -> Result<(), FolderError> {
    let path = || dir.to_owned();
    let metadata =
        fs::metadata(dir).map_err(|source| FolderError::Open { path: path(), source })?;
    if !metadata.is_dir() {
        return Err(FolderError::NotAFolder(path()));
    }
    tempfile::tempfile_in(dir)
        .map(drop)
        .map_err(|source| FolderError::Write { path: path(), source })
}

/// Throughput of a file system, in bytes per second.
#[derive(Clone, Copy, Debug)]
pub struct FileRates {
    /// Including the sync to disk.
    pub write: f64,
    /// Of the file just written, so mostly from the page cache.
    pub read: f64,
}

impl FileRates {
    /// Measures with an unnamed file in `dir`, which leaves nothing behind if interrupted.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written or read.
    pub fn measure(dir: &Path) -> io::Result<Self> {
        let bytes = vec![7; FILE_BYTES];
        let mut file = tempfile::tempfile_in(dir)?;
        let start = Instant::now();
        file.write_all(&bytes)?;
        file.sync_all()?;
        let write_seconds = start.elapsed().as_secs_f64();
        file.rewind()?;
        let start = Instant::now();
        let mut read = Vec::with_capacity(FILE_BYTES);
        file.read_to_end(&mut read)?;
        let rate = |seconds: f64| FILE_BYTES as f64 / seconds;
        Ok(Self { write: rate(write_seconds), read: rate(start.elapsed().as_secs_f64()) })
    }
}

/// Median of nine calls after an unmeasured one.
///
/// # Errors
/// Returns the error of `work`.
pub fn median_seconds<E>(mut work: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    work()?;
    let mut seconds = Vec::new();
    for _ in 0..9 {
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Least and largest number; zeros without numbers.
pub fn range(numbers: &[f64]) -> (f64, f64) {
    let fold = |choose: fn(f64, f64) -> f64| numbers.iter().copied().reduce(choose).unwrap_or(0.0);
    (fold(f64::min), fold(f64::max))
}

/// Up to four numbers as a list, more as their range.
pub fn listed(numbers: &[f64], unit: f64) -> String {
    if numbers.len() <= 4 {
        let numbers = numbers.iter().map(|number| format!("{:.0}", number * unit));
        numbers.collect::<Vec<_>>().join(", ")
    } else {
        let (least, largest) = range(numbers);
        format!("{:.0} to {:.0}", least * unit, largest * unit)
    }
}

/// `16 bytes`, `4 MiB`.
pub fn size(bytes: f64) -> String {
    if bytes < 1024.0 {
        format!("{bytes:.0} bytes")
    } else {
        format!("{:.0} MiB", bytes / 1024.0 / 1024.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_that_can_be_written_are_tried() {
        let dir = tempfile::tempdir().unwrap();
        check_folder(dir.path()).unwrap();
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let refused = |path: &Path| check_folder(path).unwrap_err().to_string();
        assert_eq!(refused(&file), format!("`{}` is not a folder", file.display()));
        assert!(refused(&dir.path().join("no/such")).starts_with("cannot open the folder"));
        assert!(refused(Path::new("/proc/self")).starts_with("cannot write to the folder"));
        assert!(!dir.path().join("no").exists());
    }

    #[test]
    fn long_lists_become_ranges() {
        assert_eq!(listed(&[1e9, 2e9], 1e-9), "1, 2");
        assert_eq!(listed(&[3e9, 1e9, 2e9, 2e9, 2e9], 1e-9), "1 to 3");
        assert_eq!((size(16.0).as_str(), size(4194304.0).as_str()), ("16 bytes", "4 MiB"));
    }
}
