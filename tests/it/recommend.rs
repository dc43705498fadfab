//! `bireme train --export` and `bireme recommend` turn events into named products.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use bireme::etl::serving::Preprocessor;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;
use serde_json::Value;

use crate::support::configs::MODELS;
use crate::support::event_shop::EventShop;
use crate::support::process::Finished;

/// A shop with an exported model, `bireme` in `repository`.
fn exported() -> EventShop {
    let shop = EventShop::small();
    let config = shop.path("run.toml");
    let train = "[train]\nmax_steps_per_day = 8\nlearning_rate = 0.02\n";
    fs::write(&config, format!("[data]\nfirst_day = 1\nlast_day = 2\n{}\n{train}", MODELS[0].1))
        .unwrap();
    let (data, run, out) = (shop.path("data"), shop.path("run"), shop.path("repository"));
    let trained = shop
        .run(&["train", "--config", &config, "--data", &data, "--run-dir", &run, "--export", &out])
        .success();
    assert!(trained.stdout.contains("version 1 of `bireme`"), "{trained:#?}");
    shop
}

fn recommend(shop: &EventShop, events: &str, more: &[&str]) -> Finished {
    let (repository, events) = (shop.path("repository"), shop.path(events));
    let arguments =
        ["recommend", "--device", "cpu", "--repository", &repository, "--events", &events];
    shop.run(&[&arguments[..], more].concat())
}

fn objects(lines: &str) -> Vec<Value> {
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn sessions_of_a_file_get_recommendations_in_every_form() {
    let shop = exported();
    let json = recommend(&shop, "events.csv", &["--format", "json"]).success().stdout;
    let sessions = objects(&json);

    // What is expected of the first fifty rows, by other means.
    let (events, _) = shop.first_events(12_000);
    let mut events: Vec<_> = events.iter().collect();
    events.sort_by_key(|event| &event["event_time"]);
    let mut by_session: BTreeMap<&str, usize> = BTreeMap::new();
    for event in &events[..50] {
        *by_session.entry(&event["user_session"]).or_default() += 1;
    }
    // Events of one second may lie on both sides of the fiftieth.
    let is_tied = events[49]["event_time"] == events[50]["event_time"];
    let seen: usize =
        sessions.iter().map(|session| session["seen"].as_array().unwrap().len()).sum();
    let expected: usize = by_session.values().filter(|&&n| n > 1).sum();
    assert!(seen == expected || is_tied, "{seen} and {expected}");
    let etl = Preprocessor::load(&PathBuf::from(shop.path("repository/bireme_etl/1"))).unwrap();
    for session in &sessions {
        let recommended = session["recommended"].as_array().unwrap();
        assert_eq!((recommended.len(), &session["fallback"]), (5, &Value::Bool(false)));
        let scores: Vec<f64> = recommended.iter().map(|of| of["score"].as_f64().unwrap()).collect();
        assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
        for of in recommended {
            let known = etl.workflow().product(of["product_id"].as_i64().unwrap()).unwrap();
            assert_eq!(of["brand"].as_str(), known.brand);
            assert_eq!(of["category_code"].as_str(), known.category_code);
            assert_eq!(of["price"].as_f64(), Some(known.price));
        }
    }

    // The other forms say the same.
    let csv = recommend(&shop, "events.csv", &["--format", "csv"]).success().stdout;
    let rows: Vec<Vec<&str>> = csv.lines().skip(1).map(|line| line.split(',').collect()).collect();
    let of_json: Vec<(String, String, String)> = sessions
        .iter()
        .flat_map(|session| {
            ["seen", "recommended"].into_iter().flat_map(move |list| {
                let products = session[list].as_array().unwrap().iter();
                products.map(move |product| {
                    let id = product["product_id"].to_string();
                    (session["session"].as_str().unwrap().to_owned(), list.to_owned(), id)
                })
            })
        })
        .collect();
    let of_csv: Vec<(String, String, String)> =
        rows.iter().map(|row| (row[0].to_owned(), row[1].to_owned(), row[3].to_owned())).collect();
    assert_eq!(of_csv, of_json);
    let path = shop.path("recommended.parquet");
    recommend(&shop, "events.csv", &["--format", "parquet", "--out", &path]).success();
    let reader = SerializedFileReader::new(fs::File::open(&path).unwrap()).unwrap();
    let of_parquet: Vec<_> = reader
        .get_row_iter(None)
        .unwrap()
        .map(|row| {
            let row = row.unwrap();
            let text = |column| row.get_string(column).unwrap().clone();
            (text(0), text(1), row.get_long(3).unwrap().to_string())
        })
        .collect();
    assert_eq!(of_parquet, of_json);
    let table = recommend(&shop, "events.csv", &[]).success().stdout;
    assert_eq!(table.matches("session ").count(), sessions.len());
    for (_, _, id) in &of_json {
        assert!(table.contains(&format!("  {id}  ")), "{id}");
    }

    // All sessions, in several requests; what is seen is left out.
    let more = ["--first", "12000", "--format", "json", "--exclude-seen", "--top", "10"];
    let sessions = objects(&recommend(&shop, "events.csv", &more).success().stdout);
    assert!(sessions.len() > 500, "{}", sessions.len());
    for session in &sessions {
        let ids = |list: &str| -> Vec<i64> {
            let products = session[list].as_array().unwrap().iter();
            products.map(|product| product["product_id"].as_i64().unwrap()).collect()
        };
        let seen = ids("seen");
        assert!(ids("recommended").iter().all(|id| !seen.contains(id)));
    }
}

#[test]
fn shops_of_few_items_recommend_all_of_them() {
    for n_items in [2, 3] {
        let shop = EventShop::tiny(n_items);
        shop.train("run", MODELS[0].1);
        shop.export("run", &[]).success();
        let ask = |more: &[&str]| {
            let more = [&["--name", "run", "--format", "json", "--top", "100"], more].concat();
            objects(&recommend(&shop, "events.csv", &more).success().stdout)
        };
        let ids = |session: &Value, list: &str| -> Vec<i64> {
            let products = session[list].as_array().unwrap().iter();
            products.map(|product| product["product_id"].as_i64().unwrap()).collect()
        };
        for session in ask(&[]) {
            let mut all = ids(&session, "recommended");
            all.sort_unstable();
            assert_eq!(all, (-1..n_items - 1).collect::<Vec<_>>(), "each product once, −1 too");
        }
        for session in ask(&["--exclude-seen", "--first", "2"]) {
            let (seen, left) = (ids(&session, "seen"), ids(&session, "recommended"));
            assert_eq!(
                (seen.as_slice(), left.len() as i64),
                (&[-1, 0][..], n_items - 2),
                "{session}"
            );
        }
    }
}

#[test]
fn what_cannot_be_recommended_is_refused() {
    let shop = exported();
    let broken = fs::read_to_string(shop.path("events.csv")).unwrap().replacen("UTC", "noon", 1);
    fs::write(shop.path("broken.csv"), broken).unwrap();
    let nowhere = shop.path("no/such/folder/out.csv");
    for (events, more, code, message) in [
        ("none.csv", &[][..], 2, "none.csv"),
        ("broken.csv", &[], 2, "line 2"),
        ("events.csv", &["--name", "other"], 2, "no model `other`"),
        ("events.csv", &["--first", "1"], 2, "the first 1 events hold no session of more than one"),
        ("events.csv", &["--top", "101"], 2, "101"),
        ("events.csv", &["--format", "parquet"], 2, "--out"),
        ("events.csv", &["--out", &nowhere], 2, "out.csv"),
    ] {
        let finished = recommend(&shop, events, more);
        assert_eq!(finished.code, Some(code), "{finished:#?}");
        assert!(finished.stderr.contains(message) && finished.stdout.is_empty(), "{finished:#?}");
    }
    let skipped = recommend(&shop, "broken.csv", &["--skip-bad-rows"]).success();
    assert!(skipped.stderr.contains("warning: 1 of 12000 rows cannot be read"), "{skipped:#?}");
    // A model that only counts is refused before it is trained.
    let (config, data) = (shop.path("counts.toml"), shop.path("data"));
    fs::write(&config, "[data]\nfirst_day = 1\nlast_day = 2\n[model]\nkind = \"popularity\"\n")
        .unwrap();
    let (run, out) = (shop.path("counts"), shop.path("repository"));
    let refused = shop.run(&[
        "train",
        "--config",
        &config,
        "--data",
        &data,
        "--run-dir",
        &run,
        "--export",
        &out,
    ]);
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(!PathBuf::from(run).exists());
}
