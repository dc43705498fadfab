//! What cannot be run is refused with one message, exit code 2, and nothing left behind.

use std::fs;
use std::path::PathBuf;
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
    let error = finished.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    assert!(error.chars().count() <= 310 && !error.contains(char::is_control), "{error}");
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
        (
            "train.global_batch=fast",
            "`train.global_batch` must be a whole number from 0 on, not the string `fast`",
        ),
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
    let config = shop.config();
    let config = config.to_str().unwrap();
    fs::write(config, "[run]\nseed = 1\nseed = 2\n").unwrap();
    let line = format!("`{config}` is not valid TOML: line 3, column 1: duplicate key");
    refused(&shop.train("run", &[]), &line);
    fs::write(config, b"\x7fELF\xff\x00").unwrap();
    refused(&shop.train("run", &[]), &format!("cannot read the configuration `{config}`"));
    fs::write(config, "").unwrap();
    refused(&shop.train("run", &[]), " is missing");
    fs::remove_file(config).unwrap();
    refused(&shop.train("run", &[]), "cannot read the configuration");
    fs::create_dir(config).unwrap();
    refused(&shop.train("run", &[]), &format!("cannot read the configuration `{config}`: Is a directory"));
    fs::remove_dir(config).unwrap();
    fs::write(config, crate::train::CONFIG).unwrap();
    let huge = format!("train.micro_batch={}\u{1b}[31m\nx", "9".repeat(10_000));
    refused(&shop.train("run", &["--set", &huge]), "`train.micro_batch` must be a whole number");
    fs::write(config, "[run]\n\"a\\u001b[31m\" = 1\n").unwrap();
    refused(&shop.train("run", &[]), "unknown key `run.a\\u{1b}[31m`");
}

#[test]
fn a_row_that_one_rank_cannot_read_is_named_before_the_rank() {
    let shop = Shop::new(200);
    let mut sessions = fixtures::sessions(200, 40, 3);
    sessions[150] = vec![5, 41];
    fixtures::write_sessions(&shop.data().join("1/train.parquet"), &sessions, |_| 0.0);
    let Some(failed) = shop.train_on(2, "run", &[]) else { return };
    assert!([Some(1), Some(2)].contains(&failed.code), "{failed:#?}");
    let error = failed.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    let row = "1/train.parquet` row 150: column `product_id-list_seq` has the id 41, outside 1..=39";
    assert!(error.contains(row), "{failed:#?}");
    for debug in ["(())", "Uint8", "Float", "Some("] {
        assert!(!failed.stderr.contains(debug), "{failed:#?}");
    }
}

#[test]
fn damaged_files_of_a_run() {
    let shop = Shop::new(60);
    shop.train("run", &[]).success();
    let run_dir = shop.run_dir("run");
    let checkpoint = crate::resume::checkpoints(&shop, "run").pop().unwrap();
    let evaluate = || {
        let mut command = Command::new(PROGRAM);
        command.arg("evaluate").arg("--run-dir").arg(&run_dir).arg("--data").arg(shop.data());
        run_within(&mut command, Duration::from_secs(60))
    };
    let report = || {
        let mut command = Command::new(PROGRAM);
        command.arg("report").arg(&run_dir).arg("--out").arg(shop.dir.path().join("report"));
        run_within(&mut command, Duration::from_secs(60))
    };
    let damaged = |file: PathBuf, text: &str, command: &dyn Fn() -> Finished, message: &str| {
        let whole = fs::read(&file).unwrap();
        fs::write(&file, text).unwrap();
        let finished = command();
        refused(&finished, message);
        for word in ["struct", "invalid type", "expected u", "enum"] {
            assert!(!finished.stderr.contains(word), "{finished:#?}");
        }
        fs::write(&file, whole).unwrap();
    };
    let config = run_dir.join("config.toml");
    damaged(config.clone(), "train = 3\n", &evaluate, "config.toml`: ");
    damaged(config, "[", &evaluate, "config.toml` is not valid TOML: line 1, column ");
    let metrics = run_dir.join("metrics.jsonl");
    damaged(metrics.clone(), "{\"kind\":\"other\"}\n{\"kind\"", &report, "metrics.jsonl`, line 2: ");
    damaged(
        metrics,
        "{\"kind\":\"step\",\"day\":{},\"step\":1,\"loss\":1}",
        &report,
        "metrics.jsonl`, line 1: ",
    );
    damaged(run_dir.join("run.json"), "[1,", &report, "run.json`, line 1: ");
    // The older checkpoint takes its place.
    fs::write(checkpoint.join("manifest.json"), "{\"files\": 3}").unwrap();
    let warned = evaluate().success();
    assert!(
        warned.stderr.contains("`manifest.json`: the number 3 where a table is expected at line 1"),
        "{warned:#?}"
    );
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
