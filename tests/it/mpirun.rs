//! Runs a program on several MPI ranks, within a time limit.

use std::env;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What a job left behind.
#[derive(Debug)]
pub struct Finished {
    /// `None` when the job was killed, also by the time limit.
    pub code: Option<i32>,
    /// All ranks' lines.
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Finished {
    /// The job, when it ended with 0.
    #[track_caller]
    pub fn success(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }
}

/// Runs `program` on `n_ranks` ranks, more than cores if need be, and ends all of them after `limit`.
///
/// `None` where there is no `mpirun`: the test prints `skipped: ...` here and returns. With `REQUIRE_MPI=1` it fails.
pub fn mpirun(
    n_ranks: usize,
    program: &Path,
    arguments: &[&str],
    variables: &[(&str, &str)],
    limit: Duration,
) -> Option<Finished> {
    if !has_mpirun(&format!("nothing ran on {n_ranks} ranks")) {
        return None;
    }
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "--bind-to", "none", "-np", &n_ranks.to_string()])
        .arg(program)
        .args(arguments)
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        // Ranks that wait let the others have the core.
        .envs([("OMPI_MCA_mpi_yield_when_idle", "1"), ("OMP_NUM_THREADS", "1")])
        .envs(variables.iter().copied());
    Some(run_within(&mut command, limit))
}

/// Whether there is an `mpirun`. Where there is none the test prints `skipped: ...` with what follows here and returns. With
/// `REQUIRE_MPI=1` it fails.
pub fn has_mpirun(else_what: &str) -> bool {
    let has_mpirun = found("mpirun");
    if !has_mpirun {
        assert_ne!(env::var("REQUIRE_MPI").as_deref(), Ok("1"), "there is no `mpirun` in `PATH`");
        println!("skipped: there is no `mpirun` in `PATH`, so {else_what}");
    }
    has_mpirun
}

/// The same with ranks that share the host's one GPU: NCCL takes those with different host names to be on different hosts.
pub fn mpirun_on_one_gpu(
    n_ranks: usize,
    program: &Path,
    arguments: &[&str],
    variables: &[(&str, &str)],
    limit: Duration,
) -> Option<Finished> {
    let name_host = r#"NCCL_HOSTID="rank-$OMPI_COMM_WORLD_RANK" exec "$0" "$@""#;
    let arguments = [&["-c", name_host, program.to_str().unwrap()], arguments].concat();
    let between_hosts = [
        ("NCCL_ALGO", "Ring"),
        ("NCCL_PROTO", "Simple"),
        ("NCCL_IB_DISABLE", "1"),
        ("NCCL_NVLS_ENABLE", "0"),
        ("NCCL_MNNVL_ENABLE", "0"),
    ];
    mpirun(n_ranks, Path::new("/bin/sh"), &arguments, &[&between_hosts, variables].concat(), limit)
}

/// Whether there is a GPU. Where there is none the test prints `skipped: ...` here and returns. With `REQUIRE_GPU=1` it fails.
pub fn has_gpu() -> bool {
    let has_gpu = Path::new("/dev/nvidiactl").exists();
    if !has_gpu {
        assert_ne!(env::var("REQUIRE_GPU").as_deref(), Ok("1"), "there is no GPU");
        println!("skipped: there is no GPU, so nothing ran on one");
    }
    has_gpu
}

fn found(program: &str) -> bool {
    env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

/// Runs a command in a process group of its own and ends the whole group after `limit`.
pub fn run_within(command: &mut Command, limit: Duration) -> Finished {
    // Files and not pipes, which a rank that outlives its launcher would hold open.
    let (mut stdout, mut stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap()).process_group(0);
    let start = Instant::now();
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let status = wait(&mut child, limit).or_else(|| {
        signal("TERM", child.id());
        let status = wait(&mut child, Duration::from_secs(5));
        signal("KILL", child.id());
        status.or_else(|| child.wait().ok())
    });
    let took = start.elapsed();
    let [stdout, stderr] = [&mut stdout, &mut stderr].map(|file| {
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let code = status.filter(|_| took < limit).and_then(|status| status.code());
    Finished { code, stdout, stderr, took }
}

fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        match child.try_wait().unwrap() {
            None if start.elapsed() < limit => sleep(Duration::from_millis(20)),
            status => return status,
        }
    }
}

// The shell's own `kill`: the program is missing on bare machines.
fn signal(name: &str, group: u32) {
    let _ = Command::new("sh").args(["-c", &format!("kill -s {name} -- -{group} 2>/dev/null")]).status();
}

#[test]
fn a_job_that_hangs_is_ended_with_all_its_ranks() {
    let limit = Duration::from_secs(2);
    let sleeper = "echo pid $$; exec sleep 100";
    let Some(finished) = mpirun(2, Path::new("/bin/sh"), &["-c", sleeper], &[], limit) else { return };
    assert_eq!(finished.code, None, "{finished:#?}");
    assert!(finished.took < Duration::from_secs(10), "{finished:#?}");
    let pids: Vec<&str> = finished.stdout.lines().filter_map(|line| line.strip_prefix("pid ")).collect();
    assert_eq!(pids.len(), 2, "{finished:#?}");
    // `mpirun` kills its ranks and does not wait for them to be gone.
    let alive = |pid: &&str| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name.trim() == "sleep")
    };
    let start = Instant::now();
    while pids.iter().any(alive) {
        assert!(start.elapsed() < Duration::from_secs(10), "still there: {pids:?}");
        sleep(Duration::from_millis(20));
    }
}
