//! The start queue, and what became of what was in it.

use chrono::NaiveDateTime;
use diesel::prelude::{Queryable, Selectable};

use super::{SessionRow, TrackRow};
use crate::db::DbError;
use crate::db::schema::egresses;
use crate::ids::{EgressId, Identity, RoomName, StartId, TicketId, TrackSid};
use crate::session::lifecycle::SessionStatus;

/// Where an egress of ours is in its life. Stored and shown by these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EgressState {
    /// Waits for its turn.
    Queued,
    /// LiveKit is asked, or has agreed; its socket has not come yet.
    Starting,
    /// Its socket is open.
    Active,
    /// Its socket or the egress itself ended; whether another follows is not decided yet.
    Lost,
    Ended,
    /// There never was one: encrypted, or a rule says so.
    Skipped,
}

impl EgressState {
    pub const ALL: [Self; 6] = [Self::Queued, Self::Starting, Self::Active, Self::Lost, Self::Ended, Self::Skipped];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "QUEUED",
            Self::Starting => "STARTING",
            Self::Active => "ACTIVE",
            Self::Lost => "LOST",
            Self::Ended => "ENDED",
            Self::Skipped => "SKIPPED",
        }
    }

    /// # Errors
    /// A name that this version does not know.
    pub fn from_name(name: &str) -> Result<Self, DbError> {
        Self::ALL.into_iter().find(|state| state.as_str() == name).ok_or_else(|| DbError::Unreadable(format!("an egress's state {name:?}")))
    }
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = egresses)]
pub struct EgressRow {
    pub id: String,
    pub track_id: String,
    pub state: String,
    pub server_id: String,
    pub egress_id: Option<String>,
    pub ticket_id: Option<String>,
    pub attempts: i32,
    pub restarts: i32,
    pub last_error: Option<String>,
    pub node: Option<String>,
    pub created_at: NaiveDateTime,
    pub due_at: NaiveDateTime,
    pub started_at: Option<NaiveDateTime>,
    pub connected_at: Option<NaiveDateTime>,
    pub ended_at: Option<NaiveDateTime>,
    pub end_reason: Option<String>,
}

/// An egress with the track that it is of.
#[derive(Debug, Clone, PartialEq)]
pub struct Egress {
    pub row: EgressRow,
    pub id: StartId,
    pub state: EgressState,
    pub track: TrackRow,
    pub meeting_id: String,
    pub room: RoomName,
    pub session_is_active: bool,
}

impl Egress {
    /// # Errors
    /// A state that this version does not know.
    pub fn new(row: EgressRow, track: TrackRow, session: &SessionRow) -> Result<Self, DbError> {
        Ok(Self {
            id: StartId::new(&row.id),
            state: EgressState::from_name(&row.state)?,
            meeting_id: session.meeting_id.clone(),
            room: RoomName::new(&session.room_name),
            session_is_active: session.status == SessionStatus::Active.as_str(),
            row,
            track,
        })
    }

    pub fn track_sid(&self) -> TrackSid {
        TrackSid::new(self.track.sid.clone().unwrap_or_default())
    }

    pub fn identity(&self) -> Identity {
        Identity::new(self.track.identity.clone().unwrap_or_default())
    }

    pub fn egress_id(&self) -> Option<EgressId> {
        self.row.egress_id.as_ref().map(EgressId::new)
    }

    pub fn ticket(&self) -> Option<TicketId> {
        self.row.ticket_id.as_ref().map(TicketId::new)
    }
}

/// What becomes of an egress that nobody here asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adoption {
    /// It is its track's own now.
    Adopted,
    /// Somebody else's, and let be.
    Tolerated,
    /// It has no business here.
    Unwanted,
}

/// Which egresses are asked for; what is absent leaves all.
#[derive(Debug, Clone, Default)]
pub struct EgressFilter {
    pub state: Option<EgressState>,
    pub room_name: Option<String>,
    pub track_sid: Option<String>,
    pub meeting_id: Option<String>,
}
