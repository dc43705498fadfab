//! The charts of a report, as descriptions for [`super::plot`].

use super::bootstrap::Estimate;
use super::compare::{Comparison, SessionGroup};
use super::plot::{
    Axis, COLOURS, Chart, ChartError, Mark, Plot, PlotPoint, Series, WIDTH, colour, highest,
    render, shortened,
};
use crate::measure::Measure;

/// Width of a model's bars with their name, in pixels.
const BARS_WIDTH: i32 = 190;

/// Longer names below bars are shortened.
const BARS_LETTERS: usize = 22;

/// All charts of a report.
///
/// # Errors
/// Returns an error of the drawing library.
pub(super) fn charts(comparison: &Comparison) -> Result<Vec<Chart>, ChartError> {
    let plots = [
        bars(comparison, "ndcg", "NDCG", [Measure::NdcgAt10, Measure::NdcgAt20]),
        bars(comparison, "recall", "Recall", [Measure::RecallAt10, Measure::RecallAt20]),
        by_day(comparison, "ndcg_by_day", Measure::NdcgAt20),
        by_day(comparison, "recall_by_day", Measure::RecallAt20),
        by_group(
            comparison,
            "recall_by_target_support",
            "support of the target",
            "support (occurrences in training) of targets that are new to their session",
            &comparison.by_target_support,
        ),
        by_group(
            comparison,
            "recall_by_known_events",
            "number of known events",
            "known events of the session",
            &comparison.by_known_events,
        ),
        by_group(
            comparison,
            "recall_by_popularity",
            "popularity of the held-out item",
            "popularity decile of the held-out item (1: most popular in training)",
            &comparison.by_popularity_decile,
        ),
    ];
    plots.into_iter().chain(learning_curves(comparison)).map(render).collect()
}

/// Two measures of every run on the last evaluation.
fn bars(comparison: &Comparison, name: &'static str, of: &str, measures: [Measure; 2]) -> Plot {
    const BAR: f64 = 0.34;
    let last = comparison.last();
    let colours = [COLOURS[5], COLOURS[0]];
    let series = measures.into_iter().zip([-BAR / 2.0, BAR / 2.0]).zip(colours);
    let series: Vec<Series> = series
        .map(|((measure, offset), colour)| Series {
            label: measure.title().to_owned(),
            colour,
            mark: Mark::Bar(BAR),
            points: last
                .runs
                .iter()
                .enumerate()
                .filter_map(|(i, run)| {
                    plot_point(i as f64 + 0.5 + offset, run.estimates.get(measure))
                })
                .collect(),
        })
        .collect();
    Plot {
        name,
        title: format!("{of} on {}", last.name()),
        x_title: "model".to_owned(),
        y_title: format!("{of} (mean and 95 % interval)"),
        x: Axis::Categories(
            last.runs.iter().map(|run| shortened(short_name(&run.label), BARS_LETTERS)).collect(),
        ),
        y: 0.0..highest(&series),
        series,
        width: (BARS_WIDTH * last.runs.len() as i32 + 100).max(WIDTH),
    }
}

/// One measure of every run on the valid parts of all days.
fn by_day(comparison: &Comparison, name: &'static str, measure: Measure) -> Plot {
    let days: Vec<_> = comparison.evaluations.iter().filter(|part| part.split == "valid").collect();
    let series = lines(comparison, |run| {
        days.iter().map(|day| day.runs[run].estimates.get(measure)).collect()
    });
    let title = measure.title();
    Plot {
        name,
        title: format!("{title} by day"),
        x_title: "day evaluated on (trained up to the day before)".to_owned(),
        y_title: format!("{title} (mean and 95 % interval)"),
        x: Axis::Categories(days.iter().map(|day| day.eval_day.to_string()).collect()),
        y: 0.0..highest(&series),
        series,
        width: WIDTH,
    }
}

/// Recall@20 of every run on groups of sessions.
fn by_group(
    comparison: &Comparison,
    name: &'static str,
    by: &str,
    x_title: &str,
    groups: &[SessionGroup],
) -> Plot {
    let measure = Measure::RecallAt20;
    let series =
        lines(comparison, |run| groups.iter().map(|group| group.runs[run].get(measure)).collect());
    let last = comparison.last();
    Plot {
        name,
        title: format!("{} by {by}, {}", measure.title(), last.name()),
        x_title: x_title.to_owned(),
        y_title: format!("{} (mean and 95 % interval)", measure.title()),
        x: Axis::Categories(groups.iter().map(|group| group.label.clone()).collect()),
        y: 0.0..highest(&series),
        series,
        width: WIDTH,
    }
}

/// Training losses; none where no run has any.
fn learning_curves(comparison: &Comparison) -> Option<Plot> {
    let mut series = Vec::new();
    for (i, run) in comparison.runs.iter().enumerate() {
        let curve = run.learning_curve.iter().filter(|point| point.loss.is_finite());
        let points: Vec<_> =
            curve.map(|point| PlotPoint { x: point.step, y: point.loss, whisker: None }).collect();
        if !points.is_empty() {
            let mark = Mark::Line { dashed: false, marker: None };
            series.push(Series { label: run.label.clone(), colour: colour(i), mark, points });
        }
    }
    let points = || series.iter().flat_map(|series| &series.points);
    let last_step = points().map(|point| point.x).fold(0.0, f64::max);
    let lowest = points().map(|point| point.y).fold(f64::INFINITY, f64::min);
    let highest = points().map(|point| point.y).fold(f64::NEG_INFINITY, f64::max);
    let room = ((highest - lowest) * 0.05).max(1e-6);
    (!series.is_empty()).then(|| Plot {
        name: "learning_curves",
        title: "Training loss".to_owned(),
        x_title: "step, over all days".to_owned(),
        y_title: "loss (nats per target)".to_owned(),
        x: Axis::Numbers(last_step),
        y: lowest - room..highest + room,
        series,
        width: WIDTH,
    })
}

/// A line per run through its estimates, with a small offset between runs.
fn lines(comparison: &Comparison, figures: impl Fn(usize) -> Vec<Estimate>) -> Vec<Series> {
    let n_runs = comparison.runs.len() as f64;
    let apart = (0.5 / n_runs).min(0.08);
    let of_run = comparison.runs.iter().enumerate().map(|(i, run)| {
        let offset = (i as f64 - (n_runs - 1.0) / 2.0) * apart;
        let points = figures(i).into_iter().enumerate();
        Series {
            label: run.label.clone(),
            colour: colour(i),
            mark: Mark::Line { dashed: run.is_baseline, marker: Some(i) },
            points: points
                .filter_map(|(x, figure)| plot_point(x as f64 + 0.5 + offset, figure))
                .collect(),
        }
    });
    of_run.collect()
}

/// None for an estimate without sessions.
fn plot_point(x: f64, estimate: Estimate) -> Option<PlotPoint> {
    let Estimate { value, low, high } = estimate;
    value.is_finite().then_some(PlotPoint { x, y: value, whisker: Some((low, high)) })
}

/// The directory of a label `MODEL (DIRECTORY)`: the model alone would be ambiguous.
fn short_name(label: &str) -> &str {
    label.rsplit_once(" (").map_or(label, |(_, directory)| directory.trim_end_matches(')'))
}
