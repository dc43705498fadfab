//! Writes a [`Scaling`] as a folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::gpu::GpuEstimate;
use super::predict::{Link, Prediction};
use super::{Growth, Scaling, ScalingPoint, TableLayout};
use crate::report::plot::{self, ChartError, RateLine};
use crate::table::{self, Align, markdown_text};

/// The tables; the other files are `scaling.json` and `scaling.svg`.
pub const TABLE: &str = "scaling.md";

/// In the order of a step.
const PHASES: [&str; 9] = [
    "data",
    "forward",
    "loss",
    "backward",
    "waiting",
    "communication",
    "optimizer",
    "records",
    "hidden",
];

#[derive(Debug, thiserror::Error)]
pub enum ScalingWriteError {
    #[error("cannot write `{path}`")]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Chart(#[from] ChartError),
}

/// Writes `scaling.md`, `scaling.json` and `scaling.svg`.
///
/// # Errors
/// Returns an error if a write fails.
pub fn write(folder: &Path, scaling: &Scaling) -> Result<(), ScalingWriteError> {
    let title = format!("Training, {}", scaling.title);
    let chart = plot::rates("scaling", &title, &numbers_of_ranks(scaling), &lines(scaling))?;
    let json = serde_json::to_string_pretty(scaling).expect("numbers and words are JSON");
    for (name, text) in
        [(TABLE, markdown(scaling)), ("scaling.json", json), ("scaling.svg", chart.svg)]
    {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|source| ScalingWriteError::Io { path, source })?;
    }
    Ok(())
}

/// Ascending.
fn numbers_of_ranks(scaling: &Scaling) -> Vec<usize> {
    let mut ranks: Vec<usize> = scaling.points.iter().map(|point| point.ranks).collect();
    ranks.dedup();
    ranks
}

/// A line per growth and holding of the table, and one proportional to the ranks.
fn lines(scaling: &Scaling) -> Vec<RateLine> {
    let ranks = numbers_of_ranks(scaling);
    let alone = &scaling.points[0];
    let ideal = ranks.iter().map(|&n| Some(n as f64 * alone.sessions_per_s)).collect();
    let mut lines = vec![RateLine { label: "ideal".to_owned(), is_dashed: true, values: ideal }];
    for growth in [Growth::Strong, Growth::Weak] {
        for item_table in [TableLayout::Replicated, TableLayout::Sharded] {
            let rate = |n: usize| {
                let is_on_line = |point: &&ScalingPoint| {
                    // All lines start at the single rank.
                    let is_kind =
                        n == 1 || (point.growth, point.item_table) == (growth, item_table);
                    point.ranks == n && is_kind
                };
                scaling.points.iter().find(is_on_line).map(|point| point.sessions_per_s)
            };
            let values: Vec<_> = ranks.iter().map(|&n| rate(n)).collect();
            if values.iter().flatten().count() > 1 || ranks.len() == 1 {
                let label = format!("{}, {}", growth.name(), item_table.name());
                lines.push(RateLine { label, is_dashed: false, values });
            }
        }
    }
    lines
}

fn markdown(scaling: &Scaling) -> String {
    let Scaling { title, device, threads_per_rank, points, model, predictions, gpu_estimates } =
        scaling;
    let threads = match threads_per_rank {
        0 => String::new(),
        n => format!(", {n} threads per rank"),
    };
    let link =
        |link: Link| format!("{:.1} µs, {:.2} GB/s", link.latency * 1e6, link.bytes_per_s / 1e9);
    let commands: String = points.iter().map(|point| format!("    {}\n", point.command)).collect();
    format!(
        "# Scaling of {}\n\n\
         {device}{threads}, {:.0} items. Strong: the ranks divide the sessions of a step; weak: \
         each rank has as many sessions as the single rank. Efficiency is relative to as many \
         independent single ranks; predicted step times are those of the model below.\n\n\
         {}\n\
         Times are in ms per step. Phases are medians of rank 0.\n\n\
         ![sessions/s](scaling.svg)\n\n\
         ## Predicted\n\n\
         {:.0} sessions per step and rank, {:.1} events and {:.1} targets per session, item \
         vectors of width {:.0}. Between ranks {}; {:.0} ranks per node; between nodes {}. The \
         model assumes that arithmetic is linear in the sessions per rank, the loss also in the \
         catalogue, and the optimizer in the parameters per rank; that an all-reduce takes a ring \
         or a tree, first within nodes; that no communication overlaps with arithmetic, and that \
         no rank is late.\n\n\
         {}\n\
         Memory is that of parameters, gradients and moments.\n\n\
         {}\
         ## Commands\n\n\
         {commands}",
        markdown_text(title),
        model.n_items,
        measured_table(points),
        model.sessions,
        model.events,
        model.targets,
        model.width,
        link(model.within),
        model.ranks_per_node,
        link(model.across),
        predicted_table(predictions),
        estimated_on_gpus(gpu_estimates),
    )
}

/// A section on GPUs, or nothing.
fn estimated_on_gpus(estimates: &[GpuEstimate]) -> String {
    if estimates.is_empty() {
        return String::new();
    }
    let row = |estimate: &GpuEstimate| {
        vec![
            format!("{:.0}", estimate.job.n_items),
            estimate.job.ranks.to_string(),
            format!("{:.2}", estimate.step_seconds * 1e3),
            format!("{:.0}", estimate.sessions_per_s),
        ]
    };
    let columns = ["items", "GPUs", "ms per step", "sessions/s"].map(|name| (name, Align::Right));
    let rows: Vec<Vec<String>> = estimates.iter().map(row).collect();
    format!(
        "## Estimated on H200 GPUs\n\n\
         From the launches, operations and bytes that a step of this model queues on a GPU, and \
         the rates of the device, NVLink within nodes of 8 and 50 GB/s between them. Not \
         measured.\n\n\
         {}\n",
        table::markdown(&columns, &rows)
    )
}

fn measured_table(points: &[ScalingPoint]) -> String {
    let numbers = [
        "ranks",
        "sessions per step",
        "sessions/s",
        "efficiency",
        "step",
        "predicted",
        "evaluated/s",
    ];
    let mut columns = vec![("scaling", Align::Left), ("item table", Align::Left)];
    columns.extend(numbers.iter().chain(&PHASES).map(|&name| (name, Align::Right)));
    let ms = |seconds: f64| format!("{:.1}", seconds * 1e3);
    let row = |point: &ScalingPoint| {
        let mut cells = vec![
            point.growth.name().to_owned(),
            point.item_table.name().to_owned(),
            point.ranks.to_string(),
            point.global_batch.to_string(),
            format!("{:.0}", point.sessions_per_s),
            format!("{:.0} %", 100.0 * point.efficiency),
            ms(point.step_seconds),
            ms(point.predicted_seconds),
            format!("{:.0}", point.evaluated_per_s),
        ];
        let phase = |name| point.phases.get(name).map_or("–".to_owned(), |&seconds| ms(seconds));
        cells.extend(PHASES.map(phase));
        cells
    };
    table::markdown(&columns, &points.iter().map(row).collect::<Vec<_>>())
}

fn predicted_table(predictions: &[Prediction]) -> String {
    let columns = [
        ("items", Align::Right),
        ("item table", Align::Left),
        ("ranks", Align::Right),
        ("sessions/s", Align::Right),
        ("efficiency", Align::Right),
        ("ms per step", Align::Right),
        ("communication", Align::Right),
        ("GiB per rank", Align::Right),
    ];
    let row = |prediction: &Prediction| {
        vec![
            format!("{:.0}", prediction.job.n_items),
            prediction.job.item_table.name().to_owned(),
            prediction.job.ranks.to_string(),
            format!("{:.0}", prediction.sessions_per_s),
            format!("{:.0} %", 100.0 * prediction.efficiency),
            format!("{:.1}", prediction.step_seconds * 1e3),
            format!("{:.0} %", 100.0 * prediction.communication),
            format!("{:.2}", prediction.bytes_per_rank / f64::from(1 << 30)),
        ]
    };
    table::markdown(&columns, &predictions.iter().map(row).collect::<Vec<_>>())
}
