//! A checkpoint that rank 0 has read, on every rank: only rank 0 needs to see the run directory. Of tables that are shared
//! out, every rank gets its own rows.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::tensor_file::deal;
use super::{Checkpoint, State, Tensors};
use crate::collective::{Collective, CollectiveError};
use crate::model;

/// What there is to tell before the tensors themselves.
#[derive(Serialize, Deserialize)]
struct Head {
    path: PathBuf,
    state: State,
    weights: Vec<Shape>,
    optimizer: Vec<Shape>,
    n_occurrences: usize,
}

/// A tensor's name, whether it counts (i64) or measures (f32), and its size.
#[derive(Serialize, Deserialize)]
struct Shape {
    name: String,
    is_count: bool,
    size: Vec<i64>,
}

/// *All ranks.* What rank 0 brings, on every rank, which then holds these rows of the tables of items.
///
/// # Errors
/// Those of the collective.
pub fn share(
    mine: Option<Checkpoint>,
    rows: &model::Share<'_>,
    collective: &dyn Collective,
) -> Result<Option<Checkpoint>, CollectiveError> {
    let shapes = |named: &[(String, Tensor)]| {
        let shape = |(name, tensor): &(String, Tensor)| Shape {
            name: name.clone(),
            is_count: tensor.kind() == Kind::Int64,
            size: tensor.size(),
        };
        named.iter().map(shape).collect()
    };
    let head = mine.as_ref().map(|checkpoint| Head {
        path: checkpoint.path.clone(),
        state: checkpoint.state.clone(),
        weights: shapes(&checkpoint.tensors.weights),
        optimizer: shapes(&checkpoint.tensors.optimizer),
        n_occurrences: checkpoint.occurrences.len(),
    });
    let head = serde_json::to_vec(&head).expect("a state is JSON");
    let head = collective.broadcast_bytes(head, 0)?;
    let head: Option<Head> = serde_json::from_slice(&head).expect("what rank 0 has just written");
    let Some(Head { path, state, weights, optimizer, n_occurrences }) = head else { return Ok(None) };
    let (have, mut occurrences) = match mine {
        Some(Checkpoint { tensors, occurrences, .. }) => (tensors, occurrences),
        None => (Tensors::default(), vec![0; n_occurrences]),
    };
    let receive = |shapes: Vec<Shape>, have: Vec<(String, Tensor)>| {
        let mut have = have.into_iter();
        let receive = |Shape { name, is_count, size }| {
            let kind = if is_count { Kind::Int64 } else { Kind::Float };
            let mine = have.next().map(|(_, tensor)| tensor.contiguous());
            if let Some(company) = rows.company().filter(|_| model::Share::is_table(&name)) {
                return Ok((name, deal(mine.as_ref(), (&size, kind), rows, company)?));
            }
            let mut tensor = mine.unwrap_or_else(|| Tensor::empty(size, (kind, Device::Cpu)));
            collective.broadcast(&mut tensor, 0)?;
            Ok((name, tensor))
        };
        shapes.into_iter().map(receive).collect::<Result<Vec<_>, CollectiveError>>()
    };
    let weights = receive(weights, have.weights)?;
    let tensors = Tensors { weights, optimizer: receive(optimizer, have.optimizer)? };
    let mut counted = Tensor::from_slice(&occurrences);
    collective.broadcast(&mut counted, 0)?;
    counted.copy_data(&mut occurrences, n_occurrences);
    Ok(Some(Checkpoint { path, state, tensors, occurrences }))
}
