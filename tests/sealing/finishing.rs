//! D8: a finished file is immutable and can be verified; its sidecar comes after everything else.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{audio_dir, ended_rows};
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::machine::sha256sum;
use crate::support::strace::{self, Start, Strace, Traced};
use crate::support::test_app::{TestApp, read_wav, sidecar};

const PATH: &str = "/egress-audio?roomName=room&participant=ana&trackId=TR_1";

async fn hashed(app: &TestApp, path: &Path) -> Value {
    let hashed = async || sidecar(path).filter(|sidecar| sidecar["sha256"].is_string());
    app.eventually("the sidecar has a hash", hashed).await
}

#[tokio::test]
async fn d8_a_finished_file_has_a_sidecar_whose_hash_sha256sum_confirms() {
    let app = TestApp::builder().open().start().await;
    let started = (chrono::Utc::now() - chrono::TimeDelta::seconds(60)).timestamp();
    let room = json!({"sid": "RM_1", "name": "room"});
    assert_eq!(app.webhook(json!({"event": "room_started", "room": room, "createdAt": started.to_string()})).await.status, 204);
    app.settled().await;
    let pcm = counter_pcm(48_000, 7);
    let after_start = |time: chrono::DateTime<chrono::Utc>| time.timestamp_millis() - 1_000 * started;
    let mut peer = app.by_the_databases_word(async || EgressPeer::connect(app.addr, PATH).await).await.unwrap();
    let before = chrono::Utc::now();
    peer.send_pcm(&pcm[..96_000]).await.unwrap();
    app.received("ana", 96_000).await;
    let behind = chrono::Utc::now();
    peer.mute(true).await.unwrap();
    peer.send_pcm(&pcm[96_000..144_000]).await.unwrap();
    peer.mute(false).await.unwrap();
    peer.send_pcm(&pcm[144_000..]).await.unwrap();
    peer.close_and_wait().await;
    let path = app.wav_file();
    let first = sidecar(&path).expect("it is there when the Close is answered");
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
    let told = hashed(&app, &path).await;
    assert_eq!(told["sha256"].as_str().unwrap(), sha256sum(&path));
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), modified, "the file is not touched");
    // The hash came, and nothing else changed.
    let mut without = told.clone();
    without["sha256"] = Value::Null;
    without["segmentId"] = first["segmentId"].clone();
    assert!(first["sha256"].is_null() || first["sha256"] == told["sha256"]);
    let mut first = first;
    first["sha256"] = Value::Null;
    assert_eq!(without, first);
    let text = |member: &str| told[member].as_str().unwrap_or("null").to_owned();
    assert_eq!(
        ["meetingId", "roomName", "participant", "trackSid", "format", "endReason"].map(text),
        ["RM_1", "room", "ana", "TR_1", "wav", "closed"]
    );
    assert_eq!([&told["version"], &told["sampleRate"], &told["channels"], &told["frames"], &told["bytes"]], [1, 48_000, 2, 48_000, 192_000]);
    assert_eq!([&told["recovered"], &told["suspect"]], [false, false]);
    assert_eq!(told["muteSpans"], json!([{"startFrame": 24_000, "frames": 12_000}]));
    assert_eq!((told["gaps"].clone(), told["tailUnverifiedMs"].as_u64()), (json!([]), Some(0)));
    let offset = told["sessionOffsetMs"].as_i64().expect("the session is known");
    // As long after the session's start as the audio was sent.
    assert!((after_start(before) - 400..=after_start(behind)).contains(&offset), "{offset}");
    // The API says the same, and `sha256sum -c` takes a line that is made of the sidecar.
    let row_has_it = async || app.items("/api/v1/recordings").await[0]["segments"][0]["sha256"].as_str().map(str::to_owned);
    assert_eq!(app.eventually("the row has it", row_has_it).await, text("sha256"));
    app.settled().await;
    let segment = app.items("/api/v1/recordings").await[0]["segments"][0].clone();
    for member in ["recovered", "suspect", "tailUnverifiedMs", "sessionOffsetMs", "driftPpm", "frames", "bytes", "endReason"] {
        assert_eq!(segment[member], told[member], "{member}");
    }
    std::fs::write(path.with_file_name("SHA256SUMS"), format!("{}  {}\n", text("sha256"), text("file"))).unwrap();
    let mut check = std::process::Command::new("sha256sum");
    let checked = check.args(["-c", "SHA256SUMS"]).current_dir(path.parent().unwrap()).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[tokio::test]
async fn mute_spans_and_offsets_are_those_of_each_segment() {
    let app = TestApp::builder().open().env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", "1s").start().await;
    let pcm = counter_pcm(48_000 * 3, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    for (number, part) in pcm.chunks(96_000).enumerate() {
        // Muted from frame 24,000 to 120,000 of the connection.
        if number == 1 || number == 5 {
            peer.mute(number == 1).await.unwrap();
        }
        peer.send_pcm(part).await.unwrap();
        let sent = peer.sent().audio_bytes as u64;
        let written = async || (app.live("ana").await?["recordedBytes"].as_u64()? == sent).then_some(());
        app.eventually("it is written", written).await;
    }
    peer.close_and_wait().await;
    let sealed = async || app.wav_files().iter().all(|file| sidecar(file).is_some()).then_some(());
    app.eventually("every segment has its sidecar", sealed).await;
    let (mut before, mut muted) = (0, Vec::new());
    for file in app.wav_files() {
        let told = sidecar(&file).unwrap();
        let frames = told["frames"].as_u64().unwrap();
        assert_eq!(read_wav(&file).1.len() as u64, 4 * frames);
        for span in told["muteSpans"].as_array().unwrap() {
            let (start, frames) = (span["startFrame"].as_u64().unwrap(), span["frames"].as_u64().unwrap());
            muted.push((before + start, before + start + frames));
        }
        before += frames;
    }
    assert_eq!(before, 144_000);
    assert!(muted.len() >= 2, "{muted:?}");
    assert_eq!((muted.first().unwrap().0, muted.last().unwrap().1), (24_000, 120_000), "{muted:?}");
    assert!(muted.windows(2).all(|pair| pair[0].1 == pair[1].0), "{muted:?}");
}

#[tokio::test]
async fn a_file_that_has_no_hash_yet_gets_it_after_the_next_start() {
    let app = TestApp::builder().open().start().await;
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&counter_pcm(4_800, 7)).await.unwrap();
    peer.mute(true).await.unwrap();
    peer.send_pcm(&counter_pcm(960, 4_807)).await.unwrap();
    peer.close_and_wait().await;
    let path = app.wav_file();
    let first = hashed(&app, &path).await;
    assert_eq!(first["muteSpans"], json!([{"startFrame": 4_800, "frames": 960}]));
    let row_has_it = async || app.items("/api/v1/recordings").await[0]["segments"][0]["sha256"].as_str().map(drop);
    app.eventually("the row has it", row_has_it).await;
    let stopped = app.kill().await;
    // As if it had been killed before, or the disk had been full when the sidecar was to be written.
    std::fs::remove_file(format!("{}.json", path.display())).unwrap();
    let notes = path.with_file_name(format!(".{}.notes", path.file_name().unwrap().to_str().unwrap()));
    std::fs::write(&notes, "{").unwrap();
    diesel::connection::SimpleConnection::batch_execute(&mut super::database(stopped.dir.path()), "UPDATE seals SET sha256 = NULL").unwrap();
    let before = std::fs::read(&path).unwrap();
    let app = stopped.restart().await;
    let told = hashed(&app, &path).await;
    assert_eq!(told["sha256"].as_str().unwrap(), sha256sum(&path));
    assert_eq!((told["recovered"].as_bool(), told["endReason"].as_str(), told["frames"].as_u64()), (Some(false), Some("closed"), Some(5_760)));
    for member in ["muteSpans", "gaps", "sessionOffsetMs", "driftPpm", "sampleRate", "channels", "participant", "trackSid"] {
        assert_eq!(told[member], first[member], "{member}");
    }
    app.eventually("the notes go, for the sidecar says all", async || (!notes.exists()).then_some(())).await;
    let row_has_it = async || app.items("/api/v1/recordings").await[0]["segments"][0]["sha256"].as_str().map(drop);
    app.eventually("the row has it", row_has_it).await;
    assert!(std::fs::read(&path).unwrap() == before);
}

#[tokio::test]
async fn d8_a_file_that_changed_between_its_seal_and_its_hash_gets_none_and_is_suspect() {
    let app = TestApp::builder().open().start().await;
    let mut files = Vec::new();
    for participant in ["cut", "grown"] {
        let mut peer = EgressPeer::connect(app.addr, &PATH.replace("ana", participant)).await.unwrap();
        peer.send_pcm(&counter_pcm(4_800, 7)).await.unwrap();
        peer.close_and_wait().await;
        let path = app.wav_files().into_iter().find(|path| !files.contains(path)).unwrap();
        hashed(&app, &path).await;
        files.push(path);
    }
    let segments = async || app.items("/api/v1/recordings").await.into_iter().map(|recording| recording["segments"][0].clone()).collect::<Vec<_>>();
    let all_hashed = async || segments().await.iter().all(|segment| segment["sha256"].is_string()).then_some(());
    app.eventually("the rows have their hashes", all_hashed).await;
    let stopped = app.kill().await;
    // As if it had been killed before.
    diesel::connection::SimpleConnection::batch_execute(&mut super::database(stopped.dir.path()), "UPDATE seals SET sha256 = NULL").unwrap();
    for (path, length) in files.iter().zip([44 + 19_000, 44 + 19_300]) {
        let mut told = sidecar(path).unwrap();
        told["sha256"] = Value::Null;
        std::fs::write(format!("{}.json", path.display()), told.to_string()).unwrap();
        std::fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
    }
    let app = stopped.restart().await;
    let segments = async || app.items("/api/v1/recordings").await.into_iter().map(|recording| recording["segments"][0].clone()).collect::<Vec<_>>();
    let all_suspect = async || segments().await.iter().all(|segment| segment["suspect"] == true).then_some(());
    app.eventually("both are suspect", all_suspect).await;
    assert!(segments().await.iter().all(|segment| segment["sha256"].is_null()));
    for (path, length) in files.iter().zip([19_044, 19_344]) {
        let told = sidecar(path).unwrap();
        assert_eq!((&told["sha256"], &told["suspect"], &told["frames"]), (&Value::Null, &json!(true), &json!(4_800)));
        assert!(app.log().contains(&format!("bytes={length} sealed_bytes=19244")), "{}", app.log());
    }
}

/// The only recording below a directory.
fn only_wav(dir: &Path) -> Option<PathBuf> {
    let mut files = std::fs::read_dir(audio_dir(dir).join("room")).ok()?.map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|kind| kind == "wav"))
}

/// A connection that brings audio and closes in order, whatever becomes of the server meanwhile.
pub async fn record(address: &str, pcm: &[u8]) {
    let Ok(mut peer) = EgressPeer::connect(address.parse().unwrap(), PATH).await else { return };
    if peer.send_pcm(pcm).await.is_ok() {
        tokio::time::timeout(Duration::from_secs(60), peer.close_and_wait()).await.expect("answered, or the server is dead");
    }
}

/// Threads of the server's that sync, and are held in a call of theirs.
fn held_syncs(app: &TestApp) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", app.pid())).unwrap().map(|task| task.unwrap().path());
    let status = tasks.filter_map(|task| std::fs::read_to_string(task.join("status")).ok());
    status.filter(|status| status.starts_with("Name:\tsyncer\n") && status.contains("\nState:\tt ")).map(pid_of).collect()
}

fn pid_of(status: String) -> String {
    status.lines().find(|line| line.starts_with("Pid:")).unwrap().to_owned()
}

#[tokio::test]
async fn d5_a_sync_that_fails_while_its_file_is_sealed_makes_it_suspect_now_and_after_the_next_start() {
    let app = TestApp::builder().open().start().await;
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    let pcm = counter_pcm(9_600, 1);
    peer.send_pcm(&pcm[..19_200]).await.unwrap();
    let path = app.eventually("there is a file", async || app.wav_files().pop()).await;
    // The clock's next sync is told of the loss, late; whoever syncs meanwhile, or later, is told that all is well.
    let Some(failing) = Strace::inject(&app, Some("fdatasync"), "error=EIO:delay_enter=2000000:when=1", Some(&path)) else { return };
    peer.send_pcm(&pcm[19_200..]).await.unwrap();
    let looks = Cell::new((Vec::new(), 0));
    let under_way = async || {
        let (held, (before, times)) = (held_syncs(&app), looks.take());
        let times = if !held.is_empty() && held == before { times + 1 } else { 0 };
        looks.set((held, times));
        (times == 3).then_some(())
    };
    app.eventually("a sync is under way", under_way).await;
    peer.close_and_wait().await;
    drop(failing);
    let verdict = |told: &Value| (told["endReason"].as_str().unwrap().to_owned(), told["suspect"].as_bool().unwrap(), told["frames"].as_u64());
    let expected = ("failed".to_owned(), true, Some(9_600));
    assert_eq!(verdict(&hashed(&app, &path).await), expected);
    let in_row = async || Some(app.items("/api/v1/recordings").await[0]["segments"][0].clone()).filter(|segment| segment["sha256"].is_string());
    assert_eq!(verdict(&app.eventually("the row has its hash", in_row).await), expected);
    assert!(read_wav(&path).1 == pcm);
    // As if its sidecar had not reached the disk.
    let stopped = app.kill().await;
    std::fs::remove_file(format!("{}.json", path.display())).unwrap();
    diesel::connection::SimpleConnection::batch_execute(&mut super::database(stopped.dir.path()), "UPDATE seals SET sha256 = NULL").unwrap();
    let app = stopped.restart().await;
    assert_eq!(verdict(&hashed(&app, &path).await), expected);
}

#[tokio::test]
async fn d8_the_sidecar_comes_after_the_file_and_its_name_have_reached_the_disk() {
    if !strace::is_here() {
        return;
    }
    let (_, _, stopped) = TestApp::builder().open().start().await.terminate().await;
    let dir = stopped.dir;
    let args = "-y -o calls -e trace=fsync,fdatasync,renameat,renameat2".split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut server = Traced::start(dir.path(), &args);
    let Start::Listening(address) = server.started().await else { panic!("it died") };
    record(&address, &counter_pcm(4_800, 1)).await;
    server.ended(true).await;
    let path = only_wav(dir.path()).expect("a recording");
    let calls = std::fs::read_to_string(dir.path().join("calls")).unwrap();
    let (wav, room) = (path.display().to_string(), path.parent().unwrap().display().to_string());
    let file = path.file_name().unwrap().to_str().unwrap();
    let line = |what: &str, from: usize, matches: &dyn Fn(&str) -> bool| {
        let found = calls.lines().enumerate().skip(from).find(|(_, line)| matches(line)).map(|(number, _)| number);
        found.unwrap_or_else(|| panic!("{what} is not among the calls:\n{calls}"))
    };
    let is_sync = |line: &str, of: &str| line.contains("sync(") && line.contains(&format!("<{of}>"));
    let named = line("the file's name", 0, &|line| line.contains("renameat2(") && line.contains(file));
    let published = line("the sidecar's name", named, &|line| line.contains("renameat(") && line.contains(".json.new"));
    // All at once, so in any order.
    for of in [&wav, &room, &format!("{room}/.{file}.json.new")] {
        assert!(line("a sync", named, &|line| is_sync(line, of)) < published, "{of} is synced first:\n{calls}");
    }
    line("the last sync", published, &|line| is_sync(line, &room));
    let first = line("a sidecar", 0, &|line| line.contains("renameat(") && line.contains(".json.new"));
    assert_eq!(first, published, "{calls}");
}

#[tokio::test]
async fn d8_a_server_that_is_killed_at_any_step_of_finishing_leaves_no_sidecar_or_a_true_one() {
    if !strace::is_here() {
        return;
    }
    let pcm = counter_pcm(4_800, 1);
    let mut left = Vec::new();
    for (call, when) in [("fsync", 1), ("fsync", 2), ("fsync", 3), ("renameat", 1), ("fsync", 4), ("fsync", 5), ("renameat", 2)] {
        let (_, _, stopped) = TestApp::builder().open().start().await.terminate().await;
        let dir = stopped.dir.path();
        let inject = format!("-o /dev/null -e trace={call} -e inject={call}:signal=SIGKILL:when={when}");
        let args: Vec<String> = inject.split(' ').map(str::to_owned).collect();
        let mut server = Traced::start(dir, &args);
        let Start::Listening(address) = server.started().await else { panic!("it died at its start: {call} {when}") };
        record(&address, &pcm).await;
        server.ended(true).await;
        // The database syncs too, and may be what it died of, before there was a file.
        let Some(path) = only_wav(dir) else { continue };
        let recorded = read_wav(&path).1;
        assert!(pcm.starts_with(&recorded), "before any repair");
        let before = sidecar(&path);
        left.push(before.is_some());
        let app = stopped.restart().await;
        let told = hashed(&app, &path).await;
        assert_eq!(told["sha256"].as_str().unwrap(), sha256sum(&path), "{call} {when}");
        // What had its sidecar is as it was; what had none is repaired.
        assert_eq!(told["recovered"].as_bool(), Some(before.is_none()), "{call} {when}");
        let deadline = Instant::now() + Duration::from_secs(20);
        while ended_rows(dir).iter().any(|row| row.ends_with("|-")) {
            assert!(Instant::now() < deadline, "{:?}", ended_rows(dir));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(read_wav(&path).1 == recorded, "{call} {when}");
    }
    assert!(left.contains(&true) && left.contains(&false), "kills before and after the sidecar: {left:?}");
}
