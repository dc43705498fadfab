//! One shop in every format that events may have.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use bireme_base::user_error::UserError;
use bireme_etl::{PreprocessOptions, preprocess};
use flate2::Compression;
use flate2::write::GzEncoder;
use polars::prelude::*;

use crate::support::{bytes, run, scratch, shop};

fn output(dir: &Path, events: Vec<PathBuf>) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    let mut options = PreprocessOptions::new(events, dir.join("other"));
    options.n_buckets = Some(2);
    preprocess(&options, &mut |_| {}).unwrap();
    bytes(&options.out)
}

/// The shop, and the output for its plain file.
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
            // The second file has its columns in reverse order and one more, and CRLF.
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

/// The table of a CSV text without quotes: ids and prices as numbers, empty cells as nulls.
fn table(csv: &str) -> DataFrame {
    let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    let columns = rows[0].iter().enumerate().map(|(i, name)| {
        let cells = rows[1..].iter().map(|row| Some(row[i]).filter(|cell| !cell.is_empty()));
        let name = PlSmallStr::from_str(name);
        match name.as_str() {
            "price" => {
                Float64Chunked::from_iter_options(name, cells.map(|cell| cell?.parse().ok()))
                    .into_column()
            }
            "product_id" | "category_id" | "user_id" => {
                Int64Chunked::from_iter_options(name, cells.map(|cell| cell?.parse().ok()))
                    .into_column()
            }
            _ => StringChunked::from_iter_options(name, cells).into_column(),
        }
    });
    DataFrame::new(rows.len() - 1, columns.collect()).unwrap()
}

#[test]
fn parquet_gives_the_same() {
    let dir = scratch();
    let (csv, expected) = plain(dir.path());
    let mut table = table(&csv);
    // Once with times as text, once as times.
    for unit in [None, Some(TimeUnit::Milliseconds), Some(TimeUnit::Nanoseconds)] {
        if let Some(unit) = unit {
            let per_second = if unit == TimeUnit::Milliseconds { 1_000 } else { 1_000_000_000 };
            let seconds = csv.lines().skip(1).map(|line| {
                let time = chrono::NaiveDateTime::parse_from_str(&line[..19], "%Y-%m-%d %H:%M:%S")
                    .unwrap();
                time.and_utc().timestamp() * per_second
            });
            let times = Int64Chunked::from_vec("event_time".into(), seconds.collect());
            table
                .with_column(times.into_datetime(unit, Some(TimeZone::UTC)).into_column())
                .unwrap();
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
    assert_eq!(
        report.n_values[3..6].iter().filter(|n| **n == 0).count(),
        2,
        "{:?}",
        report.n_values
    );
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

/// Writes a file and reads it; `Err` holds the exit code and the message.
fn read(dir: &Path, name: &str, bytes: &[u8]) -> Result<u64, (i32, String)> {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    let mut options = PreprocessOptions::new(vec![path], dir.join("out"));
    options.overwrite = true;
    let report = preprocess(&options, &mut |_| {});
    report
        .map(|report| report.rows.read)
        .map_err(|error| (error.exit_code(), bireme_base::message::chain(&error)))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = GzEncoder::new(Vec::new(), Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

/// Names and contents.
type Files<'a> = &'a [(&'a str, &'a [u8])];

/// An archive of these files.
fn zip(files: Files<'_>) -> Vec<u8> {
    let mut archive = ::zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in files {
        archive.start_file(*name, ::zip::write::SimpleFileOptions::default()).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

#[test]
fn gzip_of_many_members_and_with_zeros_behind_is_read_and_with_other_bytes_refused() {
    let dir = scratch();
    let csv = shop(50);
    let n_rows = csv.lines().count() as u64 - 1;
    let (start, end) = csv.as_bytes().split_at(csv.len() / 2);
    let members = [gzip(start), gzip(b""), gzip(end)];
    let read = |bytes: &[u8]| read(dir.path(), "events.csv", bytes);
    assert_eq!(read(&members.concat()), Ok(n_rows));
    for n_zeros in [1, 512, 1_000_000] {
        assert_eq!(read(&[members.concat(), vec![0; n_zeros]].concat()), Ok(n_rows));
    }
    assert_eq!(read(&members.join(&[0, 0, 0][..])), Ok(n_rows));
    let garbages: [&[u8]; 5] = [b"x", b"\0\0x", b"\x1f", b"\x1f\x8b", b"\x1f\x8bgarbage"];
    for garbage in garbages {
        let (code, text) = read(&[&gzip(csv.as_bytes())[..], garbage].concat()).unwrap_err();
        assert!(code == 2 && text.contains("events.csv"), "{text}");
    }
    let mut broken = gzip(csv.as_bytes());
    let at = broken.len() - 6;
    broken[at] ^= 1;
    assert!(read(&broken).unwrap_err().1.contains("events.csv"));
}

#[test]
fn zstd_is_read_whatever_its_frames() {
    let dir = scratch();
    let csv = shop(50);
    let n_rows = csv.lines().count() as u64 - 1;
    let (start, end) = csv.as_bytes().split_at(csv.len() / 2);
    let frames = [zstd::encode_all(start, 3).unwrap(), zstd::encode_all(end, 3).unwrap()];
    // A skippable frame, as pzstd writes it.
    let skipped = [0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];
    let read = |bytes: &[u8]| read(dir.path(), "events.csv", bytes);
    assert_eq!(read(&frames.concat()), Ok(n_rows));
    assert_eq!(read(&[&skipped[..], &frames[0], &skipped, &frames[1]].concat()), Ok(n_rows));
    let (code, text) = read(&frames[0][..frames[0].len() - 5]).unwrap_err();
    assert!(code == 2 && text.contains("events.csv"), "{text}");
}

#[test]
fn a_zip_archive_is_read_if_it_holds_one_file() {
    let dir = scratch();
    let csv = shop(50);
    let n_rows = csv.lines().count() as u64 - 1;
    let read = |bytes: &[u8]| read(dir.path(), "events.csv", bytes);
    assert_eq!(read(&zip(&[("2019-Oct.csv", csv.as_bytes())])), Ok(n_rows));
    let of_a_mac = [
        ("a/", &b""[..]),
        ("a/2019-Oct.csv", csv.as_bytes()),
        ("__MACOSX/a/._2019-Oct.csv", &b"x"[..]),
    ];
    assert_eq!(read(&zip(&of_a_mac)), Ok(n_rows));
    let cases: &[(Files<'_>, &str)] = &[
        (
            &[("a.csv", b"x"), ("b\x1b.csv", b"y")],
            "a zip archive with 2 files: `a.csv`, `b\\u{1b}.csv`",
        ),
        (&[], "a zip archive without a file"),
        (&[("xl/workbook.xml", b""), ("xl/styles.xml", b"")], "an Excel workbook"),
        (&[("word/document.xml", b""), ("[Content_Types].xml", b"")], "an Office document"),
        (&[("events.parquet", b"PAR1....PAR1")], "a zip archive with a parquet file in it"),
        (&[("events.csv.gz", b"\x1f\x8b...")], "a zip archive with a gzip file in it"),
    ];
    for (files, kind) in cases {
        let (code, text) = read(&zip(files)).unwrap_err();
        assert!(code == 2 && text.ends_with(&format!("it is {kind}")), "{text}");
    }
    let whole = zip(&[("2019-Oct.csv", csv.as_bytes())]);
    for length in [4, 40, whole.len() / 2, whole.len() - 1] {
        let (code, text) = read(&whole[..length]).unwrap_err();
        assert!(code == 2 && text.contains("events.csv"), "{text}");
    }
}

#[test]
fn other_formats_are_refused_by_their_kind() {
    let dir = scratch();
    let utf16: Vec<u8> =
        format!("\u{feff}{}", shop(5)).encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    let cases: &[(&[u8], &str)] = &[
        (b"BZh91AY&SY", "a bzip2 file"),
        (b"\xfd7zXZ\0\0", "an xz file"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07\x01", "a rar archive"),
        (b"ARROW1\0\0", "a feather (Arrow) file"),
        (b"ORC...", "an ORC file"),
        (b"Obj\x01", "an Avro file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook or Office document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file itself"),
        (b"PARE\0\0\0\0PARE", "an encrypted parquet file"),
        (b"{\"event_time\": 1, \"price\": 2}\n", "JSON"),
        (b"<!DOCTYPE html>\n<html></html>", "an HTML page"),
        (b"\x00\x01\x02\x03\x04\n\x05\x06", "no text, but binary data of an unknown kind"),
        (&utf16, "UTF-16 text"),
        (&utf16[2..], "UTF-16 text"),
        (&tar, "a tar archive"),
        (&gzip(&tar), "a gzip file with a tar archive in it"),
        (&gzip(b"PAR1....PAR1"), "a gzip file with a parquet file in it"),
        (&zstd::encode_all(&b"BZh9"[..], 1).unwrap(), "a zstd file with a bzip2 file in it"),
        (&gzip(b"[{}]"), "JSON"),
    ];
    for (bytes, kind) in cases {
        let (code, text) = read(dir.path(), "events.csv", bytes).unwrap_err();
        assert!(code == 2 && text.ends_with(&format!("events.csv`: it is {kind}")), "{text}");
    }
    let mut options = PreprocessOptions::new(vec![dir.path().into()], dir.path().join("out"));
    let error = preprocess(&options, &mut |_| {}).unwrap_err();
    assert!(error.to_string().ends_with("it is a directory"), "{error}");
    assert_eq!((error.exit_code(), error.hint()), (2, Some("name the files in it".to_owned())));
    options.events = vec![dir.path().join("missing")];
    assert_eq!(preprocess(&options, &mut |_| {}).unwrap_err().exit_code(), 2);
}

#[test]
fn a_fifo_gives_the_same_in_every_format() {
    let dir = scratch();
    let (csv, expected) = plain(dir.path());
    let mut table = table(&csv);
    let mut parquet = Vec::new();
    ParquetWriter::new(&mut parquet).finish(&mut table).unwrap();
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let zstd = zstd::encode_all(csv.as_bytes(), 1).unwrap();
    let zip = zip(&[("events.csv", csv.as_bytes())]);
    for bytes in [csv.clone().into_bytes(), gzip(csv.as_bytes()), zstd, zip, parquet] {
        let found = std::thread::scope(|scope| {
            scope.spawn(|| {
                // A few bytes at first, as a slow program writes them.
                let mut pipe = File::options().write(true).open(&fifo).unwrap();
                pipe.write_all(&bytes[..3]).unwrap();
                pipe.write_all(&bytes[3..]).unwrap();
            });
            output(dir.path(), vec![fifo.clone()])
        });
        assert!(found == expected);
        fs::remove_dir_all(dir.path().join("other")).unwrap();
    }
}
