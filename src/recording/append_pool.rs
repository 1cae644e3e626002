//! The threads that write to open files: a few for all tracks.
//!
//! An append takes microseconds, so a thread for every track that writes at the same moment costs memory and brings nothing (`docs/performance.md`). But
//! a write that hangs keeps its thread, for however long: when the oldest job has waited too long, others come to help, one for each that hangs and a few
//! for a disk that is slow, and end when nothing waits.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// Threads that are always there.
const THREADS: usize = 4;
/// Threads that are at work at once, and do not hang: more would wait for the disk too, or for a core.
const AT_WORK: usize = 16;
/// All of them, also those that hang; what comes then waits. As many as tokio's own pool has.
const MOST_THREADS: usize = 512;
/// How long a job waits for a thread before others come: what arrives is to be in its file 250 ms later, of which the batch takes 160.
const PATIENCE: Duration = Duration::from_millis(40);
/// How long a job takes that hangs.
const HANGS: Duration = Duration::from_millis(250);
/// How often somebody looks after that. Those who submit cannot: when all of them wait, nobody does.
const LOOK: Duration = Duration::from_millis(20);

type Job = Box<dyn FnOnce() + Send>;

/// Cheap to clone. The threads end when the last clone is gone and nothing waits.
#[derive(Debug, Clone)]
pub struct AppendPool {
    shared: Arc<Shared>,
    _alive: Arc<Alive>,
}

/// The job panicked, or there is no pool any more.
#[derive(Debug, thiserror::Error)]
#[error("the task was lost")]
pub struct Lost;

/// Stops the threads when it is dropped.
#[derive(Debug)]
struct Alive(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There is a job, or the end.
    work: Condvar,
    /// There is the end.
    end: Condvar,
}

#[derive(Default)]
struct State {
    /// Each with the time that it came.
    jobs: VecDeque<(Instant, Job)>,
    threads: usize,
    /// Jobs under way, by their number, each with the time that it began.
    under_way: BTreeMap<u64, Instant>,
    begun: u64,
    /// The system gives no more of them, and it has been said.
    is_short: bool,
    stopping: bool,
}

impl AppendPool {
    /// # Errors
    /// When no thread can be started.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let pool = Self { _alive: Arc::new(Alive(Arc::clone(&shared))), shared: Arc::clone(&shared) };
        for _ in 0..THREADS {
            shared.add_thread(true)?;
        }
        std::thread::Builder::new().name("append-clock".to_owned()).spawn(move || shared.look())?;
        Ok(pool)
    }

    /// Resolves to what the job returns. It is done whether anybody waits for that or not.
    ///
    /// # Errors
    /// When the job panics.
    pub fn run<T: Send + 'static, J: FnOnce() -> T + Send + 'static>(&self, job: J) -> impl Future<Output = Result<T, Lost>> + use<T, J> {
        let (done, outcome) = oneshot::channel();
        let job = Box::new(move || {
            // Whoever waited may be gone.
            done.send(job()).ok();
        });
        self.shared.lock().jobs.push_back((Instant::now(), job));
        self.shared.work.notify_one();
        async move { outcome.await.map_err(|_| Lost) }
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.lock().stopping = true;
        self.0.work.notify_all();
        self.0.end.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that `stays` waits for more when nothing is to be done.
    fn add_thread(self: &Arc<Self>, stays: bool) -> io::Result<()> {
        let shared = Arc::clone(self);
        self.lock().threads += 1;
        let started = std::thread::Builder::new().name("append".to_owned()).spawn(move || shared.work(stays));
        if started.is_err() {
            self.lock().threads -= 1;
        }
        started.map(drop)
    }

    fn work(&self, stays: bool) {
        let mut state = self.lock();
        loop {
            if let Some((number, job)) = state.begin() {
                drop(state);
                // Whoever waits hears of it by its answer, which never comes; the thread goes on. The panic itself is in the log.
                catch_unwind(AssertUnwindSafe(job)).ok();
                state = self.lock();
                state.under_way.remove(&number);
            } else if state.stopping || !stays {
                state.threads -= 1;
                return;
            } else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn look(self: &Arc<Self>) {
        let mut state = self.lock();
        while !state.stopping {
            state = self.end.wait_timeout(state, LOOK).map_or_else(|error| error.into_inner().0, |(state, _)| state);
            let help = state.help();
            if help > 0 {
                drop(state);
                self.bring(help);
                state = self.lock();
            }
        }
    }

    fn bring(self: &Arc<Self>, help: usize) {
        log::debug!("writes wait for others that hang threads_more={help}");
        for _ in 0..help {
            let added = self.add_thread(false);
            let was_short = std::mem::replace(&mut self.lock().is_short, added.is_err());
            if let Err(error) = added {
                if !was_short {
                    log::error!("writes wait for others that hang, and no thread can be started for them error={error}");
                }
                return;
            }
        }
    }
}

impl State {
    fn begin(&mut self) -> Option<(u64, Job)> {
        let (_, job) = self.jobs.pop_front()?;
        self.begun += 1;
        self.under_way.insert(self.begun, Instant::now());
        Some((self.begun, job))
    }

    /// How many threads should come: none while jobs are taken in time.
    fn help(&self) -> usize {
        let waits = self.jobs.front().is_some_and(|(since, _)| since.elapsed() >= PATIENCE);
        if !waits {
            return 0;
        }
        let hanging = self.under_way.values().filter(|since| since.elapsed() >= HANGS).count();
        let wanted = (AT_WORK + hanging).min(MOST_THREADS);
        wanted.saturating_sub(self.threads).min(self.threads).min(self.jobs.len())
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("jobs", &self.jobs.len()).field("threads", &self.threads).field("stopping", &self.stopping).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let met = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, met).await.expect(what);
    }

    #[tokio::test]
    async fn jobs_are_done_by_the_threads_that_are_there() {
        let pool = AppendPool::start().expect("threads");
        let jobs: Vec<_> = (0..1_000).map(|number| pool.run(move || (number, std::thread::current().id()))).collect();
        let mut threads = std::collections::HashSet::new();
        for (expected, job) in jobs.into_iter().enumerate() {
            let (number, thread) = job.await.expect("done");
            assert_eq!(number, expected);
            threads.insert(thread);
        }
        assert!(threads.len() <= AT_WORK, "however long they wait: {threads:?}");
    }

    #[tokio::test]
    async fn jobs_that_hang_hold_up_no_other_and_their_help_ends_with_them() {
        let pool = AppendPool::start().expect("threads");
        let (release, hung): (Vec<mpsc::Sender<()>>, Vec<_>) = (0..3 * AT_WORK)
            .map(|_| {
                let (release, held) = mpsc::channel::<()>();
                (release, pool.run(move || held.recv().is_err()))
            })
            .unzip();
        let behind = pool.run(|| "done");
        assert_eq!(tokio::time::timeout(DEADLINE, behind).await.expect("in time").expect("done"), "done");
        drop(release);
        for hung in hung {
            assert!(hung.await.expect("done"));
        }
        until("the help is gone", || pool.shared.lock().threads == THREADS).await;
    }

    #[tokio::test]
    async fn a_job_that_panics_is_told_of_and_costs_no_thread() {
        let pool = AppendPool::start().expect("threads");
        for _ in 0..3 * THREADS {
            pool.run(|| panic!("as asked")).await.expect_err("lost");
        }
        assert_eq!(pool.run(|| 1).await.expect("done"), 1);
        assert_eq!(pool.shared.lock().threads, THREADS);
    }

    #[tokio::test]
    async fn what_waits_when_the_pool_goes_is_done_and_the_threads_end() {
        let pool = AppendPool::start().expect("threads");
        let jobs: Vec<_> = (0..100).map(|number| pool.run(move || number)).collect();
        let shared = Arc::downgrade(&pool.shared);
        drop(pool);
        for job in jobs {
            job.await.expect("done");
        }
        until("every thread is gone", || shared.strong_count() == 0).await;
    }
}
