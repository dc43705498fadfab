//! A comparison as text: `results.txt`, `report.md`, `report.json`, `index.html`.

use std::fmt::Write;

use super::charts::Chart;
use super::compare::Comparison;
use super::tables::{self, Table};
use crate::metrics::{Measure, Metrics};

const TITLE: &str = "Comparison of runs";

/// The metrics of the last evaluation, a block for each run.
pub(super) fn results_txt(comparison: &Comparison) -> String {
    let last = comparison.last();
    let blocks = last.runs.iter().map(|run| {
        let figure = |measure| run.figures.get(measure).value;
        let metrics = Metrics {
            n_sessions: last.n_sessions as i64,
            loss: run.loss.unwrap_or(f64::NAN),
            ndcg_at_10: figure(Measure::NdcgAt10),
            ndcg_at_20: figure(Measure::NdcgAt20),
            recall_at_10: figure(Measure::RecallAt10),
            recall_at_20: figure(Measure::RecallAt20),
            mrr_at_20: figure(Measure::MrrAt20),
        };
        super::results(&run.label, &metrics)
    });
    blocks.collect::<Vec<_>>().join("\n")
}

/// Every number of the report.
pub(super) fn json(comparison: &Comparison) -> String {
    let mut text = serde_json::to_string_pretty(comparison).expect("figures are JSON");
    text.push('\n');
    text
}

/// A part of a page: a heading, what is to be said, tables and names of charts.
struct Section {
    heading: &'static str,
    text: String,
    tables: Vec<Table>,
    charts: &'static [&'static str],
}

fn sections(comparison: &Comparison) -> Vec<Section> {
    let last = comparison.last();
    let compared = match &comparison.differences {
        None => "There is but one run, so nothing to compare it with.".to_owned(),
        Some(differences) if comparison.runs.iter().any(|run| run.is_baseline) => format!(
            "{} is the baseline with the highest NDCG@20. A difference whose interval leaves out 0 is not one of \
             chance among sessions; it says nothing about another seed or another day.",
            differences.reference
        ),
        Some(differences) => format!(
            "No baseline was given, so the runs are compared with the first, {}.",
            differences.reference
        ),
    };
    let of_last = format!("Day {} ({}).", last.eval_day, last.split.name());
    vec![
        Section {
            heading: "Metrics",
            text: method(comparison),
            tables: tables::evaluations(comparison),
            charts: &["ndcg", "recall", "ndcg_by_day", "recall_by_day"],
        },
        Section {
            heading: "Differences",
            text: compared,
            tables: tables::differences(comparison).into_iter().collect(),
            charts: &[],
        },
        Section {
            heading: "By length of the session",
            text: of_last.clone(),
            tables: tables::by_known_events(comparison),
            charts: &["recall_by_known_events"],
        },
        Section {
            heading: "By popularity of the held-out item",
            text: format!(
                "{of_last} The items that occurred in training, sorted by how often, are cut into ten groups of equal \
                 numbers of items; `never seen` are those that did not occur."
            ),
            tables: tables::by_popularity(comparison),
            charts: &["recall_by_popularity"],
        },
        Section {
            heading: "Training",
            text: "Losses of different kinds of models are not to be compared with each other.".to_owned(),
            tables: vec![tables::training(comparison)],
            charts: &["learning_curves"],
        },
    ]
}

fn method(comparison: &Comparison) -> String {
    format!(
        "The last item of every session is ranked among all items of the catalogue, from the events before it. Figures \
         are means over sessions; in brackets the {:.0} % interval of a percentile bootstrap over sessions with {} \
         resamples, which has no width where no session, or every session, had its item in the top. coverage@20 is the share of the catalogue that is in the top 20 of at least one session.",
        comparison.confidence * 100.0,
        comparison.n_resamples
    )
}

/// `report.md`, which shows the charts beside it.
pub(super) fn markdown(comparison: &Comparison, charts: &[Chart]) -> String {
    let mut page = format!("# {TITLE}\n");
    for warning in &comparison.warnings {
        let _ = write!(page, "\n> **Warning:** {}\n", markdown_text(warning));
    }
    for section in sections(comparison) {
        let _ = write!(page, "\n## {}\n\n{}\n", section.heading, markdown_text(&section.text));
        for table in &section.tables {
            page.push_str(&markdown_table(table));
        }
        for chart in charts.iter().filter(|chart| section.charts.contains(&chart.name)) {
            let _ = write!(page, "\n![{}]({}.svg)\n", markdown_text(&chart.title), chart.name);
        }
    }
    page.push_str("\n## Runs\n\n");
    for run in &comparison.runs {
        let (label, path) = (markdown_text(&run.label), markdown_text(&run.path.display().to_string()));
        let _ = writeln!(page, "- {label}: {path}");
    }
    page
}

fn markdown_table(table: &Table) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| markdown_text(cell)).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut text = format!("\n**{}**\n\n{}", markdown_text(&table.caption), line(&table.head));
    let rule: Vec<&str> =
        (0..table.head.len()).map(|column| if column == 0 { "---" } else { "---:" }).collect();
    let _ = writeln!(text, "| {} |", rule.join(" | "));
    table.rows.iter().for_each(|row| text.push_str(&line(row)));
    text
}

/// Text that Markdown takes as it is, on one line.
fn markdown_text(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\\' | '|' | '*' | '_' | '[' | ']' | '#' | '~' => plain.extend(['\\', letter]),
            '<' => plain.push_str("&lt;"),
            '>' => plain.push_str("&gt;"),
            '&' => plain.push_str("&amp;"),
            _ if letter.is_control() => plain.push(' '),
            _ => plain.push(letter),
        }
    }
    plain
}

const STYLE: &str = "
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: #fff; color: #222;
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
figure { margin: 1.5rem 0; }
figure svg { display: block; min-width: 36rem; max-width: 100%; height: auto; }
.warning { border-left: .3rem solid #d55e00; background: #fdf1e7; padding: .5rem 1rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem; font-size: .85rem; }
summary { cursor: pointer; }
code { overflow-wrap: anywhere; }
";

/// `index.html`, which needs nothing beside it and no network.
pub(super) fn html(comparison: &Comparison, charts: &[Chart]) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\" />\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\" />\n\
         <title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n"
    );
    for warning in &comparison.warnings {
        let _ = writeln!(page, "<p class=\"warning\">Warning: {}</p>", html_text(warning));
    }
    for section in sections(comparison) {
        let _ = write!(page, "<h2>{}</h2>\n<p>{}</p>\n", section.heading, html_text(&section.text));
        for table in &section.tables {
            page.push_str(&html_table(table));
        }
        for chart in charts.iter().filter(|chart| section.charts.contains(&chart.name)) {
            let (title, svg) = (html_text(&chart.title), &chart.svg);
            let _ =
                write!(page, "<figure class=\"wide\" role=\"img\" aria-label=\"{title}\">\n{svg}</figure>\n");
        }
    }
    page.push_str("<h2>Runs</h2>\n");
    for run in &comparison.runs {
        let path = run.path.display().to_string();
        let machine = serde_json::to_string_pretty(&run.machine).expect("it was JSON");
        let _ = write!(
            page,
            "<details>\n<summary>{}: <code>{}</code></summary>\n<pre>{}</pre>\n<pre>{}</pre>\n</details>\n",
            html_text(&run.label),
            html_text(&path),
            html_text(&run.config),
            html_text(&machine)
        );
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn html_table(table: &Table) -> String {
    let line = |tag: &str, cells: &[String]| {
        let cells = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", html_text(cell)));
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let rows: String = table.rows.iter().map(|row| line("td", row)).collect();
    format!(
        "<div class=\"wide\">\n<table>\n<caption>{}</caption>\n<thead>\n{}</thead>\n<tbody>\n{rows}</tbody>\n</table>\n\
         </div>\n",
        html_text(&table.caption),
        line("th", &table.head)
    )
}

/// Text between tags or in an attribute.
fn html_text(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            _ if letter.is_control() && letter != '\n' && letter != '\t' => safe.push('\u{fffd}'),
            _ => safe.push(letter),
        }
    }
    safe
}
