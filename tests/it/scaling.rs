//! `bireme bench scaling` measures this machine and predicts others.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::process::{Finished, LIMIT, PROGRAM, kill, run_within, wait_until};
use crate::support::requirements::has_mpirun;
use crate::support::session_shop::SessionShop;

fn command(shop: &SessionShop, ranks: &str, out: &str) -> Command {
    let out = shop.dir.path().join(out);
    let mut command = Command::new(PROGRAM);
    command.args(["bench", "scaling", "--steps", "4", "--ranks", ranks]);
    command.arg("--config").arg(shop.config()).arg("--data").arg(shop.data()).arg("--out").arg(out);
    // As on a plain machine: root and more ranks than cores are its own concern.
    for variable in [
        "OMPI_ALLOW_RUN_AS_ROOT",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM",
        "OMPI_MCA_rmaps_base_oversubscribe",
        "PRTE_MCA_rmaps_default_mapping_policy",
    ] {
        command.env_remove(variable);
    }
    command
}

fn scaling(shop: &SessionShop, ranks: &str, out: &str) -> Finished {
    run_within(&mut command(shop, ranks, out), LIMIT)
}

/// A folder with a program of this name that runs `script`, to be the whole PATH.
fn folder_with(shop: &SessionShop, name: &str, script: &str) -> PathBuf {
    let folder = shop.dir.path().join("bin");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(name), format!("#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")).unwrap();
    fs::set_permissions(folder.join(name), Permissions::from_mode(0o755)).unwrap();
    folder
}

#[test]
fn scaling_is_measured_and_predicted() {
    if !has_mpirun("scaling was not measured") {
        return;
    }
    let shop = SessionShop::new(150);
    let finished = scaling(&shop, "2", "out").success();
    let out = shop.dir.path().join("out");
    assert_eq!(finished.stdout.trim(), out.join("scaling.md").to_str().unwrap());
    let json: Value =
        serde_json::from_str(&fs::read_to_string(out.join("scaling.json")).unwrap()).unwrap();
    let points = json["points"].as_array().unwrap();
    let names: Vec<_> = points
        .iter()
        .map(|point| {
            let [growth, table] = ["growth", "item_table"].map(|key| point[key].as_str().unwrap());
            (
                point["ranks"].as_u64().unwrap(),
                growth,
                table,
                point["global_batch"].as_u64().unwrap(),
            )
        })
        .collect();
    let expected = [
        (1, "strong", "replicated", 48),
        (2, "strong", "replicated", 48),
        (2, "weak", "replicated", 96),
        (2, "strong", "sharded", 48),
        (2, "weak", "sharded", 96),
    ];
    assert_eq!(names, expected);
    for point in points {
        assert!(point["phases"]["communication"].as_f64().unwrap() > 0.0, "{point}");
        assert!(
            point["predicted_seconds"].as_f64().unwrap() > 0.0
                && point["evaluated_per_s"].as_f64().unwrap() > 0.0
        );
    }
    assert_eq!(points[0]["efficiency"], 1.0);
    // Of 40 items, 16 numbers and a bias each.
    assert_eq!(json["model"]["numbers_per_item"], 17.0);
    assert!(json["model"]["events"].as_f64().unwrap() > json["model"]["targets"].as_f64().unwrap());
    assert_eq!(json["predictions"].as_array().unwrap().len(), 3 * 4 * 2);
    let table = fs::read_to_string(out.join("scaling.md")).unwrap();
    assert!(
        table.contains("| weak | sharded | 2 | 96 |")
            && table.contains("| 100000000 | sharded | 512 |"),
        "{table}"
    );
    assert!(fs::read_to_string(out.join("scaling.svg")).unwrap().contains("strong, sharded"));

    let again = scaling(&shop, "2", "out");
    assert_eq!(again.code, Some(2));
    assert!(again.stderr.contains("is not empty"), "{}", again.stderr);
}

#[test]
fn ranks_without_a_micro_batch_are_refused() {
    let shop = SessionShop::new(60);
    let refused = scaling(&shop, "2,7", "out");
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("7 ranks cannot share 6 micro-batches of a step"),
        "{}",
        refused.stderr
    );
    assert!(!shop.dir.path().join("out").exists());
}

#[test]
fn a_failing_run_is_reported_with_its_last_output() {
    if !has_mpirun("no run failed") {
        return;
    }
    let shop = SessionShop::new(60);
    fs::write(shop.data().join("2/valid.parquet"), "no parquet").unwrap();
    let failed = scaling(&shop, "1", "out");
    assert_eq!(failed.code, Some(1));
    let stderr = failed.stderr;
    assert!(
        stderr.contains("bireme train --config") && stderr.contains("valid.parquet"),
        "{stderr}"
    );
}

#[test]
fn launchers_that_cannot_start_ranks_are_refused() {
    let shop = SessionShop::new(60);
    let empty = shop.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let srun = folder_with(&shop, "srun", "exit 1");
    let hosts = shop.dir.path().join("hosts");
    let hosts = hosts.to_str().unwrap();
    for (path, more, message) in [
        (&empty, &[][..], "there is no `mpirun` in PATH"),
        (&empty, &["--launcher", "srun"][..], "there is no `srun` in PATH"),
        (&srun, &["--launcher", "srun"][..], "`--launcher srun` needs an allocation of Slurm"),
        (
            &srun,
            &["--launcher", "srun", "--hosts", hosts][..],
            "`--hosts` is for `--launcher mpirun`",
        ),
    ] {
        let mut command = command(&shop, "1", "out");
        let refused =
            run_within(command.args(more).env("PATH", path).env_remove("SLURM_JOB_ID"), LIMIT);
        assert_eq!(refused.code, Some(2), "{refused:#?}");
        assert!(refused.stderr.starts_with(&format!("error: {message}")), "{refused:#?}");
    }
    let mpirun = folder_with(&shop, "mpirun", "exit 1");
    let refused =
        run_within(command(&shop, "1", "out").args(["--hosts", hosts]).env("PATH", mpirun), LIMIT);
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.stderr.contains("cannot read the hosts `"), "{refused:#?}");
    assert!(!shop.dir.path().join("out").exists());
}

#[test]
fn the_output_of_a_launcher_is_the_reason() {
    let shop = SessionShop::new(60);
    let script = "printf -- '-----\\nThere are not enough slots available\\nin the \
                  system.\\n\\nmore\\n' >&2; exit 1";
    let path = folder_with(&shop, "mpirun", script);
    let failed = run_within(command(&shop, "1", "out").env("PATH", path), LIMIT);
    assert_eq!(failed.code, Some(1), "{failed:#?}");
    let message = "error: There are not enough slots available in the system; the log is `";
    assert!(
        failed.stderr.starts_with(message) && failed.stderr.contains("doctor.log`"),
        "{failed:#?}"
    );
}

#[test]
fn ranks_end_with_the_command_that_started_them() {
    let shop = SessionShop::new(60);
    let pid_file = shop.dir.path().join("pid");
    let script = format!("echo $$ > '{}'; exec sleep 600", pid_file.display());
    let path = folder_with(&shop, "mpirun", &script);
    for signal in ["INT", "TERM", "KILL"] {
        // What the one before left in the folder is removed.
        let mut command = command(&shop, "1", "out");
        command.env("PATH", &path).stdout(Stdio::null()).stderr(Stdio::null());
        let mut bench = command.spawn().unwrap();
        let pid = || fs::read_to_string(&pid_file).ok().filter(|pid| pid.ends_with('\n'));
        wait_until(|| pid().is_some());
        let launcher = Path::new("/proc").join(pid().unwrap().trim());
        let second = run_within(self::command(&shop, "1", "out").env("PATH", &path), LIMIT);
        assert_eq!(second.code, Some(2), "{second:#?}");
        let in_use = format!("out`: in use by process {} on ", bench.id());
        assert!(second.stderr.contains(&in_use), "{second:#?}");
        kill(signal, bench.id());
        assert!(!bench.wait().unwrap().success());
        // One that has ended and is not waited for by anybody has no command line any more.
        wait_until(|| fs::read(launcher.join("cmdline")).map_or(true, |line| line.is_empty()));
        fs::remove_file(&pid_file).unwrap();
    }
}
