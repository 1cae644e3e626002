//! Recordings, the tracks they are of, and the sessions they belong to.

use chrono::NaiveDateTime;
use live_meeting::db::Store;
use live_meeting::db::rows::{Admission, EndReason, MuteSpan, NewRecording, OpenedRecording, Page, RecordingRow, TrackFacts};
use live_meeting::ids::{Identity, MeetingId, RecordingId, RoomName, TicketId, TrackSid, new_row_id};
use live_meeting::journal::rows::{ConnectionRows, Measured, OpenedSegment, RowOp, Written};
use live_meeting::session::event::EventKind;

use super::engine::TestDatabase;
use super::fixtures::{
    ALL, at, at_ms, close, closed, deliver, ended, event, new_recording, new_segment, open_recording, open_segment, participant, started, track,
};

async fn admit(store: &Store, meeting: Option<&str>, ticket: Option<&str>) -> Admission {
    store.admit(RoomName::new("room"), meeting.map(MeetingId::new), ticket.map(TicketId::new)).await.unwrap()
}

async fn row(store: &Store, id: &RecordingId) -> RecordingRow {
    store.recording(id.clone()).await.unwrap().expect("the recording is there")
}

async fn session_id(store: &Store, meeting: &str) -> Option<String> {
    store.session(MeetingId::new(meeting)).await.unwrap().map(|session| session.id)
}

/// The ids of a meeting's recordings, newest first.
async fn of_meeting(store: &Store, meeting: &str) -> Vec<String> {
    let rows = store.recordings(Some(MeetingId::new(meeting)), ALL).await.unwrap();
    rows.into_iter().map(|row| row.id).collect()
}

pub async fn admission_finds_the_active_session(db: &TestDatabase) {
    let store = db.store().await;
    let found = |meeting: Option<&str>| Admission { meeting: meeting.map(MeetingId::new), session_started_at: None, ticket_spent: false };
    let since = |meeting, second| Admission { session_started_at: Some(at(second)), ..found(meeting) };
    deliver(&store, started("RM_other", "other room", 9)).await;
    assert_eq!(admit(&store, None, Some("T1")).await, found(None), "nobody has told of the room");
    deliver(&store, started("RM_1", "room", 0)).await;
    assert_eq!(admit(&store, None, None).await, since(Some("RM_1"), 0));
    deliver(&store, started("RM_2", "room", 5)).await;
    assert_eq!(admit(&store, None, None).await, since(Some("RM_2"), 5), "the newest");
    assert_eq!(admit(&store, Some("RM_1"), None).await, since(None, 0), "whoever names a meeting needs none, but the start of its session");
    assert_eq!(admit(&store, Some("RM_other"), None).await, since(None, 5), "a meeting of another room is none");
    deliver(&store, ended("RM_2", "room", 6)).await;
    deliver(&store, ended("RM_1", "room", 6)).await;
    assert_eq!(admit(&store, None, None).await, found(None));
    let recording = open_recording(&store, "RM_1", "room", 1).await;
    store.open_segment(new_segment(&recording, 1, Some("T1"))).await.unwrap();
    assert!(admit(&store, None, Some("T1")).await.ticket_spent);
    assert!(!admit(&store, None, Some("T2")).await.ticket_spent);
}

pub async fn a_track_continues_its_recording_in_the_same_session_only(db: &TestDatabase) {
    let store = db.store().await;
    deliver(&store, started("RM_1", "room", 0)).await;
    let first = store.open_recording(new_recording("RM_1", "room", at(1))).await.unwrap();
    assert_eq!((first.offset_ms, row(&store, &first.id).await.session_id), (0, session_id(&store, "RM_1").await));
    let segment = open_segment(&store, &first.id, 1).await;
    close(&store, &first.id, &segment, 2).await;
    assert!(row(&store, &first.id).await.ended_at.is_some());
    let again = store.open_recording(new_recording("RM_1", "room", at_ms(4_750))).await.unwrap();
    assert_eq!(again, OpenedRecording { id: first.id.clone(), offset_ms: 3_750, facts: TrackFacts::default() });
    assert_eq!(row(&store, &first.id).await.ended_at, None, "it goes on");
    // The room's name stands in for a meeting that the sender does not know.
    let by_room = store.open_recording(new_recording("room", "room", at(6))).await.unwrap();
    assert_eq!(by_room, OpenedRecording { id: first.id.clone(), offset_ms: 5_000, facts: TrackFacts::default() });
    // A clock that was set back makes no negative time.
    assert_eq!(store.open_recording(new_recording("RM_1", "room", at(0))).await.unwrap().offset_ms, 0);

    let others = [
        NewRecording { participant: Some(Identity::new("ben")), ..new_recording("RM_1", "room", at(7)) },
        NewRecording { participant: None, ..new_recording("RM_1", "room", at(7)) },
        NewRecording { track: Some(TrackSid::new("TR_2")), ..new_recording("RM_1", "room", at(7)) },
        NewRecording { track: None, ..new_recording("RM_1", "room", at(7)) },
        NewRecording { track: None, ..new_recording("RM_1", "room", at(7)) },
    ];
    for (number, other) in others.into_iter().enumerate() {
        assert_eq!(store.open_recording(other.clone()).await.unwrap().offset_ms, 0, "{other:?}");
        assert_eq!(of_meeting(&store, "RM_1").await.len(), number + 2, "{other:?} is a recording of its own");
    }
    deliver(&store, ended("RM_1", "room", 10)).await;
    deliver(&store, started("RM_2", "room", 11)).await;
    for meeting in ["RM_2", "room"] {
        let next = store.open_recording(new_recording(meeting, "room", at(12))).await.unwrap();
        assert_eq!((next.offset_ms, of_meeting(&store, "RM_2").await), (0, vec![next.id.to_string()]));
    }
}

pub async fn a_track_continues_its_recording_while_no_session_is_known(db: &TestDatabase) {
    let store = db.store().await;
    let first = open_recording(&store, "room", "room", 0).await;
    let again = store.open_recording(new_recording("room", "room", at(2))).await.unwrap();
    assert_eq!(again, OpenedRecording { id: first.clone(), offset_ms: 2_000, facts: TrackFacts::default() });
    assert_ne!(open_recording(&store, "another meeting", "room", 3).await, first);
    assert_ne!(open_recording(&store, "room", "another room", 3).await, first);
    assert_eq!(db.count("tracks").await, 3, "continuing makes no track");
}

pub async fn a_recording_ends_with_its_last_segment(db: &TestDatabase) {
    let store = db.store().await;
    let recording = open_recording(&store, "room", "room", 0).await;
    store.close_recording(recording.clone()).await.unwrap();
    assert_eq!(row(&store, &recording).await.ended_at, None, "it has not begun");
    let (one, two) = (open_segment(&store, &recording, 0).await, open_segment(&store, &recording, 5).await);
    close(&store, &recording, &two, 9).await;
    assert_eq!(row(&store, &recording).await.ended_at, None, "one is still written");
    close(&store, &recording, &one, 6).await;
    assert_eq!(row(&store, &recording).await.ended_at, Some(at(9).naive_utc()), "the last end counts");
}

pub async fn a_session_that_appears_later_gets_the_recordings_of_its_room_and_time(db: &TestDatabase) {
    let store = db.store().await;
    let open = async |meeting: &str, room: &str, second| {
        let recording = open_recording(&store, meeting, room, second).await;
        (open_segment(&store, &recording, second).await, recording)
    };
    let (old_segment, old) = open("of yesterday", "room", -7_200).await;
    close(&store, &old, &old_segment, -3_600).await;
    let (just_segment, just_ended) = open("a minute ago", "room", -60).await;
    close(&store, &just_ended, &just_segment, -59).await;
    let (_, elsewhere) = open("other", "other room", 0).await;
    let (live_segment, live) = open("room", "room", 1).await;
    let path = store.segment(live_segment.clone()).await.unwrap().unwrap().path;

    // Any event that names a room tells of its session.
    deliver(&store, event("RM_1", "room", 0, EventKind::ParticipantJoined(participant("PA_1", "Ana")))).await;
    let session = session_id(&store, "RM_1").await;
    assert!(session.is_some());
    assert_eq!(of_meeting(&store, "RM_1").await, [live.as_str(), just_ended.as_str()], "newest first");
    assert_eq!(row(&store, &live).await.session_id, session);
    for apart in [&old, &elsewhere] {
        assert_eq!(row(&store, apart).await.session_id, None);
    }
    assert_eq!(row(&store, &live).await.meeting_id, "room");
    assert_eq!(store.segment(live_segment).await.unwrap().unwrap().path, path, "the file stays where it is");
    assert_eq!(of_meeting(&store, "room").await, [live.as_str()], "under its first name it is found as before");
    let tracks = store.tracks(MeetingId::new("RM_1"), ALL).await.unwrap();
    let of_live: Vec<_> = tracks.iter().filter(|track| track.sid.as_deref() == Some("TR_1")).map(|track| &track.session_id).collect();
    assert_eq!(of_live, [&session], "{tracks:?}");

    // What begins after the end belongs to the next session.
    deliver(&store, ended("RM_1", "room", 100)).await;
    let (_, late) = open("later", "room", 200).await;
    deliver(&store, event("RM_1", "room", 50, EventKind::Other)).await;
    assert_eq!(row(&store, &late).await.session_id, None);
    deliver(&store, started("RM_2", "room", 201)).await;
    assert_eq!(of_meeting(&store, "RM_2").await, [late.as_str()]);
}

pub async fn a_track_that_webhooks_knew_first_takes_over_what_the_ingest_knows(db: &TestDatabase) {
    let store = db.store().await;
    let recording = open_recording(&store, "room", "room", 1).await;
    let spans = vec![MuteSpan { start_ms: 250, end_ms: Some(900) }, MuteSpan { start_ms: 2_000, end_ms: None }];
    let facts = TrackFacts { format_mismatch: Some("stereo arrives".to_owned()), mute_spans: spans };
    store.set_track_facts(recording.clone(), facts).await.unwrap();
    // The event makes the session, its own row of the track, and only then finds the recording.
    deliver(&store, event("RM_1", "room", 0, EventKind::TrackPublished(participant("PA_1", ""), track("TR_1", "mic")))).await;
    let tracks = store.tracks(MeetingId::new("RM_1"), ALL).await.unwrap();
    assert_eq!(tracks.len(), 1, "{tracks:?}");
    assert_eq!((tracks[0].name.as_str(), tracks[0].format_mismatch.as_deref()), ("mic", Some("stereo arrives")));
    assert_eq!(tracks[0].mute_spans, r#"[{"startMs":250,"endMs":900},{"startMs":2000,"endMs":null}]"#);
    assert_eq!(row(&store, &recording).await.track_id, tracks[0].id);
    assert_eq!(db.count("tracks").await, 1, "the ingest's own row is gone");
    // What it finds out later goes to the same row, and a connection that comes later adds none.
    store.set_track_facts(recording.clone(), TrackFacts::default()).await.unwrap();
    assert_eq!(open_recording(&store, "RM_1", "room", 3).await, recording);
    let tracks = store.tracks(MeetingId::new("RM_1"), ALL).await.unwrap();
    assert_eq!((tracks.len(), tracks[0].format_mismatch.as_deref(), tracks[0].mute_spans.as_str()), (1, None, "[]"));

    // The other way round: the session and its track are known, the recording comes.
    deliver(&store, event("RM_2", "room 2", 0, EventKind::TrackPublished(participant("PA_2", ""), track("TR_1", "mic")))).await;
    let second = open_recording(&store, "RM_2", "room 2", 1).await;
    let tracks = store.tracks(MeetingId::new("RM_2"), ALL).await.unwrap();
    assert_eq!((tracks.len(), row(&store, &second).await.track_id), (1, tracks[0].id.clone()));
}

pub async fn a_recording_that_missed_its_session_finds_it_at_its_end(db: &TestDatabase) {
    let store = db.store().await;
    let recording = open_recording(&store, "room", "room", 1).await;
    let segment = open_segment(&store, &recording, 1).await;
    deliver(&store, event("RM_1", "room", 0, EventKind::TrackPublished(participant("PA_1", ""), track("TR_1", "mic")))).await;
    // As if both had been committed at the same time, neither seeing the other.
    db.execute(
        "INSERT INTO tracks (id, room_name, sid, kind, source, name, mime_type, mute_spans)
         VALUES ('own', 'room', 'TR_1', 'AUDIO', '', '', '', '[{\"startMs\":7,\"endMs\":9}]');
         UPDATE recordings SET session_id = NULL, track_id = 'own'",
    )
    .await
    .unwrap();
    deliver(&store, ended("RM_0", "room", -100)).await;
    assert_eq!(row(&store, &recording).await.session_id, None, "an earlier session does not take it");
    close(&store, &recording, &segment, 2).await;
    let row = row(&store, &recording).await;
    assert_eq!((row.session_id, row.ended_at), (session_id(&store, "RM_1").await, Some(at(2).naive_utc())));
    let tracks = store.tracks(MeetingId::new("RM_1"), ALL).await.unwrap();
    assert_eq!((tracks.len(), tracks[0].mute_spans.as_str(), &tracks[0].id), (1, r#"[{"startMs":7,"endMs":9}]"#, &row.track_id));
    assert_eq!(db.count("tracks").await, 1);
}

pub async fn pages_of_recordings_neither_repeat_nor_lose_a_row_when_others_come_between(db: &TestDatabase) {
    let store = db.store().await;
    let open = async |meeting: &str, millisecond| {
        let new = NewRecording { track: None, ..new_recording(meeting, "room", at_ms(millisecond)) };
        store.open_recording(new).await.unwrap().id.into_string()
    };
    let mut expected = Vec::new();
    for millisecond in [1_000, 1_500, 1_500, 1_500, 2_000] {
        expected.insert(0, open("meeting", millisecond).await);
        open("another meeting", millisecond).await;
    }
    let mut seen: Vec<String> = Vec::new();
    let mut after: Option<(NaiveDateTime, String)> = None;
    loop {
        let page = store.recordings(Some(MeetingId::new("meeting")), Page { limit: 2, after: after.clone() }).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some((last.started_at, last.id.clone()));
        if seen.is_empty() {
            open("meeting", 9_000).await;
            expected.push(open("meeting", 500).await);
        }
        seen.extend(page.into_iter().map(|row| row.id));
    }
    assert_eq!(seen, expected);
    assert_eq!(store.recordings(None, ALL).await.unwrap().len(), 12, "without a meeting, all of them");
}

pub async fn a_recording_that_is_asked_for_again_under_its_id_is_the_same(db: &TestDatabase) {
    let store = db.store().await;
    let named = new_recording("RM_1", "room", at(1));
    let unnamed = NewRecording { track: None, ..new_recording("RM_1", "room", at(1)) };
    for new in [named, unnamed] {
        // At once, as when a call that was given up and its repetition meet.
        let answers = futures_util::future::join_all((0..3).map(|_| store.open_recording(new.clone()))).await;
        for answer in answers {
            assert_eq!(answer.unwrap(), OpenedRecording { id: new.id.clone(), offset_ms: 0, facts: TrackFacts::default() });
        }
        // Also behind a session that came meanwhile.
        deliver(&store, started("RM_1", "room", 0)).await;
        assert_eq!(store.open_recording(new.clone()).await.unwrap().id, new.id);
    }
    assert_eq!((db.count("recordings").await, db.count("tracks").await), (2, 2));
}

pub async fn the_rows_of_a_connection_that_are_written_twice_are_as_if_once(db: &TestDatabase) {
    let store = db.store().await;
    // An earlier connection of the track has been muted.
    let earlier = open_recording(&store, "RM_1", "room", 1).await;
    let spans = |spans: &[(u64, u64)]| TrackFacts {
        mute_spans: spans.iter().map(|(start, end)| MuteSpan { start_ms: *start, end_ms: Some(*end) }).collect(),
        format_mismatch: None,
    };
    store.set_track_facts(earlier, spans(&[(0, 500)])).await.unwrap();
    let rows = ConnectionRows { recording: new_recording("RM_1", "room", at(11)), opened: None };
    let segment = new_segment(&rows.recording.id, 11, None);
    let measured = Measured {
        id: new_row_id(),
        service: "hume".into(),
        kind: "prosody".into(),
        start_ms: 0,
        end_ms: 2_000,
        scores: vec![("Joy".to_owned(), 0.5)],
        warning: None,
        received_at: at(12),
    };
    let opened = OpenedSegment { id: segment.id.clone(), path: segment.path, format: segment.format, started_at: segment.started_at };
    let ops = [
        RowOp::Opened(opened, Some(TicketId::new("ticket"))),
        RowOp::Facts(spans(&[(0, 100)])),
        RowOp::Facts(spans(&[(0, 100), (200, 300)])),
        RowOp::Measured(vec![measured]),
        RowOp::Closed(closed(&segment.id, 13, EndReason::Closed)),
        RowOp::End,
    ];
    // The second time as after a crash: what the first time learnt is not known.
    for _ in 0..2 {
        let mut rows: ConnectionRows = serde_json::from_str(&serde_json::to_string(&rows).unwrap()).unwrap();
        for op in &ops {
            let op: RowOp = serde_json::from_str(&serde_json::to_string(op).unwrap()).unwrap();
            assert_eq!(rows.write(&store, op).await.unwrap(), Written::AsSaid);
        }
        for table in ["recordings", "segments", "tracks", "measurements"] {
            assert_eq!(db.count(table).await, 1, "{table}");
        }
        let recording = RecordingId::new(of_meeting(&store, "RM_1").await.remove(0));
        assert_eq!(row(&store, &recording).await.ended_at, Some(at(13).naive_utc()));
        let tracks = store.tracks(MeetingId::new("RM_1"), ALL).await.unwrap();
        let expected = [(0, 500), (10_000, 10_100), (10_200, 10_300)];
        assert_eq!(tracks[0].mute_spans, serde_json::to_string(&spans(&expected).mute_spans).unwrap());
    }
}
