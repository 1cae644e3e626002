//! Two channels that are recorded as one.

use std::os::unix::fs::MetadataExt;

use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::{PATH, recording, stereo};
use crate::support::egress_peer::{CHUNK_TIME, EgressPeer, Handshake, counter_pcm, tone};
use crate::support::test_app::{TestApp, read_wav};

const MONO_PATH: &str = "/egress-audio?roomName=room&participant=ana&trackId=TR_1&mix=mono";

fn mono() -> hound::WavSpec {
    hound::WavSpec { channels: 1, ..stereo() }
}

/// The mean of each frame, reckoned in a wider number.
fn mean(stereo: &[u8]) -> Vec<u8> {
    let sample = |frame: &[u8], at: usize| i32::from(i16::from_le_bytes([frame[at], frame[at + 1]]));
    stereo.chunks_exact(4).flat_map(|frame| (((sample(frame, 0) + sample(frame, 2)) / 2) as i16).to_le_bytes()).collect()
}

/// Mono samples as LiveKit sends them: on both channels.
fn doubled(mono: &[u8]) -> Vec<u8> {
    mono.chunks_exact(2).flat_map(|sample| [sample, sample].concat()).collect()
}

/// Sends so many bytes each 10 ms until the server has judged their rate, for 20 s at most; returns what was sent.
pub async fn send_until_judged(app: &TestApp, peer: &mut EgressPeer, bytes: usize) -> Vec<u8> {
    let pcm = counter_pcm(bytes / 4 * 2_000, 1);
    let mut due = Instant::now();
    for (chunk, number) in pcm.chunks(bytes).zip(1..) {
        sleep_until(due).await;
        peer.send_binary(chunk).await.unwrap();
        due += CHUNK_TIME;
        if number % 50 == 0 && app.live("ana").await.is_some_and(|live| live["formatMismatch"].is_string()) {
            return pcm[..number * bytes].to_vec();
        }
    }
    panic!("the rate is not judged:\n{}", app.log());
}

#[tokio::test]
async fn a_tone_that_differs_between_the_channels_is_recorded_as_its_mean() {
    let app = TestApp::builder().open().start().await;
    let (left, right) = (tone(48_000, 1, 440.0, 1.0, 0.9), tone(48_000, 1, 1_000.0, 1.0, 1.0));
    let mut pcm: Vec<u8> = left.chunks(2).zip(right.chunks(2)).flat_map(|(left, right)| [left, right].concat()).collect();
    pcm.extend([1, 2, 3]);
    let mut peer = EgressPeer::connect(app.addr, MONO_PATH).await.unwrap();
    // Any message may tear a frame.
    let (mut rest, sizes) = (&pcm[..], [3, 1, 1_921, 7, 65_536, 2, 4_096]);
    for size in sizes.iter().cycle() {
        let (message, tail) = rest.split_at((*size).min(rest.len()));
        peer.send_binary(message).await.unwrap();
        rest = tail;
        if rest.is_empty() {
            break;
        }
    }
    peer.close_and_wait().await;
    assert!(read_wav(&app.wav_file()) == (mono(), mean(&pcm)));
    assert!(app.log().contains("the last frame of a track was torn and is left out bytes=3"), "{}", app.log());
    let segment = recording(&app).await["segments"][0].clone();
    assert_eq!((segment["channels"].as_u64(), segment["sampleRate"].as_u64()), (Some(1), Some(48_000)));
    assert_eq!((segment["frames"].as_u64(), segment["bytes"].as_u64(), segment["seconds"].as_f64()), (Some(48_000), Some(96_000), Some(1.0)));
}

#[tokio::test]
async fn a_mono_microphone_is_recorded_to_the_bit_and_its_silence_stays_a_hole() {
    let app = TestApp::builder().open().start().await;
    let (before, after) = (counter_pcm(12_000, 1), counter_pcm(12_000, 90_000));
    let zeros = vec![0; 96_000 * 4];
    let mut peer = EgressPeer::connect(app.addr, MONO_PATH).await.unwrap();
    peer.send_pcm(&doubled(&before)).await.unwrap();
    peer.mute(true).await.unwrap();
    peer.send_pcm(&doubled(&zeros)).await.unwrap();
    peer.mute(false).await.unwrap();
    peer.send_pcm(&doubled(&after)).await.unwrap();
    peer.close_and_wait().await;
    assert!(read_wav(&app.wav_file()) == (mono(), [before, zeros, after].concat()));
    let metadata = app.wav_file().metadata().unwrap();
    assert!(metadata.blocks() * 512 < 96_000 + 5 * 4_096, "{} bytes on the disk for 1 s of sound", metadata.blocks() * 512);
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    assert_eq!(tracks[0]["muteSpans"], json!([{"startMs": 500, "endMs": 4_500}]), "on the track's own time");
}

#[tokio::test]
async fn what_is_live_tells_arriving_and_recorded_audio_apart_and_groups_are_mono() {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(48_000, 1);
    let mut peer = EgressPeer::connect(app.addr, &format!("{MONO_PATH}&groupSeconds=0.5")).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    let written = async || app.live("ana").await.filter(|live| live["recordedBytes"] == 96_000);
    let live = app.eventually("it is written", written).await;
    assert_eq!((live["bytes"].as_u64(), live["frames"].as_u64(), live["seconds"].as_f64()), (Some(192_000), Some(48_000), Some(1.0)));
    assert_eq!((live["channels"].as_u64(), live["recordedChannels"].as_u64()), (Some(2), Some(1)));
    peer.close_and_wait().await;
    let log = app.eventually("two lines", async || Some(app.pipeline_log("room")).filter(|log| log.lines().count() == 2)).await;
    assert!(log.lines().all(|line| line.contains("duration_ms=500 bytes=48000")), "{log}");
    assert!(read_wav(&app.wav_file()) == (mono(), mean(&pcm)));
}

#[tokio::test]
async fn segments_are_as_long_and_pauses_as_exact_as_in_stereo() {
    let env = [("LIVE_MEETING__RECORDING__SEGMENT_DURATION", "1s"), ("LIVE_MEETING__RECORDING__MUTE", "pause")];
    let app = env.into_iter().fold(TestApp::builder().open(), |builder, (name, value)| builder.env(name, value)).start().await;
    let (before, after) = (counter_pcm(24_000, 1), counter_pcm(24_000, 90_000));
    let mut peer = EgressPeer::connect(app.addr, MONO_PATH).await.unwrap();
    peer.send_pcm(&doubled(&before)).await.unwrap();
    let written = async || app.live("ana").await.filter(|live| live["recordedBytes"] == 96_000).map(drop);
    app.eventually("a second is written", written).await;
    peer.mute(true).await.unwrap();
    peer.send_pcm(&vec![0; 96_000]).await.unwrap();
    peer.mute(false).await.unwrap();
    peer.send_pcm(&doubled(&after)).await.unwrap();
    peer.close_and_wait().await;
    let recording = recording(&app).await;
    let segments = recording["segments"].as_array().unwrap();
    assert_eq!(segments.len(), 2, "{recording}");
    assert_eq!(segments[0]["seconds"], 1.0, "{recording}");
    assert_eq!(segments[1]["gaps"], json!([{"startFrame": 0, "frames": 24_000, "reason": "muted"}]), "{recording}");
    let joined: Vec<u8> = segments.iter().flat_map(|segment| read_wav(&app.audio_dir().join(segment["path"].as_str().unwrap())).1).collect();
    assert!(joined == [before, after].concat(), "{} bytes", joined.len());
}

#[tokio::test]
async fn a_sender_that_declares_mono_has_nothing_to_mix() {
    for content_type in [None, Some("audio/x-raw")] {
        let app = TestApp::builder().open().start().await;
        let pcm = counter_pcm(4_801, 1);
        let mut peer =
            EgressPeer::connect_with(app.addr, &format!("{MONO_PATH}&channels=1"), Handshake { content_type, headers: &[] }).await.unwrap();
        peer.send_pcm(&pcm).await.unwrap();
        peer.close_and_wait().await;
        assert!(read_wav(&app.wav_file()) == (mono(), pcm), "{content_type:?}");
    }
}

#[tokio::test]
async fn livekits_stereo_behind_a_mono_declaration_is_corrected_and_not_mixed() {
    let app = TestApp::builder().open().start().await;
    let mut peer = EgressPeer::connect(app.addr, &format!("{MONO_PATH}&channels=1")).await.unwrap();
    let pcm = send_until_judged(&app, &mut peer, 1_920).await;
    let live = app.live("ana").await.unwrap();
    assert_eq!((live["channels"].as_u64(), live["recordedChannels"].as_u64()), (Some(2), Some(2)));
    peer.close_and_wait().await;
    // Its start was written before the rate could tell: one header is true of all of it.
    assert!(read_wav(&app.wav_file()) == (stereo(), pcm));
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    assert!(tracks[0]["formatMismatch"].as_str().unwrap().contains("not mixed"), "{}", tracks[0]);
}

#[tokio::test]
async fn a_rate_below_the_declared_one_is_told_of_what_arrives() {
    let app = TestApp::builder().open().start().await;
    let mut peer = EgressPeer::connect(app.addr, MONO_PATH).await.unwrap();
    // Half of LiveKit's bytes: what the recording has, and not what was declared.
    let pcm = send_until_judged(&app, &mut peer, 960).await;
    peer.close_and_wait().await;
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    let mismatch = tracks[0]["formatMismatch"].as_str().unwrap();
    assert!(mismatch.contains("2 channels, which are 192000 bytes per second"), "{mismatch}");
    assert!(read_wav(&app.wav_file()) == (mono(), mean(&pcm)));
}

#[tokio::test]
async fn a_ticket_that_asks_for_mono_and_no_analysis_wins_over_the_query() {
    let app = TestApp::builder().start().await;
    let subject = json!({"roomName": "room", "participant": "ana", "groupSeconds": 0.5, "analyse": false, "mix": "mono"});
    let ticket = app.ticket(subject).await;
    let pcm = counter_pcm(24_000, 1);
    let path = format!("{PATH}&groupSeconds=30&analyse=true&ticket={ticket}");
    let mut peer = EgressPeer::connect(app.addr, &path).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    peer.close_and_wait().await;
    assert!(read_wav(&app.wav_file()) == (mono(), mean(&pcm)));
    let log = app.eventually("a line", async || Some(app.pipeline_log("room")).filter(|log| !log.is_empty())).await;
    assert!(log.contains("sequence=1 duration_ms=500 bytes=48000 outcome=skipped reason=\"the connection asked for none\""), "{log}");
}
