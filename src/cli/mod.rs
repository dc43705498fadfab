//! The command line: one subcommand a stage.

mod bench;
mod interrupt;
mod run_dir;

use std::error::Error;
use std::io::{self, ErrorKind, Write};
use std::ops::RangeInclusive;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bireme_base::output::{self, OutputError, OutputFile};
use bireme_base::{console, message};
use bireme_serve::service::Limits;
use bireme_serve::{Addresses, logs};
use bireme_tools::findings;
use bireme_tools::report as run_reports;
use bireme_tools::run_dir::CONFIG;
use bireme_tools::sink::{Sink, is_gzip};
use bireme_tools::synth::{self, SynthError, SynthOptions};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use tch::Kind;

use crate::checkpoint::{CheckpointError, Position, SharedCheckpoint};
use crate::collective::topology;
use crate::collective::{self, Collective, CollectiveError, Reduce};
use crate::config::{Config, ConfigError, Reduction};
use crate::data::{Days, Split};
use crate::device::{self, DeviceChoice, memory};
use crate::doctor;
use crate::etl;
use crate::export::{self, ExportError, Exported, ScriptedModel};
use crate::recommend;
use crate::report::{Report, evaluations};
use crate::train::{
    Dataset, Ended, ImportedWeights, Purpose, RankContext, Signals, TrainError, TrainedRun, Training,
    check_memory, item_table,
};

use run_dir::{Opened, RunDirError, begin_run, lock_run_dir, open_run, prepare_run_dir};

/// Trains session-based recommenders on many GPUs.
///
/// Exit codes: 0 done; 1 the run failed; 2 refused before starting; 3 stopped on request after a checkpoint.
#[derive(Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make the events of a shop, shaped like the REES46 data, of any size
    Synth(SynthArgs),
    /// Turn shop events into sessions by day, a fitted workflow and a schema
    Preprocess(PreprocessArgs),
    /// Train day by day, evaluate each day on the next; alone, or under `mpirun` or `srun`
    Train(TrainCommand),
    /// Evaluate the newest checkpoint of a run; alone, or under `mpirun` or `srun`
    Evaluate(EvaluateArgs),
    /// Write the model of a run into a model repository, for Triton or `bireme serve`
    Export(ExportArgs),
    /// Serve a model repository over HTTP and gRPC, as Triton does
    Serve(ServeArgs),
    /// Recommend for the sessions of a file, with the names of products
    Recommend(RecommendArgs),
    /// Make a run of weights that Transformers4Rec saved
    ImportWeights(ImportArgs),
    /// Compare runs: tables, charts and a page, with confidence intervals
    Report(ReportArgs),
    /// Look at the machine: devices, speed of arithmetic, of the ranks' talk and of a folder, clocks; alone or under
    /// `mpirun` or `srun`
    Doctor(DoctorArgs),
    /// Measure how training scales with ranks
    Bench(bench::BenchArgs),
}

#[derive(Args)]
struct SynthArgs {
    /// Rows of the file
    #[arg(long, default_value_t = 300_000)]
    events: u64,
    /// Items of the shop on its last day
    #[arg(long, default_value_t = 2_000)]
    items: u32,
    /// Whole days
    #[arg(long, default_value_t = 5)]
    days: u32,
    /// The same options and seed give the same bytes
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The CSV file to write; gzip if it ends in `.gz`; `-` is the standard output
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Args)]
struct PreprocessArgs {
    /// Events: CSV, plain or compressed, or parquet; `-` is standard input; several files are read one after
    /// the other
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    events: Vec<PathBuf>,
    /// The folder to write
    #[arg(long, value_name = "DIR", required_unless_present = "extend")]
    out: Option<PathBuf>,
    /// Add the sessions of later days to this folder, which an earlier run wrote: ids stay and new values get those that
    /// follow, means and deviations stay, sessions are made as before
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["out", "max_length", "min_length", "keep", "seed", "overwrite"]
    )]
    extend: Option<PathBuf>,
    /// Use the events of these days only: calendar days in UTC, 1 being that of the first event
    #[arg(long, value_name = "A..B", value_parser = parse_days)]
    days: Option<RangeInclusive<i64>>,
    /// Leave out rows that cannot be read, and count them
    #[arg(long)]
    skip_bad_rows: bool,
    /// Events of a session that are kept at most
    #[arg(long, default_value_t = etl::Settings::default().max_length)]
    max_length: usize,
    /// Events that a session needs to be kept at all
    #[arg(long, default_value_t = etl::Settings::default().min_length)]
    min_length: usize,
    /// Which events of a longer session are kept
    #[arg(long, value_enum, default_value_t = KeepArg::First)]
    keep: KeepArg,
    /// Seed of the hash that deals sessions to train, valid and test
    #[arg(long, default_value_t = etl::Settings::default().seed)]
    seed: u64,
    /// Replace what an earlier run wrote to DIR
    #[arg(long)]
    overwrite: bool,
}

/// As [`etl::Keep`], on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum KeepArg {
    /// The session's start
    First,
    /// The session's end
    Last,
}

fn split_parser() -> impl TypedValueParser<Value = Split> {
    PossibleValuesParser::new(Split::ALL.map(Split::name))
        .try_map(|name| Split::ALL.into_iter().find(|split| split.name() == name).ok_or("no part of a day"))
}

fn parse_days(text: &str) -> Result<RangeInclusive<i64>, String> {
    let parsed = text.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..=b.parse().ok()?));
    parsed.ok_or_else(|| "days are written as `A..B`, both included".to_owned())
}

#[derive(Args)]
struct TrainArgs {
    /// The run's TOML file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// What `bireme preprocess` wrote, or a folder of `<day>/{train,valid,test}.parquet` with `schema.pbtxt`
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Where metrics, results and checkpoints go [default: `runs/` and the name of the configuration]
    #[arg(long, value_name = "RUN")]
    run_dir: Option<PathBuf>,
    /// Override a key of the configuration, as `section.key=value`; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Replace the run that RUN holds
    #[arg(long)]
    overwrite: bool,
}

#[derive(Args)]
struct TrainCommand {
    #[command(flatten)]
    run: TrainArgs,
    /// What to do where RUN holds a run already
    #[arg(long, value_enum, num_args = 0..=1, default_value_t, default_missing_value = "auto")]
    resume: ResumeArg,
    /// At the end, export the run into this model repository, as `bireme export` does
    #[arg(long, value_name = "REPO")]
    export: Option<PathBuf>,
    /// With `--export`: the model's name
    #[arg(long, value_name = "NAME", default_value = "bireme", requires = "export")]
    export_name: String,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum ResumeArg {
    /// Go on with it, if configuration and data are the same
    #[default]
    Auto,
    /// Go on with it, though configuration or data are others
    Anyway,
    /// Refuse
    Never,
}

impl TrainCommand {
    fn export_options(&self) -> Option<export::ExportOptions> {
        let out = self.export.clone()?;
        Some(export::ExportOptions {
            run_dir: self.run.run_dir(),
            checkpoint: None,
            out,
            name: self.export_name.clone(),
            tables: Kind::Float,
            library: library_beside(),
        })
    }
}

/// Where the build leaves the library that preprocesses in Triton.
fn library_beside() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name(export::LIBRARY)
}

#[derive(Args)]
struct ExportArgs {
    /// What `bireme train` wrote
    #[arg(long, value_name = "RUN")]
    run_dir: PathBuf,
    /// Which of `RUN/checkpoints` [default: the newest]
    #[arg(long, value_name = "CHECKPOINT")]
    checkpoint: Option<String>,
    /// The model repository; what it already holds stays
    #[arg(long, value_name = "REPO")]
    out: PathBuf,
    /// The model's name; if the repository has it, it gets a new version
    #[arg(long, default_value = "bireme")]
    name: String,
    /// The type in which tables of vectors are kept and items are scored
    #[arg(long, value_enum, default_value_t = TablesArg::F32)]
    tables: TablesArg,
    // Removed; accepted in this version, so that the refusal can name the replacement.
    #[arg(long, hide = true)]
    python_backend: bool,
    /// The library that preprocesses in Triton [default: beside this program]
    #[arg(long, value_name = "FILE")]
    backend_library: Option<PathBuf>,
}

/// Types of exported tables, on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum TablesArg {
    F32,
    Bf16,
    F16,
}

impl ExportArgs {
    fn options(&self) -> export::ExportOptions {
        export::ExportOptions {
            run_dir: self.run_dir.clone(),
            checkpoint: self.checkpoint.clone(),
            out: self.out.clone(),
            name: self.name.clone(),
            tables: match self.tables {
                TablesArg::F32 => Kind::Float,
                TablesArg::Bf16 => Kind::BFloat16,
                TablesArg::F16 => Kind::Half,
            },
            library: self.backend_library.clone().unwrap_or_else(library_beside),
        }
    }
}

/// Limits are per process.
#[derive(Args)]
struct ServeArgs {
    /// What `bireme export` wrote
    #[arg(long, value_name = "REPO")]
    repository: PathBuf,
    /// Load this model at the start, and the steps of an ensemble; may be given several times [default: all]
    #[arg(long = "load", value_name = "NAME")]
    models: Vec<String>,
    /// Where to listen for HTTP: `127.0.0.1:8000`, `[::1]:8000`, or a name, of whose addresses the
    /// first is taken that this machine has, IPv4 before IPv6; port 0 stands for any that is free
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8000")]
    http: String,
    /// Where to listen for gRPC
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8001")]
    grpc: String,
    /// Ask for `Authorization: Bearer KEY` with a key of this file, one in a line; health checks need none
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// Where the network runs
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
    /// Threads that read requests and write answers, and as many that preprocess and score [default: the cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Largest body of a request, in MiB
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().body >> 20)]
    max_body_mib: usize,
    /// Memory for the bodies of all requests and answers, in MiB
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().bodies >> 20)]
    max_bodies_mib: usize,
    /// Rows of events in a request at most
    #[arg(long, value_name = "N", default_value_t = Limits::default().rows)]
    max_rows: usize,
    /// Requests under way at most; more are answered with 503 and `Retry-After`
    #[arg(long, value_name = "N", default_value_t = Limits::default().requests)]
    max_requests: usize,
    /// Open connections at most; more are closed at once
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections)]
    max_connections: usize,
    /// How long a request may take, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = Limits::default().time.as_millis() as u64)]
    timeout_ms: u64,
    /// How long a connection may say nothing, in seconds
    #[arg(long, value_name = "S", default_value_t = Limits::default().idle.as_secs())]
    idle_seconds: u64,
    /// How long requests under way have after SIGTERM, in seconds
    #[arg(long, value_name = "S", default_value_t = 30)]
    drain_seconds: u64,
    /// The form of the log; BIREME_LOG says what is logged, as `info` or `debug`
    #[arg(long, value_enum, default_value_t = LogArg::Text)]
    log: LogArg,
}

#[derive(Args)]
struct RecommendArgs {
    /// What `bireme export` wrote
    #[arg(long, value_name = "REPO")]
    repository: PathBuf,
    /// The model's name
    #[arg(long, default_value = "bireme")]
    name: String,
    /// Events: CSV, plain or compressed, or parquet; `-` is standard input; several files are read one after
    /// the other
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    events: Vec<PathBuf>,
    /// Leave out rows that cannot be read
    #[arg(long)]
    skip_bad_rows: bool,
    /// Look at so many events, the first by time; sessions of more than one are told
    #[arg(long, value_name = "N", default_value_t = 50)]
    first: usize,
    /// Recommendations for each session
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=100))]
    top: u8,
    /// Leave out what the session holds
    #[arg(long)]
    exclude_seen: bool,
    /// The form of the answer
    #[arg(long, value_enum, default_value_t = FormatArg::Table)]
    format: FormatArg,
    /// Write to a file, as gzip if it ends in `.gz` [default: the terminal, except for parquet]
    #[arg(long, value_name = "FILE", required_if_eq("format", "parquet"))]
    out: Option<PathBuf>,
    /// Where the network runs
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
}

/// As [`recommend::RecommendationFormat`], on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum FormatArg {
    /// A block for each session
    Table,
    /// An object in a line for each session
    Json,
    /// A row for each product seen or recommended
    Csv,
    /// The rows of csv
    Parquet,
}

/// Devices, on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum DeviceArg {
    Auto,
    Cpu,
    Cuda,
}

impl DeviceArg {
    fn choice(self) -> DeviceChoice {
        match self {
            Self::Auto => DeviceChoice::Auto,
            Self::Cpu => DeviceChoice::Cpu,
            Self::Cuda => DeviceChoice::Cuda,
        }
    }

    /// Where a process without ranks computes; 0 threads stand for all cores.
    fn place(self, n_threads: usize) -> Result<device::Place, Failure> {
        device::place(self.choice(), n_threads, 0, 1).map_err(|error| Failure::refused(&error, None))
    }
}

/// Forms of logs, on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum LogArg {
    Text,
    Json,
}

impl ServeArgs {
    fn limits(&self) -> Limits {
        Limits {
            body: self.max_body_mib << 20,
            bodies: self.max_bodies_mib << 20,
            rows: self.max_rows,
            requests: self.max_requests,
            connections: self.max_connections,
            time: Duration::from_millis(self.timeout_ms),
            idle: Duration::from_secs(self.idle_seconds),
        }
    }
}

impl TrainArgs {
    fn run_dir(&self) -> PathBuf {
        let named = || Path::new("runs").join(self.config.file_stem().unwrap_or(self.config.as_os_str()));
        self.run_dir.clone().unwrap_or_else(named)
    }
}

#[derive(Args)]
struct EvaluateArgs {
    /// What `bireme train` wrote
    #[arg(long, value_name = "RUN")]
    run_dir: PathBuf,
    /// The data to evaluate on
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Which part of the day
    #[arg(long, default_value = Split::Valid.name(), value_parser = split_parser())]
    split: Split,
    /// Which day [default: the one after the last trained on]
    #[arg(long)]
    day: Option<i64>,
    /// Override a key of the run's configuration, as `section.key=value`; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Evaluate what `bireme export` made of the run, in this repository, in place of the checkpoint
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

#[derive(Args)]
struct ReportArgs {
    /// What `bireme train` wrote, for each model; those that only count are the baselines of the others
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The folder to write
    #[arg(long, value_name = "DIR", default_value = "report")]
    out: PathBuf,
    /// Resamples behind each confidence interval
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    resamples: u32,
    /// Replace the report that DIR holds
    #[arg(long)]
    overwrite: bool,
}

#[derive(Args)]
struct ImportArgs {
    /// The state dictionary, as `safetensors.torch.save_file(model.state_dict(), FILE)` writes it
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// The last day that they were trained on
    #[arg(long)]
    day: i64,
    #[command(flatten)]
    run: TrainArgs,
}

#[derive(Args)]
struct DoctorArgs {
    /// The folder whose file system is tried, as that of data and runs
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// What the ranks compute on
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
    /// Also write what was found to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Why a command ends early. Whoever made it knows whether this rank is to speak of it.
struct Failure {
    exit_code: i32,
    /// One message and perhaps a hint; none on a rank whose error another rank tells.
    message: Option<String>,
}

impl From<OutputError> for Failure {
    fn from(error: OutputError) -> Self {
        Self { exit_code: error.exit_code().into(), message: Some(explain(&error, None)) }
    }
}

impl Failure {
    fn refused(error: &dyn Error, hint: Option<&str>) -> Self {
        Self { exit_code: 2, message: Some(explain(error, hint)) }
    }
}

fn explain(error: &dyn Error, hint: Option<&str>) -> String {
    let text = message::chain(error);
    hint.map_or(text.clone(), |hint| format!("{text}\nhint: {hint}"))
}

/// Prints the result of a command.
fn print(text: &str) -> Result<(), Failure> {
    console::print(text).map_err(|error| {
        let message = format!("cannot write to the standard output: {error}");
        Failure { exit_code: 1, message: Some(message) }
    })
}

/// Prints what clap answers to the arguments, help or an error, and returns the exit code.
pub fn answer(answer: &clap::Error) -> i32 {
    let printed = answer.print().and_then(|()| io::stdout().flush());
    match console::unless_closed(printed) {
        Err(error) if !answer.use_stderr() => {
            console::error(&format!("cannot write to the standard output: {error}"));
            1
        }
        _ => answer.exit_code(),
    }
}

/// Runs a command and returns its exit code. A panic is a failed run: exit code 1.
pub fn run(cli: Cli) -> i32 {
    panic::set_hook(Box::new(|panic| console::internal_error("", panic)));
    panic::catch_unwind(AssertUnwindSafe(|| run_command(cli.command))).unwrap_or(1)
}

fn run_command(command: Command) -> i32 {
    // Where libtorch is refused memory it throws, and tch panics: an error like others.
    let done = memory::catch(|| match command {
        Command::Synth(args) => synth(&args),
        Command::Preprocess(args) => preprocess(&args),
        Command::Train(args) => train(&args),
        Command::Evaluate(args) => evaluate(&args),
        Command::Export(args) => export(&args),
        Command::Serve(args) => serve(&args),
        Command::Recommend(args) => recommend(&args),
        Command::ImportWeights(args) => import_weights(&args),
        Command::Report(args) => report(&args),
        Command::Doctor(args) => doctor(&args),
        Command::Bench(args) => bench::bench(&args),
    });
    let done = done.unwrap_or_else(|refused| Err(Failure { exit_code: 1, message: Some(refused) }));
    match done {
        Ok(()) => 0,
        Err(Failure { exit_code, message }) => {
            interrupt::end_if_interrupted();
            if let Some(message) = message {
                console::error(&message);
            }
            exit_code
        }
    }
}

/// Commands whose output a signal leaves as it was.
fn clean_up_on_signals() -> Result<(), Failure> {
    interrupt::clean_up_on_signals().map_err(|error| Failure::refused(&error, None))
}

fn synth(args: &SynthArgs) -> Result<(), Failure> {
    clean_up_on_signals()?;
    let &SynthArgs { events, items, days, seed, ref out } = args;
    let options = SynthOptions { events, items, days, seed };
    options.check().map_err(|error| Failure::refused(&error, None))?;
    let mut sink = Sink::create(out, &mut console::log)?;
    let is_stdout = sink.is_stdout();
    let report = match synth::synth(&options, &mut sink) {
        Ok(report) => report,
        // The reader of the standard output has closed it.
        Err(SynthError::Write(error)) if is_stdout && error.kind() == ErrorKind::BrokenPipe => return Ok(()),
        Err(SynthError::Write(source)) => {
            return Err(OutputError::Io { action: "write", path: out.clone(), source }.into());
        }
        Err(error @ SynthError::Option { .. }) => return Err(Failure::refused(&error, None)),
    };
    sink.publish()?;
    // Not between the rows.
    let print = if is_stdout { console::log } else { console::note };
    print(&report.to_string());
    Ok(())
}

fn preprocess(args: &PreprocessArgs) -> Result<(), Failure> {
    clean_up_on_signals()?;
    let out = args.extend.as_ref().or(args.out.as_ref()).expect("clap asks for one of them");
    let options = etl::PreprocessOptions {
        days: args.days.clone(),
        bad_rows: if args.skip_bad_rows { etl::BadRows::Skip } else { etl::BadRows::Refuse },
        settings: etl::Settings {
            max_length: args.max_length,
            min_length: args.min_length,
            keep: match args.keep {
                KeepArg::First => etl::Keep::First,
                KeepArg::Last => etl::Keep::Last,
            },
            seed: args.seed,
        },
        overwrite: args.overwrite,
        extend: args.extend.is_some(),
        ..etl::PreprocessOptions::new(args.events.clone(), out.clone())
    };
    let report = etl::preprocess(&options, &mut console::log).map_err(|error| Failure {
        exit_code: error.exit_code().into(),
        message: Some(explain(&error, error.hint())),
    })?;
    console::note(&report.to_string());
    Ok(())
}

/// The ranks of a command and its configuration.
struct Job {
    collective: Box<dyn Collective>,
    config: Config,
    place: device::Place,
}

impl Job {
    /// *All ranks.* Joins the job this process was started into.
    fn join(load: impl FnOnce() -> Result<Config, ConfigError>) -> Result<Self, Failure> {
        let choose = || {
            let config = load()?;
            config.check_threads(device::n_cores())?;
            Ok::<_, ConfigError>(((config.run.device, config.run.threads_per_rank), config))
        };
        let (place, collective, config) = join(choose)?;
        if place.device.is_cuda() {
            let is_deterministic = config.run.reduction == Reduction::Reproducible;
            agree(&*collective, device::tune(is_deterministic, config.run.precision), |_| None)?;
        }
        if let Some(watch) = collective.watch() {
            watch.set_limit(Duration::from_secs_f64(config.run.patience_seconds));
        }
        Ok(Self { collective, config, place })
    }

    fn place(&self) -> RankContext<'_> {
        RankContext { collective: &*self.collective, device: self.place.device }
    }

    /// Ends the command as work of all ranks ended on this one. An error that only this rank knows of ends the
    /// whole job at once, as the others may wait for this rank forever.
    fn end<T>(&self, worked: Result<T, TrainError>) -> Result<T, Failure> {
        worked.map_err(|error| {
            let known_to_all = matches!(
                &error,
                TrainError::NotFinite { .. }
                    | TrainError::Desync { .. }
                    | TrainError::Collective(CollectiveError::Rank { .. })
            );
            let message = explain(&error, None);
            if known_to_all || self.collective.world_size() == 1 {
                let message = self.collective.root().map(|_| message);
                return Failure { exit_code: 1, message };
            }
            let (rank, world_size) = (self.collective.rank(), self.collective.world_size());
            let host = collective::host_name();
            let at = self.collective.watch().map_or(String::new(), |watch| format!(", {}", watch.progress()));
            console::error(&format!("{message}: rank {rank} of {world_size} on {host}{at}"));
            self.collective.abort(1)
        })
    }
}

/// *All ranks.* Joins the job this process was started into, on the device and with the threads that `choose` says.
fn join<T, E: Error>(
    choose: impl FnOnce() -> Result<((DeviceChoice, usize), T), E>,
) -> Result<(device::Place, Box<dyn Collective>, T), Failure> {
    device::host::keep_freed_memory();
    let host = collective::join().map_err(|error| Failure::refused(&error, error.hint()))?;
    // The device comes before `agree`, which makes tensors: libtorch looks for GPUs at the first of them.
    let (local_rank, local_size) = (host.local_rank(), host.local_size());
    let chosen = choose()
        .map(|((device, threads), more)| (device::place(device, threads, local_rank, local_size), more));
    let (placed, more) = agree(&*host, chosen, |_| None)?;
    let place = agree(&*host, placed, |error| Some(error.hint()))?;
    let collective =
        collective::on_device(host, place.device).map_err(|error| Failure::refused(&error, error.hint()))?;
    Ok((place, collective, more))
}

/// *All ranks.* What each rank prepared by itself; where one failed, all are refused and rank 0 says why.
fn agree<T, E: Error>(
    collective: &dyn Collective,
    prepared: Result<T, E>,
    hint: impl Fn(&E) -> Option<&'static str>,
) -> Result<T, Failure> {
    let hint = prepared.as_ref().err().and_then(hint);
    collective.agree(prepared).map_err(|error| {
        let message = collective.root().map(|_| explain(&error, hint));
        Failure { exit_code: 2, message }
    })
}

fn train(command: &TrainCommand) -> Result<(), Failure> {
    // First of all: a job that is told to stop while it starts stops after its first step.
    let signals = Signals::listen();
    let args = &command.run;
    let mut job = Job::join(|| Config::load(&args.config, &args.set))?;
    let resolved = job.config.data.resolve_days(&args.data, None);
    let collective = &*job.collective;
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let signals = agree(collective, signals, |_| None)?;
    agree(collective, resolved, |_| None)?;
    let data = agree(collective, Dataset::open(&args.data, &job.config, world_size), TrainError::hint)?;
    agree(collective, data.compare_ranks(collective), |_| None)?;
    let n_sessions = Some(data.n_sessions());
    let fits = check_memory(&job.config, data.features(), job.place(), Purpose::Train, n_sessions);
    agree(collective, fits, TrainError::hint)?;
    let checked = data.check_rows((rank, world_size), job.place.n_threads);
    let mut checked = agree(collective, checked, TrainError::hint)?;
    let run_dir = args.run_dir();
    let to_export = command.export_options();
    let exportable = to_export.as_ref().map_or(Ok(()), |options| export::check(options, &job.config));
    agree(collective, exportable, ExportError::hint)?;
    let opened = collective.root().map(|root| open_run(root, command, &job, &data)).transpose();
    let opened = agree(collective, opened, |_| None)?.unwrap_or_default();
    let Opened { lock: _lock, from, skipped, is_done, is_new } = opened;
    warn_of(&skipped);
    let shared = |error: CollectiveError| Failure { exit_code: 1, message: Some(explain(&error, None)) };
    let mut done_on_root = [u8::from(is_done)];
    collective.reduce(&mut done_on_root, Reduce::Max).map_err(shared)?;
    if done_on_root == [1] {
        if collective.root().is_some() {
            console::log(&format!("`{}` holds this run, and it is done", run_dir.display()));
        }
        return export_on_root(collective, to_export);
    }
    let rows = item_table(&job.config, data.n_items(), collective);
    let from = SharedCheckpoint::new(from, rows, collective).map_err(shared)?;
    let going_on = from.as_ref().map(|from| {
        let state = from.state();
        (from.path().to_owned(), state.position, state.log_bytes)
    });
    // What does not fit is known before anything is changed.
    let training = Training::new(&job.config, &data, job.place(), from);
    let training = agree(collective, training, |_| None)?;
    let begun = collective.root().map_or(Ok(()), |root| begin_run(root, is_new, args, &job));
    agree(collective, begun, |_| None)?;
    let n_bytes = going_on.as_ref().map_or(0, |(_, _, n_bytes)| *n_bytes);
    let mut report = agree(collective, Report::open(collective.root(), &run_dir, n_bytes), |_| None)?;
    let placements = topology::rank_placements(&job.place, collective).map_err(shared)?;
    for warning in job.place.warnings.iter().chain(&topology::warnings(&placements)).chain(data.warnings()) {
        report.say(&format!("warning: {warning}"));
    }
    if world_size > 1 {
        topology::table(&placements).iter().for_each(|line| report.say(line));
    }
    report.say(&format!(
        "{}: ranks {world_size} ({}), device {}, threads a rank {}",
        job.config.title(),
        collective.backend(),
        job.place.device_name(),
        job.place.n_threads,
    ));
    if let Some((path, Position { day, day_step, day_steps, .. }, _)) = &going_on {
        let path = path.display();
        report.say(&format!("going on from `{path}`: day {day}, {day_step} of {day_steps} steps done"));
    }
    let mut n_left = [checked.n_left() as i64];
    collective.sum_i64(&mut n_left).map_err(shared)?;
    if n_left[0] > 0 {
        let [n_left] = n_left;
        report.say(&format!("the rows of the last {n_left} sessions are checked beside the training"));
    }
    checked.continue_in_background();
    let fitted = training.fit(&run_dir, &mut report, &signals, &mut checked);
    match job.end(fitted)? {
        Ended::Done => {
            report.say(&format!("metrics, results and checkpoints are in `{}`", run_dir.display()));
            export_on_root(collective, to_export)
        }
        Ended::Stopped(Position { day, day_step, .. }) => {
            report.say(&format!(
                "stopped on request after day {day}, step {day_step}: the same command, without `--overwrite`, goes on"
            ));
            Err(Failure { exit_code: 3, message: None })
        }
    }
}

fn export_on_root(
    collective: &dyn Collective,
    options: Option<export::ExportOptions>,
) -> Result<(), Failure> {
    match options {
        Some(options) if collective.root().is_some() => write_export(&options),
        _ => Ok(()),
    }
}

fn export(args: &ExportArgs) -> Result<(), Failure> {
    if args.python_backend {
        return Err(Failure::refused(&ExportError::PythonBackend, None));
    }
    clean_up_on_signals()?;
    write_export(&args.options())
}

fn write_export(options: &export::ExportOptions) -> Result<(), Failure> {
    let exported = export::export(options, &mut console::log);
    let Exported { version, n_items, skipped } = exported.map_err(|error: ExportError| Failure {
        exit_code: error.exit_code(),
        message: Some(explain(&error, error.hint())),
    })?;
    warn_of(&skipped);
    let (name, out) = (&options.name, options.out.display());
    console::note(&format!("version {version} of `{name}`, {n_items} items, is in `{out}`"));
    Ok(())
}

/// Checkpoints that are not whole.
fn warn_of(skipped: &[String]) {
    for skipped in skipped {
        console::log(&format!("warning: a checkpoint that is not whole is left aside: {skipped}"));
    }
}

fn serve(args: &ServeArgs) -> Result<(), Failure> {
    let place = args.device.place(args.threads.unwrap_or(0))?;
    logs::start(match args.log {
        LogArg::Text => logs::LogFormat::Text,
        LogArg::Json => logs::LogFormat::Json,
    });
    let options = bireme_serve::ServeOptions {
        repository: args.repository.clone(),
        models: args.models.clone(),
        http: args.http.clone(),
        grpc: args.grpc.clone(),
        api_keys: args.api_keys.clone(),
        limits: args.limits(),
        drain: Duration::from_secs(args.drain_seconds),
        device: place.device,
        n_threads: place.n_threads,
    };
    let tell = |Addresses { http, grpc }| console::note(&format!("http {http}\ngrpc {grpc}"));
    bireme_serve::serve(&options, tell)
        .map_err(|error| Failure { exit_code: error.exit_code(), message: Some(explain(&error, None)) })
}

fn recommend(args: &RecommendArgs) -> Result<(), Failure> {
    clean_up_on_signals()?;
    let options = recommend::RecommendOptions {
        repository: args.repository.clone(),
        name: args.name.clone(),
        events: args.events.clone(),
        bad_rows: if args.skip_bad_rows { etl::BadRows::Skip } else { etl::BadRows::Refuse },
        first: args.first,
        top: args.top.into(),
        exclude_seen: args.exclude_seen,
        device: args.device.place(0)?.device,
    };
    let format = match args.format {
        FormatArg::Table => recommend::RecommendationFormat::Table,
        FormatArg::Json => recommend::RecommendationFormat::Json,
        FormatArg::Csv => recommend::RecommendationFormat::Csv,
        FormatArg::Parquet => recommend::RecommendationFormat::Parquet,
    };
    let done = match &args.out {
        Some(out) if format == recommend::RecommendationFormat::Parquet && is_gzip(out) => {
            let problem = "parquet is compressed already: leave out `.gz`".to_owned();
            return Err(OutputError::Refused { path: out.clone(), problem }.into());
        }
        Some(out) => recommend::to_file(&options, format, out, &mut console::log),
        None => recommend::to_terminal(&options, format),
    };
    let counts =
        done.map_err(|error| Failure { exit_code: error.exit_code(), message: Some(explain(&error, None)) })?;
    if let Some(etl::RowCounts { bad: bad @ 1.., read, .. }) = counts {
        console::log(&format!("warning: {bad} of {read} rows cannot be read and are left out"));
    }
    Ok(())
}

/// Refuses a model that does not fit into memory without its optimizer, on the sessions in `data`.
fn check_memory_to_read(job: &Job, data: &Path) -> Result<(), Failure> {
    let collective = &*job.collective;
    let features = Days::open(data, &job.config.data).map(|days| days.features().clone());
    let features = agree(collective, features, |_| None)?;
    let fits = check_memory(&job.config, &features, job.place(), Purpose::Read, None);
    agree(collective, fits, TrainError::hint)
}

fn evaluate(args: &EvaluateArgs) -> Result<(), Failure> {
    let job = Job::join(|| Config::load(&args.run_dir.join(CONFIG), &args.set))?;
    let collective = &*job.collective;
    let which = (args.day, args.split);
    let device = job.place.device;
    check_memory_to_read(&job, &args.data)?;
    let lock = collective.root().filter(|_| args.save).map(|root| lock_run_dir(root, &args.run_dir));
    let _lock = agree(collective, lock.transpose(), |_| None)?;
    let opened = TrainedRun::open(&args.run_dir, &args.data, &job.config, which, job.place());
    let opened = match &args.exported {
        Some(repository) => opened.and_then(|run| {
            let exported = ScriptedModel::load(repository, &args.name, run.n_items(), device);
            let mismatch = |problem| CheckpointError::Mismatch { path: repository.clone(), problem };
            Ok(run.with_recommender(Box::new(exported.map_err(mismatch)?)))
        }),
        None => opened,
    };
    let run = agree(collective, opened, TrainError::hint)?;
    if collective.root().is_some() {
        warn_of(run.skipped());
    }
    let file = run.evaluation_file(&args.run_dir);
    let writable = if args.save && collective.root().is_some() {
        output::check_folder(&args.run_dir.join(evaluations::EVALUATIONS))
    } else {
        Ok(())
    };
    agree(collective, writable, |_| None)?;
    let taken = args.save && !args.overwrite && collective.root().is_some() && file.exists();
    agree(collective, if taken { Err(RunDirError::Evaluated(file)) } else { Ok(()) }, |_| None)?;
    let save = args.save.then_some(args.run_dir.as_path());
    let record = job.end(run.evaluate(&job.config, save, collective))?;
    if job.collective.root().is_some() {
        print(&serde_json::to_string(&record).expect("a record is JSON"))?;
    }
    Ok(())
}

/// On one rank: a file is read and another written.
fn import_weights(args: &ImportArgs) -> Result<(), Failure> {
    let mut job = Job::join(|| Config::load(&args.run.config, &args.run.set))?;
    let run_dir = args.run.run_dir();
    let days = job.config.data.resolve_days(&args.run.data, Some(args.day));
    agree(&*job.collective, days, |_| None)?;
    check_memory_to_read(&job, &args.run.data)?;
    let Some(root) = job.collective.root() else { return Ok(()) };
    // Read before the run directory is touched, which may hold another run.
    let weights = ImportedWeights::read((&args.weights, args.day), &args.run.data, &job.config)
        .map_err(|error| Failure::refused(&error, error.hint()))?;
    let _lock = lock_run_dir(root, &run_dir).map_err(|error| Failure::refused(&error, None))?;
    prepare_run_dir(root, &run_dir, &args.run, &job).map_err(|error| Failure::refused(&error, None))?;
    weights
        .write(root, &run_dir)
        .map_err(|error| Failure { exit_code: 1, message: Some(explain(&error, None)) })?;
    console::note(&format!("`{}` holds the weights, as if trained to day {}", run_dir.display(), args.day));
    Ok(())
}

fn report(args: &ReportArgs) -> Result<(), Failure> {
    clean_up_on_signals()?;
    let refused = |error: &dyn Error| Failure::refused(error, None);
    let failed = |error: run_reports::WriteError| Failure {
        exit_code: error.exit_code(),
        message: Some(explain(&error, None)),
    };
    let folder =
        run_reports::create(&args.out, &args.runs, args.overwrite, &mut console::log).map_err(failed)?;
    let runs = run_reports::runs::read(&args.runs).map_err(|error| refused(&error))?;
    let comparison = run_reports::compare::compare(&runs, args.resamples).map_err(|error| refused(&error))?;
    run_reports::write(folder, &comparison).map_err(failed)?;
    for warning in &comparison.warnings {
        console::log(&format!("warning: {warning}"));
    }
    print(&args.out.join(run_reports::PAGE).display().to_string())
}

fn doctor(args: &DoctorArgs) -> Result<(), Failure> {
    let (place, collective, ()) =
        join(|| Ok::<_, std::convert::Infallible>(((args.device.choice(), 0), ())))?;
    let usable = collective.root().map_or(Ok(()), |_| findings::check_folder(&args.dir));
    agree(&*collective, usable, |_| None)?;
    let file = args.json.as_ref().filter(|_| collective.root().is_some());
    let file = file.map(|file| OutputFile::create(file, &mut console::log)).transpose();
    let file = agree(&*collective, file, |_| None)?;
    let found = doctor::examine(&place, &args.dir, &*collective)
        .map_err(|error| Failure { exit_code: 1, message: Some(explain(&error, None)) })?;
    if collective.root().is_some() {
        for advice in &found.advice {
            console::log(&format!("warning: {advice}"));
        }
        if let (Some(mut file), Some(path)) = (file, &args.json) {
            let json = serde_json::to_string_pretty(&found).expect("numbers and words are JSON");
            let failed = |source| OutputError::Io { action: "write", path: path.clone(), source };
            file.write_all(json.as_bytes()).map_err(failed)?;
            file.publish()?;
        }
        print(&found.lines.join("\n"))?;
    }
    Ok(())
}
