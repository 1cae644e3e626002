//! Recordings and their files.

use std::path::PathBuf;

use serde_json::Value;

use super::bearer;
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::test_app::{TestApp, read_wav};

/// A short recording and its only file.
async fn record(app: &TestApp) -> (Value, PathBuf) {
    let mut peer = EgressPeer::connect(app.addr, "/egress-audio?roomName=room&participant=ana&trackId=TR_1").await.unwrap();
    peer.send_pcm(&counter_pcm(4_800, 1)).await.unwrap();
    peer.close_and_wait().await;
    app.settled().await;
    let recording = app.items("/api/v1/recordings?meetingId=room").await[0].clone();
    (recording, app.wav_file())
}

fn media(recording: &Value) -> String {
    recording["segments"][0]["media"].as_str().expect("a path").to_owned()
}

#[tokio::test]
async fn a_recording_is_shown_with_its_segments() {
    let app = TestApp::builder().open().start().await;
    let (recording, file) = record(&app).await;
    let id = recording["id"].as_str().unwrap();
    assert_eq!(app.get_json(&format!("/api/v1/recordings/{id}")).await, recording);
    assert_eq!(recording["segments"].as_array().unwrap().len(), 1);
    let segment = &recording["segments"][0];
    assert_eq!(media(&recording), format!("/api/v1/segments/{}/media", segment["id"].as_str().unwrap()));
    assert_eq!(app.audio_dir().join(segment["path"].as_str().unwrap()), file);
    assert_eq!((segment["format"].as_str(), segment["bytes"].as_u64(), segment["frames"].as_u64()), (Some("wav"), Some(19_200), Some(4_800)));
    let of = |key: &str| recording[key].as_str().unwrap().to_owned();
    assert_eq!(["roomName", "participant", "trackSid", "meetingId"].map(of), ["room", "ana", "TR_1", "room"]);
    assert!(app.items("/api/v1/recordings?meetingId=other").await.is_empty());
}

#[tokio::test]
async fn media_is_the_file_on_the_disk() {
    let app = TestApp::builder().open().start().await;
    let (recording, file) = record(&app).await;
    let bytes = std::fs::read(&file).unwrap();
    let disposition = format!("inline; filename=\"{}\"", file.file_name().unwrap().to_str().unwrap());
    let whole = format!("/api/v1/recordings/{}/media", recording["id"].as_str().unwrap());
    for path in [media(&recording), whole] {
        let response = app.get(&path).await;
        assert_eq!((response.status, response.header("content-type")), (200, Some("audio/wav")), "{path}");
        assert_eq!(response.header("accept-ranges"), Some("bytes"));
        assert_eq!(response.header("content-disposition"), Some(disposition.as_str()));
        assert_eq!(response.body, bytes);
        let head = app.request("HEAD", &path, &[("Authorization", &bearer())], b"").await;
        let length = bytes.len().to_string();
        let told = (head.status, head.header("content-type"), head.header("content-length"), head.body.len());
        assert_eq!(told, (200, Some("audio/wav"), Some(length.as_str()), 0), "{path}");
    }
}

#[tokio::test]
async fn single_byte_ranges_are_served() {
    let app = TestApp::builder().open().start().await;
    let (recording, file) = record(&app).await;
    let (path, bytes) = (media(&recording), std::fs::read(file).unwrap());
    let end = bytes.len();
    let ask =
        async |range: &str| app.request("GET", &path, &[("Authorization", &bearer()), ("Range", range), ("Accept-Encoding", "gzip")], b"").await;
    for (range, expected) in [
        ("bytes=0-0", 0..1),
        ("bytes=0-43", 0..44),
        ("bytes=1000-2999", 1_000..3_000),
        ("bytes=19000-", 19_000..end),
        ("bytes=-10", end - 10..end),
        ("bytes=19000-999999999", 19_000..end),
        ("bytes=0-", 0..end),
        ("bytes=-999999999", 0..end),
    ] {
        let response = ask(range).await;
        let content_range = format!("bytes {}-{}/{end}", expected.start, expected.end - 1);
        assert_eq!((response.status, response.header("content-range")), (206, Some(content_range.as_str())), "{range}");
        assert_eq!(response.header("content-type"), Some("audio/wav"));
        assert!(response.body == bytes[expected], "{range}");
    }
    for range in [format!("bytes={end}-"), "bytes=999999999-".to_owned(), "bytes=-0".to_owned()] {
        let response = ask(&range).await;
        response.assert_problem(416, "rangeNotSatisfiable");
        assert_eq!(response.header("content-range"), Some(format!("bytes */{end}").as_str()), "{range}");
    }
}

#[tokio::test]
async fn a_growing_segment_can_be_heard() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(9_600, 1);
    let mut peer = EgressPeer::connect(app.addr, "/egress-audio?roomName=room").await.unwrap();
    for half in [1, 2] {
        let so_far = 19_200 * half;
        peer.send_pcm(&pcm[so_far - 19_200..so_far]).await.unwrap();
        let recorded = async || (app.items("/api/v1/tracks/live").await.first()?["recordedBytes"] == so_far).then_some(());
        app.eventually("it is recorded", recorded).await;
        let with_segment = async || app.items("/api/v1/recordings").await.into_iter().find(|recording| recording["segments"][0].is_object());
        let recording = app.eventually("its rows are there", with_segment).await;
        assert!(recording["endedAt"].is_null() && recording["segments"][0]["endReason"].is_null(), "{recording}");
        let response = app.get(&media(&recording)).await;
        assert_eq!((response.status, response.body.len()), (200, 44 + so_far));
        let heard = app.dir.path().join("heard.wav");
        std::fs::write(&heard, &response.body).unwrap();
        assert_eq!(read_wav(&heard).1, pcm[..so_far]);
        let tail = app.request("GET", &media(&recording), &[("Authorization", &bearer()), ("Range", "bytes=-100")], b"").await;
        assert_eq!((tail.status, tail.body.as_slice()), (206, &pcm[so_far - 100..so_far]));
    }
    peer.close_and_wait().await;
}
