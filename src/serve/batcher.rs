//! The queue of requests to a model, and the threads that take batches from it.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bireme_protocol::Tensor;
use tokio::sync::oneshot;

use crate::request::InferRequest;
use crate::request_error::{RequestError, RequestErrorKind};

/// Runs the requests of one model.
pub trait Executor: Send + Sync + 'static {
    /// Answers requests in their order, each with outputs or with a message of what is wrong with
    /// it.
    fn execute(&self, requests: &[&InferRequest]) -> Vec<Result<Vec<Tensor>, String>>;
}

/// How requests are batched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPolicy {
    /// The most rows in a batch of several requests, and the number worth waiting for; 0: each
    /// request runs alone.
    pub max_batch: usize,
    /// The longest time that a request waits for others.
    pub max_delay: Duration,
    pub n_instances: usize,
    /// The most requests in the queue; 0: any number.
    pub max_queue: usize,
}

/// The outputs of a request, and the time that they took.
#[derive(Debug)]
pub struct ModelAnswer {
    pub outputs: Vec<Tensor>,
    /// The time in the queue.
    pub queued: Duration,
    /// The execution time of the batch.
    pub computed: Duration,
}

struct Job {
    request: InferRequest,
    arrived: Instant,
    answer: oneshot::Sender<Result<ModelAnswer, RequestError>>,
}

impl Job {
    fn n_rows(&self) -> usize {
        self.request
            .inputs
            .first()
            .and_then(|tensor| tensor.shape.first())
            .map_or(1, |&rows| rows as usize)
    }
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    is_closed: bool,
}

struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
    /// Announced requests that are still in an earlier step of an ensemble.
    coming: AtomicUsize,
    policy: BatchPolicy,
}

/// The threads of a model. When this is dropped, they empty the queue and end.
pub struct Batcher(Arc<Queue>);

/// Announces a request, so that the model's threads wait for it.
pub struct Announcement(Arc<Queue>);

/// Called after each batch with the time in the queue of each request, the number of rows, and the
/// execution time.
pub type Observe = Box<dyn Fn(&[Duration], usize, Duration) + Send + Sync>;

impl Batcher {
    /// # Errors
    /// A thread cannot be started.
    pub fn start(
        name: &str,
        policy: BatchPolicy,
        executor: Arc<dyn Executor>,
        observe: Observe,
    ) -> std::io::Result<Self> {
        let state = Mutex::default();
        let queue =
            Arc::new(Queue { state, changed: Condvar::new(), coming: AtomicUsize::new(0), policy });
        let batcher = Self(queue);
        let observe = Arc::new(observe);
        for _ in 0..policy.n_instances.max(1) {
            let (queue, executor, observe) = (batcher.0.clone(), executor.clone(), observe.clone());
            let run = move || {
                while let Some(jobs) = queue.next_batch() {
                    execute(&*executor, jobs, &**observe);
                }
            };
            thread::Builder::new().name(name.to_owned()).spawn(run)?;
        }
        Ok(batcher)
    }

    pub fn announce(&self) -> Announcement {
        self.0.coming.fetch_add(1, Ordering::Relaxed);
        Announcement(self.0.clone())
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
    }
}

impl Announcement {
    /// Puts the request into the queue and waits for its outputs. A request whose caller stopped
    /// waiting is not run.
    ///
    /// # Errors
    /// The queue is full, or the model refuses the request.
    pub async fn submit(self, request: InferRequest) -> Result<ModelAnswer, RequestError> {
        let (answer, answered) = oneshot::channel();
        {
            let mut state = self.0.lock();
            let max_queue = self.0.policy.max_queue;
            if max_queue > 0 && state.jobs.len() >= max_queue {
                return Err(RequestError::new(
                    RequestErrorKind::Full,
                    format!("{max_queue} requests are waiting already"),
                ));
            }
            state.jobs.push_back(Job { request, arrived: Instant::now(), answer });
        }
        // Takes back the announcement, which also wakes the threads.
        drop(self);
        answered
            .await
            .unwrap_or_else(|_| Err(RequestError::internal("the model's thread has ended")))
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        self.0.coming.fetch_sub(1, Ordering::Relaxed);
        self.0.changed.notify_one();
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a batch; `None` when the batcher was dropped and the queue is empty.
    fn next_batch(&self) -> Option<Vec<Job>> {
        let BatchPolicy { max_batch, max_delay, .. } = self.policy;
        let mut state = self.lock();
        loop {
            let Some(oldest) = state.jobs.front() else {
                if state.is_closed {
                    return None;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let waited = oldest.arrived.elapsed();
            let n_rows: usize = state.jobs.iter().map(Job::n_rows).sum();
            // Wait only for requests that were announced.
            let worth_it = n_rows < max_batch && self.coming.load(Ordering::Relaxed) > 0;
            if max_batch == 0 || !worth_it || waited >= max_delay || state.is_closed {
                break;
            }
            let left = max_delay - waited;
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let (mut n, mut n_rows) = (0, 0);
        for job in &state.jobs {
            n_rows += job.n_rows();
            if n > 0 && n_rows > max_batch {
                break;
            }
            n += 1;
        }
        let batch = state.jobs.drain(..n).collect();
        if !state.jobs.is_empty() {
            self.changed.notify_one();
        }
        Some(batch)
    }
}

fn execute(
    executor: &dyn Executor,
    mut jobs: Vec<Job>,
    observe: &dyn Fn(&[Duration], usize, Duration),
) {
    jobs.retain(|job| !job.answer.is_closed());
    if jobs.is_empty() {
        return;
    }
    let begun = Instant::now();
    let requests: Vec<&InferRequest> = jobs.iter().map(|job| &job.request).collect();
    // A panic in the model's code must not end the server.
    let answers = catch_unwind(AssertUnwindSafe(|| executor.execute(&requests)));
    let computed = begun.elapsed();
    let queued: Vec<Duration> =
        jobs.iter().map(|job| begun.saturating_duration_since(job.arrived)).collect();
    observe(&queued, jobs.iter().map(Job::n_rows).sum(), computed);
    match answers {
        Ok(answers) => {
            for ((job, answer), queued) in jobs.into_iter().zip(answers).zip(queued) {
                let answer = answer.map(|outputs| ModelAnswer { outputs, queued, computed });
                // The caller may have stopped waiting.
                let _ = job.answer.send(answer.map_err(RequestError::invalid));
            }
        }
        Err(_) => {
            for job in jobs {
                let _ = job.answer.send(Err(RequestError::internal(
                    "the model failed; the server's log has the reason",
                )));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records the number of requests in each batch.
    struct Echo(tokio::sync::Mutex<Vec<usize>>);

    impl Executor for Echo {
        fn execute(&self, requests: &[&InferRequest]) -> Vec<Result<Vec<Tensor>, String>> {
            self.0.blocking_lock().push(requests.len());
            let answer = |request: &&InferRequest| match request.inputs[0].name.as_str() {
                "panics" => panic!("a test panic"),
                "fails" => Err("it fails".to_owned()),
                _ => Ok(request.inputs.clone()),
            };
            requests.iter().map(answer).collect()
        }
    }

    fn request(name: &str, rows: i64) -> InferRequest {
        InferRequest {
            inputs: vec![Tensor::ints(name, &[rows], 0..rows)],
            ..InferRequest::default()
        }
    }

    fn batcher(max_batch: usize, max_delay: Duration, max_queue: usize) -> (Batcher, Arc<Echo>) {
        let policy = BatchPolicy { max_batch, max_delay, n_instances: 1, max_queue };
        let echo = Arc::new(Echo(Default::default()));
        (Batcher::start("test", policy, echo.clone(), Box::new(|_, _, _| {})).unwrap(), echo)
    }

    #[tokio::test]
    async fn requests_that_are_announced_run_together_up_to_the_largest_batch() {
        let (batcher, echo) = batcher(8, Duration::from_secs(60), 0);
        let last = batcher.announce();
        let [a, b, c] = [3, 3, 3].map(|rows| batcher.announce().submit(request("x", rows)));
        let later = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            last.submit(request("x", 5)).await
        };
        let answers = tokio::join!(a, b, c, later);
        assert_eq!(answers.3.unwrap().outputs[0].shape, [5]);
        assert_eq!(*echo.0.lock().await, [2, 2]);
    }

    #[tokio::test]
    async fn nobody_waits_for_what_is_not_coming_and_nobody_forever() {
        let (batcher, _) = batcher(8, Duration::from_secs(60), 0);
        let begun = Instant::now();
        batcher.announce().submit(request("x", 1)).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10));
        let (batcher, _) = self::batcher(8, Duration::from_millis(30), 0);
        let _never = batcher.announce();
        let answer = batcher.announce().submit(request("x", 1)).await.unwrap();
        assert!(answer.queued >= Duration::from_millis(30), "{answer:?}");
    }

    #[tokio::test]
    async fn a_full_queue_refuses_and_a_panic_is_an_answer() {
        let (batcher, echo) = batcher(0, Duration::ZERO, 1);
        let fault = batcher.announce().submit(request("panics", 1)).await.unwrap_err();
        assert_eq!(fault.kind, RequestErrorKind::Internal);
        let fault = batcher.announce().submit(request("fails", 1)).await.unwrap_err();
        assert_eq!((fault.kind, fault.message.as_str()), (RequestErrorKind::Invalid, "it fails"));
        let busy = echo.0.lock().await;
        // The thread runs the first and blocks in it; the second waits.
        let one = tokio::spawn(batcher.announce().submit(request("x", 1)));
        let queue = &batcher.0;
        while queue.coming.load(Ordering::Relaxed) > 0 || !queue.lock().jobs.is_empty() {
            tokio::task::yield_now().await;
        }
        let two = tokio::spawn(batcher.announce().submit(request("x", 1)));
        while queue.lock().jobs.is_empty() {
            tokio::task::yield_now().await;
        }
        let fault = batcher.announce().submit(request("x", 1)).await.unwrap_err();
        assert_eq!(fault.kind, RequestErrorKind::Full);
        drop(busy);
        assert!(one.await.unwrap().is_ok() && two.await.unwrap().is_ok());
    }
}
