//! One shop, in every form in which it may come.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use bireme_etl::{Options, preprocess};
use flate2::Compression;
use flate2::write::GzEncoder;
use polars::prelude::*;

use crate::support::{bytes, run, scratch, shop};

fn output(dir: &Path, events: Vec<PathBuf>) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    let mut options = Options::new(events, dir.join("other"));
    options.n_buckets = Some(2);
    preprocess(&options, &mut |_| {}).unwrap();
    bytes(&options.out)
}

/// The shop, and what its plain file gives.
fn plain(dir: &Path) -> (String, std::collections::BTreeMap<PathBuf, Vec<u8>>) {
    let csv = shop(500);
    run(dir, &csv, |_| {}).unwrap();
    (csv, bytes(&dir.join("out")))
}

#[test]
fn gzip_gives_the_same() {
    let dir = scratch();
    let (csv, expected) = plain(dir.path());
    let path = dir.path().join("events.csv.gz");
    let mut gz = GzEncoder::new(File::create(&path).unwrap(), Compression::fast());
    gz.write_all(csv.as_bytes()).unwrap();
    gz.finish().unwrap();
    assert!(output(dir.path(), vec![path]) == expected);
}

#[test]
fn several_files_with_columns_in_any_order_give_the_same() {
    let dir = scratch();
    let (csv, expected) = plain(dir.path());
    let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    let (header, rows) = rows.split_first().unwrap();
    let mut paths = Vec::new();
    for (i, rows) in rows.chunks(rows.len() / 3 + 1).enumerate() {
        let mut text = String::new();
        for row in std::iter::once(header).chain(rows) {
            // The second file has its columns backwards and one more, and Windows' line ends.
            let mut row = row.clone();
            if i == 1 {
                row.reverse();
                row.push("\"more, of\"\"it\"");
            }
            text += &row.join(",");
            text += if i == 1 { "\r\n" } else { "\n" };
        }
        let path = dir.path().join(format!("part-{i}.csv"));
        fs::write(&path, text).unwrap();
        paths.push(path);
    }
    assert_eq!(paths.len(), 3);
    assert!(output(dir.path(), paths) == expected);
}

#[test]
fn parquet_gives_the_same() {
    let dir = scratch();
    let (csv, expected) = plain(dir.path());
    let mut table = CsvReadOptions::default()
        .with_has_header(true)
        .into_reader_with_file_handle(std::io::Cursor::new(csv.as_bytes()))
        .finish()
        .unwrap();
    // Once with times as text, once as times.
    for unit in [None, Some(TimeUnit::Milliseconds), Some(TimeUnit::Nanoseconds)] {
        if let Some(unit) = unit {
            let per_second = if unit == TimeUnit::Milliseconds { 1_000 } else { 1_000_000_000 };
            let seconds = csv.lines().skip(1).map(|line| {
                let time = chrono::NaiveDateTime::parse_from_str(&line[..19], "%Y-%m-%d %H:%M:%S").unwrap();
                time.and_utc().timestamp() * per_second
            });
            let times = Int64Chunked::from_vec("event_time".into(), seconds.collect());
            table.with_column(times.into_datetime(unit, Some(TimeZone::UTC)).into_column()).unwrap();
        }
        let path = dir.path().join("events.parquet");
        ParquetWriter::new(File::create(&path).unwrap()).finish(&mut table).unwrap();
        assert!(output(dir.path(), vec![path]) == expected, "{unit:?}");
        fs::remove_dir_all(dir.path().join("other")).unwrap();
    }
}

#[test]
fn optional_columns_may_be_missing() {
    let dir = scratch();
    let csv: String = shop(300)
        .lines()
        .map(|line| {
            let cells: Vec<_> = line.split(',').collect();
            [0, 1, 2, 3, 6, 8].map(|i| cells[i]).join(",") + "\n"
        })
        .collect();
    let report = run(dir.path(), &csv, |_| {}).unwrap();
    assert_eq!(report.n_values[3..6].iter().filter(|n| **n == 0).count(), 2, "{:?}", report.n_values);
    for row in crate::support::rows(&dir.path().join("out")) {
        assert!(
            row.lists["brand-list_seq"]
                .iter()
                .chain(&row.lists["category_code-list_seq"])
                .all(|id| *id == 1.0)
        );
    }
}

#[test]
fn a_header_alone_in_one_of_two_files_does_no_harm() {
    let dir = scratch();
    let (csv, expected) = plain(dir.path());
    let (empty, full) = (dir.path().join("empty.csv"), dir.path().join("full.csv"));
    fs::write(&empty, format!("{}\n", crate::support::HEADER)).unwrap();
    fs::write(&full, csv).unwrap();
    assert!(output(dir.path(), vec![empty, full]) == expected);
}
