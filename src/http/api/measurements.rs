//! What analysis services said of a meeting.

use actix_web::web::{self, Json};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::page::{Listed, PageQuery, timestamp};
use super::sessions::stored_json;
use crate::http::Doors;
use crate::http::error::ApiError;
use crate::ids::MeetingId;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MeasurementQuery {
    participant: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Measurement {
    id: String,
    recording_id: String,
    participant: Option<String>,
    track_sid: Option<String>,
    service: String,
    kind: String,
    /// From the recording's first sample.
    start_ms: i64,
    end_ms: i64,
    scores: Box<RawValue>,
    warning: Option<String>,
    received_at: String,
}

/// `GET /api/v1/sessions/{meetingId}/measurements?participant=&limit=&cursor=`, in the order of their coming.
pub async fn list(
    meeting: web::Path<String>,
    query: web::Query<MeasurementQuery>,
    doors: web::Data<Doors>,
) -> Result<Json<Listed<Measurement>>, ApiError> {
    let MeasurementQuery { participant, limit, cursor } = query.into_inner();
    let page = PageQuery { limit, cursor };
    let participant = participant.filter(|participant| !participant.is_empty());
    let mut rows = doors.store.measurements(MeetingId::new(meeting.into_inner()), participant, page.page("measurements")?).await?;
    let next_cursor = page.cut("measurements", &mut rows, |(row, ..)| (chrono::DateTime::UNIX_EPOCH.naive_utc(), row.id.clone()))?;
    let items = rows.into_iter().map(|(row, participant, track_sid)| {
        Ok(Measurement {
            id: row.id,
            recording_id: row.recording_id,
            participant,
            track_sid,
            service: row.service,
            kind: row.kind,
            start_ms: row.start_ms,
            end_ms: row.end_ms,
            scores: stored_json(row.scores)?,
            warning: row.warning,
            received_at: timestamp(row.received_at),
        })
    });
    Ok(Json(Listed { items: items.collect::<Result<_, ApiError>>()?, next_cursor }))
}
