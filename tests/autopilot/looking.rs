//! Ways to look at what became of egresses and recordings.

use std::time::{Duration, Instant};

use diesel::sql_types::{Nullable, Text};
use diesel::{QueryableByName, RunQueryDsl};
use livekit_api::services::egress::{EgressClient, TrackEgressOutput};
use serde_json::{Value, json};

use crate::support::fake_livekit::{EgressSeen, FakeLiveKit, Method, OUR_NAME};
use crate::support::test_app::{API_KEY, API_SECRET, TestApp, read_wav};

/// 16-bit stereo at 48 kHz.
const FRAME_BYTES: usize = 4;
const FRAMES_PER_MS: usize = 48;

/// What takes longer than the patience of everything else.
const LONG: Duration = Duration::from_secs(90);

#[derive(QueryableByName)]
struct Row {
    #[diesel(sql_type = Nullable<Text>)]
    value: Option<String>,
}

/// The values of a query's only column, `value`.
pub fn column(app: &TestApp, sql: &str) -> Vec<String> {
    let rows: Vec<Row> = diesel::sql_query(sql).load(&mut app.database()).unwrap();
    rows.into_iter().map(|row| row.value.unwrap_or_default()).collect()
}

/// The track SIDs of each recording's segments in their order, as `TR_1,TR_2`; oldest recording first.
pub fn tracks_of_segments(app: &TestApp) -> Vec<String> {
    let of_recording = "SELECT track_sid FROM segments WHERE recording_id = recordings.id ORDER BY started_at, id";
    column(app, &format!("SELECT (SELECT group_concat(track_sid) FROM ({of_recording})) AS value FROM recordings ORDER BY recordings.id"))
}

/// Waits until the recordings have such segments, as [`tracks_of_segments`] has them, in any order.
pub async fn segments_are(app: &TestApp, expected: &[String]) {
    let mut expected = expected.to_vec();
    expected.sort();
    let seen = async || {
        let mut segments = tracks_of_segments(app);
        segments.sort();
        (segments == expected).then_some(())
    };
    app.eventually(&format!("{expected:?} in {:?}", tracks_of_segments(app)), seen).await;
}

/// When LiveKit was asked to start an egress of a track.
pub fn starts(livekit: &FakeLiveKit, track: &str) -> Vec<Instant> {
    let calls = livekit.journal().into_iter().filter(|call| call.method == Method::StartTrackEgress && call.track == track);
    calls.map(|call| call.at).collect()
}

pub fn is_stopped(livekit: &FakeLiveKit, egress: &str) -> bool {
    livekit.journal().iter().any(|call| call.method == Method::StopEgress && call.egress_id == egress)
}

/// Waits until LiveKit is asked to stop an egress.
pub async fn stopped(livekit: &FakeLiveKit, egress: &str) {
    livekit.eventually(&format!("a stop of {egress}"), |livekit| is_stopped(livekit, egress).then_some(())).await;
}

/// Waits until a track is streamed by another egress than these.
pub async fn streaming_anew(livekit: &FakeLiveKit, track: &str, before: &[&str]) -> EgressSeen {
    livekit
        .eventually(&format!("another egress of {track}"), |livekit| {
            livekit.active_for(track).into_iter().find(|egress| egress.connected && !before.contains(&&*egress.id))
        })
        .await
}

/// Waits for so many more looks at LiveKit's rooms, the first of which may be under way.
pub async fn looks(livekit: &FakeLiveKit, more: usize) {
    let enough = livekit.calls(Method::ListRooms) + more;
    livekit.eventually("another look", |livekit| (livekit.calls(Method::ListRooms) >= enough).then_some(())).await;
}

/// Waits with more patience than usual.
pub async fn patiently<T>(app: &TestApp, what: &str, probe: impl AsyncFn() -> Option<T>) -> T {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come true; the log:\n{}", app.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// An egress that somebody starts by hand, to this server unless `base` says otherwise. Its id.
pub async fn start_by_hand(livekit: &FakeLiveKit, app: &TestApp, room: &str, track: &str, base: Option<&str>) -> String {
    let ticket = app.ticket(json!({"roomName": room, "participant": "ana", "trackId": track})).await;
    let base = base.map_or_else(|| format!("ws://{OUR_NAME}"), str::to_owned);
    let url = format!("{base}/egress-audio?roomName={room}&participant=ana&trackId={track}&ticket={ticket}");
    let client = EgressClient::with_api_key(&livekit.url(), API_KEY, API_SECRET).with_failover(false);
    client.start_track_egress(room, TrackEgressOutput::WebSocket(url), track).await.unwrap().egress_id
}

/// The recording of a participant that has ended, with so many segments; the newest where there are several.
pub async fn ended(app: &TestApp, participant: &str, segments: usize) -> Value {
    app.eventually(&format!("the end of {participant}'s recording"), async || {
        let recordings = app.items("/api/v1/recordings").await;
        let recording = recordings.into_iter().find(|recording| recording["participant"] == participant)?;
        (recording["endedAt"].is_string() && recording["segments"].as_array()?.len() == segments).then_some(recording)
    })
    .await
}

pub fn end_reasons(recording: &Value) -> Vec<&str> {
    recording["segments"].as_array().unwrap().iter().map(|segment| segment["endReason"].as_str().unwrap_or("open")).collect()
}

/// Asserts that a recording plays as one file with the audio of its egresses in their places and silence between, and tells of the same gaps. What an egress
/// sent begins with a sample that is not zero; of one that was cut off, the last may not have arrived.
pub async fn assert_joined(app: &TestApp, recording: &Value, sent: &[Vec<u8>]) {
    let id = recording["id"].as_str().unwrap();
    let media = app.get(&format!("/api/v1/recordings/{id}/media")).await;
    assert_eq!((media.status, media.header("content-type")), (200, Some("audio/wav")));
    let file = app.dir.path().join(format!("heard-{id}.wav"));
    std::fs::write(&file, &media.body).unwrap();
    let (spec, heard) = read_wav(&file);
    assert_eq!((spec.sample_rate, spec.channels), (48_000, 2));
    assert_segments(recording, &heard, sent);
}

fn assert_segments(recording: &Value, heard: &[u8], sent: &[Vec<u8>]) {
    let segments = recording["segments"].as_array().unwrap();
    assert_eq!(segments.len(), sent.len(), "{recording}");
    let (mut at, mut gaps) = (0, Vec::new());
    for (segment, sent) in segments.iter().zip(sent) {
        let number = |name: &str| segment[name].as_u64().unwrap() as usize;
        let silence = heard[at..].chunks_exact(FRAME_BYTES).take_while(|frame| *frame == [0; FRAME_BYTES]).count();
        if silence >= FRAMES_PER_MS {
            gaps.push(json!([at / FRAME_BYTES / FRAMES_PER_MS, number("startMs")]));
        }
        at += silence * FRAME_BYTES;
        assert_eq!(at / FRAME_BYTES / FRAMES_PER_MS, number("startMs"), "{recording}");
        let bytes = number("bytes");
        assert!(bytes > 0 && bytes <= sent.len(), "{bytes} of {} in {segment}", sent.len());
        assert!(segment["endReason"] != "closed" || bytes == sent.len(), "{bytes} of {} in {segment}", sent.len());
        assert!(heard[at..at + bytes] == sent[..bytes], "{segment}");
        at += bytes;
        assert_eq!(at / FRAME_BYTES / FRAMES_PER_MS, number("endMs"), "{recording}");
    }
    assert_eq!(heard.len(), at, "nothing follows the last segment");
    let told = recording["gaps"].as_array().unwrap().iter().map(|gap| json!([gap["startMs"], gap["endMs"]]));
    let told: Vec<Value> = told.filter(|gap| gap[0] != gap[1]).collect();
    assert_eq!(told, gaps, "{recording}");
}

/// What each egress of a track has sent that sent anything.
pub fn sent(livekit: &FakeLiveKit, track: &str) -> Vec<Vec<u8>> {
    livekit.sent_pcm(track).iter().map(|sent| sent.bytes()).filter(|bytes| !bytes.is_empty()).collect()
}
