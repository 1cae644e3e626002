//! What `[[livekit.rules]]` make of tracks.

use std::sync::Arc;

use livekit_protocol::participant_info::Kind;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::starting::files;
use super::{builder, egresses, streamed, until};
use crate::support::fake_livekit::{FakeLiveKit, Method, Verdict, mic, person, screen_audio};
use crate::support::test_app::{TestApp, read_wav};

const RULES: &str = r#"
[[livekit.rules]]
kind = "agent"
record = false

[[livekit.rules]]
kind = "sip"
analyse = false

[[livekit.rules]]
identity = "quiet-*"
record = false

[[livekit.rules]]
room = "mono-*"
channels = "mono"

[[livekit.rules]]
source = "screen_share_audio"
group_seconds = 0.5
"#;

async fn ruled() -> (FakeLiveKit, TestApp) {
    let livekit = FakeLiveKit::start().await;
    livekit.pace(4.0);
    let dir = Arc::new(TempDir::new().unwrap());
    std::fs::write(dir.path().join("config.toml"), RULES).unwrap();
    let app = builder(&livekit).dir(&dir).start().await;
    livekit.deliver_to(app.addr);
    (livekit, app)
}

/// Waits until a track has no egress because a rule says so.
async fn left_alone(app: &TestApp, track: &str) -> Value {
    app.eventually(&format!("{track} is left alone"), async || {
        let last = egresses(app, track).await.pop()?;
        (last["endReason"] == "rule").then_some(last)
    })
    .await
}

#[tokio::test]
async fn each_rule_does_what_it_says() {
    let (livekit, app) = ruled().await;
    livekit.join("daily", person("agent").kind(Kind::Agent)).await;
    livekit.join("daily", person("phone").kind(Kind::Sip)).await;
    livekit.join("daily", person("stream").kind(Kind::Ingress)).await;
    for (identity, track) in [("agent", mic()), ("quiet-1", mic())] {
        let track = livekit.publish("daily", identity, track).await;
        let shown = left_alone(&app, &track).await;
        assert_eq!((shown["state"].as_str(), shown["attempts"].as_i64()), (Some("SKIPPED"), Some(0)), "{shown}");
    }
    let everything = [
        ("daily", "ana", mic(), [None, Some("2"), None], 2),
        ("daily", "stream", mic(), [None, Some("2"), None], 2),
        ("daily", "phone", mic(), [Some("false"), Some("2"), None], 2),
        ("daily", "bob", screen_audio(), [None, Some("0.5"), None], 2),
        ("mono-1", "ana", mic(), [None, Some("2"), Some("mono")], 1),
    ];
    for (room, identity, track, said, channels) in everything {
        let meeting = livekit.start_room(room).await;
        let track = livekit.publish(room, identity, track).await;
        let query = livekit.streaming(&track).await.query;
        let found = ["analyse", "groupSeconds", "mix"].map(|name| query.get(name).map(String::as_str));
        assert_eq!(found, said, "{room} {identity}");
        // The first group is whole, and says what became of it.
        let mark = format!("track=\"{track}\" sequence=1 ");
        let line = async || app.pipeline_log(&meeting).lines().find(|line| line.contains(&mark)).map(str::to_owned);
        let line = app.eventually(&format!("a group of {identity}"), line).await;
        let milliseconds = said[1].unwrap().parse::<f64>().unwrap() * 1_000.0;
        assert!(line.contains(&format!("duration_ms={milliseconds} ")), "{line}");
        assert_eq!(line.contains("the connection asked for none"), said[0] == Some("false"), "{line}");

        livekit.unpublish(&track).await;
        until(&app, &track, "ENDED").await;
        let ended = async || {
            let recordings = app.items(&format!("/api/v1/recordings?meetingId={meeting}")).await;
            recordings.into_iter().find(|recording| recording["trackSid"] == *track && recording["endedAt"].is_string())
        };
        let recording = app.eventually("the recording's end", ended).await;
        assert_eq!(recording["segments"][0]["channels"].as_i64(), Some(channels), "{recording}");
    }
    let mono = app.wav_files().into_iter().find(|path| path.to_string_lossy().contains("mono-1")).expect("a file of that room");
    let (spec, pcm) = read_wav(&mono);
    assert_eq!((spec.channels, spec.sample_rate), (1, 48_000));
    assert!(!pcm.is_empty());
    assert_eq!(livekit.calls(Method::StartTrackEgress), 5);
}

#[tokio::test]
async fn a_kind_that_no_webhook_told_is_asked_for_before_a_rule_decides() {
    let (livekit, app) = ruled().await;
    livekit.filter_webhooks(|event| if event == "participant_joined" { Verdict::Drop } else { Verdict::Deliver });
    livekit.join("daily", person("agent").kind(Kind::Agent)).await;
    livekit.join("daily", person("phone").kind(Kind::Sip)).await;
    livekit.join("daily", person("ana")).await;
    let of_agent = livekit.publish("daily", "agent", mic()).await;
    let of_phone = livekit.publish("daily", "phone", mic()).await;
    let of_ana = livekit.publish("daily", "ana", mic()).await;
    left_alone(&app, &of_agent).await;
    for (track, analyse) in [(&of_phone, Some("false")), (&of_ana, None)] {
        let query = livekit.streaming(track).await.query;
        assert_eq!(query.get("analyse").map(String::as_str), analyse);
    }
    assert_eq!(livekit.calls(Method::StartTrackEgress), 2);
}

#[tokio::test]
async fn a_kind_that_cannot_be_asked_for_now_is_waited_for() {
    use crate::support::fake_livekit::Fault;
    let (livekit, app) = ruled().await;
    livekit.filter_webhooks(|event| if event == "participant_joined" { Verdict::Drop } else { Verdict::Deliver });
    livekit.fail(Method::ListParticipants, Fault::Unavailable);
    livekit.join("daily", person("agent").kind(Kind::Agent)).await;
    let of_agent = livekit.publish("daily", "agent", mic()).await;
    let of_ana = livekit.publish("daily", "ana", mic()).await;
    for track in [&of_agent, &of_ana] {
        super::troubles::put_off(&app, track, "busy").await;
    }
    assert_eq!(livekit.calls(Method::StartTrackEgress), 0, "an agent is not recorded on suspicion");
    livekit.clear(Method::ListParticipants);
    left_alone(&app, &of_agent).await;
    until(&app, &of_ana, "ACTIVE").await;
    assert_eq!(livekit.calls(Method::StartTrackEgress), 1);
}

#[tokio::test]
async fn an_operator_has_a_track_recorded_that_a_rule_leaves_alone() {
    let (livekit, app) = ruled().await;
    let track = livekit.publish("daily", "quiet-1", mic()).await;
    left_alone(&app, &track).await;
    let answer = app.post(&format!("/api/v1/rooms/daily/tracks/{track}/record"), json!({})).await;
    assert_eq!(answer.status, 202);
    let queued = answer.json();
    assert_eq!((queued["trackSid"].as_str(), queued["participant"].as_str()), (Some(&*track), Some("quiet-1")), "{queued}");
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!((shown.len(), &shown[0]["state"], &shown[1]["id"]), (2, &json!("SKIPPED"), &queued["id"]));
    // Said once more, it changes nothing.
    assert_eq!(app.post(&format!("/api/v1/rooms/daily/tracks/{track}/record"), json!({})).await.json()["id"], queued["id"]);
    streamed(&livekit, &track, std::time::Duration::from_millis(200)).await;
    files(&app, 1).await;
    assert_eq!(livekit.calls(Method::StartTrackEgress), 1);
}
