//! Runs the seeds of the fuzz targets in tests/fuzz again.

use std::fs;
use std::path::Path;

#[path = "../fuzz/targets.rs"]
mod targets;

fn replay(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let mut paths: Vec<_> = fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!((20..=30).contains(&paths.len()), "{} seeds of `{name}`", paths.len());
    for path in paths {
        // The last name shows which seed failed.
        println!("{}", path.display());
        target(&fs::read(&path).unwrap());
    }
}

#[test]
fn requests_that_were_found_are_answered_or_refused() {
    replay("request", targets::request);
}

#[test]
fn schemas_that_were_found_are_read_or_refused() {
    replay("schema", targets::schema);
}

#[test]
fn workflows_that_were_found_are_loaded_or_refused() {
    replay("workflow", targets::workflow);
}

#[test]
fn events_that_were_found_are_preprocessed_or_refused() {
    replay("events", targets::events);
}
