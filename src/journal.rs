//! What the database could not take in time, on the disk: webhooks and the rows of tracks, in their order, until it takes them.
//!
//! While the database answers, nothing comes here, no file exists, and a thread sleeps. When it does not, whoever could not write appends a
//! [`Record`], and is told when that is on the disk. From then on everything goes behind it, so that nothing overtakes, until [`replay`] has applied all of
//! it through the same calls of the store. A call that had been given up may still succeed later: events have ids, and rows have theirs before they are
//! written, so that what comes twice changes nothing.
//!
//! Full or unwritable: the record is refused. Webhooks are then answered 503, so that LiveKit repeats them; rows wait in memory.

mod files;
mod format;
mod record;
pub mod replay;
pub mod rows;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use chrono::Utc;
use serde::Serialize;
use tokio::sync::{Notify, RwLock, oneshot};
use tokio::task::JoinHandle;

use self::files::{Entry, Files, Position};
pub use self::files::{Waiting, look};
pub use self::record::Record;
use self::writer::{OnTheWay, Order};

/// The journal's place below `storage.dir`.
pub const DIRECTORY: &str = "journal";

/// Why the journal did not take a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the journal is full: {0} bytes wait for the database")]
    Full(u64),
    #[error("the journal's disk is slow: {0} bytes wait for it")]
    Slow(u64),
    #[error("the journal cannot be written: {0}")]
    Disk(String),
}

/// What came of a record that was to go behind others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Behind {
    /// It is on the disk.
    Kept,
    /// Nothing waits any more: the database takes it.
    NothingWaits,
    Refused(Refused),
}

/// Counters of the journal, for whoever shows them.
#[derive(Debug, Default)]
pub struct JournalStats {
    in_use: AtomicBool,
    records: AtomicU64,
    bytes: AtomicU64,
    /// Milliseconds since 1970; 0 for none.
    oldest_ms: AtomicI64,
    appended: AtomicU64,
    syncs: AtomicU64,
    replayed: AtomicU64,
    refused: AtomicU64,
    set_aside: AtomicU64,
}

/// [`JournalStats`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JournalFigures {
    /// That wait for the database now.
    pub records: u64,
    /// On the disk, with records of files that are not done with.
    pub bytes: u64,
    /// How long the oldest has waited.
    pub oldest_seconds: u64,
    /// Since the start, as all that follow.
    pub appended: u64,
    /// Syncs that they shared.
    pub syncs: u64,
    /// That the database has taken.
    pub replayed: u64,
    /// That found no room or no disk.
    pub refused: u64,
    /// That can never be applied, and parts that were corrupt; each is a `.bad` file.
    pub set_aside: u64,
}

/// The way into the journal. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Journal {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    max_bytes: u64,
    orders: Sender<Order>,
    on_the_way: Arc<AtomicU64>,
    stats: Arc<JournalStats>,
    /// Held shared while a record is appended, and alone for the last records, so that there is a last one.
    gate: RwLock<()>,
    used: Notify,
    /// Calls of the store that were given up and still run.
    late: Mutex<Vec<JoinHandle<()>>>,
    /// Connections that want to know of a spent ticket.
    spent: Mutex<Vec<(String, oneshot::Sender<()>)>>,
    /// Where the rows of earlier runs end, which have been applied.
    rows_done: Mutex<Position>,
}

impl Journal {
    /// Opens the journal of a storage directory, with what an earlier run left in it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(storage: &Path, max_bytes: u64) -> io::Result<Self> {
        let dir: PathBuf = storage.join(DIRECTORY);
        let (files, waiting) = Files::open(&dir)?;
        let stats = JournalStats {
            in_use: AtomicBool::new(waiting.records > 0 || waiting.bytes > 0),
            records: AtomicU64::new(waiting.records),
            bytes: AtomicU64::new(waiting.bytes),
            oldest_ms: AtomicI64::new(waiting.oldest_ms.unwrap_or(0)),
            set_aside: AtomicU64::new(waiting.corrupt),
            ..JournalStats::default()
        };
        if waiting.records > 0 {
            log::warn!("an earlier run left records in the journal, which are applied now records={} bytes={}", waiting.records, waiting.bytes);
        }
        let stats = Arc::new(stats);
        let inner = Inner {
            dir,
            max_bytes,
            orders: writer::start(files, max_bytes, Arc::clone(&stats))?,
            on_the_way: Arc::default(),
            stats,
            gate: RwLock::default(),
            used: Notify::new(),
            late: Mutex::default(),
            spent: Mutex::default(),
            rows_done: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Whether something waits, so that the next has to go behind it.
    pub fn is_in_use(&self) -> bool {
        self.inner.stats.in_use.load(Relaxed)
    }

    /// Keeps a record that the database did not take. Resolves when it is on the disk.
    ///
    /// # Errors
    /// When there is no room for it.
    pub async fn keep(&self, record: &Record) -> Result<(), Refused> {
        let _gate = self.inner.gate.read().await;
        self.append(record).await
    }

    /// Keeps a record if others wait.
    pub async fn keep_behind(&self, record: &Record) -> Behind {
        let _gate = self.inner.gate.read().await;
        if !self.is_in_use() {
            return Behind::NothingWaits;
        }
        match self.append(record).await {
            Ok(()) => Behind::Kept,
            // A journal that takes nothing and holds nothing is in nobody's way.
            Err(_) if self.inner.stats.records.load(Relaxed) == 0 => Behind::NothingWaits,
            Err(refused) => Behind::Refused(refused),
        }
    }

    async fn append(&self, record: &Record) -> Result<(), Refused> {
        let payload = serde_json::to_vec(record).map_err(|error| Refused::Disk(error.to_string()))?;
        let is_row = matches!(record, Record::Rows(_));
        let limit = writer::limit(self.inner.max_bytes, is_row);
        let Some(on_the_way) = OnTheWay::of(&payload, &self.inner.on_the_way, limit) else {
            self.inner.stats.refused.fetch_add(1, Relaxed);
            return Err(Refused::Slow(self.inner.on_the_way.load(Relaxed)));
        };
        self.inner.stats.in_use.store(true, Relaxed);
        let (done, kept) = oneshot::channel();
        let order = Order::Append { payload, on_the_way, is_row, done };
        let gone = || Refused::Disk("its thread is gone".to_owned());
        self.inner.orders.send(order).map_err(|_| gone())?;
        let kept = kept.await.map_err(|_| gone())?;
        self.inner.used.notify_one();
        kept
    }

    /// Remembers a call of the store that was given up: what is replayed waits for it, so that it does not come later than what follows it.
    pub fn wait_for(&self, call: JoinHandle<()>) {
        let mut late = lock(&self.inner.late);
        late.retain(|call| !call.is_finished());
        late.push(call);
    }

    /// `told` hears if the ticket of a connection turns out to be spent when its rows are applied.
    pub fn tell_spent(&self, connection: &str, told: oneshot::Sender<()>) {
        lock(&self.inner.spent).push((connection.to_owned(), told));
    }

    /// Whom [`Self::tell_spent`] named, once.
    pub fn take_spent(&self, connection: &str) -> Option<oneshot::Sender<()>> {
        let mut waiting = lock(&self.inner.spent);
        let place = waiting.iter().position(|(asker, _)| asker == connection)?;
        Some(waiting.swap_remove(place).1)
    }

    /// The number of `.bad` files that lie in the journal's directory, of this run and of earlier ones.
    ///
    /// # Errors
    /// What the file system says.
    pub fn bad_files(&self) -> io::Result<u64> {
        files::set_aside_in(&self.inner.dir)
    }

    pub fn figures(&self) -> JournalFigures {
        let stats = &self.inner.stats;
        let oldest = Some(stats.oldest_ms.load(Relaxed)).filter(|oldest| *oldest > 0);
        let age_ms = oldest.map_or(0, |oldest| Utc::now().timestamp_millis() - oldest);
        JournalFigures {
            records: stats.records.load(Relaxed),
            bytes: stats.bytes.load(Relaxed),
            oldest_seconds: u64::try_from(age_ms / 1_000).unwrap_or(0),
            appended: stats.appended.load(Relaxed),
            syncs: stats.syncs.load(Relaxed),
            replayed: stats.replayed.load(Relaxed),
            refused: stats.refused.load(Relaxed),
            set_aside: stats.set_aside.load(Relaxed),
        }
    }

    async fn read(&self, from: Option<Position>) -> io::Result<Vec<Entry>> {
        self.ask(|found| Order::Read { from, found }).await
    }

    async fn advance(&self, to: Position, records: u64) -> io::Result<()> {
        self.ask(|done| Order::Advance { to, records, done }).await
    }

    async fn clear(&self) -> io::Result<()> {
        self.ask(Order::Clear).await
    }

    fn set_aside(&self, entry: Entry, why: String) {
        if self.inner.orders.send(Order::SetAside { entry: Box::new(entry), why }).is_err() {
            log::error!("the journal's thread is gone");
        }
    }

    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<io::Result<T>>) -> Order) -> io::Result<T> {
        let (answer, answered) = oneshot::channel();
        let gone = || io::Error::other("the journal's thread is gone");
        self.inner.orders.send(order(answer)).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

impl JournalStats {
    fn note_oldest(&self, at_ms: i64) {
        // Only the first of an outage.
        self.oldest_ms.compare_exchange(0, at_ms, Relaxed, Relaxed).ok();
    }

    fn dealt_with(&self, records: u64) {
        self.records.fetch_sub(records.min(self.records.load(Relaxed)), Relaxed);
        self.replayed.fetch_add(records, Relaxed);
    }

    fn cleared(&self) {
        self.records.store(0, Relaxed);
        self.bytes.store(0, Relaxed);
        self.oldest_ms.store(0, Relaxed);
        self.in_use.store(false, Relaxed);
    }
}

/// Nothing panics while these are held.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
