//! Bad input is refused with one message that names the place and exit code 2, and leaves nothing
//! behind.

use std::fs;
use std::path::Path;

use bireme_base::user_error::UserError;
use bireme_etl::{BadRows, Coded, Error, PreprocessOptions, preprocess};

use crate::support::{HEADER, bytes, rows, run, scratch};

const GOOD: &str = "2020-01-01 00:00:00 UTC,view,1,10,a.b,acme,1.5,7,s1\n\
                    2020-01-01 00:00:01 UTC,view,2,10,a.b,acme,2.5,7,s1\n";

/// The entries of a folder beside the events.
fn left_behind(dir: &Path) -> Vec<String> {
    let names =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with("events.")).collect()
}

fn refused(csv: &str) -> String {
    let dir = scratch();
    let error = run(dir.path(), csv, |_| {}).expect_err("this is refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    assert_eq!(left_behind(dir.path()), Vec::<String>::new(), "{error}");
    let text = error.to_string();
    assert!(text.contains("events.csv"), "{text}");
    text
}

#[test]
fn a_bad_cell_is_named_with_line_and_column() {
    let cases = [
        ("2020-01-01 00:00:61 UTC,view,1,10,,,1,7,s1", "event_time", "is not a timestamp"),
        ("yesterday,view,1,10,,,1,7,s1", "event_time", "`yesterday` is not a timestamp"),
        (",view,1,10,,,1,7,s1", "event_time", "the cell is empty"),
        ("2020-01-01 00:00:00 UTC,view,one,10,,,1,7,s1", "product_id", "`one` is not an integer"),
        ("2020-01-01 00:00:00 UTC,view,,10,,,1,7,s1", "product_id", "the cell is empty"),
        ("2020-01-01 00:00:00 UTC,view,1,1.5,,,1,7,s1", "category_id", "`1.5` is not an integer"),
        (
            "2020-01-01 00:00:00 UTC,view,1,10,,,-0.5,7,s1",
            "price",
            "`-0.5` is not a price: it is below zero",
        ),
        ("2020-01-01 00:00:00 UTC,view,1,10,,,inf,7,s1", "price", "not finite"),
        ("2020-01-01 00:00:00 UTC,view,1,10,,,NaN,7,s1", "price", "not finite"),
        ("2020-01-01 00:00:00 UTC,view,1,10,,,cheap,7,s1", "price", "`cheap` is not a number"),
        ("2020-01-01 00:00:00 UTC,view,1,10,,,,7,s1", "price", "the cell is empty"),
        ("2020-01-01 00:00:00 UTC,view,1,10,,,1,me,s1", "user_id", "`me` is not an integer"),
        (
            "2020-01-01 00:00:00 UTC,view,1,10,,,1,7",
            "user_session",
            "the row has 8 fields instead of 9",
        ),
        ("2020-01-01 00:00:00 UTC,view,1,1", "category_code", "the row has 4 fields instead of 9"),
        (
            "2020-01-01 00:00:00 UTC,view,1,10,,,1,7,s1,more",
            "user_session",
            "the row has 10 fields instead of 9",
        ),
    ];
    for (row, column, problem) in cases {
        // In the middle, with CRLF, and at the end without a line end.
        let csv = format!("{HEADER}\n{GOOD}{row}\n{GOOD}");
        for csv in [csv.clone(), csv.replace('\n', "\r\n"), format!("{HEADER}\n{GOOD}{row}")] {
            let text = refused(&csv);
            assert!(text.contains(&format!("line 4, column `{column}`: ")), "{row}: {text}");
            assert!(text.contains(problem), "{row}: {text}");
        }
    }
}

#[test]
fn a_row_without_a_session_is_not_a_bad_row() {
    let dir = scratch();
    let csv = format!("{HEADER}\n{GOOD}not a time,view,,,,,-1,,\n{GOOD}");
    let report = run(dir.path(), &csv, |_| {}).unwrap();
    assert_eq!((report.rows.read, report.rows.bad, report.rows.without_session), (5, 0, 1));
}

#[test]
fn quoted_separators_do_not_hide_a_short_row() {
    let quoted = "2020-01-01 00:00:02 UTC,view,3,10,\"a, \"\"b\"\"\nand c\",acme,3.5,7,s1\n";
    let without_session = "2020-01-01 00:00:02 UTC,view,3,10,,,3.5,7,\n";
    let csv = format!("{HEADER}\n{GOOD}{quoted}{without_session}");
    let report = run(scratch().path(), &csv, |_| {}).unwrap();
    assert_eq!((report.rows.read, report.rows.without_session, report.n_events), (4, 1, 3));
    // One separator too many in quotes, one too few in the last row.
    let text = refused(&format!("{csv}2020-01-01 00:00:02 UTC,view,3,10,,,3.5,7\n"));
    assert!(
        text.contains("line 7, column `user_session`: the row has 8 fields instead of 9"),
        "{text}"
    );
}

/// Rows of one product each, a second apart, with these texts verbatim in the column `brand`.
fn with_brands(brands: &[&str]) -> String {
    let rows = brands.iter().enumerate().map(|(i, brand)| {
        format!("2020-01-01 00:00:{:02} UTC,view,{},10,,{brand},1.5,7,s{}\n", i % 60, i + 1, i / 2)
    });
    format!("{HEADER}\n") + &rows.collect::<String>()
}

/// Reads with bad rows left out: the line of the first one, and the numbers of rows read and left
/// out.
fn skipped(csv: &str) -> (Option<u64>, u64, u64) {
    let refused = run(scratch().path(), csv, |options| options.settings.min_length = 1);
    let line = refused.err().map(|error| match error {
        Error::BadRow { number, .. } => number,
        error => panic!("{error}"),
    });
    let report = run(scratch().path(), csv, |options| {
        options.bad_rows = BadRows::Skip;
        options.settings.min_length = 1;
    });
    let rows = report.unwrap().rows;
    (line, rows.read, rows.bad)
}

#[test]
fn a_wrong_quote_costs_its_own_line_and_no_other() {
    // Quotes that a program did not escape, 200 rows apart.
    let mut brands = vec!["acme"; 300];
    brands[99] = "\"LG\" 24\"";
    brands[199] = "\"LG\" 24\"";
    let csv = with_brands(&brands);
    assert!(
        refused(&csv)
            .ends_with("line 101, column `brand`: there is text after the field's closing quote")
    );
    assert_eq!(skipped(&csv), (Some(101), 300, 2));
    let cases: &[(&[&str], u64)] = &[
        // A quote that opens a field and is closed by one of a later row, by none, and at once.
        (&["\"24 inch", "a", "b", "24\""], 1),
        (&["\"24 inch", "24\""], 1),
        (&["\"24 inch", "\"24 inch", "a"], 2),
        (&["\"24 inch", "\"sound\"", "a"], 1),
        (&["a", "\"\"\"24 inch\"\"", "a", "\"b\"\" c\""], 1),
        (&["a", "\""], 1),
        (&["a", "\"b\"c"], 1),
        (&["a", "\"b\" ", "c"], 1),
        (&["a", "\"b,c\"\"", "c", "d"], 1),
        // Valid quotes.
        (&["24\" tv", "a \"b\"", "24\"", "\"\"", "\"a \"\"b\"\"\"", "\"a,b\""], 0),
        (&["\"two\nlines\"", "\"a\n\nb,,,,,,,,\n\"", "a"], 0),
    ];
    for &(wrong, n_bad) in cases {
        // At the file's start, in the middle and at its end, with both line ends.
        for place in 0..3 {
            let mut brands = vec!["acme"; 20];
            let at = [0, 10, 20][place];
            brands.splice(at..at, wrong.iter().copied());
            let csv = with_brands(&brands);
            for csv in [csv.clone(), csv.replace('\n', "\r\n"), csv.trim_end().to_owned()] {
                let (line, n_read, bad) = skipped(&csv);
                assert_eq!(
                    (n_read, bad),
                    (20 + wrong.len() as u64, n_bad),
                    "{wrong:?} at {at}: {csv}"
                );
                assert_eq!(line.is_some(), n_bad > 0, "{wrong:?}");
            }
        }
    }
}

#[test]
fn blank_lines_are_no_rows_and_count_as_lines() {
    let csv = format!("\n{HEADER}\n\n{GOOD} \t\r\n\n{GOOD}\n").replace("s1\n2020", "s1\n\n2020");
    assert_eq!(skipped(&csv), (None, 4, 0));
    let bad = format!("{csv}\n\nnever,view,9,10,,,1,7,s1\n\n");
    let line = bad.lines().position(|line| line.starts_with("never")).unwrap() as u64 + 1;
    assert_eq!(skipped(&bad), (Some(line), 5, 1));
}

#[test]
fn headers_are_read_as_rows_are_and_refused_by_what_is_wrong() {
    let quoted = HEADER.split(',').map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(",");
    let plain = format!("{HEADER}\n{GOOD}");
    for csv in [
        format!("\u{feff}{HEADER}\n{GOOD}"),
        format!("{quoted}\r\n{GOOD}"),
        format!("\u{feff}{quoted}\n{GOOD}"),
        plain.trim_end().to_owned(),
        // Columns without a name, as spreadsheets leave them, and one with a name of two lines.
        plain.replace('\n', ",,\n"),
        plain.replacen('\n', ",\"of\ntwo\"\n", 1).replace("s1\n", "s1,\n"),
    ] {
        let report =
            run(scratch().path(), &csv, |_| {}).unwrap_or_else(|error| panic!("{csv}: {error}"));
        assert_eq!(report.rows.read, 2, "{csv}");
    }
    let text = refused(&plain.replace("category_code", "brand"));
    assert!(text.ends_with("has the column `brand` twice"), "{text}");
    let text = refused(&plain.replacen('\n', ",x,x\n", 1).replace("s1\n", "s1,,\n"));
    assert!(text.ends_with("has the column `x` twice"), "{text}");
    let text = refused(&plain.replace("brand", "\"brand\"s"));
    assert!(text.ends_with(
        "line 1: the header cannot be read: there is text after the field's closing quote"
    ));
    for (separator, name) in [(";", "`;`"), ("\t", "`\\t`"), ("|", "`|`")] {
        let text = refused(&plain.replace(',', separator));
        assert!(text.ends_with(&format!("its fields seem to be separated by {name}")), "{text}");
    }
    let text = refused(&plain.replace('\n', "\r"));
    assert!(text.contains("its lines seem to end with CR alone"), "{text}");
    let text = refused(&plain.replace("event_time", " event_time"));
    assert!(text.contains("has no column `event_time`; it has ` event_time`, "), "{text}");
    let many: Vec<String> = (0..100).map(|i| format!("column{i}")).collect();
    let text = refused(&(many.join(",") + "\n"));
    assert!(text.ends_with("`column11`, 88 more"), "{text}");
    assert!(refused("\n\r\n \n").contains("the file is empty"));
}

#[test]
fn numbers_are_refused_by_what_they_are() {
    let row = |id: &str| format!("{HEADER}\n{GOOD}2020-01-01 00:00:00 UTC,view,{id},10,,,1,7,s1\n");
    for (id, problem) in [
        ("9223372036854775808", "is too large for a 64-bit integer"),
        ("-9223372036854775809", "is too small for a 64-bit integer"),
        ("12.0", "is not an integer"),
        ("1e5", "is not an integer"),
        (" 5", "is not an integer"),
    ] {
        let text = refused(&row(id));
        assert!(
            text.ends_with(&format!("line 4, column `product_id`: `{id}` {problem}")),
            "{text}"
        );
    }
    // Long and hostile values are cut and escaped.
    let text = refused(&row(&format!("\u{1b}[31m{}", "9".repeat(10_000))));
    assert!(
        text.chars().count() < 300
            && text.contains("`\\u{1b}[31m999")
            && text.ends_with("is not an integer")
    );
}

#[test]
fn odd_bytes_are_characters_of_their_cells() {
    let report = run(
        scratch().path(),
        &with_brands(&["a\0b", "a\rb", "\u{feff}", "\u{2028}", "a\u{b}"]),
        |_| {},
    );
    let report = report.unwrap();
    assert_eq!((report.rows.read, report.n_values[Coded::Brand as usize]), (5, 5));
    let text = refused(&with_brands(&["a"]).replace(",view,1,", ",view,1\0,"));
    assert!(text.ends_with("`1\\u{0}` is not an integer"), "{text}");
    // Zeros where a disk was full.
    assert_eq!(skipped(&(with_brands(&["a", "b"]) + &"\0".repeat(5000))), (Some(4), 3, 1));
    // Cells of other columns are not looked at.
    let dir = scratch();
    let mut csv = with_brands(&["a", "b"]).replace(",brand,", ",colour,").into_bytes();
    let at = csv.windows(3).position(|bytes| bytes == b",a,").unwrap();
    csv[at + 1] = 0xff;
    fs::write(dir.path().join("events.csv"), csv).unwrap();
    let options =
        PreprocessOptions::new(vec![dir.path().join("events.csv")], dir.path().join("out"));
    assert_eq!(preprocess(&options, &mut |_| {}).unwrap().rows.read, 2);
}

#[test]
fn a_line_longer_than_a_block_is_read_and_one_beyond_all_bounds_is_left_out() {
    let long = "x".repeat(5 << 20);
    assert_eq!(skipped(&with_brands(&["a", &long, "b"])), (None, 3, 0));
    let quoted = format!("\"{long}\"");
    assert_eq!(skipped(&with_brands(&["a", &quoted, "b"])), (Some(3), 3, 1));
    let longer = "x".repeat(17 << 20);
    assert_eq!(skipped(&with_brands(&["a", &longer, "b"])), (Some(3), 3, 1));
}

#[test]
fn bytes_that_are_no_text_are_named() {
    let dir = scratch();
    let mut csv = format!("{HEADER}\n{GOOD}").into_bytes();
    csv.extend_from_slice(b"2020-01-01 00:00:00 UTC,view,1,10,,\xff\xfe,1,7,s1\n");
    fs::write(dir.path().join("events.csv"), csv).unwrap();
    let options =
        PreprocessOptions::new(vec![dir.path().join("events.csv")], dir.path().join("out"));
    let error = preprocess(&options, &mut |_| {}).unwrap_err();
    assert!(
        error.to_string().ends_with("line 4, column `brand`: the cell is not UTF-8"),
        "{error}"
    );
    assert_eq!((error.exit_code(), left_behind(dir.path()).len()), (2, 0));
}

#[test]
fn a_missing_column_is_named() {
    for column in HEADER.split(',') {
        let csv = format!("{}\n{GOOD}", HEADER.replace(column, "something"));
        let optional = ["category_code", "brand", "user_id"].contains(&column);
        if optional {
            run(scratch().path(), &csv, |_| {}).unwrap();
        } else {
            let text = refused(&csv);
            assert!(text.contains(&format!("has no column `{column}`; it has `")), "{text}");
        }
    }
    assert!(refused("").contains("has no column"), "an empty file");
}

#[test]
fn nothing_to_do_is_said() {
    for csv in
        [format!("{HEADER}\n"), format!("{HEADER}\n2020-01-01 00:00:00 UTC,view,1,1,,,1,1,\n")]
    {
        let dir = scratch();
        let error = run(dir.path(), &csv, |_| {}).unwrap_err();
        assert!(error.to_string().contains("is an event of a session"), "{error}");
        assert_eq!((error.exit_code(), left_behind(dir.path()).len()), (2, 0));
    }
    let dir = scratch();
    let error = run(dir.path(), &format!("{HEADER}\n{GOOD}"), |options| options.days = Some(5..=6))
        .unwrap_err();
    assert_eq!(error.to_string(), "no session has 2 events or more in days 5..6");
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let dir = scratch();
    let out = dir.path().join("out");
    for (name, content) in [
        ("events.missing", None),
        ("events.gz", Some(b"\x1f\x8b\x08\x00broken".to_vec())),
        ("events.parquet", Some(b"PAR1 and no footer".to_vec())),
    ] {
        let path = dir.path().join(name);
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        let error =
            preprocess(&PreprocessOptions::new(vec![path], out.clone()), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!((error.exit_code(), left_behind(dir.path()).len()), (2, 0), "{error}");
    }
}

#[test]
fn a_truncated_gzip_file_is_refused() {
    use std::io::Write;
    let dir = scratch();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(crate::support::shop(300).as_bytes()).unwrap();
    let bytes = gz.finish().unwrap();
    let path = dir.path().join("events.csv.gz");
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error =
        preprocess(&PreprocessOptions::new(vec![path], dir.path().join("out")), &mut |_| {})
            .unwrap_err();
    assert!(error.to_string().contains("events.csv.gz"), "{error}");
    assert_eq!((error.exit_code(), left_behind(dir.path()).len()), (2, 0), "{error}");
}

#[test]
fn a_parquet_column_of_the_wrong_type_and_a_bad_row_are_named() {
    use polars::prelude::*;
    let dir = scratch();
    let path = dir.path().join("events.parquet");
    let table = |prices: Column| {
        let text = |name: &str, cells: &[&str]| Column::new(name.into(), cells);
        let columns = vec![
            text(
                "event_time",
                &["2020-01-01 00:00:00 UTC", "2020-01-01 00:00:01 UTC", "2020-01-01 00:00:02 UTC"],
            ),
            text("event_type", &["view", "view", "view"]),
            Column::new("product_id".into(), [1_i64, 2, 3]),
            Column::new("category_id".into(), [1_i64, 1, 1]),
            prices,
            text("user_session", &["", "a", "a"]),
        ];
        DataFrame::new(3, columns).unwrap()
    };
    let run = |prices: Column, bad_rows: BadRows| {
        ParquetWriter::new(fs::File::create(&path).unwrap()).finish(&mut table(prices)).unwrap();
        let mut options = PreprocessOptions::new(vec![path.clone()], dir.path().join("out"));
        options.bad_rows = bad_rows;
        options.settings.min_length = 1;
        preprocess(&options, &mut |_| {})
    };
    let wrong = run(Column::new("price".into(), [true, true, true]), BadRows::Refuse).unwrap_err();
    assert!(
        wrong.to_string().contains("column `price`: a number is needed, and the column holds bool"),
        "{wrong}"
    );
    let negative = || Column::new("price".into(), [-1.0, 2.0, -3.0]);
    let bad = run(negative(), BadRows::Refuse).unwrap_err();
    assert!(
        bad.to_string().ends_with("row 3, column `price`: -3 is not a price: it is below zero"),
        "{bad}"
    );
    assert_eq!((bad.exit_code(), left_behind(dir.path()).len()), (2, 0));
    let report = run(negative(), BadRows::Skip).unwrap();
    assert_eq!(
        (report.rows.read, report.rows.bad, report.rows.without_session, report.n_events),
        (3, 1, 1, 1)
    );
}

#[test]
fn bad_rows_are_left_out_and_counted_if_asked() {
    let good = scratch();
    run(good.path(), &format!("{HEADER}\n{GOOD}"), |_| {}).unwrap();
    let dir = scratch();
    let csv = format!(
        "{HEADER}\nnever,view,9,10,,,1,7,s1\n{GOOD}2020-01-01 00:00:00 \
         UTC,view,1,10,,,1,7,s1,more\n\
         2020-01-01 00:00:00 UTC,view,9,10,,,-1,7,s2\n2020-01-01 00:00:00 UTC,view,9,10,,,1,7"
    );
    let report = run(dir.path(), &csv, |options| options.bad_rows = BadRows::Skip).unwrap();
    assert_eq!((report.rows.read, report.rows.bad, report.rows.without_session), (6, 4, 0));
    assert!(bytes(&dir.path().join("out")) == bytes(&good.path().join("out")));
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        2,
        "the events and the sessions, no copy"
    );
}

#[test]
fn sessions_that_are_there_are_kept_unless_told_otherwise() {
    let dir = scratch();
    let csv = format!("{HEADER}\n{GOOD}");
    run(dir.path(), &csv, |_| {}).unwrap();
    let before = bytes(&dir.path().join("out"));
    let error = run(dir.path(), &csv, |_| {}).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }) && error.exit_code() == 2, "{error}");
    // A failure during the work leaves them unchanged, too.
    let broken = format!("{csv}never,view,9,10,,,1,7,s1\n");
    run(dir.path(), &broken, |options| options.overwrite = true).unwrap_err();
    assert!(bytes(&dir.path().join("out")) == before);
    let more = csv.clone() + &GOOD.replace("s1", "s2");
    run(dir.path(), &more, |options| options.overwrite = true).unwrap();
    assert_eq!(rows(&dir.path().join("out")).len(), 2);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);

    // An empty folder may be used; one with other contents is never replaced.
    let other = scratch();
    fs::create_dir(other.path().join("out")).unwrap();
    run(other.path(), &csv, |_| {}).unwrap();
    let precious = scratch();
    fs::create_dir(precious.path().join("out")).unwrap();
    fs::write(precious.path().join("out/thesis.tex"), "").unwrap();
    let error = run(precious.path(), &csv, |options| options.overwrite = true).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }), "{error}");
}

/// Makes the options invalid.
type Change = fn(&mut PreprocessOptions);

#[test]
fn settings_that_make_no_sense_are_refused() {
    let cases: [(Change, &str); 5] = [
        (|options| options.events.clear(), "no file of events is given"),
        (|options| options.settings.min_length = 0, "`min_length` must be at least 1"),
        (|options| options.settings.max_length = 1, "`max_length` 1 is less than `min_length` 2"),
        (|options| options.days = Some(0..=3), "day 0 is before day 1"),
        #[allow(clippy::reversed_empty_ranges)]
        (|options| options.days = Some(4..=3), "no day is in 4..3"),
    ];
    for (change, message) in cases {
        let dir = scratch();
        let error = run(dir.path(), &format!("{HEADER}\n{GOOD}"), change).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.exit_code()), (message, 2));
    }
}

#[test]
fn missing_parents_of_the_output_come_with_it_and_only_with_it() {
    let dir = scratch();
    let deep = dir.path().join("some/where/out");
    let csv = format!("{HEADER}\n{GOOD}");
    run(dir.path(), &format!("{csv}x\n"), |options| options.out = deep.clone()).unwrap_err();
    assert!(left_behind(dir.path()).is_empty());
    run(dir.path(), &csv, |options| options.out = deep.clone()).unwrap();
    assert!(deep.join("schema.pbtxt").is_file());
}

#[test]
fn an_output_that_cannot_be_written_is_refused() {
    // Not even the superuser can create folders there.
    let out = Path::new("/proc/bireme-test");
    if !Path::new("/proc").is_dir() {
        println!("skipped: there is no /proc here");
        return;
    }
    let error =
        run(scratch().path(), &format!("{HEADER}\n{GOOD}"), |options| options.out = out.into())
            .unwrap_err();
    assert!(matches!(error, Error::Output(_)) && error.exit_code() == 2, "{error}");
}

#[test]
fn rows_that_are_left_out_are_named_by_their_lines() {
    let dir = scratch();
    let events = dir.path().join("events.csv");
    let warnings = |n_bad: usize| {
        let mut brands = vec!["\"LG\" 24\""; n_bad];
        brands.extend(["acme"; 20]);
        fs::write(&events, with_brands(&brands)).unwrap();
        let mut options = PreprocessOptions::new(vec![events.clone()], dir.path().join("out"));
        (options.bad_rows, options.overwrite) = (BadRows::Skip, true);
        let mut lines = Vec::new();
        preprocess(&options, &mut |line| lines.push(line.to_owned())).unwrap();
        lines.retain(|line| line.starts_with("warning: "));
        lines
    };
    let file = events.display();
    assert_eq!(warnings(0), [""; 0]);
    assert_eq!(warnings(1), [format!("warning: `{file}`: left out line 2")]);
    assert_eq!(warnings(3), [format!("warning: `{file}`: left out lines 2, 3, 4")]);
    let many =
        format!("warning: `{file}`: left out lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more");
    assert_eq!(warnings(12), [many]);
}
