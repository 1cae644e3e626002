//! A disk that refuses writes, and limits of the system (D6, F11).

use std::collections::BTreeMap;
use std::time::Duration;

use super::{STEREO_FRAME, all_recorded, connect, eager, files, metric, pcm, reasons, recording};
use crate::support::egress_peer::counter_pcm;
use crate::support::faults::{Strace, frames_for_players};
use crate::support::machine::skip;
use crate::support::speaker::{recorded, speak, speech};
use crate::support::test_app::read_wav;

const MIB: usize = 1 << 20;

#[tokio::test]
async fn d6_a_disk_that_refuses_is_tried_until_it_takes_everything_and_each_refusal_has_its_words() {
    let cases = [
        ("ENOSPC", "no space is left for recordings"),
        ("EDQUOT", "the quota for recordings is used up"),
        ("EROFS", "the file system of recordings is read-only"),
        ("EACCES", "recordings may not be written"),
    ];
    let app = eager().start().await;
    let sent = counter_pcm(5 * MIB / STEREO_FRAME, 1);
    let mut peer = connect(&app, "ana").await;
    let (first, rest) = sent.split_at(MIB);
    peer.send_pcm(first).await.unwrap();
    all_recorded(&app, "ana").await;
    let file = app.wav_file();
    for ((error, words), part) in cases.into_iter().zip(rest.chunks(MIB)) {
        let Some(refusing) = Strace::inject(&app, None, &format!("error={error}"), Some(&file)) else { return };
        peer.send_pcm(part).await.unwrap();
        app.logged(&format!("{words}, trying again every second")).await;
        let found = read_wav(&file).1;
        assert!(sent.starts_with(&found), "{error}");
        assert!(frames_for_players(&file).iter().all(|(_, frames)| *frames as usize * STEREO_FRAME == found.len()), "{error}");
        drop(refusing);
        all_recorded(&app, "ana").await;
        assert_eq!(app.log().matches(words).count(), 1, "{words}");
    }
    peer.close_and_wait().await;
    let recording = recording(&app, "ana").await;
    assert!(pcm(&files(&app, &recording)) == sent);
    assert_eq!((recording["segments"].as_array().unwrap().len(), metric(&app, "live_meeting_writer_restarts_total").await), (1, 0.0));
}

#[tokio::test]
async fn d6_a_write_that_fails_for_good_ends_its_segment_and_the_next_has_the_rest() {
    let app = eager().start().await;
    let sent = counter_pcm(2 * MIB / STEREO_FRAME, 1);
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(&sent[..MIB]).await.unwrap();
    all_recorded(&app, "ana").await;
    let Some(_failing) = Strace::inject(&app, None, "error=EIO", Some(&app.wav_file())) else { return };
    peer.send_pcm(&sent[MIB..]).await.unwrap();
    all_recorded(&app, "ana").await;
    peer.close_and_wait().await;
    let recording = recording(&app, "ana").await;
    let files = files(&app, &recording);
    assert!(files.len() == 2 && pcm(&files) == sent, "{recording}");
    assert_eq!(recording["segments"][0]["endReason"], "failed");
    assert_eq!(metric(&app, "live_meeting_writer_restarts_total").await, 1.0);
}

#[tokio::test]
async fn d5_a_failed_sync_is_never_taken_back_and_the_next_segment_has_what_comes() {
    let app = eager().start().await;
    let sent = counter_pcm(48_000 * 60, 1);
    let mut peer = connect(&app, "ana").await;
    let (first, rest) = sent.split_at(38_400);
    peer.send_pcm(first).await.unwrap();
    app.eventually("there is a file", async || (app.wav_files().len() == 1).then_some(())).await;
    let Some(failing) = Strace::inject(&app, Some("fdatasync"), "error=EIO:when=1", Some(&app.wav_file())) else { return };
    // Synced each second: the first fails, and those behind it would succeed.
    let mut rest = rest.chunks(19_200);
    while app.wav_files().len() < 2 {
        peer.go_on(rest.next().expect("a sync fails within a minute")).await.unwrap();
    }
    drop(failing);
    let told = async || reasons(&app).await.iter().any(|reason| reason.starts_with("disk: a sync failed")).then_some(());
    app.eventually("health tells of it", told).await;
    assert_eq!(metric(&app, "live_meeting_sync_failures_total").await, 1.0);
    peer.send_pcm(rest.next().expect("more")).await.unwrap();
    let bytes = peer.sent().audio_bytes;
    peer.close_and_wait().await;
    let recording = recording(&app, "ana").await;
    let segments = recording["segments"].as_array().unwrap();
    let ends: Vec<_> = segments.iter().map(|segment| (segment["endReason"].as_str().unwrap(), segment["suspect"].as_bool().unwrap())).collect();
    assert_eq!(ends, [("failed", true), ("closed", false)], "{recording}");
    assert!(pcm(&files(&app, &recording)) == sent[..bytes], "nothing is lost by it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d5_a_file_system_that_fails_to_sync_makes_each_file_suspect_that_was_open_and_no_other() {
    // More than are synced one by one.
    const MANY: u32 = 12;
    let app = eager().start().await;
    let mut speakers = Vec::new();
    for number in 0..MANY {
        speakers.push(speak(&app, number, 120).await);
    }
    app.eventually("all have a file", async || (app.wav_files().len() == MANY as usize).then_some(())).await;
    // Each thread that syncs fails once: what the kernel tells of one failure depends on the descriptor that is asked, so it is always the same.
    let Some(failing) = Strace::inject(&app, Some("syncfs"), "error=EIO:when=1", Some(&app.audio_dir())) else { return };
    app.eventually("all go on in another file", async || (app.wav_files().len() >= 2 * MANY as usize).then_some(())).await;
    drop(failing);
    let mut sent = BTreeMap::new();
    for speaker in speakers {
        let spoken = speaker.await.unwrap();
        sent.insert(spoken.number, spoken.sent);
    }
    let kept = recorded(&app).await;
    for (number, sent) in sent {
        let (track, last) = (&kept[&number], kept[&number].rows.len() - 1);
        for (at, row) in track.rows.iter().enumerate() {
            let expected = if at == last { ("closed", false) } else { ("failed", true) };
            assert_eq!((row["endReason"].as_str().unwrap(), row["suspect"].as_bool().unwrap()), expected, "{:?}", track.rows);
        }
        assert!(track.ended && track.pcm == speech(number, sent), "nothing is lost by it: p{number}");
    }
    assert_eq!(metric(&app, "live_meeting_tracks_given_up_total").await, 0.0);
}

#[tokio::test]
async fn d5_where_what_moves_cannot_be_synced_its_file_is_suspect_and_the_next_segment_has_what_comes() {
    let app = eager().start().await;
    let sent = counter_pcm(48_000 * 60, 1);
    let mut peer = connect(&app, "ana").await;
    let (first, rest) = sent.split_at(384_000);
    peer.send_realtime(first).await.unwrap();
    let file = app.wav_file();
    let moving = file.with_file_name(format!(".{}.move", file.file_name().unwrap().to_str().unwrap()));
    let Some(failing) = Strace::inject(&app, Some("fsync"), "error=EIO:when=1", Some(&moving)) else { return };
    // A pause that is filled where audio has come since. It was a longer one where strace took its time.
    peer.send_realtime(&[]).await.unwrap();
    peer.pause(Duration::from_secs(2)).await;
    let mut rest = rest.chunks(19_200);
    while app.wav_files().len() < 2 {
        peer.go_on(rest.next().expect("it is filled within a minute")).await.unwrap();
    }
    drop(failing);
    let bytes = peer.sent().audio_bytes;
    peer.close_and_wait().await;
    let recording = recording(&app, "ana").await;
    let segments = recording["segments"].as_array().unwrap();
    let ends: Vec<_> = segments.iter().map(|segment| (segment["endReason"].as_str().unwrap(), segment["suspect"].as_bool().unwrap())).collect();
    assert_eq!(ends, [("failed", true), ("closed", false)], "{recording}");
    let spoken: Vec<u8> = pcm(&files(&app, &recording)).as_chunks::<4>().0.iter().filter(|frame| **frame != [0; 4]).flatten().copied().collect();
    assert!(spoken == sent[..bytes], "nothing is lost by it, or there twice");
}

#[tokio::test]
async fn d3_a_sync_that_does_not_come_back_is_told_of_and_costs_nothing() {
    let app = eager().start().await;
    let sent = counter_pcm(48_000 * 60, 1);
    let mut peer = connect(&app, "ana").await;
    let (first, rest) = sent.split_at(384_000);
    peer.send_realtime(first).await.unwrap();
    let Some(hanging) = Strace::inject(&app, Some("fdatasync,fsync"), "delay_enter=3600000000", Some(&app.wav_file())) else { return };
    let mut rest = rest.chunks(19_200);
    // A pause that is filled where audio has come since: what moves is not on the disk by then.
    peer.pause(Duration::from_secs(2)).await;
    let is_told = async || reasons(&app).await.iter().any(|reason| reason.starts_with("disk: a sync has waited for "));
    let is_filled = async || app.live("ana").await.is_some_and(|live| live["filledFrames"].as_u64() > Some(0));
    while !is_told().await || !is_filled().await {
        peer.go_on(rest.next().expect("told within a minute")).await.unwrap();
    }
    assert!(metric(&app, "live_meeting_sync_oldest_seconds").await > 5.0);
    let goes_on = async || {
        let live = app.live("ana").await?;
        let [bytes, recorded, filled] = ["bytes", "recordedBytes", "filledFrames"].map(|count| live[count].as_u64().expect("a count") as usize);
        (filled > 0 && recorded == bytes + filled * STEREO_FRAME).then_some(())
    };
    app.eventually("recording goes on", goes_on).await;
    drop(hanging);
    app.eventually("it comes back", async || (!is_told().await).then_some(())).await;
    peer.send_pcm(rest.next().expect("more")).await.unwrap();
    let bytes = peer.sent().audio_bytes;
    peer.close_and_wait().await;
    let recording = recording(&app, "ana").await;
    let mut kept = pcm(&files(&app, &recording));
    for gap in recording["segments"][0]["gaps"].as_array().unwrap().iter().rev() {
        assert_eq!(gap["reason"], "missing", "{gap}");
        let [start, frames] = ["startFrame", "frames"].map(|key| gap[key].as_u64().unwrap() as usize * STEREO_FRAME);
        assert!(kept.drain(start..start + frames).all(|byte| byte == 0));
    }
    assert!(kept == sent[..bytes], "nothing is lost by it");
}

#[tokio::test]
async fn f11_a_file_that_may_not_grow_is_followed_by_the_next_and_nobody_dies() {
    // More than one append may hold.
    const LIMIT: usize = 5_000_000;
    let app = eager().start().await;
    let pid = app.child.id().expect("the server runs").to_string();
    let limited = std::process::Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={LIMIT}")]).status();
    if !limited.is_ok_and(|status| status.success()) {
        return skip("files that may not grow", "prlimit cannot set the limit");
    }
    let sent = counter_pcm(17 * MIB / STEREO_FRAME, 1);
    let mut peer = connect(&app, "ana").await;
    // Less at once than the spool takes, however slow the disk is.
    for part in sent.chunks(4 * MIB) {
        peer.send_pcm(part).await.unwrap();
        all_recorded(&app, "ana").await;
    }
    peer.close_and_wait().await;
    let recording = recording(&app, "ana").await;
    let files = files(&app, &recording);
    assert!((4..=10).contains(&files.len()), "{recording}");
    assert!(pcm(&files) == sent, "no sample is lost between them");
    for (file, segment) in files.iter().zip(recording["segments"].as_array().unwrap()) {
        let bytes = std::fs::metadata(file).unwrap().len();
        assert!(bytes as usize <= LIMIT && bytes == segment["bytes"].as_u64().unwrap() + 44, "{segment}");
        assert!(["rotated", "closed"].contains(&segment["endReason"].as_str().unwrap()), "{segment}");
        assert!(frames_for_players(file).iter().all(|(_, frames)| Some(*frames) == segment["frames"].as_u64()), "{segment}");
    }
    assert_eq!(metric(&app, "live_meeting_writer_restarts_total").await, 0.0);
    app.healthy().await;
}
