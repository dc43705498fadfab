//! `bireme evaluate`.

use std::path::PathBuf;

use bireme_base::output;
use bireme_tools::run_dir::{CONFIG, EVALUATIONS};
use clap::Args;

use super::args::by_name;
use super::failure::{Failure, print};
use super::job::Job;
use super::warn_of_skipped;
use crate::checkpoint::CheckpointError;
use crate::config::Config;
use crate::data::Split;
use crate::export::ScriptedModel;
use crate::resume::{RunDirError, lock_run_dir};
use crate::train::{TrainError, TrainedRun};

#[derive(Args)]
pub(super) struct EvaluateArgs {
    /// Run directory of `bireme train`
    #[arg(long, value_name = "RUN")]
    run_dir: PathBuf,
    /// Data to evaluate on
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Part of the day
    #[arg(long, default_value = Split::Valid.name())]
    #[arg(value_parser = by_name(Split::ALL, Split::name))]
    split: Split,
    /// Day [default: the day after the last training day]
    #[arg(long)]
    day: Option<i64>,
    /// Override a key of the run's configuration, as `section.key=value`; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Evaluate the exported model of the run in this repository instead of the checkpoint
    #[arg(long, value_name = "REPO", conflicts_with = "save")]
    exported: Option<PathBuf>,
    /// Name of the exported model
    #[arg(long, default_value = "bireme", requires = "exported")]
    name: String,
    /// Save the outcome of each session in `RUN/evaluations`, for `bireme report`
    #[arg(long)]
    save: bool,
    /// With `--save`: replace saved outcomes of that day and part
    #[arg(long, requires = "save")]
    overwrite: bool,
}

pub(super) fn run(args: &EvaluateArgs) -> Result<(), Failure> {
    let job = Job::with_config(|| Config::load(&args.run_dir.join(CONFIG), &args.set))?;
    let root = job.collective.root();
    job.check_memory_to_read(&args.data)?;
    let lock = root.filter(|_| args.save).map(|root| lock_run_dir(root, &args.run_dir));
    let _lock = job.agree(lock.transpose())?;
    let run = job.agree(open_run(args, &job))?;
    if root.is_some() {
        warn_of_skipped(run.skipped());
    }
    if args.save {
        check_output(args, &job, &run)?;
    }
    let save = args.save.then_some(args.run_dir.as_path());
    let record = job.end(run.evaluate(&job.config, save, &*job.collective))?;
    if root.is_some() {
        print(&serde_json::to_string(&record).expect("a record is JSON"))?;
    }
    Ok(())
}

fn open_run<'a>(args: &EvaluateArgs, job: &'a Job) -> Result<TrainedRun<'a>, TrainError> {
    let which = (args.day, args.split);
    let run = TrainedRun::open(&args.run_dir, &args.data, &job.config, which, job.context())?;
    let Some(repository) = &args.exported else { return Ok(run) };
    let exported = ScriptedModel::load(repository, &args.name, run.n_items(), job.place.device)
        .map_err(|problem| CheckpointError::Mismatch { path: repository.clone(), problem })?;
    Ok(run.with_recommender(Box::new(exported)))
}

/// *All ranks.* Refuses to save where rank 0 cannot write, or would replace an evaluation.
fn check_output(args: &EvaluateArgs, job: &Job, run: &TrainedRun<'_>) -> Result<(), Failure> {
    let root = job.collective.root();
    let folder = args.run_dir.join(EVALUATIONS);
    job.agree(root.map_or(Ok(()), |_| output::check_folder(&folder)))?;
    let file = run.evaluation_file(&args.run_dir);
    let is_taken = root.is_some() && !args.overwrite && file.exists();
    job.agree(if is_taken { Err(RunDirError::Evaluated(file)) } else { Ok(()) })
}
