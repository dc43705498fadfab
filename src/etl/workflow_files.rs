//! A workflow's folder: `statistics.json`, `vocabulary/<column>.parquet`, `products.parquet` and
//! `categories.parquet`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bireme_base::digest::xxh3_of_file;
use polars::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::schema::event;
use crate::time::EventTime;
use crate::vocab::{Coded, ColumnValue, Dictionary, Vocabulary};
use crate::workflow::{DESCRIBED, Product, Statistics, VISITORS, Workflow};

/// The layout of the files that this version writes and reads.
pub(crate) const FORMAT: u32 = 3;
pub(crate) const STATISTICS: &str = "statistics.json";
const VOCABULARIES: &str = "vocabulary";
const PRODUCTS: &str = "products.parquet";
const CATEGORIES: &str = "categories.parquet";

/// Columns of `products.parquet`, beside those named as in the events.
const FIRST_SEEN: &str = "first_event_time_ts";
const LAST_SEEN: &str = "last_event_time_ts";
/// Only where times have fractions of a second.
const LAST_SEEN_NANOS: &str = "last_event_time_nanos";
/// Of `categories.parquet`.
const MEAN_PRICE: &str = "price_mean";
/// Of a vocabulary, beside the column with the values.
const ID: &str = "id";
const COUNT: &str = "count";

/// `statistics.json`.
#[derive(Serialize, Deserialize)]
struct Saved<S> {
    #[serde(flatten)]
    statistics: S,
    /// The digest of each table, by its path in the folder.
    files: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct SavedFormat {
    format: u32,
}

fn vocabulary_file(column: Coded) -> String {
    format!("{VOCABULARIES}/{}.parquet", column.name())
}

/// The paths of all tables in the folder.
fn table_files() -> impl Iterator<Item = String> {
    Coded::ALL.into_iter().map(vocabulary_file).chain([PRODUCTS, CATEGORIES].map(str::to_owned))
}

/// Copies a workflow's folder without the ids of users and sessions. `to` must exist.
///
/// # Errors
/// A file that cannot be read or written.
pub fn copy_without_visitors(from: &Path, to: &Path) -> Result<(), Error> {
    let vocabularies = to.join(VOCABULARIES);
    fs::create_dir_all(&vocabularies).map_err(Error::io("create", &vocabularies))?;
    let of_visitors = VISITORS.map(vocabulary_file);
    let files = table_files().filter(|file| !of_visitors.contains(file));
    for file in files.chain([STATISTICS.to_owned()]) {
        let source = from.join(&file);
        fs::copy(&source, to.join(&file)).map_err(Error::io("copy", &source))?;
    }
    Ok(())
}

impl Workflow {
    /// Writes the workflow into a folder, which must exist. The ids of users and sessions are left
    /// out where the workflow has none.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        let vocabularies = dir.join(VOCABULARIES);
        fs::create_dir_all(&vocabularies).map_err(Error::io("create", &vocabularies))?;
        for vocabulary in &self.vocabularies {
            let column = vocabulary.column();
            if !(VISITORS.contains(&column) && vocabulary.is_empty()) {
                write_vocabulary(vocabulary, &dir.join(vocabulary_file(column)))?;
            }
        }
        write_table(self.product_table()?, &dir.join(PRODUCTS))?;
        write_table(self.category_table()?, &dir.join(CATEGORIES))?;
        self.write_statistics(dir)
    }

    /// One row per product, by ascending id.
    fn product_table(&self) -> PolarsResult<DataFrame> {
        let (ids, products) = self.by_value(Coded::Product, &self.products);
        let integers = |name: &str, value: fn(&Product) -> i64| {
            Column::new(name.into(), products.iter().map(value).collect::<Vec<_>>())
        };
        let described = |place: usize| {
            let column = DESCRIBED[place];
            let dictionary = self.vocabulary(column).dictionary();
            let cells = products.iter().map(|product| dictionary.cell(product.codes[place]));
            column_of(column.name(), column.is_int(), cells)
        };
        let prices: Vec<f64> = products.iter().map(|product| product.price).collect();
        let n_rows = ids.len();
        let mut columns = vec![
            Column::new(event::PRODUCT.into(), ids),
            integers(FIRST_SEEN, |product| product.first_seen),
            integers(LAST_SEEN, |product| product.last_seen.seconds),
            described(0),
            described(1),
            described(2),
            Column::new(event::PRICE.into(), prices),
        ];
        if products.iter().any(|product| product.last_seen.nanos > 0) {
            let nanos = integers(LAST_SEEN_NANOS, |product| i64::from(product.last_seen.nanos));
            columns.push(nanos);
        }
        DataFrame::new(n_rows, columns)
    }

    /// One row per category, by ascending id.
    fn category_table(&self) -> PolarsResult<DataFrame> {
        let (ids, means) = self.by_value(Coded::Category, &self.mean_price);
        let columns =
            vec![Column::new(event::CATEGORY.into(), ids), Column::new(MEAN_PRICE.into(), means)];
        DataFrame::new(columns[0].len(), columns)
    }

    /// The values of an integer column in ascending order, and what `by_code` holds of each.
    fn by_value<T: Copy>(&self, column: Coded, by_code: &[T]) -> (Vec<i64>, Vec<T>) {
        let dictionary = self.vocabulary(column).dictionary();
        let mut rows: Vec<(i64, T)> = (1..=dictionary.len() as u32)
            .filter_map(|code| Some((dictionary.value(code).as_int()?, by_code[code as usize])))
            .collect();
        rows.sort_unstable_by_key(|(value, _)| *value);
        rows.into_iter().unzip()
    }

    /// Writes `statistics.json` with the digests of the tables, which must be written before.
    fn write_statistics(&self, dir: &Path) -> Result<(), Error> {
        let mut files = BTreeMap::new();
        for file in table_files() {
            let path = dir.join(&file);
            if path.exists() {
                files.insert(file, xxh3_of_file(&path).map_err(Error::io("read", &path))?);
            }
        }
        let path = dir.join(STATISTICS);
        let saved = Saved { statistics: &self.statistics, files };
        let text = serde_json::to_string_pretty(&saved).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text + "\n")).map_err(Error::io("write", &path))
    }

    /// Reads what [`Workflow::save`] wrote.
    ///
    /// # Errors
    /// A file that is missing, damaged, or of a format that this version does not know.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let Saved { statistics, files } = read_statistics(dir)?;
        for file in table_files() {
            check_digest(dir, &file, files.get(&file))?;
        }
        let mut vocabularies = Vec::with_capacity(Coded::ALL.len());
        for column in Coded::ALL {
            let path = dir.join(vocabulary_file(column));
            vocabularies.push(if may_be_absent(column) && !path.exists() {
                Vocabulary::empty(column)
            } else {
                read_vocabulary(path, column)?
            });
        }
        let mut vocabularies: [_; 7] = vocabularies
            .try_into()
            .unwrap_or_else(|_| unreachable!("one for each of `Coded::ALL`"));
        let products = read_products(dir.join(PRODUCTS), &mut vocabularies)?;
        let mean_price = read_mean_prices(dir.join(CATEGORIES), &mut vocabularies)?;
        Ok(Self { statistics, vocabularies, products, mean_price })
    }
}

fn may_be_absent(column: Coded) -> bool {
    VISITORS.contains(&column)
}

fn read_statistics(dir: &Path) -> Result<Saved<Statistics>, Error> {
    let path = dir.join(STATISTICS);
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let broken = |problem: String| Error::Workflow { path: path.clone(), problem };
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| broken(error.to_string()))?;
    // The format comes first, because files of another format may have other keys.
    let SavedFormat { format } =
        SavedFormat::deserialize(&json).map_err(|error| broken(error.to_string()))?;
    if format != FORMAT {
        return Err(broken(format!("its format is {format}, and this version reads {FORMAT}")));
    }
    Saved::deserialize(json).map_err(|error| broken(error.to_string()))
}

/// Refuses a table that is not what was saved: polars trusts the metadata of a parquet file, and
/// may panic on a damaged one.
fn check_digest(dir: &Path, file: &str, saved: Option<&String>) -> Result<(), Error> {
    let path = dir.join(file);
    if VISITORS.iter().any(|&column| file == vocabulary_file(column)) && !path.exists() {
        return Ok(());
    }
    let found = xxh3_of_file(&path).map_err(Error::io("read", &path))?;
    if saved == Some(&found) {
        return Ok(());
    }
    let problem = "the file has changed since it was saved: its digest differs".to_owned();
    Err(Error::Workflow { path, problem })
}

/// Writes `id`, the value and its count, by ascending id. The first row is id 1 with null, which is
/// not counted.
fn write_vocabulary(vocabulary: &Vocabulary, path: &Path) -> Result<(), Error> {
    /// Rows of a table in memory: there may be many millions of session ids.
    const ROWS: usize = 1 << 20;
    let (name, is_int) = (vocabulary.column().name(), vocabulary.dictionary().is_int());
    let table = |ids: Range<usize>| {
        let values = column_of(name, is_int, ids.clone().map(|id| vocabulary.value(id as u32)));
        let counts = ids.clone().map(|id| i64::from(vocabulary.count(id as u32).unwrap_or(0)));
        let columns = vec![
            Column::new(ID.into(), ids.clone().map(|id| id as i64).collect::<Vec<_>>()),
            values,
            Column::new(COUNT.into(), counts.collect::<Vec<_>>()),
        ];
        DataFrame::new(ids.len(), columns)
    };
    let file = File::create(path).map_err(Error::io("create", path))?;
    let write = || {
        let schema = table(0..0)?.schema().clone();
        let mut writer = ParquetWriter::new(BufWriter::new(file)).batched(&schema)?;
        let end = vocabulary.cardinality();
        for start in (Vocabulary::UNKNOWN as usize..end).step_by(ROWS) {
            writer.write_batch(&table(start..end.min(start + ROWS))?)?;
        }
        writer.finish()
    };
    write().map(drop).map_err(Error::parquet("write", path))
}

fn read_vocabulary(path: PathBuf, column: Coded) -> Result<Vocabulary, Error> {
    let table = StoredTable::read(path)?;
    let ids = table.ints(ID)?;
    if !ids.into_iter().eq((i64::from(Vocabulary::UNKNOWN)..).take(table.frame.height())) {
        return Err(table.broken(format!("`{ID}` does not count up from 1")));
    }
    let mut dictionary = Dictionary::new(table.holds_ints(column));
    for (row, cell) in table.cells(column)?.enumerate() {
        let is_expected = match cell {
            // The first row stands for null, which has code 0.
            None => row == 0,
            Some(value) => row > 0 && dictionary.intern(value) as usize == row,
        };
        if !is_expected {
            let name = column.name();
            return Err(table.broken(format!("row {}: `{name}` is null or repeated", row + 1)));
        }
    }
    let counts = table.ints(COUNT)?.into_iter().skip(1).map(u32::try_from);
    let counts: Vec<u32> =
        counts.collect::<Result<_, _>>().map_err(|error| table.broken(error.to_string()))?;
    Ok(Vocabulary::of_ids(column, dictionary, counts))
}

/// Products by their code. Products and values without an id get a code now.
fn read_products(path: PathBuf, vocabularies: &mut [Vocabulary; 7]) -> Result<Vec<Product>, Error> {
    let table = StoredTable::read(path)?;
    let mut codes = [const { Vec::new() }; 3];
    for (codes, column) in codes.iter_mut().zip(DESCRIBED) {
        let vocabulary = &mut vocabularies[column as usize];
        let cells = table.cells(column)?;
        codes.extend(cells.map(|cell| match cell {
            Some(value) => vocabulary.add_unknown(value),
            None => Dictionary::NULL,
        }));
    }
    let (first, last) = (table.ints(FIRST_SEEN)?, table.ints(LAST_SEEN)?);
    let nanos = if table.frame.column(LAST_SEEN_NANOS).is_ok() {
        table.ints(LAST_SEEN_NANOS)?
    } else {
        vec![0; last.len()]
    };
    let prices = table.floats(event::PRICE)?;
    let products = (0..first.len()).map(|row| Product {
        first_seen: first[row],
        last_seen: EventTime { seconds: last[row], nanos: nanos[row] as u32 },
        price: prices[row],
        codes: [codes[0][row], codes[1][row], codes[2][row]],
    });
    let vocabulary = &mut vocabularies[Coded::Product as usize];
    Ok(by_code(vocabulary, &table.ints(event::PRODUCT)?, products, Product::UNSEEN))
}

/// Mean prices by the code of the category. Categories without an id get a code now.
fn read_mean_prices(path: PathBuf, vocabularies: &mut [Vocabulary; 7]) -> Result<Vec<f64>, Error> {
    let table = StoredTable::read(path)?;
    let vocabulary = &mut vocabularies[Coded::Category as usize];
    let means = table.floats(MEAN_PRICE)?.into_iter();
    Ok(by_code(vocabulary, &table.ints(event::CATEGORY)?, means, f64::NAN))
}

/// Orders what is known of `values` by their codes; a value without an id gets its code now.
fn by_code<T: Copy>(
    vocabulary: &mut Vocabulary,
    values: &[i64],
    known: impl Iterator<Item = T>,
    unknown: T,
) -> Vec<T> {
    let mut ordered = vec![unknown; vocabulary.ids().len()];
    for (value, known) in values.iter().zip(known) {
        let code = vocabulary.add_unknown(ColumnValue::Int(*value)) as usize;
        ordered.resize(ordered.len().max(code + 1), unknown);
        ordered[code] = known;
    }
    ordered
}

/// A column of integers or of text. All cells must be of that type.
fn column_of<'v>(
    name: &str,
    is_int: bool,
    cells: impl Iterator<Item = Option<ColumnValue<'v>>>,
) -> Column {
    if is_int {
        let ints = cells.map(|cell| cell.and_then(ColumnValue::as_int));
        Int64Chunked::from_iter_options(name.into(), ints).into_column()
    } else {
        let texts = cells.map(|cell| cell.and_then(ColumnValue::as_text));
        StringChunked::from_iter_options(name.into(), texts).into_column()
    }
}

pub(crate) fn write_table(mut table: DataFrame, path: &Path) -> Result<(), Error> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    let written = ParquetWriter::new(BufWriter::new(file)).finish(&mut table);
    written.map(drop).map_err(Error::parquet("write", path))
}

struct StoredTable {
    path: PathBuf,
    frame: DataFrame,
}

impl StoredTable {
    fn read(path: PathBuf) -> Result<Self, Error> {
        let file = File::open(&path).map_err(Error::io("read", &path))?;
        let frame = ParquetReader::new(file).finish().map_err(Error::parquet("read", &path))?;
        Ok(Self { path, frame })
    }

    fn broken(&self, problem: String) -> Error {
        Error::Workflow { path: self.path.clone(), problem }
    }

    /// What `read` returns for a column.
    fn column<'t, T>(
        &'t self,
        name: &str,
        read: impl FnOnce(&'t Column) -> PolarsResult<T>,
    ) -> Result<T, Error> {
        let values = self.frame.column(name).and_then(read);
        values.map_err(|error| self.broken(error.to_string()))
    }

    /// A column of integers without null.
    fn ints(&self, name: &str) -> Result<Vec<i64>, Error> {
        self.column(name, |column| {
            let cells = column.i64()?;
            polars_ensure!(cells.null_count() == 0, ComputeError: "`{}` holds null", name);
            Ok(cells.into_no_null_iter().collect())
        })
    }

    /// A column of floats; NaN for null.
    fn floats(&self, name: &str) -> Result<Vec<f64>, Error> {
        self.column(name, |column| {
            Ok(column.f64()?.iter().map(|cell| cell.unwrap_or(f64::NAN)).collect())
        })
    }

    /// Whether the cells of an encoded column are integers. Session ids may be either.
    fn holds_ints(&self, column: Coded) -> bool {
        let is_int64 = |cells: &Column| cells.dtype() == &DataType::Int64;
        column.is_int()
            || column == Coded::Session && self.frame.column(column.name()).is_ok_and(is_int64)
    }

    /// The cells of an encoded column.
    fn cells(
        &self,
        column: Coded,
    ) -> Result<Box<dyn Iterator<Item = Option<ColumnValue<'_>>> + '_>, Error> {
        let is_int = self.holds_ints(column);
        self.column(column.name(), |cells| {
            Ok(if is_int {
                Box::new(cells.i64()?.iter().map(|cell| cell.map(ColumnValue::Int)))
            } else {
                Box::new(cells.str()?.iter().map(|cell| cell.map(ColumnValue::Text)))
                    as Box<dyn Iterator<Item = _>>
            })
        })
    }
}
