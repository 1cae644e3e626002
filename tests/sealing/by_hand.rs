//! `live-meeting repair DIR`, and what `live-meeting check` says of files and rows.

use std::path::Path;

use diesel::connection::SimpleConnection;
use tempfile::TempDir;

use super::{TIME, audio_dir, database, interrupted_wav};
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::test_app::{ADMIN_KEY, Finished, TestApp, read_wav, run, sidecar};

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn repair_finishes_what_was_interrupted_tells_of_each_file_and_changes_nothing_again() {
    let dir = TempDir::new().unwrap();
    let room = dir.path().join("audio/room");
    std::fs::create_dir_all(&room).unwrap();
    let name = format!("{TIME}_room_ana_TR_1.wav");
    std::fs::write(room.join(&name), interrupted_wav(192_000, 400, 3)).unwrap();
    std::fs::write(room.join("short.wav"), [1; 20]).unwrap();
    std::fs::write(room.join("notes.txt"), "not ours").unwrap();
    let before = names(&room);
    let Finished { code, stdout, stderr } = run(dir.path(), &[], &["repair", "--dry-run", "audio"]).await;
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    for told in [&name, "to be repaired", "1.00 s", "short.wav", "short.wav.bad", "2 to repair, 0 finished before, 0 in use, 0 at fault"] {
        assert!(stdout.contains(told), "{told}: {stdout}");
    }
    assert_eq!((names(&room), std::fs::metadata(room.join(&name)).unwrap().len()), (before, 44 + 192_003));
    let Finished { code, stdout, stderr } = run(dir.path(), &[], &["repair", "audio"]).await;
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    assert!(stdout.contains("2 repaired, 0 finished before, 0 in use, 0 at fault"), "{stdout}");
    assert_eq!(read_wav(&room.join(&name)).1, interrupted_wav(192_000, 0, 0)[44..]);
    let told = sidecar(&room.join(&name)).unwrap();
    assert_eq!((told["frames"].as_u64(), told["startedAt"].as_str()), (Some(48_000), Some("2026-11-20T10:53:12.345Z")), "{told}");
    assert!(room.join("short.wav.bad").exists());
    // A file that is not ours is a fault, and stays.
    std::fs::write(room.join("foreign.wav"), [1; 200]).unwrap();
    let Finished { code, stdout, .. } = run(dir.path(), &[], &["repair", "audio"]).await;
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains("foreign.wav") && stdout.contains("0 repaired, 1 finished before, 0 in use, 1 at fault"), "{stdout}");
    assert_eq!(std::fs::read(room.join("foreign.wav")).unwrap(), [1; 200]);
    let Finished { code, stderr, .. } = run(dir.path(), &[], &["repair", "nowhere"]).await;
    assert_eq!(code, Some(1));
    assert!(stderr.contains("nowhere is not a directory"), "{stderr}");
}

#[tokio::test]
async fn repair_leaves_a_running_servers_file_alone_and_the_next_start_takes_its_word_for_a_dead_ones() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(48_000, 1);
    let mut peer = EgressPeer::connect(app.addr, "/egress-audio?roomName=room&participant=ana&trackId=TR_1").await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    let written = async || (app.live("ana").await?["recordedBytes"].as_u64()? == pcm.len() as u64).then_some(());
    app.eventually("it is written", written).await;
    app.eventually("its row is there", async || app.items("/api/v1/recordings").await.first().map(drop)).await;
    let audio = audio_dir(app.dir.path()).display().to_string();
    let Finished { code, stdout, .. } = run(app.dir.path(), &[], &["repair", &audio]).await;
    assert_eq!(code, Some(0), "{stdout}");
    assert!(stdout.contains("it is being written") && stdout.contains("0 repaired, 0 finished before, 1 in use"), "{stdout}");
    let file = app.wav_file();
    assert!(sidecar(&file).is_none());
    let stopped = app.kill().await;
    let Finished { code, stdout, .. } = run(stopped.dir.path(), &[], &["repair", &audio]).await;
    assert_eq!(code, Some(0), "{stdout}");
    assert!(stdout.contains("1 repaired"), "{stdout}");
    let (modified, told) = (std::fs::metadata(&file).unwrap().modified().unwrap(), sidecar(&file).unwrap());
    let app = stopped.restart().await;
    let segment = app.items("/api/v1/recordings").await[0]["segments"][0].clone();
    assert_eq!((segment["endReason"].as_str(), segment["frames"].as_u64()), (Some("crashed"), Some(48_000)), "{segment}");
    assert_eq!((segment["recovered"].as_bool(), told["recovered"].as_bool()), (Some(true), Some(true)));
    assert_eq!(std::fs::metadata(&file).unwrap().modified().unwrap(), modified, "a sealed file is not touched");
    assert!(read_wav(&file).1 == pcm);
}

#[tokio::test]
async fn check_tells_of_rows_without_files_and_of_files_without_rows() {
    let (_, _, stopped) = TestApp::builder().open().start().await.terminate().await;
    let files: Vec<_> = (0..6).map(|number| (format!("{TIME}_room_ana_TR_{number}.wav"), interrupted_wav(400, 400, 0))).collect();
    drop(stopped);
    let dir = super::killed_while_writing(&files).await;
    let room = audio_dir(dir.path()).join("room");
    let env = [("ADMIN_API_KEY", ADMIN_KEY)];
    let Finished { stdout, .. } = run(dir.path(), &env, &["check"]).await;
    assert!(stdout.contains("ok     recordings      6 files, 6 of them not finished or without a sidecar"), "{stdout}");
    for (name, _) in &files[..4] {
        std::fs::remove_file(room.join(name)).unwrap();
    }
    std::fs::write(room.join("stray.wav"), interrupted_wav(400, 400, 0)).unwrap();
    database(dir.path()).batch_execute("INSERT INTO seals (segment_id, recovered, suspect, tail_unverified_ms) VALUES ('s0005', 1, 1, 0)").unwrap();
    let before = names(&room);
    let Finished { stdout, code, .. } = run(dir.path(), &env, &["check"]).await;
    assert_eq!(code, Some(1), "{stdout}");
    for told in
        ["FAULT  recordings", "3 files", "1 are recovered, 1 suspect", "4 rows have no file: room/", ", …", "1 files have no row: room/stray.wav"]
    {
        assert!(stdout.contains(told), "{told}: {stdout}");
    }
    assert_eq!(names(&room), before, "it only looks");
}
