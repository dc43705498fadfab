//! Runs the seeds of the fuzz targets in tests/fuzz again.

use std::fs;
use std::process::Command;

use crate::support::files::root;

#[path = "../fuzz/targets.rs"]
mod targets;

fn replay(name: &str, target: fn(&[u8])) {
    let dir = tempfile::tempdir().unwrap();
    let mut unpack = Command::new("tar");
    unpack.arg("-C").arg(dir.path()).arg("-xzf").arg(root().join("tests/fuzz/corpus.tar.gz"));
    assert!(unpack.status().unwrap().success());
    let seeds = dir.path().join("corpus").join(name);
    let mut paths: Vec<_> =
        fs::read_dir(seeds).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!((10..=15).contains(&paths.len()), "{} seeds of `{name}`", paths.len());
    for path in paths {
        // The last name shows which seed failed.
        println!("{}", path.display());
        target(&fs::read(&path).unwrap());
    }
}

#[test]
fn seeds_of_requests_are_answered_or_refused() {
    replay("request", targets::request);
}

#[test]
fn seeds_of_schemas_are_read_or_refused() {
    replay("schema", targets::schema);
}

#[test]
fn seeds_of_workflows_are_loaded_or_refused() {
    replay("workflow", targets::workflow);
}

#[test]
fn seeds_of_events_are_preprocessed_or_refused() {
    replay("events", targets::events);
}
