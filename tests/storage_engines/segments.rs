//! Segments and the tickets that opened them.

use live_meeting::audio::format::PcmFormat;
use live_meeting::audio::gaps::{Gap, GapReason};
use live_meeting::db::DbError;
use live_meeting::db::rows::{ClosedSegment, EndReason, NewRecording, NewSegment, Page, TrackKind};
use live_meeting::ids::{MeetingId, RecordingId, SegmentId};

use super::engine::TestDatabase;
use super::fixtures::{at, closed, new_recording, new_segment, open_recording, open_segment};

pub async fn a_ticket_opens_one_segment_ever(db: &TestDatabase) {
    let store = db.store().await;
    let recording = open_recording(&store, "room", "room", 0).await;
    let first = new_segment(&recording, 0, Some("T1"));
    store.open_segment(first.clone()).await.unwrap();
    let row = store.segment(first.id.clone()).await.unwrap();
    store.open_segment(NewSegment { started_at: at(9), ..first.clone() }).await.expect("the same again is no fault");
    assert_eq!(store.segment(first.id.clone()).await.unwrap(), row, "and changes nothing");
    let refusal = store.open_segment(new_segment(&recording, 1, Some("T1"))).await.expect_err("the ticket is spent");
    assert!(matches!(refusal, DbError::TicketSpent) && !refusal.is_retryable(), "{refusal:?}");
    // Its ending does not give it back, nor does another start of the server.
    store.close_segment(closed(&first.id, 2, EndReason::Closed)).await.unwrap();
    let refusal = db.store().await.open_segment(new_segment(&recording, 3, Some("T1"))).await.expect_err("the ticket is spent");
    assert!(matches!(refusal, DbError::TicketSpent), "{refusal:?}");
    for ticket in [Some("T2"), None, None] {
        store.open_segment(new_segment(&recording, 4, ticket)).await.unwrap();
    }
    assert_eq!(db.count("segments").await, 4);
}

pub async fn the_first_ending_of_a_segment_stays(db: &TestDatabase) {
    let store = db.store().await;
    let recording = open_recording(&store, "room", "room", 0).await;
    let id = open_segment(&store, &recording, 0).await;
    let gaps = vec![Gap { start_frame: 48, frames: 96, reason: GapReason::Overload }, Gap { start_frame: 480, frames: 5, reason: GapReason::Muted }];
    let first = ClosedSegment {
        format: PcmFormat { sample_rate: 44_100, channels: 1 },
        frames: 5_000_000_000,
        bytes: 20_000_000_000,
        gaps,
        ..closed(&id, 7, EndReason::Lost)
    };
    store.close_segment(first).await.unwrap();
    store.close_segment(closed(&id, 9, EndReason::Crashed)).await.expect("a second ending is no fault");
    let row = store.segment(id).await.unwrap().unwrap();
    assert_eq!((row.sample_rate, row.channels, row.frames, row.bytes), (44_100, 1, 5_000_000_000, 20_000_000_000));
    assert_eq!((row.ended_at, row.end_reason.as_deref()), (Some(at(7).naive_utc()), Some("lost")));
    assert_eq!(row.gaps, r#"[{"startFrame":48,"frames":96,"reason":"overload"},{"startFrame":480,"frames":5,"reason":"muted"}]"#);
}

pub async fn video_is_told_from_audio_by_its_files(db: &TestDatabase) {
    let store = db.store().await;
    let new = NewRecording { kind: TrackKind::Video, ..new_recording("RM_1", "room", at(0)) };
    let recording = store.open_recording(new).await.unwrap().id;
    for extension in ["h264", "ivf"] {
        let new = new_segment(&recording, 0, None);
        let (id, path) = (new.id.clone(), format!("meeting/x.{extension}"));
        store.open_segment(NewSegment { path: path.clone(), format: PcmFormat::NONE, ..new }).await.unwrap();
        store.close_segment(ClosedSegment { format: PcmFormat::NONE, ..closed(&id, 1, EndReason::Closed) }).await.unwrap();
        let row = store.segment(id).await.unwrap().unwrap();
        assert_eq!((row.format.as_str(), row.path, row.sample_rate, row.channels), (extension, path, 0, 0));
    }
    let tracks = store.tracks(MeetingId::new("RM_1"), Page { limit: 10, after: None }).await.unwrap();
    assert_eq!(tracks.iter().map(|track| track.kind.as_str()).collect::<Vec<_>>(), ["VIDEO"]);
}

pub async fn only_segments_without_an_end_are_open(db: &TestDatabase) {
    let store = db.store().await;
    assert!(store.interrupted_segments("wav").await.unwrap().is_empty());
    let recording = open_recording(&store, "room", "room", 0).await;
    let mut ids: Vec<SegmentId> = Vec::new();
    for second in 0..4 {
        ids.push(open_segment(&store, &recording, second).await);
    }
    store.close_segment(closed(&ids[2], 5, EndReason::Rotated)).await.unwrap();
    store.close_segment(closed(&ids[0], 5, EndReason::Closed)).await.unwrap();
    let open: Vec<String> = store.interrupted_segments("wav").await.unwrap().into_iter().map(|row| row.segment.id).collect();
    assert_eq!(open, [ids[1].as_str(), ids[3].as_str()]);
}

pub async fn segments_come_in_the_order_of_their_making(db: &TestDatabase) {
    let store = db.store().await;
    let (one, two) = (open_recording(&store, "one", "room", 0).await, open_recording(&store, "two", "room", 0).await);
    let late = open_segment(&store, &one, 9).await;
    let other = open_segment(&store, &two, 5).await;
    let early = open_segment(&store, &one, 1).await;
    let of = async |recordings: &[&RecordingId]| {
        let rows = store.segments_of(recordings.iter().map(ToString::to_string).collect()).await.unwrap();
        rows.into_iter().map(|row| row.id).collect::<Vec<_>>()
    };
    assert_eq!(of(&[&one]).await, [early.as_str(), late.as_str()]);
    assert_eq!(of(&[&one, &two]).await, [early.as_str(), other.as_str(), late.as_str()]);
    assert!(of(&[]).await.is_empty());
}

pub async fn a_segment_without_its_recording_is_refused_for_good(db: &TestDatabase) {
    let store = db.store().await;
    let refusal = store.open_segment(new_segment(&RecordingId::new("none"), 0, Some("T1"))).await.expect_err("there is no such recording");
    assert!(matches!(refusal, DbError::Query(_)) && !refusal.is_retryable(), "{refusal:?}");
    let recording = open_recording(&store, "room", "room", 0).await;
    let first = new_segment(&recording, 0, None);
    store.open_segment(first.clone()).await.unwrap();
    let twice = NewSegment { path: first.path, ..new_segment(&recording, 1, None) };
    let refusal = store.open_segment(twice).await.expect_err("a file has one row");
    assert!(matches!(refusal, DbError::Query(_)) && !refusal.is_retryable(), "{refusal:?}");
    assert_eq!(db.count("segments").await, 1);
}
