//! Steps of a rank, read and put together in the background while the one before computes.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use super::plan::{Shape, derive_seed, lanes_of_rank};
use super::{Batch, DataError, Features, Segment, SessionFile, Sessions, Window};

/// Steps that may wait ready: enough to even out a slow read, few enough to be nothing in memory.
const READY_STEPS: usize = 4;

/// Where a training day begins and what it consists of.
#[derive(Clone)]
pub struct DayPlan {
    /// The sessions.
    pub window: Window,
    /// The day.
    pub day: i64,
    /// Passes over it.
    pub n_epochs: usize,
    /// How steps are cut.
    pub shape: Shape,
    /// Seed of the run.
    pub seed: u64,
    /// At most so many steps, if given.
    pub max_steps: Option<usize>,
    /// Whether every micro-batch is a pass of its own, and not all of a rank's together one.
    pub pass_by_pass: bool,
}

impl DayPlan {
    /// Steps of one epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.shape.steps(self.window.n_sessions())
    }

    /// Steps of the day, the same on every rank.
    pub fn n_steps(&self) -> usize {
        let all = self.n_epochs * self.steps_per_epoch();
        self.max_steps.map_or(all, |max| all.min(max))
    }

    /// Sessions in the global batch of step `step` of the day.
    pub fn sessions_in_step(&self, step: usize) -> usize {
        self.shape.sessions_in_step(self.window.n_sessions(), step % self.steps_per_epoch())
    }
}

/// A rank's share of each step of one day: its micro-batches, in one pass or in one each.
pub struct Loader {
    steps: Receiver<Result<Vec<Batch>, DataError>>,
}

impl Loader {
    /// Starts reading the lanes that `rank` owns, for the steps of the day from `first_step` on.
    pub fn start(
        plan: &DayPlan,
        features: &Features,
        (rank, world_size): (usize, usize),
        first_step: usize,
    ) -> Self {
        let (ready, steps) = sync_channel(READY_STEPS);
        let (plan, features) = (plan.clone(), features.clone());
        thread::spawn(move || {
            let n_steps = plan.n_steps();
            let group_rows = plan.window.group_rows();
            let steps_per_epoch = plan.steps_per_epoch();
            let first_epoch = first_step.checked_div(steps_per_epoch).unwrap_or(0);
            let epochs = (first_epoch..plan.n_epochs).take_while(|epoch| epoch * steps_per_epoch < n_steps);
            for epoch in epochs {
                let place = (plan.seed, plan.day, epoch);
                let lanes = lanes_of_rank(&group_rows, plan.shape, place, (rank, world_size));
                let sessions: Result<Vec<Sessions>, _> =
                    lanes.iter().map(|lane| plan.window.read(&lane.spans)).collect();
                let sessions = match sessions {
                    Ok(sessions) => sessions,
                    // The receiver may be gone after an error of its own: then nobody is left to tell.
                    Err(error) => return drop(ready.send(Err(error))),
                };
                let orders: Vec<Vec<usize>> = lanes
                    .iter()
                    .zip(&sessions)
                    .map(|(lane, sessions)| lane.order(&sessions.lengths(), plan.shape.micro_batch))
                    .collect();
                let before = epoch * steps_per_epoch;
                for step in first_step.saturating_sub(before)..steps_per_epoch.min(n_steps - before) {
                    let at = |stream, place: &[u64]| {
                        let place = [&[plan.day as u64, epoch as u64], place].concat();
                        derive_seed(plan.seed, stream, &place)
                    };
                    let micro_batches =
                        lanes.iter().zip(&orders).zip(&sessions).map(|((lane, order), sessions)| {
                            let taken = plan.shape.micro_batch_rows(sessions.len(), step);
                            let seed = at("micro-batch", &[step as u64, lane.index as u64]);
                            let segment = Segment { seed, n_sessions: taken.len() };
                            (segment, order[taken].iter().map(|&row| (sessions, row)).collect::<Vec<_>>())
                        });
                    let pass = |rows: &[(&Sessions, usize)], segments| Batch {
                        session_seeds: rows
                            .iter()
                            .map(|(of, row)| of.place(*row))
                            .map(|(day, row)| at("session", &[day as u64, row]))
                            .collect(),
                        step_seed: at("step", &[step as u64]),
                        segments,
                        ..Batch::new(rows, &features)
                    };
                    let passes = if plan.pass_by_pass {
                        micro_batches.map(|(segment, rows)| pass(&rows, vec![segment])).collect()
                    } else {
                        let (segments, rows): (Vec<_>, Vec<_>) = micro_batches.unzip();
                        vec![pass(&rows.concat(), segments)]
                    };
                    if ready.send(Ok(passes)).is_err() {
                        return;
                    }
                }
            }
        });
        Self { steps }
    }
}

impl Iterator for Loader {
    type Item = Result<Vec<Batch>, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.steps.recv().ok()
    }
}

/// The blocks of `block` consecutive sessions of a file that `rank` evaluates.
///
/// Blocks are cut without regard to the number of ranks, so that a session is scored in the same company, and
/// by the same arithmetic, whoever scores it. Each rank takes consecutive blocks and reads its share only.
///
/// # Errors
/// See [`SessionFile::read`].
pub fn evaluation_batches(
    file: &SessionFile,
    features: &Features,
    block: usize,
    (rank, world_size): (usize, usize),
) -> Result<impl ExactSizeIterator<Item = Batch>, DataError> {
    let n_blocks = file.n_sessions().div_ceil(block);
    let first = rank * n_blocks / world_size * block;
    let end = ((rank + 1) * n_blocks / world_size * block).min(file.n_sessions());
    let sessions = file.read(&file.spans(first..end))?;
    let features = features.clone();
    Ok((0..sessions.len()).step_by(block).map(move |first| {
        let rows: Vec<_> = (first..(first + block).min(sessions.len())).map(|row| (&sessions, row)).collect();
        Batch::new(&rows, &features)
    }))
}
