//! `bireme recommend`.

use std::path::PathBuf;

use bireme_base::console;
use bireme_base::output::OutputError;
use bireme_tools::sink::is_gzip;
use clap::Args;
use tch::Device;

use super::args::place_alone;
use super::failure::Failure;
use super::interrupt::clean_up_on_signals;
use crate::device::DeviceChoice;
use crate::etl::{BadRows, RowCounts};
use crate::recommend::{self, RecommendOptions, RecommendationFormat};

#[derive(Args)]
pub(super) struct RecommendArgs {
    /// Model repository of `bireme export`
    #[arg(long, value_name = "REPO")]
    repository: PathBuf,
    /// Name of the model
    #[arg(long, default_value = "bireme")]
    name: String,
    /// Events: CSV, plain or compressed, or parquet; `-` is standard input; several files are read
    /// in order
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    events: Vec<PathBuf>,
    /// Leave out bad rows
    #[arg(long)]
    skip_bad_rows: bool,
    /// Read the first N events in order of time; sessions of one event are left out
    #[arg(long, value_name = "N", default_value_t = 50)]
    first: usize,
    /// Number of recommendations for each session
    #[arg(long, value_name = "K", default_value_t = 5)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=100))]
    top: u8,
    /// Leave out the items of the session
    #[arg(long)]
    exclude_seen: bool,
    /// Output format
    #[arg(long, value_enum, default_value_t = RecommendationFormat::Table)]
    format: RecommendationFormat,
    /// Output file, gzip if it ends in `.gz` [default: standard output, except for parquet]
    #[arg(long, value_name = "FILE", required_if_eq("format", "parquet"))]
    out: Option<PathBuf>,
    /// Device of the network
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

impl RecommendArgs {
    fn options(&self, device: Device) -> RecommendOptions {
        RecommendOptions {
            repository: self.repository.clone(),
            name: self.name.clone(),
            events: self.events.clone(),
            bad_rows: if self.skip_bad_rows { BadRows::Skip } else { BadRows::Refuse },
            first: self.first,
            top: self.top.into(),
            exclude_seen: self.exclude_seen,
            device,
        }
    }
}

pub(super) fn run(args: &RecommendArgs) -> Result<(), Failure> {
    clean_up_on_signals()?;
    let options = args.options(place_alone(args.device, 0)?.device);
    let counts = match &args.out {
        Some(out) if args.format == RecommendationFormat::Parquet && is_gzip(out) => {
            let problem = "parquet is compressed already: leave out `.gz`".to_owned();
            return Err(OutputError::Refused { path: out.clone(), problem }.into());
        }
        Some(out) => recommend::to_file(&options, args.format, out, &mut console::log)?,
        None => recommend::to_terminal(&options, args.format)?,
    };
    if let Some(RowCounts { bad: bad @ 1.., read, .. }) = counts {
        console::log(&format!("warning: {bad} of {read} rows cannot be read and are left out"));
    }
    Ok(())
}
