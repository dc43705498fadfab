//! Arguments in, exit code out.

use clap::Parser;

fn main() {
    // SAFETY: there is no other thread yet.
    unsafe { bireme::device::set_environment() };
    std::process::exit(bireme::cli::run(bireme::cli::Cli::parse()));
}
