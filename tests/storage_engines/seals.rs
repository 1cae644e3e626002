//! What is known of finished files, and how those without an end are found.

use live_meeting::audio::gaps::MutedFrames;
use live_meeting::db::rows::seals::Seal;
use live_meeting::db::rows::{ClosedSegment, EndReason, Host};
use live_meeting::ids::{RecordingId, SegmentId, ServerId};

use super::engine::TestDatabase;
use super::fixtures::{ALL, at, closed, deliver, new_segment, open_recording, open_segment, started};

fn seal() -> Seal {
    Seal {
        recovered: true,
        suspect: true,
        tail_unverified_ms: 2_000,
        session_offset_ms: Some(-7),
        drift_ppm: Some(12.5),
        sha256: None,
        width: Some(1_280),
        height: Some(720),
        mute_spans: vec![MutedFrames { start_frame: 3, frames: 4 }],
    }
}

pub async fn a_seal_comes_with_the_first_ending_and_stays(db: &TestDatabase) {
    let store = db.store().await;
    let recording = open_recording(&store, "room", "room", 0).await;
    let (one, other) = (open_segment(&store, &recording, 0).await, open_segment(&store, &recording, 1).await);
    let of = vec![recording.to_string()];
    assert!(store.seals_of(of.clone()).await.unwrap().is_empty(), "an open file has none");
    store.close_segment(ClosedSegment { seal: seal(), ..closed(&one, 2, EndReason::Crashed) }).await.unwrap();
    store.close_segment(closed(&one, 3, EndReason::Closed)).await.unwrap();
    store.close_segments(vec![closed(&one, 4, EndReason::Lost), closed(&other, 5, EndReason::Closed)]).await.unwrap();
    let rows = store.seals_of(of).await.unwrap();
    let row = &rows[one.as_str()];
    assert_eq!((row.recovered, row.suspect, row.tail_unverified_ms, row.session_offset_ms), (true, true, 2_000, Some(-7)));
    assert_eq!((row.drift_ppm, row.sha256.as_deref(), row.width, row.height), (Some(12.5), None, Some(1_280), Some(720)));
    assert_eq!(row.mute_spans, r#"[{"startFrame":3,"frames":4}]"#);
    let row = &rows[other.as_str()];
    assert_eq!((row.recovered, row.suspect, row.tail_unverified_ms, row.session_offset_ms, row.drift_ppm), (false, false, 0, None, None));
    assert_eq!(store.segment(other).await.unwrap().unwrap().end_reason.as_deref(), Some("closed"));
    assert_eq!(store.doubtful_files().await.unwrap(), (1, 1));
    assert_eq!(store.seals_of(Vec::new()).await.unwrap().len(), 0);
}

pub async fn finished_files_have_no_hash_until_they_are_given_one(db: &TestDatabase) {
    let store = db.store().await;
    deliver(&store, started("RM_1", "room", 0)).await;
    let recording = open_recording(&store, "RM_1", "room", 1).await;
    let mut ids: Vec<SegmentId> = Vec::new();
    for second in 0..5 {
        ids.push(open_segment(&store, &recording, second).await);
    }
    for id in &ids[..4] {
        store.close_segment(closed(id, 9, EndReason::Closed)).await.unwrap();
    }
    let without = async |after: &str, limit| {
        let rows = store.without_hash(vec!["wav", "ivf"], after.to_owned(), limit).await.unwrap();
        rows.into_iter().map(|row| row.segment.id).collect::<Vec<_>>()
    };
    assert_eq!(without("", 10).await, ids[..4].iter().map(SegmentId::as_str).collect::<Vec<_>>());
    assert_eq!(without(ids[0].as_str(), 2).await, [ids[1].as_str(), ids[2].as_str()]);
    store.set_hashes(vec![(ids[1].clone(), "ab".to_owned())]).await.unwrap();
    store.set_hashes(vec![(ids[1].clone(), "cd".to_owned())]).await.expect("a second one is no fault");
    assert_eq!(without("", 10).await, [ids[0].as_str(), ids[2].as_str(), ids[3].as_str()]);
    assert_eq!(store.seals_of(vec![recording.to_string()]).await.unwrap()[ids[1].as_str()].sha256.as_deref(), Some("ab"), "the first stays");
    let row = store.without_hash(vec!["wav"], String::new(), 1).await.unwrap().remove(0);
    assert_eq!((row.meeting_id.as_str(), row.room_name.as_str(), row.participant.as_deref()), ("RM_1", "room", Some("ana")));
    assert_eq!((row.session_started_at, row.seal.map(|seal| seal.segment_id)), (Some(at(0).naive_utc()), Some(ids[0].to_string())));
    assert!(store.without_hash(vec!["h264"], String::new(), 9).await.unwrap().is_empty());
    let other = db.store().await.on_behalf_of(Host { server: ServerId::new("other"), autopilot: None });
    assert!(other.without_hash(vec!["wav"], String::new(), 9).await.unwrap().is_empty(), "its files lie elsewhere");
}

pub async fn many_interrupted_segments_and_recordings_end_in_one_transaction(db: &TestDatabase) {
    let store = db.store().await;
    let mut recordings: Vec<RecordingId> = Vec::new();
    for number in 0..3 {
        recordings.push(open_recording(&store, &format!("room {number}"), &format!("room {number}"), number).await);
        open_segment(&store, &recordings[recordings.len() - 1], number).await;
    }
    // Its session became known after it.
    deliver(&store, started("RM_1", "room 1", 0)).await;
    let open = store.interrupted_segments("wav").await.unwrap();
    assert_eq!(open.len(), 3);
    assert!(store.interrupted_segments("ivf").await.unwrap().is_empty());
    assert!(open.iter().all(|row| row.seal.is_none() && row.segment.ended_at.is_none()));
    let ends: Vec<ClosedSegment> =
        open.iter().map(|row| ClosedSegment { seal: seal(), ..closed(&SegmentId::new(row.segment.id.clone()), 7, EndReason::Crashed) }).collect();
    store.close_segments(ends).await.unwrap();
    store.close_crashed_recordings(recordings).await.unwrap();
    assert!(store.interrupted_segments("wav").await.unwrap().is_empty() && store.open_recordings().await.unwrap().is_empty());
    let rows = store.recordings(None, ALL).await.unwrap();
    assert!(rows.iter().all(|row| row.ended_at == Some(at(7).naive_utc())), "{rows:?}");
    assert_eq!(rows.iter().filter(|row| row.session_id.is_some()).count(), 1);
}

pub async fn files_are_found_by_their_paths(db: &TestDatabase) {
    let store = db.store().await;
    let recording = open_recording(&store, "room", "room", 0).await;
    let mut made = Vec::new();
    for second in 0..3 {
        let new = new_segment(&recording, second, None);
        store.open_segment(new.clone()).await.unwrap();
        made.push((new.id.to_string(), new.path));
    }
    let empty = open_segment(&store, &recording, 9).await;
    store.close_segment(ClosedSegment { frames: 0, bytes: 0, ..closed(&empty, 9, EndReason::Crashed) }).await.unwrap();
    assert_eq!(store.segment_files("wav", String::new(), 2).await.unwrap(), made[..2]);
    assert_eq!(store.segment_files("wav", made[1].0.clone(), 2).await.unwrap(), made[2..], "what held nothing has none");
    let asked = vec![made[2].1.clone(), "meeting/none.wav".to_owned()];
    assert_eq!(store.paths_with_rows("wav", asked.clone()).await.unwrap(), [made[2].1.clone()]);
    assert!(store.paths_with_rows("h264", asked).await.unwrap().is_empty());
}
