//! When what is recorded is handed to the disk, as the kernel sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::speaker::speak;
use crate::support::strace::Strace;
use crate::support::test_app::TestApp;
use crate::support::video::clip_of;

const WHAT: &str = "watching for syncs";
const TRACKS: u32 = 4;
const SECONDS: usize = 8;
/// 1 s is promised; four times that decide.
const AT_MOST: f64 = 4.0;

/// A call: when it began and when it was done, and what of it counts.
#[derive(Debug)]
enum Call {
    /// Audio, not a header, to the file of this name.
    Data(String),
    /// Of one file.
    Sync(String),
    /// Of all files.
    SyncAll,
    /// A stretch of this file is emptied.
    Empty(String),
}

impl Call {
    fn syncs(&self, file: &str) -> bool {
        match self {
            Self::Sync(synced) => synced == file,
            Self::SyncAll => true,
            Self::Data(_) | Self::Empty(_) => false,
        }
    }
}

/// Reads a log of `strace -f -ttt -T -y`; calls that another thread's came between are put together again.
fn calls(log: &str) -> Vec<(f64, f64, Call)> {
    let mut open: BTreeMap<(String, String), (f64, String)> = BTreeMap::new();
    let mut calls = Vec::new();
    for line in log.lines() {
        // Low numbers of threads are padded with blanks.
        let Some((thread, rest)) = line.trim_start().split_once(' ') else { continue };
        let Some((time, call)) = rest.trim_start().split_once(' ') else { continue };
        let Ok(time) = time.parse::<f64>() else { continue };
        if let Some((begun, _)) = call.split_once(" <unfinished") {
            let name = begun.split('(').next().unwrap_or_default();
            open.insert((thread.to_owned(), name.to_owned()), (time, begun.to_owned()));
        } else if let Some((name, _)) = call.strip_prefix("<... ").and_then(|rest| rest.split_once(' ')) {
            if let Some((begun, text)) = open.remove(&(thread.to_owned(), name.to_owned())) {
                calls.extend(read(&format!("{text}{}", call.split_once("resumed>").map_or("", |(_, rest)| rest))).map(|call| (begun, time, call)));
            }
        } else {
            let took = call.rsplit_once('<').and_then(|(_, took)| took.trim_end_matches('>').parse::<f64>().ok()).unwrap_or_default();
            calls.extend(read(call).map(|call| (time, time + took, call)));
        }
    }
    calls
}

fn read(call: &str) -> Option<Call> {
    let (name, arguments) = call.split_once('(')?;
    if name == "syncfs" {
        return Some(Call::SyncAll);
    }
    let file = arguments.split_once('<')?.1.split_once('>')?.0.rsplit('/').next()?.to_owned();
    // The meeting's directory has the room's name here.
    if file != "room" && ![".wav", ".ivf", ".h264", ".move"].iter().any(|kind| file.ends_with(kind)) {
        return None;
    }
    match name {
        "fallocate" => arguments.contains("PUNCH_HOLE").then_some(Call::Empty(file)),
        "fdatasync" | "fsync" => Some(Call::Sync(file)),
        // The others are written at a place.
        "write" => file.ends_with(".move").then_some(Call::Data(file)),
        // The header is rewritten at the beginning; it may lag behind.
        "pwrite64" | "pwritev" | "pwritev2" => {
            (![", 44, 0)", ", 32, 0)"].iter().any(|header| arguments.contains(header))).then_some(Call::Data(file))
        }
        _ => None,
    }
}

#[test]
fn a_call_is_understood_whatever_the_number_of_its_thread() {
    for thread in ["7    ", "12345 ", "123456 "] {
        let log = format!(
            "{thread}100.5 pwrite64(9</a/b.wav>, \"x\"..., 4096, 44) = 4096 <0.25>\n\
             {thread}101.0 fdatasync(9</a/b.wav> <unfinished ...>\n\
             {thread}102.0 <... fdatasync resumed>) = 0 <1.0>\n"
        );
        let found: Vec<(f64, f64, String)> = calls(&log).into_iter().map(|(begun, done, call)| (begun, done, format!("{call:?}"))).collect();
        assert_eq!(found, [(100.5, 100.75, "Data(\"b.wav\")".to_owned()), (101.0, 102.0, "Sync(\"b.wav\")".to_owned())], "{thread:?}");
    }
}

/// That every byte of these files was synced in time; `end` of the watching, before which what came last need not be. Returns the longest that it took.
fn assert_synced(calls: &[(f64, f64, Call)], seconds: usize) -> f64 {
    let end = calls.iter().map(|(_, done, _)| *done).fold(0.0, f64::max);
    let mut worst = 0.0_f64;
    for file in written(calls) {
        let syncs: Vec<(f64, f64)> = calls.iter().filter(|(.., call)| call.syncs(file)).map(|(begun, done, _)| (*begun, *done)).collect();
        for (_, written, _) in calls.iter().filter(|(.., call)| matches!(call, Call::Data(written) if written == file)) {
            // A sync that began before the data was there does not count for it.
            let synced = syncs.iter().filter(|(begun, _)| begun >= written).map(|(_, done)| *done).fold(f64::INFINITY, f64::min);
            if synced.is_finite() {
                worst = worst.max(synced - written);
            }
            let in_time = synced - written <= AT_MOST || end - written <= AT_MOST;
            assert!(in_time, "{file}: written {:.3} s before the end, not synced in time", end - written);
        }
        assert!(syncs.len() * 4 >= seconds, "{file}: {} syncs in {seconds} s", syncs.len());
    }
    worst
}

/// The files that got data.
fn written(calls: &[(f64, f64, Call)]) -> BTreeSet<&String> {
    calls.iter().filter_map(|(.., call)| if let Call::Data(file) = call { Some(file) } else { None }).collect()
}

/// A log of the server's calls to the disk, for as long as the second lives.
async fn watched(app: &TestApp) -> Option<(tempfile::NamedTempFile, Strace)> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let arguments = ["-ttt", "-T", "-y", "-e", "trace=write,pwrite64,pwritev,pwritev2,fdatasync,fsync,syncfs,fallocate"];
    let strace = Strace::attach(WHAT, app.pid(), &arguments, log.path()).await?;
    Some((log, strace))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d3_what_is_written_is_handed_to_the_disk_within_a_second_and_after_it_was_written() {
    let app = TestApp::builder().open().start().await;
    let Some((log, strace)) = watched(&app).await else { return };
    let speaking = (0..TRACKS).map(async |number| {
        let mut peer =
            EgressPeer::connect(app.addr, &format!("/egress-audio?roomName=room&participant=p{number}&trackId=TR_{number}")).await.unwrap();
        peer.send_realtime(&counter_pcm(48_000 * SECONDS, 1)).await.unwrap();
        peer // stays open, so that no seal helps
    });
    let peers = futures_util::future::join_all(speaking).await;
    // One may be written under its temporary name all the time.
    let seen = async || {
        let calls = calls(&std::fs::read_to_string(log.path()).unwrap());
        (written(&calls).len() >= TRACKS as usize - 1).then_some(())
    };
    app.eventually("strace has seen the audio being written", seen).await;
    drop(strace);
    let calls = calls(&std::fs::read_to_string(log.path()).unwrap());
    let names = calls.iter().filter(|(.., call)| call.syncs("room")).count();
    assert!(names > 0, "the names of the files are handed to the disk too, before any of them ends");
    let worst = assert_synced(&calls, SECONDS);
    println!("{TRACKS} tracks: synced {worst:.3} s after a write at most");
    for peer in peers {
        peer.close_and_wait().await;
    }
}

/// More than are synced one by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d3_many_tracks_are_handed_to_the_disk_together_within_a_second() {
    const MANY: u32 = 20;
    let app = TestApp::builder().open().start().await;
    let Some((log, strace)) = watched(&app).await else { return };
    let mut speakers = Vec::new();
    for number in 0..MANY {
        // On and on, so that no seal helps.
        speakers.push(speak(&app, number, 36_000).await);
    }
    let have_spoken = async || {
        let live = app.items("/api/v1/tracks/live").await;
        live.iter().all(|track| track["recordedBytes"].as_u64() > Some(SECONDS as u64 * 32_000)).then_some(())
    };
    app.eventually("all have spoken for so long", have_spoken).await;
    drop(strace);
    let calls = calls(&std::fs::read_to_string(log.path()).unwrap());
    assert!(calls.iter().any(|(.., call)| matches!(call, Call::SyncAll)), "together");
    let worst = assert_synced(&calls, SECONDS);
    println!("{MANY} tracks: synced {worst:.3} s after a write at most");
    for speaker in speakers {
        speaker.abort();
    }
}

#[tokio::test]
async fn d3_video_is_handed_to_the_disk_within_a_second_too() {
    let app = TestApp::builder().open().start().await;
    let Some((log, strace)) = watched(&app).await else { return };
    let mut peers = Vec::new();
    for codec in ["vp8", "h264"] {
        let Some(clip) = clip_of(codec) else { return };
        let path = format!("/egress-video?roomName=room&participant={codec}&trackId=TR_{codec}&codec={codec}");
        peers.push((EgressPeer::connect(app.addr, &path).await.unwrap(), clip.messages.iter().cycle()));
    }
    let (mut at, end) = (tokio::time::Instant::now(), tokio::time::Instant::now() + Duration::from_secs(SECONDS as u64));
    while at < end {
        for (peer, messages) in &mut peers {
            peer.send_binary(messages.next().unwrap()).await.unwrap();
        }
        at += Duration::from_millis(40);
        tokio::time::sleep_until(at).await;
    }
    let seen = async || (written(&calls(&std::fs::read_to_string(log.path()).unwrap())).len() >= 2).then_some(());
    app.eventually("strace has seen the pictures being written", seen).await;
    drop(strace);
    assert_synced(&calls(&std::fs::read_to_string(log.path()).unwrap()), SECONDS);
    for (peer, _) in peers {
        peer.close_and_wait().await;
    }
}

#[tokio::test]
async fn d3_what_moves_is_written_down_and_synced_before_its_place_is_emptied() {
    let app = TestApp::builder().open().start().await;
    let Some((log, strace)) = watched(&app).await else { return };
    let mut peer = EgressPeer::connect(app.addr, "/egress-audio?roomName=room&participant=ana&trackId=TR_1").await.unwrap();
    peer.send_realtime(&counter_pcm(48_000 * 2, 1)).await.unwrap();
    // A pause is what is sent.
    tokio::time::sleep(Duration::from_secs(2)).await;
    peer.send_realtime(&counter_pcm(48_000 * 3, 200_000)).await.unwrap();
    let filled = async || app.live("ana").await.filter(|live| live["filledFrames"].as_u64() > Some(0));
    app.eventually("the pause is filled", filled).await;
    let emptied = async || std::fs::read_to_string(log.path()).unwrap().contains("PUNCH_HOLE").then_some(());
    app.eventually("strace has seen it", emptied).await;
    peer.close_and_wait().await;
    drop(strace);
    let calls = calls(&std::fs::read_to_string(log.path()).unwrap());
    let emptied: Vec<(f64, &String)> =
        calls.iter().filter_map(|(begun, _, call)| if let Call::Empty(file) = call { Some((*begun, file)) } else { None }).collect();
    assert!(!emptied.is_empty());
    for (emptied, file) in emptied {
        let record = format!(".{file}.move");
        let written = calls.iter().filter(|(_, done, call)| matches!(call, Call::Data(written) if *written == record) && *done <= emptied);
        let last = written.map(|(_, done, _)| *done).fold(0.0, f64::max);
        assert!(last > 0.0, "{file}: nothing is written down when it is emptied at {emptied}");
        let synced = |file: &str, since: f64| calls.iter().any(|(begun, done, call)| call.syncs(file) && *begun >= since && *done <= emptied);
        assert!(synced(&record, last) && synced("room", last), "{record}: emptied at {emptied}, written down at {last}");
        // The first that is written behind that is the copy.
        let copied = calls.iter().filter(|(begun, _, call)| *begun >= last && matches!(call, Call::Data(written) if written == file));
        let copied = copied.map(|(_, done, _)| *done).fold(f64::INFINITY, f64::min);
        assert!(copied <= emptied && synced(file, copied), "{file}: emptied at {emptied}, copied at {copied}");
    }
}
