//! Commits without an answer: the connection to PostgreSQL is cut when it is asked to commit, and the server cannot know whether it has. Each is tried both ways.

use serde_json::json;

use super::rows::{segments, written};
use super::webhooks::{deliver, meeting, told};
use super::{assert_no_errors, builder_at, replayed};
use crate::storage_engines::engine::{TestDatabase, on_postgres};
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::fake_livekit::{FakeLiveKit, Method, OUR_NAME, mic};
use crate::support::postgres_proxy::{Cut, PostgresProxy};
use crate::support::test_app::TestApp;

const CUTS: [Cut; 2] = [Cut::Answer, Cut::Commit];

async fn server(database: &TestDatabase) -> (PostgresProxy, TestApp) {
    let proxy = PostgresProxy::start(&database.url).await;
    let app = builder_at(&proxy.url(&database.url)).start().await;
    (proxy, app)
}

/// Cuts what has this statement while `act` makes it happen, and waits until the journal is through with what follows.
async fn cut_while<T>(proxy: &PostgresProxy, app: &TestApp, cut: Cut, statement: &str, act: impl Future<Output = T>) -> T {
    let journals = || app.log().matches("has taken all that waited in the journal").count();
    let before = journals();
    proxy.cut(cut, statement);
    let done = act.await;
    let what = format!("{cut:?} of {statement} is cut, and done again");
    app.eventually(&what, async || (proxy.left().is_empty() && journals() > before).then_some(())).await;
    replayed(app).await;
    done
}

async fn each_webhook_is_applied_once(cut: Cut, attempts: &str) {
    on_postgres(async |database| {
        let (proxy, app) = server(database).await;
        let events = meeting("RM_1");
        for event in &events {
            let one = std::slice::from_ref(event);
            cut_while(&proxy, &app, cut, r#"INSERT INTO "webhook_events""#, deliver(&app, one)).await;
            // LiveKit's own repetition of it is one more.
            deliver(&app, one).await;
        }
        let undisturbed = TestApp::builder().start().await;
        deliver(&undisturbed, &events).await;
        assert_eq!(told(&app, &["RM_1"]).await, told(&undisturbed, &["RM_1"]).await);
        assert_eq!(database.count("webhook_events").await, events.len());
        assert_eq!(database.texts("SELECT DISTINCT CAST(attempts AS TEXT) AS text FROM webhook_events").await, [attempts]);
        assert_no_errors(&app);
    })
    .await;
}

#[tokio::test]
async fn w2_w3_a_webhook_whose_commit_is_not_answered_is_acknowledged_and_applied_once() {
    // What was committed is known again.
    each_webhook_is_applied_once(Cut::Answer, "3").await;
}

#[tokio::test]
async fn w2_w3_a_webhook_whose_commit_does_not_arrive_is_acknowledged_and_applied_once() {
    each_webhook_is_applied_once(Cut::Commit, "2").await;
}

/// What a recording commits, in the order in which it comes.
const BEGINNING: [&str; 2] = [r#"INSERT INTO "recordings""#, r#"INSERT INTO "segments""#];
const MUTE: &str = r#"UPDATE "tracks" SET "format_mismatch""#;
const END: [&str; 2] = [r#"UPDATE "segments""#, r#"UPDATE "recordings" SET "ended_at" = $1 WHERE ("recordings"."id" = $2) RETURNING"#];

async fn record(proxy: &PostgresProxy, app: &TestApp, cut: Cut, step: &str, participant: &str) {
    let pcm = counter_pcm(9_600, 1);
    let (before, after) = pcm.split_at(19_200);
    let act = async {
        let subject = json!({"roomName": "room", "participant": participant, "trackId": format!("TR_{participant}")});
        // The ticket is spent by the row of the first segment, and by this connection.
        let ticket = app.ticket(subject).await;
        let path = format!("/egress-audio?roomName=room&participant={participant}&trackId=TR_{participant}&ticket={ticket}");
        let mut peer = EgressPeer::connect(app.addr, &path).await.unwrap();
        peer.send_pcm(before).await.unwrap();
        written(app, participant, before.len()).await;
        peer.mute(true).await.unwrap();
        peer.send_pcm(after).await.unwrap();
        peer.mute(false).await.unwrap();
        peer.close_and_wait().await;
    };
    cut_while(proxy, app, cut, step, act).await;
    assert!(segments(app, participant).await == [("closed".to_owned(), pcm)], "{cut:?} of {step}");
    let tracks = app.items("/api/v1/sessions/room/tracks").await;
    let own: Vec<_> = tracks.iter().filter(|track| track["participant"] == participant).collect();
    assert!(own.len() == 1 && own[0]["muteSpans"].as_array().unwrap().len() == 1, "{cut:?} of {step}: {own:?}");
}

async fn each_row_of_a_recording_is_there_once(cut: Cut) {
    on_postgres(async |database| {
        let (proxy, app) = server(database).await;
        let steps: Vec<&str> = BEGINNING.into_iter().chain([MUTE]).chain(END).collect();
        for (number, step) in steps.iter().enumerate() {
            record(&proxy, &app, cut, step, &format!("p{number}")).await;
        }
        for table in ["recordings", "segments", "seals", "tracks"] {
            assert_eq!(database.count(table).await, steps.len(), "{table}");
        }
        assert_no_errors(&app);
    })
    .await;
}

#[tokio::test]
async fn s7_a_recording_whose_commits_are_not_answered_has_each_row_once() {
    each_row_of_a_recording_is_there_once(Cut::Answer).await;
}

#[tokio::test]
async fn s7_a_recording_whose_commits_do_not_arrive_has_each_row_once() {
    each_row_of_a_recording_is_there_once(Cut::Commit).await;
}

#[tokio::test]
async fn s7_all_commits_of_a_recording_without_an_answer_are_as_good_as_one() {
    on_postgres(async |database| {
        let (proxy, app) = server(database).await;
        for (cut, participant) in CUTS.into_iter().zip(["ana", "ben"]) {
            for step in BEGINNING.into_iter().chain([MUTE]).chain([END[0]]) {
                proxy.cut(cut, step);
            }
            record(&proxy, &app, cut, END[1], participant).await;
        }
        assert_no_errors(&app);
    })
    .await;
}

/// The row of the queue, with what published the track; what the starter says of its try; what LiveKit has agreed to; and the socket that came of it.
const EGRESS: [&str; 4] = [
    r#"INSERT INTO "egresses""#,
    r#"UPDATE "egresses" SET "state" = $1, "ticket_id""#,
    r#"UPDATE "egresses" SET "egress_id""#,
    r#"UPDATE "egresses" SET "state" = $1, "server_id""#,
];

#[tokio::test]
async fn w3_a_published_track_whose_commits_get_no_answer_has_one_egress() {
    on_postgres(async |database| {
        let livekit = FakeLiveKit::start().await;
        livekit.pace(4.0);
        let proxy = PostgresProxy::start(&database.url).await;
        let app = builder_at(&proxy.url(&database.url)).env("LIVEKIT_URL", livekit.ws_url()).env("EGRESS_WS_BASE", format!("ws://{OUR_NAME}"));
        let app = app.env("LIVE_MEETING__LIVEKIT__RECONCILE_INTERVAL", "10m").start().await;
        livekit.deliver_to(app.addr);
        // From then on webhooks alone tell of tracks.
        livekit.eventually("the first look", |livekit| (livekit.calls(Method::ListRooms) > 0).then_some(())).await;
        for (cut, identity) in CUTS.into_iter().zip(["ana", "ben"]) {
            for step in EGRESS {
                proxy.cut(cut, step);
            }
            let track = livekit.publish("standup", identity, mic()).await;
            let egresses = app
                .eventually("its egress is recorded", async || {
                    let egresses = match app.get(&format!("/api/v1/egresses?trackSid={track}")).await {
                        answer if answer.status == 200 => answer.json()["items"].as_array()?.clone(),
                        _ => return None,
                    };
                    (proxy.left().is_empty() && egresses.first()?["state"] == "ACTIVE").then_some(egresses)
                })
                .await;
            assert_eq!((egresses.len(), livekit.active_for(&track).len()), (1, 1), "{egresses:?}\n{}", app.log());
        }
        assert_eq!((livekit.calls(Method::StartTrackEgress), livekit.calls(Method::StopEgress)), (2, 0), "{}", app.log());
        replayed(&app).await;
        assert_no_errors(&app);
    })
    .await;
}
