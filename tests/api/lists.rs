//! Lists: filters, order, and pages that hold while rows come in.

use diesel::connection::SimpleConnection;
use serde_json::{Value, json};

use crate::support::test_app::TestApp;

/// Tells of a room's life `sid`, so many seconds after a time in February 2025.
async fn tell(app: &TestApp, event: &str, sid: &str, room: &str, second: i64) {
    let at = (1_739_900_000 + second).to_string();
    let response = app.webhook(json!({"event": event, "createdAt": at, "room": {"sid": sid, "name": room}})).await;
    assert_eq!(response.status, 204);
    app.settled().await;
}

pub fn texts(items: &[Value], key: &str) -> Vec<String> {
    items.iter().map(|item| item[key].as_str().unwrap_or_else(|| panic!("no {key}: {item}")).to_owned()).collect()
}

/// Follows the cursors of a list to its end, with `between` done behind the first page.
pub async fn follow(app: &TestApp, list: &str, limit: usize, between: impl AsyncFnOnce()) -> Vec<Value> {
    let mut between = Some(between);
    let (mut items, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = app.get_json(&format!("{list}?limit={limit}&cursor={cursor}")).await;
        let found = page["items"].as_array().unwrap();
        items.extend_from_slice(found);
        if let Some(between) = between.take() {
            between().await;
        }
        let Some(next) = page["nextCursor"].as_str() else {
            assert!(!found.is_empty() && page["nextCursor"].is_null(), "{page}");
            return items;
        };
        assert_eq!(found.len(), limit, "only the last page is short");
        cursor = next.to_owned();
    }
}

#[tokio::test]
async fn sessions_are_filtered_and_the_newest_comes_first() {
    let app = TestApp::builder().start().await;
    for (sid, room, second) in [("RM_2", "a", 2), ("RM_4", "b", 4), ("RM_1", "a", 1), ("RM_3", "a", 3)] {
        tell(&app, "room_started", sid, room, second).await;
    }
    tell(&app, "room_finished", "RM_2", "a", 9).await;
    for (query, expected) in [
        ("", &["RM_4", "RM_3", "RM_2", "RM_1"][..]),
        ("?status=&roomName=", &["RM_4", "RM_3", "RM_2", "RM_1"]),
        ("?status=ACTIVE", &["RM_4", "RM_3", "RM_1"]),
        ("?status=ENDED", &["RM_2"]),
        ("?roomName=a", &["RM_3", "RM_2", "RM_1"]),
        ("?roomName=a&status=ACTIVE", &["RM_3", "RM_1"]),
        ("?roomName=A", &[]),
        ("?status=ENDED&roomName=b", &[]),
    ] {
        let page = app.get_json(&format!("/api/v1/sessions{query}")).await;
        assert_eq!(
            (texts(page["items"].as_array().unwrap(), "meetingId"), &page["nextCursor"]),
            (expected.iter().map(|&sid| sid.to_owned()).collect(), &Value::Null),
            "{query}"
        );
    }
}

#[tokio::test]
async fn sessions_that_begin_between_two_pages_neither_repeat_nor_hide_any() {
    let app = TestApp::builder().start().await;
    let told = [("RM_1", 0), ("RM_2", 0), ("RM_3", 0), ("RM_4", 1), ("RM_5", 1), ("RM_6", 2), ("RM_7", 3)];
    for (sid, second) in told {
        tell(&app, "room_started", sid, "room", second).await;
    }
    let before = texts(&app.items("/api/v1/sessions").await, "meetingId");
    let more = async || {
        for (sid, second) in [("RM_newer", 9), ("RM_newer_still", 10), ("RM_older", -1)] {
            tell(&app, "room_started", sid, "room", second).await;
        }
    };
    let seen = texts(&follow(&app, "/api/v1/sessions", 2, more).await, "meetingId");
    assert_eq!((&seen[..7], &seen[7..]), (&before[..], &["RM_older".to_owned()][..]), "what comes behind the cursor is met, once");
    assert_eq!(app.items("/api/v1/sessions?limit=200").await.len(), 10);
}

#[tokio::test]
async fn recordings_that_start_within_one_microsecond_are_all_met() {
    let app = TestApp::builder().start().await;
    let mut rows =
        "INSERT INTO tracks (id, room_name, kind, source, name, mime_type, mute_spans) VALUES ('t', 'room', 'AUDIO', '', '', '', '[]');".to_owned();
    for nanosecond in [100, 900, 500, 300, 700] {
        rows.push_str(&format!(
            "INSERT INTO recordings (id, track_id, meeting_id, room_name, started_at)
             VALUES ('r{nanosecond}', 't', 'room', 'room', '2026-11-20 10:53:12.123456{nanosecond}');"
        ));
    }
    app.database().batch_execute(&rows).unwrap();
    for limit in [1, 2, 4] {
        let seen = texts(&follow(&app, "/api/v1/recordings", limit, async || ()).await, "id");
        assert_eq!(seen, ["r900", "r700", "r500", "r300", "r100"], "{limit} a page");
    }
}

#[tokio::test]
async fn tracks_and_measurements_have_pages_too() {
    let app = TestApp::builder().start().await;
    let publish = async |number: i64| {
        let event = json!({"event": "track_published", "room": {"sid": "RM_1", "name": "room"}, "participant": {"sid": "PA_1", "identity": "ana"},
            "track": {"sid": format!("TR_{number}")}});
        assert_eq!(app.webhook(event).await.status, 204);
    };
    for number in 1..=5 {
        publish(number).await;
    }
    let seen = texts(&follow(&app, "/api/v1/sessions/RM_1/tracks", 2, async || publish(6).await).await, "sid");
    assert_eq!(seen, ["TR_1", "TR_2", "TR_3", "TR_4", "TR_5", "TR_6"], "the oldest comes first");
    let mut rows = "INSERT INTO recordings (id, track_id, meeting_id, room_name, participant, started_at)
        SELECT identity || id, id, 'mine', 'room', sid, '2026-11-20 10:53:12' FROM tracks ORDER BY id LIMIT 2;"
        .to_owned();
    for number in 1..=5 {
        rows.push_str(&format!(
            "INSERT INTO measurements (id, recording_id, service, kind, start_ms, end_ms, scores, received_at)
             SELECT '{number}' || participant, id, 'hume', 'prosody', {number}, 9, '{{\"Joy\":0.5}}', '2026-11-20 10:53:12' FROM recordings;"
        ));
    }
    app.database().batch_execute(&rows).unwrap();
    let seen = follow(&app, "/api/v1/sessions/mine/measurements", 3, async || ()).await;
    assert_eq!(texts(&seen, "id"), ["1TR_1", "1TR_2", "2TR_1", "2TR_2", "3TR_1", "3TR_2", "4TR_1", "4TR_2", "5TR_1", "5TR_2"]);
    assert_eq!(seen[0]["scores"], json!({"Joy": 0.5}));
    let of_one = app.items("/api/v1/sessions/mine/measurements?participant=TR_2").await;
    assert_eq!(texts(&of_one, "id"), ["1TR_2", "2TR_2", "3TR_2", "4TR_2", "5TR_2"]);
}

#[tokio::test]
async fn a_bad_limit_cursor_or_filter_is_400() {
    let app = TestApp::builder().start().await;
    for (sid, second) in [("RM_1", 0), ("RM_2", 1)] {
        tell(&app, "room_started", sid, "room", second).await;
    }
    let page = app.get_json("/api/v1/sessions?limit=1").await;
    let cursor = page["nextCursor"].as_str().unwrap();
    let lists = ["/api/v1/sessions", "/api/v1/recordings", "/api/v1/sessions/RM_1/tracks", "/api/v1/sessions/RM_1/measurements"];
    let bad = ["limit=0", "limit=201", "limit=-1", "limit=1.5", "limit=many", "limit=1&limit=2", "cursor=garbage", "cursor=e30", "cursor=%00"];
    for list in lists {
        assert_eq!(app.get(&format!("{list}?limit=200&cursor=&other=ignored")).await.status, 200, "{list}");
        for query in bad {
            let response = app.get(&format!("{list}?{query}")).await;
            assert_eq!(response.status, 400, "{list}?{query}");
            response.assert_problem(400, "invalidRequest");
        }
        if list != "/api/v1/sessions" {
            app.get(&format!("{list}?cursor={cursor}")).await.assert_problem(400, "invalidRequest");
        }
    }
    for status in ["active", "OPEN", "ACTIVE,ENDED"] {
        app.get(&format!("/api/v1/sessions?status={status}")).await.assert_problem(400, "invalidRequest");
    }
}
