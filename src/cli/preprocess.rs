//! `bireme preprocess`.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use bireme_base::console;
use clap::Args;

use super::failure::Failure;
use super::interrupt::clean_up_on_signals;
use crate::etl;

#[derive(Args)]
pub(super) struct PreprocessArgs {
    /// Events: CSV, plain or compressed, or parquet; `-` is standard input; several files are read
    /// in order
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    events: Vec<PathBuf>,
    /// Output folder
    #[arg(long, value_name = "DIR", required_unless_present = "extend")]
    out: Option<PathBuf>,
    /// Add the sessions of later days to the output of an earlier run: existing ids, means and
    /// deviations are kept, new values get the next ids
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["out", "max_length", "min_length", "keep", "seed", "overwrite"]
    )]
    extend: Option<PathBuf>,
    /// Use only the events of these days: calendar days in UTC, day 1 has the first event
    #[arg(long, value_name = "A..B", value_parser = parse_days)]
    days: Option<RangeInclusive<i64>>,
    /// Leave out and count bad rows
    #[arg(long)]
    skip_bad_rows: bool,
    /// Maximum number of events of a session
    #[arg(long, default_value_t = etl::Settings::default().max_length)]
    max_length: usize,
    /// Minimum number of events of a session; shorter sessions are left out
    #[arg(long, default_value_t = etl::Settings::default().min_length)]
    min_length: usize,
    /// Events to keep of a longer session
    #[arg(long, value_enum, default_value_t = etl::Keep::First)]
    keep: etl::Keep,
    /// Seed of the hash that splits sessions into train, valid and test
    #[arg(long, default_value_t = etl::Settings::default().seed)]
    seed: u64,
    /// Replace the output of an earlier run in DIR
    #[arg(long)]
    overwrite: bool,
}

impl PreprocessArgs {
    fn options(&self) -> etl::PreprocessOptions {
        let out = self.extend.as_ref().or(self.out.as_ref()).expect("clap asks for one of them");
        etl::PreprocessOptions {
            days: self.days.clone(),
            bad_rows: if self.skip_bad_rows { etl::BadRows::Skip } else { etl::BadRows::Refuse },
            settings: etl::Settings {
                max_length: self.max_length,
                min_length: self.min_length,
                keep: self.keep,
                seed: self.seed,
            },
            overwrite: self.overwrite,
            extend: self.extend.is_some(),
            ..etl::PreprocessOptions::new(self.events.clone(), out.clone())
        }
    }
}

fn parse_days(text: &str) -> Result<RangeInclusive<i64>, String> {
    let parsed = text.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..=b.parse().ok()?));
    parsed.ok_or_else(|| "days are written as `A..B`, both included".to_owned())
}

pub(super) fn run(args: &PreprocessArgs) -> Result<(), Failure> {
    clean_up_on_signals()?;
    let report = etl::preprocess(&args.options(), &mut console::log)?;
    console::note(&report.to_string());
    Ok(())
}
