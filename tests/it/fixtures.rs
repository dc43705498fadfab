//! Files that tests read: made by them, or kept in tests/golden.

use std::collections::HashMap;
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bireme::data::Features;
use bireme::etl::Schema;
use parquet::data_type::{FloatType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tch::Tensor;

/// The folder of real events: `BIREME_SHARED`, or `../shared`. A test without it is skipped.
pub fn shared() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let dir = env::var_os("BIREME_SHARED").map_or(beside, PathBuf::from);
    if dir.is_dir() {
        return Some(dir);
    }
    println!("skipped: there is no `{}` with real events (`BIREME_SHARED` names another)", dir.display());
    None
}

/// A file of tests/golden, whose README describes them.
pub fn golden_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Named tensors of `tests/golden/NAME.safetensors`.
pub fn golden(name: &str) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(golden_path(&format!("{name}.safetensors"))).unwrap().into_iter().collect()
}

/// Largest absolute difference.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    if a.numel() == 0 { 0.0 } else { (a - b).abs().max().double_value(&[]) }
}

pub const ITEM: &str = "product_id-list_seq";
pub const PRICE: &str = "price_log_norm-list_seq";
pub const COLOUR: &str = "colour-list_seq";

/// Colours are 1 to 7, as follows from the item.
pub fn colour(item: i64) -> i64 {
    1 + item % 7
}

/// Writes sessions of item indices, with a price and a colour for each event, as a session file with small row groups.
pub fn write_sessions(path: &Path, sessions: &[Vec<i64>], price: impl Fn(i64) -> f32) {
    let list = |name: &str, of: &str| {
        format!("optional group {name} (LIST) {{ repeated group list {{ optional {of} element; }} }} ")
    };
    let columns = list(ITEM, "int64") + &list(PRICE, "float") + &list(COLOUR, "int64");
    let message = format!("message sessions {{ {columns} }}");
    let schema = Arc::new(parse_message_type(&message).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    for group in sessions.chunks(64) {
        // A value is defined at level 3; level 1 is an empty list.
        let (mut definitions, mut repetitions) = (Vec::new(), Vec::new());
        for session in group {
            definitions.extend(if session.is_empty() { vec![1] } else { vec![3i16; session.len()] });
            repetitions.extend((0..session.len().max(1)).map(|i| i16::from(i > 0)));
        }
        let items = group.concat();
        let prices: Vec<f32> = items.iter().map(|&item| price(item)).collect();
        let mut columns = writer.next_row_group().unwrap();
        let mut column = columns.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&items, Some(&definitions), Some(&repetitions)).unwrap();
        column.close().unwrap();
        let mut column = columns.next_column().unwrap().unwrap();
        column.typed::<FloatType>().write_batch(&prices, Some(&definitions), Some(&repetitions)).unwrap();
        column.close().unwrap();
        let colours: Vec<i64> = items.iter().map(|&item| colour(item)).collect();
        let mut column = columns.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&colours, Some(&definitions), Some(&repetitions)).unwrap();
        column.close().unwrap();
        columns.close().unwrap();
    }
    writer.close().unwrap();
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

/// Reproducible numbers below `n`.
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

/// A folder of days 1 to `n_days` as `bireme train` reads it.
pub fn days(dir: &Path, n_days: i64, n_sessions: usize, n_items: i64) {
    fs::create_dir_all(dir).unwrap();
    write_schema(dir, n_items);
    for day in 1..=n_days {
        for (i, (part, n)) in [("train", n_sessions), ("valid", n_sessions / 8), ("test", n_sessions / 8)]
            .into_iter()
            .enumerate()
        {
            let sessions = sessions(n, n_items, day as u64 * 3 + i as u64);
            write_sessions(&dir.join(format!("{day}/{part}.parquet")), &sessions, |item| item as f32);
        }
    }
}

/// List features as a schema describes them, the first being the item id: categorical ones with the rows of their table.
pub fn features(columns: &[(String, Option<i64>)]) -> Features {
    let feature = |(i, (name, n_rows)): (usize, &(String, Option<i64>))| {
        let domain = n_rows.map_or("type: FLOAT".to_owned(), |n| {
            format!("type: INT int_domain {{ name: \"{name}\" min: 1 max: {} is_categorical: true }}", n - 1)
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

/// Of `n` sessions: no item is hidden from any.
pub fn nothing_hidden(n: i64) -> Tensor {
    Tensor::empty([n, 0], (tch::Kind::Int64, tch::Device::Cpu))
}
