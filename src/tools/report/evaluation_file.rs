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

use bireme_base::user_error::{REFUSED, UserError};

use crate::columns;
use crate::run_dir::EVALUATIONS;

/// Names of the parts of a day, in the order in which a report lists them.
pub const SPLITS: [&str; 3] = ["train", "valid", "test"];

/// Key of [`EvaluationFacts`] in the footer.
const KEY: &str = "bireme";

/// Version of the layout. Version 1 had neither `n_repeats` nor `support`.
pub const FORMAT: u32 = 2;

const COLUMNS: [&str; 6] = ["rank", "n_known", "target", "decile", "n_repeats", "support"];

/// What was evaluated, and the figures that are not a function of the outcomes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationFacts {
    /// Version of the layout, [`FORMAT`].
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
    /// How often the item occurs among the known events.
    pub n_repeats: i64,
    /// How often the item occurred in training; 0 for an item that may not be recommended.
    pub support: i64,
}

/// A file that is not a saved evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationFileError {
    #[error("cannot open `{path}`")]
    Open { path: PathBuf, source: io::Error },
    /// Not parquet, or truncated.
    #[error("`{path}` is not a readable parquet file")]
    Parquet { path: PathBuf, source: ParquetError },
    /// Written by another version.
    #[error("`{path}` has format {format}, and this version reads format {FORMAT}")]
    Format { path: PathBuf, format: u32 },
    /// Parquet of another layout.
    #[error("`{path}` is not an evaluation of this version: {problem}")]
    Content { path: PathBuf, problem: String },
}

impl UserError for EvaluationFileError {
    fn exit_code(&self) -> i32 {
        REFUSED
    }

    fn hint(&self) -> Option<String> {
        let Self::Format { .. } = self else { return None };
        let hint = "`bireme evaluate --save --overwrite` evaluates the newest checkpoint again; \
                    evaluations of earlier days need `bireme train --overwrite`";
        Some(hint.to_owned())
    }
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
    let columns: [fn(&SessionOutcome) -> i64; COLUMNS.len()] = [
        |outcome| outcome.rank,
        |outcome| outcome.n_known,
        |outcome| outcome.target,
        |outcome| outcome.decile,
        |outcome| outcome.n_repeats,
        |outcome| outcome.support,
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
    if facts.format != FORMAT {
        return Err(EvaluationFileError::Format { path: path.to_owned(), format: facts.format });
    }
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
        n_repeats: columns[4][row],
        support: columns[5][row],
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

#[cfg(test)]
mod tests {
    use super::*;

    const OUTCOME: SessionOutcome =
        SessionOutcome { rank: 1, n_known: 2, target: 3, decile: 4, n_repeats: 5, support: 6 };

    fn write_and_read(
        format: u32,
    ) -> Result<(EvaluationFacts, Vec<SessionOutcome>), EvaluationFileError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("day-3-valid.parquet");
        let facts = EvaluationFacts {
            format,
            title: "GRU".to_owned(),
            train_day: 2,
            eval_day: 3,
            split: "valid".to_owned(),
            loss: Some(1.5),
            coverage_at_20: None,
        };
        write(File::create(&path).unwrap(), &facts, &[OUTCOME, OUTCOME]).unwrap();
        read(&path)
    }

    #[test]
    fn outcomes_are_read_as_written() {
        let (facts, outcomes) = write_and_read(FORMAT).unwrap();
        assert_eq!((facts.format, facts.loss, facts.coverage_at_20), (FORMAT, Some(1.5), None));
        assert_eq!(outcomes, [OUTCOME, OUTCOME]);
    }

    #[test]
    fn another_format_is_refused_with_the_command_that_helps() {
        for format in [FORMAT - 1, FORMAT + 1] {
            let error = write_and_read(format).unwrap_err();
            let message = error.to_string();
            let expected = format!(
                "day-3-valid.parquet` has format {format}, and this version reads format 2"
            );
            assert!(message.ends_with(&expected), "{message}");
            assert_eq!(error.exit_code(), REFUSED);
            assert!(error.hint().unwrap().contains("`bireme evaluate --save --overwrite`"));
        }
    }
}
