//! Recommendations as text, JSON, CSV or parquet.

use std::io::{self, Write};
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DataType, DoubleType, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde::Serialize;

use super::{Recommendation, Session};
use crate::etl::ProductInWords;

/// Forms in which recommendations are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people: a block for each session.
    Table,
    /// A line with an object for each session.
    Json,
    /// A row for each product seen or recommended.
    Csv,
    /// The rows of [`Format::Csv`].
    Parquet,
}

/// A row of the flat formats.
#[derive(Serialize)]
struct Row<'a> {
    session: &'a str,
    /// `seen` or `recommended`.
    list: &'static str,
    /// From 1.
    place: i64,
    product_id: i64,
    brand: Option<&'a str>,
    category_code: Option<&'a str>,
    price: f64,
    /// None of what was seen.
    score: Option<f64>,
    /// Whether the session's recommendations are the most popular items.
    fallback: bool,
}

fn rows<'a>(session: &'a Session<'_>) -> impl Iterator<Item = Row<'a>> {
    let row = |list, product: &'a ProductInWords<'a>, score| Row {
        session: session.session,
        list,
        place: 0,
        product_id: product.product_id,
        brand: product.brand,
        category_code: product.category_code,
        price: product.price,
        score,
        fallback: session.fallback,
    };
    let seen = session.seen.iter().map(move |product| row("seen", product, None)).zip(1..);
    let recommended = session.recommended.iter();
    let recommended = recommended
        .map(move |Recommendation { product, score }| row("recommended", product, Some(f64::from(*score))))
        .zip(1..);
    seen.chain(recommended).map(|(row, place)| Row { place, ..row })
}

/// Writes sessions one after the other.
pub struct Writer<W: Write + Send>(Kind<W>);

enum Kind<W: Write + Send> {
    Table(W),
    Json(W),
    Csv(Box<csv::Writer<W>>),
    Parquet(Box<SerializedFileWriter<W>>, Vec<Kept>),
}

/// Rows of a group of a parquet file.
const GROUP: usize = 1 << 16;

const SCHEMA: &str = "message recommendations {
    required binary session (utf8); required binary list (utf8); required int64 place; required int64 product_id;
    optional binary brand (utf8); optional binary category_code (utf8); required double price; optional double score;
    required boolean fallback; }";

impl<W: Write + Send> Writer<W> {
    /// Begins.
    ///
    /// # Errors
    /// What the writer says.
    pub fn new(format: Format, out: W) -> io::Result<Self> {
        Ok(Self(match format {
            Format::Table => Kind::Table(out),
            Format::Json => Kind::Json(out),
            Format::Csv => Kind::Csv(Box::new(csv::Writer::from_writer(out))),
            Format::Parquet => {
                let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
                let schema = Arc::new(parse_message_type(SCHEMA)?);
                let file = SerializedFileWriter::new(out, schema, Arc::new(properties))?;
                Kind::Parquet(Box::new(file), Vec::new())
            }
        }))
    }

    /// Writes a session.
    ///
    /// # Errors
    /// What the writer says.
    pub fn write(&mut self, session: &Session<'_>) -> io::Result<()> {
        match &mut self.0 {
            Kind::Table(out) => write_table(session, out),
            Kind::Json(out) => {
                serde_json::to_writer(&mut *out, session)?;
                out.write_all(b"\n")
            }
            Kind::Csv(out) => rows(session).try_for_each(|row| out.serialize(row)).map_err(io::Error::from),
            Kind::Parquet(file, kept) => {
                kept.extend(rows(session).map(Kept::from));
                if kept.len() < GROUP {
                    return Ok(());
                }
                write_group(file, &std::mem::take(kept))
            }
        }
    }

    /// Ends, and gives back what was written to.
    ///
    /// # Errors
    /// What the writer says.
    pub fn finish(self) -> io::Result<W> {
        let mut out = match self.0 {
            Kind::Table(out) | Kind::Json(out) => out,
            Kind::Csv(out) => out.into_inner().map_err(|error| error.into_error())?,
            Kind::Parquet(mut file, kept) => {
                write_group(&mut file, &kept)?;
                file.into_inner()?
            }
        };
        out.flush()?;
        Ok(out)
    }
}

/// A block like this, as wide as its longest texts:
///
/// ```text
/// session 81ef7ee3
///   seen
///     1  1004856  samsung  electronics.smartphone   130.76
///   recommended
///     1  1004767  samsung  electronics.smartphone   246.52  12.41
/// ```
fn write_table(session: &Session<'_>, out: &mut dyn Write) -> io::Result<()> {
    let cells = |product: &ProductInWords<'_>| {
        let text = |text: Option<&str>| text.unwrap_or("-").to_owned();
        let price = format!("{:.2}", product.price);
        [product.product_id.to_string(), text(product.brand), text(product.category_code), price]
    };
    let seen: Vec<_> = session.seen.iter().map(|product| (cells(product), String::new())).collect();
    let recommended = session.recommended.iter();
    let recommended: Vec<_> =
        recommended.map(|of| (cells(&of.product), format!("{:.2}", of.score))).collect();
    let mut widths = [0; 4];
    for (cells, _) in seen.iter().chain(&recommended) {
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = cell.chars().count().max(*width);
        }
    }
    let [id_width, brand_width, category_width, price_width] = widths;
    writeln!(out, "session {}", session.session)?;
    let title = if session.fallback { "recommended, by popularity" } else { "recommended" };
    for (title, products) in [("seen", seen), (title, recommended)] {
        writeln!(out, "  {title}")?;
        for (place, ([id, brand, category, price], score)) in (1..).zip(products) {
            let line = format!(
                "    {place:>3}  {id:id_width$}  {brand:brand_width$}  {category:category_width$}  \
                 {price:>price_width$}  {score}"
            );
            writeln!(out, "{}", line.trim_end())?;
        }
    }
    Ok(())
}

/// A row that is kept until its group is written.
struct Kept {
    /// Session, list, brand and category code.
    texts: [Option<ByteArray>; 4],
    place: i64,
    product_id: i64,
    price: f64,
    score: Option<f64>,
    fallback: bool,
}

impl From<Row<'_>> for Kept {
    fn from(row: Row<'_>) -> Self {
        let texts = [Some(row.session), Some(row.list), row.brand, row.category_code];
        Self {
            texts: texts.map(|text| text.map(ByteArray::from)),
            place: row.place,
            product_id: row.product_id,
            price: row.price,
            score: row.score,
            fallback: row.fallback,
        }
    }
}

fn write_group<W: Write + Send>(file: &mut SerializedFileWriter<W>, rows: &[Kept]) -> io::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut group = file.next_row_group()?;
    let text = |number: usize| rows.iter().map(move |row| row.texts[number].clone());
    write_column::<_, ByteArrayType>(&mut group, false, text(0))?;
    write_column::<_, ByteArrayType>(&mut group, false, text(1))?;
    write_column::<_, Int64Type>(&mut group, false, rows.iter().map(|row| Some(row.place)))?;
    write_column::<_, Int64Type>(&mut group, false, rows.iter().map(|row| Some(row.product_id)))?;
    write_column::<_, ByteArrayType>(&mut group, true, text(2))?;
    write_column::<_, ByteArrayType>(&mut group, true, text(3))?;
    write_column::<_, DoubleType>(&mut group, false, rows.iter().map(|row| Some(row.price)))?;
    write_column::<_, DoubleType>(&mut group, true, rows.iter().map(|row| row.score))?;
    write_column::<_, BoolType>(&mut group, false, rows.iter().map(|row| Some(row.fallback)))?;
    group.close()?;
    Ok(())
}

fn write_column<W: Write + Send, T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    is_optional: bool,
    values: impl Iterator<Item = Option<T::T>> + Clone,
) -> Result<(), ParquetError> {
    let levels: Vec<i16> = values.clone().map(|value| value.is_some().into()).collect();
    let values: Vec<T::T> = values.flatten().collect();
    let mut column = group.next_column()?.expect("as many columns as the schema names");
    column.typed::<T>().write_batch(&values, is_optional.then_some(&levels), None)?;
    column.close()
}
