//! The rows of segments on their recording's time line.

use std::path::Path;
use std::sync::Arc;

use chrono::Utc;

use crate::actors::track::TrackResources;
use crate::audio::format::PcmFormat;
use crate::db::rows::{EndReason, SegmentRow};
use crate::http::error::{ApiError, ErrorCode};
use crate::recording::joined::{Span, Taken, timeline};
use crate::recording::segment_reader::declared;
use crate::recording::video_file::declared_video;
use crate::video::codec::Container;

/// Brings the rows of open segments up to what their files declare now. A row whose file cannot be read stays as it is.
///
/// # Errors
/// 500 if the blocking pool is gone.
pub async fn measured(segments: Vec<SegmentRow>, tracks: &Arc<TrackResources>) -> Result<Vec<SegmentRow>, ApiError> {
    if segments.iter().all(|segment| segment.ended_at.is_some()) {
        return Ok(segments);
    }
    let tracks = Arc::clone(tracks);
    blocking(move || segments.into_iter().map(|segment| if segment.ended_at.is_none() { grown(segment, &tracks) } else { segment }).collect()).await
}

fn grown(mut segment: SegmentRow, tracks: &TrackResources) -> SegmentRow {
    let container = Container::of(&segment.path);
    let (root, path) = (tracks.root_of(container), Path::new(&segment.path));
    if container.is_video() {
        match declared_video(root, path) {
            Ok(video) => {
                segment.frames = i64::try_from(video.pictures).unwrap_or(i64::MAX);
                segment.bytes = i64::try_from(video.bytes).unwrap_or(i64::MAX);
            }
            Err(error) => log::warn!("an open segment cannot be measured segment_id={} error={error}", segment.id),
        }
        return segment;
    }
    match declared(root, path) {
        Ok((format, frames)) => {
            segment.sample_rate = i32::try_from(format.sample_rate).unwrap_or(i32::MAX);
            segment.channels = i32::from(format.channels);
            segment.frames = i64::try_from(frames).unwrap_or(i64::MAX);
            segment.bytes = i64::try_from(frames * format.frame_bytes()).unwrap_or(i64::MAX);
        }
        Err(error) => log::warn!("an open segment cannot be measured segment_id={} error={error}", segment.id),
    }
    segment
}

/// Where each segment of one recording lies; they come in the order of their start.
pub fn spans_of(segments: &[SegmentRow]) -> Vec<Span> {
    let mut before: Option<&SegmentRow> = None;
    let first = segments.first().map(|first| first.started_at);
    let taken: Vec<Taken> = segments
        .iter()
        .map(|segment| {
            let after = first.map(|first| segment.started_at - first).unwrap_or_default();
            let goes_on = before.is_some_and(|before| before.end_reason.as_deref() == Some(EndReason::Rotated.as_str()));
            before = Some(segment);
            Taken { format: format_of(segment), frames: frames_of(segment), after: after.to_std().unwrap_or_default(), goes_on }
        })
        .collect();
    timeline(&taken)
}

/// The length of a segment. Video goes by the clock alone.
fn frames_of(segment: &SegmentRow) -> u64 {
    if Container::of(&segment.path).is_video() {
        let ended_at = segment.ended_at.unwrap_or_else(|| Utc::now().naive_utc());
        return u64::try_from((ended_at - segment.started_at).num_milliseconds()).unwrap_or(0);
    }
    u64::try_from(segment.frames).unwrap_or(0)
}

/// What a segment's time is counted in: its frames, or of video, milliseconds.
pub fn format_of(segment: &SegmentRow) -> PcmFormat {
    if Container::of(&segment.path).is_video() {
        return PcmFormat { sample_rate: 1_000, channels: 1 };
    }
    let sample_rate = u32::try_from(segment.sample_rate).unwrap_or(0).max(1);
    PcmFormat { sample_rate, channels: u16::try_from(segment.channels).unwrap_or(0).max(1) }
}

/// Work on files, off the threads that serve.
///
/// # Errors
/// 500 if the blocking pool is gone.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        log::error!("a request's work on files was lost error={error}");
        ApiError::new(ErrorCode::Internal, "an internal error, which the log explains")
    })
}
