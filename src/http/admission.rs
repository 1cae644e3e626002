//! Who may open an ingest socket, of audio or video: what both ask before the upgrade.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use super::Doors;
use super::error::{ApiError, ErrorCode};
use super::ingest_query::IngestQuery;
use super::storage::Storage;
use crate::actors::session_registry::{ConnectionId, GetRememberedMeeting, Refusal, ReserveTrack};
use crate::actors::stats::TrackStats;
use crate::actors::track::rows::TrackIdentity;
use crate::config::IngestAuth;
use crate::ids::{MeetingId, TicketId};
use crate::ticket::TicketKind;

/// How long the upgrade waits for the database: LiveKit holds 2 s of audio before it drops some (`docs/FACTS.md`, egress socket).
const ADMISSION_DEADLINE: Duration = Duration::from_millis(100);
/// How long ago a track may have been recorded that goes on: an egress that is lost is replaced within a minute, if LiveKit has room for it.
const JUST_NOW: TimeDelta = TimeDelta::minutes(5);

/// A ticket's id, and the time after which it is worth nothing anyway.
pub type Spendable = (TicketId, DateTime<Utc>);

/// The ticket's word over the query's.
pub fn authenticate(query: IngestQuery, kind: TicketKind, doors: &Doors) -> Result<(IngestQuery, Option<Spendable>), ApiError> {
    match (&query.ticket, doors.tracks.ingest.auth) {
        (None, IngestAuth::Open) => Ok((query, None)),
        (None, IngestAuth::Ticket) => Err(ApiError::unauthorized()),
        (Some(text), IngestAuth::Open | IngestAuth::Ticket) => {
            let ticket = doors.mint.check(text, kind, Utc::now()).map_err(|error| {
                log::warn!("a ticket opens nothing problem={error}");
                ApiError::unauthorized()
            })?;
            Ok((query.overridden_by(ticket.subject), Some((ticket.id, ticket.expires_at))))
        }
    }
}

/// Asks the database whether the ticket is spent, which meeting the room has, and since when, but not for long.
pub async fn admit(query: &IngestQuery, ticket: Option<TicketId>, doors: &Doors) -> Result<(MeetingId, Option<DateTime<Utc>>), ApiError> {
    let admission = doors.tracks.store.admit(query.room.clone(), query.meeting.clone(), ticket);
    let (active, session_started_at) = match tokio::time::timeout(ADMISSION_DEADLINE, admission).await {
        Ok(Ok(admission)) if admission.ticket_spent => return Err(ApiError::unauthorized()),
        Ok(Ok(admission)) => (admission.meeting, admission.session_started_at),
        late_or_failed => {
            log::warn!("a connection is let in without the database's word late={}", late_or_failed.is_err());
            (doors.registry.send(GetRememberedMeeting(query.room.clone())).await?, None)
        }
    };
    Ok((query.meeting.clone().or(active).unwrap_or_else(|| MeetingId::new(query.room.as_str())), session_started_at))
}

/// Whether a recording can be begun, or gone on with, in the directory of this name.
pub async fn storage_is_ready(name: &str, storage: &Storage, query: &IngestQuery, doors: &Doors) -> Result<(), ApiError> {
    if let Some(space) = storage.disk().space().filter(|space| space.is_low())
        && !goes_on(query, doors).await
    {
        return Err(ApiError::new(ErrorCode::StorageLow, format!("no new recording is begun: {space}")));
    }
    if let Some(problem) = storage.look().await.problem {
        log::error!("a connection is refused: the {name} directory cannot be written problem={problem:?}");
        return Err(ApiError::new(ErrorCode::StorageUnavailable, "recordings cannot be written now"));
    }
    Ok(())
}

/// Whether the track was being recorded until just now: that is no new recording. Without the database's word it is one.
async fn goes_on(query: &IngestQuery, doors: &Doors) -> bool {
    let Some(track) = query.track.clone() else { return false };
    let going_on = doors.tracks.store.is_recorded(query.room.clone(), query.participant.clone(), track, Utc::now() - JUST_NOW);
    matches!(tokio::time::timeout(ADMISSION_DEADLINE, going_on).await, Ok(Ok(true)))
}

/// Lets the connection in, if nothing speaks against it.
pub async fn reserve(
    identity: &TrackIdentity,
    ticket: Option<&Spendable>,
    stats: &Arc<TrackStats>,
    peer: &str,
    doors: &Doors,
) -> Result<ConnectionId, ApiError> {
    let reserve = ReserveTrack { identity: identity.clone(), ticket: ticket.cloned(), stats: Arc::clone(stats), peer: peer.to_owned() };
    doors.registry.send(reserve).await?.map_err(|refusal| match refusal {
        Refusal::TicketSpent => ApiError::unauthorized(),
        Refusal::TrackIsLive => ApiError::new(ErrorCode::TrackIsLive, "this track has a live connection already"),
        Refusal::ShuttingDown => ApiError::new(ErrorCode::ShuttingDown, "the server is shutting down"),
    })
}
