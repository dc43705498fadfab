//! `bireme synth`.

use std::io::ErrorKind;
use std::path::PathBuf;

use bireme_base::console;
use bireme_base::output::OutputError;
use bireme_tools::sink::Sink;
use bireme_tools::synth::{self, SynthError, SynthOptions};
use clap::Args;

use super::failure::Failure;
use super::interrupt::clean_up_on_signals;

#[derive(Args)]
pub(super) struct SynthArgs {
    /// Number of events
    #[arg(long, default_value_t = 300_000)]
    events: u64,
    /// Number of items on the last day
    #[arg(long, default_value_t = 2_000)]
    items: u32,
    /// Number of days
    #[arg(long, default_value_t = 5)]
    days: u32,
    /// Seed; the same options and seed give the same bytes
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Output CSV file; gzip if it ends in `.gz`; `-` is standard output
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(super) fn run(args: &SynthArgs) -> Result<(), Failure> {
    clean_up_on_signals()?;
    let &SynthArgs { events, items, days, seed, ref out } = args;
    let options = SynthOptions { events, items, days, seed };
    options.check()?;
    let mut sink = Sink::create(out, &mut console::log)?;
    let is_stdout = sink.is_stdout();
    let report = match synth::synth(&options, &mut sink) {
        Ok(report) => report,
        // The reader of the standard output has closed it.
        Err(SynthError::Write(error)) if is_stdout && error.kind() == ErrorKind::BrokenPipe => {
            return Ok(());
        }
        Err(SynthError::Write(source)) => {
            return Err(OutputError::Io { action: "write", path: out.clone(), source }.into());
        }
        Err(error) => return Err(error.into()),
    };
    sink.publish()?;
    // The rows are on the standard output: keep the report apart from them.
    let print = if is_stdout { console::log } else { console::note };
    print(&report.to_string());
    Ok(())
}
