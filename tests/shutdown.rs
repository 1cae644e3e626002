//! How the server ends: everything sealed, everybody told.

mod crowd;

use std::process::Stdio;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::egress_peer::{BINARY, CloseSeen, EgressPeer, counter_pcm, frame};
use crate::support::machine::{has_tools, skip};
use crate::support::test_app::{Stopped, TestApp, parse_response, read_wav};

/// 10 s are promised of a service manager's patience; four times that decide.
const PROMISED: Duration = Duration::from_secs(10);

async fn connect(app: &TestApp, participant: &str) -> EgressPeer {
    EgressPeer::connect(app.addr, &format!("/egress-audio?roomName=room&participant={participant}&trackId=TR_{participant}")).await.unwrap()
}

/// How segments end that a server had open when it was told to stop.
fn ends(stopped: &Stopped) -> &'static [&'static str] {
    if stopped.is_late() { &["shutdown", "crashed"] } else { &["shutdown"] }
}

/// The PCM of the only segment of each participant's recording, by participant, after asserting how it ended.
async fn sealed(app: &TestApp, end_reasons: &[&str]) -> Vec<(String, Vec<u8>)> {
    app.settled().await;
    let items = app.items("/api/v1/recordings").await;
    let pcm = |item: &Value| {
        let segments = item["segments"].as_array().unwrap();
        assert!(segments.len() == 1 && end_reasons.contains(&segments[0]["endReason"].as_str().unwrap()), "{item}");
        assert!(item["endedAt"].is_string() && segments[0]["endedAt"].is_string(), "{item}");
        let pcm = read_wav(&app.audio_dir().join(segments[0]["path"].as_str().unwrap())).1;
        assert_eq!(segments[0]["bytes"].as_u64(), Some(pcm.len() as u64), "{item}");
        (item["participant"].as_str().unwrap().to_owned(), pcm)
    };
    let mut sealed: Vec<_> = items.iter().map(pcm).collect();
    sealed.sort();
    sealed
}

#[track_caller]
fn assert_told(close: &CloseSeen) {
    assert_eq!((close.close_frame, close.code, close.reason.as_str()), (true, Some(1012), "shutdown"), "{close:?}");
}

#[tokio::test]
async fn what_was_read_just_before_the_signal_is_recorded() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(480 * 105, 1);
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(&pcm).await.unwrap();
    // The pong follows what was read before it.
    peer.ping().await.unwrap();
    assert_eq!(peer.next_frame().await.unwrap().payload, b"ping");
    let (status, _, stopped) = app.terminate().await;
    assert_eq!(status.code(), Some(0));
    let app = stopped.restart().await;
    let recorded = sealed(&app, ends(&stopped)).await;
    assert!(recorded[0].1 == pcm, "{} of {} bytes", recorded[0].1.len(), pcm.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_seals_twenty_tracks_and_their_rows_and_tells_each_peer() {
    let app = TestApp::builder().open().start().await;
    let (zeros, more) = (vec![0; 96_000], counter_pcm(48_000 * 60, 1_000_000));
    let mut peers = Vec::new();
    let mut expected = Vec::new();
    for number in 0..20 {
        let participant = format!("p{number:02}");
        let mut pcm = counter_pcm(24_000 + 333, number);
        let mut peer = connect(&app, &participant).await;
        peer.send_pcm(&pcm).await.unwrap();
        if number == 0 {
            peer.mute(true).await.unwrap();
            peer.send_pcm(&zeros).await.unwrap();
            pcm.extend(&zeros);
        }
        app.received(&participant, pcm.len()).await;
        if number == 1 {
            // In mid-message: half a frame of the next.
            peer.send_raw(&frame(BINARY, true, &[7; 1_920], true)[..960]).await.unwrap();
        }
        peers.push(peer);
        expected.push((participant, pcm));
    }
    // The first ten have nothing more to say; the others speak on until they are stopped.
    let waiting = peers.into_iter().enumerate().map(|(number, mut peer)| {
        let more = more.clone();
        tokio::spawn(async move {
            if number >= 10 {
                peer.send_realtime(&more).await.expect_err("the server closes first");
            }
            peer.expect_close().await
        })
    });
    let waiting: Vec<_> = waiting.collect();
    let (status, took, stopped) = app.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", stopped.log);
    println!("20 tracks were sealed in {took:?}");
    assert!(took < 4 * PROMISED, "{took:?}");
    for told in waiting {
        assert_told(&told.await.unwrap());
    }
    let app = stopped.restart().await;
    assert!(!app.log().contains("left open") || stopped.is_late(), "every row was final: {}", app.log());
    let sealed = sealed(&app, ends(&stopped)).await;
    assert_eq!((sealed.len(), app.wav_files().len()), (20, 20));
    for ((participant, pcm), (name, before)) in sealed.into_iter().zip(expected) {
        assert_eq!(participant, name);
        if name.as_str() < "p10" {
            assert!(pcm == before, "{name}: {} of {} bytes", pcm.len(), before.len());
        } else {
            let (head, tail) = pcm.split_at(before.len());
            assert!(head == before && *tail == more[..tail.len()], "{name}: {} bytes", pcm.len());
        }
    }
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    let muted = tracks.iter().find(|track| track["participant"] == "p00").unwrap();
    assert!(muted["muteSpans"][0]["endMs"].is_number(), "the mute span is closed: {muted}");
}

#[tokio::test]
async fn nobody_new_gets_in_while_the_server_stops() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(24_000, 1);
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(&pcm).await.unwrap();
    app.received("ana", pcm.len()).await;
    let recording_is_there = async || app.items("/api/v1/recordings").await.first().map(drop);
    app.eventually("its row is there", recording_is_there).await;
    let handshake = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13";
    let request = format!("GET /egress-audio?roomName=new HTTP/1.1\r\nHost: {}\r\n{handshake}\r\n\r\n", app.addr);
    let mut early = TcpStream::connect(app.addr).await.unwrap();
    // Answered, so that the connection is the server's by now.
    early.write_all(format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", app.addr).as_bytes()).await.unwrap();
    assert!(!until_brace(&mut early).await.is_empty());
    // A locked database holds the end up for as long as rows are waited for.
    let mut database = app.database();
    database.batch_execute("BEGIN IMMEDIATE").unwrap();
    app.signal(Signal::TERM);
    assert_told(&{
        app.logged("stopping:").await;
        let start = Instant::now();
        let mut late = TcpStream::connect(app.addr).await;
        early.write_all(request.as_bytes()).await.unwrap();
        let answer = until_brace(&mut early).await;
        parse_response(&answer, false).assert_problem(503, "shuttingDown");
        if let Ok(late) = &mut late {
            late.write_all(request.as_bytes()).await.ok();
            assert_eq!(String::from_utf8_lossy(&until_brace(late).await), "", "a connection that comes now is not answered");
        }
        let close = peer.expect_close().await;
        assert!(start.elapsed() < 4 * PROMISED, "{:?}", start.elapsed());
        close
    });
    let mut app = app;
    let status = tokio::time::timeout(4 * PROMISED, app.child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(0), "{}", app.log());
    assert!(read_wav(&app.wav_file()).1 == pcm, "sealed without the database");
    database.batch_execute("COMMIT").unwrap();
    let app = TestApp::builder().open().dir(&app.dir).start().await;
    assert!(sealed(&app, &["shutdown"]).await == [("ana".to_owned(), pcm)], "the row waited in the journal");
}

/// One request; nothing if it is not answered.
async fn ask_root(stream: &mut TcpStream) -> Option<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.ok()?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        if stream.read_buf(&mut answer).await.ok()? == 0 {
            return None;
        }
    }
    Some(())
}

/// What comes until the end of a JSON body, or of the connection.
async fn until_brace(stream: &mut TcpStream) -> Vec<u8> {
    let mut raw = Vec::new();
    while !raw.ends_with(b"}") {
        match tokio::time::timeout(4 * PROMISED, stream.read_buf(&mut raw)).await.expect("an answer or an end") {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
    raw
}

#[tokio::test]
async fn a_second_sigterm_ends_at_once_and_files_are_still_valid() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(24_000, 1);
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(&pcm).await.unwrap();
    let written = async || (app.live("ana").await?["recordedBytes"].as_u64()? == pcm.len() as u64).then_some(());
    app.eventually("it is written", written).await;
    let recording_is_there = async || app.items("/api/v1/recordings").await.first().map(drop);
    app.eventually("its row is there", recording_is_there).await;
    let mut database = app.database();
    database.batch_execute("BEGIN IMMEDIATE").unwrap();
    app.signal(Signal::TERM);
    app.logged("stopping:").await;
    app.signal(Signal::TERM);
    let mut app = app;
    let status = tokio::time::timeout(4 * PROMISED, app.child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(1), "by the second signal, and not when all was done: {}", app.log());
    assert!(read_wav(&app.wav_file()).1 == pcm, "before any repair");
    drop(database);
    // The file may have been finished before the second signal; its row was not.
    let reason = if app.wav_file().with_extension("wav.json").exists() { "shutdown" } else { "crashed" };
    let app = TestApp::builder().open().dir(&app.dir).start().await;
    assert!(sealed(&app, &[reason]).await == [("ana".to_owned(), pcm)]);
}

#[tokio::test]
async fn sigint_works_like_sigterm() {
    let mut app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(24_000, 1);
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(&pcm).await.unwrap();
    app.received("ana", pcm.len()).await;
    app.signal(Signal::INT);
    assert_told(&peer.expect_close().await);
    let status = tokio::time::timeout(4 * PROMISED, app.child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(0), "{}", app.log());
    let app = TestApp::builder().open().dir(&app.dir).start().await;
    assert!(sealed(&app, &["shutdown"]).await == [("ana".to_owned(), pcm)]);
}

#[tokio::test]
async fn sigterm_without_a_track_is_a_quick_and_clean_end() {
    let app = TestApp::builder().start().await;
    let (status, took, stopped) = app.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", stopped.log);
    assert!(took < 4 * PROMISED, "{took:?}");
    assert!(stopped.log.contains("stopping:") && !stopped.log.contains("ERROR"), "{}", stopped.log);
    assert!(std::fs::read_dir(stopped.dir.path()).unwrap().count() == 1, "only the storage is left");
}

#[tokio::test]
async fn i7_a_hang_up_ends_nothing() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(24_000, 1);
    let (before, behind) = pcm.split_at(48_000);
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(before).await.unwrap();
    app.received("ana", before.len()).await;
    for _ in 0..2 {
        app.signal(Signal::HUP);
        app.logged("a hang-up is ignored").await;
    }
    peer.send_pcm(behind).await.unwrap();
    peer.close_and_wait().await;
    assert!(read_wav(&app.wav_file()).1 == pcm);
}

#[tokio::test]
async fn i7_sigterm_ends_a_start_that_repairs_files_on_a_slow_disk() {
    const WHAT: &str = "a start on a slow disk";
    if !has_tools(WHAT, &["strace"]) {
        return;
    }
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(24_000, 1);
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(&pcm).await.unwrap();
    app.eventually("it is written", async || (app.live("ana").await?["recordedBytes"].as_u64()? == pcm.len() as u64).then_some(())).await;
    app.eventually("its row is there", async || app.items("/api/v1/recordings").await.first().map(drop)).await;
    let (file, mut database) = (app.wav_file(), app.database());
    let stopped = app.kill().await;
    // Sixteen threads have 100 s to do. As a child of the server, so that the signal is the server's.
    let mut command = tokio::process::Command::new("strace");
    command.args(["-D", "-f", "-o", "/dev/null"]);
    let beginning = std::fs::read(&file).unwrap()[..4_044].to_vec();
    let name = file.file_name().unwrap().to_str().unwrap();
    let mut rows = "INSERT INTO recordings (id, track_id, meeting_id, room_name, participant, started_at, server_id)
            SELECT 'copies', track_id, meeting_id, room_name, 'copies', started_at, server_id FROM recordings;"
        .to_owned();
    for number in 0..320 {
        let copy = file.with_file_name(format!("{number:03}.wav"));
        std::fs::write(&copy, &beginning).unwrap();
        rows.push_str(&format!(
            "INSERT INTO segments (id, recording_id, path, format, sample_rate, channels, frames, bytes, started_at, gaps, server_id)
                SELECT 'copy{number:03}', 'copies', replace(path, '{name}', '{number:03}.wav'), format, sample_rate, channels, 0, 0, started_at, '[]', server_id
                FROM segments WHERE recording_id <> 'copies';"
        ));
        command.arg("-P").arg(copy);
    }
    database.batch_execute(&format!("BEGIN; {rows} COMMIT")).unwrap();
    command.args(["-e", "trace=fsync", "-e", "inject=fsync:delay_enter=5000000", env!("CARGO_BIN_EXE_live-meeting"), "serve"]);
    command.current_dir(stopped.dir.path()).env_clear().env("HOST", "127.0.0.1").env("PORT", "0").kill_on_drop(true);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let draft = file.with_file_name(".000.wav.json.new");
    let deadline = Instant::now() + 4 * PROMISED;
    while !draft.exists() {
        if child.try_wait().unwrap().is_some() {
            return skip(WHAT, "strace may not");
        }
        assert!(Instant::now() < deadline, "nothing is repaired");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    rustix::process::kill_process(rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap(), Signal::TERM).unwrap();
    let status = tokio::time::timeout(4 * PROMISED, child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(0));
    let app = stopped.restart().await;
    app.settled().await;
    let items = app.items("/api/v1/recordings").await;
    let segment = &items.iter().find(|item| item["participant"] == "ana").unwrap()["segments"][0];
    assert_eq!(segment["endReason"], "crashed", "{segment}");
    assert!(read_wav(&file).1 == pcm);
}
