//! LiveKit and the server together: what happens in a room is known and recorded.

use std::time::Duration;

use livekit_api::services::egress::{EgressClient, TrackEgressOutput};
use serde_json::json;

use crate::support::fake_livekit::{FakeLiveKit, Fate, mic, person};
use crate::support::test_app::{API_KEY, API_SECRET, TestApp, read_wav};

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
