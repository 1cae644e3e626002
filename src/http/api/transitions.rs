//! What happened in a session, step by step, and who caused it.

use actix_web::web::{self, Json};
use serde::Serialize;

use super::page::{Listed, PageQuery, timestamp};
use crate::db::rows::events::TransitionRow;
use crate::http::Doors;
use crate::http::error::ApiError;
use crate::ids::MeetingId;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Transition {
    id: String,
    /// The participant's or the track's SID; null for the session itself.
    subject: Option<String>,
    step: String,
    /// When it happened, as LiveKit told it.
    at: String,
    cause: String,
    /// The webhook that told it.
    event_id: Option<String>,
    recorded_at: String,
}

/// `GET /api/v1/sessions/{meetingId}/transitions?limit=&cursor=`, in the order in which they became known.
pub async fn list(meeting: web::Path<String>, page: web::Query<PageQuery>, doors: web::Data<Doors>) -> Result<Json<Listed<Transition>>, ApiError> {
    let asked = page.page("transitions")?;
    let session = doors.store.session(MeetingId::new(meeting.into_inner())).await?.ok_or_else(|| ApiError::not_found("session"))?;
    let mut rows = doors.store.transitions(session.id, asked).await?;
    let next_cursor = page.cut("transitions", &mut rows, |row| (row.recorded_at, row.id.clone()))?;
    Ok(Json(Listed { items: rows.into_iter().map(Transition::from).collect(), next_cursor }))
}

impl From<TransitionRow> for Transition {
    fn from(row: TransitionRow) -> Self {
        Self {
            id: row.id,
            subject: row.subject,
            step: row.step,
            at: timestamp(row.at),
            cause: row.cause,
            event_id: row.event_id,
            recorded_at: timestamp(row.recorded_at),
        }
    }
}
