//! Owns how LiveKit's API is reached, what the autopilot does with it, and LiveKit's keys.

use std::time::Duration;

use super::reader::Reader;
use super::rules::rules;
use super::secret::Secret;
use super::value::{duration, flag, livekit_url, text, whole};
use super::{Config, IngestConfig};
use crate::session::rules::Rules;

/// How LiveKit's API is reached, and what is asked of it. The secret of the key is in [`super::Secrets`]; both are set or neither.
#[derive(Debug, Clone, PartialEq)]
pub struct LiveKitConfig {
    /// http, https, ws or wss as written, without a trailing slash; livekit-api maps ws to http itself.
    pub url: Option<String>,
    /// Of our own calls.
    pub api_key: Option<String>,
    /// Whether a track egress is started for every track that is published. It takes a URL, a key and `ingest.ws_base` too.
    pub autopilot: bool,
    /// How often what LiveKit says is compared with what we know.
    pub reconcile_interval: Duration,
    /// How long one call may take.
    pub request_timeout: Duration,
    /// How many egress starts are in flight at most.
    pub max_starts: u32,
    /// How many are while LiveKit refuses some; never above `max_starts`.
    pub min_starts: u32,
    /// After this long without audio the egress of a published track is replaced.
    pub restart_after: Duration,
    /// Which tracks are recorded, and how.
    pub rules: Rules,
}

impl LiveKitConfig {
    pub(super) fn read(reader: &mut Reader) -> Self {
        let urls = ["LIVEKIT_URL", "LIVEKIT_API_URL", "LIVEKIT_HOST"];
        Self {
            url: reader.take_optional("livekit", "url", &urls, livekit_url),
            api_key: reader.take_optional("livekit", "api_key", &["LIVEKIT_API_KEY"], text),
            autopilot: reader.take("livekit", "autopilot", &[], "true", flag),
            reconcile_interval: reader.take("livekit", "reconcile_interval", &[], "30s", duration("1s", "10m")),
            request_timeout: reader.take("livekit", "request_timeout", &[], "30s", duration("1s", "2m")),
            max_starts: reader.take("livekit", "max_starts", &[], "50", whole(1..=1_000)),
            min_starts: reader.take("livekit", "min_starts", &[], "1", whole(1..=100)),
            restart_after: reader.take("livekit", "restart_after", &[], "30s", duration("5s", "10m")),
            rules: rules(reader),
        }
    }
}

impl LiveKitConfig {
    /// The variables that stand between this server and starting egresses by itself.
    pub fn missing_for_autopilot(&self, ingest: &IngestConfig) -> Vec<&'static str> {
        let needs = [
            ("LIVEKIT_URL", self.url.is_none()),
            ("LIVEKIT_API_KEY with its secret", self.api_key.is_none()),
            ("EGRESS_WS_BASE", ingest.ws_base.is_none()),
        ];
        needs.into_iter().filter(|(_, is_missing)| *is_missing).map(|(name, _)| name).collect()
    }
}

impl Config {
    /// Makes one list of the pair and `LIVEKIT_KEYS`. Without a pair the first line is the pair.
    pub(super) fn join_livekit_keys(&mut self, reader: &mut Reader) {
        let pair = self.livekit.api_key.clone().zip(self.secrets.livekit_api_secret.clone());
        let mut keys: Vec<(String, Secret)> = pair.into_iter().collect();
        let is_alone = !reader.is_set("livekit", "api_key") && !reader.is_set("livekit", "api_secret");
        if let Some(lines) = reader.take_secret_lines("livekit", "keys", "LIVEKIT_KEYS") {
            let (more, faults) = parse(&lines, keys.first());
            faults.iter().for_each(|fault| reader.fault("livekit", "keys", fault));
            keys.extend(more);
        }
        if let Some((key, secret)) = keys.first().filter(|_| is_alone).cloned() {
            (self.livekit.api_key, self.secrets.livekit_api_secret) = (Some(key), Some(secret));
        }
        self.secrets.livekit_keys = keys;
    }
}

/// Reads lines of `key: secret`, as LiveKit does (`docs/FACTS.md`, webhooks), and tells what is wrong with which. The space may be missing. A line
/// that repeats the pair is left out.
fn parse(lines: &Secret, pair: Option<&(String, Secret)>) -> (Vec<(String, Secret)>, Vec<String>) {
    let (mut keys, mut faults) = (Vec::<(usize, String, Secret)>::new(), Vec::new());
    let written = lines.expose().lines().map(str::trim).zip(1_usize..);
    // Nothing of a line is quoted: who forgets the colon may have written the secret first.
    for (line, number) in written.filter(|(line, _)| !line.is_empty() && !line.starts_with('#')) {
        let Some((key, secret)) = line.split_once(':') else {
            faults.push(format!("line {number} has no colon, expected key: secret"));
            continue;
        };
        let (key, secret) = (unquoted(key), unquoted(secret));
        let has_blanks = |text: &str| text.contains(|c: char| c.is_whitespace() || c.is_control());
        if key.is_empty() || secret.is_empty() {
            let empty = if key.is_empty() { "key" } else { "secret" };
            faults.push(format!("line {number} has an empty {empty}, expected key: secret"));
        } else if has_blanks(key) || has_blanks(secret) {
            faults.push(format!("line {number} has white space or control characters inside its key or secret, expected none"));
        } else if let Some((first, ..)) = keys.iter().find(|(_, known, _)| known == key) {
            faults.push(format!("line {number} has the same key as line {first}, expected each key once"));
        } else if pair.is_some_and(|(known, other)| known == key && other.expose() != secret) {
            faults.push(format!("line {number} has the same key as livekit.api_key but another secret than livekit.api_secret"));
        } else {
            keys.push((number, key.to_owned(), Secret::new(secret)));
        }
    }
    if keys.is_empty() && faults.is_empty() {
        faults.push("has no line with a key, expected key: secret".to_owned());
    }
    let is_new = |key: &String| pair.is_none_or(|(known, _)| known != key);
    (keys.into_iter().filter(|(_, key, _)| is_new(key)).map(|(_, key, secret)| (key, secret)).collect(), faults)
}

/// Without the blanks around it, and without the quotes that YAML allows.
fn unquoted(text: &str) -> &str {
    let text = text.trim();
    let within = |quote| text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    within('"').or_else(|| within('\'')).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use toml::Table;

    use super::super::{ConfigError, Env, Fault};
    use super::*;

    type Variables<'a> = &'a [(&'a str, &'a str)];
    type Keys<'a> = &'a [(&'a str, &'a str)];

    const PAIR: [(&str, &str); 2] = [("LIVEKIT_API_KEY", "one"), ("LIVEKIT_API_SECRET", "SECRET-1")];

    fn read(env: Variables) -> Result<Config, ConfigError> {
        Config::from_table(Table::new(), Path::new("config.toml"), &Env::from_pairs(env.iter().copied()))
    }

    fn with_keys(env: Variables, lines: &str) -> Result<Config, ConfigError> {
        read(&[env, &[("LIVEKIT_KEYS", lines)]].concat())
    }

    fn keys(config: &Config) -> Vec<(&str, &str)> {
        config.secrets.livekit_keys.iter().map(|(key, secret)| (key.as_str(), secret.expose())).collect()
    }

    fn pair(config: &Config) -> Option<(&str, &str)> {
        config.livekit.api_key.as_deref().zip(config.secrets.livekit_api_secret.as_ref().map(Secret::expose))
    }

    #[test]
    fn lines_are_read_as_livekit_reads_them() {
        let table: [(&str, Keys); 8] = [
            ("a: b", &[("a", "b")]),
            ("a: b\nc: d\n", &[("a", "b"), ("c", "d")]),
            ("\n# a: x\n\n  a: b  \r\n   # c: d\n\tc :\td\r\n", &[("a", "b"), ("c", "d")]),
            ("a:b\nc:  d", &[("a", "b"), ("c", "d")]),
            ("a: \"b\"\n'c': 'd'", &[("a", "b"), ("c", "d")]),
            ("a: \"b'", &[("a", "\"b'")]),
            ("a: b:c=", &[("a", "b:c=")]),
            ("z: 1\na: 2", &[("z", "1"), ("a", "2")]),
        ];
        for (lines, expected) in table {
            let config = with_keys(&[], lines).unwrap();
            assert_eq!((keys(&config), pair(&config)), (expected.to_vec(), expected.first().copied()), "{lines:?}");
        }
    }

    #[test]
    fn the_pair_comes_first_and_nothing_twice() {
        let (one, two) = (("one", "SECRET-1"), ("two", "SECRET-2"));
        let table: [(Variables, &str, Keys); 4] =
            [(&[], "", &[]), (&PAIR, "", &[one]), (&PAIR, "two: SECRET-2", &[one, two]), (&PAIR, "two: SECRET-2\none: SECRET-1", &[one, two])];
        for (env, lines, expected) in table {
            let config = with_keys(env, lines).unwrap();
            assert_eq!((keys(&config), pair(&config)), (expected.to_vec(), expected.first().copied()), "{lines:?}");
        }
        assert_eq!(keys(&with_keys(&PAIR, "one: SECRET-1").unwrap()), [one]);
    }

    #[test]
    fn every_faulty_line_is_told_by_number_and_without_a_secret() {
        let table: [(Variables, &str, &[&str]); 9] = [
            (&[], "SECRET", &["line 1 has no colon, expected key: secret"]),
            (&[], "# c\na: b\nSECRET = c", &["line 3 has no colon, expected key: secret"]),
            (&[], ": SECRET", &["line 1 has an empty key, expected key: secret"]),
            (&[], "a:\nb: ''", &["line 1 has an empty secret, expected key: secret", "line 2 has an empty secret, expected key: secret"]),
            (&[], "a: SECRET # of a", &["line 1 has white space or control characters inside its key or secret, expected none"]),
            (&[], "a: SECRET\nb: c\na: SECRET", &["line 3 has the same key as line 1, expected each key once"]),
            (&[], "# none\n", &["has no line with a key, expected key: secret"]),
            (&PAIR, "two: x\none: SECRET-2", &["line 2 has the same key as livekit.api_key but another secret than livekit.api_secret"]),
            (&PAIR, "one: SECRET-1\none: SECRET-1", &["line 2 has the same key as line 1, expected each key once"]),
        ];
        for (env, lines, expected) in table {
            let error = with_keys(env, lines).unwrap_err();
            let told = format!("{error} {error:?}");
            let ConfigError::Invalid(faults) = error else { panic!("{told}") };
            let expected: Vec<_> = expected.iter().map(|problem| format!("livekit.keys (from LIVEKIT_KEYS): {problem}")).collect();
            assert_eq!(faults.iter().map(Fault::to_string).collect::<Vec<_>>(), expected);
            assert!(!told.contains("SECRET"), "{told}");
        }
    }

    #[test]
    fn half_a_pair_stays_a_fault_beside_other_keys() {
        for (half, value) in PAIR {
            let told = with_keys(&[(half, value)], "one: SECRET-1").unwrap_err().to_string();
            assert!(told.contains("stands without") && !told.contains("SECRET-1"), "{told}");
        }
    }

    #[test]
    fn no_file_may_hold_keys() {
        let table: Table = "livekit.keys = 'a: SECRET'".parse().unwrap();
        let error = Config::from_table(table, Path::new("config.toml"), &Env::default()).unwrap_err();
        let expected = "livekit.keys (from config.toml): is a secret, which no file may hold, set LIVEKIT_KEYS in the environment";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn dotenv_holds_several_lines_in_quotes() {
        let directory = tempfile::tempdir().unwrap();
        let dotenv = directory.path().join(".env");
        for written in ["LIVEKIT_KEYS=\"a: b\nc: d\"\n", "LIVEKIT_KEYS=\"a: b\\nc: d\"\n"] {
            std::fs::write(&dotenv, written).unwrap();
            let env = Env::layered(Some(&dotenv), std::iter::empty()).unwrap();
            let config = Config::from_table(Table::new(), Path::new("config.toml"), &env).unwrap();
            assert_eq!(keys(&config), [("a", "b"), ("c", "d")], "{written:?}");
        }
    }

    #[test]
    fn keys_are_in_no_debug_output() {
        let config = with_keys(&PAIR, "two: SECRET-2").unwrap();
        let debug = format!("{config:?}");
        assert!(debug.contains("\"two\"") && !debug.contains("SECRET-"), "{debug}");
    }
}
