//! The plots of a report, as SVG with text that stays text.
//!
//! Owns three kinds: throughput against depth, percentiles of latency, and ratios with their spread. The colours are
//! legible on white and on black; grids and words take the page's own colour from its style sheet. Axes of throughput,
//! latency and ratios are logarithmic: twice is as far everywhere.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::{
    backend::SVGBackend,
    chart::ChartBuilder,
    coord::{
        ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter},
        types::RangedCoordf64,
    },
    drawing::IntoDrawingArea,
    element::{Circle, PathElement},
    style::{Color, IntoFont, RGBColor, ShapeStyle, TextStyle},
};

/// Of words and grids; the page's style sheet replaces it.
const GREY: RGBColor = RGBColor(110, 119, 129);
/// The bare file's, then those of what is measured, then those of what it is held against.
const PALETTE: [RGBColor; 1 + SHADES + SHADES] = [
    GREY,
    RGBColor(9, 105, 160),
    RGBColor(31, 111, 235),
    RGBColor(26, 140, 80),
    RGBColor(130, 80, 223),
    RGBColor(20, 150, 160),
    RGBColor(84, 174, 40),
    RGBColor(211, 32, 47),
    RGBColor(232, 98, 30),
    RGBColor(181, 137, 0),
    RGBColor(191, 57, 137),
    RGBColor(150, 96, 60),
    RGBColor(160, 20, 70),
];
/// Colours of one kind; from the next one on they come again.
const SHADES: usize = 6;
const WIDTH: u32 = 760;
const HEIGHT: u32 = 320;
/// Of one row of a plot of ratios.
const ROW_HEIGHT: u32 = 24;
const FONT_SIZE: u32 = 13;

/// A line of a plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    pub name: String,
    pub hue: Hue,
    /// Place on the x axis, median, least and greatest.
    pub points: Vec<(f64, [f64; 3])>,
}

/// A row of a plot of ratios.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub name: String,
    pub hue: Hue,
    pub median: f64,
    pub quartiles: (f64, f64),
    pub extremes: (f64, f64),
}

/// Whose a line or row is, and the how manieth of its kind: the colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hue {
    Bare,
    Measured(usize),
    Yardstick(usize),
}

impl Hue {
    /// For legends.
    pub fn html(self) -> String {
        let RGBColor(r, g, b) = self.colour();
        format!("#{r:02x}{g:02x}{b:02x}")
    }

    fn colour(self) -> RGBColor {
        let index = match self {
            Hue::Bare => 0,
            Hue::Measured(nth) => 1 + nth % SHADES,
            Hue::Yardstick(nth) => 1 + SHADES + nth % SHADES,
        };
        PALETTE.get(index).copied().unwrap_or(GREY)
    }
}

fn words() -> TextStyle<'static> {
    ("sans-serif", FONT_SIZE).into_font().color(&GREY)
}

/// The range of values on a logarithmic axis, with some room; none without values above zero.
fn log_range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let values = values.filter(|value| *value > 0.0 && value.is_finite());
    let (least, greatest) = values.fold((f64::INFINITY, 0.0), |(least, greatest): (f64, f64), value| {
        (least.min(value), greatest.max(value))
    });
    (greatest > 0.0).then_some((least / 1.3, greatest * 1.3))
}

/// Lines over an axis of named places.
pub fn lines(
    series: &[Series],
    places: &[(f64, String)],
    x_name: &str,
    y_name: &str,
    show: impl Fn(f64) -> String,
) -> Result<Option<String>> {
    let values = series.iter().flat_map(|line| line.points.iter().flat_map(|(_, values)| *values));
    let Some((least, greatest)) = log_range(values) else { return Ok(None) };
    let (Some(first), Some(last)) = (places.first(), places.last()) else { return Ok(None) };
    let room = ((last.0 - first.0) * 0.04).max(0.2);
    let marks = places.iter().map(|(at, _)| *at).collect();
    let x = Axis { scale: Scale::Linear, range: (first.0 - room)..(last.0 + room), marks };
    let y = Axis::log(least, greatest);
    let name = |at: &f64| {
        let place = places.iter().find(|(place, _)| (place - at).abs() < 1e-9);
        place.map_or_else(String::new, |(_, name)| name.clone())
    };
    draw(HEIGHT, 70, (x, y), (x_name, y_name), (&name, &|value| show(*value)), |chart| {
        for line in series {
            let colour = line.hue.colour();
            let path: Vec<(f64, f64)> = line.points.iter().map(|(at, [median, ..])| (*at, *median)).collect();
            for (at, [_, min, max]) in &line.points {
                let spread = vec![(*at, *min), (*at, *max)];
                chart(Shape::Path(spread, colour.mix(0.45).stroke_width(1)));
            }
            chart(Shape::Path(path.clone(), colour.stroke_width(2)));
            path.into_iter().for_each(|point| chart(Shape::Dot(point, 3, colour.filled())));
        }
    })
    .map(Some)
}

/// Ratios, each with its quartiles and extremes, beside a line at `mark`.
pub fn ratios(rows: &[Row], x_name: &str, mark: f64) -> Result<Option<String>> {
    if rows.is_empty() {
        return Ok(None);
    }
    let values = rows.iter().flat_map(|row| [row.median, row.extremes.0, row.extremes.1]).chain([mark]);
    let Some((least, greatest)) = log_range(values) else { return Ok(None) };
    let count = u32::try_from(rows.len())?;
    let place = |index: usize| f64::from(count) - f64::from(u32::try_from(index).unwrap_or(0)) - 0.5;
    let x = Axis::log(least, greatest);
    let marks = (0..rows.len()).map(place).collect();
    let y = Axis { scale: Scale::Linear, range: 0.0..f64::from(count), marks };
    let name = |at: &f64| {
        let row = rows.iter().enumerate().find(|(index, _)| (place(*index) - at).abs() < 1e-9);
        row.map_or_else(String::new, |(_, row)| row.name.clone())
    };
    let longest = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
    let names_width = u32::try_from(longest)?.saturating_mul(7).clamp(60, WIDTH / 2);
    let height = count * ROW_HEIGHT + 60;
    let show = |value: &f64| format!("{}x", trimmed(*value));
    draw(height, names_width, (x, y), (x_name, ""), (&show, &name), |chart| {
        chart(Shape::Path(vec![(mark, 0.0), (mark, f64::from(count))], GREY.stroke_width(1)));
        for (index, row) in rows.iter().enumerate() {
            let (at, colour) = (place(index), row.hue.colour());
            chart(Shape::Path(vec![(row.extremes.0, at), (row.extremes.1, at)], colour.stroke_width(1)));
            chart(Shape::Path(vec![(row.quartiles.0, at), (row.quartiles.1, at)], colour.stroke_width(5)));
            chart(Shape::Dot((row.median, at), 5, colour.filled()));
        }
    })
    .map(Some)
}

/// What a plot is made of.
enum Shape {
    Path(Vec<(f64, f64)>, ShapeStyle),
    Dot((f64, f64), i32, ShapeStyle),
}

/// What a value of an axis is called.
type Words<'a> = &'a dyn Fn(&f64) -> String;

/// One chart with its axes; `fill` puts the shapes in.
fn draw(
    height: u32,
    left: u32,
    (x, y): (Axis, Axis),
    (x_name, y_name): (&str, &str),
    (x_words, y_words): (Words<'_>, Words<'_>),
    fill: impl FnOnce(&mut dyn FnMut(Shape)),
) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .x_label_area_size(40)
            .y_label_area_size(left)
            .build_cartesian_2d(x, y)
            .map_err(|error| anyhow!("plot: {error}"))?;
        chart
            .configure_mesh()
            .axis_style(GREY.mix(0.6))
            .bold_line_style(GREY.mix(0.25))
            .light_line_style(GREY.mix(0.0))
            .label_style(words())
            .axis_desc_style(words())
            .x_desc(x_name)
            .y_desc(y_name)
            .x_label_formatter(x_words)
            .y_label_formatter(y_words)
            .draw()
            .map_err(|error| anyhow!("plot: {error}"))?;
        let mut failed = None;
        fill(&mut |shape| {
            let drawn = match shape {
                Shape::Path(points, style) => chart.draw_series([PathElement::new(points, style)]).map(drop),
                Shape::Dot(at, size, style) => chart.draw_series([Circle::new(at, size, style)]).map(drop),
            };
            if let Err(error) = drawn {
                failed = Some(anyhow!("plot: {error}"));
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        root.present().map_err(|error| anyhow!("plot: {error}"))?;
    }
    Ok(svg)
}

/// How values are laid out.
#[derive(Clone, Copy)]
enum Scale {
    Linear,
    Log,
}

impl Scale {
    fn of(self, value: f64) -> f64 {
        match self {
            Scale::Linear => value,
            Scale::Log => value.ln(),
        }
    }
}

/// One axis, which knows where its words go.
struct Axis {
    scale: Scale,
    range: Range<f64>,
    marks: Vec<f64>,
}

impl Axis {
    fn log(least: f64, greatest: f64) -> Axis {
        Axis { scale: Scale::Log, range: least..greatest, marks: marks(least, greatest) }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let Range { start, end } = self.range;
        RangedCoordf64::from(self.scale.of(start)..self.scale.of(end)).map(&self.scale.of(*value), limit)
    }

    fn key_points<H: KeyPointHint>(&self, _: H) -> Vec<f64> {
        self.marks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// Every plot has words of its own in place of these.
impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        value.to_string()
    }
}

/// Ones, twos and fives of each decade within a range, or more of them where that makes less than three.
fn marks(least: f64, greatest: f64) -> Vec<f64> {
    let few = steps(&[1.0, 2.0, 5.0], least, greatest);
    if few.len() > 2 {
        return few;
    }
    steps(&[1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], least, greatest)
}

fn steps(steps: &[f64], least: f64, greatest: f64) -> Vec<f64> {
    let mut marks = Vec::new();
    let mut decade = 10f64.powf(least.log10().floor());
    while decade <= greatest {
        let of_decade = steps.iter().map(|step| step * decade);
        marks.extend(of_decade.filter(|mark| (least..=greatest).contains(mark)));
        decade *= 10.0;
    }
    marks
}

/// At most three digits after the point, and no zeros at the end.
fn trimmed(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_throughput_has_its_names_as_text() {
        let series = [Series {
            name: "a".to_owned(),
            hue: Hue::Bare,
            points: vec![(0.0, [10e3, 9e3, 11e3]), (1.0, [90e3, 80e3, 95e3])],
        }];
        let places = [(0.0, "1".to_owned()), (1.0, "32".to_owned())];
        let svg = lines(&series, &places, "depth", "requests a second", |v| format!("{v}")).unwrap().unwrap();
        assert!(
            svg.starts_with("<svg") && svg.contains("requests a second") && svg.contains("polyline"),
            "{svg}"
        );
    }

    #[test]
    fn a_plot_without_values_is_none() {
        assert_eq!(ratios(&[], "ratio", 1.0).unwrap(), None);
        assert_eq!(lines(&[], &[(0.0, "1".to_owned())], "x", "y", |v| format!("{v}")).unwrap(), None);
        let nothing = Series { name: "a".to_owned(), hue: Hue::Bare, points: vec![(0.0, [0.0; 3])] };
        assert_eq!(lines(&[nothing], &[(0.0, "1".to_owned())], "x", "y", |v| v.to_string()).unwrap(), None);
    }

    #[test]
    fn names_in_a_plot_stay_text() {
        let row = Row {
            name: "</svg><script>".to_owned(),
            hue: Hue::Yardstick(40),
            median: 2.0,
            quartiles: (1.5, 2.5),
            extremes: (1.0, 3.0),
        };
        let svg = ratios(&[row], "ratio", 1.0).unwrap().unwrap();
        assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;"), "{svg}");
    }

    #[test]
    fn marks_are_ones_twos_and_fives_and_more_in_a_narrow_range() {
        assert_eq!(marks(0.9, 1.6), [0.9, 1.0, 1.2, 1.5]);
        assert_eq!(marks(0.15, 3.0), [0.2, 0.5, 1.0, 2.0]);
        assert_eq!([trimmed(0.2), trimmed(10.0)], ["0.2", "10"]);
    }
}
