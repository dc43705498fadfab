//! The manifest of a checkpoint, which shows whether its folder is complete.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use bireme_base::digest::xxh3_of_file;
use bireme_base::message;
use bireme_tools::run_dir::MANIFEST;
use serde::{Deserialize, Serialize};

/// `manifest.json`: size and hash of the other files, by name.
#[derive(Serialize, Deserialize)]
pub(super) struct Manifest {
    files: BTreeMap<String, Entry>,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    xxh3: String,
}

impl Entry {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { bytes: fs::metadata(path)?.len(), xxh3: xxh3_of_file(path)? })
    }
}

impl Manifest {
    /// Describes `files` of a folder.
    pub fn of(folder: &Path, files: &[&str]) -> io::Result<Self> {
        let entry = |file: &&str| Ok(((*file).to_owned(), Entry::of(&folder.join(file))?));
        Ok(Self { files: files.iter().map(entry).collect::<io::Result<_>>()? })
    }

    /// Returns why a folder is not a complete checkpoint, or `None` if it is one.
    pub fn problem(folder: &Path) -> Option<String> {
        let text = match fs::read(folder.join(MANIFEST)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Some(format!("it has no `{MANIFEST}`"));
            }
            Err(error) => return Some(format!("`{MANIFEST}`: {error}")),
        };
        let manifest: Self = match serde_json::from_slice(&text) {
            Ok(manifest) => manifest,
            Err(error) => return Some(format!("`{MANIFEST}`: {}", message::chain(&error))),
        };
        manifest.files.iter().find_map(|(file, written)| match Entry::of(&folder.join(file)) {
            Ok(found) if found == *written => None,
            Ok(Entry { bytes, .. }) if bytes != written.bytes => {
                Some(format!("`{file}` has {bytes} bytes, {} were written", written.bytes))
            }
            Ok(_) => Some(format!("the hash of `{file}` is not the one that was written")),
            Err(error) => Some(format!("`{file}`: {error}")),
        })
    }
}
