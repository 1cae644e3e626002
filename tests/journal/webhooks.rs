//! Webhooks while the database is away.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::databases::Database;
use super::{Starting, builder, replayed, waiting};
use crate::support::test_app::{TestApp, complete};

/// A meeting from its beginning to its end, in the room's life `sid`: its events with their ids.
pub fn meeting(sid: &str) -> Vec<Value> {
    let ana = json!({"sid": format!("PA_{sid}"), "identity": "ana", "name": "Ana"});
    let short = json!({"sid": format!("PA_{sid}"), "identity": "ana"});
    let track = json!({"sid": format!("TR_{sid}"), "source": "MICROPHONE", "name": "mic", "mimeType": "audio/opus"});
    let steps = [
        ("room_started", json!({})),
        ("participant_joined", json!({"participant": ana})),
        ("track_published", json!({"participant": short, "track": track})),
        ("track_unpublished", json!({"participant": short, "track": track})),
        ("participant_left", json!({"participant": ana})),
        ("room_finished", json!({})),
    ];
    let event = |(second, (name, more)): (usize, (&str, Value))| {
        let mut event = json!({"event": name, "id": format!("EV_{sid}_{second}"), "createdAt": (1_739_900_000 + second).to_string()});
        event["room"] = json!({"sid": sid, "name": format!("room-{sid}")});
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        complete(event)
    };
    steps.into_iter().enumerate().map(event).collect()
}

/// All that the API tells of meetings, without what differs from one server to the next.
pub async fn told(app: &TestApp, meetings: &[&str]) -> Vec<Value> {
    let mut told = Vec::new();
    for meeting in meetings {
        told.push(app.get_json(&format!("/api/v1/sessions/{meeting}")).await);
        for list in ["tracks", "transitions"] {
            told.extend(app.items(&format!("/api/v1/sessions/{meeting}/{list}")).await);
        }
    }
    told.iter_mut().for_each(forget_ids);
    told
}

fn forget_ids(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|name, _| !["id", "recordedAt", "receivedAt"].contains(&name.as_str()));
            members.values_mut().for_each(forget_ids);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_ids),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

pub async fn deliver(app: &TestApp, events: &[Value]) {
    for event in events {
        let answer = app.webhook(event.clone()).await;
        assert_eq!(answer.status, 204, "{event}: {answer:?}\n{}", app.log());
    }
}

pub async fn are_taken_and_applied_in_order(mut database: Database) {
    let undisturbed = Database::sqlite();
    let expected = {
        let app = builder(&undisturbed).start().await;
        deliver(&app, &[meeting("RM_1"), meeting("RM_2")].concat()).await;
        told(&app, &["RM_1", "RM_2"]).await
    };
    let app = builder(&database).start().await;
    let (first, second) = (meeting("RM_1"), meeting("RM_2"));
    deliver(&app, &first[..2]).await;
    replayed(&app).await;
    database.take_away();
    let start = Instant::now();
    deliver(&app, &first[2..]).await;
    // One was waited for; four times that decide.
    assert!(start.elapsed() < Duration::from_secs(4 * 2), "{:?}", start.elapsed());
    deliver(&app, &second).await;
    let said = app.eventually("what waits is said", async || waiting(&app).await).await;
    assert!(said.contains("10 records wait for the database"), "{said}");
    assert_eq!(app.log().matches("wait in the journal").count(), 1, "an outage is said once: {}", app.log());
    database.give_back();
    replayed(&app).await;
    assert_eq!(told(&app, &["RM_1", "RM_2"]).await, expected);
    assert_eq!(app.log().matches("has taken all that waited").count(), 1, "{}", app.log());
    // Ids of rows sort by the time of their making.
    for events in [&first, &second] {
        let (sid, room) = (events[0]["room"]["sid"].as_str().unwrap(), "SELECT id FROM sessions WHERE meeting_id");
        let order = database.texts(&format!("SELECT event_id AS text FROM transitions WHERE session_id = ({room} = '{sid}') ORDER BY id")).await;
        let mut order: Vec<&str> = order.iter().map(String::as_str).collect();
        order.dedup();
        let ids: Vec<&str> = events.iter().map(|event| event["id"].as_str().unwrap()).collect();
        assert_eq!(order, ids);
    }
    deliver(&app, &meeting("RM_3")).await;
    assert_eq!(waiting(&app).await, None, "the database is used directly again");
    assert!(files(&app).is_empty(), "{:?}", files(&app));
}

/// What the journal has on the disk, but for the file that says whose it is.
pub fn files(app: &TestApp) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir(app.dir.path().join("storage/journal")).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| !path.ends_with("lock")).collect()
}

pub async fn survive_kill_9(mut database: Database) {
    let app = builder(&database).start().await;
    database.take_away();
    let events: Vec<Value> = (0..20).flat_map(|number| meeting(&format!("RM_{number}"))).collect();
    deliver(&app, &events).await;
    let stopped = app.kill().await;
    // The start waits for the database, and is killed again while it replays.
    let mut starting = Starting::new(stopped.dir.path(), &database.url);
    starting.says("the start waits for it").await;
    database.give_back();
    starting.says("listening address=").await;
    starting.child.kill().await.unwrap();
    let app = stopped.restart().await;
    replayed(&app).await;
    let ids = database.texts("SELECT id AS text FROM webhook_events ORDER BY id").await;
    let mut expected: Vec<&str> = events.iter().map(|event| event["id"].as_str().unwrap()).collect();
    expected.sort_unstable();
    assert_eq!(ids, expected);
    for number in 0..20 {
        let session = app.get_json(&format!("/api/v1/sessions/RM_{number}")).await;
        assert_eq!((session["status"].as_str(), session["participants"].as_array().unwrap().len()), (Some("ENDED"), 1), "{session}");
    }
}
