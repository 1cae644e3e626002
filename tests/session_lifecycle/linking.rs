//! How recordings and sessions find each other.

use serde_json::{Value, json};

use super::{DAWN, deliver, event, of_anas_microphone, session};
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::test_app::TestApp;

/// Records a little and closes, as a track of `room`.
async fn record(app: &TestApp, query: &str) {
    let mut peer = EgressPeer::connect(app.addr, &format!("/egress-audio?roomName=room&{query}")).await.unwrap();
    peer.send_pcm(&counter_pcm(480, 1)).await.unwrap();
    peer.close_and_wait().await;
    app.settled().await;
}

fn now() -> i64 {
    chrono::Utc::now().timestamp() - DAWN
}

async fn tracks_of(app: &TestApp, meeting: &str) -> Vec<Value> {
    app.items(&format!("/api/v1/recordings?meetingId={meeting}")).await.into_iter().map(|recording| recording["trackSid"].clone()).collect()
}

#[tokio::test]
async fn recordings_made_before_their_session_are_found_by_it_and_stay_where_they_are() {
    let app = TestApp::builder().open().start().await;
    record(&app, "trackId=TR_1&participant=ana").await;
    let mut open = EgressPeer::connect(app.addr, "/egress-audio?roomName=room&trackId=TR_2").await.unwrap();
    open.send_pcm(&counter_pcm(480, 1)).await.unwrap();
    app.eventually("both have rows", async || (app.items("/api/v1/recordings").await.len() == 2).then_some(())).await;
    let (before, files) = (app.items("/api/v1/recordings?meetingId=room").await, app.wav_files());
    assert!(tracks_of(&app, "RM_1").await.is_empty());
    // The track is known from both sides, and is one row.
    deliver(&app, event("track_published", "RM_1", now(), of_anas_microphone())).await;
    let mut after = app.items("/api/v1/recordings?meetingId=RM_1").await;
    let id = session(&app, "RM_1").await["id"].clone();
    for (after, before) in after.iter_mut().zip(&before) {
        assert_eq!(after["sessionId"], id);
        (after["sessionId"], after["trackId"]) = (Value::Null, before["trackId"].clone());
    }
    assert_eq!((after, app.wav_files()), (before.clone(), files), "nothing else has changed");
    let tracks: Vec<Value> = app.items("/api/v1/sessions/RM_1/tracks").await.into_iter().map(|track| track["sid"].clone()).collect();
    assert_eq!(tracks.len(), 2, "{tracks:?}");
    open.close_and_wait().await;
    app.settled().await;
    assert_eq!(app.items("/api/v1/recordings?meetingId=room").await.len(), 2, "they are found by their old name too");
}

#[tokio::test]
async fn a_connection_is_of_the_active_session_unless_it_names_a_meeting() {
    let app = TestApp::builder().open().start().await;
    deliver(&app, event("room_started", "RM_1", now(), json!({}))).await;
    record(&app, "trackId=TR_1").await;
    record(&app, "trackId=TR_2&meetingId=mine").await;
    let directories = || app.wav_files().iter().map(|file| file.parent().unwrap().file_name().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!((tracks_of(&app, "mine").await, directories()), (vec![json!("TR_2")], vec!["RM_1".into(), "mine".into()]));
    assert!(tracks_of(&app, "RM_1").await.contains(&json!("TR_1")));
    deliver(&app, event("room_finished", "RM_1", now(), json!({}))).await;
    deliver(&app, event("room_started", "RM_2", now(), json!({}))).await;
    record(&app, "trackId=TR_1").await;
    assert_eq!((tracks_of(&app, "RM_2").await, directories().len()), (vec![json!("TR_1")], 3));
}

#[tokio::test]
async fn recordings_of_an_earlier_meeting_of_the_same_room_stay_apart() {
    let app = TestApp::builder().open().start().await;
    record(&app, "trackId=TR_1").await;
    deliver(&app, event("room_started", "RM_late", now() + 3_600, json!({}))).await;
    deliver(&app, event("room_started", "RM_early", now() - 7_200, json!({}))).await;
    deliver(&app, event("room_finished", "RM_early", now() - 3_600, json!({}))).await;
    assert_eq!((tracks_of(&app, "RM_late").await, tracks_of(&app, "room").await), (vec![], vec![json!("TR_1")]));
}
