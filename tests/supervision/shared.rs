//! What all tracks share: a panic of it costs nothing, or ends the process, which every file and every event survives.

use std::time::Duration;

use diesel::connection::SimpleConnection;
use serde_json::json;

use super::failing;
use super::{all_final, continued, cut_short, twenty_speak};
use crate::support::speaker::{recorded, speak, speech};
use crate::support::test_app::{Builder, TestApp};

fn event(sid: &str) -> serde_json::Value {
    json!({"event": "room_started", "id": format!("EV_{sid}"), "room": {"sid": sid, "name": sid}})
}

/// Its code when it has ended by itself.
async fn ended(app: &mut TestApp) -> Option<i32> {
    tokio::time::timeout(Duration::from_secs(30), app.child.wait()).await.expect("it ends").unwrap().code()
}

/// A server that has somebody to start egresses and to look at, who is not there.
fn autopilot(points: &str) -> Builder {
    let builder = failing(points).env("LIVEKIT_URL", "ws://127.0.0.1:9").env("EGRESS_WS_BASE", "ws://recorder.example");
    builder.env("LIVE_MEETING__LIVEKIT__RECONCILE_INTERVAL", "1s")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_starter_or_a_reconciler_that_panics_ends_the_process_which_every_file_survives() {
    for (point, name) in [("starter-sync=1*off->1*panic", "starter of egresses"), ("reconciler-look=2*off->1*panic", "reconciler")] {
        let mut app = autopilot(point).start().await;
        let speaker = speak(&app, 0, 600).await;
        assert_eq!(ended(&mut app).await, Some(70), "{}", app.log());
        app.logged(&format!("the {name} panicked, the server ends")).await;
        let spoken = speaker.await.unwrap();
        let app = TestApp::builder().open().dir(&app.dir).start().await;
        for track in recorded(&app).await.values() {
            assert!(track.ended && speech(0, spoken.sent).starts_with(&track.pcm), "{point}: {:?}", track.rows);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_commit_of_webhooks_that_panics_loses_none_and_the_next_ones_go_on() {
    let app = failing("group-commit=1*panic->off").start().await;
    for sid in ["RM_1", "RM_2"] {
        assert_eq!(app.webhook(event(sid)).await.status, 204, "{}", app.log());
    }
    app.logged("webhooks were not applied, they are tried again").await;
    for sid in ["RM_1", "RM_2"] {
        let known = async || (app.get(&format!("/api/v1/sessions/{sid}")).await.status == 200).then_some(());
        app.eventually(&format!("{sid} is known"), known).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_journal_that_panics_ends_the_process_and_loses_nothing_that_was_acknowledged() {
    for (point, name) in [("journal-replay=1*panic", "the replay of the journal"), ("journal-write=1*off->1*panic", "the journal's thread")] {
        let mut app = failing(point).start().await;
        let mut database = app.database();
        database.batch_execute("BEGIN EXCLUSIVE").unwrap();
        assert_eq!(app.webhook(event("RM_1")).await.status, 204, "{}", app.log());
        if point.starts_with("journal-replay") {
            database.batch_execute("ROLLBACK").unwrap();
        } else {
            // Its rows are the next that the journal is to keep.
            speak(&app, 0, 600).await;
        }
        assert_eq!(ended(&mut app).await, Some(70), "{}", app.log());
        app.logged(&format!("{name} panicked, the server ends")).await;
        drop(database);
        let app = TestApp::builder().open().dir(&app.dir).start().await;
        let known = async || (app.get("/api/v1/sessions/RM_1").await.status == 200).then_some(());
        app.eventually("what was acknowledged is known", known).await;
        for track in recorded(&app).await.values() {
            assert!(track.ended, "{:?}", track.rows);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_file_whose_repair_panics_is_repaired_later_and_no_other_waits_for_it() {
    let app = TestApp::builder().open().start().await;
    for number in 0..3 {
        speak(&app, number, 600).await;
    }
    let heard = async || (recorded(&app).await.len() == 3).then_some(());
    app.eventually("they have rows", heard).await;
    let stopped = app.kill().await;
    let app = failing("repair-file=1*panic->off").dir(&stopped.dir).start().await;
    assert!(app.log().contains("closed the segments that an earlier run left open segments=2 "), "{}", app.log());
    assert_eq!(app.log().matches("cannot be repaired now").count(), 1, "{}", app.log());
    let all_ended = async || recorded(&app).await.values().flat_map(|track| &track.rows).all(|row| row["endedAt"].is_string()).then_some(());
    app.eventually("the third is repaired too", all_ended).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_buffer_a_seal_a_sync_or_a_hash_that_hangs_for_seconds_costs_nothing() {
    for point in [
        "buffer-push=200*off->1*sleep(2000)->off",
        "writer-seal=5*off->1*sleep(5000)->off",
        "syncer-sync=1*off->1*sleep(3000)->off",
        "hasher-file=1*sleep(2000)->off",
    ] {
        let app = failing(point).start().await;
        let spoken = twenty_speak(&app).await;
        let kept = all_final(&app).await;
        assert_eq!((cut_short(&spoken, &kept).len(), continued(&kept)), (0, 0), "{point}: {}", app.log());
        let hashed = async || {
            let kept = recorded(&app).await;
            kept.values().flat_map(|track| &track.rows).all(|row| row["sha256"].is_string()).then_some(())
        };
        app.eventually("all of them are hashed", hashed).await;
    }
}
