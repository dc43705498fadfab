//! Parquet files of every type that a column of events may have, and of types that it may not have.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bireme_base::user_error::UserError;
use bireme_etl::{
    BadRows, EventTime, PreprocessOptions, RawEvent, RowCounts, first_events, preprocess,
};
use parquet::basic::{Compression, Encoding};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::{ByteArray, FixedLenByteArray, Int96};
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use crate::support::{Random, scratch};

/// Three values of a column; `None` writes nulls alone.
#[derive(Clone, Debug)]
enum Values {
    Nulls,
    Bool([bool; 3]),
    Int([i64; 3]),
    Int96([[u32; 3]; 3]),
    Float([f64; 3]),
    Bytes([&'static [u8]; 3]),
}

/// The columns of three good rows: type, name, annotation, values.
type Columns = Vec<(&'static str, &'static str, &'static str, Values)>;

fn good() -> Columns {
    let times: [&[u8]; 3] =
        [b"2020-01-01 00:00:00 UTC", b"2020-01-01 00:00:01.5 UTC", b"2020-01-01 00:00:02 UTC"];
    vec![
        ("required binary", "event_time", "(UTF8)", Values::Bytes(times)),
        ("optional binary", "event_type", "(UTF8)", Values::Bytes([b"view", b"cart", b"view"])),
        ("required int64", "product_id", "", Values::Int([1, 2, 3])),
        ("optional int64", "category_id", "", Values::Int([10, 10, 20])),
        ("required double", "price", "", Values::Float([1.5, 2.5, 0.0])),
        ("required binary", "user_session", "(UTF8)", Values::Bytes([b"a", b"a", b"b"])),
    ]
}

/// The good rows with one column changed, or with one more.
fn with(column: (&'static str, &'static str, &'static str, Values)) -> Columns {
    let mut columns = good();
    match columns.iter_mut().find(|(_, name, ..)| *name == column.1) {
        Some(place) => *place = column,
        None => columns.push(column),
    }
    columns
}

fn message(columns: &Columns) -> String {
    let fields = columns.iter().map(|(kind, name, annotation, _)| match kind.strip_suffix('}') {
        // A group has its name inside.
        Some(_) => kind.replace("NAME", name),
        None => format!("{kind} {name} {annotation};"),
    });
    format!("message events {{ {} }}", fields.collect::<Vec<_>>().join(" "))
}

fn write(path: &Path, columns: &Columns, properties: WriterProperties) {
    let schema = Arc::new(parse_message_type(&message(columns)).unwrap());
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (kind, name, _, values) in columns {
        let mut column = group.next_column().unwrap().unwrap();
        let is_null = matches!(values, Values::Nulls);
        let levels: &[i16] = if is_null { &[0; 3] } else { &[1; 3] };
        let (definitions, repetitions) = (Some(levels), Some(&[0_i16; 3][..]));
        let written = match (column.untyped(), values) {
            (ColumnWriter::BoolColumnWriter(w), Values::Bool(v)) => {
                w.write_batch(v, definitions, repetitions)
            }
            (ColumnWriter::Int32ColumnWriter(w), Values::Int(v)) => {
                w.write_batch(&v.map(|v| v as i32), definitions, repetitions)
            }
            (ColumnWriter::Int64ColumnWriter(w), Values::Int(v)) => {
                w.write_batch(v, definitions, repetitions)
            }
            (ColumnWriter::Int96ColumnWriter(w), Values::Int96(v)) => {
                let values = v.map(|[low, high, day]| {
                    let mut value = Int96::new();
                    value.set_data(low, high, day);
                    value
                });
                w.write_batch(&values, definitions, repetitions)
            }
            (ColumnWriter::FloatColumnWriter(w), Values::Float(v)) => {
                w.write_batch(&v.map(|v| v as f32), definitions, repetitions)
            }
            (ColumnWriter::DoubleColumnWriter(w), Values::Float(v)) => {
                w.write_batch(v, definitions, repetitions)
            }
            (ColumnWriter::ByteArrayColumnWriter(w), Values::Bytes(v)) => {
                w.write_batch(&v.map(ByteArray::from), definitions, repetitions)
            }
            (ColumnWriter::FixedLenByteArrayColumnWriter(w), Values::Bytes(v)) => {
                let values = v.map(|v| FixedLenByteArray::from(ByteArray::from(v)));
                w.write_batch(&values, definitions, repetitions)
            }
            (ColumnWriter::Int32ColumnWriter(w), Values::Nulls) => {
                w.write_batch(&[], definitions, repetitions)
            }
            (ColumnWriter::Int64ColumnWriter(w), Values::Nulls) => {
                w.write_batch(&[], definitions, repetitions)
            }
            (ColumnWriter::DoubleColumnWriter(w), Values::Nulls) => {
                w.write_batch(&[], definitions, repetitions)
            }
            (ColumnWriter::ByteArrayColumnWriter(w), Values::Nulls) => {
                w.write_batch(&[], definitions, repetitions)
            }
            _ => panic!("{kind} {name} does not hold {values:?}"),
        };
        written.unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

/// The events of a file, or the exit code and message of its refusal.
fn read(columns: &Columns, bad_rows: BadRows) -> Result<(Vec<RawEvent>, RowCounts), (i32, String)> {
    let dir = scratch();
    let path = dir.path().join("events.parquet");
    write(&path, columns, WriterProperties::default());
    first_events(&[path], 10, bad_rows)
        .map_err(|error| (error.exit_code(), bireme_base::message::chain(&error)))
}

fn events(columns: &Columns) -> Vec<RawEvent> {
    let (events, counts) =
        read(columns, BadRows::Refuse).unwrap_or_else(|e| panic!("{columns:?}: {e:?}"));
    assert_eq!((counts.read, counts.bad, events.len()), (3, 0, 3));
    events
}

#[test]
fn ids_of_every_integer_type_are_read() {
    let largest = i64::MAX;
    for (kind, annotation, values, expected) in [
        ("required int32", "(INTEGER(8,true))", [-128, 0, 127], [-128, 0, 127]),
        ("required int32", "(INT_16)", [-32768, 0, 7], [-32768, 0, 7]),
        ("required int32", "", [-1, i64::from(i32::MIN), 7], [-1, i64::from(i32::MIN), 7]),
        ("optional int64", "(INTEGER(64,true))", [i64::MIN, -1, largest], [i64::MIN, -1, largest]),
        ("required int32", "(INTEGER(8,false))", [1, 2, 255], [1, 2, 255]),
        ("required int32", "(UINT_16)", [1, 2, 65535], [1, 2, 65535]),
        ("required int32", "(INTEGER(32,false))", [1, 2, -1], [1, 2, 4_294_967_295]),
        ("required int64", "(INTEGER(64,false))", [1, 2, largest], [1, 2, largest]),
        ("required int32", "(DECIMAL(9,0))", [1, -2, 3], [1, -2, 3]),
        ("required int64", "(DECIMAL(18,0))", [1, -2, 3], [1, -2, 3]),
    ] {
        let found = events(&with((kind, "product_id", annotation, Values::Int(values))));
        let ids: Vec<i64> = found.iter().map(|event| event.product_id).collect();
        assert_eq!(ids, expected, "{kind} {annotation}");
        let found = events(&with((kind, "user_session", annotation, Values::Int(values))));
        let texts: Vec<&str> = found.iter().map(|event| event.session.as_str()).collect();
        assert_eq!(texts, expected.map(|id| id.to_string()), "{kind} {annotation}");
    }
    let wide: [&[u8]; 3] = [&[0, 0, 0, 0, 0, 0, 0, 1, 0], &[0xff; 9], &[0; 9]];
    let found = events(&with((
        "required fixed_len_byte_array(9)",
        "product_id",
        "(DECIMAL(20,0))",
        Values::Bytes(wide),
    )));
    assert_eq!(found.iter().map(|event| event.product_id).collect::<Vec<_>>(), [256, -1, 0]);
}

#[test]
fn ids_beyond_64_bits_are_bad_rows() {
    let column = ("required int64", "product_id", "(INTEGER(64,false))", Values::Int([1, -1, 3]));
    let (code, text) = read(&with(column.clone()), BadRows::Refuse).unwrap_err();
    assert!(
        text.ends_with(
            "row 2, column `product_id`: `18446744073709551615` is too large for a 64-bit integer"
        ),
        "{text}"
    );
    assert_eq!(code, 2);
    let (events, counts) = read(&with(column), BadRows::Skip).unwrap();
    assert_eq!((events.len(), counts.read, counts.bad), (2, 3, 1));
    let wide: [&[u8]; 3] = [&[0; 17], &[1; 17], &[0; 17]];
    let column = (
        "required fixed_len_byte_array(17)",
        "category_id",
        "(DECIMAL(39,0))",
        Values::Bytes(wide),
    );
    let (_, text) = read(&with(column), BadRows::Refuse).unwrap_err();
    assert!(
        text.contains("row 2, column `category_id`") && text.ends_with("64-bit integer"),
        "{text}"
    );
}

#[test]
fn prices_of_every_number_are_read() {
    let half: [&[u8]; 3] = [&[0x00, 0x3e], &[0x00, 0x41], &[0, 0]];
    let bytes: [&[u8]; 3] = [&[0x30, 0x39], &[0xfa], &[]];
    let wide: [&[u8]; 3] = [
        &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x30, 0x39],
        &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfa],
        &[0; 20],
    ];
    for (kind, annotation, values, expected) in [
        ("required float", "", Values::Float([1.5, 0.1, 3.0]), [1.5, f64::from(0.1_f32), 3.0]),
        ("optional double", "", Values::Float([1.5, 0.1, 3.0]), [1.5, 0.1, 3.0]),
        ("required int32", "(INTEGER(8,false))", Values::Int([1, 2, 255]), [1.0, 2.0, 255.0]),
        ("required int64", "", Values::Int([1, 2, 3]), [1.0, 2.0, 3.0]),
        ("required int32", "(DECIMAL(9,2))", Values::Int([12_345, 250, 0]), [123.45, 2.5, 0.0]),
        (
            "required int64",
            "(DECIMAL(18,4))",
            Values::Int([1_234_500, 25_000, 0]),
            [123.45, 2.5, 0.0],
        ),
        ("required binary", "(DECIMAL(9,2))", Values::Bytes(bytes), [123.45, -0.06, 0.0]),
        (
            "required fixed_len_byte_array(20)",
            "(DECIMAL(40,2))",
            Values::Bytes(wide),
            [123.45, 2.5, 0.0],
        ),
        ("required fixed_len_byte_array(2)", "(FLOAT16)", Values::Bytes(half), [1.5, 2.5, 0.0]),
        ("required binary", "(UTF8)", Values::Bytes([b"1.5", b"2e1", b"0"]), [1.5, 20.0, 0.0]),
    ] {
        let column = with((kind, "price", annotation, values));
        if expected[1] < 0.0 {
            let (_, text) = read(&column, BadRows::Refuse).unwrap_err();
            assert!(
                text.ends_with("row 2, column `price`: -0.06 is not a price: it is below zero"),
                "{text}"
            );
            continue;
        }
        let prices: Vec<f64> = events(&column).iter().map(|event| event.price).collect();
        assert_eq!(prices, expected, "{kind} {annotation}");
    }
}

#[test]
fn times_of_every_unit_keep_their_fractions() {
    let second = 1_577_836_800;
    let expected = [(0, 0), (1, 500_000_000), (2, 0)]
        .map(|(s, nanos)| EventTime { seconds: second + s, nanos });
    let ticks = |per_second: i64| {
        Values::Int([
            second * per_second,
            second * per_second + per_second * 3 / 2,
            (second + 2) * per_second,
        ])
    };
    let day = 2_440_588 + 18_262;
    for (kind, annotation, values) in [
        ("required int64", "(TIMESTAMP(MILLIS,true))", ticks(1_000)),
        ("required int64", "(TIMESTAMP(MICROS,false))", ticks(1_000_000)),
        ("optional int64", "(TIMESTAMP(NANOS,true))", ticks(1_000_000_000)),
        ("required int64", "(TIMESTAMP_MILLIS)", ticks(1_000)),
        ("required int64", "(TIMESTAMP_MICROS)", ticks(1_000_000)),
        (
            "required int96",
            "",
            Values::Int96([[0, 0, day], [1_500_000_000, 0, day], [2_000_000_000, 0, day]]),
        ),
    ] {
        let found = events(&with((kind, "event_time", annotation, values)));
        let times: Vec<EventTime> = found.iter().map(|event| event.time).collect();
        assert_eq!(times, expected, "{kind} {annotation}");
    }
}

#[test]
fn text_is_read_from_every_type_of_text_and_bytes_that_are_none_are_bad_rows() {
    for annotation in ["(UTF8)", "(ENUM)", "(JSON)", ""] {
        let column = (
            "required binary",
            "brand",
            annotation,
            Values::Bytes([b"a", "\u{e4}".as_bytes(), b""]),
        );
        let brands: Vec<_> = events(&with(column)).into_iter().map(|event| event.brand).collect();
        assert_eq!(brands, [Some("a".to_owned()), Some("\u{e4}".to_owned()), None]);
        for name in ["brand", "user_session", "event_time", "price", "product_id"] {
            let mut columns = with((
                "required binary",
                name,
                annotation,
                Values::Bytes([b"\xff", b"\xff", b"\xff"]),
            ));
            columns[1].3 = Values::Bytes([b"view", b"view", b"view"]);
            let (code, text) = read(&columns, BadRows::Refuse).unwrap_err();
            assert!(
                text.ends_with(&format!("row 1, column `{name}`: the cell is not UTF-8")),
                "{text}"
            );
            assert_eq!(code, 2);
        }
    }
}

#[test]
fn nulls_are_empty_cells() {
    for annotation in ["", "(UTF8)"] {
        let kind = if annotation.is_empty() { "optional int64" } else { "optional binary" };
        let found = events(&with((kind, "category_id", annotation, Values::Nulls)));
        assert!(found.iter().all(|event| event.category_id.is_none()));
        let (_, text) =
            read(&with((kind, "product_id", annotation, Values::Nulls)), BadRows::Refuse)
                .unwrap_err();
        assert!(text.ends_with("row 1, column `product_id`: the cell is empty"), "{text}");
    }
    let (_, counts) =
        read(&with(("optional binary", "user_session", "(UTF8)", Values::Nulls)), BadRows::Refuse)
            .unwrap();
    assert_eq!((counts.read, counts.without_session), (3, 3));
    let (_, text) =
        read(&with(("optional double", "price", "", Values::Nulls)), BadRows::Refuse).unwrap_err();
    assert!(text.ends_with("row 1, column `price`: the cell is empty"), "{text}");
}

const LIST: &str =
    "optional group NAME (LIST) { repeated group list { optional binary element (UTF8); } }";
const STRUCT: &str = "optional group NAME { optional int32 part (DECIMAL(9,2)); }";
const MAP: &str = "optional group NAME (MAP) { repeated group key_value { required int32 key; } }";

#[test]
fn other_types_are_refused_by_column_and_type_and_not_looked_at_beside() {
    let fixed: [&[u8]; 3] = [&[7; 16]; 3];
    let cases = [
        ("required boolean", "", Values::Bool([true; 3]), "bool"),
        ("required int32", "(DATE)", Values::Int([1; 3]), "DATE"),
        ("required int64", "(TIME(MICROS,true))", Values::Int([1; 3]), "TIME"),
        ("required int32", "(DECIMAL(9,2))", Values::Int([1; 3]), "DECIMAL(9,2)"),
        ("required fixed_len_byte_array(16)", "", Values::Bytes(fixed), "FIXED_LEN_BYTE_ARRAY"),
        ("required fixed_len_byte_array(16)", "(UUID)", Values::Bytes(fixed), "UUID"),
        (
            "required fixed_len_byte_array(16)",
            "(DECIMAL(38,10))",
            Values::Bytes(fixed),
            "DECIMAL(38,10)",
        ),
        ("required double", "", Values::Float([1.0; 3]), "DOUBLE"),
        ("required binary", "(BSON)", Values::Bytes([b"1"; 3]), "BSON"),
        ("repeated int32", "", Values::Int([1; 3]), "repeated INT32"),
        (LIST, "", Values::Nulls, "a list"),
        (STRUCT, "", Values::Nulls, "a struct"),
        (MAP, "", Values::Nulls, "a map"),
    ];
    for (kind, annotation, values, name) in cases {
        let (code, text) =
            read(&with((kind, "product_id", annotation, values.clone())), BadRows::Refuse)
                .unwrap_err();
        let expected =
            format!("column `product_id`: an integer is needed, and the column holds {name}");
        assert!(text.ends_with(&expected), "{kind}: {text}");
        assert_eq!(code, 2);
        // A column that is not used may have any type.
        let found = events(&with((kind, "colour", annotation, values)));
        assert_eq!(found, events(&good()), "{kind} {annotation}");
    }
    let mut twice = good();
    twice.push(("required binary", "brand", "(UTF8)", Values::Bytes([b"a"; 3])));
    twice.push(("required binary", "brand", "(UTF8)", Values::Bytes([b"b"; 3])));
    let (code, text) = read(&twice, BadRows::Refuse).unwrap_err();
    assert!(text.ends_with("has the column `brand` twice") && code == 2, "{text}");
}

#[test]
fn every_codec_and_encoding_gives_the_same() {
    use parquet::basic::{BrotliLevel, GzipLevel, ZstdLevel};
    let dir = scratch();
    let path = dir.path().join("events.parquet");
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
        Compression::ZSTD(ZstdLevel::default()),
    ];
    let expected = events(&good());
    let check = |properties: WriterProperties| {
        write(&path, &good(), properties);
        let (found, _) = first_events(std::slice::from_ref(&path), 10, BadRows::Refuse).unwrap();
        assert_eq!(found, expected);
    };
    for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
        for codec in codecs {
            check(
                WriterProperties::builder()
                    .set_compression(codec)
                    .set_writer_version(version)
                    .build(),
            );
        }
        for encoding in
            [Encoding::PLAIN, Encoding::DELTA_BYTE_ARRAY, Encoding::DELTA_LENGTH_BYTE_ARRAY]
        {
            let builder = WriterProperties::builder()
                .set_writer_version(version)
                .set_dictionary_enabled(false);
            check(builder.set_column_encoding("user_session".into(), encoding).build());
        }
        let builder =
            WriterProperties::builder().set_writer_version(version).set_dictionary_enabled(false);
        check(
            builder.set_column_encoding("product_id".into(), Encoding::DELTA_BINARY_PACKED).build(),
        );
    }
}

/// Reads a damaged file, which must be refused in one line or read.
fn survives(path: &Path) {
    let outcome = first_events(&[PathBuf::from(path)], 10, BadRows::Skip);
    if let Err(error) = outcome {
        let text = bireme_base::message::chain(&error);
        assert_eq!(error.exit_code(), 2, "{text}");
        assert!(text.contains("events.parquet") && !text.contains('\n'), "{text}");
    }
}

#[test]
fn broken_files_are_refused() {
    let dir = scratch();
    let path = dir.path().join("events.parquet");
    write(&path, &good(), WriterProperties::default());
    let bytes = fs::read(&path).unwrap();
    for length in (4..bytes.len()).step_by(7).chain(bytes.len() - 12..bytes.len()) {
        fs::write(&path, &bytes[..length]).unwrap();
        survives(&path);
        let options = PreprocessOptions::new(vec![path.clone()], dir.path().join("out"));
        assert_eq!(preprocess(&options, &mut |_| {}).unwrap_err().exit_code(), 2, "{length} bytes");
    }
    let mut random = Random(22);
    for _ in 0..3_000 {
        let mut bytes = bytes.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = [0, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(5) as usize];
        }
        fs::write(&path, &bytes).unwrap();
        survives(&path);
    }
}
