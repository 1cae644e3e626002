//! Events that arrive while a transaction is under way share the next one: a commit costs a sync of the disk, whatever is in it.
//!
//! SQLite has one writer, so one lane. PostgreSQL has several; a room keeps its lane, so that its events keep their order and no two lanes wait for each
//! other's rows. What is given to a lane together stays together: where the database does not take an event, none that was behind it is tried before it.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Weak};

use futures_util::future::join_all;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};

use super::rows::Host;
use super::rows::events::{Applied, Arrival};
use super::{DbError, Engine, Inner, Store};
use crate::fail_point;

/// Events in one transaction: the first of them waits no longer than it takes to apply so many.
const MAX_BATCH: usize = 64;
/// Transactions at a time on PostgreSQL; the rest of its pool is for everybody else.
const POSTGRES_LANES: usize = 4;

/// The lanes of one store.
pub(super) struct Lanes {
    lanes: Vec<mpsc::UnboundedSender<Vec<Waiting>>>,
}

struct Waiting {
    arrival: Arrival,
    host: Arc<Host>,
    answer: oneshot::Sender<Result<Applied, DbError>>,
}

impl Lanes {
    pub(super) fn start(runtime: &Runtime, inner: &Weak<Inner>, engine: &Engine) -> Self {
        let lanes = match engine {
            Engine::Sqlite(_) => 1,
            Engine::Postgres(_) => POSTGRES_LANES,
        };
        let lane = |_| {
            let (sender, waiting) = mpsc::unbounded_channel();
            runtime.spawn(drive(Weak::clone(inner), waiting));
            sender
        };
        Self { lanes: (0..lanes).map(lane).collect() }
    }

    /// They take their places at once, so that calls keep their order. As many wait as requests are open, which the HTTP server bounds, or as the journal
    /// reads at a time.
    pub(super) fn apply(&self, arrivals: Vec<Arrival>, host: &Arc<Host>) -> impl Future<Output = Vec<Result<Applied, DbError>>> + Send + use<> {
        let mut lanes: Vec<Vec<Waiting>> = self.lanes.iter().map(|_| Vec::new()).collect();
        let mut answers = Vec::with_capacity(arrivals.len());
        for arrival in arrivals {
            let hash = BuildHasherDefault::<DefaultHasher>::new().hash_one(sid(&arrival));
            let lane = usize::try_from(hash).unwrap_or_default().checked_rem(lanes.len()).unwrap_or_default();
            let (answer, applied) = oneshot::channel();
            answers.push(applied);
            if let Some(lane) = lanes.get_mut(lane) {
                lane.push(Waiting { arrival, host: Arc::clone(host), answer });
            }
        }
        for (lane, waiting) in self.lanes.iter().zip(lanes) {
            if !waiting.is_empty() {
                // What a lane that has ended does not take is dropped, and so its answer.
                lane.send(waiting).ok();
            }
        }
        async move {
            let stopped = |_| Err(DbError::Connect("the store has stopped".to_owned()));
            join_all(answers).await.into_iter().map(|applied| applied.unwrap_or_else(stopped)).collect()
        }
    }
}

async fn drive(inner: Weak<Inner>, mut waiting: mpsc::UnboundedReceiver<Vec<Waiting>>) {
    let mut batch = Vec::with_capacity(MAX_BATCH);
    while waiting.recv_many(&mut batch, MAX_BATCH).await > 0 {
        let Some(inner) = inner.upgrade() else { return };
        // A panic costs those who wait for this transaction their answer, which they ask for again, and the lane goes on.
        if let Err(error) = tokio::spawn(commit(inner, batch.drain(..).flatten().collect())).await {
            log::error!("webhooks were not applied, they are tried again error={error}");
        }
    }
}

async fn commit(inner: Arc<Inner>, mut batch: Vec<Waiting>) {
    fail_point::pass("group-commit");
    // Two servers whose batches hold the same rooms must not wait for each other crosswise. The sort keeps the order within a room.
    batch.sort_by(|a, b| sid(&a.arrival).cmp(&sid(&b.arrival)));
    let Some(host) = batch.first().map(|waiting| Arc::clone(&waiting.host)) else { return };
    let store = Store { inner, host, patience: None };
    let mut batch = batch.into_iter().peekable();
    while batch.peek().is_some() {
        if let Err(error) = together(&store, batch.by_ref().take(MAX_BATCH).collect()).await {
            // Whatever is left may follow what was not taken.
            return refuse(batch, &error);
        }
    }
}

/// One transaction.
///
/// # Errors
/// What the same events may not meet later. Those that were not applied have it as their answer.
async fn together(store: &Store, batch: Vec<Waiting>) -> Result<(), Arc<DbError>> {
    let arrivals: Arc<[Arrival]> = batch.iter().map(|waiting| waiting.arrival.clone()).collect();
    match store.apply_events(arrivals).await {
        Ok(applied) => {
            for (waiting, applied) in batch.into_iter().zip(applied) {
                // Who asked may have given up; the event is kept all the same.
                waiting.answer.send(Ok(applied)).ok();
            }
        }
        Err(error) if error.is_retryable() => {
            let error = Arc::new(error);
            refuse(batch, &error);
            return Err(error);
        }
        Err(error) => {
            // One of them is at fault: each for itself tells.
            log::warn!("webhooks are applied one by one events={} error={error}", batch.len());
            let mut batch = batch.into_iter();
            while let Some(waiting) = batch.next() {
                match alone(store, waiting.arrival.clone()).await {
                    Err(error) if error.is_retryable() => {
                        let error = Arc::new(error);
                        refuse(std::iter::once(waiting).chain(batch), &error);
                        return Err(error);
                    }
                    applied => drop(waiting.answer.send(applied)),
                }
            }
        }
    }
    Ok(())
}

/// LiveKit, or the journal, repeats each of them.
fn refuse(batch: impl IntoIterator<Item = Waiting>, error: &Arc<DbError>) {
    for waiting in batch {
        waiting.answer.send(Err(DbError::Shared(Arc::clone(error)))).ok();
    }
}

fn sid(arrival: &Arrival) -> Option<&str> {
    arrival.event.room.as_ref().map(|room| room.sid.as_str())
}

async fn alone(store: &Store, arrival: Arrival) -> Result<Applied, DbError> {
    match store.apply_events([arrival.clone()].into()).await {
        Ok(applied) => applied.into_iter().next().ok_or_else(|| DbError::Unreadable("no answer for an event".to_owned())),
        Err(error) if error.is_retryable() => Err(error),
        Err(error) => failed(store, arrival, &error).await,
    }
}

/// What can never be applied is kept, so that it can be looked at and replayed.
async fn failed(store: &Store, arrival: Arrival, error: &DbError) -> Result<Applied, DbError> {
    let problem = error.to_string();
    store.keep_failed_event(arrival, problem.clone()).await?;
    Ok(Applied::Failed(problem))
}
