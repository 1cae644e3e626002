//! What is to become of a published track: the one place that decides whether it is recorded.

use super::rules::{Candidate, Capture, Rules, Verdict};
use crate::ids::{Identity, RoomName};

/// What is known of a track when somebody asks.
#[derive(Debug, Clone, Copy)]
pub struct TrackFacts<'a> {
    pub room: &'a RoomName,
    pub identity: &'a Identity,
    /// LiveKit's `ParticipantInfo.Kind`, once an event or a list has told it.
    pub participant_kind: Option<&'a str>,
    /// `AUDIO`, `VIDEO`, `DATA`.
    pub kind: &'a str,
    pub source: &'a str,
    pub encryption: &'a str,
    pub session_is_active: bool,
    pub is_published: bool,
    pub wish: Option<Wish>,
}

/// What an operator wants of a track, over every rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    Record,
    Stop,
}

impl Wish {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Stop => "stop",
        }
    }

    /// `None` for what this version does not know.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Record, Self::Stop].into_iter().find(|wish| wish.as_str() == name)
    }
}

/// What is to be done about a track.
#[derive(Debug, Clone, PartialEq)]
pub enum Plan {
    Record(Capture),
    /// A rule needs to know what kind of participant it is.
    AskKind,
    /// Nothing, and why.
    Leave(Reason),
}

/// Why a track has no egress, or has none any more. Stored and shown by these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Not audio: egress takes nothing else to a WebSocket.
    NotAudio,
    /// Egress has no keys (`docs/FACTS.md`, server API).
    Encrypted,
    /// A rule says so, or it is an egress participant.
    Rule,
    /// An operator stopped it.
    Stopped,
    TrackEnded,
    SessionEnded,
    /// LiveKit knows no such track or room.
    Gone,
    /// Another egress follows this one.
    Replaced,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotAudio => "notAudio",
            Self::Encrypted => "encrypted",
            Self::Rule => "rule",
            Self::Stopped => "stopped",
            Self::TrackEnded => "trackEnded",
            Self::SessionEnded => "sessionEnded",
            Self::Gone => "gone",
            Self::Replaced => "replaced",
        }
    }

    /// Whether the reason is a choice, so that the track is shown with it even though nothing was ever asked for.
    pub fn is_choice(self) -> bool {
        match self {
            Self::Encrypted | Self::Rule => true,
            Self::NotAudio | Self::Stopped | Self::TrackEnded | Self::SessionEnded | Self::Gone | Self::Replaced => false,
        }
    }
}

/// Whether a track can be heard: audio, or a microphone of a kind that LiveKit adds.
pub fn is_audio(kind: &str, source: &str) -> bool {
    kind == "AUDIO" || (source == "MICROPHONE" && !matches!(kind, "VIDEO" | "DATA"))
}

/// Decides.
pub fn plan(facts: &TrackFacts<'_>, rules: &Rules) -> Plan {
    if !is_audio(facts.kind, facts.source) {
        return Plan::Leave(Reason::NotAudio);
    }
    if !facts.session_is_active {
        return Plan::Leave(Reason::SessionEnded);
    }
    if !facts.is_published {
        return Plan::Leave(Reason::TrackEnded);
    }
    if facts.wish == Some(Wish::Stop) {
        return Plan::Leave(Reason::Stopped);
    }
    // A track that only an egress connection told of has no word on it.
    if !matches!(facts.encryption, "NONE" | "") {
        return Plan::Leave(Reason::Encrypted);
    }
    let candidate = Candidate { room: facts.room, kind: facts.participant_kind, identity: facts.identity, source: facts.source };
    match rules.decide(&candidate) {
        Verdict::Record(capture) => Plan::Record(capture),
        Verdict::Ignored { .. } if facts.wish == Some(Wish::Record) => Plan::Record(Capture::default()),
        Verdict::Ignored { .. } => Plan::Leave(Reason::Rule),
        Verdict::KindUnknown => Plan::AskKind,
    }
}

#[cfg(test)]
mod tests {
    use super::super::rules::{Action, CaptureChannels, Rule};
    use super::*;

    #[test]
    fn what_becomes_of_a_track() {
        let (room, identity) = (RoomName::new("standup"), Identity::new("ana"));
        let facts = TrackFacts {
            room: &room,
            identity: &identity,
            participant_kind: Some("STANDARD"),
            kind: "AUDIO",
            source: "MICROPHONE",
            encryption: "NONE",
            session_is_active: true,
            is_published: true,
            wish: None,
        };
        let rules = Rules::default();
        assert!(matches!(plan(&facts, &rules), Plan::Record(_)));
        let table = [
            (TrackFacts { kind: "VIDEO", ..facts }, Reason::NotAudio),
            (TrackFacts { kind: "DATA", wish: Some(Wish::Record), ..facts }, Reason::NotAudio),
            (TrackFacts { kind: "7", source: "CAMERA", ..facts }, Reason::NotAudio),
            (TrackFacts { session_is_active: false, wish: Some(Wish::Record), ..facts }, Reason::SessionEnded),
            (TrackFacts { is_published: false, wish: Some(Wish::Record), ..facts }, Reason::TrackEnded),
            (TrackFacts { wish: Some(Wish::Stop), ..facts }, Reason::Stopped),
            (TrackFacts { encryption: "GCM", wish: Some(Wish::Record), ..facts }, Reason::Encrypted),
            (TrackFacts { encryption: "CUSTOM", ..facts }, Reason::Encrypted),
            (TrackFacts { encryption: "7", ..facts }, Reason::Encrypted),
        ];
        for (facts, reason) in table {
            assert_eq!(plan(&facts, &rules), Plan::Leave(reason), "{facts:?}");
        }
        let heard = [
            TrackFacts { kind: "7", ..facts },
            TrackFacts { source: "SCREEN_SHARE_AUDIO", ..facts },
            TrackFacts { encryption: "", ..facts },
            TrackFacts { participant_kind: None, ..facts },
        ];
        for facts in heard {
            assert_eq!(plan(&facts, &rules), Plan::Record(Capture::default()), "{facts:?}");
        }
    }

    #[test]
    fn an_operators_wish_stands_over_a_rule_and_takes_what_a_rule_says_of_the_how() {
        let (room, identity) = (RoomName::new("standup"), Identity::new("ana"));
        let facts = TrackFacts {
            room: &room,
            identity: &identity,
            participant_kind: Some("AGENT"),
            kind: "AUDIO",
            source: "MICROPHONE",
            encryption: "NONE",
            session_is_active: true,
            is_published: true,
            wish: None,
        };
        let rule = |kind: &str, action| Rule { room: None, kinds: vec![kind.to_owned()], identity: None, sources: Vec::new(), action };
        let mono = Capture { channels: CaptureChannels::Mono, ..Capture::default() };
        let rules = Rules::new(vec![rule("AGENT", Action::Ignore), rule("SIP", Action::Record(mono.clone()))]);
        let unknown = TrackFacts { participant_kind: None, ..facts };
        let wanted = Some(Wish::Record);
        let table = [
            (facts, Plan::Leave(Reason::Rule)),
            (TrackFacts { wish: wanted, ..facts }, Plan::Record(Capture::default())),
            (TrackFacts { participant_kind: Some("SIP"), wish: wanted, ..facts }, Plan::Record(mono)),
            (unknown, Plan::AskKind),
            (TrackFacts { wish: wanted, ..unknown }, Plan::AskKind),
        ];
        for (facts, expected) in table {
            assert_eq!(plan(&facts, &rules), expected, "{facts:?}");
        }
    }
}
