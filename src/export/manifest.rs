//! The manifest of an exported version: its origin, and the digests of its files.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use bireme_base::digest::sha256_of_file;
use bireme_tools::run_dir::METRICS;
use serde_json::{Value, json};
use tch::Kind;

use crate::checkpoint::State;
use crate::config::Config;
use crate::device::LIBTORCH;

/// The manifest, in the version folder of the ensemble.
pub const FILE: &str = "manifest.json";

/// The origin of an exported version.
pub struct ManifestFacts<'a> {
    /// In the repository.
    pub name: String,
    pub version: u64,
    pub run_dir: &'a Path,
    pub checkpoint: &'a Path,
    /// Of the checkpoint.
    pub state: &'a State,
    pub config: &'a Config,
    pub tables: Kind,
}

/// Writes the manifest of all files under `root` into the folder `dir`.
pub fn write(facts: &ManifestFacts<'_>, root: &Path, dir: &Path) -> io::Result<()> {
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

/// The name of a type of tables on the command line.
pub fn type_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "f32",
    }
}

/// The run's records of evaluations after training on `day`.
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
        let (path, bytes) = (entry.path(), entry.metadata()?.len());
        let sha256 = sha256_of_file(&path)?;
        files.insert(name, json!({ "bytes": bytes, "sha256": sha256 }));
    }
    Ok(())
}
