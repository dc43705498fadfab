//! `bireme bench`: measurements of this machine, with the program as its users run it.

use std::path::PathBuf;

use bireme_base::console;
use bireme_tools::launch::{Launch, Launcher};
use bireme_tools::scaling::TABLE;
use bireme_tools::scaling::predict::Link;
use clap::{Args, Subcommand};

use super::args::by_name;
use super::failure::{Failure, SystemError};
use super::interrupt::clean_up_on_signals;
use crate::config::TableLayout;
use crate::scaling::{self, ScalingOptions};

const ITEM_TABLES: [TableLayout; 2] = [TableLayout::Replicated, TableLayout::Sharded];

#[derive(Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Train on several numbers of ranks, with a fixed number of sessions per step (strong scaling)
    /// and per rank (weak scaling), and predict more ranks and larger catalogues. Starts `mpirun`
    /// itself
    Scaling(ScalingArgs),
}

#[derive(Args)]
struct ScalingArgs {
    /// Configuration of the run, TOML
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Output of `bireme preprocess`
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Override a key of the configuration, as `section.key=value`; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Numbers of ranks; one rank is always measured
    #[arg(long, value_name = "N,N...", value_delimiter = ',', default_value = "1,2")]
    ranks: Vec<usize>,
    /// Layout of the item table
    #[arg(
        long,
        value_delimiter = ',',
        default_values = ITEM_TABLES.map(TableLayout::name),
        value_parser = by_name(ITEM_TABLES, TableLayout::name)
    )]
    item_tables: Vec<TableLayout>,
    /// Launcher of the ranks
    #[arg(long, value_enum, default_value_t = Launcher::Mpirun)]
    launcher: Launcher,
    /// Hosts of the ranks, in the format of `mpirun --hostfile`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["across_gbps", "across_us"])]
    hosts: Option<PathBuf>,
    /// Measured steps of each run
    #[arg(long, value_name = "N", default_value_t = 30)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Ranks per node in predictions
    #[arg(long, value_name = "N", default_value_t = 8)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    ranks_per_node: u32,
    /// Bandwidth between nodes per rank in predictions, in GB/s [default: measured between the
    /// ranks]
    #[arg(long, value_name = "GB/S", requires = "across_us", value_parser = positive)]
    across_gbps: Option<f64>,
    /// Latency between nodes in predictions, in microseconds
    #[arg(long, value_name = "US", requires = "across_gbps", value_parser = positive)]
    across_us: Option<f64>,
    /// Output folder
    #[arg(long, value_name = "DIR", default_value = "scaling")]
    out: PathBuf,
}

fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if number > 0.0 && number.is_finite() { Ok(number) } else { Err("not above zero".to_owned()) }
}

impl ScalingArgs {
    fn options(&self) -> Result<ScalingOptions, SystemError> {
        let program = std::env::current_exe().map_err(SystemError::refused("find this program"))?;
        Ok(ScalingOptions {
            config: self.config.clone(),
            data: self.data.clone(),
            set: self.set.clone(),
            ranks: self.ranks.clone(),
            item_tables: self.item_tables.clone(),
            launch: Launch { launcher: self.launcher, hosts: self.hosts.clone(), program },
            steps: self.steps as usize,
            ranks_per_node: self.ranks_per_node as usize,
            across: (self.across_gbps.zip(self.across_us))
                .map(|(gbps, us)| Link { latency: us * 1e-6, bytes_per_s: gbps * 1e9 }),
            out: self.out.clone(),
        })
    }
}

pub(super) fn run(args: &BenchArgs) -> Result<(), Failure> {
    clean_up_on_signals()?;
    let Bench::Scaling(args) = &args.bench;
    let options = args.options()?;
    scaling::scaling(&options, &mut console::log)?;
    console::note(&options.out.join(TABLE).display().to_string());
    Ok(())
}
