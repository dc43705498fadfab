//! Distributes a checkpoint that rank 0 has read, so that other ranks need no access to the run
//! directory.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::tensor_file::scatter_rows;
use super::{Checkpoint, CheckpointError, State, Tensors};
use crate::collective::{Collective, CollectiveError};
use crate::device::memory::return_freed_memory;
use crate::model::ItemTable;

/// A checkpoint as all ranks see it. Tensors are sent one at a time as an iterator yields them. Of
/// a sharded item table each rank receives only its own rows, so that no rank holds a whole table.
pub struct SharedCheckpoint<'a> {
    header: Header,
    /// The tensors, on rank 0.
    tensors: Option<Tensors>,
    occurrences: Vec<i64>,
    item_table: ItemTable<'a>,
    collective: &'a dyn Collective,
}

/// The part of a checkpoint that rank 0 sends before the tensors.
#[derive(Serialize, Deserialize)]
struct Header {
    path: PathBuf,
    state: State,
    weights: Vec<TensorSpec>,
    optimizer: Vec<TensorSpec>,
    n_occurrences: usize,
}

/// Name, type and size of a tensor.
#[derive(Serialize, Deserialize)]
struct TensorSpec {
    name: String,
    /// Whether it is i64; otherwise it is f32.
    is_i64: bool,
    size: Vec<i64>,
}

impl TensorSpec {
    fn of((name, tensor): &(String, Tensor)) -> Self {
        Self { name: name.clone(), is_i64: tensor.kind() == Kind::Int64, size: tensor.size() }
    }
}

impl<'a> SharedCheckpoint<'a> {
    /// *All ranks.* Sends everything but the tensors of rank 0's checkpoint to all ranks; returns
    /// `None` if rank 0 has none. `item_table`: the rows that this rank receives.
    ///
    /// # Errors
    /// A collective call fails.
    pub fn new(
        on_root: Option<Checkpoint>,
        item_table: ItemTable<'a>,
        collective: &'a dyn Collective,
    ) -> Result<Option<Self>, CollectiveError> {
        let header =
            on_root.as_ref().map(|Checkpoint { path, state, tensors, occurrences }| Header {
                path: path.clone(),
                state: state.clone(),
                weights: tensors.weights.iter().map(TensorSpec::of).collect(),
                optimizer: tensors.optimizer.iter().map(TensorSpec::of).collect(),
                n_occurrences: occurrences.len(),
            });
        let header = serde_json::to_vec(&header).expect("a state is JSON");
        let header = collective.broadcast_bytes(header, 0)?;
        let header: Option<Header> =
            serde_json::from_slice(&header).expect("rank 0 has written it");
        let Some(header) = header else { return Ok(None) };
        let (tensors, mut occurrences) = match on_root {
            Some(Checkpoint { tensors, occurrences, .. }) => (Some(tensors), occurrences),
            None => (None, vec![0; header.n_occurrences]),
        };
        let mut counts = Tensor::from_slice(&occurrences);
        collective.broadcast(&mut counts, 0)?;
        counts.copy_data(&mut occurrences, header.n_occurrences);
        Ok(Some(Self { header, tensors, occurrences, item_table, collective }))
    }

    /// Folder of the checkpoint on rank 0.
    pub fn path(&self) -> &Path {
        &self.header.path
    }

    pub fn state(&self) -> &State {
        &self.header.state
    }

    /// Occurrences of each item in training so far, `[V]`.
    pub fn occurrences(&self) -> &[i64] {
        &self.occurrences
    }

    /// The error of a checkpoint of another model or of other data.
    pub fn mismatch(&self, problem: String) -> CheckpointError {
        CheckpointError::Mismatch { path: self.header.path.clone(), problem }
    }

    /// Names of the tensors that [`SharedCheckpoint::weights`] yields.
    pub fn weight_names(&self) -> impl Iterator<Item = &str> + Clone {
        self.header.weights.iter().map(|spec| spec.name.as_str())
    }

    /// Names of the tensors that [`SharedCheckpoint::optimizer`] yields.
    pub fn optimizer_names(&self) -> impl Iterator<Item = &str> + Clone {
        self.header.optimizer.iter().map(|spec| spec.name.as_str())
    }

    /// *All ranks*, with the same number of calls of `next`. Receives the weights.
    pub fn weights(&self) -> impl Iterator<Item = Result<(&str, Tensor), CollectiveError>> {
        self.receive(&self.header.weights, self.tensors.as_ref().map(|tensors| &tensors.weights))
    }

    /// *All ranks*, with the same number of calls of `next`. Receives the state of the optimizer.
    pub fn optimizer(&self) -> impl Iterator<Item = Result<(&str, Tensor), CollectiveError>> {
        self.receive(
            &self.header.optimizer,
            self.tensors.as_ref().map(|tensors| &tensors.optimizer),
        )
    }

    fn receive<'b>(
        &'b self,
        specs: &'b [TensorSpec],
        on_root: Option<&'b Vec<(String, Tensor)>>,
    ) -> impl Iterator<Item = Result<(&'b str, Tensor), CollectiveError>> {
        specs.iter().enumerate().map(move |(number, TensorSpec { name, is_i64, size })| {
            let kind = if *is_i64 { Kind::Int64 } else { Kind::Float };
            let on_root = on_root.map(|tensors| tensors[number].1.contiguous());
            let is_table = ItemTable::is_item_table(name);
            if is_table {
                // Return the memory of the previous table to the system before this one takes as
                // much.
                return_freed_memory();
            }
            if let Some(ranks) = self.item_table.ranks().filter(|_| is_table) {
                let local = scatter_rows(on_root.as_ref(), size, kind, &self.item_table, ranks)?;
                return Ok((name.as_str(), local));
            }
            let mut tensor = on_root.unwrap_or_else(|| Tensor::empty(size, (kind, Device::Cpu)));
            self.collective.broadcast(&mut tensor, 0)?;
            Ok((name.as_str(), tensor))
        })
    }
}
