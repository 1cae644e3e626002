//! What a LiveKit webhook says, in our words.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::ids::{EgressId, EventId, Identity, ParticipantSid, RoomName, RoomSid, TrackSid};

/// A verified webhook event. Its stored body is kept beside it by the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionEvent {
    /// The same in every delivery.
    pub id: EventId,
    /// LiveKit's name of the event, such as `room_started`.
    pub name: String,
    /// When LiveKit made it, to the second.
    pub created_at: DateTime<Utc>,
    /// Absent for events without a room, and for bodies that could not be understood.
    pub room: Option<Room>,
    pub kind: EventKind,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Room {
    pub sid: RoomSid,
    pub name: RoomName,
    /// Only in events that carry the whole room.
    pub created_at: Option<DateTime<Utc>>,
    /// What the application said of the room; as `created_at`, only of a whole one.
    pub metadata: Option<String>,
}

/// What happened to whom.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EventKind {
    RoomStarted,
    RoomEnded,
    ParticipantJoined(Participant),
    ParticipantLeft(Participant),
    TrackPublished(Participant, Track),
    TrackUnpublished(Participant, Track),
    /// `egress_started`, `egress_updated` and `egress_ended` alike: the status tells.
    Egress(EgressReport),
    /// Ingress, agents, and whatever LiveKit adds: kept, and a sign of life of its room.
    Other,
}

impl EventKind {
    /// Whether an egress may have to be started or replaced, or not to be started any more.
    pub fn may_change_queue(&self) -> bool {
        match self {
            Self::TrackPublished(..) | Self::TrackUnpublished(..) | Self::RoomEnded => true,
            Self::Egress(report) => report.status.is_final(),
            Self::RoomStarted | Self::ParticipantJoined(_) | Self::ParticipantLeft(_) | Self::Other => false,
        }
    }
}

/// What LiveKit says of an egress, without the URL it sends to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressReport {
    pub id: EgressId,
    pub status: EgressStatus,
    /// What went wrong, or why it ended, without URLs.
    pub detail: Option<String>,
}

/// LiveKit's `EgressStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EgressStatus {
    Starting,
    Active,
    Ending,
    Complete,
    Failed,
    Aborted,
    LimitReached,
    /// A status of the future: neither a start nor an end can be read from it.
    Unknown,
}

impl EgressStatus {
    /// From LiveKit's name, such as `EGRESS_ACTIVE`.
    pub fn from_name(name: &str) -> Self {
        match name {
            "EGRESS_STARTING" => Self::Starting,
            "EGRESS_ACTIVE" => Self::Active,
            "EGRESS_ENDING" => Self::Ending,
            "EGRESS_COMPLETE" => Self::Complete,
            "EGRESS_FAILED" => Self::Failed,
            "EGRESS_ABORTED" => Self::Aborted,
            "EGRESS_LIMIT_REACHED" => Self::LimitReached,
            _ => Self::Unknown,
        }
    }

    pub fn is_final(self) -> bool {
        match self {
            Self::Complete | Self::Failed | Self::Aborted | Self::LimitReached => true,
            Self::Starting | Self::Active | Self::Ending | Self::Unknown => false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Participant {
    pub sid: ParticipantSid,
    pub identity: Identity,
    pub name: String,
    /// LiveKit's `ParticipantInfo.Kind`, such as `STANDARD`, `AGENT`, `SIP`.
    pub kind: String,
    /// What it may do in the application's own words: the attribute `role`, else the member `role` of JSON metadata, else empty.
    pub role: String,
    pub metadata: String,
    /// JSON: an object of texts, by name.
    pub attributes: String,
    pub joined_at: Option<DateTime<Utc>>,
    /// Whether the event carries the whole participant; track events carry SID and identity alone.
    pub complete: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Track {
    pub sid: TrackSid,
    /// `AUDIO`, `VIDEO` or `DATA`.
    pub kind: String,
    /// `MICROPHONE`, `CAMERA`, `SCREEN_SHARE`, …
    pub source: String,
    pub name: String,
    pub mime_type: String,
    /// LiveKit's `Encryption.Type`: `NONE`, `GCM`, `CUSTOM`.
    pub encryption: String,
}
