//! Two servers on one database, behind one address: LiveKit tells both what happens, and its egresses reach either.

use std::collections::BTreeSet;
use std::time::Duration;

use super::starting::files;
use super::{builder, egresses, until};
use crate::storage_engines::engine::{TestDatabase, on_postgres, on_sqlite};
use crate::support::fake_livekit::{FakeLiveKit, Fault, Method, mic};
use crate::support::test_app::TestApp;

/// The egresses dial the first.
async fn two_servers(database: &TestDatabase) -> (FakeLiveKit, TestApp, TestApp) {
    let livekit = FakeLiveKit::start().await;
    livekit.pace(4.0);
    let server = || {
        let shared = builder(&livekit).env("DATABASE_URL", &database.url).env("INGEST_TICKET_SECRET", "a-secret-that-both-servers-share-0123456789");
        // An unoptimised build takes about a second to authenticate a connection to PostgreSQL.
        shared.env("LIVE_MEETING__DATABASE__CONNECTIONS", "3")
    };
    let (first, second) = (server().start().await, server().start().await);
    livekit.deliver_to(first.addr);
    livekit.also_deliver_to(second.addr);
    (livekit, first, second)
}

/// The killed server was not heard of for long. The living one says at once that it is there.
async fn patience_is_over(database: &TestDatabase) {
    database.execute("UPDATE servers SET seen_at = '2020-01-01 00:00:00'").await.unwrap();
}

async fn each_track_is_started_once(database: &TestDatabase) {
    let (livekit, first, second) = two_servers(database).await;
    let mut tracks = BTreeSet::new();
    for identity in ["ana", "bob", "eve", "joe", "zoe"] {
        tracks.insert(livekit.publish("standup", identity, mic()).await);
    }
    for track in &tracks {
        for app in [&first, &second] {
            assert_eq!(until(app, track, "ACTIVE").await.len(), 1);
        }
    }
    livekit.webhooks_delivered().await;
    let looks = livekit.calls(Method::ListRooms);
    livekit.eventually("looks of both", |livekit| (livekit.calls(Method::ListRooms) >= looks + 6).then_some(())).await;
    let started: BTreeSet<String> = livekit.egresses().into_iter().map(|egress| egress.track).collect();
    assert_eq!((livekit.calls(Method::StartTrackEgress), livekit.calls(Method::StopEgress), started), (tracks.len(), 0, tracks));
    files(&first, 5).await;
    assert!(second.wav_files().is_empty(), "whoever is dialled records, whoever asked");
}

async fn a_killed_servers_work_is_taken_over(database: &TestDatabase) {
    let (livekit, first, second) = two_servers(database).await;
    let recorded = livekit.publish("standup", "ana", mic()).await;
    let before = until(&second, &recorded, "ACTIVE").await;
    livekit.fail(Method::StartTrackEgress, Fault::Unavailable);
    let mut queued = Vec::new();
    for identity in ["bob", "eve", "joe"] {
        let track = livekit.publish("standup", identity, mic()).await;
        until(&second, &track, "QUEUED").await;
        queued.push(track);
    }
    let first = first.kill().await;
    livekit.deliver_to(second.addr);
    livekit.clear(Method::StartTrackEgress);
    patience_is_over(database).await;
    second.logged("the egresses of a server that is gone are taken over").await;
    for track in queued.iter().chain([&recorded]) {
        let shown = until(&second, track, "ACTIVE").await;
        assert_eq!(shown.len(), if *track == recorded { 2 } else { 1 }, "{shown:?}");
        assert_eq!(livekit.active_for(track).len(), 1);
    }
    let shown = egresses(&second, &recorded).await;
    assert_eq!((shown[0]["endReason"].as_str(), shown[1]["restarts"].as_i64()), (Some("replaced"), Some(1)));
    assert_ne!(shown[1]["server"], before[0]["server"]);
    files(&second, 4).await;

    // The first comes back, and takes nothing from the second.
    let again = first.restart().await;
    livekit.also_deliver_to(again.addr);
    let looks = livekit.calls(Method::ListRooms);
    livekit.eventually("looks of both", |livekit| (livekit.calls(Method::ListRooms) >= looks + 4).then_some(())).await;
    for track in queued.iter().chain([&recorded]) {
        assert_eq!(livekit.active_for(track).len(), 1);
        assert_eq!(until(&again, track, "ACTIVE").await.last().unwrap()["server"], shown[1]["server"]);
    }
    let sent = livekit.sent_pcm(&recorded).last().unwrap().duration();
    let goes_on = |livekit: &FakeLiveKit| (livekit.sent_pcm(&recorded).last()?.duration() > sent + Duration::from_millis(200)).then_some(());
    livekit.eventually("more audio", goes_on).await;
}

#[tokio::test]
async fn two_servers_on_one_sqlite_file_start_each_track_once() {
    on_sqlite(each_track_is_started_once).await;
}

#[tokio::test]
async fn two_servers_on_one_postgresql_start_each_track_once() {
    on_postgres(each_track_is_started_once).await;
}

#[tokio::test]
async fn what_a_killed_server_did_is_done_by_the_other_on_its_sqlite_file() {
    on_sqlite(a_killed_servers_work_is_taken_over).await;
}

#[tokio::test]
async fn what_a_killed_server_did_is_done_by_the_other_on_its_postgresql() {
    on_postgres(a_killed_servers_work_is_taken_over).await;
}
