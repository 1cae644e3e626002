//! How tracks of video end: by a kill, by a signal, by silence, by a disk.

use rustix::process::Signal;
use serde_json::json;

use super::{connect, messages, open_recording, path, paths, recording, send};
use crate::support::egress_peer::EgressPeer;
use crate::support::test_app::TestApp;
use crate::support::video::{Clip, clips, declared_pictures, expected, files, pictures, probe};

/// Every clip's first pictures on a connection of its own, all of them in files, and the rows of those.
async fn half_played(app: &TestApp, count: usize) -> Vec<(&'static Clip, EgressPeer)> {
    let mut peers = Vec::new();
    for clip in clips() {
        let mut peer = connect(app, &path(clip.codec).replace("ana", clip.codec)).await;
        send(&mut peer, &clip.messages[..count]).await;
        let bytes = clip.messages[..count].concat().len();
        app.eventually("all of it in the file", async || app.live(clip.codec).await.filter(|live| live["recordedBytes"] == bytes)).await;
        open_recording(app, clip.codec).await;
        peers.push((clip, peer));
    }
    peers
}

#[tokio::test]
async fn d1_a_kill_leaves_files_that_ffprobe_opens_before_any_repair_and_rows_that_the_next_start_closes() {
    let app = TestApp::builder().open().start().await;
    let peers = half_played(&app, 60).await;
    let stopped = app.kill().await;
    for file in files(stopped.dir.path()) {
        let codec = clips().iter().find(|clip| file.to_string_lossy().contains(&format!("_TR_{}.", clip.codec))).expect("a clip's").codec;
        assert_eq!(probe(&file), expected(codec, 60), "before any repair");
    }
    // As a kill in the middle of an append leaves them: a picture that is torn, and one that the header does not count.
    for (clip, _) in peers.iter().filter(|(clip, _)| clip.codec != "h264") {
        let file = files(stopped.dir.path()).into_iter().find(|file| file.to_string_lossy().contains(clip.codec)).expect("its file");
        let mut bytes = std::fs::read(&file).unwrap();
        bytes.extend([&(clip.messages[60].len() as u32).to_le_bytes()[..], &99_999u64.to_le_bytes(), &clip.messages[60]].concat());
        bytes.extend([&2_000u32.to_le_bytes()[..], &100_000u64.to_le_bytes(), &[0x11; 700]].concat());
        std::fs::write(&file, bytes).unwrap();
    }
    let app = stopped.restart().await;
    for (clip, _) in &peers {
        let recording = recording(&app, clip.codec).await;
        let (segment, file) = (&recording["segments"][0], std::fs::read(&paths(&app, &recording)[0]).unwrap());
        let count = if clip.codec == "h264" { 60 } else { 61 };
        assert_eq!((&segment["endReason"], &segment["frames"], &segment["bytes"]), (&json!("crashed"), &json!(count), &json!(file.len())));
        assert!(segment["endedAt"].is_string() && recording["endedAt"].is_string(), "{recording}");
        assert!(messages(clip, &file) == clip.messages[..count].concat(), "{}", clip.codec);
        if clip.codec != "h264" {
            assert_eq!((declared_pictures(&file) as usize, pictures(&file).len()), (count, count));
        }
        assert_eq!(probe(&paths(&app, &recording)[0]), expected(clip.codec, count));
    }
}

#[tokio::test]
async fn i7_sigterm_seals_video_and_tells_each_sender() {
    let app = TestApp::builder().open().start().await;
    let peers = half_played(&app, 40).await;
    let (closes, (status, _, stopped)) = tokio::join!(
        async {
            let mut closes = Vec::new();
            for (_, peer) in peers {
                closes.push(peer.expect_close().await);
            }
            closes
        },
        app.terminate()
    );
    assert_eq!(status.code(), Some(0));
    assert!(closes.iter().all(|close| close.close_frame && close.code == Some(1012) && close.reason == "shutdown"), "{closes:?}");
    let app = stopped.restart().await;
    for clip in clips() {
        let recording = recording(&app, clip.codec).await;
        let segment = &recording["segments"][0];
        assert_eq!((&segment["endReason"], &segment["frames"]), (&json!("shutdown"), &json!(40)), "{recording}");
        assert_eq!(probe(&paths(&app, &recording)[0]), expected(clip.codec, 40));
    }
}

#[tokio::test]
async fn a_sender_that_vanishes_is_sealed_as_lost() {
    let app = TestApp::builder().open().start().await;
    for (clip, peer) in half_played(&app, 20).await {
        peer.vanish().await;
        let sealed = async || Some(recording(&app, clip.codec).await["segments"][0].clone()).filter(|segment| segment["endedAt"].is_string());
        let segment = app.eventually("the end of the row", sealed).await;
        assert_eq!((&segment["endReason"], &segment["frames"]), (&json!("lost"), &json!(20)), "{segment}");
    }
}

#[tokio::test]
async fn i3_a_silent_sender_is_closed_and_a_stalled_one_gives_way() {
    let app = TestApp::builder().open().env("LIVE_MEETING__INGEST__STALL_AFTER", "1s").env("LIVE_MEETING__INGEST__IDLE_TIMEOUT", "5s").start().await;
    let Some((clip, old)) = half_played(&app, 20).await.pop() else { return };
    app.eventually("the stall", async || app.live(clip.codec).await.filter(|live| live["stalled"] == true)).await;
    let mut new = connect(&app, &path(clip.codec).replace("ana", clip.codec)).await;
    let close = old.expect_close().await;
    assert_eq!((close.code, close.reason.as_str()), (Some(1008), "superseded"), "{close:?}");
    send(&mut new, &clip.messages[..10]).await;
    let close = new.expect_close().await;
    assert_eq!((close.code, close.reason.as_str()), (Some(1008), "idle"), "{close:?}");
    let segments = recording(&app, clip.codec).await["segments"].clone();
    assert_eq!((&segments[0]["endReason"], &segments[1]["endReason"]), (&json!("superseded"), &json!("idle")), "{segments}");
}

#[tokio::test]
async fn a_stopped_process_loses_no_message() {
    let app = TestApp::builder().open().start().await;
    let peers = half_played(&app, 10).await;
    app.signal(Signal::STOP);
    let mut sending = Vec::new();
    for (clip, mut peer) in peers {
        sending.push(tokio::spawn(async move {
            send(&mut peer, &clip.messages[10..]).await;
            (clip, peer.close_and_wait().await)
        }));
    }
    app.signal(Signal::CONT);
    for sent in sending {
        let (clip, close) = sent.await.unwrap();
        assert!(close.close_frame, "{close:?}");
        let file = std::fs::read(&paths(&app, &recording(&app, clip.codec).await)[0]).unwrap();
        assert!(messages(clip, &file) == clip.messages.concat(), "{}", clip.codec);
    }
}
