//! Checkpoints written while training goes on.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

use super::{CheckpointError, Checkpoints, State, Tensors};
use crate::collective::Root;

/// Writes checkpoints from copies, one at a time. Dropping it waits for the one being written.
pub struct Saver {
    to_writer: Option<SyncSender<Copied>>,
    writer: Option<JoinHandle<Result<(), CheckpointError>>>,
    last: Instant,
}

struct Copied {
    state: State,
    tensors: Tensors,
    occurrences: Vec<i64>,
}

impl Saver {
    /// For the checkpoints of a run.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn new(root: Root, checkpoints: Checkpoints) -> Result<Self, CheckpointError> {
        // No room: a state is taken when the writer is free, so that there are two of them at most.
        let (to_writer, states) = sync_channel::<Copied>(0);
        let write = move || {
            states.into_iter().try_for_each(|Copied { state, tensors, occurrences }| {
                checkpoints.write(root, &state, &tensors, &occurrences)
            })
        };
        let writer = thread::Builder::new().name("checkpoint-writer".to_owned()).spawn(write);
        let writer = writer.map_err(|error| CheckpointError::Background(error.to_string()))?;
        Ok(Self { to_writer: Some(to_writer), writer: Some(writer), last: Instant::now() })
    }

    /// How long ago the last checkpoint was begun, or this was made.
    pub fn since_last(&self) -> Duration {
        self.last.elapsed()
    }

    /// One has been written in another way.
    pub fn saved(&mut self) {
        self.last = Instant::now();
    }

    /// Begins a checkpoint of what is given, as it is now: waits for the one before, and copies.
    ///
    /// # Errors
    /// Those of the one before.
    pub fn save(
        &mut self,
        state: State,
        tensors: &Tensors,
        occurrences: &[i64],
    ) -> Result<(), CheckpointError> {
        let copy = |named: &[(String, Tensor)]| {
            let copied = named.iter().map(|(name, tensor)| {
                let here = tensor.detach().to_device_(Device::Cpu, tensor.kind(), false, true);
                (name.clone(), here)
            });
            copied.collect()
        };
        let tensors = Tensors { weights: copy(&tensors.weights), optimizer: copy(&tensors.optimizer) };
        let copied = Copied { state, tensors, occurrences: occurrences.to_vec() };
        let sent = self.to_writer.as_ref().is_some_and(|to_writer| to_writer.send(copied).is_ok());
        if !sent {
            self.finish()?;
        }
        self.saved();
        Ok(())
    }

    /// Whether the writer has met an error, which [`Saver::finish`] tells.
    pub fn has_failed(&self) -> bool {
        self.writer.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Waits until all is written.
    ///
    /// # Errors
    /// What went wrong in the background.
    pub fn finish(&mut self) -> Result<(), CheckpointError> {
        self.to_writer = None;
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(written)) => written,
            // The panic's text was told by the hook.
            Some(Err(_)) => {
                Err(CheckpointError::Background("the thread that writes them panicked".to_owned()))
            }
            None => Ok(()),
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // Whoever drops it early has an error of its own to tell.
        let _ = self.finish();
    }
}
