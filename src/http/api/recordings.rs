//! Recordings and their segments.

use std::collections::BTreeMap;

use actix_web::web::{self, Json};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::page::{Listed, PageQuery, timestamp};
use super::sessions::stored_json;
use super::timeline::{format_of, measured, spans_of};
use crate::db::rows::seals::SealRow;
use crate::db::rows::{RecordingRow, SegmentRow};
use crate::http::Doors;
use crate::http::error::ApiError;
use crate::ids::{MeetingId, RecordingId};
use crate::recording::joined::Span;

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
    /// From the first sample to the last, gaps included.
    duration_ms: u64,
    /// What lies between segments, on the recording's time line.
    gaps: Vec<GapBetween>,
    segments: Vec<Segment>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GapBetween {
    start_ms: u64,
    end_ms: u64,
    /// How the segment before it ended; null while that is being found out.
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Segment {
    id: String,
    /// Below the audio directory, or the video directory.
    path: String,
    /// `wav`, `h264` or `ivf`.
    format: String,
    /// 0 of video, as `channels`.
    sample_rate: i32,
    channels: i32,
    /// Final once it has ended; before, what the file declares. Of video, pictures: of H.264 they are counted at its end.
    frames: i64,
    /// Of PCM; the file is 44 bytes longer. Of video, of the whole file.
    bytes: i64,
    seconds: f64,
    /// Where it lies on the recording's time line, which begins with the first sample of the first segment.
    start_ms: u64,
    end_ms: u64,
    started_at: String,
    ended_at: Option<String>,
    end_reason: Option<String>,
    /// Within the segment.
    gaps: Box<RawValue>,
    /// These are known once it is sealed.
    recovered: Option<bool>,
    suspect: Option<bool>,
    tail_unverified_ms: Option<i64>,
    session_offset_ms: Option<i64>,
    drift_ppm: Option<f64>,
    /// Of video, by its first key frame; of H.264 nobody knows.
    width: Option<i32>,
    height: Option<i32>,
    /// Follows in the background.
    sha256: Option<String>,
    media: String,
}

/// By the ids of their segments.
type Seals = BTreeMap<String, SealRow>;

/// `GET /api/v1/recordings?meetingId=&limit=&cursor=`, newest first.
pub async fn list(query: web::Query<RecordingQuery>, doors: web::Data<Doors>) -> Result<Json<Listed<Recording>>, ApiError> {
    let RecordingQuery { meeting_id, limit, cursor } = query.into_inner();
    let meeting = meeting_id.filter(|meeting| !meeting.is_empty()).map(MeetingId::new);
    let page = PageQuery { limit, cursor };
    let mut rows = doors.store.recordings(meeting, page.page("recordings")?).await?;
    let next_cursor = page.cut("recordings", &mut rows, |row| (row.started_at, row.id.clone()))?;
    let ids: Vec<String> = rows.iter().map(|row| row.id.clone()).collect();
    let segments = doors.store.segments_of(ids.clone()).await?;
    let mut seals = doors.store.seals_of(ids).await?;
    let mut segments = measured(segments, &doors.tracks).await?;
    let items = rows.into_iter().map(|row| {
        let (own, others) = segments.drain(..).partition(|segment| segment.recording_id == row.id);
        segments = others;
        Recording::new(row, own, &mut seals)
    });
    Ok(Json(Listed { items: items.collect::<Result<_, _>>()?, next_cursor }))
}

/// `GET /api/v1/recordings/{id}`
pub async fn show(id: web::Path<String>, doors: web::Data<Doors>) -> Result<Json<Recording>, ApiError> {
    let row = doors.store.recording(RecordingId::new(id.into_inner())).await?.ok_or_else(|| ApiError::not_found("recording"))?;
    let segments = doors.store.segments_of(vec![row.id.clone()]).await?;
    let mut seals = doors.store.seals_of(vec![row.id.clone()]).await?;
    let segments = measured(segments, &doors.tracks).await?;
    Ok(Json(Recording::new(row, segments, &mut seals)?))
}

/// Where a segment's file is served.
pub fn media_path(segment: &str) -> String {
    format!("/api/v1/segments/{segment}/media")
}

impl Recording {
    fn new(row: RecordingRow, rows: Vec<SegmentRow>, seals: &mut Seals) -> Result<Self, ApiError> {
        let spans = spans_of(&rows);
        let (mut segments, mut gaps) = (Vec::<Segment>::new(), Vec::new());
        for (row, span) in rows.into_iter().zip(spans) {
            let seal = seals.remove(&row.id);
            let segment = Segment::new(row, seal, span)?;
            if let Some(before) = segments.last().filter(|_| span.gap > 0) {
                gaps.push(GapBetween { start_ms: before.end_ms, end_ms: segment.start_ms, reason: before.end_reason.clone() });
            }
            segments.push(segment);
        }
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
            duration_ms: segments.last().map_or(0, |last| last.end_ms),
            gaps,
            segments,
        })
    }
}

impl Segment {
    fn new(row: SegmentRow, seal: Option<SealRow>, span: Span) -> Result<Self, ApiError> {
        let format = format_of(&row);
        #[expect(clippy::as_conversions, reason = "frames of one file are below 2^31: exact in an f64")]
        let seconds = (span.end - span.start) as f64 / f64::from(format.sample_rate);
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
            start_ms: format.frame_ms(span.start),
            end_ms: format.frame_ms(span.end),
            started_at: timestamp(row.started_at),
            ended_at: row.ended_at.map(timestamp),
            end_reason: row.end_reason,
            gaps: stored_json(row.gaps)?,
            recovered: seal.as_ref().map(|seal| seal.recovered),
            suspect: seal.as_ref().map(|seal| seal.suspect),
            tail_unverified_ms: seal.as_ref().map(|seal| seal.tail_unverified_ms),
            session_offset_ms: seal.as_ref().and_then(|seal| seal.session_offset_ms),
            drift_ppm: seal.as_ref().and_then(|seal| seal.drift_ppm),
            width: seal.as_ref().and_then(|seal| seal.width),
            height: seal.as_ref().and_then(|seal| seal.height),
            sha256: seal.and_then(|seal| seal.sha256),
        })
    }
}
