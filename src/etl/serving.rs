//! Preprocessing of inference requests: from events to a model's inputs.
//!
//! [`Workflow::apply`] encodes the events as it did for training, except that the most recent
//! events of a session are kept, and sessions of one event are served. `bireme serve` and the
//! Triton backend run the same function.

use std::fmt;
use std::fs;
use std::path::Path;

use bireme_base::message::chain;
use bireme_protocol::{DataType as Type, Parameter, Tensor, TensorView};
use polars::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::first::RawEvent;
use crate::schema::event;
use crate::sessions::Keep;
use crate::workflow::{Settings, Workflow};

/// Output with the sessions' ids: BYTES `[B, 1]`. In an ensemble an output cannot have the name of
/// an input.
pub const SESSION: &str = "session";
/// Output with the number of events of each session: INT64 `[B, 1]`.
pub const LENGTH: &str = "length";
/// Output with the items that are not recommended to each session, 0 where there are fewer: INT64
/// `[B, at least L]`.
pub const HIDDEN: &str = "hidden";
/// Output with the wanted places of the ranking, 0 to K − 1, at most the number of items: INT64
/// `[B, K]`.
pub const PLACES: &str = "places";
/// Request input or parameter: the number of recommendations per session, INT32 `[1]`.
pub const TOP_K: &str = "top_k";
/// Request input or parameter: whether to leave out items of the session, BOOL `[1]`.
pub const EXCLUDE_SEEN: &str = "exclude_seen";

#[derive(Clone, Copy, Debug)]
pub struct RequestInput {
    pub name: &'static str,
    pub datatype: Type,
    /// Sizes; −1 for any.
    pub dims: &'static [i64],
    pub optional: bool,
}

impl RequestInput {
    const fn column(name: &'static str, datatype: Type, optional: bool) -> Self {
        Self { name, datatype, dims: &[-1, 1], optional }
    }
}

/// The inputs of a request: the columns of the events, and options.
pub const INPUTS: [RequestInput; 11] = [
    RequestInput::column(event::TIME, Type::Bytes, false),
    RequestInput::column(event::TYPE, Type::Bytes, false),
    RequestInput::column(event::PRODUCT, Type::Int64, false),
    RequestInput::column(event::CATEGORY, Type::Int64, false),
    RequestInput::column(event::CATEGORY_CODE, Type::Bytes, true),
    RequestInput::column(event::BRAND, Type::Bytes, true),
    RequestInput::column(event::PRICE, Type::Fp64, false),
    RequestInput::column(event::USER, Type::Int64, true),
    RequestInput::column(event::SESSION, Type::Bytes, false),
    RequestInput { name: TOP_K, datatype: Type::Int32, dims: &[1], optional: true },
    RequestInput { name: EXCLUDE_SEEN, datatype: Type::Bool, dims: &[1], optional: true },
];

/// The inputs of a request for `top_k` recommendations per session.
pub fn request(events: &[RawEvent], top_k: i32, exclude_seen: bool) -> Vec<Tensor> {
    let shape = [events.len() as i64, 1];
    fn text(cell: &Option<String>) -> &str {
        cell.as_deref().unwrap_or_default()
    }
    let times: Vec<String> = events.iter().map(|event| event.time.to_string()).collect();
    let texts =
        |name, cell: fn(&RawEvent) -> &str| Tensor::texts(name, &shape, events.iter().map(cell));
    // INT64 has no null; an unknown value gets the same id as null.
    let ints = |name, cell: fn(&RawEvent) -> Option<i64>| {
        Tensor::ints(name, &shape, events.iter().map(|event| cell(event).unwrap_or(i64::MIN)))
    };
    let prices = events.iter().flat_map(|event| event.price.to_le_bytes());
    let scalar = |name: &str, datatype, data| Tensor {
        name: name.to_owned(),
        datatype,
        shape: vec![1],
        data,
    };
    vec![
        Tensor::texts(event::TIME, &shape, times.iter().map(String::as_str)),
        texts(event::TYPE, |event| text(&event.event_type)),
        ints(event::PRODUCT, |event| Some(event.product_id)),
        ints(event::CATEGORY, |event| event.category_id),
        texts(event::CATEGORY_CODE, |event| text(&event.category_code)),
        texts(event::BRAND, |event| text(&event.brand)),
        Tensor {
            name: event::PRICE.to_owned(),
            datatype: Type::Fp64,
            shape: shape.to_vec(),
            data: prices.collect(),
        },
        ints(event::USER, |event| event.user_id),
        texts(event::SESSION, |event| &event.session),
        scalar(TOP_K, Type::Int32, top_k.to_le_bytes().to_vec()),
        scalar(EXCLUDE_SEEN, Type::Bool, vec![exclude_seen.into()]),
    ]
}

/// A column of the sessions that a model reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelColumn {
    /// The name in the schema.
    pub column: String,
    /// The name of the model's input, which must be an identifier.
    pub input: String,
    /// INT64 if so, else FP32.
    pub is_categorical: bool,
}

impl ModelColumn {
    /// Derives the input's name from that of the column.
    pub fn new(column: &str, is_categorical: bool) -> Self {
        let letter = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let mut input: String = column.chars().map(letter).collect();
        if input.starts_with(|c: char| c.is_ascii_digit()) {
            input.insert(0, '_');
        }
        Self { column: column.to_owned(), input, is_categorical }
    }
}

/// The settings of serving: `serving.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServingSettings {
    /// The number of most recent events of a session that the model reads.
    pub max_length: usize,
    pub columns: Vec<ModelColumn>,
    /// Recommendations per session by default.
    pub top_k: usize,
    /// The most recommendations per session.
    pub max_top_k: usize,
    /// The most sessions of a request.
    pub max_sessions: usize,
    /// The number of items that can be recommended; absent in exports that bound `max_top_k` by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_recommendable: Option<usize>,
}

/// A fitted workflow that serves requests.
#[derive(Debug)]
pub struct Preprocessor {
    workflow: Workflow,
    settings: ServingSettings,
}

/// Entries of a saved preprocessor's folder.
const WORKFLOW: &str = "workflow";
const SETTINGS: &str = "serving.json";

impl Preprocessor {
    /// Takes a workflow, and removes the ids of users and sessions from it.
    pub fn new(workflow: Workflow, settings: ServingSettings) -> Self {
        Self { workflow: workflow.without_visitors(), settings }
    }

    /// Reads what [`Preprocessor::save`] wrote.
    ///
    /// # Errors
    /// A file that is missing or damaged.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(SETTINGS);
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let settings = serde_json::from_str(&text).map_err(|e| {
            let (line, column) = (e.line(), e.column());
            let problem = format!(
                "line {line}, column {column} is not what `bireme export` writes: export again"
            );
            Error::Workflow { path: path.clone(), problem }
        })?;
        Ok(Self { workflow: Workflow::load(&dir.join(WORKFLOW))?, settings })
    }

    /// Writes the workflow and the settings into a folder, which must exist.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        let workflow = dir.join(WORKFLOW);
        fs::create_dir(&workflow).map_err(Error::io("create", &workflow))?;
        self.workflow.save(&workflow)?;
        let path = dir.join(SETTINGS);
        let text = serde_json::to_string_pretty(&self.settings).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text + "\n")).map_err(Error::io("write", &path))
    }

    pub fn workflow(&self) -> &Workflow {
        &self.workflow
    }

    pub fn settings(&self) -> &ServingSettings {
        &self.settings
    }

    /// The outputs: name, type and sizes, −1 for those that depend on the request. All but the
    /// first are the model's inputs: its columns, [`LENGTH`], [`HIDDEN`], [`PLACES`].
    pub fn outputs(&self) -> Vec<(&str, Type, Vec<i64>)> {
        let ServingSettings { max_length, columns, .. } = &self.settings;
        let mut outputs = vec![(SESSION, Type::Bytes, vec![-1, 1])];
        outputs.extend(columns.iter().map(|column| {
            let datatype = if column.is_categorical { Type::Int64 } else { Type::Fp32 };
            (column.input.as_str(), datatype, vec![-1, *max_length as i64])
        }));
        outputs.push((LENGTH, Type::Int64, vec![-1, 1]));
        outputs.push((HIDDEN, Type::Int64, vec![-1, -1]));
        outputs.push((PLACES, Type::Int64, vec![-1, -1]));
        outputs
    }

    /// Turns the events of a request into the outputs, with a row per session in the order of their
    /// first events.
    ///
    /// # Errors
    /// What is wrong with the request, in one line.
    pub fn apply(
        &self,
        inputs: &[TensorView<'_>],
        parameters: &[(String, Parameter)],
    ) -> Result<Vec<Tensor>, String> {
        let ServingSettings { max_length, columns, max_sessions, .. } = &self.settings;
        let find = |name: &str| inputs.iter().find(|input| input.name == name);
        let top_k = self.top_k(find(TOP_K), parameters)?;
        let exclude_seen = exclude_seen(find(EXCLUDE_SEEN), parameters)?;
        let events = events(inputs)?;
        let settings = Settings {
            max_length: *max_length,
            min_length: 1,
            keep: Keep::Last,
            seed: self.workflow.statistics.settings.seed,
        };
        let applied = self.workflow.apply(&events, &settings).map_err(|error| chain(&error))?;
        let n_sessions = applied.session_ids.len();
        if n_sessions == 0 {
            return Err(format!(
                "none of the {} rows of the request has a session",
                events.height()
            ));
        }
        if n_sessions > *max_sessions {
            return Err(format!(
                "the request holds {n_sessions} sessions, and at most {max_sessions} are served at \
                 once"
            ));
        }
        let rows = n_sessions as i64;
        let mut outputs = vec![Tensor::texts(
            SESSION,
            &[rows, 1],
            applied.session_ids.iter().map(String::as_str),
        )];
        let shape = [rows, *max_length as i64];
        let mut lengths = Vec::new();
        for ModelColumn { column, input, is_categorical } in columns {
            let lists = applied.sessions.column(column).and_then(|column| column.list().cloned());
            let lists =
                lists.map_err(|error| format!("the workflow makes no `{column}`: {error}"))?;
            lengths = lists.lst_lengths().iter().map(|n| i64::from(n.unwrap_or(0))).collect();
            let values = lists.get_inner();
            outputs.push(if *is_categorical {
                let values = values.i64().map_err(|error| error.to_string())?.to_vec_null_aware();
                let values = values.left().ok_or("a code is null")?;
                Tensor::ints(input, &shape, padded(&values, &lengths, *max_length))
            } else {
                let values = values.cast(&DataType::Float32).map_err(|error| error.to_string())?;
                let values = values.f32().map_err(|error| error.to_string())?.to_vec_null_aware();
                let values = values.left().ok_or("a value is null")?;
                Tensor::floats(input, &shape, padded(&values, &lengths, *max_length))
            });
        }
        outputs.push(Tensor::ints(LENGTH, &[rows, 1], lengths));
        let hidden = if exclude_seen { applied.seen } else { vec![Vec::new(); n_sessions] };
        let width = hidden.iter().map(Vec::len).max().unwrap_or(0).max(*max_length);
        let fill = |items: &Vec<i64>| {
            items
                .iter()
                .copied()
                .chain(std::iter::repeat_n(0, width - items.len()))
                .collect::<Vec<_>>()
        };
        outputs.push(Tensor::ints(HIDDEN, &[rows, width as i64], hidden.iter().flat_map(fill)));
        let places = (0..n_sessions).flat_map(|_| 0..top_k);
        outputs.push(Tensor::ints(PLACES, &[rows, top_k], places));
        Ok(outputs)
    }

    /// The number of recommendations per session: as requested, but at most the number of items.
    fn top_k(
        &self,
        input: Option<&TensorView<'_>>,
        parameters: &[(String, Parameter)],
    ) -> Result<i64, String> {
        let &ServingSettings { top_k, max_top_k, n_recommendable, .. } = &self.settings;
        let input = match input.map(TensorView::i32s).transpose()?.as_deref() {
            None => None,
            Some(&[wanted]) => Some(i64::from(wanted)),
            Some(several) => {
                return Err(format!("`{TOP_K}` must be one number, not {}", several.len()));
            }
        };
        let parameter = match parameter(parameters, TOP_K) {
            None => None,
            Some(&Parameter::Int(wanted)) => Some(wanted),
            Some(other) => {
                return Err(format!("parameter `{TOP_K}` must be a whole number, not {other}"));
            }
        };
        let wanted = one_of(TOP_K, input, parameter)?.unwrap_or(top_k as i64);
        if !(1..=max_top_k as i64).contains(&wanted) {
            return Err(format!("`{TOP_K}` is {wanted}, and must be from 1 to {max_top_k}"));
        }
        Ok(n_recommendable.map_or(wanted, |n| wanted.min(n as i64)))
    }
}

fn exclude_seen(
    input: Option<&TensorView<'_>>,
    parameters: &[(String, Parameter)],
) -> Result<bool, String> {
    let input = match input.map(TensorView::bools).transpose()?.as_deref() {
        None => None,
        Some(&[value]) => Some(value),
        Some(several) => {
            return Err(format!("`{EXCLUDE_SEEN}` must be one truth value, not {}", several.len()));
        }
    };
    let parameter = match parameter(parameters, EXCLUDE_SEEN) {
        None => None,
        Some(&Parameter::Bool(value)) => Some(value),
        Some(other) => {
            return Err(format!("parameter `{EXCLUDE_SEEN}` must be true or false, not {other}"));
        }
    };
    Ok(one_of(EXCLUDE_SEEN, input, parameter)?.unwrap_or(false))
}

fn parameter<'p>(parameters: &'p [(String, Parameter)], name: &str) -> Option<&'p Parameter> {
    parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value)
}

/// An option that may be given as an input or as a parameter, or as both if they agree.
fn one_of<T: PartialEq + fmt::Display>(
    name: &str,
    input: Option<T>,
    parameter: Option<T>,
) -> Result<Option<T>, String> {
    match (&input, &parameter) {
        (Some(a), Some(b)) if a != b => {
            Err(format!("`{name}` is {a} as an input and {b} as a parameter: give one of them"))
        }
        _ => Ok(input.or(parameter)),
    }
}

/// The columns of the events among a request's inputs, all of the same length.
fn events(inputs: &[TensorView<'_>]) -> Result<DataFrame, String> {
    let mut columns: Vec<Column> = Vec::new();
    let mut n_rows = None;
    for RequestInput { name, datatype, optional, .. } in
        INPUTS.iter().filter(|input| input.dims.len() == 2)
    {
        let Some(input) = inputs.iter().find(|input| input.name == *name) else {
            if *optional {
                continue;
            }
            return Err(format!("input `{name}` is missing"));
        };
        let rows = match *input.shape {
            [rows] | [rows, 1] => rows,
            ref shape => {
                return Err(format!("input `{name}` must have the shape [any, 1], not {shape:?}"));
            }
        };
        let (first, n) = *n_rows.get_or_insert((*name, rows));
        if n != rows {
            return Err(format!("input `{name}` has {rows} rows, input `{first}` {n}"));
        }
        let name = PlSmallStr::from_static(name);
        columns.push(match datatype {
            Type::Int64 => Column::new(name, input.i64s()?),
            Type::Fp64 => Column::new(name, input.f64s()?),
            _ => Column::new(name, input.texts()?),
        });
    }
    let n_rows = n_rows.map_or(0, |(_, rows)| rows.max(0) as usize);
    DataFrame::new(n_rows, columns).map_err(|error| error.to_string())
}

/// Rows of different lengths, each filled up to `width` with zeros.
fn padded<T: Copy + Default>(values: &[T], lengths: &[i64], width: usize) -> Vec<T> {
    let mut padded = Vec::with_capacity(lengths.len() * width);
    let mut rest = values;
    for &length in lengths {
        let (row, after) = rest.split_at(length as usize);
        rest = after;
        padded.extend_from_slice(row);
        padded.resize(padded.len() + width - row.len(), T::default());
    }
    padded
}
