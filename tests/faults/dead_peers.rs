//! Peers that are there no more, or do as if: stopped in the middle, and behind a line that is down.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::ingest_errors::recording_of;
use crate::support::egress_peer::counter_pcm;
use crate::support::machine::{has_tools, output, skip};
use crate::support::test_app::{ADMIN_KEY, TestApp, command, read_wav};

/// The least that can be configured; what is promised by default, 75 s, is the same rule.
const IDLE: Duration = Duration::from_secs(5);
/// After so long without an acknowledgement the kernel gives a peer up.
const UNACKNOWLEDGED: Duration = Duration::from_secs(20);

/// A minute of audio to be played.
fn file(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("minute.wav");
    let spec = hound::WavSpec { channels: 2, sample_rate: 48_000, bits_per_sample: 16, sample_format: hound::SampleFormat::Int };
    let mut writer = hound::WavWriter::create(&path, spec).unwrap();
    counter_pcm(48_000 * 60, 1).chunks_exact(2).for_each(|sample| writer.write_sample(i16::from_le_bytes([sample[0], sample[1]])).unwrap());
    writer.finalize().unwrap();
    path
}

/// A client in a process of its own that plays the file in real time.
fn player(prefix: &[&str], url: &str, participant: &str, directory: &Path) -> tokio::process::Child {
    let env = BTreeMap::from([("ADMIN_API_KEY".to_owned(), ADMIN_KEY.to_owned())]);
    let program = command(directory, &env).as_std().get_program().to_owned();
    let mut player = match prefix {
        [] => command(directory, &env),
        [first, rest @ ..] => {
            let mut player = tokio::process::Command::new(first);
            player.args(rest).arg(program).current_dir(directory).env("ADMIN_API_KEY", ADMIN_KEY);
            player
        }
    };
    player.args(["replay", "--url", url, "--room", "room", "--participant", participant, "--track", participant]).arg(file(directory));
    player.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap()
}

async fn heard(app: &TestApp, participant: &str) {
    let heard = async || app.live(participant).await.filter(|live| live["recordedBytes"].as_u64() > Some(96_000)).map(drop);
    app.eventually("the client is heard", heard).await;
}

/// Waits for the end of a recording, and hands over how it ended and how long that took.
async fn ended(app: &TestApp, participant: &str, patience: Duration) -> (String, Duration) {
    let start = Instant::now();
    loop {
        let recording = recording_of(app, participant).await;
        if recording["endedAt"].is_string() {
            let segment = &recording["segments"][0];
            let pcm = read_wav(&app.audio_dir().join(segment["path"].as_str().unwrap())).1;
            assert_eq!(segment["bytes"].as_u64(), Some(pcm.len() as u64), "{recording}");
            assert!(pcm.len() > 96_000, "{} bytes", pcm.len());
            return (segment["endReason"].as_str().unwrap().to_owned(), start.elapsed());
        }
        assert!(start.elapsed() < patience, "{participant} is not sealed:\n{}", app.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn i3_a_client_that_is_stopped_is_shown_as_stalled_and_then_sealed() {
    let app = TestApp::builder().env("LIVE_MEETING__INGEST__IDLE_TIMEOUT", "5s").env("LIVE_MEETING__INGEST__STALL_AFTER", "1s").start().await;
    let directory = tempfile::tempdir().unwrap();
    let mut player = player(&[], &format!("http://{}", app.addr), "ana", directory.path());
    heard(&app, "ana").await;
    let pid = rustix::process::Pid::from_raw(player.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    // Its kernel goes on to acknowledge: nothing tells but the silence.
    app.eventually("it is shown as stalled", async || app.live("ana").await?["stalled"].as_bool()?.then_some(())).await;
    let (reason, took) = ended(&app, "ana", 4 * IDLE).await;
    assert_eq!(reason, "idle", "after {took:?}");
    player.kill().await.unwrap();
}

/// A network of its own beside the machine's, joined by a line that can be cut. Dropping it takes it away.
struct Line {
    name: String,
    address: String,
}

impl Line {
    fn new() -> Result<Self, String> {
        let number = std::process::id() % 16_384;
        // Of the addresses that are set aside for such tests (RFC 2544).
        let (third, fourth) = (number / 64, number % 64 * 4);
        let line = Self { name: format!("lm{number}"), address: format!("198.18.{third}.{}", fourth + 1) };
        let name = &line.name;
        for words in [
            format!("netns add {name}"),
            format!("link add {name}h type veth peer name {name}n netns {name}"),
            format!("addr add {}/30 dev {name}h", line.address),
            format!("link set {name}h up"),
            format!("-n {name} addr add 198.18.{third}.{}/30 dev {name}n", fourth + 2),
            format!("-n {name} link set {name}n up"),
        ] {
            ip(&words)?;
        }
        Ok(line)
    }

    /// From now on nothing passes, and nobody is told.
    fn cut(&self) {
        ip(&format!("-n {name} link set {name}n down", name = self.name)).unwrap();
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // The line goes with it.
        ip(&format!("netns del {}", self.name)).ok();
    }
}

fn ip(words: &str) -> Result<(), String> {
    output(Command::new("ip").args(words.split(' '))).map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i3_a_peer_behind_a_cut_line_is_found_by_its_silence_and_by_the_kernel() {
    const WHAT: &str = "a peer behind a cut line";
    if !has_tools(WHAT, &["ip"]) {
        return;
    }
    let line = match Line::new() {
        Ok(line) => line,
        Err(refused) => return skip(WHAT, &refused),
    };
    let cases = [("5s", "idle", IDLE), ("75s", "lost", UNACKNOWLEDGED)];
    let mut servers = Vec::new();
    for (idle_timeout, ..) in cases {
        let app = TestApp::builder().env("HOST", "0.0.0.0").env("LIVE_MEETING__INGEST__IDLE_TIMEOUT", idle_timeout).start().await;
        let directory = tempfile::tempdir().unwrap();
        let url = format!("http://{}:{}", line.address, app.addr.port());
        let player = player(&["ip", "netns", "exec", &line.name], &url, "ana", directory.path());
        heard(&app, "ana").await;
        servers.push((app, player, directory));
    }
    line.cut();
    let ends = servers.iter().zip(cases).map(|((app, ..), (idle_timeout, reason, promised))| async move {
        let (ended, took) = ended(app, "ana", 4 * promised).await;
        assert_eq!(ended, reason, "idle_timeout {idle_timeout}: after {took:?}");
        println!("idle_timeout {idle_timeout}: {ended} after {took:?}");
    });
    futures_util::future::join_all(ends).await;
}
