//! A small shop, and its output, decoded.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use bireme_etl::{
    Coded, ColumnValue, Error, PreprocessOptions, PreprocessReport, SESSIONS_BY_DAY, Split,
    WORKFLOW, Workflow, preprocess,
};
use polars::prelude::*;
use tempfile::TempDir;

pub const HEADER: &str =
    "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session";

/// A file of the shared data; prints that the test is skipped where it is absent.
pub fn shared(path: &str) -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let found = std::env::var_os("BIREME_SHARED").map_or_else(beside, PathBuf::from).join(path);
    if !found.exists() {
        println!("skipped: {} is not here", found.display());
    }
    found.exists().then_some(found)
}

pub fn scratch() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Writes events and preprocesses them in the same folder.
pub fn run(
    dir: &Path,
    csv: &str,
    change: impl FnOnce(&mut PreprocessOptions),
) -> Result<PreprocessReport, Error> {
    let events = dir.join("events.csv");
    fs::write(&events, csv).expect("events are written");
    let mut options = PreprocessOptions::new(vec![events], dir.join("out"));
    change(&mut options);
    preprocess(&options, &mut |_| {})
}

/// A shop of `n_sessions` sessions over ten days or so: nulls, repeats, equal seconds, lengths from
/// 1 to 40, rows of different sessions mixed and out of order.
pub fn shop(n_sessions: u64) -> String {
    let mut random = Random(7);
    let mut rows = Vec::new();
    for session in 0..n_sessions {
        let length = if random.below(10) == 0 { 1 + random.below(40) } else { 1 + random.below(8) };
        let mut time = 1_569_888_123 + random.below(10 * 86_400) as i64;
        let user = 500 + random.below(n_sessions / 2 + 1);
        for _ in 0..length {
            let product = 1000 + random.below(30) * random.below(30);
            let category = 2_053_013_552_000_000_000 + product % 17;
            let code = if product.is_multiple_of(3) {
                String::new()
            } else {
                format!("kind.{}", product % 7)
            };
            let brand = if product.is_multiple_of(5) {
                String::new()
            } else {
                format!("brand{}", product % 11)
            };
            let kind = ["view", "view", "view", "cart", "purchase"][random.below(5) as usize];
            let price = (product % 97) as f64 * 1.37 + random.below(5) as f64;
            let time_text = text_of(time);
            let id = format!("{session:08x}-aaaa");
            let row = format!(
                "{time_text},{kind},{product},{category},{code},{brand},{price},{user},{id}"
            );
            rows.push((random.below(1_000_000), row.clone()));
            if random.below(4) == 0 {
                rows.push((random.below(1_000_000), row));
            }
            time += random.below(90) as i64;
        }
    }
    rows.push((500_000, format!("{},view,1,2,,,3.5,4,", text_of(1_569_888_123))));
    rows.sort();
    let mut csv = format!("{HEADER}\n");
    for (_, row) in rows {
        let _ = writeln!(csv, "{row}");
    }
    csv
}

fn text_of(seconds: i64) -> String {
    let time = chrono::DateTime::from_timestamp(seconds, 0).expect("a time");
    let time = time.naive_utc();
    format!("{} {} UTC", time.date(), time.time())
}

pub struct Random(pub u64);

impl Random {
    /// A number below `n` (splitmix64).
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }
}

/// A session of the output, with ids decoded where possible.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub day_index: i64,
    pub split: Split,
    pub session: String,
    pub count: i64,
    pub products: Vec<i64>,
    /// By column name, with ids not decoded.
    pub lists: BTreeMap<String, Vec<f64>>,
}

/// All rows, by day, split and place in the file.
pub fn rows(out: &Path) -> Vec<Row> {
    let workflow = Workflow::load(&out.join(WORKFLOW)).expect("the workflow is read");
    let mut rows = Vec::new();
    for day_index in days(out) {
        for split in Split::ALL {
            let path = out.join(SESSIONS_BY_DAY).join(day_index.to_string()).join(split.file());
            for row in table_rows(&read(&path), &workflow) {
                rows.push(Row { day_index, split, ..row });
            }
        }
    }
    rows
}

/// The rows of a table, as if in train of day 0.
pub fn table_rows(table: &DataFrame, workflow: &Workflow) -> Vec<Row> {
    let ints = |name: &str| -> Vec<i64> {
        table.column(name).unwrap().i64().unwrap().into_no_null_iter().collect()
    };
    let (sessions, counts) = (ints("user_session"), ints("product_id-count"));
    let lists: Vec<_> = (table.columns().iter())
        .filter(|column| column.name().ends_with("-list_seq"))
        .map(|column| (column.name().to_string(), column.list().unwrap().clone()))
        .collect();
    (0..table.height())
        .map(|row| {
            let values = |(name, lists): &(String, ListChunked)| {
                let values = lists.get_as_series(row).expect("no list is null");
                let values = values.cast(&DataType::Float64).unwrap();
                (name.clone(), values.f64().unwrap().into_no_null_iter().collect::<Vec<_>>())
            };
            let lists: BTreeMap<_, _> = lists.iter().map(values).collect();
            let products = lists["product_id-list_seq"].iter();
            let decode =
                |id: &f64| decoded(workflow, Coded::Product, *id as i64).expect("a known product");
            Row {
                day_index: 0,
                split: Split::Train,
                session: decoded(workflow, Coded::Session, sessions[row]).unwrap_or_default(),
                count: counts[row],
                products: products.map(|id| decode(id).parse().unwrap()).collect(),
                lists,
            }
        })
        .collect()
}

pub fn decoded(workflow: &Workflow, column: Coded, id: i64) -> Option<String> {
    workflow.vocabulary(column).value(id as u32).map(|value| match value {
        ColumnValue::Int(value) => value.to_string(),
        ColumnValue::Text(value) => value.to_owned(),
    })
}

pub fn days(out: &Path) -> Vec<i64> {
    let entries = fs::read_dir(out.join(SESSIONS_BY_DAY)).expect("the days are there");
    let mut days: Vec<i64> = entries
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    days.sort_unstable();
    days
}

pub fn read(path: &Path) -> DataFrame {
    ParquetReader::new(File::open(path).unwrap()).finish().unwrap()
}

/// Every file below a folder, with its bytes.
pub fn bytes(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(
                    path.strip_prefix(dir).unwrap().to_path_buf(),
                    fs::read(&path).unwrap(),
                );
            }
        }
    }
    found
}
