//! Recordings while the database is away.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::databases::Database;
use super::{ANSWERED, builder, replayed, waiting};
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::test_app::{TestApp, read_wav};

pub async fn connect(app: &TestApp, participant: &str) -> EgressPeer {
    EgressPeer::connect(app.addr, &format!("/egress-audio?roomName=room&participant={participant}&trackId=TR_{participant}")).await.unwrap()
}

/// Waits until so much of a participant's audio is in its file.
pub async fn written(app: &TestApp, participant: &str, bytes: usize) {
    let written = async || (app.live(participant).await?["recordedBytes"].as_u64()? == bytes as u64).then_some(());
    app.eventually(&format!("{bytes} bytes of {participant} in the file"), written).await;
}

async fn recording(app: &TestApp, participant: &str) -> Value {
    let mut found: Vec<Value> = app.items("/api/v1/recordings").await.into_iter().filter(|item| item["participant"] == participant).collect();
    assert_eq!(found.len(), 1, "{participant} has one recording: {found:?}\n{}", app.log());
    found.remove(0)
}

/// The segments of a participant's only recording, oldest first: how each ended, and its audio, which its row counts right.
pub async fn segments(app: &TestApp, participant: &str) -> Vec<(String, Vec<u8>)> {
    let recording = recording(app, participant).await;
    assert!(recording["endedAt"].is_string(), "{recording}");
    let segment = |segment: &Value| {
        let pcm = read_wav(&app.audio_dir().join(segment["path"].as_str().unwrap())).1;
        assert_eq!(segment["bytes"].as_u64(), Some(pcm.len() as u64), "{segment}");
        (segment["endReason"].as_str().unwrap_or("open").to_owned(), pcm)
    };
    recording["segments"].as_array().unwrap().iter().map(segment).collect()
}

/// Ana speaks when the database goes, Ben comes while it is away, twice, and is muted for a while.
async fn speak(app: &TestApp, database: &mut Database) -> (EgressPeer, Vec<u8>, [Vec<u8>; 2]) {
    let (ana, ben) = (counter_pcm(48_000, 1), [counter_pcm(24_000, 100_000), counter_pcm(12_000, 200_000)]);
    let mut peer = connect(app, "ana").await;
    let (before, meanwhile) = ana.split_at(96_000);
    peer.send_pcm(before).await.unwrap();
    written(app, "ana", before.len()).await;
    app.eventually("its row is there", async || app.items("/api/v1/recordings").await.first().map(drop)).await;
    replayed(app).await;
    database.take_away();
    peer.send_pcm(meanwhile).await.unwrap();
    let mut first = connect(app, "ben").await;
    first.mute(true).await.unwrap();
    first.send_pcm(&ben[0]).await.unwrap();
    first.mute(false).await.unwrap();
    first.close_and_wait().await;
    let mut second = connect(app, "ben").await;
    second.send_pcm(&ben[1]).await.unwrap();
    second.close_and_wait().await;
    written(app, "ana", ana.len()).await;
    app.eventually("rows wait in the journal", async || waiting(app).await).await;
    (peer, ana, ben)
}

async fn assert_ben(app: &TestApp, ben: &[Vec<u8>; 2]) {
    let closed = |pcm: &Vec<u8>| ("closed".to_owned(), pcm.clone());
    assert!(segments(app, "ben").await == [closed(&ben[0]), closed(&ben[1])], "{}", recording(app, "ben").await);
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    let spans: Vec<&Value> = tracks.iter().filter(|track| track["participant"] == "ben").map(|track| &track["muteSpans"]).collect();
    assert_eq!(spans, [&json!([{"startMs": 0, "endMs": 500}])], "{tracks:?}");
}

pub async fn follow(mut database: Database) {
    let app = builder(&database).start().await;
    let (peer, ana, ben) = speak(&app, &mut database).await;
    peer.close_and_wait().await;
    database.give_back();
    replayed(&app).await;
    assert!(segments(&app, "ana").await == [("closed".to_owned(), ana)], "{}", recording(&app, "ana").await);
    assert_ben(&app, &ben).await;
}

pub async fn survive_kill_9(mut database: Database) {
    let app = builder(&database).start().await;
    let (_peer, ana, ben) = speak(&app, &mut database).await;
    let stopped = app.kill().await;
    database.give_back();
    let app = stopped.restart().await;
    replayed(&app).await;
    assert!(segments(&app, "ana").await == [("crashed".to_owned(), ana)], "{}", recording(&app, "ana").await);
    assert_ben(&app, &ben).await;
    assert!(app.log().contains("closed the segments that an earlier run left open segments=1 "), "only what was open: {}", app.log());
}

pub async fn sigterm_loses_no_row(mut database: Database) {
    let app = builder(&database).start().await;
    let (_peer, ana, ben) = speak(&app, &mut database).await;
    let (status, took, stopped) = app.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", stopped.log);
    assert!(took < Duration::from_secs(4 * 10), "{took:?}");
    database.give_back();
    let app = stopped.restart().await;
    replayed(&app).await;
    assert!(segments(&app, "ana").await == [("shutdown".to_owned(), ana)], "{}", recording(&app, "ana").await);
    assert_ben(&app, &ben).await;
    assert!(!app.log().contains("left open") || stopped.is_late(), "every row was final, or in the journal: {}", app.log());
}

pub async fn recording_goes_on_and_the_api_says_come_again(mut database: Database) {
    let app = builder(&database).start().await;
    let started = json!({"event": "room_started", "id": "EV_1", "room": {"sid": "RM_1", "name": "room"}});
    assert_eq!(app.webhook(started).await.status, 204);
    let (before, meanwhile) = (counter_pcm(24_000, 1), counter_pcm(48_000, 24_001));
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(&before).await.unwrap();
    written(&app, "ana", before.len()).await;
    replayed(&app).await;
    database.take_away();
    // One socket is read while others ask.
    let speaking = async {
        peer.send_realtime(&meanwhile).await.unwrap();
        peer
    };
    let asking = async {
        for path in ["/api/v1/sessions", "/api/v1/sessions/RM_1/transitions", "/api/v1/recordings", "/api/v1/webhook-events"] {
            let start = Instant::now();
            let answer = app.get(path).await;
            // Who only reads is served by SQLite all the same.
            if answer.status != 200 {
                answer.assert_problem(503, "databaseUnavailable");
                assert!(answer.header("retry-after").is_some(), "{answer:?}");
            }
            assert!(start.elapsed() < ANSWERED, "{path}: {:?}", start.elapsed());
        }
        let start = Instant::now();
        let answer = app.post_once("/api/v1/sessions/RM_1/end", json!({})).await;
        answer.assert_problem(503, "databaseUnavailable");
        assert!(answer.header("retry-after").is_some() && start.elapsed() < ANSWERED, "{:?}: {answer:?}", start.elapsed());
    };
    let (peer, ()) = tokio::join!(speaking, asking);
    peer.close_and_wait().await;
    let recorded = [before, meanwhile].concat();
    assert!(read_wav(&app.wav_file()).1 == recorded, "every sample is in the file");
    database.give_back();
    replayed(&app).await;
    assert!(segments(&app, "ana").await == [("closed".to_owned(), recorded)]);
}
