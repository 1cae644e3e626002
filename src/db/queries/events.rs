//! Webhook events: each is kept once, together with all that it changes.

use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::{Connection, recordings, sessions};
use crate::db::DbError;
use crate::db::rows::{Applied, StoredBody};
use crate::db::schema::webhook_events;
use crate::session::event::SessionEvent;
use crate::session::lifecycle::{self, Change};

/// Keeps the event and commits its effects with it.
pub async fn apply(connection: &mut Connection, event: &SessionEvent, body: &StoredBody) -> Result<Applied, DbError> {
    transaction!(connection, async |connection| {
        let columns = (
            webhook_events::id.eq(event.id.as_str()),
            webhook_events::event.eq(event.name.replace('\0', "\u{2400}")),
            webhook_events::room_sid.eq(event.room.as_ref().map(|room| room.sid.as_str())),
            webhook_events::room_name.eq(event.room.as_ref().map(|room| room.name.as_str())),
            webhook_events::created_at.eq(event.created_at.naive_utc()),
            webhook_events::received_at.eq(body.received_at.naive_utc()),
            webhook_events::understood.eq(body.understood),
            webhook_events::body.eq(&body.text),
        );
        let fresh =
            diesel::insert_into(webhook_events::table).values(columns).on_conflict(webhook_events::id).do_nothing().execute(connection).await?;
        if fresh == 0 {
            return Ok(Applied::Repeated);
        }
        let Some(Change { session, participant, track }) = lifecycle::change(event) else { return Ok(Applied::Kept(None)) };
        let session = sessions::merge(connection, session).await?;
        if let Some(participant) = participant {
            sessions::merge_participant(connection, &session.id, participant).await?;
        }
        if let Some(track) = track {
            recordings::merge_track(connection, &session, track).await?;
        }
        recordings::link(connection, &session).await?;
        Ok(Applied::Kept(Some(session)))
    })
}
