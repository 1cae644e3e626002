//! Sessions and their participants, as webhooks tell them.

use std::collections::HashSet;

use chrono::{DateTime, NaiveDateTime, Utc};
use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::{Backend, Connection};
use crate::db::DbError;
use crate::db::rows::{Page, ParticipantRow, SessionFilter, SessionRow};
use crate::db::schema::{participants, sessions};
use crate::ids::{Identity, MeetingId, ParticipantSid, RoomName, RoomSid, new_row_id};
use crate::session::lifecycle::{Described, ParticipantDescription, ParticipantState, SessionState, SessionStatus, Signal, Step, transition};

pub async fn list(connection: &mut Connection, filter: &SessionFilter, page: &Page) -> Result<Vec<SessionRow>, DbError> {
    let mut query = sessions::table.select(SessionRow::as_select()).into_boxed::<Backend>();
    if let Some(status) = filter.status {
        query = query.filter(sessions::status.eq(status.as_str()));
    }
    if let Some(room) = &filter.room_name {
        query = query.filter(sessions::room_name.eq(room.as_str()));
    }
    if let Some((time, id)) = &page.after {
        query = query.filter(sessions::started_at.lt(time).or(sessions::started_at.eq(time).and(sessions::id.lt(id))));
    }
    Ok(query.order((sessions::started_at.desc(), sessions::id.desc())).limit(page.limit.into()).load(connection).await?)
}

pub async fn find(connection: &mut Connection, meeting: &MeetingId) -> Result<Option<SessionRow>, DbError> {
    let query = sessions::table.filter(sessions::meeting_id.eq(meeting.as_str())).select(SessionRow::as_select());
    Ok(query.first(connection).await.optional()?)
}

/// The newest session of a room that has not ended.
pub async fn active_of_room(connection: &mut Connection, room: &RoomName) -> Result<Option<SessionRow>, DbError> {
    let of_room = sessions::table.filter(sessions::room_name.eq(room.as_str())).filter(sessions::status.eq(SessionStatus::Active.as_str()));
    Ok(of_room.select(SessionRow::as_select()).order((sessions::started_at.desc(), sessions::id.desc())).first(connection).await.optional()?)
}

/// The newest session of a room that touches a stretch of time.
pub async fn of_room_during(connection: &mut Connection, room: &str, from: NaiveDateTime, to: NaiveDateTime) -> Result<Option<SessionRow>, DbError> {
    let during = sessions::table
        .filter(sessions::room_name.eq(room))
        .filter(sessions::started_at.le(to))
        .filter(sessions::ended_at.is_null().or(sessions::ended_at.ge(from)));
    Ok(during.select(SessionRow::as_select()).order((sessions::started_at.desc(), sessions::id.desc())).first(connection).await.optional()?)
}

pub async fn participants(connection: &mut Connection, session: &str) -> Result<Vec<ParticipantRow>, DbError> {
    let query = participants::table.filter(participants::session_id.eq(session)).select(ParticipantRow::as_select());
    Ok(query.order(participants::id.asc()).load(connection).await?)
}

type Steps = Vec<(Step, DateTime<Utc>)>;

/// Lays what is said over what is known of the session, and holds the session's row until the transaction ends.
pub async fn merge(connection: &mut Connection, said: SessionState) -> Result<(SessionRow, Steps), DbError> {
    let meeting = said.meeting_id().into_string();
    let id = new_row_id();
    let columns = (
        sessions::id.eq(&id),
        sessions::meeting_id.eq(&meeting),
        sessions::room_name.eq(said.room_name.as_str()),
        sessions::room_sid.eq(said.room_sid.as_str()),
        sessions::status.eq(SessionStatus::Active.as_str()),
        sessions::started_at.eq(said.started_at.naive_utc()),
    );
    // A conflict that changes nothing still holds the row in both engines, so that those who speak of one room take turns.
    let row: SessionRow = diesel::insert_into(sessions::table)
        .values(columns)
        .on_conflict(sessions::meeting_id)
        .do_update()
        .set(sessions::room_name.eq(sessions::room_name))
        .returning(SessionRow::as_returning())
        .get_result(connection)
        .await?;
    let status = (row.id != id).then(|| status(&row));
    lay_over(connection, row, status, said).await
}

/// The same for a row that this transaction holds already.
pub async fn merge_held(connection: &mut Connection, row: SessionRow, said: SessionState) -> Result<(SessionRow, Steps), DbError> {
    let status = status(&row);
    lay_over(connection, row, Some(status), said).await
}

fn status(row: &SessionRow) -> SessionStatus {
    if row.ended_at.is_some() { SessionStatus::Ended } else { SessionStatus::Active }
}

async fn lay_over(
    connection: &mut Connection,
    row: SessionRow,
    status: Option<SessionStatus>,
    said: SessionState,
) -> Result<(SessionRow, Steps), DbError> {
    let signal = if said.ended_at.is_some() { Signal::End } else { Signal::Alive };
    let (status, steps) = transition(status, signal);
    let steps = steps.iter().map(|step| (*step, if *step == Step::Ended { said.ended_at.unwrap_or(said.started_at) } else { said.started_at }));
    let steps: Steps = steps.collect();
    let known = SessionState {
        room_sid: RoomSid::new(row.room_sid.clone().unwrap_or_default()),
        room_name: RoomName::new(row.room_name.clone()),
        started_at: row.started_at.and_utc(),
        ended_at: row.ended_at.map(|time| time.and_utc()),
        metadata: Described { at: row.described_at.map(|time| time.and_utc()), value: row.metadata.clone() },
    };
    let merged = known.clone().merge(said);
    if merged == known {
        return Ok((row, steps));
    }
    let changes = (
        sessions::status.eq(status.as_str()),
        sessions::started_at.eq(merged.started_at.naive_utc()),
        sessions::ended_at.eq(naive(merged.ended_at)),
        sessions::metadata.eq(&merged.metadata.value),
        sessions::described_at.eq(naive(merged.metadata.at)),
    );
    let this = sessions::table.filter(sessions::id.eq(&row.id));
    Ok((diesel::update(this).set(changes).returning(SessionRow::as_returning()).get_result(connection).await?, steps))
}

/// Holds the rows of those meetings that are known, until the transaction ends.
pub async fn hold(connection: &mut Connection, meetings: Vec<&str>) -> Result<Vec<SessionRow>, DbError> {
    let these = sessions::table.filter(sessions::meeting_id.eq_any(meetings));
    Ok(diesel::update(these).set(sessions::room_name.eq(sessions::room_name)).returning(SessionRow::as_returning()).get_results(connection).await?)
}

pub async fn find_participant(connection: &mut Connection, session: &str, sid: &ParticipantSid) -> Result<Option<ParticipantRow>, DbError> {
    let this = participants::table.filter(participants::session_id.eq(session)).filter(participants::sid.eq(sid.as_str()));
    Ok(this.select(ParticipantRow::as_select()).first(connection).await.optional()?)
}

/// Those of some sessions that have one of these SIDs, each with its session.
pub async fn find_participants(connection: &mut Connection, of: &[&str], sids: &[&str]) -> Result<Vec<(String, ParticipantRow)>, DbError> {
    let these = participants::table.filter(participants::session_id.eq_any(of)).filter(participants::sid.eq_any(sids));
    Ok(these.select((participants::session_id, ParticipantRow::as_select())).load(connection).await?)
}

/// Lays what is said over what is known of a participant, its row. The session's row must be held.
pub async fn merge_participant(
    connection: &mut Connection,
    session: &str,
    row: Option<ParticipantRow>,
    said: ParticipantState,
) -> Result<Steps, DbError> {
    let Some(row) = row else {
        let steps = said.steps(None);
        let columns = (
            participants::id.eq(new_row_id()),
            participants::session_id.eq(session),
            participants::sid.eq(said.sid.as_str()),
            participants::identity.eq(said.identity.as_str()),
            (
                participants::name.eq(&said.description.value.name),
                participants::kind.eq(&said.description.value.kind),
                participants::role.eq(&said.description.value.role),
                participants::metadata.eq(&said.description.value.metadata),
                participants::attributes.eq(&said.description.value.attributes),
                participants::described_at.eq(naive(said.description.at)),
            ),
            participants::joined_at.eq(naive(said.joined_at)),
            participants::left_at.eq(naive(said.left_at)),
        );
        diesel::insert_into(participants::table).values(columns).execute(connection).await?;
        return Ok(steps);
    };
    let known = participant_state(&row);
    let steps = said.steps(Some(&known));
    let merged = known.clone().merge(said);
    if merged == known {
        return Ok(steps);
    }
    let changes = (
        participants::identity.eq(merged.identity.as_str()),
        participants::name.eq(&merged.description.value.name),
        participants::kind.eq(&merged.description.value.kind),
        participants::role.eq(&merged.description.value.role),
        participants::metadata.eq(&merged.description.value.metadata),
        participants::attributes.eq(&merged.description.value.attributes),
        participants::described_at.eq(naive(merged.description.at)),
        participants::joined_at.eq(naive(merged.joined_at)),
        participants::left_at.eq(naive(merged.left_at)),
    );
    diesel::update(participants::table.filter(participants::id.eq(row.id))).set(changes).execute(connection).await?;
    Ok(steps)
}

/// A row as a state.
pub fn participant_state(row: &ParticipantRow) -> ParticipantState {
    ParticipantState {
        sid: ParticipantSid::new(&row.sid),
        identity: Identity::new(&row.identity),
        joined_at: row.joined_at.map(|time| time.and_utc()),
        left_at: row.left_at.map(|time| time.and_utc()),
        description: Described {
            at: row.described_at.map(|time| time.and_utc()),
            value: ParticipantDescription {
                name: row.name.clone(),
                kind: row.kind.clone(),
                role: row.role.clone(),
                metadata: row.metadata.clone(),
                attributes: row.attributes.clone(),
            },
        },
    }
}

/// Sessions that have not ended.
pub async fn active(connection: &mut Connection) -> Result<Vec<SessionRow>, DbError> {
    let active = sessions::table.filter(sessions::status.eq(SessionStatus::Active.as_str())).filter(sessions::room_sid.is_not_null());
    Ok(active.select(SessionRow::as_select()).load(connection).await?)
}

/// Those of some rooms whose sessions have ended.
pub async fn ended(connection: &mut Connection, rooms: &[RoomSid]) -> Result<HashSet<RoomSid>, DbError> {
    let ended = sessions::table
        .filter(sessions::room_sid.eq_any(rooms.iter().map(RoomSid::as_str)))
        .filter(sessions::status.eq(SessionStatus::Ended.as_str()));
    let ended: Vec<Option<String>> = ended.select(sessions::room_sid).load(connection).await?;
    Ok(ended.into_iter().flatten().map(RoomSid::new).collect())
}

/// Participants of sessions whose leaving nobody has told, each with its session.
pub async fn present(connection: &mut Connection, of: &[&str]) -> Result<Vec<(String, ParticipantRow)>, DbError> {
    let present = participants::table.filter(participants::session_id.eq_any(of)).filter(participants::left_at.is_null());
    Ok(present.select((participants::session_id, ParticipantRow::as_select())).load(connection).await?)
}

pub(super) fn naive(time: Option<DateTime<Utc>>) -> Option<NaiveDateTime> {
    time.map(|time| time.naive_utc())
}
