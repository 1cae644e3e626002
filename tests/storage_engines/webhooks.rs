//! Events and the sessions, participants and tracks they make.

use chrono::{NaiveDateTime, TimeDelta};
use futures_util::future::join_all;
use live_meeting::db::Store;
use live_meeting::db::rows::events::{Applied, Arrival, StoredBody};
use live_meeting::db::rows::{Page, SessionFilter, SessionRow};
use live_meeting::ids::{Identity, MeetingId, RoomName};
use live_meeting::session::event::{EventKind, SessionEvent};
use live_meeting::session::lifecycle::SessionStatus;

use super::engine::TestDatabase;
use super::fixtures::{ALL, at, at_ms, body, deliver, ended, event, participant, started, track};

pub async fn events_are_kept_once(db: &TestDatabase) {
    let store = db.store().await;
    let first = started("RM_1", "room", 0);
    let text = r#"{"event":"room_started"}"#.to_owned();
    let kept = store
        .apply_event(Arrival { event: first.clone(), body: StoredBody { text: text.clone(), understood: true, received_at: at(1) } })
        .await
        .unwrap();
    let Applied::Kept(Some(session)) = kept else { panic!("{kept:?}") };
    assert_eq!((session.meeting_id.as_str(), session.status.as_str(), session.started_at), ("RM_1", "ACTIVE", at(0).naive_utc()));
    // The id decides, whatever else it says.
    let repeated = SessionEvent { id: first.id, ..ended("RM_1", "room", 9) };
    assert_eq!(deliver(&store, repeated).await, Applied::Repeated);
    assert_eq!(store.session(MeetingId::new("RM_1")).await.unwrap(), Some(session));
    assert_eq!(db.texts("SELECT body AS text FROM webhook_events").await, [text]);
    // One that names no room is kept, and that is all.
    let roomless = SessionEvent { room: None, ..event("", "", 0, EventKind::Other) };
    assert_eq!(deliver(&store, roomless.clone()).await, Applied::Kept(None));
    assert_eq!(deliver(&store, roomless).await, Applied::Repeated);
    assert_eq!((db.count("webhook_events").await, db.count("sessions").await), (2, 1));
}

pub async fn events_are_kept_once_when_they_come_at_the_same_time(db: &TestDatabase) {
    let store = db.store().await;
    let event = event("RM_1", "room", 0, EventKind::ParticipantJoined(participant("PA_1", "Ana")));
    let answers = join_all((0..20).map(|_| deliver(&store, event.clone()))).await;
    assert_eq!(answers.iter().filter(|answer| **answer != Applied::Repeated).count(), 1, "{answers:?}");
    for table in ["webhook_events", "sessions", "participants"] {
        assert_eq!(db.count(table).await, 1, "{table}");
    }
}

pub async fn different_events_of_a_room_at_the_same_time_are_all_kept(db: &TestDatabase) {
    let store = db.store().await;
    let kind = |n: i64| match n % 3 {
        0 => EventKind::RoomStarted,
        1 => EventKind::TrackPublished(participant("PA_1", ""), track("TR_1", &format!("mic {n}"))),
        _ => EventKind::ParticipantJoined(participant("PA_1", &format!("Ana {n}"))),
    };
    let answers = join_all((0..20).rev().map(|n| deliver(&store, event("RM_1", "room", n, kind(n))))).await;
    assert!(answers.iter().all(|answer| matches!(answer, Applied::Kept(Some(_)))), "{answers:?}");
    let session = store.session(MeetingId::new("RM_1")).await.unwrap().unwrap();
    assert_eq!(session.started_at, at(0).naive_utc());
    let participants = store.participants(session.id).await.unwrap();
    assert_eq!((participants.len(), participants[0].name.as_str(), participants[0].joined_at), (1, "Ana 17", Some(at(2).naive_utc())));
    let tracks = store.tracks(MeetingId::new("RM_1"), ALL).await.unwrap();
    assert_eq!((tracks.len(), tracks[0].name.as_str(), tracks[0].published_at), (1, "mic 19", Some(at(1).naive_utc())));
}

/// A meeting from its beginning to its end.
fn story(room_sid: &str, room_name: &str) -> Vec<SessionEvent> {
    let kinds = [
        EventKind::RoomStarted,
        EventKind::ParticipantJoined(participant("PA_1", "Ana")),
        EventKind::TrackPublished(participant("PA_1", ""), track("TR_1", "mic")),
        EventKind::Other,
        EventKind::TrackUnpublished(participant("PA_1", ""), track("TR_1", "mic 2")),
        EventKind::ParticipantLeft(participant("PA_1", "Ana B.")),
        EventKind::RoomEnded,
    ];
    kinds.into_iter().zip(0..).map(|(kind, second)| event(room_sid, room_name, second, kind)).collect()
}

/// All that is kept of a meeting, but for the ids and names that tell meetings apart.
async fn told(store: &Store, room_sid: &str) -> String {
    let session = store.session(MeetingId::new(room_sid)).await.unwrap().expect("a session");
    let mut participants = store.participants(session.id).await.unwrap();
    participants.iter_mut().for_each(|row| row.id.clear());
    let mut tracks = store.tracks(MeetingId::new(room_sid), ALL).await.unwrap();
    for row in &mut tracks {
        row.id.clear();
        row.room_name.clear();
        row.session_id = None;
    }
    format!("{} {} {:?}\n{participants:#?}\n{tracks:#?}", session.status, session.started_at, session.ended_at)
}

pub async fn every_order_of_a_story_gives_equal_rows(db: &TestDatabase) {
    const ORDERS: [&[usize]; 10] = [
        &[0, 1, 2, 3, 4, 5, 6],
        &[6, 5, 4, 3, 2, 1, 0],
        &[1, 2, 3, 4, 5, 6, 0],
        &[2, 4, 0, 6, 1, 3, 5],
        &[3, 6, 2, 5, 1, 4, 0],
        &[4, 2, 5, 1, 6, 0, 3],
        &[5, 1, 4, 2, 0, 3, 6],
        &[6, 0, 5, 1, 4, 2, 3],
        &[0, 0, 6, 6, 4, 2, 4, 2, 5, 1, 1, 5, 3],
        &[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6],
    ];
    let store = db.store().await;
    for (number, order) in ORDERS.iter().enumerate() {
        let (room_sid, room_name) = (format!("RM_{number}"), format!("room {number}"));
        let story = story(&room_sid, &room_name);
        for index in *order {
            deliver(&store, story[*index].clone()).await;
        }
        assert_eq!(told(&store, &room_sid).await, told(&store, "RM_0").await, "{order:?}");
    }
    let first = store.session(MeetingId::new("RM_0")).await.unwrap().unwrap();
    assert_eq!((first.status.as_str(), first.ended_at), ("ENDED", Some(at(6).naive_utc())));
    let (people, tracks) = (store.participants(first.id).await.unwrap(), store.tracks(MeetingId::new("RM_0"), ALL).await.unwrap());
    assert_eq!((people.len(), people[0].name.as_str(), people[0].left_at), (1, "Ana B.", Some(at(5).naive_utc())));
    assert_eq!((tracks.len(), tracks[0].name.as_str(), tracks[0].unpublished_at), (1, "mic 2", Some(at(4).naive_utc())));
}

fn meetings(rows: &[SessionRow]) -> Vec<&str> {
    rows.iter().map(|row| row.meeting_id.as_str()).collect()
}

/// A session that started between whole seconds, as LiveKit's creation times do.
async fn start_at_ms(store: &Store, room_sid: &str, millisecond: i64) {
    let mut event = started(room_sid, "room", 1_000);
    event.room.as_mut().unwrap().created_at = Some(at_ms(millisecond));
    deliver(store, event).await;
}

pub async fn sessions_are_listed_newest_first_and_by_filter(db: &TestDatabase) {
    let store = db.store().await;
    for (room_sid, millisecond) in [("RM_3", 1_500), ("RM_1", 999), ("RM_5", 10_000), ("RM_2", 1_000), ("RM_4", 1_501)] {
        start_at_ms(&store, room_sid, millisecond).await;
    }
    deliver(&store, started("RM_other", "other room", 2)).await;
    deliver(&store, ended("RM_4", "room", 20)).await;
    let list = async |status, room: Option<&str>| {
        let filter = SessionFilter { status, room_name: room.map(RoomName::new) };
        let rows = store.sessions(filter, ALL).await.unwrap();
        meetings(&rows).join(" ")
    };
    assert_eq!(list(None, None).await, "RM_5 RM_other RM_4 RM_3 RM_2 RM_1");
    assert_eq!(list(None, Some("room")).await, "RM_5 RM_4 RM_3 RM_2 RM_1");
    assert_eq!(list(Some(SessionStatus::Ended), None).await, "RM_4");
    assert_eq!(list(Some(SessionStatus::Active), Some("room")).await, "RM_5 RM_3 RM_2 RM_1");
    assert_eq!(list(Some(SessionStatus::Ended), Some("other room")).await, "");
}

pub async fn pages_of_sessions_neither_repeat_nor_lose_a_row_when_others_come_between(db: &TestDatabase) {
    let store = db.store().await;
    for (room_sid, millisecond) in [("RM_1", 1_000), ("RM_2", 2_000), ("RM_3", 2_000), ("RM_4", 2_000), ("RM_5", 5_000)] {
        start_at_ms(&store, room_sid, millisecond).await;
    }
    let mut seen: Vec<String> = Vec::new();
    let mut after: Option<(NaiveDateTime, String)> = None;
    loop {
        let page = store.sessions(SessionFilter::default(), Page { limit: 2, after: after.clone() }).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some((last.started_at, last.id.clone()));
        if seen.is_empty() {
            // One before what was seen, which is too late, and one behind it, which is not.
            start_at_ms(&store, "RM_newer", 9_000).await;
            start_at_ms(&store, "RM_older", 500).await;
        }
        seen.extend(page.into_iter().map(|row| row.meeting_id));
    }
    assert_eq!(seen, ["RM_5", "RM_4", "RM_3", "RM_2", "RM_1", "RM_older"]);
}

pub async fn nul_and_long_and_emoji_names_survive(db: &TestDatabase) {
    let store = db.store().await;
    // As long as a name may be, and of a kind that no compression makes fit into an index.
    let long: String = std::iter::repeat_with(|| uuid::Uuid::new_v4().simple().to_string()).take(32).collect();
    assert_eq!(long.len(), 1_024);
    for (number, name) in ["nul\0nul", "👩‍👩‍👧 会議 \u{202e}", "'; DROP TABLE sessions; --", &long].into_iter().enumerate() {
        let kept = name.replace('\0', "\u{2400}");
        let room_sid = format!("RM_{number}{name}");
        let mut speaker = participant(name, &kept.repeat(50));
        speaker.identity = Identity::new(name);
        let mut joined = event(&room_sid, name, 0, EventKind::ParticipantJoined(speaker.clone()));
        joined.name = name.to_owned();
        deliver(&store, joined).await;
        deliver(&store, event(&room_sid, name, 1, EventKind::TrackPublished(speaker, track(name, &kept)))).await;
        let filter = SessionFilter { status: None, room_name: Some(RoomName::new(name)) };
        let sessions = store.sessions(filter, ALL).await.unwrap();
        assert_eq!((sessions.len(), sessions[0].room_name.as_str()), (1, kept.as_str()));
        let people = store.participants(sessions[0].id.clone()).await.unwrap();
        assert_eq!((people[0].sid.as_str(), people[0].identity.as_str(), people[0].name.as_str()), (&*kept, &*kept, &*kept.repeat(50)));
        let tracks = store.tracks(MeetingId::new(&room_sid), ALL).await.unwrap();
        assert_eq!((tracks[0].sid.as_deref(), tracks[0].name.as_str()), (Some(&*kept), &*kept));
    }
    // The text of an event may be as long as a webhook's body.
    let text = "🎉".repeat((1 << 20) / 4);
    store.apply_event(Arrival { event: started("RM_big", "room", 0), body: StoredBody { text: text.clone(), ..body() } }).await.unwrap();
    assert!(db.texts("SELECT body AS text FROM webhook_events WHERE room_sid = 'RM_big'").await == [text], "the body is changed");
    let times = store.session(MeetingId::new("RM_big")).await.unwrap().unwrap();
    assert_eq!(times.started_at + TimeDelta::seconds(1), at(1).naive_utc());
}
