//! Writes columns of parquet files.

use std::io::Write;

use parquet::data_type::DataType;
use parquet::errors::ParquetError;
use parquet::file::writer::SerializedRowGroupWriter;

/// Writes the next column of a row group, which the schema declares as `optional`.
///
/// # Errors
/// Returns an error if a write fails.
pub fn write_optional<W: Write + Send, T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: impl Iterator<Item = Option<T::T>>,
) -> Result<(), ParquetError> {
    let values: Vec<Option<T::T>> = values.collect();
    let definition_levels: Vec<i16> = values.iter().map(|value| value.is_some().into()).collect();
    let values: Vec<T::T> = values.into_iter().flatten().collect();
    write::<_, T>(group, &values, Some(&definition_levels))
}

/// Writes the next column of a row group, which the schema declares as `required`.
///
/// # Errors
/// Returns an error if a write fails.
pub fn write_required<W: Write + Send, T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: impl Iterator<Item = T::T>,
) -> Result<(), ParquetError> {
    write::<_, T>(group, &values.collect::<Vec<_>>(), None)
}

fn write<W: Write + Send, T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: &[T::T],
    definition_levels: Option<&[i16]>,
) -> Result<(), ParquetError> {
    let mut column = group.next_column()?.expect("as many columns as the schema names");
    column.typed::<T>().write_batch(values, definition_levels, None)?;
    column.close()
}
