//! Requests for recommendations, made of rows of a file of events.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use bireme::etl::serving::{INPUTS, Preprocessor};
use bireme_protocol::{DataType, Parameter, Tensor as Column};
use tch::Tensor;

/// A row of a file of events, by column.
pub type Event = HashMap<&'static str, String>;

/// The inputs of a request for the sessions of these events.
pub fn request(events: &[&Event]) -> Vec<Column> {
    let shape = [events.len() as i64, 1];
    INPUTS
        .iter()
        .filter(|input| events.first().is_some_and(|event| event.contains_key(input.name)))
        .map(|input| {
            let cells = events.iter().map(|event| event[input.name].as_str());
            match input.datatype {
                DataType::Int64 => Column::ints(
                    input.name,
                    &shape,
                    cells.map(|cell| cell.parse().unwrap_or_default()),
                ),
                DataType::Fp64 => Column {
                    name: input.name.to_owned(),
                    datatype: DataType::Fp64,
                    shape: shape.to_vec(),
                    data: cells
                        .flat_map(|cell| cell.parse::<f64>().unwrap().to_le_bytes())
                        .collect(),
                },
                _ => Column::texts(input.name, &shape, cells),
            }
        })
        .collect()
}

/// [`request`] with `top_k` recommendations a session.
pub fn request_of_rows(events: &[Event], top_k: u8) -> Vec<Column> {
    let mut request = request(&events.iter().collect::<Vec<_>>());
    request.push(Column {
        name: "top_k".into(),
        datatype: DataType::Int32,
        shape: vec![1],
        data: vec![top_k, 0, 0, 0],
    });
    request
}

/// Inputs of the model after the preprocessing of a repository.
pub fn prepared(
    etl: &Preprocessor,
    request: &[Column],
    parameters: &[(String, Parameter)],
) -> Vec<Tensor> {
    let views: Vec<_> = request.iter().map(Column::view).collect();
    let outputs = etl.apply(&views, parameters).unwrap();
    outputs[1..]
        .iter()
        .map(|tensor| match tensor.datatype {
            DataType::Int64 => Tensor::from_slice(&tensor.view().i64s().unwrap()),
            _ => Tensor::from_slice(&tensor.view().f32s().unwrap()),
        })
        .zip(&outputs[1..])
        .map(|(values, tensor)| values.view(tensor.shape.as_slice()))
        .collect()
}

/// The rows of a file of events by their sessions, in file order.
pub fn events_by_session(path: &Path) -> HashMap<String, Vec<Event>> {
    let text = fs::read_to_string(path).unwrap();
    let mut lines = text.lines();
    let header: Vec<&'static str> = (lines.next().unwrap().split(','))
        .map(|name| INPUTS.iter().find(|input| input.name == name).unwrap().name)
        .collect();
    let mut sessions: HashMap<String, Vec<Event>> = HashMap::new();
    for line in lines {
        let event: Event = header.iter().copied().zip(line.split(',').map(str::to_owned)).collect();
        sessions.entry(event["user_session"].clone()).or_default().push(event);
    }
    sessions
}
