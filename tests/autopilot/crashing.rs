//! A server that died or was stopped records again what goes on, when it is back.

use std::time::Duration;

use serde_json::Value;

use super::looking::{assert_joined, end_reasons, ended, sent, starts, streaming_anew};
use super::{autopilot, egresses, streamed, until};
use crate::support::fake_livekit::{EgressSeen, FakeLiveKit, Fault, Method, mic};
use crate::support::test_app::{Stopped, TestApp};

const SOME_AUDIO: Duration = Duration::from_millis(300);
const PEOPLE: [&str; 5] = ["ana", "bo", "cy", "di", "ed"];

/// Five tracks in two rooms, of which no webhook told, and their egresses.
async fn five_tracks(livekit: &FakeLiveKit, app: &TestApp) -> Vec<(String, EgressSeen)> {
    livekit.pace(1.0);
    livekit.lose_webhooks(true);
    let mut tracks = Vec::new();
    for (number, identity) in PEOPLE.into_iter().enumerate() {
        tracks.push(livekit.publish(["standup", "retro"][number % 2], identity, mic()).await);
    }
    let mut streaming = Vec::new();
    for track in tracks {
        let egress = livekit.streaming(&track).await;
        streamed(livekit, &track, SOME_AUDIO).await;
        until(app, &track, "ACTIVE").await;
        streaming.push((track, egress));
    }
    let written = async || {
        let recordings = app.items("/api/v1/recordings").await;
        let all = recordings.iter().all(|recording| recording["segments"][0]["bytes"].as_u64().is_some_and(|bytes| bytes > 0));
        (recordings.len() == PEOPLE.len() && all).then_some(())
    };
    app.eventually("all of them in files", written).await;
    streaming
}

async fn restarted(livekit: &FakeLiveKit, stopped: &Stopped) -> TestApp {
    // The next server has another port, which LiveKit has to be told.
    livekit.tune(|knobs| knobs.dial_delay = Duration::from_millis(200));
    let app = stopped.restart().await;
    livekit.deliver_to(app.addr);
    app
}

/// Every track goes on in its own recording, whose first segment ended so. 10 s are promised; two times that is how long is waited for each.
async fn assert_goes_on(livekit: &FakeLiveKit, app: &TestApp, tracks: &[(String, EgressSeen)], first_end: &str) {
    let before: Vec<&str> = tracks.iter().map(|(_, egress)| &*egress.id).collect();
    for (track, first) in tracks {
        let again = streaming_anew(livekit, track, &before).await;
        assert_ne!(again.query["ticket"], first.query["ticket"]);
        streamed(livekit, track, livekit.sent_pcm(&first.id)[0].duration() + SOME_AUDIO).await;
        until(app, track, "ACTIVE").await;
    }
    for ((track, _), identity) in tracks.iter().zip(PEOPLE) {
        livekit.unpublish(track).await;
        let recording: Value = ended(app, identity, 2).await;
        assert_eq!(end_reasons(&recording), [first_end, "closed"]);
        assert_joined(app, &recording, &sent(livekit, track)).await;
    }
    assert_eq!(app.items("/api/v1/recordings").await.len(), tracks.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i6_after_a_crash_every_live_track_is_recorded_again_without_any_webhook() {
    let (livekit, app) = autopilot().await;
    let tracks = five_tracks(&livekit, &app).await;
    let stopped = app.kill().await;
    let app = restarted(&livekit, &stopped).await;
    assert_goes_on(&livekit, &app, &tracks, "crashed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_stopped_asks_for_nothing_more_and_goes_on_when_it_is_back() {
    let (livekit, app) = autopilot().await;
    let tracks = five_tracks(&livekit, &app).await;
    livekit.lose_webhooks(false);
    let asked: usize = tracks.iter().map(|(track, _)| starts(&livekit, track).len()).sum();
    let (status, _, stopped) = app.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", stopped.log);
    assert_eq!(tracks.iter().map(|(track, _)| starts(&livekit, track).len()).sum::<usize>(), asked, "what ends with the server is not replaced");
    livekit.lose_webhooks(true);
    let app = restarted(&livekit, &stopped).await;
    assert_goes_on(&livekit, &app, &tracks, "shutdown").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_opens_its_port_without_livekit_closes_nothing_and_goes_on_when_it_answers() {
    let (livekit, app) = autopilot().await;
    let tracks = five_tracks(&livekit, &app).await;
    let stopped = app.kill().await;
    livekit.unreachable().await;
    let app = restarted(&livekit, &stopped).await;
    app.logged("cannot be compared").await;
    // The first look came to nothing; the restarts are asked for all the same, and put off.
    for (track, _) in &tracks {
        let put_off = async || {
            let shown = egresses(&app, track).await;
            assert!(
                shown.iter().all(|egress| !["gone", "trackEnded", "sessionEnded"].contains(&egress["endReason"].as_str().unwrap_or(""))),
                "{shown:?}"
            );
            (shown.last()?["attempts"].as_i64()? > 0 && shown.last()?["restarts"].as_i64()? > 0).then_some(())
        };
        app.eventually("a start that is put off", put_off).await;
    }
    assert_eq!(app.items("/api/v1/sessions?status=ACTIVE").await.len(), 2);
    livekit.reachable();
    assert_goes_on(&livekit, &app, &tracks, "crashed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_livekit_that_does_not_list_its_rooms_in_time_holds_no_track_up() {
    let (livekit, app) = autopilot().await;
    let tracks = five_tracks(&livekit, &app).await;
    let stopped = app.kill().await;
    livekit.fail(Method::ListRooms, Fault::Hang);
    let app = restarted(&livekit, &stopped).await;
    assert_goes_on(&livekit, &app, &tracks, "crashed").await;
}

#[tokio::test]
async fn a_start_that_waited_for_its_turn_is_not_forgotten_by_a_crash() {
    let (livekit, app) = autopilot().await;
    livekit.nodes(0);
    let track = livekit.publish("standup", "ana", mic()).await;
    app.eventually("a refused try", async || (egresses(&app, &track).await.first()?["attempts"].as_i64()? > 0).then_some(())).await;
    let stopped = app.kill().await;
    let app = restarted(&livekit, &stopped).await;
    livekit.nodes(1);
    livekit.streaming(&track).await;
    assert_eq!(until(&app, &track, "ACTIVE").await.len(), 1);
}
