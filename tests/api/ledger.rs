//! The ledger of webhooks: what it tells, what it keeps to itself, and events that are applied once more.

use chrono::{TimeDelta, Utc};
use diesel::connection::SimpleConnection;
use serde_json::{Value, json};

use super::lists::{follow, texts};
use crate::support::test_app::{Response, TestApp};

const EVENTS: &str = "/api/v1/webhook-events";

/// Delivers an event with an id, of the room `room` in its life `sid`.
async fn tell(app: &TestApp, id: &str, name: &str, sid: &str, more: Value) {
    let mut event = json!({"event": name, "id": id, "createdAt": "1739900000", "room": {"sid": sid, "name": "room"}});
    event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    assert_eq!(app.webhook(event).await.status, 204);
    app.settled().await;
}

fn of_ana() -> Value {
    json!({"participant": {"sid": "PA_1", "identity": "ana", "name": "Ana", "metadata": "{\"role\":\"host\"}", "attributes": {"team": "a"}}})
}

async fn replay(app: &TestApp, id: &str) -> Response {
    app.post(&format!("{EVENTS}/{id}/replay"), json!({})).await
}

async fn told(app: &TestApp, meeting: &str) -> Value {
    let mut session = app.get_json(&format!("/api/v1/sessions/{meeting}")).await;
    session.as_object_mut().unwrap().remove("id");
    session
}

#[tokio::test]
async fn every_event_is_listed_with_what_came_of_it_and_shown_with_its_body() {
    let app = TestApp::builder().start().await;
    tell(&app, "EV_1", "room_started", "RM_1", json!({"extra": {"is": ["kept", 1]}})).await;
    tell(&app, "EV_1", "room_started", "RM_1", json!({})).await;
    assert_eq!(app.webhook(json!({"event": "ingress_started", "id": "EV_2"})).await.status, 204);
    for body in ["no JSON", "[1]"] {
        assert_eq!(app.signed_webhook(body.as_bytes()).await.status, 204);
    }
    let page = app.get_json(EVENTS).await;
    let items = page["items"].as_array().unwrap();
    assert_eq!(
        (texts(items, "outcome"), &page["nextCursor"]),
        (["notUnderstood", "notUnderstood", "noRoom", "applied"].map(str::to_owned).into(), &Value::Null)
    );
    let mut started = items[3].clone();
    let received = chrono::DateTime::parse_from_rfc3339(started["receivedAt"].as_str().unwrap()).unwrap();
    assert!((Utc::now() - received.to_utc()).abs() < TimeDelta::minutes(5), "{started}");
    started.as_object_mut().unwrap().remove("receivedAt");
    let mut expected = json!({
        "id": "EV_1", "event": "room_started", "roomSid": "RM_1", "roomName": "room", "createdAt": "2025-02-18T17:33:20.000Z",
        "attempts": 2, "outcome": "applied", "problem": null,
    });
    assert_eq!(started, expected);
    let mut shown = app.get_json(&format!("{EVENTS}/EV_1")).await;
    shown.as_object_mut().unwrap().remove("receivedAt");
    expected["body"] = json!({"event": "room_started", "id": "EV_1", "createdAt": "1739900000", "room": {"sid": "RM_1", "name": "room"}, "extra": {"is": ["kept", 1]}});
    assert_eq!(shown, expected);
    let bodies = items[..2].iter().map(|item| format!("{EVENTS}/{}", item["id"].as_str().unwrap()));
    let shown = futures_util::future::join_all(bodies.map(async |path| app.get_json(&path).await["body"].clone())).await;
    assert_eq!(shown, [json!([1]), json!("no JSON")], "JSON if it is some, else the text");
    app.get(&format!("{EVENTS}/EV_3")).await.assert_problem(404, "notFound");
}

#[tokio::test]
async fn the_ledger_is_filtered_and_paged() {
    let app = TestApp::builder().start().await;
    for number in 1..=7 {
        let (sid, name) = (format!("RM_{}", number % 2), ["room_started", "participant_joined"][number % 3 % 2]);
        tell(&app, &format!("EV_{number}"), name, &sid, of_ana()).await;
    }
    let mut times = String::new();
    for number in 1..=7 {
        times.push_str(&format!("UPDATE webhook_events SET received_at = '2026-11-20 10:00:0{number}' WHERE id = 'EV_{number}';"));
    }
    app.database().batch_execute(&times).unwrap();
    app.database().batch_execute("UPDATE webhook_events SET room_name = 'a/b +&' WHERE id = 'EV_2'").unwrap();
    for (query, expected) in [
        ("", "7654321"),
        ("?event=&roomName=&roomSid=&outcome=&from=&to=&limit=&cursor=", "7654321"),
        ("?event=participant_joined", "741"),
        ("?event=participant", ""),
        ("?roomSid=RM_0", "642"),
        ("?roomName=a%2Fb%20%2B%26", "2"),
        ("?roomName=%00", ""),
        ("?outcome=applied&roomSid=RM_1&event=room_started", "53"),
        ("?outcome=failed", ""),
        ("?from=2026-11-20T10:00:05Z", "765"),
        ("?to=2026-11-20T10:00:02Z", "1"),
        ("?from=2026-11-20T12:00:02%2B02:00&to=2026-11-20T10:00:03.000001Z", "32"),
    ] {
        let ids = texts(&app.items(&format!("{EVENTS}{query}")).await, "id").concat().replace("EV_", "");
        assert_eq!(ids, expected, "{query}");
    }
    for limit in [1, 2, 3] {
        let more = async || tell(&app, &format!("EV_new_{limit}"), "room_started", "RM_0", json!({})).await;
        let seen = texts(&follow(&app, EVENTS, limit, more).await, "id");
        assert_eq!(seen[limit - 1..], ["EV_7", "EV_6", "EV_5", "EV_4", "EV_3", "EV_2", "EV_1"], "{limit} a page");
    }
    let cursor = app.get_json(&format!("{EVENTS}?limit=1")).await["nextCursor"].as_str().unwrap().to_owned();
    let bad = [
        "outcome=Applied".to_owned(),
        "from=yesterday".to_owned(),
        "to=2026-11-20".to_owned(),
        "from=2026-11-20T10:00:00+02:00".to_owned(),
        "limit=0".to_owned(),
        "cursor=e30".to_owned(),
    ];
    for query in bad {
        app.get(&format!("{EVENTS}?{query}")).await.assert_problem(400, "invalidRequest");
    }
    app.get(&format!("/api/v1/sessions/RM_1/transitions?cursor={cursor}")).await.assert_problem(400, "invalidRequest");
}

#[tokio::test]
async fn the_steps_of_a_session_tell_who_caused_them() {
    let app = TestApp::builder().start().await;
    let of_track = json!({"participant": {"sid": "PA_1", "identity": "ana"}, "track": {"sid": "TR_1", "encryption": "GCM"}});
    for (id, name, more) in [
        ("EV_1", "room_started", json!({})),
        ("EV_2", "participant_joined", of_ana()),
        ("EV_3", "track_published", of_track.clone()),
        ("EV_4", "track_unpublished", of_track),
        ("EV_5", "participant_left", of_ana()),
        ("EV_6", "room_finished", json!({})),
    ] {
        tell(&app, id, name, "RM_1", more).await;
    }
    let steps = follow(&app, "/api/v1/sessions/RM_1/transitions", 4, async || ()).await;
    let told: Vec<_> = steps.iter().map(|step| (&step["subject"], &step["step"], &step["eventId"])).collect();
    let (room, ana, track) = (Value::Null, json!("PA_1"), json!("TR_1"));
    let [started, joined, published, unpublished, left, ended] =
        ["started", "joined", "published", "unpublished", "left", "ended"].map(|step| json!(step));
    let [ev_1, ev_2, ev_3, ev_4, ev_5, ev_6] = ["EV_1", "EV_2", "EV_3", "EV_4", "EV_5", "EV_6"].map(|id| json!(id));
    assert_eq!(
        told,
        [
            (&room, &started, &ev_1),
            (&ana, &joined, &ev_2),
            (&track, &published, &ev_3),
            (&track, &unpublished, &ev_4),
            (&ana, &left, &ev_5),
            (&room, &ended, &ev_6)
        ]
    );
    for step in &steps {
        assert_eq!((&step["cause"], &step["at"]), (&json!("webhook"), &json!("2025-02-18T17:33:20.000Z")));
        assert!(chrono::DateTime::parse_from_rfc3339(step["recordedAt"].as_str().unwrap()).is_ok() && step["id"].is_string(), "{step}");
    }
    app.get("/api/v1/sessions/RM_2/transitions").await.assert_problem(404, "notFound");
    let ana = &told_participants(&app, "RM_1").await[0];
    assert_eq!((&ana["role"], &ana["metadata"], &ana["attributes"]), (&json!("host"), &json!(r#"{"role":"host"}"#), &json!({"team": "a"})));
    let track = &app.items("/api/v1/sessions/RM_1/tracks").await[0];
    assert_eq!((&track["encryption"], &track["wish"]), (&json!("GCM"), &Value::Null));
    app.database().batch_execute("UPDATE tracks SET wish = 'stop'").unwrap();
    assert_eq!(app.items("/api/v1/sessions/RM_1/tracks").await[0]["wish"], "stop");
}

async fn told_participants(app: &TestApp, meeting: &str) -> Vec<Value> {
    app.get_json(&format!("/api/v1/sessions/{meeting}")).await["participants"].as_array().unwrap().clone()
}

#[tokio::test]
async fn replaying_kept_events_brings_back_what_they_told() {
    let app = TestApp::builder().start().await;
    let whole = json!({"sid": "RM_1", "name": "room", "creationTime": "1739899999", "metadata": "topic", "turnPassword": "secret"});
    tell(&app, "EV_1", "room_started", "RM_1", json!({"room": whole})).await;
    tell(&app, "EV_2", "participant_joined", "RM_1", of_ana()).await;
    // One without an id is known by a digest of what LiveKit sent, which is not what is kept.
    let nameless =
        json!({"event": "participant_joined", "room": {"sid": "RM_1", "name": "room", "turnPassword": "secret"}, "participant": {"sid": "PA_2"}});
    assert_eq!(app.signed_webhook(nameless.to_string().as_bytes()).await.status, 204);
    let before = told(&app, "RM_1").await;
    assert_eq!((&before["metadata"], before["participants"].as_array().map(Vec::len)), (&json!("topic"), Some(2)));
    let ids = texts(&app.items(EVENTS).await, "id");
    assert!(ids[0].starts_with("sha256:"), "{ids:?}");
    app.database().batch_execute("DELETE FROM transitions; DELETE FROM participants; DELETE FROM sessions").unwrap();
    app.get("/api/v1/sessions/RM_1").await.assert_problem(404, "notFound");
    for id in &ids {
        let answer = replay(&app, id).await;
        assert_eq!((answer.status, &answer.json()["id"], &answer.json()["attempts"]), (200, &json!(id), &json!(2)));
        assert!(answer.json().get("body").is_none());
    }
    let by_sid = |mut session: Value| {
        session["participants"].as_array_mut().unwrap().sort_by_key(|participant| participant["sid"].to_string());
        session
    };
    assert_eq!(by_sid(told(&app, "RM_1").await), by_sid(before.clone()), "in another order, at another time");
    let causes = texts(&app.items("/api/v1/sessions/RM_1/transitions").await, "cause");
    assert_eq!(causes, ["operator", "operator", "operator"]);
    assert_eq!(replay(&app, "EV_1").await.json()["attempts"], 3);
    assert_eq!(by_sid(told(&app, "RM_1").await), by_sid(before), "what is there already stays as it is");
    assert_eq!(app.items(EVENTS).await.len(), 3, "a replay is no event of its own");
}

#[tokio::test]
async fn what_is_not_there_or_not_understood_is_not_replayed() {
    let app = TestApp::builder().start().await;
    assert_eq!(app.signed_webhook(b"[]").await.status, 204);
    let before = app.items(EVENTS).await;
    replay(&app, before[0]["id"].as_str().unwrap()).await.assert_problem(409, "notUnderstood");
    replay(&app, "EV_1").await.assert_problem(404, "notFound");
    assert_eq!((app.items(EVENTS).await, app.items("/api/v1/sessions").await), (before, Vec::new()));
}

#[tokio::test]
async fn no_answer_tells_a_ticket_a_password_or_a_url() {
    let app = TestApp::builder().start().await;
    let ticket = app.ticket(json!({"roomName": "room"})).await;
    let url = format!("wss://recorder.internal/egress-audio?ticket={ticket}&roomName=room");
    let info = json!({"egressId": "EG_1", "status": "EGRESS_FAILED", "error": format!("dial {url}: refused"), "track": {"trackId": "TR_1", "websocketUrl": url},
        "streamResults": [{"url": url}]});
    let room = json!({"sid": "RM_1", "name": "room", "creationTime": "1739899999", "turnPassword": "canary-of-turn"});
    tell(&app, "EV_1", "egress_ended", "RM_1", json!({"room": room, "egressInfo": info})).await;
    assert_eq!(app.signed_webhook(format!("not JSON, but {url} \"turnPassword\":\"canary-of-turn\"").as_bytes()).await.status, 204);
    let ids = texts(&app.items(EVENTS).await, "id");
    let mut answers = String::new();
    for path in [EVENTS.to_owned(), "/api/v1/sessions".to_owned(), "/api/v1/sessions/RM_1".to_owned(), "/api/v1/sessions/RM_1/transitions".to_owned()]
        .into_iter()
        .chain(ids.iter().map(|id| format!("{EVENTS}/{id}")))
    {
        answers += &String::from_utf8(app.get(&path).await.body).unwrap();
    }
    answers += &String::from_utf8(replay(&app, "EV_1").await.body).unwrap();
    assert!(answers.contains("EG_1") && answers.contains("not JSON, but"), "{answers}");
    for secret in [ticket.rsplit('.').next().unwrap(), "recorder.internal", "egress-audio", "canary"] {
        assert!(!answers.contains(secret) && !app.log().contains(secret), "{secret}: {answers}");
    }
}

#[tokio::test]
async fn webhooks_are_forgotten_after_a_week() {
    let app = TestApp::builder().start().await;
    for (id, days) in [("EV_old", 7), ("EV_older", 30), ("EV_new", 6), ("EV_now", 0)] {
        tell(&app, id, "participant_joined", "RM_1", of_ana()).await;
        let received = (Utc::now() - TimeDelta::days(days)).format("%F %T%.6f");
        app.database().batch_execute(&format!("UPDATE webhook_events SET received_at = '{received}' WHERE id = '{id}'")).unwrap();
    }
    let app = app.kill().await.restart().await;
    app.logged("old webhooks are forgotten events=2").await;
    assert_eq!(texts(&app.items(EVENTS).await, "id"), ["EV_now", "EV_new"]);
    assert_eq!(told_participants(&app, "RM_1").await.len(), 1);
    let app = app.kill().await.restart().await;
    app.healthy().await;
    assert_eq!((app.items(EVENTS).await.len(), app.log().contains("forgotten")), (2, false), "nothing went, and nothing is said");
}
