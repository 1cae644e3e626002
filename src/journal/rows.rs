//! The rows of a connection, as operations that may be done twice: at once, or by way of the journal, also by the next run of the server.

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::audio::format::PcmFormat;
use crate::db::rows::{ClosedSegment, MuteSpan, NewMeasurement, NewRecording, NewSegment, OpenedRecording, TrackFacts};
use crate::db::{DbError, Store};
use crate::ids::{SegmentId, TicketId};

/// A file that has just been made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenedSegment {
    pub id: SegmentId,
    /// Below the directory of its kind.
    pub path: String,
    pub format: PcmFormat,
    pub started_at: DateTime<Utc>,
}

/// What an analysis service said of a stretch of the connection's audio.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Measured {
    /// Its row's.
    pub id: String,
    pub service: Cow<'static, str>,
    pub kind: Cow<'static, str>,
    /// From the connection's first sample, in milliseconds.
    pub start_ms: u64,
    pub end_ms: u64,
    pub scores: Vec<(String, f64)>,
    pub warning: Option<String>,
    pub received_at: DateTime<Utc>,
}

/// A step of a connection's rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RowOp {
    /// The ticket goes on the row of the connection's first segment.
    Opened(OpenedSegment, Option<TicketId>),
    Closed(ClosedSegment),
    /// Mute spans count from the connection's first sample.
    Facts(TrackFacts),
    Measured(Vec<Measured>),
    End,
}

/// A step with all that it takes to do it, whoever does it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RowRecord {
    /// Tells connections apart, also those of different runs.
    pub connection: String,
    pub rows: ConnectionRows,
    pub op: RowOp,
}

/// What is known of the recording that a connection writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionRows {
    pub recording: NewRecording,
    /// What the database said of it; it may be asked again.
    pub opened: Option<OpenedRecording>,
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    AsSaid,
    /// The ticket had opened another connection before: the audio has its row, without it.
    TicketSpent,
}

impl ConnectionRows {
    /// Does a step. Doing it again changes nothing.
    ///
    /// # Errors
    /// What the store says.
    pub async fn write(&mut self, store: &Store, op: RowOp) -> Result<Written, DbError> {
        let opened = match &self.opened {
            Some(opened) => opened.clone(),
            None => {
                let opened = store.open_recording(self.recording.clone()).await?;
                self.opened.insert(opened).clone()
            }
        };
        match op {
            RowOp::Opened(segment, ticket) => return self.open_segment(store, &opened, segment, ticket).await,
            RowOp::Closed(closed) => store.close_segment(closed).await?,
            RowOp::Facts(facts) => store.set_track_facts(opened.id.clone(), merged(opened, facts)).await?,
            RowOp::Measured(measured) => {
                store.add_measurements(measured.into_iter().map(|measured| measurement(measured, &opened)).collect()).await?;
            }
            RowOp::End => store.close_recording(opened.id).await?,
        }
        Ok(Written::AsSaid)
    }

    async fn open_segment(
        &self,
        store: &Store,
        opened: &OpenedRecording,
        segment: OpenedSegment,
        ticket: Option<TicketId>,
    ) -> Result<Written, DbError> {
        let new = NewSegment {
            id: segment.id,
            recording: opened.id.clone(),
            path: segment.path,
            format: segment.format,
            track: self.recording.track.clone(),
            started_at: segment.started_at,
            ticket,
        };
        match store.open_segment(new.clone()).await {
            Ok(()) => Ok(Written::AsSaid),
            Err(DbError::TicketSpent) => {
                // The audio is kept, with a row of its own; the connection goes.
                log::error!("a spent ticket was used again, while the database could not be asked segment_id={}", new.id);
                store.open_segment(NewSegment { ticket: None, ..new }).await?;
                Ok(Written::TicketSpent)
            }
            Err(error) => Err(error),
        }
    }
}

/// A connection's own facts behind those of earlier connections. What the connection itself told before is among those when they are asked for again: its
/// spans begin at or behind its first sample.
fn merged(opened: OpenedRecording, own: TrackFacts) -> TrackFacts {
    let OpenedRecording { offset_ms, facts: earlier, .. } = opened;
    let shifted =
        own.mute_spans.into_iter().map(|span| MuteSpan { start_ms: span.start_ms + offset_ms, end_ms: span.end_ms.map(|end| end + offset_ms) });
    let mute_spans = earlier.mute_spans.into_iter().filter(|span| span.start_ms < offset_ms).chain(shifted).collect();
    TrackFacts { mute_spans, format_mismatch: own.format_mismatch.or(earlier.format_mismatch) }
}

fn measurement(measured: Measured, recording: &OpenedRecording) -> NewMeasurement {
    NewMeasurement {
        id: measured.id,
        recording: recording.id.clone(),
        service: measured.service,
        kind: measured.kind,
        start_ms: measured.start_ms + recording.offset_ms,
        end_ms: measured.end_ms + recording.offset_ms,
        scores: measured.scores,
        warning: measured.warning,
        received_at: measured.received_at,
    }
}
