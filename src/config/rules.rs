//! Owns how `[[livekit.rules]]` are written.

use toml::Value;

use super::entry::Entry;
use super::reader::Reader;
use super::value::{Raw, choice, flag, real, text};
use crate::session::rules::{Action, Capture, CaptureChannels, Glob, Rule, Rules};

/// LiveKit's `ParticipantInfo.Kind` in lower case, but for the egress (`docs/FACTS.md`, webhooks).
const KINDS: [&str; 6] = ["standard", "agent", "sip", "ingress", "connector", "bridge"];
/// LiveKit's `TrackSource` in lower case, as far as it is audio.
const SOURCES: [&str; 3] = ["microphone", "screen_share_audio", "unknown"];
/// What only a recorded track can have.
const OF_A_RECORDING: [&str; 3] = ["analyse", "group_seconds", "channels"];

/// Reads the rules, in the order of the file.
pub(super) fn rules(reader: &mut Reader) -> Rules {
    Rules::new(reader.take_list("livekit", "rules", rule))
}

/// A fault is kept by the entry, and the rule is then as good as absent: the start stops anyway.
fn rule(entry: &mut Entry) -> Rule {
    let glob = |raw: &Raw| text(raw).map(|pattern| Glob::new(&pattern));
    let channels = choice([("source", CaptureChannels::Source), ("mono", CaptureChannels::Mono)]);
    let (room, identity) = (entry.take("room", glob), entry.take("identity", glob));
    let (kinds, sources) = (entry.take("kind", kinds), entry.take("source", |raw| words(raw, &SOURCES)));
    let record = entry.take("record", flag).unwrap_or(true);
    let capture = Capture {
        analyse: entry.take("analyse", flag).unwrap_or(true),
        group_seconds: entry.take("group_seconds", real(0.1..=30.0)),
        channels: entry.take("channels", channels).unwrap_or_default(),
    };
    for name in OF_A_RECORDING {
        if !record && entry.is_set(name) {
            entry.fault(name, "stands beside record = false, which leaves nothing to which it could apply");
        }
    }
    let action = if record { Action::Record(capture) } else { Action::Ignore };
    Rule { room, kinds: kinds.unwrap_or_default(), identity, sources: sources.unwrap_or_default(), action }
}

fn kinds(raw: &Raw) -> Result<Vec<String>, String> {
    if written(raw).any(|word| word == "egress") {
        return Err("\"egress\" is never recorded, which no rule can change: an egress is how LiveKit listens".to_owned());
    }
    words(raw, &KINDS)
}

/// One word or a list of them, as LiveKit's names.
fn words(raw: &Raw, known: &[&str]) -> Result<Vec<String>, String> {
    let expected = format!("one or a list of {}", known.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", "));
    let of_right_type = match raw {
        Raw::File(Value::String(_)) => true,
        Raw::File(Value::Array(list)) => list.iter().all(Value::is_str),
        Raw::File(_) | Raw::Variable(_) => false,
    };
    if !of_right_type {
        return Err(raw.of_wrong_type(&expected));
    }
    if written(raw).next().is_none() {
        return Err(format!("is an empty list, expected {expected}"));
    }
    match written(raw).find(|word| !known.contains(word)) {
        Some(unknown) => Err(format!("{unknown:?} cannot be read, expected {expected}")),
        None => Ok(written(raw).map(str::to_ascii_uppercase).collect()),
    }
}

/// The words of a word or a list.
fn written(raw: &Raw) -> impl Iterator<Item = &str> {
    let list = match raw {
        Raw::File(Value::Array(list)) => list.as_slice(),
        Raw::File(word) => std::slice::from_ref(word),
        Raw::Variable(_) => &[],
    };
    list.iter().filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use toml::Table;

    use super::super::{Config, ConfigError, Env, Fault};
    use super::*;
    use crate::ids::{Identity, RoomName};
    use crate::session::rules::{Candidate, Verdict};

    fn read(file: &str) -> Result<Rules, ConfigError> {
        Config::from_table(file.parse().unwrap(), Path::new("config.toml"), &Env::default()).map(|config| config.livekit.rules)
    }

    fn faults(file: &str) -> Vec<String> {
        let Err(ConfigError::Invalid(faults)) = read(file) else { panic!("faults expected") };
        faults.iter().map(Fault::to_string).collect()
    }

    #[track_caller]
    fn assert_fault(of_a_rule: &str, key: &str, problem: &str) {
        let file = format!("[[livekit.rules]]\nrecord = true\n[[livekit.rules]]\n{of_a_rule}");
        assert_eq!(faults(&file), [format!("livekit.rules[2]{key} (from config.toml): {problem}")]);
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn every_key_of_a_rule_is_read_as_it_is_written() {
        let file = r#"
            [[livekit.rules]]
            room = "test-*"
            record = false
            [[livekit.rules]]
            kind = "sip"
            source = "screen_share_audio"
            analyse = false
            [[livekit.rules]]
            kind = ["standard", "agent", "sip", "ingress", "connector", "bridge"]
            identity = "bot-?"
            source = ["microphone", "screen_share_audio", "unknown"]
            record = true
            analyse = true
            group_seconds = 5
            channels = "mono"
            [[livekit.rules]]
        "#;
        let everything = Rule { room: None, kinds: vec![], identity: None, sources: vec![], action: Action::Record(Capture::default()) };
        let of_all = Capture { analyse: true, group_seconds: Some(5.0), channels: CaptureChannels::Mono };
        let expected = vec![
            Rule { room: Some(Glob::new("test-*")), action: Action::Ignore, ..everything.clone() },
            Rule {
                kinds: names(&["SIP"]),
                sources: names(&["SCREEN_SHARE_AUDIO"]),
                action: Action::Record(Capture { analyse: false, ..Capture::default() }),
                ..everything.clone()
            },
            Rule {
                kinds: names(&["STANDARD", "AGENT", "SIP", "INGRESS", "CONNECTOR", "BRIDGE"]),
                identity: Some(Glob::new("bot-?")),
                sources: names(&["MICROPHONE", "SCREEN_SHARE_AUDIO", "UNKNOWN"]),
                action: Action::Record(of_all),
                ..everything.clone()
            },
            everything,
        ];
        assert_eq!(read(file).unwrap(), Rules::new(expected));
    }

    #[test]
    fn rules_may_be_written_in_one_line_and_none_is_the_default() {
        let rules = read("livekit.rules = [{ room = 'a', record = false }, { kind = 'sip' }]").unwrap();
        let (room, identity) = (RoomName::new("a"), Identity::new("ana"));
        let verdict = rules.decide(&Candidate { room: &room, kind: None, identity: &identity, source: "MICROPHONE" });
        assert_eq!(verdict, Verdict::Ignored { rule: Some(1) });
        for file in ["", "livekit.rules = []"] {
            assert_eq!(read(file).unwrap(), Rules::default(), "{file:?}");
        }
    }

    #[test]
    fn a_fault_of_a_rule_is_told_with_its_number() {
        let kinds = "one or a list of \"standard\", \"agent\", \"sip\", \"ingress\", \"connector\", \"bridge\"";
        let sources = "one or a list of \"microphone\", \"screen_share_audio\", \"unknown\"";
        let contradiction = "stands beside record = false, which leaves nothing to which it could apply";
        let egress = "\"egress\" is never recorded, which no rule can change: an egress is how LiveKit listens";
        let table = [
            ("kind = 'robot'", ".kind", format!("\"robot\" cannot be read, expected {kinds}")),
            ("kind = 'SIP'", ".kind", format!("\"SIP\" cannot be read, expected {kinds}")),
            ("kind = ['sip', 'robot']", ".kind", format!("\"robot\" cannot be read, expected {kinds}")),
            ("kind = []", ".kind", format!("is an empty list, expected {kinds}")),
            ("kind = 1", ".kind", format!("is of type integer, expected {kinds}")),
            ("kind = ['sip', 1]", ".kind", format!("is of type array, expected {kinds}")),
            ("kind = 'egress'", ".kind", egress.to_owned()),
            ("kind = ['sip', 'egress']\nrecord = false", ".kind", egress.to_owned()),
            ("source = 'camera'", ".source", format!("\"camera\" cannot be read, expected {sources}")),
            ("room = ''", ".room", "is empty, expected text".to_owned()),
            ("room = ['a']", ".room", "is of type array, expected text".to_owned()),
            ("identity = 1", ".identity", "is of type integer, expected text".to_owned()),
            ("record = 'no'", ".record", "is of type string, expected true or false".to_owned()),
            ("analyse = 1", ".analyse", "is of type integer, expected true or false".to_owned()),
            ("group_seconds = 0.09", ".group_seconds", "0.09 is out of range, expected a number from 0.1 to 30".to_owned()),
            ("group_seconds = 30.1", ".group_seconds", "30.1 is out of range, expected a number from 0.1 to 30".to_owned()),
            ("channels = 'stereo'", ".channels", "\"stereo\" cannot be read, expected \"source\" or \"mono\"".to_owned()),
            ("record = false\nanalyse = true", ".analyse", contradiction.to_owned()),
            ("record = false\ngroup_seconds = 1", ".group_seconds", contradiction.to_owned()),
            ("record = false\nchannels = 'source'", ".channels", contradiction.to_owned()),
            ("knd = 'sip'", ".knd", "unknown key, did you mean livekit.rules[2].kind?".to_owned()),
            ("participant = 'ana'", ".participant", "unknown key".to_owned()),
        ];
        for (of_a_rule, key, problem) in table {
            assert_fault(of_a_rule, key, &problem);
        }
    }

    #[test]
    fn all_faults_of_all_rules_are_told_at_once_beside_those_of_other_keys() {
        let file = "[http]\nport = 70000\n[[livekit.rules]]\nkind = 'x'\nrecord = false\nanalyse = false\nrom = 'a'\n[[livekit.rules]]\nsource = 'x'";
        let told = faults(file);
        let keys: Vec<_> = told.iter().filter_map(|fault| fault.split(' ').next()).collect();
        assert_eq!(keys, ["http.port", "livekit.rules[1].kind", "livekit.rules[1].analyse", "livekit.rules[1].rom", "livekit.rules[2].source"]);
    }

    #[test]
    fn what_is_no_list_of_tables_is_no_rules() {
        for (file, problem) in [
            ("[livekit.rules]\nroom = 'a'", "is of type table, expected a list of tables in the file"),
            ("livekit.rules = ['a']", "has an item of type string, expected a list of tables in the file"),
        ] {
            assert_eq!(faults(file), [format!("livekit.rules (from config.toml): {problem}")]);
        }
        assert_eq!(faults("[[livekit.rule]]\nroom = 'a'"), ["livekit.rule (from config.toml): unknown key, did you mean livekit.rules?"]);
        let env = Env::from_pairs([("LIVE_MEETING__LIVEKIT__RULES", "x")]);
        let error = Config::from_table(Table::new(), Path::new("config.toml"), &env).unwrap_err().to_string();
        assert!(error.ends_with("cannot come from the environment, expected a list of tables in the file"), "{error}");
    }

    /// With `config_toml_states_every_key_and_no_other`, which reads the examples: no key of a rule is without one.
    #[test]
    fn the_examples_in_config_toml_show_every_key_of_a_rule() {
        let file = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/config.toml"));
        let (_, examples) = file.split_once("# [[livekit.rules]]").unwrap();
        let (examples, _) = examples.split_once("\n[").unwrap();
        let shown: BTreeSet<_> = examples.lines().filter_map(|line| line.strip_prefix("# ")?.split_once(" = ").map(|(name, _)| name)).collect();
        let mut entry = Entry::new(String::new(), Table::new());
        rule(&mut entry);
        assert_eq!(shown, entry.names().collect());
    }
}
