//! Takes what waits to the database, in order, once that answers again.
//!
//! A record is done with when the store has taken it, or refused it for good: then it is set aside as a `.bad` file. The cursor follows behind a batch, so a
//! process that ends in between does some of it twice, which changes nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::{self, FuturesUnordered, StreamExt};

use super::files::{Entry, Position};
use super::rows::{ConnectionRows, RowOp, RowRecord, Written};
use super::{Journal, Record, lock};
use crate::db::rows::events::{Applied, Arrival};
use crate::db::rows::{NewRecording, SessionRow};
use crate::db::{DbError, Store};
use crate::fail_point;
use crate::ids::RoomName;

/// How long after a refusal the database is asked again whether it takes writes.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// A question without an answer does not keep the next from being asked, but only so many are open: each may hold a connection of the pool.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);
const MAX_PROBES: usize = 3;
/// How long calls that were given up are waited for. Each ends by the time-outs of the pool and of the statement.
const LATE_DEADLINE: Duration = Duration::from_secs(10);
/// With so few left, nothing new is taken in until they are done with: under load there would always be one more.
const LAST_RECORDS: u64 = 64;
/// How long that may take.
const LAST_DEADLINE: Duration = Duration::from_secs(1);
/// Tracks whose rows are written at a time.
const ROWS_AT_ONCE: usize = 4;
/// A database that answers, but refuses one record so often and for so long, will never take it.
const MAX_ATTEMPTS: u32 = 20;
const MAX_STUCK: Duration = Duration::from_secs(60);
/// At a start, the attempts alone decide: nothing is recorded meanwhile.
const MAX_STUCK_AT_START: Duration = Duration::ZERO;
/// From then on records are tried one by one: the one at fault is to be known.
const ALONE_AFTER: u32 = 3;
/// How long after an error of the disk it is read again.
const DISK_RETRY: Duration = Duration::from_secs(5);

/// What replayed webhooks have changed.
#[derive(Debug, Default)]
pub struct Replayed {
    pub sessions: Vec<SessionRow>,
    /// An egress may have to be started or stopped.
    pub may_change_queue: bool,
    /// Something could not be applied: LiveKit is to be asked.
    pub is_incomplete: bool,
}

/// Hears of them.
pub type Tell = Box<dyn Fn(Replayed) -> BoxFuture<'static, ()>>;

/// Why a batch is not done with.
#[derive(Debug, thiserror::Error)]
pub enum Halt {
    #[error("{0}")]
    Database(DbError),
    #[error("{0}")]
    Disk(#[from] io::Error),
}

/// Writes the rows of tracks that earlier runs left in the journal, so that what is open behind them is what really was left open.
/// Webhooks, which may be many, follow by [`run`].
///
/// # Errors
/// When the database does not take them now, or the journal cannot be read. Doing it again does no harm.
pub async fn write_rows(journal: &Journal, store: &Store) -> Result<(), Halt> {
    let mut replayer = Replayer::new(journal.clone(), store.clone(), Box::new(|_| Box::pin(async {})));
    let mut from = *lock(&journal.inner.rows_done);
    let mut rows = 0;
    loop {
        let entries = journal.read(Some(from)).await?;
        let Some(last) = entries.last() else { break };
        let to = last.to;
        let records = entries.into_iter().filter_map(|entry| match serde_json::from_slice(&entry.payload) {
            Ok(Record::Rows(record)) => Some((entry, *record)),
            // Webhooks come later, and what cannot be read is said then.
            Ok(Record::Webhook(_)) | Err(_) => None,
        });
        let records: Vec<_> = records.collect();
        rows += records.len();
        replayer.rows_at_start(records).await?;
        from = to;
        *lock(&journal.inner.rows_done) = to;
    }
    if rows > 0 {
        log::info!("rows of tracks that an earlier run left in the journal are written rows={rows}");
    }
    Ok(())
}

/// Replays whenever something waits. Never ends.
pub async fn run(journal: Journal, store: Store, tell: Tell) {
    let mut replayer = Replayer::new(journal, store, tell);
    if replayer.journal.is_in_use() {
        replayer.until_empty().await;
    }
    loop {
        while !replayer.journal.is_in_use() {
            replayer.journal.inner.used.notified().await;
        }
        log::warn!("the database does not take what comes: webhooks and rows of tracks wait in the journal");
        replayer.until_empty().await;
    }
}

struct Replayer {
    journal: Journal,
    store: Store,
    tell: Tell,
    /// Connections whose rows have been seen, until their end.
    connections: HashMap<String, ConnectionRows>,
    /// Records behind the cursor that are done with.
    done: HashSet<Position>,
    /// The record that is refused, since when, and how often.
    stuck: Option<(Position, Instant, u32)>,
}

impl Replayer {
    fn new(journal: Journal, store: Store, tell: Tell) -> Self {
        Self { journal, store, tell, connections: HashMap::new(), done: HashSet::new(), stuck: None }
    }

    async fn until_empty(&mut self) {
        let (began, before) = (Instant::now(), self.journal.figures());
        loop {
            database_answers(&self.store).await;
            match self.drain().await {
                Ok(()) => break,
                Err((position, Halt::Database(error))) => {
                    log::debug!("the journal waits for the database again error={error}");
                    self.note_refusal(position, &error, MAX_STUCK).await;
                    tokio::time::sleep(PROBE_INTERVAL).await;
                }
                Err((_, Halt::Disk(error))) => {
                    log::error!("the journal cannot be read, it is tried again error={error}");
                    tokio::time::sleep(DISK_RETRY).await;
                }
            }
        }
        let replayed = self.journal.figures().replayed - before.replayed;
        self.connections.clear();
        log::info!("the database has taken all that waited in the journal records={replayed} seconds={}", began.elapsed().as_secs());
    }

    /// What was given up is older than what was kept behind it.
    async fn late_calls(&self) {
        let late = std::mem::take(&mut *lock(&self.journal.inner.late));
        if tokio::time::timeout(LATE_DEADLINE, join_all(late)).await.is_err() {
            log::warn!("calls of the database that were given up still run");
        }
    }

    async fn drain(&mut self) -> Result<(), (Option<Position>, Halt)> {
        fail_point::pass("journal-replay");
        loop {
            let entries = self.journal.read(None).await.map_err(nowhere)?;
            let is_end = entries.is_empty();
            self.apply(entries).await?;
            if (is_end || self.journal.figures().records <= LAST_RECORDS) && self.last_records().await? {
                return Ok(());
            }
        }
    }

    /// Holds newcomers back until the journal is empty, for [`LAST_DEADLINE`] at most, and says whether it is. What is under way then is waited for all the
    /// same: given up, its calls would go on in the store, and come later than what follows them.
    async fn last_records(&mut self) -> Result<bool, (Option<Position>, Halt)> {
        let journal = self.journal.clone();
        let gate = journal.inner.gate.write().await;
        let deadline = tokio::time::Instant::now() + LAST_DEADLINE;
        loop {
            let entries = journal.read(None).await.map_err(nowhere)?;
            if entries.is_empty() {
                return journal.clear().await.map(|()| true).map_err(nowhere);
            }
            let mut applying = pin!(self.apply(entries));
            match tokio::time::timeout_at(deadline, &mut applying).await {
                Ok(applied) => applied?,
                Err(_) => {
                    drop(gate);
                    return applying.await.map(|()| false);
                }
            }
        }
    }

    /// Applies all of a batch, or tells the first that could not be.
    async fn apply(&mut self, entries: Vec<Entry>) -> Result<(), (Option<Position>, Halt)> {
        let Some(last) = entries.last().map(|entry| entry.to) else { return Ok(()) };
        self.late_calls().await;
        let count = u64::try_from(entries.len()).unwrap_or(u64::MAX);
        let rows_done = *lock(&self.journal.inner.rows_done);
        let alone = self.stuck.is_some_and(|(_, _, attempts)| attempts >= ALONE_AFTER);
        let (mut events, mut rows) = (Vec::new(), Vec::new());
        for entry in entries {
            if self.done.contains(&entry.from) {
                continue;
            }
            match serde_json::from_slice::<Record>(&entry.payload) {
                Ok(Record::Webhook(arrival)) => {
                    self.rows(std::mem::take(&mut rows)).await?;
                    events.push((entry, *arrival));
                }
                Ok(Record::Rows(record)) => {
                    if entry.to > rows_done {
                        self.events(std::mem::take(&mut events)).await?;
                        rows.push((entry, *record));
                    }
                }
                Err(error) => self.give_up(entry, format!("it cannot be read: {error}")),
            }
            if alone {
                self.events(std::mem::take(&mut events)).await?;
                self.rows(std::mem::take(&mut rows)).await?;
            }
        }
        self.events(events).await?;
        self.rows(rows).await?;
        self.journal.advance(last, count).await.map_err(nowhere)?;
        self.done.clear();
        self.stuck = None;
        Ok(())
    }

    /// Webhooks that follow each other go to the store together, in their order.
    async fn events(&mut self, events: Vec<(Entry, Arrival)>) -> Result<(), (Option<Position>, Halt)> {
        if events.is_empty() {
            return Ok(());
        }
        let mut told = Replayed::default();
        let applied = self.store.apply_in_order(events.iter().map(|(_, arrival)| arrival.clone()).collect()).await;
        let mut halt = None;
        for ((entry, arrival), applied) in events.into_iter().zip(applied) {
            match applied {
                Err(error) if error.is_retryable() => {
                    halt.get_or_insert((Some(entry.from), Halt::Database(error)));
                    continue;
                }
                Err(error) => {
                    told.is_incomplete = true;
                    self.give_up(entry, error.to_string());
                    continue;
                }
                Ok(Applied::Kept(session)) => {
                    told.may_change_queue |= arrival.event.kind.may_change_queue();
                    told.sessions.extend(session);
                }
                Ok(Applied::Repeated) => {}
                Ok(Applied::Failed(problem)) => {
                    told.is_incomplete = true;
                    log::error!(
                        "a webhook is kept that could not be applied event={:?} event_id={} problem={problem:?}",
                        arrival.event.name,
                        arrival.event.id
                    );
                }
            }
            self.done.insert(entry.from);
        }
        (self.tell)(told).await;
        halt.map_or(Ok(()), Err)
    }

    /// The rows of a track follow each other, also those of several connections: they write one recording. Tracks do not wait for one another.
    async fn rows(&mut self, rows: Vec<(Entry, RowRecord)>) -> Result<(), (Option<Position>, Halt)> {
        let mut tracks: BTreeMap<(RoomName, String), Vec<(Entry, RowRecord)>> = BTreeMap::new();
        for (entry, record) in rows {
            let NewRecording { room, track, .. } = &record.rows.recording;
            let track = track.as_ref().map_or_else(|| record.connection.clone(), ToString::to_string);
            tracks.entry((room.clone(), track)).or_default().push((entry, record));
        }
        let known = |records: &[(Entry, RowRecord)], all: &mut HashMap<String, ConnectionRows>| -> HashMap<String, ConnectionRows> {
            records.iter().filter_map(|(_, record)| all.remove_entry(&record.connection)).collect()
        };
        let tracks: Vec<_> = tracks.into_values().map(|records| (known(&records, &mut self.connections), records)).collect();
        let written = stream::iter(tracks).map(|(known, records)| write(&self.store, known, records));
        let written: Vec<_> = written.buffer_unordered(ROWS_AT_ONCE).collect().await;
        let mut halt = None;
        for TrackWritten { known, done, bad, first, failed } in written {
            self.connections.extend(known);
            self.done.extend(done);
            for (entry, why) in bad {
                self.give_up(entry, why);
            }
            for (connection, written) in first {
                if let Some(told) = self.journal.take_spent(&connection).filter(|_| written == Written::TicketSpent) {
                    // The connection may have ended.
                    told.send(()).ok();
                }
            }
            if let Some((position, error)) = failed {
                halt.get_or_insert((Some(position), Halt::Database(error)));
            }
        }
        halt.map_or(Ok(()), Err)
    }

    /// The same before anything else is written. What the database refuses in words would keep every start from succeeding: after some attempts it is set aside.
    async fn rows_at_start(&mut self, rows: Vec<(Entry, RowRecord)>) -> Result<(), Halt> {
        loop {
            let left = rows.iter().filter(|(entry, _)| !self.done.contains(&entry.from)).cloned().collect();
            match self.rows(left).await {
                Ok(()) => break,
                Err((position, Halt::Database(error @ DbError::Query(_)))) if !error.is_outage() => {
                    self.note_refusal(position, &error, MAX_STUCK_AT_START).await;
                    tokio::time::sleep(PROBE_INTERVAL).await;
                }
                Err((_, halt)) => return Err(halt),
            }
        }
        self.done.clear();
        Ok(())
    }

    /// The database answers, and yet it does not take a record. After so many attempts, and so long, it never will.
    async fn note_refusal(&mut self, position: Option<Position>, error: &DbError, max_stuck: Duration) {
        // Who holds its rows for minutes refuses nothing.
        let Some(position) = position.filter(|_| !error.is_outage()) else { return };
        let (since, attempts) = match self.stuck {
            Some((same, since, attempts)) if same == position => (since, attempts + 1),
            Some(_) | None => (Instant::now(), 1),
        };
        self.stuck = Some((position, since, attempts));
        if attempts < MAX_ATTEMPTS || since.elapsed() < max_stuck {
            return;
        }
        if let Ok(entries) = self.journal.read(Some(position)).await
            && let Some(entry) = entries.into_iter().next()
        {
            self.give_up(entry, format!("the database answers, and does not take it: {error}"));
            (self.tell)(Replayed { is_incomplete: true, ..Replayed::default() }).await;
        }
        self.stuck = None;
    }

    fn give_up(&mut self, entry: Entry, why: String) {
        self.done.insert(entry.from);
        self.journal.set_aside(entry, why);
    }
}

/// What came of a track's rows.
#[derive(Default)]
struct TrackWritten {
    /// Connections that have not ended.
    known: HashMap<String, ConnectionRows>,
    done: Vec<Position>,
    bad: Vec<(Entry, String)>,
    /// What came of the first segments of connections, and so of their tickets.
    first: Vec<(String, Written)>,
    failed: Option<(Position, DbError)>,
}

async fn write(store: &Store, known: HashMap<String, ConnectionRows>, records: Vec<(Entry, RowRecord)>) -> TrackWritten {
    let mut track = TrackWritten { known, ..TrackWritten::default() };
    for (entry, RowRecord { connection, rows, op }) in records {
        let (is_first, is_end) = (matches!(op, RowOp::Opened(_, Some(_))), matches!(op, RowOp::End));
        let rows = track.known.entry(connection.clone()).or_insert(rows);
        match rows.write(store, op).await {
            Ok(written) => {
                track.first.extend(is_first.then(|| (connection.clone(), written)));
                track.done.push(entry.from);
            }
            Err(error) if error.is_retryable() => {
                track.failed = Some((entry.from, error));
                break;
            }
            Err(error) => track.bad.push((entry, error.to_string())),
        }
        if is_end {
            track.known.remove(&connection);
        }
    }
    track
}

/// Resolves when the database takes writes.
async fn database_answers(store: &Store) {
    let mut probes = FuturesUnordered::new();
    loop {
        if probes.len() < MAX_PROBES {
            probes.push(store.probe());
        }
        match tokio::time::timeout(PROBE_PATIENCE, probes.next()).await {
            Ok(Some(Ok(()))) => return,
            Ok(Some(Err(_)) | None) => tokio::time::sleep(PROBE_INTERVAL).await,
            Err(_) => {}
        }
    }
}

fn nowhere(error: io::Error) -> (Option<Position>, Halt) {
    (None, Halt::Disk(error))
}

#[cfg(test)]
mod tests;
