//! Which tracks are recorded, and how: an operator's rules, of which the first that matches decides.

use crate::ids::{Identity, RoomName};

pub use super::glob::Glob;

/// The kind of the participants by which LiveKit's egress listens. They publish nothing that anybody said (`docs/FACTS.md`, webhooks).
const EGRESS: &str = "EGRESS";

/// The rules in the order of the file. Where none matches, a track is recorded and analysed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules(Vec<Rule>);

/// What a rule wants of a track, and what is done with one that is so. A matcher that is absent or empty wants nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    pub room: Option<Glob>,
    /// LiveKit's names, such as `SIP`. A kind that LiveKit adds is none of them and matches only where there is no matcher.
    pub kinds: Vec<String>,
    pub identity: Option<Glob>,
    /// LiveKit's names, such as `MICROPHONE`; one that LiveKit adds is as with kinds.
    pub sources: Vec<String>,
    pub action: Action,
}

/// A published track, as far as it is known.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    pub room: &'a RoomName,
    /// LiveKit's `ParticipantInfo.Kind`; `None` while nobody has said it, as events about tracks do not.
    pub kind: Option<&'a str>,
    pub identity: &'a Identity,
    /// LiveKit's `TrackSource`.
    pub source: &'a str,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Ignore,
    Record(Capture),
}

/// How a track is recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Capture {
    pub analyse: bool,
    /// `None` leaves the length of a group to the configuration.
    pub group_seconds: Option<f64>,
    pub channels: CaptureChannels,
}

/// What becomes of LiveKit's two channels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CaptureChannels {
    /// They are kept as LiveKit sends them.
    #[default]
    Source,
    /// They are mixed into one.
    Mono,
}

/// What the rules say of a track.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    Record(Capture),
    /// By the rule of this number, from 1 as in the file; `None` for an egress, which no rule can have recorded.
    Ignored {
        rule: Option<usize>,
    },
    /// A rule that comes before every other that matches depends on the kind, which nobody has said yet.
    KindUnknown,
}

impl Rules {
    pub fn new(rules: Vec<Rule>) -> Self {
        Self(rules)
    }

    pub fn decide(&self, candidate: &Candidate<'_>) -> Verdict {
        if candidate.kind == Some(EGRESS) {
            return Verdict::Ignored { rule: None };
        }
        for (rule, number) in self.0.iter().zip(1..) {
            match rule.matches(candidate) {
                None => return Verdict::KindUnknown,
                Some(false) => {}
                Some(true) => {
                    return match &rule.action {
                        Action::Record(capture) => Verdict::Record(capture.clone()),
                        Action::Ignore => Verdict::Ignored { rule: Some(number) },
                    };
                }
            }
        }
        Verdict::Record(Capture::default())
    }
}

impl Rule {
    /// `None` if it hangs on the kind alone, which nobody has said.
    fn matches(&self, candidate: &Candidate<'_>) -> Option<bool> {
        let rest_matches = self.room.as_ref().is_none_or(|glob| glob.matches(candidate.room.as_str()))
            && self.identity.as_ref().is_none_or(|glob| glob.matches(candidate.identity.as_str()))
            && is_one_of(&self.sources, candidate.source);
        if !rest_matches || self.kinds.is_empty() {
            return Some(rest_matches);
        }
        candidate.kind.map(|kind| is_one_of(&self.kinds, kind))
    }
}

/// What is done where no rule says otherwise.
impl Default for Capture {
    fn default() -> Self {
        Self { analyse: true, group_seconds: None, channels: CaptureChannels::default() }
    }
}

fn is_one_of(wanted: &[String], found: &str) -> bool {
    wanted.is_empty() || wanted.iter().any(|name| name == found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What matches everything, and ignores it.
    fn ignore() -> Rule {
        Rule { room: None, kinds: Vec::new(), identity: None, sources: Vec::new(), action: Action::Ignore }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn of_room(pattern: &str) -> Rule {
        Rule { room: Some(Glob::new(pattern)), ..ignore() }
    }

    fn of_identity(pattern: &str) -> Rule {
        Rule { identity: Some(Glob::new(pattern)), ..ignore() }
    }

    fn of_kinds(kinds: &[&str]) -> Rule {
        Rule { kinds: names(kinds), ..ignore() }
    }

    fn of_sources(sources: &[&str]) -> Rule {
        Rule { sources: names(sources), ..ignore() }
    }

    fn mono() -> Capture {
        Capture { analyse: false, group_seconds: Some(5.0), channels: CaptureChannels::Mono }
    }

    fn decide(rules: &[Rule], room: &str, kind: Option<&str>, identity: &str, source: &str) -> Verdict {
        let (room, identity) = (RoomName::new(room), Identity::new(identity));
        Rules::new(rules.to_vec()).decide(&Candidate { room: &room, kind, identity: &identity, source })
    }

    /// Of ana's microphone in the room `daily`.
    fn of_ana(rules: &[Rule], kind: Option<&str>) -> Verdict {
        decide(rules, "daily", kind, "ana", "MICROPHONE")
    }

    const EVERYTHING: Verdict = Verdict::Record(Capture { analyse: true, group_seconds: None, channels: CaptureChannels::Source });
    const KIND: Option<&str> = Some("STANDARD");

    const fn ignored(rule: usize) -> Verdict {
        Verdict::Ignored { rule: Some(rule) }
    }

    #[test]
    fn each_matcher_looks_at_its_own_part_and_all_must_agree() {
        let every = Rule {
            room: Some(Glob::new("d*")),
            kinds: names(&["STANDARD"]),
            identity: Some(Glob::new("an?")),
            sources: names(&["MICROPHONE"]),
            ..ignore()
        };
        let table = [
            ("no matcher", ignore(), ignored(1)),
            ("the room", of_room("d*y"), ignored(1)),
            ("another room", of_room("d"), EVERYTHING),
            ("a room as the identity is", of_room("ana"), EVERYTHING),
            ("the identity", of_identity("a?a"), ignored(1)),
            ("another identity", of_identity("b*"), EVERYTHING),
            ("an identity as the room is", of_identity("daily"), EVERYTHING),
            ("the kind", of_kinds(&["STANDARD"]), ignored(1)),
            ("one of the kinds", of_kinds(&["SIP", "STANDARD"]), ignored(1)),
            ("other kinds", of_kinds(&["SIP", "AGENT"]), EVERYTHING),
            ("a kind in lower case, which is not LiveKit's name", of_kinds(&["standard"]), EVERYTHING),
            ("the source", of_sources(&["MICROPHONE"]), ignored(1)),
            ("one of the sources", of_sources(&["UNKNOWN", "MICROPHONE"]), ignored(1)),
            ("another source", of_sources(&["SCREEN_SHARE_AUDIO"]), EVERYTHING),
            ("all of them", every.clone(), ignored(1)),
            ("all but the room", Rule { room: Some(Glob::new("x")), ..every.clone() }, EVERYTHING),
            ("all but the kind", Rule { kinds: names(&["SIP"]), ..every.clone() }, EVERYTHING),
            ("all but the identity", Rule { identity: Some(Glob::new("x")), ..every.clone() }, EVERYTHING),
            ("all but the source", Rule { sources: names(&["UNKNOWN"]), ..every }, EVERYTHING),
        ];
        for (case, rule, verdict) in table {
            assert_eq!(of_ana(&[rule], KIND), verdict, "{case}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let record = |rule: Rule| Rule { action: Action::Record(mono()), ..rule };
        let table = [
            (vec![], EVERYTHING),
            (vec![record(ignore())], Verdict::Record(mono())),
            (vec![record(ignore()), ignore()], Verdict::Record(mono())),
            (vec![ignore(), record(ignore())], ignored(1)),
            (vec![of_room("x"), of_identity("ana"), record(ignore())], ignored(2)),
            (vec![of_room("x"), record(of_identity("ana")), ignore()], Verdict::Record(mono())),
            (vec![of_room("x"), of_kinds(&["SIP"]), ignore()], ignored(3)),
        ];
        for (rules, verdict) in table {
            assert_eq!(of_ana(&rules, KIND), verdict, "{rules:?}");
        }
    }

    #[test]
    fn an_unsaid_kind_matters_only_where_a_rule_hangs_on_it() {
        let sip = of_kinds(&["SIP"]);
        let table = [
            ("no rule", vec![], EVERYTHING),
            ("a rule that hangs on it", vec![sip.clone()], Verdict::KindUnknown),
            ("one that matches before", vec![of_room("daily"), sip.clone()], ignored(1)),
            ("one that does not match before", vec![of_room("x"), sip.clone(), ignore()], Verdict::KindUnknown),
            ("another room's", vec![Rule { room: Some(Glob::new("x")), ..sip.clone() }], EVERYTHING),
            ("another identity's", vec![Rule { identity: Some(Glob::new("x")), ..sip.clone() }, ignore()], ignored(2)),
            ("another source's", vec![Rule { sources: names(&["UNKNOWN"]), ..sip }], EVERYTHING),
        ];
        for (case, rules, verdict) in table {
            assert_eq!(of_ana(&rules, None), verdict, "{case}");
        }
    }

    #[test]
    fn an_egress_is_never_recorded() {
        let record = |rule: Rule| Rule { action: Action::Record(mono()), ..rule };
        for rules in [vec![], vec![record(ignore())], vec![record(of_kinds(&["EGRESS"]))], vec![ignore()]] {
            assert_eq!(of_ana(&rules, Some("EGRESS")), Verdict::Ignored { rule: None }, "{rules:?}");
        }
    }

    #[test]
    fn what_livekit_adds_matches_only_where_no_matcher_is() {
        let (kinds, sources) = (of_kinds(&["STANDARD", "AGENT", "SIP"]), of_sources(&["MICROPHONE", "SCREEN_SHARE_AUDIO", "UNKNOWN"]));
        for kind in ["HOLOGRAM", "99", ""] {
            assert_eq!(of_ana(&[kinds.clone(), ignore()], Some(kind)), ignored(2), "{kind:?}");
        }
        for source in ["THEREMIN", "7", ""] {
            assert_eq!(decide(&[sources.clone(), ignore()], "daily", KIND, "ana", source), ignored(2), "{source:?}");
        }
    }
}
