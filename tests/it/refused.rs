//! What cannot be run is refused with one message, exit code 2, and nothing left behind.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::fixtures;
use crate::mpirun::{Finished, run_within};
use crate::train::{PROGRAM, Shop};

fn refused(finished: &Finished, message: &str) {
    assert_eq!(finished.code, Some(2), "{finished:#?}");
    assert!(finished.stderr.contains(message), "{message}\n{finished:#?}");
    assert_eq!(
        finished.stderr.lines().filter(|line| line.starts_with("error: ")).count(),
        1,
        "{finished:#?}"
    );
    assert!(!finished.stderr.contains("panicked"), "{finished:#?}");
}

#[test]
fn configurations() {
    let shop = Shop::new(20);
    let set = |assignment: &str| shop.train("run", &["--set", assignment]);
    for (assignment, message) in [
        (
            "train.learning_rat=1",
            "unknown key `train.learning_rat` in the configuration: did you mean `train.learning_rate`?",
        ),
        (
            "model.hiden_width=1",
            "unknown key `model.hiden_width` in the configuration: did you mean `model.hidden_width`?",
        ),
        ("trian.epochs=1", "unknown key `trian` in the configuration: did you mean `train`?"),
        ("model.kind=lstm", "`lstm`"),
        ("train.global_batch=fast", "section `[train]` of the configuration"),
        ("train.global_batch=50", "`global_batch` 50 is not a whole number of micro-batches of 8"),
        ("train.epochs_per_day=0", "`epochs_per_day` must be at least 1"),
        ("train.learning_rate=nan", "`learning_rate` cannot be NaN"),
        ("model.dropout=1.5", "`dropout` 1.5"),
        ("data.last_day=1", "`last_day` 1 is not after `first_day` 1"),
        ("data.window_days=0", "`window_days` must be at least 1"),
        ("dropout", "`--set dropout` is not of the form `section.key=value`"),
        ("data.features=[\"colour\"]", "feature `colour` of `data.features` is not in the schema"),
        ("data.last_day=9", "no day 4 under"),
    ] {
        refused(&set(assignment), message);
    }
    assert!(!shop.run_dir("run").exists());
    fs::write(shop.config(), "[run\n").unwrap();
    refused(&shop.train("run", &[]), "is not valid TOML");
    fs::remove_file(shop.config()).unwrap();
    refused(&shop.train("run", &[]), "cannot read the configuration");
}

#[test]
fn data() {
    let shop = Shop::new(20);
    let valid = shop.data().join("3/valid.parquet");
    let whole = fs::read(&valid).unwrap();
    // A footer that is cut off, then one that is not there at all.
    fs::write(&valid, &whole[..whole.len() - 6]).unwrap();
    refused(&shop.train("run", &[]), "3/valid.parquet` is not a readable parquet file");
    fs::remove_file(&valid).unwrap();
    refused(&shop.train("run", &[]), "cannot open");
    fs::write(&valid, &whole).unwrap();
    fs::rename(shop.data().join("schema.pbtxt"), shop.data().join("elsewhere")).unwrap();
    refused(&shop.train("run", &[]), "schema.pbtxt`");
    assert!(!shop.run_dir("run").exists());
}

#[test]
fn rows() {
    let shop = Shop::new(20);
    let train = shop.data().join("1/train.parquet");
    let features = ["--set", "data.features=[\"price_log_norm-list_seq\"]"];
    let one_event = vec![vec![5, 6], vec![7]];
    let none = vec![vec![5, 6], vec![], vec![5, 6]];
    let too_large = vec![vec![5, 6], vec![40, 6]];
    let padding = vec![vec![0, 6]];
    for (sessions, message) in [
        (one_event, "1/train.parquet` row 1: column `product_id-list_seq` has a session of one event"),
        (none, "1/train.parquet` row 1: column `product_id-list_seq` holds a null or an empty list"),
        (too_large, "1/train.parquet` row 1: column `product_id-list_seq` has the id 40, outside 1..=39"),
        (padding, "1/train.parquet` row 0: column `product_id-list_seq` has the id 0, outside 1..=39"),
        (vec![vec![5, 6, 7], vec![8, 9]], "row 1: column `price_log_norm-list_seq` has the value NaN"),
    ] {
        fixtures::write_sessions(&train, &sessions, |item| if item == 9 { f32::NAN } else { 0.0 });
        let finished = shop.train("run", &[&features[..], &["--overwrite"]].concat());
        // These are seen only when the rows are read, so the run has begun.
        assert_eq!(finished.code, Some(1), "{finished:#?}");
        assert!(finished.stderr.contains(message), "{message}\n{finished:#?}");
    }
}

#[test]
fn more_ranks_than_there_is_work_for() {
    let shop = Shop::new(1);
    let one_day = ["--set", "data.last_day=2"];
    let Some(finished) = shop.train_on(2, "run", &one_day) else { return };
    refused(&finished, "2 ranks are more than the 1 training sessions of days 1 to 1");
    let Some(finished) = shop.train_on(2, "run", &["--set", "train.micro_batch=48"]) else { return };
    refused(&finished, "2 ranks are more than the 1 micro-batches of a global batch");
    assert!(!shop.run_dir("run").exists());
}

#[test]
fn a_run_directory_that_is_taken_is_left_alone() {
    let shop = Shop::new(20);
    shop.train("run", &[]).success();
    let before = fs::read(shop.run_dir("run").join("metrics.jsonl")).unwrap();
    refused(&shop.train("run", &["--resume=never"]), "already holds a run");
    refused(
        &shop.train("run", &["--set", "run.seed=1"]),
        "another configuration: `run.seed` was 42, and is 1 now",
    );
    assert_eq!(fs::read(shop.run_dir("run").join("metrics.jsonl")).unwrap(), before);
    shop.train("run", &["--overwrite", "--set", "run.seed=1"]).success();
    assert_ne!(fs::read(shop.run_dir("run").join("metrics.jsonl")).unwrap(), before);
}

#[test]
fn a_run_that_cannot_be_evaluated() {
    let shop = Shop::new(20);
    let evaluate = |run: &str, more: &[&str]| {
        let (run, data) = (shop.run_dir(run), shop.data());
        let paths = ["evaluate", "--run-dir", run.to_str().unwrap(), "--data", data.to_str().unwrap()];
        run_within(Command::new(PROGRAM).args([&paths[..], more].concat()), Duration::from_secs(60))
    };
    refused(&evaluate("nowhere", &[]), "cannot read the configuration");
    shop.train("run", &[]).success();
    refused(&evaluate("run", &["--day", "7"]), "no day 7 under");
    fixtures::write_schema(&shop.data(), 50);
    refused(&evaluate("run", &[]), "it counts 40 items, the schema has 50");
    fixtures::write_schema(&shop.data(), 40);
    let checkpoints = shop.run_dir("run").join("checkpoints");
    for entry in fs::read_dir(&checkpoints).unwrap() {
        fs::remove_file(entry.unwrap().path().join("manifest.json")).unwrap();
    }
    refused(&evaluate("run", &[]), "holds no complete checkpoint");
}
