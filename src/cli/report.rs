//! `bireme report`.

use std::path::PathBuf;

use bireme_base::console;
use bireme_tools::report::{self, compare, runs};
use clap::Args;

use super::failure::{Failure, print};
use super::interrupt::clean_up_on_signals;

#[derive(Args)]
pub(super) struct ReportArgs {
    /// Run directories of `bireme train`, one for each model; counting models are the baselines
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// Output folder
    #[arg(long, value_name = "DIR", default_value = "report")]
    out: PathBuf,
    /// Bootstrap resamples for each confidence interval
    #[arg(long, default_value_t = 1000)]
    #[arg(value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    resamples: u32,
    /// Replace an existing report in DIR
    #[arg(long)]
    overwrite: bool,
}

pub(super) fn run(args: &ReportArgs) -> Result<(), Failure> {
    clean_up_on_signals()?;
    let folder = report::create(&args.out, &args.runs, args.overwrite, &mut console::log)?;
    let runs = runs::read(&args.runs)?;
    let comparison = compare::compare(&runs, args.resamples)?;
    report::write(folder, &comparison)?;
    for warning in &comparison.warnings {
        console::log(&format!("warning: {warning}"));
    }
    Ok(print(&args.out.join(report::PAGE).display().to_string())?)
}
