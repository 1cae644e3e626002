//! The rows of one track, in order, for as long as the database takes: rows follow, the recording never waits for them.
//!
//! A task of the store owns the order; it outlives the actors. What the database does not take within a second goes to the [`Journal`], and what follows goes
//! behind it, so that neither a database that is down nor a process that is killed meanwhile costs a row. Only where the journal takes nothing either do
//! rows wait in memory. Measurements and facts could become many there: the ones have a bound, and of the others one waits.

mod abandoned;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use self::abandoned::Abandoned;
use crate::actors::child::{RestartBudget, RestartPolicy, Verdict, backoff, jitter};
use crate::db::rows::{ClosedSegment, NewRecording, TrackFacts, TrackKind};
use crate::db::{DbError, Store};
use crate::fail_point;
use crate::ids::{Identity, MeetingId, RecordingId, RoomName, SegmentId, TicketId, TrackSid, new_row_id};
use crate::journal::rows::{ConnectionRows, Measured, OpenedSegment, RowOp, RowRecord, Written};
use crate::journal::{Behind, Journal, Record, Refused};
use crate::recording::root::Root;
use crate::video::codec::Container;
use crate::watchdog::{Watchdog, Work};

const FIRST_RETRY: Duration = Duration::from_millis(100);
/// Replies of an analysis service that wait for the database: ten minutes of them, in groups of 2 s.
const MAX_MEASURED: usize = 300;
const MAX_RETRY: Duration = Duration::from_secs(5);
/// How long the database may take for a row before the journal does. A shutdown waits twice as long for rows.
const ROW_PATIENCE: Duration = Duration::from_secs(1);

/// How soon a file that a dead writer has left is tried again, and then later and later.
const HELD_RETRY: Duration = Duration::from_millis(100);

/// Of one row that panics.
const RESTARTS: RestartPolicy =
    RestartPolicy { intensity: 5, window: Duration::from_secs(60), first_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(5) };

/// Whose rows they are.
#[derive(Debug, Clone)]
pub struct TrackIdentity {
    pub meeting: MeetingId,
    pub room: RoomName,
    pub participant: Option<Identity>,
    pub track: Option<TrackSid>,
    /// Of the session that the recording belongs to, if one is known.
    pub session_started_at: Option<DateTime<Utc>>,
}

/// What is to become rows.
#[derive(Clone)]
enum Told {
    Opened(OpenedSegment),
    Closed(ClosedSegment),
    /// Its writer died.
    Abandoned(SegmentId),
    Facts(TrackFacts),
    Measured(Vec<Measured>),
    End,
    /// The files that were still held may be free by now.
    Again,
}

enum Op {
    Row(Told),
    /// Answers when everything before it is in the database or in the journal.
    Flush(oneshot::Sender<()>),
}

/// The way to the rows of one track. Cheap to clone; every call returns at once.
#[derive(Debug, Clone)]
pub struct RowLog {
    /// Boxed: a channel holds room for 32 of them from the start, and a track that is idle sends none.
    ops: mpsc::UnboundedSender<Box<Op>>,
    measured_waiting: Arc<AtomicUsize>,
    facts_waiting: Arc<AtomicBool>,
}

impl RowLog {
    /// `spent` is told when the connection's ticket turns out to have opened another before.
    pub fn start(
        store: Store,
        journal: Journal,
        root: Root,
        identity: TrackIdentity,
        ticket: Option<TicketId>,
        spent: oneshot::Sender<()>,
        watchdog: &Watchdog,
    ) -> Self {
        let (ops, received) = mpsc::unbounded_channel();
        let (measured_waiting, facts_waiting) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let keeper = Keeper {
            store: store.clone(),
            journal,
            root,
            identity,
            connection: new_row_id(),
            ticket,
            rows: None,
            open: Vec::new(),
            held: Vec::new(),
            held_tries: 0,
            measured_waiting: Arc::clone(&measured_waiting),
            facts_waiting: Arc::clone(&facts_waiting),
            spent: Some(spent),
            work: watchdog.work("the rows of a track".to_owned()),
        };
        store.spawn(keeper.run(received));
        Self { ops, measured_waiting, facts_waiting }
    }

    pub fn segment_opened(&self, segment: OpenedSegment) {
        self.put(Told::Opened(segment));
    }

    pub fn segment_closed(&self, segment: ClosedSegment) {
        self.put(Told::Closed(segment));
    }

    /// Its writer died: the file says how it ended.
    pub fn segment_abandoned(&self, id: SegmentId) {
        self.put(Told::Abandoned(id));
    }

    /// Mute spans count from the connection's first sample.
    pub fn facts(&self, facts: TrackFacts) {
        self.facts_waiting.store(true, Relaxed);
        self.put(Told::Facts(facts));
    }

    /// Whether earlier facts still wait for the database: newer ones had better wait too.
    pub fn facts_are_waiting(&self) -> bool {
        self.facts_waiting.load(Relaxed)
    }

    /// Behind a database that is down, a bounded number of them waits; what comes then is dropped, and said.
    pub fn measured(&self, measured: Vec<Measured>) {
        if self.measured_waiting.fetch_add(1, Relaxed) < MAX_MEASURED {
            self.put(Told::Measured(measured));
        } else {
            self.measured_waiting.fetch_sub(1, Relaxed);
            log::error!("measurements are lost: the database has been away for too long");
        }
    }

    /// Ends the recording's row.
    pub fn end(&self) {
        self.put(Told::End);
    }

    /// Resolves when everything so far is in the database, or in the journal.
    pub async fn flushed(&self) {
        let (done, flushed) = oneshot::channel();
        self.send(Op::Flush(done));
        if flushed.await.is_err() {
            log::error!("rows of a track were not written: their task is gone");
        }
    }

    fn put(&self, told: Told) {
        self.send(Op::Row(told));
    }

    fn send(&self, op: Op) {
        if self.ops.send(Box::new(op)).is_err() {
            log::error!("a row of a track was not written: its task is gone");
        }
    }
}

struct Keeper {
    store: Store,
    journal: Journal,
    root: Root,
    identity: TrackIdentity,
    /// In the journal.
    connection: String,
    /// Goes on the row of the connection's first segment.
    ticket: Option<TicketId>,
    /// `None` until there is a segment.
    rows: Option<ConnectionRows>,
    /// The segments whose end nobody has reported yet: the one that is written, one that is being sealed, and those of writers that died.
    open: Vec<OpenedSegment>,
    /// Those of dead writers whose files cannot be closed yet.
    held: Vec<Abandoned>,
    held_tries: u32,
    measured_waiting: Arc<AtomicUsize>,
    facts_waiting: Arc<AtomicBool>,
    spent: Option<oneshot::Sender<()>>,
    work: Work,
}

/// A step that the database is doing, with what it says of the recording.
type Writing = JoinHandle<(ConnectionRows, Result<Written, DbError>)>;

impl Keeper {
    async fn run(mut self, mut ops: mpsc::UnboundedReceiver<Box<Op>>) {
        // What an operation needs is 4 KiB, which the thousands that wait for one do not hold.
        while let Some(op) = self.next(&mut ops).await {
            match *op {
                Op::Row(told) => self.keep_in_spite_of_panics(told).await,
                Op::Flush(done) => {
                    // Nobody may be waiting any more.
                    done.send(()).ok();
                }
            }
        }
        // A track that died could not say its end.
        self.keep_in_spite_of_panics(Told::End).await;
        if !self.held.is_empty() {
            // Nothing is told any more: this ends when no file is held.
            self.next(&mut ops).await;
            self.keep_in_spite_of_panics(Told::End).await;
        }
    }

    /// What is told next. Meanwhile files that were held are tried again.
    async fn next(&mut self, ops: &mut mpsc::UnboundedReceiver<Box<Op>>) -> Option<Box<Op>> {
        while !self.held.is_empty() {
            let wait = backoff(self.held_tries, HELD_RETRY, MAX_RETRY, jitter());
            match tokio::time::timeout(wait, ops.recv()).await {
                Ok(Some(op)) => return Some(op),
                Ok(None) => tokio::time::sleep(wait).await,
                Err(_) => {}
            }
            self.held_tries = self.held_tries.saturating_add(1);
            self.keep_in_spite_of_panics(Told::Again).await;
        }
        self.held_tries = 0;
        ops.recv().await
    }

    /// A panic costs neither the row, which is tried again as it may be done twice, nor those behind it.
    async fn keep_in_spite_of_panics(&mut self, told: Told) {
        match &told {
            Told::Facts(_) => self.facts_waiting.store(false, Relaxed),
            Told::Measured(_) => {
                self.measured_waiting.fetch_sub(1, Relaxed);
            }
            Told::Opened(_) | Told::Closed(_) | Told::Abandoned(_) | Told::End | Told::Again => {}
        }
        let mut budget = RestartBudget::new(RESTARTS);
        self.work.begin();
        while Box::pin(AssertUnwindSafe(self.keep(told.clone())).catch_unwind()).await.is_err() {
            let Verdict::RestartIn(wait) = budget.on_failure(Instant::now(), jitter()) else {
                log::error!("a row of a track is given up: it panics again and again connection={}", self.connection);
                break;
            };
            log::error!("a row of a track panicked, trying again connection={}", self.connection);
            tokio::time::sleep(wait).await;
        }
        self.work.end();
    }

    async fn keep(&mut self, told: Told) {
        fail_point::hold("rows-keep").await;
        match told {
            Told::Opened(segment) => {
                self.open.retain(|open| open.id != segment.id);
                self.open.push(segment.clone());
                if self.rows.is_none() {
                    let TrackIdentity { meeting, room, participant, track, .. } = self.identity.clone();
                    let (id, kind) = (RecordingId::fresh(), TrackKind::of(Container::of(&segment.path)));
                    let recording = NewRecording { id, meeting, room, participant, track, kind, started_at: segment.started_at };
                    self.rows = Some(ConnectionRows { recording, opened: None });
                }
                self.write("segment", RowOp::Opened(segment, self.ticket.clone())).await;
                self.ticket = None;
            }
            Told::Closed(closed) => {
                self.open.retain(|open| open.id != closed.id);
                self.write("segment", RowOp::Closed(closed)).await;
            }
            Told::Facts(facts) => {
                self.write("track", RowOp::Facts(facts)).await;
            }
            Told::Measured(measured) => self.write("measurements", RowOp::Measured(measured)).await,
            Told::Abandoned(id) => {
                let (dead, others) = std::mem::take(&mut self.open).into_iter().partition(|open| open.id == id);
                self.open = others;
                self.close_abandoned(Abandoned::all(dead)).await;
            }
            Told::End => self.end().await,
            Told::Again => {
                let held = std::mem::take(&mut self.held);
                self.close_abandoned(held).await;
            }
        }
    }

    async fn end(&mut self) {
        let open = std::mem::take(&mut self.open);
        self.close_abandoned(Abandoned::all(open)).await;
        self.write("recording", RowOp::End).await;
    }

    /// Returns when the step is in the database or in the journal, or can never be. Without a segment there is no row to be written.
    async fn write(&mut self, what: &str, op: RowOp) {
        let mut attempt = 0;
        while let Some(rows) = self.rows.clone() {
            let record = RowRecord { connection: self.connection.clone(), rows: rows.clone(), op: op.clone() };
            let record = Record::Rows(Box::new(record));
            let behind = if self.journal.is_in_use() { self.put_off(&record, &op, true).await } else { Behind::NothingWaits };
            match behind {
                Behind::Kept => return,
                Behind::NothingWaits => {}
                Behind::Refused(refused) => {
                    // What the connection told before may be in there: it would come later than this.
                    say_that_it_waits(what, attempt, "others wait for the database before it", &refused);
                    tokio::time::sleep(backoff(attempt, FIRST_RETRY, MAX_RETRY, jitter())).await;
                    attempt += 1;
                    continue;
                }
            }
            let mut writing = self.begin(rows, op.clone());
            let (problem, late) = match tokio::time::timeout(ROW_PATIENCE, &mut writing).await {
                Ok(Ok((rows, Err(error)))) if error.is_retryable() => {
                    self.rows = Some(rows);
                    (error.to_string(), None)
                }
                Ok(Ok((rows, outcome))) => return self.is_written(what, rows, outcome),
                Ok(Err(error)) => (error.to_string(), None),
                Err(_) => (format!("no answer within {} s", ROW_PATIENCE.as_secs()), Some(writing)),
            };
            match self.put_off(&record, &op, false).await {
                Behind::Kept => {
                    if let Some(writing) = late {
                        self.journal.wait_for(tokio::spawn(tell_if_spent(writing, self.journal.clone(), self.connection.clone())));
                    }
                    return;
                }
                Behind::NothingWaits => {}
                Behind::Refused(refused) => say_that_it_waits(what, attempt, &problem, &refused),
            }
            // A call that may still succeed is not made twice.
            if let Some(writing) = late
                && let Ok((rows, outcome)) = writing.await
            {
                if !outcome.as_ref().is_err_and(DbError::is_retryable) {
                    return self.is_written(what, rows, outcome);
                }
                self.rows = Some(rows);
            }
            tokio::time::sleep(backoff(attempt, FIRST_RETRY, MAX_RETRY, jitter())).await;
            attempt += 1;
        }
    }

    fn begin(&self, mut rows: ConnectionRows, op: RowOp) -> Writing {
        let store = self.store.clone();
        tokio::spawn(async move {
            fail_point::hold("rows-write").await;
            let outcome = rows.write(&store, op).await;
            (rows, outcome)
        })
    }

    /// Gives a step to the journal, and with the first segment's the question whether the ticket was spent.
    async fn put_off(&mut self, record: &Record, op: &RowOp, behind: bool) -> Behind {
        let asks = matches!(op, RowOp::Opened(_, Some(_)));
        if let Some(spent) = self.spent.take_if(|_| asks) {
            self.journal.tell_spent(&self.connection, spent);
        }
        let put_off = if behind {
            self.journal.keep_behind(record).await
        } else {
            self.journal.keep(record).await.map_or_else(Behind::Refused, |()| Behind::Kept)
        };
        if asks && put_off != Behind::Kept {
            self.spent = self.journal.take_spent(&self.connection);
        }
        put_off
    }

    fn is_written(&mut self, what: &str, rows: ConnectionRows, outcome: Result<Written, DbError>) {
        self.rows = Some(rows);
        match outcome {
            Ok(Written::AsSaid) => {}
            Ok(Written::TicketSpent) => {
                if let Some(spent) = self.spent.take() {
                    // The connection may have ended.
                    spent.send(()).ok();
                }
            }
            Err(error) => log::error!("a row was not written what={what} error={error}"),
        }
    }
}

/// Said once of each row.
fn say_that_it_waits(what: &str, attempt: u32, problem: &str, refused: &Refused) {
    if attempt == 0 {
        log::error!("a row waits for the database, and in memory alone what={what} problem={problem:?} journal={refused}");
    }
}

/// The end of a call that was given up, whose step is done again by way of the journal: its word of the ticket is the one that counts.
async fn tell_if_spent(writing: Writing, journal: Journal, connection: String) {
    if let Ok((_, Ok(Written::TicketSpent))) = writing.await
        && let Some(spent) = journal.take_spent(&connection)
    {
        // The connection may have ended.
        spent.send(()).ok();
    }
}

#[cfg(test)]
mod tests;
