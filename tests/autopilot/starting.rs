//! Every published track gets one egress.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use livekit_protocol::TrackType;
use serde_json::json;

use super::{autopilot, builder, egresses, recorded, streamed, until};
use crate::support::fake_livekit::{Audio, FakeLiveKit, Fault, Method, Verdict, camera, mic, screen_audio};
use crate::support::test_app::{TestApp, read_wav};

#[tokio::test]
async fn a_published_track_is_recorded_to_the_bit_with_nobodys_help() {
    let (livekit, app) = autopilot().await;
    let room = livekit.start_room("standup").await;
    let track = livekit.publish("standup", "ana", mic()).await;
    let egress = livekit.streaming(&track).await;
    let query = &egress.query;
    let said = ["roomName", "participant", "trackId", "meetingId", "sampleRate", "channels", "groupSeconds"].map(|name| query[name].as_str());
    assert_eq!(said, ["standup", "ana", &track, &room, "48000", "2", "2"]);
    assert!(query.contains_key("ticket"));
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!(shown.len(), 1);
    assert_eq!(
        (shown[0]["egressId"].as_str(), shown[0]["attempts"].as_i64(), shown[0]["node"].as_str()),
        (Some(&*egress.id), Some(1), Some("127.0.0.1"))
    );

    streamed(&livekit, &track, Duration::from_millis(500)).await;
    livekit.unpublish(&track).await;
    let recording = recorded(&app, 1).await;
    assert_eq!((recording["meetingId"].as_str(), recording["segments"][0]["endReason"].as_str()), (Some(&*room), Some("closed")));
    assert_eq!(read_wav(&app.wav_file()).1, livekit.sent_pcm(&track)[0].bytes());
    ended_with_its_track(&app, &track).await;
    assert_eq!(livekit.calls(Method::StartTrackEgress), 1);
}

/// Waits until so many files are there.
pub async fn files(app: &TestApp, count: usize) {
    let there = async || Some(app.wav_files().len()).filter(|found| *found >= count);
    assert_eq!(app.eventually("the files", there).await, count);
}

/// Waits until the last egress of a track has ended because the track has: the webhook told it, or LiveKit when it was asked.
pub async fn ended_with_its_track(app: &TestApp, track: &str) {
    let last = until(app, track, "ENDED").await.pop().unwrap();
    assert!(["trackEnded", "gone"].contains(&last["endReason"].as_str().unwrap()), "{last}");
}

/// Tracks that wait behind a start which LiveKit does not answer: they are never asked for.
async fn waiting_tracks(places: [(&str, &str); 3]) -> (FakeLiveKit, TestApp, Vec<String>) {
    let livekit = FakeLiveKit::start().await;
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__MAX_STARTS", "1").env("LIVE_MEETING__LIVEKIT__REQUEST_TIMEOUT", "2m").start().await;
    livekit.deliver_to(app.addr);
    livekit.fail(Method::StartTrackEgress, Fault::Hang);
    livekit.publish("first", "zoe", mic()).await;
    livekit.eventually("the first start", |livekit| (livekit.calls(Method::StartTrackEgress) == 1).then_some(())).await;
    let mut tracks = Vec::new();
    for (room, identity) in places {
        let track = livekit.publish(room, identity, mic()).await;
        until(&app, &track, "QUEUED").await;
        tracks.push(track);
    }
    (livekit, app, tracks)
}

/// The only row of a track, which has ended without a call, and why.
async fn given_up(app: &TestApp, track: &str) -> String {
    let shown = until(app, track, "ENDED").await;
    assert_eq!((shown.len(), shown[0]["attempts"].as_i64(), shown[0]["endedAt"].is_string()), (1, Some(0), true), "{shown:?}");
    shown[0]["endReason"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn what_ends_while_it_waits_is_never_asked_for() {
    let (livekit, app, tracks) = waiting_tracks([("second", "ana"), ("third", "bob"), ("fourth", "eve")]).await;
    livekit.unpublish(&tracks[0]).await;
    assert_eq!(given_up(&app, &tracks[0]).await, "trackEnded");
    livekit.leave("third", "bob").await;
    assert_eq!(given_up(&app, &tracks[1]).await, "trackEnded");
    // Of the end of the room only the room's own event is heard.
    livekit.filter_webhooks(|event| if event == "room_finished" { Verdict::Deliver } else { Verdict::Drop });
    livekit.finish_room("fourth").await;
    assert_eq!(given_up(&app, &tracks[2]).await, "sessionEnded");
    assert_eq!(livekit.calls(Method::StartTrackEgress), 1);
}

#[tokio::test]
async fn what_ends_while_it_waits_with_no_word_of_it_is_never_asked_for() {
    let (livekit, app, tracks) = waiting_tracks([("second", "ana"), ("third", "bob"), ("fourth", "eve")]).await;
    livekit.lose_webhooks(true);
    livekit.unpublish(&tracks[0]).await;
    livekit.leave("third", "bob").await;
    livekit.finish_room("fourth").await;
    for track in &tracks {
        let reason = given_up(&app, track).await;
        assert!(["trackEnded", "sessionEnded"].contains(&&*reason), "{reason}");
    }
    assert_eq!(livekit.calls(Method::StartTrackEgress), 1);
}

#[tokio::test]
async fn forty_tracks_at_once_are_each_recorded_once_at_the_pace_of_the_nodes() {
    const TRACKS: usize = 40;
    const MAX_STARTS: usize = 6;
    const ANSWER_TIME: Duration = Duration::from_millis(100);
    let livekit = FakeLiveKit::start().await;
    livekit.tune(|knobs| (knobs.nodes, knobs.start_window) = (Some(2), Duration::from_secs(3_600)));
    livekit.fail(Method::StartTrackEgress, Fault::Slow(ANSWER_TIME));
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__MAX_STARTS", MAX_STARTS.to_string()).start().await;
    livekit.deliver_to(app.addr);
    let mut tracks = BTreeSet::new();
    for number in 0..TRACKS {
        tracks.insert(livekit.publish("townhall", &format!("p{number}"), mic().audio(Audio::Silence)).await);
    }
    let refused = |livekit: &FakeLiveKit| livekit.journal().iter().any(|call| call.status == Some(503)).then_some(());
    livekit.eventually("full nodes", refused).await;
    livekit.tune(|knobs| knobs.start_window = Duration::from_millis(500));
    for track in &tracks {
        until(&app, track, "ACTIVE").await;
    }
    let egresses = livekit.egresses();
    let started: BTreeSet<String> = egresses.iter().map(|egress| egress.track.clone()).collect();
    assert_eq!((egresses.len(), &started), (TRACKS, &tracks), "each track has one egress");
    assert_eq!(app.items("/api/v1/egresses?limit=200").await.len(), TRACKS);

    let calls: Vec<Instant> = livekit.journal().iter().filter(|call| call.method == Method::StartTrackEgress).map(|call| call.at).collect();
    // Each call took at least so long, so those that began within that time of each other were under way together.
    let in_flight = |at: Instant| calls.iter().filter(|begun| **begun <= at && at.duration_since(**begun) < ANSWER_TIME).count();
    let most = calls.iter().map(|at| in_flight(*at)).max().unwrap();
    assert!(most <= MAX_STARTS, "{most} starts were in flight");
}

#[tokio::test]
async fn only_what_can_be_heard_is_started() {
    let (livekit, app) = autopilot().await;
    let mut data = mic();
    data.info.set_type(TrackType::Data);
    let never = [livekit.publish("standup", "ana", camera()).await, livekit.publish("standup", "ana", data).await];
    let heard = [livekit.publish("standup", "ana", screen_audio()).await, livekit.publish("standup", "bob", mic()).await];
    for track in &heard {
        until(&app, track, "ACTIVE").await;
    }
    for track in &never {
        assert!(egresses(&app, track).await.is_empty());
        let refused = app.post(&format!("/api/v1/rooms/standup/tracks/{track}/record"), json!({})).await;
        refused.assert_problem(409, "notRecordable");
        assert_eq!(refused.json()["reason"], "notAudio");
    }
    let started: BTreeSet<String> = livekit.egresses().into_iter().map(|egress| egress.track).collect();
    assert_eq!((livekit.calls(Method::StartTrackEgress), started), (2, heard.into()));
}

#[tokio::test]
async fn an_encrypted_track_is_shown_as_such_and_never_started() {
    let (livekit, app) = autopilot().await;
    let track = livekit.publish("standup", "ana", mic().encrypted()).await;
    let shown = until(&app, &track, "SKIPPED").await;
    assert_eq!((shown.len(), shown[0]["endReason"].as_str(), shown[0]["attempts"].as_i64()), (1, Some("encrypted"), Some(0)));
    let refused = app.post(&format!("/api/v1/rooms/standup/tracks/{track}/record"), json!({})).await;
    refused.assert_problem(409, "notRecordable");
    assert_eq!(refused.json()["reason"], "encrypted");
    let plain = livekit.publish("standup", "bob", mic()).await;
    until(&app, &plain, "ACTIVE").await;
    let looks = livekit.calls(Method::ListRooms);
    livekit.eventually("two more looks", |livekit| (livekit.calls(Method::ListRooms) >= looks + 2).then_some(())).await;
    assert_eq!((livekit.calls(Method::StartTrackEgress), egresses(&app, &track).await.len()), (1, 1));
    assert_eq!(app.items("/api/v1/egresses?state=SKIPPED").await.len(), 1);
}

#[tokio::test]
async fn repeated_and_reordered_webhooks_start_a_track_once() {
    let (livekit, app) = autopilot().await;
    livekit.duplicate(true);
    let track = livekit.publish("standup", "ana", mic()).await;
    until(&app, &track, "ACTIVE").await;
    livekit.webhooks_delivered().await;
    assert_eq!((livekit.calls(Method::StartTrackEgress), egresses(&app, &track).await.len()), (1, 1));
    // The end is heard before the beginning.
    livekit.duplicate(false);
    livekit.filter_webhooks(|event| if event == "track_published" { Verdict::HoldUntilReleased } else { Verdict::Deliver });
    let short = livekit.publish("other", "bob", mic()).await;
    livekit.unpublish(&short).await;
    livekit.release_webhooks();
    livekit.webhooks_delivered().await;
    assert_eq!((livekit.calls(Method::StartTrackEgress), egresses(&app, &short).await.len()), (1, 0));
}
