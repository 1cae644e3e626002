//! What becomes of an event: the database takes it within a moment, or the journal does.

use std::time::Duration;

use actix::prelude::*;

use super::{ApplyEvent, EventsReplayed, Kept, SessionRegistry};
use crate::db::rows::SessionRow;
use crate::db::rows::events::{Applied, Arrival};
use crate::db::{DbError, Store};
use crate::ids::{MeetingId, RoomName};
use crate::journal::{Behind, Journal, Record};
use crate::session::lifecycle::SessionStatus;

/// How long the database may take for an event before the journal does. An event that is slower than that is kept twice and applied once.
const PATIENCE: Duration = Duration::from_secs(2);

impl Handler<ApplyEvent> for SessionRegistry {
    type Result = ResponseActFuture<Self, Result<Kept, DbError>>;

    fn handle(&mut self, ApplyEvent(arrival): ApplyEvent, _: &mut Context<Self>) -> Self::Result {
        let (name, id) = (arrival.event.name.clone(), arrival.event.id.clone());
        let may_change_queue = arrival.event.kind.may_change_queue();
        let kept = keep(self.store.clone(), self.journal.clone(), arrival);
        Box::pin(kept.into_actor(self).map(move |kept, registry, _| {
            match &kept {
                Ok(Kept::InDatabase(Applied::Kept(Some(session)))) => {
                    registry.remember(session);
                    log::debug!("webhook kept event={name:?} event_id={id} session_id={} status={}", session.id, session.status);
                }
                Ok(Kept::InDatabase(Applied::Kept(None))) => log::debug!("webhook kept event={name:?} event_id={id}"),
                Ok(Kept::InDatabase(Applied::Failed(problem))) => {
                    log::error!("a webhook is kept that could not be applied event={name:?} event_id={id} problem={problem:?}")
                }
                Ok(Kept::InDatabase(Applied::Repeated)) => log::debug!("webhook repeated event={name:?} event_id={id}"),
                Ok(Kept::InJournal) => log::debug!("webhook waits in the journal event={name:?} event_id={id}"),
                Err(error) => log::error!("a webhook could not be kept event={name:?} event_id={id} error={error}"),
            }
            match &kept {
                Ok(Kept::InDatabase(Applied::Kept(Some(_)))) if may_change_queue => registry.queue_changed(),
                Ok(Kept::InDatabase(Applied::Kept(_) | Applied::Repeated) | Kept::InJournal) => {}
                // What LiveKit says may be lost with it: it is asked.
                Ok(Kept::InDatabase(Applied::Failed(_))) | Err(_) => registry.reconcile(),
            }
            kept
        }))
    }
}

/// Whatever the journal holds goes first. A call of the store that is given up may still succeed: then the event's id makes a repetition of the other one.
async fn keep(store: Store, journal: Journal, arrival: Arrival) -> Result<Kept, DbError> {
    if journal.is_in_use() {
        let record = Record::Webhook(Box::new(arrival.clone()));
        match journal.keep_behind(&record).await {
            Behind::Kept => return Ok(Kept::InJournal),
            Behind::NothingWaits => {}
            Behind::Refused(refused) => return Err(DbError::Connect(refused.to_string())),
        }
    }
    let error = match tokio::time::timeout(PATIENCE, store.apply_event(arrival.clone())).await {
        Ok(Ok(applied)) => return Ok(Kept::InDatabase(applied)),
        Ok(Err(error)) if error.is_retryable() => error,
        Ok(Err(error)) => return Err(error),
        Err(_) => DbError::Late(PATIENCE),
    };
    match journal.keep(&Record::Webhook(Box::new(arrival))).await {
        Ok(()) => Ok(Kept::InJournal),
        Err(refused) => Err(DbError::Connect(format!("{error}; {refused}"))),
    }
}

impl SessionRegistry {
    /// The active meeting of a room, for when the database does not answer.
    fn remember(&mut self, session: &SessionRow) {
        let (room, meeting) = (RoomName::new(&session.room_name), MeetingId::new(&session.meeting_id));
        if session.status == SessionStatus::Active.as_str() {
            self.active.insert(room, meeting);
        } else if self.active.get(&room) == Some(&meeting) {
            self.active.remove(&room);
        }
    }
}

impl Handler<EventsReplayed> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, EventsReplayed(replayed): EventsReplayed, _: &mut Context<Self>) {
        for session in &replayed.sessions {
            self.remember(session);
        }
        if replayed.may_change_queue {
            self.queue_changed();
        }
        if replayed.is_incomplete {
            self.reconcile();
        }
    }
}
