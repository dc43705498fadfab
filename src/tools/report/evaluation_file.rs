//! A saved evaluation: `RUN/evaluations/day-<eval_day>-<split>.parquet`.
//!
//! One row per session, in the order of the evaluated file, with the columns of
//! [`SessionOutcome`]; [`EvaluationFacts`] as JSON in the footer under the key `bireme`.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::column::reader::ColumnReader;
use parquet::data_type::Int64Type;
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde::{Deserialize, Serialize};

use crate::columns;
use crate::run_dir::EVALUATIONS;

/// Names of the parts of a day, in the order in which a report lists them.
pub const SPLITS: [&str; 3] = ["train", "valid", "test"];

/// Key of [`EvaluationFacts`] in the footer.
const KEY: &str = "bireme";

const COLUMNS: [&str; 4] = ["rank", "n_known", "target", "decile"];

/// What was evaluated, and the figures that are not a function of the outcomes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationFacts {
    /// Version of the layout.
    pub format: u32,
    /// The model's name.
    pub title: String,
    /// Last day trained on.
    pub train_day: i64,
    /// Day evaluated on.
    pub eval_day: i64,
    /// One of [`SPLITS`].
    pub split: String,
    /// Cross entropy of the held-out item, for models whose scores are logits.
    pub loss: Option<f64>,
    /// Share of the catalogue that is in the top 20 of at least one session.
    pub coverage_at_20: Option<f64>,
}

/// The held-out item of a session and its rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOutcome {
    /// Exact rank of the item, from 1; beyond all others for an item that may not be recommended.
    pub rank: i64,
    /// Events that the model knew.
    pub n_known: i64,
    /// Index of the item.
    pub target: i64,
    /// Popularity decile of the item in training, 1 being the most popular; 0 for an item that did
    /// not occur.
    pub decile: i64,
}

/// A file that is not a saved evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationFileError {
    #[error("cannot open `{path}`")]
    Open { path: PathBuf, source: io::Error },
    /// Not parquet, or truncated.
    #[error("`{path}` is not a readable parquet file")]
    Parquet { path: PathBuf, source: ParquetError },
    /// Parquet of another layout.
    #[error("`{path}` is not an evaluation of this version: {problem}")]
    Content { path: PathBuf, problem: String },
}

/// The file of the evaluation of part `split` of a day.
pub fn path(run_dir: &Path, eval_day: i64, split: &str) -> PathBuf {
    run_dir.join(EVALUATIONS).join(format!("day-{eval_day}-{split}.parquet"))
}

/// Writes an evaluation.
///
/// # Errors
/// Returns an error if a write fails.
pub fn write<W: Write + Send>(
    out: W,
    facts: &EvaluationFacts,
    outcomes: &[SessionOutcome],
) -> io::Result<W> {
    let fields: String = COLUMNS.iter().map(|name| format!("required int64 {name}; ")).collect();
    let schema = Arc::new(parse_message_type(&format!("message outcomes {{ {fields}}}"))?);
    let facts = serde_json::to_string(facts).expect("facts are JSON");
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_key_value_metadata(Some(vec![KeyValue::new(KEY.to_owned(), facts)]))
        .build();
    let mut writer = SerializedFileWriter::new(out, schema, Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    let columns: [fn(&SessionOutcome) -> i64; 4] = [
        |outcome| outcome.rank,
        |outcome| outcome.n_known,
        |outcome| outcome.target,
        |outcome| outcome.decile,
    ];
    for column in columns {
        columns::write_required::<_, Int64Type>(&mut group, outcomes.iter().map(column))?;
    }
    group.close()?;
    Ok(writer.into_inner()?)
}

/// Reads what [`write()`] wrote.
///
/// # Errors
/// See [`EvaluationFileError`].
pub fn read(path: &Path) -> Result<(EvaluationFacts, Vec<SessionOutcome>), EvaluationFileError> {
    let file = File::open(path)
        .map_err(|source| EvaluationFileError::Open { path: path.to_owned(), source })?;
    let content = |problem: String| EvaluationFileError::Content { path: path.to_owned(), problem };
    let in_file = |source| EvaluationFileError::Parquet { path: path.to_owned(), source };
    let reader = SerializedFileReader::new(file).map_err(in_file)?;
    let metadata = reader.metadata().file_metadata();
    let facts = metadata
        .key_value_metadata()
        .and_then(|pairs| pairs.iter().find(|pair| pair.key == KEY)?.value.as_ref())
        .ok_or_else(|| content(format!("its footer has no key `{KEY}`")))?;
    let facts: EvaluationFacts =
        serde_json::from_str(facts).map_err(|error| content(error.to_string()))?;
    if !SPLITS.contains(&facts.split.as_str()) {
        return Err(content(format!("unknown split `{}`", facts.split)));
    }
    let columns = metadata.schema_descr().columns();
    if !columns.iter().map(|column| column.name()).eq(COLUMNS) {
        return Err(content(format!("its columns are not {}", COLUMNS.join(", "))));
    }
    let mut columns = Vec::new();
    for column in 0..COLUMNS.len() {
        columns.push(read_column(&reader, column).map_err(in_file)?);
    }
    let outcome = |row: usize| SessionOutcome {
        rank: columns[0][row],
        n_known: columns[1][row],
        target: columns[2][row],
        decile: columns[3][row],
    };
    Ok((facts, (0..columns[0].len()).map(outcome).collect()))
}

fn read_column(
    reader: &SerializedFileReader<File>,
    column: usize,
) -> Result<Vec<i64>, ParquetError> {
    let mut values = Vec::new();
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group)?;
        let ColumnReader::Int64ColumnReader(mut column) = group.get_column_reader(column)? else {
            return Err(ParquetError::General("a column is not of 64-bit integers".to_owned()));
        };
        column.read_records(group.metadata().num_rows() as usize, None, None, &mut values)?;
    }
    Ok(values)
}
