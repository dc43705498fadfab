//! `preprocess --events FILE... --out DIR` without libtorch, timed by `benches/etl.py`.
//!
//! `cargo build --release -p bireme-etl --example preprocess`

use std::process::ExitCode;

use bireme_base::user_error::UserError;
use bireme_etl::{PreprocessOptions, preprocess};

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (events, out) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["preprocess", "--events", ref events @ .., "--out", out] if !events.is_empty() => {
            (events.iter().map(Into::into).collect(), out.into())
        }
        _ => {
            eprintln!("usage: preprocess preprocess --events FILE... --out DIR");
            return ExitCode::from(2);
        }
    };
    let began = std::time::Instant::now();
    let mut progress = |line: &str| eprintln!("{:8.2} s  {line}", began.elapsed().as_secs_f64());
    match preprocess(&PreprocessOptions::new(events, out), &mut progress) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(error.exit_code())
        }
    }
}
