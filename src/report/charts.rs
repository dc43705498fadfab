//! Figures as pictures: each is described once, as a [`Plot`], and drawn twice, as SVG and as PNG.
//!
//! Both are drawn at [`SCALE`] times the size they are seen at, as the drawing library knows whole pixels only: the
//! SVG is scaled down by its view box, the PNG by averaging, which smooths its edges. Letters come from the font
//! beside this file, so that a machine needs none. Colours are those of Okabe & Ito (2008), told apart by the colour
//! blind too; models also differ in their markers, and lines of baselines are dashed.

use std::ops::Range;

use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::register_font;

use super::bootstrap::Estimate;
use super::compare::{Comparison, Group};
use crate::data::Split;
use crate::metrics::Measure;

/// Drawn pixels for one of the size that a picture is seen at.
const SCALE: i32 = 4;

/// Pixels of a PNG for one of the size that a picture is seen at.
const PNG_SCALE: i32 = 2;

/// Width that a picture is seen at, at least, in pixels.
const WIDTH: i32 = 760;

/// Height of its axes with their labels.
const AXES_HEIGHT: i32 = 368;

/// Width of a model's bars with their name, in pixels.
const BARS_WIDTH: i32 = 190;

/// Letters of a model's name that fit below its bars.
const BARS_LETTERS: usize = 22;

/// Letters of a name in a legend at most.
const LEGEND_LETTERS: usize = 60;

const FONT: &str = "sans-serif";

/// Height of a line of labels, in pixels as seen.
const LABEL_SIZE: i32 = 15;

/// Text, axes and whiskers of bars.
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

/// Colours of runs, in their order.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x00, 0x00, 0x00),
    RGBColor(0x99, 0x99, 0x99),
];

/// A picture.
pub(crate) struct Chart {
    /// Name of its files.
    pub(super) name: &'static str,
    /// What it shows.
    pub(super) title: String,
    pub(crate) svg: String,
    pub(crate) png: Vec<u8>,
}

/// A line of [`rates`].
pub(crate) struct Line {
    pub(crate) label: String,
    pub(crate) is_dashed: bool,
    /// One for each number of ranks, where there is one.
    pub(crate) values: Vec<Option<f64>>,
}

/// A picture that cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw the chart `{name}`: {problem}")]
pub struct ChartError {
    name: &'static str,
    problem: String,
}

/// All pictures of a report.
///
/// # Errors
/// Those of the drawing library, which has no reason for any.
pub(super) fn charts(comparison: &Comparison) -> Result<Vec<Chart>, ChartError> {
    let plots = [
        bars(comparison, "ndcg", "NDCG", [Measure::NdcgAt10, Measure::NdcgAt20]),
        bars(comparison, "recall", "Recall", [Measure::RecallAt10, Measure::RecallAt20]),
        by_day(comparison, "ndcg_by_day", Measure::NdcgAt20),
        by_day(comparison, "recall_by_day", Measure::RecallAt20),
        by_group(
            comparison,
            "recall_by_known_events",
            "number of events known",
            "events known of the session",
            &comparison.by_known_events,
        ),
        by_group(
            comparison,
            "recall_by_popularity",
            "popularity of the held-out item",
            "popularity decile of the held-out item (1: most popular in training)",
            &comparison.by_popularity_decile,
        ),
    ];
    plots.into_iter().chain(learning_curves(comparison)).map(render).collect()
}

/// Sessions a second by the number of ranks.
///
/// # Errors
/// As of [`charts`].
pub(crate) fn rates(
    name: &'static str,
    title: &str,
    ranks: &[usize],
    lines: &[Line],
) -> Result<Chart, ChartError> {
    let series = lines.iter().enumerate().map(|(i, line)| Series {
        label: line.label.clone(),
        colour: colour(i),
        mark: Mark::Line { dashed: line.is_dashed, marker: Some(i) },
        points: (line.values.iter().enumerate())
            .filter_map(|(x, y)| Some(Point { x: x as f64 + 0.5, y: (*y)?, whisker: None }))
            .collect(),
    });
    let series: Vec<Series> = series.collect();
    render(Plot {
        name,
        title: title.to_owned(),
        x_title: "ranks".to_owned(),
        y_title: "sessions a second".to_owned(),
        x: Axis::Categories(ranks.iter().map(ToString::to_string).collect()),
        y: (0.0, highest(&series)),
        series,
        width: WIDTH,
    })
}

/// A picture, described.
struct Plot {
    name: &'static str,
    title: String,
    x_title: String,
    y_title: String,
    x: Axis,
    /// Lowest and highest value.
    y: (f64, f64),
    series: Vec<Series>,
    /// In pixels, as seen.
    width: i32,
}

enum Axis {
    /// Category i is centred at i + 0.5.
    Categories(Vec<String>),
    /// From 0 to here.
    Numbers(f64),
}

struct Series {
    label: String,
    colour: RGBColor,
    mark: Mark,
    points: Vec<Point>,
}

#[derive(Clone, Copy)]
enum Mark {
    /// So wide, in units of the x axis.
    Bar(f64),
    /// The marker of this run, if any.
    Line { dashed: bool, marker: Option<usize> },
}

struct Point {
    x: f64,
    y: f64,
    whisker: Option<(f64, f64)>,
}

impl Point {
    /// None for a figure that is no number.
    fn of(x: f64, estimate: Estimate) -> Option<Self> {
        let Estimate { value, low, high } = estimate;
        value.is_finite().then_some(Self { x, y: value, whisker: Some((low, high)) })
    }
}

/// Two measures of every run on the last evaluation.
fn bars(comparison: &Comparison, name: &'static str, of: &str, measures: [Measure; 2]) -> Plot {
    const BAR: f64 = 0.34;
    let last = comparison.last();
    let colours = [COLOURS[5], COLOURS[0]];
    let series = measures.into_iter().zip([-BAR / 2.0, BAR / 2.0]).zip(colours);
    let series: Vec<Series> = series
        .map(|((measure, offset), colour)| Series {
            label: measure.title().to_owned(),
            colour,
            mark: Mark::Bar(BAR),
            points: last
                .runs
                .iter()
                .enumerate()
                .filter_map(|(i, run)| Point::of(i as f64 + 0.5 + offset, run.figures.get(measure)))
                .collect(),
        })
        .collect();
    Plot {
        name,
        title: format!("{of} on day {} ({})", last.eval_day, last.split.name()),
        x_title: "model".to_owned(),
        y_title: format!("{of} (mean and 95 % interval)"),
        x: Axis::Categories(
            last.runs.iter().map(|run| shortened(short_name(&run.label), BARS_LETTERS)).collect(),
        ),
        y: (0.0, highest(&series)),
        series,
        width: (BARS_WIDTH * last.runs.len() as i32 + 100).max(WIDTH),
    }
}

/// One measure of every run on the valid parts of all days.
fn by_day(comparison: &Comparison, name: &'static str, measure: Measure) -> Plot {
    let days: Vec<_> = comparison.evaluations.iter().filter(|part| part.split == Split::Valid).collect();
    let series = lines(comparison, |run| days.iter().map(|day| day.runs[run].figures.get(measure)).collect());
    let title = measure.title();
    Plot {
        name,
        title: format!("{title} by day"),
        x_title: "day evaluated on (trained up to the day before)".to_owned(),
        y_title: format!("{title} (mean and 95 % interval)"),
        x: Axis::Categories(days.iter().map(|day| day.eval_day.to_string()).collect()),
        y: (0.0, highest(&series)),
        series,
        width: WIDTH,
    }
}

/// Recall@20 of every run on groups of sessions.
fn by_group(comparison: &Comparison, name: &'static str, by: &str, x_title: &str, groups: &[Group]) -> Plot {
    let measure = Measure::RecallAt20;
    let series = lines(comparison, |run| groups.iter().map(|group| group.runs[run].get(measure)).collect());
    let last = comparison.last();
    Plot {
        name,
        title: format!("{} by {by}, day {} ({})", measure.title(), last.eval_day, last.split.name()),
        x_title: x_title.to_owned(),
        y_title: format!("{} (mean and 95 % interval)", measure.title()),
        x: Axis::Categories(groups.iter().map(|group| group.label.clone()).collect()),
        y: (0.0, highest(&series)),
        series,
        width: WIDTH,
    }
}

/// Training losses; nothing where no run has any.
fn learning_curves(comparison: &Comparison) -> Option<Plot> {
    let mut series = Vec::new();
    for (i, run) in comparison.runs.iter().enumerate() {
        let curve = run.learning_curve.iter().filter(|point| point.loss.is_finite());
        let points: Vec<_> =
            curve.map(|point| Point { x: point.step, y: point.loss, whisker: None }).collect();
        if !points.is_empty() {
            let mark = Mark::Line { dashed: false, marker: None };
            series.push(Series { label: run.label.clone(), colour: colour(i), mark, points });
        }
    }
    let points = || series.iter().flat_map(|series| &series.points);
    let last_step = points().map(|point| point.x).fold(0.0, f64::max);
    let lowest = points().map(|point| point.y).fold(f64::INFINITY, f64::min);
    let highest = points().map(|point| point.y).fold(f64::NEG_INFINITY, f64::max);
    let room = ((highest - lowest) * 0.05).max(1e-6);
    (!series.is_empty()).then(|| Plot {
        name: "learning_curves",
        title: "Training loss".to_owned(),
        x_title: "step, over all days".to_owned(),
        y_title: "loss (nats per target)".to_owned(),
        x: Axis::Numbers(last_step),
        y: (lowest - room, highest + room),
        series,
        width: WIDTH,
    })
}

fn colour(run: usize) -> RGBColor {
    COLOURS[run % COLOURS.len()]
}

/// A line for each run through its figures of every category, the runs a little beside each other.
fn lines(comparison: &Comparison, figures: impl Fn(usize) -> Vec<Estimate>) -> Vec<Series> {
    let n_runs = comparison.runs.len() as f64;
    let apart = (0.5 / n_runs).min(0.08);
    let of_run = comparison.runs.iter().enumerate().map(|(i, run)| {
        let offset = (i as f64 - (n_runs - 1.0) / 2.0) * apart;
        let points = figures(i).into_iter().enumerate();
        Series {
            label: run.label.clone(),
            colour: colour(i),
            mark: Mark::Line { dashed: run.is_baseline, marker: Some(i) },
            points: points.filter_map(|(x, figure)| Point::of(x as f64 + 0.5 + offset, figure)).collect(),
        }
    });
    of_run.collect()
}

/// A little above all whiskers.
fn highest(series: &[Series]) -> f64 {
    let points = series.iter().flat_map(|series| &series.points);
    let highest = points.map(|point| point.whisker.map_or(point.y, |(_, high)| high)).fold(0.0, f64::max);
    if highest > 0.0 { highest * 1.08 } else { 1.0 }
}

/// The directory in brackets where several runs share a model's name, which alone would not tell them apart.
fn short_name(label: &str) -> &str {
    label.rsplit_once(" (").map_or(label, |(_, directory)| directory.trim_end_matches(')'))
}

/// Without its middle where it is too long, as names of runs mostly differ at their ends.
fn shortened(text: &str, n_letters: usize) -> String {
    let letters: Vec<char> = text.chars().collect();
    if letters.len() <= n_letters {
        return text.to_owned();
    }
    let (start, end) = (n_letters / 2, (n_letters - 1) / 2);
    letters[..start].iter().chain(&['…']).chain(&letters[letters.len() - end..]).collect()
}

/// Round values between two others, about six of them, and the digits after the point that tell them apart.
fn ticks(low: f64, high: f64) -> (Vec<f64>, usize) {
    let rough = (high - low) / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    let ticks = ((low / step).ceil() as i64..=(high / step).floor() as i64).map(|tick| tick as f64 * step);
    (ticks.collect(), (-(step.log10() + 1e-9).floor()).max(0.0) as usize)
}

fn render(plot: Plot) -> Result<Chart, ChartError> {
    let failed = |problem: String| ChartError { name: plot.name, problem };
    let font = include_bytes!("font/DejaVuSans.ttf");
    register_font(FONT, FontStyle::Normal, font)
        .map_err(|_| failed("the font is not readable".to_owned()))?;
    let legend = Legend::of(&plot).map_err(failed)?;
    let seen_height = legend.height + AXES_HEIGHT;
    let (width, height) = ((plot.width * SCALE) as u32, (seen_height * SCALE) as u32);

    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
    draw(&area, &plot, &legend).map_err(|error| failed(error.to_string()))?;
    drop(area);
    // Seen at its size, drawn at a multiple of it.
    let drawn = format!("width=\"{width}\" height=\"{height}\"");
    let seen = format!("width=\"{}\" height=\"{}\"", plot.width, seen_height);
    let svg = svg.replacen(&drawn, &seen, 1);

    let mut pixels = vec![0; (width * height * 3) as usize];
    let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
    draw(&area, &plot, &legend).map_err(|error| failed(error.to_string()))?;
    drop(area);
    let png = png(&pixels, width as usize, (SCALE / PNG_SCALE) as usize);
    Ok(Chart { name: plot.name, title: plot.title, svg, png })
}

type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;
type Area<DB> = DrawingArea<DB, Shift>;
type Axes<'a, DB> = ChartContext<'a, DB, Cartesian2d<Scale, Scale>>;

/// Numbers along an axis, with ticks of our own choice.
struct Scale {
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

fn text(size: i32) -> TextStyle<'static> {
    TextStyle::from((FONT, size * SCALE).into_font()).color(&INK)
}

fn draw<DB: DrawingBackend>(area: &Area<DB>, plot: &Plot, legend: &Legend) -> Drawn<DB> {
    area.fill(&WHITE)?;
    area.draw_text(&plot.title, &text(20), (16 * SCALE, 12 * SCALE))?;
    for (series, (label, place)) in plot.series.iter().zip(&legend.entries) {
        draw_legend_entry(area, series, label, *place)?;
    }
    let (_, below) = area.split_vertically(legend.height * SCALE);

    let (x_end, x_ticks, x_digits) = match &plot.x {
        Axis::Categories(names) => {
            let centres = (0..names.len()).map(|i| i as f64 + 0.5).collect();
            (names.len() as f64, centres, 0)
        }
        Axis::Numbers(end) => {
            let (ticks, digits) = ticks(0.0, *end);
            (*end, ticks, digits)
        }
    };
    let x_label = |x: &f64| match &plot.x {
        Axis::Categories(names) => names.get(*x as usize).cloned().unwrap_or_default(),
        Axis::Numbers(_) => format!("{x:.x_digits$}"),
    };
    let (y_ticks, y_digits) = ticks(plot.y.0, plot.y.1);
    let mut axes = ChartBuilder::on(&below)
        .margin_left(14 * SCALE)
        .margin_right(20 * SCALE)
        .margin_bottom(8 * SCALE)
        .x_label_area_size(52 * SCALE)
        .y_label_area_size(66 * SCALE)
        .build_cartesian_2d(
            Scale { range: 0.0..x_end, ticks: x_ticks },
            Scale { range: plot.y.0..plot.y.1, ticks: y_ticks },
        )?;
    axes.configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(SCALE as u32))
        .axis_style(INK.stroke_width(SCALE as u32))
        .set_all_tick_mark_size(5 * SCALE)
        .label_style(text(LABEL_SIZE))
        .axis_desc_style(text(16))
        .x_desc(plot.x_title.as_str())
        .y_desc(plot.y_title.as_str())
        .x_label_formatter(&x_label)
        .y_label_formatter(&|y| format!("{y:.y_digits$}"))
        .draw()?;
    plot.series.iter().try_for_each(|series| draw_series(&mut axes, series))?;
    area.present()
}

/// Names and marks of series, between the title and the axes, in as many rows as they need.
struct Legend {
    /// What each series is called, and where its entry begins, in drawn pixels.
    entries: Vec<(String, (i32, i32))>,
    /// Where the rows end, in pixels as seen.
    height: i32,
}

impl Legend {
    const ROW: i32 = 22;
    const SWATCH: i32 = 34;

    fn of(plot: &Plot) -> Result<Self, String> {
        let (left, right) = (20, plot.width - 16);
        let (mut x, mut y) = (left, 50);
        let mut entries = Vec::new();
        for series in &plot.series {
            let label = shortened(&series.label, LEGEND_LETTERS);
            let (label_width, _) =
                (FONT, LABEL_SIZE).into_font().box_size(&label).map_err(|error| error.to_string())?;
            let width = Self::SWATCH + label_width as i32 + 26;
            if x + width > right && x > left {
                (x, y) = (left, y + Self::ROW);
            }
            entries.push((label, (x * SCALE, y * SCALE)));
            x += width;
        }
        Ok(Self { entries, height: y + Self::ROW })
    }
}

fn draw_legend_entry<DB: DrawingBackend>(
    area: &Area<DB>,
    series: &Series,
    label: &str,
    (x, y): (i32, i32),
) -> Drawn<DB> {
    match series.mark {
        Mark::Bar(_) => {
            let corners = [(x + 8 * SCALE, y - 7 * SCALE), (x + 26 * SCALE, y + 7 * SCALE)];
            area.draw(&Rectangle::new(corners, series.colour.filled()))?;
        }
        Mark::Line { dashed, marker } => {
            let line = series.colour.stroke_width(2 * SCALE as u32);
            let parts = if dashed { vec![(0, 8), (10, 18), (20, 26)] } else { vec![(0, 26)] };
            for (from, to) in parts {
                let ends = [(x + from * SCALE, y), (x + to * SCALE, y)];
                area.draw(&PathElement::new(ends, line))?;
            }
            if let Some(marker) = marker {
                let around = |(dx, dy)| (x + 13 * SCALE + dx, y + dy);
                let corners: Vec<_> = marker_outline(marker).into_iter().map(around).collect();
                area.draw(&Polygon::new(corners, series.colour.filled()))?;
            }
        }
    }
    area.draw_text(label, &text(LABEL_SIZE), (x + Legend::SWATCH * SCALE, y - 11 * SCALE / 2))
}

/// Corners of the marker of a run, around its point: circle, square, diamond, two triangles, then anew. There are not
/// as many as colours, so that they meet again late.
fn marker_outline(run: usize) -> Vec<(i32, i32)> {
    let (n_corners, radius, turn) = match run % 5 {
        0 => (24, 4.5, 0.0),
        1 => (4, 5.5, 0.125),
        2 => (4, 6.0, 0.0),
        3 => (3, 6.0, 0.75),
        _ => (3, 6.0, 0.25),
    };
    let corner = |i: usize| {
        let angle = (i as f64 / n_corners as f64 + turn) * std::f64::consts::TAU;
        let radius: f64 = radius * f64::from(SCALE);
        ((radius * angle.cos()).round() as i32, (radius * angle.sin()).round() as i32)
    };
    (0..n_corners).map(corner).collect()
}

fn draw_series<DB: DrawingBackend>(axes: &mut Axes<'_, DB>, series: &Series) -> Drawn<DB> {
    let points = || series.points.iter().map(|point| (point.x, point.y));
    let line = series.colour.stroke_width(2 * SCALE as u32);
    let mut whisker_colour = series.colour;
    match series.mark {
        Mark::Bar(width) => {
            whisker_colour = INK;
            axes.draw_series(points().map(|(x, y)| {
                Rectangle::new([(x - width / 2.0, 0.0), (x + width / 2.0, y)], series.colour.filled())
            }))?;
        }
        Mark::Line { dashed: true, .. } => {
            axes.draw_series(DashedLineSeries::new(points(), 7 * SCALE, 4 * SCALE, line))?;
        }
        Mark::Line { dashed: false, .. } => {
            axes.draw_series(LineSeries::new(points(), line))?;
        }
    }
    if let Mark::Line { marker: Some(marker), .. } = series.mark {
        let outline = marker_outline(marker);
        axes.draw_series(
            points().map(|at| EmptyElement::at(at) + Polygon::new(outline.clone(), series.colour.filled())),
        )?;
    }
    let style = whisker_colour.stroke_width((SCALE * 3 / 2) as u32);
    let cap = 4 * SCALE;
    for (x, (low, high)) in series.points.iter().filter_map(|point| Some((point.x, point.whisker?))) {
        axes.draw_series([PathElement::new([(x, low), (x, high)], style)])?;
        axes.draw_series(
            [low, high].map(|y| EmptyElement::at((x, y)) + PathElement::new([(-cap, 0), (cap, 0)], style)),
        )?;
    }
    Ok(())
}

/// Pixels (rows of red, green, blue) as PNG, each being the mean of a square of `factor` by `factor`.
fn png(pixels: &[u8], width: usize, factor: usize) -> Vec<u8> {
    let (columns, rows) = (width / factor, pixels.len() / 3 / width / factor);
    let mean = |at: usize| {
        let (row, column, channel) = (at / 3 / columns, at / 3 % columns, at % 3);
        let square = (0..factor * factor).map(|i| {
            let (y, x) = (row * factor + i / factor, column * factor + i % factor);
            u32::from(pixels[(y * width + x) * 3 + channel])
        });
        (square.sum::<u32>() / (factor * factor) as u32) as u8
    };
    let smooth: Vec<u8> = (0..rows * columns * 3).map(mean).collect();
    let mut png = Vec::new();
    let mut encoder = png::Encoder::new(&mut png, columns as u32, rows as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder
        .write_header()
        .and_then(|mut writer| writer.write_image_data(&smooth))
        .expect("writing to memory");
    png
}
