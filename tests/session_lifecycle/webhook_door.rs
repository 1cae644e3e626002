//! The webhook's door: who is believed, what is refused, and what an answer promises.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;
use futures_util::future::join_all;
use hmac::{Hmac, KeyInit, Mac};
use live_meeting::livekit::webhook::sign;
use livekit_api::access_token::{AccessToken, VideoGrants};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{assert_taken, deliver, event, of_ana, rows, session};
use crate::support::test_app::{ADMIN_KEY, API_KEY, API_SECRET, Response, TestApp, complete, parse_response};

const WEBHOOK: &str = "/livekit/webhook";
const MEBIBYTE: usize = 1 << 20;

/// A token of exactly these claims.
fn token(claims: &Value, secret: &str) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(&json!({"alg": "HS256", "typ": "JWT"})), part(claims));
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

/// LiveKit's claims for a body, from `start` to `end`, in seconds from now.
fn claims(body: &[u8], start: i64, end: i64) -> Value {
    let now = chrono::Utc::now().timestamp();
    json!({"iss": API_KEY, "iat": now + start, "nbf": now + start, "exp": now + end, "sha256": STANDARD.encode(Sha256::digest(body))})
}

#[tokio::test]
async fn what_livekit_did_not_sign_is_401_and_leaves_nothing() {
    let app = TestApp::builder().start().await;
    let body = complete(event("room_started", "RM_1", 0, json!({}))).to_string().into_bytes();
    let grants = VideoGrants { room_join: true, room: "room".to_owned(), ..VideoGrants::default() };
    let participants = AccessToken::with_api_key(API_KEY, API_SECRET).with_identity("ana").with_grants(grants.clone());
    let mut other_issuer = claims(&body, 0, 300);
    other_issuer["iss"] = json!("other");
    let cases = [
        ("garbage", "garbage".to_owned(), false),
        ("the admin key", format!("Bearer {ADMIN_KEY}"), false),
        ("another secret", token(&claims(&body, 0, 300), "another-secret-of-32-characters!!"), false),
        ("another issuer", token(&other_issuer, API_SECRET), false),
        ("another body", token(&claims(b"{}", 0, 300), API_SECRET), false),
        ("a participant's token", participants.clone().to_jwt().unwrap(), false),
        ("one with this body", participants.with_sha256(&STANDARD.encode(Sha256::digest(&body))).to_jwt().unwrap(), false),
        ("expired", token(&claims(&body, -400, -70), API_SECRET), true),
        ("from the future", token(&claims(&body, 70, 370), API_SECRET), true),
    ];
    let unsigned = app.request("POST", WEBHOOK, &[], &body).await;
    unsigned.assert_problem(401, "unauthorized");
    let errors = || app.log().lines().filter(|line| line.contains("ERROR") && line.contains("a webhook is refused")).count();
    let mut expected = 0;
    for (case, token, is_loss) in cases {
        let response = app.request("POST", WEBHOOK, &[("Authorization", &token)], &body).await;
        assert_eq!((response.status, &response.body), (401, &unsigned.body), "{case}: nobody learns why");
        expected += usize::from(is_loss);
        app.eventually(&format!("{expected} errors in the log after {case:?}"), async || (errors() == expected).then_some(())).await;
    }
    let encoded = [("Authorization", &*token(&claims(&body, 0, 300), API_SECRET)), ("Content-Encoding", "gzip")];
    app.request("POST", WEBHOOK, &encoded, &body).await.assert_problem(401, "unauthorized");
    assert_eq!(["webhook_events", "sessions"].map(|table| rows(&app, table)), [0, 0]);
    let good = token(&claims(&body, -360, -50), API_SECRET);
    assert_taken(&app.request("POST", WEBHOOK, &[("Authorization", &good)], &body).await, "clocks may differ by a minute");
}

#[tokio::test]
async fn no_content_type_matters() {
    let app = TestApp::builder().start().await;
    for kind in ["text/plain", "application/json", "application/x-www-form-urlencoded", "no type at all", ""] {
        let body = complete(event("room_started", "RM_1", 0, json!({}))).to_string();
        let token = format!("Bearer {}", token(&claims(body.as_bytes(), 0, 300), API_SECRET));
        let headers = [("Authorization", token.as_str()), ("Content-Type", kind)];
        assert_taken(&app.request("POST", WEBHOOK, if kind.is_empty() { &headers[..1] } else { &headers }, body.as_bytes()).await, kind);
    }
    assert_eq!(rows(&app, "webhook_events"), 5);
}

#[tokio::test]
async fn a_body_over_a_mebibyte_is_413_however_it_comes() {
    let app = TestApp::builder().start().await;
    assert_taken(&app.signed_webhook(&vec![b' '; MEBIBYTE]).await, "exactly a mebibyte");
    app.signed_webhook(&vec![b' '; MEBIBYTE + 1]).await.assert_problem(413, "payloadTooLarge");
    app.signed_webhook(&vec![b' '; 3 * MEBIBYTE]).await.assert_problem(413, "payloadTooLarge");
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x1_0000));
    let chunked = format!("POST {WEBHOOK} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n{}", chunk.repeat(17));
    send_and_read(&app, chunked).await.assert_problem(413, "payloadTooLarge");
    // What is declared need not be sent to be refused.
    let declared = format!("POST {WEBHOOK} HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n", MEBIBYTE + 1);
    send_and_read(&app, declared).await.assert_problem(413, "payloadTooLarge");
}

/// Sends the beginning of a request, then a byte each second, and reads the answer.
async fn send_and_read(app: &TestApp, beginning: String) -> Response {
    let (mut reader, mut writer) = TcpStream::connect(app.addr).await.unwrap().into_split();
    let drip = tokio::spawn(async move {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        let mut sent = writer.write_all(beginning.as_bytes()).await;
        while sent.is_ok() {
            second.tick().await;
            sent = writer.write_all(b"x").await;
        }
    });
    let mut raw = Vec::new();
    // Each answer here is a problem document.
    let answer = async { while !raw.ends_with(b"}") && reader.read_buf(&mut raw).await.is_ok_and(|length| length > 0) {} };
    tokio::time::timeout(Duration::from_secs(20), answer).await.expect("an answer within four times the 5 s");
    drip.abort();
    parse_response(&raw, false)
}

#[tokio::test]
async fn a_body_that_drips_in_is_given_up() {
    let app = TestApp::builder().start().await;
    let head = format!("POST {WEBHOOK} HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n");
    let response = send_and_read(&app, head).await;
    assert_eq!((response.status, response.header("content-type")), (503, Some("application/problem+json")));
    assert!(response.header("retry-after").is_some(), "LiveKit tries again: {response:?}");
}

#[tokio::test]
async fn a_signed_body_is_kept_and_never_refused_whatever_it_says() {
    let app = TestApp::builder().env("RUST_LOG", "debug").start().await;
    let deep = "[".repeat(100_000);
    let garbage = [&b""[..], b"\xff\xfe\0", b"[]", b"null", b"{}", b"{\"event\":7}", b"{\"event\":\"room_started\"", deep.as_bytes()];
    for (body, count) in garbage.into_iter().zip(1..) {
        assert_taken(&app.signed_webhook(body).await, "the first time");
        assert_taken(&app.signed_webhook(body).await, "the second time");
        app.eventually("the repetition is told", async || (app.log().matches("webhook repeated").count() == count).then_some(())).await;
    }
    assert_eq!(rows(&app, "webhook_events WHERE NOT understood"), 8);
    let strange = [
        json!({"event": "room_started"}),
        json!({"event": "room_started", "room": "RM_1", "participant": [], "track": 1}),
        json!({"event": "participant_joined", "room": {"sid": "RM_1", "name": "room"}, "participant": {"sid": {}, "identity": 5, "kind": 99}}),
        json!({"event": "track_published", "room": {"sid": "RM_\u{0}", "name": "\u{0}"}, "participant": {"sid": "\u{0}"}, "track": {"sid": "\u{0}"}}),
        json!({"event": "room_finished", "createdAt": "8210266876799", "room": {"sid": "RM_2", "name": "room", "creationTimeMs": "8210266876799999"}}),
        json!({"event": "room_finished", "createdAt": 1e300, "room": {"sid": "RM_3", "name": "x".repeat(100_000), "creationTime": i64::MAX}}),
    ];
    for event in strange {
        deliver(&app, event).await;
    }
    // The name that is longer than any of LiveKit's is kept, but makes no session.
    assert_eq!((rows(&app, "webhook_events WHERE understood"), rows(&app, "webhook_events")), (5, 14));
    let sessions = app.items("/api/v1/sessions").await;
    let has_time = |session: &Value| chrono::DateTime::parse_from_rfc3339(session["startedAt"].as_str().unwrap()).is_ok();
    assert!(sessions.len() == 3 && sessions.iter().all(has_time), "{sessions:?}");
}

#[tokio::test]
async fn events_that_wait_for_the_database_for_a_moment_are_all_taken() {
    let app = TestApp::builder().start().await;
    let mut lock = app.database();
    lock.batch_execute("BEGIN IMMEDIATE").unwrap();
    let deliveries = join_all(["RM_1", "RM_2", "RM_3"].map(|sid| deliver(&app, event("room_started", sid, 0, json!({})))));
    // The fault lasts so long: more than an event waits for the database, which finds it in the journal.
    let fault = async move {
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        drop(lock);
    };
    tokio::join!(deliveries, fault);
    app.eventually("three sessions", async || (app.items("/api/v1/sessions").await.len() == 3).then_some(())).await;
}

#[tokio::test]
async fn what_was_acknowledged_survives_kill_9() {
    let mut app = TestApp::builder().start().await;
    for (name, more, probe) in [
        ("room_started", json!({}), "/status"),
        ("participant_joined", of_ana(), "/participants/0/joinedAt"),
        ("participant_left", of_ana(), "/participants/0/leftAt"),
        ("room_finished", json!({}), "/endedAt"),
    ] {
        deliver(&app, event(name, "RM_1", 0, more)).await;
        app = app.kill().await.restart().await;
        app.settled().await;
        let found = session(&app, "RM_1").await;
        assert!(found.pointer(probe).is_some_and(Value::is_string), "{name}: {found}");
    }
}

#[tokio::test]
async fn without_livekits_credentials_every_webhook_is_refused_and_the_start_warns() {
    let app = TestApp::builder().without("LIVEKIT_API_KEY").without("LIVEKIT_API_SECRET").start().await;
    assert!(app.log().lines().any(|line| line.contains("WARN") && line.contains("LIVEKIT_API_SECRET")), "{}", app.log());
    app.webhook(event("room_started", "RM_1", 0, json!({}))).await.assert_problem(401, "unauthorized");
    // Nor does an empty secret sign anything.
    let body = b"{}";
    let response = app.request("POST", WEBHOOK, &[("Authorization", &token(&claims(body, 0, 300), ""))], body).await;
    response.assert_problem(401, "unauthorized");
}

#[tokio::test]
async fn webhooks_of_each_of_several_keys_are_believed_and_no_other() {
    const LINES: &str = "# two at once, while one is replaced\nold: canary-old-0123456789-0123456789\n\nnew:canary-new-0123456789-0123456789\n";
    let (old, new) = ("canary-old-0123456789-0123456789", "canary-new-0123456789-0123456789");
    let builder = TestApp::builder().env("LIVEKIT_KEYS", LINES).env("RUST_LOG", "trace");
    let app = builder.without("LIVEKIT_API_KEY").without("LIVEKIT_API_SECRET").start().await;
    let answer = async |key: &str, secret: &str, room: &str| {
        let body = complete(event("room_started", room, 0, json!({}))).to_string().into_bytes();
        let token = sign(key, secret, &body).unwrap();
        app.request("POST", WEBHOOK, &[("Authorization", &token)], &body).await
    };
    assert_taken(&answer("old", old, "RM_1").await, "the first key");
    assert_taken(&answer("new", new, "RM_2").await, "the second key");
    for (key, secret) in [("third", "canary-third-0123456789-0123456789"), ("third", old), ("new", old), ("old", new), (API_KEY, API_SECRET)] {
        answer(key, secret, "RM_3").await.assert_problem(401, "unauthorized");
    }
    assert_eq!(rows(&app, "webhook_events"), 2);
    app.eventually("each refusal is told", async || (app.log().matches("a webhook is refused").count() == 5).then_some(())).await;
    assert!(!app.log().contains("canary"), "{}", app.log());

    // Beside the pair they are more keys, not other ones.
    let app = TestApp::builder().env("LIVEKIT_KEYS", LINES).start().await;
    assert_taken(&app.webhook(event("room_started", "RM_1", 0, json!({}))).await, "the pair");
    let body = complete(event("room_started", "RM_2", 0, json!({}))).to_string().into_bytes();
    let token = sign("new", new, &body).unwrap();
    assert_taken(&app.request("POST", WEBHOOK, &[("Authorization", &token)], &body).await, "a key beside the pair");
}

#[tokio::test]
async fn a_ticket_that_livekit_repeats_is_not_stored() {
    #[derive(QueryableByName)]
    struct Stored {
        #[diesel(sql_type = Text)]
        body: String,
    }
    let app = TestApp::builder().start().await;
    let ticket = app.ticket(json!({"roomName": "room"})).await;
    let url = format!("wss://h/egress-audio?ticket={ticket}&roomName=room");
    let info = json!({"egressId": "EG_1", "track": {"websocketUrl": url}, "streamResults": [{"url": url}], "stream": {"info": [{"url": url}]}});
    deliver(&app, event("egress_updated", "RM_1", 0, json!({"egressInfo": info}))).await;
    let stored: Stored = diesel::sql_query("SELECT body FROM webhook_events").get_result(&mut app.database()).unwrap();
    assert!(stored.body.contains("EG_1") && !stored.body.contains("egress-audio"), "{}", stored.body);
    let secret = ticket.rsplit('.').next().unwrap();
    assert!(!stored.body.contains(secret) && !app.log().contains(secret), "{}", stored.body);
}
