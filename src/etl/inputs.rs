//! The files of events of a command, before any is read.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Refuses a file that is given twice, under one name or several: its events would count twice.
///
/// # Errors
/// Names both.
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
/// Names the file.
pub fn check_output(files: &[PathBuf], out: &Path) -> Result<(), Error> {
    if !out.is_file() && !out.is_dir() {
        // A terminal may be read and written.
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

/// What a path leads to. Some shared file systems number a file anew when it is looked up again, so
/// that its path counts too.
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
            // A file that is missing is named when it is opened.
            path: fs::canonicalize(path).ok(),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.node.is_some() && self.node == other.node) || (self.path.is_some() && self.path == other.path)
    }
}
