//! Recordings and tracks, and how they find the session they belong to.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_async::RunQueryDsl;

use super::{Backend, Connection, sessions, tracks};
use crate::db::DbError;
use crate::db::rows::{Admission, Host, NewRecording, OpenedRecording, Page, RecordingRow, SessionRow, TrackFacts, TrackRow};
use crate::db::schema::{egresses, recordings, segments, sessions as sessions_table, tracks as tracks_table};
use crate::ids::{Identity, MeetingId, RecordingId, RoomName, TicketId, TrackSid, new_row_id};
use crate::session::plan::Reason;

/// How far this machine's clock and LiveKit's may differ when a recording looks for its session: the leeway of the webhooks' tokens.
const CLOCK_LEEWAY: TimeDelta = TimeDelta::seconds(60);

pub async fn admit(
    connection: &mut Connection,
    room: &RoomName,
    meeting: Option<&MeetingId>,
    ticket: Option<&TicketId>,
) -> Result<Admission, DbError> {
    let ticket_spent = match ticket {
        Some(ticket) => {
            let spent = segments::table.filter(segments::ticket_id.eq(ticket.as_str())).select(segments::id);
            spent.first::<String>(connection).await.optional()?.is_some()
        }
        None => false,
    };
    // As for a recording: a sender may name any meeting, and only one of its own room is its session.
    let named = match meeting {
        Some(meeting) => sessions::find(connection, meeting).await?.filter(|session| session.room_name == room.as_str()),
        None => None,
    };
    let session = match named {
        Some(session) => Some(session),
        None => sessions::active_of_room(connection, room).await?,
    };
    let session_started_at = session.as_ref().map(|session| session.started_at.and_utc());
    Ok(Admission {
        meeting: session.filter(|_| meeting.is_none()).map(|session| MeetingId::new(session.meeting_id)),
        session_started_at,
        ticket_spent,
    })
}

/// Whether a track has a recording that goes on, or ended after `since`.
pub async fn is_recorded(
    connection: &mut Connection,
    room: &RoomName,
    participant: Option<&Identity>,
    track: &TrackSid,
    since: DateTime<Utc>,
) -> Result<bool, DbError> {
    let lately = recordings::ended_at.is_null().or(recordings::ended_at.gt(since.naive_utc()).assume_not_null());
    let mut same = recordings::table
        .filter(recordings::room_name.eq(room.as_str()))
        .filter(recordings::track_sid.eq(track.as_str()))
        .filter(lately)
        .select(recordings::id)
        .into_boxed::<Backend>();
    same = match participant {
        Some(participant) => same.filter(recordings::participant.eq(participant.as_str())),
        None => same.filter(recordings::participant.is_null()),
    };
    Ok(same.first::<String>(connection).await.optional()?.is_some())
}

/// A connection of a known track continues that track's recording in the meeting; one that names no track starts its own.
///
/// Idempotent, by the id that a new recording is given.
pub async fn open(connection: &mut Connection, new: &NewRecording, host: &Host) -> Result<OpenedRecording, DbError> {
    match find_or_make(connection, new, host).await {
        // An earlier call that had been given up has made it in this moment.
        Err(DbError::Query(DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, _))) => find_or_make(connection, new, host).await,
        opened => opened,
    }
}

async fn find_or_make(connection: &mut Connection, new: &NewRecording, host: &Host) -> Result<OpenedRecording, DbError> {
    transaction!(connection, async |connection| {
        if let Some(known) = find(connection, &new.id).await? {
            return continued(connection, known, new).await;
        }
        // A sender may name any meeting; only one of its own room is its session.
        let named = sessions::find(connection, &new.meeting).await?.filter(|session| session.room_name == new.room.as_str());
        let session = match named {
            Some(session) => Some(session),
            None => sessions::active_of_room(connection, &new.room).await?,
        };
        if let Some(track) = &new.track {
            let mut same = recordings::table
                .filter(recordings::room_name.eq(new.room.as_str()))
                .filter(recordings::track_sid.eq(track.as_str()))
                .select(RecordingRow::as_select())
                .into_boxed::<Backend>();
            same = match &new.participant {
                Some(participant) => same.filter(recordings::participant.eq(participant.as_str())),
                None => same.filter(recordings::participant.is_null()),
            };
            // A meeting that is named after its room alone may be another one by now: it goes on only while no session is known.
            same = match &session {
                Some(session) => same.filter(recordings::session_id.eq(session.id.as_str())),
                None => same.filter(recordings::session_id.is_null()).filter(recordings::meeting_id.eq(new.meeting.as_str())),
            };
            let mut known: Option<RecordingRow> = same.order(recordings::id.desc()).first(connection).await.optional()?;
            if known.is_none()
                && let Some(session) = &session
            {
                known = followed(connection, session, track).await?;
            }
            if let Some(known) = known {
                diesel::update(recordings::table.filter(recordings::id.eq(&known.id)))
                    .set((recordings::ended_at.eq(None::<chrono::NaiveDateTime>), recordings::server_id.eq(host.server.as_str())))
                    .execute(connection)
                    .await?;
                return continued(connection, known, new).await;
            }
        }
        let track = find_or_make_track(connection, session.as_ref(), new).await?;
        let columns = (
            recordings::id.eq(new.id.as_str()),
            recordings::session_id.eq(session.map(|session| session.id)),
            recordings::track_id.eq(track),
            recordings::meeting_id.eq(new.meeting.as_str()),
            recordings::room_name.eq(new.room.as_str()),
            recordings::participant.eq(new.participant.as_ref().map(Identity::as_str)),
            recordings::track_sid.eq(new.track.as_ref().map(TrackSid::as_str)),
            recordings::started_at.eq(new.started_at.naive_utc()),
            recordings::server_id.eq(host.server.as_str()),
        );
        diesel::insert_into(recordings::table).values(columns).execute(connection).await?;
        Ok(OpenedRecording { id: new.id.clone(), offset_ms: 0, facts: TrackFacts::default() })
    })
}

async fn continued(connection: &mut Connection, known: RecordingRow, new: &NewRecording) -> Result<OpenedRecording, DbError> {
    let offset = (new.started_at.naive_utc() - known.started_at).num_milliseconds();
    let facts = track_facts(connection, &known.track_id).await?;
    Ok(OpenedRecording { id: RecordingId::new(known.id), offset_ms: u64::try_from(offset).unwrap_or(0), facts })
}

/// The recording that a track goes on with which is not its first: LiveKit gives a participant's track another SID after a full reconnect. It is followed by
/// identity and source, which an event must have told, and by name where there are several. Two tracks of one source at the same time are two recordings.
async fn followed(connection: &mut Connection, session: &SessionRow, track: &TrackSid) -> Result<Option<RecordingRow>, DbError> {
    let of_session = recordings::table.filter(recordings::session_id.eq(&session.id));
    let continued = segments::table.filter(segments::track_sid.eq(track.as_str())).select(segments::recording_id);
    let own = of_session.filter(recordings::id.eq_any(continued)).select(RecordingRow::as_select()).order(recordings::id.desc());
    if let Some(own) = own.first(connection).await.optional()? {
        return Ok(Some(own));
    }
    let Some(this) = tracks::find(connection, &session.id, track).await? else { return Ok(None) };
    let Some(identity) = this.identity.filter(|_| !matches!(this.source.as_str(), "" | "UNKNOWN")) else { return Ok(None) };
    let of_source = tracks_table::table.filter(tracks_table::session_id.eq(&session.id)).filter(tracks_table::identity.eq(&identity));
    let of_source: Vec<TrackRow> = of_source.filter(tracks_table::source.eq(&this.source)).select(TrackRow::as_select()).load(connection).await?;
    let before = of_session.filter(recordings::participant.eq(&identity)).select(RecordingRow::as_select()).order(recordings::id.desc());
    let mut found = None;
    for recording in before.load::<RecordingRow>(connection).await? {
        let last = segments::table.filter(segments::recording_id.eq(&recording.id)).filter(segments::track_sid.is_not_null());
        let last = last.select(segments::track_sid).order((segments::started_at.desc(), segments::id.desc()));
        let last: Option<Option<String>> = last.first(connection).await.optional()?;
        let sid = last.flatten().or_else(|| recording.track_sid.clone());
        let Some(last) = of_source.iter().find(|track| track.sid == sid) else { continue };
        if is_over(connection, last).await? {
            if last.name == this.name {
                return Ok(Some(recording));
            }
            found = found.or(Some(recording));
        }
    }
    Ok(found)
}

/// Whether a track has ended: an event told so, or LiveKit when its egress ended.
async fn is_over(connection: &mut Connection, track: &TrackRow) -> Result<bool, DbError> {
    if track.unpublished_at.is_some() {
        return Ok(true);
    }
    let last = egresses::table.filter(egresses::track_id.eq(&track.id)).select(egresses::end_reason);
    let last: Option<Option<String>> = last.order((egresses::created_at.desc(), egresses::id.desc())).first(connection).await.optional()?;
    let ends = [Reason::TrackEnded, Reason::Gone].map(Reason::as_str);
    Ok(last.flatten().is_some_and(|reason| ends.contains(&reason.as_str())))
}

async fn find_or_make_track(connection: &mut Connection, session: Option<&SessionRow>, new: &NewRecording) -> Result<String, DbError> {
    let session_id = session.map(|session| session.id.as_str());
    if let (Some(session_id), Some(track)) = (session_id, &new.track) {
        let known =
            tracks_table::table.filter(tracks_table::session_id.eq(session_id)).filter(tracks_table::sid.eq(track.as_str())).select(tracks_table::id);
        if let Some(known) = known.first(connection).await.optional()? {
            return Ok(known);
        }
    }
    let id = new_row_id();
    let columns = (
        tracks_table::id.eq(&id),
        tracks_table::session_id.eq(session_id),
        tracks_table::room_name.eq(new.room.as_str()),
        tracks_table::sid.eq(new.track.as_ref().map(TrackSid::as_str)),
        tracks_table::identity.eq(new.participant.as_ref().map(Identity::as_str)),
        // The rest only a webhook knows.
        tracks_table::kind.eq(new.kind.as_str()),
        tracks_table::source.eq(""),
        tracks_table::name.eq(""),
        tracks_table::mime_type.eq(""),
        tracks_table::mute_spans.eq("[]"),
    );
    let insert = diesel::insert_into(tracks_table::table).values(columns).on_conflict((tracks_table::session_id, tracks_table::sid)).do_nothing();
    if insert.execute(connection).await? == 1 {
        return Ok(id);
    }
    // A webhook has made it in this moment.
    let known =
        tracks_table::table.filter(tracks_table::session_id.eq(session_id)).filter(tracks_table::sid.eq(new.track.as_ref().map(TrackSid::as_str)));
    Ok(known.select(tracks_table::id).first(connection).await?)
}

/// What the ingest knew of a track.
async fn track_facts(connection: &mut Connection, track: &str) -> Result<TrackFacts, DbError> {
    let row = tracks_table::table.filter(tracks_table::id.eq(track)).select((tracks_table::format_mismatch, tracks_table::mute_spans));
    let (format_mismatch, spans) = row.first::<(Option<String>, String)>(connection).await?;
    let mute_spans = serde_json::from_str(&spans).map_err(|error| DbError::Unreadable(error.to_string()))?;
    Ok(TrackFacts { format_mismatch, mute_spans })
}

/// [`link`] for several sessions: most rooms have nothing to link, which one look tells of all.
pub async fn link_all(connection: &mut Connection, sessions: &[&SessionRow]) -> Result<(), DbError> {
    let rooms: Vec<&str> = sessions.iter().map(|session| session.room_name.as_str()).collect();
    let orphans = recordings::table.filter(recordings::session_id.is_null()).filter(recordings::room_name.eq_any(rooms));
    let rooms: Vec<String> = orphans.select(recordings::room_name).distinct().load(connection).await?;
    for session in sessions.iter().filter(|session| rooms.contains(&session.room_name)) {
        link(connection, session).await?;
    }
    Ok(())
}

/// Gives the session the recordings of its room that were made while it lasted and belong to none yet. Their paths stay.
pub async fn link(connection: &mut Connection, session: &SessionRow) -> Result<(), DbError> {
    let mut orphans = recordings::table
        .filter(recordings::session_id.is_null())
        .filter(recordings::room_name.eq(&session.room_name))
        .filter(recordings::ended_at.is_null().or(recordings::ended_at.ge(session.started_at - CLOCK_LEEWAY)))
        .select(RecordingRow::as_select())
        .into_boxed::<Backend>();
    if let Some(ended_at) = session.ended_at {
        orphans = orphans.filter(recordings::started_at.le(ended_at + CLOCK_LEEWAY));
    }
    for orphan in orphans.load::<RecordingRow>(connection).await? {
        let track = adopt_track(connection, session, &orphan).await?;
        diesel::update(recordings::table.filter(recordings::id.eq(&orphan.id)))
            .set((recordings::session_id.eq(&session.id), recordings::track_id.eq(track)))
            .execute(connection)
            .await?;
    }
    Ok(())
}

/// The track's row in the session: the one that webhooks made, given what the ingest knew, else the ingest's own.
async fn adopt_track(connection: &mut Connection, session: &SessionRow, orphan: &RecordingRow) -> Result<String, DbError> {
    let known: Option<String> = match &orphan.track_sid {
        Some(sid) => {
            let known =
                tracks_table::table.filter(tracks_table::session_id.eq(&session.id)).filter(tracks_table::sid.eq(sid)).select(tracks_table::id);
            known.first(connection).await.optional()?
        }
        None => None,
    };
    let own = tracks_table::table.filter(tracks_table::id.eq(&orphan.track_id));
    let Some(known) = known.filter(|known| *known != orphan.track_id) else {
        diesel::update(own).set(tracks_table::session_id.eq(&session.id)).execute(connection).await?;
        return Ok(orphan.track_id.clone());
    };
    let (mut facts, own_facts) = (track_facts(connection, &known).await?, track_facts(connection, &orphan.track_id).await?);
    facts.format_mismatch = facts.format_mismatch.or(own_facts.format_mismatch);
    facts.mute_spans.extend(own_facts.mute_spans);
    write_facts(connection, &known, &facts).await?;
    diesel::update(recordings::table.filter(recordings::track_id.eq(&orphan.track_id)))
        .set(recordings::track_id.eq(&known))
        .execute(connection)
        .await?;
    diesel::delete(own).execute(connection).await?;
    Ok(known)
}

pub async fn set_track_facts(connection: &mut Connection, recording: &RecordingId, facts: &TrackFacts) -> Result<(), DbError> {
    let track: String = recordings::table.filter(recordings::id.eq(recording.as_str())).select(recordings::track_id).first(connection).await?;
    write_facts(connection, &track, facts).await
}

async fn write_facts(connection: &mut Connection, track: &str, facts: &TrackFacts) -> Result<(), DbError> {
    let spans = serde_json::to_string(&facts.mute_spans).map_err(|error| DbError::Unreadable(error.to_string()))?;
    diesel::update(tracks_table::table.filter(tracks_table::id.eq(track)))
        .set((tracks_table::format_mismatch.eq(&facts.format_mismatch), tracks_table::mute_spans.eq(spans)))
        .execute(connection)
        .await?;
    Ok(())
}

/// Ends a recording when its last open segment has ended, at the time of that. One that missed its session while both were made finds it.
pub async fn close(connection: &mut Connection, recording: &RecordingId) -> Result<(), DbError> {
    if let Some(session) = end(connection, recording, false).await? {
        transaction!(connection, async |connection| link(connection, &session).await)?;
    }
    Ok(())
}

/// The same, but for the session, which is to be linked. Of an earlier run, also one whose first file was never made.
pub async fn end(connection: &mut Connection, recording: &RecordingId, of_earlier_run: bool) -> Result<Option<SessionRow>, DbError> {
    let of_recording = segments::table.filter(segments::recording_id.eq(recording.as_str()));
    let ends: Vec<Option<chrono::NaiveDateTime>> = of_recording.select(segments::ended_at).load(connection).await?;
    let this = recordings::table.filter(recordings::id.eq(recording.as_str()));
    let started_at = if of_earlier_run { Some(this.select(recordings::started_at).first(connection).await?) } else { None };
    if let Some(ended_at) = ends.into_iter().collect::<Option<Vec<_>>>().and_then(|ends| ends.into_iter().max().or(started_at)) {
        let row: RecordingRow =
            diesel::update(this).set(recordings::ended_at.eq(ended_at)).returning(RecordingRow::as_returning()).get_result(connection).await?;
        if row.session_id.is_none() {
            return sessions::of_room_during(connection, &row.room_name, row.started_at - CLOCK_LEEWAY, ended_at + CLOCK_LEEWAY).await;
        }
    }
    Ok(None)
}

/// Recordings that have not ended, of this server.
pub async fn all_open(connection: &mut Connection, host: &Host) -> Result<Vec<String>, DbError> {
    let own = recordings::server_id.eq(host.server.as_str()).or(recordings::server_id.is_null());
    Ok(recordings::table.filter(recordings::ended_at.is_null()).filter(own).select(recordings::id).load(connection).await?)
}

pub async fn list(connection: &mut Connection, meeting: Option<&MeetingId>, page: &Page) -> Result<Vec<RecordingRow>, DbError> {
    let mut query = recordings::table.select(RecordingRow::as_select()).into_boxed::<Backend>();
    if let Some(meeting) = meeting {
        let session = sessions_table::table.filter(sessions_table::meeting_id.eq(meeting.as_str())).select(sessions_table::id.nullable());
        query = query.filter(recordings::meeting_id.eq(meeting.as_str()).or(recordings::session_id.eq_any(session)));
    }
    if let Some((time, id)) = &page.after {
        query = query.filter(recordings::started_at.lt(time).or(recordings::started_at.eq(time).and(recordings::id.lt(id))));
    }
    Ok(query.order((recordings::started_at.desc(), recordings::id.desc())).limit(page.limit.into()).load(connection).await?)
}

pub async fn find(connection: &mut Connection, id: &RecordingId) -> Result<Option<RecordingRow>, DbError> {
    let query = recordings::table.filter(recordings::id.eq(id.as_str())).select(RecordingRow::as_select());
    Ok(query.first(connection).await.optional()?)
}

/// Pages by id alone, oldest first.
pub async fn tracks(connection: &mut Connection, meeting: &MeetingId, page: &Page) -> Result<Vec<TrackRow>, DbError> {
    let session = sessions_table::table.filter(sessions_table::meeting_id.eq(meeting.as_str())).select(sessions_table::id.nullable());
    let recorded = recordings::table.filter(recordings::meeting_id.eq(meeting.as_str())).select(recordings::track_id);
    let mut query = tracks_table::table
        .filter(tracks_table::session_id.eq_any(session).or(tracks_table::id.eq_any(recorded)))
        .select(TrackRow::as_select())
        .into_boxed::<Backend>();
    if let Some((_, id)) = &page.after {
        query = query.filter(tracks_table::id.gt(id));
    }
    Ok(query.order(tracks_table::id.asc()).limit(page.limit.into()).load(connection).await?)
}
