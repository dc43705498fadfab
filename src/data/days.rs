//! The day partitions of a data folder, and the columns that a run reads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bireme_etl::{Feature, SCHEMA, SESSIONS_BY_DAY, Schema, Split};

use super::{DataConfig, DataError, SessionFile};
use crate::config::ALL_FEATURES;

/// The columns that a run reads, in the order of [`super::Batch::columns`].
#[derive(Clone, Debug)]
pub struct Features {
    columns: Vec<Feature>,
    warnings: Vec<String>,
}

impl Features {
    /// Selects the item id and then the features `names`, sorted by name; [`ALL_FEATURES`] among
    /// them selects all that are lists.
    ///
    /// # Errors
    /// A feature is not in the schema or is not a list.
    pub fn select(schema: &Schema, names: &[String]) -> Result<Self, DataError> {
        let item = schema.item_id()?;
        if item.cardinality().is_none() || !item.is_list() {
            return Err(DataError::ItemId { feature: item.name.clone() });
        }
        let mut columns = vec![item.clone()];
        let all: Vec<String> = if names.iter().any(|name| name == ALL_FEATURES) {
            let lists = schema.features.iter().filter(|feature| feature.is_list());
            lists.map(|feature| feature.name.clone()).collect()
        } else {
            names.to_vec()
        };
        let mut names: Vec<&String> = all.iter().filter(|name| **name != item.name).collect();
        names.sort();
        names.dedup();
        for name in names {
            let feature =
                schema.feature(name).filter(|feature| feature.is_list()).ok_or_else(|| {
                    let have: Vec<_> = schema
                        .features
                        .iter()
                        .filter(|f| f.is_list())
                        .map(|f| f.name.as_str())
                        .collect();
                    DataError::UnknownFeature { feature: name.clone(), have: have.join(", ") }
                })?;
            columns.push(feature.check()?.clone());
        }
        Ok(Self { columns, warnings: schema.warnings.clone() })
    }

    /// Descriptions of the schema's parts that this version does not know.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// All columns; the item id is the first.
    pub fn columns(&self) -> &[Feature] {
        &self.columns
    }

    /// Size of the catalogue `V`: the largest item index + 1, which includes padding (0) and
    /// unknown (1).
    pub fn n_items(&self) -> i64 {
        self.columns[0].cardinality().unwrap_or_default()
    }
}

/// The day partitions of a data folder.
pub struct Days {
    dir: PathBuf,
    partitions: BTreeMap<i64, PathBuf>,
    features: Features,
    max_length: usize,
}

impl Days {
    /// Opens the output of `bireme preprocess`, or a folder of `<day>/{train,valid,test}.parquet`
    /// with a `schema.pbtxt`.
    ///
    /// # Errors
    /// The folder has no partitions, its schema cannot be read, or it lacks a configured feature.
    pub fn open(dir: &Path, config: &DataConfig) -> Result<Self, DataError> {
        let schema = Schema::read(dir.join(SCHEMA))?;
        let features = Features::select(&schema, &config.features)?;
        let nested = dir.join(SESSIONS_BY_DAY);
        let root = if nested.is_dir() { nested } else { dir.to_owned() };
        let entries = std::fs::read_dir(&root)
            .map_err(|source| DataError::Open { path: root.clone(), source })?;
        let partitions: BTreeMap<i64, PathBuf> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
            .collect();
        if partitions.is_empty() {
            return Err(DataError::NoDays(dir.to_owned()));
        }
        Ok(Self { dir: dir.to_owned(), partitions, features, max_length: config.max_length })
    }

    pub fn features(&self) -> &Features {
        &self.features
    }

    /// The days that have a partition, ascending.
    pub fn days(&self) -> impl DoubleEndedIterator<Item = i64> {
        self.partitions.keys().copied()
    }

    pub fn first(&self) -> i64 {
        self.days().next().expect("a folder without days is refused")
    }

    pub fn last(&self) -> i64 {
        self.days().next_back().expect("a folder without days is refused")
    }

    /// The days as messages list them: `1 to 3, 5`.
    pub(super) fn in_words(&self) -> String {
        let days: Vec<i64> = self.days().collect();
        let ranges = days.chunk_by(|a, b| a + 1 == *b).map(|range| match range {
            [first, .., last] => format!("{first} to {last}"),
            [day, ..] => day.to_string(),
            [] => unreachable!("a range has a day"),
        });
        ranges.collect::<Vec<_>>().join(", ")
    }

    /// Opens one split of a day and checks the file's footer and columns.
    ///
    /// # Errors
    /// The day or its file is missing, the file is not parquet, or a column is missing or has an
    /// unexpected type.
    pub fn file(&self, day: i64, split: Split) -> Result<SessionFile, DataError> {
        let partition = self.partitions.get(&day).ok_or_else(|| DataError::MissingDay {
            day,
            dir: self.dir.clone(),
            have: self.in_words(),
        })?;
        SessionFile::open(&partition.join(split.file()), day, &self.features, self.max_length)
    }
}
