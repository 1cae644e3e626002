//! LiveKit and the server together: what happens in a room is known and recorded.

mod converging;
mod crashing;
mod looking;
mod operators;
mod reconciling;
mod restarting;
mod rules;
mod servers;
mod starting;
mod troubles;

use std::time::Duration;

use livekit_api::services::egress::{EgressClient, TrackEgressOutput};
use serde_json::{Value, json};

use crate::support::fake_livekit::{FakeLiveKit, Fate, OUR_NAME, mic, person};
use crate::support::test_app::{API_KEY, API_SECRET, Builder, TestApp, read_wav};

/// A server that records by itself what is published at this LiveKit, and looks at it each second.
fn builder(livekit: &FakeLiveKit) -> Builder {
    TestApp::builder()
        .env("LIVEKIT_URL", livekit.ws_url())
        .env("EGRESS_WS_BASE", format!("ws://{OUR_NAME}"))
        .env("LIVE_MEETING__LIVEKIT__RECONCILE_INTERVAL", "1s")
}

/// A LiveKit whose audio flows at four times real time, and a server beside it.
async fn autopilot() -> (FakeLiveKit, TestApp) {
    let livekit = FakeLiveKit::start().await;
    livekit.pace(4.0);
    let app = builder(&livekit).start().await;
    livekit.deliver_to(app.addr);
    (livekit, app)
}

/// The egresses of a track, oldest first.
async fn egresses(app: &TestApp, track: &str) -> Vec<Value> {
    let mut items = app.items(&format!("/api/v1/egresses?trackSid={track}")).await;
    items.reverse();
    items
}

/// Waits until the last egress of a track is in a state, and returns all of them.
async fn until(app: &TestApp, track: &str, state: &str) -> Vec<Value> {
    app.eventually(&format!("{state} of {track}"), async || {
        let egresses = egresses(app, track).await;
        (egresses.last()?["state"] == state).then_some(egresses)
    })
    .await
}

/// Waits until so much of a track's audio has been streamed in all of its egresses together.
async fn streamed(livekit: &FakeLiveKit, track: &str, audio: Duration) {
    let enough = |livekit: &FakeLiveKit| (livekit.sent_pcm(track).iter().map(|sent| sent.duration()).sum::<Duration>() >= audio).then_some(());
    livekit.eventually("audio is streamed", enough).await;
}

/// The only recording that has ended, with so many segments.
async fn recorded(app: &TestApp, segments: usize) -> Value {
    app.eventually("the recording's end", async || {
        let mut recordings = app.items("/api/v1/recordings").await;
        assert!(recordings.len() <= 1, "{recordings:?}");
        let recording = recordings.pop()?;
        (recording["endedAt"].is_string() && recording["segments"].as_array()?.len() == segments).then_some(recording)
    })
    .await
}

#[tokio::test]
async fn a_room_is_known_by_its_webhooks_and_an_operators_egress_is_recorded_to_the_bit() {
    let livekit = FakeLiveKit::start().await;
    let app = TestApp::builder().env("LIVEKIT_URL", livekit.ws_url()).start().await;
    livekit.deliver_to(app.addr);
    livekit.pace(4.0);

    let room = livekit.start_room("standup").await;
    livekit.join("standup", person("ana").name("Ana")).await;
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.webhooks_delivered().await;
    let session = app.get_json(&format!("/api/v1/sessions/{room}")).await;
    assert_eq!((session["status"].as_str(), session["participants"][0]["identity"].as_str()), (Some("ACTIVE"), Some("ana")));
    let tracks = app.items(&format!("/api/v1/sessions/{room}/tracks")).await;
    assert_eq!((tracks.len(), tracks[0]["sid"].as_str(), tracks[0]["source"].as_str()), (1, Some(&*track), Some("MICROPHONE")));

    let ticket = app.ticket(json!({"roomName": "standup", "participant": "ana", "trackId": track, "meetingId": room})).await;
    let url = format!("ws://{}/egress-audio?roomName=standup&participant=ana&trackId={track}&ticket={ticket}", app.addr);
    let client = EgressClient::with_api_key(&livekit.url(), API_KEY, API_SECRET).with_failover(false);
    client.start_track_egress("standup", TrackEgressOutput::WebSocket(url), &track).await.unwrap();
    livekit
        .eventually("half a second of audio", |livekit| (livekit.sent_pcm(&track).first()?.duration() >= Duration::from_millis(500)).then_some(()))
        .await;
    livekit.unpublish(&track).await;
    livekit.eventually("the egress's end", |livekit| livekit.active_for(&track).is_empty().then_some(())).await;

    let sealed = async || app.items("/api/v1/recordings").await.into_iter().find(|recording| recording["endedAt"].is_string());
    let recording = app.eventually("the recording's end", sealed).await;
    assert_eq!((recording["meetingId"].as_str(), recording["segments"][0]["endReason"].as_str()), (Some(&*room), Some("closed")));
    assert_eq!(read_wav(&app.wav_file()).1, livekit.sent_pcm(&track)[0].bytes());
    livekit.webhooks_delivered().await;
    assert!(livekit.deliveries().iter().all(|delivery| delivery.fate == Fate::Answered(204)), "{:?}", livekit.deliveries());
}
