//! Item vectors from a file.

use std::path::Path;

use bireme_etl::{Domain, Feature};
use parquet::file::reader::FileReader;

use super::file::{Column, Rows, column_error, leaf, open_parquet, read_column};
use super::{DataError, Features, catalogue};

/// Column with the vectors.
const VECTOR: &str = "vector";

/// Vectors of items, all of one width.
pub struct Pretrained {
    /// Items, each once.
    pub items: Vec<i64>,
    /// Width of a vector.
    pub width: usize,
    /// The vectors, one after the other.
    pub values: Vec<f32>,
}

impl Pretrained {
    /// Reads a parquet file: a column named like the feature of the item id, with item indices, and
    /// the list column `vector`.
    ///
    /// # Errors
    /// The file is not parquet, a column is missing, an item is there twice, or a vector is empty,
    /// of another width than the first, or not finite.
    pub fn read(path: &Path, features: &Features) -> Result<Self, DataError> {
        let reader = open_parquet(path)?;
        let item = &features.columns()[0];
        let read = |feature: &Feature, rows: Rows| {
            let leaf = leaf(&reader, path, feature, rows)?;
            let missing = || column_error(path, &feature.name, "is missing".to_owned());
            read_column(&reader, path, feature, leaf.ok_or_else(missing)?)
        };
        let items = read(item, Rows::Values)?;
        let Column::Ids(items) = items.column else { unreachable!("the item id is categorical") };
        catalogue::check_distinct(&items, features, path)?;
        let vectors = read(&vector_feature(), Rows::Lists)?;
        let Column::Values(values) = vectors.column else { unreachable!("vectors have values") };
        let width = vectors.lengths.first().copied().unwrap_or_default();
        if let Some(row) = vectors.lengths.iter().position(|&length| length != width) {
            return Err(DataError::Row {
                path: path.to_owned(),
                row,
                column: VECTOR.to_owned(),
                problem: format!("has {} values, the first vector {width}", vectors.lengths[row]),
            });
        }
        if reader.metadata().file_metadata().num_rows() == 0 {
            return Err(column_error(path, VECTOR, "has no vector".to_owned()));
        }
        Ok(Self { items, width, values })
    }
}

/// A list of numbers.
fn vector_feature() -> Feature {
    Feature {
        name: VECTOR.to_owned(),
        value_count: None,
        domain: Domain::Float(None),
        tags: vec!["continuous".to_owned(), "list".to_owned()],
    }
}
