//! Sessions, with their participants and tracks.

use actix_web::web::{self, Json};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::page::{Listed, PageQuery, timestamp};
use crate::db::rows::{ParticipantRow, SessionFilter, SessionRow, TrackRow};
use crate::http::Doors;
use crate::http::error::{ApiError, ErrorCode};
use crate::ids::{MeetingId, RoomName};
use crate::session::lifecycle::SessionStatus;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionQuery {
    status: Option<String>,
    room_name: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    id: String,
    meeting_id: String,
    room_name: String,
    room_sid: Option<String>,
    /// What the application said of the room, last.
    metadata: String,
    status: String,
    started_at: String,
    ended_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    participants: Option<Vec<Participant>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Participant {
    sid: String,
    identity: String,
    name: String,
    kind: String,
    /// The application's word: the attribute `role`, else the member `role` of JSON metadata.
    role: String,
    metadata: String,
    attributes: Box<RawValue>,
    joined_at: Option<String>,
    /// The session's end, for one whose leaving LiveKit did not tell.
    left_at: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Track {
    id: String,
    sid: Option<String>,
    participant: Option<String>,
    room_name: String,
    kind: String,
    source: String,
    name: String,
    mime_type: String,
    encryption: String,
    /// What an operator wants, whatever the rules say: `record`, `stop` or nothing.
    wish: Option<String>,
    published_at: Option<String>,
    unpublished_at: Option<String>,
    format_mismatch: Option<String>,
    mute_spans: Box<RawValue>,
}

/// `GET /api/v1/sessions?status=&roomName=&limit=&cursor=`, newest first.
pub async fn list(query: web::Query<SessionQuery>, doors: web::Data<Doors>) -> Result<Json<Listed<Session>>, ApiError> {
    let SessionQuery { status, room_name, limit, cursor } = query.into_inner();
    let status = match status.as_deref() {
        None | Some("") => None,
        Some("ACTIVE") => Some(SessionStatus::Active),
        Some("ENDED") => Some(SessionStatus::Ended),
        Some(_) => return Err(ApiError::new(ErrorCode::InvalidRequest, "status must be ACTIVE or ENDED")),
    };
    let filter = SessionFilter { status, room_name: room_name.filter(|name| !name.is_empty()).map(RoomName::new) };
    let page = PageQuery { limit, cursor };
    let mut rows = doors.store.sessions(filter, page.page("sessions")?).await?;
    let next_cursor = page.cut("sessions", &mut rows, |row| (row.started_at, row.id.clone()))?;
    Ok(Json(Listed { items: rows.into_iter().map(Session::from).collect(), next_cursor }))
}

/// `GET /api/v1/sessions/{meetingId}`, with its participants.
pub async fn show(meeting: web::Path<String>, doors: web::Data<Doors>) -> Result<Json<Session>, ApiError> {
    let row = doors.store.session(MeetingId::new(meeting.into_inner())).await?.ok_or_else(|| ApiError::not_found("session"))?;
    let participants = doors.store.participants(row.id.clone()).await?;
    let ended_at = row.ended_at;
    let participants = participants.into_iter().map(|participant| Participant::new(participant, ended_at)).collect::<Result<_, _>>()?;
    Ok(Json(Session { participants: Some(participants), ..row.into() }))
}

/// `GET /api/v1/sessions/{meetingId}/tracks?limit=&cursor=`, oldest first. Also of meetings that have recordings but no session.
pub async fn tracks(meeting: web::Path<String>, page: web::Query<PageQuery>, doors: web::Data<Doors>) -> Result<Json<Listed<Track>>, ApiError> {
    let meeting = MeetingId::new(meeting.into_inner());
    let mut rows = doors.store.tracks(meeting.clone(), page.page("tracks")?).await?;
    if rows.is_empty() && doors.store.session(meeting).await?.is_none() {
        return Err(ApiError::not_found("session"));
    }
    let next_cursor = page.cut("tracks", &mut rows, |row| (chrono::DateTime::UNIX_EPOCH.naive_utc(), row.id.clone()))?;
    let items = rows.into_iter().map(Track::try_from).collect::<Result<_, _>>()?;
    Ok(Json(Listed { items, next_cursor }))
}

impl From<SessionRow> for Session {
    fn from(row: SessionRow) -> Self {
        Self {
            id: row.id,
            meeting_id: row.meeting_id,
            room_name: row.room_name,
            room_sid: row.room_sid,
            metadata: row.metadata,
            status: row.status,
            started_at: timestamp(row.started_at),
            ended_at: row.ended_at.map(timestamp),
            participants: None,
        }
    }
}

impl Participant {
    fn new(row: ParticipantRow, session_ended_at: Option<chrono::NaiveDateTime>) -> Result<Self, ApiError> {
        Ok(Self {
            sid: row.sid,
            identity: row.identity,
            name: row.name,
            kind: row.kind,
            role: row.role,
            metadata: row.metadata,
            attributes: stored_json(row.attributes)?,
            joined_at: row.joined_at.map(timestamp),
            left_at: row.left_at.or(session_ended_at).map(timestamp),
        })
    }
}

impl TryFrom<TrackRow> for Track {
    type Error = ApiError;

    fn try_from(row: TrackRow) -> Result<Self, ApiError> {
        Ok(Self {
            id: row.id,
            sid: row.sid,
            participant: row.identity,
            room_name: row.room_name,
            kind: row.kind,
            source: row.source,
            name: row.name,
            mime_type: row.mime_type,
            encryption: row.encryption,
            wish: row.wish,
            published_at: row.published_at.map(timestamp),
            unpublished_at: row.unpublished_at.map(timestamp),
            format_mismatch: row.format_mismatch,
            mute_spans: stored_json(row.mute_spans)?,
        })
    }
}

/// JSON out of a column, as it is.
pub fn stored_json(text: String) -> Result<Box<RawValue>, ApiError> {
    RawValue::from_string(text).map_err(|error| ApiError::from(crate::db::DbError::Unreadable(error.to_string())))
}
