//! A checkpoint that rank 0 has read, as every rank sees it: only rank 0 needs to see the run directory.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::tensor_file::deal;
use super::{Checkpoint, CheckpointError, State, Tensors};
use crate::collective::{Collective, CollectiveError};
use crate::device::host::return_freed_memory;
use crate::model::ItemTable;

/// What all ranks know of it. Tensors come over one by one when they are asked for, of tables that are shared out only a rank's own
/// rows, so that none is whole in the memory of a rank that does not keep it.
pub struct SharedCheckpoint<'a> {
    head: Head,
    /// What rank 0 has.
    mine: Option<Tensors>,
    occurrences: Vec<i64>,
    item_table: ItemTable<'a>,
    collective: &'a dyn Collective,
}

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

impl Shape {
    fn of((name, tensor): &(String, Tensor)) -> Self {
        Self { name: name.clone(), is_count: tensor.kind() == Kind::Int64, size: tensor.size() }
    }
}

impl<'a> SharedCheckpoint<'a> {
    /// *All ranks.* What rank 0 brings, of which a rank wants these rows of the tables of items.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn new(
        mine: Option<Checkpoint>,
        item_table: ItemTable<'a>,
        collective: &'a dyn Collective,
    ) -> Result<Option<Self>, CollectiveError> {
        let head = mine.as_ref().map(|Checkpoint { path, state, tensors, occurrences }| Head {
            path: path.clone(),
            state: state.clone(),
            weights: tensors.weights.iter().map(Shape::of).collect(),
            optimizer: tensors.optimizer.iter().map(Shape::of).collect(),
            n_occurrences: occurrences.len(),
        });
        let head = serde_json::to_vec(&head).expect("a state is JSON");
        let head = collective.broadcast_bytes(head, 0)?;
        let head: Option<Head> = serde_json::from_slice(&head).expect("what rank 0 has just written");
        let Some(head) = head else { return Ok(None) };
        let (mine, mut occurrences) = match mine {
            Some(Checkpoint { tensors, occurrences, .. }) => (Some(tensors), occurrences),
            None => (None, vec![0; head.n_occurrences]),
        };
        let mut counted = Tensor::from_slice(&occurrences);
        collective.broadcast(&mut counted, 0)?;
        counted.copy_data(&mut occurrences, head.n_occurrences);
        Ok(Some(Self { head, mine, occurrences, item_table, collective }))
    }

    /// Its folder, where rank 0 sees it.
    pub fn path(&self) -> &Path {
        &self.head.path
    }

    /// What is not a tensor.
    pub fn state(&self) -> &State {
        &self.head.state
    }

    /// How often each item occurred in training so far, `[V]`.
    pub fn occurrences(&self) -> &[i64] {
        &self.occurrences
    }

    /// Says that it belongs to another model or other data.
    pub fn mismatch(&self, problem: String) -> CheckpointError {
        CheckpointError::Mismatch { path: self.head.path.clone(), problem }
    }

    /// Names of what [`SharedCheckpoint::weights`] gives.
    pub fn weight_names(&self) -> impl Iterator<Item = &str> + Clone {
        self.head.weights.iter().map(|shape| shape.name.as_str())
    }

    /// Names of what [`SharedCheckpoint::optimizer`] gives.
    pub fn optimizer_names(&self) -> impl Iterator<Item = &str> + Clone {
        self.head.optimizer.iter().map(|shape| shape.name.as_str())
    }

    /// *All ranks*, each as far as the others. What the model predicts with.
    pub fn weights(&self) -> impl Iterator<Item = Result<(&str, Tensor), CollectiveError>> {
        self.each(&self.head.weights, self.mine.as_ref().map(|mine| &mine.weights))
    }

    /// *All ranks*, each as far as the others. What only further training needs.
    pub fn optimizer(&self) -> impl Iterator<Item = Result<(&str, Tensor), CollectiveError>> {
        self.each(&self.head.optimizer, self.mine.as_ref().map(|mine| &mine.optimizer))
    }

    fn each<'b>(
        &'b self,
        shapes: &'b [Shape],
        mine: Option<&'b Vec<(String, Tensor)>>,
    ) -> impl Iterator<Item = Result<(&'b str, Tensor), CollectiveError>> {
        shapes.iter().enumerate().map(move |(number, Shape { name, is_count, size })| {
            let kind = if *is_count { Kind::Int64 } else { Kind::Float };
            let mine = mine.map(|mine| mine[number].1.contiguous());
            let is_table = ItemTable::is_item_table(name);
            if is_table {
                // What the table before took goes back first.
                return_freed_memory();
            }
            if let Some(ranks) = self.item_table.ranks().filter(|_| is_table) {
                return Ok((name.as_str(), deal(mine.as_ref(), (size, kind), &self.item_table, ranks)?));
            }
            let mut tensor = mine.unwrap_or_else(|| Tensor::empty(size, (kind, Device::Cpu)));
            self.collective.broadcast(&mut tensor, 0)?;
            Ok((name.as_str(), tensor))
        })
    }
}
