//! When what is recorded is handed to the disk, as the kernel sees it.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::strace::Strace;
use crate::support::test_app::TestApp;

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
    if !file.ends_with(".wav") {
        return None;
    }
    match name {
        "fdatasync" | "fsync" => Some(Call::Sync(file)),
        // The header is rewritten at the beginning; it may lag behind.
        "pwrite64" | "pwritev" | "pwritev2" => (!arguments.contains(", 44, 0)")).then_some(Call::Data(file)),
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d3_what_is_written_is_handed_to_the_disk_within_a_second_and_after_it_was_written() {
    let app = TestApp::builder().open().start().await;
    let log = tempfile::NamedTempFile::new().unwrap();
    let arguments = ["-ttt", "-T", "-y", "-e", "trace=pwrite64,pwritev,pwritev2,fdatasync,fsync,syncfs"];
    let Some(strace) = Strace::attach(WHAT, app.pid(), &arguments, log.path()).await else { return };
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
        let files: BTreeSet<&String> = calls.iter().filter_map(|(.., call)| if let Call::Data(file) = call { Some(file) } else { None }).collect();
        (files.len() >= TRACKS as usize - 1).then_some(())
    };
    app.eventually("strace has seen the audio being written", seen).await;
    drop(strace);
    let calls = calls(&std::fs::read_to_string(log.path()).unwrap());
    let end = calls.iter().map(|(_, done, _)| *done).fold(0.0, f64::max);
    let files: BTreeSet<&String> = calls.iter().filter_map(|(.., call)| if let Call::Data(file) = call { Some(file) } else { None }).collect();
    let mut worst = 0.0_f64;
    for file in files {
        let syncs: Vec<(f64, f64)> = calls
            .iter()
            .filter(|(.., call)| matches!(call, Call::SyncAll) || matches!(call, Call::Sync(synced) if synced == file))
            .map(|(begun, done, _)| (*begun, *done))
            .collect();
        for (_, written, _) in calls.iter().filter(|(.., call)| matches!(call, Call::Data(written) if written == file)) {
            // A sync that began before the data was there does not count for it.
            let synced = syncs.iter().filter(|(begun, _)| begun >= written).map(|(_, done)| *done).fold(f64::INFINITY, f64::min);
            if synced.is_finite() {
                worst = worst.max(synced - written);
            }
            assert!(
                synced - written <= AT_MOST || end - written <= AT_MOST,
                "{file}: written {:.3} s before the end, not synced in time",
                end - written
            );
        }
        assert!(syncs.len() * 4 >= SECONDS, "{file}: {} syncs in {SECONDS} s", syncs.len());
    }
    println!("{TRACKS} tracks: synced {worst:.3} s after a write at most");
    for peer in peers {
        peer.close_and_wait().await;
    }
}
