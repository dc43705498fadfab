//! A shop that starts at session files: trains and evaluates on generated sessions.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::configs::CONFIG;
use super::mpirun::mpirun;
use super::process::{Finished, LIMIT, PROGRAM, run_within, wait_until};
use super::session_data;

/// A folder with three days of sessions, a configuration and runs.
pub struct SessionShop {
    pub dir: TempDir,
}

impl SessionShop {
    /// `n_sessions` training sessions a day, and [`CONFIG`].
    pub fn new(n_sessions: usize) -> Self {
        let shop = Self { dir: tempfile::tempdir().unwrap() };
        session_data::write_days(&shop.data(), 3, n_sessions, 40);
        fs::write(shop.config(), CONFIG).unwrap();
        shop
    }

    /// 200 sessions in steps of 48, two epochs: ten steps a day, twenty in all.
    pub fn of_twenty_steps() -> Self {
        Self::new(200)
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("config.toml")
    }

    pub fn run_dir(&self, run: &str) -> PathBuf {
        self.dir.path().join(run)
    }

    /// Arguments of `bireme train`.
    pub fn arguments(&self, run: &str, more: &[&str]) -> Vec<String> {
        let paths = [self.config(), self.data(), self.run_dir(run)];
        let [config, data, run] = paths.each_ref().map(|path| path.to_str().unwrap());
        let arguments = ["train", "--config", config, "--data", data, "--run-dir", run];
        arguments.iter().chain(more).map(|&word| word.to_owned()).collect()
    }

    pub fn train_command(&self, run: &str, more: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(self.arguments(run, more));
        command
    }

    /// `bireme train` without a launcher.
    pub fn train(&self, run: &str, more: &[&str]) -> Finished {
        run_within(&mut self.train_command(run, more), LIMIT)
    }

    /// `bireme train` under `mpirun`; `None` where there is none.
    pub fn train_on(&self, n_ranks: usize, run: &str, more: &[&str]) -> Option<Finished> {
        mpirun(n_ranks, &self.train_command(run, more), LIMIT)
    }

    /// [`Self::train_on`] with a fault planted, as `BIREME_FAULT` names it.
    pub fn train_with_fault(
        &self,
        n_ranks: usize,
        run: &str,
        more: &[&str],
        fault: &str,
    ) -> Option<Finished> {
        mpirun(n_ranks, self.train_command(run, more).env("BIREME_FAULT", fault), LIMIT)
    }

    /// Starts a run, calls `interfere` with its process id after the first logged step, and returns
    /// exit code and log.
    pub fn train_and_interfere(
        &self,
        run: &str,
        more: &[&str],
        interfere: impl FnOnce(u32),
    ) -> (Option<i32>, String) {
        let log = self.dir.path().join(format!("{run}.stderr"));
        let mut command = self.train_command(run, more);
        command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        wait_until(|| fs::read_to_string(&log).unwrap().contains("  loss "));
        interfere(child.id());
        let code = child.wait().unwrap().code();
        (code, fs::read_to_string(log).unwrap())
    }

    pub fn evaluate_command(&self, run: &str, more: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("evaluate").arg("--run-dir").arg(self.run_dir(run));
        command.arg("--data").arg(self.data()).args(more);
        command
    }

    /// `bireme evaluate` without a launcher.
    pub fn evaluate(&self, run: &str, more: &[&str]) -> Finished {
        run_within(&mut self.evaluate_command(run, more), LIMIT)
    }

    /// Records of one kind from a run's `metrics.jsonl`.
    pub fn records(&self, run: &str, kind: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.run_dir(run).join("metrics.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .filter(|record| record["kind"] == kind)
            .collect()
    }

    /// Records of a run's evaluations, without their durations.
    pub fn evaluations(&self, run: &str) -> Vec<Value> {
        self.records(run, "eval").into_iter().map(timeless).collect()
    }

    /// Complete checkpoints of a run, oldest first.
    pub fn checkpoints(&self, run: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.run_dir(run).join("checkpoints")).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        // Those that are being written end in `.partial`.
        paths.retain(|path| path.extension().is_none());
        paths.sort();
        paths
    }

    pub fn newest_checkpoint(&self, run: &str) -> PathBuf {
        self.checkpoints(run).pop().unwrap()
    }
}

/// A record without its duration.
pub fn timeless(mut record: Value) -> Value {
    assert!(record["seconds"].take().as_f64().unwrap() > 0.0);
    record
}
