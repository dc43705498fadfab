//! The text files of a report: `results.txt`, `report.md`, `report.json`, `index.html`.

use std::fmt::Write;

use super::compare::Comparison;
use super::plot::Chart;
use super::results_text;
use super::tables::{self, CaptionedTable};
use crate::measure::Measure;
use crate::table::{self, Align, markdown_text};

const STYLE: &str = include_str!("page.css");

const TITLE: &str = "Comparison of runs";

/// `results.txt`: the metrics of the last evaluation, one block per run.
pub(super) fn results_txt(comparison: &Comparison) -> String {
    const MEASURES: [Measure; 4] =
        [Measure::NdcgAt10, Measure::NdcgAt20, Measure::RecallAt10, Measure::RecallAt20];
    let blocks = comparison.last().runs.iter().map(|run| {
        results_text(&run.label, MEASURES.map(|measure| run.estimates.get(measure).value))
    });
    blocks.collect::<Vec<_>>().join("\n")
}

/// `report.json`: every number of the report.
pub(super) fn json(comparison: &Comparison) -> String {
    let mut text = serde_json::to_string_pretty(comparison).expect("figures are JSON");
    text.push('\n');
    text
}

#[derive(Default)]
struct Section {
    heading: &'static str,
    text: String,
    /// Items of a list below the text.
    items: Vec<String>,
    tables: Vec<CaptionedTable>,
    /// Names.
    charts: &'static [&'static str],
}

fn sections(comparison: &Comparison) -> Vec<Section> {
    let last = comparison.last();
    let of_last = format!("Day {} ({}).", last.eval_day, last.split);
    vec![
        Section {
            heading: "Metrics",
            text: method(comparison),
            tables: tables::evaluations(comparison),
            charts: &["ndcg", "recall", "ndcg_by_day", "recall_by_day"],
            ..Section::default()
        },
        Section {
            heading: "Differences",
            text: reference(comparison),
            items: summaries(comparison),
            tables: tables::differences(comparison).into_iter().collect(),
            ..Section::default()
        },
        Section {
            heading: "By kind of target",
            text: format!(
                "{of_last} The target of a session is its held-out item. `repeat`: the target is \
                 among the known events of its session; `seen`: it is not, but it occurred in \
                 training; `never seen`: neither."
            ),
            tables: tables::by_target_kind(comparison),
            ..Section::default()
        },
        Section {
            heading: "By support of the target",
            text: format!(
                "{of_last} The support of a target is the number of its occurrences in training. \
                 The sessions of `repeat` are left out; those of `never seen` have support 0."
            ),
            tables: tables::by_target_support(comparison),
            charts: &["recall_by_target_support"],
            ..Section::default()
        },
        Section {
            heading: "By length of the session",
            text: of_last.clone(),
            tables: tables::by_known_events(comparison),
            charts: &["recall_by_known_events"],
            ..Section::default()
        },
        Section {
            heading: "By popularity of the held-out item",
            text: format!(
                "{of_last} The items of the training data, sorted by their number of events, form \
                 ten groups of equal size; `never seen` are items without events in training, \
                 whether or not they repeat an event of their session."
            ),
            tables: tables::by_popularity(comparison),
            charts: &["recall_by_popularity"],
            ..Section::default()
        },
        Section {
            heading: "Training",
            text: "Losses of models of different kinds are not comparable.".to_owned(),
            tables: vec![tables::training(comparison)],
            charts: &["learning_curves"],
            ..Section::default()
        },
    ]
}

fn reference(comparison: &Comparison) -> String {
    let Some(differences) = &comparison.differences else {
        return "The report holds a single run, so there are no differences.".to_owned();
    };
    let reference = &differences.reference;
    let choice = if comparison.runs.iter().any(|run| run.is_baseline) {
        format!("The reference is {reference}, the baseline with the highest NDCG@20.")
    } else {
        format!("Without a baseline, the reference is the first run, {reference}.")
    };
    format!(
        "{choice} A difference whose interval excludes 0 is unlikely to be due to the choice of \
         sessions; other seeds or days are not covered. The list names the segments by kind of \
         target, by support of the target and by length of the session in which a run has a lower \
         NDCG@20 than the reference. Among many segments, a few intervals exclude 0 by chance."
    )
}

/// Where each run has a lower NDCG@20 than the reference.
fn summaries(comparison: &Comparison) -> Vec<String> {
    let runs = comparison.differences.iter().flat_map(|differences| &differences.runs);
    runs.map(|run| run.summary.clone()).collect()
}

fn method(comparison: &Comparison) -> String {
    format!(
        "The last item of every session is ranked among all items of the catalogue, given the \
         events before it. Figures are means over sessions, with the {:.0} % interval of a \
         percentile bootstrap over sessions ({} resamples) in brackets. The interval has no width \
         where no session, or every session, has its item in the top K. coverage@20 is the share \
         of the catalogue that is in the top 20 of at least one session.",
        comparison.confidence * 100.0,
        comparison.n_resamples
    )
}

/// `report.md`, which refers to the files of the charts.
pub(super) fn markdown(comparison: &Comparison, charts: &[Chart]) -> String {
    let mut page = format!("# {TITLE}\n");
    for warning in &comparison.warnings {
        let _ = write!(page, "\n> **Warning:** {}\n", markdown_text(warning));
    }
    for section in sections(comparison) {
        let _ = write!(page, "\n## {}\n\n{}\n", section.heading, markdown_text(&section.text));
        if !section.items.is_empty() {
            page.push('\n');
        }
        for item in &section.items {
            let _ = writeln!(page, "- {}", markdown_text(item));
        }
        for table in &section.tables {
            page.push_str(&markdown_table(table));
        }
        for chart in charts.iter().filter(|chart| section.charts.contains(&chart.name)) {
            let _ = write!(page, "\n![{}]({}.svg)\n", markdown_text(&chart.title), chart.name);
        }
    }
    page.push_str("\n## Runs\n\n");
    for run in &comparison.runs {
        let (label, path) =
            (markdown_text(&run.label), markdown_text(&run.path.display().to_string()));
        let _ = writeln!(page, "- {label}: {path}");
    }
    page
}

fn markdown_table(captioned: &CaptionedTable) -> String {
    let escape =
        |cells: &[String]| cells.iter().map(|cell| markdown_text(cell)).collect::<Vec<_>>();
    let head = escape(&captioned.head);
    let align = |column| if column == 0 { Align::Left } else { Align::Right };
    let columns = head.iter().enumerate().map(|(column, name)| (name.as_str(), align(column)));
    let rows: Vec<_> = captioned.rows.iter().map(|row| escape(row)).collect();
    let table = table::markdown(&columns.collect::<Vec<_>>(), &rows);
    format!("\n**{}**\n\n{table}", markdown_text(&captioned.caption))
}

/// `index.html`, which needs no other file and no network.
pub(super) fn html(comparison: &Comparison, charts: &[Chart]) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\" />\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\" />\n\
         <title>{TITLE}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n"
    );
    for warning in &comparison.warnings {
        let _ = writeln!(page, "<p class=\"warning\">Warning: {}</p>", html_text(warning));
    }
    for section in sections(comparison) {
        let _ = write!(page, "<h2>{}</h2>\n<p>{}</p>\n", section.heading, html_text(&section.text));
        if !section.items.is_empty() {
            let items = section.items.iter().map(|item| format!("<li>{}</li>\n", html_text(item)));
            let _ = write!(page, "<ul>\n{}</ul>\n", items.collect::<String>());
        }
        for table in &section.tables {
            page.push_str(&html_table(table));
        }
        for chart in charts.iter().filter(|chart| section.charts.contains(&chart.name)) {
            let (title, svg) = (html_text(&chart.title), &chart.svg);
            let _ = write!(
                page,
                "<figure class=\"wide\" role=\"img\" aria-label=\"{title}\">\n{svg}</figure>\n"
            );
        }
    }
    page.push_str("<h2>Runs</h2>\n");
    for run in &comparison.runs {
        let path = run.path.display().to_string();
        let machine = serde_json::to_string_pretty(&run.machine).expect("it was JSON");
        let _ = write!(
            page,
            "<details>\n<summary>{}: <code>{}</code></summary>\n<pre>{}</pre>\n<pre>{}</pre>\n\
             </details>\n",
            html_text(&run.label),
            html_text(&path),
            html_text(&run.config),
            html_text(&machine)
        );
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn html_table(table: &CaptionedTable) -> String {
    let line = |tag: &str, cells: &[String]| {
        let cells = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", html_text(cell)));
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let rows: String = table.rows.iter().map(|row| line("td", row)).collect();
    format!(
        "<div class=\"wide\">\n<table>\n<caption>{}</caption>\n<thead>\n{}</thead>\n\
         <tbody>\n{rows}</tbody>\n</table>\n</div>\n",
        html_text(&table.caption),
        line("th", &table.head)
    )
}

/// Escapes text for content and attributes.
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
