//! The ledger of webhooks, and what operators do to sessions.

use chrono::{DateTime, NaiveDateTime, Utc};

use super::rows::events::{Applied, Arrival, EventFilter, TransitionRow, WebhookEventRow};
use super::rows::{Page, SessionRow};
use super::{DbError, Engine, POOL_WAIT, Store, postgres, sqlite};
use crate::ids::EventId;
use crate::session::event::SessionEvent;
use crate::session::lifecycle::{Cause, Change};

/// Events that are forgotten in one transaction, which keeps others from writing on SQLite; below the number of values that a statement takes there.
const FORGET_AT_ONCE: usize = 500;

impl Store {
    /// Keeps an event and commits everything it changes with it, together with others that arrive at the same time. A known id changes nothing.
    /// Its place among them is taken by the call, not by the first look at the answer.
    ///
    /// # Errors
    /// What the same event may not meet later. An event whose effects the database never takes is kept alone, as [`Applied::Failed`].
    pub fn apply_event(&self, arrival: Arrival) -> impl Future<Output = Result<Applied, DbError>> + Send + use<> {
        let applied = self.apply_in_order(vec![arrival]);
        async move { applied.await.pop().unwrap_or_else(|| Err(DbError::Unreadable("no answer for an event".to_owned()))) }
    }

    /// The same for several, and of a room, none that follows one which was not taken: it would be written down before what it came after.
    pub fn apply_in_order(&self, arrivals: Vec<Arrival>) -> impl Future<Output = Vec<Result<Applied, DbError>>> + Send + use<> {
        self.inner.lanes.apply(arrivals, &self.host)
    }

    /// One transaction for all of them, in their order.
    pub(super) async fn apply_events(&self, arrivals: std::sync::Arc<[Arrival]>) -> Result<Vec<Applied>, DbError> {
        let host = self.host();
        run!(self, writer, events::apply(&arrivals, &host))
    }

    pub(super) async fn keep_failed_event(&self, arrival: Arrival, problem: String) -> Result<(), DbError> {
        run!(self, writer, events::keep_failed(&arrival, &problem))
    }

    /// Applies what a kept event says once more.
    pub async fn replay_event(&self, event: SessionEvent, now: DateTime<Utc>) -> Result<Option<SessionRow>, DbError> {
        let host = self.host();
        run!(self, writer, events::replay(&event, &host, now))
    }

    /// Commits what a list of LiveKit's or an operator says, all or nothing.
    pub async fn apply_changes(&self, changes: Vec<Change>, cause: Cause, now: DateTime<Utc>) -> Result<(), DbError> {
        let host = self.host();
        run!(self, writer, changes::apply_all(changes, &cause, &host, now))
    }

    pub async fn webhook_event(&self, id: EventId) -> Result<Option<WebhookEventRow>, DbError> {
        run!(self, reader, events::find(&id))
    }

    pub async fn webhook_events(&self, filter: EventFilter, page: Page) -> Result<Vec<WebhookEventRow>, DbError> {
        run!(self, reader, events::list(&filter, &page))
    }

    /// Forgets the events that were received before a time.
    pub async fn forget_events(&self, before: NaiveDateTime) -> Result<usize, DbError> {
        let mut forgotten = 0;
        loop {
            let gone = run!(self, writer, events::forget(before, FORGET_AT_ONCE))?;
            forgotten += gone;
            if gone < FORGET_AT_ONCE {
                return Ok(forgotten);
            }
        }
    }

    /// What happened in a session, and who caused it.
    pub async fn transitions(&self, session: String, page: Page) -> Result<Vec<TransitionRow>, DbError> {
        run!(self, reader, changes::list(&session, &page))
    }
}
