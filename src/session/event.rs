//! What a LiveKit webhook says, in our words.

use chrono::{DateTime, Utc};

use crate::ids::{EventId, Identity, ParticipantSid, RoomName, RoomSid, TrackSid};

/// A verified webhook event. Its stored body is kept beside it by the store.
#[derive(Debug, Clone, PartialEq)]
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

#[derive(Debug, Clone, PartialEq)]
pub struct Room {
    pub sid: RoomSid,
    pub name: RoomName,
    /// Only in events that carry the whole room.
    pub created_at: Option<DateTime<Utc>>,
}

/// What happened to whom.
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    RoomStarted,
    RoomEnded,
    ParticipantJoined(Participant),
    ParticipantLeft(Participant),
    TrackPublished(Participant, Track),
    TrackUnpublished(Participant, Track),
    /// Egress, ingress, agents, and whatever LiveKit adds: kept, and a sign of life of its room.
    Other,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Participant {
    pub sid: ParticipantSid,
    pub identity: Identity,
    pub name: String,
    /// LiveKit's `ParticipantInfo.Kind`, such as `STANDARD`, `AGENT`, `SIP`.
    pub kind: String,
    pub joined_at: Option<DateTime<Utc>>,
    /// Whether the event carries the whole participant; track events carry SID and identity alone.
    pub complete: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Track {
    pub sid: TrackSid,
    /// `AUDIO`, `VIDEO` or `DATA`.
    pub kind: String,
    /// `MICROPHONE`, `CAMERA`, `SCREEN_SHARE`, …
    pub source: String,
    pub name: String,
    pub mime_type: String,
}
