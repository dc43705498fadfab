//! `synth`, `preprocess` and `train` take a seed to metrics.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::files::names;
use crate::support::process::{Finished, LIMIT, PROGRAM, bireme, run_within};

fn synth(dir: &Path, events: &str, items: &str) -> PathBuf {
    let out = dir.join("events.csv");
    let size = ["--events", events, "--items", items, "--days", "3", "--seed", "5"];
    bireme(&[&["synth", "--out", out.to_str().unwrap()], &size[..]].concat()).success();
    out
}

fn preprocess(events: &Path, out: &Path, more: &[&str]) -> Finished {
    let paths =
        ["preprocess", "--events", events.to_str().unwrap(), "--out", out.to_str().unwrap()];
    bireme(&[&paths[..], more].concat())
}

#[test]
fn a_shop_becomes_sessions_and_pairs_beat_popularity_on_them() {
    let dir = tempfile::tempdir().unwrap();
    let events = synth(dir.path(), "60000", "500");
    assert_eq!(fs::read_to_string(&events).unwrap().lines().count(), 60_001);
    let data = dir.path().join("data");
    let finished = preprocess(&events, &data, &[]).success();
    assert!(finished.stdout.contains("rows read                     60000"), "{}", finished.stdout);
    assert_eq!(names(&data.join("sessions_by_day")), ["1", "2", "3"]);

    let ndcg = ["popularity", "markov"].map(|kind| {
        let (config, run) = (dir.path().join(format!("{kind}.toml")), dir.path().join(kind));
        fs::write(
            &config,
            format!("[data]\nfirst_day = 1\nlast_day = 3\n[model]\nkind = \"{kind}\"\n"),
        )
        .unwrap();
        let [config, data, run] = [&config, &data, &run].map(|path| path.to_str().unwrap());
        bireme(&["train", "--config", config, "--data", data, "--run-dir", run]).success();
        let results = fs::read_to_string(Path::new(run).join("results.txt")).unwrap();
        results.lines().nth(1).unwrap().split_once(':').unwrap().1.parse::<f64>().unwrap()
    });
    assert!(ndcg[1] > ndcg[0] + 0.03, "{ndcg:?}");
}

#[test]
fn days_can_be_chosen_and_sessions_cut() {
    let dir = tempfile::tempdir().unwrap();
    let events = synth(dir.path(), "5000", "200");
    let data = dir.path().join("data");
    preprocess(&events, &data, &["--days", "2..3", "--max-length", "5", "--keep", "last"])
        .success();
    assert_eq!(names(&data.join("sessions_by_day")), ["2", "3"]);
    let schema = fs::read_to_string(data.join("schema.pbtxt")).unwrap();
    assert!(schema.contains("max: 5"), "{schema}");
    let finished = preprocess(&events, &dir.path().join("other"), &["--days", "3"]);
    assert_eq!(finished.code, Some(2));
    assert!(finished.stderr.contains("`A..B`"), "{}", finished.stderr);
}

#[test]
fn a_bad_row_is_named_or_skipped_and_no_partial_output_stays() {
    let dir = tempfile::tempdir().unwrap();
    let events = synth(dir.path(), "2000", "200");
    let text = fs::read_to_string(&events).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines[99] = lines[99].replacen("2019-", "2o19-", 1);
    fs::write(&events, lines.join("\n")).unwrap();

    let data = dir.path().join("data");
    let finished = preprocess(&events, &data, &[]);
    assert_eq!(finished.code, Some(2), "{finished:#?}");
    assert!(
        finished.stderr.contains("events.csv`, line 100, column `event_time`"),
        "{}",
        finished.stderr
    );
    assert!(finished.stderr.contains("hint: `--skip-bad-rows`"), "{}", finished.stderr);
    assert_eq!(names(dir.path()), ["events.csv"]);

    let finished = preprocess(&events, &data, &["--skip-bad-rows"]).success();
    assert!(finished.stdout.contains("unreadable, left out              1"), "{}", finished.stdout);
    let before = fs::read(data.join("schema.pbtxt")).unwrap();
    let finished = preprocess(&events, &data, &["--skip-bad-rows"]);
    assert_eq!(finished.code, Some(2), "a folder that is taken");
    assert_eq!(fs::read(data.join("schema.pbtxt")).unwrap(), before);
    preprocess(&events, &data, &["--skip-bad-rows", "--overwrite"]).success();
    assert_eq!(names(dir.path()), ["data", "events.csv"]);
}

#[test]
fn impossible_shops_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("events.csv");
    for (option, value) in [("--items", "0"), ("--days", "0"), ("--events", "3")] {
        let finished = bireme(&["synth", "--out", out.to_str().unwrap(), option, value]);
        assert_eq!(finished.code, Some(2), "{finished:#?}");
        assert!(
            finished.stderr.starts_with(&format!("error: `{option} {value}` is too few")),
            "{finished:#?}"
        );
    }
    let nowhere = dir.path().join("nowhere/events.csv");
    let finished = bireme(&["synth", "--out", nowhere.to_str().unwrap()]);
    assert_eq!(finished.code, Some(2), "{finished:#?}");
    assert!(finished.stderr.contains("nowhere/events.csv"), "{finished:#?}");
    assert_eq!(names(dir.path()), [] as [&str; 0]);
}

/// A file that accepts a limited number of bytes, like a full disk.
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let events = synth(dir.path(), "20000", "200");
    let (data, program) = (dir.path().join("data"), PROGRAM);
    // A file may grow to 64 blocks of 512 bytes; the signal that says so is ignored, so that the
    // write fails.
    let script = format!(
        "trap '' XFSZ; ulimit -f 64; exec {program} preprocess --events {} --out {}",
        events.display(),
        data.display()
    );
    let finished = run_within(Command::new("sh").args(["-c", &script]), LIMIT);
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert!(finished.stderr.contains("error: cannot write"), "{finished:#?}");
    assert_eq!(names(dir.path()), ["events.csv"]);
}

#[test]
fn events_are_read_from_standard_input_as_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let events = synth(dir.path(), "3000", "200");
    let text = fs::read(&events).unwrap();
    let counts =
        |stdout: &str| stdout.lines().filter(|line| !line.contains("written")).collect::<String>();
    let expected = counts(&preprocess(&events, &dir.path().join("data"), &[]).success().stdout);
    for name in ["-", "/dev/stdin"] {
        let out = dir.path().join(if name == "-" { "a" } else { "b" });
        let mut command = Command::new(PROGRAM);
        command.args(["preprocess", "--events", name, "--out", out.to_str().unwrap()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(&text).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(counts(&String::from_utf8(output.stdout).unwrap()), expected);
    }
}
