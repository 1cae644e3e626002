//! What follows an egress that has ended, and what becomes of egresses that nobody here asked for.

use std::collections::HashSet;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use super::Tools;
use crate::actors::child::{full_jitter, jitter};
use crate::db::DbError;
use crate::db::rows::egresses::{Adoption, Egress, EgressState};
use crate::ids::{EgressId, RoomName, StartId, TrackSid};
use crate::livekit::api::{CallError, OwnEgress};
use crate::livekit::scrub::scrub_text;
use crate::session::event::EgressStatus;
use crate::session::plan::{Plan, Reason};

/// How long LiveKit may take to say whether a track is still there: another egress is asked for within 2 s.
const LOOK_DEADLINE: Duration = Duration::from_millis(1_000);
/// Before a track that LiveKit does not list is looked for again.
const SECOND_LOOK: Duration = Duration::from_millis(500);
/// What the budget counts: so many replacements of one track in so long a time; then the next waits until it may.
const RESTARTS: usize = 10;
const RESTART_WINDOW: TimeDelta = TimeDelta::minutes(5);
const FIRST_WAIT: Duration = Duration::from_secs(1);
const MAX_WAIT: Duration = Duration::from_secs(30);
/// An egress is told to stop so often, at these intervals; what is left the reconciler finds.
const STOP_TRIES: u32 = 3;
const STOP_RETRY: Duration = Duration::from_secs(2);

/// How an egress has ended, as far as is known here.
pub(super) enum Ending {
    /// Its socket closed as LiveKit closes.
    InOrder,
    /// Its row tells.
    Told,
    Failed(String),
}

impl Ending {
    /// For the row of an egress that should not have ended. Without URLs.
    fn error(self) -> Option<String> {
        match self {
            Self::InOrder => Some("its socket ended: closed".to_owned()),
            Self::Told => None,
            Self::Failed(error) => Some(scrub_text(&error)),
        }
    }
}

impl Tools {
    /// Replaces an egress whose socket or self has ended, if its track has not.
    ///
    /// # Errors
    /// The database's.
    pub(super) async fn judge(&self, id: &StartId, ending: Ending) -> Result<(), DbError> {
        let Some(egress) = self.store.egress(id.clone()).await?.filter(|egress| egress.row.ended_at.is_none()) else { return Ok(()) };
        let over = match self.plan(&egress).await? {
            Plan::Leave(reason) => Some(reason),
            Plan::Record(_) | Plan::AskKind => (!self.is_published(&egress).await).then_some(Reason::TrackEnded),
        };
        match (over, ending) {
            // As it should be: nothing failed, and nothing runs any more.
            (Some(reason), Ending::InOrder) => {
                self.end(&egress, reason).await?;
                return Ok(());
            }
            (Some(reason), ending) => {
                self.store.egress_lost(id.clone(), ending.error()).await?;
                return self.stop(id, reason).await;
            }
            (None, ending) => self.store.egress_lost(id.clone(), ending.error()).await?,
        };
        let now = Utc::now();
        let earlier = self.store.restarts_since(egress.row.track_id.clone(), now - RESTART_WINDOW).await?;
        let due = next_restart(&earlier, now, jitter());
        if earlier.len() >= RESTARTS {
            log::error!("a track loses its egress again and again track_sid={} restarts={} next={due}", egress.track_sid(), earlier.len());
        }
        if self.store.restart_egress(id.clone(), due, now).await? {
            log::warn!("an egress is replaced room={:?} track_sid={} start_id={id}", egress.room.as_str(), egress.track_sid());
            if let Some(old) = egress.egress_id() {
                self.stop_at_livekit(old);
            }
        }
        Ok(())
    }

    /// Whether LiveKit still has the track. No answer is taken for a yes, and a no must be said twice: when an egress dies LiveKit may not be well itself.
    async fn is_published(&self, egress: &Egress) -> bool {
        if self.is_listed(egress).await {
            return true;
        }
        tokio::time::sleep(SECOND_LOOK).await;
        self.is_listed(egress).await
    }

    async fn is_listed(&self, egress: &Egress) -> bool {
        let track = egress.track_sid();
        match tokio::time::timeout(LOOK_DEADLINE, self.livekit.participants(&egress.room)).await {
            Ok(Ok(listed)) => listed.iter().any(|listed| listed.tracks.iter().any(|known| known.sid == track)),
            Ok(Err(CallError::NotFound(_))) => false,
            Ok(Err(_)) | Err(_) => true,
        }
    }

    /// Ends a row, and its egress where that does not end by itself.
    ///
    /// # Errors
    /// The database's.
    pub(super) async fn stop(&self, id: &StartId, reason: Reason) -> Result<(), DbError> {
        let Some(egress) = self.store.egress(id.clone()).await? else { return Ok(()) };
        self.end(&egress, reason).await?;
        if let Some(running) = egress.egress_id()
            && egress.state != EgressState::Queued
        {
            self.stop_at_livekit(running);
        }
        Ok(())
    }

    async fn end(&self, egress: &Egress, reason: Reason) -> Result<(), DbError> {
        if self.store.end_egress(egress.id.clone(), reason, Utc::now()).await? {
            log::info!("an egress is over room={:?} track_sid={} reason={}", egress.room.as_str(), egress.track_sid(), reason.as_str());
        }
        Ok(())
    }

    /// In the background: nobody waits for it.
    pub(super) fn stop_at_livekit(&self, egress: EgressId) {
        let livekit = std::sync::Arc::clone(&self.livekit);
        actix_rt::spawn(async move { insist_on_stop(&livekit, egress).await });
    }

    /// Adopts or stops the egresses that send here and are in no row.
    ///
    /// # Errors
    /// The database's.
    pub(super) async fn settle_orphans(&self, listed: Vec<OwnEgress>, live: HashSet<(RoomName, TrackSid)>) -> Result<(), DbError> {
        // Read after LiveKit was: whatever runs had its row before.
        let open = self.store.open_egresses().await?;
        let known: HashSet<EgressId> = open.iter().filter_map(Egress::egress_id).collect();
        for orphan in listed {
            if known.contains(&orphan.id) || !matches!(orphan.status, EgressStatus::Starting | EgressStatus::Active) {
                continue;
            }
            let is_live = live.contains(&(orphan.room.clone(), orphan.track.clone()));
            match self.settle(&orphan, &open, is_live).await {
                Ok(Settled::Left) => {}
                Ok(Settled::Adopted) => {
                    log::info!("an egress is adopted that nobody here asked for egress_id={} track_sid={}", orphan.id, orphan.track);
                }
                Ok(Settled::Unwanted) => {
                    log::warn!("an egress is stopped that nobody here asked for egress_id={} track_sid={}", orphan.id, orphan.track);
                    self.stop_at_livekit(orphan.id);
                }
                Err(error) => log::warn!("an egress that nobody asked for is left for now egress_id={} error={error}", orphan.id),
            }
        }
        Ok(())
    }

    async fn settle(&self, orphan: &OwnEgress, open: &[Egress], is_live: bool) -> Result<Settled, DbError> {
        // It was told to stop, and did not.
        if self.store.is_former_egress(orphan.id.clone()).await? {
            return Ok(Settled::Unwanted);
        }
        Ok(match open.iter().find(|egress| egress.room == orphan.room && egress.track_sid() == orphan.track) {
            Some(egress) if egress.row.egress_id.is_some() => Settled::Unwanted,
            // It is the one that is being asked for, or will be found before the next question.
            Some(egress) if egress.state != EgressState::Active && egress.row.attempts > 0 => Settled::Left,
            Some(egress) if self.store.egress_agreed(egress.id.clone(), orphan.id.clone(), Utc::now()).await? => Settled::Adopted,
            Some(_) => Settled::Left,
            None => match self.store.adopt_egress(orphan.room.clone(), orphan.track.clone(), orphan.id.clone(), Utc::now()).await? {
                Adoption::Adopted => Settled::Adopted,
                Adoption::NotOurs => Settled::Left,
                // Somebody's ticket brings audio that nothing else has told of.
                Adoption::Unknown if is_live => Settled::Left,
                Adoption::Unknown | Adoption::Unwanted => Settled::Unwanted,
            },
        })
    }
}

/// What becomes of an egress that is in no open row.
enum Settled {
    Adopted,
    Left,
    Unwanted,
}

async fn insist_on_stop(livekit: &crate::livekit::api::LiveKit, egress: EgressId) {
    for attempt in 1..=STOP_TRIES {
        match livekit.stop_egress(&egress).await {
            Ok(()) => return,
            Err(error) => log::warn!("an egress was not stopped egress_id={egress} attempt={attempt} error={error}"),
        }
        tokio::time::sleep(STOP_RETRY).await;
    }
}

/// When a track may have its next egress: at once for the first time, then after 1, 2, 4 … 30 s with full jitter, and past the budget not before the oldest of
/// its restarts has left the window.
fn next_restart(earlier: &[DateTime<Utc>], now: DateTime<Utc>, jitter: f64) -> DateTime<Utc> {
    let Some(attempt) = earlier.len().checked_sub(1) else { return now };
    let wait = full_jitter(u32::try_from(attempt).unwrap_or(u32::MAX), FIRST_WAIT, MAX_WAIT, jitter);
    let over_budget = earlier.len().checked_sub(RESTARTS).and_then(|index| earlier.get(index));
    let budget = over_budget.map_or(now, |oldest| *oldest + RESTART_WINDOW);
    (now + wait).max(budget)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_come_at_once_then_later_and_past_the_budget_when_it_is_free() {
        let now = Utc::now();
        let at = |count: usize, jitter| next_restart(&vec![now - TimeDelta::seconds(100); count], now, jitter) - now;
        assert_eq!(at(0, 1.0), TimeDelta::zero());
        for (count, seconds) in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 30), (9, 30)] {
            assert_eq!(at(count, 1.0), TimeDelta::seconds(seconds), "{count}");
            assert_eq!(at(count, 0.0), TimeDelta::zero(), "full jitter begins at nothing");
        }
        assert_eq!(at(10, 0.0), TimeDelta::seconds(200), "the oldest of ten has 200 s of its 300 to go");
        let uneven: Vec<_> = (0..12).map(|index| now - TimeDelta::seconds(240 - index)).collect();
        assert_eq!(next_restart(&uneven, now, 0.0) - now, TimeDelta::seconds(62), "nine of them may be left");
    }
}
