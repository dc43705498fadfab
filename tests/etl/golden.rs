//! Two hundred events are encoded as by NVTabular 0.7.

use std::path::Path;

use bireme_etl::{Coded, PreprocessOptions, SESSIONS_BY_DAY, WORKFLOW, Workflow, preprocess};
use serde_json::Value;

use crate::support::{Row, days, decoded, read, rows, scratch};

const COLUMNS: [(Coded, &str); 5] = [
    (Coded::Product, "product_id-list_seq"),
    (Coded::CategoryCode, "category_code-list_seq"),
    (Coded::EventType, "event_type-list_seq"),
    (Coded::Brand, "brand-list_seq"),
    (Coded::Category, "category_id-list_seq"),
];

fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-5 * b.abs().max(1.0)
}

#[test]
fn the_golden_events_give_the_golden_sessions() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let events = folder.join("etl_events.csv");
    let golden: Value =
        serde_json::from_slice(&std::fs::read(folder.join("etl_golden.json")).unwrap()).unwrap();
    let dir = scratch();
    let out = dir.path().join("out");
    let mut options = PreprocessOptions::new(vec![events], out.clone());
    options.days = Some(1..=7);
    let report = preprocess(&options, &mut |_| {}).unwrap();

    let stats = &golden["stats"];
    assert_eq!(report.rows.read, stats["csv_rows"].as_u64().unwrap());
    assert_eq!(
        report.rows.read - report.rows.without_session,
        stats["rows_with_session"].as_u64().unwrap()
    );
    assert_eq!(
        report.rows.read - report.rows.without_session - report.n_repeats,
        stats["after_dedup"].as_u64().unwrap()
    );
    assert_eq!(report.n_events, stats["first_week"].as_u64().unwrap());
    assert_eq!(report.n_sessions - report.n_short, stats["sessions"].as_u64().unwrap());

    let workflow = Workflow::load(&out.join(WORKFLOW)).unwrap();
    check_statistics(&workflow, &golden);
    check_vocabularies(&workflow, &golden);

    // The columns, in their order.
    let table = read(&out.join(SESSIONS_BY_DAY).join("1/train.parquet"));
    let names: Vec<_> = table.get_column_names().iter().map(|name| name.to_string()).collect();
    let expected = golden["sessions_canonical"][0].as_object().unwrap();
    assert_eq!(names.len(), expected.len() - 2, "all but day_index and the test's own uuid");

    let written = rows(&out);
    let wanted = golden["sessions_canonical"].as_array().unwrap();
    assert_eq!(written.len(), wanted.len());
    for wanted in wanted {
        let id = wanted["uuid"].as_str().unwrap();
        let row = written
            .iter()
            .find(|row| row.session == id)
            .unwrap_or_else(|| panic!("no session {id}"));
        check_session(row, wanted);
    }
    let per_day: Vec<i64> =
        golden["stats"]["days"].as_object().unwrap().keys().map(|d| d.parse().unwrap()).collect();
    assert_eq!(days(&out), per_day);
    for day in report.days {
        let wanted: u64 = stats["days"][day.day_index.to_string()]
            .as_array()
            .unwrap()
            .iter()
            .map(|n| n.as_u64().unwrap())
            .sum();
        assert_eq!(day.n_sessions.iter().sum::<usize>() as u64, wanted, "day {}", day.day_index);
    }
}

fn check_statistics(workflow: &Workflow, golden: &Value) {
    let norm = |name: &str, column: &str, place: usize| {
        golden["stats"]["norm"][name][place][column].as_f64().unwrap()
    };
    let statistics = &workflow.statistics;
    assert!(near(statistics.price_log.mean, norm("price", "price", 0)));
    assert!(near(statistics.price_log.std, norm("price", "price", 1)));
    assert!(near(statistics.recency_log.mean, norm("recency", "event_time_ts_age_days", 0)));
    assert!(near(statistics.recency_log.std, norm("recency", "event_time_ts_age_days", 1)));
    for (category, mean) in golden["avg_price_by_category_id"].as_object().unwrap() {
        let found = workflow.mean_price(category.parse().unwrap()).unwrap();
        assert!(near(found, mean.as_f64().unwrap()), "category {category}: {found}");
    }
}

fn check_vocabularies(workflow: &Workflow, golden: &Value) {
    for column in Coded::ALL.into_iter().filter(|column| *column != Coded::Session) {
        let wanted = &golden["canonical_mappings"][column.name()];
        let (values, counts) =
            (wanted["values"].as_array().unwrap(), wanted["count"].as_array().unwrap());
        assert_eq!(
            workflow.vocabulary(column).cardinality(),
            values.len() + 1,
            "{}",
            column.name()
        );
        for (place, (value, count)) in values.iter().zip(counts).enumerate() {
            let id = place as i64 + 1;
            assert_eq!(decoded(workflow, column, id), text(value), "{} {id}", column.name());
            let found = workflow.vocabulary(column).count(id as u32).map_or(0, u64::from);
            assert_eq!(found, count.as_u64().unwrap(), "{} {id}", column.name());
        }
    }
    // The original encodes sessions twice and breaks ties by the first code: here sessions are
    // identified by their ids.
    let wanted = &golden["canonical_mappings"]["user_session"];
    let (values, counts) =
        (wanted["values"].as_array().unwrap(), wanted["count"].as_array().unwrap());
    let vocabulary = workflow.vocabulary(Coded::Session);
    assert_eq!(vocabulary.cardinality(), values.len() + 1);
    let mut by_count = Vec::new();
    for (value, count) in values.iter().zip(counts).skip(1) {
        let id = golden["pre_user_session"][value.to_string()].as_str().unwrap();
        by_count.push((std::cmp::Reverse(count.as_u64().unwrap()), id.to_owned()));
    }
    by_count.sort();
    for (place, (count, session)) in by_count.into_iter().enumerate() {
        let id = place as u32 + 2;
        assert_eq!(decoded(workflow, Coded::Session, i64::from(id)).unwrap(), session);
        assert_eq!(u64::from(vocabulary.count(id).unwrap()), count.0);
    }
}

fn check_session(row: &Row, wanted: &Value) {
    assert_eq!(row.count, wanted["product_id-count"].as_i64().unwrap(), "{}", row.session);
    assert_eq!(row.day_index, wanted["day_index"].as_i64().unwrap(), "{}", row.session);
    for (name, values) in &row.lists {
        let wanted: Vec<f64> =
            wanted[name].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!(values.len(), wanted.len(), "{} {name}", row.session);
        let is_ids = COLUMNS.iter().any(|(_, column)| column == name);
        for (found, wanted) in values.iter().zip(&wanted) {
            let equal = if is_ids { found == wanted } else { near(*found, *wanted) };
            assert!(equal, "{} {name}: {found} instead of {wanted}", row.session);
        }
    }
    assert_eq!(row.lists.len(), wanted.as_object().unwrap().len() - 4);
}
