//! What the operator chooses, and what is never said of it.

use std::sync::Arc;

use live_meeting::livekit::webhook::sign;
use serde_json::json;
use tempfile::TempDir;

use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::test_app::{API_KEY, Finished, TestApp, complete, run};

fn directory(files: &[(&str, &str)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    files.iter().for_each(|(name, text)| std::fs::write(dir.path().join(name), text).unwrap());
    dir
}

/// The port that the program goes by, as its ticket's URL tells.
async fn port(dir: &TempDir, env: &[(&str, &str)], args: &[&str]) -> u16 {
    let Finished { code, stdout, stderr } = run(dir.path(), env, &[&["ticket", "--room", "r"], args].concat()).await;
    assert_eq!(code, Some(0), "{stderr}");
    let rest = stdout.strip_prefix("ws://localhost:").unwrap_or_else(|| panic!("{stdout}"));
    rest.split('/').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn own_variable_beats_original_beats_file_beats_default_and_dotenv_lies_below_the_environment() {
    let (own, original) = (("LIVE_MEETING__HTTP__PORT", "1001"), ("PORT", "1002"));
    let file = ("config.toml", "[http]\nport = 1003\n");
    let dotenv = (".env", "PORT=1004\n");
    let own_in_dotenv = (".env", "LIVE_MEETING__HTTP__PORT=1005\n");
    let empty_own = ("LIVE_MEETING__HTTP__PORT", "");
    type Variables<'a> = &'a [(&'a str, &'a str)];
    let table: [(Variables, Variables, u16); 9] = [
        (&[file, dotenv], &[own, original], 1001),
        (&[file, dotenv], &[original], 1002),
        (&[file, dotenv], &[], 1004),
        (&[file], &[], 1003),
        (&[], &[], 3001),
        (&[file, own_in_dotenv], &[own], 1001),
        (&[file, own_in_dotenv], &[original], 1005),
        (&[file, own_in_dotenv], &[original, empty_own], 1002),
        (&[file], &[("PORT", "")], 1003),
    ];
    for (files, env, expected) in table {
        assert_eq!(port(&directory(files), env, &[]).await, expected, "{files:?} {env:?}");
    }
}

#[tokio::test]
async fn a_server_listens_where_the_strongest_source_says() {
    let dir = Arc::new(directory(&[("config.toml", "[http]\nport = 1\nhost = \"192.0.2.1\"\n"), (".env", "PORT=2\n")]));
    let app = TestApp::builder().dir(&dir).env("PORT", "3").env("LIVE_MEETING__HTTP__PORT", "0").start().await;
    assert!(app.addr.ip().is_loopback() && app.addr.port() > 3, "{}", app.addr);
}

#[tokio::test]
async fn a_named_file_is_read_instead_of_config_toml_and_must_exist() {
    let dir = directory(&[("config.toml", "[http]\nport = 1003\n"), ("other.toml", "[http]\nport = 1006\n")]);
    assert_eq!(port(&dir, &[], &["--config", "other.toml"]).await, 1006);
    for args in [&["serve", "--config", "missing.toml"][..], &["--config", "missing.toml"], &["check", "--config", "missing.toml"]] {
        let Finished { code, stdout, stderr } = run(dir.path(), &[("PORT", "0")], args).await;
        assert_eq!(code, Some(1), "{args:?}");
        let told = format!("{stdout}{stderr}");
        assert!(told.contains("cannot read missing.toml: No such file"), "{args:?}: {told}");
    }
}

#[tokio::test]
async fn every_fault_of_every_source_stops_the_start_in_one_message() {
    let file = "[http]\nport = 70000\nprot = 1\n[[livekit.rules]]\nkind = \"egress\"\n[recordng]\nmute = \"keep\"\n[ingest]\nstall_after = \"2h\"\n";
    let dir = directory(&[("config.toml", file), (".env", "AUDIO_PIPELINE_GROUP_SECONDS=31\n")]);
    let env = [("ADMIN_API_KEY", "short"), ("LIVE_MEETING__HTTP__WORKERS", "0"), ("LIVE_MEETING__NO__KEY", "1"), ("LIVEKIT_API_KEY", "alone")];
    let Finished { code, stdout, stderr } = run(dir.path(), &env, &["serve"]).await;
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    let faults = [
        "http.port (from config.toml): 70000 is out of range",
        "http.prot (from config.toml): unknown key",
        "livekit.rules[1].kind (from config.toml): \"egress\" is never recorded",
        "recordng.mute (from config.toml): unknown key",
        "ingest.stall_after (from config.toml): \"2h\" is out of range",
        "analysis.group_seconds (from AUDIO_PIPELINE_GROUP_SECONDS): \"31\" is out of range",
        "http.admin_api_key (from ADMIN_API_KEY): is too short",
        "http.workers (from LIVE_MEETING__HTTP__WORKERS): \"0\" is out of range",
        "no.key (from LIVE_MEETING__NO__KEY): unknown key",
        "livekit.api_key (from LIVEKIT_API_KEY): stands without livekit.api_secret",
    ];
    for fault in faults {
        assert!(stderr.contains(fault), "{fault} is not told:\n{stderr}");
    }
    assert_eq!((stderr.matches("live-meeting: ").count(), stderr.lines().count()), (1, faults.len()), "{stderr}");
    assert!(!dir.path().join("storage").exists(), "nothing was begun");
}

#[tokio::test]
async fn variables_of_parts_that_are_not_built_are_accepted_and_said_to_have_no_effect() {
    let variables = ["AUDIO_PIPELINE_PAYLOAD", "AUDIO_PIPELINE_TIMEOUT_MS", "IMENTIV_ENDPOINT_URL", "IMENTIV_API_KEY"];
    let builder = variables.iter().fold(TestApp::builder(), |builder, variable| builder.env(variable, "a-value-of-it"));
    let app = builder.start().await;
    for variable in variables {
        assert!(app.log().contains(&format!("{variable} is set but has no effect yet")), "{variable}: {}", app.log());
    }
    assert!(!app.log().contains("a-value-of-it"), "{}", app.log());
    assert!(!app.dir.path().join("a-value-of-it").exists());
}

#[tokio::test]
async fn a_hume_key_without_a_url_stops_the_start_and_none_at_all_is_said() {
    let dir = directory(&[]);
    let Finished { code, stderr, .. } = run(dir.path(), &[("HUME_API_KEY", "canary-key"), ("PORT", "0")], &["serve"]).await;
    assert_eq!(code, Some(1));
    assert!(["hume.api_key", "HUME_WS_URL", "switched off"].iter().all(|word| stderr.contains(word)) && !stderr.contains("canary"), "{stderr}");
    let app = TestApp::builder().start().await;
    assert!(app.log().contains("streaming to Hume is skipped: HUME_API_KEY is missing"), "{}", app.log());
}

#[tokio::test]
async fn rust_log_sets_the_filter_also_from_dotenv() {
    let notice = "AUDIO_PIPELINE_PAYLOAD is set but has no effect";
    for (dotenv, filter, is_told) in [("", None, true), ("RUST_LOG=error\n", None, false), ("RUST_LOG=error\n", Some("warn"), true)] {
        let dir = directory(&[(".env", dotenv)]);
        let mut env = vec![("AUDIO_PIPELINE_PAYLOAD", "wav")];
        env.extend(filter.map(|filter| ("RUST_LOG", filter)));
        let Finished { stderr, .. } = run(dir.path(), &env, &["ticket", "--room", "r"]).await;
        assert_eq!(stderr.contains(notice), is_told, "{dotenv:?} {filter:?}: {stderr}");
    }
}

#[tokio::test]
async fn no_secret_ticket_token_or_query_string_is_in_the_log_at_any_level() {
    let secrets = [
        ("LIVEKIT_API_SECRET", "canary-livekit-secret-0123456789"),
        ("HUME_API_KEY", "canary-hume-0123456789"),
        ("ADMIN_API_KEY", "canary-admin-0123456789"),
        ("INGEST_TICKET_SECRET", "canary-ticket-0123456789-0123456789"),
        ("IMENTIV_API_KEY", "canary-imentiv-0123456789"),
        ("LIVEKIT_KEYS", "more: canary-more-0123456789"),
    ];
    let admin = secrets[2].1;
    let builder = secrets.iter().fold(TestApp::builder(), |builder, (name, secret)| builder.env(name, *secret));
    // Nobody listens there, which the analysis says in the log.
    let app = builder.env("HUME_WS_URL", "ws://127.0.0.1:1/v0").env("RUST_LOG", "trace").start().await;
    let bearer = |key: &str| format!("Bearer {key}");

    // The ingest, with tickets good, spent and forged, and with a sender that breaks the protocol.
    let subject = json!({"roomName": "room", "participant": "ana", "trackId": "TR_1"});
    let minted = app.request("POST", "/api/v1/tickets?q=canary-query", &[("Authorization", &bearer(admin))], subject.to_string().as_bytes()).await;
    assert_eq!(minted.status, 201);
    let ticket = minted.json()["ticket"].as_str().unwrap().to_owned();
    let good = format!("/egress-audio?roomName=room&note=canary-query&ticket={ticket}");
    let mut peer = EgressPeer::connect(app.addr, &good).await.unwrap();
    peer.send_pcm(&counter_pcm(96_000, 1)).await.unwrap();
    peer.send_text(r#"{"secret":"canary-text"}"#).await.unwrap();
    app.logged("the analysis service is not reached").await;
    peer.send_raw(&[0xff; 16]).await.unwrap();
    assert_eq!(peer.expect_close().await.code, Some(1002));
    let mut refused = Vec::new();
    for path in [&good, "/egress-audio?roomName=room&ticket=canary-forged.x.y", "/egress-audio?sampleRate=1&x=canary-query"] {
        refused.push(EgressPeer::connect(app.addr, path).await.map(drop).expect_err("refused").body);
    }

    // Webhooks: good, twice, forged, and with a body that is not understood.
    let event = complete(json!({"event": "room_started", "room": {"sid": "RM_1", "name": "room", "metadata": "canary-body"}})).to_string();
    let mut tokens = Vec::new();
    for (secret, body, status) in [
        (secrets[0].1, event.as_str(), 204),
        (secrets[0].1, event.as_str(), 204),
        ("canary-wrong-secret-0123456789-01", event.as_str(), 401),
        (secrets[0].1, "{\"canary-body\": [", 204),
    ] {
        let token = sign(API_KEY, secret, body.as_bytes()).unwrap();
        let response = app.request("POST", "/livekit/webhook?q=canary-query", &[("Authorization", &token)], body.as_bytes()).await;
        assert_eq!(response.status, status, "{body}");
        tokens.push(token);
    }

    // The API with right and wrong keys, and whatever else is asked.
    let mut answered = Vec::new();
    for (path, key, status) in [
        ("/api/v1/recordings?q=canary-query", admin, 200),
        ("/api/v1/tracks/live?q=canary-query", admin, 200),
        ("/api/v1/sessions?cursor=canary-query", admin, 400),
        ("/api/v1/recordings?q=canary-query", "canary-wrong-key", 401),
        ("/health?q=canary-query", "canary-wrong-key", 200),
        ("/nowhere?q=canary-query", "canary-wrong-key", 404),
    ] {
        let asked = async || Some(app.request("GET", path, &[("Authorization", &bearer(key))], b"").await).filter(|answer| answer.status == status);
        let response = app.eventually(&format!("{status} of {path}"), asked).await;
        answered.push(String::from_utf8(response.body).unwrap());
    }
    app.request("POST", "/api/v1/tickets", &[("Authorization", &bearer(admin))], b"{\"canary-body\":").await.assert_problem(400, "invalidRequest");

    let (status, _, stopped) = app.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", stopped.log);
    assert!(stopped.log.contains(" DEBUG "), "the filter lets details through: {}", stopped.log);
    let parts: Vec<&str> = tokens.iter().map(String::as_str).chain([ticket.as_str()]).flat_map(|text| text.split('.').skip(1)).collect();
    for (what, text) in [("log", stopped.log.as_str()), ("answers", &refused.concat()), ("answers", &answered.concat())] {
        for needle in ["canary", "ticket=", "roomName="].iter().chain(&parts) {
            let line = text.lines().find(|line| line.contains(needle));
            assert_eq!(line, None, "{needle:?} is in the {what}");
        }
    }
}
