//! What describes the items, from a file beside the sessions.

use std::path::Path;

use bireme_etl::ITEMS;

use super::file::{Column, Rows, column_error, leaf, open_parquet, read_column};
use super::{DataError, Features};

/// Attributes of items, a row each. It may have items without events.
pub struct Catalogue {
    items: Vec<i64>,
    /// By the number of the column in [`Features::columns`]; `None` if the file does not have it.
    columns: Vec<Option<Column>>,
}

impl Catalogue {
    /// Reads `items.parquet` in `dir`; `None` if the file is missing. Its columns are named like
    /// features and hold one value for each item, encoded as in the sessions.
    ///
    /// # Errors
    /// The file is not parquet, has no column with the items, has an item twice, or a column has
    /// another type than its feature, a null or a value out of range.
    pub fn open(dir: &Path, features: &Features) -> Result<Option<Self>, DataError> {
        let path = dir.join(ITEMS);
        if !path.exists() {
            return Ok(None);
        }
        let reader = open_parquet(&path)?;
        let mut columns = Vec::new();
        for feature in features.columns() {
            let leaf = leaf(&reader, &path, feature, Rows::Values)?;
            let column = leaf.map(|leaf| read_column(&reader, &path, feature, leaf)).transpose()?;
            columns.push(column.map(|column| column.column));
        }
        let Some(Column::Ids(items)) = columns[0].take() else {
            return Err(column_error(&path, &features.columns()[0].name, "is missing".to_owned()));
        };
        check_distinct(&items, features, &path)?;
        Ok(Some(Self { items, columns }))
    }

    /// Items of the rows.
    pub fn items(&self) -> &[i64] {
        &self.items
    }

    /// Values of a column of [`Features::columns`], row by row; `None` if the file does not have
    /// it.
    pub fn column(&self, column: usize) -> Option<&Column> {
        self.columns[column].as_ref()
    }
}

/// Checks that no item is there twice.
///
/// # Errors
/// Names the second row of the first that is.
pub(super) fn check_distinct(
    items: &[i64],
    features: &Features,
    path: &Path,
) -> Result<(), DataError> {
    let mut is_there = vec![false; features.n_items() as usize];
    for (row, &id) in items.iter().enumerate() {
        if std::mem::replace(&mut is_there[id as usize], true) {
            let problem = format!("holds the item {id} a second time");
            let column = features.columns()[0].name.clone();
            return Err(DataError::Row { path: path.to_owned(), row, column, problem });
        }
    }
    Ok(())
}
