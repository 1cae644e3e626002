//! Starts that LiveKit does not agree to at once.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::connection::SimpleConnection;
use serde_json::{Value, json};

use super::starting::files;
use super::{autopilot, builder, egresses, streamed, until};
use crate::support::fake_livekit::{FakeLiveKit, Fault, Method, Script, mic};
use crate::support::test_app::TestApp;

/// A server that waits for LiveKit a second at most.
pub async fn impatient() -> (FakeLiveKit, TestApp) {
    let livekit = FakeLiveKit::start().await;
    livekit.pace(4.0);
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__REQUEST_TIMEOUT", "1s").start().await;
    livekit.deliver_to(app.addr);
    (livekit, app)
}

/// Waits until the last egress of a track waits for another try, and returns it.
pub async fn put_off(app: &TestApp, track: &str, error: &str) -> Value {
    app.eventually(&format!("{error:?} said of {track}"), async || {
        let last = egresses(app, track).await.pop()?;
        (last["state"] == "QUEUED" && last["lastError"].as_str()?.contains(error)).then_some(last)
    })
    .await
}

/// How often it was asked which egresses run in one room.
fn looks(livekit: &FakeLiveKit, room: &str) -> usize {
    livekit.journal().iter().filter(|call| call.method == Method::ListEgress && call.room == room).count()
}

/// Nothing was started: the track is recorded when the fault is over, once.
async fn overcomes(fault: Fault, error: &str) {
    let (livekit, app) = impatient().await;
    livekit.fail(Method::StartTrackEgress, fault);
    let track = livekit.publish("standup", "ana", mic()).await;
    let waiting = put_off(&app, &track, error).await;
    assert!(waiting["attempts"].as_i64() >= Some(1) && waiting["dueAt"].is_string() && waiting["egressId"].is_null(), "{waiting}");
    livekit.clear(Method::StartTrackEgress);
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!((shown.len(), &shown[0]["id"], &shown[0]["lastError"], &shown[0]["dueAt"]), (1, &waiting["id"], &Value::Null, &Value::Null));
    assert!(shown[0]["attempts"].as_i64() > waiting["attempts"].as_i64(), "{shown:?}");
    streamed(&livekit, &track, Duration::from_millis(200)).await;
    files(&app, 1).await;
    assert_eq!(livekit.egresses().len(), 1);
}

/// It was started all the same: the egress is found, and no other one is asked for, even while LiveKit does not say what runs.
async fn adopts(fault: Fault) {
    let (livekit, app) = impatient().await;
    livekit.tune(|knobs| knobs.hold_dials = true);
    livekit.fail(Method::ListEgress, Fault::Unavailable);
    livekit.fail_next(Method::StartTrackEgress, fault, 1);
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.eventually("two looks in vain", |livekit| (looks(livekit, "standup") >= 2).then_some(())).await;
    let waiting = put_off(&app, &track, "busy").await;
    assert!(waiting["attempts"].as_i64() >= Some(2), "each look makes the next wait longer: {waiting}");
    assert_eq!((livekit.calls(Method::StartTrackEgress), livekit.egresses().len()), (1, 1), "in doubt nothing is started");

    livekit.clear(Method::ListEgress);
    let shown = until(&app, &track, "STARTING").await;
    assert_eq!((shown.len(), shown[0]["egressId"].as_str(), &shown[0]["lastError"]), (1, Some(&*livekit.egresses()[0].id), &Value::Null));
    livekit.tune(|knobs| knobs.hold_dials = false);
    until(&app, &track, "ACTIVE").await;
    streamed(&livekit, &track, Duration::from_millis(200)).await;
    files(&app, 1).await;
    assert_eq!((livekit.calls(Method::StartTrackEgress), livekit.egresses().len()), (1, 1));
}

#[tokio::test]
async fn a_start_that_no_node_has_room_for_is_tried_again() {
    overcomes(Fault::Unavailable, "LiveKit is busy").await;
}

#[tokio::test]
async fn a_start_past_a_limit_is_tried_again() {
    overcomes(Fault::ResourceExhausted, "LiveKit is busy").await;
}

#[tokio::test]
async fn a_start_without_an_answer_is_tried_again() {
    overcomes(Fault::Hang, "LiveKit did not answer").await;
}

#[tokio::test]
async fn a_start_whose_connection_broke_is_tried_again() {
    overcomes(Fault::Close, "LiveKit did not answer").await;
}

#[tokio::test]
async fn a_start_that_a_proxy_answered_is_tried_again() {
    overcomes(Fault::ProxyPage, "LiveKit did not answer").await;
}

#[tokio::test]
async fn a_start_that_ran_without_an_answer_is_adopted() {
    adopts(Fault::HangButRun).await;
}

#[tokio::test]
async fn a_start_that_ran_while_its_connection_broke_is_adopted() {
    adopts(Fault::CloseButRun).await;
}

#[tokio::test]
async fn a_start_that_was_answered_too_late_is_adopted() {
    adopts(Fault::Slow(Duration::from_secs(3))).await;
}

#[tokio::test]
async fn an_egress_that_was_replaced_is_not_adopted_for_the_one_that_follows() {
    let livekit = FakeLiveKit::start().await;
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__REQUEST_TIMEOUT", "1s").env("LIVE_MEETING__LIVEKIT__RESTART_AFTER", "5s").start().await;
    livekit.deliver_to(app.addr);
    livekit.script_next(Script::Stall);
    let track = livekit.publish("standup", "ana", mic()).await;
    until(&app, &track, "ACTIVE").await;
    // It goes on at LiveKit, where nobody hears that it is to stop; and whether its successor runs is in doubt.
    livekit.fail(Method::StopEgress, Fault::Close);
    livekit.tune(|knobs| knobs.hold_dials = true);
    livekit.fail_next(Method::StartTrackEgress, Fault::CloseButRun, 1);
    livekit.eventually("its successor", |livekit| (livekit.egresses().len() == 2).then_some(())).await;
    let agreed = async || Some(egresses(&app, &track).await.pop()?["egressId"].as_str()?.to_owned());
    let successor = livekit.egresses()[1].id.clone();
    let found = async || (agreed().await? == successor).then_some(());
    app.eventually("the successor is found", found).await;
    livekit.tune(|knobs| knobs.hold_dials = false);
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!((shown.len(), shown[0]["endReason"].as_str(), livekit.calls(Method::StartTrackEgress)), (2, Some("replaced"), 2));
    livekit.clear(Method::StopEgress);
    livekit.eventually("one egress", |livekit| (livekit.active_for(&track).len() == 1).then_some(())).await;
    assert!(livekit.active_for(&track)[0].id == successor && livekit.active_for(&track)[0].connected);
}

#[tokio::test]
async fn a_socket_that_comes_while_the_database_is_busy_is_shown_once_it_is_not() {
    let (livekit, app) = autopilot().await;
    livekit.tune(|knobs| knobs.hold_dials = true);
    let track = livekit.publish("standup", "ana", mic()).await;
    app.eventually("LiveKit's yes", async || egresses(&app, &track).await.pop()?["egressId"].is_string().then_some(())).await;
    let mut database = app.database();
    database.batch_execute("BEGIN IMMEDIATE").unwrap();
    livekit.tune(|knobs| knobs.hold_dials = false);
    app.logged("the row of an egress does not say that it is connected").await;
    assert_eq!(egresses(&app, &track).await[0]["state"], "STARTING");
    database.batch_execute("ROLLBACK").unwrap();
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!((shown.len(), shown[0]["node"].as_str(), livekit.calls(Method::StartTrackEgress)), (1, Some("127.0.0.1"), 1));
}

#[tokio::test]
async fn a_slow_answer_is_waited_for() {
    let (livekit, app) = autopilot().await;
    livekit.fail_next(Method::StartTrackEgress, Fault::Slow(Duration::from_millis(700)), 1);
    let track = livekit.publish("standup", "ana", mic()).await;
    let shown = until(&app, &track, "ACTIVE").await;
    livekit
        .eventually("the answer", |livekit| {
            livekit.journal().iter().find_map(|call| (call.method == Method::StartTrackEgress).then_some(call.status?))
        })
        .await;
    let agreed = app.eventually("the egress's id", async || egresses(&app, &track).await[0]["egressId"].as_str().map(str::to_owned)).await;
    assert_eq!((shown.len(), livekit.calls(Method::StartTrackEgress), agreed), (1, 1, livekit.egresses()[0].id.clone()));
}

#[tokio::test]
async fn what_livekit_does_not_know_is_given_up_until_an_operator_asks_again() {
    let (livekit, app) = autopilot().await;
    livekit.fail_next(Method::StartTrackEgress, Fault::NotFound, 1);
    let track = livekit.publish("standup", "ana", mic()).await;
    let shown = until(&app, &track, "ENDED").await;
    assert_eq!((shown.len(), shown[0]["endReason"].as_str(), shown[0]["attempts"].as_i64()), (1, Some("gone"), Some(1)));
    assert!(shown[0]["lastError"].as_str().unwrap().contains("scripted by the test"), "{shown:?}");
    // LiveKit goes on to list the track, which changes nothing.
    let looks = livekit.calls(Method::ListRooms);
    livekit.eventually("three more looks", |livekit| (livekit.calls(Method::ListRooms) >= looks + 3).then_some(())).await;
    assert_eq!((livekit.calls(Method::StartTrackEgress), egresses(&app, &track).await.len()), (1, 1));

    assert_eq!(app.post(&format!("/api/v1/rooms/standup/tracks/{track}/record"), json!({})).await.status, 202);
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!((shown.len(), livekit.calls(Method::StartTrackEgress)), (2, 2));
}

#[tokio::test]
async fn a_start_that_is_refused_is_tried_again_slowly() {
    let (livekit, app) = autopilot().await;
    livekit.fail_next(Method::StartTrackEgress, Fault::Unauthenticated, 1);
    let track = livekit.publish("standup", "ana", mic()).await;
    let waiting = put_off(&app, &track, "LiveKit refuses").await;
    let due = DateTime::parse_from_rfc3339(waiting["dueAt"].as_str().unwrap()).unwrap();
    let made = DateTime::parse_from_rfc3339(waiting["createdAt"].as_str().unwrap()).unwrap();
    assert!((due - made).num_seconds() >= 29, "{waiting}");
    // Its time has come.
    let now = Utc::now().naive_utc();
    app.database().batch_execute(&format!("UPDATE egresses SET due_at = '{now}'")).unwrap();
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!((shown.len(), shown[0]["attempts"].as_i64(), &shown[0]["lastError"]), (1, Some(2), &Value::Null));
    assert_eq!(livekit.calls(Method::StartTrackEgress), 2);
}

#[tokio::test]
async fn a_livekit_that_comes_after_the_server_or_goes_meanwhile_loses_no_track() {
    let livekit = FakeLiveKit::start().await;
    livekit.pace(4.0);
    livekit.unreachable().await;
    let app = builder(&livekit).start().await;
    livekit.deliver_to(app.addr);
    let first = livekit.publish("standup", "ana", mic()).await;
    let waiting = put_off(&app, &first, "LiveKit cannot be reached").await;
    assert!(!waiting["lastError"].as_str().unwrap().contains("ticket"), "{waiting}");
    livekit.reachable();
    until(&app, &first, "ACTIVE").await;
    let egress = livekit.streaming(&first).await;

    livekit.unreachable().await;
    let second = livekit.publish("standup", "bob", mic()).await;
    put_off(&app, &second, "LiveKit cannot be reached").await;
    let before = livekit.sent_pcm(&first)[0].duration();
    streamed(&livekit, &first, before + Duration::from_millis(500)).await;
    livekit.reachable();
    let shown = until(&app, &second, "ACTIVE").await;
    assert_eq!((shown.len(), &shown[0]["lastError"]), (1, &Value::Null));
    let of_first = egresses(&app, &first).await;
    assert_eq!((of_first.len(), of_first[0]["egressId"].as_str(), of_first[0]["state"].as_str()), (1, Some(&*egress.id), Some("ACTIVE")));
    files(&app, 2).await;
    assert_eq!(livekit.egresses().len(), 2);
}

#[tokio::test]
async fn starts_that_were_queued_when_the_server_was_killed_are_made_by_the_next() {
    let (livekit, app) = autopilot().await;
    livekit.fail(Method::StartTrackEgress, Fault::Unavailable);
    let mut tracks = Vec::new();
    for identity in ["ana", "bob", "eve"] {
        tracks.push(livekit.publish("standup", identity, mic()).await);
    }
    let mut rows = Vec::new();
    for track in &tracks {
        rows.push(put_off(&app, track, "busy").await["id"].clone());
    }
    let app = app.kill().await.restart().await;
    livekit.deliver_to(app.addr);
    livekit.clear(Method::StartTrackEgress);
    for (track, row) in tracks.iter().zip(rows) {
        let shown = until(&app, track, "ACTIVE").await;
        assert_eq!((shown.len(), &shown[0]["id"]), (1, &row), "the queue is durable");
    }
    assert_eq!(livekit.egresses().len(), 3);
}

#[tokio::test]
async fn a_start_that_was_under_way_when_the_server_was_killed_is_adopted_by_the_next() {
    let (livekit, app) = autopilot().await;
    livekit.tune(|knobs| knobs.hold_dials = true);
    livekit.fail_next(Method::StartTrackEgress, Fault::HangButRun, 1);
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.eventually("the egress", |livekit| (livekit.egresses().len() == 1).then_some(())).await;
    let app = app.kill().await.restart().await;
    livekit.deliver_to(app.addr);
    app.logged("an egress is adopted that was asked for before").await;
    livekit.tune(|knobs| knobs.hold_dials = false);
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!((shown.len(), shown[0]["egressId"].as_str()), (1, Some(&*livekit.egresses()[0].id)));
    assert_eq!((livekit.calls(Method::StartTrackEgress), livekit.egresses().len()), (1, 1));
}
