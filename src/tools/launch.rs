//! Starts commands of this program on several ranks.

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bireme_base::message::single_line;
use bireme_base::user_error::{FAILED, REFUSED, UserError};

use crate::shell;

/// The program that starts ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Launcher {
    /// On this host, on those of a host file, or in a Slurm allocation.
    Mpirun,
    /// In a Slurm allocation.
    Srun,
}

impl Launcher {
    fn name(self) -> &'static str {
        match self {
            Self::Mpirun => "mpirun",
            Self::Srun => "srun",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("there is no `{0}` in PATH")]
    Missing(&'static str),
    /// `srun` would wait for an allocation.
    #[error("`--launcher srun` needs an allocation of Slurm: run this inside `sbatch` or `salloc`")]
    NoAllocation,
    #[error("`--hosts` is for `--launcher mpirun`; `srun` uses the hosts of its allocation")]
    HostsOfSrun,
    #[error("cannot read the hosts `{path}`")]
    Hosts { path: PathBuf, source: io::Error },
    /// The launcher cannot be run, or its log not be written.
    #[error("cannot run `{command}`")]
    Start { command: String, source: io::Error },
    #[error("{reason}; the log is `{log}`")]
    Failed {
        command: String,
        /// The exit code or signal.
        status: String,
        /// The first error message of the log.
        reason: String,
        log: PathBuf,
    },
}

impl UserError for LaunchError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Missing(_) | Self::NoAllocation | Self::HostsOfSrun | Self::Hosts { .. } => {
                REFUSED
            }
            Self::Start { .. } | Self::Failed { .. } => FAILED,
        }
    }

    /// The command that reproduces the failure.
    fn hint(&self) -> Option<String> {
        match self {
            Self::Failed { command, status, .. } => Some(format!("{status} of `{command}`")),
            _ => None,
        }
    }
}

/// How to start ranks.
#[derive(Clone, Debug)]
pub struct Launch {
    pub launcher: Launcher,
    /// Host file of `mpirun`.
    pub hosts: Option<PathBuf>,
    /// Path of this program.
    pub program: PathBuf,
}

impl Launch {
    /// Checks what can be checked without starting a rank.
    ///
    /// # Errors
    /// Returns the first obstacle.
    pub fn check(&self) -> Result<(), LaunchError> {
        let name = self.launcher.name();
        let path = env::var_os("PATH").unwrap_or_default();
        if !env::split_paths(&path).any(|folder| folder.join(name).is_file()) {
            return Err(LaunchError::Missing(name));
        }
        if self.launcher == Launcher::Srun {
            if self.hosts.is_some() {
                return Err(LaunchError::HostsOfSrun);
            }
            if env::var_os("SLURM_JOB_ID").is_none() {
                return Err(LaunchError::NoAllocation);
            }
        }
        let Some(hosts) = &self.hosts else { return Ok(()) };
        File::open(hosts)
            .map(drop)
            .map_err(|source| LaunchError::Hosts { path: hosts.clone(), source })
    }

    /// Runs this program with `arguments` on `ranks` ranks and returns the command as typed in a
    /// shell. The output goes to the file `log`.
    ///
    /// # Errors
    /// Returns an error if the command cannot be started or fails.
    pub fn run(
        &self,
        ranks: usize,
        arguments: &[String],
        log: &Path,
    ) -> Result<String, LaunchError> {
        let words = self.words(ranks, arguments);
        let command = shell::quoted(&words);
        let start = |source| LaunchError::Start { command: command.clone(), source };
        let file = File::create(log).map_err(start)?;
        let (output, errors) = (file.try_clone().map_err(start)?, file);
        let mut child = Command::new(&words[0]);
        child.args(&words[1..]).stdin(Stdio::null()).stdout(output).stderr(errors);
        child.envs(environment());
        // SAFETY: between fork and exec, the function only makes a system call.
        unsafe { child.pre_exec(end_with_parent) };
        let status = child.status().map_err(start)?;
        if status.success() {
            return Ok(command);
        }
        let text = fs::read_to_string(log).unwrap_or_default();
        Err(LaunchError::Failed {
            command,
            status: status.to_string(),
            reason: reason(&text),
            log: log.to_owned(),
        })
    }

    fn words(&self, ranks: usize, arguments: &[String]) -> Vec<String> {
        let ranks = ranks.to_string();
        // No binding to single cores: the loader and the math libraries of a rank start threads.
        let mut words: Vec<String> = match self.launcher {
            Launcher::Mpirun => {
                ["mpirun", "-np", &ranks, "--bind-to", "none"].map(str::to_owned).to_vec()
            }
            Launcher::Srun => ["srun", "--mpi=pmix", "-n", &ranks].map(str::to_owned).to_vec(),
        };
        if let Some(hosts) = &self.hosts {
            words.extend(["--hostfile".to_owned(), hosts.display().to_string()]);
        }
        words.push(self.program.display().to_string());
        words.extend_from_slice(arguments);
        words
    }
}

/// Variables for Open MPI that are not set already, as in `launch/env.sh`: allow root, as in
/// containers, and more ranks than cores.
fn environment() -> Vec<(&'static str, &'static str)> {
    let is_root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    let for_root = [("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")];
    let oversubscribe = [
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
    ];
    let for_root = for_root.into_iter().filter(|_| is_root);
    for_root.chain(oversubscribe).filter(|(name, _)| env::var_os(name).is_none()).collect()
}

/// Makes the launcher, and thereby its ranks, end with this process, even if it is killed.
fn end_with_parent() -> io::Result<()> {
    // SAFETY: the call takes numbers and affects the calling process only.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The first error of Bireme in the log, or the first paragraph of the launcher's message.
fn reason(log: &str) -> String {
    let own = log.lines().find_map(|line| line.split_once("error: ").map(|(_, message)| message));
    if let Some(message) = own {
        return single_line(message);
    }
    let is_empty = |line: &&str| line.trim().trim_matches(['-', '=', '*']).is_empty();
    let paragraph: Vec<&str> =
        log.lines().skip_while(is_empty).take_while(|line| !is_empty(line)).collect();
    if paragraph.is_empty() {
        "the command wrote no message".to_owned()
    } else {
        single_line(paragraph.join(" ").trim_end_matches('.'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(launcher: Launcher, hosts: Option<&str>) -> Launch {
        Launch { launcher, hosts: hosts.map(PathBuf::from), program: PathBuf::from("/bin/bireme") }
    }

    #[test]
    fn the_reason_is_the_first_message_of_the_log() {
        let of_mpirun = "-----\nmpirun has detected an attempt to run\nas root.\n\n\
                         Running as root is bad.\n-----\n";
        assert_eq!(reason(of_mpirun), "mpirun has detected an attempt to run as root");
        let of_rank =
            format!("day 1: 3 sessions\nerror: `data` is missing\nhint: look\n{of_mpirun}");
        assert_eq!(reason(&of_rank), "`data` is missing");
        assert_eq!(reason("\n---\n"), "the command wrote no message");
    }

    #[test]
    fn commands_can_be_typed_again() {
        let arguments = [
            "train".to_owned(),
            "--set".to_owned(),
            "train.loss={ kind = \"sampled\" }".to_owned(),
        ];
        let typed = |launch: Launch| shell::quoted(&launch.words(2, &arguments));
        assert_eq!(
            typed(launch(Launcher::Mpirun, Some("hosts"))),
            "mpirun -np 2 --bind-to none --hostfile hosts /bin/bireme train --set 'train.loss={ \
             kind = \"sampled\" }'"
        );
        assert!(
            typed(launch(Launcher::Srun, None))
                .starts_with("srun --mpi=pmix -n 2 /bin/bireme train")
        );
    }
}
