//! The thread that owns the journal's files.
//!
//! Appends that wait when one is done share the next write and the next sync, however many they are.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use chrono::Utc;
use tokio::sync::oneshot;

use super::files::{Entry, Files, Position};
use super::{JournalStats, Refused, format};
use crate::fail_point;
use crate::watchdog::EXIT_CODE;

/// Appends that share a sync at most, in bytes: a disk that writes 100 MB/s takes 40 ms for them.
const MAX_BATCH_BYTES: usize = 4 << 20;

/// Payloads on their way to the thread, in bytes, at most: a disk that hangs would fill the memory with them.
const MAX_ON_THE_WAY: u64 = 64 << 20;

/// Whatever waits for the thread: counted as long as this lives.
#[derive(Debug)]
pub(super) struct OnTheWay {
    bytes: u64,
    all: Arc<AtomicU64>,
}

impl OnTheWay {
    /// `None` where more than `limit` would wait, or too much for any memory. What comes alone is the thread's to judge.
    pub(super) fn of(payload: &[u8], all: &Arc<AtomicU64>, limit: u64) -> Option<Self> {
        let bytes = u64::try_from(payload.len()).unwrap_or(u64::MAX);
        let waits = all.fetch_add(bytes, Relaxed).saturating_add(bytes);
        let counted = Self { bytes, all: Arc::clone(all) };
        (waits == bytes || waits <= limit.min(MAX_ON_THE_WAY)).then_some(counted)
    }
}

impl Drop for OnTheWay {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Relaxed);
    }
}

/// An eighth is kept for the rows of tracks: LiveKit repeats what it told, nobody repeats those.
pub(super) fn limit(max_bytes: u64, is_row: bool) -> u64 {
    if is_row { max_bytes } else { max_bytes - max_bytes / 8 }
}

/// What the thread is asked to do.
pub(super) enum Order {
    Append {
        payload: Vec<u8>,
        on_the_way: OnTheWay,
        /// May use what is kept free for the rows of tracks.
        is_row: bool,
        done: oneshot::Sender<Result<(), Refused>>,
    },
    /// Some records from a place on, or from the front.
    Read {
        from: Option<Position>,
        found: oneshot::Sender<io::Result<Vec<Entry>>>,
    },
    /// The records up to `to` have been dealt with.
    Advance {
        to: Position,
        records: u64,
        done: oneshot::Sender<io::Result<()>>,
    },
    SetAside {
        entry: Box<Entry>,
        why: String,
    },
    /// Nothing waits any more.
    Clear(oneshot::Sender<io::Result<()>>),
}

/// Starts the thread, which ends when nobody can give orders any more.
pub(super) fn start(files: Files, max_bytes: u64, stats: Arc<JournalStats>) -> io::Result<Sender<Order>> {
    let (orders, received) = channel();
    let writer = Writer { files, max_bytes, stats, buffer: Vec::new(), waiting: Vec::new() };
    std::thread::Builder::new().name("journal".to_owned()).spawn(move || {
        // Nothing is acknowledged any more without it while the database is away; the next start reads what it has written.
        if catch_unwind(AssertUnwindSafe(|| writer.run(&received))).is_err() {
            log::error!("the journal's thread panicked, the server ends");
            std::process::exit(EXIT_CODE);
        }
    })?;
    Ok(orders)
}

struct Writer {
    files: Files,
    max_bytes: u64,
    stats: Arc<JournalStats>,
    /// Records on their way to one sync.
    buffer: Vec<u8>,
    waiting: Vec<oneshot::Sender<Result<(), Refused>>>,
}

impl Writer {
    fn run(mut self, orders: &Receiver<Order>) {
        while let Ok(order) = orders.recv() {
            let mut other = self.take(order);
            while other.is_none() && self.buffer.len() < MAX_BATCH_BYTES {
                match orders.try_recv() {
                    Ok(order) => other = self.take(order),
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            self.write();
            if let Some(other) = other {
                self.follow(other);
            }
        }
    }

    /// Collects an append; gives back what is none.
    fn take(&mut self, order: Order) -> Option<Order> {
        match order {
            Order::Append { payload, on_the_way: _counted, is_row, done } => {
                self.collect(&payload, is_row, done);
                None
            }
            other @ (Order::Read { .. } | Order::Advance { .. } | Order::SetAside { .. } | Order::Clear(_)) => Some(other),
        }
    }

    fn collect(&mut self, payload: &[u8], is_row: bool, done: oneshot::Sender<Result<(), Refused>>) {
        let length = u64::try_from(payload.len() + format::HEADER_BYTES + self.buffer.len()).unwrap_or(u64::MAX);
        let limit = limit(self.max_bytes, is_row);
        let refused = if self.files.bytes().saturating_add(length) > limit {
            Some(Refused::Full(limit))
        } else {
            let encoded = format::encode(Utc::now().timestamp_millis(), payload, &mut self.buffer);
            encoded.err().map(|error| Refused::Disk(error.to_string()))
        };
        match refused {
            Some(refused) => {
                self.stats.refused.fetch_add(1, Relaxed);
                done.send(Err(refused)).ok();
            }
            None => self.waiting.push(done),
        }
    }

    fn write(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        fail_point::pass("journal-write");
        let records = u64::try_from(self.waiting.len()).unwrap_or(u64::MAX);
        let written = self.files.append(&self.buffer);
        match &written {
            Ok(()) => {
                self.stats.records.fetch_add(records, Relaxed);
                self.stats.appended.fetch_add(records, Relaxed);
                self.stats.syncs.fetch_add(1, Relaxed);
                self.stats.note_oldest(Utc::now().timestamp_millis());
            }
            Err(_) => {
                self.stats.refused.fetch_add(records, Relaxed);
            }
        }
        self.stats.bytes.store(self.files.bytes(), Relaxed);
        for done in self.waiting.drain(..) {
            // Who gave up may find it twice, which does no harm.
            done.send(written.as_ref().map_or_else(|error| Err(Refused::Disk(error.to_string())), |()| Ok(()))).ok();
        }
        self.buffer.clear();
        self.buffer.shrink_to(MAX_BATCH_BYTES);
    }

    fn follow(&mut self, order: Order) {
        match order {
            Order::Append { payload, on_the_way: _counted, is_row, done } => {
                self.collect(&payload, is_row, done);
                self.write();
            }
            Order::Read { from, found } => {
                let read = self.files.read(from.unwrap_or(self.files.front()));
                if let (None, Some(first)) = (from, read.as_ref().ok().and_then(|entries| entries.first())) {
                    self.stats.oldest_ms.store(first.at_ms, Relaxed);
                }
                found.send(read).ok();
            }
            Order::Advance { to, records, done } => {
                let advanced = self.files.advance(to);
                if advanced.is_ok() {
                    self.stats.dealt_with(records);
                    self.stats.bytes.store(self.files.bytes(), Relaxed);
                }
                done.send(advanced).ok();
            }
            Order::SetAside { entry, why } => {
                self.stats.set_aside.fetch_add(1, Relaxed);
                self.files.set_aside(&entry, &why);
            }
            Order::Clear(done) => {
                let cleared = self.files.clear();
                if cleared.is_ok() {
                    self.stats.cleared();
                }
                done.send(cleared).ok();
            }
        }
    }
}
