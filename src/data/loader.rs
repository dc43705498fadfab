//! Reads the batches of a rank in the background, a few steps ahead of the training.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle, ScopedJoinHandle};

use bireme_base::console::panic_text;

use super::plan::{EpochKey, StepShape, derive_seed, streams_of_rank};
use super::{Batch, DataError, Features, Segment, SessionFile, Sessions, Window};
use crate::config::{EvaluateConfig, SessionOrder};

/// Number of steps that are read ahead: enough to hide a slow read, few enough to need little
/// memory.
const READY_STEPS: usize = 4;

/// The sessions and steps of a training day.
#[derive(Clone)]
pub struct DayPlan {
    pub window: Window,
    pub day: i64,
    pub n_epochs: usize,
    pub shape: StepShape,
    /// Seed of the run.
    pub seed: u64,
    pub order: SessionOrder,
    /// Largest number of steps of the day.
    pub max_steps: Option<usize>,
    /// Whether each micro-batch is a separate batch; otherwise all micro-batches of a rank are one
    /// batch.
    pub one_batch_each: bool,
    /// Whether the next epoch is read beside the current one, in twice the memory.
    pub reads_ahead: bool,
}

impl DayPlan {
    pub fn steps_per_epoch(&self) -> usize {
        self.shape.steps(self.window.n_sessions())
    }

    /// Number of steps of the day, the same on every rank.
    pub fn n_steps(&self) -> usize {
        let all = self.n_epochs * self.steps_per_epoch();
        self.max_steps.map_or(all, |max| all.min(max))
    }

    /// Number of sessions in the global batch of step `step` of the day.
    pub fn sessions_in_step(&self, step: usize) -> usize {
        self.shape.sessions_in_step(self.window.n_sessions(), step % self.steps_per_epoch())
    }
}

/// What the thread of a [`Loader`] has read.
pub enum Read<'a> {
    /// All steps of an epoch before they are packed: lengths, seeds and days, without columns. The
    /// first may be done already.
    Epoch(&'a mut dyn Iterator<Item = Vec<Batch>>),
    /// This rank's micro-batches of the next step.
    Step(Vec<Batch>),
}

/// Reads this rank's micro-batches of each step of a day on a background thread, and prepares them
/// there.
///
/// The iterator ends after the last step. If the thread panics, the last item is an error with the
/// panic's text.
pub struct Loader<T = Vec<Batch>> {
    /// `None` while the loader is dropped.
    steps: Option<Receiver<Result<T, DataError>>>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts reading the steps of the day from `first_step` on.
    pub fn start(
        plan: &DayPlan,
        features: &Features,
        ranks: (usize, usize),
        first_step: usize,
    ) -> Self {
        Self::preparing(plan, features, ranks, first_step, |loaded| match loaded {
            Read::Epoch(_) => None,
            Read::Step(micro_batches) => Some(micro_batches),
        })
    }
}

impl<T: Send + 'static> Loader<T> {
    /// Starts reading the steps of the day from `first_step` on. The items are what `prepare`
    /// returns for epochs and steps, called in order on the loader's thread.
    pub fn preparing(
        plan: &DayPlan,
        features: &Features,
        (rank, world_size): (usize, usize),
        first_step: usize,
        mut prepare: impl FnMut(Read<'_>) -> Option<T> + Send + 'static,
    ) -> Self {
        let (ready, steps) = sync_channel(READY_STEPS);
        let reader =
            StepReader { plan: plan.clone(), features: features.clone(), rank, world_size };
        let thread = thread::spawn(move || reader.send_from(first_step, &ready, &mut prepare));
        Self { steps: Some(steps), thread: Some(thread) }
    }
}

impl<T> Iterator for Loader<T> {
    type Item = Result<T, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Ok(step) = self.steps.as_ref()?.recv() {
            return Some(step);
        }
        let panic = self.thread.take()?.join().err()?;
        Some(Err(DataError::LoaderPanicked(panic_text(&*panic).unwrap_or("no message").to_owned())))
    }
}

impl<T> Drop for Loader<T> {
    fn drop(&mut self) {
        // Closing the channel ends the thread at its next send.
        self.steps = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Reads and packs the steps on the thread of a [`Loader`].
struct StepReader {
    plan: DayPlan,
    features: Features,
    rank: usize,
    world_size: usize,
}

/// Returns what a thread returned, and panics if the thread did.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The sessions of one stream in one epoch.
struct EpochStream {
    index: usize,
    sessions: Sessions,
    /// Indices of the sessions in training order.
    order: Vec<usize>,
}

impl StepReader {
    /// Sends the steps of the day from `first_step` on, until the receiver is dropped or a file
    /// cannot be read.
    fn send_from<T>(
        &self,
        first_step: usize,
        ready: &SyncSender<Result<T, DataError>>,
        prepare: &mut impl FnMut(Read<'_>) -> Option<T>,
    ) {
        let n_steps = self.plan.n_steps();
        let steps_per_epoch = self.plan.steps_per_epoch();
        let first_epoch = first_step.checked_div(steps_per_epoch).unwrap_or(0);
        let n_epochs = self.plan.n_epochs.min(n_steps.div_ceil(steps_per_epoch.max(1)));
        thread::scope(|scope| {
            let mut next = None;
            for epoch in first_epoch..n_epochs {
                let read = match next.take() {
                    Some(reading) => joined(reading),
                    None => self.read_epoch(epoch),
                };
                let streams = match read {
                    Ok(streams) => streams,
                    Err(error) => return drop(ready.send(Err(error))),
                };
                if self.plan.reads_ahead && epoch + 1 < n_epochs {
                    next = Some(scope.spawn(move || self.read_epoch(epoch + 1)));
                }
                let n_before = epoch * steps_per_epoch;
                let steps =
                    first_step.saturating_sub(n_before)..steps_per_epoch.min(n_steps - n_before);
                if !self.send_epoch(&streams, epoch, steps, ready, prepare) {
                    return;
                }
            }
        });
    }

    /// Sends steps of an epoch; returns whether the receiver took them.
    fn send_epoch<T>(
        &self,
        streams: &[EpochStream],
        epoch: usize,
        steps: Range<usize>,
        ready: &SyncSender<Result<T, DataError>>,
        prepare: &mut impl FnMut(Read<'_>) -> Option<T>,
    ) -> bool {
        let all_steps = 0..self.plan.steps_per_epoch();
        let mut outlines = all_steps.map(|step| self.micro_batches(streams, epoch, step, false));
        let epoch_read = prepare(Read::Epoch(&mut outlines));
        let prepared =
            steps.map(|step| prepare(Read::Step(self.micro_batches(streams, epoch, step, true))));
        std::iter::once(epoch_read)
            .chain(prepared)
            .flatten()
            .all(|item| ready.send(Ok(item)).is_ok())
    }

    fn read_epoch(&self, epoch: usize) -> Result<Vec<EpochStream>, DataError> {
        let DayPlan { window, shape, seed, order, day, .. } = &self.plan;
        let key = EpochKey { seed: *seed, day: *day, epoch, order: *order };
        let streams =
            streams_of_rank(&window.group_rows(), *shape, key, self.rank, self.world_size);
        let read = streams.iter().map(|stream| {
            let sessions = window.read(&stream.spans)?;
            let order = stream.order(&sessions.lengths(), shape.micro_batch);
            Ok(EpochStream { index: stream.index, sessions, order })
        });
        read.collect()
    }

    /// Packs this rank's micro-batches of step `step` of an epoch into one batch, or into one batch
    /// each; only their outlines if not `has_columns`.
    fn micro_batches(
        &self,
        streams: &[EpochStream],
        epoch: usize,
        step: usize,
        has_columns: bool,
    ) -> Vec<Batch> {
        let plan = &self.plan;
        let derive = |purpose, position: &[u64]| {
            let position = [&[plan.day as u64, epoch as u64], position].concat();
            derive_seed(plan.seed, purpose, &position)
        };
        let step_seed = derive("step", &[step as u64]);
        let batch = |rows: &[(&Sessions, usize)], segments| Batch {
            session_seeds: rows
                .iter()
                .map(|(sessions, row)| sessions.day_row(*row))
                .map(|(day, row)| derive("session", &[day as u64, row]))
                .collect(),
            step_seed,
            segments,
            ..if has_columns { Batch::new(rows, &self.features) } else { Batch::outline(rows) }
        };
        let micro_batches = streams.iter().map(|EpochStream { index, sessions, order }| {
            let taken = plan.shape.micro_batch_rows(sessions.len(), step);
            let seed = derive("micro-batch", &[step as u64, *index as u64]);
            let segment = Segment { seed, n_sessions: taken.len() };
            (segment, order[taken].iter().map(|&row| (sessions, row)).collect::<Vec<_>>())
        });
        if !plan.one_batch_each {
            let (segments, rows): (Vec<_>, Vec<_>) = micro_batches.unzip();
            return vec![batch(&rows.concat(), segments)];
        }
        let mut batches: Vec<Batch> =
            micro_batches.map(|(segment, rows)| batch(&rows, vec![segment])).collect();
        // A backward pass may exchange rows with all ranks, so a rank with fewer micro-batches than
        // others gets empty ones.
        batches.resize_with(plan.shape.n_streams.div_ceil(self.world_size), || Batch {
            step_seed,
            ..Batch::new(&[], &self.features)
        });
        batches
    }
}

/// Packs the cases of a file that `rank` evaluates into batches: see [`SessionFile::read_cases`].
///
/// The blocks do not depend on the number of ranks, so that a case is always scored beside the same
/// cases and by the same arithmetic. Each rank reads only its own consecutive blocks of sessions.
///
/// # Errors
/// See [`SessionFile::read`].
pub fn evaluation_batches(
    file: &SessionFile,
    features: &Features,
    config: &EvaluateConfig,
    (rank, world_size): (usize, usize),
) -> Result<impl ExactSizeIterator<Item = Batch>, DataError> {
    let block = config.block;
    let n_blocks = file.n_sessions().div_ceil(block);
    let first = rank * n_blocks / world_size * block;
    let end = ((rank + 1) * n_blocks / world_size * block).min(file.n_sessions());
    let features = features.clone();
    Ok(file.read_cases(first..end, config)?.map(move |cases| {
        let rows: Vec<_> = (0..cases.len()).map(|row| (&cases, row)).collect();
        Batch::new(&rows, &features)
    }))
}
