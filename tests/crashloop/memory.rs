//! A server that gets no more memory dies, as at a kill.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use super::readers::{Held, assert_all_read, segments};
use super::{PROMISED_LOSS_MS, assert_repaired, speak};
use crate::support::egress_peer::{BINARY, CONTINUATION, EgressPeer, frame};
use crate::support::test_app::TestApp;

/// Connections that each hold two mebibytes: with what the allocator has set aside for its arenas, so many are more than enough.
const CONNECTIONS: u32 = 200;

/// Everything that the process has mapped (proc(5)).
fn mapped_bytes(pid: u32) -> u64 {
    let pages = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    pages.split(' ').next().unwrap().parse::<u64>().unwrap() * rustix::param::page_size() as u64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d1_a_server_without_memory_leaves_files_that_can_be_read_and_are_made_whole() {
    let mut app = TestApp::builder().open().start().await;
    let sent = Arc::<AtomicU64>::default();
    let speaker = tokio::spawn(speak(app.addr, 0, 1, Arc::clone(&sent)));
    app.eventually("it is recorded", async || app.live("p0").await.filter(|live| live["recordedBytes"].as_u64() > Some(192_000))).await;
    let pid = Pid::from_raw(app.pid() as i32).unwrap();
    let mapped = Some(mapped_bytes(app.pid()));
    prlimit(Some(pid), Resource::As, Rlimit { current: mapped, maximum: mapped }).unwrap();
    let half = vec![7; (1 << 20) - 1];
    let (first, second) = (frame(BINARY, false, &half, true), frame(CONTINUATION, false, &half, true));
    let (addr, mut open) = (app.addr, Vec::new());
    for number in 0..CONNECTIONS {
        if app.child.try_wait().unwrap().is_some() {
            break;
        }
        // The server may be gone before it has answered; that one is not heard.
        let path = format!("/egress-video?roomName=room&participant=v{number}&codec=vp8");
        let Ok(Ok(mut peer)) = tokio::spawn(async move { EgressPeer::connect(addr, &path).await }).await else { continue };
        if peer.send_raw(&first).await.is_ok() {
            peer.send_raw(&second).await.ok();
        }
        open.push(peer);
    }
    let status = tokio::time::timeout(std::time::Duration::from_secs(20), app.child.wait()).await.expect("it is without memory").unwrap();
    let at_its_end = sent.load(Ordering::Relaxed);
    // Whichever part wants some first: what is allocated, or a thread's stack.
    let tells = ["memory allocation", "Cannot allocate memory"].iter().any(|words| app.log().contains(words));
    assert!(!status.success() && tells, "{status}: {}", app.log());
    speaker.abort();
    let stopped = app.kill().await;
    let files: Vec<Held> = stopped.wav_files().into_iter().map(Held::read).collect();
    assert_all_read(&files);
    assert!(files.len() == 1 && files[0].contiguous().is_some_and(|(first, _)| first == 1), "{files:?}");
    let lost = at_its_end.saturating_sub(files[0].frames) / 48;
    assert!(lost <= 4 * PROMISED_LOSS_MS, "{lost} ms are lost");

    let app = stopped.restart().await;
    let rows = segments(&app.items("/api/v1/recordings").await);
    let row = rows.get(files[0].path.strip_prefix(app.audio_dir()).unwrap().to_str().unwrap());
    assert_repaired(&files[0], row);
}
