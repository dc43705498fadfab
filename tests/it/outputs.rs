//! Commands write their outputs to files, folders, links, pipes and devices, and clean up after
//! signals.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::support::files::names;
use crate::support::process::{Finished, LIMIT, PROGRAM, kill, run_within, with_default_signals};

const SMALL: [&str; 6] = ["--events", "2000", "--items", "100", "--days", "2"];

fn bireme(dir: &Path, arguments: &[&str]) -> Finished {
    run_within(Command::new(PROGRAM).args(arguments).current_dir(dir), LIMIT)
}

fn synth(dir: &Path, out: &str) -> Finished {
    bireme(dir, &[&["synth", "--out", out], &SMALL[..]].concat())
}

#[test]
fn a_shop_is_written_wherever_it_should_go() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    synth(dir, "plain.csv").success();
    let plain = fs::read_to_string(dir.join("plain.csv")).unwrap();
    assert_eq!(plain.lines().count(), 2001);

    symlink("target.csv", dir.join("link.csv")).unwrap();
    for _ in 0..2 {
        synth(dir, "link.csv").success();
    }
    assert!(dir.join("link.csv").is_symlink());
    assert_eq!(fs::read_to_string(dir.join("target.csv")).unwrap(), plain);

    assert!(Command::new("mkfifo").arg(dir.join("pipe")).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = dir.join("pipe");
        move || fs::read_to_string(pipe).unwrap()
    });
    synth(dir, "pipe").success();
    assert_eq!(reader.join().unwrap(), plain);
    assert!(fs::metadata(dir.join("pipe")).unwrap().file_type().is_fifo());
    synth(dir, "/dev/null").success();
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());

    for out in ["-", "/dev/stdout", "/dev/fd/1"] {
        let finished = synth(dir, out).success();
        assert!(
            finished.stdout == plain && finished.stderr.contains("rows"),
            "{out}: {}",
            finished.stderr
        );
    }
    synth(dir, "x.csv.gz").success();
    let mut text = String::new();
    let file = fs::File::open(dir.join("x.csv.gz")).unwrap();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    assert_eq!(text, plain);

    for (out, said) in
        [("no/x.csv", "no"), (".", "folder"), ("x.csv/", "x.csv/"), ("plain.csv/x", "plain.csv/x")]
    {
        let refused = synth(dir, out);
        assert_eq!((refused.code, refused.stderr.lines().count()), (Some(2), 1), "{refused:#?}");
        assert!(refused.stderr.contains(said), "{refused:#?}");
    }
    assert_eq!(names(dir), ["link.csv", "pipe", "plain.csv", "target.csv", "x.csv.gz"]);
}

#[test]
fn sessions_are_written_into_the_current_folder() {
    let dir = tempfile::tempdir().unwrap();
    synth(dir.path(), "events.csv").success();
    let here = dir.path().join("here");
    fs::create_dir(&here).unwrap();
    bireme(&here, &["preprocess", "--events", "../events.csv", "--out", "."]).success();
    assert_eq!(names(&here), ["items.parquet", "schema.pbtxt", "sessions_by_day", "workflow"]);
    let missing =
        bireme(dir.path(), &["preprocess", "--events", "events.csv", "--extend", "nothing"]);
    assert_eq!(missing.code, Some(2), "{missing:#?}");
    assert_eq!(names(dir.path()), ["events.csv", "here"]);
}

/// A command that is at work on its output until its input ends.
fn at_work(dir: &Path, staging: &str) -> (Child, fs::File) {
    let mut command = with_default_signals();
    command.args(["preprocess", "--events", "pipe", "--out", "data"]).current_dir(dir);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // Opened for both, so that it opens at once and the other end waits.
    let pipe = fs::OpenOptions::new().read(true).write(true).open(dir.join("pipe")).unwrap();
    while !dir.join(staging).join("scratch").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        sleep(Duration::from_millis(5));
    }
    (child, pipe)
}

#[test]
fn a_signal_leaves_nothing_and_a_kill_is_cleaned_up_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    synth(dir, "events.csv").success();
    assert!(Command::new("mkfifo").arg(dir.join("pipe")).status().unwrap().success());
    let preprocess = || bireme(dir, &["preprocess", "--events", "events.csv", "--out", "data"]);
    for there in [false, true] {
        let staging = if there { "data/.bireme.partial" } else { ".data.partial" };
        let before: &[&str] =
            if there { &["data", "events.csv", "pipe"] } else { &["events.csv", "pipe"] };
        if there {
            fs::create_dir(dir.join("data")).unwrap();
        }
        for (signal, number) in [("TERM", 15), ("INT", 2), ("HUP", 1)] {
            let (mut child, _pipe) = at_work(dir, staging);
            kill(signal, child.id());
            assert_eq!(child.wait().unwrap().signal(), Some(number));
            assert!(!dir.join(staging).exists(), "{signal}");
            assert_eq!(names(dir), before);
        }
        let (mut child, pipe) = at_work(dir, staging);
        let refused = preprocess();
        assert_eq!(refused.code, Some(2), "{refused:#?}");
        assert!(
            refused.stderr.contains(&format!("in use by process {}", child.id())),
            "{refused:#?}"
        );
        kill("KILL", child.id());
        child.wait().unwrap();
        drop(pipe);
        assert!(dir.join(staging).exists());
        let finished = preprocess().success();
        assert!(finished.stderr.contains("which an interrupted command left"), "{finished:#?}");
        assert_eq!(names(dir), ["data", "events.csv", "pipe"]);
        assert_eq!(
            names(&dir.join("data")),
            ["items.parquet", "schema.pbtxt", "sessions_by_day", "workflow"]
        );
        fs::remove_dir_all(dir.join("data")).unwrap();
    }
}

#[test]
fn an_empty_folder_in_a_folder_without_write_permission_is_written_to() {
    let dir = tempfile::tempdir().unwrap();
    synth(dir.path(), "events.csv").success();
    // Root is denied nothing; a mount is a folder that cannot be renamed for anybody.
    let volume: PathBuf = dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=20m", "tmpfs"])
        .arg(&volume)
        .output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        println!("skipped: a file system cannot be mounted here");
        return;
    }
    let finished = bireme(dir.path(), &["preprocess", "--events", "events.csv", "--out", "volume"]);
    let found = names(&volume);
    assert!(Command::new("umount").arg(&volume).status().unwrap().success());
    finished.success();
    assert_eq!(found, ["items.parquet", "schema.pbtxt", "sessions_by_day", "workflow"]);
}
