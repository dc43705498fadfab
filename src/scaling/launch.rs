//! Commands of this program on several ranks, one after the other.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What starts ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `mpirun`, on this host, on those of a file, or in an allocation of Slurm.
    Mpirun,
    /// `srun`, in an allocation of Slurm.
    Srun,
}

/// A command that did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The launcher or its log cannot be had.
    #[error("cannot run `{command}`")]
    Start {
        /// As typed.
        command: String,
        /// Why not.
        source: io::Error,
    },
    /// It ended in another way than by code 0.
    #[error("`{command}` ended with {status}: {said}; all it said is in `{log}`")]
    Failed {
        /// As typed.
        command: String,
        /// Its exit code, or the signal.
        status: String,
        /// Its last words.
        said: String,
        /// What it wrote.
        log: PathBuf,
    },
}

/// How ranks are started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// By what.
    pub launcher: Launcher,
    /// The file that names hosts, for `mpirun`.
    pub hosts: Option<PathBuf>,
    /// This program.
    pub program: PathBuf,
}

impl Launch {
    /// Runs `arguments` of this program on so many ranks, writes what it says to `log`, and returns the command as typed.
    ///
    /// # Errors
    /// See [`LaunchError`].
    pub fn run(&self, ranks: usize, arguments: &[String], log: &Path) -> Result<String, LaunchError> {
        let words = self.words(ranks, arguments);
        let command = as_typed(&words);
        let start = |source| LaunchError::Start { command: command.clone(), source };
        let file = File::create(log).map_err(start)?;
        let (output, errors) = (file.try_clone().map_err(start)?, file);
        let mut child = Command::new(&words[0]);
        child.args(&words[1..]).stdin(Stdio::null()).stdout(output).stderr(errors);
        let status = child.status().map_err(start)?;
        if status.success() {
            return Ok(command);
        }
        let text = fs::read_to_string(log).unwrap_or_default();
        let said = text.lines().find(|line| line.contains("error:")).or(text.lines().last());
        Err(LaunchError::Failed {
            command,
            status: status.to_string(),
            said: said.unwrap_or("it said nothing").trim().to_owned(),
            log: log.to_owned(),
        })
    }

    fn words(&self, ranks: usize, arguments: &[String]) -> Vec<String> {
        let ranks = ranks.to_string();
        // Not bound to single cores: a rank's loader and its math libraries have threads of their own.
        let mut words: Vec<String> = match self.launcher {
            Launcher::Mpirun => ["mpirun", "-np", &ranks, "--bind-to", "none"].map(str::to_owned).to_vec(),
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

/// Words as a shell takes them.
fn as_typed(words: &[String]) -> String {
    let mut line = String::new();
    for word in words {
        let is_plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "-_=./:,".contains(c));
        let space = if line.is_empty() { "" } else { " " };
        let _ = match is_plain {
            true => write!(line, "{space}{word}"),
            false => write!(line, "{space}'{}'", word.replace('\'', r"'\''")),
        };
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(launcher: Launcher, hosts: Option<&str>) -> Launch {
        Launch { launcher, hosts: hosts.map(PathBuf::from), program: PathBuf::from("/bin/bireme") }
    }

    #[test]
    fn commands_can_be_typed_again() {
        let arguments =
            ["train".to_owned(), "--set".to_owned(), "train.loss={ kind = \"sampled\" }".to_owned()];
        let typed = |launch: Launch| as_typed(&launch.words(2, &arguments));
        assert_eq!(
            typed(launch(Launcher::Mpirun, Some("hosts"))),
            r#"mpirun -np 2 --bind-to none --hostfile hosts /bin/bireme train --set 'train.loss={ kind = "sampled" }'"#
        );
        assert!(typed(launch(Launcher::Srun, None)).starts_with("srun --mpi=pmix -n 2 /bin/bireme train"));
    }
}
