//! T1, T3: where audio lies in its files is where the time says, whatever its sender does and whatever the wall clock does.

use std::path::Path;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};

use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::machine::skip;
use crate::support::test_app::{TestApp, read_wav, sidecar};

const PATH: &str = "/egress-audio?roomName=room&participant=ana&trackId=TR_1";
const FRAME_BYTES: usize = 4;
const BYTES_PER_MS: usize = 192;
/// T1 says 100 ms.
const CLOSE_TO: Duration = Duration::from_millis(400);

/// So much audio that counts up, no frame of it silent.
fn audio(ms: usize, seed: u32) -> Vec<u8> {
    counter_pcm(ms * 48, seed)
}

/// How long after the end of audio that was sent in real time from `start` on.
fn since_the_end_of(start: Instant, audio: &[u8]) -> Duration {
    start.elapsed().saturating_sub(Duration::from_millis((audio.len() / BYTES_PER_MS) as u64))
}

/// Goes on with audio, for 5 s at least, until the server has found the pause before it, which takes a second of steady flow; how much was sent.
async fn send_until_filled(app: &TestApp, peer: &mut EgressPeer, pcm: &[u8]) -> usize {
    let mut parts = pcm.chunks(500 * BYTES_PER_MS);
    let mut sent = 0;
    let is_filled = async || app.live("ana").await.is_some_and(|live| live["filledFrames"].as_u64() > Some(0));
    while sent < 5_000 * BYTES_PER_MS || !is_filled().await {
        let part = parts.next().unwrap_or_else(|| panic!("the pause is not filled:\n{}", app.log()));
        // The pause has been as long as it was: nothing is caught up with.
        let outcome = if sent == 0 { peer.send_realtime(part).await } else { peer.go_on(part).await };
        outcome.unwrap();
        sent += part.len();
    }
    sent
}

fn lasts(bytes: usize) -> Duration {
    Duration::from_micros((bytes * 1_000 / BYTES_PER_MS) as u64)
}

/// Says when the session of the room began: a minute ago, in whole seconds as LiveKit does.
async fn begin_session(app: &TestApp) -> DateTime<Utc> {
    let began = (Utc::now() - TimeDelta::seconds(60)).timestamp();
    let room = json!({"sid": "RM_1", "name": "room"});
    assert_eq!(app.webhook(json!({"event": "room_started", "room": room, "createdAt": began.to_string()})).await.status, 204);
    app.settled().await;
    DateTime::from_timestamp(began, 0).unwrap()
}

/// A connection that knows when its session began.
async fn connect(app: &TestApp) -> EgressPeer {
    app.by_the_databases_word(async || EgressPeer::connect(app.addr, PATH).await).await.unwrap()
}

/// Waits until so much audio is in files, fillings included.
async fn written(app: &TestApp, bytes: usize) {
    let written = async || (app.live("ana").await?["recordedBytes"].as_u64()? == bytes as u64).then_some(());
    app.eventually("it is written", written).await;
}

/// All segments as one stretch, in their order.
#[derive(Debug, Default)]
struct Joined {
    pcm: Vec<u8>,
    /// Start, length and reason of each, in frames.
    gaps: Vec<(u64, u64, String)>,
    /// Start and length; what is cut at the end of a file is one again.
    muted: Vec<(u64, u64)>,
    /// The first frame of each segment, and how long after the start of the session it lies.
    offsets: Vec<(u64, i64)>,
}

async fn joined(app: &TestApp) -> Joined {
    app.settled().await;
    let recording = app.items("/api/v1/recordings").await.remove(0);
    let mut all = Joined::default();
    for segment in recording["segments"].as_array().unwrap() {
        let path = app.audio_dir().join(segment["path"].as_str().unwrap());
        let told = sidecar(&path).expect("a sidecar");
        assert_eq!((&segment["gaps"], &segment["sessionOffsetMs"]), (&told["gaps"], &told["sessionOffsetMs"]), "row and sidecar say the same");
        let first = (all.pcm.len() / FRAME_BYTES) as u64;
        let number = |value: &Value| value.as_u64().unwrap();
        for gap in told["gaps"].as_array().unwrap() {
            all.gaps.push((first + number(&gap["startFrame"]), number(&gap["frames"]), gap["reason"].as_str().unwrap().to_owned()));
        }
        for span in told["muteSpans"].as_array().unwrap() {
            let (start, frames) = (first + number(&span["startFrame"]), number(&span["frames"]));
            match all.muted.last_mut() {
                Some((before, length)) if *before + *length == start => *length += frames,
                _ => all.muted.push((start, frames)),
            }
        }
        all.offsets.push((first, told["sessionOffsetMs"].as_i64().unwrap_or_default()));
        all.pcm.extend(read_wav(&path).1);
    }
    all
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Closed,
    Killed,
}

/// Six seconds, a pause, and then with its own pace audio, muted zeros and audio again.
async fn pauses_and_mutes(segment_duration: &str, end: End) {
    // Made before anybody waits for it: that takes its time too.
    let (before, mut behind, zeros, last) = (audio(6_000, 1), audio(20_000, 200_000), vec![0; 500 * BYTES_PER_MS], audio(500, 40_000_000));
    let app = TestApp::builder().open().env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", segment_duration).start().await;
    let began = begin_session(&app).await;
    let mut peer = connect(&app).await;
    let (start, start_at) = (Instant::now(), Utc::now());
    peer.send_realtime(&before).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let pause = since_the_end_of(start, &before);
    let sent = send_until_filled(&app, &mut peer, &behind).await;
    behind.truncate(sent);
    peer.mute(true).await.unwrap();
    peer.go_on(&zeros).await.unwrap();
    peer.mute(false).await.unwrap();
    peer.go_on(&last).await.unwrap();
    let sent = before.len() + behind.len() + zeros.len() + last.len();
    let app = match end {
        End::Closed => {
            peer.close_and_wait().await;
            app
        }
        End::Killed => {
            let filled_and_written = async || {
                let live = app.live("ana").await?;
                let [recorded, filled] = ["recordedBytes", "filledFrames"].map(|count| live[count].as_u64().unwrap() as usize);
                (filled > 0 && recorded == sent + filled * FRAME_BYTES).then_some(())
            };
            app.eventually("all of it is written", filled_and_written).await;
            let noted = async || {
                let last = app.wav_files().pop()?;
                let notes = std::fs::read_to_string(last.with_file_name(format!(".{}.notes", last.file_name()?.to_str()?))).ok()?;
                notes.lines().last().filter(|line| line.contains(r#""muteSpans":[["#) && !line.contains("null")).map(drop)
            };
            app.eventually("what is known is noted", noted).await;
            app.kill().await.restart().await
        }
    };
    assert_eq!(notes(&app), [""; 0], "what was noted is in the sidecars");
    let all = joined(&app).await;
    let hole = all.pcm.len().saturating_sub(sent);
    assert!(lasts(hole).abs_diff(pause) < CLOSE_TO, "{:?} were filled of {pause:?}; {:?}", lasts(hole), all.gaps);
    let expected = [before.clone(), vec![0; hole], behind.clone(), zeros.clone(), last].concat();
    let differs = all.pcm.iter().zip(&expected).position(|(kept, said)| kept != said);
    assert!(
        all.pcm == expected,
        "not in its place in {segment_duration}, from byte {differs:?} on: {:?}, {:?}\n{}",
        all.gaps,
        all.offsets,
        app.log()
    );
    let frames = |bytes: usize| (bytes / FRAME_BYTES) as u64;
    let gap = (frames(before.len()), frames(hole), "missing".to_owned());
    assert_eq!(all.gaps, [gap], "in {segment_duration}");
    assert_eq!(all.muted, [(frames(before.len() + hole + behind.len()), frames(zeros.len()))], "in {segment_duration}");
    for (first, offset) in &all.offsets {
        let truth = start_at - began + TimeDelta::milliseconds((first / 48) as i64);
        let error = (truth - TimeDelta::milliseconds(*offset)).abs().to_std().unwrap();
        assert!(error < CLOSE_TO, "{error:?} of {truth}, in {segment_duration}: {:?}", all.offsets);
    }
}

/// What lies beside files that are written.
fn notes(app: &TestApp) -> Vec<String> {
    let names = std::fs::read_dir(app.audio_dir().join("RM_1")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".notes")).collect()
}

#[tokio::test]
async fn t1_a_pause_is_filled_in_its_place_and_nothing_behind_it_is_told_elsewhere() {
    // In one file; with the next file behind the hole; with a hole that is found when the next file has begun; and with a file that would end before it is.
    tokio::join!(
        pauses_and_mutes("1h", End::Closed),
        pauses_and_mutes("12s", End::Closed),
        pauses_and_mutes("6s", End::Closed),
        pauses_and_mutes("6500ms", End::Closed)
    );
}

#[tokio::test]
async fn d4_t1_what_was_filled_and_muted_is_known_of_files_whose_server_was_killed() {
    tokio::join!(pauses_and_mutes("1h", End::Killed), pauses_and_mutes("6s", End::Killed));
}

#[tokio::test]
async fn t1_a_stall_that_is_caught_up_with_inserts_nothing() {
    let app = TestApp::builder().open().start().await;
    let (before, behind) = (audio(2_000, 1), audio(5_500, 200_000));
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_realtime(&before).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    // As much at once as is late by then.
    peer.go_on(&behind).await.unwrap();
    peer.close_and_wait().await;
    let all = joined(&app).await;
    assert!(all.pcm == [before, behind].concat(), "{} bytes; {:?}", all.pcm.len(), all.gaps);
    assert_eq!((all.gaps, all.muted), (Vec::new(), Vec::new()));
}

#[tokio::test]
async fn t1_a_pause_of_a_muted_track_whose_silence_is_left_out_moves_nothing() {
    let app = TestApp::builder().open().env("LIVE_MEETING__RECORDING__MUTE", "pause").start().await;
    let (before, between, spoken, last) = (audio(1_500, 1), audio(500, 200_000), audio(500, 300_000), audio(500, 400_000));
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_realtime(&before).await.unwrap();
    peer.mute(true).await.unwrap();
    peer.go_on(&vec![0; 500 * BYTES_PER_MS]).await.unwrap();
    peer.pause(Duration::from_secs(2)).await;
    peer.go_on(&vec![0; 2_000 * BYTES_PER_MS]).await.unwrap();
    peer.mute(false).await.unwrap();
    peer.go_on(&between).await.unwrap();
    peer.mute(true).await.unwrap();
    // A muted track that is heard all the same.
    peer.go_on(&spoken).await.unwrap();
    peer.mute(false).await.unwrap();
    peer.go_on(&last).await.unwrap();
    peer.close_and_wait().await;
    let all = joined(&app).await;
    let frames = |bytes: usize| (bytes / FRAME_BYTES) as u64;
    let [(start, left_out, reason)] = &all.gaps[..] else { panic!("{:?}", all.gaps) };
    assert_eq!((*start, reason.as_str()), (frames(before.len()), "muted"));
    assert!(*left_out > 48 * 4_000, "with the pause: {left_out}");
    assert_eq!(all.muted, [(frames(before.len() + between.len()), frames(spoken.len()))]);
    assert!(all.pcm == [before, between, spoken, last].concat(), "{} bytes", all.pcm.len());
}

#[tokio::test]
async fn t1_each_segment_begins_when_its_first_frame_was_sent() {
    let app = TestApp::builder().open().env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", "1s").start().await;
    let began = begin_session(&app).await;
    let mut peer = connect(&app).await;
    let (mut sent, mut times) = (0, Vec::new());
    for part in audio(3_000, 1).chunks(500 * BYTES_PER_MS) {
        let before = Utc::now();
        peer.send_pcm(part).await.unwrap();
        sent += part.len();
        written(&app, sent).await;
        times.push((before - began, Utc::now() - began));
    }
    peer.close_and_wait().await;
    let all = joined(&app).await;
    assert!(all.offsets.len() >= 2, "{:?}", all.offsets);
    for (first, offset) in all.offsets {
        let (before, behind) = times[(first / 24_000) as usize];
        let window = (before - TimeDelta::from_std(CLOSE_TO).unwrap()).num_milliseconds()..=behind.num_milliseconds();
        assert!(window.contains(&offset), "frame {first} at {offset}, sent within {window:?}");
    }
}

#[tokio::test]
async fn t3_a_wall_clock_that_steps_changes_neither_lengths_nor_offsets() {
    let library = ["/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1", "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"];
    let Some(library) = library.into_iter().find(|library| Path::new(library).is_file()) else {
        return skip("a wall clock that steps", "libfaketime is missing");
    };
    let dir = tempfile::tempdir().unwrap();
    let clock = dir.path().join("clock");
    std::fs::write(&clock, "+0").unwrap();
    let app = TestApp::builder()
        .open()
        .env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", "1s")
        .env("LD_PRELOAD", library)
        .env("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap())
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .start()
        .await;
    let began = begin_session(&app).await;
    let pcm = audio(4_800, 1);
    let mut peer = connect(&app).await;
    let start_at = Utc::now();
    for (part, hours) in pcm.chunks(1_200 * BYTES_PER_MS).zip([0, 1, -1, 0]) {
        std::fs::write(&clock, format!("{:+}", hours * 3_600)).unwrap();
        let shown = async || {
            let now = DateTime::parse_from_rfc2822(app.get("/health").await.header("date")?).unwrap().to_utc();
            ((now - Utc::now() - TimeDelta::hours(hours)).abs() < TimeDelta::minutes(1)).then_some(())
        };
        let (sent, ()) = tokio::join!(peer.go_on(part), app.eventually("the server sees the other time", shown));
        sent.unwrap();
    }
    peer.close_and_wait().await;
    let all = joined(&app).await;
    assert!(all.pcm == pcm && all.gaps.is_empty(), "{} bytes; {:?}", all.pcm.len(), all.gaps);
    assert!(all.offsets.len() >= 4, "{:?}", all.offsets);
    for (first, offset) in &all.offsets {
        let truth = (start_at - began + TimeDelta::milliseconds((first / 48) as i64)).num_milliseconds();
        assert!((truth - offset).abs() < 60_000, "frame {first} of {truth}: {:?}", all.offsets);
    }
    let mut names = app.wav_files();
    names.sort_by_key(|path| sidecar(path).unwrap()["sessionOffsetMs"].as_i64());
    assert_eq!(names, app.wav_files(), "names sort as the audio came");
    let recording = app.items("/api/v1/recordings").await.remove(0);
    let length = recording["durationMs"].as_u64().unwrap();
    assert_eq!(length, 4_800, "{recording}");
}
