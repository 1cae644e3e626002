//! `kill -9`, again and again: what is on the disk then, and what the next start makes of it.
//!
//! The samples of every sender are a 32-bit counter, so that a lost, doubled or swapped one shows. More kills than a test run has are asked for by
//! hand, and a run is repeated by its seed:
//!
//! ```text
//! CRASHLOOP_KILLS=500 CRASHLOOP_SEED=7 cargo test --test main crashloop:: -- --nocapture
//! ```

mod boundaries;
mod memory;
mod readers;
mod syncs;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use diesel::RunQueryDsl;
use diesel::sql_types::Text;

use self::readers::{Held, assert_all_read, segments};
use crate::support::egress_peer::{CHUNK_BYTES, EgressPeer, counter_pcm};
use crate::support::machine::number;
use crate::support::stalls::{Stalls, Wants};
use crate::support::test_app::{Stopped, TestApp};

const RECORDINGS: &str = "/api/v1/recordings?limit=200";
const SENDERS: u32 = 20;
const KILLS: u64 = 25;
/// The frames that a sender's counter has for itself: 5 s, more than it lives.
const COUNTERS: u32 = 1 << 18;
/// What may be lost of what had been sent. So it must be for 95 of 100; four times that for each, as the machine may be busy. How long that let nobody
/// write is apart ([`Stalls`]).
const PROMISED_LOSS_MS: u64 = 250;
const WITHIN_PROMISE: f64 = 0.95;

/// Chance that can be had again (an xorshift generator).
struct Chance(u64);

impl Chance {
    /// Less than `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Who pauses, so that silence has to be put in front of what comes behind: that is known a second later.
fn pauses(sender: u32) -> bool {
    sender % 3 == 2
}

/// Speaks in real time until the server is gone; `sent` has the frames that the kernel took.
async fn speak(addr: SocketAddr, sender: u32, seed: u32, sent: Arc<AtomicU64>) {
    let path = format!("/egress-audio?roomName=crash&participant=p{sender}&trackId=TR_{sender}");
    // The server may be killed before it has answered; that one is not heard.
    let Ok(Ok(mut peer)) = tokio::spawn(async move { EgressPeer::connect(addr, &path).await }).await else { return };
    let mut due = tokio::time::Instant::now();
    for chunk in 0.. {
        let pcm = counter_pcm(CHUNK_BYTES / 4, seed + chunk * 480);
        if chunk == 10 && pauses(sender) {
            due += Duration::from_millis(600);
        }
        tokio::time::sleep_until(due).await;
        if peer.send_binary(&pcm).await.is_err() {
            return;
        }
        sent.fetch_add(480, Ordering::Relaxed);
        due += Duration::from_millis(10);
    }
}

/// What was known when a server died.
struct Death {
    stopped: Stopped,
    /// The frames that each sender had sent.
    sent: Vec<u64>,
    /// The files that it had told of in an answer.
    told: BTreeSet<String>,
    stall: Duration,
}

/// One life of the server.
async fn live_and_die(app: TestApp, life: u32, lasts: Duration) -> Death {
    let stalls = Stalls::watch(&app.audio_dir(), Wants::Pages);
    let counts: Vec<Arc<AtomicU64>> = (0..SENDERS).map(|_| Arc::default()).collect();
    let senders: Vec<_> =
        (0..SENDERS).zip(&counts).map(|(sender, sent)| tokio::spawn(speak(app.addr, sender, seed_of(life, sender), Arc::clone(sent)))).collect();
    tokio::time::sleep(lasts / 2).await;
    let told = segments(&app.items(RECORDINGS).await).into_keys().collect();
    tokio::time::sleep(lasts / 2).await;
    let sent: Vec<u64> = counts.iter().map(|sent| sent.load(Ordering::Relaxed)).collect();
    let killed = Instant::now();
    let stopped = app.kill().await;
    for sender in senders {
        sender.abort();
    }
    Death { stopped, sent, told, stall: stalls.longest_before(killed) }
}

fn seed_of(life: u32, sender: u32) -> u32 {
    (life * SENDERS + sender).wrapping_mul(COUNTERS).wrapping_add(1)
}

#[derive(diesel::QueryableByName)]
struct Integrity {
    #[diesel(sql_type = Text)]
    integrity_check: String,
}

#[track_caller]
fn assert_whole_database(app: &TestApp) {
    let check = diesel::sql_query("PRAGMA integrity_check").load::<Integrity>(&mut app.database()).unwrap();
    assert_eq!(check.iter().map(|row| row.integrity_check.as_str()).collect::<Vec<_>>(), ["ok"]);
}

/// Asserts that a file has been made whole by a start: nothing of it is gone, and its row says what it holds.
#[track_caller]
fn assert_repaired(before: &Held, row: Option<&serde_json::Value>) {
    let after = Held::read(before.path.clone());
    let is_kept = if before.is_moving { after.frames >= before.frames } else { after.pcm.starts_with(&before.pcm) };
    assert!(is_kept, "{}: a start takes nothing away", before.path.display());
    after.contiguous();
    assert_eq!(std::fs::metadata(&after.path).unwrap().len(), 44 + 4 * after.frames, "{}: no torn end", after.path.display());
    if let Some(row) = row {
        let ended = before.ended.as_deref().unwrap_or("crashed");
        assert_eq!((row["endReason"].as_str(), row["frames"].as_u64()), (Some(ended), Some(after.frames)), "{row}");
        assert_eq!(row["bytes"].as_u64(), Some(4 * after.frames), "{row}");
        assert!(row["endedAt"].is_string(), "{row}");
    }
}

/// A sender's files of one life.
fn of_sender(files: &[Held], life: u32, sender: u32) -> Vec<&Held> {
    let seed = seed_of(life, sender);
    files.iter().filter(|file| file.counters().any(|counter| (seed..seed + COUNTERS).contains(&counter))).collect()
}

/// How many frames of a sender are in its files, after asserting that each goes on where the one before it ended.
#[track_caller]
fn frames_of(own: &[&Held], life: u32, sender: u32) -> u32 {
    let seed = seed_of(life, sender);
    let mut spans: Vec<(u32, u32)> = own.iter().filter_map(|file| file.contiguous()).collect();
    spans.sort_unstable();
    spans.into_iter().fold(0, |kept, (first, last)| {
        assert_eq!(first, seed + kept, "life {life}: a segment of sender {sender} begins where the one before it ended");
        last + 1 - seed
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d1_s8_kill_9_at_any_moment_loses_a_quarter_of_a_second_and_no_file_and_no_row() {
    let kills = number("CRASHLOOP_KILLS", KILLS);
    let seed = number("CRASHLOOP_SEED", SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into());
    assert!(kills <= 500, "the counters are enough for 500");
    println!("CRASHLOOP_SEED={seed} CRASHLOOP_KILLS={kills}");
    let mut chance = Chance(seed.max(1));
    // Some lives are long enough for the next segment, and for what a pause moves.
    let mut app = TestApp::builder().open().env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", "1s").start().await;
    let (mut known, mut losses, mut without_row, mut told_of, mut longest_stall) = (BTreeSet::<PathBuf>::new(), Vec::new(), 0, 0, 0);
    let (mut moved, mut filled) = (0, 0);
    for life in 0..u32::try_from(kills).unwrap() {
        // A third of the lives is so short that files are just being made.
        let lasts = Duration::from_millis(if chance.below(3) == 0 { chance.below(400) } else { 400 + chance.below(2_600) });
        let audio_dir = app.audio_dir();
        let Death { stopped, sent, told, stall } = live_and_die(app, life, lasts).await;
        let stall = u64::try_from(stall.as_millis()).unwrap();
        longest_stall = longest_stall.max(stall);
        let files: Vec<Held> = stopped.wav_files().into_iter().filter(|path| !known.contains(path)).map(Held::read).collect();
        assert_all_read(&files);
        let mut moving = Vec::new();
        for (sender, sent) in (0..SENDERS).zip(&sent) {
            let own = of_sender(&files, life, sender);
            if own.iter().any(|file| file.is_moving) {
                moving.push((sender, *sent));
                continue;
            }
            let kept = frames_of(&own, life, sender);
            filled += usize::from(own.iter().any(|file| file.counters().any(|counter| counter == 0)));
            let lost = sent.saturating_sub(kept.into()) / 48;
            let of_us = lost.saturating_sub(stall);
            let told = format!("life {life} of {lasts:?}: {lost} ms of sender {sender} are lost, and the machine let nobody write for {stall} ms");
            assert!(of_us <= 4 * PROMISED_LOSS_MS, "{told}\n{}", stopped.log);
            losses.push(of_us);
        }
        assert!(files.iter().all(|file| file.is_moving || file.contiguous().is_some()), "every file has a sample, and all are whole");

        // Some starts are killed too.
        if chance.below(5) == 0 {
            stopped.dies_while_it_starts(Duration::from_millis(chance.below(500))).await;
        }
        app = stopped.restart().await;
        assert_whole_database(&app);
        let rows = segments(&app.items(RECORDINGS).await);
        for file in &files {
            let path = file.path.strip_prefix(&audio_dir).unwrap().to_str().unwrap();
            let row = rows.get(path);
            without_row += usize::from(row.is_none());
            told_of += usize::from(told.contains(path));
            assert!(row.is_some() || !told.contains(path), "life {life} of {lasts:?}: {path} was told of, and has no row now");
            assert_repaired(file, row);
        }
        moved += moving.len();
        let repaired: Vec<Held> = files.iter().map(|file| Held::read(file.path.clone())).collect();
        for (sender, sent) in moving {
            let kept = frames_of(&of_sender(&repaired, life, sender), life, sender);
            let of_us = (sent.saturating_sub(kept.into()) / 48).saturating_sub(stall);
            // What moves is on the disk first, which may take a second.
            assert!(of_us <= 4 * PROMISED_LOSS_MS + 1_000, "life {life} of {lasts:?}: {of_us} ms of sender {sender} are lost, which was being moved");
        }
        known.extend(files.into_iter().map(|file| file.path));
    }
    let files: Vec<Held> = app.wav_files().into_iter().map(Held::read).collect();
    assert_eq!(files.iter().map(|file| file.path.clone()).collect::<BTreeSet<_>>(), known, "nothing is deleted, and nothing made");
    assert_all_read(&files);
    let starts: BTreeSet<u32> = files.iter().filter_map(Held::contiguous).map(|(first, _)| first).collect();
    assert_eq!(starts.len(), files.len(), "no file begins where another does");
    assert!(told_of > 0, "rows were told of before some deaths");
    // Fewer kills may all have come too early.
    assert!(filled > 0 || kills < KILLS, "some pauses were filled before the end");
    losses.sort_unstable();
    let within = losses.iter().filter(|lost| **lost <= PROMISED_LOSS_MS).count();
    assert!(
        within as f64 >= WITHIN_PROMISE * losses.len() as f64,
        "{within} of {} losses are within {PROMISED_LOSS_MS} ms: {losses:?}",
        losses.len()
    );
    println!(
        "{kills} kills: {} files; at most {} ms lost, {} in the middle, {within} of {} within {PROMISED_LOSS_MS} ms, beside stalls of {longest_stall} ms; {without_row} files without a row, {filled} senders whose pause was filled, {moved} killed while it was",
        files.len(),
        losses.last().unwrap(),
        losses[losses.len() / 2],
        losses.len(),
    );
}
