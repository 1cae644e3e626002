//! What operators see of egresses, and what they say to them.

use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::Text;
use livekit_protocol::EgressStatus;
use serde_json::{Value, json};

use super::starting::ended_with_its_track;
use super::{autopilot, builder, egresses, streamed, until};
use crate::support::fake_livekit::{End, FakeLiveKit, Fault, Method, Script, mic};
use crate::support::test_app::TestApp;

async fn say(app: &TestApp, track: &str, word: &str) {
    let answer = app.post(&format!("/api/v1/rooms/standup/tracks/{track}/{word}"), json!({})).await;
    assert_eq!(answer.status, 202, "{}", String::from_utf8_lossy(&answer.body));
}

/// Waits until the server has looked at LiveKit twice from now on.
async fn looked_twice(livekit: &FakeLiveKit) {
    let looks = livekit.calls(Method::ListRooms);
    livekit.eventually("two more looks", |livekit| (livekit.calls(Method::ListRooms) >= looks + 3).then_some(())).await;
}

/// Waits until no egress of a track runs at LiveKit.
async fn none_runs(livekit: &FakeLiveKit, track: &str) {
    livekit.eventually("no egress", |livekit| livekit.active_for(track).is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_stopped_track_is_left_alone_until_it_is_to_be_recorded_again() {
    let (livekit, app) = autopilot().await;
    let track = livekit.publish("standup", "ana", mic()).await;
    until(&app, &track, "ACTIVE").await;
    streamed(&livekit, &track, Duration::from_millis(300)).await;
    say(&app, &track, "stop").await;
    let shown = until(&app, &track, "ENDED").await;
    assert_eq!((shown.len(), shown[0]["endReason"].as_str()), (1, Some("stopped")));
    none_runs(&livekit, &track).await;
    let stopped = &livekit.egresses()[0];
    assert_eq!((stopped.status, stopped.details.as_str()), (EgressStatus::EgressComplete, "End reason: StopEgress API"));

    // Neither looks at LiveKit nor webhooks nor a new server bring it back.
    looked_twice(&livekit).await;
    livekit.publish("standup", "ana", mic().name("second")).await;
    let app = app.kill().await.restart().await;
    livekit.deliver_to(app.addr);
    looked_twice(&livekit).await;
    assert_eq!((egresses(&app, &track).await.len(), livekit.active_for(&track).len()), (1, 0));

    say(&app, &track, "record").await;
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!((shown.len(), shown[1]["restarts"].as_i64()), (2, Some(0)));
    let audio = livekit.sent_pcm(&track)[0].duration();
    streamed(&livekit, &track, audio + Duration::from_millis(300)).await;
    livekit.unpublish(&track).await;
    ended_with_its_track(&app, &track).await;
    let steps = transitions(&app).await;
    assert_eq!(steps.iter().filter(|step| ["stopWanted", "recordWanted"].contains(&&***step)).count(), 2, "{steps:?}");
}

#[derive(QueryableByName)]
struct Line {
    #[diesel(sql_type = Text)]
    text: String,
}

fn texts(app: &TestApp, sql: &str) -> Vec<String> {
    let lines: Vec<Line> = diesel::sql_query(sql).load(&mut app.database()).unwrap();
    lines.into_iter().map(|line| line.text).collect()
}

async fn transitions(app: &TestApp) -> Vec<String> {
    texts(app, "SELECT step AS text FROM transitions")
}

#[tokio::test]
async fn a_track_that_is_stopped_while_livekit_is_asked_is_stopped_there_too() {
    let (livekit, app) = autopilot().await;
    livekit.fail_next(Method::StartTrackEgress, Fault::Slow(Duration::from_secs(2)), 1);
    livekit.tune(|knobs| knobs.hold_dials = true);
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.eventually("the start", |livekit| (livekit.egresses().len() == 1).then_some(())).await;
    say(&app, &track, "stop").await;
    assert_eq!(until(&app, &track, "ENDED").await[0]["endReason"], "stopped");
    none_runs(&livekit, &track).await;
    looked_twice(&livekit).await;
    assert_eq!((livekit.calls(Method::StartTrackEgress), egresses(&app, &track).await.len()), (1, 1));
    assert!(app.wav_files().is_empty());
}

#[tokio::test]
async fn a_stop_that_livekit_did_not_hear_is_said_again() {
    let (livekit, app) = autopilot().await;
    let track = livekit.publish("standup", "ana", mic()).await;
    until(&app, &track, "ACTIVE").await;
    livekit.fail_next(Method::StopEgress, Fault::Close, 4);
    say(&app, &track, "stop").await;
    none_runs(&livekit, &track).await;
    assert_eq!(until(&app, &track, "ENDED").await[0]["endReason"], "stopped");
    looked_twice(&livekit).await;
    assert_eq!(livekit.calls(Method::StartTrackEgress), 1);
}

#[tokio::test]
async fn a_track_that_is_wanted_again_while_its_egress_still_ends_is_recorded() {
    let (livekit, app) = autopilot().await;
    livekit.tune(|knobs| knobs.trailing = Duration::from_secs(1));
    let track = livekit.publish("standup", "ana", mic()).await;
    until(&app, &track, "ACTIVE").await;
    streamed(&livekit, &track, Duration::from_millis(300)).await;
    say(&app, &track, "stop").await;
    say(&app, &track, "record").await;
    let wanted = app
        .eventually("one egress, and not the first", async || {
            let running = livekit.active_for(&track);
            let last = egresses(&app, &track).await.pop()?;
            let is_it = running.len() == 1 && running[0].connected && last["egressId"] == *running[0].id && last["state"] == "ACTIVE";
            (is_it && running[0].id != livekit.egresses()[0].id).then(|| running[0].id.clone())
        })
        .await;
    let sent = livekit.sent_pcm(&wanted)[0].duration();
    livekit.eventually("more audio", |livekit| (livekit.sent_pcm(&wanted)[0].duration() > sent + Duration::from_millis(200)).then_some(())).await;
}

#[tokio::test]
async fn a_track_that_waits_is_stopped_without_a_call() {
    let (livekit, app) = autopilot().await;
    livekit.fail(Method::StartTrackEgress, Fault::Unavailable);
    let track = livekit.publish("standup", "ana", mic()).await;
    super::troubles::put_off(&app, &track, "busy").await;
    say(&app, &track, "stop").await;
    let shown = until(&app, &track, "ENDED").await;
    assert_eq!((shown.len(), shown[0]["endReason"].as_str()), (1, Some("stopped")));
    livekit.clear(Method::StartTrackEgress);
    looked_twice(&livekit).await;
    assert!(livekit.egresses().is_empty());
}

#[tokio::test]
async fn a_track_that_no_webhook_told_of_is_found_when_an_operator_names_it() {
    let livekit = FakeLiveKit::start().await;
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__RECONCILE_INTERVAL", "10m").start().await;
    livekit.eventually("the first look", |livekit| (livekit.calls(Method::ListEgress) >= 1).then_some(())).await;
    let track = livekit.publish("standup", "ana", mic()).await;
    say(&app, &track, "stop").await;
    let other = livekit.publish("standup", "bob", mic()).await;
    livekit.deliver_to(app.addr);
    say(&app, &other, "record").await;
    until(&app, &other, "ACTIVE").await;
    assert!(livekit.active_for(&track).is_empty());
}

#[tokio::test]
async fn an_ended_session_stays_ended_and_its_egresses_stop() {
    let (livekit, app) = autopilot().await;
    let room = livekit.start_room("standup").await;
    let first = livekit.publish("standup", "ana", mic()).await;
    let second = livekit.publish("standup", "bob", mic()).await;
    let elsewhere = livekit.publish("other", "eve", mic()).await;
    for track in [&first, &second, &elsewhere] {
        until(&app, track, "ACTIVE").await;
    }
    livekit.fail(Method::StartTrackEgress, Fault::Unavailable);
    let waiting = livekit.publish("standup", "joe", mic()).await;
    super::troubles::put_off(&app, &waiting, "busy").await;
    let path = format!("/api/v1/sessions/{room}/end");
    let answer = app.post(&path, json!({})).await;
    assert_eq!((answer.status, answer.json()["status"].as_str()), (200, Some("ENDED")), "{}", answer.json());
    livekit.clear(Method::StartTrackEgress);
    for track in [&first, &second, &waiting] {
        let shown = until(&app, track, "ENDED").await;
        assert_eq!((shown.len(), shown[0]["endReason"].as_str()), (1, Some("sessionEnded")));
        none_runs(&livekit, track).await;
    }
    let asked = livekit.calls(Method::StartTrackEgress);

    // The room goes on at LiveKit, and says so.
    let late = livekit.publish("standup", "zoe", mic()).await;
    livekit.unpublish(&second).await;
    livekit.webhooks_delivered().await;
    looked_twice(&livekit).await;
    let session = app.get_json(&format!("/api/v1/sessions/{room}")).await;
    assert_eq!(session["status"], "ENDED");
    assert!(egresses(&app, &late).await.is_empty());
    assert_eq!(livekit.calls(Method::StartTrackEgress), asked);
    assert_eq!(livekit.active_for(&elsewhere).len(), 1, "another room's egress is left alone");
    let again = app.post(&path, json!({})).await.json();
    assert_eq!(again["endedAt"], session["endedAt"], "the first end stays");
    let of_ended = app.post(&format!("/api/v1/rooms/standup/tracks/{late}/record"), json!({})).await;
    of_ended.assert_problem(404, "notFound");

    // The next life of the room is another session.
    livekit.finish_room("standup").await;
    let next = livekit.publish("standup", "ana", mic()).await;
    assert_ne!(until(&app, &next, "ACTIVE").await[0]["meetingId"].as_str(), Some(&*room));
}

#[tokio::test]
async fn an_egress_of_an_ended_session_is_stopped_even_if_livekit_did_not_hear_it() {
    let (livekit, app) = autopilot().await;
    let room = livekit.start_room("standup").await;
    let track = livekit.publish("standup", "ana", mic()).await;
    until(&app, &track, "ACTIVE").await;
    livekit.fail(Method::StopEgress, Fault::Close);
    assert_eq!(app.post(&format!("/api/v1/sessions/{room}/end"), json!({})).await.status, 200);
    livekit.eventually("many stops in vain", |livekit| (livekit.calls(Method::StopEgress) >= 4).then_some(())).await;
    livekit.clear(Method::StopEgress);
    none_runs(&livekit, &track).await;
    assert_eq!(until(&app, &track, "ENDED").await[0]["endReason"], "sessionEnded");
}

#[tokio::test]
async fn what_is_unknown_or_wrong_is_told() {
    let (livekit, app) = autopilot().await;
    let track = livekit.publish("standup", "ana", mic()).await;
    until(&app, &track, "ACTIVE").await;
    for path in ["/api/v1/rooms/standup/tracks/TR_none", &format!("/api/v1/rooms/elsewhere/tracks/{track}")] {
        for word in ["record", "stop"] {
            app.post(&format!("{path}/{word}"), json!({})).await.assert_problem(404, "notFound");
        }
    }
    app.post("/api/v1/sessions/RM_none/end", json!({})).await.assert_problem(404, "notFound");
    for query in ["state=ALIVE", "state=active", "limit=0", "cursor=x"] {
        app.get(&format!("/api/v1/egresses?{query}")).await.assert_problem(400, "invalidRequest");
    }
    let routes = [
        "GET /api/v1/egresses",
        "POST /api/v1/rooms/standup/tracks/TR_1/record",
        "POST /api/v1/rooms/standup/tracks/TR_1/stop",
        "POST /api/v1/sessions/RM_1/end",
    ];
    for (method, path) in routes.map(|route| route.split_once(' ').unwrap()) {
        app.request(method, path, &[], b"").await.assert_problem(401, "unauthorized");
    }
    assert_eq!(until(&app, &track, "ACTIVE").await.len(), 1);
}

#[tokio::test]
async fn without_the_autopilot_nothing_is_started_and_operators_are_told() {
    let livekit = FakeLiveKit::start().await;
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__AUTOPILOT", "false").start().await;
    livekit.deliver_to(app.addr);
    let room = livekit.start_room("standup").await;
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.webhooks_delivered().await;
    for word in ["record", "stop"] {
        app.post(&format!("/api/v1/rooms/standup/tracks/{track}/{word}"), json!({})).await.assert_problem(409, "autopilotOff");
    }
    looked_twice(&livekit).await;
    assert!(app.items("/api/v1/egresses").await.is_empty());
    assert_eq!(livekit.calls(Method::StartTrackEgress), 0);
    let ended = app.post(&format!("/api/v1/sessions/{room}/end"), json!({})).await;
    assert_eq!((ended.status, ended.json()["status"].as_str()), (200, Some("ENDED")));
}

#[tokio::test]
async fn egresses_are_listed_newest_first_by_filter_and_page() {
    let (livekit, app) = autopilot().await;
    let meeting = livekit.start_room("standup").await;
    let mut tracks = Vec::new();
    for (room, identity) in [("standup", "ana"), ("standup", "bob"), ("other", "eve"), ("standup", "joe"), ("other", "zoe")] {
        let track = livekit.publish(room, identity, mic()).await;
        until(&app, &track, "ACTIVE").await;
        tracks.push(track);
    }
    livekit.unpublish(&tracks[1]).await;
    until(&app, &tracks[1], "ENDED").await;
    let listed = async |query: &str| -> Vec<usize> {
        let items = app.items(&format!("/api/v1/egresses?{query}")).await;
        items.iter().map(|item| tracks.iter().position(|track| item["trackSid"] == **track).unwrap()).collect()
    };
    let table = [
        ("", vec![4, 3, 2, 1, 0]),
        ("state=ACTIVE", vec![4, 3, 2, 0]),
        ("state=ENDED", vec![1]),
        ("state=QUEUED", vec![]),
        ("roomName=other", vec![4, 2]),
        ("roomName=standup&state=ACTIVE", vec![3, 0]),
        (&*format!("meetingId={meeting}"), vec![3, 1, 0]),
        (&*format!("trackSid={}", tracks[2]), vec![2]),
        ("trackSid=TR_none", vec![]),
        ("state=&roomName=", vec![4, 3, 2, 1, 0]),
    ];
    for (query, expected) in table {
        assert_eq!(listed(query).await, expected, "{query}");
    }
    let (mut cursor, mut pages) = (String::new(), Vec::new());
    loop {
        let page = app.get_json(&format!("/api/v1/egresses?limit=2&cursor={cursor}")).await;
        let items = page["items"].as_array().unwrap();
        pages.push(items.iter().map(|item| item["trackSid"].as_str().unwrap().to_owned()).collect::<Vec<_>>());
        match page["nextCursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
    assert!(pages.concat().iter().eq(tracks.iter().rev()), "{pages:?}");
    app.get(&format!("/api/v1/sessions?cursor={cursor}")).await.assert_problem(400, "invalidRequest");
}

#[tokio::test]
async fn no_ticket_and_no_url_of_ours_reaches_a_log_a_row_or_an_answer() {
    let livekit = FakeLiveKit::start().await;
    livekit.pace(4.0);
    let app = builder(&livekit).env("RUST_LOG", "trace").env("LIVE_MEETING__LIVEKIT__REQUEST_TIMEOUT", "1s").start().await;
    livekit.deliver_to(app.addr);
    let room = livekit.start_room("standup").await;
    let track = livekit.publish("standup", "ana", mic()).await;
    let url = livekit.streaming(&track).await.url;
    // LiveKit's errors hold the URL as well.
    livekit.end_egress(&track, End::failed(format!("dial {url}: connection refused, \"{url}\" and {}", url.replace("ws://", "wss://")), 503)).await;
    app.eventually("another egress", async || (egresses(&app, &track).await.len() == 2).then_some(())).await;
    until(&app, &track, "ACTIVE").await;
    livekit.script_next(Script::DieBeforeDial);
    livekit.fail_next(Method::StartTrackEgress, Fault::CloseButRun, 1);
    let other = livekit.publish("standup", "bob", mic()).await;
    until(&app, &other, "ACTIVE").await;
    streamed(&livekit, &other, Duration::from_millis(200)).await;
    livekit.unpublish(&track).await;
    livekit.finish_room("standup").await;
    for track in [&track, &other] {
        until(&app, track, "ENDED").await;
    }
    livekit.webhooks_delivered().await;
    let tickets: Vec<String> = livekit.egresses().iter().map(|egress| egress.query["ticket"].clone()).collect();
    assert!(tickets.len() >= 3);
    let told = livekit.deliveries().iter().filter(|delivery| String::from_utf8_lossy(&delivery.body).contains(&tickets[0])).count();
    assert!(told >= 2, "LiveKit's webhooks hold the ticket");

    let mut kept = vec![("the log", app.log())];
    for path in ["egresses?limit=200", "recordings", "sessions", &format!("sessions/{room}"), &format!("sessions/{room}/tracks"), "tracks/live"] {
        let answer = app.get(&format!("/api/v1/{path}")).await;
        kept.push(("an answer", String::from_utf8(answer.body).unwrap()));
    }
    let tables = texts(&app, "SELECT name AS text FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'");
    assert!(["webhook_events", "egresses", "recordings"].iter().all(|table| tables.iter().any(|known| known == table)), "{tables:?}");
    for table in tables {
        let columns = texts(&app, &format!("SELECT name AS text FROM pragma_table_info('{table}')"));
        let all = columns.iter().map(|column| format!("coalesce(CAST(\"{column}\" AS TEXT), '')")).collect::<Vec<_>>().join(" || ' ' || ");
        kept.extend(texts(&app, &format!("SELECT {all} AS text FROM \"{table}\"")).into_iter().map(|row| ("a row", row)));
    }
    for file in walk(app.dir.path()).into_iter().filter(|path| !path.to_string_lossy().contains("live-meeting.db")) {
        kept.push(("a file", String::from_utf8_lossy(&std::fs::read(&file).unwrap()).into_owned()));
    }
    assert!(kept.iter().any(|(_, text)| text.contains("egress_ended") && text.contains("{...}")), "the events are kept, without the URL");
    for (place, text) in kept {
        for secret in tickets.iter().map(String::as_str).chain(["egress-audio?", "ticket=v1"]) {
            assert!(!text.contains(secret), "{place} has {secret:?}: {}", text.chars().take(2_000).collect::<String>());
        }
    }
    let ids: Vec<Value> = app.items("/api/v1/egresses").await;
    assert!(ids.iter().any(|egress| egress["lastError"].as_str().is_some_and(|error| error.contains("connection refused"))), "{ids:?}");
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
