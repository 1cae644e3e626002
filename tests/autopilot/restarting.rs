//! An egress that is lost while its track goes on is replaced, and what it brings continues the recording.

use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;

use super::looking::{assert_joined, column, end_reasons, ended, is_stopped, looks, patiently, segments_are, sent, starts, stopped, streaming_anew};
use super::{autopilot, builder, egresses, recorded, streamed, until};
use crate::support::fake_livekit::{End, FakeLiveKit, Fault, Method, Script, Verdict, mic, screen_audio};
use crate::support::test_app::TestApp;

/// Another egress is promised to be asked for within 2 s; four times that decide.
const PROMISED: Duration = Duration::from_secs(8);
const SOME_AUDIO: Duration = Duration::from_millis(200);

/// The same as `autopilot`, in real time: gaps are as long as they are.
async fn in_real_time() -> (FakeLiveKit, TestApp) {
    let (livekit, app) = autopilot().await;
    livekit.pace(1.0);
    (livekit, app)
}

/// With the shortest patience for silent connections.
async fn impatient() -> (FakeLiveKit, TestApp) {
    let livekit = FakeLiveKit::start().await;
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__RESTART_AFTER", "5s").start().await;
    livekit.deliver_to(app.addr);
    (livekit, app)
}

#[tokio::test]
async fn a_lost_track_does_not_wait_behind_new_ones_that_no_node_takes() {
    let (livekit, app) = autopilot().await;
    let lost = livekit.publish("standup", "ana", mic()).await;
    let first = livekit.streaming(&lost).await;
    until(&app, &lost, "ACTIVE").await;
    // One start is allowed at a time after so many refusals, and that one is not answered.
    livekit.fail_next(Method::StartTrackEgress, Fault::Unavailable, 3);
    livekit.fail_next(Method::StartTrackEgress, Fault::Hang, 1);
    livekit.publish("standup", "bo", mic()).await;
    livekit.eventually("a start that hangs", |livekit| (livekit.calls(Method::StartTrackEgress) == 5).then_some(())).await;
    let at = Instant::now();
    livekit.crash_egress(&first.id).await;
    streaming_anew(&livekit, &lost, &[&*first.id]).await;
    let asked = starts(&livekit, &lost);
    assert!(asked[1] - at < PROMISED, "{:?}", asked[1] - at);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i5_every_end_of_an_egress_whose_track_goes_on_is_followed_by_another_one_of_the_same_recording() {
    let (livekit, app) = in_real_time().await;
    let ends = [
        ("crash", End::Crash),
        ("reset", End::Reset),
        ("closed", End::SourceClosed),
        ("aborted", End::Aborted),
        ("limit", End::LimitReached),
        ("roomLost", End::RoomLost),
        ("failed", End::failed("a pipeline that broke", 500)),
    ];
    let mut tracks = Vec::new();
    for (name, end) in ends {
        let track = livekit.publish("standup", name, mic()).await;
        let first = livekit.streaming(&track).await;
        tracks.push((name, end, track, first));
    }
    for (name, end, track, first) in &tracks {
        streamed(&livekit, track, SOME_AUDIO).await;
        until(&app, track, "ACTIVE").await;
        let at = Instant::now();
        livekit.end_egress(&first.id, end.clone()).await;
        let second = streaming_anew(&livekit, track, &[&*first.id]).await;
        let asked = starts(&livekit, track);
        assert_eq!(asked.len(), 2, "{name}");
        assert!(asked[1] - at < PROMISED, "{name}: {:?}", asked[1] - at);
        assert_ne!(first.query["ticket"], second.query["ticket"], "{name}");
        stopped(&livekit, &first.id).await;
    }
    for (name, _, track, first) in &tracks {
        streamed(&livekit, track, livekit.sent_pcm(&first.id)[0].duration() + SOME_AUDIO).await;
        livekit.unpublish(track).await;
        let recording = ended(&app, name, 2).await;
        let orderly = ["closed", "aborted", "limit", "roomLost"].contains(name);
        let first_end = end_reasons(&recording)[0];
        assert!(if orderly { first_end == "closed" } else { ["lost", "superseded"].contains(&first_end) }, "{name}: {recording}");
        assert_joined(&app, &recording, &sent(&livekit, track)).await;
        let shown = until(&app, track, "ENDED").await;
        assert_eq!((shown.len(), shown[0]["endReason"].as_str(), shown[1]["restarts"].as_i64()), (2, Some("replaced"), Some(1)), "{name}");
        assert_eq!(shown[1]["endReason"], "trackEnded", "{name}");
    }
    assert_eq!(app.items("/api/v1/recordings").await.len(), tracks.len());
}

#[tokio::test]
async fn an_egress_that_dies_before_it_dials_is_replaced() {
    let (livekit, app) = autopilot().await;
    livekit.script_next(Script::DieBeforeDial);
    let at = Instant::now();
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.streaming(&track).await;
    let asked = starts(&livekit, &track);
    assert_eq!(asked.len(), 2);
    assert!(asked[1] - at < PROMISED, "{:?}", asked[1] - at);

    // Also when nobody tells of its end.
    livekit.filter_webhooks(|event| if event.starts_with("egress_") { Verdict::Drop } else { Verdict::Deliver });
    livekit.script_next(Script::DieBeforeDial);
    let other = livekit.publish("standup", "bo", mic()).await;
    livekit.streaming(&other).await;
    assert_eq!(starts(&livekit, &other).len(), 2);
    assert_eq!(until(&app, &other, "ACTIVE").await[0]["endReason"], "replaced");
}

#[tokio::test]
async fn an_egress_whose_end_is_told_before_its_start_is_answered_is_replaced() {
    let livekit = FakeLiveKit::start().await;
    // No look finds it missing.
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__RECONCILE_INTERVAL", "10m").start().await;
    livekit.deliver_to(app.addr);
    livekit.script_next(Script::DieBeforeDial);
    livekit.fail_next(Method::StartTrackEgress, Fault::Slow(Duration::from_secs(1)), 1);
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.streaming(&track).await;
    let asked = starts(&livekit, &track);
    assert_eq!(asked.len(), 2);
    assert!(asked[1] - asked[0] < Duration::from_secs(1) + PROMISED, "{:?}", asked[1] - asked[0]);
    assert_eq!(until(&app, &track, "ACTIVE").await[0]["endReason"], "replaced");
}

#[tokio::test]
async fn an_egress_that_never_dials_is_stopped_and_replaced() {
    let (livekit, app) = impatient().await;
    livekit.script_next(Script::NeverDial);
    let track = livekit.publish("standup", "ana", mic()).await;
    let first = livekit.eventually("the first", |livekit| livekit.egresses().first().cloned()).await;
    patiently(&app, "its replacement", async || is_stopped(&livekit, &first.id).then_some(())).await;
    let second = livekit.streaming(&track).await;
    assert_ne!(first.id, second.id);
    let asked = starts(&livekit, &track);
    // Twice what may pass without audio.
    assert!(asked.len() == 2 && asked[1] - asked[0] >= Duration::from_secs(10), "{asked:?}");
}

#[tokio::test]
async fn silence_on_the_wire_is_a_stall_and_muted_zeros_are_none() {
    let (livekit, app) = impatient().await;
    let muted = livekit.publish("standup", "muted", mic().muted()).await;
    livekit.streaming(&muted).await;
    livekit.script_next(Script::Stall);
    let mute_from_the_start = livekit.publish("standup", "ana", mic()).await;
    let from_the_start = livekit.streaming(&mute_from_the_start).await;
    let broken = livekit.publish("standup", "bo", mic()).await;
    let in_mid_stream = livekit.streaming(&broken).await;
    streamed(&livekit, &broken, SOME_AUDIO).await;
    livekit.stall_egress(&broken);
    let at = Instant::now();
    for (track, first) in [(&mute_from_the_start, &from_the_start), (&broken, &in_mid_stream)] {
        streaming_anew(&livekit, track, &[&*first.id]).await;
        stopped(&livekit, &first.id).await;
        let asked = starts(&livekit, track);
        assert!(asked.len() == 2 && asked[1] - asked[0] >= Duration::from_secs(5), "{asked:?}");
        assert!(asked[1] - at < Duration::from_secs(5) + PROMISED, "{:?}", asked[1] - at);
    }
    assert_eq!(starts(&livekit, &muted).len(), 1);
    assert_eq!((until(&app, &muted, "ACTIVE").await.len(), livekit.active_for(&muted).len()), (1, 1));
    streamed(&livekit, &broken, livekit.sent_pcm(&broken)[0].duration() + SOME_AUDIO).await;
    livekit.unpublish(&broken).await;
    let recording = ended(&app, "bo", 2).await;
    assert_eq!(end_reasons(&recording), ["superseded", "closed"]);
    assert_joined(&app, &recording, &sent(&livekit, &broken)).await;
}

#[tokio::test]
async fn a_second_connection_of_the_same_egress_changes_nothing() {
    let (livekit, app) = autopilot().await;
    livekit.script_next(Script::DialTwice);
    let track = livekit.publish("standup", "ana", mic()).await;
    let twice = |livekit: &FakeLiveKit| livekit.active_for(&track).into_iter().find(|egress| egress.handshakes.len() == 2);
    let egress = livekit.eventually("the second handshake", twice).await;
    assert!(egress.handshakes.contains(&101) && egress.handshakes.iter().any(|status| *status >= 400), "{egress:?}");
    streamed(&livekit, &track, SOME_AUDIO).await;
    looks(&livekit, 2).await;
    livekit.unpublish(&track).await;
    assert_joined(&app, &recorded(&app, 1).await, &sent(&livekit, &track)).await;
    assert_eq!(starts(&livekit, &track).len(), 1);
}

#[tokio::test]
async fn an_egress_that_dies_again_and_again_is_replaced_later_and_later_and_its_recording_is_whole() {
    let (livekit, app) = in_real_time().await;
    for _ in 0..4 {
        livekit.script_next(Script::EndAfter(Duration::from_millis(100), End::Crash));
    }
    let track = livekit.publish("standup", "ana", mic()).await;
    let last = patiently(&app, "the fifth", async || {
        livekit
            .active_for(&track)
            .into_iter()
            .find(|egress| livekit.egresses().len() == 5 && livekit.sent_pcm(&egress.id)[0].duration() >= SOME_AUDIO)
    })
    .await;
    livekit.unpublish(&track).await;
    let recording = recorded(&app, 5).await;
    assert_joined(&app, &recording, &sent(&livekit, &track)).await;
    assert!(livekit.egresses().iter().all(|egress| egress.id == last.id || is_stopped(&livekit, &egress.id)));
    // At once for the first time, then within 1, 2, 4 s.
    let waits =
        "SELECT printf('%d', (julianday(due_at) - julianday(created_at)) * 86400000) AS value FROM egresses WHERE restarts > 0 ORDER BY restarts";
    let waits: Vec<i64> = column(&app, waits).iter().map(|wait| wait.parse().unwrap()).collect();
    assert_eq!(waits.len(), 4);
    for (wait, most) in waits.iter().zip([0, 1_000, 2_000, 4_000]) {
        assert!((-5..=most + 5).contains(wait), "{waits:?}");
    }
    let asked = starts(&livekit, &track);
    for (pair, wait) in asked.windows(2).zip(&waits) {
        assert!(pair[1] - pair[0] >= Duration::from_millis(wait.saturating_sub(5).try_into().unwrap_or(0)), "{waits:?}");
    }
}

#[tokio::test]
async fn past_ten_restarts_in_five_minutes_the_next_one_waits_until_the_first_is_that_old() {
    let (livekit, app) = autopilot().await;
    let track = livekit.publish("standup", "ana", mic()).await;
    let first = livekit.streaming(&track).await;
    until(&app, &track, "ACTIVE").await;
    streamed(&livekit, &track, SOME_AUDIO).await;
    let columns = "track_id, state, server_id, attempts, restarts, created_at, due_at, ended_at, end_reason";
    let ago = "strftime('%Y-%m-%d %H:%M:%f', 'now', '-100 seconds')";
    for restart in 1..=10 {
        let old =
            format!("SELECT 'old-{restart}', track_id, 'ENDED', server_id, 1, {restart}, {ago}, {ago}, {ago}, 'replaced' FROM egresses LIMIT 1");
        app.database().batch_execute(&format!("INSERT INTO egresses (id, {columns}) {old}")).unwrap();
    }
    livekit.crash_egress(&track).await;
    let shown = until(&app, &track, "QUEUED").await;
    app.logged("again and again").await;
    stopped(&livekit, &first.id).await;
    let wait = "SELECT printf('%d', (julianday(due_at) - julianday(created_at)) * 86400) AS value FROM egresses WHERE ended_at IS NULL";
    let wait: i64 = column(&app, wait)[0].parse().unwrap();
    assert!((150..=201).contains(&wait), "{wait}: {shown:?}");
    assert!(shown.last().unwrap()["lastError"].is_string(), "{shown:?}");
    looks(&livekit, 3).await;
    assert_eq!((starts(&livekit, &track).len(), egresses(&app, &track).await.len()), (1, 12));
    // What was recorded stays, and the track's end takes the start back.
    livekit.unpublish(&track).await;
    assert_eq!(until(&app, &track, "ENDED").await.last().unwrap()["endReason"], "trackEnded");
    assert_joined(&app, &recorded(&app, 1).await, &sent(&livekit, &track)).await;
}

#[tokio::test]
async fn a_publisher_that_comes_back_under_another_sid_goes_on_with_its_recording() {
    let (livekit, app) = in_real_time().await;
    // LiveKit drains what it has: the new egress comes before the old one's Close.
    livekit.tune(|knobs| knobs.trailing = Duration::from_secs(1));
    let first = livekit.publish("standup", "ana", mic()).await;
    livekit.streaming(&first).await;
    streamed(&livekit, &first, SOME_AUDIO).await;
    until(&app, &first, "ACTIVE").await;
    let recording = app.eventually("a recording", async || app.items("/api/v1/recordings").await.pop()).await;
    let second = livekit.rejoin("standup", "ana").await.remove(0);
    livekit.streaming(&second).await;
    streamed(&livekit, &second, SOME_AUDIO).await;
    assert_eq!(until(&app, &first, "ENDED").await[0]["endReason"], "trackEnded");
    livekit.unpublish(&second).await;
    let whole = recorded(&app, 2).await;
    assert_eq!((&whole["id"], whole["trackSid"].as_str()), (&recording["id"], Some(&*first)));
    segments_are(&app, &[format!("{first},{second}")]).await;
    assert_joined(&app, &whole, &[sent(&livekit, &first), sent(&livekit, &second)].concat()).await;
}

#[tokio::test]
async fn a_publisher_whose_leaving_nobody_told_goes_on_with_its_recording() {
    let (livekit, app) = in_real_time().await;
    livekit.filter_webhooks(|event| if event.ends_with("published") || event == "room_started" { Verdict::Deliver } else { Verdict::Drop });
    let first = livekit.publish("standup", "ana", mic()).await;
    livekit.streaming(&first).await;
    streamed(&livekit, &first, SOME_AUDIO).await;
    livekit.filter_webhooks(|event| if event == "track_published" { Verdict::Deliver } else { Verdict::Drop });
    livekit.leave("standup", "ana").await;
    until(&app, &first, "ENDED").await;
    let second = livekit.publish("standup", "ana", mic()).await;
    livekit.streaming(&second).await;
    streamed(&livekit, &second, SOME_AUDIO).await;
    segments_are(&app, &[format!("{first},{second}")]).await;
}

#[tokio::test]
async fn two_microphones_at_once_and_another_source_are_recordings_of_their_own() {
    let (livekit, app) = in_real_time().await;
    let waiting = livekit.publish("standup", "ana", mic()).await;
    livekit.streaming(&waiting).await;
    streamed(&livekit, &waiting, SOME_AUDIO).await;
    app.eventually("the first recording", async || (app.items("/api/v1/recordings").await.len() == 1).then_some(())).await;
    // Its next egress is on its way when the second microphone comes, so the first has no open file.
    livekit.script_next(Script::NeverDial);
    livekit.crash_egress(&waiting).await;
    livekit.eventually("the second start", |livekit| (starts(livekit, &waiting).len() == 2).then_some(())).await;
    let second = livekit.publish("standup", "ana", mic().name("headset")).await;
    let screen = livekit.publish("standup", "ana", screen_audio()).await;
    for track in [&second, &screen] {
        livekit.streaming(track).await;
        streamed(&livekit, track, SOME_AUDIO).await;
    }
    segments_are(&app, &[waiting, second, screen]).await;
}

#[tokio::test]
async fn two_microphones_that_came_back_and_are_lost_together_go_on_each_with_its_own() {
    let (livekit, app) = in_real_time().await;
    let old = [livekit.publish("standup", "ana", mic()).await, livekit.publish("standup", "ana", mic().name("headset")).await];
    for track in &old {
        livekit.streaming(track).await;
        streamed(&livekit, track, SOME_AUDIO).await;
    }
    let two = async |segments: usize| {
        app.eventually("two recordings of so many segments", async || {
            let recordings = app.items("/api/v1/recordings").await;
            assert!(recordings.len() <= 2, "{recordings:?}");
            let all = recordings.len() == 2 && recordings.iter().all(|recording| recording["segments"].as_array().unwrap().len() == segments);
            all.then_some(())
        })
        .await
    };
    two(1).await;
    let new = livekit.rejoin("standup", "ana").await;
    for track in &new {
        livekit.streaming(track).await;
        streamed(&livekit, track, SOME_AUDIO).await;
    }
    two(2).await;
    for track in &new {
        let before = livekit.streaming(track).await;
        livekit.crash_egress(track).await;
        streaming_anew(&livekit, track, &[&*before.id]).await;
    }
    two(3).await;
    segments_are(&app, &[format!("{},{new},{new}", old[0], new = new[0]), format!("{},{new},{new}", old[1], new = new[1])]).await;
}

#[tokio::test]
async fn a_track_that_goes_with_its_socket_has_no_other_egress() {
    let livekit = FakeLiveKit::start().await;
    // Nobody looks but for this egress.
    let app = builder(&livekit).env("LIVE_MEETING__LIVEKIT__RECONCILE_INTERVAL", "10m").start().await;
    livekit.deliver_to(app.addr);
    livekit.tune(|knobs| knobs.trailing = Duration::from_secs(60));
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.streaming(&track).await;
    until(&app, &track, "ACTIVE").await;
    livekit.lose_webhooks(true);
    livekit.unpublish(&track).await;
    livekit.crash_egress(&track).await;
    // Its row is the last: there would be another one if it were replaced.
    let shown = until(&app, &track, "ENDED").await;
    assert_eq!((shown.len(), shown[0]["endReason"].as_str(), starts(&livekit, &track).len()), (1, Some("trackEnded"), 1));
    assert_eq!(column(&app, "SELECT unpublished_at AS value FROM tracks"), [""], "no webhook told it");
}
