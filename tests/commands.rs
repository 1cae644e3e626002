//! The command line, as somebody types it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::egress_peer::{EgressPeer, counter_pcm, tone};
use crate::support::fake_livekit::FakeLiveKit;
use crate::support::test_app::{ADMIN_KEY, API_KEY, API_SECRET, Finished, TestApp, command, read_wav, request, run};

const SAMPLES: hound::SampleFormat = hound::SampleFormat::Int;

fn wav_file(dir: &Path, name: &str, channels: u16, sample_rate: u32, pcm: &[u8]) -> String {
    let path = dir.join(name);
    let mut file = hound::WavWriter::create(&path, hound::WavSpec { channels, sample_rate, bits_per_sample: 16, sample_format: SAMPLES }).unwrap();
    let mut samples = file.get_i16_writer(u32::try_from(pcm.len() / 2).unwrap());
    pcm.chunks_exact(2).for_each(|sample| samples.write_sample(i16::from_le_bytes([sample[0], sample[1]])));
    samples.flush().unwrap();
    file.finalize().unwrap();
    path.to_str().unwrap().to_owned()
}

/// Every file below a directory, by its path from there.
fn files_below(dir: &Path) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                open.push(entry);
            } else {
                found.insert(entry.strip_prefix(dir).unwrap().to_str().unwrap().to_owned(), entry);
            }
        }
    }
    found
}

#[tokio::test]
async fn help_tells_what_matters_of_every_command() {
    let dir = TempDir::new().unwrap();
    let pages: [(&[&str], &[&str]); 7] = [
        (&["--help"], &["serve", "demo", "replay", "ticket", "check", "--config", "--version", "LiveKit", "WAV", "webhooks"]),
        (&["serve", "--help"], &["--config", "config.toml"]),
        (&["demo", "--help"], &["--once", "storage/demo", "embedded database"]),
        (&["replay", "--help"], &["--url", "--speed", "max", "--room", "--participant", "--track", "FILE.wav", "48 kHz stereo", "ADMIN_API_KEY"]),
        (&["ticket", "--help"], &["--room", "--participant", "--track", "ten minutes", "INGEST_TICKET_SECRET"]),
        (&["check", "--help"], &["--config", "Exits with 1"]),
        (&["repair", "--help"], &["DIR", "--dry-run", "sidecar", "nothing is deleted", "Exits with 1"]),
    ];
    for (args, words) in pages {
        let Finished { code, stdout, stderr } = run(dir.path(), &[], args).await;
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{args:?}");
        for word in words {
            assert!(stdout.contains(word), "{args:?} does not speak of {word}:\n{stdout}");
        }
    }
    for args in [&["--version"][..], &["replay", "--version"]] {
        let Finished { code, stdout, .. } = run(dir.path(), &[], args).await;
        assert_eq!(code, Some(0));
        assert!(stdout.starts_with("live-meeting") && stdout.trim_end().ends_with(env!("CARGO_PKG_VERSION")), "{stdout}");
    }
    assert!(files_below(dir.path()).is_empty());
}

#[tokio::test]
async fn what_is_no_command_exits_with_2_and_says_so() {
    let dir = TempDir::new().unwrap();
    let table: [(&[&str], &str); 7] = [
        (&["--colour"], "--colour"),
        (&["record"], "record"),
        (&["demo", "--twice"], "--twice"),
        (&["replay"], "FILE.wav"),
        (&["replay", "--speed", "0.5", "a.wav"], "from 1, or max"),
        (&["replay", "--speed", "fast", "a.wav"], "from 1, or max"),
        (&["ticket"], "--room"),
    ];
    for (args, told) in table {
        let Finished { code, stdout, stderr } = run(dir.path(), &[], args).await;
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{args:?}");
        assert!(stderr.contains(told), "{args:?}: {stderr}");
    }
    assert!(files_below(dir.path()).is_empty());
}

/// The longest run of silent frames, as its start and length in seconds of 48 kHz stereo.
fn longest_silence(pcm: &[u8]) -> (f64, f64) {
    let (mut longest, mut start) = ((0, 0), 0);
    for (index, frame) in pcm.chunks_exact(4).enumerate() {
        if frame != [0; 4] {
            start = index + 1;
        } else if index + 1 - start > longest.1 {
            longest = (start, index + 1 - start);
        }
    }
    (longest.0 as f64 / 48_000.0, longest.1 as f64 / 48_000.0)
}

#[tokio::test]
async fn demo_once_records_two_speakers_and_keeps_everything_under_storage_demo() {
    let dir = TempDir::new().unwrap();
    let Finished { code, stdout, stderr } = run(dir.path(), &[("PORT", "0")], &["demo", "--once"]).await;
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    let files = files_below(dir.path());
    assert!(files.keys().all(|path| path.starts_with("storage/demo/")), "{files:?}");
    let wavs: Vec<_> = files.iter().filter(|(path, _)| path.ends_with(".wav")).collect();
    assert_eq!(wavs.len(), 2, "{files:?}");
    assert!(stdout.contains("is ENDED"), "{stdout}");
    // The embedded recordings have 5.2065 s and 4.7773 s; bruno is muted for 2 s in his middle.
    for (speaker, seconds, shown) in [("ana", 5.2065, "5.21 s"), ("bruno", 6.7773, "6.78 s")] {
        let (path, file) = wavs.iter().find(|(path, _)| path.contains(&format!("_{speaker}_"))).unwrap();
        let (spec, pcm) = read_wav(file);
        assert_eq!((spec.channels, spec.sample_rate), (2, 48_000));
        let recorded = pcm.len() as f64 / 192_000.0;
        assert!((recorded - seconds).abs() < 0.001, "{speaker}: {recorded} s");
        let row = stdout.lines().find(|line| line.contains(path.as_str())).unwrap_or_else(|| panic!("no row of {path} in\n{stdout}"));
        assert!(row.contains(speaker) && row.contains(shown) && row.contains("dBFS"), "{row}");
        let (start, silence) = longest_silence(&pcm);
        match speaker {
            "bruno" => assert!((2.0..2.5).contains(&silence) && start > 1.8 && start + silence < 5.0, "{silence} s from {start} s"),
            _ => assert!(silence < 1.0, "{silence} s from {start} s"),
        }
    }
}

#[tokio::test]
async fn demo_goes_on_serving_until_it_is_told_to_end() {
    let dir = TempDir::new().unwrap();
    let env = BTreeMap::from([("PORT".to_owned(), "0".to_owned())]);
    let mut child = command(dir.path(), &env).arg("demo").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (mut port, mut told) = (None, String::new());
    while !told.contains("The server goes on") {
        let line = tokio::time::timeout(Duration::from_secs(60), lines.next_line()).await.expect("a line").unwrap();
        let line = line.unwrap_or_else(|| panic!("it ended:\n{told}"));
        if let Some((_, rest)) = line.split_once("serves http://localhost:") {
            port = rest.split(' ').next().unwrap().parse::<u16>().ok();
        }
        told.push_str(&line);
    }
    let key = std::fs::read_to_string(dir.path().join("storage/demo/admin-key")).unwrap();
    let addr = SocketAddr::from(([127, 0, 0, 1], port.expect("the port is told")));
    let response = request(addr, "GET", "/api/v1/recordings", &[("Authorization", &format!("Bearer {}", key.trim()))], b"").await;
    assert_eq!(response.json()["items"].as_array().unwrap().len(), 2);
    kill_process(child.id().and_then(|pid| Pid::from_raw(pid as i32)).unwrap(), Signal::TERM).unwrap();
    let status = tokio::time::timeout(Duration::from_secs(40), child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(0));
}

/// Values that must show nowhere.
const SECRETS: [(&str, &str); 6] = [
    ("LIVEKIT_API_SECRET", "canary-livekit-0123456789"),
    ("LIVEKIT_KEYS", "more: canary-more-0123456789"),
    ("ADMIN_API_KEY", "canary-admin-0123456789"),
    ("INGEST_TICKET_SECRET", "canary-ticket-0123456789-0123456789"),
    ("HUME_API_KEY", "canary-hume-0123456789"),
    ("IMENTIV_API_KEY", "canary-imentiv-0123456789"),
];

async fn check(dir: &TempDir, env: &[(&str, &str)]) -> Finished {
    let finished = run(dir.path(), env, &["check"]).await;
    let told = format!("{}{}", finished.stdout, finished.stderr);
    assert!(!told.contains("canary"), "a secret is told:\n{told}");
    finished
}

#[tokio::test]
async fn check_of_an_empty_directory_finds_nothing_at_fault_and_tells_what_it_looked_at() {
    let dir = TempDir::new().unwrap();
    let Finished { code, stdout, .. } = check(&dir, &[]).await;
    assert_eq!(code, Some(0), "{stdout}");
    for name in [
        "configuration",
        "database",
        "storage",
        "audio directory",
        "video directory",
        "pipeline logs",
        "admin key",
        "ticket key",
        "ingest",
        "webhooks",
        "LiveKit",
        "autopilot",
        "Hume",
    ] {
        let told = stdout.lines().any(|line| line.split_once("  ").is_some_and(|(_, rest)| rest.trim_start().starts_with(name)));
        assert!(told, "{name} is not spoken of:\n{stdout}");
    }
    assert!(stdout.contains("off: LIVEKIT_URL and LIVEKIT_API_KEY with its secret and EGRESS_WS_BASE is not set"), "{stdout}");
    assert!(!stdout.contains("FAULT"), "{stdout}");
    assert!(files_below(dir.path()).is_empty(), "it makes neither keys nor a database: {:?}", files_below(dir.path()));
}

#[tokio::test]
async fn check_exits_with_1_for_each_fault_and_tells_no_secret() {
    let with_secrets =
        |more: &[(&'static str, &'static str)]| [&SECRETS[..], &[("LIVEKIT_API_KEY", "key"), ("HUME_WS_URL", "ws://127.0.0.1:1/")], more].concat();
    let cases = [
        ("database", with_secrets(&[("DATABASE_URL", "postgres://user:canary-password@127.0.0.1:1/x")])),
        ("LiveKit", with_secrets(&[("LIVEKIT_URL", "http://127.0.0.1:1")])),
        ("configuration", with_secrets(&[("DATABASE_URL", "mysql://user:canary-password@127.0.0.1:1/x")])),
    ];
    for (name, env) in cases {
        let dir = TempDir::new().unwrap();
        let Finished { code, stdout, .. } = check(&dir, &env).await;
        let faults: Vec<_> = stdout.lines().filter_map(|line| line.strip_prefix("FAULT")).collect();
        assert_eq!((code, faults.len()), (Some(1), 1), "{stdout}");
        assert!(faults[0].trim_start().starts_with(name), "{stdout}");
        assert_eq!(stdout.contains("believed if they are signed with key or more"), name != "configuration", "{stdout}");
    }

    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("storage"), "a file in its place").unwrap();
    let Finished { code, stdout, .. } = check(&dir, &with_secrets(&[])).await;
    assert_eq!(code, Some(1));
    for path in ["storage", "storage/egress/audio", "storage/pipeline-logs"] {
        assert!(stdout.contains(&format!("{path} cannot be written")), "{stdout}");
    }

    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("config.toml"), "[http]\nprot = 1\n[recording]\nmute = \"never\"\n").unwrap();
    let Finished { code, stdout, .. } = check(&dir, &with_secrets(&[("PORT", "eighty")])).await;
    assert_eq!(code, Some(1));
    for key in ["http.port (from PORT)", "http.prot (from config.toml)", "recording.mute (from config.toml)"] {
        assert!(stdout.contains(key), "{stdout}");
    }
}

#[tokio::test]
async fn check_tells_a_wrong_secret_from_a_livekit_that_does_not_answer() {
    let livekit = FakeLiveKit::start().await;
    let url = livekit.url();
    for (secret, code, told) in [(API_SECRET, 0, "accepts the key"), ("canary-another-secret-0123456789", 1, "the API key or its secret is wrong")] {
        let dir = TempDir::new().unwrap();
        let finished = check(&dir, &[("LIVEKIT_URL", &*url), ("LIVEKIT_API_KEY", API_KEY), ("LIVEKIT_API_SECRET", secret)]).await;
        assert!(finished.stdout.lines().any(|line| line.contains("LiveKit") && line.contains(told)), "{}", finished.stdout);
        assert_eq!(finished.code, Some(code), "{}", finished.stdout);
    }
}

/// Plays at a server, with its key.
async fn replay(app: &TestApp, dir: &TempDir, args: &[&str]) -> Finished {
    let url = format!("http://{}", app.addr);
    run(dir.path(), &[("ADMIN_API_KEY", ADMIN_KEY)], &[&["replay", "--url", &url], args].concat()).await
}

/// The only segment that has come of a participant.
async fn segment_of(app: &TestApp, participant: &str) -> (Value, Vec<u8>) {
    app.settled().await;
    let items = app.items("/api/v1/recordings").await;
    let item = items.into_iter().find(|item| item["participant"] == participant).expect("a recording");
    let segments = item["segments"].as_array().unwrap();
    assert_eq!((segments.len(), segments[0]["endReason"].as_str()), (1, Some("closed")), "{item}");
    let pcm = read_wav(&app.audio_dir().join(segments[0]["path"].as_str().unwrap())).1;
    (item, pcm)
}

#[tokio::test]
async fn replay_plays_files_of_any_kind_as_livekit_would() {
    let (app, dir) = (TestApp::builder().start().await, TempDir::new().unwrap());
    let exact = counter_pcm(48_000, 1);
    let mut files = vec![
        (wav_file(dir.path(), "low.wav", 1, 16_000, &tone(16_000, 1, 440.0, 1.5, 0.5)), 1.5),
        (wav_file(dir.path(), "exact.wav", 2, 48_000, &exact), 1.0),
    ];
    if let Ok(speech) = std::env::var("LIVE_MEETING_TEST_SPEECH")
        && Path::new(&speech).exists()
    {
        let file = hound::WavReader::open(&speech).unwrap();
        files.push((speech, f64::from(file.duration()) / f64::from(file.spec().sample_rate)));
    }
    let paths: Vec<&str> = files.iter().map(|(path, _)| path.as_str()).collect();
    let Finished { code, stdout, stderr } = replay(&app, &dir, &[&["--speed", "4"], &paths[..]].concat()).await;
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    for (path, seconds) in &files {
        let stem = Path::new(path).file_stem().unwrap().to_str().unwrap();
        let (item, pcm) = segment_of(&app, stem).await;
        assert_eq!((item["roomName"].as_str(), item["trackSid"].as_str()), (Some("replay"), Some(&*format!("TR_{stem}"))));
        let recorded = pcm.len() as f64 / 192_000.0;
        assert!((recorded - seconds).abs() < 0.001, "{stem}: {recorded} of {seconds} s");
        assert!(stdout.contains(&format!("{path}: {recorded:.3} s recorded")), "{stdout}");
    }
    assert!(segment_of(&app, "exact").await.1 == exact, "bit for bit");
    // Both channels of what was mono are the same, and it sounds.
    let (_, pcm) = segment_of(&app, "low").await;
    assert!(pcm.chunks_exact(4).all(|frame| frame[..2] == frame[2..]) && longest_silence(&pcm).1 < 0.1);
}

#[tokio::test]
async fn replay_at_full_speed_runs_at_the_guards_pace_and_loses_nothing() {
    // The burst alone is a third of what the spool of a track holds by default: the minute waits where the disk stalls.
    let app = TestApp::builder().env("LIVE_MEETING__RECORDING__SPOOL_PER_TRACK", "2m").start().await;
    let dir = TempDir::new().unwrap();
    let pcm = counter_pcm(48_000 * 60, 1);
    let file = wav_file(dir.path(), "minute.wav", 2, 48_000, &pcm);
    let names = ["--speed", "max", "--room", "r", "--participant", "p", "--track", "TR_9"];
    let Finished { code, stderr, .. } = replay(&app, &dir, &[&names[..], &[file.as_str()]].concat()).await;
    assert_eq!(code, Some(0), "{stderr}");
    let (item, recorded) = segment_of(&app, "p").await;
    assert_eq!((item["roomName"].as_str(), item["trackSid"].as_str()), (Some("r"), Some("TR_9")));
    // A burst of 10 s, then 50 s at eight times the speed.
    let time = |name: &str| DateTime::parse_from_rfc3339(item["segments"][0][name].as_str().unwrap()).unwrap();
    let took = time("endedAt") - time("startedAt");
    assert!((TimeDelta::seconds(5)..TimeDelta::seconds(25)).contains(&took), "{took}");
    assert!(recorded == pcm, "{} of {} bytes", recorded.len(), pcm.len());
}

#[tokio::test]
async fn replay_finds_server_and_key_by_itself_in_the_servers_directory() {
    let app = TestApp::builder().without("ADMIN_API_KEY").start().await;
    let file = wav_file(app.dir.path(), "a.wav", 2, 48_000, &counter_pcm(4_800, 1));
    let Finished { code, stderr, .. } = run(app.dir.path(), &[("PORT", &app.addr.port().to_string())], &["replay", &file]).await;
    assert_eq!(code, Some(0), "{stderr}");
    assert!(read_wav(&app.wav_file()).1 == counter_pcm(4_800, 1));
}

#[tokio::test]
async fn replay_says_what_is_in_its_way() {
    let (app, dir) = (TestApp::builder().start().await, TempDir::new().unwrap());
    let file = wav_file(dir.path(), "good.wav", 2, 48_000, &counter_pcm(480, 1));
    std::fs::write(dir.path().join("no.wav"), "hello").unwrap();
    let (here, nowhere) = (format!("http://{}", app.addr), "http://127.0.0.1:1".to_owned());
    let key = ("ADMIN_API_KEY", ADMIN_KEY);
    let cases = [
        ("a wrong key", ("ADMIN_API_KEY", "another-admin-key"), &here, file.as_str(), "401 Unauthorized"),
        ("no key", ("ADMIN_API_KEY", ""), &here, &file, "set ADMIN_API_KEY"),
        ("an unreachable server", key, &nowhere, &file, "the server is not reached at http://127.0.0.1:1"),
        ("no WAV file", key, &here, "no.wav", "not a WAV file that can be read"),
        ("no file", key, &here, "missing.wav", "missing.wav: "),
        ("no such scheme", key, &"ftp://x".to_owned(), &file, "http:// or https://"),
    ];
    for (case, key, url, file, told) in cases {
        let Finished { code, stdout, stderr } = run(dir.path(), &[key], &["replay", "--url", url, file]).await;
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{case}: {stderr}");
        assert!(stderr.starts_with("live-meeting: ") && stderr.contains(told), "{case}: {stderr}");
        assert!(!stderr.contains(key.1) || key.1.is_empty(), "{case}: {stderr}");
    }
    assert!(app.wav_files().is_empty());
}

#[tokio::test]
async fn ticket_prints_a_url_that_opens_the_ingest_of_the_server_in_the_same_directory() {
    let app = TestApp::builder().start().await;
    let port = app.addr.port().to_string();
    let args =
        ["ticket", "--room", "a room", "--participant", "ana", "--track", "TR_1", "--meeting", "RM_1", "--channels", "1", "--sample-rate", "16000"];
    let args = [&args[..], &["--group-seconds", "0.5", "--analyse", "false", "--mix", "mono"]].concat();
    let Finished { code, stdout, stderr } = run(app.dir.path(), &[("PORT", &port)], &args).await;
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("opens one connection until"), "{stderr}");
    let path = stdout.trim_end().strip_prefix(&format!("ws://localhost:{port}")).unwrap_or_else(|| panic!("{stdout}"));
    let mut peer = EgressPeer::connect(app.addr, path).await.unwrap();
    peer.send_pcm(&counter_pcm(480, 1)).await.unwrap();
    peer.close_and_wait().await;
    let (item, pcm) = segment_of(&app, "ana").await;
    assert_eq!((item["roomName"].as_str(), item["trackSid"].as_str(), item["meetingId"].as_str()), (Some("a room"), Some("TR_1"), Some("RM_1")));
    assert_eq!((item["segments"][0]["sampleRate"].as_u64(), item["segments"][0]["channels"].as_u64()), (Some(16_000), Some(1)));
    assert!(pcm == counter_pcm(480, 1), "there was nothing to mix");
    assert!(path.contains("&groupSeconds=0.5&analyse=false&mix=mono&ticket="), "{path}");

    let base = [("EGRESS_WS_BASE", "wss://media.example.com/")];
    let Finished { stdout, .. } = run(app.dir.path(), &base, &["ticket", "--room", "r"]).await;
    assert!(stdout.starts_with("wss://media.example.com/egress-audio?roomName=r&ticket="), "{stdout}");
    let Finished { code, stderr, .. } =
        run(app.dir.path(), &[], &["ticket", "--room", "", "--channels", "3", "--sample-rate", "1", "--group-seconds", "31"]).await;
    assert_eq!(code, Some(1));
    assert!(["roomName", "channels", "sampleRate", "groupSeconds"].iter().all(|name| stderr.contains(name)), "{stderr}");
}
