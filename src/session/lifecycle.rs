//! The life of a session: one table of transitions, and what an event changes, such that every order and every repetition of the same events ends in the
//! same state.
//!
//! LiveKit promises no order between its queues and repeats what it is not sure of (`docs/FACTS.md`, webhooks). So nothing here depends on what came
//! before: times only move to the earlier one, endings are final for their SID, and a description is replaced only by a later one.

use chrono::{DateTime, Utc};

use super::event::{EventKind, Participant, SessionEvent, Track};
use crate::ids::{EventId, Identity, MeetingId, ParticipantSid, RoomName, RoomSid, TrackSid};

/// Whether a meeting goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionStatus {
    Active,
    Ended,
}

impl SessionStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "ACTIVE",
            Self::Ended => "ENDED",
        }
    }
}

/// What the life of a session turns on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Anything that happens in the room.
    Alive,
    /// The room has gone, or an operator wants no more of it.
    End,
}

/// What is written down of a session, its participants and its tracks, each once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    Started,
    Ended,
    Joined,
    Left,
    Published,
    Unpublished,
    /// An operator wants a track recorded, whatever the rules say.
    RecordWanted,
    /// An operator wants a track left alone.
    StopWanted,
}

impl Step {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Ended => "ended",
            Self::Joined => "joined",
            Self::Left => "left",
            Self::Published => "published",
            Self::Unpublished => "unpublished",
            Self::RecordWanted => "recordWanted",
            Self::StopWanted => "stopWanted",
        }
    }
}

/// Who made a step happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    Webhook(EventId),
    /// A comparison with what LiveKit lists.
    Reconciler,
    Operator,
}

impl Cause {
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Webhook(_) => "webhook",
            Self::Reconciler => "reconciler",
            Self::Operator => "operator",
        }
    }

    pub fn event(&self) -> Option<&EventId> {
        match self {
            Self::Webhook(event) => Some(event),
            Self::Reconciler | Self::Operator => None,
        }
    }
}

/// The life of a session, whole: `None` is a room that nothing is known of. The end is final for a room's SID.
pub fn transition(status: Option<SessionStatus>, signal: Signal) -> (SessionStatus, &'static [Step]) {
    match (status, signal) {
        (None, Signal::Alive) => (SessionStatus::Active, &[Step::Started]),
        (None, Signal::End) => (SessionStatus::Ended, &[Step::Started, Step::Ended]),
        (Some(SessionStatus::Active), Signal::Alive) => (SessionStatus::Active, &[]),
        (Some(SessionStatus::Active), Signal::End) => (SessionStatus::Ended, &[Step::Ended]),
        (Some(SessionStatus::Ended), Signal::Alive | Signal::End) => (SessionStatus::Ended, &[]),
    }
}

/// What one event says of the session of its room, and of one participant or track in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub session: SessionState,
    pub participant: Option<ParticipantState>,
    pub track: Option<TrackState>,
}

/// Everything known of one life of a room. Its end is final.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionState {
    pub room_sid: RoomSid,
    pub room_name: RoomName,
    pub started_at: DateTime<Utc>,
    pub ended_at: Option<DateTime<Utc>>,
    pub metadata: Described<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ParticipantState {
    pub sid: ParticipantSid,
    pub identity: Identity,
    pub joined_at: Option<DateTime<Utc>>,
    pub left_at: Option<DateTime<Utc>>,
    pub description: Described<ParticipantDescription>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ParticipantDescription {
    pub name: String,
    pub kind: String,
    pub role: String,
    pub metadata: String,
    pub attributes: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct TrackState {
    pub sid: TrackSid,
    pub identity: Identity,
    pub published_at: Option<DateTime<Utc>>,
    pub unpublished_at: Option<DateTime<Utc>>,
    pub description: Described<TrackDescription>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrackDescription {
    pub kind: String,
    pub source: String,
    pub name: String,
    pub mime_type: String,
    pub encryption: String,
}

/// A value and the time of the event that said it. The later one wins; at the same second the greater value does, so that order never decides.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Described<T> {
    /// `None`: nobody has said it yet.
    pub at: Option<DateTime<Utc>>,
    pub value: T,
}

impl<T: Ord> Described<T> {
    fn merge(self, other: Self) -> Self {
        self.max(other)
    }
}

impl SessionState {
    /// The meeting that a webhook-made session stands for.
    pub fn meeting_id(&self) -> MeetingId {
        MeetingId::new(self.room_sid.as_str())
    }

    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self {
            started_at: self.started_at.min(other.started_at),
            ended_at: earlier(self.ended_at, other.ended_at),
            metadata: self.metadata.merge(other.metadata),
            ..self
        }
    }
}

impl ParticipantState {
    /// What becomes known with this state, over what was.
    pub fn steps(&self, known: Option<&Self>) -> Vec<(Step, DateTime<Utc>)> {
        let joined = news(known.and_then(|known| known.joined_at), self.joined_at).map(|at| (Step::Joined, at));
        let left = news(known.and_then(|known| known.left_at), self.left_at).map(|at| (Step::Left, at));
        joined.into_iter().chain(left).collect()
    }

    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self {
            joined_at: earlier(self.joined_at, other.joined_at),
            left_at: earlier(self.left_at, other.left_at),
            description: self.description.merge(other.description),
            sid: self.sid,
            identity: self.identity.max(other.identity),
        }
    }
}

impl TrackState {
    /// What becomes known with this state, over what was.
    pub fn steps(&self, known: Option<&Self>) -> Vec<(Step, DateTime<Utc>)> {
        let published = news(known.and_then(|known| known.published_at), self.published_at).map(|at| (Step::Published, at));
        let unpublished = news(known.and_then(|known| known.unpublished_at), self.unpublished_at).map(|at| (Step::Unpublished, at));
        published.into_iter().chain(unpublished).collect()
    }

    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self {
            published_at: earlier(self.published_at, other.published_at),
            unpublished_at: earlier(self.unpublished_at, other.unpublished_at),
            description: self.description.merge(other.description),
            sid: self.sid,
            identity: self.identity.max(other.identity),
        }
    }
}

/// A time that was not known at all before.
fn news(known: Option<DateTime<Utc>>, said: Option<DateTime<Utc>>) -> Option<DateTime<Utc>> {
    said.filter(|_| known.is_none())
}

fn earlier(a: Option<DateTime<Utc>>, b: Option<DateTime<Utc>>) -> Option<DateTime<Utc>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// That a room is there, and no more.
pub fn sign_of_life(room_sid: RoomSid, room_name: RoomName, at: DateTime<Utc>) -> Change {
    let session = SessionState { room_sid, room_name, started_at: at, ended_at: None, metadata: Described { at: None, value: String::new() } };
    Change { session, participant: None, track: None }
}

/// What an event changes. `None` for one that names no room: there is nothing to keep but the event.
pub fn change(event: &SessionEvent) -> Option<Change> {
    let room = event.room.as_ref()?;
    let at = event.created_at;
    let session = SessionState {
        room_sid: room.sid.clone(),
        room_name: room.name.clone(),
        started_at: room.created_at.map_or(at, |created| created.min(at)),
        ended_at: matches!(event.kind, EventKind::RoomEnded).then_some(at),
        metadata: Described { at: room.metadata.as_ref().map(|_| at), value: room.metadata.clone().unwrap_or_default() },
    };
    let (participant, track) = match &event.kind {
        EventKind::RoomStarted | EventKind::RoomEnded | EventKind::Egress(_) | EventKind::Other => (None, None),
        EventKind::ParticipantJoined(participant) => {
            let joined_at = participant.joined_at.unwrap_or(at);
            (Some(ParticipantState { joined_at: Some(joined_at), ..described_participant(participant, at) }), None)
        }
        EventKind::ParticipantLeft(participant) => (Some(ParticipantState { left_at: Some(at), ..described_participant(participant, at) }), None),
        EventKind::TrackPublished(participant, track) => {
            let state = TrackState { published_at: Some(at), ..described_track(participant, track, at) };
            (Some(described_participant(participant, at)), Some(state))
        }
        EventKind::TrackUnpublished(participant, track) => {
            let state = TrackState { unpublished_at: Some(at), ..described_track(participant, track, at) };
            (Some(described_participant(participant, at)), Some(state))
        }
    };
    Some(Change { session, participant, track })
}

pub fn described_participant(participant: &Participant, at: DateTime<Utc>) -> ParticipantState {
    ParticipantState {
        sid: participant.sid.clone(),
        identity: participant.identity.clone(),
        joined_at: participant.joined_at,
        left_at: None,
        description: Described {
            at: participant.complete.then_some(at),
            value: ParticipantDescription {
                name: participant.name.clone(),
                kind: participant.kind.clone(),
                role: participant.role.clone(),
                metadata: participant.metadata.clone(),
                attributes: participant.attributes.clone(),
            },
        },
    }
}

pub fn described_track(participant: &Participant, track: &Track, at: DateTime<Utc>) -> TrackState {
    TrackState {
        sid: track.sid.clone(),
        identity: participant.identity.clone(),
        published_at: None,
        unpublished_at: None,
        description: Described {
            at: Some(at),
            value: TrackDescription {
                kind: track.kind.clone(),
                source: track.source.clone(),
                name: track.name.clone(),
                mime_type: track.mime_type.clone(),
                encryption: track.encryption.clone(),
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::TimeZone;
    use proptest::prelude::*;

    use super::*;
    use crate::ids::EventId;
    use crate::session::event::Room;

    fn time(second: i64) -> DateTime<Utc> {
        Utc.timestamp_opt(1_700_000_000 + second, 0).single().expect("a time")
    }

    fn event(second: i64, kind: EventKind) -> SessionEvent {
        let room = Room { sid: RoomSid::new("RM_1"), name: RoomName::new("room"), created_at: None, metadata: None };
        SessionEvent { id: EventId::new("EV"), name: String::new(), created_at: time(second), room: Some(room), kind }
    }

    fn participant(name: &str, complete: bool) -> Participant {
        Participant {
            sid: ParticipantSid::new("PA_1"),
            identity: Identity::new("ana"),
            name: name.to_owned(),
            kind: "STANDARD".to_owned(),
            role: String::new(),
            metadata: String::new(),
            attributes: "{}".to_owned(),
            joined_at: None,
            complete,
        }
    }

    fn track(name: &str) -> Track {
        let text = str::to_owned;
        Track {
            sid: TrackSid::new("TR_1"),
            kind: text("AUDIO"),
            source: text("MICROPHONE"),
            name: text(name),
            mime_type: text("audio/opus"),
            encryption: text("NONE"),
        }
    }

    /// One session with everything that can happen, twice over and with two names.
    fn story() -> Vec<SessionEvent> {
        vec![
            event(0, EventKind::RoomStarted),
            event(1, EventKind::ParticipantJoined(participant("Ana", true))),
            event(2, EventKind::TrackPublished(participant("", false), track("mic"))),
            event(3, EventKind::Other),
            event(4, EventKind::TrackUnpublished(participant("", false), track("mic 2"))),
            event(5, EventKind::ParticipantLeft(participant("Ana B.", true))),
            event(6, EventKind::RoomEnded),
            event(7, EventKind::RoomEnded),
        ]
    }

    type World = (Option<SessionState>, BTreeMap<ParticipantSid, ParticipantState>, BTreeMap<TrackSid, TrackState>);

    /// What is written down, by subject: each step once, or it shows twice.
    type Steps = Vec<(String, &'static str)>;

    fn replay(events: &[SessionEvent]) -> World {
        replay_with_steps(events).0
    }

    fn replay_with_steps(events: &[SessionEvent]) -> (World, Steps) {
        let mut world: World = Default::default();
        let mut steps: Steps = Vec::new();
        let mut status = None;
        for change in events.iter().filter_map(change) {
            let signal = if change.session.ended_at.is_some() { Signal::End } else { Signal::Alive };
            let (next, made) = transition(status, signal);
            status = Some(next);
            steps.extend(made.iter().map(|step| (String::new(), step.as_str())));
            if let Some(state) = &change.participant {
                let made = state.steps(world.1.get(&state.sid));
                steps.extend(made.iter().map(|(step, _)| (state.sid.to_string(), step.as_str())));
            }
            if let Some(state) = &change.track {
                let made = state.steps(world.2.get(&state.sid));
                steps.extend(made.iter().map(|(step, _)| (state.sid.to_string(), step.as_str())));
            }
            world.0 = Some(match world.0 {
                None => change.session,
                Some(known) => known.merge(change.session),
            });
            if let Some(state) = change.participant {
                let known = world.1.remove(&state.sid);
                world.1.insert(state.sid.clone(), known.map_or(state.clone(), |known| known.merge(state)));
            }
            if let Some(state) = change.track {
                let known = world.2.remove(&state.sid);
                world.2.insert(state.sid.clone(), known.map_or(state.clone(), |known| known.merge(state)));
            }
        }
        steps.sort_unstable();
        (world, steps)
    }

    #[test]
    fn every_transition() {
        use SessionStatus::{Active, Ended};
        let table = [
            (None, Signal::Alive, Active, &[Step::Started][..]),
            (None, Signal::End, Ended, &[Step::Started, Step::Ended]),
            (Some(Active), Signal::Alive, Active, &[]),
            (Some(Active), Signal::End, Ended, &[Step::Ended]),
            (Some(Ended), Signal::Alive, Ended, &[]),
            (Some(Ended), Signal::End, Ended, &[]),
        ];
        for (from, signal, to, steps) in table {
            assert_eq!(transition(from, signal), (to, steps), "{from:?} {signal:?}");
        }
    }

    #[test]
    fn a_step_is_told_once() {
        let event = event(4, EventKind::TrackUnpublished(participant("", false), track("mic")));
        let said = change(&event).and_then(|change| change.track).expect("a track");
        assert_eq!(said.steps(None), [(Step::Unpublished, time(4))]);
        assert_eq!(said.steps(Some(&said)), []);
    }

    #[test]
    fn the_told_order_gives_the_expected_end() {
        let (session, participants, tracks) = replay(&story());
        let session = session.expect("a session");
        assert_eq!((session.started_at, session.ended_at), (time(0), Some(time(6))));
        let ana = &participants[&ParticipantSid::new("PA_1")];
        assert_eq!((ana.description.value.name.as_str(), ana.joined_at, ana.left_at), ("Ana B.", Some(time(1)), Some(time(5))));
        let track = &tracks[&TrackSid::new("TR_1")];
        assert_eq!((track.published_at, track.unpublished_at), (Some(time(2)), Some(time(4))));
        assert_eq!(track.description.value.name, "mic 2");
    }

    /// Events of two people and two tracks, at seconds of which some are the same.
    fn crowd() -> impl Strategy<Value = Vec<SessionEvent>> {
        let one = (0..8_u8, 0..2_u8, 0..4_i64, 0..2_u8).prop_map(|(kind, who, second, name)| {
            let person = |complete| Participant { sid: ParticipantSid::new(format!("PA_{who}")), ..participant(&format!("name {name}"), complete) };
            let microphone = || Track { sid: TrackSid::new(format!("TR_{who}")), ..track(&format!("mic {name}")) };
            let kind = match kind {
                0 => EventKind::RoomStarted,
                1 => EventKind::RoomEnded,
                2 => EventKind::ParticipantJoined(person(true)),
                3 => EventKind::ParticipantLeft(person(true)),
                4 => EventKind::TrackPublished(person(false), microphone()),
                5 => EventKind::TrackUnpublished(person(false), microphone()),
                6 => EventKind::ParticipantJoined(Participant { joined_at: Some(time(second - 1)), ..person(true) }),
                _ => EventKind::Other,
            };
            event(second, kind)
        });
        proptest::collection::vec(one, 1..20)
    }

    proptest! {
        #[test]
        fn every_order_and_repetition_gives_the_same_state(
            order in Just((0..8).collect::<Vec<usize>>()).prop_shuffle(),
            repeated in proptest::collection::vec(0..8usize, 0..12),
        ) {
            let story = story();
            let shuffled: Vec<SessionEvent> = order.iter().chain(&repeated).map(|index| story[*index].clone()).collect();
            prop_assert_eq!(replay_with_steps(&shuffled), replay_with_steps(&story));
        }

        #[test]
        fn a_subset_gives_the_same_state_in_every_order(
            subset in proptest::sample::subsequence((0..8).collect::<Vec<usize>>(), 1..8),
        ) {
            let story = story();
            let forth: Vec<SessionEvent> = subset.iter().map(|index| story[*index].clone()).collect();
            let back: Vec<SessionEvent> = subset.iter().rev().map(|index| story[*index].clone()).collect();
            prop_assert_eq!(replay_with_steps(&forth), replay_with_steps(&back));
        }

        #[test]
        fn any_events_of_many_give_the_same_state_and_steps_in_every_order_and_number(
            (events, shuffled) in crowd().prop_flat_map(|events| {
                let again = proptest::sample::subsequence(events.clone(), 0..=events.len());
                let shuffled = (Just(events.clone()), again).prop_map(|(once, again)| [once, again].concat()).prop_shuffle();
                (Just(events), shuffled)
            }),
        ) {
            prop_assert_eq!(replay_with_steps(&shuffled), replay_with_steps(&events));
        }
    }

    #[test]
    fn an_ended_session_never_comes_back() {
        let (session, ..) = replay(&[event(6, EventKind::RoomEnded), event(9, EventKind::RoomStarted)]);
        assert_eq!(session.expect("a session").ended_at, Some(time(6)));
    }

    #[test]
    fn an_event_without_a_room_changes_nothing() {
        assert_eq!(change(&SessionEvent { room: None, ..event(0, EventKind::Other) }), None);
    }
}
