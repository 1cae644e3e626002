//! The ledger of webhooks: what LiveKit told, what came of it, and once more.

use actix_web::web::{self, Json};
use chrono::{DateTime, NaiveDateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::page::{Listed, PageQuery, timestamp};
use crate::actors::session_registry::SessionsChanged;
use crate::db::rows::events::{EventFilter, Outcome, WebhookEventRow};
use crate::http::Doors;
use crate::http::error::{ApiError, ErrorCode};
use crate::ids::{EventId, RoomName, RoomSid};
use crate::livekit::webhook::parse_kept;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventQuery {
    event: Option<String>,
    room_name: Option<String>,
    room_sid: Option<String>,
    outcome: Option<String>,
    from: Option<String>,
    to: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WebhookEvent {
    id: String,
    event: String,
    room_sid: Option<String>,
    room_name: Option<String>,
    created_at: String,
    received_at: String,
    /// How often it came or was applied again.
    attempts: i32,
    outcome: String,
    problem: Option<String>,
    /// As it is kept, without secrets; a text if it is no JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<Box<RawValue>>,
}

/// `GET /api/v1/webhook-events?event=&roomName=&roomSid=&outcome=&from=&to=&limit=&cursor=`, newest first, without their bodies.
pub async fn list(query: web::Query<EventQuery>, doors: web::Data<Doors>) -> Result<Json<Listed<WebhookEvent>>, ApiError> {
    let EventQuery { event, room_name, room_sid, outcome, from, to, limit, cursor } = query.into_inner();
    let filter = EventFilter {
        event: given(event).map(|event| event.replace('\0', "\u{2400}")),
        room_name: given(room_name).map(|name| RoomName::new(name).into_string()),
        room_sid: given(room_sid).map(|sid| RoomSid::new(sid).into_string()),
        outcome: given(outcome).map(|name| outcome_named(&name)).transpose()?,
        from: given(from).map(|text| time("from", &text)).transpose()?,
        to: given(to).map(|text| time("to", &text)).transpose()?,
    };
    let page = PageQuery { limit, cursor };
    let mut rows = doors.store.webhook_events(filter, page.page("webhook-events")?).await?;
    let next_cursor = page.cut("webhook-events", &mut rows, |row| (row.received_at, row.id.clone()))?;
    Ok(Json(Listed { items: rows.into_iter().map(WebhookEvent::from).collect(), next_cursor }))
}

/// `GET /api/v1/webhook-events/{id}`, with its body.
pub async fn show(id: web::Path<String>, doors: web::Data<Doors>) -> Result<Json<WebhookEvent>, ApiError> {
    let row = find(&doors, id.into_inner()).await?;
    let body = RawValue::from_string(row.body.clone()).or_else(|_| to_raw_value(&row.body)).expect("a text is plain data");
    Ok(Json(WebhookEvent { body: Some(body), ..row.into() }))
}

/// `POST /api/v1/webhook-events/{id}/replay`: applies a kept event once more. It changes what is missing, as a repetition of the same event would.
pub async fn replay(id: web::Path<String>, doors: web::Data<Doors>) -> Result<Json<WebhookEvent>, ApiError> {
    let row = find(&doors, id.into_inner()).await?;
    let kept = parse_kept(&row.body, EventId::new(row.id.clone()), row.created_at.and_utc());
    if !kept.understood {
        return Err(ApiError::new(ErrorCode::NotUnderstood, "the event is not understood, so that there is nothing to apply"));
    }
    doors.store.replay_event(kept.event, Utc::now()).await?;
    doors.registry.send(SessionsChanged).await?;
    log::info!("a webhook was applied again event={:?} event_id={}", row.event, row.id);
    Ok(Json(find(&doors, row.id).await?.into()))
}

async fn find(doors: &Doors, id: String) -> Result<WebhookEventRow, ApiError> {
    doors.store.webhook_event(EventId::new(id)).await?.ok_or_else(|| ApiError::not_found("webhook event"))
}

fn given(parameter: Option<String>) -> Option<String> {
    parameter.filter(|text| !text.is_empty())
}

fn outcome_named(name: &str) -> Result<Outcome, ApiError> {
    Outcome::from_name(name).ok_or_else(|| {
        let names = Outcome::ALL.map(Outcome::as_str).join(", ");
        ApiError::new(ErrorCode::InvalidRequest, format!("outcome must be one of {names}"))
    })
}

fn time(parameter: &str, text: &str) -> Result<NaiveDateTime, ApiError> {
    let time = DateTime::parse_from_rfc3339(text).map(|time| time.naive_utc());
    time.map_err(|_| {
        let detail = format!("{parameter} must be a time of RFC 3339, such as 2026-11-20T10:53:12Z; a + in it is written %2B");
        ApiError::new(ErrorCode::InvalidRequest, detail)
    })
}

impl From<WebhookEventRow> for WebhookEvent {
    fn from(row: WebhookEventRow) -> Self {
        Self {
            id: row.id,
            event: row.event,
            room_sid: row.room_sid,
            room_name: row.room_name,
            created_at: timestamp(row.created_at),
            received_at: timestamp(row.received_at),
            attempts: row.attempts,
            outcome: row.outcome,
            problem: row.problem,
            body: None,
        }
    }
}
