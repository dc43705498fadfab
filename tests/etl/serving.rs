//! A workflow that was saved and loaded again encodes the events as the fit did.

use std::collections::BTreeMap;
use std::fs;

use bireme_etl::{WORKFLOW, Workflow};
use polars::prelude::*;

use crate::support::{HEADER, bytes, rows, run, scratch, shop, table_rows};

/// A table of text, as it would come out of a CSV file.
fn table(csv: &str) -> DataFrame {
    let mut lines = csv.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let header = lines.next().unwrap();
    let rows: Vec<_> = lines.collect();
    let columns = header.iter().enumerate().map(|(i, name)| {
        let cells = rows.iter().map(|row| Some(row[i]).filter(|cell| !cell.is_empty()));
        StringChunked::from_iter_options((*name).into(), cells).into_column()
    });
    DataFrame::new(rows.len(), columns.collect()).unwrap()
}

#[test]
fn apply_after_load_gives_what_preprocess_wrote() {
    let dir = scratch();
    let csv = shop(600);
    run(dir.path(), &csv, |_| {}).unwrap();
    let out = dir.path().join("out");
    let workflow = Workflow::load(&out.join(WORKFLOW)).unwrap();
    let applied = workflow.apply(&table(&csv)).unwrap();
    let served = table_rows(&applied.sessions, &workflow);
    let ids: Vec<_> = served.iter().map(|row| row.session.clone()).collect();
    assert_eq!(ids, applied.session_ids);
    let served: BTreeMap<_, _> = served.into_iter().map(|row| (row.session.clone(), row)).collect();
    let written = rows(&out);
    assert_eq!(written.len(), served.len());
    for row in written {
        let served = &served[&row.session];
        assert_eq!((row.count, &row.products), (served.count, &served.products));
        assert_eq!(row.lists, served.lists, "{}", row.session);
    }
}

#[test]
fn a_loaded_workflow_saves_the_same_files() {
    let dir = scratch();
    run(dir.path(), &shop(300), |options| options.days = Some(2..=5)).unwrap();
    let saved = dir.path().join("out").join(WORKFLOW);
    let again = dir.path().join("again");
    fs::create_dir(&again).unwrap();
    Workflow::load(&saved).unwrap().save(&again).unwrap();
    let (saved, again) = (bytes(&saved), bytes(&again));
    assert!(saved.keys().eq(again.keys()));
    for (path, bytes) in &saved {
        assert!(bytes == &again[path], "{}", path.display());
    }
}

#[test]
fn unknown_values_are_served_as_unknown() {
    let dir = scratch();
    run(dir.path(), &shop(300), |_| {}).unwrap();
    let workflow = Workflow::load(&dir.path().join("out").join(WORKFLOW)).unwrap();
    let time = "2030-01-01 00:00:00 UTC";
    let csv = format!(
        "{HEADER}\n{time},swipe,99999999,7,no.such,nobody,10,1,new-a\n{time},view,1000,8,,,5,1,new-b\n\
         {time},view,99999998,9,,,12,1,new-a\n{time},view,1001,8,,,5,1,new-b\n"
    );
    let applied = workflow.apply(&table(&csv)).unwrap();
    assert_eq!(applied.session_ids, ["new-a", "new-b"], "both new sessions, in the order in which they came");
    let ids = |name: &str, row: usize| -> Vec<i64> {
        let lists = applied.sessions.column(name).unwrap().list().unwrap().clone();
        lists.get_as_series(row).unwrap().i64().unwrap().into_no_null_iter().collect()
    };
    assert_eq!(ids("product_id-list_seq", 0), [1, 1]);
    assert_eq!(ids("category_id-list_seq", 0), [1, 1]);
    assert_eq!(ids("event_type-list_seq", 0)[0], 1);
    assert_eq!(ids("brand-list_seq", 0), [1, 1]);
    let floats = applied.sessions.column("relative_price_to_avg_categ_id-list_seq").unwrap();
    let relative = floats.list().unwrap().get_as_series(0).unwrap();
    assert_eq!(relative.f64().unwrap().into_no_null_iter().collect::<Vec<_>>(), [0.0, 0.0]);
    for column in applied.sessions.columns().iter().filter(|column| column.dtype().is_list()) {
        let values = column.list().unwrap().get_inner().cast(&DataType::Float64).unwrap();
        assert!(
            values.f64().unwrap().iter().all(|value| value.is_some_and(f64::is_finite)),
            "{}",
            column.name()
        );
    }
}
