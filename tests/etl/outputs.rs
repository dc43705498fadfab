//! The folders to which sessions may be written, and their contents afterwards.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use bireme_base::user_error::UserError;
use bireme_etl::{Error, PreprocessOptions, PreprocessReport, preprocess};

use crate::support::{HEADER, bytes, run, scratch, shop};

const ROWS: &str =
    "2019-10-01 10:00:00 UTC,view,11,7,,,1,1,s\n2019-10-01 10:00:05 UTC,view,22,7,,,1,1,s\n";

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn into(
    dir: &Path,
    out: &str,
    change: impl FnOnce(&mut PreprocessOptions),
) -> Result<PreprocessReport, Error> {
    let events = dir.join("events.csv");
    fs::write(&events, format!("{HEADER}\n{ROWS}")).unwrap();
    let mut options = PreprocessOptions::new(vec![events], dir.join(out));
    change(&mut options);
    preprocess(&options, &mut |_| {})
}

#[test]
fn folders_that_exist_stay_the_same_folders() {
    let dir = scratch();
    fs::create_dir(dir.path().join("large")).unwrap();
    symlink("large", dir.path().join("data")).unwrap();
    into(dir.path(), "data", |_| {}).unwrap();
    let expected = ["items.parquet", "schema.pbtxt", "sessions_by_day", "workflow"];
    assert_eq!(names(&dir.path().join("large")), expected);
    assert!(dir.path().join("data").is_symlink());
    fs::write(dir.path().join("large/notes"), "of somebody").unwrap();
    into(dir.path(), "data", |options| options.overwrite = true).unwrap();
    into(dir.path(), "deep/er", |_| {}).unwrap();
    assert_eq!(names(&dir.path().join("deep/er")), expected);
    assert_eq!(names(&dir.path().join("large")).len(), 5);
    assert_eq!(names(dir.path()), ["data", "deep", "events.csv", "large"]);
}

#[test]
fn places_that_cannot_be_written_to_are_refused() {
    let dir = scratch();
    fs::write(dir.path().join("file"), "").unwrap();
    for out in ["file", "file/data", "/dev/null", "/proc/data"] {
        let refused = into(dir.path(), out, |_| {}).unwrap_err();
        assert_eq!(refused.exit_code(), 2, "{refused}");
    }
    for (out, missing) in [("nothing", "workflow"), ("file", "workflow"), (".", "workflow")] {
        let refused = into(dir.path(), out, |options| options.extend = true).unwrap_err();
        assert_eq!(refused.exit_code(), 2, "{refused}");
        assert!(refused.to_string().contains(missing), "{refused}");
    }
    assert_eq!(names(dir.path()), ["events.csv", "file"]);
    // Events in the same folder as the sessions are never moved.
    into(dir.path(), "data", |_| {}).unwrap();
    let events = dir.path().join("data/sessions_by_day/events.csv");
    fs::write(&events, format!("{HEADER}\n{ROWS}")).unwrap();
    let refused = into(dir.path(), "data", |options| {
        options.events = vec![events.clone()];
        options.overwrite = true;
    });
    assert!(matches!(refused, Err(Error::OutputIsInput { .. })), "{refused:?}");
    assert!(events.exists());
}

#[test]
fn a_failed_extension_leaves_what_was_there() {
    let dir = scratch();
    run(dir.path(), &shop(100), |_| {}).unwrap();
    let before = bytes(&dir.path().join("out"));
    let broken = format!("{HEADER}\n{}never,view,1,1,,,1,1,s\n", ROWS.replace("2019", "2020"));
    run(dir.path(), &broken, |options| options.extend = true).unwrap_err();
    assert!(bytes(&dir.path().join("out")) == before);
    assert_eq!(names(dir.path()), ["events.csv", "out"]);
}
