//! Ranks as threads of one process: the lowest rung on which code for many ranks can be tested.
//!
//! Every rank sees every other's tensor and combines them in rank order, so results are the same bits on every
//! rank and in every run. A rank that leaves too early, by panic or by return, fails the others' calls.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use bireme_base::console::panic_text;
use tch::Tensor;

use super::call::How;
use super::{Call, Collective, CollectiveError, Reduce};

/// Runs `work` on `world_size` ranks, a thread each, and returns what they returned in rank order.
///
/// # Panics
/// Goes on with the panic of the first rank that panicked, when all have ended.
pub fn spawn<T: Send>(world_size: usize, work: impl Fn(&dyn Collective) -> T + Sync) -> Vec<T> {
    let meeting = Meeting::default();
    let outcomes: Vec<thread::Result<T>> = thread::scope(|scope| {
        let (meeting, work) = (&meeting, &work);
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                scope.spawn(move || {
                    let threads = Threads { rank, world_size, meeting };
                    let outcome = catch_unwind(AssertUnwindSafe(|| work(&threads)));
                    let how = match &outcome {
                        Ok(_) => "returned before the others were done".to_owned(),
                        Err(panic) => {
                            let text = panic_text(&**panic).unwrap_or("with a value that is no text");
                            format!("panicked: {text}")
                        }
                    };
                    meeting.leave(rank, how);
                    outcome
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().and_then(|outcome| outcome)).collect()
    });
    // Later panics are mostly the others' complaints about the first.
    let first = meeting.lock().left.as_ref().map_or(0, |(rank, _)| *rank);
    let (mut values, mut panics) = (Vec::new(), Vec::new());
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Ok(value) => values.push(value),
            Err(panic) => panics.push((rank != first, panic)),
        }
    }
    match panics.into_iter().min_by_key(|(later, _)| *later) {
        Some((_, panic)) => resume_unwind(panic),
        None => values,
    }
}

/// Where the threads of one [`spawn`] exchange tensors, one round per call.
#[derive(Default)]
struct Meeting {
    round: Mutex<Round>,
    changed: Condvar,
}

#[derive(Default)]
struct Round {
    /// What the ranks that have come brought: the call in words and the tensor, by rank.
    brought: Vec<Option<(String, Tensor)>>,
    /// Ranks that still have to take the others' tensors, once all have come.
    n_taking: usize,
    /// The first rank that left for good while others could still come, and how.
    left: Option<(usize, String)>,
}

impl Meeting {
    // No code that can panic runs under the lock, so a poisoned one is whole.
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &'a self,
        round: MutexGuard<'a, Round>,
        busy: impl FnMut(&mut Round) -> bool,
    ) -> MutexGuard<'a, Round> {
        self.changed.wait_while(round, busy).unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, rank: usize, how: String) {
        self.lock().left.get_or_insert((rank, how));
        self.changed.notify_all();
    }
}

/// One rank of [`spawn`].
struct Threads<'a> {
    rank: usize,
    world_size: usize,
    meeting: &'a Meeting,
}

impl Threads<'_> {
    /// *All ranks.* The tensors of all ranks in rank order.
    fn exchange(&self, call: Call, tensor: &Tensor, how: How) -> Result<Vec<Tensor>, CollectiveError> {
        let (words, mine) = (call.words(tensor, how), call.snapshot(tensor)?);
        let meeting = self.meeting;
        // A fast rank waits until the slow ones have taken what the last round brought.
        let mut round = meeting.wait(meeting.lock(), |round| round.n_taking > 0);
        round.brought.resize_with(self.world_size, || None);
        round.brought[self.rank] = Some((words.clone(), mine));
        if round.brought.iter().all(Option::is_some) {
            round.n_taking = self.world_size;
            meeting.changed.notify_all();
        }
        let mut round = meeting.wait(round, |round| round.n_taking == 0 && round.left.is_none());
        if round.n_taking == 0 {
            let (rank, message) = round.left.clone().unwrap_or_default();
            return Err(CollectiveError::Rank { rank, message: format!("rank {rank} {message}") });
        }
        let taken =
            round.brought.iter().flatten().map(|(words, tensor)| (words.clone(), tensor.shallow_clone()));
        let (all_words, tensors): (Vec<String>, Vec<Tensor>) = taken.unzip();
        round.n_taking -= 1;
        if round.n_taking == 0 {
            round.brought.clear();
            meeting.changed.notify_all();
        }
        drop(round);
        call.check_words(&words, all_words.iter().map(String::as_str))?;
        Ok(tensors)
    }

    /// *All ranks.* The flat tensors of all ranks, combined in rank order.
    fn combine(&self, call: Call, tensor: &Tensor, op: Reduce) -> Result<Tensor, CollectiveError> {
        let all = self.exchange(call, tensor, How::Reduce(op))?;
        call.torch(|| {
            let mut combined = all[0].f_view([-1])?;
            for other in &all[1..] {
                let other = other.f_view([-1])?;
                combined = match op {
                    Reduce::Sum => combined.f_add(&other)?,
                    Reduce::Min => combined.f_minimum(&other)?,
                    Reduce::Max => combined.f_maximum(&other)?,
                };
            }
            Ok(combined)
        })
    }
}

impl Collective for Threads<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn local_rank(&self) -> usize {
        self.rank
    }

    fn local_size(&self) -> usize {
        self.world_size
    }

    fn backend(&self) -> &'static str {
        "threads"
    }

    fn all_reduce(&self, tensor: &mut Tensor, op: Reduce) -> Result<(), CollectiveError> {
        let call = Call::new("all_reduce", self);
        call.check(tensor)?;
        let combined = self.combine(call, tensor, op)?;
        call.copy(tensor, &combined)
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError> {
        let call = Call::new("broadcast", self);
        call.check_root(tensor, root)?;
        let all = self.exchange(call, tensor, How::From(root))?;
        call.copy(tensor, &all[root])
    }

    fn all_gather(&self, part: &Tensor, whole: &mut Tensor) -> Result<(), CollectiveError> {
        let call = Call::new("all_gather", self);
        call.check_parts(part, whole)?;
        let flat: Vec<Tensor> =
            self.exchange(call, part, How::Plain)?.iter().map(|part| part.view([-1])).collect();
        let gathered = call.torch(|| Tensor::f_cat(&flat, 0))?;
        call.copy(whole, &gathered)
    }

    fn reduce_scatter(&self, whole: &Tensor, part: &mut Tensor, op: Reduce) -> Result<(), CollectiveError> {
        let call = Call::new("reduce_scatter", self);
        call.check_parts(part, whole)?;
        let n_elements = part.numel() as i64;
        let combined = self.combine(call, whole, op)?;
        let mine = call.torch(|| combined.f_narrow(0, self.rank as i64 * n_elements, n_elements))?;
        call.copy(part, &mine)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        let token = Tensor::from_slice(&[0_u8]);
        self.exchange(Call::new("barrier", self), &token, How::Barrier).map(drop)
    }

    /// Threads cannot end the process of the test: a panic ends this rank, and the others' calls fail.
    fn abort(&self, code: i32) -> ! {
        panic!("rank {} aborted the job with code {code}", self.rank)
    }
}
