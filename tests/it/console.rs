//! Closed or full outputs do not end a run, and signals save a checkpoint.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::compare::assert_identical;
use crate::support::configs::REPRODUCIBLE;
use crate::support::process::{
    Finished, PROGRAM, exit_status_within, kill, run_within, wait_until, with_default_signals,
};
use crate::support::requirements::has_mpirun;
use crate::support::session_shop::SessionShop;

const LIMIT: Duration = Duration::from_secs(120);

/// Runs a line of bash with the program as `$B` and the shop's paths as `$config`, `$data` and
/// `$dir`.
fn bash(shop: &SessionShop, line: &str) -> Finished {
    let mut command = Command::new("bash");
    command
        .args(["-c", line])
        .env("B", PROGRAM)
        .env("config", shop.config())
        .env("data", shop.data());
    command.env("dir", shop.dir.path()).env("RUST_BACKTRACE", "0");
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    run_within(&mut command, LIMIT)
}

#[test]
fn a_log_that_cannot_be_written_does_not_end_a_training() {
    let shop = SessionShop::new(60);
    let train = "train --config $config --data $data --run-dir $dir/run --overwrite";
    for line in [
        "$B TRAIN 2>&1 | true; exit ${PIPESTATUS[0]}",
        "$B TRAIN 2>&1 | head -1; exit ${PIPESTATUS[0]}",
        "$B TRAIN 2> /dev/full > /dev/full",
        "$B TRAIN 2>&- >&- <&-",
        "ulimit -f 1; $B TRAIN 2>> $dir/log; echo $?",
    ] {
        let finished = bash(&shop, &line.replace("TRAIN", train));
        if line.contains("ulimit") {
            // The run directory is on the full disk too: an error, and no signal.
            assert!(["1", "2"].contains(&finished.stdout.trim()), "{line}: {finished:#?}");
            continue;
        }
        assert_eq!(finished.code, Some(0), "{line}: {finished:#?}");
        assert_eq!(shop.records("run", "eval").len(), 2, "{line}");
        fs::remove_dir_all(shop.run_dir("run")).unwrap();
    }
}

#[test]
fn output_that_is_not_read_is_no_error_and_a_full_disk_is_one() {
    let shop = SessionShop::new(60);
    shop.train("run", &[]).success();
    let commands = [
        "evaluate --run-dir $dir/run --data $data",
        "doctor --device cpu --dir $dir",
        "report $dir/run --out $dir/report --overwrite",
        "--help",
        "train --help",
        "--version",
    ];
    for command in commands {
        for end in ["| true", "| head -c 1", ">&-"] {
            let finished = bash(&shop, &format!("$B {command} {end}; exit ${{PIPESTATUS[0]}}"));
            assert_eq!(finished.code, Some(0), "{command} {end}: {finished:#?}");
            assert!(!finished.stderr.contains("error"), "{command} {end}: {finished:#?}");
        }
        let full = bash(&shop, &format!("$B {command} > /dev/full"));
        assert_eq!(full.code, Some(1), "{command}: {full:#?}");
        let errors: Vec<&str> =
            full.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(
            errors,
            ["error: cannot write to the standard output: No space left on device (os error 28)"],
            "{command}"
        );
    }
    // Their results are files.
    for command in ["synth --events 2000 --items 100 --days 2 --out $dir/shop.csv"] {
        for end in ["| true", "> /dev/full", ">&-"] {
            let finished = bash(&shop, &format!("$B {command} {end}; exit ${{PIPESTATUS[0]}}"));
            assert_eq!((finished.code, &*finished.stderr), (Some(0), ""), "{command} {end}");
        }
    }
    let mistyped = bash(&shop, "$B trian 2> /dev/full");
    assert_eq!(mistyped.code, Some(2), "{mistyped:#?}");
}

#[test]
fn a_job_whose_log_is_not_read_ends_without_panic() {
    if !has_mpirun("no job lost its log") {
        return;
    }
    let shop = SessionShop::new(60);
    let job = "mpirun --oversubscribe --bind-to none -np 2 $B train --config $config --data $data \
               --run-dir $dir/run";
    let finished = bash(&shop, &format!("{job} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"));
    assert!(
        !finished.stderr.contains("panicked") && !finished.stderr.contains("internal"),
        "{finished:#?}"
    );
}

/// Starts the program and waits until `path` has `n` lines.
fn start_until(command: &mut Command, path: &Path, n: usize) -> Child {
    let child = command.spawn().unwrap();
    wait_until(|| fs::read_to_string(path).is_ok_and(|text| text.lines().count() >= n));
    child
}

/// Waits for a process, and kills one that does not end.
#[track_caller]
fn end(mut child: Child) -> ExitStatus {
    let status = exit_status_within(&mut child, LIMIT);
    status.unwrap_or_else(|| {
        child.kill().unwrap();
        panic!("the process does not end")
    })
}

/// A training that is long enough to be met by a signal.
fn long_training(shop: &SessionShop, run: &str) -> Command {
    let set = [&REPRODUCIBLE[..], &["--set", "train.epochs_per_day=30"]].concat();
    let mut command = with_default_signals();
    command.args(shop.arguments(run, &set));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn interrupts_and_a_closed_terminal_save_the_run() {
    let shop = SessionShop::of_twenty_steps();
    for signal in ["INT", "HUP", "TERM"] {
        let metrics = shop.run_dir(signal).join("metrics.jsonl");
        let child = start_until(&mut long_training(&shop, signal), &metrics, 2);
        kill(signal, child.id());
        // The second hangup is the shell's.
        if signal == "HUP" {
            kill(signal, child.id());
        }
        let status = end(child);
        assert_eq!(status.code(), Some(3), "{signal}: {status}");
        assert!(shop.newest_checkpoint(signal).join("manifest.json").exists());
    }
    // Interrupted several times, it ends as one that was not.
    for _ in 0..2 {
        let metrics = shop.run_dir("INT").join("metrics.jsonl");
        let before = fs::read_to_string(&metrics).unwrap().lines().count();
        let child = start_until(&mut long_training(&shop, "INT"), &metrics, before + 2);
        kill("INT", child.id());
        assert_eq!(end(child).code(), Some(3));
    }
    for run in ["INT", "unbroken"] {
        assert_eq!(long_training(&shop, run).status().unwrap().code(), Some(0));
    }
    assert_identical(&shop, "INT", "unbroken");
}

#[test]
fn the_reader_of_the_log_and_the_terminal_may_go_together() {
    let shop = SessionShop::of_twenty_steps();
    let metrics = shop.run_dir("run").join("metrics.jsonl");
    let mut child = start_until(long_training(&shop, "run").stderr(Stdio::piped()), &metrics, 2);
    drop(child.stderr.take());
    kill("HUP", child.id());
    assert_eq!(end(child).code(), Some(3));
    assert!(!shop.checkpoints("run").is_empty());
}

#[test]
fn ignored_signals_stay_ignored() {
    let shop = SessionShop::of_twenty_steps();
    for (signal, run) in [("HUP", "nohup"), ("INT", "background")] {
        let metrics = shop.run_dir(run).join("metrics.jsonl");
        let train = long_training(&shop, run);
        let mut ignoring = Command::new("bash");
        ignoring.args(["-c", &format!("trap '' {signal}; exec \"$0\" \"$@\"")]);
        // Without `env`, which would reset the handling.
        ignoring.args(train.get_args().skip_while(|argument| *argument != PROGRAM));
        ignoring.stdout(Stdio::null()).stderr(Stdio::null());
        let child = start_until(&mut ignoring, &metrics, 2);
        kill(signal, child.id());
        let status = end(child);
        assert_eq!(status.code(), Some(0), "{signal}: {status}");
    }
}

#[test]
fn a_second_signal_ends_a_run_that_does_not_reach_its_checkpoint() {
    let shop = SessionShop::of_twenty_steps();
    for (signal, number) in [("INT", 2), ("TERM", 15)] {
        let mut train = long_training(&shop, signal);
        train.env("BIREME_FAULT", "hang@0:3").stderr(Stdio::piped());
        let mut child = start_until(&mut train, &shop.run_dir(signal).join("metrics.jsonl"), 3);
        kill(signal, child.id());
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("a second signal ends the run") {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the signal was not logged");
        }
        let begun = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < LIMIT, "the second signal did not end it");
            kill(signal, child.id());
            sleep(Duration::from_millis(20));
        }
        assert_eq!(end(child).signal(), Some(number));
        let mut rest = String::new();
        log.read_to_string(&mut rest).unwrap();
        assert!(!rest.contains("panicked"), "{rest}");
    }
}

#[test]
fn a_signal_at_the_start_stops_after_the_first_step() {
    let shop = SessionShop::of_twenty_steps();
    // The first file that the run writes comes long before its first step.
    let child =
        start_until(&mut long_training(&shop, "run"), &shop.run_dir("run").join("run.json"), 1);
    kill("INT", child.id());
    assert_eq!(end(child).code(), Some(3));
    assert!(!shop.checkpoints("run").is_empty());
}

#[test]
fn a_signal_during_an_evaluation_stops_the_next_day() {
    let shop = SessionShop::of_twenty_steps();
    let run_dir = shop.run_dir("run");
    let child = long_training(&shop, "run").spawn().unwrap();
    // The checkpoint of the first day's end is written beside its evaluation.
    wait_until(|| run_dir.join("checkpoints/day-0001-step-00000150").exists());
    kill("INT", child.id());
    let status = end(child);
    assert_eq!(status.code(), Some(3), "{status}");
    assert!(!run_dir.join("results.txt").exists());
}

#[test]
fn commands_without_a_checkpoint_end_by_the_signal() {
    let shop = SessionShop::of_twenty_steps();
    shop.train("run", &[]).success();
    let run = shop.run_dir("run");
    for (signal, number) in [("INT", 2), ("TERM", 15)] {
        let mut evaluate = shop.evaluate_command("run", &["--save"]);
        let child = evaluate.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        kill(signal, child.id());
        let status = end(child);
        // Where the machine is slow to send it, the command is done.
        assert!(status.signal() == Some(number) || status.success(), "{status}");
    }
    let partial = fs::read_dir(run.join("evaluations")).unwrap();
    assert!(partial.flatten().all(|entry| !entry.path().to_string_lossy().contains("partial")));
}

#[test]
fn an_internal_error_is_one_line_with_its_place_and_exit_code_1() {
    let shop = SessionShop::of_twenty_steps();
    let mut train = shop.train_command("run", &[]);
    train.env("BIREME_FAULT", "panic@0:3").env("RUST_BACKTRACE", "0");
    let failed = run_within(&mut train, LIMIT);
    assert_eq!(failed.code, Some(1), "{failed:#?}");
    let [.., error, hint] = &failed.stderr.lines().collect::<Vec<_>>()[..] else {
        panic!("{failed:#?}")
    };
    assert!(
        error.starts_with("error: internal error: a planted panic (src/train/fault.rs:"),
        "{error}"
    );
    assert!(hint.starts_with("hint: ") && hint.contains("RUST_BACKTRACE=1"), "{hint}");
}

#[test]
fn the_folder_of_doctor_must_exist() {
    let shop = SessionShop::new(1);
    let file = shop.dir.path().join("file");
    File::create(&file).unwrap();
    for folder in [shop.dir.path().join("no/such"), file, "/proc/self".into()] {
        let mut doctor = Command::new(PROGRAM);
        doctor.args(["doctor", "--device", "cpu", "--dir"]).arg(&folder);
        let refused = run_within(&mut doctor, LIMIT);
        assert_eq!((refused.code, &*refused.stdout), (Some(2), ""), "{refused:#?}");
        assert!(refused.stderr.contains(&format!("`{}`", folder.display())), "{refused:#?}");
    }
    assert!(!shop.dir.path().join("no").exists());
}
