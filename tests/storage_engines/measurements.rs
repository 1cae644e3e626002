//! What analysis services said.

use live_meeting::db::Store;
use live_meeting::db::rows::{NewMeasurement, NewRecording, Page};
use live_meeting::ids::{Identity, MeetingId, RecordingId, new_row_id};
use serde_json::{Value, json};

use super::engine::TestDatabase;
use super::fixtures::{ALL, at, deliver, new_recording, open_recording, started};

fn measurement(recording: &RecordingId, start_ms: u64) -> NewMeasurement {
    NewMeasurement {
        id: new_row_id(),
        recording: recording.clone(),
        service: "hume".into(),
        kind: "prosody".into(),
        start_ms,
        end_ms: start_ms + 2_000,
        scores: vec![("Joy".to_owned(), 0.123_456_789_012_345_67), ("Empathic Pain 🥲".to_owned(), 1e-9)],
        warning: None,
        received_at: at(1),
    }
}

async fn starts(store: &Store, meeting: &str, participant: Option<&str>) -> Vec<i64> {
    let rows = store.measurements(MeetingId::new(meeting), participant.map(str::to_owned), ALL).await.unwrap();
    rows.into_iter().map(|(row, ..)| row.start_ms).collect()
}

pub async fn measurements_are_listed_with_their_speaker(db: &TestDatabase) {
    let store = db.store().await;
    deliver(&store, started("RM_1", "room", 0)).await;
    let ana = open_recording(&store, "RM_1", "room", 1).await;
    let ben = NewRecording { participant: Some(Identity::new("ben")), track: None, ..new_recording("RM_1", "room", at(1)) };
    let ben = store.open_recording(ben).await.unwrap().id;
    let elsewhere = open_recording(&store, "other", "other room", 1).await;
    store.add_measurements(vec![measurement(&ana, 0), measurement(&elsewhere, 7)]).await.unwrap();
    let warning = Some("W0105: no speech\0".to_owned());
    store.add_measurements(vec![NewMeasurement { scores: Vec::new(), warning, ..measurement(&ben, 500) }]).await.unwrap();
    store.add_measurements(vec![measurement(&ana, 2_000)]).await.unwrap();
    store.add_measurements(Vec::new()).await.expect("nothing is not too little");

    let rows = store.measurements(MeetingId::new("RM_1"), None, ALL).await.unwrap();
    let who: Vec<_> = rows.iter().map(|(row, participant, track)| (row.start_ms, row.end_ms, participant.as_deref(), track.as_deref())).collect();
    let expected = [(0, 2_000, Some("ana"), Some("TR_1")), (500, 2_500, Some("ben"), None), (2_000, 4_000, Some("ana"), Some("TR_1"))];
    assert_eq!(who, expected, "oldest first");
    let (first, ..) = &rows[0];
    assert_eq!((first.service.as_str(), first.kind.as_str(), first.warning.as_deref()), ("hume", "prosody", None));
    assert_eq!((&first.recording_id, first.received_at), (&ana.to_string(), at(1).naive_utc()));
    let scores: Value = serde_json::from_str(&first.scores).unwrap();
    assert_eq!(scores, json!({"Joy": 0.123_456_789_012_345_67, "Empathic Pain 🥲": 1e-9}));
    assert_eq!((rows[1].0.scores.as_str(), rows[1].0.warning.as_deref()), ("{}", Some("W0105: no speech\u{2400}")));
    assert_eq!(starts(&store, "RM_1", Some("ana")).await, [0, 2_000]);
    assert_eq!(starts(&store, "RM_1", Some("ben")).await, [500]);
    assert!(starts(&store, "RM_1", Some("cleo")).await.is_empty());
    assert_eq!(starts(&store, "other", None).await, [7], "a meeting without a session has its own");
}

pub async fn measurements_are_kept_all_or_none(db: &TestDatabase) {
    let store = db.store().await;
    let recording = open_recording(&store, "room", "room", 1).await;
    let lost = measurement(&RecordingId::new("none"), 1);
    let refusal = store.add_measurements(vec![measurement(&recording, 0), lost]).await.expect_err("there is no such recording");
    assert!(!refusal.is_retryable(), "{refusal:?}");
    assert_eq!(db.count("measurements").await, 0);
}

pub async fn pages_of_measurements_are_complete(db: &TestDatabase) {
    let store = db.store().await;
    let recording = open_recording(&store, "room", "room", 1).await;
    store.add_measurements((0..5).map(|n| measurement(&recording, n)).collect()).await.unwrap();
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = store.measurements(MeetingId::new("room"), None, Page { limit: 2, after: after.clone() }).await.unwrap();
        let Some((last, ..)) = page.last() else { break };
        after = Some((last.received_at, last.id.clone()));
        if seen.is_empty() {
            store.add_measurements(vec![measurement(&recording, 5)]).await.unwrap();
        }
        seen.extend(page.iter().map(|(row, ..)| row.start_ms));
    }
    assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
}
