//! Writes checkpoints in the background of the training.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

use super::{CheckpointError, Checkpoints, State, Tensors};
use crate::collective::Root;

/// Writes copies of the state on a background thread, one at a time. Dropping the saver waits for
/// the checkpoint that is being written.
pub struct Saver {
    to_writer: Option<SyncSender<Snapshot>>,
    writer: Option<JoinHandle<Result<(), CheckpointError>>>,
    /// Start of the last checkpoint, or of the saver.
    last: Instant,
}

/// A copy of everything that a checkpoint holds.
struct Snapshot {
    state: State,
    tensors: Tensors,
    occurrences: Vec<i64>,
}

impl Saver {
    /// Starts the writer of the checkpoints of a run.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn new(root: Root, checkpoints: Checkpoints) -> Result<Self, CheckpointError> {
        // The channel has no buffer, so that at most two copies exist: the one being written and
        // the next one.
        let (to_writer, snapshots) = sync_channel::<Snapshot>(0);
        let write = move || {
            snapshots.into_iter().try_for_each(|Snapshot { state, tensors, occurrences }| {
                checkpoints.write(root, &state, &tensors, &occurrences)
            })
        };
        let writer = thread::Builder::new().name("checkpoint-writer".to_owned()).spawn(write);
        let writer = writer.map_err(|error| CheckpointError::Background(error.to_string()))?;
        Ok(Self { to_writer: Some(to_writer), writer: Some(writer), last: Instant::now() })
    }

    /// Time since the last checkpoint was started, or since the saver was made.
    pub fn since_last(&self) -> Duration {
        self.last.elapsed()
    }

    /// Records that a checkpoint was written without this saver.
    pub fn reset_timer(&mut self) {
        self.last = Instant::now();
    }

    /// Copies the state, waits for the previous checkpoint, and starts writing this one.
    ///
    /// # Errors
    /// The previous checkpoint could not be written.
    pub fn save(
        &mut self,
        state: State,
        tensors: &Tensors,
        occurrences: &[i64],
    ) -> Result<(), CheckpointError> {
        let copy = |named: &[(String, Tensor)]| {
            let copied = named.iter().map(|(name, tensor)| {
                let on_cpu = tensor.detach().to_device_(Device::Cpu, tensor.kind(), false, true);
                (name.clone(), on_cpu)
            });
            copied.collect()
        };
        let tensors =
            Tensors { weights: copy(&tensors.weights), optimizer: copy(&tensors.optimizer) };
        let snapshot = Snapshot { state, tensors, occurrences: occurrences.to_vec() };
        let is_sent =
            self.to_writer.as_ref().is_some_and(|to_writer| to_writer.send(snapshot).is_ok());
        if !is_sent {
            self.finish()?;
        }
        self.reset_timer();
        Ok(())
    }

    /// Whether the writer has failed; [`Saver::finish`] returns the error.
    pub fn has_failed(&self) -> bool {
        self.writer.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Waits until all checkpoints are written.
    ///
    /// # Errors
    /// A checkpoint could not be written.
    pub fn finish(&mut self) -> Result<(), CheckpointError> {
        self.to_writer = None;
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(written)) => written,
            // The panic hook has printed the panic's text.
            Some(Err(_)) => {
                Err(CheckpointError::Background("the thread that writes them panicked".to_owned()))
            }
            None => Ok(()),
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // A saver is only dropped without `finish` after another error, which is the one to report.
        let _ = self.finish();
    }
}
