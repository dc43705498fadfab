//! A [`Scaling`] as a folder.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::predict::Prediction;
use super::{Growth, Point, Scaling, ScalingError, io_at};
use crate::config::TableLayout;
use crate::report::{self, Line};

/// The file to read first.
pub const TABLE: &str = "scaling.md";

/// What steps are made of, in the order of a step.
const PHASES: [&str; 9] =
    ["data", "forward", "loss", "backward", "waiting", "communication", "optimizer", "records", "hidden"];

/// Writes `scaling.md`, `scaling.json`, `scaling.svg` and `scaling.png`.
///
/// # Errors
/// The disk is full, say.
pub(super) fn write(out: &Path, scaling: &Scaling) -> Result<(), ScalingError> {
    let chart =
        report::rates("scaling", &format!("Training, {}", scaling.title), &ranks(scaling), &lines(scaling))?;
    let json = serde_json::to_string_pretty(scaling).expect("numbers and words are JSON");
    let files = [
        (TABLE, markdown(scaling).into_bytes()),
        ("scaling.json", json.into_bytes()),
        ("scaling.svg", chart.svg.into_bytes()),
        ("scaling.png", chart.png),
    ];
    for (name, content) in files {
        let path = out.join(name);
        io_at(&path, fs::write(&path, content))?;
    }
    Ok(())
}

fn ranks(scaling: &Scaling) -> Vec<usize> {
    let mut ranks: Vec<usize> = scaling.points.iter().map(|point| point.ranks).collect();
    ranks.dedup();
    ranks
}

/// A line for each way to grow, and one of what would be twice as much on twice as many.
fn lines(scaling: &Scaling) -> Vec<Line> {
    let ranks = ranks(scaling);
    let alone = &scaling.points[0];
    let ideal = ranks.iter().map(|&n| Some(n as f64 * alone.sessions_per_s)).collect();
    let mut lines = vec![Line { label: "ideal".to_owned(), is_dashed: true, values: ideal }];
    for growth in [Growth::Strong, Growth::Weak] {
        for item_table in [TableLayout::Replicated, TableLayout::Sharded] {
            let of = |n: usize| {
                let is = |point: &&Point| {
                    point.ranks == n && (n == 1 || (point.growth, point.item_table) == (growth, item_table))
                };
                scaling.points.iter().find(is).map(|point| point.sessions_per_s)
            };
            let values: Vec<_> = ranks.iter().map(|&n| of(n)).collect();
            // All begin with the one rank.
            if values.iter().flatten().count() > 1 || ranks.len() == 1 {
                let label = format!("{}, {}", growth.name(), item_table.name());
                lines.push(Line { label, is_dashed: false, values });
            }
        }
    }
    lines
}

fn markdown(scaling: &Scaling) -> String {
    let Scaling { title, device, threads_per_rank, points, model, predictions } = scaling;
    let threads = match threads_per_rank {
        0 => String::new(),
        n => format!(", threads a rank {n}"),
    };
    let mut text = format!(
        "# Scaling of {title}\n\n{device}{threads}, {:.0} items. Strong: ranks share a step's sessions; weak: each has as many as \
         one rank alone. Efficiency is beside as many single ranks; predicted steps are the model's below.\n\n",
        model.n_items
    );
    let head = "| | item table | ranks | sessions a step | sessions/s | efficiency | ms a step | predicted | evaluated/s |";
    let _ = writeln!(text, "{head} {} |", PHASES.join(" | "));
    let _ = writeln!(text, "| --- | --- |{}", " ---: |".repeat(7 + PHASES.len()));
    for point in points {
        let Point { ranks, growth, item_table, global_batch, step_seconds, sessions_per_s, .. } = point;
        let ms = |seconds: f64| format!("{:.1}", seconds * 1e3);
        let phases =
            PHASES.map(|name| point.phases.get(name).map_or("–".to_owned(), |&seconds| ms(seconds)));
        let _ = writeln!(
            text,
            "| {} | {} | {ranks} | {global_batch} | {sessions_per_s:.0} | {:.0} % | {} | {} | {:.0} | {} |",
            growth.name(),
            item_table.name(),
            100.0 * point.efficiency,
            ms(*step_seconds),
            ms(point.predicted_seconds),
            point.evaluated_per_s,
            phases.join(" | ")
        );
    }
    let link =
        |of: super::predict::Link| format!("{:.1} µs, {:.2} GB/s", of.latency * 1e6, of.bytes_per_s / 1e9);
    let _ = write!(
        text,
        "\nPhases are rank 0's, ms in a step, each its median.\n\n![sessions a second](scaling.svg)\n\n## Predicted\n\n\
         {:.0} sessions a step for each rank, {:.1} events and {:.1} targets a session, vectors of {:.0} numbers. Between \
         ranks {}; nodes of {:.0} ranks, between them {}. The model assumes that arithmetic grows in a straight line with a \
         rank's sessions, the loss also with the catalogue, the optimizer with a rank's parameters; that sums go round a ring or \
         through a tree, first within nodes; that nothing is hidden behind arithmetic, and no rank is late.\n\n\
         | items | item table | ranks | sessions/s | efficiency | ms a step | communication | GiB a rank |\n\
         | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        model.sessions,
        model.events,
        model.targets,
        model.width,
        link(model.within),
        model.ranks_per_node,
        link(model.across)
    );
    for Prediction { job, step_seconds, communication, sessions_per_s, efficiency, bytes_per_rank } in
        predictions
    {
        let _ = writeln!(
            text,
            "| {:.0} | {} | {} | {sessions_per_s:.0} | {:.0} % | {:.1} | {:.0} % | {:.2} |",
            job.n_items,
            job.item_table.name(),
            job.ranks,
            100.0 * efficiency,
            step_seconds * 1e3,
            100.0 * communication,
            bytes_per_rank / f64::from(1 << 30)
        );
    }
    text.push_str(
        "\nParameters, gradients and moments alone are counted as a rank's memory.\n\n## Commands\n\n",
    );
    points.iter().for_each(|point| {
        let _ = writeln!(text, "    {}", point.command);
    });
    text
}
