//! The outcomes of an evaluation on disk: `RUN/evaluations/day-<eval_day>-<split>.parquet`.
//!
//! One row a session, in the order of the evaluated file, with the columns of [`Outcome`], and [`Facts`] as JSON in
//! the footer under the key `bireme`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bireme_base::console;
use bireme_base::output::OutputFile;
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

use super::ReportError;
use crate::collective::Root;
use crate::data::Split;
use crate::metrics::{Evaluation, Outcome};

/// Folder of a run directory.
pub(crate) const EVALUATIONS: &str = "evaluations";

/// Key of [`Facts`] in a file's footer.
const KEY: &str = "bireme";

const COLUMNS: [&str; 4] = ["rank", "n_known", "target", "decile"];

/// What an evaluation file says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Layout of the file.
    pub format: u32,
    /// The model's name.
    pub title: String,
    /// The day trained on last.
    pub train_day: i64,
    /// The day evaluated on.
    pub eval_day: i64,
    /// Which of its parts.
    pub split: Split,
    /// Cross entropy of the held-out item, for models whose scores are logits.
    pub loss: Option<f64>,
    /// Share of the items that may be recommended that are in the top 20 of at least one session.
    pub coverage_at_20: Option<f64>,
}

impl Facts {
    /// Of an evaluation after `train_day`, on part `split` of `eval_day`.
    pub fn new(
        title: &str,
        (train_day, eval_day, split): (i64, i64, Split),
        evaluation: &Evaluation,
    ) -> Self {
        let some = |value: f64| value.is_finite().then_some(value);
        let (loss, coverage_at_20) = (some(evaluation.metrics.loss), some(evaluation.coverage_at_20));
        Self { format: 1, title: title.to_owned(), train_day, eval_day, split, loss, coverage_at_20 }
    }
}

/// A file that holds no evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationFileError {
    /// The file cannot be opened.
    #[error("cannot open `{path}`")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not parquet, or is cut off.
    #[error("`{path}` is not a readable parquet file")]
    Parquet {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ParquetError,
    },
    /// It is not what [`write()`] writes.
    #[error("`{path}` is not an evaluation of this version: {problem}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// Where the outcomes of an evaluation lie.
pub fn path(run_dir: &Path, eval_day: i64, split: Split) -> PathBuf {
    run_dir.join(EVALUATIONS).join(format!("day-{eval_day}-{}.parquet", split.name()))
}

/// Writes the outcomes of an evaluation; an earlier one of the same day and split is replaced.
///
/// # Errors
/// The disk is full, say.
pub fn write(_: Root, run_dir: &Path, facts: &Facts, outcomes: &[Outcome]) -> Result<(), ReportError> {
    let path = path(run_dir, facts.eval_day, facts.split);
    let written = fs::create_dir_all(run_dir.join(EVALUATIONS)).and_then(|()| {
        let file = OutputFile::create(&path, &mut console::log)?;
        Ok(write_outcomes(file, facts, outcomes)?.publish()?)
    });
    written.map_err(|source| ReportError { path, source })
}

fn write_outcomes(file: OutputFile, facts: &Facts, outcomes: &[Outcome]) -> io::Result<OutputFile> {
    let fields: String = COLUMNS.iter().map(|name| format!("required int64 {name}; ")).collect();
    let schema = Arc::new(parse_message_type(&format!("message outcomes {{ {fields}}}"))?);
    let facts = serde_json::to_string(facts).expect("facts are JSON");
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_key_value_metadata(Some(vec![KeyValue::new(KEY.to_owned(), facts)]))
        .build();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    let columns: [fn(&Outcome) -> i64; 4] = [
        |outcome| outcome.rank,
        |outcome| outcome.n_known,
        |outcome| outcome.target,
        |outcome| outcome.decile,
    ];
    for of_outcome in columns {
        let values: Vec<i64> = outcomes.iter().map(of_outcome).collect();
        let mut column = group.next_column()?.expect("as many columns as the schema names");
        column.typed::<Int64Type>().write_batch(&values, None, None)?;
        column.close()?;
    }
    group.close()?;
    Ok(writer.into_inner()?)
}

/// Reads what [`write()`] wrote.
///
/// # Errors
/// See [`EvaluationFileError`].
pub fn read(path: &Path) -> Result<(Facts, Vec<Outcome>), EvaluationFileError> {
    let file =
        File::open(path).map_err(|source| EvaluationFileError::Open { path: path.to_owned(), source })?;
    let content = |problem: String| EvaluationFileError::Content { path: path.to_owned(), problem };
    let in_file = |source| EvaluationFileError::Parquet { path: path.to_owned(), source };
    let reader = SerializedFileReader::new(file).map_err(in_file)?;
    let metadata = reader.metadata().file_metadata();
    let facts = metadata
        .key_value_metadata()
        .and_then(|pairs| pairs.iter().find(|pair| pair.key == KEY)?.value.as_ref())
        .ok_or_else(|| content(format!("its footer has no key `{KEY}`")))?;
    let facts: Facts = serde_json::from_str(facts).map_err(|error| content(error.to_string()))?;
    let columns = metadata.schema_descr().columns();
    if !columns.iter().map(|column| column.name()).eq(COLUMNS) {
        return Err(content(format!("its columns are not {}", COLUMNS.join(", "))));
    }
    let [rank, n_known, target, decile] = [0, 1, 2, 3].map(|column| read_column(&reader, column));
    let (rank, n_known) = (rank.map_err(in_file)?, n_known.map_err(in_file)?);
    let (target, decile) = (target.map_err(in_file)?, decile.map_err(in_file)?);
    let outcomes = rank.into_iter().zip(n_known).zip(target).zip(decile);
    let outcomes =
        outcomes.map(|(((rank, n_known), target), decile)| Outcome { rank, n_known, target, decile });
    Ok((facts, outcomes.collect()))
}

fn read_column(reader: &SerializedFileReader<File>, column: usize) -> Result<Vec<i64>, ParquetError> {
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
