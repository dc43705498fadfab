//! Recommendations as text, JSON, CSV or parquet.

use std::io::{self, Write};
use std::sync::Arc;

use bireme_tools::columns::{write_optional, write_required};
use bireme_tools::table::{self, Align};
use parquet::basic::Compression;
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde::Serialize;

use super::{Recommendation, Session};
use crate::etl::ProductInWords;

/// How recommendations are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RecommendationFormat {
    /// For people: a block per session.
    Table,
    /// A line with an object per session.
    Json,
    /// A row per product seen or recommended.
    Csv,
    /// The rows of csv.
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
    /// None in the list `seen`.
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
        .map(move |Recommendation { product, score }| {
            row("recommended", product, Some(f64::from(*score)))
        })
        .zip(1..);
    seen.chain(recommended).map(|(row, place)| Row { place, ..row })
}

/// Writes sessions one after the other.
pub struct RecommendationWriter<W: Write + Send>(Encoder<W>);

enum Encoder<W: Write + Send> {
    Table(W),
    Json(W),
    Csv(Box<csv::Writer<W>>),
    Parquet(Box<SerializedFileWriter<W>>, Vec<ParquetRow>),
}

/// Least rows of a row group.
const GROUP_ROWS: usize = 1 << 16;

const SCHEMA: &str = "message recommendations {
    required binary session (utf8); required binary list (utf8);
    required int64 place; required int64 product_id;
    optional binary brand (utf8); optional binary category_code (utf8);
    required double price; optional double score;
    required boolean fallback; }";

impl<W: Write + Send> RecommendationWriter<W> {
    /// # Errors
    /// Returns an error if a write fails.
    pub fn new(format: RecommendationFormat, out: W) -> io::Result<Self> {
        Ok(Self(match format {
            RecommendationFormat::Table => Encoder::Table(out),
            RecommendationFormat::Json => Encoder::Json(out),
            RecommendationFormat::Csv => Encoder::Csv(Box::new(csv::Writer::from_writer(out))),
            RecommendationFormat::Parquet => {
                let properties =
                    WriterProperties::builder().set_compression(Compression::SNAPPY).build();
                let schema = Arc::new(parse_message_type(SCHEMA)?);
                let file = SerializedFileWriter::new(out, schema, Arc::new(properties))?;
                Encoder::Parquet(Box::new(file), Vec::new())
            }
        }))
    }

    /// Writes a session.
    ///
    /// # Errors
    /// Returns an error if a write fails.
    pub fn write(&mut self, session: &Session<'_>) -> io::Result<()> {
        match &mut self.0 {
            Encoder::Table(out) => write_table(session, out),
            Encoder::Json(out) => {
                serde_json::to_writer(&mut *out, session)?;
                out.write_all(b"\n")
            }
            Encoder::Csv(out) => {
                rows(session).try_for_each(|row| out.serialize(row)).map_err(io::Error::from)
            }
            Encoder::Parquet(file, kept) => {
                kept.extend(rows(session).map(ParquetRow::from));
                if kept.len() < GROUP_ROWS {
                    return Ok(());
                }
                write_group(file, &std::mem::take(kept))
            }
        }
    }

    /// Writes what is buffered, and returns the inner writer.
    ///
    /// # Errors
    /// Returns an error if a write fails.
    pub fn finish(self) -> io::Result<W> {
        let mut out = match self.0 {
            Encoder::Table(out) | Encoder::Json(out) => out,
            Encoder::Csv(out) => out.into_inner().map_err(|error| error.into_error())?,
            Encoder::Parquet(mut file, kept) => {
                write_group(&mut file, &kept)?;
                file.into_inner()?
            }
        };
        out.flush()?;
        Ok(out)
    }
}

/// Writes a block like this:
///
/// ```text
/// session 81ef7ee3
///   seen
///     1  1004856  samsung  electronics.smartphone  130.76
///   recommended
///     1  1004767  samsung  electronics.smartphone  246.52  12.41
/// ```
fn write_table(session: &Session<'_>, out: &mut dyn Write) -> io::Result<()> {
    let cells = |place: usize, product: &ProductInWords<'_>, score: String| {
        let text = |text: Option<&str>| text.unwrap_or("-").to_owned();
        [
            format!("{place:3}"),
            product.product_id.to_string(),
            text(product.brand),
            text(product.category_code),
            format!("{:.2}", product.price),
            score,
        ]
    };
    let seen =
        (1..).zip(&session.seen).map(|(place, product)| cells(place, product, String::new()));
    let recommended = (1..).zip(&session.recommended);
    let recommended =
        recommended.map(|(place, of)| cells(place, &of.product, format!("{:.2}", of.score)));
    // One table, so that the columns of both lists are equally wide.
    let rows: Vec<_> = seen.chain(recommended).collect();
    let columns = [Align::Right, Align::Left, Align::Left, Align::Left, Align::Right, Align::Left];
    let lines = table::aligned(columns, &rows);
    let (seen, recommended) = lines.split_at(session.seen.len());
    writeln!(out, "session {}", session.session)?;
    let title = if session.fallback { "recommended, by popularity" } else { "recommended" };
    for (title, lines) in [("seen", seen), (title, recommended)] {
        writeln!(out, "  {title}")?;
        lines.iter().try_for_each(|line| writeln!(out, "    {line}"))?;
    }
    Ok(())
}

/// A row buffered for its group.
struct ParquetRow {
    /// Session, list, brand and category code.
    texts: [Option<ByteArray>; 4],
    place: i64,
    product_id: i64,
    price: f64,
    score: Option<f64>,
    fallback: bool,
}

impl From<Row<'_>> for ParquetRow {
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

fn write_group<W: Write + Send>(
    file: &mut SerializedFileWriter<W>,
    rows: &[ParquetRow],
) -> io::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut group = file.next_row_group()?;
    let text = |number: usize| rows.iter().map(move |row| row.texts[number].clone());
    // Session and list are never missing.
    write_required::<_, ByteArrayType>(&mut group, text(0).flatten())?;
    write_required::<_, ByteArrayType>(&mut group, text(1).flatten())?;
    write_required::<_, Int64Type>(&mut group, rows.iter().map(|row| row.place))?;
    write_required::<_, Int64Type>(&mut group, rows.iter().map(|row| row.product_id))?;
    write_optional::<_, ByteArrayType>(&mut group, text(2))?;
    write_optional::<_, ByteArrayType>(&mut group, text(3))?;
    write_required::<_, DoubleType>(&mut group, rows.iter().map(|row| row.price))?;
    write_optional::<_, DoubleType>(&mut group, rows.iter().map(|row| row.score))?;
    write_required::<_, BoolType>(&mut group, rows.iter().map(|row| row.fallback))?;
    group.close()?;
    Ok(())
}
