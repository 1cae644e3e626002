//! Audio in, WAV files and rows out.

mod flowing;
mod mono;

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use self::mono::send_until_judged;
use crate::support::egress_peer::{CHUNK_BYTES, EgressPeer, GORILLA_WRITE_BUFFER, Handshake, counter_pcm};
use crate::support::test_app::{TestApp, read_wav};

const PATH: &str = "/egress-audio?roomName=room&participant=ana&trackId=TR_1";

fn stereo() -> hound::WavSpec {
    hound::WavSpec { channels: 2, sample_rate: 48_000, bits_per_sample: 16, sample_format: hound::SampleFormat::Int }
}

/// The only recording of the only meeting.
async fn recording(app: &TestApp) -> Value {
    app.settled().await;
    let items = app.items("/api/v1/recordings").await;
    assert_eq!(items.len(), 1, "{items:?}");
    items[0].clone()
}

#[tokio::test]
async fn audio_out_equals_audio_in_to_the_bit_and_is_sealed_before_the_close() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(48_000 * 3 / 2, 7);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    peer.ping().await.unwrap();
    let close = peer.close_and_wait().await;
    assert!(close.close_frame && close.code.is_none(), "{close:?}");
    // Everything is final when the Close arrives: no waiting from here on.
    assert_eq!(read_wav(&app.wav_file()), (stereo(), pcm));
    let recording = recording(&app).await;
    let segment = &recording["segments"][0];
    assert_eq!((segment["frames"].as_u64(), segment["bytes"].as_u64()), (Some(72_000), Some(288_000)));
    assert_eq!((segment["endReason"].as_str(), segment["seconds"].as_f64()), (Some("closed"), Some(1.5)));
    assert_eq!((segment["channels"].as_u64(), segment["sampleRate"].as_u64()), (Some(2), Some(48_000)));
    assert!(recording["endedAt"].is_string() && segment["endedAt"].is_string(), "{recording}");
    assert_eq!(app.audio_dir().join(segment["path"].as_str().unwrap()), app.wav_file());
    assert_eq!(recording["meetingId"], "room", "without session and meetingId, the room's name stands in");
}

#[tokio::test]
async fn the_file_is_named_and_placed_as_promised() {
    let app = TestApp::builder().open().start().await;
    let mut peer = EgressPeer::connect(app.addr, "/egress-audio?roomName=my-room&trackId=TR_9&meetingId=RM_x").await.unwrap();
    peer.send_pcm(&counter_pcm(480, 1)).await.unwrap();
    peer.close_and_wait().await;
    let file = app.wav_file();
    assert_eq!(file.parent().unwrap(), app.audio_dir().join("RM_x"));
    let name = file.file_name().unwrap().to_str().unwrap().to_owned();
    let (time, rest) = name.split_once('_').unwrap();
    chrono::NaiveDateTime::parse_from_str(time, "%Y%m%dT%H%M%S%.3fZ").unwrap();
    assert_eq!(rest, "my-room_unknown_TR_9.wav");
}

#[tokio::test]
async fn a_connection_without_audio_makes_no_file_and_no_row() {
    let app = TestApp::builder().open().start().await;
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.mute(true).await.unwrap();
    peer.close_and_wait().await;
    assert!(app.wav_files().is_empty());
    assert!(app.items("/api/v1/recordings").await.is_empty());
    assert!(!app.log().contains("was not finished"), "nothing is wrong with that: {}", app.log());
}

#[tokio::test]
async fn messages_of_any_size_and_shape_keep_every_byte() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(60_000, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    let (mut rest, sizes) = (&pcm[..], [1, 3, 1_921, 7, 65_536, 2, 5_000]);
    for size in sizes.iter().cycle() {
        let (message, tail) = rest.split_at((*size).min(rest.len()));
        match *size {
            5_000 => peer.send_fragmented(message, GORILLA_WRITE_BUFFER).await.unwrap(),
            _ => peer.send_binary(message).await.unwrap(),
        }
        peer.send_binary(b"").await.unwrap();
        rest = tail;
        if rest.is_empty() {
            break;
        }
    }
    peer.close_and_wait().await;
    assert_eq!(read_wav(&app.wav_file()).1, pcm);
}

#[tokio::test]
async fn a_torn_last_frame_is_left_out() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(500, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_binary(&pcm[..1_999]).await.unwrap();
    peer.close_and_wait().await;
    assert_eq!(read_wav(&app.wav_file()).1, pcm[..1_996]);
}

#[tokio::test]
async fn a_growing_file_is_valid_and_follows_within_its_deadline() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(48_000, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    for (part, frames) in pcm.chunks(19_200).zip(1..) {
        peer.go_on(part).await.unwrap();
        let sent = Instant::now();
        // 200 ms are promised; four times that decide.
        let expected = frames * 19_200;
        app.eventually("what was sent is in the file", async || {
            let files = app.wav_files();
            let read = files.first().map(|file| read_wav(file).1).unwrap_or_default();
            assert_eq!(read, pcm[..read.len()], "valid and true at every instant");
            (read.len() == expected).then_some(())
        })
        .await;
        assert!(sent.elapsed() < Duration::from_millis(800), "{:?}", sent.elapsed());
    }
    let live = app.get_json("/api/v1/tracks/live").await;
    let lags = live["writeLag"].as_array().unwrap();
    assert!(lags.iter().map(|class| class["count"].as_u64().unwrap()).sum::<u64>() > 0, "{lags:?}");
    peer.close_and_wait().await;
}

#[tokio::test]
async fn a_lost_connection_keeps_what_came() {
    for (name, reason) in [("fin", "lost"), ("close-then-gone", "closed")] {
        let app = TestApp::builder().open().start().await;
        let pcm = counter_pcm(48_000, 3);
        let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
        peer.send_pcm(&pcm).await.unwrap();
        match name {
            "fin" => peer.vanish().await,
            _ => peer.close_abruptly_after_close_frame().await.unwrap(),
        }
        app.logged("track closed").await;
        assert_eq!(read_wav(&app.wav_file()).1, pcm, "{name}");
        assert_eq!(recording(&app).await["segments"][0]["endReason"], reason, "{name}");
    }
}

#[tokio::test]
async fn a_reset_connection_keeps_what_was_read() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(48_000, 3);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    let all = pcm.len() as u64;
    app.eventually("the audio is read", async || (app.items("/api/v1/tracks/live").await.first()?["bytes"].as_u64()? == all).then_some(())).await;
    peer.reset();
    // 2 s are promised; four times that decide.
    tokio::time::timeout(4 * Duration::from_secs(2), app.logged("track closed")).await.expect("it is sealed in time");
    assert_eq!(read_wav(&app.wav_file()).1, pcm);
    assert_eq!(recording(&app).await["segments"][0]["endReason"], "lost");
}

#[tokio::test]
async fn muted_zeros_are_holes_and_mute_spans_are_kept() {
    let app = TestApp::builder().open().start().await;
    let (before, after) = (counter_pcm(24_000, 1), counter_pcm(24_000, 99_000));
    let zeros = vec![0; 192_000 * 4];
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    // LiveKit's text comes about 2 s before the silence: nothing may be cut on it.
    peer.mute(true).await.unwrap();
    peer.send_pcm(&before).await.unwrap();
    peer.send_pcm(&zeros).await.unwrap();
    app.eventually("it is muted", async || app.items("/api/v1/tracks/live").await.first()?["muted"].as_bool()?.then_some(())).await;
    peer.mute(false).await.unwrap();
    peer.send_pcm(&after).await.unwrap();
    peer.close_and_wait().await;
    let (_, pcm) = read_wav(&app.wav_file());
    assert_eq!(pcm, [before, zeros, after].concat());
    let metadata = app.wav_file().metadata().unwrap();
    assert!(metadata.blocks() * 512 < 192_000 + 5 * 4_096, "{} bytes on the disk for 1 s of sound", metadata.blocks() * 512);
    app.settled().await;
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    assert_eq!(tracks[0]["muteSpans"], json!([{"startMs": 0, "endMs": 4_500}]));
}

#[tokio::test]
async fn a_reconnect_keeps_the_mute_spans_of_before() {
    let app = TestApp::builder().open().start().await;
    for _ in 0..2 {
        let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
        peer.send_pcm(&counter_pcm(9_600, 1)).await.unwrap();
        peer.mute(true).await.unwrap();
        peer.send_pcm(&vec![0; 19_200]).await.unwrap();
        peer.mute(false).await.unwrap();
        peer.send_pcm(&counter_pcm(480, 1)).await.unwrap();
        peer.close_and_wait().await;
    }
    app.settled().await;
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    let spans = tracks[0]["muteSpans"].as_array().unwrap();
    assert_eq!(spans.len(), 2, "{spans:?}");
    assert_eq!(spans[0], json!({"startMs": 200, "endMs": 300}));
    // The second connection's, on the time of the recording.
    let length = spans[1]["endMs"].as_u64().unwrap() - spans[1]["startMs"].as_u64().unwrap();
    assert!(length == 100 && spans[1]["startMs"].as_u64() > Some(300), "{spans:?}");
}

#[tokio::test]
async fn pause_leaves_the_silence_of_a_muted_track_out_and_says_so() {
    let app = TestApp::builder().open().env("LIVE_MEETING__RECORDING__MUTE", "pause").start().await;
    let (before, after) = (counter_pcm(4_800, 1), counter_pcm(4_800, 99_000));
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&vec![0; 19_200]).await.unwrap();
    peer.send_pcm(&before).await.unwrap();
    peer.mute(true).await.unwrap();
    peer.send_pcm(&vec![0; 192_000]).await.unwrap();
    peer.mute(false).await.unwrap();
    peer.send_pcm(&after).await.unwrap();
    peer.close_and_wait().await;
    assert_eq!(read_wav(&app.wav_file()).1, [vec![0; 19_200], before, after].concat(), "silence of a track that is not muted stays");
    let segment = &recording(&app).await["segments"][0];
    assert_eq!(segment["gaps"], json!([{"startFrame": 9_600, "frames": 48_000, "reason": "muted"}]));
}

#[tokio::test]
async fn livekits_stereo_behind_a_mono_declaration_is_corrected() {
    let app = TestApp::builder().open().start().await;
    let mut peer = EgressPeer::connect(app.addr, &format!("{PATH}&sampleRate=48000&channels=1")).await.unwrap();
    let sent = send_until_judged(&app, &mut peer, CHUNK_BYTES).await.len();
    // Whole groups of 2 s.
    let pcm = counter_pcm(sent.next_multiple_of(384_000) / 4, 1);
    peer.send_pcm(&pcm[sent..]).await.unwrap();
    peer.close_and_wait().await;
    assert!(read_wav(&app.wav_file()) == (stereo(), pcm.clone()));
    let segment = recording(&app).await["segments"][0].clone();
    let frames = (pcm.len() / 4) as u64;
    assert_eq!(
        (segment["channels"].as_u64(), segment["frames"].as_u64(), segment["seconds"].as_f64()),
        (Some(2), Some(frames), Some(frames as f64 / 48_000.0))
    );
    app.settled().await;
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    assert!(tracks[0]["formatMismatch"].as_str().unwrap().contains("stereo"), "{}", tracks[0]);
    assert!(app.log().contains("the format of a track is not as declared"));
    // Groups too: none was cut as mono.
    let log = app.pipeline_log("room");
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), pcm.len() / 384_000, "{log}");
    assert!(lines.iter().all(|line| line.contains("duration_ms=2000 bytes=384000")), "{log}");
}

#[tokio::test]
async fn a_steady_rate_below_the_declared_one_is_told_and_nothing_is_changed() {
    let app = TestApp::builder().open().start().await;
    // 16 kHz stereo that claims to be 48 kHz: a third of the bytes, in real time.
    let handshake = Handshake { content_type: None, headers: &[] };
    let mut peer = EgressPeer::connect_with(app.addr, &format!("{PATH}&channels=2"), handshake).await.unwrap();
    let pcm = send_until_judged(&app, &mut peer, 640).await;
    peer.close_and_wait().await;
    assert!(read_wav(&app.wav_file()) == (stereo(), pcm));
    app.settled().await;
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    assert!(tracks[0]["formatMismatch"].as_str().unwrap().contains("192000 bytes per second"), "{}", tracks[0]);
}

#[tokio::test]
async fn a_sender_that_is_not_livekit_gets_the_documented_defaults() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(480, 1);
    let handshake = Handshake { content_type: None, headers: &[] };
    let mut peer = EgressPeer::connect_with(app.addr, PATH, handshake).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    peer.close_and_wait().await;
    assert_eq!(read_wav(&app.wav_file()), (hound::WavSpec { channels: 1, ..stereo() }, pcm));
}

#[tokio::test]
async fn hostile_names_stay_inside_the_audio_directory_and_apart() {
    let app = TestApp::builder().open().start().await;
    let long = "x".repeat(300);
    let names = ["..%2F..%2Fescape", "a%2Fb", "a%5Cb", "nul%00nul", "%E4%BC%9A%E8%AD%B0", "%E4%BC%9A%E4%B9%89", &long, ".hidden"];
    for name in names {
        let path = format!("/egress-audio?roomName={name}&participant={name}&trackId={name}&meetingId={name}");
        let mut peer = EgressPeer::connect(app.addr, &path).await.unwrap();
        peer.send_pcm(&counter_pcm(48, 1)).await.unwrap();
        peer.close_and_wait().await;
    }
    let files = app.wav_files();
    assert_eq!(files.len(), names.len(), "{files:?}");
    let directories: std::collections::BTreeSet<_> = files.iter().map(|file| file.parent().unwrap().to_owned()).collect();
    assert_eq!(directories.len(), names.len(), "{directories:?}");
    assert!(directories.iter().all(|directory| directory.parent() == Some(&app.audio_dir())), "{directories:?}");
    let outside: Vec<_> = std::fs::read_dir(app.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(outside, ["storage"], "nothing was made beside the storage");
    app.settled().await;
    assert_eq!(app.items("/api/v1/recordings").await.len(), names.len());
}

#[tokio::test]
async fn t2_a_second_connection_is_refused_until_the_first_stalls_and_continues_its_recording() {
    let app = TestApp::builder().open().env("LIVE_MEETING__INGEST__STALL_AFTER", "1s").start().await;
    let (one, two) = (counter_pcm(48_000 * 60, 1), counter_pcm(9_600, 50_000));
    let mut first = EgressPeer::connect(app.addr, PATH).await.unwrap();
    let addr = app.addr;
    let dialling = tokio::spawn(async move { EgressPeer::connect(addr, PATH).await.map(drop) });
    let mut parts = one.chunks(CHUNK_BYTES);
    first.go_on(parts.next().expect("some")).await.unwrap();
    while !dialling.is_finished() {
        first.go_on(parts.next().expect("an answer within a minute")).await.unwrap();
    }
    let one = one[..first.sent().audio_bytes].to_vec();
    let refusal = dialling.await.unwrap().expect_err("the track is live");
    assert_eq!((refusal.status, refusal.content_type.as_str()), (409, "application/problem+json"));
    app.eventually("the first is stalled", async || app.items("/api/v1/tracks/live").await.first()?["stalled"].as_bool()?.then_some(())).await;
    let mut second = EgressPeer::connect(app.addr, PATH).await.unwrap();
    second.send_pcm(&two).await.unwrap();
    let close = first.expect_close().await;
    assert_eq!(close.code, Some(1008), "{close:?}");
    second.close_and_wait().await;
    let recording = recording(&app).await;
    let segments = recording["segments"].as_array().unwrap();
    let reasons: Vec<_> = segments.iter().map(|segment| segment["endReason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["superseded", "closed"], "{recording}");
    let pcm: Vec<Vec<u8>> = app.wav_files().iter().map(|file| read_wav(file).1).collect();
    assert_eq!(pcm, [one.clone(), two.clone()]);
    // Together they are one file.
    let id = recording["id"].as_str().unwrap();
    let media = app.get(&format!("/api/v1/recordings/{id}/media")).await;
    assert_eq!(media.status, 200);
    assert!(media.body[44..].starts_with(&one) && media.body.ends_with(&two));
}

#[tokio::test]
async fn i3_a_silent_connection_is_sealed_after_its_idle_time_out() {
    let app = TestApp::builder().open().env("LIVE_MEETING__INGEST__IDLE_TIMEOUT", "5s").env("LIVE_MEETING__INGEST__STALL_AFTER", "1s").start().await;
    let pcm = counter_pcm(480, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    let start = Instant::now();
    let close = peer.expect_close().await;
    assert_eq!((close.code, close.reason.as_str()), (Some(1008), "idle"));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(recording(&app).await["segments"][0]["endReason"], "idle");
}

#[tokio::test]
async fn d7_segments_rotate_without_losing_a_sample() {
    let app = TestApp::builder().open().env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", "1s").start().await;
    let pcm = counter_pcm(48_000 * 5, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    for part in pcm.chunks(96_000) {
        peer.send_pcm(part).await.unwrap();
        let sent = peer.sent().audio_bytes as u64;
        app.eventually("it is written", async || (app.items("/api/v1/tracks/live").await.first()?["recordedBytes"].as_u64()? == sent).then_some(()))
            .await;
    }
    peer.close_and_wait().await;
    let recording = recording(&app).await;
    let segments = recording["segments"].as_array().unwrap();
    assert!(segments.len() >= 4, "{}", segments.len());
    assert_eq!(segments.last().unwrap()["endReason"], "closed");
    let joined: Vec<u8> = segments.iter().flat_map(|segment| read_wav(&app.audio_dir().join(segment["path"].as_str().unwrap())).1).collect();
    assert!(joined == pcm, "{} of {} bytes", joined.len(), pcm.len());
}

#[tokio::test]
async fn d1_a_killed_server_leaves_valid_files_and_closes_their_rows_at_its_next_start() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(48_000, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    let all = pcm.len() as u64;
    app.eventually("it is written", async || (app.items("/api/v1/tracks/live").await.first()?["recordedBytes"].as_u64()? == all).then_some(())).await;
    app.eventually("its row is there", async || app.items("/api/v1/recordings").await.first().map(drop)).await;
    let file = app.wav_file();
    let stopped = app.kill().await;
    assert_eq!(read_wav(&file), (stereo(), pcm), "before any repair");
    let app = stopped.restart().await;
    let recording = recording(&app).await;
    let segment = &recording["segments"][0];
    assert_eq!((segment["endReason"].as_str(), segment["frames"].as_u64()), (Some("crashed"), Some(48_000)), "{recording}");
    assert!(recording["endedAt"].is_string(), "{recording}");
}

#[tokio::test]
async fn groups_are_logged_with_what_became_of_them() {
    let app = TestApp::builder().open().start().await;
    let mut peer = EgressPeer::connect(app.addr, &format!("{PATH}&groupSeconds=0.5&meetingId=RM_1")).await.unwrap();
    peer.send_pcm(&counter_pcm(24_000, 1)).await.unwrap();
    peer.send_pcm(&vec![0; 96_000]).await.unwrap();
    peer.send_pcm(&counter_pcm(12_000, 1)).await.unwrap();
    peer.close_and_wait().await;
    app.eventually("the log has three lines", async || (app.pipeline_log("RM_1").lines().count() == 3).then_some(())).await;
    let log = app.pipeline_log("RM_1");
    let outcomes: Vec<&str> = log.lines().map(|line| line.split_once("sequence=").unwrap().1).collect();
    assert_eq!(
        outcomes,
        [
            "1 duration_ms=500 bytes=96000 outcome=skipped reason=\"HUME_API_KEY is missing\"",
            "2 duration_ms=500 bytes=96000 outcome=silent",
            "3 duration_ms=250 bytes=48000 outcome=skipped reason=\"HUME_API_KEY is missing\"",
        ]
    );
    assert!(log.lines().all(|line| line.contains(r#" meeting="RM_1" participant="ana" track="TR_1" "#)), "{log}");
}
