//! What LiveKit lists, compared with what is known: what webhooks should have told.
//!
//! What is there is believed at once. What is missing is believed when every look for a while has missed it: lists and events overtake each other, LiveKit may
//! list nothing for a moment, and an end is final. Where audio still arrives, that while is long. A room that nobody could be asked about is neither. Pure.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, TimeDelta, Utc};

use super::event::{Participant, Room, Track};
use super::lifecycle::{Change, Described, ParticipantState, SessionState, TrackState, described_participant, described_track, sign_of_life};
use crate::ids::{Identity, ParticipantSid, RoomName, RoomSid, TrackSid};

/// How long a track or a participant must be missing.
const GONE_AFTER: TimeDelta = TimeDelta::seconds(2);
/// How long a room must be.
const ENDED_AFTER: TimeDelta = TimeDelta::seconds(10);
/// How long anything must be whose audio goes on arriving. An egress ends within 5 s of its track (`docs/FACTS.md`, egress socket).
const SILENT_AFTER: TimeDelta = TimeDelta::seconds(60);

/// A room that LiveKit lists.
#[derive(Debug, Clone, PartialEq)]
pub struct ListedRoom {
    pub room: Room,
    /// Who is in it and what they publish; `None` where there was no answer.
    pub inside: Option<Vec<(Participant, Vec<Track>)>>,
}

/// A session that has not ended, as far as it is known.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownSession {
    pub room_sid: RoomSid,
    pub room_name: RoomName,
    pub metadata: String,
    /// Who has not left.
    pub participants: Vec<ParticipantState>,
    /// What has not been unpublished.
    pub tracks: Vec<KnownTrack>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct KnownTrack {
    pub state: TrackState,
    /// It has an egress, or is on its way to one, or is not to be recorded.
    pub is_settled: bool,
}

/// What is known and not listed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Missing {
    Session(RoomSid),
    Participant(ParticipantSid),
    Track(TrackSid),
}

/// What was missing at the last look, and since when.
pub type Misses = HashMap<Missing, DateTime<Utc>>;

/// Whose audio arrives now.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Audible {
    pub rooms: HashSet<RoomName>,
    pub people: HashSet<(RoomName, Identity)>,
    pub tracks: HashSet<TrackSid>,
}

/// What follows from a comparison.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Findings {
    pub changes: Vec<Change>,
    /// What is missing, but not for long enough yet.
    pub missing: Misses,
}

/// What is compared against, besides the two lists.
#[derive(Debug, Clone, Copy)]
pub struct Moment<'a> {
    pub before: &'a Misses,
    pub audible: &'a Audible,
    pub now: DateTime<Utc>,
}

pub fn compare(known: &[KnownSession], listed: &[ListedRoom], moment: Moment<'_>) -> Findings {
    let (mut findings, now) = (Findings::default(), moment.now);
    for room in listed {
        let session = known.iter().find(|session| session.room_sid == room.room.sid);
        findings.present(session, room, moment);
    }
    for session in known {
        if !listed.iter().any(|room| room.room.sid == session.room_sid) {
            let change = alive(session, now);
            let ended = Change { session: SessionState { ended_at: Some(now), ..change.session }, ..change };
            let is_audible = moment.audible.rooms.contains(&session.room_name);
            findings.absent(Missing::Session(session.room_sid.clone()), ended, if is_audible { SILENT_AFTER } else { ENDED_AFTER }, moment);
        }
    }
    findings
}

impl Findings {
    fn present(&mut self, session: Option<&KnownSession>, listed: &ListedRoom, moment: Moment<'_>) {
        let now = moment.now;
        let Room { sid, name, created_at, metadata } = &listed.room;
        let mut state = sign_of_life(sid.clone(), name.clone(), now).session;
        state.started_at = created_at.map_or(now, |created| created.min(now));
        let metadata = metadata.clone().unwrap_or_default();
        if session.is_none_or(|session| session.metadata != metadata) {
            state.metadata = Described { at: Some(now), value: metadata };
            self.changes.push(Change { session: state.clone(), participant: None, track: None });
        }
        let Some(inside) = &listed.inside else { return };
        for (participant, tracks) in inside {
            let said = described_participant(participant, now);
            let said = ParticipantState { joined_at: said.joined_at.or(Some(now)), ..said };
            let known = session.and_then(|session| session.participants.iter().find(|known| known.sid == said.sid));
            if known.is_none_or(|known| known.description.value != said.description.value) {
                self.changes.push(Change { session: state.clone(), participant: Some(said), track: None });
            }
            for track in tracks {
                let known = session.and_then(|session| session.tracks.iter().find(|known| known.state.sid == track.sid));
                let said = described_track(participant, track, now);
                let said = TrackState { published_at: Some(now), ..said };
                // A track that is to have an egress is said again, so that what is to become of it is planned again.
                if known.is_none_or(|known| !known.is_settled || known.state.description.value != said.description.value) {
                    self.changes.push(Change { session: state.clone(), participant: None, track: Some(said) });
                }
            }
        }
        let Some(session) = session else { return };
        for gone in &session.participants {
            if !inside.iter().any(|(participant, _)| participant.sid == gone.sid) {
                let left = ParticipantState { left_at: Some(now), ..gone.clone() };
                let change = Change { participant: Some(left), ..alive(session, now) };
                let is_audible = moment.audible.people.contains(&(session.room_name.clone(), gone.identity.clone()));
                self.absent(Missing::Participant(gone.sid.clone()), change, if is_audible { SILENT_AFTER } else { GONE_AFTER }, moment);
            }
        }
        for KnownTrack { state: gone, .. } in &session.tracks {
            if !inside.iter().flat_map(|(_, tracks)| tracks).any(|track| track.sid == gone.sid) {
                let unpublished = TrackState { unpublished_at: Some(now), ..gone.clone() };
                let change = Change { track: Some(unpublished), ..alive(session, now) };
                let is_audible = moment.audible.tracks.contains(&gone.sid);
                self.absent(Missing::Track(gone.sid.clone()), change, if is_audible { SILENT_AFTER } else { GONE_AFTER }, moment);
            }
        }
    }

    fn absent(&mut self, missing: Missing, closing: Change, patience: TimeDelta, Moment { before, now, .. }: Moment<'_>) {
        match before.get(&missing) {
            Some(since) if now - *since >= patience => self.changes.push(closing),
            Some(since) => drop(self.missing.insert(missing, *since)),
            None => drop(self.missing.insert(missing, now)),
        }
    }
}

fn alive(session: &KnownSession, now: DateTime<Utc>) -> Change {
    sign_of_life(session.room_sid.clone(), session.room_name.clone(), now)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::session::lifecycle::{ParticipantDescription, TrackDescription};

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000, 0).expect("a time")
    }

    fn room(sid: &str) -> Room {
        Room { sid: RoomSid::new(sid), name: RoomName::new("room"), created_at: Some(now() - TimeDelta::hours(1)), metadata: Some("m".to_owned()) }
    }

    fn ana() -> Participant {
        Participant {
            sid: ParticipantSid::new("PA_1"),
            identity: Identity::new("ana"),
            name: "Ana".to_owned(),
            kind: "STANDARD".to_owned(),
            role: String::new(),
            metadata: String::new(),
            attributes: "{}".to_owned(),
            joined_at: None,
            complete: true,
        }
    }

    fn microphone() -> Track {
        let text = str::to_owned;
        Track {
            sid: TrackSid::new("TR_1"),
            kind: text("AUDIO"),
            source: text("MICROPHONE"),
            name: text("mic"),
            mime_type: text("audio/opus"),
            encryption: text("NONE"),
        }
    }

    fn listed(inside: Option<Vec<(Participant, Vec<Track>)>>) -> ListedRoom {
        ListedRoom { room: room("RM_1"), inside }
    }

    /// Everything that `listed` says, and an egress for the track.
    fn known() -> KnownSession {
        let participant = ParticipantState { joined_at: Some(now()), ..described_participant(&ana(), now()) };
        let track = TrackState { published_at: Some(now()), ..described_track(&ana(), &microphone(), now()) };
        KnownSession {
            room_sid: RoomSid::new("RM_1"),
            room_name: RoomName::new("room"),
            metadata: "m".to_owned(),
            participants: vec![participant],
            tracks: vec![KnownTrack { state: track, is_settled: true }],
        }
    }

    fn none() -> Misses {
        Misses::new()
    }

    /// In silence.
    fn compare(known: &[KnownSession], listed: &[ListedRoom], before: &Misses, now: DateTime<Utc>) -> Findings {
        super::compare(known, listed, Moment { before, audible: &Audible::default(), now })
    }

    fn later(seconds: i64) -> DateTime<Utc> {
        now() + TimeDelta::seconds(seconds)
    }

    #[test]
    fn what_agrees_changes_nothing() {
        let listed = [listed(Some(vec![(ana(), vec![microphone()])]))];
        assert_eq!(compare(&[known()], &listed, &none(), now()), Findings::default());
        assert_eq!(compare(&[], &[], &none(), now()), Findings::default());
    }

    #[test]
    fn what_is_listed_and_not_known_is_made() {
        let Findings { changes, missing } = compare(&[], &[listed(Some(vec![(ana(), vec![microphone()])]))], &none(), now());
        assert_eq!(missing, none());
        let [session, participant, track] = changes.as_slice() else { panic!("{changes:?}") };
        assert_eq!(session.session.started_at, now() - TimeDelta::hours(1));
        assert_eq!(session.session.metadata.value, "m");
        let name = participant.participant.as_ref().map(|ana| ana.description.value.name.as_str());
        assert_eq!(name, Some("Ana"));
        assert_eq!(track.track.as_ref().map(|track| (track.sid.as_str(), track.published_at)), Some(("TR_1", Some(now()))));
    }

    #[test]
    fn a_track_that_is_to_have_an_egress_is_said_again() {
        let mut session = known();
        session.tracks[0].is_settled = false;
        let Findings { changes, .. } = compare(&[session], &[listed(Some(vec![(ana(), vec![microphone()])]))], &none(), now());
        assert_eq!(changes.len(), 1);
        assert!(changes[0].track.is_some());
    }

    #[test]
    fn new_words_replace_old_ones() {
        let renamed = Participant { name: "Ana B.".to_owned(), ..ana() };
        let Findings { changes, .. } = compare(&[known()], &[listed(Some(vec![(renamed, vec![microphone()])]))], &none(), now());
        let expected = ParticipantDescription { name: "Ana B.".to_owned(), ..known().participants[0].description.value.clone() };
        assert_eq!(changes[0].participant.as_ref().map(|ana| &ana.description.value), Some(&expected));
        let muted = Track { name: "other".to_owned(), ..microphone() };
        let Findings { changes, .. } = compare(&[known()], &[listed(Some(vec![(ana(), vec![muted])]))], &none(), now());
        let expected = TrackDescription { name: "other".to_owned(), ..known().tracks[0].state.description.value.clone() };
        assert_eq!(changes[0].track.as_ref().map(|track| &track.description.value), Some(&expected));
    }

    #[test]
    fn what_is_missing_for_long_enough_has_ended() {
        let first = compare(&[known()], &[], &none(), now());
        assert_eq!((first.changes.as_slice(), first.missing.len()), (&[][..], 1));
        let second = compare(&[known()], &[], &first.missing, later(9));
        assert_eq!(second, first, "a moment without rooms ends nothing");
        let third = compare(&[known()], &[], &second.missing, later(10));
        assert_eq!(third.changes[0].session.ended_at, Some(later(10)));

        let empty = [listed(Some(Vec::new()))];
        let first = compare(&[known()], &empty, &none(), now());
        assert_eq!((first.changes.len(), first.missing.len()), (0, 2));
        assert_eq!(compare(&[known()], &empty, &first.missing, later(1)), first, "two looks at once are one");
        let second = compare(&[known()], &empty, &first.missing, later(2));
        assert!(second.changes.iter().any(|change| change.participant.as_ref().is_some_and(|ana| ana.left_at == Some(later(2)))));
        assert!(second.changes.iter().any(|change| change.track.as_ref().is_some_and(|track| track.unpublished_at == Some(later(2)))));
        assert!(second.changes.iter().all(|change| change.session.ended_at.is_none()));
    }

    #[test]
    fn what_is_heard_is_not_believed_to_be_gone_for_a_minute() {
        let session = known();
        let audible = Audible {
            rooms: HashSet::from([session.room_name.clone()]),
            people: HashSet::from([(session.room_name.clone(), Identity::new("ana"))]),
            tracks: HashSet::from([TrackSid::new("TR_1")]),
        };
        for listed in [Vec::new(), vec![listed(Some(Vec::new()))]] {
            let at = |before: &Misses, now| super::compare(&[known()], &listed, Moment { before, audible: &audible, now });
            let first = at(&none(), now());
            assert_eq!(at(&first.missing, later(59)), first);
            assert_eq!(at(&first.missing, later(60)).changes.len(), first.missing.len());
        }
    }

    #[test]
    fn what_comes_back_in_between_has_not_ended() {
        let first = compare(&[known()], &[], &none(), now());
        let back = compare(&[known()], &[listed(Some(vec![(ana(), vec![microphone()])]))], &first.missing, now());
        assert_eq!(back, Findings::default());
    }

    #[test]
    fn no_answer_is_not_an_empty_answer() {
        let before = Misses::from([(Missing::Track(TrackSid::new("TR_1")), now()), (Missing::Participant(ParticipantSid::new("PA_1")), now())]);
        assert_eq!(compare(&[known()], &[listed(None)], &before, later(100)), Findings::default());
    }

    #[test]
    fn another_life_of_the_room_is_another_session() {
        let other = ListedRoom { room: room("RM_2"), inside: Some(Vec::new()) };
        let findings = compare(&[known()], &[other], &Misses::from([(Missing::Session(RoomSid::new("RM_1")), now())]), later(10));
        let ended: Vec<_> = findings.changes.iter().map(|change| (change.session.room_sid.as_str(), change.session.ended_at.is_some())).collect();
        assert_eq!(ended, [("RM_2", false), ("RM_1", true)]);
    }

    /// Lays changes over what is known, as the database does.
    fn apply(known: &mut Vec<KnownSession>, changes: Vec<Change>) {
        for Change { session, participant, track } in changes {
            let known_at = known.iter().position(|known| known.room_sid == session.room_sid);
            let at = known_at.unwrap_or(known.len());
            if known_at.is_none() {
                let (room_sid, room_name) = (session.room_sid.clone(), session.room_name.clone());
                known.push(KnownSession { room_sid, room_name, metadata: String::new(), participants: Vec::new(), tracks: Vec::new() });
            }
            if session.metadata.at.is_some() {
                known[at].metadata = session.metadata.value;
            }
            if let Some(said) = participant {
                let people = &mut known[at].participants;
                let before = people.iter().position(|person| person.sid == said.sid).map(|index| people.remove(index));
                let merged = before.map_or(said.clone(), |before| before.merge(said));
                people.extend(Some(merged).filter(|merged| merged.left_at.is_none()));
            }
            if let Some(said) = track {
                let tracks = &mut known[at].tracks;
                let before = tracks.iter().position(|track| track.state.sid == said.sid).map(|index| tracks.remove(index).state);
                let state = before.map_or(said.clone(), |before| before.merge(said));
                tracks.extend(Some(KnownTrack { state, is_settled: true }).filter(|track| track.state.unpublished_at.is_none()));
            }
            if session.ended_at.is_some() {
                known.remove(at);
            }
        }
    }

    type Facts = std::collections::BTreeSet<String>;

    fn facts(known: &[KnownSession]) -> Facts {
        let each = known.iter().flat_map(|session| {
            let sid = &session.room_sid;
            let people = session.participants.iter().map(move |person| format!("{sid} {} {:?}", person.sid, person.description.value));
            let tracks = session.tracks.iter().map(move |track| format!("{sid} {} {:?}", track.state.sid, track.state.description.value));
            people.chain(tracks).chain([format!("{sid} {}", session.metadata)])
        });
        each.collect()
    }

    /// Rooms, each with its metadata, and of each person in it the name and the tracks by name.
    type World = std::collections::BTreeMap<u8, (u8, std::collections::BTreeMap<u8, (u8, std::collections::BTreeMap<u8, u8>)>)>;

    fn worlds() -> impl Strategy<Value = World> {
        use proptest::collection::btree_map;
        btree_map(0..3_u8, (0..2_u8, btree_map(0..3_u8, (0..2_u8, btree_map(0..2_u8, 0..2_u8, 0..3)), 0..4)), 0..4)
    }

    fn rooms(world: &World, answers: bool) -> Vec<ListedRoom> {
        let person = |room: &u8, (number, (name, tracks)): (&u8, &(u8, std::collections::BTreeMap<u8, u8>))| {
            let participant = Participant { sid: ParticipantSid::new(format!("PA_{room}{number}")), name: name.to_string(), ..ana() };
            let track =
                |(track, name): (&u8, &u8)| Track { sid: TrackSid::new(format!("TR_{room}{number}{track}")), name: name.to_string(), ..microphone() };
            (participant, tracks.iter().map(track).collect())
        };
        let listed = world.iter().map(|(number, (metadata, people))| ListedRoom {
            room: Room { metadata: Some(metadata.to_string()), ..room(&format!("RM_{number}")) },
            inside: answers.then(|| people.iter().map(|each| person(number, each)).collect()),
        });
        listed.collect()
    }

    proptest! {
        #[test]
        fn two_looks_make_anything_known_what_is_there(before in worlds(), truth in worlds()) {
            let at = |second| now() + TimeDelta::seconds(second);
            let mut known = Vec::new();
            apply(&mut known, compare(&[], &rooms(&before, true), &none(), at(0)).changes);
            let mut expected = Vec::new();
            apply(&mut expected, compare(&[], &rooms(&truth, true), &none(), at(0)).changes);

            // Rooms that nobody tells of lose nobody, however often they are looked at.
            let told = facts(&known);
            let silent = compare(&known, &rooms(&before, false), &compare(&known, &[], &none(), at(1)).missing, at(1));
            prop_assert_eq!(silent, Findings::default());

            let listed = rooms(&truth, true);
            let first = compare(&known, &listed, &none(), at(2));
            apply(&mut known, first.changes);
            prop_assert!(facts(&known).len() >= told.len(), "nothing is closed by one look");
            let second = compare(&known, &listed, &first.missing, at(12));
            apply(&mut known, second.changes);
            prop_assert_eq!(facts(&known), facts(&expected));
            prop_assert_eq!(compare(&known, &listed, &second.missing, at(14)), Findings::default());
        }
    }
}
