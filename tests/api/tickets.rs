//! `POST /api/v1/tickets`.

use serde_json::{Value, json};

use super::bearer;
use crate::support::egress_peer::EgressPeer;
use crate::support::test_app::TestApp;

#[tokio::test]
async fn a_ticket_comes_with_its_url_and_its_end() {
    let app = TestApp::builder().env("EGRESS_WS_BASE", "wss://media.example.com").start().await;
    let response = app.post("/api/v1/tickets", json!({"roomName": "a room & more", "trackId": "TR_1", "channels": 2})).await;
    let minted = response.json();
    assert_eq!((response.status, minted.as_object().unwrap().len()), (201, 3), "{minted}");
    let ticket = minted["ticket"].as_str().unwrap();
    assert_eq!(minted["url"], format!("wss://media.example.com/egress-audio?roomName=a%20room%20%26%20more&trackId=TR_1&channels=2&ticket={ticket}"));
    let expires = chrono::DateTime::parse_from_rfc3339(minted["expiresAt"].as_str().unwrap()).unwrap();
    let left = expires.signed_duration_since(chrono::Utc::now()).num_seconds();
    assert!((540..=600).contains(&left), "{left} s");
}

#[tokio::test]
async fn without_a_base_the_url_leads_to_where_it_was_asked_for() {
    let app = TestApp::builder().start().await;
    let minted = app.post("/api/v1/tickets", json!({"roomName": "room"})).await.json();
    let url = minted["url"].as_str().unwrap();
    let path = url.strip_prefix(&format!("ws://{}", app.addr)).unwrap_or_else(|| panic!("{url}"));
    let peer = EgressPeer::connect(app.addr, path).await.expect("its ticket opens the door");
    peer.close_and_wait().await;
}

#[tokio::test]
async fn a_url_of_the_longest_names_and_all_parameters_opens() {
    let app = TestApp::builder().start().await;
    // 256 bytes are LiveKit's bound, 1024 ours; each takes three characters of the URL, and six of the ticket.
    for length in [256, 1_024] {
        let name = |first: char| format!("{first}{}", "\u{1}".repeat(length - 1));
        let subject = json!({
            "roomName": name('r'), "participant": name('p'), "trackId": name('t'), "meetingId": name('m'),
            "sampleRate": 48_000, "channels": 2, "groupSeconds": 2.5, "analyse": false, "mix": "mono",
        });
        let minted = app.post("/api/v1/tickets", subject).await.json();
        let url = minted["url"].as_str().unwrap();
        assert!(url.contains("&sampleRate=48000&channels=2&groupSeconds=2.5&analyse=false&mix=mono&ticket="), "{url}");
        assert!(url.len() > 4 * 3 * length, "{} characters", url.len());
        let path = url.strip_prefix(&format!("ws://{}", app.addr)).unwrap();
        let mut peer = EgressPeer::connect(app.addr, path).await.unwrap();
        peer.send_pcm(&[1, 0, 1, 0]).await.unwrap();
        let close = peer.close_and_wait().await;
        assert!(close.close_frame, "{close:?}");
        app.settled().await;
        let items = app.items("/api/v1/recordings").await;
        assert!(items.iter().any(|item| item["participant"] == name('p') && item["roomName"] == name('r')), "{length} bytes: {items:?}");
    }
}

#[tokio::test]
async fn a_bad_request_for_a_ticket_is_told_so() {
    let app = TestApp::builder().start().await;
    let bad = [
        "",
        "{",
        "[]",
        "null",
        "{}",
        r#"{"roomName":""}"#,
        r#"{"roomName":null}"#,
        r#"{"roomName":"r","channel":2}"#,
        r#"{"roomName":"r","channels":3}"#,
        r#"{"roomName":"r","channels":0}"#,
        r#"{"roomName":"r","channels":"2"}"#,
        r#"{"roomName":"r","sampleRate":7999}"#,
        r#"{"roomName":"r","sampleRate":192001}"#,
        r#"{"roomName":"r","kind":"smoke"}"#,
        r#"{"roomName":"r","participant":7}"#,
        r#"{"roomName":"r","groupSeconds":0.09}"#,
        r#"{"roomName":"r","groupSeconds":30.1}"#,
        r#"{"roomName":"r","groupSeconds":"2"}"#,
        r#"{"roomName":"r","analyse":"false"}"#,
        r#"{"roomName":"r","mix":"stereo"}"#,
        r#"{"roomName":"r","mix":1}"#,
    ];
    let ask = async |body: &[u8]| app.request("POST", "/api/v1/tickets", &[("Authorization", &bearer())], body).await;
    for body in bad {
        let response = ask(body.as_bytes()).await;
        assert_eq!(response.status, 400, "{body}");
        response.assert_problem(400, "invalidRequest");
    }
    let too_long = json!({"roomName": "r", "trackId": "x".repeat(1_025)}).to_string();
    ask(too_long.as_bytes()).await.assert_problem(400, "invalidRequest");
    let with_room = |padding: usize| format!("{}{}", r#"{"roomName":"r"}"#, " ".repeat(padding)).into_bytes();
    ask(&with_room(1 << 20)).await.assert_problem(413, "payloadTooLarge");
    let good: Value = ask(&with_room(100)).await.json();
    assert!(good["ticket"].is_string(), "the content type does not matter: {good}");
}
