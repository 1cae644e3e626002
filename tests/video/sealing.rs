//! Finished files of video: sidecars, hashes, repair, and room for new ones.

use serde_json::json;
use tempfile::TempDir;

use super::{connect, path, paths, recording, send};
use crate::support::egress_peer::{EgressPeer, Handshake};
use crate::support::machine::sha256sum;
use crate::support::test_app::{Finished, TestApp, run, sidecar};
use crate::support::video::{HEIGHT, PICTURES, WIDTH, clip_of, clips, declared_pictures, files};

#[tokio::test]
async fn d8_a_finished_file_of_video_has_a_sidecar_and_a_row_that_say_what_it_is() {
    let app = TestApp::builder().open().start().await;
    for clip in clips() {
        let mut peer = connect(&app, &path(clip.codec)).await;
        send(&mut peer, &clip.messages).await;
        peer.close_and_wait().await;
        let file = paths(&app, &recording(&app, clip.codec).await)[0].clone();
        let told = sidecar(&file).expect("it is there when the Close is answered");
        let (format, size) = if clip.codec == "h264" { ("h264", [json!(null), json!(null)]) } else { ("ivf", [json!(WIDTH), json!(HEIGHT)]) };
        let length = std::fs::metadata(&file).unwrap().len();
        assert_eq!([&told["format"], &told["frames"], &told["bytes"]], [&json!(format), &json!(PICTURES), &json!(length)], "{told}");
        assert_eq!([&told["sampleRate"], &told["channels"]], [&json!(null); 2], "{told}");
        assert_eq!([&told["width"], &told["height"]], [&size[0], &size[1]], "{told}");
        assert_eq!([&told["endReason"], &told["recovered"], &told["suspect"]], [&json!("closed"), &json!(false), &json!(false)], "{told}");
        let hashed = async || {
            let segment = recording(&app, clip.codec).await["segments"][0].clone();
            segment["sha256"].is_string().then_some(segment)
        };
        let segment = app.eventually("its hash in the row", hashed).await;
        assert_eq!((&segment["sha256"], &sidecar(&file).unwrap()["sha256"]), (&json!(sha256sum(&file)), &segment["sha256"]));
        assert_eq!([&segment["width"], &segment["height"]], [&size[0], &size[1]], "{segment}");
    }
}

#[tokio::test]
async fn d4_repair_by_hand_counts_the_pictures_of_what_was_interrupted() {
    let Some(clip) = clip_of("vp8") else { return };
    let dir = TempDir::new().unwrap();
    let room = dir.path().join("video/room");
    std::fs::create_dir_all(&room).unwrap();
    // Of a header that counts nothing, and with half a picture at the end.
    let mut stream = clip.file.clone();
    stream[24..28].fill(0);
    let whole = stream.len();
    stream.extend([&1_000u32.to_le_bytes()[..], &9u64.to_le_bytes(), &[1; 500]].concat());
    let (ivf, h264) = (room.join("20261120T105312.345Z_room_ana_TR_1.ivf"), room.join("20261120T105312.345Z_room_ana_TR_2.h264"));
    std::fs::write(&ivf, &stream).unwrap();
    std::fs::write(&h264, [0, 0, 0, 1, 0x65, 0x88, 0, 0, 1, 0x41, 0x9a]).unwrap();
    let pictures = PICTURES;
    let Finished { code, stdout, stderr } = run(dir.path(), &[], &["repair", "--dry-run", "video"]).await;
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    assert!(stdout.contains(&format!("{pictures} pictures")) && stdout.contains("2 to repair"), "{stdout}");
    assert_eq!(std::fs::read(&ivf).unwrap(), stream);
    let Finished { code, stdout, stderr } = run(dir.path(), &[], &["repair", "video"]).await;
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    let mended = std::fs::read(&ivf).unwrap();
    assert_eq!((mended.len(), declared_pictures(&mended)), (whole, pictures as u32));
    assert!(mended[32..] == stream[32..whole], "the pictures stay as they are");
    let told = sidecar(&ivf).unwrap();
    assert_eq!([&told["frames"], &told["width"], &told["recovered"]], [&json!(pictures), &json!(WIDTH), &json!(true)], "{told}");
    assert_eq!((std::fs::metadata(&h264).unwrap().len(), &sidecar(&h264).unwrap()["frames"]), (11, &json!(2)));
    let Finished { stdout, .. } = run(dir.path(), &[], &["repair", "video"]).await;
    assert!(stdout.contains("0 repaired, 2 finished before"), "{stdout}");
}

#[tokio::test]
async fn d3_files_of_video_without_rows_are_finished_by_the_next_start() {
    let Some(clip) = clip_of("vp8") else { return };
    let app = TestApp::builder().open().start().await;
    let stopped = app.kill().await;
    let room = stopped.dir.path().join("storage/egress/video/room");
    std::fs::create_dir_all(&room).unwrap();
    let mut stream = clip.file.clone();
    stream[24..28].fill(0);
    std::fs::write(room.join("20261120T105312.345Z_room_ana_TR_1.ivf"), &stream).unwrap();
    let app = stopped.restart().await;
    let file = files(app.dir.path()).pop().expect("it stays");
    assert_eq!(declared_pictures(&std::fs::read(&file).unwrap()) as usize, PICTURES);
    assert_eq!(sidecar(&file).expect("a sidecar")["endReason"], "crashed");
    assert!(app.log().contains("repaired a file that the database does not know"), "{}", app.log());
    let hashed = async || sidecar(&file).filter(|sidecar| sidecar["sha256"].is_string());
    let told = app.eventually("its hash", hashed).await;
    assert_eq!(told["sha256"], json!(sha256sum(&file)));
}

#[tokio::test]
async fn d6_new_video_is_refused_below_min_free() {
    let app = TestApp::builder().open().env("LIVE_MEETING__STORAGE__MIN_FREE", "1PiB").start().await;
    let refused = EgressPeer::connect_with(app.addr, &path("vp8"), Handshake { content_type: None, headers: &[] }).await;
    let Err(refusal) = refused else { panic!("it is let in") };
    assert_eq!(refusal.status, 507, "{refusal}");
}
