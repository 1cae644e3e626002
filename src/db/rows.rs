//! What goes into the store and what comes out.

pub mod egresses;
pub mod events;
pub mod seals;

use std::borrow::Cow;

use chrono::{DateTime, NaiveDateTime, Utc};
use diesel::prelude::{Queryable, Selectable};
use serde::{Deserialize, Serialize};

use self::seals::Seal;
use super::schema::{measurements, participants, recordings, segments, sessions, tracks};
use crate::audio::format::PcmFormat;
use crate::audio::gaps::Gap;
use crate::ids::{Identity, MeetingId, RecordingId, RoomName, SegmentId, ServerId, TicketId, TrackSid};
use crate::session::lifecycle::SessionStatus;
use crate::session::plan;
use crate::session::rules::Rules;
use crate::video::codec::Container;

/// Why a segment ended. Stored and shown by these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EndReason {
    /// The sender closed as LiveKit does.
    Closed,
    /// The connection went without a Close.
    Lost,
    /// Nothing came for `ingest.idle_timeout`.
    Idle,
    /// Another connection of the same track took over from a stalled one.
    Superseded,
    /// The server was told to stop.
    Shutdown,
    /// The file was full; the next segment goes on.
    Rotated,
    /// The sender was silent for longer than a file is filled with silence; the next segment goes on when it speaks again.
    Gap,
    /// The sender broke the protocol or a limit of it.
    Violation,
    /// The connection's ticket had opened another before.
    TicketSpent,
    /// The file could not be written; a next segment goes on if that could be.
    Failed,
    /// The server died; found and repaired at its next start.
    Crashed,
}

impl EndReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Lost => "lost",
            Self::Idle => "idle",
            Self::Superseded => "superseded",
            Self::Shutdown => "shutdown",
            Self::Rotated => "rotated",
            Self::Gap => "gap",
            Self::Violation => "violation",
            Self::TicketSpent => "ticketSpent",
            Self::Failed => "failed",
            Self::Crashed => "crashed",
        }
    }
}

/// A stretch of a list: `limit` rows behind `after`, which is the sort time and id of the last row seen.
#[derive(Debug, Clone)]
pub struct Page {
    pub limit: u32,
    pub after: Option<(NaiveDateTime, String)>,
}

#[derive(Debug, Clone, Default)]
pub struct SessionFilter {
    pub status: Option<SessionStatus>,
    pub room_name: Option<RoomName>,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = sessions)]
pub struct SessionRow {
    pub id: String,
    pub meeting_id: String,
    pub room_name: String,
    pub room_sid: Option<String>,
    pub status: String,
    pub started_at: NaiveDateTime,
    pub ended_at: Option<NaiveDateTime>,
    pub metadata: String,
    pub described_at: Option<NaiveDateTime>,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = participants)]
pub struct ParticipantRow {
    pub id: String,
    pub sid: String,
    pub identity: String,
    pub name: String,
    pub kind: String,
    pub role: String,
    pub metadata: String,
    /// JSON.
    pub attributes: String,
    pub described_at: Option<NaiveDateTime>,
    pub joined_at: Option<NaiveDateTime>,
    pub left_at: Option<NaiveDateTime>,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = tracks)]
pub struct TrackRow {
    pub id: String,
    pub session_id: Option<String>,
    pub room_name: String,
    pub sid: Option<String>,
    pub identity: Option<String>,
    pub kind: String,
    pub source: String,
    pub name: String,
    pub mime_type: String,
    pub encryption: String,
    /// What an operator wants, by the names of [`crate::session::plan::Wish`].
    pub wish: Option<String>,
    pub described_at: Option<NaiveDateTime>,
    pub published_at: Option<NaiveDateTime>,
    pub unpublished_at: Option<NaiveDateTime>,
    pub format_mismatch: Option<String>,
    pub mute_spans: String,
}

impl TrackRow {
    /// What the decision about the track rests on.
    pub fn facts<'a>(
        &'a self,
        room: &'a RoomName,
        identity: &'a Identity,
        participant_kind: Option<&'a str>,
        session_is_active: bool,
    ) -> plan::TrackFacts<'a> {
        plan::TrackFacts {
            room,
            identity,
            participant_kind,
            kind: &self.kind,
            source: &self.source,
            encryption: &self.encryption,
            session_is_active,
            is_published: self.unpublished_at.is_none(),
            wish: self.wish.as_deref().and_then(plan::Wish::from_name),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = recordings)]
pub struct RecordingRow {
    pub id: String,
    pub session_id: Option<String>,
    pub track_id: String,
    pub meeting_id: String,
    pub room_name: String,
    pub participant: Option<String>,
    pub track_sid: Option<String>,
    pub started_at: NaiveDateTime,
    pub ended_at: Option<NaiveDateTime>,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = segments)]
pub struct SegmentRow {
    pub id: String,
    pub recording_id: String,
    pub path: String,
    pub format: String,
    pub sample_rate: i32,
    pub channels: i32,
    pub frames: i64,
    pub bytes: i64,
    pub started_at: NaiveDateTime,
    pub ended_at: Option<NaiveDateTime>,
    pub end_reason: Option<String>,
    pub gaps: String,
    pub track_sid: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = measurements)]
pub struct MeasurementRow {
    pub id: String,
    pub recording_id: String,
    pub service: String,
    pub kind: String,
    pub start_ms: i64,
    pub end_ms: i64,
    pub scores: String,
    pub warning: Option<String>,
    pub received_at: NaiveDateTime,
}

/// What the handshake must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// The active session of the room, for who names no meeting.
    pub meeting: Option<MeetingId>,
    /// Of the session that the recording belongs to.
    pub session_started_at: Option<DateTime<Utc>>,
    pub ticket_spent: bool,
}

/// The server on whose behalf the store is used.
#[derive(Debug, Clone)]
pub struct Host {
    pub server: ServerId,
    /// What becomes of published tracks; `None` starts nothing.
    pub autopilot: Option<Rules>,
}

/// A connection that has sent its first sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NewRecording {
    /// Of the recording that is made, unless the connection goes on with one that is there. Asked for again under the same id, it is the same.
    pub id: RecordingId,
    pub meeting: MeetingId,
    pub room: RoomName,
    pub participant: Option<Identity>,
    pub track: Option<TrackSid>,
    /// A journal from before there was video has none.
    #[serde(default)]
    pub kind: TrackKind,
    pub started_at: DateTime<Utc>,
}

/// What a sender brings, by LiveKit's names of what a track is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TrackKind {
    #[default]
    Audio,
    Video,
}

impl TrackKind {
    /// By the files that are made of it.
    pub fn of(container: Container) -> Self {
        if container.is_video() { Self::Video } else { Self::Audio }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Audio => "AUDIO",
            Self::Video => "VIDEO",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenedRecording {
    pub id: RecordingId,
    /// How long after the recording's first sample this connection's first sample came, in milliseconds.
    pub offset_ms: u64,
    /// What earlier connections found out about the track.
    pub facts: TrackFacts,
}

#[derive(Debug, Clone)]
pub struct NewSegment {
    pub id: SegmentId,
    pub recording: RecordingId,
    /// Below the directory of its kind; its extension says which.
    pub path: String,
    /// [`PcmFormat::NONE`] of video.
    pub format: PcmFormat,
    pub track: Option<TrackSid>,
    pub started_at: DateTime<Utc>,
    pub ticket: Option<TicketId>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClosedSegment {
    pub id: SegmentId,
    pub format: PcmFormat,
    pub frames: u64,
    pub bytes: u64,
    pub ended_at: DateTime<Utc>,
    pub reason: EndReason,
    pub gaps: Vec<Gap>,
    pub seal: Seal,
}

/// What the ingest found out about a track.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrackFacts {
    pub format_mismatch: Option<String>,
    pub mute_spans: Vec<MuteSpan>,
}

/// From a mute text to the next unmute text, by the position of the audio that arrived with them, in milliseconds of the recording.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MuteSpan {
    pub start_ms: u64,
    pub end_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct NewMeasurement {
    /// Of its row; one that is there stays as it is.
    pub id: String,
    pub recording: RecordingId,
    pub service: Cow<'static, str>,
    pub kind: Cow<'static, str>,
    pub start_ms: u64,
    pub end_ms: u64,
    /// Name and score, in the service's order.
    pub scores: Vec<(String, f64)>,
    pub warning: Option<String>,
    pub received_at: DateTime<Utc>,
}
