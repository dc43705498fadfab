//! Ranks as threads of one process, for tests of code that runs on several ranks.
//!
//! Every rank reads the tensors of all ranks and combines them in rank order, so results are
//! identical bits on every rank and in every run. If a rank panics or returns too early, the calls
//! of the other ranks fail.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use bireme_base::console::panic_text;
use tch::Tensor;

use super::call::CallArgs;
use super::{Call, Collective, CollectiveError, Reduce};

/// Runs `work` on `world_size` ranks, one thread each, and returns their results in rank order.
///
/// # Panics
/// If a rank panics. When all threads have ended, the first panic is resumed.
pub fn spawn<T: Send>(world_size: usize, work: impl Fn(&dyn Collective) -> T + Sync) -> Vec<T> {
    let exchange = Exchange::default();
    let outcomes: Vec<thread::Result<T>> = thread::scope(|scope| {
        let (exchange, work) = (&exchange, &work);
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                scope.spawn(move || {
                    let threads = Threads { rank, world_size, exchange };
                    let outcome = catch_unwind(AssertUnwindSafe(|| work(&threads)));
                    let reason = match &outcome {
                        Ok(_) => "returned before the others were done".to_owned(),
                        Err(panic) => {
                            let text =
                                panic_text(&**panic).unwrap_or("with a value that is not text");
                            format!("panicked: {text}")
                        }
                    };
                    exchange.leave(rank, reason);
                    outcome
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().and_then(|outcome| outcome)).collect()
    });
    // Later panics are mostly failed calls, which the first panic caused.
    let first = exchange.lock().departed.as_ref().map_or(0, |(rank, _)| *rank);
    let (mut values, mut panics) = (Vec::new(), Vec::new());
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Ok(value) => values.push(value),
            Err(panic) => panics.push((rank != first, panic)),
        }
    }
    match panics.into_iter().min_by_key(|(is_later, _)| *is_later) {
        Some((_, panic)) => resume_unwind(panic),
        None => values,
    }
}

/// Memory in which the threads of one [`spawn`] exchange tensors, one round per call.
#[derive(Default)]
struct Exchange {
    round: Mutex<Round>,
    changed: Condvar,
}

#[derive(Default)]
struct Round {
    /// By rank, from the ranks that have arrived: the description of the call, and the tensor.
    contributions: Vec<Option<(String, Tensor)>>,
    /// Number of ranks that have yet to read the contributions. Zero until all ranks have arrived.
    n_reading: usize,
    /// The first rank that ended, and the reason.
    departed: Option<(usize, String)>,
}

impl Exchange {
    // No code that can panic runs under the lock, so the value is valid even if it is poisoned.
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

    fn leave(&self, rank: usize, reason: String) {
        self.lock().departed.get_or_insert((rank, reason));
        self.changed.notify_all();
    }
}

/// One rank of [`spawn`].
struct Threads<'a> {
    rank: usize,
    world_size: usize,
    exchange: &'a Exchange,
}

impl Threads<'_> {
    /// *All ranks.* Returns the tensors of all ranks in rank order.
    fn gather_all(
        &self,
        call: Call,
        tensor: &Tensor,
        args: CallArgs,
    ) -> Result<Vec<Tensor>, CollectiveError> {
        let (description, local) = (call.description(tensor, args), call.snapshot(tensor)?);
        let exchange = self.exchange;
        // A fast rank may arrive for the next round while slow ranks still read this one.
        let mut round = exchange.wait(exchange.lock(), |round| round.n_reading > 0);
        round.contributions.resize_with(self.world_size, || None);
        round.contributions[self.rank] = Some((description.clone(), local));
        if round.contributions.iter().all(Option::is_some) {
            round.n_reading = self.world_size;
            exchange.changed.notify_all();
        }
        let mut round =
            exchange.wait(round, |round| round.n_reading == 0 && round.departed.is_none());
        // The round is complete if ranks are reading, even if one has departed since.
        if round.n_reading == 0 {
            let (rank, message) = round.departed.clone().unwrap_or_default();
            return Err(CollectiveError::Rank { rank, message: format!("rank {rank} {message}") });
        }
        let (descriptions, tensors): (Vec<String>, Vec<Tensor>) = round
            .contributions
            .iter()
            .flatten()
            .map(|(description, tensor)| (description.clone(), tensor.shallow_clone()))
            .unzip();
        round.n_reading -= 1;
        if round.n_reading == 0 {
            round.contributions.clear();
            exchange.changed.notify_all();
        }
        drop(round);
        call.check_descriptions(&description, descriptions.iter().map(String::as_str))?;
        Ok(tensors)
    }

    /// *All ranks.* Reduces the flat tensors of all ranks in rank order.
    fn combine(&self, call: Call, tensor: &Tensor, op: Reduce) -> Result<Tensor, CollectiveError> {
        let all = self.gather_all(call, tensor, CallArgs::Op(op))?;
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
        let all = self.gather_all(call, tensor, CallArgs::Root(root))?;
        call.copy(tensor, &all[root])
    }

    fn all_gather(&self, part: &Tensor, whole: &mut Tensor) -> Result<(), CollectiveError> {
        let call = Call::new("all_gather", self);
        call.check_parts(part, whole)?;
        let flat: Vec<Tensor> = self
            .gather_all(call, part, CallArgs::None)?
            .iter()
            .map(|part| part.view([-1]))
            .collect();
        let gathered = call.torch(|| Tensor::f_cat(&flat, 0))?;
        call.copy(whole, &gathered)
    }

    fn reduce_scatter(
        &self,
        whole: &Tensor,
        part: &mut Tensor,
        op: Reduce,
    ) -> Result<(), CollectiveError> {
        let call = Call::new("reduce_scatter", self);
        call.check_parts(part, whole)?;
        let n_elements = part.numel() as i64;
        let combined = self.combine(call, whole, op)?;
        let local =
            call.torch(|| combined.f_narrow(0, self.rank as i64 * n_elements, n_elements))?;
        call.copy(part, &local)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        let token = Tensor::from_slice(&[0_u8]);
        self.gather_all(Call::new("barrier", self), &token, CallArgs::NoTensor).map(drop)
    }

    /// Panics, because a rank must not end the test process. The calls of the other ranks then
    /// fail.
    fn abort(&self, code: i32) -> ! {
        panic!("rank {} aborted the job with code {code}", self.rank)
    }
}
