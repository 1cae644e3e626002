//! I1: whatever stands still below a socket, its reader goes on.
//!
//! It is asked from outside: who reads a socket answers its pings, each behind the audio that came before it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::net::TcpListener;

use crate::ingest_errors::recording_of;
use crate::journal::databases::{Database, Fault};
use crate::support::egress_peer::{CHUNK_BYTES, CHUNK_TIME, EgressPeer, PONG, counter_pcm};
use crate::support::fake_hume::{FakeHume, FakeHumeOptions};
use crate::support::strace::Strace;
use crate::support::test_app::{Builder, TestApp, read_wav};

/// A second is promised, and LiveKit drops audio after three; four times the promise decide.
const AT_MOST: Duration = Duration::from_secs(4);
/// Faster than real time: so much is more than the messages that may wait for a track (9.6 s), and less than its spool (30 s).
const SPEED: usize = 3;
const SECONDS: usize = 8;
const PING_EVERY: usize = 10;
/// What is sent at once: enough for a file.
const BEGINNING: usize = 20 * CHUNK_BYTES;
/// Every call that puts something on the disk.
const DISK_CALLS: &str = "pwrite64,pwritev,pwritev2,fsync,fdatasync,syncfs,sync_file_range";

struct Speaker {
    participant: String,
    pcm: Vec<u8>,
    peer: EgressPeer,
    /// The longest that a ping was without its answer.
    longest: Duration,
}

impl Speaker {
    async fn connect(app: &TestApp, number: u32) -> Self {
        let participant = format!("p{number}");
        let path = format!("/egress-audio?roomName=room&participant={participant}&trackId=TR_{number}&groupSeconds=0.5");
        let mut peer = EgressPeer::connect(app.addr, &path).await.unwrap_or_else(|refusal| panic!("{refusal}; the log:\n{}", app.log()));
        let pcm = counter_pcm(SECONDS * SPEED * 48_000, 1 + number * 100_000_000);
        peer.send_pcm(&pcm[..BEGINNING]).await.unwrap();
        Self { participant, pcm, peer, longest: Duration::ZERO }
    }

    async fn speak(mut self) -> Self {
        let (mut asked, mut due) = (VecDeque::new(), tokio::time::Instant::now());
        for (number, part) in self.pcm[BEGINNING..].chunks(SPEED * CHUNK_BYTES).enumerate() {
            tokio::time::sleep_until(due).await;
            due += CHUNK_TIME;
            if number % PING_EVERY == 0 {
                asked.push_back(Instant::now());
                self.peer.ping().await.unwrap();
            }
            self.peer.send_pcm(part).await.unwrap();
            let answers = self.peer.poll_incoming().await.iter().filter(|frame| frame.opcode == PONG).count();
            self.longest = asked.drain(..answers).map(|asked| asked.elapsed()).fold(self.longest, Duration::max);
        }
        while let Some(first) = asked.front() {
            if self.peer.next_frame().await.expect("the connection stays").opcode == PONG {
                self.longest = self.longest.max(first.elapsed());
                asked.pop_front();
            }
        }
        self
    }
}

/// Under a fault, a track that was there before it and one that comes now: both are read all the time.
async fn assert_read(app: &TestApp, first: Speaker) -> [Speaker; 2] {
    let (first, second) = tokio::join!(first.speak(), async { Speaker::connect(app, 2).await.speak().await });
    for Speaker { participant, longest, .. } in [&first, &second] {
        println!("{participant}: a ping was answered after {longest:?} at most");
        assert!(*longest < AT_MOST, "the reader of {participant} was held up for {longest:?}");
    }
    let told = app.metric("live_meeting_ingest_read_stall_max_seconds").await;
    assert!(told < AT_MOST.as_secs_f64(), "a reader was held up for {told} s");
    assert_eq!(app.metric("live_meeting_lost_bytes_total").await, 0.0);
    [first, second]
}

/// Whether files and rows have what was sent, once all is well.
async fn assert_exact(app: &TestApp, speakers: [Speaker; 2]) {
    for Speaker { participant, pcm, peer, .. } in speakers {
        peer.close_and_wait().await;
        let is_there = async || app.items("/api/v1/recordings").await.iter().any(|item| item["participant"] == *participant).then_some(());
        app.eventually("its row follows", is_there).await;
        let ended = async || Some(recording_of(app, &participant).await).filter(|recording| recording["endedAt"].is_string());
        let recording = app.eventually("its row ends", ended).await;
        let segments = recording["segments"].as_array().unwrap().iter();
        let recorded: Vec<u8> = segments.flat_map(|segment| read_wav(&app.audio_dir().join(segment["path"].as_str().unwrap())).1).collect();
        assert!(recorded == pcm, "{participant}: {} of {} bytes", recorded.len(), pcm.len());
    }
}

#[tokio::test]
async fn i1_a_disk_of_300_ms_a_write_and_a_sync_holds_up_no_reader() {
    let app = TestApp::builder().open().start().await;
    let first = Speaker::connect(&app, 1).await;
    let Some(slow) = Strace::inject(&app, Some(DISK_CALLS), "delay_enter=300000", None) else { return };
    let speakers = assert_read(&app, first).await;
    let [soon, all] = ["bucket{le=\"0.2\"}", "count"].map(|part| format!("live_meeting_write_lag_seconds_{part}"));
    assert!(app.metric(&soon).await < app.metric(&all).await, "the disk is slow");
    drop(slow);
    assert_exact(&app, speakers).await;
}

#[tokio::test]
async fn i1_a_disk_that_stands_still_for_5_s_holds_up_no_reader() {
    let app = TestApp::builder().open().start().await;
    let first = Speaker::connect(&app, 1).await;
    // Of each thread of the server every call from the tenth on, once each.
    let Some(still) = Strace::inject(&app, Some(DISK_CALLS), "delay_enter=5000000:when=10", None) else { return };
    let speakers = assert_read(&app, first).await;
    let [soon, all] = ["bucket{le=\"1.0\"}", "count"].map(|part| format!("live_meeting_write_lag_seconds_{part}"));
    assert!(app.metric(&soon).await < app.metric(&all).await, "audio waited");
    drop(still);
    assert_exact(&app, speakers).await;
}

async fn without_a_database(mut database: Database) {
    // An unoptimised build takes about a second to authenticate a connection to PostgreSQL.
    let app = TestApp::builder().open().env("DATABASE_URL", &database.url).env("LIVE_MEETING__DATABASE__CONNECTIONS", "4").start().await;
    let first = Speaker::connect(&app, 1).await;
    app.eventually("its row", async || app.items("/api/v1/recordings").await.first().map(drop)).await;
    database.take_away();
    let speakers = assert_read(&app, first).await;
    database.give_back();
    assert_exact(&app, speakers).await;
}

#[tokio::test]
async fn i1_a_locked_sqlite_holds_up_no_reader() {
    without_a_database(Database::sqlite()).await;
}

#[tokio::test]
async fn i1_a_postgresql_that_stands_still_holds_up_no_reader() {
    if let Some(database) = Database::postgres(Fault::Stopped) {
        without_a_database(database).await;
    }
}

fn analysed_by(url: &str) -> Builder {
    TestApp::builder().open().env("HUME_WS_URL", url).env("HUME_API_KEY", "key")
}

/// A service that opens WebSockets and reads nothing that comes then.
async fn deaf_service() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            open.extend(tokio_tungstenite::accept_async(stream).await);
        }
    });
    url
}

#[tokio::test]
async fn i1_an_analysis_that_refuses_or_does_not_answer_or_reads_nothing_holds_up_no_reader() {
    let refuses = FakeHume::start(FakeHumeOptions::default());
    refuses.refuse_with(Some(503));
    let silent = FakeHume::start(FakeHumeOptions { accept_delay: Duration::from_secs(3_600), ..FakeHumeOptions::default() });
    let each = [refuses.url(), silent.url(), deaf_service().await].map(|url| async move {
        let app = analysed_by(&url).start().await;
        let first = Speaker::connect(&app, 1).await;
        let speakers = assert_read(&app, first).await;
        for participant in ["p1", "p2"] {
            let live = app.live(participant).await.expect("it is live");
            assert!(live["groups"].as_u64() > Some(0) && live["measurements"] == 0, "its audio is for a service that measures nothing: {live}");
        }
        assert_exact(&app, speakers).await;
    });
    join_all(each).await;
}
