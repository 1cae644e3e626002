//! What this process does about one row of the queue. The row is the truth; this follows from it, from what is under way and from the sockets that are open.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};

use crate::db::rows::egresses::{Egress, EgressState};

/// From LiveKit's yes to the socket at most: an egress waits up to 30 s for its track, and dials then (`docs/FACTS.md`, server API).
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(60);
/// The same in `livekit.restart_after`s, where those are short.
pub(super) const CONNECT_PATIENCE: u32 = 2;

/// An egress ends within 5 s of its track: 2 s of grace, and what is in its pipeline (`docs/FACTS.md`, egress socket).
const ENDING_GRACE: TimeDelta = TimeDelta::seconds(30);

pub(super) struct Job {
    pub egress: Egress,
    pub phase: JobPhase,
}

impl Job {
    /// Whether its track was recorded a moment ago, and LiveKit was not asked for another egress yet.
    pub fn is_first_replacement(&self) -> bool {
        self.egress.row.restarts > 0 && self.egress.row.attempts == 0
    }

    /// Whether the track has ended so long ago that its egress does not by itself.
    pub fn outlives_its_track(&self, now: DateTime<Utc>) -> bool {
        self.egress.over_since.is_some_and(|over| now - over.and_utc() > ENDING_GRACE)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JobPhase {
    /// Until then. `doubtful`: an earlier call may have started an egress.
    Waiting {
        due: Instant,
        doubtful: bool,
    },
    /// LiveKit is asked.
    Asking,
    /// LiveKit has agreed; without a socket by then it was in vain.
    Connecting {
        deadline: Instant,
        since: Instant,
    },
    Live,
    /// What follows is being decided.
    Judging,
}

/// What a reading of the queue changes for a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Whoever is at it brings the row's next state, or there is nothing to do.
    Nothing,
    Phase(JobPhase),
    /// It has ended, or was an earlier run's: what follows must be decided.
    Judge,
}

/// The clocks, and how long an egress may take to dial.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    pub now: Instant,
    pub wall: DateTime<Utc>,
    pub connect_deadline: Duration,
}

/// `connected`: the socket of the row's ticket is open here.
pub(super) fn next_phase(egress: &Egress, known: Option<JobPhase>, connected: bool, times: Times) -> Next {
    let Times { now, wall, connect_deadline } = times;
    match (egress.state, known) {
        (_, Some(JobPhase::Asking | JobPhase::Judging)) | (EgressState::Ended | EgressState::Skipped, _) => Next::Nothing,
        (EgressState::Lost, _) => Next::Judge,
        (EgressState::Queued, known) => {
            let was_doubtful = matches!(known, Some(JobPhase::Waiting { doubtful: true, .. }));
            let wait = (egress.row.due_at.and_utc() - wall).to_std().unwrap_or_default();
            // An earlier run may have been asking when it died.
            Next::Phase(JobPhase::Waiting { due: now + wait, doubtful: was_doubtful || (known.is_none() && egress.row.attempts > 0) })
        }
        (EgressState::Starting | EgressState::Active, _) if connected => Next::Phase(JobPhase::Live),
        (EgressState::Starting, Some(JobPhase::Connecting { .. })) => Next::Nothing,
        (EgressState::Starting, _) if egress.row.egress_id.is_some() => {
            Next::Phase(JobPhase::Connecting { deadline: now + connect_deadline, since: now })
        }
        (EgressState::Starting, _) => Next::Phase(JobPhase::Waiting { due: now, doubtful: true }),
        // Its socket went with an earlier run, or its end was not told.
        (EgressState::Active, _) => Next::Judge,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::rows::egresses::EgressRow;
    use crate::db::rows::{SessionRow, TrackRow};

    fn egress(state: EgressState, agreed: bool, attempts: i32) -> Egress {
        let at = DateTime::from_timestamp(1_700_000_000, 0).expect("a time").naive_utc();
        let text = str::to_owned;
        let row = EgressRow {
            id: text("1"),
            track_id: text("2"),
            state: text(state.as_str()),
            server_id: text("here"),
            egress_id: agreed.then(|| text("EG_1")),
            ticket_id: None,
            attempts,
            restarts: 0,
            last_error: None,
            node: None,
            created_at: at,
            due_at: at,
            started_at: None,
            connected_at: None,
            ended_at: None,
            end_reason: None,
        };
        let track = TrackRow {
            id: text("2"),
            session_id: Some(text("3")),
            room_name: text("room"),
            sid: Some(text("TR_1")),
            identity: Some(text("ana")),
            kind: text("AUDIO"),
            source: text("MICROPHONE"),
            name: String::new(),
            mime_type: String::new(),
            encryption: text("NONE"),
            wish: None,
            described_at: None,
            published_at: Some(at),
            unpublished_at: None,
            format_mismatch: None,
            mute_spans: text("[]"),
        };
        let session = SessionRow {
            id: text("3"),
            meeting_id: text("RM_1"),
            room_name: text("room"),
            room_sid: Some(text("RM_1")),
            status: text("ACTIVE"),
            started_at: at,
            ended_at: None,
            metadata: String::new(),
            described_at: None,
        };
        Egress::new(row, track, &session).expect("a known state")
    }

    #[test]
    fn an_egress_may_end_with_its_track_by_itself_for_a_while() {
        let now = DateTime::from_timestamp(1_700_000_000, 0).expect("a time");
        let job = |ago: Option<i64>| {
            let egress = egress(EgressState::Active, true, 1);
            let over_since = ago.map(|ago| (now - TimeDelta::seconds(ago)).naive_utc());
            Job { egress: Egress { over_since, ..egress }, phase: JobPhase::Live }
        };
        assert_eq!([None, Some(0), Some(30), Some(31)].map(|ago| job(ago).outlives_its_track(now)), [false, false, false, true]);
    }

    #[test]
    fn what_a_reading_of_the_queue_changes() {
        use EgressState::{Active, Ended, Lost, Queued, Starting};
        let (now, wall) = (Instant::now(), DateTime::from_timestamp(1_700_000_000, 0).expect("a time"));
        let times = Times { now, wall, connect_deadline: CONNECT_DEADLINE };
        let waiting = |doubtful| Next::Phase(JobPhase::Waiting { due: now, doubtful });
        let connecting = JobPhase::Connecting { deadline: now + times.connect_deadline, since: now };
        let doubtful = Some(JobPhase::Waiting { due: now, doubtful: true });
        let table = [
            ("new", egress(Queued, false, 0), None, false, waiting(false)),
            ("asked for by an earlier run", egress(Queued, false, 1), None, false, waiting(true)),
            ("put off for good reason", egress(Queued, false, 1), Some(JobPhase::Waiting { due: now, doubtful: false }), false, waiting(false)),
            ("put off in doubt", egress(Queued, false, 1), doubtful, false, waiting(true)),
            ("an earlier run died asking", egress(Starting, false, 1), None, false, waiting(true)),
            ("an earlier run was agreed with", egress(Starting, true, 1), None, false, Next::Phase(connecting)),
            ("on its way", egress(Starting, true, 1), Some(connecting), false, Next::Nothing),
            ("there", egress(Starting, true, 1), Some(connecting), true, Next::Phase(JobPhase::Live)),
            ("still there", egress(Active, true, 1), Some(JobPhase::Live), true, Next::Phase(JobPhase::Live)),
            ("its socket is an earlier run's", egress(Active, true, 1), None, false, Next::Judge),
            ("told lost", egress(Lost, true, 1), Some(JobPhase::Live), true, Next::Judge),
            ("being judged", egress(Lost, true, 1), Some(JobPhase::Judging), false, Next::Nothing),
            ("being asked for", egress(Queued, false, 1), Some(JobPhase::Asking), false, Next::Nothing),
            ("over", egress(Ended, true, 1), None, false, Next::Nothing),
        ];
        for (case, egress, known, connected, next) in table {
            assert_eq!(next_phase(&egress, known, connected, times), next, "{case}");
        }
        let early = next_phase(&egress(Queued, false, 0), None, false, Times { wall: wall - TimeDelta::seconds(7), ..times });
        assert_eq!(early, Next::Phase(JobPhase::Waiting { due: now + Duration::from_secs(7), doubtful: false }));
    }
}
