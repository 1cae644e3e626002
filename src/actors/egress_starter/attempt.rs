//! One try to start an egress.

use std::time::Duration;

use chrono::Utc;

use super::Tools;
use crate::actors::child::{full_jitter, jitter};
use crate::audio::format::PcmFormat;
use crate::audio::mixdown::Mix;
use crate::db::DbError;
use crate::db::rows::Page;
use crate::db::rows::egresses::{Egress, EgressFilter};
use crate::ids::{EgressId, MeetingId, RoomSid, StartId};
use crate::livekit::api::{CallError, OwnEgress};
use crate::session::event::EgressStatus;
use crate::session::lifecycle::{Cause, Change, described_participant, sign_of_life};
use crate::session::plan::{Plan, Reason, plan};
use crate::session::rules::{Capture, CaptureChannels};
use crate::ticket::{TicketKind, TicketSubject, socket_url};

/// The waits between tries, with full jitter: from one second to half a minute.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(30);
/// More than may still be ending at the same time.
const EARLIER: u32 = 20;

/// What came of a try. The row says it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attempted {
    /// LiveKit has agreed, or had before.
    Agreed,
    PutOff {
        wait: Duration,
        /// No node had room.
        was_busy: bool,
        /// An egress may run all the same.
        doubtful: bool,
    },
    /// The row has ended, or is somebody else's.
    Over,
}

impl Tools {
    /// Asks LiveKit for an egress, if it is still wanted. Looks first whether one runs already, if that may be.
    pub(super) async fn attempt(&self, id: StartId, doubtful: bool) -> Attempted {
        match self.try_start(&id, doubtful).await {
            Ok(attempted) => attempted,
            Err(error) => {
                log::warn!("an egress is not asked for now: the database does not answer start_id={id} error={error}");
                // The call may have been made, and its answer not kept.
                Attempted::PutOff { wait: full_jitter(1, FIRST_RETRY, MAX_RETRY, jitter()), was_busy: false, doubtful: true }
            }
        }
    }

    async fn try_start(&self, id: &StartId, doubtful: bool) -> Result<Attempted, DbError> {
        let Some(egress) = self.store.egress(id.clone()).await?.filter(|egress| egress.row.ended_at.is_none()) else { return Ok(Attempted::Over) };
        let planned = match self.plan(&egress).await? {
            Plan::AskKind => match self.ask_kind(&egress).await? {
                Ok(plan) => plan,
                Err(error) => return self.not_yet_asked(&egress, &error, doubtful).await,
            },
            planned @ (Plan::Record(_) | Plan::Leave(_)) => planned,
        };
        let capture = match planned {
            Plan::Record(capture) => capture,
            Plan::AskKind => {
                return self.not_yet_asked(&egress, &CallError::NotFound("nobody of this identity is in the room".to_owned()), doubtful).await;
            }
            Plan::Leave(reason) => {
                self.stop(id, reason).await?;
                return Ok(Attempted::Over);
            }
        };
        if doubtful {
            match self.livekit.own_egresses(Some(&egress.room), &self.ws_base).await {
                Ok(listed) => {
                    // One that was replaced may still be ending.
                    let replaced = self.earlier(&egress).await?;
                    if let Some(found) = listed.into_iter().find(|found| is_of(found, &egress) && !replaced.contains(&found.id)) {
                        log::info!("an egress is adopted that was asked for before start_id={id} egress_id={}", found.id);
                        return self.agreed(&egress, found.id).await;
                    }
                }
                Err(error) => return self.not_yet_asked(&egress, &error, true).await,
            }
        }
        let (ticket, said) = self.mint.mint(TicketKind::Audio, self.subject(&egress, &capture), Utc::now());
        if !self.store.egress_asked(id.clone(), said.id.clone()).await? {
            return Ok(Attempted::Over);
        }
        match self.livekit.start_track_egress(&egress.room, &egress.track_sid(), socket_url(&self.ws_base, &said, &ticket)).await {
            Ok(started) => self.agreed(&egress, started).await,
            Err(CallError::NotFound(error)) => {
                log::info!("a track is not recorded: LiveKit does not know it any more start_id={id} error={error:?}");
                self.store.egress_lost(id.clone(), Some(error)).await?;
                self.store.end_egress(id.clone(), Reason::Gone, Utc::now()).await?;
                Ok(Attempted::Over)
            }
            Err(error) => {
                let doubtful = error.may_have_happened();
                self.put_off(&egress, &error, doubtful, false).await
            }
        }
    }

    /// What must be known before an egress is asked for could not be learned. It counts as a try, so that the next wait is longer.
    async fn not_yet_asked(&self, egress: &Egress, error: &CallError, doubtful: bool) -> Result<Attempted, DbError> {
        self.put_off(egress, error, doubtful, true).await
    }

    /// The egresses that the track had before this row.
    async fn earlier(&self, egress: &Egress) -> Result<Vec<EgressId>, DbError> {
        let of_track = EgressFilter {
            room_name: Some(egress.room.as_str().to_owned()),
            track_sid: Some(egress.track_sid().into_string()),
            ..EgressFilter::default()
        };
        let rows = self.store.egresses(of_track, Page { limit: EARLIER, after: None }).await?;
        Ok(rows.into_iter().filter(|earlier| earlier.id != egress.id).filter_map(|earlier| earlier.egress_id()).collect())
    }

    async fn agreed(&self, egress: &Egress, started: EgressId) -> Result<Attempted, DbError> {
        if self.store.egress_agreed(egress.id.clone(), started.clone(), Utc::now()).await? {
            log::info!("an egress is starting room={:?} track_sid={} egress_id={started}", egress.room.as_str(), egress.track_sid());
            return Ok(Attempted::Agreed);
        }
        // The track or its session ended while LiveKit was asked, or an operator stopped it.
        self.stop_at_livekit(started);
        Ok(Attempted::Over)
    }

    async fn put_off(&self, egress: &Egress, error: &CallError, doubtful: bool, counts: bool) -> Result<Attempted, DbError> {
        let tries = u32::try_from(egress.row.attempts).unwrap_or_default();
        let wait = match error {
            // Nothing changes by itself here: somebody must set it right.
            CallError::Refused(_) => MAX_RETRY,
            CallError::NotFound(_) | CallError::Busy(_) | CallError::Unanswered(_) | CallError::Unreachable(_) => {
                full_jitter(tries, FIRST_RETRY, MAX_RETRY, jitter())
            }
        };
        let was_busy = matches!(error, CallError::Busy(_));
        if !was_busy {
            log::warn!("an egress did not start, it is tried again start_id={} wait_ms={} error={error}", egress.id, wait.as_millis());
        }
        self.store.egress_put_off(egress.id.clone(), error.to_string(), Utc::now() + wait, counts).await?;
        Ok(Attempted::PutOff { wait, was_busy, doubtful })
    }

    /// What is to become of a track, as the database knows it.
    pub(super) async fn plan(&self, egress: &Egress) -> Result<Plan, DbError> {
        let session = egress.track.session_id.clone().unwrap_or_default();
        let kind = self.store.participant_kind(session, egress.identity()).await?;
        Ok(self.plan_of_kind(egress, kind.as_deref()))
    }

    fn plan_of_kind(&self, egress: &Egress, participant_kind: Option<&str>) -> Plan {
        let identity = egress.identity();
        let facts = egress.track.facts(&egress.room, &identity, participant_kind, egress.session_is_active);
        plan(&facts, &self.config.rules)
    }

    /// No event has told what kind of participant it is, and a rule wants to know.
    async fn ask_kind(&self, egress: &Egress) -> Result<Result<Plan, CallError>, DbError> {
        let listed = match self.livekit.participants(&egress.room).await {
            Ok(listed) => listed,
            Err(CallError::NotFound(_)) => return Ok(Ok(Plan::Leave(Reason::Gone))),
            Err(error) => return Ok(Err(error)),
        };
        let identity = egress.identity();
        let Some(found) = listed.into_iter().find(|listed| listed.participant.identity == identity) else { return Ok(Ok(Plan::Leave(Reason::Gone))) };
        let now = Utc::now();
        let room = RoomSid::new(&egress.meeting_id);
        let change = Change { participant: Some(described_participant(&found.participant, now)), ..sign_of_life(room, egress.room.clone(), now) };
        self.store.apply_changes(vec![change], Cause::Reconciler, now).await?;
        Ok(Ok(self.plan_of_kind(egress, Some(&found.participant.kind))))
    }

    fn subject(&self, egress: &Egress, capture: &Capture) -> TicketSubject {
        TicketSubject {
            participant: Some(egress.identity()),
            track_id: Some(egress.track_sid()),
            meeting_id: Some(MeetingId::new(&egress.meeting_id)),
            sample_rate: Some(PcmFormat::LIVEKIT.sample_rate),
            channels: Some(PcmFormat::LIVEKIT.channels),
            group_seconds: Some(capture.group_seconds.unwrap_or(self.group_seconds)),
            analyse: (!capture.analyse).then_some(false),
            mix: match capture.channels {
                CaptureChannels::Source => None,
                CaptureChannels::Mono => Some(Mix::Mono),
            },
            ..TicketSubject::of_room(egress.room.clone())
        }
    }
}

/// An egress that runs for the same track and was not told to end.
fn is_of(found: &OwnEgress, egress: &Egress) -> bool {
    found.track == egress.track_sid() && matches!(found.status, EgressStatus::Starting | EgressStatus::Active)
}
