use std::collections::BTreeSet;
use std::ffi::OsString;
use std::process::Command;

use super::*;

const CONFIG_TOML: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/config.toml"));

type Variables<'a> = &'a [(&'a str, &'a str)];

/// Every variable of the original system that is read, with its key and a value unlike the default.
const ORIGINAL: [(&str, &str, &str); 19] = [
    ("http.host", "HOST", "127.0.0.1"),
    ("http.port", "PORT", "8080"),
    ("database.url", "DATABASE_URL", "postgres://u:pw@h/d"),
    ("storage.audio_dir", "EGRESS_AUDIO_OUTPUT_DIR", "a"),
    ("storage.video_dir", "EGRESS_VIDEO_OUTPUT_DIR", "v"),
    ("storage.pipeline_log_dir", "PIPELINE_LOG_DIR", "b"),
    ("livekit.url", "LIVEKIT_URL", "https://c"),
    ("livekit.url", "LIVEKIT_API_URL", "https://d"),
    ("livekit.url", "LIVEKIT_HOST", "https://e"),
    ("livekit.api_key", "LIVEKIT_API_KEY", "f"),
    ("livekit.api_secret", "LIVEKIT_API_SECRET", "g"),
    ("livekit.keys", "LIVEKIT_KEYS", "k: l"),
    ("ingest.ws_base", "EGRESS_WS_BASE", "wss://h"),
    ("ingest.ticket_secret", "INGEST_TICKET_SECRET", "0123456789abcdef0123456789abcdef"),
    ("analysis.group_seconds", "AUDIO_PIPELINE_GROUP_SECONDS", "3"),
    ("analysis.normalize", "AUDIO_PIPELINE_NORMALIZE", "yes"),
    ("hume.url", "HUME_WS_URL", "wss://i"),
    ("hume.api_key", "HUME_API_KEY", "j"),
    ("http.admin_api_key", "ADMIN_API_KEY", "0123456789abcdef"),
];

fn read(file: &str, env: Variables) -> Result<Config, ConfigError> {
    Config::from_table(file.parse().unwrap(), Path::new(DEFAULT_FILE), &Env::from_pairs(env.iter().copied()))
}

fn faults(file: &str, env: Variables) -> Vec<String> {
    let Err(ConfigError::Invalid(faults)) = read(file, env) else { panic!("faults expected") };
    faults.iter().map(Fault::to_string).collect()
}

#[track_caller]
fn assert_fault(file: &str, env: Variables, expected: &str) {
    assert_eq!(faults(file, env), [expected]);
}

#[track_caller]
fn assert_file_fault(key: &str, value: &str, problem: &str) {
    let (section, name) = key.split_once('.').unwrap();
    let file = format!("[{section}]\n{name} = {value}");
    assert_fault(&file, &[], &format!("{key} (from config.toml): {problem}"));
}

#[test]
fn config_toml_states_the_defaults() {
    assert_eq!(read(CONFIG_TOML, &[]).unwrap(), Config::default());
}

/// Uncommenting reads every example, and an unknown or invalid one would be a fault.
#[test]
fn config_toml_states_every_key_and_no_other() {
    let uncommented: String = CONFIG_TOML
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(key) if key.split_once(" = ").is_some_and(|(name, _)| !name.contains(' ')) => format!("{key}\n"),
            Some(list) if list.starts_with("[[") => format!("{list}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let env = Env::from_pairs([("LIVEKIT_API_SECRET", "s")]);
    let table: Table = uncommented.parse().unwrap();
    Config::from_table(table.clone(), Path::new("config.toml"), &env).unwrap();

    let mut reader = Reader::new(Table::new(), Path::new("config.toml"), &env);
    Config::read(&mut reader);
    let known: BTreeSet<String> = reader.taken().iter().filter(|(_, taken)| !taken.is_secret).map(|(key, _)| key.to_string()).collect();
    let written = |(section, keys): (&String, &toml::Value)| -> Vec<String> {
        keys.as_table().unwrap().keys().map(|name| format!("{section}.{name}")).collect()
    };
    assert_eq!(table.iter().flat_map(written).collect::<BTreeSet<_>>(), known);
}

#[test]
fn config_toml_names_every_original_variable() {
    for (_, variable, _) in ORIGINAL {
        assert!(CONFIG_TOML.contains(variable), "{variable}");
    }
}

#[test]
fn every_original_variable_sets_its_key() {
    for (key, variable, value) in ORIGINAL {
        let env = Env::from_pairs([(variable, value)]);
        let mut reader = Reader::new(Table::new(), Path::new("config.toml"), &env);
        let config = Config::read(&mut reader);
        assert_ne!(config, Config::default(), "{variable}");
        let set: Vec<_> = reader.taken().keys().filter(|key| reader.is_set(key.section, key.name)).collect();
        assert_eq!(set.iter().map(ToString::to_string).collect::<Vec<_>>(), [key], "{variable}");
    }
}

#[test]
fn own_variable_beats_original_beats_file_beats_default() {
    let (own, original) = (("LIVE_MEETING__HTTP__PORT", "1"), ("PORT", "2"));
    let file = "[http]\nport = 3";
    let table: [(&str, Variables, u16); 6] = [
        (file, &[own, original], 1),
        (file, &[original], 2),
        (file, &[], 3),
        ("", &[], 3001),
        (file, &[("PORT", "")], 3),
        (file, &[("LIVE_MEETING__HTTP__PORT", ""), original], 2),
    ];
    for (file, env, port) in table {
        assert_eq!(read(file, env).unwrap().http.port, port, "{file:?} {env:?}");
    }
}

#[test]
fn the_first_of_several_original_variables_wins() {
    let env = [("LIVEKIT_HOST", "c"), ("LIVEKIT_API_URL", "b"), ("LIVEKIT_URL", "a")];
    let url = |env: Variables| read("", env).unwrap().livekit.url.unwrap();
    assert_eq!(url(&env), "https://a");
    assert_eq!(url(&env[..2]), "https://b");
    assert_eq!(url(&env[..1]), "https://c");
}

#[test]
fn secrets_follow_the_same_precedence() {
    let env = [("ADMIN_API_KEY", "original-original"), ("LIVE_MEETING__HTTP__ADMIN_API_KEY", "own-own-own-own-own")];
    let key = |env: Variables| read("", env).unwrap().secrets.admin_api_key.unwrap();
    assert_eq!(key(&env).expose(), "own-own-own-own-own");
    assert_eq!(key(&env[..1]).expose(), "original-original");
}

#[test]
fn all_faults_are_told_at_once_with_key_origin_and_expectation() {
    let file = r#"
        prt = 1
        [http]
        port = 70000
        hots = "x"
        [ingest]
        auth = "closed"
        [recordng]
        mute = "keep"
        [livekit]
        api_secret = "hunter2"
    "#;
    let env = [
        ("LIVE_MEETING__INGEST__MAX_SPEED", "0"),
        ("DATABASE_URL", "mysql://u:hunter2@h/d"),
        ("ADMIN_API_KEY", "hunter2"),
        ("LIVE_MEETING__HTTP__PROT", "hunter2"),
        ("LIVE_MEETING__WHATEVER", "hunter2"),
    ];
    let expected = r#"
http.port (from config.toml): 70000 is out of range, expected a whole number from 0 to 65535
database.url (from DATABASE_URL): cannot use the scheme "mysql", expected sqlite:PATH, postgres://… or postgresql://…
ingest.auth (from config.toml): "closed" cannot be read, expected "ticket" or "open"
ingest.max_speed (from LIVE_MEETING__INGEST__MAX_SPEED): "0" is out of range, expected a number from 1 to 1000
livekit.api_secret (from config.toml): is a secret, which no file may hold, set LIVEKIT_API_SECRET in the environment
http.admin_api_key (from ADMIN_API_KEY): is too short, expected at least 16 characters
http.hots (from config.toml): unknown key, did you mean http.host?
prt (from config.toml): unknown key
recordng.mute (from config.toml): unknown key, did you mean recording.mute?
http.prot (from LIVE_MEETING__HTTP__PROT): unknown key, did you mean LIVE_MEETING__HTTP__PORT?
whatever (from LIVE_MEETING__WHATEVER): unknown key
"#;
    assert_eq!(read(file, &env).unwrap_err().to_string(), expected.trim());
}

#[test]
fn an_unknown_key_is_told_where_it_belongs() {
    assert_file_fault("http.segment_duration", "\"1h\"", "unknown key, did you mean recording.segment_duration?");
    assert_fault("port = 1", &[], "port (from config.toml): unknown key, did you mean http.port?");
    assert_fault("[nothing]", &[], "nothing (from config.toml): unknown key");
    assert_fault("[http.tls]\ncert = 1", &[], "http.tls.cert (from config.toml): unknown key");
    assert_fault("http = 1", &[], "http (from config.toml): is not a section, expected [http] and its keys");
    assert_fault(
        "",
        &[("LIVE_MEETING__http__port", "1")],
        "http.port (from LIVE_MEETING__http__port): unknown key, did you mean LIVE_MEETING__HTTP__PORT?",
    );
}

#[test]
fn an_empty_section_and_an_empty_variable_are_no_fault() {
    assert_eq!(read("[http]", &[("LIVE_MEETING__NO__KEY", "")]).unwrap(), Config::default());
}

#[test]
fn both_ends_of_a_range_are_in_range_and_one_step_further_is_not() {
    let table = [
        ("http.port", ["0", "65535"], ["-1", "65536"]),
        ("http.workers", ["1", "256"], ["0", "257"]),
        ("http.max_connections", ["1", "1000000"], ["0", "1000001"]),
        ("database.connections", ["1", "200"], ["0", "201"]),
        ("livekit.reconcile_interval", ["'1s'", "'10m'"], ["'999ms'", "'601s'"]),
        ("livekit.request_timeout", ["'1s'", "'2m'"], ["'999ms'", "'121s'"]),
        ("livekit.max_starts", ["1", "1000"], ["0", "1001"]),
        ("livekit.min_starts", ["1", "50"], ["0", "101"]),
        ("livekit.restart_after", ["'5s'", "'10m'"], ["'4999ms'", "'601s'"]),
        ("ingest.max_speed", ["1", "1000.0"], ["0.999", "1000.1"]),
        ("ingest.stall_after", ["'1s'", "'60s'"], ["'999ms'", "'60001ms'"]),
        ("ingest.idle_timeout", ["'5s'", "'1h'"], ["'4999ms'", "'3601s'"]),
        ("ingest.spool", ["'1MiB'", "'64GiB'"], ["'1048575B'", "'65GiB'"]),
        ("storage.min_free", ["'1B'", "'1PiB'"], ["'0B'", "'1025TiB'"]),
        ("recording.segment_duration", ["'1s'", "'3h'"], ["'999ms'", "'10801s'"]),
        ("recording.longest_fill", ["'1s'", "'1h'"], ["'999ms'", "'61m'"]),
        ("recording.spool_per_track", ["'1s'", "'5m'"], ["'999ms'", "'301s'"]),
        ("storage.journal_max", ["'1MiB'", "'1TiB'"], ["'1048575B'", "'2TiB'"]),
        ("analysis.group_seconds", ["0.1", "30"], ["0.09", "nan"]),
        ("analysis.group_bytes", ["'4KiB'", "'64MiB'"], ["'4095B'", "'65MiB'"]),
        ("hume.queue", ["'1s'", "'10m'"], ["'999ms'", "'601s'"]),
        ("hume.refused_retry", ["'1s'", "'1h'"], ["'0s'", "'3601s'"]),
    ];
    for (key, inside, outside) in table {
        let (section, name) = key.split_once('.').unwrap();
        let variable = format!("LIVE_MEETING__{}__{}", section.to_uppercase(), name.to_uppercase());
        for (value, is_inside) in inside.map(|value| (value, true)).into_iter().chain(outside.map(|value| (value, false))) {
            let from_file = read(&format!("[{section}]\n{name} = {value}"), &[]);
            let from_env = read("", &[(&variable, value.trim_matches('\''))]);
            for outcome in [from_file, from_env] {
                assert_eq!(outcome.is_ok(), is_inside, "{key} = {value}: {outcome:?}");
                if let Err(error) = outcome {
                    let told = error.to_string();
                    assert!(told.starts_with(key) && told.contains("is out of range, expected a"), "{told}");
                }
            }
        }
    }
}

#[test]
fn a_value_of_another_type_is_told_what_was_expected() {
    assert_file_fault("http.port", "'80'", "is of type string, expected a whole number from 0 to 65535");
    assert_file_fault("http.port", "80.5", "80.5 cannot be read, expected a whole number from 0 to 65535");
    assert_file_fault("http.host", "''", "is empty, expected text");
    assert_file_fault("analysis.enabled", "1", "is of type integer, expected true or false");
    let seconds = "expected a duration from 1s to 60s, with its unit and in quotes";
    assert_file_fault("ingest.stall_after", "5", &format!("is of type integer, {seconds}"));
    assert_file_fault("ingest.stall_after", "'5'", &format!("\"5\" cannot be read, {seconds}"));
    assert_fault(
        "",
        &[("LIVE_MEETING__HTTP__CORS_ORIGINS", "https://a")],
        "http.cors_origins (from LIVE_MEETING__HTTP__CORS_ORIGINS): cannot come from the environment, expected a list in the file",
    );
}

#[test]
fn what_must_be_free_is_a_size_or_a_word() {
    let min_free = |word: &str| read(&format!("storage.min_free = {word:?}"), &[]).map(|config| config.storage.min_free);
    let cases = [("auto", MinFree::Auto), ("0", MinFree::Bytes(0)), ("2MiB", MinFree::Bytes(2 << 20)), ("10 GB", MinFree::Bytes(10_000_000_000))];
    for (word, expected) in cases {
        assert_eq!(min_free(word).unwrap(), expected, "{word}");
    }
    for unclear in ["Auto", "00", "5", "2 %", ""] {
        assert!(min_free(unclear).is_err(), "{unclear}");
    }
    let [small, large] = [64 << 20, 100 << 40].map(|total| MinFree::Auto.bytes_of(total));
    assert_eq!((small, large), (1 << 30, 2 << 40));
}

#[test]
fn a_flag_in_the_environment_has_six_words_in_any_case() {
    for (word, flag) in [("true", true), ("1", true), ("YES", true), ("False", false), ("0", false), ("no", false)] {
        assert_eq!(read("", &[("AUDIO_PIPELINE_NORMALIZE", word)]).unwrap().analysis.normalize, flag, "{word}");
    }
    assert_eq!(faults("", &[("AUDIO_PIPELINE_NORMALIZE", "on")]).len(), 1);
}

#[test]
fn origins_are_exact() {
    let ok = r#"["https://meet.example.com", "http://localhost:3000", "http://[::1]:80", "tauri://localhost"]"#;
    let config = read(&format!("http.cors_origins = {}", ok.replace(":80\"", ":81\"")), &[]).unwrap();
    assert_eq!(config.http.cors_origins[2], "http://[::1]:81");
    for origin in ["*", "null", "a.example", "https://a/", "https://a/b", "https://A", "https://u@a", "https://*.a", "https://a:443", "https://"] {
        let told = faults(&format!("http.cors_origins = [{origin:?}]"), &[]);
        assert!(told[0].contains(&format!("{origin:?} is not an exact origin")), "{told:?}");
    }
}

#[test]
fn urls_are_normalised_and_checked() {
    let livekit = |url: &str| read("", &[("LIVEKIT_URL", url)]).map(|config| config.livekit.url.unwrap());
    assert_eq!(livekit("localhost:7880").unwrap(), "https://localhost:7880");
    assert_eq!(livekit("wss://a.livekit.cloud/").unwrap(), "wss://a.livekit.cloud");
    for bad in ["ftp://a", "https://", "https://u:p@a", "https://a b", "https://a:99999", "https://a?x=1", "/a"] {
        assert!(livekit(bad).is_err(), "{bad}");
    }
    let base = |url: &str| read("", &[("EGRESS_WS_BASE", url)]).map(|config| config.ingest.ws_base.unwrap());
    assert_eq!(base("ws://10.0.0.1:3001/media/").unwrap(), "ws://10.0.0.1:3001/media");
    assert!(base("https://a").is_err());
    assert_eq!(read("", &[("HUME_WS_URL", "ws://a/v0/")]).unwrap().hume.url.unwrap(), "ws://a/v0/");
}

#[test]
fn keys_that_need_each_other_are_refused_alone() {
    assert_fault(
        "",
        &[("LIVEKIT_API_KEY", "k")],
        "livekit.api_key (from LIVEKIT_API_KEY): stands without livekit.api_secret, set LIVEKIT_API_SECRET",
    );
    assert_fault(
        "",
        &[("LIVEKIT_API_SECRET", "s")],
        "livekit.api_secret (from LIVEKIT_API_SECRET): stands without livekit.api_key, set LIVEKIT_API_KEY",
    );
    assert_fault(
        "",
        &[("HUME_API_KEY", "k")],
        "hume.api_key (from HUME_API_KEY): stands without hume.url, set HUME_WS_URL: there is no default, since Hume's \
         old endpoint wss://api.hume.ai/v0/stream/models was switched off in June 2026",
    );
    assert_fault(
        "ingest = { stall_after = '30s', idle_timeout = '29s' }",
        &[],
        "ingest.idle_timeout (from config.toml): is shorter than ingest.stall_after, expected at least as long",
    );
    assert!(read("ingest = { stall_after = '30s', idle_timeout = '30s' }", &[]).is_ok());
    assert_fault(
        "livekit = { max_starts = 9, min_starts = 10 }",
        &[],
        "livekit.min_starts (from config.toml): is above livekit.max_starts, expected at most as many",
    );
    assert!(read("livekit = { max_starts = 100, min_starts = 100 }", &[]).is_ok());
}

#[test]
fn a_faulty_value_is_not_also_called_missing() {
    assert_eq!(faults("hume.url = 'https://a'", &[("HUME_API_KEY", "k")]).len(), 1);
}

#[test]
fn a_database_url_names_its_engine() {
    let url = |text: &str| text.parse::<DatabaseUrl>();
    assert_eq!(url("sqlite:a/b.db").unwrap(), DatabaseUrl::Sqlite("a/b.db".into()));
    assert_eq!(url("sqlite:/a.db").unwrap(), DatabaseUrl::Sqlite("/a.db".into()));
    assert_eq!(url("postgresql://h/d").unwrap(), DatabaseUrl::Postgres(Secret::new("postgresql://h/d")));
    for bad in ["", "a.db", "sqlite:", "sqlite://a.db", "sqlite::memory:", "file:./dev.db", "postgres:h", "postgres://", "mysql://h"] {
        assert!(url(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_schema_parameter_of_prisma_is_dropped() {
    for (written, kept) in [
        ("postgres://u:p@h/d?schema=public", "postgres://u:p@h/d"),
        ("postgres://u:p@h/d?schema=public&sslmode=require", "postgres://u:p@h/d?sslmode=require"),
        ("postgres://u:p@h/d?a=1&schema=public&b=2", "postgres://u:p@h/d?a=1&b=2"),
        ("postgres://u:p?schema=x@h/d", "postgres://u:p?schema=x@h/d"),
    ] {
        assert_eq!(written.parse(), Ok(DatabaseUrl::Postgres(Secret::new(kept))));
    }
}

#[test]
fn a_redacted_url_holds_no_part_of_a_password() {
    for (url, redacted) in [
        ("sqlite:a.db", "sqlite:a.db"),
        ("postgres://h:5432/d", "postgres://h:5432/d"),
        ("postgres://u@h/d", "postgres://u@h/d"),
        ("postgres://u:SECRET@h:5432/d?sslmode=require", "postgres://u:***@h:5432/d?sslmode=require"),
        ("postgres://u:SEC@RET@h/d", "postgres://u:***@h/d"),
        ("postgres://u:SEC/RET:?SECRET@h/d", "postgres://u:***@h/d"),
        ("postgres://u:SECRET@h/d?password=SECRET&a=1", "postgres://u:***@h/d?password=***&a=1"),
        ("postgres://u@h/d?password=SEC@RET", "postgres://u@h/d?password=***"),
        ("postgres://h/d?password=SECRET", "postgres://h/d?password=***"),
    ] {
        let parsed: DatabaseUrl = url.parse().unwrap();
        assert_eq!(parsed.redacted(), redacted);
        assert_eq!(format!("{parsed:?}"), redacted);
    }
}

#[test]
fn a_secret_is_in_no_debug_output() {
    let env = ORIGINAL.map(|(_, variable, value)| match variable {
        "DATABASE_URL" => (variable, "postgres://u:SECRET-SECRET@h/d"),
        "LIVEKIT_API_SECRET" | "HUME_API_KEY" | "ADMIN_API_KEY" => (variable, "SECRET-SECRET-SECRET"),
        "LIVEKIT_KEYS" => (variable, "k: SECRET-SECRET-SECRET"),
        "INGEST_TICKET_SECRET" => (variable, "SECRET-SECRET-SECRET-SECRET-SECRET"),
        _ => (variable, value),
    });
    let config = read("", &env).unwrap();
    assert_eq!(config.secrets.hume_api_key.as_ref().unwrap().expose(), "SECRET-SECRET-SECRET");
    let debug = format!("{config:#?} {:?}", Env::from_pairs(env));
    assert!(!debug.contains("SECRET-SECRET"), "{debug}");
    assert_eq!(debug.matches("<redacted>").count(), 6);
}

#[test]
fn a_secret_is_in_no_fault() {
    let secrets: [(&str, Variables); 9] = [
        ("livekit.api_secret = 'SECRET'", &[]),
        ("http.admin_api_key = 'SECRET'", &[]),
        ("database.url = 'SECRET:x'", &[]),
        ("database.url = ['postgres://u:SECRET@h/d']", &[]),
        ("hume.url = 'https://u:SECRET@h'", &[]),
        ("", &[("ADMIN_API_KEY", "SECRET")]),
        ("", &[("INGEST_TICKET_SECRET", "SECRET\r")]),
        ("", &[("LIVE_MEETING__HTTP__ADMIN_KEY", "SECRET")]),
        ("", &[("DATABASE_URL", "SECRET")]),
    ];
    for (file, env) in secrets {
        let error = read(file, env).unwrap_err();
        let told = format!("{error} {error:?}").replace("INGEST_TICKET_SECRET", "").replace("LIVEKIT_API_SECRET", "");
        assert!(!told.contains("SECRET"), "{told}");
    }
}

#[test]
fn a_part_that_is_not_built_is_said_without_its_value() {
    let env = Env::from_pairs([("IMENTIV_API_KEY", "SECRET"), ("AUDIO_PIPELINE_PAYLOAD", "wav"), ("IMENTIV_ENDPOINT_URL", "")]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("empty.toml");
    std::fs::write(&file, "").unwrap();
    let loaded = Config::load(Some(&file), &env).unwrap();
    assert_eq!(loaded.config, Config::default());
    let notice = |name| format!("{name} is set but has no effect yet: Imentiv dispatch is not built");
    assert_eq!(loaded.notices, ["AUDIO_PIPELINE_PAYLOAD", "IMENTIV_API_KEY"].map(notice));
}

#[test]
fn a_named_file_must_exist_and_be_toml() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("live.toml");
    let load = || Config::load(Some(&file), &Env::default());
    assert!(matches!(load(), Err(ConfigError::Unreadable { .. })));

    std::fs::write(&file, "[database]\nurl = \"postgres://u:SECRET@h\n").unwrap();
    let error = load().unwrap_err();
    let told = error.to_string();
    assert!(told.contains("live.toml, line 2, is not TOML: ") && !format!("{told} {error:?}").contains("SECRET"), "{told}");
}

#[test]
fn the_environment_lies_over_dotenv() {
    let directory = tempfile::tempdir().unwrap();
    let dotenv = directory.path().join(".env");
    std::fs::write(&dotenv, "\u{feff}# comment\nPORT=1\nexport HOST='a b'\nPORT=2\nHUME_API_KEY=k\nA=1\n").unwrap();
    let process = [("A", "2"), ("HUME_API_KEY", "")].map(|(name, value)| (name.into(), value.into()));
    let env = Env::layered(Some(&dotenv), process.into_iter()).unwrap();
    let expected = [("PORT", Some("2")), ("HOST", Some("a b")), ("A", Some("2")), ("HUME_API_KEY", None), ("B", None)];
    for (name, value) in expected {
        assert_eq!(env.get(name), value, "{name}");
    }
    assert_eq!(Env::layered(Some(&directory.path().join("none")), std::iter::empty()).unwrap(), Env::default());
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_utf8_is_skipped() {
    use std::os::unix::ffi::OsStringExt;
    let bad = OsString::from_vec(vec![0xff]);
    let process = [("A".into(), bad.clone()), (bad, "b".into()), ("C".into(), "c".into())];
    assert_eq!(Env::layered(None, process.into_iter()).unwrap(), Env::from_pairs([("C", "c")]));
}

#[test]
fn every_broken_line_of_dotenv_is_told_by_number() {
    let directory = tempfile::tempdir().unwrap();
    let dotenv = directory.path().join(".env");
    std::fs::write(&dotenv, "PORT=1\nSECRET here\nA=1\nB=SECRET other\nC='SECRET\nSECRET\n").unwrap();
    let error = Env::layered(Some(&dotenv), std::iter::empty()).unwrap_err();
    let told = error.to_string();
    let lines: Vec<_> = told.lines().map(|line| line.split(" (from ").next().unwrap()).collect();
    assert_eq!(lines, ["line 2", "line 4", "line 5"]);
    assert!(!format!("{told} {error:?}").contains("SECRET"), "{told}");
}

/// Runs another test of this file in a process whose environment would change its outcome, if it were looked at.
#[test]
fn nothing_but_env_load_reads_the_environment() {
    let module = module_path!().split_once("::").unwrap().1;
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::config_toml_states_the_defaults")])
        .envs([("PORT", "9"), ("LIVE_MEETING__HTTP__HOST", "h"), ("LIVE_MEETING__NO__KEY", "1")])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}
