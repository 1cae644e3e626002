//! Identifiers as types: what names a room can never be passed where a track is meant.
//!
//! Names from LiveKit and from query strings are attacker-chosen text. They are kept as they came, but for NUL, which PostgreSQL cannot
//! store: it becomes U+2400 (SYMBOL FOR NULL). They reach a path only through [`crate::recording::path`].

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            pub fn new(text: impl Into<String>) -> Self {
                let text = text.into();
                Self(if text.contains('\0') { text.replace('\0', "\u{2400}") } else { text })
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }

            pub fn into_string(self) -> String {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )+};
}

id! {
    /// The public name of a meeting: the room SID for sessions that webhooks opened, else what the sender said, else the room's name.
    MeetingId,
    /// A LiveKit room name.
    RoomName,
    /// A LiveKit room SID, `RM_…`: unique for each life of a room.
    RoomSid,
    /// A participant's identity, as its access token says it.
    Identity,
    /// A LiveKit participant SID, `PA_…`: unique for each connection of a participant.
    ParticipantSid,
    /// A LiveKit track SID, `TR_…`.
    TrackSid,
    /// The id of a LiveKit webhook event, `EV_…`, the same in every delivery of it.
    EventId,
    /// The id of a LiveKit egress, `EG_…`.
    EgressId,
    /// The id of an ingest ticket.
    TicketId,
    /// A session's row.
    SessionId,
    /// A recording's row.
    RecordingId,
    /// A segment's row.
    SegmentId,
    /// The row of an egress of ours.
    StartId,
    /// A server among those that share a database: kept in its storage directory.
    ServerId,
}

/// A new UUIDv7 as text: sorts by the time of its making.
pub fn new_row_id() -> String {
    Uuid::now_v7().to_string()
}

impl SegmentId {
    pub fn fresh() -> Self {
        Self(new_row_id())
    }
}

impl RecordingId {
    pub fn fresh() -> Self {
        Self(new_row_id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nul_never_reaches_a_database() {
        assert_eq!(RoomName::new("a\0b").as_str(), "a\u{2400}b");
    }

    #[test]
    fn row_ids_sort_by_their_making() {
        let ids: Vec<String> = (0..1000).map(|_| new_row_id()).collect();
        assert!(ids.is_sorted());
    }
}
