//! What LiveKit told, and what became of it.

use chrono::{DateTime, NaiveDateTime, Utc};
use diesel::prelude::{Insertable, Queryable, Selectable};
use serde::{Deserialize, Serialize};

use super::SessionRow;
use crate::db::schema::{transitions, webhook_events};
use crate::session::event::SessionEvent;

/// The body of an event as it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredBody {
    pub text: String,
    pub understood: bool,
    pub received_at: DateTime<Utc>,
}

/// A verified event with its body.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Arrival {
    pub event: SessionEvent,
    pub body: StoredBody,
}

/// What came of an event.
#[derive(Debug, Clone, PartialEq)]
pub enum Applied {
    /// Its id was known: nothing changed.
    Repeated,
    /// It was kept; the session of its room as it is now.
    Kept(Option<SessionRow>),
    /// It was kept for later: the database does not take what it says, for this reason.
    Failed(String),
}

/// What is told of an event that was kept. Stored and shown by these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Applied,
    /// It names no room: there is nothing to change.
    NoRoom,
    /// The body is none of LiveKit's.
    NotUnderstood,
    /// It is kept, but what it says could not be: the problem is beside it.
    Failed,
}

impl Outcome {
    pub const ALL: [Self; 4] = [Self::Applied, Self::NoRoom, Self::NotUnderstood, Self::Failed];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::NoRoom => "noRoom",
            Self::NotUnderstood => "notUnderstood",
            Self::Failed => "failed",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.as_str() == name)
    }
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = webhook_events)]
pub struct WebhookEventRow {
    pub id: String,
    pub event: String,
    pub room_sid: Option<String>,
    pub room_name: Option<String>,
    pub created_at: NaiveDateTime,
    pub received_at: NaiveDateTime,
    pub attempts: i32,
    pub outcome: String,
    pub problem: Option<String>,
    /// Without secrets.
    pub body: String,
}

/// An event that arrives.
#[derive(Debug, Insertable)]
#[diesel(table_name = webhook_events, treat_none_as_default_value = false)]
pub struct NewWebhookEvent<'a> {
    pub id: &'a str,
    pub event: String,
    pub room_sid: Option<&'a str>,
    pub room_name: Option<&'a str>,
    pub created_at: NaiveDateTime,
    pub received_at: NaiveDateTime,
    pub understood: bool,
    pub body: &'a str,
    pub outcome: &'a str,
    pub problem: Option<&'a str>,
}

/// Which events are asked for; what is absent leaves all.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    pub event: Option<String>,
    pub room_name: Option<String>,
    pub room_sid: Option<String>,
    pub outcome: Option<Outcome>,
    pub from: Option<NaiveDateTime>,
    pub to: Option<NaiveDateTime>,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = transitions)]
pub struct TransitionRow {
    pub id: String,
    pub subject: Option<String>,
    pub step: String,
    pub at: NaiveDateTime,
    pub cause: String,
    pub event_id: Option<String>,
    pub recorded_at: NaiveDateTime,
}

/// A step that is to be written down.
#[derive(Debug, Insertable)]
#[diesel(table_name = transitions, treat_none_as_default_value = false)]
pub struct NewTransition {
    pub id: String,
    pub session_id: String,
    pub subject: Option<String>,
    pub step: &'static str,
    pub at: NaiveDateTime,
    pub cause: &'static str,
    pub event_id: Option<String>,
    pub recorded_at: NaiveDateTime,
}
