//! A disk without room (D6), and one that has less than `storage.min_free`.

use std::time::Duration;

use serde_json::json;

use super::{STEREO_FRAME, all_recorded, connect, eager, files, metric, pcm, reasons, recording, with_holes};
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::faults::{SmallDisk, frames_for_players};
use crate::support::test_app::{TestApp, read_wav};

const MIB: usize = 1 << 20;
const PARTICIPANTS: [&str; 2] = ["ana", "bruno"];
/// 10 s after there is space again are promised; four times that decide.
const RESUMES_WITHIN: Duration = Duration::from_secs(40);

#[tokio::test]
async fn d6_a_full_disk_loses_only_what_the_spool_cannot_hold_and_recording_goes_on_by_itself() {
    let Some(disk) = SmallDisk::mount("storage/egress/audio") else { return };
    let spool = 8 * MIB;
    let app = eager().dir(&disk.dir).env("LIVE_MEETING__INGEST__SPOOL", "8MiB").env("LIVE_MEETING__RECORDING__SPOOL_PER_TRACK", "5m").start().await;
    let sent = [1, 1_000_000_000].map(|seed| counter_pcm(10 * MIB / STEREO_FRAME, seed));
    let mut peers = [connect(&app, PARTICIPANTS[0]).await, connect(&app, PARTICIPANTS[1]).await];
    let mut position = 0;
    let mut send = async |peers: &mut [EgressPeer; 2], bytes: usize| {
        for ((peer, sent), participant) in peers.iter_mut().zip(&sent).zip(PARTICIPANTS) {
            peer.send_pcm(&sent[position..][..bytes]).await.unwrap();
            app.received(participant, position + bytes).await;
        }
        position += bytes;
    };
    // Every file at every stage: what it holds so far, for every player.
    let assert_valid = |so_far: usize| {
        for (file, sent) in app.wav_files().into_iter().zip(&sent) {
            let found = read_wav(&file).1;
            assert!(found.len() <= so_far && *found == sent[..found.len()], "{} of {so_far} bytes", found.len());
            for (player, frames) in frames_for_players(&file) {
                assert_eq!(frames as usize * STEREO_FRAME, found.len(), "{player}");
            }
        }
    };
    send(&mut peers, MIB).await;
    for participant in PARTICIPANTS {
        all_recorded(&app, participant).await;
    }
    assert_valid(MIB);

    let ballast = disk.fill(0);
    send(&mut peers, 2 * MIB).await;
    app.logged("no space is left for recordings, trying again every second").await;
    assert_valid(3 * MIB);
    app.eventually("health finds the disk full", async || {
        let told = reasons(&app).await;
        told.iter().any(|reason| reason.starts_with("audio directory:") && reason.contains("No space left")).then_some(())
    })
    .await;
    assert_eq!(metric(&app, "live_meeting_lost_bytes_total").await, 0.0, "it waits");

    send(&mut peers, 6 * MIB).await;
    let lost = metric(&app, "live_meeting_lost_bytes_total").await as usize;
    // 16 MiB came, 8 wait; a page of either file may have had room for more.
    assert!((16 * MIB - spool - 65_536..=16 * MIB - spool + 40_000).contains(&lost), "{lost}");
    assert!(reasons(&app).await.iter().any(|reason| reason.starts_with("audio or video: it is being lost")), "{:?}", reasons(&app).await);
    let (used, size) = (metric(&app, "live_meeting_spool_used_bytes").await, metric(&app, "live_meeting_spool_size_bytes").await);
    assert!(used <= size && size == spool as f64 && used > 0.9 * size, "{used} of {size}");
    assert_eq!(metric(&app, "live_meeting_live_tracks").await, 2.0);
    assert_valid(9 * MIB);

    drop(ballast);
    let resumed = async {
        for participant in PARTICIPANTS {
            all_recorded(&app, participant).await;
        }
    };
    tokio::time::timeout(RESUMES_WITHIN, resumed).await.expect("recording resumes by itself");
    send(&mut peers, MIB).await;
    for peer in peers {
        peer.close_and_wait().await;
    }
    let mut holes = 0;
    for (participant, sent) in PARTICIPANTS.into_iter().zip(&sent) {
        let recording = recording(&app, participant).await;
        let files = files(&app, &recording);
        assert_eq!(files.len(), 1, "no segment failed: {recording}");
        let (expected, hole) = with_holes(sent, &recording["segments"][0]);
        assert!(pcm(&files) == expected, "{participant}");
        assert!(frames_for_players(&files[0]).iter().all(|(_, frames)| *frames as usize * STEREO_FRAME == sent.len()));
        holes += hole;
    }
    assert_eq!(holes, lost, "every lost byte is in a gap's record");
    assert_eq!(metric(&app, "live_meeting_received_bytes_total").await, 20.0 * MIB as f64, "totals stay when tracks end");
    assert_eq!(metric(&app, "live_meeting_recorded_bytes_total").await, 20.0 * MIB as f64);
    let all_gone = async || (metric(&app, "live_meeting_live_tracks").await == 0.0).then_some(());
    app.eventually("no track is live", all_gone).await;
    for line in ["no space is left for recordings", "recordings can be written again"] {
        assert_eq!(app.log().matches(line).count(), 2, "once for each track: {line}");
    }
}

#[tokio::test]
async fn d6_what_waits_for_room_is_not_lost_when_its_sender_goes() {
    let Some(disk) = SmallDisk::mount("storage/egress/audio") else { return };
    let app = eager().dir(&disk.dir).start().await;
    let sent = counter_pcm(3 * MIB / STEREO_FRAME, 1);
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(&sent[..MIB]).await.unwrap();
    all_recorded(&app, "ana").await;
    let ballast = disk.fill(0);
    peer.send_pcm(&sent[MIB..]).await.unwrap();
    app.logged("no space is left for recordings, trying again every second").await;
    let closing = tokio::spawn(peer.close_and_wait());
    // Longer than a shutdown would wait for it: this is the input, not a time limit.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(!closing.is_finished(), "nothing is sealed yet");
    drop(ballast);
    let close = tokio::time::timeout(RESUMES_WITHIN, closing).await.expect("sealed when there is room").unwrap();
    assert!(close.close_frame, "{close:?}");
    assert_eq!(read_wav(&app.wav_file()).1, sent);
    let segment = recording(&app, "ana").await["segments"][0].clone();
    assert_eq!((segment["endReason"].as_str(), segment["frames"].as_u64()), (Some("closed"), Some((3 * MIB / STEREO_FRAME) as u64)), "{segment}");
}

#[tokio::test]
async fn d6_with_the_database_on_the_same_full_disk_the_server_lives_and_rows_follow() {
    let Some(disk) = SmallDisk::mount("storage") else { return };
    let app = eager().dir(&disk.dir).start().await;
    let sent = counter_pcm(3 * MIB / STEREO_FRAME, 1);
    let mut running = connect(&app, "ana").await;
    running.send_pcm(&sent[..MIB]).await.unwrap();
    all_recorded(&app, "ana").await;
    let ballast = disk.fill(0);
    running.send_pcm(&sent[MIB..2 * MIB]).await.unwrap();
    app.logged("no space is left for recordings").await;
    // A meeting with enough to tell that the database needs room for it.
    let event = |number: usize| {
        let participant = json!({"sid": format!("PA_{number}"), "identity": format!("p{number}"), "metadata": "x".repeat(20_000)});
        json!({"event": "participant_joined", "id": format!("EV_{number}"), "room": {"sid": "RM", "name": "room"}, "participant": participant})
    };
    let mut refused = None;
    for number in 0..200 {
        let answer = app.webhook_once(event(number)).await;
        if answer.status != 204 {
            refused = Some((number, answer));
            break;
        }
    }
    let (number, answer) = refused.expect("the database finds no room either");
    answer.assert_problem(503, "databaseUnavailable");
    let full = async || reasons(&app).await.iter().any(|reason| reason.starts_with("audio directory:")).then_some(());
    app.eventually("health finds the disk full", full).await;

    drop(ballast);
    let resumed = tokio::time::timeout(RESUMES_WITHIN, all_recorded(&app, "ana")).await;
    resumed.expect("recording resumes by itself");
    running.send_pcm(&sent[2 * MIB..]).await.unwrap();
    running.close_and_wait().await;
    app.eventually("the webhook is taken", async || (app.webhook_once(event(number)).await.status == 204).then_some(())).await;
    let ended = async || recording(&app, "ana").await["endedAt"].is_string().then_some(());
    app.eventually("the rows follow", ended).await;
    assert!(pcm(&files(&app, &recording(&app, "ana").await)) == sent);
    app.eventually("it is healthy", async || reasons(&app).await.is_empty().then_some(())).await;
}

#[tokio::test]
async fn d6_below_min_free_new_recordings_are_refused_and_those_that_run_go_on() {
    let Some(disk) = SmallDisk::mount("storage/egress/audio") else { return };
    let app = eager().dir(&disk.dir).env("LIVE_MEETING__STORAGE__MIN_FREE", "16MiB").start().await;
    let sent = counter_pcm(2 * MIB / STEREO_FRAME, 1);
    let mut running = connect(&app, "ana").await;
    running.send_pcm(&sent[..MIB]).await.unwrap();
    assert_eq!(metric(&app, "live_meeting_recordings_refused").await, 0.0);

    let ballast = disk.fill(8 * MIB as u64);
    app.logged("new recordings are refused for want of space").await;
    let told = async || {
        let told = reasons(&app).await;
        (told.len() == 1 && told[0].starts_with("space: ") && told[0].contains("16.0 MiB")).then_some(())
    };
    app.eventually("health tells of the space alone", told).await;
    for _ in 0..3 {
        let path = "/egress-audio?roomName=room&participant=bruno";
        let refusal = EgressPeer::connect(app.addr, path).await.map(drop).expect_err("there is too little room");
        let problem: serde_json::Value = serde_json::from_str(&refusal.body).unwrap();
        assert_eq!((refusal.status, &problem["code"]), (507, &json!("storageLow")), "{problem}");
    }
    assert_eq!(metric(&app, "live_meeting_recordings_refused").await, 1.0);
    assert_eq!(metric(&app, "live_meeting_refused_connections_total{reason=\"storageLow\"}").await, 3.0);
    let free = metric(&app, "live_meeting_disk_free_bytes").await;
    assert!(free < metric(&app, "live_meeting_disk_min_free_bytes").await && free > 0.0, "{free}");
    running.send_pcm(&sent[MIB..][..MIB / 2]).await.unwrap();
    all_recorded(&app, "ana").await;
    // A track whose connection is lost goes on: that is no new recording.
    running.vanish().await;
    app.eventually("it is gone", async || app.live("ana").await.is_none().then_some(())).await;
    let mut running = connect(&app, "ana").await;
    running.send_pcm(&sent[3 * MIB / 2..]).await.unwrap();
    all_recorded(&app, "ana").await;

    drop(ballast);
    app.logged("new recordings are taken again").await;
    connect(&app, "bruno").await.close_and_wait().await;
    running.close_and_wait().await;
    assert!(pcm(&files(&app, &recording(&app, "ana").await)) == sent);
    for line in ["new recordings are refused for want of space", "new recordings are taken again"] {
        assert_eq!(app.log().matches(line).count(), 1, "{line}");
    }
}

#[tokio::test]
async fn d6_a_small_disk_has_too_little_room_by_default_and_a_server_starts_on_a_full_one() {
    let Some(disk) = SmallDisk::mount("storage/egress/audio") else { return };
    let ballast = disk.fill(0);
    let app = TestApp::builder().open().without("LIVE_MEETING__STORAGE__MIN_FREE").dir(&disk.dir).start().await;
    let told = async || {
        let told = reasons(&app).await;
        let space = told.iter().any(|reason| reason.starts_with("space: ") && reason.contains("1.0 GiB"));
        (space && told.iter().any(|reason| reason.starts_with("audio directory: No space left"))).then_some(())
    };
    app.eventually("health tells of both", told).await;
    drop(ballast);
    app.eventually("it can be written, with too little room", async || (reasons(&app).await.len() == 1).then_some(())).await;
    let refusal = EgressPeer::connect(app.addr, "/egress-audio?roomName=room").await.map(drop).expect_err("there is too little room");
    assert_eq!(refusal.status, 507);
}
