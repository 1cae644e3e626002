//! Who is not let in, and what is not taken.

use serde_json::json;

use super::{connect, path, recording};
use crate::support::egress_peer::{EgressPeer, GORILLA_WRITE_BUFFER};
use crate::support::test_app::{TestApp, run};
use crate::support::video::{clip_of, files};

#[tokio::test]
async fn a_codec_is_required_and_told_so() {
    let app = TestApp::builder().open().start().await;
    for (query, detail) in [
        ("roomName=room", "codec is required: h264, vp8 or vp9"),
        ("roomName=room&codec=", "codec is required: h264, vp8 or vp9"),
        ("roomName=room&codec=av1", "codec must be h264, vp8 or vp9"),
        ("codec=VP8", "roomName is required; codec must be h264, vp8 or vp9"),
    ] {
        let refusal = EgressPeer::connect(app.addr, &format!("/egress-video?{query}")).await.unwrap_err();
        assert_eq!((refusal.status, refusal.content_type.as_str()), (400, "application/problem+json"), "{query}: {refusal}");
        assert!(refusal.body.contains(detail), "{query}: {refusal}");
    }
    assert!(files(app.dir.path()).is_empty());
}

#[tokio::test]
async fn a_ticket_for_video_opens_video_once_and_nothing_else_does() {
    let app = TestApp::builder().start().await;
    let refused = async |path: &str| EgressPeer::connect(app.addr, path).await.unwrap_err().status;
    assert_eq!(refused("/egress-video?roomName=room&codec=vp8").await, 401);
    let audio = app.ticket(json!({"roomName": "room"})).await;
    assert_eq!(refused(&format!("/egress-video?roomName=room&codec=vp8&ticket={audio}")).await, 401);
    let minted = app.post("/api/v1/tickets", json!({"roomName": "room", "trackId": "TR_vp8", "kind": "video", "codec": "vp8"})).await.json();
    let url = minted["url"].as_str().unwrap();
    let path = url.strip_prefix(&format!("ws://{}", app.addr)).unwrap();
    assert!(path.starts_with("/egress-video?roomName=room&trackId=TR_vp8&codec=vp8&ticket="), "{url}");
    assert_eq!(refused(&path.replace("/egress-video", "/egress-audio")).await, 401, "nor does it open audio");
    // What the ticket says wins, and suffices.
    let ticket = minted["ticket"].as_str().unwrap();
    let mut peer = EgressPeer::connect(app.addr, &format!("/egress-video?roomName=other&codec=h264&ticket={ticket}")).await.unwrap();
    peer.send_binary(&[0x11, 0, 0, 0]).await.unwrap();
    peer.close_and_wait().await;
    let recording = recording(&app, "vp8").await;
    assert_eq!((&recording["roomName"], &recording["segments"][0]["format"]), (&json!("room"), &json!("ivf")));
    assert_eq!(refused(path).await, 401, "it is spent");
    for bad in [
        json!({"roomName": "r", "kind": "video"}),
        json!({"roomName": "r", "kind": "audio", "codec": "vp8"}),
        json!({"roomName": "r", "codec": "av1"}),
    ] {
        app.post("/api/v1/tickets", bad).await.assert_problem(400, "invalidRequest");
    }
}

#[tokio::test]
async fn the_ticket_command_makes_tickets_for_video() {
    let app = TestApp::builder().start().await;
    let made = run(app.dir.path(), &[], &["ticket", "--room", "room", "--track", "TR_h264", "--codec", "h264"]).await;
    assert_eq!(made.code, Some(0), "{made:?}");
    let path = made.stdout.trim().split_once(":3001").unwrap().1;
    let mut peer = EgressPeer::connect(app.addr, path).await.unwrap();
    peer.send_binary(&[0, 0, 0, 1, 0x67]).await.unwrap();
    peer.close_and_wait().await;
    assert_eq!(recording(&app, "h264").await["segments"][0]["format"], "h264");
}

#[tokio::test]
async fn t2_a_track_has_one_live_connection() {
    let Some(clip) = clip_of("vp8") else { return };
    let app = TestApp::builder().open().start().await;
    let mut peer = connect(&app, &path("vp8")).await;
    super::send(&mut peer, &clip.messages[..5]).await;
    app.received("ana", clip.messages[..5].concat().len()).await;
    let refusal = EgressPeer::connect(app.addr, &path("vp8")).await.unwrap_err();
    assert_eq!(refusal.status, 409, "{refusal}");
    peer.close_and_wait().await;
}

#[tokio::test]
async fn i2_a_message_of_two_mebibytes_is_taken_and_a_longer_one_is_not() {
    const MOST: usize = 2 << 20;
    let app = TestApp::builder().open().start().await;
    let message = [&[0, 0, 0, 1, 0x65, 0x88][..], &vec![7; MOST - 6]].concat();
    let mut peer = connect(&app, &path("h264")).await;
    peer.send_binary(&message).await.unwrap();
    peer.send_fragmented(&message, GORILLA_WRITE_BUFFER).await.unwrap();
    // One byte more is refused at the header, and what came before is sealed.
    peer.send_raw(&[0x82, 0xff, 0, 0, 0, 0, 0, 0x20, 0, 1, 0, 0, 0, 0]).await.unwrap();
    let close = peer.expect_close().await;
    assert_eq!((close.close_frame, close.code), (true, Some(1009)), "{close:?}");
    let segment = recording(&app, "h264").await["segments"][0].clone();
    assert_eq!((&segment["bytes"], &segment["frames"], &segment["endReason"]), (&json!(2 * MOST), &json!(2), &json!("violation")));
    let mut peer = connect(&app, &path("vp9")).await;
    peer.send_raw(&super::frames_of_tiny_fragments(513)).await.ok();
    assert_eq!(peer.expect_close().await.code, Some(1002), "a message in 513 fragments");
}

#[tokio::test]
async fn a_stream_that_means_nothing_is_ended_and_what_came_before_is_kept() {
    let Some(clip) = clip_of("vp8") else { return };
    let app = TestApp::builder().open().start().await;
    let mut peer = connect(&app, &path("vp8")).await;
    let end = 32 + clip.messages[..3].iter().map(|picture| 12 + picture.len()).sum::<usize>();
    peer.send_binary(&[&clip.file[..end], &[0xff; 12]].concat()).await.unwrap();
    let close = peer.expect_close().await;
    assert_eq!((close.code, close.reason.as_str()), (Some(1002), "violation"), "{close:?}");
}

#[tokio::test]
async fn texts_are_counted_and_change_nothing() {
    let Some(clip) = clip_of("vp8") else { return };
    let app = TestApp::builder().open().start().await;
    let mut peer = connect(&app, &path("vp8")).await;
    super::send(&mut peer, &clip.messages[..2]).await;
    peer.mute(true).await.unwrap();
    peer.send_text("{").await.unwrap();
    app.eventually("two texts", async || app.live("ana").await.filter(|live| live["unknownTexts"] == 2)).await;
    super::send(&mut peer, &clip.messages[2..4]).await;
    peer.close_and_wait().await;
    assert_eq!(recording(&app, "vp8").await["segments"][0]["frames"], 4);
}
