//! What a sender can do wrong: refused before the upgrade, closed after it, and never at the cost of anybody else's audio.

use std::time::{Duration, Instant};

use chrono::{TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use live_meeting::config::Secret;
use live_meeting::ids::RoomName;
use live_meeting::ticket::{TicketKind, TicketMint, TicketSubject};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::egress_peer::{BINARY, CONTINUATION, CloseSeen, EgressPeer, Frame, Handshake, PING, PONG, Refusal, TEXT, counter_pcm, frame};
use crate::support::test_app::{Response, TestApp, parse_response, read_wav};

const TICKET_KEY: &str = "a-ticket-key-for-tests-0123456789";
pub const PATH: &str = "/egress-audio?roomName=room&participant=ana&trackId=TR_1";

async fn with_tickets() -> TestApp {
    TestApp::builder().env("INGEST_TICKET_SECRET", TICKET_KEY).start().await
}

fn subject(room: &str) -> TicketSubject {
    TicketSubject::of_room(RoomName::new(room))
}

/// A ticket that was minted so many seconds ago.
fn ticket(key: &str, kind: TicketKind, age: i64) -> String {
    TicketMint::new(Secret::new(key)).mint(kind, subject("room"), Utc::now() - TimeDelta::seconds(age)).0
}

async fn present(app: &TestApp, ticket: &str) -> Result<EgressPeer, Refusal> {
    EgressPeer::connect(app.addr, &format!("/egress-audio?roomName=room&ticket={ticket}")).await
}

/// The same with a database that is asked in time whether the ticket is spent.
async fn present_in_time(app: &TestApp, ticket: &str) -> Result<EgressPeer, Refusal> {
    app.by_the_databases_word(async || present(app, ticket).await).await
}

/// Asserts that a connection got a problem document instead of its upgrade, and hands over the detail.
#[track_caller]
fn assert_refused(outcome: Result<EgressPeer, Refusal>, status: u16, code: &str, case: &str) -> String {
    let refusal = outcome.map(drop).expect_err(case);
    assert_eq!((refusal.status, refusal.content_type.as_str()), (status, "application/problem+json"), "{case}: {refusal}");
    let document: Value = serde_json::from_str(&refusal.body).unwrap();
    assert_eq!((document["status"].as_u64(), document["code"].as_str()), (Some(status.into()), Some(code)), "{case}: {document}");
    document["detail"].as_str().unwrap().to_owned()
}

/// The only recording of a participant.
pub async fn recording_of(app: &TestApp, participant: &str) -> Value {
    app.settled().await;
    let items = app.items("/api/v1/recordings").await;
    let mut own = items.iter().filter(|item| item["participant"] == participant);
    let found = own.next().unwrap_or_else(|| panic!("no recording of {participant} in {items:?}"));
    assert!(own.next().is_none(), "{items:?}");
    found.clone()
}

pub fn pcm_of(app: &TestApp, recording: &Value) -> Vec<u8> {
    read_wav(&app.audio_dir().join(recording["segments"][0]["path"].as_str().unwrap())).1
}

#[tokio::test]
async fn a_bad_query_is_refused_before_the_upgrade_and_its_fault_is_named() {
    let app = TestApp::builder().open().start().await;
    let bad = [
        ("", "roomName"),
        ("roomName=", "roomName"),
        ("participant=ana&trackId=TR_1", "roomName"),
        ("roomName=r&sampleRate=7999", "sampleRate"),
        ("roomName=r&sampleRate=192001", "sampleRate"),
        ("roomName=r&sampleRate=fast", "sampleRate"),
        ("roomName=r&sampleRate=48000.5", "sampleRate"),
        ("roomName=r&channels=0", "channels"),
        ("roomName=r&channels=3", "channels"),
        ("roomName=r&channels=two", "channels"),
        ("roomName=r&groupSeconds=0.09", "groupSeconds"),
        ("roomName=r&groupSeconds=30.1", "groupSeconds"),
        ("roomName=r&groupSeconds=NaN", "groupSeconds"),
        ("roomName=r&groupSeconds=long", "groupSeconds"),
        ("roomName=r&analyse=no", "analyse must be true or false"),
        ("roomName=r&analyse=0", "analyse must be true or false"),
        ("roomName=r&mix=stereo", "mix must be mono"),
        ("roomName=r&mix=Mono&channels=2", "mix must be mono"),
    ];
    for (query, fault) in bad {
        let outcome = EgressPeer::connect(app.addr, &format!("/egress-audio?{query}")).await;
        let detail = assert_refused(outcome, 400, "invalidRequest", query);
        assert!(detail.contains(fault), "{query}: {detail}");
    }
    assert!(!app.log().contains("track opened"), "{}", app.log());
}

#[tokio::test]
async fn what_is_no_websocket_handshake_gets_a_problem_document() {
    let app = TestApp::builder().open().start().await;
    let (upgrade, version) = ("Connection: Upgrade\r\nUpgrade: websocket\r\n", "Sec-WebSocket-Version: 13\r\n");
    let key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let cases = [
        ("a plain GET", String::new()),
        ("no Connection", format!("Upgrade: websocket\r\n{version}{key}")),
        ("no Upgrade", format!("Connection: Upgrade\r\n{version}{key}")),
        ("no version", format!("{upgrade}{key}")),
        ("another version", format!("{upgrade}Sec-WebSocket-Version: 12\r\n{key}")),
        ("no key", format!("{upgrade}{version}")),
    ];
    for (case, headers) in cases {
        let request = format!("GET {PATH} HTTP/1.1\r\nHost: {}\r\n{headers}\r\n", app.addr);
        let response = problem_of(&app, &request).await;
        assert_eq!(response.status, 400, "{case}");
        response.assert_problem(400, "invalidRequest");
    }
}

/// The problem document that a request is answered with, on a connection that stays open.
async fn problem_of(app: &TestApp, request: &str) -> Response {
    let mut stream = TcpStream::connect(app.addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut raw = Vec::new();
    while !raw.ends_with(b"}") {
        assert_ne!(stream.read_buf(&mut raw).await.unwrap(), 0, "{:?}", String::from_utf8_lossy(&raw));
    }
    parse_response(&raw, false)
}

#[tokio::test]
async fn nothing_but_a_fresh_ticket_of_ours_opens_and_nobody_learns_why() {
    let app = with_tickets().await;
    let good = ticket(TICKET_KEY, TicketKind::Audio, 0);
    let (middle, end) = (good.len() / 2, good.len() - 3);
    let tampered = |at: usize| {
        let letter = if &good[at..=at] == "A" { "B" } else { "A" };
        format!("{}{letter}{}", &good[..at], &good[at + 1..])
    };
    let cases = [
        ("none", String::new()),
        ("no ticket at all", "hello".to_owned()),
        ("forged with another key", ticket("another-ticket-key-0123456789-abc", TicketKind::Audio, 0)),
        ("its payload tampered with", tampered(middle)),
        ("its signature tampered with", tampered(end)),
        ("cut short", good[..good.len() - 1].to_owned()),
        ("expired", ticket(TICKET_KEY, TicketKind::Audio, 601)),
        ("for video", ticket(TICKET_KEY, TicketKind::Video, 0)),
    ];
    let mut details = std::collections::BTreeSet::new();
    for (case, text) in &cases {
        details.insert(assert_refused(present(&app, text).await, 401, "unauthorized", case));
    }
    details.insert(assert_refused(EgressPeer::connect(app.addr, PATH).await, 401, "unauthorized", "no parameter"));
    assert_eq!(details.len(), 1, "{details:?}");
    assert!(app.wav_files().is_empty() && !app.log().contains("track opened"), "{}", app.log());
    present(&app, &good).await.expect("untouched, it opens");
    present(&app, &ticket(TICKET_KEY, TicketKind::Audio, 590)).await.expect("ten minutes are not over");
}

#[tokio::test]
async fn a_spent_ticket_stays_spent_after_a_restart_and_after_a_kill() {
    let app = with_tickets().await;
    let [first, second] = [0, 1].map(|age| ticket(TICKET_KEY, TicketKind::Audio, age));
    let mut peer = present(&app, &first).await.unwrap();
    peer.send_pcm(&counter_pcm(480, 1)).await.unwrap();
    peer.close_and_wait().await;
    assert_refused(present_in_time(&app, &first).await, 401, "unauthorized", "at once");
    let (_, _, stopped) = app.terminate().await;

    let app = stopped.restart().await;
    assert_refused(present_in_time(&app, &first).await, 401, "unauthorized", "after a restart");
    let mut peer = present(&app, &second).await.unwrap();
    peer.send_pcm(&counter_pcm(480, 1)).await.unwrap();
    app.eventually("its row is there", async || (app.items("/api/v1/recordings").await.len() == 2).then_some(())).await;
    let app = app.kill().await.restart().await;
    for (case, spent) in [("the first", &first), ("the one that was live", &second)] {
        assert_refused(present_in_time(&app, spent).await, 401, "unauthorized", case);
    }
}

#[tokio::test]
async fn ten_connections_with_one_ticket_are_one_connection() {
    let app = with_tickets().await;
    let ticket = ticket(TICKET_KEY, TicketKind::Audio, 0);
    let path = format!("/egress-audio?roomName=room&ticket={ticket}");
    let attempts = (0..10).map(|_| {
        let (addr, path) = (app.addr, path.clone());
        tokio::spawn(async move { EgressPeer::connect(addr, &path).await })
    });
    let mut opened = Vec::new();
    for attempt in attempts.collect::<Vec<_>>() {
        match attempt.await.unwrap() {
            Ok(peer) => opened.push(peer),
            Err(refusal) => drop(assert_refused(Err(refusal), 401, "unauthorized", "the others")),
        }
    }
    assert_eq!(opened.len(), 1);
}

#[tokio::test]
async fn what_a_ticket_says_wins_over_the_query() {
    let app = with_tickets().await;
    let subject =
        json!({"roomName": "true-room", "participant": "ana", "trackId": "TR_true", "meetingId": "RM_true", "sampleRate": 44_100, "channels": 1});
    let ticket = app.ticket(subject).await;
    let lies = "roomName=false&participant=eve&trackId=TR_false&meetingId=RM_false&sampleRate=48000&channels=2";
    let pcm = counter_pcm(1_000, 1);
    let mut peer = EgressPeer::connect(app.addr, &format!("/egress-audio?{lies}&ticket={ticket}")).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    peer.close_and_wait().await;
    let (spec, recorded) = read_wav(&app.wav_file());
    assert_eq!((spec.sample_rate, spec.channels, recorded == pcm), (44_100, 1, true));
    let name = app.wav_file().strip_prefix(app.audio_dir()).unwrap().to_str().unwrap().to_owned();
    assert!(name.starts_with("RM_true/") && name.ends_with("_true-room_ana_TR_true.wav"), "{name}");
    let recording = recording_of(&app, "ana").await;
    assert_eq!(
        (&recording["roomName"], &recording["trackSid"], &recording["meetingId"]),
        (&json!("true-room"), &json!("TR_true"), &json!("RM_true"))
    );
    let segment = &recording["segments"][0];
    assert_eq!((segment["sampleRate"].as_u64(), segment["channels"].as_u64(), segment["frames"].as_u64()), (Some(44_100), Some(1), Some(2_000)));
}

#[tokio::test]
async fn the_upgrade_does_not_wait_for_a_locked_database_and_rows_follow() {
    let app = with_tickets().await;
    let mut database = app.database();
    database.batch_execute("BEGIN EXCLUSIVE").unwrap();
    let mut waits = Vec::new();
    for number in 0..5 {
        let ticket = TicketMint::new(Secret::new(TICKET_KEY)).mint(TicketKind::Audio, subject("room"), Utc::now()).0;
        let start = Instant::now();
        let path = format!("/egress-audio?roomName=room&participant=p{number}&ticket={ticket}");
        let mut peer = EgressPeer::connect(app.addr, &path).await.unwrap();
        waits.push(start.elapsed());
        peer.send_pcm(&counter_pcm(24_000, number)).await.unwrap();
        if number == 0 {
            peer.close_and_wait().await;
        } else {
            peer.vanish().await;
        }
    }
    // 100 ms are promised; four times that decide, and a busy machine may spoil two.
    waits.sort();
    assert!(waits[2] < Duration::from_millis(400), "{waits:?}");
    app.eventually("five files", async || (app.wav_files().len() == 5).then_some(())).await;
    assert!(app.items("/api/v1/recordings").await.is_empty(), "the lock holds");
    database.batch_execute("COMMIT").unwrap();
    let all_ended = async || {
        let items = app.items("/api/v1/recordings").await;
        (items.len() == 5 && items.iter().all(|item| item["endedAt"].is_string())).then_some(())
    };
    app.eventually("every row follows", all_ended).await;
    for number in 0..5 {
        let recording = recording_of(&app, &format!("p{number}")).await;
        assert!(pcm_of(&app, &recording) == counter_pcm(24_000, number), "track {number}");
        assert_eq!(recording["segments"][0]["endReason"], if number == 0 { "closed" } else { "lost" });
    }
}

#[tokio::test]
async fn violations_close_with_their_code_and_keep_what_came_before() {
    let app = TestApp::builder().open().start().await;
    let data = |opcode, fin, length| frame(opcode, fin, &vec![b'x'; length], true);
    let cases: [(&str, u16, Vec<u8>); 18] = [
        ("a frame over 64 KiB", 1009, data(BINARY, true, 65_537)),
        ("a binary message over its cap in fragments", 1009, [data(BINARY, false, 60_000), data(CONTINUATION, true, 6_000)].concat()),
        ("a text over 4 KiB", 1009, data(TEXT, true, 4_097)),
        ("a text over its cap in fragments", 1009, [data(TEXT, false, 3_000), data(CONTINUATION, true, 2_000)].concat()),
        ("an unmasked frame", 1002, frame(BINARY, true, b"four", false)),
        ("the first reserved bit", 1002, data(BINARY | 0x40, true, 4)),
        ("the last reserved bit", 1002, data(BINARY | 0x10, true, 4)),
        ("an unknown data opcode", 1002, data(3, true, 4)),
        ("an unknown control opcode", 1002, data(0xB, true, 4)),
        ("a continuation of nothing", 1002, data(CONTINUATION, true, 4)),
        ("a message inside another", 1002, [data(BINARY, false, 4), data(BINARY, true, 4)].concat()),
        ("a ping in fragments", 1002, data(PING, false, 4)),
        ("a ping of 126 bytes", 1002, data(PING, true, 126)),
        ("65 fragments", 1002, [vec![data(BINARY, false, 10)], vec![data(CONTINUATION, false, 10); 64]].concat().concat()),
        ("an empty first fragment", 1002, data(BINARY, false, 0)),
        ("an empty fragment", 1002, [data(BINARY, false, 4), data(CONTINUATION, false, 0)].concat()),
        ("a text that is not UTF-8", 1002, frame(TEXT, true, &[0xff, 0xfe], true)),
        ("a text in fragments that is not UTF-8", 1002, [frame(TEXT, false, &[0xff], true), frame(CONTINUATION, true, &[0xfe], true)].concat()),
    ];
    let app = &app;
    let all = cases.into_iter().zip(1..).map(async |((case, code, bytes), seed)| {
        let (participant, pcm) = (format!("p{seed}"), counter_pcm(5_000, seed));
        let mut peer = EgressPeer::connect(app.addr, &format!("/egress-audio?roomName=room&participant={participant}")).await.unwrap();
        peer.send_pcm(&pcm).await.unwrap();
        peer.send_raw(&bytes).await.ok(); // the server may have closed at the header
        let close = peer.expect_close().await;
        assert_eq!((close.close_frame, close.code), (true, Some(code)), "{case}: {close:?}");
        // Final when the Close arrives: no waiting from here on.
        let recording = recording_of(app, &participant).await;
        assert_eq!(recording["segments"][0]["endReason"], "violation", "{case}");
        assert!(pcm_of(app, &recording) == pcm, "{case}");
    });
    futures_util::future::join_all(all).await;
}

#[tokio::test]
async fn unknown_texts_are_counted_pings_are_answered_and_audio_goes_on() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(9_600, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    for (part, text) in pcm.chunks(9_600).zip(["hello", "", "{}", r#"{"muted":"yes"}"#]) {
        peer.send_pcm(part).await.unwrap();
        peer.send_text(text).await.unwrap();
    }
    for payload in [&b"any payload"[..], b"", &[0xff; 125]] {
        peer.send_raw(&frame(PING, true, payload, true)).await.unwrap();
        assert_eq!(peer.next_frame().await, Some(Frame { opcode: PONG, fin: true, payload: payload.to_vec() }));
    }
    app.received("ana", pcm.len()).await;
    let live = app.live("ana").await.unwrap();
    assert_eq!((live["unknownTexts"].as_u64(), live["muted"].as_bool()), (Some(4), Some(false)), "{live}");
    let CloseSeen { close_frame, code, .. } = peer.close_and_wait().await;
    assert_eq!((close_frame, code), (true, None));
    assert!(read_wav(&app.wav_file()).1 == pcm);
}

#[tokio::test]
async fn no_extension_and_no_subprotocol_is_accepted() {
    let app = TestApp::builder().open().start().await;
    let headers = [("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"), ("Sec-WebSocket-Protocol", "audio")];
    let offering = Handshake { headers: &headers, ..Handshake::default() };
    // The peer fails if the 101 chooses any.
    EgressPeer::connect_with(app.addr, PATH, offering).await.unwrap().close_and_wait().await;
}
