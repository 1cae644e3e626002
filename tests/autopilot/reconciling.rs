//! What webhooks do not tell is found by asking LiveKit; what LiveKit does not answer is not taken for an answer.

use std::time::Duration;

use diesel::connection::SimpleConnection;
use serde_json::{Value, json};

use super::looking::{assert_joined, column, is_stopped, looks, sent, start_by_hand, starts, stopped, streaming_anew};
use super::{autopilot, builder, egresses, recorded, streamed, until};
use crate::support::fake_livekit::{End, FakeLiveKit, Fault, Method, Script, Verdict, camera, mic, person};
use crate::support::test_app::TestApp;

const SOME_AUDIO: Duration = Duration::from_millis(300);

/// Waits until a session has such a status, and returns it.
async fn session(app: &TestApp, meeting: &str, status: &str) -> Value {
    app.eventually(&format!("{meeting} {status}"), async || {
        let sessions = app.items("/api/v1/sessions").await;
        sessions.iter().find(|session| session["meetingId"] == meeting && session["status"] == status)?;
        Some(app.get_json(&format!("/api/v1/sessions/{meeting}")).await)
    })
    .await
}

/// Waits for a participant of a session that is there, or has left.
async fn participant(app: &TestApp, meeting: &str, identity: &str, has_left: bool) -> Value {
    app.eventually(&format!("{identity} in {meeting}, gone: {has_left}"), async || {
        let response = app.get(&format!("/api/v1/sessions/{meeting}")).await;
        let found = (response.status == 200).then(|| response.json())?;
        let people = found["participants"].as_array()?.clone();
        people.into_iter().find(|person| person["identity"] == identity && person["leftAt"].is_string() == has_left)
    })
    .await
}

/// Waits for a track of a session that is published, or was.
async fn track(app: &TestApp, meeting: &str, sid: &str, is_over: bool) -> Value {
    app.eventually(&format!("{sid} in {meeting}, over: {is_over}"), async || {
        let response = app.get(&format!("/api/v1/sessions/{meeting}/tracks")).await;
        let found = (response.status == 200).then(|| response.json())?;
        let tracks = found["items"].as_array()?.clone();
        tracks.into_iter().find(|track| track["sid"] == sid && track["unpublishedAt"].is_string() == is_over)
    })
    .await
}

/// Every step and who caused it, as `joined reconciler`, sorted.
fn steps(app: &TestApp) -> Vec<String> {
    column(app, "SELECT step || ' ' || cause AS value FROM transitions ORDER BY 1")
}

#[tokio::test]
async fn with_every_webhook_lost_all_is_known_recorded_and_closed_again() {
    let (livekit, app) = autopilot().await;
    livekit.lose_webhooks(true);
    let room = livekit.start_room_with("standup", "{\"topic\":\"all\"}").await;
    livekit.join("standup", person("ana").name("Ana").metadata("m").attribute("role", "host").attribute("tone", "low")).await;
    let mic = livekit.publish("standup", "ana", mic()).await;
    let camera = livekit.publish("standup", "ana", camera()).await;
    assert_eq!(session(&app, &room, "ACTIVE").await["roomName"], "standup");
    let ana = participant(&app, &room, "ana", false).await;
    assert_eq!((ana["name"].as_str(), ana["kind"].as_str()), (Some("Ana"), Some("STANDARD")));
    assert_eq!(
        (track(&app, &room, &mic, false).await["source"].as_str(), track(&app, &room, &camera, false).await["kind"].as_str()),
        (Some("MICROPHONE"), Some("VIDEO"))
    );
    let told = "SELECT role || ' ' || metadata || ' ' || attributes AS value FROM participants";
    assert_eq!(column(&app, told), ["host m {\"role\":\"host\",\"tone\":\"low\"}"]);
    assert_eq!(column(&app, "SELECT metadata AS value FROM sessions"), ["{\"topic\":\"all\"}"]);
    livekit.streaming(&mic).await;
    streamed(&livekit, &mic, SOME_AUDIO).await;
    until(&app, &mic, "ACTIVE").await;

    // What is there is not found again: that would be news each time.
    livekit.set_room_metadata("standup", "changed").await;
    app.eventually("the new metadata", async || (column(&app, "SELECT metadata AS value FROM sessions") == ["changed"]).then_some(())).await;
    let news = || app.log().matches("LiveKit knows more").count();
    let before = news();
    looks(&livekit, 3).await;
    assert_eq!(news(), before, "{}", app.log());

    livekit.unpublish(&mic).await;
    livekit.unpublish(&camera).await;
    track(&app, &room, &mic, true).await;
    track(&app, &room, &camera, true).await;
    let recording = recorded(&app, 1).await;
    assert_joined(&app, &recording, &sent(&livekit, &mic)).await;
    assert_eq!((recording["meetingId"].as_str(), starts(&livekit, &mic).len()), (Some(&*room), 1));
    livekit.leave("standup", "ana").await;
    participant(&app, &room, "ana", true).await;
    livekit.finish_room("standup").await;
    session(&app, &room, "ENDED").await;
    let expected = ["ended", "joined", "left", "published", "published", "started", "unpublished", "unpublished"];
    assert_eq!(steps(&app), expected.map(|step| format!("{step} reconciler")));
    assert!(column(&app, "SELECT id AS value FROM webhook_events").is_empty());
}

#[tokio::test]
async fn ends_that_no_webhook_told_are_found() {
    let (livekit, app) = autopilot().await;
    let ends = ["track_unpublished", "participant_left", "room_finished"];
    livekit.filter_webhooks(move |event| if ends.contains(&event) { Verdict::Drop } else { Verdict::Deliver });
    let room = livekit.start_room("standup").await;
    livekit.join("standup", person("ana")).await;
    let sid = livekit.publish("standup", "ana", mic()).await;
    livekit.streaming(&sid).await;
    until(&app, &sid, "ACTIVE").await;
    livekit.unpublish(&sid).await;
    track(&app, &room, &sid, true).await;
    livekit.leave("standup", "ana").await;
    participant(&app, &room, "ana", true).await;
    livekit.finish_room("standup").await;
    session(&app, &room, "ENDED").await;
    // A look may be quicker than the webhooks of what began.
    let ends = |step: &String| ["ended", "left", "unpublished"].contains(&step.split(' ').next().unwrap());
    let expected = ["ended reconciler", "left reconciler", "unpublished reconciler"];
    assert_eq!(steps(&app).into_iter().filter(ends).collect::<Vec<_>>(), expected);
    assert_eq!(steps(&app).len(), 6, "each once: {:?}", steps(&app));
    assert_eq!(livekit.active_for(&sid), []);
}

#[tokio::test]
async fn while_livekit_is_unreachable_nothing_is_closed_and_recording_goes_on() {
    let (livekit, app) = autopilot().await;
    let room = livekit.start_room("standup").await;
    let (goes_on, breaks) = (livekit.publish("standup", "ana", mic()).await, livekit.publish("standup", "bo", mic()).await);
    for track in [&goes_on, &breaks] {
        livekit.streaming(track).await;
        until(&app, track, "ACTIVE").await;
    }
    livekit.unreachable().await;
    app.logged("cannot be compared").await;
    // Webhooks still come, and an egress is lost meanwhile.
    let late = livekit.publish("standup", "cy", mic()).await;
    let lost = livekit.active_for(&breaks).remove(0);
    livekit.crash_egress(&breaks).await;
    // Three seconds of audio at four times their speed, three times: some looks long.
    let before = livekit.sent_pcm(&goes_on)[0].duration();
    streamed(&livekit, &goes_on, before + Duration::from_secs(12)).await;
    assert_eq!(
        steps(&app).iter().filter(|step| !["started", "joined", "published"].contains(&step.split(' ').next().unwrap())).count(),
        0,
        "{:?}",
        steps(&app)
    );
    session(&app, &room, "ACTIVE").await;
    assert_eq!(until(&app, &goes_on, "ACTIVE").await.len(), 1);
    assert!(starts(&livekit, &late).is_empty());

    livekit.reachable();
    app.logged("LiveKit answers again").await;
    streaming_anew(&livekit, &breaks, &[&*lost.id]).await;
    livekit.streaming(&late).await;
    for track in [&breaks, &late] {
        until(&app, track, "ACTIVE").await;
    }
    looks(&livekit, 3).await;
    assert_eq!((starts(&livekit, &goes_on).len(), starts(&livekit, &breaks).len(), starts(&livekit, &late).len()), (1, 2, 1));
    assert!(steps(&app).iter().all(|step| !step.starts_with("ended") && !step.starts_with("left")), "{:?}", steps(&app));
    assert_eq!(app.items("/api/v1/recordings").await.len(), 3);
}

#[tokio::test]
async fn a_room_that_nobody_tells_of_loses_nobody() {
    let (livekit, app) = autopilot().await;
    let room = livekit.start_room("standup").await;
    livekit.join("standup", person("ana")).await;
    participant(&app, &room, "ana", false).await;
    livekit.lose_webhooks(true);
    livekit.fail(Method::ListParticipants, Fault::Unavailable);
    livekit.leave("standup", "ana").await;
    let other = livekit.start_room("other").await;
    session(&app, &other, "ACTIVE").await;
    looks(&livekit, 4).await;
    participant(&app, &room, "ana", false).await;
    livekit.clear(Method::ListParticipants);
    participant(&app, &room, "ana", true).await;
    session(&app, &room, "ACTIVE").await;
}

#[tokio::test]
async fn a_room_that_ends_between_two_questions_is_closed_whatever_the_second_answer_is() {
    let (livekit, app) = autopilot().await;
    livekit.lose_webhooks(true);
    for nobody in [false, true] {
        livekit.tune(|knobs| knobs.unknown_rooms_are_refused = !nobody);
        let room = livekit.start_room("standup").await;
        let sid = livekit.publish("standup", "ana", mic()).await;
        livekit.streaming(&sid).await;
        until(&app, &sid, "ACTIVE").await;
        livekit.fail_next(Method::ListRooms, Fault::Slow(Duration::from_millis(300)), 1);
        let asked = livekit.calls(Method::ListRooms);
        livekit.eventually("a slow look", |livekit| (livekit.calls(Method::ListRooms) > asked).then_some(())).await;
        livekit.finish_room("standup").await;
        assert!(session(&app, &room, "ENDED").await["endedAt"].is_string());
        until(&app, &sid, "ENDED").await;
        assert_eq!(starts(&livekit, &sid).len(), 1, "nobody: {nobody}");
    }
}

#[tokio::test]
async fn without_a_list_of_egresses_sessions_and_recordings_are_made_all_the_same() {
    let (livekit, app) = autopilot().await;
    livekit.lose_webhooks(true);
    livekit.fail(Method::ListEgress, Fault::Unavailable);
    let room = livekit.start_room("standup").await;
    let sid = livekit.publish("standup", "ana", mic()).await;
    livekit.streaming(&sid).await;
    session(&app, &room, "ACTIVE").await;
    until(&app, &sid, "ACTIVE").await;
    livekit.finish_room("standup").await;
    session(&app, &room, "ENDED").await;
    until(&app, &sid, "ENDED").await;
}

#[tokio::test]
async fn an_egress_started_by_hand_is_adopted_whether_it_streams_already_or_not() {
    let (livekit, app) = autopilot().await;
    livekit.lose_webhooks(true);
    livekit.fail(Method::ListRooms, Fault::Unavailable);
    app.logged("cannot be compared").await;
    let streams = livekit.publish("standup", "ana", mic()).await;
    let first = start_by_hand(&livekit, &app, "standup", &streams, None).await;
    livekit.streaming(&streams).await;
    let dials_later = livekit.publish("standup", "ana", mic()).await;
    livekit.script_next(Script::DialAfter(Duration::from_secs(3)));
    let second = start_by_hand(&livekit, &app, "standup", &dials_later, None).await;
    livekit.clear(Method::ListRooms);
    for (track, egress) in [(&streams, &first), (&dials_later, &second)] {
        let adopted = async || {
            let shown = egresses(&app, track).await;
            assert!(shown.len() <= 1, "{shown:?}");
            (shown.first()?["egressId"] == **egress && shown[0]["state"] == "ACTIVE").then_some(())
        };
        app.eventually(&format!("{egress} in its row"), adopted).await;
        assert_eq!(starts(&livekit, track).len(), 1, "by hand alone");
    }
    looks(&livekit, 3).await;
    assert!(!is_stopped(&livekit, &first) && !is_stopped(&livekit, &second));
    // From now on it is replaced as any other.
    livekit.crash_egress(&first).await;
    streaming_anew(&livekit, &streams, &[&*first]).await;
}

#[tokio::test]
async fn an_egress_that_is_nobodys_is_stopped_and_one_to_another_address_is_not() {
    let (livekit, app) = autopilot().await;
    livekit.start_room("standup").await;
    let sid = livekit.publish("standup", "ana", mic()).await;
    let own = livekit.streaming(&sid).await;
    until(&app, &sid, "ACTIVE").await;
    assert_eq!(app.post(&format!("/api/v1/rooms/standup/tracks/{sid}/stop"), json!({})).await.status, 202);
    stopped(&livekit, &own.id).await;
    until(&app, &sid, "ENDED").await;

    livekit.script_all(Some(Script::NeverDial));
    let elsewhere = start_by_hand(&livekit, &app, "standup", &sid, Some("ws://elsewhere.test")).await;
    let of_a_stopped_track = start_by_hand(&livekit, &app, "standup", &sid, None).await;
    let of_no_track = start_by_hand(&livekit, &app, "standup", "TR_nobodys", None).await;
    livekit.start_room("other").await;
    let of_no_room = start_by_hand(&livekit, &app, "other", "TR_nowhere", None).await;
    livekit.finish_room("other").await;
    for orphan in [&of_a_stopped_track, &of_no_track, &of_no_room] {
        stopped(&livekit, orphan).await;
    }
    // One that streams, too.
    livekit.script_all(None);
    let streams = start_by_hand(&livekit, &app, "standup", &sid, None).await;
    stopped(&livekit, &streams).await;
    looks(&livekit, 3).await;
    assert!(!is_stopped(&livekit, &elsewhere));
    assert_eq!(egresses(&app, &sid).await.last().unwrap()["endReason"], "stopped");
}

#[tokio::test]
async fn a_session_that_an_operator_ended_stays_ended_while_its_room_goes_on() {
    let (livekit, app) = autopilot().await;
    let room = livekit.start_room("standup").await;
    let sid = livekit.publish("standup", "ana", mic()).await;
    let egress = livekit.streaming(&sid).await;
    until(&app, &sid, "ACTIVE").await;
    streamed(&livekit, &sid, SOME_AUDIO).await;
    assert_eq!(app.post(&format!("/api/v1/sessions/{room}/end"), json!({})).await.json()["status"], "ENDED");
    stopped(&livekit, &egress.id).await;
    recorded(&app, 1).await;
    let late = livekit.publish("standup", "bo", mic()).await;
    let by_hand = start_by_hand(&livekit, &app, "standup", &sid, None).await;
    stopped(&livekit, &by_hand).await;
    let news = app.log().matches("LiveKit knows more").count();
    looks(&livekit, 4).await;
    assert_eq!(session(&app, &room, "ENDED").await["roomSid"], *room);
    assert_eq!((starts(&livekit, &sid).len(), starts(&livekit, &late).len()), (2, 0), "the second was by hand");
    assert_eq!(app.log().matches("LiveKit knows more").count(), news, "it is left alone");
}

#[tokio::test]
async fn a_webhook_that_could_not_be_kept_makes_livekit_be_asked_at_once() {
    let livekit = FakeLiveKit::start().await;
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__RECONCILE_INTERVAL", "10m").start().await;
    livekit.deliver_to(app.addr);
    let room = livekit.start_room("standup").await;
    session(&app, &room, "ACTIVE").await;
    let before = livekit.calls(Method::ListRooms);
    let mut lock = app.database();
    lock.batch_execute("BEGIN IMMEDIATE").unwrap();
    // Nor does the journal take anything.
    let journal = app.dir.path().join("storage/journal");
    std::fs::remove_dir_all(&journal).unwrap();
    std::fs::write(&journal, b"no directory").unwrap();
    let sid = livekit.publish("standup", "ana", mic()).await;
    livekit.eventually("a look", |livekit| (livekit.calls(Method::ListRooms) > before).then_some(())).await;
    // Whatever LiveKit repeats now is lost.
    livekit.lose_webhooks(true);
    drop(lock);
    livekit.streaming(&sid).await;
    until(&app, &sid, "ACTIVE").await;
    assert!(livekit.deliveries().iter().any(|delivery| delivery.answers.contains(&Some(503))), "{:?}", livekit.deliveries());
}

#[tokio::test]
async fn an_end_that_livekit_does_not_list_yet_is_not_forgotten() {
    let (livekit, app) = autopilot().await;
    let sid = livekit.publish("standup", "ana", mic()).await;
    let first = livekit.streaming(&sid).await;
    until(&app, &sid, "ACTIVE").await;
    // Nobody says whether the track is still there: that is no reason to give it up.
    livekit.fail(Method::ListParticipants, Fault::Hang);
    livekit.end_egress(&first.id, End::RoomLost).await;
    streaming_anew(&livekit, &sid, &[&*first.id]).await;
    assert_eq!(until(&app, &sid, "ACTIVE").await.len(), 2);
}
