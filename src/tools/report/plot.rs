//! Draws a `Plot` as SVG.
//!
//! The drawing library knows whole pixels only, so a chart is drawn at `SCALE` times its size,
//! and the view box of the SVG scales it down. Text is in the viewer's sans-serif font. Colours are
//! those of Okabe & Ito (2008), distinguishable by colour-blind readers; runs also differ in their
//! markers, and lines of baselines are dashed.

use std::ops::Range;

use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;

/// Drawn pixels per pixel of the chart.
const SCALE: i32 = 4;

/// Least width of a chart, in pixels.
pub(super) const WIDTH: i32 = 760;

/// Height of the axes with their labels.
const AXES_HEIGHT: i32 = 368;

/// Longer names in a legend are shortened.
const LEGEND_LETTERS: usize = 60;

const FONT: &str = "sans-serif";

/// Height of a line of labels, in pixels.
const LABEL_SIZE: i32 = 15;

/// Estimated mean width of a letter of a label: the font is the viewer's.
const LETTER_WIDTH: i32 = 7;

/// Text, axes and whiskers of bars.
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

/// Colours of runs, in their order.
pub(super) const COLOURS: [RGBColor; 8] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x00, 0x00, 0x00),
    RGBColor(0x99, 0x99, 0x99),
];

pub struct Chart {
    /// Name of its file, without the extension.
    pub name: &'static str,
    pub title: String,
    pub svg: String,
}

/// A line of [`rates`].
pub struct RateLine {
    pub label: String,
    pub is_dashed: bool,
    /// By number of ranks; none where nothing was measured.
    pub values: Vec<Option<f64>>,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot draw the chart `{name}`: {problem}")]
pub struct ChartError {
    name: &'static str,
    problem: String,
}

/// Charts sessions per second by the number of ranks.
///
/// # Errors
/// Returns an error of the drawing library.
pub fn rates(
    name: &'static str,
    title: &str,
    ranks: &[usize],
    lines: &[RateLine],
) -> Result<Chart, ChartError> {
    let series = lines.iter().enumerate().map(|(i, line)| Series {
        label: line.label.clone(),
        colour: colour(i),
        mark: Mark::Line { dashed: line.is_dashed, marker: Some(i) },
        points: (line.values.iter().enumerate())
            .filter_map(|(x, y)| Some(PlotPoint { x: x as f64 + 0.5, y: (*y)?, whisker: None }))
            .collect(),
    });
    let series: Vec<Series> = series.collect();
    render(Plot {
        name,
        title: title.to_owned(),
        x_title: "ranks".to_owned(),
        y_title: "sessions/s".to_owned(),
        x: Axis::Categories(ranks.iter().map(ToString::to_string).collect()),
        y: 0.0..highest(&series),
        series,
        width: WIDTH,
    })
}

/// Description of a chart.
pub(super) struct Plot {
    pub(super) name: &'static str,
    pub(super) title: String,
    pub(super) x_title: String,
    pub(super) y_title: String,
    pub(super) x: Axis,
    pub(super) y: Range<f64>,
    pub(super) series: Vec<Series>,
    /// In pixels.
    pub(super) width: i32,
}

pub(super) enum Axis {
    /// Category i is centred at i + 0.5.
    Categories(Vec<String>),
    /// From 0 to this number.
    Numbers(f64),
}

impl Axis {
    fn scale(&self) -> Scale {
        match self {
            Self::Categories(names) => Scale {
                range: 0.0..names.len() as f64,
                ticks: (0..names.len()).map(|i| i as f64 + 0.5).collect(),
                digits: 0,
            },
            Self::Numbers(end) => Scale::of_numbers(0.0..*end),
        }
    }

    fn label(&self, x: f64, digits: usize) -> String {
        match self {
            Self::Categories(names) => names.get(x as usize).cloned().unwrap_or_default(),
            Self::Numbers(_) => format!("{x:.digits$}"),
        }
    }
}

pub(super) struct Series {
    pub(super) label: String,
    pub(super) colour: RGBColor,
    pub(super) mark: Mark,
    pub(super) points: Vec<PlotPoint>,
}

#[derive(Clone, Copy)]
pub(super) enum Mark {
    /// A bar of this width, in units of the x axis.
    Bar(f64),
    /// `marker` is the number of a run.
    Line { dashed: bool, marker: Option<usize> },
}

pub(super) struct PlotPoint {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) whisker: Option<(f64, f64)>,
}

pub(super) fn colour(run: usize) -> RGBColor {
    COLOURS[run % COLOURS.len()]
}

/// Upper end of a y axis from 0 that shows all points and whiskers.
pub(super) fn highest(series: &[Series]) -> f64 {
    let points = series.iter().flat_map(|series| &series.points);
    let highest =
        points.map(|point| point.whisker.map_or(point.y, |(_, high)| high)).fold(0.0, f64::max);
    if highest > 0.0 { highest * 1.08 } else { 1.0 }
}

/// Cuts the middle out of long text: names of runs mostly differ at their ends.
pub(super) fn shortened(text: &str, n_letters: usize) -> String {
    let letters: Vec<char> = text.chars().collect();
    if letters.len() <= n_letters {
        return text.to_owned();
    }
    let (start, end) = (n_letters / 2, (n_letters - 1) / 2);
    letters[..start].iter().chain(&['…']).chain(&letters[letters.len() - end..]).collect()
}

/// Draws a plot.
///
/// # Errors
/// Returns an error of the drawing library.
pub(super) fn render(plot: Plot) -> Result<Chart, ChartError> {
    let legend = Legend::new(&plot);
    let plot_height = legend.height + AXES_HEIGHT;
    let (width, height) = ((plot.width * SCALE) as u32, (plot_height * SCALE) as u32);
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
    draw(&area, &plot, &legend)
        .map_err(|error| ChartError { name: plot.name, problem: error.to_string() })?;
    drop(area);
    let drawn = format!("width=\"{width}\" height=\"{height}\"");
    let shown = format!("width=\"{}\" height=\"{plot_height}\"", plot.width);
    Ok(Chart { name: plot.name, title: plot.title, svg: svg.replacen(&drawn, &shown, 1) })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Axes<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Scale, Scale>>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

/// An axis with ticks at round values.
struct Scale {
    range: Range<f64>,
    ticks: Vec<f64>,
    /// Digits after the point that distinguish the ticks.
    digits: usize,
}

impl Scale {
    /// About six ticks.
    fn of_numbers(range: Range<f64>) -> Self {
        let rough = (range.end - range.start) / 6.0;
        let power = 10f64.powf(rough.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
        let step = steps.into_iter().find(|step| *step >= rough).unwrap_or(rough);
        let ticks = (range.start / step).ceil() as i64..=(range.end / step).floor() as i64;
        let ticks = ticks.map(|tick| tick as f64 * step).collect();
        let digits = (-(step.log10() + 1e-9).floor()).max(0.0) as usize;
        Self { range, ticks, digits }
    }
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

fn draw<'a>(area: &Area<'a>, plot: &Plot, legend: &Legend) -> Drawn<'a> {
    area.fill(&WHITE)?;
    area.draw_text(&plot.title, &text(20), (16 * SCALE, 12 * SCALE))?;
    for (series, entry) in plot.series.iter().zip(&legend.entries) {
        draw_legend_entry(area, series, entry)?;
    }
    let (_, below) = area.split_vertically(legend.height * SCALE);
    let (x, y) = (plot.x.scale(), Scale::of_numbers(plot.y.clone()));
    let (x_digits, y_digits) = (x.digits, y.digits);
    let mut axes = ChartBuilder::on(&below)
        .margin_left(14 * SCALE)
        .margin_right(20 * SCALE)
        .margin_bottom(8 * SCALE)
        .x_label_area_size(52 * SCALE)
        .y_label_area_size(66 * SCALE)
        .build_cartesian_2d(x, y)?;
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
        .x_label_formatter(&|&x| plot.x.label(x, x_digits))
        .y_label_formatter(&|y| format!("{y:.y_digits$}"))
        .draw()?;
    plot.series.iter().try_for_each(|series| draw_series(&mut axes, series))?;
    area.present()
}

/// Names and marks of the series, in rows between the title and the axes.
struct Legend {
    entries: Vec<LegendEntry>,
    /// Lower end of the rows, in pixels.
    height: i32,
}

struct LegendEntry {
    label: String,
    /// In drawn pixels.
    x: i32,
    y: i32,
}

impl Legend {
    const ROW: i32 = 22;
    const SWATCH: i32 = 34;

    fn new(plot: &Plot) -> Self {
        let (left, right) = (20, plot.width - 16);
        let (mut x, mut y) = (left, 50);
        let mut entries = Vec::new();
        for series in &plot.series {
            let label = shortened(&series.label, LEGEND_LETTERS);
            let width = Self::SWATCH + LETTER_WIDTH * label.chars().count() as i32 + 26;
            if x + width > right && x > left {
                (x, y) = (left, y + Self::ROW);
            }
            entries.push(LegendEntry { label, x: x * SCALE, y: y * SCALE });
            x += width;
        }
        Self { entries, height: y + Self::ROW }
    }
}

fn draw_legend_entry<'a>(area: &Area<'a>, series: &Series, entry: &LegendEntry) -> Drawn<'a> {
    let &LegendEntry { ref label, x, y } = entry;
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

/// Corners of the marker of a run, relative to its point: circle, square, diamond, two triangles.
/// The number of shapes and the number of colours have no common factor, so that 40 runs differ.
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

fn draw_series<'b>(axes: &mut Axes<'_, 'b>, series: &Series) -> Drawn<'b> {
    let points = || series.points.iter().map(|point| (point.x, point.y));
    let line = series.colour.stroke_width(2 * SCALE as u32);
    let mut whisker_colour = series.colour;
    match series.mark {
        Mark::Bar(width) => {
            whisker_colour = INK;
            axes.draw_series(points().map(|(x, y)| {
                Rectangle::new(
                    [(x - width / 2.0, 0.0), (x + width / 2.0, y)],
                    series.colour.filled(),
                )
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
        axes.draw_series(points().map(|at| {
            EmptyElement::at(at) + Polygon::new(outline.clone(), series.colour.filled())
        }))?;
    }
    let style = whisker_colour.stroke_width((SCALE * 3 / 2) as u32);
    let cap = 4 * SCALE;
    for (x, (low, high)) in series.points.iter().filter_map(|point| Some((point.x, point.whisker?)))
    {
        axes.draw_series([PathElement::new([(x, low), (x, high)], style)])?;
        axes.draw_series(
            [low, high]
                .map(|y| EmptyElement::at((x, y)) + PathElement::new([(-cap, 0), (cap, 0)], style)),
        )?;
    }
    Ok(())
}
