//! Hands what was written over to the disk, each second for every open file and at once for whoever asks, off every thread that serves sockets.
//!
//! What waits at the same time is done together: a few files by a sync each, many by one `syncfs` of their file system, which costs one commit of its
//! journal instead of hundreds (`docs/performance.md`). A failed sync is never taken back, whatever the next one says (`docs/FACTS.md`, failed syncs):
//! the files it was for count as suspect from then on, and a `syncfs` that fails names none, so that is every open file of that file system. The system
//! tells of it once for each descriptor, whatever that is of, so all are made by one that is kept.

mod counts;
mod kernel;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

pub use self::counts::SyncCounts;
use crate::fail_point;

/// How often open files are synced. A promise of 1 s, less what a round may be late.
const INTERVAL: Duration = Duration::from_millis(850);
/// Threads that wait for disks.
const THREADS: usize = 3;
/// Of these, as many as one file system may keep: if it hangs, the others are synced.
const AT_ONE_DEVICE: usize = THREADS - 1;
/// With more files than this to sync on one file system, the whole of it is synced.
const FEW: usize = 8;

/// The threads that sync. Cheap to clone; they end when the last clone is gone and nothing waits.
#[derive(Clone, Debug)]
pub struct Syncer {
    shared: Arc<Shared>,
    _alive: Arc<Alive>,
}

/// A file that is synced for as long as this lives, whenever something was written to it.
#[derive(Debug)]
pub struct Watched {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: Arc<File>,
    device: u64,
    /// Written to since the last sync began.
    dirty: AtomicBool,
    /// A sync is queued or under way.
    queued: AtomicBool,
    failed: AtomicBool,
}

/// Stops the threads when it is dropped.
#[derive(Debug)]
struct Alive(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There is a job, or the end.
    work: Condvar,
    /// There is the end. Of its own: a word of work that reached the clock would be lost on every worker.
    end: Condvar,
    /// A sync is over, and whoever it was for has been told.
    over: Condvar,
    counts: SyncCounts,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    watched: Vec<Weak<Inner>>,
    /// What the threads are at.
    under_way: Vec<UnderWay>,
    /// Syncs that have begun so far.
    begun: u64,
    /// Through what each file system is synced as a whole.
    kept: Vec<(u64, Arc<File>)>,
    /// The kernel does not tell of a file system's failures.
    one_by_one: bool,
    stopping: bool,
}

#[derive(Debug)]
struct UnderWay {
    number: u64,
    device: u64,
    /// When the oldest of what it is for was due.
    since: Instant,
    /// `None` for the whole file system.
    file: Option<Arc<File>>,
    of: Weak<Inner>,
}

#[derive(Debug)]
struct Job {
    file: Arc<File>,
    device: u64,
    /// When it was asked for.
    since: Instant,
    /// The metadata too.
    whole: bool,
    /// What is suspect if it fails. A job holds nobody's file open but its own.
    of: Weak<Inner>,
    /// It is the sync of each second.
    is_due: bool,
    asked: Option<oneshot::Sender<io::Result<()>>>,
}

impl Syncer {
    /// # Errors
    /// When no thread can be started.
    pub fn start() -> io::Result<Self> {
        Self::with(INTERVAL)
    }

    fn with(interval: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        if !kernel::tells_of_failed_writes() {
            log::warn!("this kernel is older than Linux 5.8: files are synced one by one, which costs more");
            shared.lock().one_by_one = true;
        }
        for _ in 0..THREADS {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("syncer".to_owned()).spawn(move || shared.work())?;
        }
        let ticker = Arc::clone(&shared);
        std::thread::Builder::new().name("sync-clock".to_owned()).spawn(move || ticker.tick(interval))?;
        Ok(Self { _alive: Arc::new(Alive(Arc::clone(&shared))), shared })
    }

    /// Syncs a file system as a whole through this directory of it, for as long as the syncer lives.
    ///
    /// # Errors
    /// When the directory cannot be looked at.
    pub fn keep(&self, directory: Arc<File>) -> io::Result<()> {
        let device = directory.metadata()?.dev();
        self.shared.lock().kept.push((device, directory));
        Ok(())
    }

    /// Syncs a file each second from now on.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn watch(&self, file: Arc<File>) -> io::Result<Watched> {
        let device = file.metadata()?.dev();
        let inner = Arc::new(Inner { file, device, dirty: AtomicBool::new(true), queued: AtomicBool::new(false), failed: AtomicBool::new(false) });
        self.shared.lock().watched.push(Arc::downgrade(&inner));
        Ok(Watched { inner })
    }

    /// Resolves when everything that was written to the file before is on the disk, with its length and attributes. A directory is a file too.
    ///
    /// # Errors
    /// What the disk says.
    pub fn sync(&self, file: Arc<File>) -> impl Future<Output = io::Result<()>> + Send + use<> {
        let asked = self.ask(file);
        async move { asked?.await.map_err(|_| stopped())? }
    }

    /// The same for a thread that may wait.
    ///
    /// # Errors
    /// What the disk says.
    pub fn sync_now(&self, file: Arc<File>) -> io::Result<()> {
        self.ask(file)?.blocking_recv().map_err(|_| stopped())?
    }

    /// The same for what a watched file wants on the disk before it changes.
    ///
    /// # Errors
    /// What the disk says: then the file is suspect, also if it is said when nobody waits any more.
    pub fn sync_for(&self, watched: &Watched, files: Vec<Arc<File>>) -> impl Future<Output = io::Result<()>> + Send + use<> {
        let ask = |file| self.shared.ask(file, watched.inner.device, Arc::downgrade(&watched.inner));
        let asked: Vec<_> = files.into_iter().map(ask).collect();
        async move {
            for asked in asked {
                asked?.await.map_err(|_| stopped())??;
            }
            Ok(())
        }
    }

    /// The same for files that are waited for together, each with its own answer.
    pub fn sync_together(&self, files: Vec<Arc<File>>) -> Vec<io::Result<()>> {
        let asked: Vec<_> = files.into_iter().map(|file| self.ask(file)).collect();
        asked.into_iter().map(|asked| asked?.blocking_recv().map_err(|_| stopped())?).collect()
    }

    /// Hands the name that a file has just got in its directory to the disk. Nobody waits for it; where it fails, the file is suspect.
    pub fn sync_name(&self, watched: &Watched, directory: Arc<File>) {
        let (device, of) = (watched.inner.device, Arc::downgrade(&watched.inner));
        self.shared.queue(Job { file: directory, device, since: Instant::now(), whole: true, of, is_due: false, asked: None });
    }

    /// Waits for the syncs of the file that are under way. The system tells of a loss once: if one of these is told, whoever asks beside it hears that all
    /// is well (`docs/FACTS.md`, failed syncs).
    ///
    /// # Errors
    /// When any of its syncs has failed.
    pub fn settle(&self, watched: &Watched) -> io::Result<()> {
        let mut state = self.shared.lock();
        let begun = state.begun;
        while state.under_way.iter().any(|sync| sync.number <= begun && sync.reaches(&watched.inner)) {
            state = self.shared.over.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        if watched.has_failed() { Err(io::Error::other("an earlier sync of the file failed")) } else { Ok(()) }
    }

    pub fn counts(&self) -> &SyncCounts {
        &self.shared.counts
    }

    /// How long the oldest sync that is due has waited for the disk, one under way included.
    pub fn oldest_wait(&self) -> Option<Duration> {
        let state = self.shared.lock();
        let due = state.under_way.iter().map(|sync| sync.since).chain(state.jobs.iter().map(|job| job.since));
        due.min().map(|since| since.elapsed())
    }

    fn ask(&self, file: Arc<File>) -> io::Result<oneshot::Receiver<io::Result<()>>> {
        let device = file.metadata()?.dev();
        self.shared.ask(file, device, Weak::new())
    }
}

impl Watched {
    /// Something was written.
    pub fn note_written(&self) {
        self.inner.dirty.store(true, Ordering::Release);
    }

    /// Whether a sync has failed since the file was made: what the disk holds of it is not known.
    pub fn has_failed(&self) -> bool {
        self.inner.failed.load(Ordering::Acquire)
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

    fn ask(&self, file: Arc<File>, device: u64, of: Weak<Inner>) -> io::Result<oneshot::Receiver<io::Result<()>>> {
        let (asked, told) = oneshot::channel();
        if self.lock().stopping {
            return Err(stopped());
        }
        self.queue(Job { file, device, since: Instant::now(), whole: true, of, is_due: false, asked: Some(asked) });
        Ok(told)
    }

    fn queue(&self, job: Job) {
        self.lock().jobs.push_back(job);
        self.work.notify_one();
    }

    /// Queues what was written to, each interval.
    fn tick(&self, interval: Duration) {
        let mut next = Instant::now() + interval;
        let mut state = self.lock();
        while !state.stopping {
            let wait = next.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                state = self.end.wait_timeout(state, wait).map_or_else(|error| error.into_inner().0, |(state, _)| state);
                continue;
            }
            next = Instant::now() + interval;
            state.watched.retain(|watched| watched.strong_count() > 0);
            let due: Vec<Job> = state.watched.iter().filter_map(|watched| due(&watched.upgrade()?)).collect();
            state.jobs.extend(due);
            self.work.notify_all();
        }
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some((number, jobs)) = state.begin() {
                drop(state);
                self.run(jobs);
                state = self.end(number);
            } else if state.stopping {
                return;
            } else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// The sync of this number has been told of.
    fn end(&self, number: u64) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.under_way.retain(|sync| sync.number != number);
        self.over.notify_all();
        state
    }

    fn run(&self, jobs: Vec<Job>) {
        let Some(first) = jobs.first() else { return };
        for job in &jobs {
            if let Some(watched) = job.of.upgrade().filter(|_| job.is_due) {
                watched.dirty.store(false, Ordering::Release);
            }
        }
        let started = Instant::now();
        let counter = if jobs.len() == 1 { &self.counts.files } else { &self.counts.file_systems };
        // Whoever waits is told, and the thread goes on, whatever happens in here.
        let synced = catch_unwind(AssertUnwindSafe(|| {
            fail_point::pass("syncer-sync");
            match jobs.as_slice() {
                [only] if only.whole => only.file.sync_all(),
                [only] => only.file.sync_data(),
                _ => rustix::fs::syncfs(self.whole(first).as_ref().unwrap_or(&first.file)).map_err(io::Error::from),
            }
        }));
        let outcome = synced.unwrap_or_else(|_| Err(io::Error::other("the sync panicked")));
        counter.fetch_add(1, Ordering::Relaxed);
        let took = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.counts.slowest_us.fetch_max(took, Ordering::Relaxed);
        self.tell(jobs, &outcome);
    }

    /// Through what the file system of a job's file is synced, if it is kept.
    fn whole(&self, job: &Job) -> Option<Arc<File>> {
        let state = self.lock();
        state.kept.iter().find(|(device, _)| *device == job.device).map(|(_, directory)| Arc::clone(directory))
    }

    fn tell(&self, jobs: Vec<Job>, outcome: &io::Result<()>) {
        if let Err(error) = outcome {
            self.counts.note_failure();
            log::error!("what was written may not be on the disk: a sync failed files={} error={error}", jobs.len());
            match jobs.as_slice() {
                // The file system has counted it too, and would tell it when other files are open.
                [only] if self.whole(only).is_some_and(|kept| rustix::fs::syncfs(kept).is_err()) => self.suspect_all(only.device),
                [first, _, ..] => self.suspect_all(first.device),
                [] | [_] => {}
            }
        }
        for job in jobs {
            job.finish(outcome);
        }
    }

    /// A file system that could not be synced names no file.
    fn suspect_all(&self, device: u64) {
        let state = self.lock();
        for watched in state.watched.iter().filter_map(Weak::upgrade).filter(|watched| watched.device == device) {
            watched.failed.store(true, Ordering::Release);
        }
    }
}

impl State {
    /// Jobs that are under way from now on, as the sync of this number.
    fn begin(&mut self) -> Option<(u64, Vec<Job>)> {
        let jobs = self.next()?;
        self.begun += 1;
        let first = jobs.first()?;
        let file = (jobs.len() == 1).then(|| Arc::clone(&first.file));
        let since = jobs.iter().map(|job| job.since).min()?;
        let of = Weak::clone(&first.of);
        self.under_way.push(UnderWay { number: self.begun, device: first.device, since, file, of });
        Some((self.begun, jobs))
    }

    /// A job, or with many that wait for one file system, all of these.
    fn next(&mut self) -> Option<Vec<Job>> {
        let under_way = |device| self.under_way.iter().filter(|sync| sync.device == device).count();
        let first = self.jobs.iter().position(|job| under_way(job.device) < AT_ONE_DEVICE)?;
        let device = self.jobs.get(first)?.device;
        if self.one_by_one || self.jobs.iter().filter(|job| job.device == device).count() <= FEW {
            return Some(vec![self.jobs.remove(first)?]);
        }
        let (together, others): (Vec<Job>, Vec<Job>) = self.jobs.drain(..).partition(|job| job.device == device);
        self.jobs = others.into();
        Some(together)
    }
}

impl UnderWay {
    fn reaches(&self, watched: &Inner) -> bool {
        let is_its = |file| Arc::ptr_eq(file, &watched.file) || std::ptr::eq(self.of.as_ptr(), watched);
        self.device == watched.device && self.file.as_ref().is_none_or(is_its)
    }
}

impl Job {
    fn finish(self, outcome: &io::Result<()>) {
        if let Some(watched) = self.of.upgrade() {
            if outcome.is_err() {
                watched.failed.store(true, Ordering::Release);
            }
            if self.is_due {
                watched.queued.store(false, Ordering::Release);
            }
        }
        if let Some(asked) = self.asked {
            let told = outcome.as_ref().copied().map_err(|error| io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(5)));
            // Whoever asked may have given up.
            asked.send(told).ok();
        }
    }
}

/// A job for a file that was written to and is not waiting already.
fn due(watched: &Arc<Inner>) -> Option<Job> {
    let is_due = watched.dirty.load(Ordering::Acquire) && !watched.queued.swap(true, Ordering::AcqRel);
    is_due.then(|| Job {
        file: Arc::clone(&watched.file),
        device: watched.device,
        since: Instant::now(),
        whole: false,
        of: Arc::downgrade(watched),
        is_due: true,
        asked: None,
    })
}

fn stopped() -> io::Error {
    io::Error::other("nothing is synced any more")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(dir: &tempfile::TempDir, count: usize) -> Vec<Arc<File>> {
        (0..count).map(|number| Arc::new(File::create_new(dir.path().join(number.to_string())).expect("a file"))).collect()
    }

    #[tokio::test]
    async fn whoever_asks_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let syncer = Syncer::start().expect("threads");
        let asked: Vec<_> = files(&dir, 40).into_iter().map(|file| syncer.sync(file)).collect();
        for asked in asked {
            asked.await.expect("synced");
        }
        let (files, systems) = (syncer.counts().files.load(Ordering::Relaxed), syncer.counts().file_systems.load(Ordering::Relaxed));
        assert!(systems >= 1 && files + systems < 40, "what waits together is done together: {files} files, {systems} file systems");
        let directory = Arc::new(File::open(dir.path()).expect("a directory"));
        tokio::task::spawn_blocking(move || syncer.sync_now(directory)).await.expect("a thread").expect("synced");
    }

    #[test]
    fn a_file_system_that_hangs_leaves_a_thread_for_the_others() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = Arc::new(File::open(dir.path()).expect("a directory"));
        let job = |device| Job { file: Arc::clone(&file), device, since: Instant::now(), whole: true, of: Weak::new(), is_due: false, asked: None };
        let mut state = State { jobs: [1, 1, 1, 1, 2].map(job).into(), ..State::default() };
        let begun: Vec<u64> = std::iter::from_fn(|| state.begin()).filter_map(|(_, jobs)| Some(jobs.first()?.device)).take(THREADS).collect();
        assert_eq!(begun, [1, 1, 2]);
        state.under_way.retain(|sync| sync.number != 1);
        assert!(state.begin().is_some_and(|(_, jobs)| jobs.iter().all(|job| job.device == 1)), "and goes on when it answers");
    }

    #[tokio::test]
    async fn who_asks_alone_is_heard_by_a_worker_and_not_by_the_clock() {
        let dir = tempfile::tempdir().expect("a directory");
        let syncer = Syncer::with(Duration::from_secs(86_400)).expect("threads");
        for file in files(&dir, 40) {
            tokio::time::timeout(Duration::from_secs(20), syncer.sync(file)).await.expect("heard").expect("synced");
        }
    }

    #[tokio::test]
    async fn a_failure_is_told_and_never_taken_back() {
        let syncer = Syncer::start().expect("threads");
        // A pipe cannot be synced.
        let (_, pipe) = std::io::pipe().expect("a pipe");
        let pipe = Arc::new(File::from(std::os::fd::OwnedFd::from(pipe)));
        let watched = syncer.watch(Arc::clone(&pipe)).expect("watched");
        assert!(!watched.has_failed());
        let failed = async {
            while !watched.has_failed() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(4 * INTERVAL, failed).await.expect("is synced within a second");
        assert_eq!(syncer.sync(pipe).await.map_err(|error| error.kind()), Err(io::ErrorKind::InvalidInput));
        assert!(syncer.counts().failures.load(Ordering::Relaxed) >= 2);
    }

    #[test]
    fn a_file_is_synced_only_when_it_was_written_to() {
        let dir = tempfile::tempdir().expect("a directory");
        let shared = Shared::default();
        let file = files(&dir, 1).remove(0);
        let inner = Inner { file, device: 1, dirty: AtomicBool::new(true), queued: AtomicBool::new(false), failed: AtomicBool::new(false) };
        let watched = Watched { inner: Arc::new(inner) };
        let job = due(&watched.inner).expect("it is new");
        assert!(due(&watched.inner).is_none(), "once at a time");
        shared.run(vec![job]);
        assert!(due(&watched.inner).is_none(), "nothing was written since");
        watched.note_written();
        assert!(due(&watched.inner).is_some());
    }

    #[test]
    fn d5_a_sync_under_way_is_waited_for_and_its_failure_is_never_taken_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let syncer = Syncer::with(Duration::from_secs(86_400)).expect("threads");
        let shared = &syncer.shared;
        for (together, fails) in [(false, false), (false, true), (true, false), (true, true)] {
            let place = tempfile::tempdir_in(&dir).expect("a directory");
            let watched: Vec<Watched> = files(&place, FEW + 2).into_iter().map(|file| syncer.watch(file).expect("watched")).collect();
            let (sealed, others) = watched.split_first().expect("files");
            // A file system that fails names no file: that which is sealed need not be among those it was for.
            let others = if together { others } else { &watched[..1] };
            let (number, jobs) = {
                // No thread takes them meanwhile.
                let mut state = shared.lock();
                state.jobs.extend(others.iter().filter_map(|watched| due(&watched.inner)));
                state.begin().expect("jobs")
            };
            syncer.sync_now(Arc::clone(&sealed.inner.file)).expect("the system has told another of the loss");
            let asked = AtomicBool::new(false);
            let settled = std::thread::scope(|scope| {
                let settling = scope.spawn(|| {
                    asked.store(true, Ordering::Release);
                    syncer.settle(sealed)
                });
                while !asked.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                (0..1_000).for_each(|_| std::thread::yield_now());
                assert!(!settling.is_finished(), "it waits");
                shared.tell(jobs, &if fails { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) });
                drop(shared.end(number));
                settling.join().expect("a thread")
            });
            assert_eq!((settled.is_err(), syncer.settle(sealed).is_err()), (fails, fails), "together: {together}");
        }
    }

    #[tokio::test]
    async fn d5_a_failure_that_is_told_when_nobody_waits_any_more_makes_its_file_suspect() {
        let dir = tempfile::tempdir().expect("a directory");
        let syncer = Syncer::start().expect("threads");
        let watched = syncer.watch(files(&dir, 1).remove(0)).expect("watched");
        // A pipe cannot be synced.
        let (_, pipe) = std::io::pipe().expect("a pipe");
        let pipe = Arc::new(File::from(std::os::fd::OwnedFd::from(pipe)));
        drop(syncer.sync_for(&watched, vec![pipe]));
        let failed = async {
            while !watched.has_failed() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), failed).await.expect("its file is suspect");
        assert!(syncer.settle(&watched).is_err());
    }

    #[test]
    fn d5_the_sync_of_a_name_is_waited_for_as_one_of_its_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let syncer = Syncer::with(Duration::from_secs(86_400)).expect("threads");
        let [one, other] = [0, 1].map(|_| syncer.watch(Arc::new(tempfile::tempfile_in(&dir).expect("a file"))).expect("watched"));
        let directory = Arc::new(File::open(dir.path()).expect("a directory"));
        let of = Arc::downgrade(&one.inner);
        let job = Job { file: directory, device: one.inner.device, since: Instant::now(), whole: true, of, is_due: false, asked: None };
        let mut state = State { jobs: [job].into(), ..State::default() };
        let (_, jobs) = state.begin().expect("a job");
        assert!(state.under_way.iter().any(|sync| sync.reaches(&one.inner)) && !state.under_way.iter().any(|sync| sync.reaches(&other.inner)));
        syncer.shared.tell(jobs, &Err(io::Error::from_raw_os_error(5)));
        assert!(one.has_failed() && !other.has_failed());
    }

    #[test]
    fn a_file_system_is_synced_by_the_directory_that_is_kept_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let syncer = Syncer::start().expect("threads");
        let directory = Arc::new(File::open(dir.path()).expect("a directory"));
        let file = files(&dir, 1).remove(0);
        let job = |device| Job { file: Arc::clone(&file), device, since: Instant::now(), whole: true, of: Weak::new(), is_due: false, asked: None };
        let device = directory.metadata().expect("looked at").dev();
        syncer.keep(Arc::clone(&directory)).expect("kept");
        assert!(syncer.shared.whole(&job(device)).is_some_and(|kept| Arc::ptr_eq(&kept, &directory)));
        assert!(syncer.shared.whole(&job(device + 1)).is_none(), "of another there is none");
    }
}
