//! The operators' API: its doors, its errors, and what it tells of live tracks.

mod joined;
mod ledger;
mod lists;
mod media;
mod tickets;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::egress_peer::{EgressPeer, tone};
use crate::support::test_app::{ADMIN_KEY, Response, TestApp};

fn bearer() -> String {
    format!("Bearer {ADMIN_KEY}")
}

#[tokio::test]
async fn the_root_says_that_it_runs() {
    let app = TestApp::builder().start().await;
    let response = app.request("GET", "/", &[], b"").await;
    assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")));
    assert_eq!(String::from_utf8_lossy(&response.body), r#"{"message":"Live Meeting API is running","status":"ok"}"#);
}

#[tokio::test]
async fn nothing_below_api_v1_answers_without_the_key() {
    let app = TestApp::builder().start().await;
    let routes = [
        "GET /api/v1/sessions",
        "GET /api/v1/sessions/RM_1",
        "GET /api/v1/sessions/RM_1/tracks",
        "GET /api/v1/sessions/RM_1/measurements",
        "GET /api/v1/sessions/RM_1/transitions",
        "GET /api/v1/webhook-events",
        "GET /api/v1/webhook-events/EV_1",
        "POST /api/v1/webhook-events/EV_1/replay",
        "GET /api/v1/recordings",
        "GET /api/v1/recordings/x",
        "GET /api/v1/recordings/x/media",
        "GET /api/v1/segments/x/media",
        "GET /api/v1/tracks/live",
        "POST /api/v1/tickets",
        "DELETE /api/v1/sessions",
        "GET /api/v1/nothing",
        "GET /api/v1/",
        "GET /api/v1",
    ];
    let right = bearer();
    let wrong = [
        String::new(),
        ADMIN_KEY.to_owned(),
        "Bearer".to_owned(),
        "Bearer wrong".to_owned(),
        format!("{right}x"),
        right[..right.len() - 1].to_owned(),
    ];
    for (method, path) in routes.map(|route| route.split_once(' ').unwrap()) {
        app.request(method, &format!("{path}?key={ADMIN_KEY}"), &[], b"").await.assert_problem(401, "unauthorized");
        for given in &wrong {
            let response = app.request(method, path, &[("Authorization", given)], b"").await;
            response.assert_problem(401, "unauthorized");
            assert_eq!(response.header("www-authenticate"), Some("Bearer"), "{method} {path}");
        }
        let response = app.request(method, path, &[("Authorization", &right)], b"").await;
        assert_ne!(response.status, 401, "{method} {path}: the same with the key");
    }
}

#[tokio::test]
async fn unknown_paths_methods_and_ids_are_problem_documents() {
    let app = TestApp::builder().start().await;
    for path in ["/nothing", "/api", "/api/v2/sessions", "/health/x", "/api/v1/nothing", "/api/v1/sessions/", "/api/v1/", "/api/v1"] {
        app.get(path).await.assert_problem(404, "notFound");
    }
    for id in ["RM_1", "..%2F..%2Fetc%2Fpasswd", "%00", "%FF"] {
        for path in [
            format!("/api/v1/sessions/{id}"),
            format!("/api/v1/sessions/{id}/tracks"),
            format!("/api/v1/sessions/{id}/transitions"),
            format!("/api/v1/webhook-events/{id}"),
            format!("/api/v1/recordings/{id}"),
            format!("/api/v1/recordings/{id}/media"),
            format!("/api/v1/segments/{id}/media"),
        ] {
            app.get(&path).await.assert_problem(404, "notFound");
        }
    }
    let methods = [
        "POST /",
        "DELETE /health",
        "GET /livekit/webhook",
        "POST /egress-audio",
        "POST /api/v1/sessions",
        "PUT /api/v1/tickets",
        "GET /api/v1/tickets",
        "DELETE /api/v1/recordings/x",
        "POST /api/v1/tracks/live",
        "POST /api/v1/webhook-events",
        "GET /api/v1/webhook-events/EV_1/replay",
    ];
    for (method, path) in methods.map(|route| route.split_once(' ').unwrap()) {
        app.request(method, path, &[("Authorization", &bearer())], b"").await.assert_problem(405, "methodNotAllowed");
    }
}

#[tokio::test]
async fn only_the_exact_origins_of_the_configuration_may_call_from_a_browser() {
    const ORIGIN: &str = "https://meet.example.com";
    let allowed = |response: &Response| response.header("access-control-allow-origin").map(str::to_owned);
    let dir = Arc::new(TempDir::new().unwrap());
    std::fs::write(dir.path().join("config.toml"), format!("[http]\ncors_origins = [\"{ORIGIN}\"]\n")).unwrap();
    let app = TestApp::builder().dir(&dir).start().await;
    let asking = [("Access-Control-Request-Method", "GET"), ("Access-Control-Request-Headers", "authorization,content-type,range")];
    let preflight = app.request("OPTIONS", "/api/v1/sessions", &[&[("Origin", ORIGIN)], &asking[..]].concat(), b"").await;
    assert_eq!((preflight.status, allowed(&preflight).as_deref()), (200, Some(ORIGIN)), "without a key: {preflight:?}");
    for (header, wanted) in [("access-control-allow-methods", ["GET", "POST"]), ("access-control-allow-headers", ["authorization", "content-type"])] {
        let granted = preflight.header(header).unwrap();
        assert!(wanted.iter().all(|wanted| granted.contains(wanted)), "{header}: {granted}");
    }
    let key = bearer();
    let from = async |app: &TestApp, origin| app.request("GET", "/api/v1/sessions", &[("Authorization", &key), ("Origin", origin)], b"").await;
    assert_eq!(allowed(&from(&app, ORIGIN).await).as_deref(), Some(ORIGIN));
    let refused = app.request("GET", "/api/v1/sessions", &[("Origin", ORIGIN)], b"").await;
    refused.assert_problem(401, "unauthorized");
    assert_eq!(allowed(&refused).as_deref(), Some(ORIGIN), "the page may read why it failed");
    let strangers =
        ["http://meet.example.com", "https://meet.example.com:8443", "https://meet.example.com.evil.example", "https://example.com", "null"];
    for origin in strangers {
        let preflight = app.request("OPTIONS", "/api/v1/sessions", &[&[("Origin", origin)], &asking[..]].concat(), b"").await;
        assert_eq!((allowed(&from(&app, origin).await), allowed(&preflight)), (None, None), "{origin}");
    }
    let closed = TestApp::builder().start().await;
    assert_eq!(allowed(&from(&closed, ORIGIN).await), None, "no origin is allowed by default");
}

#[tokio::test]
async fn the_first_start_makes_a_key_that_only_its_file_tells() {
    let app = TestApp::builder().without("ADMIN_API_KEY").start().await;
    let file = app.dir.path().join("storage/admin-key");
    let key = std::fs::read_to_string(&file).unwrap().trim().to_owned();
    assert!(key.len() >= 32, "{key}");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let opens = async |app: &TestApp| app.request("GET", "/api/v1/sessions", &[("Authorization", &format!("Bearer {key}"))], b"").await.status;
    assert_eq!((opens(&app).await, app.get("/api/v1/sessions").await.status), (200, 401));
    assert!(app.log().contains("storage/admin-key") && !app.log().contains(&key), "{}", app.log());
    let app = app.kill().await.restart().await;
    assert_eq!(opens(&app).await, 200, "the next start keeps it");
    assert!(!app.log().contains(&key), "{}", app.log());
}

#[tokio::test]
async fn a_live_track_shows_what_it_does() {
    let app = TestApp::builder().open().start().await;
    assert_eq!(app.items("/api/v1/tracks/live").await, Vec::<Value>::new());
    let half_a_second = tone(48_000, 2, 440.0, 0.5, 0.5);
    let mut peer = EgressPeer::connect(app.addr, "/egress-audio?roomName=room&participant=ana&trackId=TR_1&meetingId=RM_1").await.unwrap();
    peer.send_pcm(&half_a_second).await.unwrap();
    peer.send_text("what is this?").await.unwrap();
    peer.mute(true).await.unwrap();
    let recorded = async || {
        let track = app.items("/api/v1/tracks/live").await.first()?.clone();
        (track["recordedBytes"] == 96_000 && track["muted"] == true).then_some(track)
    };
    let mut track = app.eventually("all of it is recorded", recorded).await;
    for (level, loudest, softest) in [("/peakDbfs", -5.9, -6.1), ("/level/peakDbfs", -5.9, -6.1), ("/level/rmsDbfs", -8.9, -9.2)] {
        let dbfs = track.pointer(level).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {level}: {track}"));
        assert!(dbfs < loudest && dbfs > softest, "{level} of half a full scale is {dbfs}");
    }
    chrono::DateTime::parse_from_rfc3339(track["connectedAt"].as_str().unwrap()).unwrap();
    assert!(track["idleMs"].is_u64());
    for varying in ["peakDbfs", "level", "connectedAt", "idleMs", "stalled"] {
        track.as_object_mut().unwrap().remove(varying);
    }
    let expected = json!({
        "connection": 1, "meetingId": "RM_1", "roomName": "room", "participant": "ana", "trackSid": "TR_1",
        "kind": "audio", "codec": null, "video": null,
        "sampleRate": 48_000, "channels": 2, "recordedChannels": 2, "formatMismatch": null, "bytes": 96_000, "frames": 24_000, "seconds": 0.5, "recordedBytes": 96_000, "filledFrames": 0,
        "driftPpm": null, "muted": true, "queues": {"spooledBytes": 0, "analysisGroups": 0}, "drops": {"recordingBytes": 0, "analysisGroups": 0},
        "restarts": {"wavWriter": 0, "analysis": 0}, "groups": 0, "silentGroups": 0, "analysedGroups": 0, "analysisConnections": 0,
        "measurements": 0, "unknownTexts": 1,
    });
    assert_eq!(track, expected);
    let live = app.get_json("/api/v1/tracks/live").await;
    let lags = live["writeLag"].as_array().unwrap();
    let bounds: Vec<Option<u64>> = lags.iter().map(|class| class["atMostMs"].as_u64()).collect();
    assert!(bounds.split_last().is_some_and(|(last, rest)| last.is_none() && rest.is_sorted() && rest.contains(&Some(200))), "{bounds:?}");
    assert!(lags.iter().map(|class| class["count"].as_u64().unwrap()).sum::<u64>() > 0, "{lags:?}");
    assert_eq!(live["nextCursor"], Value::Null);
    peer.close_and_wait().await;
    app.eventually("it is gone", async || app.items("/api/v1/tracks/live").await.is_empty().then_some(())).await;
}
