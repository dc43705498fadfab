//! Runs programs within a time limit, waits for them and sends them signals.

use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The `bireme` under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_bireme");

/// Ends a whole training, evaluation or export that hangs, in a debug build on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Exit code, output and duration of a command or of a job of several ranks.
#[derive(Debug)]
pub struct Finished {
    /// `None` when a signal ended the command, also at the time limit.
    pub code: Option<i32>,
    /// Lines of all ranks.
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Finished {
    /// Asserts exit code 0.
    #[track_caller]
    pub fn success(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// Asserts exit code 2 and an error that contains `message`.
    #[track_caller]
    pub fn refused(&self, message: &str) {
        assert_eq!(self.code, Some(2), "{self:#?}");
        assert!(self.stderr.contains(message), "`{message}` is not in {self:#?}");
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
    }
}

/// `bireme` with the default handling of signals: under `nohup`, tests inherit that SIGHUP is
/// ignored, and pass it on to the programs that they start.
pub fn with_default_signals() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP,INT", PROGRAM]);
    command
}

/// Runs `bireme` with these arguments.
pub fn bireme(arguments: &[&str]) -> Finished {
    run_within(Command::new(PROGRAM).args(arguments), LIMIT)
}

/// Runs a command in a process group of its own and ends the whole group after `limit`.
pub fn run_within(command: &mut Command, limit: Duration) -> Finished {
    // Files, because a rank that outlives its launcher would hold pipes open.
    let (mut stdout, mut stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
    let start = Instant::now();
    let mut child =
        command.process_group(0).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let status = exit_status_within(&mut child, limit).or_else(|| {
        signal_group("TERM", child.id());
        let status = exit_status_within(&mut child, Duration::from_secs(5));
        signal_group("KILL", child.id());
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

/// Waits for a process; `None` if it is still running after `limit`.
pub fn exit_status_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        match child.try_wait().unwrap() {
            None if start.elapsed() < limit => sleep(Duration::from_millis(20)),
            status => return status,
        }
    }
}

/// Waits until a condition holds, at most two minutes.
#[track_caller]
pub fn wait_until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(120),
            "the condition does not hold after 120 s"
        );
        sleep(Duration::from_millis(5));
    }
}

/// Sends a signal to a process. One that has ended meanwhile is no error.
pub fn kill(signal: &str, pid: u32) {
    run_kill(signal, &pid.to_string());
}

fn signal_group(signal: &str, group: u32) {
    run_kill(signal, &format!("-{group}"));
}

fn run_kill(signal: &str, target: &str) {
    // The shell's own `kill`, because bare machines lack the program.
    let kill = format!("kill -s {signal} -- {target}");
    Command::new("sh").args(["-c", &kill]).stderr(Stdio::null()).status().unwrap();
}
