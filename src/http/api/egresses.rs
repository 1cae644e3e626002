//! Track egresses, and what operators say to them.

use actix::Addr;
use actix_web::http::StatusCode;
use actix_web::web::{self, Json};
use actix_web::{HttpResponse, Responder};
use chrono::Utc;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::page::{Listed, PageQuery, timestamp};
use super::sessions::Session;
use crate::actors::egress_starter::{EgressStarter, StopEgress};
use crate::actors::reconciler::Reconcile;
use crate::actors::session_registry::SessionsChanged;
use crate::db::rows::TrackRow;
use crate::db::rows::egresses::{Egress, EgressFilter, EgressState};
use crate::http::Doors;
use crate::http::error::{ApiError, ErrorCode};
use crate::ids::{MeetingId, RoomName, RoomSid, TrackSid};
use crate::session::lifecycle::{Cause, Change, SessionState, SessionStatus, sign_of_life};
use crate::session::plan::{Reason, Wish, is_audio};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressQuery {
    state: Option<String>,
    room_name: Option<String>,
    track_sid: Option<String>,
    meeting_id: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

/// One start of a track's egress, from the wish for it to its end.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ShownEgress {
    id: String,
    meeting_id: String,
    room_name: String,
    track_sid: String,
    participant: String,
    state: &'static str,
    /// LiveKit's; null until it has agreed.
    egress_id: Option<String>,
    /// How often LiveKit was asked.
    attempts: i32,
    /// How many egresses of the track came before.
    restarts: i32,
    last_error: Option<String>,
    /// The address that the egress dialled from.
    node: Option<String>,
    /// The server whose work it is.
    server: String,
    created_at: String,
    /// While it is queued: not asked for before.
    due_at: Option<String>,
    started_at: Option<String>,
    connected_at: Option<String>,
    ended_at: Option<String>,
    end_reason: Option<String>,
}

/// `GET /api/v1/egresses?state=&roomName=&trackSid=&meetingId=&limit=&cursor=`, newest first.
pub async fn list(query: web::Query<EgressQuery>, doors: web::Data<Doors>) -> Result<impl Responder, ApiError> {
    let EgressQuery { state, room_name, track_sid, meeting_id, limit, cursor } = query.into_inner();
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let state = given(state).map(|name| EgressState::from_name(&name)).transpose().map_err(|_| {
        let names: Vec<&str> = EgressState::ALL.iter().map(|state| state.as_str()).collect();
        ApiError::new(ErrorCode::InvalidRequest, format!("state must be one of {}", names.join(", ")))
    })?;
    let filter = EgressFilter { state, room_name: given(room_name), track_sid: given(track_sid), meeting_id: given(meeting_id) };
    let page = PageQuery { limit, cursor };
    let mut rows = doors.store.egresses(filter, page.page("egresses")?).await?;
    let next_cursor = page.cut("egresses", &mut rows, |egress| (egress.row.created_at, egress.row.id.clone()))?;
    Ok(Json(Listed { items: rows.into_iter().map(ShownEgress::from).collect(), next_cursor }))
}

/// `POST /api/v1/rooms/{room}/tracks/{sid}/record`: records a track, whatever the rules say.
pub async fn record(path: web::Path<(String, String)>, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    starter(&doors)?;
    let (room, sid) = path.into_inner();
    let (track, egress) = wish(&doors, &room, &sid, Wish::Record).await?;
    doors.registry.send(SessionsChanged).await?;
    if let Some(egress) = egress {
        return Ok(HttpResponse::build(StatusCode::ACCEPTED).json(ShownEgress::from(egress)));
    }
    let (reason, why) = if !is_audio(&track.kind, &track.source) {
        (Reason::NotAudio, "it is not audio, and LiveKit sends nothing else to a WebSocket")
    } else if track.unpublished_at.is_some() {
        (Reason::TrackEnded, "it has been unpublished")
    } else {
        (Reason::Encrypted, "it is encrypted, and LiveKit's egress has no keys")
    };
    Err(ApiError::new(ErrorCode::NotRecordable, format!("the track cannot be recorded: {why}")).with("reason", json!(reason.as_str())))
}

/// `POST /api/v1/rooms/{room}/tracks/{sid}/stop`: stops recording a track and leaves it alone, until `record` is said.
pub async fn stop(path: web::Path<(String, String)>, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let starter = starter(&doors)?;
    let (room, sid) = path.into_inner();
    let (_, egress) = wish(&doors, &room, &sid, Wish::Stop).await?;
    if let Some(egress) = egress {
        starter.send(StopEgress { id: egress.id, reason: Reason::Stopped }).await??;
    }
    doors.registry.send(SessionsChanged).await?;
    Ok(HttpResponse::build(StatusCode::ACCEPTED).json(json!({"roomName": room, "trackSid": sid, "wish": Wish::Stop.as_str()})))
}

/// `POST /api/v1/sessions/{meetingId}/end`: ends a session and its egresses. LiveKit's room is left alone.
pub async fn end_session(meeting: web::Path<String>, doors: web::Data<Doors>) -> Result<impl Responder, ApiError> {
    let (store, meeting) = (&doors.store, MeetingId::new(meeting.into_inner()));
    let row = store.session(meeting.clone()).await?.ok_or_else(|| ApiError::not_found("session"))?;
    if let Some(sid) = row.room_sid.as_ref().filter(|_| row.status == SessionStatus::Active.as_str()) {
        let now = Utc::now();
        let alive = sign_of_life(RoomSid::new(sid), RoomName::new(&row.room_name), row.started_at.and_utc());
        let ended = Change { session: SessionState { ended_at: Some(now), ..alive.session }, ..alive };
        store.apply_changes(vec![ended], Cause::Operator, now).await?;
    }
    if let Some(starter) = &doors.starter {
        for open in store.open_egresses().await?.into_iter().filter(|egress| egress.meeting_id == meeting.as_str()) {
            starter.send(StopEgress { id: open.id, reason: Reason::SessionEnded }).await??;
        }
    }
    doors.registry.send(SessionsChanged).await?;
    let row = store.session(meeting).await?.ok_or_else(|| ApiError::not_found("session"))?;
    Ok(Json(Session::from(row)))
}

fn starter(doors: &Doors) -> Result<&Addr<EgressStarter>, ApiError> {
    doors.starter.as_ref().ok_or_else(|| ApiError::new(ErrorCode::AutopilotOff, "this server starts no egresses; its start log says why"))
}

/// Notes what an operator wants of a track. One that is not known is looked for at LiveKit first.
async fn wish(doors: &Doors, room: &str, sid: &str, wish: Wish) -> Result<(TrackRow, Option<Egress>), ApiError> {
    let say = || doors.store.wish(room.to_owned(), TrackSid::new(sid), wish, Utc::now());
    // To be recorded it takes more than audio that has told of it.
    let is_known = |(track, egress): &(TrackRow, Option<Egress>)| wish == Wish::Stop || egress.is_some() || track.published_at.is_some();
    if let Some(found) = say().await?.filter(is_known) {
        return Ok(found);
    }
    if let Some(reconciler) = &doors.reconciler {
        reconciler.send(Reconcile).await?;
    }
    say().await?.filter(is_known).ok_or_else(|| ApiError::not_found("track in an open room of this name"))
}

impl From<Egress> for ShownEgress {
    fn from(egress: Egress) -> Self {
        Self {
            track_sid: egress.track_sid().into_string(),
            participant: egress.identity().into_string(),
            state: egress.state.as_str(),
            due_at: (egress.state == EgressState::Queued).then(|| timestamp(egress.row.due_at)),
            id: egress.row.id,
            meeting_id: egress.meeting_id,
            room_name: egress.room.into_string(),
            egress_id: egress.row.egress_id,
            attempts: egress.row.attempts,
            restarts: egress.row.restarts,
            last_error: egress.row.last_error,
            node: egress.row.node,
            server: egress.row.server_id,
            created_at: timestamp(egress.row.created_at),
            started_at: egress.row.started_at.map(timestamp),
            connected_at: egress.row.connected_at.map(timestamp),
            ended_at: egress.row.ended_at.map(timestamp),
            end_reason: egress.row.end_reason,
        }
    }
}
