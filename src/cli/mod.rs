//! The command line, with one file for each subcommand.

mod args;
mod bench;
mod doctor;
mod evaluate;
mod export;
mod failure;
mod import_weights;
mod interrupt;
mod job;
mod preprocess;
mod recommend;
mod report;
mod serve;
mod synth;
mod train;

use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};

use bireme_base::console;
use bireme_base::user_error::FAILED;
use clap::{Parser, Subcommand};

use crate::device::memory;
use failure::Failure;

/// Trains session-based recommenders on many GPUs.
///
/// Exit codes: 0 done; 1 the run failed; 2 refused before starting; 3 stopped on request after a
/// checkpoint.
#[derive(Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate synthetic events in the format of the REES46 data
    Synth(synth::SynthArgs),
    /// Convert shop events to sessions by day, a fitted workflow and a schema
    Preprocess(preprocess::PreprocessArgs),
    /// Train day by day and evaluate on the following day; alone, or under `mpirun` or `srun`
    Train(train::TrainArgs),
    /// Evaluate the newest checkpoint of a run; alone, or under `mpirun` or `srun`
    Evaluate(evaluate::EvaluateArgs),
    /// Write the model of a run into a model repository, for Triton or `bireme serve`
    Export(export::ExportArgs),
    /// Serve a model repository over HTTP and gRPC, as Triton does
    Serve(serve::ServeArgs),
    /// Recommend items for the sessions of a file
    Recommend(recommend::RecommendArgs),
    /// Create a run from weights saved by Transformers4Rec
    ImportWeights(import_weights::ImportArgs),
    /// Compare runs in tables, charts and a page, with confidence intervals
    Report(report::ReportArgs),
    /// Check the machine: devices, arithmetic, communication, file system, clocks; alone, or under
    /// `mpirun` or `srun`
    Doctor(doctor::DoctorArgs),
    /// Measure how training scales with the number of ranks
    Bench(bench::BenchArgs),
}

/// Prints help or an error of the argument parser and returns the exit code.
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

/// Runs a command and returns its exit code. A panic is a failed run.
pub fn run(cli: Cli) -> i32 {
    panic::set_hook(Box::new(|panic| {
        if !console::expects_panics() {
            console::internal_error("", panic);
        }
    }));
    panic::catch_unwind(AssertUnwindSafe(|| run_command(&cli.command))).unwrap_or(FAILED)
}

fn run_command(command: &Command) -> i32 {
    // Where libtorch is refused memory it throws, and tch panics: an error like others.
    let done = memory::catch(|| match command {
        Command::Synth(args) => synth::run(args),
        Command::Preprocess(args) => preprocess::run(args),
        Command::Train(args) => train::run(args),
        Command::Evaluate(args) => evaluate::run(args),
        Command::Export(args) => export::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Recommend(args) => recommend::run(args),
        Command::ImportWeights(args) => import_weights::run(args),
        Command::Report(args) => report::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Bench(args) => bench::run(args),
    });
    let out_of_memory = |message| Err(Failure { exit_code: FAILED, message: Some(message) });
    match done.unwrap_or_else(out_of_memory) {
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

fn warn_of_skipped(checkpoints: &[String]) {
    for skipped in checkpoints {
        console::log(&format!("warning: skipped an incomplete checkpoint: {skipped}"));
    }
}
