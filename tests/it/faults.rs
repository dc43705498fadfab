//! A fault ends a run in time, with an exit code and a message that names cause, place and rank,
//! and leaves the last complete checkpoint to resume from.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::configs::{REPRODUCIBLE, RESUMABLE};
use crate::support::process::{Finished, PROGRAM, run_within};
use crate::support::session_shop::SessionShop;

#[test]
fn steps_that_are_not_finite_end_the_run_or_are_left_out() {
    let shop = SessionShop::of_twenty_steps();
    let nan = "nan@1:12";
    for reduction in ["run.reduction=fast", "run.reduction=reproducible"] {
        let set = ["--set", reduction];
        let Some(ended) = shop.train_with_fault(2, reduction, &set, nan) else { return };
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        let message =
            "the loss is NaN and the norm of its gradient NaN at day 2, step 3, from rank 1";
        assert!(ended.stderr.contains(message), "{ended:#?}");
        // The earlier checkpoint is complete, and the run resumes from it.
        shop.train_on(2, reduction, &set).unwrap().success();

        let skipping = format!("{reduction} skipping");
        let set = [&set[..], &["--set", "train.non_finite={kind = \"skip\", limit = 1}"]].concat();
        shop.train_with_fault(2, &skipping, &set, nan).unwrap().success();
        let skipped = shop.records(&skipping, "skipped");
        assert_eq!(skipped.len(), 1);
        assert_eq!((skipped[0]["day"].as_i64(), skipped[0]["step"].as_i64()), (Some(2), Some(3)));
        let state = shop.newest_checkpoint(&skipping).join("state.json");
        let state: Value = serde_json::from_str(&fs::read_to_string(state).unwrap()).unwrap();
        assert_eq!(
            (state["n_skipped"].as_u64(), state["optimizer_steps"].as_u64()),
            (Some(1), Some(19))
        );

        let none = format!("{reduction} none");
        let set = ["--set", reduction, "--set", "train.non_finite={kind = \"skip\", limit = 0}"];
        let ended = shop.train_with_fault(2, &none, &set, nan).unwrap();
        assert_eq!(ended.code, Some(1), "{ended:#?}");
    }
}

#[test]
fn a_rank_with_diverging_weights_is_named() {
    let shop = SessionShop::of_twenty_steps();
    for (n_ranks, message) in
        [(2, ", or theirs are wrong"), (3, "run again from the last checkpoint")]
    {
        let set = ["--set", "run.compare_ranks_every=4"];
        let run = format!("{n_ranks}");
        let Some(ended) = shop.train_with_fault(n_ranks, &run, &set, "desync@1:5") else {
            return;
        };
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        assert!(
            ended.stderr.contains("after day 1, step 8, the weights of rank 1 on "),
            "{ended:#?}"
        );
        assert!(ended.stderr.contains(message), "{ended:#?}");
    }
}

#[test]
fn a_rank_that_panics_or_runs_out_of_memory_ends_the_job_and_its_checkpoints_stay() {
    let shop = SessionShop::of_twenty_steps();
    for (fault, start, message) in [
        ("panic@1:14", "error: internal error: rank 1 of 2 on ", "a planted panic"),
        (
            "memory@1:14",
            "error: rank 1 of 2 on ",
            "cannot allocate memory: 4194304.0 GiB asked for",
        ),
    ] {
        let Some(ended) = shop.train_with_fault(2, fault, &RESUMABLE, fault) else { return };
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        assert!(ended.took < Duration::from_secs(60), "{ended:#?}");
        let line = ended.stderr.lines().find(|line| line.starts_with(start)).unwrap_or("");
        assert!(
            line.contains(", day 2, step 5, after call ") && line.contains(message),
            "{ended:#?}"
        );
        let on: &Path = &shop.newest_checkpoint(fault);
        assert!(on.join("manifest.json").exists());
        shop.train(fault, &RESUMABLE).success();
    }
}

#[test]
fn memory_that_is_refused_is_an_error_with_the_bytes_and_the_phase() {
    let shop = SessionShop::of_twenty_steps();
    let ended = run_within(
        shop.train_command("run", &RESUMABLE).env("BIREME_FAULT", "memory@0:14"),
        Duration::from_secs(60),
    );
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    let message = "error: cannot allocate memory: 4194304.0 GiB asked for while training on day 2";
    assert!(ended.stderr.contains(message) && !ended.stderr.contains("panicked"), "{ended:#?}");
    shop.train("run", &RESUMABLE).success();
}

#[test]
fn a_run_directory_has_one_owner() {
    let shop = SessionShop::of_twenty_steps();
    let more = [&REPRODUCIBLE[..], &["--set", "checkpoint.every_steps=1"]].concat();
    // The first stops itself in the middle of its work.
    let start = |run: &str, fault: &str| {
        let mut command = shop.train_command(run, &more);
        command.env("BIREME_FAULT", fault);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut first = start("run", "stop@0:14");
    while !is_stopped(&first) {
        sleep(Duration::from_millis(5));
    }
    let pid = first.id();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let message = format!("run` is in use by process {pid} on {}", host.trim());
    let refused = |finished: &Finished| {
        assert_eq!(finished.code, Some(2), "{finished:#?}");
        assert_eq!(finished.stderr.matches("error: ").count(), 1, "{finished:#?}");
        assert!(finished.stderr.contains(&message), "{message}\n{finished:#?}");
    };
    let records = shop.records("run", "step").len();
    for other in
        [&["--resume=auto"][..], &["--resume=never"], &["--resume=anyway"], &["--overwrite"]]
    {
        refused(&shop.train("run", &[&more[..], other].concat()));
    }
    if let Some(finished) = shop.train_on(2, "run", &more) {
        refused(&finished);
    }
    refused(&shop.evaluate("run", &["--save"]));
    // Who only reads does not disturb.
    shop.evaluate("run", &[]).success();
    assert_eq!(shop.records("run", "step").len(), records);
    first.kill().unwrap();
    first.wait().unwrap();
    // What has crashed holds nothing.
    let on = shop.train("run", &more).success();
    assert!(on.stderr.contains("resuming from"), "{on:#?}");

    // Of two first starts at the same time one wins.
    let mut both = [start("new", "stop@0:0"), start("new", "stop@0:0")];
    let begun = Instant::now();
    let loser = loop {
        assert!(begun.elapsed() < Duration::from_secs(60), "neither has ended");
        if let Some(loser) = both.iter_mut().position(|one| one.try_wait().unwrap().is_some()) {
            break loser;
        }
        sleep(Duration::from_millis(5));
    };
    let [a, b] = both;
    let (loser, mut winner) = if loser == 0 { (a, b) } else { (b, a) };
    let output = loser.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains(&format!("is in use by process {} on ", winner.id())), "{stderr}");
    winner.kill().unwrap();
    winner.wait().unwrap();
    shop.train("new", &more).success();
}

/// Whether a process has been stopped by a signal.
fn is_stopped(child: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    // The name before it may hold anything but this.
    let state = stat.rsplit(") ").next().unwrap().chars().next();
    assert_ne!(state, Some('Z'), "it has ended");
    state == Some('T')
}

#[test]
fn a_rank_that_hangs_or_is_stopped_is_named_and_the_job_ends() {
    let shop = SessionShop::of_twenty_steps();
    let set = [&RESUMABLE[..], &["--set", "run.patience_seconds=3"]].concat();
    for (fault, message) in [
        ("hang@2:14", "rank 0 of 3 on "),
        ("stop@2:14", "rank 0 of 3 on "),
        ("hang@0:14", "rank 1 of 3 on "),
        ("stop@0:14", "rank 1 of 3 on "),
    ] {
        let Some(ended) = shop.train_with_fault(3, fault, &set, fault) else { return };
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        assert!(ended.took < Duration::from_secs(40), "{ended:#?}");
        let line = ended
            .stderr
            .lines()
            .find(|line| line.contains(message) && line.contains("waited"))
            .unwrap_or("");
        let (missing, how) = if message.contains("rank 0") {
            (2, "did not make the call")
        } else {
            (0, "does not respond, or waits")
        };
        assert!(line.contains(&format!("rank {missing} on ")) && line.contains(how), "{ended:#?}");
        assert!(
            line.contains("`all_reduce` (sum) of ") && line.contains("day 2, step 5"),
            "{ended:#?}"
        );
        assert!(ended.stderr.contains("  rank 0: call ") || missing == 0, "{ended:#?}");
        assert!(shop.newest_checkpoint(fault).join("manifest.json").exists());
        shop.train(fault, &set).success();
    }
}

#[test]
fn a_run_directory_that_cannot_be_written_is_refused() {
    let shop = SessionShop::of_twenty_steps();
    let config = shop.config();
    let (config, data) =
        (config.to_str().unwrap().to_owned(), shop.data().to_str().unwrap().to_owned());
    let train = ["train", "--config", &config, "--data", &data, "--run-dir", "/proc/run"];
    let refused = run_within(Command::new(PROGRAM).args(train), Duration::from_secs(60));
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(
        refused.stderr.contains("cannot write to the run directory `/proc/run`"),
        "{refused:#?}"
    );
}

#[test]
fn a_data_file_that_is_cut_off_in_the_middle_of_a_run_ends_it() {
    let shop = SessionShop::of_twenty_steps();
    let set = [&REPRODUCIBLE[..], &["--set", "train.epochs_per_day=30"]].concat();
    let file = shop.data().join("2/train.parquet");
    let whole = fs::read(&file).unwrap();
    let (code, stderr) = shop
        .train_and_interfere("run", &set, |_| fs::write(&file, &whole[..whole.len() / 2]).unwrap());
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("2/train.parquet` is not a readable parquet file"), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    // The next start refuses it; with the complete file the run resumes.
    let refused = shop.train("run", &set);
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    fs::write(&file, &whole).unwrap();
    let on = shop.train("run", &set).success();
    assert!(on.stderr.contains("resuming from") && on.stderr.contains("day-0001"), "{on:#?}");
}

/// Runs a script with a file system of 300 KiB in `folder`, which is gone afterwards.
fn on_a_small_disk(shop: &SessionShop, script: &str) -> Option<Finished> {
    let may = Command::new("unshare").args(["--mount", "true"]).output();
    if !may.is_ok_and(|may| may.status.success()) {
        println!("skipped: no file system can be mounted here");
        return None;
    }
    let folder = shop.dir.path().join("small");
    fs::create_dir(&folder).unwrap();
    let script = format!("mount -t tmpfs -o size=300k none '{}' && {script}", folder.display());
    Some(run_within(
        Command::new("unshare").args(["--mount", "sh", "-c", &script]),
        Duration::from_secs(120),
    ))
}

#[test]
fn a_full_disk_ends_the_run_and_leaves_what_was_there() {
    let shop = SessionShop::of_twenty_steps();
    let more = ["--set", "checkpoint.every_steps=1", "--set", "checkpoint.keep_last=1000"];
    let arguments = shop.arguments("small/run", &[&REPRODUCIBLE[..], &more].concat());
    let quoted: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
    let train = format!("{PROGRAM} {}", quoted.join(" "));
    let folder = shop.dir.path().join("small");
    let folder = folder.display();
    let script = format!(
        "{train}; echo \"full: $?\"; ls -A '{folder}/run/checkpoints'; \
         mount -o remount,size=64m '{folder}' && {train} && echo done"
    );
    let Some(finished) = on_a_small_disk(&shop, &script) else { return };
    let finished = finished.success();
    let (before, _) = finished.stdout.split_once("done").unwrap();
    assert!(before.contains("full: 1\n") && !before.contains("partial"), "{finished:#?}");
    assert!(finished.stderr.contains("No space left on device"), "{finished:#?}");
    assert!(
        finished.stderr.contains("/small/run/") && !finished.stderr.contains("panicked"),
        "{finished:#?}"
    );
    assert!(finished.stderr.contains("resuming from "), "{finished:#?}");
}
