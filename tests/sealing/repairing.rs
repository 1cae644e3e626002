//! D4: what a killed server left is finished by its next start, whatever kills that.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use super::finishing::record;
use super::{TIME, audio_dir, ended_rows, interrupted_wav, killed_while_writing};
use crate::support::egress_peer::counter_pcm;
use crate::support::machine::sha256sum;
use crate::support::strace::{self, Start, Traced};
use crate::support::test_app::{TestApp, read_wav, sidecar};

/// What a start may take with 1,000 interrupted files.
const PROMISED: Duration = Duration::from_secs(5);

fn name(number: usize) -> String {
    format!("{TIME}_room_ana_TR_{number:04}.wav")
}

/// Headers that lag behind, promise too much, were never patched; torn frames and odd bytes.
fn content(number: usize) -> Vec<u8> {
    let pcm = 4 * (1_000 + number);
    let declared = [pcm as u64, 0, 400, 1_000_000][number % 4];
    let mut content = interrupted_wav(pcm, declared, number % 3);
    if number.is_multiple_of(5) {
        // Both sizes zero, as of a header that was never patched.
        content[4..8].fill(0);
        content[40..44].fill(0);
    }
    content
}

#[tokio::test]
async fn d4_a_thousand_interrupted_files_are_finished_before_the_server_listens_within_5_s() {
    let files: Vec<_> = (0..1_000).map(|number| (name(number), content(number))).collect();
    let dir = killed_while_writing(&files).await;
    let room = audio_dir(dir.path()).join("room");
    let start = Instant::now();
    let app = TestApp::builder().open().dir(&dir).start().await;
    let took = start.elapsed();
    // No condition waits here: the rows and sidecars are final when it listens.
    let rows = ended_rows(dir.path());
    println!("1,000 interrupted files: {took:?} until the server listened");
    assert!(took < 4 * PROMISED, "{took:?}");
    for (number, row) in rows.iter().enumerate() {
        let frames = 1_000 + number;
        let expected = format!("s{number:04}|room/{}|{frames}|{}|crashed|", name(number), 4 * frames);
        assert!(row.starts_with(&expected), "{row} is not {expected}");
        let [ended_at, recording, recovered, suspect, tail] = row.split('|').skip(5).take(5).collect::<Vec<_>>()[..] else { panic!("{row}") };
        assert_eq!((recording, recovered, suspect, tail), (ended_at, "1", "0", "0"), "{row}");
    }
    assert_eq!(rows.len(), 1_000);
    for number in [0, 1, 2, 3, 5, 499, 999] {
        let path = room.join(name(number));
        assert!(read_wav(&path).1 == content(number)[44..44 + 4 * (1_000 + number)], "{number}");
        let sidecar = sidecar(&path).expect("a sidecar");
        let told =
            ["segmentId", "roomName", "participant", "trackSid", "startedAt"].map(|member| sidecar[member].as_str().unwrap_or("null").to_owned());
        let (segment, track) = (format!("s{number:04}"), format!("TR_{number}"));
        assert_eq!(told, [segment.as_str(), "room", "ana", &track, "2026-11-20T10:53:12.345Z"]);
        assert_eq!((sidecar["recovered"].as_bool(), sidecar["frames"].as_u64()), (Some(true), Some(1_000 + number as u64)), "{sidecar}");
    }
    // Hashes follow, and the server works meanwhile.
    let hashed = async || ended_rows(dir.path()).into_iter().nth(7).filter(|row| !row.ends_with("|-"));
    let row = app.eventually("the eighth file has its hash", hashed).await;
    assert!(row.ends_with(&sha256sum(&room.join(name(7)))), "{row}");
    let recording = app.get_json("/api/v1/recordings/r0007").await;
    let segment = &recording["segments"][0];
    assert_eq!((segment["recovered"].as_bool(), segment["tailUnverifiedMs"].as_u64()), (Some(true), Some(0)), "{segment}");
    assert_eq!(app.get(segment["media"].as_str().unwrap()).await.body.len(), 44 + 4 * 1_007);
    assert_eq!(app.get("/api/v1/recordings/r0007/media").await.body.len(), 44 + 4 * 1_007);
}

/// Every file with its content's hash; of a sidecar its members.
fn files(dir: &Path) -> BTreeMap<String, String> {
    let room = audio_dir(dir).join("room");
    let names = std::fs::read_dir(&room).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.map(|name| (sha256sum(&room.join(&name)), name)).map(|(sha256, name)| (name, sha256)).collect()
}

/// Starts the server until everything has its hash but what cannot have one, and kills it.
async fn finish(dir: &Path) -> (Vec<String>, BTreeMap<String, String>) {
    let mut server = Traced::start(dir, &["-o".into(), "/dev/null".into(), "-e".into(), "trace=none".into()]);
    assert!(matches!(server.started().await, Start::Listening(_)));
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let rows = ended_rows(dir);
        let without = rows.iter().filter(|row| row.ends_with("|-")).count();
        // The file that the database does not know is the last.
        let wavs: Vec<_> = files(dir).into_keys().filter(|name| name.ends_with(".wav")).collect();
        let told = wavs.iter().all(|name| sidecar(&audio_dir(dir).join("room").join(name)).is_some_and(|sidecar| sidecar["sha256"].is_string()));
        if told && without == 1 && !rows.iter().any(|row| row.contains("open")) {
            server.ended(true).await;
            return (rows, files(dir));
        }
        assert!(Instant::now() < deadline, "{rows:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn d2_d4_a_start_that_is_killed_at_any_step_of_its_repair_is_made_good_by_the_next() {
    if !strace::is_here() {
        return;
    }
    let mut interrupted: Vec<_> = (0..6).map(|number| (name(number), content(number))).collect();
    interrupted.push((name(6), vec![1; 20]));
    let template = killed_while_writing(&interrupted).await;
    let room = audio_dir(template.path()).join("room");
    // The database never heard of this one.
    std::fs::write(room.join("20261120T105312.345Z_room_bruno_TR_X.wav"), interrupted_wav(4_000, 0, 1)).unwrap();
    // The machine was started since: the tail is doubted, by a time that the repair itself changes.
    for entry in std::fs::read_dir(&room).unwrap() {
        let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        std::fs::File::options().write(true).open(entry.unwrap().path()).and_then(|file| file.set_modified(old)).unwrap();
    }
    let copy = || {
        let dir = TempDir::new().unwrap();
        let from = template.path().join("storage");
        assert!(Command::new("cp").arg("-a").arg(from).arg(dir.path()).status().unwrap().success());
        dir
    };
    let untouched = copy();
    let expected = finish(untouched.path()).await;
    let first = &expected.0[0];
    assert!(first.contains("|crashed|2001-09-09 01:46:40") && first.contains("|1|0|20|"), "{first}");
    assert_eq!(expected.1.keys().filter(|name| name.ends_with(".wav.json")).count(), 7, "{:?}", expected.1);
    assert!(expected.1.contains_key(&format!("{}.bad", name(6))), "{:?}", expected.1);
    let mut died = Vec::new();
    // Calls with a name have it as the server says it, those with a descriptor from the root.
    let headers: Vec<String> = (0..6).map(|number| format!("storage/egress/audio/room/{}", name(number))).collect();
    let drafts: Vec<String> = (0..6).map(|number| format!("storage/egress/audio/room/.{}.json.new", name(number))).collect();
    let wal = ["storage/live-meeting.db-wal".to_owned()];
    let steps = [
        ("renameat2", 1, &[][..]),
        ("openat", 1, &drafts),
        ("write", 1, &drafts),
        ("ftruncate", 1, &headers),
        ("pwrite64", 1, &headers),
        ("fsync", 1, &headers),
        ("fsync", 1, &drafts),
        ("rename", 1, &[]),
        ("fsync", 3, &[]),
        ("pwrite64", 2, &wal),
        ("fsync", 1, &wal),
    ];
    for (call, when, paths) in steps {
        let dir = copy();
        let inject = format!("-o /dev/null -e trace={call} -e inject={call}:signal=SIGKILL:when={when}");
        let mut args: Vec<String> = inject.split(' ').map(str::to_owned).collect();
        for path in paths {
            args.extend(["-P".to_owned(), path.clone(), "-P".to_owned(), dir.path().join(path).display().to_string()]);
        }
        let mut server = Traced::start(dir.path(), &args);
        if server.started().await == Start::Died {
            died.push((call, paths.first()));
        }
        server.ended(true).await;
        // Whatever is there is whole: a file with a sidecar is as it will be.
        for (file, sha256) in files(dir.path()).iter().filter(|(file, _)| file.ends_with(".wav")) {
            if sidecar(&audio_dir(dir.path()).join("room").join(file)).is_some() {
                assert_eq!(expected.1.get(file), Some(sha256), "{call} {when}: {file}");
            }
        }
        assert_eq!(finish(dir.path()).await, expected, "killed at {call} {when}");
    }
    assert!(died.len() >= 9, "the kills hit: {died:?}");
}

/// An archive of any size takes no longer than this directory, whose names the kernel does not tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d4_i6_a_start_listens_and_records_though_the_archive_cannot_be_read_and_finishes_it_later() {
    if !strace::is_here() {
        return;
    }
    let dir = killed_while_writing(&[(name(0), content(0))]).await;
    let room = audio_dir(dir.path()).join("room");
    let stray = room.join("20261120T105312.345Z_room_bruno_TR_X.wav");
    std::fs::write(&stray, interrupted_wav(4_000, 0, 1)).unwrap();
    let slow = "-o /dev/null -e trace=getdents64 -e inject=getdents64:delay_enter=600000000";
    let mut args: Vec<String> = slow.split(' ').map(str::to_owned).collect();
    for directory in [&room, &audio_dir(dir.path())] {
        args.extend(["-P".to_owned(), directory.display().to_string()]);
    }
    let mut server = Traced::start(dir.path(), &args);
    let Start::Listening(address) = server.started().await else { panic!("it dies") };
    let rows = ended_rows(dir.path());
    assert!(rows.len() == 1 && rows[0].contains("|crashed|"), "what has a row is finished: {rows:?}");
    record(&address, &counter_pcm(4_800, 1)).await;
    let recorded = ended_rows(dir.path()).into_iter().filter(|row| row.contains("|4800|19200|closed|")).count();
    assert_eq!((recorded, sidecar(&stray)), (1, None), "{:?}", ended_rows(dir.path()));
    server.ended(true).await;

    let app = TestApp::builder().open().dir(&dir).start().await;
    let hashed = async || sidecar(&stray).filter(|sidecar| sidecar["sha256"].is_string());
    let told = app.eventually("it is finished and hashed", hashed).await;
    assert_eq!((&told["frames"], &told["recovered"], &told["sha256"]), (&json!(1_000), &json!(true), &json!(sha256sum(&stray))));
    assert_eq!(app.metric("live_meeting_unrepaired_files").await, 0.0);
}

#[tokio::test]
async fn a_file_that_was_sealed_before_its_row_ended_is_not_touched_and_says_how_it_ended() {
    let dir = killed_while_writing(&[(name(0), interrupted_wav(4_000, 4_000, 0)), (name(1), interrupted_wav(8_000, 0, 0))]).await;
    let path = audio_dir(dir.path()).join("room").join(name(0));
    let told = json!({
        "version": 1, "file": name(0), "segmentId": "s0000", "meetingId": "room", "roomName": "room", "participant": "ana", "trackSid": "TR_0",
        "format": "wav", "sampleRate": 48_000, "channels": 2, "width": null, "height": null, "frames": 1_000, "bytes": 4_000,
        "startedAt": "2026-11-20T10:53:12.345Z", "endedAt": "2026-11-20T10:53:13Z", "sessionOffsetMs": 250, "driftPpm": 1.5,
        "gaps": [{"startFrame": 10, "frames": 5, "reason": "overload"}], "muteSpans": [{"startFrame": 1, "frames": 2}], "endReason": "lost",
        "recovered": false, "suspect": true, "tailUnverifiedMs": 0, "sha256": null,
    });
    std::fs::write(format!("{}.json", path.display()), told.to_string()).unwrap();
    // A file that another process writes is left to it.
    let other = std::fs::File::open(audio_dir(dir.path()).join("room").join(name(1))).unwrap();
    rustix::fs::flock(&other, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let app = TestApp::builder().open().dir(&dir).start().await;
    let segment = app.get_json("/api/v1/recordings/r0000").await["segments"][0].clone();
    assert_eq!((segment["endReason"].as_str(), segment["endedAt"].as_str()), (Some("lost"), Some("2026-11-20T10:53:13.000Z")), "{segment}");
    assert_eq!((segment["recovered"].as_bool(), segment["suspect"].as_bool()), (Some(false), Some(true)), "{segment}");
    assert_eq!((segment["sessionOffsetMs"].as_i64(), segment["driftPpm"].as_f64()), (Some(250), Some(1.5)), "{segment}");
    assert_eq!(segment["gaps"], told["gaps"]);
    let hashed = async || sidecar(&path)?["sha256"].as_str().map(str::to_owned);
    assert_eq!(app.eventually("it gets its hash", hashed).await, sha256sum(&path));
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), before);
    let left = app.get_json("/api/v1/recordings/r0001").await;
    assert!(left["endedAt"].is_null() && left["segments"][0]["endReason"].is_null(), "{left}");
    assert!(app.log().contains("is being written by another process"), "{}", app.log());
    let told = async || {
        let health = app.request("GET", "/health", &[], b"").await.json();
        let reason = json!("recordings: 1 files of an earlier run cannot be repaired yet; the log says why");
        (health["status"] == "degraded" && health["reasons"][0] == reason).then_some(())
    };
    app.eventually("health tells of it", told).await;
    assert_eq!(app.metric("live_meeting_unrepaired_files").await, 1.0);
    // It is tried again until it can be repaired.
    drop(other);
    let ended = async || Some(app.get_json("/api/v1/recordings/r0001").await).filter(|recording| recording["endedAt"].is_string());
    let segment = app.eventually("its row ends", ended).await["segments"][0].clone();
    assert_eq!((&segment["endReason"], &segment["frames"], &segment["recovered"]), (&json!("crashed"), &json!(2_000), &json!(true)), "{segment}");
    let healthy = async || (app.request("GET", "/health", &[], b"").await.json()["status"] == "healthy").then_some(());
    app.eventually("it is healthy", healthy).await;
    assert_eq!(app.metric("live_meeting_unrepaired_files").await, 0.0);
}

#[tokio::test]
async fn s3_a_file_behind_a_directory_that_became_a_link_is_not_touched() {
    let dir = killed_while_writing(&[(name(0), interrupted_wav(4_000, 0, 3))]).await;
    let (room, elsewhere) = (audio_dir(dir.path()).join("room"), tempfile::tempdir().unwrap());
    let moved = elsewhere.path().join("room");
    std::fs::create_dir(&moved).unwrap();
    let file = moved.join(name(0));
    std::fs::copy(room.join(name(0)), &file).unwrap();
    std::fs::remove_dir_all(&room).unwrap();
    std::os::unix::fs::symlink(&moved, &room).unwrap();
    let before = std::fs::read(&file).unwrap();
    let app = TestApp::builder().open().dir(&dir).start().await;
    assert!(std::fs::read(&file).unwrap() == before && sidecar(&file).is_none());
    assert!(app.log().contains("has no file that could be repaired"), "{}", app.log());
}

#[tokio::test]
async fn d5_a_file_whose_notes_nobody_can_read_is_suspect_and_they_outlast_its_hash() {
    let dir = killed_while_writing(&[(name(0), interrupted_wav(4_000, 0, 3))]).await;
    let notes = audio_dir(dir.path()).join("room").join(format!(".{}.notes", name(0)));
    std::os::unix::fs::symlink("nowhere", &notes).unwrap();
    let app = TestApp::builder().open().dir(&dir).start().await;
    let hashed = async || Some(app.get_json("/api/v1/recordings/r0000").await["segments"][0].clone()).filter(|segment| segment["sha256"].is_string());
    let segment = app.eventually("the row has its hash", hashed).await;
    assert_eq!((&segment["frames"], &segment["recovered"], &segment["suspect"]), (&json!(1_000), &json!(true), &json!(true)));
    assert!(std::fs::symlink_metadata(&notes).is_ok(), "somebody is to look at them");
}
