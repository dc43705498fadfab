//! Where the day partitions lie and which of their columns a run reads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bireme_etl::{Feature, SCHEMA, SESSIONS_BY_DAY, Schema, Split};

use super::{DataConfig, DataError, SessionFile};

/// The columns a run reads, in the order of [`super::Batch::columns`].
#[derive(Clone, Debug)]
pub struct Features {
    columns: Vec<Feature>,
    warnings: Vec<String>,
}

impl Features {
    /// The item id first, then the other features named, by name.
    ///
    /// # Errors
    /// A feature that the schema lacks, or has otherwise than as a list.
    pub fn select(schema: &Schema, names: &[String]) -> Result<Self, DataError> {
        let item = schema.item_id()?;
        if item.cardinality().is_none() || !item.is_list() {
            return Err(DataError::ItemId { feature: item.name.clone() });
        }
        let mut columns = vec![item.clone()];
        let mut names: Vec<&String> = names.iter().filter(|name| **name != item.name).collect();
        names.sort();
        names.dedup();
        for name in names {
            let feature = schema.feature(name).filter(|feature| feature.is_list()).ok_or_else(|| {
                let have: Vec<_> =
                    schema.features.iter().filter(|f| f.is_list()).map(|f| f.name.as_str()).collect();
                DataError::UnknownFeature { feature: name.clone(), have: have.join(", ") }
            })?;
            columns.push(feature.check()?.clone());
        }
        Ok(Self { columns, warnings: schema.warnings.clone() })
    }

    /// What the schema holds that this version does not know.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// All columns, in the order of a batch: the item id first.
    pub fn columns(&self) -> &[Feature] {
        &self.columns
    }

    /// Rows of the item table: the largest item index + 1, so padding (0) and unknown (1) are counted.
    pub fn n_items(&self) -> i64 {
        self.columns[0].cardinality().unwrap_or_default()
    }
}

/// The day partitions of a folder, opened for the days and columns of a run.
pub struct Days {
    dir: PathBuf,
    partitions: BTreeMap<i64, PathBuf>,
    features: Features,
    max_length: usize,
}

impl Days {
    /// Opens what `bireme preprocess` wrote, or a folder of `<day>/{train,valid,test}.parquet` with a
    /// `schema.pbtxt`.
    ///
    /// # Errors
    /// A folder without partitions or without a readable schema, or a configured feature that it lacks.
    pub fn open(dir: &Path, config: &DataConfig) -> Result<Self, DataError> {
        let schema = Schema::read(dir.join(SCHEMA))?;
        let features = Features::select(&schema, &config.features)?;
        let nested = dir.join(SESSIONS_BY_DAY);
        let root = if nested.is_dir() { nested } else { dir.to_owned() };
        let entries =
            std::fs::read_dir(&root).map_err(|source| DataError::Open { path: root.clone(), source })?;
        let partitions: BTreeMap<i64, PathBuf> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
            .collect();
        if partitions.is_empty() {
            return Err(DataError::NoDays(dir.to_owned()));
        }
        Ok(Self { dir: dir.to_owned(), partitions, features, max_length: config.max_length })
    }

    /// The columns a run reads.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// The days there are, ascending.
    pub fn days(&self) -> impl DoubleEndedIterator<Item = i64> {
        self.partitions.keys().copied()
    }

    /// The first of them.
    pub fn first(&self) -> i64 {
        self.days().next().expect("a folder without days is refused")
    }

    /// The last of them.
    pub fn last(&self) -> i64 {
        self.days().next_back().expect("a folder without days is refused")
    }

    /// As a message names them: `1 to 3, 5`.
    pub(super) fn in_words(&self) -> String {
        let days: Vec<i64> = self.days().collect();
        let runs = days.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
            [first, .., last] => format!("{first} to {last}"),
            [day, ..] => day.to_string(),
            [] => unreachable!("a run has a day"),
        });
        runs.collect::<Vec<_>>().join(", ")
    }

    /// Opens one part of a day and checks its footer and columns.
    ///
    /// # Errors
    /// A missing day, a file that is missing or not parquet, a column that is missing or of a wrong type.
    pub fn file(&self, day: i64, split: Split) -> Result<SessionFile, DataError> {
        let partition = self.partitions.get(&day).ok_or_else(|| DataError::MissingDay {
            day,
            dir: self.dir.clone(),
            have: self.in_words(),
        })?;
        SessionFile::open((&partition.join(split.file()), day), &self.features, self.max_length)
    }
}
