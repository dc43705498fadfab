//! `support::mpirun` ends jobs that hang.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::support::mpirun::mpirun;
use crate::support::process::wait_until;

#[test]
fn a_job_that_hangs_is_ended_with_all_its_ranks() {
    let mut sleeper = Command::new("/bin/sh");
    sleeper.args(["-c", "echo pid $$; exec sleep 100"]);
    let Some(finished) = mpirun(2, &sleeper, Duration::from_secs(2)) else { return };
    assert_eq!(finished.code, None, "{finished:#?}");
    assert!(finished.took < Duration::from_secs(10), "{finished:#?}");
    let pids: Vec<&str> =
        finished.stdout.lines().filter_map(|line| line.strip_prefix("pid ")).collect();
    assert_eq!(pids.len(), 2, "{finished:#?}");
    // `mpirun` kills its ranks and does not wait for them to end.
    let is_alive = |pid: &&str| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name.trim() == "sleep")
    };
    wait_until(|| !pids.iter().any(is_alive));
}
