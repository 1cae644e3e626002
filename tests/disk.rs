//! Disks that are full, and that refuse (D6, F11).

mod calls;
mod faults;
mod full;

use std::path::PathBuf;

use serde_json::Value;

use crate::support::egress_peer::EgressPeer;
use crate::support::test_app::{Builder, TestApp, read_wav};

const STEREO_FRAME: usize = 4;

/// A server that takes audio as fast as it comes and refuses nothing for want of space.
fn eager() -> Builder {
    TestApp::builder().open().env("LIVE_MEETING__INGEST__MAX_SPEED", "1000").env("LIVE_MEETING__STORAGE__MIN_FREE", "0")
}

async fn connect(app: &TestApp, participant: &str) -> EgressPeer {
    let path = format!("/egress-audio?roomName=room&participant={participant}&trackId=TR_{participant}&meetingId=RM");
    EgressPeer::connect(app.addr, &path).await.unwrap_or_else(|refusal| panic!("{refusal}; the log:\n{}", app.log()))
}

/// The one recording of a participant.
async fn recording(app: &TestApp, participant: &str) -> Value {
    app.settled().await;
    let all = app.items("/api/v1/recordings").await;
    let mut of_participant = all.into_iter().filter(|recording| recording["participant"] == participant);
    let recording = of_participant.next().expect("a recording");
    assert!(of_participant.next().is_none(), "one recording");
    recording
}

/// The files of a recording, in their order.
fn files(app: &TestApp, recording: &Value) -> Vec<PathBuf> {
    let segments = recording["segments"].as_array().expect("segments");
    segments.iter().map(|segment| app.audio_dir().join(segment["path"].as_str().expect("a path"))).collect()
}

fn pcm(files: &[PathBuf]) -> Vec<u8> {
    files.iter().flat_map(|file| read_wav(file).1).collect()
}

/// What was sent, with zeros where the segment's gaps are; and how many bytes those are.
fn with_holes(sent: &[u8], segment: &Value) -> (Vec<u8>, usize) {
    let (mut expected, mut lost) = (sent.to_vec(), 0);
    for gap in segment["gaps"].as_array().expect("gaps") {
        assert_eq!(gap["reason"], "overload", "{gap}");
        let [start, frames] = ["startFrame", "frames"].map(|key| gap[key].as_u64().expect("a number") as usize * STEREO_FRAME);
        expected[start..][..frames].fill(0);
        lost += frames;
    }
    (expected, lost)
}

/// Waits until everything that arrived of a participant is in its file.
async fn all_recorded(app: &TestApp, participant: &str) {
    let recorded = async || {
        let live = app.live(participant).await?;
        (live["bytes"] != 0 && live["recordedBytes"] == live["bytes"]).then_some(())
    };
    app.eventually(&format!("all of {participant} is recorded"), recorded).await;
}

/// A number of `GET /metrics`.
async fn metric(app: &TestApp, name: &str) -> f64 {
    app.metric(name).await
}

/// What `/health` has against the server.
async fn reasons(app: &TestApp) -> Vec<String> {
    let health = app.request("GET", "/health", &[], b"").await.json();
    health["reasons"].as_array().map(|reasons| reasons.iter().map(|reason| reason.as_str().expect("words").to_owned()).collect()).unwrap_or_default()
}
