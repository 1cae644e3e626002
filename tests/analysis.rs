//! What the analysis service is sent, and what becomes of its answers.

mod outages;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async};

use crate::support::egress_peer::{EgressPeer, counter_pcm, tone};
use crate::support::fake_hume::{FakeHume, FakeHumeOptions, Payload};
use crate::support::test_app::{Builder, TestApp, command, read_wav};

const KEY: &str = "s3cret-hume-key-31415";
/// Bytes of half a second of LiveKit's audio, the group of most tests here.
const HALF_SECOND: usize = 96_000;

fn hume() -> FakeHume {
    FakeHume::start(FakeHumeOptions { api_key: KEY.to_owned(), ..FakeHumeOptions::default() })
}

fn streaming_to(url: &str) -> Builder {
    TestApp::builder().open().env("HUME_WS_URL", url).env("HUME_API_KEY", KEY)
}

async fn connect(app: &TestApp, participant: &str, group_seconds: &str) -> EgressPeer {
    let path = format!("/egress-audio?roomName=room&participant={participant}&trackId=TR_{participant}&groupSeconds={group_seconds}");
    EgressPeer::connect(app.addr, &path).await.unwrap()
}

/// Sends everything, closes, and waits until the service has answered all of it.
async fn stream(app: &TestApp, fake: &FakeHume, group_seconds: &str, pcm: &[u8]) {
    let mut peer = connect(app, "ana", group_seconds).await;
    peer.send_pcm(pcm).await.unwrap();
    peer.close_and_wait().await;
    fake.wait_until("the end of the conversation", |seen| seen.connections == 1 && seen.open == 0).await;
}

async fn payloads(fake: &FakeHume, count: usize) -> Vec<Payload> {
    fake.wait_until(&format!("{count} payloads"), |seen| seen.payloads.len() >= count).await;
    fake.payloads()
}

async fn measurements(app: &TestApp, query: &str, count: usize) -> Vec<Value> {
    let path = format!("/api/v1/sessions/room/measurements{query}");
    app.eventually(&format!("{count} measurements"), async || Some(app.items(&path).await).filter(|items| items.len() == count)).await
}

/// What the pipeline log says of each group, by their order: sequence and outcome.
async fn outcomes(app: &TestApp, count: usize) -> Vec<String> {
    let log = app.eventually(&format!("{count} lines"), async || Some(app.pipeline_log("room")).filter(|log| log.lines().count() == count)).await;
    let outcome = |line: &str| {
        let (sequence, rest) = line.split_once("sequence=").unwrap().1.split_once(' ').unwrap();
        format!("{sequence} {}", rest.split_once("outcome=").unwrap().1)
    };
    let mut outcomes: Vec<String> = log.lines().map(outcome).collect();
    // A group is logged when its fate is known: a silent one overtakes one that is on its way.
    outcomes.sort_by_key(|line| line.split_once(' ').unwrap().0.parse::<u64>().unwrap());
    outcomes
}

fn joined(payloads: &[Payload]) -> Vec<f64> {
    payloads.iter().flat_map(|payload| &payload.samples).map(|sample| f64::from(*sample)).collect()
}

fn decibels(ratio: f64) -> f64 {
    20.0 * ratio.log10()
}

async fn recording_is(app: &TestApp, pcm: &[u8]) {
    let recorded = read_wav(&app.wav_file()).1;
    assert!(recorded == pcm, "{} of {} bytes", recorded.len(), pcm.len());
}

#[tokio::test]
async fn groups_arrive_as_one_unbroken_tone_of_16_khz_mono() {
    let fake = hume();
    let app = streaming_to(&fake.url()).start().await;
    stream(&app, &fake, "2", &tone(48_000, 2, 1_000.0, 7.0, 0.5)).await;
    let seen = fake.state();
    assert_eq!((seen.errors, seen.warnings), (vec![], vec![]));
    assert_eq!(seen.configurations.iter().map(|seen| &seen.message).collect::<Vec<_>>(), [&json!({"models": {"prosody": {}}})]);
    assert!(seen.payloads.iter().all(|payload| (payload.sample_rate, payload.channels) == (16_000, 1)));
    assert_eq!(seen.payloads.iter().filter_map(|payload| payload.payload_id.as_ref()).collect::<BTreeSet<_>>().len(), 4);
    let samples = joined(&seen.payloads);
    // The resampler keeps its last 40 ms at most back: they would need the audio that follows.
    assert!((16_000 * 7 - 640..=16_000 * 7).contains(&samples.len()), "{} samples", samples.len());
    // One sine, in the phase of what was sent, over everything but its onset and its end: a click, a gap or a wrong level at any joint shows.
    let whole_periods = (samples.len() - 1_760) / 16 * 16;
    let steady = &samples[1_600..1_600 + whole_periods];
    let wave = |n: usize| (std::f64::consts::TAU * n as f64 / 16.0).sin_cos();
    let (sin, cos) = steady.iter().enumerate().fold((0.0, 0.0), |(sin, cos), (n, x)| (sin + x * wave(n).0, cos + x * wave(n).1));
    let (sin, cos) = (2.0 * sin / whole_periods as f64, 2.0 * cos / whole_periods as f64);
    assert!(decibels(sin.hypot(cos) / 16_383.5).abs() < 0.1, "level {}", sin.hypot(cos));
    assert!(cos.atan2(sin).to_degrees().abs() < 360.0 / 16.0 / 2.0, "half a sample or more off: {}°", cos.atan2(sin).to_degrees());
    let worst = steady.iter().enumerate().map(|(n, x)| (x - sin * wave(n).0 - cos * wave(n).1).abs()).fold(0.0, f64::max);
    assert!(worst < 10.0, "a sample is {worst} off the tone");
}

#[tokio::test]
async fn a_10_khz_tone_arrives_60_db_down() {
    let fake = hume();
    let app = streaming_to(&fake.url()).start().await;
    stream(&app, &fake, "1", &tone(48_000, 2, 10_000.0, 3.0, 0.9)).await;
    let samples = joined(&fake.payloads());
    assert!(samples.len() > 16_000 * 2, "{} samples", samples.len());
    let steady = &samples[1_600..]; // the onset of a tone holds all frequencies
    let rms = (steady.iter().map(|x| x * x).sum::<f64>() / steady.len() as f64).sqrt();
    let attenuation = decibels(rms.max(1e-9) / (0.9 * 32_767.0 / 2f64.sqrt()));
    assert!(attenuation <= -60.0, "{attenuation} dB");
}

#[tokio::test]
async fn a_group_over_5_s_is_cut_for_the_service() {
    let fake = hume();
    let app = streaming_to(&fake.url()).start().await;
    stream(&app, &fake, "12", &tone(48_000, 2, 500.0, 12.0, 0.3)).await;
    let payloads = fake.payloads();
    assert!(payloads.len() >= 3 && payloads.iter().all(|payload| payload.samples.len() <= 80_000));
    assert!(joined(&payloads).len() > 16_000 * 119 / 10);
    assert!(fake.errors().is_empty(), "{:?}", fake.errors());
    assert_eq!(outcomes(&app, 1).await, ["1 sent"]);
}

/// The server's next conversation with a service of the test's own.
async fn accept(listener: &TcpListener) -> WebSocketStream<TcpStream> {
    let (stream, _) = tokio::time::timeout(Duration::from_secs(20), listener.accept()).await.expect("a connection").unwrap();
    accept_async(stream).await.unwrap()
}

async fn next_text(socket: &mut WebSocketStream<TcpStream>) -> Value {
    loop {
        let message = tokio::time::timeout(Duration::from_secs(20), socket.next()).await.expect("a message").unwrap().unwrap();
        if let Message::Text(text) = message {
            return serde_json::from_str(&text).unwrap();
        }
    }
}

#[tokio::test]
async fn the_first_message_configures_and_an_oversized_reply_costs_no_more_than_its_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = streaming_to(&format!("ws://{}", listener.local_addr().unwrap())).start().await;
    let pcm = counter_pcm(48_000, 1);
    let mut peer = connect(&app, "ana", "0.5").await;
    for half in pcm.chunks(HALF_SECOND) {
        peer.send_pcm(half).await.unwrap();
        let mut service = accept(&listener).await;
        assert_eq!(next_text(&mut service).await, json!({"models": {"prosody": {}}}));
        let group = next_text(&mut service).await;
        assert_eq!(group["models"], json!({"prosody": {}}));
        assert!(group["data"].is_string() && group["payload_id"].is_string(), "{group}");
        service.send(Message::text("x".repeat(2 << 20))).await.ok(); // it may be gone before it has read all of it
        while let Some(Ok(_)) = service.next().await {}
    }
    peer.close_and_wait().await;
    recording_is(&app, &pcm).await;
}

#[tokio::test]
async fn replies_become_measurements_on_the_tracks_time() {
    let fake = hume();
    let app = streaming_to(&fake.url()).start().await;
    let (mut ana, mut bob) = (connect(&app, "ana", "0.5").await, connect(&app, "bob", "0.5").await);
    ana.send_pcm(&tone(48_000, 2, 1_000.0, 1.0, 0.5)).await.unwrap();
    // No digital silence, but its mono mix is: the service finds no speech in it.
    bob.send_pcm(&[5i16, -5].repeat(24_000).into_iter().flat_map(i16::to_le_bytes).collect::<Vec<u8>>()).await.unwrap();
    ana.close_and_wait().await;
    bob.close_and_wait().await;
    assert_eq!(measurements(&app, "", 3).await.len(), 3);
    let [first, second] = &measurements(&app, "?participant=ana", 2).await[..] else { panic!("two") };
    for row in [first, second] {
        let named = ["participant", "trackSid", "service", "kind"].map(|name| row[name].as_str().unwrap());
        assert_eq!(named, ["ana", "TR_ana", "hume", "prosody"]);
        assert_eq!(row["warning"], Value::Null);
        let scores = row["scores"].as_object().unwrap();
        assert!(scores.len() == 48 && scores.contains_key("Surprise (negative)") && scores.contains_key("Empathic Pain"), "{scores:?}");
        // The fake's n-th score is n/48 of the RMS, and that of this tone is known.
        let [least, most] = ["Admiration", "Triumph"].map(|name| scores[name].as_f64().unwrap());
        assert!((most - 0.5 / 2f64.sqrt()).abs() < 0.01 && (least * 48.0 - most).abs() < 1e-9, "{least} to {most}");
        chrono::DateTime::parse_from_rfc3339(row["receivedAt"].as_str().unwrap()).unwrap();
    }
    let at = |row: &Value| (row["startMs"].as_u64().unwrap(), row["endMs"].as_u64().unwrap());
    let ((start, joint), (next, end)) = (at(first), at(second));
    assert_eq!(start, 0);
    assert!((430..=500).contains(&joint) && next.abs_diff(joint) <= 1 && (930..=1_000).contains(&end), "{joint}, {next} to {end}");
    let [warned] = &measurements(&app, "?participant=bob", 1).await[..] else { panic!("one") };
    assert_eq!((warned["warning"].as_str(), &warned["scores"]), (Some("W0105 No speech detected."), &json!({})));
    assert_eq!((at(warned).0, (430..=500).contains(&at(warned).1)), (0, true), "{warned}");
}

#[tokio::test]
async fn silent_groups_are_not_sent_and_move_no_later_one() {
    let fake = hume();
    let app = streaming_to(&fake.url()).start().await;
    let sound = tone(48_000, 2, 1_000.0, 1.0, 0.5);
    stream(&app, &fake, "0.5", &[sound.clone(), vec![0; 192_000], sound].concat()).await;
    assert_eq!(outcomes(&app, 6).await, ["1 sent", "2 sent", "3 silent", "4 silent", "5 sent", "6 sent"]);
    assert_eq!((fake.payloads().len(), fake.state().warnings), (4, vec![]));
    let starts: Vec<u64> = measurements(&app, "", 4).await.iter().map(|row| row["startMs"].as_u64().unwrap()).collect();
    assert_eq!((starts[0], starts[2]), (0, 2_000), "{starts:?}");
    assert!((2_430..=2_500).contains(&starts[3]), "{starts:?}");
}

#[tokio::test]
async fn normalisation_raises_what_the_service_gets_and_not_the_recording() {
    let fake = hume();
    let app = streaming_to(&fake.url()).env("AUDIO_PIPELINE_NORMALIZE", "true").start().await;
    let pcm = tone(48_000, 2, 440.0, 2.0, 0.05);
    stream(&app, &fake, "1", &pcm).await;
    let peaks: Vec<f64> = fake
        .payloads()
        .iter()
        .map(|payload| decibels(f64::from(payload.samples.iter().map(|x| x.unsigned_abs()).max().unwrap()) / 32_768.0))
        .collect();
    assert!(peaks.len() == 2 && peaks.iter().all(|peak| (peak + 1.0).abs() < 0.3), "{peaks:?} dBFS");
    recording_is(&app, &pcm).await;
}

#[tokio::test]
async fn over_tls_only_a_trusted_service_gets_audio() {
    let fake = FakeHume::start(FakeHumeOptions { api_key: KEY.to_owned(), tls: true, ..FakeHumeOptions::default() });
    let mut ca = tempfile::NamedTempFile::new().unwrap();
    ca.write_all(fake.ca_pem().as_bytes()).unwrap();
    let pcm = counter_pcm(48_000, 1);

    let app = streaming_to(&fake.url()).start().await;
    let mut peer = connect(&app, "ana", "0.5").await;
    peer.send_pcm(&pcm).await.unwrap();
    app.logged("the analysis service is not reached").await;
    peer.close_and_wait().await;
    recording_is(&app, &pcm).await;
    assert_eq!(outcomes(&app, 2).await, ["1 dropped", "2 dropped"]);
    assert!(fake.handshakes().is_empty());

    let app = streaming_to(&fake.url()).env("LIVE_MEETING__HUME__CA_FILE", ca.path().to_str().unwrap()).start().await;
    stream(&app, &fake, "0.5", &pcm).await;
    assert_eq!((fake.payloads().len(), fake.errors()), (2, vec![]));
    assert_eq!(outcomes(&app, 2).await, ["1 sent", "2 sent"]);
}

#[tokio::test]
async fn without_a_key_or_switched_off_nothing_is_sent_and_that_is_said() {
    let fake = hume();
    let key_missing = TestApp::builder().open().env("HUME_WS_URL", fake.url());
    let switched_off = streaming_to(&fake.url()).env("LIVE_MEETING__ANALYSIS__ENABLED", "false");
    for (builder, reason) in [(key_missing, "HUME_API_KEY is missing"), (switched_off, "analysis.enabled is false")] {
        let app = builder.start().await;
        let mut peer = connect(&app, "ana", "0.5").await;
        peer.send_pcm(&counter_pcm(24_000, 1)).await.unwrap();
        peer.close_and_wait().await;
        assert_eq!(outcomes(&app, 1).await, [format!("1 skipped reason={reason:?}")]);
        assert_eq!(app.log().contains("streaming to Hume is skipped: HUME_API_KEY is missing"), reason == "HUME_API_KEY is missing");
    }
    assert!(fake.handshakes().is_empty());
}

#[tokio::test]
async fn a_connection_that_asks_for_no_analysis_gets_none_and_others_go_on() {
    let fake = hume();
    let app = streaming_to(&fake.url()).start().await;
    let (unheard, heard) = (counter_pcm(24_000, 1), counter_pcm(24_000, 50_000));
    let mut quiet = EgressPeer::connect(app.addr, "/egress-audio?roomName=quiet&participant=bo&groupSeconds=0.5&analyse=false").await.unwrap();
    let mut loud = EgressPeer::connect(app.addr, "/egress-audio?roomName=room&participant=ana&groupSeconds=0.5&analyse=true").await.unwrap();
    quiet.send_pcm(&unheard).await.unwrap();
    loud.send_pcm(&heard).await.unwrap();
    payloads(&fake, 1).await;
    let skipped = app.eventually("the group is logged", async || Some(app.pipeline_log("quiet")).filter(|log| !log.is_empty())).await;
    assert!(skipped.ends_with("sequence=1 duration_ms=500 bytes=96000 outcome=skipped reason=\"the connection asked for none\"\n"), "{skipped}");
    let live = app.live("bo").await.unwrap();
    assert_eq!((live["groups"].as_u64(), live["analysisConnections"].as_u64(), live["analysedGroups"].as_u64()), (Some(1), Some(0), Some(0)));
    assert_eq!(app.live("ana").await.unwrap()["analysisConnections"], 1);
    quiet.close_and_wait().await;
    loud.close_and_wait().await;
    fake.wait_until("the end of the conversation", |seen| seen.open == 0).await;
    assert_eq!((fake.handshakes().len(), fake.payloads().len()), (1, 1), "of the other connection");
    assert_eq!(outcomes(&app, 1).await, ["1 sent"]);
}

#[tokio::test]
async fn no_log_level_shows_the_key_or_the_query_of_the_url() {
    const IN_QUERY: &str = "s3cret-in-query-27182";
    let fake = hume();
    fake.refuse_with(Some(403));
    let url = format!("{}?apikey={IN_QUERY}", fake.url());
    let app = streaming_to(&url).env("RUST_LOG", "trace").env("LIVE_MEETING__HUME__REFUSED_RETRY", "1s").start().await;
    let mut peer = connect(&app, "ana", "0.5").await;
    peer.send_pcm(&counter_pcm(24_000, 1)).await.unwrap();
    app.logged("refuses the key").await;
    fake.refuse_with(None);
    measurements(&app, "", 1).await;
    fake.answer_garbage(true);
    peer.send_pcm(&counter_pcm(24_000, 3)).await.unwrap();
    app.logged("said something unknown").await; // which only `debug` says
    fake.refuse_with(Some(503));
    fake.drop_all();
    peer.send_pcm(&counter_pcm(24_000, 2)).await.unwrap();
    app.logged("the analysis service is not reached").await;
    peer.close_and_wait().await;
    let (_, _, stopped) = app.terminate().await;
    for secret in [KEY, IN_QUERY] {
        let found: Vec<&str> = stopped.log.lines().filter(|line| line.contains(secret)).collect();
        assert!(found.is_empty(), "{found:?}");
    }
}

#[tokio::test]
async fn a_key_without_a_url_does_not_start_and_says_why() {
    let dir = tempfile::TempDir::new().unwrap();
    let env: BTreeMap<String, String> = [("HUME_API_KEY", KEY), ("PORT", "0")].map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let mut serve = command(dir.path(), &env);
    let output = tokio::time::timeout(Duration::from_secs(20), serve.arg("serve").output()).await.expect("it ends").unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("set HUME_WS_URL") && said.contains("was switched off") && !said.contains(KEY), "{said}");
}
