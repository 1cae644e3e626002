//! Lays what is said of a session over what is known, with everything that follows: one transaction of whoever calls.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::{Connection, egresses, recordings, sessions, tracks};
use crate::db::DbError;
use crate::db::rows::egresses::Egress;
use crate::db::rows::events::TransitionRow;
use crate::db::rows::{Host, Page, SessionRow, TrackRow};
use crate::db::schema::transitions;
use crate::ids::{EventId, RoomName, RoomSid, TrackSid, new_row_id};
use crate::session::lifecycle::{Cause, Change, Step};
use crate::session::plan::Wish;
use crate::session::reconcile::{KnownSession, KnownTrack};

/// Applies a change, writes down its steps and plans what is to become of its track.
pub async fn apply(connection: &mut Connection, change: Change, cause: &Cause, host: &Host, now: DateTime<Utc>) -> Result<SessionRow, DbError> {
    let Change { session, participant, track } = change;
    let (session, steps) = sessions::merge(connection, session).await?;
    let ends = steps.iter().any(|(step, _)| *step == Step::Ended);
    write_steps(connection, &session.id, None, &steps, cause, now).await?;
    if let Some(participant) = participant {
        let sid = participant.sid.clone();
        let steps = sessions::merge_participant(connection, &session.id, participant).await?;
        write_steps(connection, &session.id, Some(sid.as_str()), &steps, cause, now).await?;
    }
    if let Some(track) = track {
        let sid = track.sid.clone();
        let (row, steps) = tracks::merge(connection, &session, track).await?;
        write_steps(connection, &session.id, Some(sid.as_str()), &steps, cause, now).await?;
        egresses::plan_track(connection, &session, &row, host, now).await?;
    }
    if ends {
        egresses::end_queued(connection, &session.id, now).await?;
    }
    recordings::link(connection, &session).await?;
    Ok(session)
}

/// All of them or none.
pub async fn apply_all(connection: &mut Connection, changes: Vec<Change>, cause: &Cause, host: &Host, now: DateTime<Utc>) -> Result<(), DbError> {
    transaction!(connection, async |connection| {
        for change in changes {
            apply(connection, change, cause, host, now).await?;
        }
        Ok(())
    })
}

/// What an operator wants of a track of an active session.
pub async fn wish(
    connection: &mut Connection,
    room: &str,
    track: &TrackSid,
    wish: Wish,
    cause: &Cause,
    host: &Host,
    now: DateTime<Utc>,
) -> Result<Option<(TrackRow, Option<Egress>)>, DbError> {
    transaction!(connection, async |connection| {
        let Some(session) = sessions::active_of_room(connection, &RoomName::new(room)).await? else { return Ok(None) };
        let Some(known) = tracks::find(connection, &session.id, track).await? else { return Ok(None) };
        tracks::set_wish(connection, &known.id, wish).await?;
        let row = TrackRow { wish: Some(wish.as_str().to_owned()), ..known };
        let step = match wish {
            Wish::Record => Step::RecordWanted,
            Wish::Stop => Step::StopWanted,
        };
        write_steps(connection, &session.id, Some(track.as_str()), &[(step, now)], cause, now).await?;
        egresses::plan_track(connection, &session, &row, host, now).await?;
        let open = egresses::open_of_track(connection, &row.id).await?;
        Ok(Some((row, open)))
    })
}

/// Every session that has not ended, with what is in it.
pub async fn known(connection: &mut Connection, host: &Host) -> Result<Vec<KnownSession>, DbError> {
    let with_egress: HashSet<String> = egresses::tracks_of_open(connection).await?.into_iter().collect();
    let mut known = Vec::new();
    for session in sessions::active(connection).await? {
        let participants = sessions::present(connection, &session.id).await?;
        let mut tracks = Vec::new();
        for track in tracks::published(connection, &session.id).await? {
            let is_settled = with_egress.contains(&track.id) || !egresses::is_wanted(connection, &session, &track, host).await?;
            tracks.push(KnownTrack { state: tracks::state(&track), is_settled });
        }
        known.push(KnownSession {
            room_sid: RoomSid::new(session.room_sid.unwrap_or_default()),
            room_name: RoomName::new(session.room_name),
            metadata: session.metadata,
            participants: participants.iter().map(sessions::participant_state).collect(),
            tracks,
        });
    }
    Ok(known)
}

async fn write_steps(
    connection: &mut Connection,
    session: &str,
    subject: Option<&str>,
    steps: &[(Step, DateTime<Utc>)],
    cause: &Cause,
    now: DateTime<Utc>,
) -> Result<(), DbError> {
    for (step, at) in steps {
        let columns = (
            transitions::id.eq(new_row_id()),
            transitions::session_id.eq(session),
            transitions::subject.eq(subject),
            transitions::step.eq(step.as_str()),
            transitions::at.eq(at.naive_utc()),
            transitions::cause.eq(cause.as_str()),
            transitions::event_id.eq(cause.event().map(EventId::as_str)),
            transitions::recorded_at.eq(now.naive_utc()),
        );
        diesel::insert_into(transitions::table).values(columns).execute(connection).await?;
    }
    Ok(())
}

/// The steps of a session, in the order in which they were written down.
pub async fn list(connection: &mut Connection, session: &str, page: &Page) -> Result<Vec<TransitionRow>, DbError> {
    let mut query = transitions::table.filter(transitions::session_id.eq(session)).select(TransitionRow::as_select()).into_boxed::<super::Backend>();
    if let Some((_, id)) = &page.after {
        query = query.filter(transitions::id.gt(id));
    }
    Ok(query.order(transitions::id.asc()).limit(page.limit.into()).load(connection).await?)
}
