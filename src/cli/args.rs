//! Arguments that several commands take.

use std::path::{Path, PathBuf};

use bireme_base::message::chain;
use bireme_base::user_error::UserError;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::failure::Failure;
use crate::device::{self, DeviceChoice};

/// A run: its configuration, data and directory.
#[derive(Args)]
pub(super) struct RunArgs {
    /// Configuration of the run, TOML
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Output of `bireme preprocess`, or a folder of `<day>/{train,valid,test}.parquet` with
    /// `schema.pbtxt`
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Directory for metrics, results and checkpoints [default: `runs/` and the name of the
    /// configuration]
    #[arg(long, value_name = "RUN")]
    run_dir: Option<PathBuf>,
    /// Override a key of the configuration, as `section.key=value`; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Replace an existing run in RUN
    #[arg(long)]
    pub overwrite: bool,
}

impl RunArgs {
    pub fn run_dir(&self) -> PathBuf {
        let by_config =
            || Path::new("runs").join(self.config.file_stem().unwrap_or(self.config.as_os_str()));
        self.run_dir.clone().unwrap_or_else(by_config)
    }
}

/// Parses the names of an enum's values in configurations and files.
pub(super) fn by_name<T, const N: usize>(
    values: [T; N],
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T>
where
    T: Copy + Send + Sync + 'static,
{
    PossibleValuesParser::new(values.map(name)).try_map(move |given| {
        values.into_iter().find(|&value| name(value) == given).ok_or("it is none of them")
    })
}

/// Device and threads of a process without ranks. 0 threads: all cores.
pub(super) fn place_alone(
    device: DeviceChoice,
    n_threads: usize,
) -> Result<device::Place, Failure> {
    // The error's hint is about `run.device` of a configuration, which such a command has not.
    device::place(device, n_threads, 0, 1)
        .map_err(|error| Failure { exit_code: error.exit_code(), message: Some(chain(&error)) })
}
