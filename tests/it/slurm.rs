//! The batch file runs under a Slurm of two nodes on this host.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::compare::assert_identical;
use crate::support::configs::REPRODUCIBLE;
use crate::support::files::{files_below, root};
use crate::support::process::PROGRAM;
use crate::support::session_shop::SessionShop;

/// A cluster that `tests/slurm/cluster.sh` started.
struct Cluster(tempfile::TempDir);

impl Cluster {
    /// `None` where there is no Slurm: the test prints `skipped: ...` and returns. With
    /// `REQUIRE_SLURM=1` it fails.
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        // Its daemons' user has a folder in there.
        Command::new("chmod").arg("755").arg(folder.path()).status().unwrap();
        let started = cluster("start", folder.path());
        match started.status.code() {
            Some(0) => Some(Self(folder)),
            Some(2) => {
                assert_ne!(env::var("REQUIRE_SLURM").as_deref(), Ok("1"), "{started:?}");
                println!("skipped: {}", String::from_utf8_lossy(&started.stderr).trim());
                None
            }
            _ => panic!("{started:?}"),
        }
    }

    fn run(
        &self,
        dir: &Path,
        program: &str,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> String {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(dir)
            .env("SLURM_CONF", self.0.path().join("slurm.conf"));
        let ran = command.envs(variables.iter().copied()).output().unwrap();
        assert!(ran.status.success(), "{command:?}: {ran:?}");
        String::from_utf8(ran.stdout).unwrap().trim().to_owned()
    }

    /// What Slurm says of a job, as `key=value` words.
    fn job(&self, id: &str) -> String {
        self.run(self.0.path(), "scontrol", &["show", "job", id], &[])
    }

    /// Waits until Slurm says this word of a job.
    fn wait(&self, id: &str, word: &str) {
        let begun = Instant::now();
        while !self.job(id).split_whitespace().any(|other| other == word) {
            let log = || fs::read_to_string(self.0.path().join("slurmctld.log")).unwrap();
            assert!(
                begun.elapsed() < Duration::from_secs(480),
                "no {word}: {}\n{}",
                self.job(id),
                log()
            );
            sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        cluster("stop", self.0.path());
    }
}

fn cluster(action: &str, folder: &Path) -> Output {
    let script = root().join("tests/slurm/cluster.sh");
    Command::new(script).arg(action).arg(folder).output().unwrap()
}

#[test]
fn a_preempted_job_is_requeued_and_resumes_to_the_same_bits() {
    let Some(cluster) = Cluster::start() else { return };
    let shop = SessionShop::new(200);
    // Long enough to be preempted on a fast machine too.
    let long = ["--set", "train.epochs_per_day=400", "--set", "checkpoint.every_steps=100"];
    let set = [&REPRODUCIBLE[..], &long, &["--set", "train.log_every_steps=20"]].concat();
    shop.train("unbroken", &set).success();
    let dir = shop.dir.path();
    std::os::unix::fs::symlink(root().join("launch"), dir.join("launch")).unwrap();
    let here = |launcher: &'static str| {
        [
            ("BIREME_BIN", PROGRAM),
            ("BIREME_LAUNCHER", launcher),
            ("OMPI_MCA_mpi_yield_when_idle", "1"),
        ]
    };
    for (run, launcher, nodes) in [
        ("mpirun", "mpirun", ["--nodes=2", "--ntasks-per-node=1"]),
        // `srun` over both nodes fails where they share a host: they would share PMIx's folder.
        ("srun", "srun", ["--nodes=1", "--ntasks-per-node=2"]),
    ] {
        let job = [
            "--parsable",
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            "--time=10",
            "launch/slurm.sbatch",
        ];
        let arguments = shop.arguments(run, &set);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let id =
            cluster.run(dir, "sbatch", &[&nodes[..], &job, &arguments].concat(), &here(launcher));
        let log = dir.join(format!("bireme-{id}.log"));
        let ranks = dir.join(format!("bireme-{id}.ranks"));
        let begun = Instant::now();
        while !files_below(&ranks).iter().chain([&log]).any(|file| text(file).contains("  loss ")) {
            assert!(
                begun.elapsed() < Duration::from_secs(120),
                "{}\n{}",
                cluster.job(&id),
                text(&log)
            );
            sleep(Duration::from_millis(20));
        }
        let other = [
            "--parsable",
            "--partition=high",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=true",
        ];
        let other = cluster.run(dir, "sbatch", &other, &[]);
        cluster.wait(&other, "JobState=COMPLETED");
        cluster.wait(&id, "JobState=COMPLETED");
        let log_text = text(&log);
        assert!(cluster.job(&id).contains("Restarts=1 "), "{}\n{log_text}", cluster.job(&id));
        assert!(log_text.contains("the job goes back into the queue"), "{log_text}");
        let of_ranks: String = files_below(&ranks).iter().map(|file| text(file)).collect();
        assert!(of_ranks.contains("stopped on request after day 1, step "), "{of_ranks}");
        assert!(of_ranks.contains("resuming from "), "{of_ranks}");
        assert_identical(&shop, run, "unbroken");
    }
}

/// The text of a file; empty if it is missing.
fn text(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default()
}
