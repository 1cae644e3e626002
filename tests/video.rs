//! Video in, files and rows out.

mod disks;
mod ends;
mod floods;
mod refusals;
mod sealing;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::egress_peer::{BINARY, CONTINUATION, EgressPeer, GORILLA_WRITE_BUFFER, Handshake, frame};
use crate::support::test_app::TestApp;
use crate::support::video::{Clip, PICTURES, clip_of, clips, declared_pictures, expected, files, pictures, probe};

/// Where a clip goes, as a track of its own.
fn path(codec: &str) -> String {
    format!("/egress-video?roomName=room&participant=ana&trackId=TR_{codec}&codec={codec}&meetingId=RM_1")
}

/// A bridge's connection, which does not look like LiveKit's.
async fn connect(app: &TestApp, path: &str) -> EgressPeer {
    EgressPeer::connect_with(app.addr, path, Handshake { content_type: None, headers: &[] }).await.unwrap()
}

async fn send(peer: &mut EgressPeer, messages: &[Vec<u8>]) {
    for (index, message) in messages.iter().enumerate() {
        match index % 2 {
            0 => peer.send_binary(message).await.unwrap(),
            _ => peer.send_fragmented(message, GORILLA_WRITE_BUFFER).await.unwrap(),
        }
    }
}

/// One message in so many fragments of a byte.
fn frames_of_tiny_fragments(count: usize) -> Vec<u8> {
    (0..count).flat_map(|index| frame(if index == 0 { BINARY } else { CONTINUATION }, index + 1 == count, &[0x82], true)).collect()
}

/// The recording of a codec's track.
async fn recording(app: &TestApp, codec: &str) -> Value {
    app.settled().await;
    let items = app.items("/api/v1/recordings").await;
    items.iter().find(|item| item["trackSid"] == format!("TR_{codec}")).unwrap_or_else(|| panic!("{codec}: {items:?}")).clone()
}

/// The same of a track that is open, once its rows have followed its file.
async fn open_recording(app: &TestApp, codec: &str) -> Value {
    let rows = async || {
        let items = app.items("/api/v1/recordings").await;
        items.into_iter().find(|item| item["trackSid"] == format!("TR_{codec}") && item["segments"][0].is_object())
    };
    app.eventually("the rows of an open track", rows).await
}

/// The files of a recording's segments, in their order.
fn paths(app: &TestApp, recording: &Value) -> Vec<PathBuf> {
    let segments = recording["segments"].as_array().unwrap();
    segments.iter().map(|segment| app.dir.path().join("storage/egress/video").join(segment["path"].as_str().unwrap())).collect()
}

/// The messages of a clip that a file holds.
fn messages(clip: &Clip, file: &[u8]) -> Vec<u8> {
    if clip.codec == "h264" { file.to_vec() } else { pictures(file).into_iter().flat_map(|(_, picture)| picture).collect() }
}

#[tokio::test]
async fn video_of_every_codec_is_what_was_sent_and_ffprobe_reads_it() {
    let app = TestApp::builder().open().start().await;
    for clip in clips() {
        let mut peer = connect(&app, &path(clip.codec)).await;
        send(&mut peer, &clip.messages).await;
        let close = peer.close_and_wait().await;
        assert!(close.close_frame && close.code.is_none(), "{close:?}");
        // Everything is final when the Close arrives: no waiting from here on.
        let recording = recording(&app, clip.codec).await;
        let (segment, file) = (&recording["segments"][0], &paths(&app, &recording)[0]);
        assert_eq!(probe(file), expected(clip.codec, PICTURES), "{}", clip.codec);
        let bytes = std::fs::read(file).unwrap();
        assert!(messages(clip, &bytes) == clip.messages.concat(), "{}: not what was sent", clip.codec);
        let format = if clip.codec == "h264" { "h264" } else { "ivf" };
        let name = file.file_name().unwrap().to_str().unwrap();
        let (time, rest) = name.split_once('_').unwrap();
        chrono::NaiveDateTime::parse_from_str(time, "%Y%m%dT%H%M%S%.3fZ").unwrap();
        assert_eq!(rest, format!("room_ana_TR_{}.{format}", clip.codec));
        if format == "ivf" {
            assert_eq!(declared_pictures(&bytes), PICTURES as u32);
            let times: Vec<u64> = pictures(&bytes).into_iter().map(|(time, _)| time).collect();
            assert!(times[0] == 0 && times.is_sorted_by(|earlier, later| earlier < later), "{times:?}");
        }
        let row =
            json!({"format": format, "frames": PICTURES, "bytes": bytes.len(), "sampleRate": 0, "channels": 0, "endReason": "closed", "gaps": []});
        for (member, value) in row.as_object().unwrap() {
            assert_eq!(&segment[member], value, "{member} of {segment}");
        }
        assert!(recording["endedAt"].is_string() && segment["endedAt"].is_string(), "{recording}");
    }
    let tracks = app.items("/api/v1/sessions/RM_1/tracks").await;
    assert!(tracks.iter().all(|track| track["kind"] == "VIDEO" && track["formatMismatch"].is_null()), "{tracks:?}");
    assert!(app.wav_files().is_empty());
}

#[tokio::test]
async fn media_of_video_is_the_file_with_its_type_and_in_ranges() {
    let app = TestApp::builder().open().start().await;
    for (clip, content_type) in clips().iter().zip(["video/h264", "video/x-ivf", "video/x-ivf"]) {
        let mut peer = connect(&app, &path(clip.codec)).await;
        send(&mut peer, &clip.messages).await;
        peer.close_and_wait().await;
        let recording = recording(&app, clip.codec).await;
        let file = std::fs::read(&paths(&app, &recording)[0]).unwrap();
        let id = recording["id"].as_str().unwrap();
        for media in [format!("/api/v1/recordings/{id}/media"), recording["segments"][0]["media"].as_str().unwrap().to_owned()] {
            let whole = app.get(&media).await;
            assert_eq!((whole.status, whole.header("content-type")), (200, Some(content_type)), "{media}");
            assert!(whole.body == file, "{media}: {} of {} bytes", whole.body.len(), file.len());
            let key = format!("Bearer {}", crate::support::test_app::ADMIN_KEY);
            let part = app.request("GET", &media, &[("Authorization", &key), ("Range", "bytes=10-99")], b"").await;
            assert_eq!((part.status, &part.body[..]), (206, &file[10..100]));
        }
    }
}

#[tokio::test]
async fn a_recording_of_many_files_of_video_points_to_each() {
    let Some(clip) = clip_of("vp8") else { return };
    let app = TestApp::builder().open().start().await;
    for _ in 0..2 {
        let mut peer = connect(&app, &path("vp8")).await;
        send(&mut peer, &clip.messages[..30]).await;
        peer.close_and_wait().await;
    }
    let recording = recording(&app, "vp8").await;
    let segments = recording["segments"].as_array().unwrap();
    assert_eq!(segments.len(), 2, "t2: the same recording, a file of its own: {recording}");
    let response = app.get(&format!("/api/v1/recordings/{}/media", recording["id"].as_str().unwrap())).await;
    response.assert_problem(409, "manySegments");
    let links: Vec<&Value> = segments.iter().map(|segment| &segment["media"]).collect();
    assert_eq!(response.json()["segments"], json!(links));
    for file in paths(&app, &recording) {
        assert_eq!(probe(&file), expected("vp8", 30));
    }
}

#[tokio::test]
async fn a_stream_that_is_ivf_already_keeps_its_pictures_and_times_however_it_is_cut() {
    let app = TestApp::builder().open().start().await;
    for (clip, size) in clips().iter().filter(|clip| clip.codec != "h264").zip([1, 1_531]) {
        // The first 3,000 bytes one by one, for one of them.
        let (front, back) = clip.file.split_at(if size == 1 { 3_000 } else { 0 });
        let mut peer = connect(&app, &path(clip.codec)).await;
        let cut: Vec<Vec<u8>> = front.chunks(size).chain(back.chunks(1_531)).map(<[u8]>::to_vec).collect();
        for message in &cut {
            peer.send_binary(message).await.unwrap();
        }
        peer.close_and_wait().await;
        let recording = recording(&app, clip.codec).await;
        let path = &paths(&app, &recording)[0];
        assert_eq!(probe(path), expected(clip.codec, PICTURES));
        let file = std::fs::read(path).unwrap();
        assert!(file[32..] == clip.file[32..], "{}: the pictures with their times", clip.codec);
        assert_eq!((&file[..24], declared_pictures(&file)), (&clip.file[..24], PICTURES as u32));
    }
}

#[tokio::test]
async fn live_tracks_show_the_kind_and_the_codec() {
    let Some(clip) = clip_of("vp9") else { return };
    let app = TestApp::builder().open().start().await;
    let mut peer = connect(&app, &path("vp9")).await;
    send(&mut peer, &clip.messages[..30]).await;
    let live = app.eventually("30 pictures", async || app.live("ana").await.filter(|live| live["video"]["pictures"] == 30)).await;
    assert_eq!((&live["kind"], &live["codec"], &live["frames"]), (&json!("video"), &json!("vp9"), &json!(30)));
    assert_eq!((&live["video"]["width"], &live["video"]["height"], &live["video"]["keyFrames"]), (&json!(320), &json!(240), &json!(2)));
    let bytes: usize = clip.messages[..30].iter().map(Vec::len).sum();
    app.eventually("all of it in the file", async || app.live("ana").await.filter(|live| live["recordedBytes"] == bytes)).await;
    // While it grows, the rows say what the file declares, and the media is what is there.
    let segment = open_recording(&app, "vp9").await["segments"][0].clone();
    assert_eq!((&segment["frames"], segment["endedAt"].is_null()), (&json!(30), true), "{segment}");
    let media = app.get(segment["media"].as_str().unwrap()).await;
    assert_eq!((media.status, declared_pictures(&media.body), pictures(&media.body).len()), (200, 30, 30));
    peer.close_and_wait().await;
}

#[tokio::test]
async fn without_a_key_frame_everything_is_kept_all_the_same() {
    let Some(clip) = clip_of("vp8") else { return };
    let app = TestApp::builder().open().start().await;
    let mut peer = connect(&app, &path("vp8")).await;
    send(&mut peer, &clip.messages[1..20]).await;
    peer.close_and_wait().await;
    let recording = recording(&app, "vp8").await;
    let file = std::fs::read(&paths(&app, &recording)[0]).unwrap();
    assert_eq!((&recording["segments"][0]["frames"], declared_pictures(&file), &file[12..16]), (&json!(19), 19, &[0; 4][..]));
    assert!(messages(clip, &file) == clip.messages[1..20].concat());
}

#[tokio::test]
async fn what_is_not_as_declared_is_recorded_and_said() {
    let (Some(h264), Some(vp8)) = (clip_of("h264"), clip_of("vp8")) else { return };
    let app = TestApp::builder().open().start().await;
    for (declared, messages, said) in [
        ("vp8", &h264.messages, "declared as vp8, but the first message is no picture of it"),
        ("h264", &vp8.messages, "declared as h264, but the stream does not begin with a start code of Annex B"),
        ("vp9", &vec![vp8.file.clone()], "declared as vp9, but the stream says \"VP80\" of itself"),
    ] {
        let mut peer = connect(&app, &path(declared)).await;
        send(&mut peer, messages).await;
        peer.close_and_wait().await;
        let tracks = app.items("/api/v1/sessions/RM_1/tracks").await;
        let track = tracks.iter().find(|track| track["sid"] == format!("TR_{declared}")).unwrap_or_else(|| panic!("{tracks:?}"));
        assert_eq!(track["formatMismatch"], said);
    }
    let vp8_as_vp9 = &paths(&app, &recording(&app, "vp9").await)[0];
    assert_eq!(probe(vp8_as_vp9), expected("vp8", PICTURES), "a stream that says what it is is believed");
}

#[tokio::test]
async fn d7_files_rotate_at_key_frames_and_no_picture_is_lost_between_them() {
    for codec in ["h264", "vp8"] {
        let Some(clip) = clip_of(codec) else { return };
        let app = TestApp::builder().open().env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", "1s").start().await;
        let mut peer = connect(&app, &path(codec)).await;
        // At real time: the clock decides when a file is full.
        let mut due = tokio::time::Instant::now();
        for message in &clip.messages {
            tokio::time::sleep_until(due).await;
            peer.send_binary(message).await.unwrap();
            due += Duration::from_millis(40);
        }
        peer.close_and_wait().await;
        let recording = recording(&app, codec).await;
        let segments = recording["segments"].as_array().unwrap();
        // A key frame each second: a file has one second of pictures, or two where a key frame came just too early.
        assert!((2..=4).contains(&segments.len()), "{recording}");
        let (last, rotated) = segments.split_last().unwrap();
        assert!(rotated.iter().all(|segment| segment["endReason"] == "rotated") && last["endReason"] == "closed", "{recording}");
        let mut found = Vec::new();
        for (file, segment) in paths(&app, &recording).iter().zip(segments) {
            let frames = segment["frames"].as_u64().unwrap() as usize;
            assert!(frames.is_multiple_of(25), "cut at a key frame: {segment}");
            assert_eq!(probe(file), expected(codec, frames));
            found.extend(messages(clip, &std::fs::read(file).unwrap()));
        }
        assert!(found == clip.messages.concat(), "{codec}");
        assert_eq!(recording["gaps"], json!([]));
    }
}

#[tokio::test]
async fn the_video_directory_is_the_predecessors() {
    let Some(clip) = clip_of("vp8") else { return };
    let app = TestApp::builder().open().env("EGRESS_VIDEO_OUTPUT_DIR", "elsewhere/video").start().await;
    let mut peer = connect(&app, &path("vp8")).await;
    send(&mut peer, &clip.messages).await;
    peer.close_and_wait().await;
    assert!(files(app.dir.path()).is_empty());
    let names = std::fs::read_dir(app.dir.path().join("elsewhere/video/RM_1")).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(names.filter(|name| name.extension().is_some_and(|kind| kind == "ivf")).count(), 1);
}

#[tokio::test]
async fn the_replay_command_plays_files_of_video() {
    let app = TestApp::builder().start().await;
    for clip in clips() {
        let extension = if clip.codec == "h264" { "h264" } else { "ivf" };
        let file = app.dir.path().join(format!("{}.{extension}", clip.codec));
        std::fs::write(&file, &clip.file).unwrap();
        let (url, file) = (format!("http://{}", app.addr), file.to_str().unwrap().to_owned());
        let args = ["replay", "--url", &url, "--speed", "max", "--room", "room", &file];
        let played = crate::support::test_app::run(app.dir.path(), &[("ADMIN_API_KEY", crate::support::test_app::ADMIN_KEY)], &args).await;
        assert_eq!(played.code, Some(0), "{played:?}");
        let recording = recording(&app, clip.codec).await;
        assert_eq!(recording["participant"], clip.codec);
        let path = &paths(&app, &recording)[0];
        assert_eq!(probe(path), expected(clip.codec, PICTURES), "{}", clip.codec);
        assert!(messages(clip, &std::fs::read(path).unwrap()) == clip.messages.concat(), "{}", clip.codec);
    }
}
