//! What describes the items, from a file beside the sessions.

use std::path::Path;

use parquet::file::reader::FileReader;

use super::file::{Column, open_parquet, read_lists};
use super::{DataError, Features};

/// File of the catalogue in a folder of sessions.
const ITEMS: &str = "items.parquet";

/// Attributes of items, a row each. It may have items without events.
pub struct Catalogue {
    items: Vec<i64>,
    /// By the number of the column in [`Features::columns`]; `None` if the file does not have it.
    columns: Vec<Option<Column>>,
}

impl Catalogue {
    /// Reads `items.parquet` in `dir`; `None` if there is no such file. A column of the file has
    /// the name of a feature and single values, encoded as those of the sessions are.
    ///
    /// # Errors
    /// The file is not parquet, has no column with the items, has an item twice, or a value is null
    /// or out of range.
    pub fn open(dir: &Path, features: &Features) -> Result<Option<Self>, DataError> {
        let path = dir.join(ITEMS);
        if !path.exists() {
            return Ok(None);
        }
        let column = |feature: &str, problem: &str| DataError::Column {
            path: path.clone(),
            column: feature.to_owned(),
            problem: problem.to_owned(),
        };
        let reader = open_parquet(&path)?;
        let unreadable = |source| DataError::Parquet { path: path.clone(), source };
        let descriptor = reader.metadata().file_metadata().schema_descr();
        let mut columns = Vec::new();
        for feature in features.columns() {
            let leaf = (0..descriptor.num_columns())
                .find(|&leaf| descriptor.column(leaf).path().parts()[0] == feature.name);
            let Some(leaf) = leaf else {
                columns.push(None);
                continue;
            };
            if descriptor.column(leaf).max_rep_level() > 0 {
                return Err(column(&feature.name, "is a list, not one value for each item"));
            }
            let defined = descriptor.column(leaf).max_def_level();
            let mut whole: Option<Column> = None;
            let mut first_row = 0;
            for group in 0..reader.num_row_groups() {
                let invalid = |row: usize, problem: String| DataError::Row {
                    path: path.clone(),
                    row: first_row + row,
                    column: feature.name.clone(),
                    problem,
                };
                let group = reader.get_row_group(group).map_err(unreadable)?;
                let n_rows = group.metadata().num_rows() as usize;
                let values = group.get_column_reader(leaf).map_err(unreadable)?;
                let values = read_lists(values, 0..n_rows, defined).map_err(unreadable)?;
                if let Some(row) = values.first_gap {
                    return Err(invalid(row, "holds a null".to_owned()));
                }
                let values = values.into_column(feature);
                let values = values.map_err(|(row, problem)| invalid(row, problem))?;
                first_row += n_rows;
                match &mut whole {
                    Some(whole) => whole.append(values),
                    None => whole = Some(values),
                }
            }
            columns.push(whole);
        }
        let item = &features.columns()[0];
        let Some(Column::Ids(items)) = columns[0].take() else {
            return Err(column(&item.name, "is missing"));
        };
        let mut is_there = vec![false; features.n_items() as usize];
        for (row, &id) in items.iter().enumerate() {
            if std::mem::replace(&mut is_there[id as usize], true) {
                let problem = format!("holds the item {id} a second time");
                return Err(DataError::Row { path, row, column: item.name.clone(), problem });
            }
        }
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
