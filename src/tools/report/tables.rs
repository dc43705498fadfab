//! The tables of a report, as text for all pages.

use super::compare::{Comparison, Estimates, EvaluatedPart, SessionGroup};
use crate::measure::Measure;

/// A table whose first column names its rows.
pub(super) struct CaptionedTable {
    pub(super) caption: String,
    pub(super) head: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

impl CaptionedTable {
    fn new<'a>(caption: String, head: impl IntoIterator<Item = &'a str>) -> Self {
        Self { caption, head: head.into_iter().map(str::to_owned).collect(), rows: Vec::new() }
    }
}

/// One table per evaluation, the last first.
pub(super) fn evaluations(comparison: &Comparison) -> Vec<CaptionedTable> {
    comparison.evaluations.iter().rev().map(|part| evaluation(comparison, part)).collect()
}

fn evaluation(comparison: &Comparison, part: &EvaluatedPart) -> CaptionedTable {
    let caption = format!(
        "Day {} ({}), trained to day {}: {} sessions",
        part.eval_day, part.split, part.train_day, part.n_sessions
    );
    let head = ["model"]
        .into_iter()
        .chain(Measure::ALL.map(Measure::title))
        .chain(["coverage@20", "loss"]);
    let mut table = CaptionedTable::new(caption, head);
    for (run, evaluated) in comparison.runs.iter().zip(&part.runs) {
        let name =
            if run.is_baseline { format!("{}, baseline", run.label) } else { run.label.clone() };
        let mut row = vec![name];
        row.extend(all_estimates(&evaluated.estimates));
        row.extend([evaluated.coverage_at_20, evaluated.loss].map(|figure| {
            figure.map_or_else(|| "none".to_owned(), |figure| format!("{figure:.4}"))
        }));
        table.rows.push(row);
    }
    table
}

/// Each run minus the reference; none for a single run.
pub(super) fn differences(comparison: &Comparison) -> Option<CaptionedTable> {
    let differences = comparison.differences.as_ref()?;
    let last = comparison.last();
    let caption = format!(
        "Difference from {} on {}, the same sessions resampled for both",
        differences.reference,
        last.name()
    );
    let mut table =
        CaptionedTable::new(caption, ["model"].into_iter().chain(Measure::ALL.map(Measure::title)));
    for run in &differences.runs {
        let signed = Measure::ALL.map(|measure| format!("{:+}", run.estimates.get(measure)));
        table.rows.push([run.label.clone()].into_iter().chain(signed).collect());
    }
    Some(table)
}

pub(super) fn training(comparison: &Comparison) -> CaptionedTable {
    let caption =
        "Training: sessions of all epochs and ranks, wall time without evaluation".to_owned();
    let head = ["model", "day", "sessions", "seconds", "sessions/s", "ranks", "device"];
    let mut table = CaptionedTable::new(caption, head);
    for run in &comparison.runs {
        let fact = |key: &str| match &run.machine[key] {
            serde_json::Value::Null => "unknown".to_owned(),
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        for day in &run.days {
            table.rows.push(vec![
                run.label.clone(),
                day.day.to_string(),
                day.n_sessions.to_string(),
                format!("{:.2}", day.seconds),
                format!("{:.0}", day.sessions_per_s),
                fact("world_size"),
                fact("device"),
            ]);
        }
    }
    table
}

pub(super) fn by_target_kind(comparison: &Comparison) -> Vec<CaptionedTable> {
    by_group(comparison, "kind of target", "target", &comparison.by_target_kind)
}

pub(super) fn by_target_support(comparison: &Comparison) -> Vec<CaptionedTable> {
    by_group(
        comparison,
        "support (occurrences in training) of targets that are new to their session",
        "support",
        &comparison.by_target_support,
    )
}

pub(super) fn by_known_events(comparison: &Comparison) -> Vec<CaptionedTable> {
    by_group(comparison, "events known of the session", "events known", &comparison.by_known_events)
}

pub(super) fn by_popularity(comparison: &Comparison) -> Vec<CaptionedTable> {
    let groups = &comparison.by_popularity_decile;
    by_group(
        comparison,
        "popularity decile of the held-out item (1: most popular)",
        "decile",
        groups,
    )
}

fn by_group(
    comparison: &Comparison,
    by: &str,
    column: &str,
    groups: &[SessionGroup],
) -> Vec<CaptionedTable> {
    let of = |measure: Measure| {
        let caption = format!("{} by {by}", measure.title());
        let labels = comparison.runs.iter().map(|run| run.label.as_str());
        let mut table =
            CaptionedTable::new(caption, [column, "sessions"].into_iter().chain(labels));
        for group in groups {
            let figures = group.runs.iter().map(|figures| figures.get(measure).to_string());
            let row =
                [group.label.clone(), group.n_sessions.to_string()].into_iter().chain(figures);
            table.rows.push(row.collect());
        }
        table
    };
    [Measure::RecallAt20, Measure::NdcgAt20].map(of).into()
}

fn all_estimates(estimates: &Estimates) -> [String; 5] {
    Measure::ALL.map(|measure| estimates.get(measure).to_string())
}
