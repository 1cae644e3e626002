//! Nothing is written outside the storage's directories, whoever moves things around in them (S3).

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use live_meeting::audio::format::PcmFormat;
use live_meeting::recording::path::SegmentName;
use live_meeting::recording::root::Root;
use live_meeting::recording::segment_file::{Piece, SegmentFile};
use proptest::prelude::*;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::TempDir;

use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::faults::Strace;
use crate::support::test_app::{TestApp, read_wav};

/// Every file, directory and link below a directory, with its content.
fn tree(dir: &Path) -> BTreeSet<(PathBuf, Vec<u8>)> {
    let mut found = BTreeSet::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                open.push(entry.path());
            }
            found.insert((entry.path(), if kind.is_file() { std::fs::read(entry.path()).unwrap() } else { Vec::new() }));
        }
    }
    found
}

/// A directory beside the storage that nobody may touch.
fn canary(dir: &Path) -> PathBuf {
    let outside = dir.join("outside");
    std::fs::create_dir_all(outside.join("RM")).unwrap();
    std::fs::write(outside.join("RM/canary.wav"), "canary").unwrap();
    outside
}

fn path(participant: &str, meeting: &str) -> String {
    format!("/egress-audio?roomName=room&participant={participant}&meetingId={meeting}")
}

#[tokio::test]
async fn s3_nothing_is_written_outside_while_a_meetings_directory_and_a_link_change_places() {
    const TRACKS: u32 = 40;
    let app = TestApp::builder().open().start().await;
    let outside = canary(app.dir.path());
    let before = tree(&outside);
    let meeting = app.audio_dir().join("RM");
    let link = app.audio_dir().join("link");
    std::fs::create_dir(&meeting).unwrap();
    symlink(&outside, &link).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let swapping = std::thread::spawn({
        let (over, meeting, link) = (Arc::clone(&over), meeting.clone(), link.clone());
        move || {
            let mut swaps = 0u64;
            while !over.load(Relaxed) || swaps % 2 == 1 {
                renameat_with(CWD, &meeting, CWD, &link, RenameFlags::EXCHANGE).unwrap();
                swaps += 1;
            }
            swaps
        }
    });
    let pcm = counter_pcm(4_800, 1);
    let tracks = (0..TRACKS).map(async |number| {
        let mut peer = EgressPeer::connect(app.addr, &path(&format!("p{number}"), "RM")).await.unwrap();
        peer.send_pcm(&pcm).await.unwrap();
        app.received(&format!("p{number}"), pcm.len()).await;
        peer
    });
    let peers = futures_util::future::join_all(tracks).await;
    // Whoever found the link tries again each second, until nothing is in the way.
    let refused = async || app.log().contains("a segment cannot be begun, trying again every second").then_some(());
    if app.wav_files().len() < TRACKS as usize {
        app.eventually("the link is refused", refused).await;
    }
    over.store(true, Relaxed);
    let swaps = swapping.join().unwrap();
    let wav = |path: &PathBuf| path.extension().is_some_and(|kind| kind == "wav");
    let files = || std::fs::read_dir(&meeting).unwrap().map(|entry| entry.unwrap().path()).filter(wav).collect::<Vec<_>>();
    let all = async || (files().len() == TRACKS as usize).then_some(());
    app.eventually("all have their file", all).await;
    for peer in peers {
        peer.close_and_wait().await;
    }
    assert!(swaps > 100, "{swaps}");
    assert!(tree(&outside) == before, "{:?}", tree(&outside));
    let files = files();
    assert!(files.len() == TRACKS as usize && files.iter().all(|file| read_wav(file).1 == pcm), "{files:?}");
}

#[tokio::test]
async fn s3_a_link_beneath_the_storage_is_not_followed_for_reading_either() {
    let app = TestApp::builder().open().start().await;
    let mut peer = EgressPeer::connect(app.addr, &path("ana", "RM")).await.unwrap();
    peer.send_pcm(&counter_pcm(4_800, 1)).await.unwrap();
    peer.close_and_wait().await;
    app.settled().await;
    let media = app.items("/api/v1/recordings").await[0]["segments"][0]["media"].as_str().unwrap().to_owned();
    assert_eq!(app.get(&media).await.status, 200);
    let (file, elsewhere) = (app.wav_file(), app.dir.path().join("elsewhere.wav"));
    std::fs::rename(&file, &elsewhere).unwrap();
    symlink(&elsewhere, &file).unwrap();
    app.get(&media).await.assert_problem(404, "notFound");
    std::fs::remove_file(&file).unwrap();
    std::fs::rename(&elsewhere, &file).unwrap();
    assert_eq!(app.get(&media).await.status, 200);
}

#[tokio::test]
async fn s3_where_a_sandbox_forbids_the_kernels_way_each_step_is_taken_without_links() {
    let app = TestApp::builder().open().start().await;
    let outside = canary(app.dir.path());
    let before = tree(&outside);
    let pcm = counter_pcm(4_800, 1);
    for (number, error) in ["ENOSYS", "EPERM"].into_iter().enumerate() {
        let Some(_forbidden) = Strace::inject(&app, Some("openat2"), &format!("error={error}"), None) else { return };
        let mut peer = EgressPeer::connect(app.addr, &path(&format!("p{number}"), "RM")).await.unwrap();
        peer.send_pcm(&pcm).await.unwrap();
        peer.close_and_wait().await;
        let files = app.wav_files().into_iter().filter(|file| file.parent() == Some(&app.audio_dir().join("RM")));
        assert_eq!(files.count(), number + 1, "{error}");
        app.settled().await;
        let media = app.items("/api/v1/recordings").await[0]["segments"][0]["media"].as_str().unwrap().to_owned();
        assert_eq!(app.get(&media).await.body[44..], pcm[..], "{error}");
        symlink(&outside, app.audio_dir().join(error)).unwrap();
        let mut led_astray = EgressPeer::connect(app.addr, &path(error, error)).await.unwrap();
        led_astray.send_pcm(&pcm).await.unwrap();
        let refused = async || (app.log().matches("a segment cannot be begun").count() == number + 1).then_some(());
        app.eventually("the link is refused", refused).await;
    }
    assert!(tree(&outside) == before, "{:?}", tree(&outside));
}

#[tokio::test]
async fn s3_a_storage_that_is_moved_away_and_replaced_by_a_link_keeps_its_recordings() {
    let app = TestApp::builder().open().start().await;
    let outside = canary(app.dir.path());
    let before = tree(&outside);
    let pcm = counter_pcm(9_600, 1);
    let mut running = EgressPeer::connect(app.addr, &path("ana", "RM")).await.unwrap();
    running.send_pcm(&pcm[..19_200]).await.unwrap();
    app.eventually("a file", async || (app.wav_files().len() == 1).then_some(())).await;
    let moved = app.dir.path().join("moved");
    std::fs::rename(app.audio_dir(), &moved).unwrap();
    symlink(&outside, app.audio_dir()).unwrap();
    running.send_pcm(&pcm[19_200..]).await.unwrap();
    let mut new = EgressPeer::connect(app.addr, &path("bruno", "RM_new")).await.unwrap();
    new.send_pcm(&pcm).await.unwrap();
    let told = async || {
        let health = app.request("GET", "/health", &[], b"").await.json();
        health["reasons"][0].as_str()?.contains("was moved away").then_some(())
    };
    app.eventually("health says where recordings go", told).await;
    for peer in [running, new] {
        peer.close_and_wait().await;
    }
    assert!(tree(&outside) == before, "{:?}", tree(&outside));
    let is_wav = |path: &PathBuf| path.extension().is_some_and(|kind| kind == "wav");
    let files: Vec<PathBuf> = tree(&moved).into_iter().map(|(path, _)| path).filter(is_wav).collect();
    assert!(files.len() == 2 && files.iter().all(|file| read_wav(file).1 == pcm), "{files:?}");
    app.settled().await;
    assert!(app.items("/api/v1/recordings").await.iter().all(|recording| recording["segments"][0]["endReason"] == "closed"));
}

#[tokio::test]
async fn s3_a_storage_that_is_deleted_is_made_anew_and_nobody_dies() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(9_600, 1);
    let mut running = EgressPeer::connect(app.addr, &path("ana", "RM")).await.unwrap();
    running.send_pcm(&pcm[..19_200]).await.unwrap();
    app.eventually("a file", async || (app.wav_files().len() == 1).then_some(())).await;
    std::fs::remove_dir_all(app.audio_dir()).unwrap();
    running.send_pcm(&pcm[19_200..]).await.unwrap();
    let mut new = EgressPeer::connect(app.addr, &path("bruno", "RM")).await.unwrap();
    new.send_pcm(&pcm).await.unwrap();
    for peer in [running, new] {
        peer.close_and_wait().await;
    }
    assert_eq!(read_wav(&app.wav_file()).1, pcm, "the new one, in a new directory");
    assert!(app.log().contains("was deleted under the server, it is made anew"));
    app.settled().await;
    assert_eq!(app.items("/api/v1/recordings").await.len(), 2);
    let healthy = async || (app.request("GET", "/health", &[], b"").await.status == 200).then_some(());
    app.eventually("it is healthy", healthy).await;
}

#[tokio::test]
async fn s3_everything_the_server_makes_is_closed_to_strangers_whatever_the_umask() {
    for mask in [0o022, 0o000] {
        let app = TestApp::builder().open().umask(mask).start().await;
        let mut peer = EgressPeer::connect(app.addr, &path("ana", "RM")).await.unwrap();
        peer.send_pcm(&counter_pcm(480_000, 1)).await.unwrap();
        peer.close_and_wait().await;
        app.eventually("a pipeline log", async || (!app.pipeline_log("RM").is_empty()).then_some(())).await;
        let storage = app.dir.path().join("storage");
        let mut seen = BTreeSet::new();
        for (path, _) in tree(app.dir.path()) {
            let metadata = std::fs::symlink_metadata(&path).unwrap();
            let mode = metadata.permissions().mode() & 0o777;
            let allowed = if metadata.is_dir() { 0o750 } else { 0o640 };
            assert_eq!(mode & !allowed, 0, "{mode:o} {} under umask {mask:o}", path.display());
            seen.insert(path.extension().map_or_else(String::new, |kind| kind.to_string_lossy().into_owned()));
        }
        assert!(["wav", "log", "db"].iter().all(|kind| seen.contains(*kind)), "{seen:?}");
        assert_eq!(std::fs::metadata(app.wav_file()).unwrap().mode() & 0o777, 0o640);
        assert_eq!(std::fs::metadata(storage.join("egress/audio/RM")).unwrap().mode() & 0o777, 0o750);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn s3_no_name_makes_anything_outside_the_root(
        meeting in "(\\.\\./|/|\\.|~|\\PC|[\\x00-\\x1f]){0,40}",
        room in "\\PC{0,80}",
        participant in proptest::option::of("(\\.\\./){0,5}\\PC{0,300}"),
        track in proptest::option::of("[\\x00-\\xff]{0,80}"),
    ) {
        let dir = TempDir::new().unwrap();
        let outside = canary(dir.path());
        let before = tree(&outside);
        let root = Root::open(&dir.path().join("root")).unwrap();
        // Where the meeting's directory would be, there may be a link already.
        let name = SegmentName { meeting, room, participant, track };
        let syncer = live_meeting::recording::syncer::Syncer::start().unwrap();
        let make = || SegmentFile::create(&root, &name, chrono::Utc::now(), PcmFormat::LIVEKIT, &[Piece::Audio(vec![1; 400].into())], &syncer);
        let made = make().unwrap();
        prop_assert!(root.open_file(made.relative_path()).is_ok());
        prop_assert_eq!(tree(&dir.path().join("root")).len(), 2, "a directory and a file");
        std::fs::remove_dir_all(dir.path().join("root").join(name.directory())).unwrap();
        symlink(outside.join("RM"), dir.path().join("root").join(name.directory())).unwrap();
        prop_assert!(make().is_err() && root.open_file(made.relative_path()).is_err());
        prop_assert!(tree(&outside) == before);
        prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
