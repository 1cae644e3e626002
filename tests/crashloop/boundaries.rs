//! A kill at every step: before each call to the kernel that makes, grows, names or syncs a recording.
//!
//! A first run tells which calls there are, on each thread; in each of the others `strace` kills the server before one of them. A test run does some of
//! every kind, `CRASHLOOP_BOUNDARIES=all` does all.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;

use super::readers::{Held, LEAST_HOLE, assert_all_read, segments};
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::strace::Strace;
use crate::support::test_app::{Stopped, TestApp};

const WHAT: &str = "killing the server at its calls to the kernel";
/// Every call by which a file of a recording may be changed.
const CALLS: &str = "openat,openat2,mkdir,mkdirat,write,writev,pwrite64,pwritev,pwritev2,ftruncate,fallocate,rename,renameat,renameat2,link,linkat,unlink,unlinkat,fdatasync,fsync,syncfs,sync_file_range";
/// Longer than what is not filled, and shorter than what begins a segment.
const PAUSE: Duration = Duration::from_secs(1);
/// Servers at a time.
const AT_ONCE: usize = 4;
/// Of each call, in a test run.
const OF_EACH: usize = 5;
/// Calls are counted for each thread, and which thread makes one is the scheduler's choice: what one run does not reach, another may.
const TRIES: usize = 3;

/// From when on calls are counted: `strace` does it for each thread, and what a second segment does first is the first of its kind on no thread
/// that has made the first segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum From {
    Start,
    Middle,
    /// A pause, which is filled in front of what has come since.
    Pause,
}

/// The `nth` call of its name on one thread; threads are alike.
type Boundary = (From, String, usize);

/// 0.7 s with 0.2 s of silence at their end, and 0.9 s over the end of the first segment; or 0.5 s, and enough for the pause behind them to be filled.
fn pcm(from: From) -> [Vec<u8>; 2] {
    match from {
        From::Start | From::Middle => [[counter_pcm(24_000, 1), vec![0; 9_600 * 4]].concat(), counter_pcm(43_200, 100_000)],
        From::Pause => [counter_pcm(24_000, 1), counter_pcm(120_000, 100_000)],
    }
}

async fn server(from: From) -> TestApp {
    let segment = if from == From::Pause { "1h" } else { "1s" };
    let app = TestApp::builder().open().env("LIVE_MEETING__HTTP__WORKERS", "1").env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", segment);
    app.start().await
}

/// The same stream each time, for as long as there is a server, with `strace` on it from some moment on. `None` where that may not be.
async fn stream(app: &TestApp, from: From, arguments: &[&str], log: &Path) -> Option<Strace> {
    let early = if from == From::Start { Some(Strace::attach(WHAT, app.pid(), arguments, log).await?) } else { None };
    let addr = app.addr;
    let dialled = tokio::spawn(async move { EgressPeer::connect(addr, "/egress-audio?roomName=room&participant=ana&trackId=TR_1").await.unwrap() });
    // A server that is killed before it has answered makes the peer fail, which is no fault.
    let Ok(mut peer) = dialled.await else { return early };
    let [first, second] = pcm(from);
    if peer.send_realtime(&first).await.is_err() {
        return early;
    }
    let strace = if from != From::Start { Some(Strace::attach(WHAT, app.pid(), arguments, log).await?) } else { early };
    if from == From::Pause {
        tokio::time::sleep(PAUSE).await;
    }
    if peer.send_realtime(&second).await.is_ok() {
        peer.close_and_wait().await;
    }
    strace
}

/// The calls of whole streams that touch the audio directory.
async fn boundaries() -> Option<BTreeSet<Boundary>> {
    let mut found = BTreeSet::new();
    for from in [From::Start, From::Middle, From::Pause] {
        let (app, log) = (server(from).await, tempfile::NamedTempFile::new().unwrap());
        let strace = stream(&app, from, &["-y", "-e", &format!("trace={CALLS}")], log.path()).await?;
        drop(strace);
        let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
        let log = std::fs::read_to_string(log.path()).unwrap();
        // Of a pause, only what is done while its audio moves.
        let moves = |line: &str| line.contains(".move");
        let (mut moving, mut of_moves) = (from != From::Pause, log.lines().filter(|line| moves(line)).count());
        assert!(moving || of_moves > 0, "the pause was not filled: {log}");
        for line in log.lines() {
            if from == From::Pause {
                of_moves -= usize::from(moves(line));
                moving = moves(line) || moving && of_moves > 0;
            }
            let Some((thread, call)) = line.trim_start().split_once(' ') else { continue };
            let Some((name, arguments)) = call.trim_start().split_once('(').filter(|(name, _)| CALLS.split(',').any(|known| known == *name)) else {
                continue;
            };
            let count = counts.entry((thread.to_owned(), name.to_owned())).or_default();
            *count += 1;
            if moving && arguments.contains("storage/egress/audio") && !arguments.contains(".probe-") {
                found.insert((from, name.to_owned(), *count));
            }
        }
    }
    Some(found)
}

/// The server after its death at a boundary, and whether that was what it died of.
async fn dies_at((from, call, nth): &Boundary) -> (Stopped, bool) {
    let inject = format!("inject={call}:signal=SIGKILL:when={nth}");
    let mut tries = 0;
    loop {
        let mut app = server(*from).await;
        let strace = stream(&app, *from, &["-e", &format!("trace={call}"), "-e", &inject], Path::new("/dev/null")).await;
        drop(strace);
        let dead = app.child.try_wait().unwrap().is_some();
        let stopped = app.kill().await;
        tries += 1;
        if dead || tries == TRIES {
            return (stopped, dead);
        }
    }
}

/// Asserts that the files hold, one behind the other, the beginning of what was sent, and silence where that came late; and how many frames of it.
#[track_caller]
fn assert_beginning(files: &[Held], boundary: &Boundary) -> usize {
    let sent = pcm(boundary.0).concat();
    let (mut said, mut filled) = (sent.as_chunks::<4>().0.iter().peekable(), 0);
    for (at, frame) in files.iter().flat_map(|file| file.pcm.as_chunks::<4>().0).enumerate() {
        if said.next_if_eq(&frame).is_none() {
            let lengths: Vec<u64> = files.iter().map(|file| file.frames).collect();
            assert_eq!(*frame, [0; 4], "{boundary:?}: frame {at} of {lengths:?} is not what was sent");
            filled += 1;
        }
    }
    assert!(filled == 0 || filled >= LEAST_HOLE, "{boundary:?}: {filled} frames of silence are nobody's");
    sent.len() / 4 - said.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d2_a_kill_before_any_call_to_the_kernel_leaves_what_a_start_makes_whole() {
    let Some(all) = boundaries().await else { return };
    let mut chosen: BTreeSet<Boundary> = all.clone();
    if std::env::var("CRASHLOOP_BOUNDARIES").as_deref() != Ok("all") {
        let mut of_each: BTreeMap<(From, &str), Vec<usize>> = BTreeMap::new();
        all.iter().for_each(|(from, call, nth)| of_each.entry((*from, call)).or_default().push(*nth));
        // The first, the last, and some between them.
        let some = |nths: Vec<usize>| (0..OF_EACH).map(|index| nths[index * (nths.len() - 1) / (OF_EACH - 1)]).collect::<BTreeSet<_>>();
        chosen = of_each.into_iter().flat_map(|((from, call), nths)| some(nths).into_iter().map(move |nth| (from, call.to_owned(), nth))).collect();
    }
    let deaths: Vec<(Boundary, Stopped, bool)> = futures_util::stream::iter(chosen)
        .map(|boundary| async {
            let (stopped, dead) = dies_at(&boundary).await;
            (boundary, stopped, dead)
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    // All readers read all files before any start has touched one.
    let left: Vec<Vec<Held>> = deaths.iter().map(|(_, stopped, _)| stopped.wav_files().into_iter().map(Held::read).collect()).collect();
    // Where audio was being moved some of it may be there twice, or not yet: what was declared is to be told truly once it is repaired.
    let kept = |(files, (boundary, ..)): (&Vec<Held>, &(Boundary, Stopped, bool))| {
        let sent = if files.iter().any(|file| file.is_moving) { 0 } else { assert_beginning(files, boundary) };
        (sent, files.iter().map(|file| file.frames).sum())
    };
    let kept: Vec<(usize, u64)> = left.iter().zip(&deaths).map(kept).collect();
    assert_all_read(&left.into_iter().flatten().collect::<Vec<_>>());

    let repaired = futures_util::stream::iter(deaths.iter().zip(kept)).map(|((boundary, stopped, _), (sent, frames))| async move {
        let app = stopped.restart().await;
        let files: Vec<Held> = app.wav_files().into_iter().map(Held::read).collect();
        assert!(assert_beginning(&files, boundary) >= sent, "{boundary:?}: a start takes nothing away");
        assert!(files.iter().map(|file| file.frames).sum::<u64>() >= frames, "{boundary:?}: a start takes nothing away that was declared");
        assert!(!files.iter().any(|file| file.is_moving), "{boundary:?}: nothing moves any more");
        let rows = segments(&app.items("/api/v1/recordings").await);
        for file in &files {
            // A file that had just been made may be without a row; one that has it is told truly.
            let row = rows.get(file.path.strip_prefix(app.audio_dir()).unwrap().to_str().unwrap());
            assert!(row.is_none_or(|row| row["endedAt"].is_string() && row["frames"].as_u64() == Some(file.frames)), "{boundary:?}: {row:?}");
            assert_eq!(std::fs::metadata(&file.path).unwrap().len(), 44 + 4 * file.frames, "{boundary:?}");
        }
        files
    });
    let files: Vec<Held> = repaired.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await.into_iter().flatten().collect();
    assert_all_read(&files);
    let reached: BTreeSet<&Boundary> = deaths.iter().filter(|(_, _, dead)| *dead).map(|(boundary, ..)| boundary).collect();
    println!("killed at {} of {} chosen and {} known boundaries: {reached:?}", reached.len(), deaths.len(), all.len());
    // Some are never reached, but none of those that come first.
    assert!(reached.len() * 5 >= deaths.len() * 4, "{} of {} were reached", reached.len(), deaths.len());
    let missed: Vec<&Boundary> = deaths.iter().filter(|(_, _, dead)| !dead).map(|(boundary, ..)| boundary).collect();
    assert!(!missed.iter().any(|(.., nth)| *nth == 1), "{missed:?} were not reached");
}
