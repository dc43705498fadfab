//! A workflow that was saved and loaded again encodes the events as the fit did.

use std::collections::BTreeMap;
use std::fs;

use bireme_etl::serving::{ModelColumn, Preprocessor, ServingSettings};
use bireme_etl::{Coded, ColumnValue, ITEMS, ProductInWords, Settings, WORKFLOW, Workflow};
use bireme_protocol::{DataType as Type, Parameter, Tensor};
use polars::prelude::*;

use crate::support::{HEADER, bytes, rows, run, scratch, shop, table_rows};

/// A table of text, as from a CSV file.
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
    let applied = workflow.apply(&table(&csv), &workflow.statistics.settings).unwrap();
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
fn the_catalogue_has_each_item_as_its_latest_event_describes_it() {
    let dir = scratch();
    let csv = shop(600);
    run(dir.path(), &csv, |_| {}).unwrap();
    let out = dir.path().join("out");
    let workflow = Workflow::load(&out.join(WORKFLOW)).unwrap();
    // Times are texts of one length, so that they are sorted as texts.
    let mut latest: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
    for line in csv.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        let (time, product, session) = (cells[0], cells[2], cells[8]);
        let known = latest.entry(product).or_insert((time, line));
        if !session.is_empty() && time >= known.0 {
            *known = (time, line);
        }
    }
    // Each event is a session of its own.
    let rows = latest.values().enumerate().map(|(number, (_, line))| {
        let (event, _) = line.rsplit_once(',').unwrap();
        format!("{event},alone{number}")
    });
    let events = format!("{HEADER}\n{}\n", rows.collect::<Vec<_>>().join("\n"));
    let settings = Settings { min_length: 1, ..workflow.statistics.settings.clone() };
    let sessions = workflow.apply(&table(&events), &settings).unwrap().sessions;
    let alone = |row: usize| {
        LISTS.map(|name| {
            let list = sessions.column(name).unwrap().list().unwrap().get_as_series(row).unwrap();
            assert_eq!(list.len(), 1);
            list.get(0).unwrap().into_static()
        })
    };
    let mut expected: Vec<_> = (0..sessions.height()).map(alone).collect();
    expected.sort_by_key(|row| row[0].extract::<i64>());
    let items = fs::File::open(out.join(ITEMS)).unwrap();
    let items = ParquetReader::new(items).finish().unwrap();
    let of_file =
        |row: usize| LISTS.map(|name| items.column(name).unwrap().get(row).unwrap().into_static());
    let found: Vec<_> = (0..items.height()).map(of_file).collect();
    // Events in no session may describe products that are no items.
    expected.retain(|row| row[0].extract::<i64>() > Some(1));
    assert!(found.len() > 20);
    assert_eq!(found, expected);
}

/// The columns of a catalogue.
const LISTS: [&str; 6] = [
    "product_id-list_seq",
    "category_code-list_seq",
    "brand-list_seq",
    "category_id-list_seq",
    "price_log_norm-list_seq",
    "relative_price_to_avg_categ_id-list_seq",
];

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
        "{HEADER}\n\
         {time},swipe,99999999,7,no.such,nobody,10,1,new-a\n{time},view,1000,8,,,5,1,new-b\n\
         {time},view,99999998,9,,,12,1,new-a\n{time},view,1001,8,,,5,1,new-b\n"
    );
    let applied = workflow.apply(&table(&csv), &workflow.statistics.settings).unwrap();
    assert_eq!(
        applied.session_ids,
        ["new-a", "new-b"],
        "both new sessions, in the order in which they came"
    );
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

/// The columns of events as a request's tensors.
fn request(csv: &str) -> Vec<Tensor> {
    let mut lines = csv.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let header = lines.next().unwrap();
    let rows: Vec<_> = lines.collect();
    let tensor = |(i, name): (usize, &&str)| {
        let shape = [rows.len() as i64, 1];
        let cells = rows.iter().map(|row| row[i]);
        match *name {
            "product_id" | "category_id" | "user_id" => {
                Tensor::ints(name, &shape, cells.map(|cell| cell.parse().unwrap()))
            }
            "price" => Tensor {
                name: (*name).into(),
                datatype: Type::Fp64,
                shape: shape.to_vec(),
                data: cells.flat_map(|cell| cell.parse::<f64>().unwrap().to_le_bytes()).collect(),
            },
            _ => Tensor::texts(name, &shape, cells),
        }
    };
    header.iter().enumerate().map(tensor).collect()
}

fn preprocessor(dir: &std::path::Path, max_length: usize) -> Preprocessor {
    run(dir, &shop(300), |_| {}).unwrap();
    let columns = [("product_id-list_seq", true), ("price_log_norm-list_seq", false)];
    let settings = ServingSettings {
        max_length,
        columns: columns
            .map(|(column, is_categorical)| ModelColumn::new(column, is_categorical))
            .to_vec(),
        top_k: 20,
        max_top_k: 100,
        max_sessions: 3,
        n_recommendable: Some(30),
    };
    Preprocessor::new(Workflow::load(&dir.join("out").join(WORKFLOW)).unwrap(), settings)
}

fn output<'a>(outputs: &'a [Tensor], name: &str) -> &'a Tensor {
    outputs
        .iter()
        .find(|tensor| tensor.name == name)
        .unwrap_or_else(|| panic!("no output `{name}`"))
}

#[test]
fn a_request_becomes_padded_rows_in_its_own_order() {
    let dir = scratch();
    let preprocessor = preprocessor(dir.path(), 3);
    let known = |id: u32| match preprocessor.workflow().vocabulary(Coded::Product).value(id) {
        Some(ColumnValue::Int(product)) => product,
        other => panic!("{other:?}"),
    };
    let (a, b, c, d) = (known(2), known(3), known(4), known(5));
    let event = |second: u32, product: i64, session: &str| {
        format!("2020-01-01 00:00:{second:02} UTC,view,{product},7,,,10,1,{session}\n")
    };
    // One session of four events out of order, one of a single event, one of an unknown item alone.
    let csv = [
        format!("{HEADER}\n"),
        event(9, d, "z"),
        event(1, a, "z"),
        event(2, a, "y"),
        event(5, c, "z"),
        event(3, b, "z"),
        event(4, 99, "x"),
    ]
    .concat();
    let tensors = request(&csv);
    let mut views: Vec<_> = tensors.iter().map(Tensor::view).collect();
    let seen = [("exclude_seen".to_owned(), Parameter::Bool(true))];
    let outputs = preprocessor.apply(&views, &seen).unwrap();
    assert_eq!(output(&outputs, "session").view().texts().unwrap(), ["z", "y", "x"]);
    let ints = |name: &str| output(&outputs, name).view().i64s().unwrap();
    assert_eq!(
        ints("product_id_list_seq"),
        [3, 4, 5, 2, 0, 0, 1, 0, 0],
        "the last three events of `z`"
    );
    assert_eq!(ints("length"), [3, 1, 1]);
    assert_eq!(output(&outputs, "hidden").shape, [3, 4], "all four items of `z` have been seen");
    assert_eq!(ints("hidden"), [2, 3, 4, 5, 2, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(output(&outputs, "places").shape, [3, 20]);
    let prices = output(&outputs, "price_log_norm_list_seq").view().f32s().unwrap();
    assert!(prices[0] != 0.0 && prices[4] == 0.0 && prices.iter().all(|price| price.is_finite()));

    let top_k = Tensor {
        name: "top_k".into(),
        datatype: Type::Int32,
        shape: vec![1],
        data: vec![7, 0, 0, 0],
    };
    views.push(top_k.view());
    let outputs = preprocessor.apply(&views, &[]).unwrap();
    assert_eq!(output(&outputs, "places").shape, [3, 7]);
    assert!(output(&outputs, "hidden").view().i64s().unwrap().iter().all(|&item| item == 0));
}

#[test]
fn requests_that_make_no_sense_get_one_line() {
    let dir = scratch();
    let preprocessor = preprocessor(dir.path(), 20);
    let row = "2020-01-01 00:00:00 UTC,view,1000,7,,,10,1,s";
    let good = request(&format!("{HEADER}\n{row}"));
    let refused = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
        preprocessor.apply(&views, &[]).unwrap_err()
    };
    let set = |name: &'static str, with: Tensor| {
        move |tensors: &mut Vec<Tensor>| {
            *tensors.iter_mut().find(|tensor| tensor.name == name).unwrap() = with.clone();
        }
    };
    let many = format!("{HEADER}\n{row}1\n{row}2\n{row}3\n{row}4");
    let nan = Tensor { data: f64::NAN.to_le_bytes().to_vec(), ..good[6].clone() };
    let cases: [(String, &str); 8] = [
        (refused(&|tensors| drop(tensors.remove(0))), "input `event_time` is missing"),
        (
            refused(&set("price", Tensor::ints("price", &[1, 1], [1]))),
            "`price` must be of type FP64, not INT64",
        ),
        (refused(&set("price", nan)), "row 1, column `price`: NaN is not a price"),
        (
            refused(&set("event_time", Tensor::texts("event_time", &[1, 1], ["noon"]))),
            "column `event_time`: `noon`",
        ),
        (
            refused(&set("product_id", Tensor::ints("product_id", &[2, 1], [1, 2]))),
            "has 2 rows, input `event_time` 1",
        ),
        (
            refused(&set("user_session", Tensor::texts("user_session", &[1, 1], [""]))),
            "none of the 1 rows",
        ),
        (refused(&|tensors| *tensors = request(HEADER)), "none of the 0 rows"),
        (
            refused(&|tensors| *tensors = request(&many)),
            "the request holds 4 sessions, and at most 3",
        ),
    ];
    for (message, expected) in cases {
        assert!(
            message.contains(expected) && !message.contains('\n'),
            "{message:?} lacks {expected:?}"
        );
    }
}

#[test]
fn a_product_is_described_by_its_latest_event() {
    let dir = scratch();
    let csv = format!(
        "{HEADER}\n2019-10-01 00:00:00 UTC,view,5,7,old.code,old,10,1,s\n\
         2019-10-01 00:00:09 UTC,view,5,7,new.code,,12.5,1,t\n\
         2019-10-01 00:00:05 UTC,view,6,7,,b,1,1,s\n\
         2019-10-01 00:00:07 UTC,view,6,7,,b,2,1,t\n"
    );
    run(dir.path(), &csv, |_| {}).unwrap();
    let workflow = Workflow::load(&dir.path().join("out").join(WORKFLOW)).unwrap();
    let five =
        ProductInWords { product_id: 5, category_code: Some("new.code"), brand: None, price: 12.5 };
    let six = ProductInWords { product_id: 6, category_code: None, brand: Some("b"), price: 2.0 };
    assert_eq!(workflow.product(5), Some(five));
    assert_eq!(workflow.product(6), Some(six));
    assert_eq!(workflow.product(7), None);
    let without = workflow.without_visitors();
    assert_eq!(
        (without.vocabulary(Coded::Session).len(), without.vocabulary(Coded::Product).len()),
        (0, 2)
    );
}

#[test]
fn a_table_with_another_byte_is_refused() {
    let dir = scratch();
    run(dir.path(), &shop(100), |_| {}).unwrap();
    let workflow = dir.path().join("out").join(WORKFLOW);
    let files = bytes(&workflow);
    assert_eq!(files.len(), 10);
    for (path, content) in files {
        let path = workflow.join(path);
        // The middle of a file holds values, its end the metadata.
        for place in [content.len() / 2, content.len() - 6] {
            let mut changed = content.clone();
            changed[place] ^= 4;
            fs::write(&path, &changed).unwrap();
            let loaded = Workflow::load(&workflow);
            if path.ends_with("statistics.json") {
                continue;
            }
            let message = loaded.unwrap_err().to_string();
            assert!(message.contains(path.file_name().unwrap().to_str().unwrap()), "{message}");
        }
        fs::write(&path, content).unwrap();
    }
    Workflow::load(&workflow).unwrap();
}
