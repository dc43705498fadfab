//! Generated sessions, and the session files and schema that hold them.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use bireme::data::Features;
use bireme::etl::Schema;
use parquet::data_type::{DataType, FloatType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

pub const ITEM: &str = "product_id-list_seq";
pub const PRICE: &str = "price_log_norm-list_seq";
pub const COLOUR: &str = "colour-list_seq";

/// The colour of an item, 1 to 7.
pub fn colour(item: i64) -> i64 {
    1 + item % 7
}

/// Writes a session file with small row groups: item index, price and colour of each event.
pub fn write_sessions(path: &Path, sessions: &[Vec<i64>], price: impl Fn(i64) -> f32) {
    let list = |name: &str, of: &str| {
        format!(
            "optional group {name} (LIST) {{ repeated group list {{ optional {of} element; }} }} "
        )
    };
    let columns = list(ITEM, "int64") + &list(PRICE, "float") + &list(COLOUR, "int64");
    let message = format!("message sessions {{ {columns} }}");
    let schema = Arc::new(parse_message_type(&message).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut writer =
        SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    for group in sessions.chunks(64) {
        // A value is defined at level 3; level 1 is an empty list.
        let (mut definitions, mut repetitions) = (Vec::new(), Vec::new());
        for session in group {
            definitions.extend(if session.is_empty() {
                vec![1]
            } else {
                vec![3i16; session.len()]
            });
            repetitions.extend((0..session.len().max(1)).map(|i| i16::from(i > 0)));
        }
        let items = group.concat();
        let prices: Vec<f32> = items.iter().map(|&item| price(item)).collect();
        let colours: Vec<i64> = items.iter().map(|&item| colour(item)).collect();
        let levels = (definitions.as_slice(), repetitions.as_slice());
        let mut columns = writer.next_row_group().unwrap();
        write_column::<Int64Type>(&mut columns, &items, levels);
        write_column::<FloatType>(&mut columns, &prices, levels);
        write_column::<Int64Type>(&mut columns, &colours, levels);
        columns.close().unwrap();
    }
    writer.close().unwrap();
}

/// Writes the next column with its definition and repetition levels.
fn write_column<T: DataType>(
    columns: &mut SerializedRowGroupWriter<'_, File>,
    values: &[T::T],
    (definitions, repetitions): (&[i16], &[i16]),
) {
    let mut column = columns.next_column().unwrap().unwrap();
    column.typed::<T>().write_batch(values, Some(definitions), Some(repetitions)).unwrap();
    column.close().unwrap();
}

/// Writes the schema of [`write_sessions`] for `n_items` rows of the item table.
pub fn write_schema(dir: &Path, n_items: i64) {
    let text = format!(
        r#"feature {{
  name: "{ITEM}"
  value_count {{ min: 2 max: 20 }}
  type: INT
  int_domain {{ name: "{ITEM}" min: 1 max: {} is_categorical: true }}
  annotation {{ tag: "item_id" tag: "list" tag: "categorical" }}
}}
feature {{
  name: "{PRICE}"
  value_count {{ min: 2 max: 20 }}
  type: FLOAT
  annotation {{ tag: "continuous" tag: "list" }}
}}
feature {{
  name: "{COLOUR}"
  value_count {{ min: 2 max: 20 }}
  type: INT
  int_domain {{ name: "{COLOUR}" min: 1 max: 7 is_categorical: true }}
  annotation {{ tag: "list" tag: "categorical" }}
}}
"#,
        n_items - 1
    );
    fs::write(dir.join("schema.pbtxt"), text).unwrap();
}

/// A generator whose numbers are below its argument, the same for a seed.
pub fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |n| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % n
    }
}

/// Sessions in which an item is mostly followed by its successor.
pub fn sessions(n_sessions: usize, n_items: i64, seed: u64) -> Vec<Vec<i64>> {
    let mut number = numbers(seed);
    (0..n_sessions)
        .map(|_| {
            let length = 2 + number(7);
            let mut item = number(n_items as u64 - 2) as i64;
            (0..length)
                .map(|_| {
                    item = if number(10) < 8 { item + 1 } else { number(n_items as u64) as i64 };
                    2 + item % (n_items - 2)
                })
                .collect()
        })
        .collect()
}

/// Writes a folder of days 1 to `n_days` as `bireme train` reads it.
pub fn write_days(dir: &Path, n_days: i64, n_sessions: usize, n_items: i64) {
    fs::create_dir_all(dir).unwrap();
    write_schema(dir, n_items);
    for day in 1..=n_days {
        for (i, (part, n)) in
            [("train", n_sessions), ("valid", n_sessions / 8), ("test", n_sessions / 8)]
                .into_iter()
                .enumerate()
        {
            let sessions = sessions(n, n_items, day as u64 * 3 + i as u64);
            write_sessions(&dir.join(format!("{day}/{part}.parquet")), &sessions, |item| {
                item as f32
            });
        }
    }
}

/// List features of a schema, the item id first; a categorical one has the rows of its table.
pub fn features(columns: &[(String, Option<i64>)]) -> Features {
    let feature = |(i, (name, n_rows)): (usize, &(String, Option<i64>))| {
        let domain = n_rows.map_or("type: FLOAT".to_owned(), |n| {
            format!(
                "type: INT int_domain {{ name: \"{name}\" min: 1 max: {} is_categorical: true }}",
                n - 1
            )
        });
        let tag = if i == 0 { "annotation { tag: \"item_id\" }" } else { "" };
        format!("feature {{ name: \"{name}\" value_count {{ min: 2 max: 20 }} {domain} {tag} }}\n")
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("schema.pbtxt");
    fs::write(&path, columns.iter().enumerate().map(feature).collect::<String>()).unwrap();
    let names: Vec<String> = columns.iter().map(|(name, _)| name.clone()).collect();
    Features::select(&Schema::read(&path).unwrap(), &names).unwrap()
}
