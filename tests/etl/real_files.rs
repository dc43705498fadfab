//! On real files, days, sessions and catalogues agree with a count that shares no code with the
//! crate.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use bireme_base::user_error::UserError;
use bireme_etl::{
    BadRows, Coded, Error, PreprocessOptions, PreprocessReport, WORKFLOW, Workflow, preprocess,
};
use chrono::NaiveDateTime;

use crate::support::{days, decoded, rows, scratch, shared};

/// The result of an independent count of a file.
struct Recount {
    n_rows: u64,
    n_repeats: u64,
    /// Sessions of two events or more, by day.
    sessions: BTreeMap<i64, BTreeSet<String>>,
    n_sessions: u64,
    /// Distinct non-null values without repeats, by column, with their counts.
    values: HashMap<String, HashMap<String, u64>>,
    products_of: HashMap<String, Vec<i64>>,
}

fn recount(path: &Path) -> Recount {
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_path(path).unwrap();
    let header: Vec<String> = reader.headers().unwrap().iter().map(ToString::to_string).collect();
    let at = |name: &str| header.iter().position(|column| column == name).unwrap();
    let mut events: BTreeMap<String, Vec<(i64, csv::StringRecord)>> = BTreeMap::new();
    let mut n_rows = 0;
    for row in reader.records().map(Result::unwrap).filter(|row| row.len() == header.len()) {
        n_rows += 1;
        let time =
            NaiveDateTime::parse_from_str(&row[at("event_time")], "%Y-%m-%d %H:%M:%S UTC").unwrap();
        if !row[at("user_session")].is_empty() {
            let session = row[at("user_session")].to_string();
            events.entry(session).or_default().push((time.and_utc().timestamp(), row));
        }
    }
    let first = events.values().flatten().map(|(time, _)| *time).min().unwrap();
    let mut found = Recount {
        n_rows,
        n_repeats: 0,
        sessions: BTreeMap::new(),
        n_sessions: events.len() as u64,
        values: HashMap::new(),
        products_of: HashMap::new(),
    };
    for (session, mut rows) in events {
        // Stable: equal seconds stay in file order.
        rows.sort_by_key(|(time, _)| *time);
        let mut kept: Vec<(i64, csv::StringRecord)> = Vec::new();
        for row in rows {
            if kept
                .last()
                .is_some_and(|(_, last)| last[at("product_id")] == row.1[at("product_id")])
            {
                found.n_repeats += 1;
            } else {
                kept.push(row);
            }
        }
        for (_, row) in &kept {
            for (column, value) in
                header.iter().zip(row.iter()).filter(|(_, value)| !value.is_empty())
            {
                *found
                    .values
                    .entry(column.clone())
                    .or_default()
                    .entry(value.to_owned())
                    .or_default() += 1;
            }
        }
        if kept.len() >= 2 {
            found
                .sessions
                .entry((kept[0].0 - first) / 86_400 + 1)
                .or_default()
                .insert(session.clone());
        }
        let products = kept.iter().map(|(_, row)| row[at("product_id")].parse().unwrap()).collect();
        found.products_of.insert(session, products);
    }
    found
}

fn check(path: &Path, bad_rows: BadRows) -> (PreprocessReport, Recount) {
    let dir = scratch();
    let mut options = PreprocessOptions::new(vec![path.to_owned()], dir.path().join("out"));
    options.bad_rows = bad_rows;
    options.n_buckets = Some(3);
    let report = preprocess(&options, &mut |_| {}).unwrap();
    let recount = recount(path);

    assert_eq!(report.rows.read - report.rows.bad, recount.n_rows);
    assert_eq!(report.n_repeats, recount.n_repeats);
    assert_eq!(report.n_sessions, recount.n_sessions);
    assert_eq!(days(&options.out), recount.sessions.keys().copied().collect::<Vec<_>>());
    let mut written: BTreeMap<i64, BTreeSet<String>> = BTreeMap::new();
    for row in rows(&options.out) {
        let products = &recount.products_of[&row.session];
        assert_eq!(row.count as usize, products.len(), "{}", row.session);
        assert_eq!(row.products, products[..products.len().min(20)], "{}", row.session);
        assert!(
            written.entry(row.day_index).or_default().insert(row.session),
            "a session is there twice"
        );
    }
    assert_eq!(written, recount.sessions);

    let workflow = Workflow::load(&options.out.join(WORKFLOW)).unwrap();
    for column in Coded::ALL {
        let values = recount.values.get(column.name()).cloned().unwrap_or_default();
        let vocabulary = workflow.vocabulary(column);
        assert_eq!(vocabulary.len(), values.len(), "{}", column.name());
        let mut ranked: Vec<(u64, String)> =
            values.into_iter().map(|(value, count)| (count, value)).collect();
        let is_int = ranked.iter().all(|(_, value)| value.parse::<i64>().is_ok());
        let as_int = |value: &str| if is_int { value.parse::<i64>().unwrap() } else { 0 };
        ranked.sort_by(|a, b| {
            let by_value = as_int(&a.1).cmp(&as_int(&b.1)).then_with(|| a.1.cmp(&b.1));
            b.0.cmp(&a.0).then(by_value)
        });
        for (place, (count, value)) in ranked.into_iter().enumerate() {
            let id = place as u32 + 2;
            assert_eq!(
                decoded(&workflow, column, i64::from(id)),
                Some(value),
                "{} {id}",
                column.name()
            );
            assert_eq!(vocabulary.count(id).map(u64::from), Some(count), "{} {id}", column.name());
        }
    }
    (report, recount)
}

#[test]
fn the_electronics_shop_agrees_with_a_recount() {
    let Some(path) = shared("data/rees46-electronics/events.csv") else { return };
    let (report, recount) = check(&path, BadRows::Refuse);
    assert_eq!(report.days.len(), 59);
    assert_eq!(report.rows.bad, 0);
    assert_eq!(report.n_values[Coded::User as usize], 0, "there is no user_id in this file");
    assert!(recount.n_sessions > 20_000);
}

#[test]
fn the_head_of_october_agrees_with_a_recount_once_its_cut_row_is_left_out() {
    let Some(path) = shared("data/rees46-head/2019-Oct.head.csv") else { return };
    let (report, _) = check(&path, BadRows::Skip);
    assert_eq!(report.rows.bad, 1);
}

#[test]
fn the_cut_row_at_the_end_of_october_is_named() {
    let Some(path) = shared("data/rees46-head/2019-Oct.head.csv") else { return };
    let lines = std::fs::read_to_string(&path).unwrap().lines().count() as u64;
    let dir = scratch();
    let error =
        preprocess(&PreprocessOptions::new(vec![path], dir.path().join("out")), &mut |_| {})
            .unwrap_err();
    let Error::BadRow { number, column, problem, place, .. } = &error else { panic!("{error}") };
    assert_eq!((*place, *number, column.as_str()), ("line", lines, "user_session"));
    assert!(problem.contains("8 fields instead of 9"), "{problem}");
    assert_eq!(error.exit_code(), 2);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
