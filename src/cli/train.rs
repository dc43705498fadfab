//! `bireme train`.

use std::path::{Path, PathBuf};

use bireme_base::console;
use clap::Args;
use tch::Kind;

use super::args::RunArgs;
use super::export::{library_beside_program, write_export};
use super::failure::{Failure, SystemError};
use super::job::Job;
use super::warn_of_skipped;
use crate::checkpoint::{Position, SharedCheckpoint};
use crate::collective::{CollectiveError, Reduce, topology};
use crate::config::Config;
use crate::data::RowCheck;
use crate::export;
use crate::report::Report;
use crate::resume::{OpenedRun, Resume};
use crate::train::{Dataset, Ended, Purpose, Signals, Training, check_memory, item_table};

#[derive(Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    run: RunArgs,
    /// What to do if RUN already holds a run
    #[arg(long, value_enum, num_args = 0..=1, default_value_t, default_missing_value = "auto")]
    resume: Resume,
    /// Export the run into this model repository at the end, as `bireme export` does
    #[arg(long, value_name = "REPO")]
    export: Option<PathBuf>,
    /// Name of the exported model
    #[arg(long, value_name = "NAME", default_value = "bireme", requires = "export")]
    export_name: String,
}

impl TrainArgs {
    fn export_options(&self) -> Option<export::ExportOptions> {
        let out = self.export.clone()?;
        Some(export::ExportOptions {
            run_dir: self.run.run_dir(),
            checkpoint: None,
            out,
            name: self.export_name.clone(),
            tables: Kind::Float,
            library: library_beside_program(),
        })
    }
}

pub(super) fn run(args: &TrainArgs) -> Result<(), Failure> {
    // First: a job that is asked to stop while it starts stops after its first step.
    let signals = Signals::listen().map_err(SystemError::refused("listen to signals"));
    let mut job = Job::with_config(|| Config::load(&args.run.config, &args.run.set))?;
    let resolved = job.config.data.resolve_days(&args.run.data, None);
    let signals = job.agree(signals)?;
    job.agree(resolved)?;
    let reminders = job.config.evaluate.resolve_reminders(&args.run.data, &job.config.data);
    job.agree(reminders)?;
    let (data, checked) = open_data(&job, &args.run.data)?;
    let exportable =
        args.export_options().map_or(Ok(()), |options| export::check(&options, &job.config));
    job.agree(exportable)?;
    let run_dir = args.run.run_dir();
    let mut opened = open_run(args, &job, &run_dir, &data)?;
    // Held until the export at the end is written.
    let _lock = opened.lock.take();
    if any_rank(&job, opened.is_done)? {
        if job.collective.root().is_some() {
            console::log(&format!("`{}` holds this run, and it is done", run_dir.display()));
        }
        return export_on_root(args, &job);
    }
    match fit(args, &job, &run_dir, opened, Inputs { data, checked, signals })? {
        Ended::Done => export_on_root(args, &job),
        Ended::Stopped(_) => Err(Failure::STOPPED),
    }
}

/// *All ranks.* Opens the data of the run and refuses what cannot be trained on.
fn open_data(job: &Job, dir: &Path) -> Result<(Dataset, RowCheck), Failure> {
    let collective = &*job.collective;
    let ranks = (collective.rank(), collective.world_size());
    let data = job.agree(Dataset::open(dir, &job.config, ranks.1))?;
    job.agree(data.compare_ranks(collective))?;
    let n_sessions = Some(data.n_sessions());
    let context = job.context();
    job.agree(check_memory(&job.config, data.features(), context, Purpose::Train, n_sessions))?;
    let checked = job.agree(data.check_rows(ranks, job.place.n_threads))?;
    Ok((data, checked))
}

/// *All ranks.* Opens the run directory on rank 0; the others get an empty [`OpenedRun`].
fn open_run(
    args: &TrainArgs,
    job: &Job,
    run_dir: &Path,
    data: &Dataset,
) -> Result<OpenedRun, Failure> {
    let open = |root| job.request(&args.run, run_dir).open(root, args.resume, data);
    let opened = job.agree(job.collective.root().map(open).transpose())?.unwrap_or_default();
    warn_of_skipped(&opened.skipped);
    Ok(opened)
}

/// *All ranks.* Whether `is_so` on some rank.
fn any_rank(job: &Job, is_so: bool) -> Result<bool, CollectiveError> {
    let mut on_some = [u8::from(is_so)];
    job.collective.reduce(&mut on_some, Reduce::Max)?;
    Ok(on_some == [1])
}

/// What a run reads, opened and checked.
struct Inputs {
    data: Dataset,
    checked: RowCheck,
    signals: Signals,
}

/// *All ranks.* Trains, from the checkpoint that was found or from the start.
fn fit(
    args: &TrainArgs,
    job: &Job,
    run_dir: &Path,
    opened: OpenedRun,
    inputs: Inputs,
) -> Result<Ended, Failure> {
    let collective = &*job.collective;
    let Inputs { data, mut checked, signals } = inputs;
    let OpenedRun { checkpoint, is_new, .. } = opened;
    let table = item_table(&job.config, data.n_items(), collective);
    let from = SharedCheckpoint::new(checkpoint, table, collective)?;
    let resumed = from.as_ref().map(Resumed::of);
    // What does not fit is refused before anything is changed.
    let training = job.agree(Training::new(&job.config, &data, job.context(), from))?;
    let begin = |root| job.request(&args.run, run_dir).begin(root, is_new);
    job.agree(collective.root().map_or(Ok(()), begin))?;
    let log_bytes = resumed.as_ref().map_or(0, |resumed| resumed.log_bytes);
    let mut report = job.agree(Report::open(collective.root(), run_dir, log_bytes))?;
    describe(job, &data, resumed.as_ref(), &mut report)?;
    let mut n_left = [checked.n_left() as i64];
    collective.sum_i64(&mut n_left)?;
    let [n_left] = n_left;
    if n_left > 0 {
        let rows = format!("the rows of the last {n_left} sessions");
        report.print(&format!("{rows} are checked beside the training"));
    }
    checked.continue_in_background();
    let ended = job.end(training.fit(run_dir, &mut report, &signals, &mut checked))?;
    report.print(&match ended {
        Ended::Done => format!("metrics, results and checkpoints are in `{}`", run_dir.display()),
        Ended::Stopped(Position { day, day_step, .. }) => format!(
            "stopped on request after day {day}, step {day_step}: run the same command without \
             `--overwrite` to resume"
        ),
    });
    Ok(ended)
}

/// The checkpoint that a run is resumed from.
struct Resumed {
    path: PathBuf,
    position: Position,
    log_bytes: u64,
}

impl Resumed {
    fn of(from: &SharedCheckpoint<'_>) -> Self {
        let state = from.state();
        Self { path: from.path().to_owned(), position: state.position, log_bytes: state.log_bytes }
    }
}

/// *All ranks.* Reports what runs, on what, and from where.
fn describe(
    job: &Job,
    data: &Dataset,
    resumed: Option<&Resumed>,
    report: &mut Report,
) -> Result<(), CollectiveError> {
    let world_size = job.collective.world_size();
    let placements = topology::rank_placements(&job.place, &*job.collective)?;
    for warning in
        job.place.warnings.iter().chain(&topology::warnings(&placements)).chain(data.warnings())
    {
        report.print(&format!("warning: {warning}"));
    }
    if world_size > 1 {
        topology::table(&placements).iter().for_each(|line| report.print(line));
    }
    report.print(&format!(
        "{}: ranks {world_size} ({}), device {}, threads a rank {}",
        job.config.title(),
        job.collective.backend(),
        job.place.device_name(),
        job.place.n_threads,
    ));
    if let Some(Resumed { path, position, .. }) = resumed {
        let (path, Position { day, day_step, day_steps, .. }) = (path.display(), position);
        let done = format!("day {day}, {day_step} of {day_steps} steps done");
        report.print(&format!("resuming from `{path}`: {done}"));
    }
    Ok(())
}

fn export_on_root(args: &TrainArgs, job: &Job) -> Result<(), Failure> {
    match args.export_options() {
        Some(options) if job.collective.root().is_some() => write_export(&options),
        _ => Ok(()),
    }
}
