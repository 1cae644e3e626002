//! Webhooks in, sessions out.

mod ledger;
mod linking;
mod webhook_door;

use diesel::prelude::*;
use diesel::sql_types::BigInt;
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::test_app::{Response, TestApp, complete};

/// A second of February 2025, at which the stories of these tests begin.
const DAWN: i64 = 1_739_900_000;

/// What LiveKit says of the room `room` in its life `sid`, so many seconds after the dawn.
fn event(name: &str, sid: &str, second: i64, more: Value) -> Value {
    let mut event = json!({"event": name, "createdAt": (DAWN + second).to_string(), "room": {"sid": sid, "name": "room"}});
    event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    event
}

fn of_ana() -> Value {
    json!({"participant": {"sid": "PA_1", "identity": "ana", "name": "Ana"}})
}

fn of_anas_microphone() -> Value {
    let track = json!({"sid": "TR_1", "source": "MICROPHONE", "name": "mic", "mimeType": "audio/opus"});
    json!({"participant": {"sid": "PA_1", "identity": "ana"}, "track": track})
}

fn rfc3339(second: i64) -> String {
    chrono::DateTime::from_timestamp(DAWN + second, 0).unwrap().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

#[track_caller]
fn assert_taken(response: &Response, what: &str) {
    assert_eq!((response.status, String::from_utf8_lossy(&response.body).as_ref()), (204, ""), "{what}");
}

async fn deliver(app: &TestApp, event: Value) {
    assert_taken(&app.webhook(event.clone()).await, &event.to_string());
    app.settled().await;
}

async fn session(app: &TestApp, meeting: &str) -> Value {
    app.get_json(&format!("/api/v1/sessions/{meeting}")).await
}

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = BigInt)]
    number: i64,
}

/// How many rows there are `of` something.
fn rows(app: &TestApp, of: &str) -> i64 {
    diesel::sql_query(format!("SELECT COUNT(*) AS number FROM {of}")).get_result::<Number>(&mut app.database()).unwrap().number
}

#[tokio::test]
async fn a_rooms_start_opens_a_session_and_its_end_ends_it_under_every_name() {
    let app = TestApp::builder().start().await;
    for (sid, start, end) in
        [("RM_1", "room_started", "room_finished"), ("RM_2", "room_created", "room_ended"), ("RM_3", "room_created", "room_deleted")]
    {
        deliver(&app, event(start, sid, 0, json!({}))).await;
        let mut expected = json!({
            "meetingId": sid, "roomSid": sid, "roomName": "room", "metadata": "", "status": "ACTIVE", "startedAt": rfc3339(0), "endedAt": null, "participants": [],
        });
        let mut opened = session(&app, sid).await;
        let id: uuid::Uuid = opened.as_object_mut().unwrap().remove("id").unwrap().as_str().unwrap().parse().unwrap();
        assert_eq!((id.get_version_num(), &opened), (7, &expected));
        deliver(&app, event(end, sid, 60, json!({}))).await;
        expected["id"] = json!(id);
        (expected["status"], expected["endedAt"]) = (json!("ENDED"), json!(rfc3339(60)));
        assert_eq!(session(&app, sid).await, expected);
    }
}

#[tokio::test]
async fn a_repeated_id_is_answered_alike_and_changes_nothing() {
    let app = TestApp::builder().start().await;
    deliver(&app, event("room_started", "RM_1", 0, json!({"id": "EV_1"}))).await;
    let before = session(&app, "RM_1").await;
    deliver(&app, event("room_started", "RM_1", 0, json!({"id": "EV_1"}))).await;
    deliver(&app, event("room_finished", "RM_1", 60, json!({"id": "EV_1"}))).await;
    assert_eq!(session(&app, "RM_1").await, before);
    assert_eq!(rows(&app, "webhook_events"), 1);
}

#[tokio::test]
async fn fifty_deliveries_at_once_have_one_effect() {
    let app = TestApp::builder().start().await;
    let joined = complete(event("participant_joined", "RM_1", 0, of_ana())).to_string();
    for answer in join_all((0..50).map(|_| app.signed_webhook(joined.as_bytes()))).await {
        assert_taken(&answer, "each of them");
    }
    app.settled().await;
    assert_eq!(["webhook_events", "sessions", "participants"].map(|table| rows(&app, table)), [1, 1, 1]);
}

#[tokio::test]
async fn participants_and_tracks_keep_their_rows() {
    let app = TestApp::builder().start().await;
    deliver(&app, event("participant_joined", "RM_1", 1, of_ana())).await;
    deliver(&app, event("participant_joined", "RM_1", 1, json!({"participant": {"sid": "PA_E", "identity": "EG_1", "kind": "EGRESS"}}))).await;
    deliver(&app, event("track_published", "RM_1", 2, of_anas_microphone())).await;
    let mut ana = json!({
        "sid": "PA_1", "identity": "ana", "name": "Ana", "kind": "STANDARD", "role": "", "metadata": "", "attributes": {}, "joinedAt": rfc3339(1), "leftAt": null,
    });
    assert_eq!(session(&app, "RM_1").await["participants"], json!([ana]), "an egress is no participant");
    let tracks = app.items("/api/v1/sessions/RM_1/tracks").await;
    let mut track = json!({
        "id": tracks[0]["id"], "sid": "TR_1", "participant": "ana", "roomName": "room", "kind": "AUDIO", "source": "MICROPHONE", "name": "mic",
        "mimeType": "audio/opus", "encryption": "NONE", "wish": null, "publishedAt": rfc3339(2), "unpublishedAt": null, "formatMismatch": null, "muteSpans": [],
    });
    assert_eq!(tracks, [track.clone()]);
    deliver(&app, event("track_unpublished", "RM_1", 3, of_anas_microphone())).await;
    deliver(&app, event("participant_left", "RM_1", 4, of_ana())).await;
    (ana["leftAt"], track["unpublishedAt"]) = (json!(rfc3339(4)), json!(rfc3339(3)));
    assert_eq!(session(&app, "RM_1").await["participants"], json!([ana]));
    assert_eq!(app.items("/api/v1/sessions/RM_1/tracks").await, [track]);
}

#[tokio::test]
async fn any_event_with_a_room_opens_its_unknown_session() {
    let app = TestApp::builder().start().await;
    let named = ["participant_joined", "participant_left", "participant_connection_aborted", "track_published", "track_unpublished"];
    for name in named.into_iter().chain(["egress_updated", "ingress_started", "agent_job_started", "an_event_of_the_future", "room_finished"]) {
        deliver(&app, event(name, name, 0, of_anas_microphone())).await;
        let status = if name == "room_finished" { "ENDED" } else { "ACTIVE" };
        assert_eq!(session(&app, name).await["status"], status, "{name}");
    }
    deliver(&app, json!({"event": "egress_started", "egressInfo": {"egressId": "EG_1", "roomId": "RM_e", "roomName": "room"}})).await;
    assert_eq!(session(&app, "RM_e").await["roomName"], "room");
}

/// A meeting in which everything happens, with its own event ids for each life of the room.
fn story(sid: &str) -> Vec<Value> {
    let participant = |sid: &str, identity: &str, name: &str| json!({"participant": {"sid": sid, "identity": identity, "name": name}});
    let track = |sid: &str, owner: &str, name: &str| json!({"participant": {"sid": owner, "identity": if owner == "PA_2" { "bob" } else { "ana" }}, "track": {"sid": sid, "name": name}});
    let told = [
        ("room_started", json!({})),
        ("participant_joined", participant("PA_1", "ana", "Ana")),
        ("participant_joined", participant("PA_2", "bob", "Bob")),
        ("track_published", track("TR_1", "PA_1", "mic")),
        ("egress_started", json!({"egressInfo": {"egressId": "EG_1"}})),
        ("track_published", track("TR_2", "PA_2", "mic")),
        ("track_unpublished", track("TR_1", "PA_1", "mic, renamed")),
        ("participant_left", participant("PA_1", "ana", "Ana B.")),
        ("participant_joined", participant("PA_3", "ana", "Ana B.")),
        ("track_published", track("TR_3", "PA_3", "mic")),
        ("participant_connection_aborted", participant("PA_2", "bob", "Bob")),
        ("room_finished", json!({})),
    ];
    let events = told.into_iter().zip(0..).map(|((name, more), second)| {
        let mut event = event(name, sid, second, more);
        event["id"] = json!(format!("EV_{sid}_{second}"));
        event
    });
    events.collect()
}

/// What the API tells of a meeting, but for ids and the order of rows.
async fn told(app: &TestApp, sid: &str) -> Value {
    let mut session = session(app, sid).await;
    let mut tracks = app.items(&format!("/api/v1/sessions/{sid}/tracks")).await;
    for id in ["id", "meetingId", "roomSid"] {
        session.as_object_mut().unwrap().remove(id);
    }
    tracks.iter_mut().for_each(|track| drop(track.as_object_mut().unwrap().remove("id")));
    session["participants"].as_array_mut().unwrap().sort_by_key(|participant| participant["sid"].to_string());
    tracks.sort_by_key(|track| track["sid"].to_string());
    json!({"session": session, "tracks": tracks})
}

#[tokio::test]
async fn every_order_and_repetition_of_a_story_ends_in_the_same_state() {
    let app = TestApp::builder().start().await;
    for event in story("RM_0") {
        deliver(&app, event).await;
    }
    let expected = told(&app, "RM_0").await;
    assert_eq!((&expected["session"]["status"], &expected["session"]["endedAt"]), (&json!("ENDED"), &json!(rfc3339(11))));
    assert_eq!(expected["session"]["participants"].as_array().unwrap().len(), 3);
    assert_eq!(expected["tracks"][0]["name"], "mic, renamed");
    for seed in 1..=6 {
        let sid = format!("RM_{seed}");
        let mut events = [story(&sid), story(&sid)].concat();
        // Fisher and Yates with Knuth's MMIX generator: the same order in every run.
        let mut state: u64 = seed;
        for last in (1..events.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            events.swap(last, (state >> 33) as usize % (last + 1));
        }
        if seed % 2 == 0 {
            join_all(events.into_iter().map(|event| deliver(&app, event))).await;
        } else {
            for event in events {
                deliver(&app, event).await;
            }
        }
        assert_eq!(told(&app, &sid).await, expected, "seed {seed}");
    }
}

#[tokio::test]
async fn an_end_is_final_and_the_rooms_next_life_is_another_session() {
    let app = TestApp::builder().start().await;
    for (name, second, more) in [
        ("participant_left", 5, of_ana()),
        ("track_unpublished", 6, of_anas_microphone()),
        ("room_finished", 7, json!({})),
        ("participant_joined", 8, of_ana()),
        ("track_published", 9, of_anas_microphone()),
        ("room_started", 10, json!({})),
        ("room_finished", 11, json!({})),
    ] {
        deliver(&app, event(name, "RM_1", second, more)).await;
    }
    let ended = session(&app, "RM_1").await;
    assert_eq!((&ended["status"], &ended["endedAt"]), (&json!("ENDED"), &json!(rfc3339(7))));
    assert_eq!(ended["participants"][0]["leftAt"], rfc3339(5));
    assert_eq!(app.items("/api/v1/sessions/RM_1/tracks").await[0]["unpublishedAt"], rfc3339(6));
    deliver(&app, event("room_started", "RM_2", 20, json!({}))).await;
    let lives: Vec<_> =
        app.items("/api/v1/sessions?roomName=room").await.into_iter().map(|life| (life["meetingId"].clone(), life["status"].clone())).collect();
    assert_eq!(lives, [(json!("RM_2"), json!("ACTIVE")), (json!("RM_1"), json!("ENDED"))]);
}

#[tokio::test]
async fn what_a_real_livekit_sent_is_understood() {
    let app = TestApp::builder().start().await;
    let captured = include_str!("fixtures/livekit-1.13.5.jsonl");
    for body in captured.lines() {
        assert_eq!(app.signed_webhook(body.as_bytes()).await.status, 204);
    }
    let session = session(&app, "RM_XfAmBoxwx9Mv").await;
    assert_eq!((&session["status"], &session["roomName"]), (&json!("ENDED"), &json!("standup")));
    let ana = &session["participants"][0];
    assert_eq!((&ana["identity"], &ana["name"], &ana["kind"]), (&json!("ana"), &json!("Ana"), &json!("STANDARD")));
    assert!(ana["joinedAt"].is_string() && ana["leftAt"].is_string(), "{ana}");
    let tracks = app.items("/api/v1/sessions/RM_XfAmBoxwx9Mv/tracks").await;
    assert_eq!((&tracks[0]["sid"], &tracks[0]["kind"]), (&json!("TR_AMgiMrhiwfLqnk"), &json!("AUDIO")));
    assert_eq!((&tracks[0]["source"], &tracks[0]["mimeType"]), (&json!("MICROPHONE"), &json!("audio/red")));
    assert!(tracks[0]["publishedAt"].is_string() && tracks[0]["unpublishedAt"].is_string(), "{}", tracks[0]);
    assert!(!app.log().contains("not understood"));
}
