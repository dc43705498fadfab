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
    /// What `bireme train` wrote
    #[arg(long, value_name = "RUN")]
    run_dir: PathBuf,
    /// The data to evaluate on
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Which part of the day
    #[arg(long, default_value = Split::Valid.name())]
    #[arg(value_parser = by_name(Split::ALL, Split::name))]
    split: Split,
    /// Which day [default: the one after the last trained on]
    #[arg(long)]
    day: Option<i64>,
    /// Override a key of the run's configuration, as `section.key=value`; may be given several
    /// times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Evaluate what `bireme export` made of the run, in this repository, in place of the
    /// checkpoint
    #[arg(long, value_name = "REPO", conflicts_with = "save")]
    exported: Option<PathBuf>,
    /// With `--exported`: the model's name
    #[arg(long, default_value = "bireme", requires = "exported")]
    name: String,
    /// Leave each session's outcome in `RUN/evaluations` too, for `bireme report`
    #[arg(long)]
    save: bool,
    /// With `--save`: replace the outcomes of that day and part that RUN already holds
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
