//! Arguments in, exit code out.

use clap::Parser;

fn main() {
    std::process::exit(bireme::cli::run(bireme::cli::Cli::parse()));
}
