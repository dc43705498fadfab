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
    /// Run training on several numbers of ranks, with the ranks sharing a step's sessions (strong
    /// scaling) and with as many sessions for each (weak scaling), and predict more ranks and
    /// larger catalogues; not under `mpirun`, which it starts
    Scaling(ScalingArgs),
}

#[derive(Args)]
struct ScalingArgs {
    /// The run's TOML file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// What `bireme preprocess` wrote
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Override a key of the configuration, as `section.key=value`; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Numbers of ranks; one rank is measured in any case
    #[arg(long, value_name = "N,N...", value_delimiter = ',', default_value = "1,2")]
    ranks: Vec<usize>,
    /// Who holds the item table
    #[arg(
        long,
        value_delimiter = ',',
        default_values = ITEM_TABLES.map(TableLayout::name),
        value_parser = by_name(ITEM_TABLES, TableLayout::name)
    )]
    item_tables: Vec<TableLayout>,
    /// What starts the ranks
    #[arg(long, value_enum, default_value_t = Launcher::Mpirun)]
    launcher: Launcher,
    /// The hosts to start them on, as `mpirun --hostfile` takes them
    #[arg(long, value_name = "FILE", conflicts_with_all = ["across_gbps", "across_us"])]
    hosts: Option<PathBuf>,
    /// Steps of each run that count
    #[arg(long, value_name = "N", default_value_t = 30)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// In predictions: ranks of a node
    #[arg(long, value_name = "N", default_value_t = 8)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    ranks_per_node: u32,
    /// In predictions: bandwidth of a rank to another node, in GB/s [default: as measured between
    /// the ranks]
    #[arg(long, value_name = "GB/S", requires = "across_us", value_parser = positive)]
    across_gbps: Option<f64>,
    /// In predictions: latency to another node, in microseconds
    #[arg(long, value_name = "US", requires = "across_gbps", value_parser = positive)]
    across_us: Option<f64>,
    /// The folder to write
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
