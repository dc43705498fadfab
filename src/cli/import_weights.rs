//! `bireme import-weights`.

use std::path::PathBuf;

use bireme_base::console;
use clap::Args;

use super::args::RunArgs;
use super::failure::Failure;
use super::job::Job;
use crate::config::Config;
use crate::resume::lock_run_dir;
use crate::train::ImportedWeights;

#[derive(Args)]
pub(super) struct ImportArgs {
    /// State dictionary, as written by `safetensors.torch.save_file(model.state_dict(), FILE)`
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// Last day on which the weights were trained
    #[arg(long)]
    day: i64,
    #[command(flatten)]
    run: RunArgs,
}

/// Rank 0 reads and writes; the others only agree.
pub(super) fn run(args: &ImportArgs) -> Result<(), Failure> {
    let mut job = Job::with_config(|| Config::load(&args.run.config, &args.run.set))?;
    let days = job.config.data.resolve_days(&args.run.data, Some(args.day));
    job.agree(days)?;
    let reminders = job.config.evaluate.resolve_reminders(&args.run.data, &job.config.data);
    job.agree(reminders)?;
    job.check_memory_to_read(&args.run.data)?;
    let Some(root) = job.collective.root() else { return Ok(()) };
    // Read before the run directory is touched, which may hold another run.
    let weights = ImportedWeights::read((&args.weights, args.day), &args.run.data, &job.config)
        .map_err(Failure::refused)?;
    let run_dir = args.run.run_dir();
    let _lock = lock_run_dir(root, &run_dir).map_err(Failure::refused)?;
    job.request(&args.run, &run_dir).create(root).map_err(Failure::refused)?;
    weights.write(root, &run_dir)?;
    console::note(&format!(
        "`{}` holds the weights, as if trained to day {}",
        run_dir.display(),
        args.day
    ));
    Ok(())
}
