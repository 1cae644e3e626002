//! Disks that fail under video.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{connect, messages, path, paths, recording, send};
use crate::support::faults::{SmallDisk, Strace};
use crate::support::test_app::TestApp;
use crate::support::video::{clip_of, expected, files, pictures, probe};

/// For a sync that is due within a second, of a server that is traced.
const PATIENCE: Duration = Duration::from_secs(80);

#[tokio::test]
async fn d5_after_a_failed_sync_the_segment_has_failed_and_the_next_one_goes_on() {
    let Some(clip) = clip_of("vp8") else { return };
    let app = TestApp::builder().open().start().await;
    let mut peer = connect(&app, &path("vp8")).await;
    send(&mut peer, &clip.messages[..25]).await;
    let file =
        app.eventually("the file", async || files(app.dir.path()).into_iter().find(|file| file.extension().is_some_and(|kind| kind == "ivf"))).await;
    let Some(failing) = Strace::inject(&app, Some("fdatasync"), "error=EIO:when=1", Some(&file)) else { return };
    // What comes from now on is synced each second, and that fails; no later sync makes it good. A server that is traced is slow.
    let mut sent = clip.messages[..25].to_vec();
    let since = Instant::now();
    for message in clip.messages.iter().cycle() {
        if app.log().contains("a sync of the file failed") {
            break;
        }
        assert!(since.elapsed() < PATIENCE, "no sync has failed:\n{}", app.log());
        send(&mut peer, std::slice::from_ref(message)).await;
        sent.push(message.clone());
        // The pace of a camera.
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    drop(failing);
    send(&mut peer, &clip.messages).await;
    sent.extend_from_slice(&clip.messages);
    peer.close_and_wait().await;
    let recording = recording(&app, "vp8").await;
    let segments = recording["segments"].as_array().unwrap();
    assert_eq!((segments.len(), &segments[0]["endReason"], &segments[1]["endReason"]), (2, &json!("failed"), &json!("closed")), "{recording}");
    assert_eq!((&segments[0]["suspect"], &segments[1]["suspect"]), (&json!(true), &json!(false)), "{recording}");
    let kept: Vec<u8> = paths(&app, &recording).iter().flat_map(|path| messages(clip, &std::fs::read(path).unwrap())).collect();
    assert!(kept == sent.concat(), "nothing is lost by it");
    assert_eq!(probe(&paths(&app, &recording)[0]).codec, expected("vp8", 0).codec);
}

#[tokio::test]
async fn d6_a_full_disk_costs_no_picture_and_recording_resumes_by_itself() {
    let Some(disk) = SmallDisk::of_size("storage/egress/video", "4m") else { return };
    let ballast = disk.fill(1 << 20);
    let app = TestApp::builder().open().dir(&disk.dir).start().await;
    let mut peer = connect(&app, &path("vp8")).await;
    // Pictures that build on others, 2.5 MB in all: more than there is room for.
    let sent: Vec<Vec<u8>> = (0..100u8).map(|index| [&[0x11, index][..], &vec![index; 25_000]].concat()).collect();
    send(&mut peer, &sent).await;
    app.logged("no space is left for recordings").await;
    let live = app.live("ana").await.expect("its socket stays up");
    assert_eq!((&live["video"]["lostPictures"], &live["restarts"]["wavWriter"]), (&json!(0), &json!(0)), "{live}");
    drop(ballast);
    app.logged("recordings can be written again").await;
    let close = peer.close_and_wait().await;
    assert!(close.close_frame, "{close:?}");
    let recording = recording(&app, "vp8").await;
    let segments = recording["segments"].as_array().unwrap();
    assert_eq!((segments.len(), &segments[0]["frames"], &segments[0]["gaps"]), (1, &json!(100), &json!([])), "{recording}");
    let file = std::fs::read(&paths(&app, &recording)[0]).unwrap();
    assert!(pictures(&file).into_iter().map(|(_, picture)| picture).eq(sent), "every picture, in its order");
}

#[tokio::test]
async fn d6_pictures_that_the_disk_has_not_taken_when_the_server_ends_are_told_of() {
    let Some(disk) = SmallDisk::of_size("storage/egress/video", "4m") else { return };
    let _ballast = disk.fill(1 << 20);
    let app = TestApp::builder().open().dir(&disk.dir).start().await;
    let mut peer = connect(&app, &path("vp8")).await;
    let sent: Vec<Vec<u8>> = (0..100u8).map(|index| [&[0x11, index][..], &vec![index; 25_000]].concat()).collect();
    send(&mut peer, &sent).await;
    app.logged("no space is left for recordings").await;
    let written = app.live("ana").await.expect("live")["recordedBytes"].as_u64().unwrap();
    let all: u64 = sent.iter().map(|message| message.len() as u64).sum();
    app.eventually("all of it has come", async || app.live("ana").await.filter(|live| live["bytes"] == all)).await;
    let ending = tokio::spawn(peer.expect_close());
    let (status, _, stopped) = app.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", stopped.log);
    ending.await.unwrap();
    let told = format!("what waited is lost bytes={}", all - written);
    assert!(stopped.log.contains(&told), "{told}: {}", stopped.log);
}

#[tokio::test]
async fn d6_what_does_not_fit_into_memory_meanwhile_is_lost_whole_and_a_gap_says_so() {
    let Some(disk) = SmallDisk::of_size("storage/egress/video", "4m") else { return };
    let ballast = disk.fill(1 << 20);
    let app = TestApp::builder().open().env("LIVE_MEETING__INGEST__SPOOL", "4MiB").dir(&disk.dir).start().await;
    let mut peer = connect(&app, &path("vp8")).await;
    let picture = |index: u8| [&[0x11, index][..], &vec![index; 100_000]].concat();
    let sent: Vec<Vec<u8>> = (0..40).map(picture).collect();
    for (index, message) in sent.iter().enumerate() {
        peer.send_binary(message).await.unwrap();
        // As slowly as the file takes them, until the disk is full: then all that comes has only the memory, a quarter of 4 MiB.
        let written = async || {
            let live = app.live("ana").await?;
            let full = app.log().contains("no space is left");
            (full || live["recordedBytes"] == (index + 1) * message.len()).then_some(())
        };
        app.eventually("the picture in the file", written).await;
    }
    let live = app.eventually("all of it there", async || app.live("ana").await.filter(|live| live["video"]["pictures"] == 40)).await;
    let lost = live["video"]["lostPictures"].as_u64().unwrap();
    assert!((1..40).contains(&lost), "{live}");
    drop(ballast);
    app.logged("recordings can be written again").await;
    peer.send_binary(&picture(40)).await.unwrap();
    peer.close_and_wait().await;
    let segment = recording(&app, "vp8").await["segments"][0].clone();
    let kept: Vec<Vec<u8>> = pictures(&std::fs::read(files(disk.dir.path())[0].clone()).unwrap()).into_iter().map(|(_, picture)| picture).collect();
    let before = kept.len() - 1;
    assert_eq!(kept, [&sent[..before], &[picture(40)]].concat(), "whole pictures, and nothing between");
    assert_eq!(segment["gaps"], json!([{"startFrame": before, "frames": lost, "reason": "overload"}]), "{segment}");
    assert_eq!(before as u64 + lost, 40);
}
