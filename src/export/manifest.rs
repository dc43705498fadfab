//! What a version was made from, and the hashes of its files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::Kind;

use crate::checkpoint::State;
use crate::config::Config;
use crate::device::LIBTORCH;
use crate::report::METRICS;

/// The manifest, in the version folder of the ensemble.
pub const FILE: &str = "manifest.json";

/// What a manifest tells besides the files.
pub struct Facts<'a> {
    /// The model's name in the repository.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// The run.
    pub run_dir: &'a Path,
    /// The checkpoint's folder.
    pub checkpoint: &'a Path,
    /// What the checkpoint says of itself.
    pub state: &'a State,
    /// The run's configuration.
    pub config: &'a Config,
    /// Type of the tables.
    pub tables: Kind,
}

/// Writes the manifest of all files under `root` into the folder `dir`.
pub fn write(facts: &Facts<'_>, root: &Path, dir: &Path) -> io::Result<()> {
    let mut files = BTreeMap::new();
    hash_files(root, "", &mut files)?;
    let config: Value = toml::from_str::<toml::Value>(&facts.config.to_toml())
        .ok()
        .and_then(|config| serde_json::to_value(config).ok())
        .unwrap_or_default();
    let manifest = json!({
        "format": 1,
        "name": facts.name,
        "version": facts.version,
        "bireme": env!("CARGO_PKG_VERSION"),
        "libtorch": LIBTORCH,
        "tables": type_name(facts.tables),
        "checkpoint": facts.checkpoint.file_name().map(|name| name.to_string_lossy()),
        "trained_to_day": facts.state.position.day,
        "metrics": metrics(facts.run_dir, facts.state.position.day)?,
        "config": config,
        "files": files,
    });
    fs::write(dir.join(FILE), format!("{manifest:#}\n"))
}

/// How the command line calls a type of tables.
pub fn type_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "f32",
    }
}

/// The run's evaluations after that day, as it recorded them.
fn metrics(run_dir: &Path, day: i64) -> io::Result<Vec<Value>> {
    let path = run_dir.join(METRICS);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path)?;
    let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(records.filter(|record| record["kind"] == "eval" && record["train_day"] == day).collect())
}

/// Size and SHA-256 of each file, by its path from `root`.
fn hash_files(dir: &Path, prefix: &str, files: &mut BTreeMap<String, Value>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            hash_files(&entry.path(), &format!("{name}/"), files)?;
            continue;
        }
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        let mut file = BufReader::with_capacity(1 << 20, File::open(entry.path())?);
        loop {
            let read = file.fill_buf()?;
            if read.is_empty() {
                break;
            }
            hash.update(read);
            let n = read.len();
            bytes += n as u64;
            file.consume(n);
        }
        let sha256: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        files.insert(name, json!({ "bytes": bytes, "sha256": sha256 }));
    }
    Ok(())
}
