//! Checks of a command's files of events before any is read.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Refuses a file that is given twice, under one name or several, because its events would count
/// twice.
///
/// # Errors
/// The same file twice.
pub fn check_distinct(files: &[PathBuf]) -> Result<(), Error> {
    let identities: Vec<_> = files.iter().map(|file| Identity::of(file)).collect();
    for (i, identity) in identities.iter().enumerate() {
        if let Some(first) = identities[..i].iter().position(|first| first.is_same(identity)) {
            return Err(Error::SameInput { first: files[first].clone(), second: files[i].clone() });
        }
    }
    Ok(())
}

/// Refuses an output that is one of the files of events, or a folder that holds one.
///
/// # Errors
/// An output that is an input.
pub fn check_output(files: &[PathBuf], out: &Path) -> Result<(), Error> {
    if !out.is_file() && !out.is_dir() {
        // Not a regular output: a terminal may be both read and written.
        return Ok(());
    }
    let out = Identity::of(out);
    let is_read = |file: &&PathBuf| {
        let file = Identity::of(file);
        let lies_in = file.path.iter().zip(&out.path).any(|(file, out)| file.starts_with(out));
        file.is_same(&out) || lies_in
    };
    match files.iter().find(is_read) {
        Some(file) => Err(Error::OutputIsInput { path: file.clone() }),
        None => Ok(()),
    }
}

/// The identity of a file. Some shared file systems assign a new inode number at each look-up, so
/// that the canonical path counts too.
struct Identity {
    node: Option<(u64, u64)>,
    path: Option<PathBuf>,
}

impl Identity {
    fn of(path: &Path) -> Self {
        let path = if path == Path::new("-") { Path::new("/dev/stdin") } else { path };
        let node = fs::metadata(path).ok();
        Self {
            node: node.map(|node| (node.dev(), node.ino())),
            // A missing file is reported when it is opened.
            path: fs::canonicalize(path).ok(),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.node.is_some() && self.node == other.node)
            || (self.path.is_some() && self.path == other.path)
    }
}
