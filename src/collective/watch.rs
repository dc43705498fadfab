//! Watchdog over the collective calls of a rank. If a call exceeds its limit, the watchdog logs the
//! missing rank and the last calls and ends the job.
//!
//! Without it, a rank that hangs or is stopped would keep all other ranks waiting forever.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bireme_base::console;

/// Number of recent calls that are kept for the log.
const N_KEPT_CALLS: usize = 16;

/// Interval of the checks.
const TICK: Duration = Duration::from_millis(100);

/// Extra waiting time of the ranks other than 0. Rank 0 knows which rank is missing, so it logs
/// first. It then waits twice as long before it ends the job, so that the other ranks can log too.
const GRACE: Duration = Duration::from_secs(1);

/// Factor of the limit for the first step, which opens files, allocates memory and selects kernels.
const FIRST_STEP_FACTOR: u32 = 3;

/// Limit until the configuration is read.
const DEFAULT_LIMIT: Duration = Duration::from_secs(600);

/// Handle to the watchdog of this rank. It stops when the last handle is dropped.
#[derive(Clone)]
pub struct Watch(Arc<Shared>);

struct Shared {
    rank: usize,
    /// Host name by rank.
    hosts: Vec<String>,
    log: Mutex<Log>,
}

struct Log {
    calls: VecDeque<CallRecord>,
    n_calls: u64,
    limit: Duration,
    /// Current day and step (from 1).
    step: Option<(i64, usize)>,
    n_steps: usize,
    /// On rank 0: the ranks that have not made the current call.
    missing: Vec<usize>,
    times: CallTimes,
    is_timing: bool,
}

/// Total time of calls.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CallTimes {
    /// Until all ranks had made the call.
    pub waiting: Duration,
    /// After all ranks had made the call.
    pub communication: Duration,
    /// Time of overlapped calls, which is in neither of the others.
    pub hidden: Duration,
}

struct CallRecord {
    number: u64,
    description: String,
    /// Whether rank 0 tracks the arrival of the ranks.
    is_tracked: bool,
    /// When all ranks had made the call, if known.
    all_arrived_at: Option<Instant>,
    step: Option<(i64, usize)>,
    started: Instant,
    elapsed: Option<Duration>,
}

/// A call in progress. Dropping the guard ends it.
pub struct CallGuard<'a> {
    watch: &'a Watch,
    number: u64,
}

impl Drop for CallGuard<'_> {
    fn drop(&mut self) {
        let mut log = self.watch.log();
        let mut times = log.times;
        if let Some(call) = log.calls.iter_mut().find(|call| call.number == self.number) {
            call.elapsed = Some(call.started.elapsed());
            if let Some(all_arrived_at) = call.all_arrived_at {
                times.waiting += all_arrived_at - call.started;
                times.communication += all_arrived_at.elapsed();
            }
        }
        log.times = times;
    }
}

impl CallGuard<'_> {
    /// Records that all ranks have made the call.
    pub(super) fn all_arrived(&self) {
        let mut log = self.watch.log();
        if let Some(call) = log.calls.iter_mut().find(|call| call.number == self.number) {
            call.all_arrived_at = Some(Instant::now());
        }
    }
}

impl Watch {
    /// Starts the watchdog of rank `rank`. `hosts` holds the host name of each rank. If a call
    /// exceeds its limit, the watchdog's thread calls `end_job`.
    pub fn start(rank: usize, hosts: Vec<String>, end_job: fn() -> !) -> Self {
        let log = Log {
            calls: VecDeque::new(),
            n_calls: 0,
            limit: DEFAULT_LIMIT,
            step: None,
            n_steps: 0,
            missing: Vec::new(),
            times: CallTimes::default(),
            is_timing: false,
        };
        let shared = Arc::new(Shared { rank, hosts, log: Mutex::new(log) });
        // A weak reference, so that the thread ends with the last handle.
        let weak = Arc::downgrade(&shared);
        let watchdog = move || {
            while let Some(shared) = weak.upgrade() {
                if let Some(text) = shared.timeout_report() {
                    console::log(text.trim_end());
                    thread::sleep(if shared.rank == 0 { 2 * GRACE } else { GRACE });
                    end_job();
                }
                drop(shared);
                thread::sleep(TICK);
            }
        };
        let thread = thread::Builder::new().name("watchdog".to_owned()).spawn(watchdog);
        thread.expect("a process that trains can start one more thread");
        Self(shared)
    }

    /// Sets the limit of a call. The limit during the first step is three times as long.
    pub fn set_limit(&self, limit: Duration) {
        self.log().limit = limit;
    }

    /// Starts to measure calls. Calls on a GPU then return when the GPU has finished them.
    pub fn start_timing(&self) {
        self.log().is_timing = true;
    }

    pub(super) fn is_timing(&self) -> bool {
        self.log().is_timing
    }

    /// Returns the time of calls since the last `take_times`.
    pub fn take_times(&self) -> CallTimes {
        std::mem::take(&mut self.log().times)
    }

    /// The time of calls since the last `take_times`.
    pub(super) fn times(&self) -> CallTimes {
        self.log().times
    }

    /// Replaces the time measured since `before` by `communication`, which the GPU measured.
    pub(super) fn correct(&self, before: CallTimes, communication: Duration) {
        self.log().times =
            CallTimes { communication: before.communication + communication, ..before };
    }

    /// Moves the time measured since `before` to `hidden`, except for the last `exposed`, in which
    /// this rank had no work left and waited for the call.
    pub(super) fn hide(&self, before: CallTimes, exposed: Duration) {
        let times = &mut self.log().times;
        let waited = times.waiting - before.waiting;
        let communicated = times.communication - before.communication;
        // A call first waits and then communicates, so the exposed end is communication first.
        let communication = communicated.min(exposed);
        let waiting = waited.min(exposed - communication);
        times.waiting = before.waiting + waiting;
        times.communication = before.communication + communication;
        times.hidden += waited + communicated - waiting - communication;
    }

    /// Assigns the calls from now on to step `step` (from 1) of `day`.
    pub fn begin_step(&self, day: i64, step: usize) {
        let mut log = self.log();
        log.step = Some((day, step));
        log.n_steps += 1;
    }

    /// Progress of this rank for error messages: day, step and the last call.
    pub fn progress(&self) -> String {
        let log = self.log();
        let step =
            log.step.map_or(String::new(), |(day, step)| format!("day {day}, step {step}, "));
        match log.calls.iter().rev().find(|call| call.is_tracked) {
            Some(CallRecord { number, description, elapsed, .. }) => {
                let when = if elapsed.is_none() { "in" } else { "after" };
                format!("{step}{when} call {number}, {description}")
            }
            None => format!("{step}before the first call"),
        }
    }

    /// Begins an operation that may wait for other ranks.
    pub fn begin(&self, description: String) -> CallGuard<'_> {
        self.begin_call(description, false)
    }

    /// Begins a call whose arrivals rank 0 tracks with [`Watch::set_missing`]. The other ranks wait
    /// for rank 0.
    pub(super) fn begin_tracked(&self, description: String) -> CallGuard<'_> {
        self.begin_call(description, true)
    }

    fn begin_call(&self, description: String, is_tracked: bool) -> CallGuard<'_> {
        let mut log = self.log();
        log.n_calls += 1;
        if log.calls.len() == N_KEPT_CALLS {
            log.calls.pop_front();
        }
        let (number, step) = (log.n_calls, log.step);
        log.calls.push_back(CallRecord {
            number,
            description,
            is_tracked,
            all_arrived_at: None,
            step,
            started: Instant::now(),
            elapsed: None,
        });
        drop(log);
        CallGuard { watch: self, number }
    }

    /// Sets the ranks for which rank 0 waits.
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
    // No code that can panic runs under the lock, so the value is valid even if it is poisoned.
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error message, if the current call has exceeded its limit.
    fn timeout_report(&self) -> Option<String> {
        let log = self.log();
        // Calls nest (a step contains calls): the last unfinished one is the innermost.
        let call = log.calls.iter().rev().find(|call| call.elapsed.is_none())?;
        let limit = if log.n_steps > 1 { log.limit } else { FIRST_STEP_FACTOR * log.limit };
        let limit = if self.rank == 0 { limit } else { limit + GRACE };
        (call.started.elapsed() > limit).then(|| self.report(&log, call))
    }

    fn report(&self, log: &Log, late: &CallRecord) -> String {
        let name = |rank: usize| format!("rank {rank} on {}", self.hosts[rank]);
        let missing: Vec<String> = log.missing.iter().map(|&rank| name(rank)).collect();
        let reason = match self.rank {
            _ if !late.is_tracked => {
                "the call has not returned; this rank or another is stuck".to_owned()
            }
            0 if missing.is_empty() => {
                "all ranks have made the call, but it does not return".to_owned()
            }
            0 => format!("{} did not make the call", missing.join(" and ")),
            _ => format!("{} does not respond, or waits for another rank", name(0)),
        };
        let (rank, world_size, seconds) =
            (self.rank, self.hosts.len(), late.started.elapsed().as_secs());
        let mut text = format!(
            "error: rank {rank} of {world_size} on {}: {reason}: {late}, waited {seconds} s; last \
             calls:\n",
            self.hosts[rank]
        );
        for call in &log.calls {
            let elapsed = match call.elapsed {
                Some(elapsed) => format!("{:.1} ms", 1e3 * elapsed.as_secs_f64()),
                None => "not finished".to_owned(),
            };
            let _ = writeln!(text, "  rank {rank}: {call}: {elapsed}");
        }
        text
    }
}

impl std::fmt::Display for CallRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { number, description, step, .. } = self;
        write!(f, "call {number}, {description}")?;
        step.map_or(Ok(()), |(day, step)| write!(f, ", day {day}, step {step}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(rank: usize) -> Watch {
        let hosts = ["ship", "ship", "boat"].map(str::to_owned).into();
        let watch = Watch::start(rank, hosts, || unreachable!("no call lasts for minutes"));
        watch.begin_step(1, 1);
        watch.begin_step(3, 7);
        watch
    }

    /// The message when the last call has taken 2 s. The limit is restored, so that the watchdog's
    /// own thread stays quiet.
    fn report_after_2_s(watch: &Watch) -> Option<String> {
        if let Some(call) = watch.log().calls.back_mut() {
            call.started -= Duration::from_secs(2);
        }
        watch.set_limit(Duration::from_millis(800));
        let report = watch.0.timeout_report();
        watch.set_limit(DEFAULT_LIMIT);
        report
    }

    #[test]
    fn rank_0_reports_missing_ranks_and_the_last_calls() {
        let watch = watch(0);
        drop(watch.begin("`barrier`".to_owned()));
        let step = watch.begin("a step".to_owned());
        let call = watch.begin_tracked("`all_reduce` (sum) of 5 f32 elements".to_owned());
        watch.set_missing(&[1, 2]);
        watch.set_missing(&[2]);
        let report = report_after_2_s(&watch).unwrap();
        let head = "error: rank 0 of 3 on ship: rank 2 on boat did not make the call: call 3, \
                    `all_reduce` (sum) of 5 f32 elements, day 3, step 7, waited 2 s; last calls:\n";
        assert!(report.starts_with(head), "{report}");
        assert!(
            report.contains("  rank 0: call 1, `barrier`, day 3, step 7: 0.0 ms\n"),
            "{report}"
        );
        let progress = "day 3, step 7, in call 3, `all_reduce` (sum) of 5 f32 elements";
        assert_eq!(watch.progress(), progress);
        watch.set_missing(&[]);
        let report = report_after_2_s(&watch).unwrap();
        assert!(
            report.contains("all ranks have made the call, but it does not return"),
            "{report}"
        );
        drop(call);
        watch.log().calls[1].started -= Duration::from_secs(2);
        let report = report_after_2_s(&watch).unwrap();
        let stuck = "the call has not returned; this rank or another is stuck: call 2, a step";
        assert!(report.contains(stuck), "{report}");
        drop(step);
        assert_eq!(report_after_2_s(&watch), None);
    }

    #[test]
    fn other_ranks_name_rank_0_and_keep_a_limited_number_of_calls() {
        let watch = watch(1);
        (0..100).for_each(|i| drop(watch.begin_tracked(format!("call {i}"))));
        let _call = watch.begin_tracked("the last".to_owned());
        let report = report_after_2_s(&watch).unwrap();
        let reason =
            "rank 0 on ship does not respond, or waits for another rank: call 101, the last";
        assert!(report.contains(reason), "{report}");
        assert_eq!(report.lines().count(), 1 + N_KEPT_CALLS);
    }

    #[test]
    fn times_are_split_at_the_arrival_of_the_last_rank_and_overlap_is_hidden() {
        let watch = watch(0);
        let call = watch.begin_tracked("`barrier`".to_owned());
        watch.log().calls[0].started -= Duration::from_secs(2);
        call.all_arrived();
        if let Some(all_arrived_at) = &mut watch.log().calls[0].all_arrived_at {
            *all_arrived_at -= Duration::from_secs(1);
        }
        drop(call);
        drop(watch.begin("a step".to_owned()));
        // The last 0.5 s of the communication are exposed.
        watch.hide(CallTimes::default(), Duration::from_millis(500));
        let CallTimes { waiting, communication, hidden } = watch.take_times();
        assert_eq!([waiting, communication, hidden].map(|time| time.as_millis() / 100), [0, 5, 15]);
        assert_eq!(watch.take_times(), CallTimes::default());
    }

    #[test]
    fn the_first_step_may_take_longer() {
        let watch = watch(0);
        watch.log().n_steps = 1;
        let _call = watch.begin("a call".to_owned());
        assert_eq!(report_after_2_s(&watch), None);
        assert!(report_after_2_s(&watch).is_some());
    }
}
