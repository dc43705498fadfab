//! Reports repeat the metrics of the runs, with intervals that hold the truth, in self-contained
//! pages.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use bireme::data::Split;
use bireme::metrics::Tally;
use bireme::report::evaluations;
use bireme_tools::measure::Measure;
use bireme_tools::report::bootstrap::{Estimate, bootstrap};
use bireme_tools::report::compare::compare;
use bireme_tools::report::evaluation_file::{self, SessionOutcome};
use bireme_tools::report::runs::{self, FinishedRun};
use serde_json::Value;

use crate::support::configs::{CONFIG, config_with};
use crate::support::process::{Finished, bireme};
use crate::support::session_data;
use crate::support::session_shop::SessionShop;

/// Trains a model that only counts.
fn train_counts(shop: &SessionShop, kind: &str) {
    fs::write(shop.config(), config_with(&format!("kind = \"{kind}\""))).unwrap();
    shop.train(kind, &[]).success();
    fs::write(shop.config(), CONFIG).unwrap();
}

fn report(shop: &SessionShop, runs: &[&str], more: &[&str]) -> Finished {
    let paths: Vec<_> = runs.iter().chain(&["report"]).map(|run| shop.run_dir(run)).collect();
    let paths: Vec<&str> = paths.iter().map(|path| path.to_str().unwrap()).collect();
    let (out, runs) = paths.split_last().unwrap();
    bireme(&[&["report", "--out", out], runs, more].concat())
}

fn refused(finished: &Finished, message: &str) {
    finished.refused(message);
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:#?}");
}

/// Names in a folder.
fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Recall of `n_hits` in `n` sessions.
fn recall(n_hits: i64, n: i64, n_resamples: u32) -> Estimate {
    bootstrap(&[n - n_hits, n_hits], n_resamples, |counts| {
        [counts[1] as f64 / (counts[0] + counts[1]) as f64]
    })[0]
}

#[test]
fn intervals_hold_the_figure_and_shrink_with_the_root_of_the_sessions() {
    for (n, n_hits) in [(50, 20), (800, 320), (12_800, 5120)] {
        let estimate = recall(n_hits, n, 4000);
        assert!(estimate.low < 0.4 && 0.4 < estimate.high && estimate.value == 0.4, "{estimate:?}");
        let expected = 2.0 * 1.96 * (0.4f64 * 0.6 / n as f64).sqrt();
        let width = estimate.high - estimate.low;
        assert!((width / expected - 1.0).abs() < 0.1, "{n} sessions: {width}, not {expected}");
        assert_eq!(recall(n_hits, n, 4000), estimate, "the same again");
    }
    for n_hits in [0, 7] {
        let estimate = recall(n_hits, 7, 100);
        assert_eq!(
            (estimate.low, estimate.high),
            (estimate.value, estimate.value),
            "nothing to vary"
        );
    }
    let none = recall(0, 0, 100);
    assert!(none.value.is_nan() && none.low.is_nan() && none.high.is_nan());
}

#[test]
fn nineteen_of_twenty_intervals_hold_the_truth() {
    const TRIALS: usize = 1000;
    let (n, truth) = (400, [50, 150, 300]);
    let mut number = session_data::numbers(11);
    let mut n_right = 0;
    for _ in 0..TRIALS {
        // A session is ranked 1st, 7th or beyond 20 with the probabilities 0.1, 0.3 and 0.6.
        let mut at_rank = [0; 21];
        for _ in 0..n {
            let rank = match number(500) {
                draw if draw < truth[0] => 1,
                draw if draw < truth[0] + truth[1] => 7,
                _ => 0,
            };
            at_rank[rank] += 1;
        }
        let [ndcg] = bootstrap(&at_rank, 300, |counts| {
            [Tally::of_counts(counts.try_into().unwrap()).metrics(false).ndcg_at_20]
        });
        let expected = 0.1 + 0.3 / 8f64.log2();
        n_right += usize::from(ndcg.low <= expected && expected <= ndcg.high);
    }
    let share = n_right as f64 / TRIALS as f64;
    assert!((0.925..0.97).contains(&share), "{share}");
}

#[test]
fn reports_and_evaluations_compute_the_same_metrics() {
    let mut number = session_data::numbers(5);
    let counts: [i64; 21] = std::array::from_fn(|_| number(1000) as i64);
    let metrics = Tally::of_counts(counts).metrics(false);
    let evaluated = [
        metrics.ndcg_at_10,
        metrics.ndcg_at_20,
        metrics.recall_at_10,
        metrics.recall_at_20,
        metrics.mrr_at_20,
    ];
    assert_eq!(Measure::ALL.map(|measure| measure.mean(&counts)), evaluated);
}

#[test]
fn a_report_says_what_the_runs_said_and_can_be_read_anywhere() {
    let shop = SessionShop::new(400);
    let strange = "gru <1> & \"2\"";
    let runs = [strange, "gru", "popularity", "markov"];
    shop.train(strange, &["--set", "train.epochs_per_day=1"]).success();
    shop.train("gru", &[]).success();
    train_counts(&shop, "popularity");
    train_counts(&shop, "markov");
    let finished = report(&shop, &runs, &["--resamples", "200"]).success();
    assert!(
        finished.stdout.trim().ends_with("report/index.html") && finished.stderr.is_empty(),
        "{finished:#?}"
    );
    let folder = shop.run_dir("report");
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let figures: Value = serde_json::from_str(&read("report.json")).unwrap();

    // Every figure of every run and day, to the last bit.
    let labels = ["GRU (gru <1> & \"2\")", "GRU (gru)", "Popularity", "Markov"];
    for (i, (run, label)) in runs.iter().zip(labels).enumerate() {
        assert_eq!(figures["runs"][i]["label"], label);
        assert_eq!(figures["runs"][i]["is_baseline"], i >= 2);
        assert_eq!(figures["runs"][i]["days"].as_array().unwrap().len(), 2);
        let n_points = figures["runs"][i]["learning_curve"].as_array().unwrap().len();
        assert_eq!(n_points, shop.records(run, "step").len());
        let evaluations = shop.records(run, "eval");
        assert_eq!(evaluations.len(), 2);
        for (day, record) in evaluations.iter().enumerate() {
            let part = &figures["evaluations"][day];
            for key in ["train_day", "eval_day", "split", "n_sessions"] {
                assert_eq!(part[key], record[key], "{key}");
            }
            for key in ["loss", "coverage_at_20"] {
                assert_eq!(part["runs"][i][key], record[key], "{key}");
            }
            for key in ["ndcg_at_10", "ndcg_at_20", "recall_at_10", "recall_at_20", "mrr_at_20"] {
                let estimate = &part["runs"][i][key];
                assert_eq!(estimate["value"], record[key], "{key}");
                let [low, value, high] =
                    ["low", "value", "high"].map(|end| estimate[end].as_f64().unwrap());
                assert!(low <= value && value <= high, "{key}: {estimate}");
            }
        }
    }
    assert_eq!(figures["differences"]["reference"], "Markov");

    // The parts make up the whole.
    let last = &figures["evaluations"][1];
    for by in ["by_target_kind", "by_known_events", "by_popularity_decile"] {
        let groups = figures[by].as_array().unwrap();
        let n = |group: &Value| group["n_sessions"].as_f64().unwrap();
        let n_sessions: f64 = groups.iter().map(n).sum();
        assert_eq!(n_sessions, last["n_sessions"].as_f64().unwrap());
        for run in 0..4 {
            let recall = |of: &Value| of["runs"][run]["recall_at_20"]["value"].as_f64().unwrap();
            let hits: f64 = groups.iter().map(|group| n(group) * recall(group)).sum();
            assert!((hits / n_sessions - recall(last)).abs() < 1e-12, "{by}");
        }
    }
    let n_sessions = |by: &str, of: &dyn Fn(&Value) -> bool| -> i64 {
        let groups = figures[by].as_array().unwrap().iter().filter(|group| of(group));
        groups.map(|group| group["n_sessions"].as_i64().unwrap()).sum()
    };
    assert_eq!(
        n_sessions("by_target_support", &|_| true),
        n_sessions("by_target_kind", &|group| group["label"] != "repeat")
    );

    // The original's format: blocks of a title and four lines.
    let blocks: Vec<String> =
        read("results.txt").split("\n\n").map(|block| block.trim().to_owned()).collect();
    assert_eq!(blocks.len(), 4);
    for ((block, run), label) in blocks.iter().zip(runs).zip(labels) {
        let of_run = fs::read_to_string(shop.run_dir(run).join("results.txt")).unwrap();
        let (title, metrics) = of_run.trim().split_once('\n').unwrap();
        assert!(title.ends_with(" accuracy results:"));
        assert_eq!(block, &format!("{label} accuracy results:\n{metrics}"));
    }

    // Every chart is an SVG file with something in it.
    let charts = [
        "ndcg",
        "recall",
        "ndcg_by_day",
        "recall_by_day",
        "recall_by_target_support",
        "recall_by_known_events",
        "recall_by_popularity",
        "learning_curves",
    ];
    let mut expected: BTreeSet<String> =
        ["results.txt", "report.md", "report.json", "index.html"].map(str::to_owned).into();
    for chart in charts {
        let svg = format!("{chart}.svg");
        check_svg(&read(&svg));
        expected.insert(svg);
    }
    assert_eq!(names(&folder), expected);

    let page = read("index.html");
    check_page(&page, 4);
    assert!(page.contains("GRU (gru &lt;1&gt; &amp; &quot;2&quot;)") && !page.contains("<1>"));
    assert!(page.contains("kind = &quot;gru&quot;"), "configurations");
    assert_eq!(page.matches("<li>").count(), 3, "a summary for each run but the reference");
    let markdown = read("report.md");
    assert!(markdown.contains("| GRU (gru &lt;1&gt; &amp; \"2\") |") && !markdown.contains("<1>"));
    for chart in charts {
        assert!(markdown.contains(&format!("]({chart}.svg)")), "{chart}");
    }

    // The same again is the same, byte by byte, and replaces only on request.
    let files = || {
        let of_folder = names(&folder).into_iter();
        of_folder.map(|name| (fs::read(folder.join(&name)).unwrap(), name)).collect::<Vec<_>>()
    };
    let before = files();
    refused(&report(&shop, &runs, &[]), "already holds a report");
    report(&shop, &runs, &["--resamples", "200", "--overwrite"]).success();
    assert!(files() == before);
}

fn check_svg(svg: &str) {
    let document = roxmltree::Document::parse(svg).unwrap();
    let root = document.root_element();
    assert_eq!(root.tag_name().name(), "svg");
    let texts =
        root.descendants().filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "text")));
    assert!(texts.count() > 6, "axes have titles and labels");
    let is_colour = |colour: &str| colour.starts_with('#') && colour.len() == 7;
    let colours: BTreeSet<&str> = root
        .descendants()
        .flat_map(|node| ["fill", "stroke"].map(|name| node.attribute(name)))
        .flatten()
        .filter(|colour| is_colour(colour))
        .collect();
    // White, ink, grid and at least one run.
    assert!(colours.len() >= 4 && colours.contains("#FFFFFF"), "{colours:?}");
    let marks = ["polyline", "polygon", "rect"].map(|name| ("http://www.w3.org/2000/svg", name));
    let marks = root.descendants().filter(|node| marks.iter().any(|&mark| node.has_tag_name(mark)));
    assert!(marks.count() > 10, "lines, bars and markers");
}

/// A page is well-formed, and asks nothing of the network.
fn check_page(page: &str, n_runs: usize) {
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(page, options).unwrap();
    let elements = || document.descendants().filter(roxmltree::Node::is_element);
    assert_eq!(elements().filter(|node| node.tag_name().name() == "svg").count(), 8);
    assert!(elements().filter(|node| node.tag_name().name() == "table").count() >= 8);
    assert_eq!(elements().filter(|node| node.tag_name().name() == "details").count(), n_runs);
    for node in elements() {
        for attribute in node.attributes() {
            assert!(
                !["src", "href", "srcset", "data"].contains(&attribute.name()),
                "{attribute:?}"
            );
        }
    }
    let own = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for outside in ["http:", "https:", "url(", "@import", "<script", "<link"] {
        assert!(!own.contains(outside), "{outside}");
    }
}

#[test]
fn an_evaluation_can_be_saved_later_and_is_then_reported() {
    let shop = SessionShop::new(200);
    shop.train("gru", &[]).success();
    train_counts(&shop, "markov");
    let save = |run: &str, more: &[&str]| {
        let (run, data) = (shop.run_dir(run), shop.data());
        let paths =
            ["evaluate", "--run-dir", run.to_str().unwrap(), "--data", data.to_str().unwrap()];
        bireme(&[&paths[..], &["--save"], more].concat())
    };
    let part = ["--split", "test"];
    let said: Value = serde_json::from_str(&save("gru", &part).success().stdout).unwrap();
    let file = evaluations::path(&shop.run_dir("gru"), 3, Split::Test);
    let (facts, outcomes) = evaluation_file::read(&file).unwrap();
    assert_eq!((facts.title.as_str(), facts.train_day, facts.eval_day), ("GRU", 2, 3));
    assert_eq!(
        (facts.loss, facts.coverage_at_20),
        (said["loss"].as_f64(), said["coverage_at_20"].as_f64())
    );
    assert_eq!(Some(outcomes.len() as i64), said["n_sessions"].as_i64());
    assert!(
        outcomes.iter().all(|outcome| (1..=10).contains(&outcome.decile) && outcome.n_known >= 1)
    );
    assert!(outcomes.iter().all(|outcome| (0..=outcome.n_known).contains(&outcome.n_repeats)));
    assert!(outcomes.iter().all(|outcome| outcome.support >= 1));

    // What training itself left is not lost to a later look at the same day.
    let before = fs::read(evaluations::path(&shop.run_dir("gru"), 2, Split::Valid)).unwrap();
    refused(
        &save("gru", &["--day", "2"]),
        "day-2-valid.parquet` exists: replace it with `--overwrite`",
    );
    assert_eq!(fs::read(evaluations::path(&shop.run_dir("gru"), 2, Split::Valid)).unwrap(), before);
    let again = fs::read(&file).unwrap();
    save("gru", &[&part[..], &["--overwrite"]].concat()).success();
    assert!(fs::read(&file).unwrap() == again);

    refused(&report(&shop, &["gru", "markov"], &[]), "evaluated day 3 (test)");
    save("markov", &part).success();
    report(&shop, &["gru", "markov"], &[]).success();
    let figures = fs::read_to_string(shop.run_dir("report").join("report.json")).unwrap();
    let figures: Value = serde_json::from_str(&figures).unwrap();
    assert_eq!(figures["evaluations"].as_array().unwrap().len(), 3);
    assert_eq!(figures["evaluations"][2]["split"], "test");
    assert_eq!(figures["evaluations"][2]["runs"][0]["recall_at_20"]["value"], said["recall_at_20"]);
}

#[test]
fn what_cannot_be_compared_is_refused_and_leaves_nothing() {
    let shop = SessionShop::new(60);
    shop.train("one", &[]).success();
    shop.train("two", &["--set", "run.seed=1"]).success();
    let both = ["one", "two"];
    let two = shop.run_dir("two");
    fs::create_dir(shop.run_dir("empty")).unwrap();
    refused(&report(&shop, &["one", "empty"], &[]), "empty` holds no run: it has no `config.toml`");
    refused(&report(&shop, &["one", "nowhere"], &[]), "nowhere` holds no run");
    refused(&report(&shop, &["one", "one"], &[]), "one` was given twice");

    // Files that are missing, cut off or not what they should be, each put back afterwards.
    let cut = |name: &str, n_bytes: usize, message: &str| {
        let path = two.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..n_bytes]).unwrap();
        refused(&report(&shop, &both, &[]), message);
        fs::write(&path, whole).unwrap();
    };
    cut(
        "evaluations/day-3-valid.parquet",
        100,
        "day-3-valid.parquet` is not a readable parquet file",
    );
    cut("metrics.jsonl", 20, "metrics.jsonl`, line 1: EOF while parsing");
    cut(
        "config.toml",
        0,
        "config.toml` is not the configuration of a run: `model.kind` is missing",
    );
    cut("run.json", 3, "run.json`, line");
    for name in ["results.txt", "evaluations/day-3-valid.parquet"] {
        let (path, elsewhere) = (two.join(name), shop.run_dir("elsewhere"));
        fs::rename(&path, &elsewhere).unwrap();
        refused(
            &report(&shop, &both, &[]),
            &format!("is not finished, or older than this version: `{name}`"),
        );
        fs::rename(&elsewhere, &path).unwrap();
    }
    let misnamed = two.join("evaluations/day-9-test.parquet");
    fs::copy(two.join("evaluations/day-3-valid.parquet"), &misnamed).unwrap();
    refused(
        &report(&shop, &both, &[]),
        "day-9-test.parquet` holds the evaluation of day 3 (valid)",
    );
    fs::remove_file(&misnamed).unwrap();

    // Other days, other sessions.
    shop.train("day", &["--set", "data.last_day=2"]).success();
    refused(&report(&shop, &["one", "day"], &[]), "evaluated day 3 (valid)");
    shop.train("late", &["--set", "data.first_day=2"]).success();
    refused(&report(&shop, &["late", "one"], &[]), "evaluated day 2 (valid)");
    let sessions = session_data::sessions(7, 40, 99);
    session_data::write_sessions(&shop.data().join("3/valid.parquet"), &sessions, |_| 0.0);
    shop.train("other", &[]).success();
    let finished = report(&shop, &["one", "other"], &[]);
    refused(&finished, "cannot be compared on day 3 (valid): the held-out item of session ");
    for run in ["one", "other"] {
        assert!(finished.stderr.contains(&format!("{run}`")), "{finished:#?}");
    }
    session_data::write_sessions(&shop.data().join("3/valid.parquet"), &sessions[..5], |_| 0.0);
    shop.train("fewer", &[]).success();
    refused(&report(&shop, &["one", "fewer"], &[]), "the first has 7 sessions, the second 5");

    assert!(!names(shop.dir.path()).iter().any(|name| name.starts_with("report")));

    // A folder of somebody else's is never replaced; an empty one may be used.
    fs::create_dir(shop.run_dir("report")).unwrap();
    fs::write(shop.run_dir("report").join("thesis.tex"), "years of work").unwrap();
    refused(
        &report(&shop, &both, &["--overwrite"]),
        "report` exists and was not written by `bireme report`",
    );
    fs::remove_file(shop.run_dir("report").join("thesis.tex")).unwrap();
    let finished = report(&shop, &both, &[]).success();
    assert!(finished.stderr.contains("warning: no baseline was given"), "{finished:#?}");
    let page = fs::read_to_string(shop.run_dir("report").join("index.html")).unwrap();
    assert!(page.contains("Warning: no baseline was given"));
}

#[test]
fn a_rerun_forgets_the_evaluations_of_the_run_before() {
    let shop = SessionShop::new(40);
    shop.train("run", &[]).success();
    shop.train("run", &["--overwrite", "--set", "data.last_day=2"]).success();
    assert_eq!(
        names(&shop.run_dir("run").join("evaluations")),
        ["day-2-valid.parquet".to_owned()].into()
    );
}

#[test]
fn a_day_without_sessions_is_reported_without_figures() {
    let shop = SessionShop::new(40);
    session_data::write_sessions(&shop.data().join("3/valid.parquet"), &[], |_| 0.0);
    shop.train("gru", &[]).success();
    train_counts(&shop, "popularity");
    report(&shop, &["gru", "popularity"], &[]).success();
    let folder = shop.run_dir("report");
    let figures: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("report.json")).unwrap()).unwrap();
    assert!(figures["evaluations"][0]["runs"][0]["mrr_at_20"]["low"].is_f64());
    assert!(figures["evaluations"][1]["runs"][0]["mrr_at_20"]["low"].is_null());
    assert!(figures["by_known_events"].as_array().unwrap().is_empty());
    check_page(&fs::read_to_string(folder.join("index.html")).unwrap(), 2);
}

/// Runs that were never trained, with these ranks on one day.
fn made_up(name: &str, kind: &str, ranks: &[i64]) -> FinishedRun {
    let outcome = |(row, &rank): (usize, &i64)| SessionOutcome {
        rank,
        n_known: 1,
        target: row as i64 + 2,
        decile: 1,
        n_repeats: 0,
        support: 1,
    };
    let facts = serde_json::json!({
        "format": evaluation_file::FORMAT, "title": name, "train_day": 1, "eval_day": 2,
        "split": "valid", "loss": null, "coverage_at_20": 0.5,
    });
    FinishedRun {
        path: name.into(),
        label: name.to_owned(),
        title: name.to_owned(),
        kind: kind.to_owned(),
        config: String::new(),
        machine: Value::Null,
        evaluations: vec![(
            serde_json::from_value(facts).unwrap(),
            ranks.iter().enumerate().map(outcome).collect(),
        )],
        steps: Vec::new(),
        days: Vec::new(),
    }
}

#[test]
fn differences_are_taken_session_by_session_from_the_best_baseline() {
    let mut number = session_data::numbers(3);
    let ranks: Vec<i64> = (0..500).map(|_| 1 + number(40) as i64).collect();
    let shifted = |by: i64| ranks.iter().map(|rank| rank + by).collect::<Vec<_>>();
    let runs = [
        made_up("model", "gru", &ranks),
        made_up("worse", "popularity", &shifted(5)),
        made_up("better", "markov", &shifted(1)),
    ];
    let figures = serde_json::to_value(compare(&runs, 500).unwrap()).unwrap();
    assert_eq!(figures["differences"]["reference"], "better");
    let model = &figures["differences"]["runs"][0]["recall_at_20"];
    let [low, value, high] = ["low", "value", "high"].map(|end| model[end].as_f64().unwrap());
    let hits = |ranks: &[i64]| ranks.iter().filter(|&&rank| rank <= 20).count() as f64;
    assert!((value - (hits(&ranks) - hits(&shifted(1))) / 500.0).abs() < 1e-12);
    // The same sessions: one is better wherever the other is, which two intervals by themselves
    // cannot show.
    assert!(0.0 < low && low < value && value < high, "{model}");
    let alone = &figures["evaluations"][0]["runs"][0]["recall_at_20"];
    let width = alone["high"].as_f64().unwrap() - alone["low"].as_f64().unwrap();
    assert!(high - low < width / 2.0, "{model} {alone}");

    let summary = |run: usize| &figures["differences"]["runs"][run]["summary"];
    assert_eq!(*summary(0), "model has a lower NDCG@20 than better in none of 3 segments.");
    let worse = summary(1).as_str().unwrap();
    assert!(worse.starts_with("worse has a lower NDCG@20 than better in 3 of 3 segments: "));
    assert!(worse.ends_with("lies below 0 in 3 of them."), "{worse}");

    let same = [made_up("a", "gru", &ranks), made_up("b", "gru", &ranks)];
    let figures = serde_json::to_value(compare(&same, 100).unwrap()).unwrap();
    let zero = serde_json::json!({"value": 0.0, "low": 0.0, "high": 0.0});
    assert_eq!(figures["differences"]["runs"][0]["mrr_at_20"], zero);
    assert!(compare(&same[..1], 100).unwrap().differences.is_none());
    assert!(runs::read(&["nowhere".into()]).is_err());
}
