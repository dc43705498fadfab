//! The events of a session are ordered by time at the resolution of the data, and by their place in
//! the files where times are equal.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use bireme_etl::serving::{ModelColumn, Preprocessor, ServingSettings};
use bireme_etl::{BadRows, PreprocessOptions, WORKFLOW, Workflow, first_events, preprocess};
use bireme_protocol::{DataType as Type, Tensor};
use polars::prelude::*;
use rayon::ThreadPoolBuilder;

use crate::support::{HEADER, Random, bytes, rows, run, scratch};

/// The products of each session in their order.
fn products(out: &Path) -> Vec<Vec<i64>> {
    let mut rows = rows(out);
    rows.sort_by(|a, b| a.session.cmp(&b.session));
    rows.into_iter().map(|row| row.products).collect()
}

/// Rows with times that differ, many of them within one second and some by a nanosecond.
fn events(n: u64) -> Vec<String> {
    let mut random = Random(3);
    (0..n)
        .map(|i| {
            let (second, nanos) = (i / 20 % 60, i * 50_000_000 % 1_000_000_000 + i);
            let (minute, product, session) = (i / 1200, random.below(40), random.below(n / 8));
            format!(
                "2019-10-{:02} 10:{minute:02}:{second:02}.{nanos:09} \
                 UTC,view,{product},{},,brand{},{}.5,1,{session:x}s",
                1 + random.below(3),
                product % 7,
                random.below(5),
                random.below(90),
            )
        })
        .collect()
}

fn write(path: PathBuf, rows: &[String]) -> PathBuf {
    fs::write(&path, format!("{HEADER}\n{}\n", rows.join("\n"))).unwrap();
    path
}

#[test]
fn the_order_of_rows_files_and_threads_leave_no_trace() {
    let mut rows = events(4000);
    let mut first = None;
    let mut random = Random(5);
    for (n_files, threads) in [(1, 1), (1, 8), (3, 2), (7, 8)] {
        let dir = scratch();
        let files = rows.chunks(rows.len() / n_files + 1).enumerate();
        let files = files.map(|(i, rows)| write(dir.path().join(format!("{i}.csv")), rows));
        let mut options = PreprocessOptions::new(files.collect(), dir.path().join("out"));
        options.n_buckets = Some(n_files);
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| preprocess(&options, &mut |_| {})).unwrap();
        let out = bytes(&options.out);
        let first = first.get_or_insert_with(|| out.clone());
        assert!(first.keys().eq(out.keys()));
        for (path, bytes) in &out {
            assert!(
                bytes == &first[path],
                "{}: {n_files} files, {threads} threads",
                path.display()
            );
        }
        for i in (1..rows.len()).rev() {
            rows.swap(i, random.below(i as u64 + 1) as usize);
        }
    }
}

fn row(time: &str, product: u32) -> String {
    format!("{time},view,{product},7,,b{product},{product},1,s")
}

#[test]
fn equal_times_keep_the_order_of_the_files() {
    let dir = scratch();
    let time = "2019-10-01 10:00:00.5 UTC";
    let files = [[5, 3], [4, 1], [2, 6]].map(|products| products.map(|product| row(time, product)));
    let files = [2, 0, 1].map(|i| write(dir.path().join(format!("{i}.csv")), &files[i]));
    for threads in [1, 2, 8] {
        let out = dir.path().join(threads.to_string());
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = PreprocessOptions::new(files.to_vec(), out.clone());
        pool.install(|| preprocess(&options, &mut |_| {})).unwrap();
        assert_eq!(products(&out), [[2, 6, 5, 3, 4, 1]]);
    }
}

#[test]
fn resolutions_may_be_mixed() {
    let dir = scratch();
    let texts = [
        row("2019-10-01 10:00:00.000000002 UTC", 3),
        row("2019-10-01T10:00:00.0000000020000Z", 4),
        row("2019-10-01 10:00:00 UTC", 1),
        row("2019-10-01 10:00:00.1+00:00", 7),
        row("1969-12-31 23:59:59.7", 101),
        row("1969-12-31 23:59:59.6", 100),
    ];
    let mut files = vec![write(dir.path().join("text.csv"), &texts)];
    let start = 1_569_924_000_i64;
    for (name, unit, per_second, events) in [
        ("ms", TimeUnit::Milliseconds, 1_000, [(1, 6), (2, 8)]),
        ("us", TimeUnit::Microseconds, 1_000_000, [(1, 5), (100_001, 9)]),
        ("ns", TimeUnit::Nanoseconds, 1_000_000_000, [(1, 2), (2, 10)]),
    ] {
        let ticks = events.map(|(ticks, _)| start * per_second + ticks);
        // The second event is two milliseconds, 100001 microseconds or two seconds after the start.
        let ticks = if name == "ns" { [ticks[0], ticks[0] + 2_000_000_000] } else { ticks };
        let times = Int64Chunked::from_vec("event_time".into(), ticks.to_vec());
        let ints = |name: &str, values: Vec<i64>| Column::new(name.into(), values);
        let texts = |name: &str, value: &str| Column::new(name.into(), vec![value.to_owned(); 2]);
        let columns = vec![
            times.into_datetime(unit, None).into_column(),
            texts("event_type", "view"),
            ints("product_id", events.map(|(_, product)| product).to_vec()),
            ints("category_id", vec![7; 2]),
            Column::new("price".into(), vec![1.0; 2]),
            texts("user_session", "s"),
        ];
        let path = dir.path().join(format!("{name}.parquet"));
        let mut table = DataFrame::new(2, columns).unwrap();
        ParquetWriter::new(File::create(&path).unwrap()).finish(&mut table).unwrap();
        files.push(path);
    }
    let options = PreprocessOptions::new(files.clone(), dir.path().join("out"));
    preprocess(&options, &mut |_| {}).unwrap();
    let expected = [100, 101, 1, 2, 3, 4, 5, 6, 8, 7, 9, 10];
    assert_eq!(products(&options.out), [expected]);
    let (first, _) = first_events(&files, 5, BadRows::Refuse).unwrap();
    let first: Vec<i64> = first.into_iter().map(|event| event.product_id).collect();
    assert_eq!(first, expected[..5]);
}

#[test]
fn what_is_derived_is_derived_from_seconds() {
    let times = ["10:00:00", "10:00:07", "23:59:59"];
    let out = |fraction: &str| {
        let dir = scratch();
        let rows = times.iter().zip(1..).map(|(time, product)| {
            row(&format!("2019-10-01 {time}{fraction} UTC"), product) + "\n"
        });
        run(dir.path(), &format!("{HEADER}\n{}", rows.collect::<String>()), |_| {}).unwrap();
        bytes(&dir.path().join("out/sessions_by_day"))
    };
    assert!(out("") == out(".999999999"));
}

#[test]
fn the_latest_event_describes_a_product_also_after_an_extension() {
    let dir = scratch();
    let event = |time: &str, brand: &str, session: &str| {
        format!(
            "{time} UTC,view,1,7,,{brand},1,1,{session}\n\
             2019-10-03 12:00:00 UTC,view,2,7,,,1,1,{session}\n"
        )
    };
    let later = event("2019-10-01 10:00:00.9", "later", "a");
    let earlier = event("2019-10-01 10:00:00.1", "earlier", "b");
    let brand = || {
        let workflow = Workflow::load(&dir.path().join("out").join(WORKFLOW)).unwrap();
        workflow.product(1).unwrap().brand.map(str::to_owned)
    };
    run(dir.path(), &format!("{HEADER}\n{later}{earlier}"), |_| {}).unwrap();
    assert_eq!(brand().as_deref(), Some("later"));
    let new = format!(
        "{HEADER}\n{}{}",
        earlier,
        event("2019-10-05 10:00:00", "new", "c").replace("view,1,", "view,3,")
    );
    run(dir.path(), &new, |options| options.extend = true).unwrap();
    assert_eq!(brand().as_deref(), Some("later"));
}

#[test]
fn requests_in_service_are_ordered_alike() {
    let dir = scratch();
    let times = ["10:00:00.3", "10:00:00.000000001", "10:00:00", "09:59:59.9999"];
    let rows = times
        .iter()
        .zip(1..)
        .map(|(time, product)| row(&format!("2019-10-01T{time}Z"), product) + "\n");
    run(dir.path(), &format!("{HEADER}\n{}", rows.collect::<String>()), |_| {}).unwrap();
    let workflow = Workflow::load(&dir.path().join("out").join(WORKFLOW)).unwrap();
    let id = |product: i64| {
        i64::from(
            workflow
                .vocabulary(bireme_etl::Coded::Product)
                .id(bireme_etl::ColumnValue::Int(product)),
        )
    };
    let expected: Vec<i64> = [4, 3, 2, 1].map(id).to_vec();
    let settings = ServingSettings {
        max_length: 4,
        columns: vec![ModelColumn::new("product_id-list_seq", true)],
        top_k: 1,
        max_top_k: 1,
        n_recommendable: None,
        max_sessions: 1,
    };
    let preprocessor = Preprocessor::new(workflow, settings);
    let texts = |name: &str, of: &[&str]| Tensor::texts(name, &[4, 1], of.iter().copied());
    let times = times.map(|time| format!("2019-10-01 {time} UTC"));
    let inputs = [
        texts("event_time", &times.each_ref().map(String::as_str)),
        texts("event_type", &["view"; 4]),
        Tensor::ints("product_id", &[4, 1], 1..5),
        Tensor::ints("category_id", &[4, 1], [7; 4]),
        Tensor {
            name: "price".into(),
            datatype: Type::Fp64,
            shape: vec![4, 1],
            data: [1.0_f64; 4].iter().flat_map(|price| price.to_le_bytes()).collect(),
        },
        texts("user_session", &["s"; 4]),
    ];
    let views: Vec<_> = inputs.iter().map(Tensor::view).collect();
    let outputs = preprocessor.apply(&views, &[]).unwrap();
    assert_eq!(outputs[1].view().i64s().unwrap(), expected);
}
