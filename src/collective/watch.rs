//! A clock on the calls of a rank: when one lasts too long, it says which rank is missing, what was called last, and ends
//! the job.
//!
//! A rank that hangs, or is stopped, takes part in nothing, and the others would wait for it for ever.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bireme_base::console;

/// Calls that are remembered.
const N_REMEMBERED: usize = 16;

/// How often the clock looks.
const TICK: Duration = Duration::from_millis(100);

/// How much longer than rank 0, which knows who is missing, the others wait. Rank 0 ends the job later still, so that all
/// have told what they know.
const DEFERENCE: Duration = Duration::from_secs(1);

/// How often the limit the first step may take: files are opened, memory is taken, kernels are chosen.
const FIRST_STEP: u32 = 3;

/// Limit until the configuration has set one.
const AT_FIRST: Duration = Duration::from_secs(600);

/// The calls of this rank, and how long they may last.
#[derive(Clone)]
pub struct Watch(Arc<Shared>);

struct Shared {
    rank: usize,
    /// The host of each rank.
    hosts: Vec<String>,
    log: Mutex<Log>,
}

struct Log {
    calls: VecDeque<Call>,
    n_calls: u64,
    limit: Duration,
    /// Day and step (from 1) that calls belong to now.
    place: Option<(i64, usize)>,
    n_steps: usize,
    /// On rank 0: who has not come to the call.
    missing: Vec<usize>,
    times: Times,
    is_timing: bool,
}

/// What calls took, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    /// Until all ranks had come.
    pub waiting: Duration,
    /// After that.
    pub moving: Duration,
    /// Of both, what went on beside work and is counted as neither.
    pub hidden: Duration,
}

struct Call {
    number: u64,
    words: String,
    /// Whether rank 0 knows who has come to it.
    is_met: bool,
    /// When all ranks had come, if that is known.
    met: Option<Instant>,
    place: Option<(i64, usize)>,
    begun: Instant,
    took: Option<Duration>,
}

/// A call under way. It ends when this is dropped.
pub struct Watched<'a> {
    watch: &'a Watch,
    number: u64,
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        let mut log = self.watch.log();
        let mut times = log.times;
        if let Some(call) = log.calls.iter_mut().find(|call| call.number == self.number) {
            let took = call.begun.elapsed();
            call.took = Some(took);
            if let Some(met) = call.met {
                times.waiting += met - call.begun;
                times.moving += met.elapsed();
            }
        }
        log.times = times;
    }
}

impl Watched<'_> {
    /// All ranks have come to the call.
    pub(super) fn all_came(&self) {
        let mut log = self.watch.log();
        if let Some(call) = log.calls.iter_mut().find(|call| call.number == self.number) {
            call.met = Some(Instant::now());
        }
    }
}

impl Watch {
    /// Begins to watch rank `rank` of those on `hosts`; `end_job` is called on another thread when a call lasts too long.
    pub fn start(rank: usize, hosts: Vec<String>, end_job: fn() -> !) -> Self {
        let log = Log {
            calls: VecDeque::new(),
            n_calls: 0,
            limit: AT_FIRST,
            place: None,
            n_steps: 0,
            missing: Vec::new(),
            times: Times::default(),
            is_timing: false,
        };
        let shared = Arc::new(Shared { rank, hosts, log: Mutex::new(log) });
        let watched = Arc::downgrade(&shared);
        let clock = move || {
            while let Some(shared) = watched.upgrade() {
                if let Some(text) = shared.late() {
                    console::log(text.trim_end());
                    thread::sleep(if shared.rank == 0 { 2 * DEFERENCE } else { DEFERENCE });
                    end_job();
                }
                drop(shared);
                thread::sleep(TICK);
            }
        };
        let clock = thread::Builder::new().name("watchdog".to_owned()).spawn(clock);
        clock.expect("a process that trains can start one more thread");
        Self(shared)
    }

    /// How long a call may last from now on; the first step, three times as long.
    pub fn set_limit(&self, limit: Duration) {
        self.log().limit = limit;
    }

    /// From now on the times of calls are asked for, so that calls of GPUs too end when their work is done.
    pub fn time_calls(&self) {
        self.log().is_timing = true;
    }

    pub(super) fn is_timing(&self) -> bool {
        self.log().is_timing
    }

    /// What calls of all ranks took since this was last asked.
    pub fn take_times(&self) -> Times {
        std::mem::take(&mut self.log().times)
    }

    /// What calls of all ranks took since that was last taken.
    pub(super) fn times(&self) -> Times {
        self.log().times
    }

    /// Counts this as what calls took since they had taken `before`: a GPU knows better when its work was done.
    pub(super) fn correct(&self, before: Times, moving: Duration) {
        self.log().times = Times { moving: before.moving + moving, ..before };
    }

    /// Counts as hidden what calls took since they had taken `before`, but for the last of it, when somebody waited for their
    /// end.
    pub(super) fn hide(&self, before: Times, last: Duration) {
        let times = &mut self.log().times;
        let (waited, moved) = (times.waiting - before.waiting, times.moving - before.moving);
        let moving = moved.min(last);
        let waiting = waited.min(last - moving);
        times.waiting = before.waiting + waiting;
        times.moving = before.moving + moving;
        times.hidden += waited + moved - waiting - moving;
    }

    /// The calls that follow belong to step `step` (from 1) of `day`.
    pub fn at(&self, day: i64, step: usize) {
        let mut log = self.log();
        log.place = Some((day, step));
        log.n_steps += 1;
    }

    /// Where in the run this rank is, for whoever fails: day and step, and the last call.
    pub fn whereabouts(&self) -> String {
        let log = self.log();
        let place = log.place.map_or(String::new(), |(day, step)| format!("day {day}, step {step}, "));
        match log.calls.iter().rev().find(|call| call.is_met) {
            Some(Call { number, words, took, .. }) => {
                let when = if took.is_none() { "in" } else { "after" };
                format!("{place}{when} call {number}, {words}")
            }
            None => format!("{place}before the first call"),
        }
    }

    /// Something begins that may wait for other ranks.
    pub fn begin(&self, words: String) -> Watched<'_> {
        self.begin_call(words, false)
    }

    /// A call begins for which rank 0 waits by [`Watch::set_missing`], and the others for rank 0.
    pub(super) fn begin_met(&self, words: String) -> Watched<'_> {
        self.begin_call(words, true)
    }

    fn begin_call(&self, words: String, is_met: bool) -> Watched<'_> {
        let mut log = self.log();
        log.n_calls += 1;
        if log.calls.len() == N_REMEMBERED {
            log.calls.pop_front();
        }
        let (number, place) = (log.n_calls, log.place);
        let begun = Instant::now();
        log.calls.push_back(Call { number, words, is_met, met: None, place, begun, took: None });
        drop(log);
        Watched { watch: self, number }
    }

    /// Rank 0 now waits for these.
    pub(super) fn set_missing(&self, missing: &[usize]) {
        let mut log = self.log();
        log.missing.clear();
        log.missing.extend_from_slice(missing);
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.log()
    }
}

impl Shared {
    // No code that can panic runs under the lock, so a poisoned one is whole.
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is to say if the call under way has lasted too long.
    fn late(&self) -> Option<String> {
        let log = self.log();
        // The innermost that is not over.
        let call = log.calls.iter().rev().find(|call| call.took.is_none())?;
        let limit = if log.n_steps > 1 { log.limit } else { FIRST_STEP * log.limit };
        let limit = if self.rank == 0 { limit } else { limit + DEFERENCE };
        (call.begun.elapsed() > limit).then(|| self.tell(&log, call))
    }

    fn tell(&self, log: &Log, late: &Call) -> String {
        let name = |rank: usize| format!("rank {rank} on {}", self.hosts[rank]);
        let missing: Vec<String> = log.missing.iter().map(|&rank| name(rank)).collect();
        let what = match self.rank {
            _ if !late.is_met => "it does not end, here or for want of another rank".to_owned(),
            0 if missing.is_empty() => "all ranks came, but it does not end".to_owned(),
            0 => format!("{} did not come", missing.join(" and ")),
            _ => format!("{} does not answer, or waits for another", name(0)),
        };
        let (rank, world_size, seconds) = (self.rank, self.hosts.len(), late.begun.elapsed().as_secs());
        let mut text = format!(
            "error: rank {rank} of {world_size} on {}: {what}: {}, waited {seconds} s; the last calls were\n",
            self.hosts[rank], late
        );
        for call in &log.calls {
            let took =
                call.took.map_or("not over".to_owned(), |took| format!("{:.1} ms", 1e3 * took.as_secs_f64()));
            let _ = writeln!(text, "  rank {rank}: {call}: {took}");
        }
        text
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { number, words, place, .. } = self;
        write!(f, "call {number}, {words}")?;
        place.map_or(Ok(()), |(day, step)| write!(f, ", day {day}, step {step}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(rank: usize) -> Watch {
        let hosts = ["ship", "ship", "boat"].map(str::to_owned).into();
        let watch = Watch::start(rank, hosts, || unreachable!("no call lasts for minutes"));
        watch.at(1, 1);
        watch.at(3, 7);
        watch
    }

    /// What a watch would say when a call has lasted for 2 s.
    fn late(watch: &Watch) -> Option<String> {
        if let Some(call) = watch.log().calls.back_mut() {
            call.begun -= Duration::from_secs(2);
        }
        watch.set_limit(Duration::from_millis(800));
        let late = watch.0.late();
        watch.set_limit(AT_FIRST);
        late
    }

    #[test]
    fn who_is_missing_is_told_with_the_last_calls() {
        let watch = watch(0);
        drop(watch.begin("`barrier`".to_owned()));
        let step = watch.begin("a step".to_owned());
        let call = watch.begin_met("`all_reduce` (sum) of 5 f32 elements".to_owned());
        watch.set_missing(&[1, 2]);
        watch.set_missing(&[2]);
        let told = late(&watch).unwrap();
        let head = "error: rank 0 of 3 on ship: rank 2 on boat did not come: call 3, `all_reduce` (sum) of 5 f32 \
                    elements, day 3, step 7, waited 2 s; the last calls were\n";
        assert!(told.starts_with(head), "{told}");
        assert!(told.contains("  rank 0: call 1, `barrier`, day 3, step 7: 0.0 ms\n"), "{told}");
        let whereabouts = "day 3, step 7, in call 3, `all_reduce` (sum) of 5 f32 elements";
        assert_eq!(watch.whereabouts(), whereabouts);
        watch.set_missing(&[]);
        assert!(late(&watch).unwrap().contains("all ranks came, but it does not end"));
        drop(call);
        watch.log().calls[1].begun -= Duration::from_secs(2);
        let told = late(&watch).unwrap();
        assert!(told.contains("it does not end, here or for want of another rank: call 2, a step"), "{told}");
        drop(step);
        assert_eq!(late(&watch), None);
    }

    #[test]
    fn other_ranks_name_rank_0_and_remember_no_more_than_they_should() {
        let watch = watch(1);
        (0..100).for_each(|i| drop(watch.begin_met(format!("call {i}"))));
        let _call = watch.begin_met("the last".to_owned());
        let told = late(&watch).unwrap();
        assert!(
            told.contains("rank 0 on ship does not answer, or waits for another: call 101, the last"),
            "{told}"
        );
        assert_eq!(told.lines().count(), 1 + N_REMEMBERED);
    }

    #[test]
    fn times_are_those_before_and_after_all_came() {
        let watch = watch(0);
        let call = watch.begin_met("`barrier`".to_owned());
        watch.log().calls[0].begun -= Duration::from_secs(2);
        call.all_came();
        if let Some(met) = &mut watch.log().calls[0].met {
            *met -= Duration::from_secs(1);
        }
        drop(call);
        drop(watch.begin("a step".to_owned()));
        // Of the last half of it somebody waited for the end.
        let before = Times { waiting: Duration::ZERO, ..Times::default() };
        watch.hide(before, Duration::from_millis(500));
        let Times { waiting, moving, hidden } = watch.take_times();
        assert_eq!([waiting, moving, hidden].map(|time| time.as_millis() / 100), [0, 5, 15]);
        assert_eq!(watch.take_times(), Times::default());
    }

    #[test]
    fn the_first_step_may_take_longer() {
        let watch = watch(0);
        watch.log().n_steps = 1;
        let _call = watch.begin("a call".to_owned());
        assert_eq!(late(&watch), None);
        assert!(late(&watch).is_some());
    }
}
