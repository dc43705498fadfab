//! Measures how fast day partitions become batches.
//!
//! `cargo bench --bench data -- CONFIG DATA [RUNS]` reads the train sessions of the first day as a
//! single rank does, once unmeasured and then RUNS times (5 by default), and prints the median
//! sessions per second, with the least and the largest.

use std::process::ExitCode;
use std::time::Instant;

use bireme::config::Config;
use bireme::data::plan::StepShape;
use bireme::data::{DayPlan, Days, Loader, Split, Window};

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn main() -> ExitCode {
    // `cargo bench` appends `--bench`.
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let (config, data, runs) = match &arguments[..] {
        [config, data] => (config, data, 5),
        [config, data, runs] if runs.parse::<usize>().is_ok_and(|runs| runs > 0) => {
            (config, data, runs.parse().unwrap_or(5))
        }
        _ => {
            eprintln!("usage: cargo bench --bench data -- CONFIG DATA [RUNS]");
            return ExitCode::from(2);
        }
    };
    match rates(config, data, runs) {
        Ok(mut rates) => {
            rates.sort_by(f64::total_cmp);
            let (least, median, most) = (rates[0], rates[rates.len() / 2], rates[rates.len() - 1]);
            println!("{median:.0} sessions/s ({least:.0} to {most:.0})");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(1)
        }
    }
}

fn rates(config: &str, data: &str, runs: usize) -> Result<Vec<f64>, Box<dyn std::error::Error>> {
    let config = Config::load(config.as_ref(), &[])?;
    tch::set_num_threads(1);
    let days = Days::open(data.as_ref(), &config.data)?;
    let day = config.data.first_day.unwrap_or(1);
    let train = &config.train;
    let plan = DayPlan {
        window: Window::new(vec![days.file(day, Split::Train)?.into()]),
        day,
        n_epochs: 1,
        shape: StepShape {
            n_streams: train.global_batch / train.micro_batch,
            micro_batch: train.micro_batch,
        },
        seed: config.run.seed,
        order: config.train.order,
        max_steps: None,
        one_batch_each: false,
        reads_ahead: false,
    };
    let mut rates = Vec::new();
    for _ in 0..=runs {
        let begun = Instant::now();
        let mut n_sessions = 0;
        for passes in Loader::start(&plan, days.features(), (0, 1), 0) {
            n_sessions += passes?.iter().map(|batch| batch.n_sessions()).sum::<usize>();
        }
        rates.push(n_sessions as f64 / begun.elapsed().as_secs_f64());
    }
    rates.remove(0);
    Ok(rates)
}
