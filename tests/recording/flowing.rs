//! Streams that flow are read past actix-http, and by it whenever they do not: here they change from one to the other all the time.

use std::net::SocketAddr;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep, sleep_until};

use super::stereo;
use crate::support::egress_peer::{BINARY, CHUNK_BYTES, EgressPeer, counter_pcm, frame};
use crate::support::machine::number;
use crate::support::test_app::{TestApp, read_wav};

const SENDERS: u32 = 8;
const SECONDS: u64 = 6;
const CHUNKS_PER_SECOND: usize = 100;

/// Chance that can be had again: a linear congruential generator (Knuth's MMIX).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Speaks in real time, but stalls at times and then catches up, cuts frames, and says other things in between.
async fn speak(addr: SocketAddr, sender: u32, mut chance: Chance, pcm: &[u8]) -> EgressPeer {
    let path = format!("/egress-audio?roomName=flow&participant=p{sender}&trackId=TR_{sender}");
    let mut peer = EgressPeer::connect(addr, &path).await.unwrap();
    let began = Instant::now();
    for (number, chunk) in (0..).zip(pcm.chunks(CHUNK_BYTES)) {
        sleep_until(began + Duration::from_millis(10) * number).await;
        match chance.below(120) {
            0..2 => sleep(Duration::from_millis(20 + chance.below(480))).await,
            2 => peer.ping().await.unwrap(),
            3 => peer.send_text("{}").await.unwrap(),
            4 => {
                let (head, tail) = chunk.split_at(960);
                peer.send_raw(&frame(BINARY, false, head, true)).await.unwrap();
                sleep(Duration::from_millis(chance.below(200))).await;
                peer.send_raw(&frame(0, true, tail, true)).await.unwrap();
                continue;
            }
            5..8 => {
                let whole = frame(BINARY, true, chunk, true);
                let (head, tail) = whole.split_at(1 + usize::try_from(chance.below(1_926)).unwrap());
                peer.send_raw(head).await.unwrap();
                sleep(Duration::from_millis(chance.below(200))).await;
                peer.send_raw(tail).await.unwrap();
                continue;
            }
            _ => {}
        }
        peer.send_binary(chunk).await.unwrap();
    }
    peer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d1_streams_that_flow_and_stall_and_come_in_bursts_keep_every_byte_in_its_place() {
    let seed = number("FLOW_SEED", std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into());
    let seconds = number("FLOW_SECONDS", SECONDS);
    println!("FLOW_SEED={seed} FLOW_SECONDS={seconds}");
    let app = TestApp::builder().open().start().await;
    let addr = app.addr;
    let senders: Vec<_> = (0..SENDERS)
        .map(|sender| {
            let pcm = counter_pcm(480 * CHUNKS_PER_SECOND * usize::try_from(seconds).unwrap(), sender << 24 | 1);
            tokio::spawn(async move {
                let peer = speak(addr, sender, Chance(seed + u64::from(sender)), &pcm).await;
                let close = peer.close_and_wait().await;
                assert!(close.close_frame, "{close:?}");
                pcm
            })
        })
        .collect();
    // A server that is not there for a while finds several batches when it goes on.
    let mut chance = Chance(seed);
    while !senders.iter().all(tokio::task::JoinHandle::is_finished) {
        sleep(Duration::from_millis(500 + chance.below(1_000))).await;
        app.signal(Signal::STOP);
        sleep(Duration::from_millis(chance.below(800))).await;
        app.signal(Signal::CONT);
    }
    let files = app.wav_files();
    assert_eq!(files.len(), senders.len(), "{files:?}");
    for (sender, pcm) in senders.into_iter().enumerate() {
        let pcm = pcm.await.unwrap();
        let file = files.iter().find(|file| file.to_str().unwrap().contains(&format!("_p{sender}_"))).unwrap();
        let (spec, kept) = read_wav(file);
        assert_eq!(spec, stereo());
        let differs = kept.iter().zip(&pcm).position(|(kept, said)| kept != said);
        assert!(kept == pcm, "sender {sender}: {} of {} bytes, and the first that differs is {differs:?}", kept.len(), pcm.len());
    }
}

/// LiveKit's egress sends its Close and goes, and waits for nothing: a server that is late finds the end of the connection behind all that it has not read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d1_what_had_come_when_its_sender_closed_and_went_is_kept_however_late_it_is_read() {
    const TAILS_MS: [usize; 10] = [10, 100, 160, 180, 200, 250, 300, 400, 700, 1_500];
    const BEFORE_MS: usize = 1_000;
    let app = TestApp::builder().open().start().await;
    let addr = app.addr;
    let speaking = TAILS_MS.iter().zip(0u32..).map(async |(tail, sender)| {
        let pcm = counter_pcm(48 * (BEFORE_MS + tail), sender << 24 | 1);
        let path = format!("/egress-audio?roomName=flow&participant=p{sender}&trackId=TR_{sender}");
        let mut peer = EgressPeer::connect(addr, &path).await.unwrap();
        peer.send_realtime(&pcm[..192 * BEFORE_MS]).await.unwrap();
        (peer, pcm)
    });
    let spoken = futures_util::future::join_all(speaking).await;
    app.signal(Signal::STOP);
    let mut all = Vec::new();
    for (mut peer, pcm) in spoken {
        peer.send_pcm(&pcm[192 * BEFORE_MS..]).await.unwrap();
        peer.close_abruptly_after_close_frame().await.unwrap();
        all.push(pcm);
    }
    app.signal(Signal::CONT);
    let ended = async || {
        let recordings = app.items("/api/v1/recordings").await;
        (recordings.len() == all.len() && recordings.iter().all(|recording| recording["endedAt"].is_string())).then_some(recordings)
    };
    let recordings = app.eventually("all have ended", ended).await;
    let mut wrong = Vec::new();
    for (sender, (pcm, tail)) in all.iter().zip(TAILS_MS).enumerate() {
        let recording = recordings.iter().find(|recording| recording["participant"] == format!("p{sender}")).unwrap();
        let segment = &recording["segments"][0];
        let kept = read_wav(&app.audio_dir().join(segment["path"].as_str().unwrap())).1;
        if kept != *pcm || segment["endReason"] != "closed" {
            wrong.push(format!("a tail of {tail} ms: {} of {} bytes, {}", kept.len(), pcm.len(), segment["endReason"]));
        }
    }
    assert_eq!(wrong, [""; 0]);
}
