//! I8: a panic stays where it is.

use super::{all_final, continued, cut_short, failing, twenty_speak};
use super::{recorded, speak, speech};
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::fake_hume::{FakeHume, FakeHumeOptions};
use crate::support::test_app::read_wav;

/// Panics once, in one of twenty tracks, a second after they have begun. How many are cut short by it, and how many go on in another segment?
async fn a_panic_at(point: &str, after: u32, short: usize, further: usize) {
    let app = failing(&format!("{point}={after}*off->1*panic->off")).start().await;
    let spoken = twenty_speak(&app).await;
    let kept = all_final(&app).await;
    app.logged("panicked").await;
    let cut = cut_short(&spoken, &kept);
    assert_eq!((cut.len(), continued(&kept)), (short, further), "{point}: {cut:?} are cut short; the log:\n{}", app.log());
    app.healthy().await;
    for number in cut {
        assert!(!spoken[&number].close.close_frame || spoken[&number].close.code == Some(1011), "{point}: {:?}", spoken[&number].close);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_panic_of_a_socket_ends_that_track_alone() {
    a_panic_at("socket-batch", 200, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_panic_of_a_track_ends_that_track_alone() {
    a_panic_at("track-audio", 200, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_panic_of_a_buffer_ends_that_track_alone() {
    a_panic_at("buffer-push", 200, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_writer_that_panics_is_followed_by_the_next_segment_without_a_loss() {
    a_panic_at("writer-turn", 150, 0, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_write_that_panics_is_followed_by_the_next_segment_without_a_loss() {
    a_panic_at("writer-append", 150, 0, 1).await;
}

/// In its turn, and in the write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_the_segment_of_a_writer_that_panics_is_final_while_its_track_speaks_on() {
    for point in ["writer-turn", "writer-append"] {
        let app = failing(&format!("{point}=2*off->1*panic->off")).start().await;
        let mut peer = EgressPeer::connect(app.addr, "/egress-audio?roomName=room&participant=ana&trackId=TR_1").await.unwrap();
        let pcm = counter_pcm(48_000, 1);
        for (number, part) in pcm.chunks(19_200).enumerate() {
            if let 1 | 2 | 7 = number {
                peer.mute(number != 2).await.unwrap();
            }
            peer.send_pcm(part).await.unwrap();
            let sent = peer.sent().audio_bytes as u64;
            let written = async || (app.live("ana").await?["recordedBytes"].as_u64()? == sent).then_some(());
            app.eventually("it is written", written).await;
        }
        let ended = async || app.items("/api/v1/recordings").await[0]["segments"][0]["endedAt"].as_str().map(drop);
        app.eventually("the first segment's row is final", ended).await;
        assert!(app.live("ana").await.is_some_and(|live| live["restarts"]["wavWriter"] == 1), "its track goes on: {}", app.log());
        peer.close_and_wait().await;
        app.settled().await;
        let segments = app.items("/api/v1/recordings").await[0]["segments"].clone();
        let (mut kept, mut muted) = (Vec::new(), Vec::new());
        for segment in segments.as_array().unwrap() {
            let path = app.audio_dir().join(segment["path"].as_str().unwrap());
            let sidecar: serde_json::Value = serde_json::from_slice(&std::fs::read(format!("{}.json", path.display())).unwrap()).unwrap();
            let spans = sidecar["muteSpans"].as_array().unwrap().iter();
            muted.extend(spans.map(|span| (kept.len() as u64 / 4 + span["startFrame"].as_u64().unwrap(), span["frames"].as_u64().unwrap())));
            kept.extend(read_wav(&path).1);
        }
        assert_eq!(segments.as_array().unwrap().iter().map(|segment| &segment["endReason"]).collect::<Vec<_>>(), ["failed", "closed"], "{point}");
        assert!(kept == pcm, "{point}: {} of {} bytes", kept.len(), pcm.len());
        assert_eq!(muted, [(4_800, 4_800), (33_600, 14_400)], "{point}: on the connection's time");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_seal_that_panics_costs_nothing() {
    a_panic_at("writer-seal", 5, 0, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_row_that_panics_is_written_all_the_same() {
    a_panic_at("rows-keep", 10, 0, 0).await;
    a_panic_at("rows-write", 10, 0, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_sync_that_panics_makes_files_suspect_and_costs_nothing() {
    let app = failing("syncer-sync=1*off->1*panic->off").start().await;
    let spoken = twenty_speak(&app).await;
    let kept = all_final(&app).await;
    assert_eq!(cut_short(&spoken, &kept), [0; 0], "{}", app.log());
    let rows: Vec<_> = kept.values().flat_map(|track| &track.rows).collect();
    assert!(rows.iter().any(|row| row["suspect"] == true), "{rows:?}");
    assert!(kept.values().all(|track| track.rows.last().unwrap()["suspect"] == false), "the segments behind it are not: {rows:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d5_syncs_that_keep_failing_end_no_track_and_lose_nothing() {
    let app = failing("syncer-sync=panic").start().await;
    // Six files are given up, one a second; the seventh is written to its end.
    let spoken = speak(&app, 0, 200).await.await.unwrap();
    assert!(spoken.close.close_frame && spoken.close.code.is_none(), "the track was not ended: {:?}\n{}", spoken.close, app.log());
    let ended = async || recorded(&app).await.remove(&0).filter(|track| track.ended);
    let kept = app.eventually("its rows are final", ended).await;
    assert!(kept.pcm == speech(0, spoken.sent), "{} of {} bytes", kept.pcm.len(), spoken.sent);
    assert_eq!(kept.rows.len(), 7, "{:?}", kept.rows);
    assert!(kept.rows.iter().all(|row| row["suspect"] == true), "{:?}", kept.rows);
    assert_eq!(app.metric("live_meeting_tracks_given_up_total").await, 0.0);
}

/// What moves for a filled pause wants a sync of its own, which fails too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d5_a_pause_that_is_filled_while_syncs_keep_failing_ends_no_track() {
    let app = failing("syncer-sync=panic").start().await;
    let mut peer = EgressPeer::connect(app.addr, "/egress-audio?roomName=room&participant=p000&trackId=TR_1").await.unwrap();
    let pcm = counter_pcm(48_000 * 14, 1);
    let (before, behind) = pcm.split_at(192_000 * 10);
    peer.send_realtime(before).await.unwrap();
    peer.pause(std::time::Duration::from_secs(2)).await;
    peer.go_on(behind).await.unwrap();
    let close = peer.close_and_wait().await;
    assert!(close.close_frame && close.code.is_none(), "the track was not ended: {close:?}\n{}", app.log());
    let ended = async || recorded(&app).await.remove(&0).filter(|track| track.ended);
    let kept = app.eventually("its rows are final", ended).await;
    assert!(kept.rows.iter().any(|row| row["gaps"].as_array().is_some_and(|gaps| !gaps.is_empty())), "{:?}", kept.rows);
    assert!(kept.pcm == pcm, "{} of {} bytes: {:?}", kept.pcm.len(), pcm.len(), kept.rows);
    assert_eq!(app.metric("live_meeting_tracks_given_up_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d5_a_sync_that_failed_is_not_forgotten_when_the_server_is_killed() {
    let app = failing("syncer-sync=panic").start().await;
    let speaker = speak(&app, 0, 36_000).await;
    // The seventh file goes on, whatever becomes of its syncs; its writer knows of them.
    let noted = async || {
        let last = app.wav_files().into_iter().nth(6)?;
        let notes = last.with_file_name(format!(".{}.notes", last.file_name()?.to_str()?));
        std::fs::read_to_string(notes).ok()?.contains(r#""suspect":true"#).then_some(())
    };
    app.eventually("it is noted", noted).await;
    let stopped = app.kill().await;
    speaker.abort();
    let app = failing("syncer-sync=off").dir(&stopped.dir).start().await;
    let rows = recorded(&app).await.remove(&0).expect("its recording").rows;
    assert!(rows.len() == 7 && rows.iter().all(|row| row["suspect"] == true), "{rows:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_file_whose_hashing_panics_does_not_keep_others_from_theirs() {
    let app = failing("hasher-file=1*panic->off").start().await;
    let spoken = twenty_speak(&app).await;
    let kept = all_final(&app).await;
    assert_eq!(cut_short(&spoken, &kept), [0; 0]);
    let hashed = async || {
        let kept = super::recorded(&app).await;
        let hashed = kept.values().flat_map(|track| &track.rows).filter(|row| row["sha256"].is_string()).count();
        (hashed == kept.len() - 1).then_some(())
    };
    app.eventually("all but one are hashed", hashed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_an_analysis_that_panics_is_restarted_and_no_recording_notices() {
    let fake = FakeHume::start(FakeHumeOptions { api_key: "key".to_owned(), ..FakeHumeOptions::default() });
    let streaming = failing("analysis-send=3*off->1*panic->off").env("HUME_WS_URL", fake.url()).env("HUME_API_KEY", "key");
    let app = streaming.start().await;
    let spoken = twenty_speak(&app).await;
    app.logged("child=Analysis").await;
    let kept = all_final(&app).await;
    assert_eq!((cut_short(&spoken, &kept).len(), continued(&kept)), (0, 0), "{}", app.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_the_sixth_failure_within_a_minute_ends_its_track_and_is_told() {
    // One track alone, whose appends all panic but the first of each of some segments.
    let app = failing("writer-append=3*off->6*panic->off").start().await;
    let spoken = crate::support::speaker::speak(&app, 0, 100).await.await.unwrap();
    assert_eq!((spoken.close.code, spoken.close.reason.as_str()), (Some(1011), "failed"), "{:?}; {}", spoken.close, app.log());
    let ended = async || super::recorded(&app).await.remove(&0).filter(|track| track.ended);
    let track = app.eventually("its rows are final", ended).await;
    assert_eq!(track.rows.last().unwrap()["endReason"], "failed", "{:?}", track.rows);
    assert!(app.log().contains("fail again and again"), "{}", app.log());
    let metrics = String::from_utf8(app.get("/metrics").await.body).unwrap();
    for told in ["live_meeting_writer_restarts_total 5", "live_meeting_tracks_given_up_total 1"] {
        assert!(metrics.contains(told), "{told}:\n{metrics}");
    }
    // The next connection of the same track is let in.
    let again = crate::support::speaker::speak(&app, 0, 3).await.await.unwrap();
    assert!(again.close.close_frame, "{:?}", again.close);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_registry_that_panics_ends_the_process_which_every_file_survives() {
    let mut app = failing("registry-reserve=1*off->1*panic").start().await;
    let speaker = crate::support::speaker::speak(&app, 0, 600).await;
    let heard = async || app.live("p000").await.filter(|live| live["recordedBytes"].as_u64() > Some(20_000)).map(drop);
    app.eventually("it is heard", heard).await;
    let path = "/egress-audio?roomName=room&participant=p001&trackId=TR_1";
    let addr = app.addr;
    // Nobody answers it.
    tokio::spawn(async move { crate::support::egress_peer::EgressPeer::connect(addr, path).await.map(drop) });
    let status = tokio::time::timeout(std::time::Duration::from_secs(20), app.child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(70), "{}", app.log());
    let spoken = speaker.await.unwrap();
    let app = crate::support::test_app::TestApp::builder().open().dir(&app.dir).start().await;
    let kept = super::recorded(&app).await;
    assert!(kept[&0].ended && kept[&0].pcm.len() > 20_000, "{:?}", kept[&0].rows);
    assert!(crate::support::speaker::speech(0, spoken.sent).starts_with(&kept[&0].pcm));
}
