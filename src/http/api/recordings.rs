//! Recordings, their segments, and their media.

use actix_files::NamedFile;
use actix_web::http::{StatusCode, header};
use actix_web::web::{self, Json};
use actix_web::{HttpRequest, HttpResponse, ResponseError};
use serde::{Deserialize, Serialize};
use serde_json::json;
use serde_json::value::RawValue;

use super::page::{Listed, PageQuery, timestamp};
use super::sessions::stored_json;
use crate::db::rows::{RecordingRow, SegmentRow};
use crate::http::Doors;
use crate::http::error::{ApiError, ErrorCode};
use crate::ids::{MeetingId, RecordingId, SegmentId};
use crate::recording::path::below;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecordingQuery {
    meeting_id: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Recording {
    id: String,
    /// What the files are kept under.
    meeting_id: String,
    session_id: Option<String>,
    track_id: String,
    room_name: String,
    participant: Option<String>,
    track_sid: Option<String>,
    started_at: String,
    /// Null while it is being made.
    ended_at: Option<String>,
    segments: Vec<Segment>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Segment {
    id: String,
    /// Below the audio directory.
    path: String,
    format: String,
    sample_rate: i32,
    channels: i32,
    /// Final once it has ended, 0 before.
    frames: i64,
    /// Of PCM; the file is 44 bytes longer.
    bytes: i64,
    seconds: f64,
    started_at: String,
    ended_at: Option<String>,
    end_reason: Option<String>,
    gaps: Box<RawValue>,
    media: String,
}

/// `GET /api/v1/recordings?meetingId=&limit=&cursor=`, newest first.
pub async fn list(query: web::Query<RecordingQuery>, doors: web::Data<Doors>) -> Result<Json<Listed<Recording>>, ApiError> {
    let RecordingQuery { meeting_id, limit, cursor } = query.into_inner();
    let meeting = meeting_id.filter(|meeting| !meeting.is_empty()).map(MeetingId::new);
    let page = PageQuery { limit, cursor };
    let mut rows = doors.tracks.store.recordings(meeting, page.page("recordings")?).await?;
    let next_cursor = page.cut("recordings", &mut rows, |row| (row.started_at, row.id.clone()))?;
    let mut segments = doors.tracks.store.segments_of(rows.iter().map(|row| row.id.clone()).collect()).await?;
    let items = rows.into_iter().map(|row| {
        let (own, others) = segments.drain(..).partition(|segment| segment.recording_id == row.id);
        segments = others;
        Recording::new(row, own)
    });
    Ok(Json(Listed { items: items.collect::<Result<_, _>>()?, next_cursor }))
}

/// `GET /api/v1/recordings/{id}`
pub async fn show(id: web::Path<String>, doors: web::Data<Doors>) -> Result<Json<Recording>, ApiError> {
    let row = doors.tracks.store.recording(RecordingId::new(id.into_inner())).await?.ok_or_else(|| ApiError::not_found("recording"))?;
    let segments = doors.tracks.store.segments_of(vec![row.id.clone()]).await?;
    Ok(Json(Recording::new(row, segments)?))
}

/// `GET /api/v1/recordings/{id}/media`: the file, while there is one.
pub async fn media(request: HttpRequest, id: web::Path<String>, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let segments = doors.tracks.store.segments_of(vec![id.into_inner()]).await?;
    match segments.as_slice() {
        [] => Err(ApiError::not_found("recording")),
        [segment] => file(&request, segment, &doors).await,
        several => {
            let links: Vec<String> = several.iter().map(|segment| media_path(&segment.id)).collect();
            Err(ApiError::new(ErrorCode::ManySegments, "the recording has several segments; each has its own media").with("segments", json!(links)))
        }
    }
}

/// `GET /api/v1/segments/{id}/media`, also in byte ranges.
pub async fn segment_media(request: HttpRequest, id: web::Path<String>, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let segment = doors.tracks.store.segment(SegmentId::new(id.into_inner())).await?.ok_or_else(|| ApiError::not_found("segment"))?;
    file(&request, &segment, &doors).await
}

async fn file(request: &HttpRequest, segment: &SegmentRow, doors: &Doors) -> Result<HttpResponse, ApiError> {
    let path = below(&doors.tracks.audio_dir, &segment.path).ok_or_else(|| ApiError::not_found("file"))?;
    let file = NamedFile::open_async(&path).await.map_err(|error| {
        log::error!("a segment's file cannot be opened segment_id={} error={error}", segment.id);
        ApiError::not_found("file")
    })?;
    let wav = "audio/wav".parse().expect("a media type");
    let mut response = file.set_content_type(wav).into_response(request);
    let Some(range) = response.headers().get(header::CONTENT_RANGE).cloned() else { return Ok(response) };
    match response.status() {
        StatusCode::RANGE_NOT_SATISFIABLE => {
            response = ApiError::new(ErrorCode::RangeNotSatisfiable, "the file has no such bytes").error_response();
            response.headers_mut().insert(header::CONTENT_RANGE, range);
        }
        // A range that turns out to be the whole file is a range: players ask for `bytes=0-` to learn whether they may seek.
        StatusCode::OK => *response.status_mut() = StatusCode::PARTIAL_CONTENT,
        _ => {}
    }
    Ok(response)
}

fn media_path(segment: &str) -> String {
    format!("/api/v1/segments/{segment}/media")
}

impl Recording {
    fn new(row: RecordingRow, segments: Vec<SegmentRow>) -> Result<Self, ApiError> {
        Ok(Self {
            id: row.id,
            meeting_id: row.meeting_id,
            session_id: row.session_id,
            track_id: row.track_id,
            room_name: row.room_name,
            participant: row.participant,
            track_sid: row.track_sid,
            started_at: timestamp(row.started_at),
            ended_at: row.ended_at.map(timestamp),
            segments: segments.into_iter().map(Segment::try_from).collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<SegmentRow> for Segment {
    type Error = ApiError;

    fn try_from(row: SegmentRow) -> Result<Self, ApiError> {
        #[expect(clippy::as_conversions, reason = "frames of one file are below 2^31: exact in an f64")]
        let seconds = row.frames as f64 / f64::from(row.sample_rate.max(1));
        Ok(Self {
            media: media_path(&row.id),
            id: row.id,
            path: row.path,
            format: row.format,
            sample_rate: row.sample_rate,
            channels: row.channels,
            frames: row.frames,
            bytes: row.bytes,
            seconds,
            started_at: timestamp(row.started_at),
            ended_at: row.ended_at.map(timestamp),
            end_reason: row.end_reason,
            gaps: stored_json(row.gaps)?,
        })
    }
}
