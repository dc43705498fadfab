//! Arguments in, exit code out.

mod allocator;

use std::env;
use std::os::unix::process::CommandExt;
use std::process::{self, Command};

use bireme::cli::{self, Cli};
use bireme::env::REQUIRED;
use bireme_base::signal;
use clap::Parser;

fn main() {
    signal::ignore_file_size_limit();
    let exit_code = match Cli::try_parse() {
        Ok(cli) => {
            complete_environment();
            cli::run(cli)
        }
        Err(answer) => cli::answer(&answer),
    };
    process::exit(exit_code);
}

/// Starts the program again, as the same process, where the environment lacks a variable that
/// libraries have already read.
fn complete_environment() {
    let missing: Vec<_> =
        REQUIRED.into_iter().filter(|(name, _)| env::var_os(name).is_none()).collect();
    let Ok(program) = env::current_exe() else { return };
    if missing.is_empty() {
        return;
    }
    let mut arguments = env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).envs(missing);
    // `exec` returns only if it fails; the command then runs with the unchanged environment.
    let _ = command.exec();
}
