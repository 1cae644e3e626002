//! Floods: what a sender cannot do to the server, nor to anybody else's audio.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use crate::ingest_errors::{PATH, pcm_of, recording_of};
use crate::support::egress_peer::{BINARY, CLOSE, CONTINUATION, EgressPeer, PING, TEXT, counter_pcm, frame};
use crate::support::machine::resident_kib;
use crate::support::test_app::TestApp;

/// Of LiveKit's stereo, per second.
const BYTE_RATE: f64 = 192_000.0;
/// What the floods may cost in memory beside other tracks.
const FLOOD_KIB: u64 = 16 << 10;
const FLOOD_TIME: Duration = Duration::from_secs(2);

async fn anonymous(app: &TestApp, participant: &str) -> EgressPeer {
    EgressPeer::connect(app.addr, &format!("/egress-audio?roomName=flood&participant={participant}")).await.unwrap()
}

/// Sends the same bytes for ever, or until the server has had enough; what it answers is read.
async fn pour(peer: &mut EgressPeer, bytes: &[u8]) {
    while peer.send_raw(bytes).await.is_ok() {
        peer.poll_incoming().await;
    }
}

async fn flood(app: &TestApp, kind: &str) {
    let zeros = vec![0; 1 << 16];
    match kind {
        "an 8 GiB frame" => loop {
            let mut peer = anonymous(app, kind.split(' ').next().unwrap()).await;
            let header = [&[0x82, 0xff][..], &(8_u64 << 30).to_be_bytes(), &[0; 4]].concat();
            peer.send_raw(&header).await.unwrap();
            pour(&mut peer, &zeros).await;
        },
        "1-byte frames" => pour(&mut anonymous(app, "tiny").await, &vec![frame(BINARY, true, b"x", true); 1_000].concat()).await,
        "frames at full speed" => pour(&mut anonymous(app, "fast").await, &vec![frame(BINARY, true, &[7; 1_920], true); 100].concat()).await,
        "pings" => pour(&mut anonymous(app, "pings").await, &vec![frame(PING, true, &[7; 125], true); 100].concat()).await,
        "mute texts" => {
            let mut peer = anonymous(app, "mute").await;
            peer.send_binary(&[7; 1_920]).await.unwrap();
            let texts = [frame(TEXT, true, br#"{"muted":true}"#, true), frame(TEXT, true, br#"{"muted":false}"#, true)].concat();
            pour(&mut peer, &texts.repeat(100)).await;
        }
        // Allowed, in as many and as small pieces as is allowed.
        "64 fragments" => {
            let message =
                [frame(BINARY, false, b"x", true), frame(CONTINUATION, false, b"x", true).repeat(62), frame(CONTINUATION, true, b"x", true)];
            pour(&mut anonymous(app, "fragments").await, &message.concat().repeat(10)).await;
        }
        // Not allowed: what comes behind the 64th is never looked at, again and again.
        "65 fragments" => loop {
            let message = [frame(BINARY, false, &zeros[..1_000], true), frame(CONTINUATION, false, &zeros[..1_000], true).repeat(1_000)];
            pour(&mut anonymous(app, "more").await, &message.concat()).await;
        },
        "a million empty continuations" => {
            let message = [frame(BINARY, false, b"x", true), frame(CONTINUATION, false, b"", true).repeat(1_000_000)].concat();
            loop {
                pour(&mut anonymous(app, "empty").await, &message).await;
            }
        }
        "unfinished messages" => {
            let mut open = Vec::new();
            for _ in 0..20 {
                let mut peer = anonymous(app, "unfinished").await;
                peer.send_raw(&frame(BINARY, false, &zeros[..60_000], true)).await.unwrap();
                open.push(peer);
            }
            pour(open.first_mut().unwrap(), &vec![frame(PING, true, b"", true); 100].concat()).await;
        }
        _ => unreachable!("{kind}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i2_a_flood_costs_no_memory_and_no_other_track_its_audio() {
    let app = Arc::new(TestApp::builder().open().start().await);
    let (sent, pcm) = (Arc::new(AtomicUsize::new(0)), counter_pcm(48_000 * 60, 1));
    let (count, stop) = (Arc::clone(&sent), Arc::new(AtomicBool::new(false)));
    let mut witness = EgressPeer::connect(app.addr, PATH).await.unwrap();
    let (told, audio) = (Arc::clone(&stop), pcm.clone());
    let witness = tokio::spawn(async move {
        for part in audio.chunks(19_200) {
            witness.go_on(part).await.unwrap();
            count.fetch_add(part.len(), Ordering::Relaxed);
            if told.load(Ordering::Relaxed) {
                break;
            }
        }
        witness.close_and_wait().await
    });
    app.eventually("the witness is heard", async || app.live("ana").await.filter(|live| live["recordedBytes"].as_u64() > Some(100_000))).await;
    let before = resident_kib(app.pid());
    let kinds = ["an 8 GiB frame", "1-byte frames", "frames at full speed", "64 fragments", "65 fragments", "a million empty continuations"];
    for kind in kinds.into_iter().chain(["pings", "mute texts", "unfinished messages"]) {
        let (start, mut most) = (Instant::now(), 0);
        let flooding = tokio::time::timeout(FLOOD_TIME, flood(&app, kind));
        let watching = async {
            while start.elapsed() < FLOOD_TIME {
                tokio::time::sleep(Duration::from_millis(50)).await;
                most = most.max(resident_kib(app.pid()));
            }
        };
        tokio::join!(flooding, watching).0.expect_err("a flood has no end");
        assert!(most <= before + FLOOD_KIB, "{kind}: from {before} to {most} KiB");
        let due = sent.load(Ordering::Relaxed) as u64;
        let caught_up = Instant::now();
        app.eventually("the witness is recorded", async || app.live("ana").await.filter(|live| live["recordedBytes"].as_u64() >= Some(due))).await;
        assert!(caught_up.elapsed() < Duration::from_millis(800), "{kind}: the witness waits {:?}", caught_up.elapsed());
    }
    stop.store(true, Ordering::Relaxed);
    witness.await.unwrap();
    let recorded = pcm_of(&app, &recording_of(&app, "ana").await);
    assert!(recorded.len() == sent.load(Ordering::Relaxed) && recorded == pcm[..recorded.len()], "{} bytes", recorded.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i2_after_a_burst_of_ten_seconds_a_sender_is_read_at_eight_times_its_rate() {
    let app = TestApp::builder().open().start().await;
    // By bytes, and for tiny frames by their number.
    for (participant, payload, burst, rate) in [("big", 1_920, 10.0 * BYTE_RATE, 8.0 * BYTE_RATE), ("tiny", 1, 1_000.0, 800.0)] {
        let start = Instant::now();
        let mut peer = anonymous(&app, participant).await;
        let block = vec![frame(BINARY, true, &vec![7; payload], true); 100].concat();
        tokio::time::timeout(Duration::from_secs(3), pour(&mut peer, &block)).await.expect_err("it is not closed");
        let live = app.live(participant).await.unwrap();
        let (bytes, bound) = (live["bytes"].as_f64().unwrap(), burst + rate * start.elapsed().as_secs_f64());
        assert!(bytes > burst && bytes <= bound, "{participant}: {bytes} bytes, at most {bound} expected");
    }
}

#[tokio::test]
async fn i2_a_message_that_is_not_finished_within_five_seconds_ends_its_connection_and_what_came_before_is_kept() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(4_800, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    let start = Instant::now();
    peer.send_raw(&frame(BINARY, false, &pcm, true)).await.unwrap();
    // Alive all the time, and never done; 5 s are promised, four times that decide.
    let close = loop {
        assert!(start.elapsed() < Duration::from_secs(20), "the connection stays open");
        peer.send_raw(&frame(PING, true, b"", true)).await.ok();
        tokio::time::sleep(Duration::from_millis(200)).await;
        if peer.poll_incoming().await.iter().any(|frame| frame.opcode == CLOSE) {
            break start.elapsed();
        }
    };
    assert!(close > Duration::from_secs(4), "{close:?} are too soon");
    let recording = recording_of(&app, "ana").await;
    assert_eq!(recording["segments"][0]["endReason"], "violation");
    assert!(pcm_of(&app, &recording) == pcm);
}

#[tokio::test]
async fn i3_a_peer_that_reads_nothing_while_it_pings_holds_up_nobody_and_is_dropped() {
    let app = TestApp::builder().open().env("LIVE_MEETING__INGEST__MAX_SPEED", "1000").start().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4_096).unwrap();
    let mut stuck = socket.connect(app.addr).await.unwrap();
    let handshake = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13";
    let request = format!("GET /egress-audio?roomName=room&participant=stuck&channels=2 HTTP/1.1\r\nHost: {}\r\n{handshake}\r\n\r\n", app.addr);
    stuck.write_all(request.as_bytes()).await.unwrap();
    let (pcm, pings) = (counter_pcm(10_000, 1), vec![frame(PING, true, &[7; 125], true); 100].concat());
    stuck.write_all(&frame(BINARY, true, &pcm, true)).await.unwrap();
    // Its answers fill every buffer on their way; from then on the server reads no more of it either.
    let is_stuck = async { while tokio::time::timeout(Duration::from_secs(1), stuck.write_all(&pings)).await.map(Result::unwrap).is_ok() {} };
    tokio::time::timeout(Duration::from_secs(15), is_stuck).await.expect("the flood comes to a halt");

    let mut other = EgressPeer::connect(app.addr, PATH).await.unwrap();
    other.send_pcm(&pcm).await.unwrap();
    let start = Instant::now();
    assert!(other.close_and_wait().await.close_frame);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    let recording = recording_of(&app, "ana").await;
    assert_eq!(recording["segments"][0]["endReason"], "closed");
    assert!(pcm_of(&app, &recording) == pcm);

    // The kernel gives it up after 20 s without progress (`docs/FACTS.md`, F2); four times that decide.
    let gone = async {
        while app.live("stuck").await.is_some() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(80), gone).await.expect("the stuck peer is dropped");
    let ended = async || Some(recording_of(&app, "stuck").await).filter(|recording| recording["endedAt"].is_string());
    let recording = app.eventually("its recording has ended", ended).await;
    assert_eq!(recording["segments"][0]["endReason"], "lost");
    assert!(pcm_of(&app, &recording) == pcm);
}
