//! That a recording notices nothing of what the analysis service does, and how the analysis goes on.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;

use super::{HALF_SECOND, KEY, connect, hume, measurements, outcomes, payloads, recording_is, stream, streaming_to};
use crate::support::egress_peer::counter_pcm;
use crate::support::fake_hume::{FakeHume, FakeHumeOptions};
use crate::support::test_app::read_wav;

/// Four times what closing takes on a busy machine, and far below the time that an analysis may take for its last answers.
const PROMPTLY: Duration = Duration::from_secs(4);

#[tokio::test]
async fn a_lost_connection_is_made_anew_and_no_group_is_sent_twice() {
    let fake = hume();
    let app = streaming_to(&fake.url()).start().await;
    let pcm = counter_pcm(24_000 * 6, 1);
    let parts: Vec<&[u8]> = pcm.chunks(HALF_SECOND).collect();
    let mut peer = connect(&app, "ana", "0.5").await;
    peer.send_pcm(parts[0]).await.unwrap();
    measurements(&app, "", 1).await;
    fake.go_silent(true);
    peer.send_pcm(parts[1]).await.unwrap();
    payloads(&fake, 2).await;
    fake.go_silent(false);
    let lost = Instant::now();
    fake.drop_all();
    app.logged("the analysis service is not reached, trying again").await;
    peer.send_pcm(&parts[2..].concat()).await.unwrap();
    let seen = payloads(&fake, 6).await;
    let wait = fake.handshakes()[1].at - lost;
    // 1 s, of which jitter takes at most half; four times that on a busy machine.
    assert!((Duration::from_millis(500)..Duration::from_secs(4)).contains(&wait), "{wait:?}");
    peer.close_and_wait().await;
    fake.wait_until("the end of the conversation", |seen| seen.open == 0).await;
    assert_eq!(fake.payloads().iter().map(|payload| payload.connection).collect::<Vec<_>>(), [0, 0, 1, 1, 1, 1]);
    assert_eq!(seen.iter().map(|payload| &payload.samples).collect::<BTreeSet<_>>().len(), 6);
    // Only the answer that was under way is missing, and those that follow are at their time.
    let starts: Vec<u64> = measurements(&app, "", 5).await.iter().map(|row| row["startMs"].as_u64().unwrap()).collect();
    assert!(starts.iter().zip([0, 1_000, 1_500, 2_000, 2_500]).all(|(start, full)| full - start.min(&full) <= 70), "{starts:?}");
    recording_is(&app, &pcm).await;
}

#[tokio::test]
async fn an_idle_close_of_the_service_is_no_failure() {
    let options = FakeHumeOptions { api_key: KEY.to_owned(), idle_close: Duration::from_secs(1), ..FakeHumeOptions::default() };
    let fake = FakeHume::start(options);
    let app = streaming_to(&fake.url()).start().await;
    let mut peer = connect(&app, "ana", "0.5").await;
    for connections in 1..=3 {
        peer.send_pcm(&counter_pcm(24_000, connections)).await.unwrap();
        fake.wait_until("a conversation and its idle end", |seen| seen.connections == connections as usize && seen.open == 0).await;
    }
    peer.close_and_wait().await;
    assert_eq!(outcomes(&app, 3).await, ["1 sent", "2 sent", "3 sent"]);
    assert!(!app.log().contains("analysis service"), "{}", app.log());
}

#[tokio::test]
async fn while_the_service_is_down_the_oldest_groups_are_dropped_and_counted() {
    let fake = hume();
    fake.refuse_with(Some(503));
    let closed_port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for url in [fake.url(), format!("ws://{closed_port}/")] {
        let app = streaming_to(&url).env("LIVE_MEETING__HUME__QUEUE", "2s").start().await;
        let pcm = counter_pcm(24_000 * 16, 1);
        let mut peer = connect(&app, "ana", "0.5").await;
        peer.send_pcm(&pcm).await.unwrap();
        app.eventually("2 s of 8 s wait", async || {
            let track = app.items("/api/v1/tracks/live").await.first()?.clone();
            let counts = (track["groups"].as_u64()?, track["queues"]["analysisGroups"].as_u64()?, track["drops"]["analysisGroups"].as_u64()?);
            (counts == (16, 4, 12)).then_some(())
        })
        .await;
        assert_eq!(outcomes(&app, 12).await, (1..=12).map(|sequence| format!("{sequence} dropped")).collect::<Vec<_>>());
        app.logged("the analysis service is not reached, trying again").await;
        let closing = Instant::now();
        assert!(peer.close_and_wait().await.close_frame);
        assert!(closing.elapsed() < PROMPTLY, "{:?}", closing.elapsed());
        recording_is(&app, &pcm).await;
        assert_eq!(outcomes(&app, 16).await, (1..=16).map(|sequence| format!("{sequence} dropped")).collect::<Vec<_>>());
        for once in ["the analysis service is not reached, trying again", "groups are dropped"] {
            assert_eq!(app.log().matches(once).count(), 1, "{once}: {}", app.log());
        }
    }
}

#[tokio::test]
async fn a_group_longer_than_the_queue_is_sent_by_a_service_that_is_reached() {
    let fake = hume();
    let app = streaming_to(&fake.url()).env("LIVE_MEETING__HUME__QUEUE", "1s").start().await;
    stream(&app, &fake, "3", &counter_pcm(48_000 * 3, 1)).await;
    assert_eq!(outcomes(&app, 1).await, ["1 sent"]);
}

#[tokio::test]
async fn a_service_that_answers_nothing_is_left_and_used_again_when_it_does() {
    let fake = hume();
    fake.go_silent(true);
    let app = streaming_to(&fake.url()).start().await;
    let pcm = counter_pcm(24_000 * 10, 1);
    let mut peer = connect(&app, "ana", "0.5").await;
    peer.send_pcm(&pcm).await.unwrap();
    // So many may be without an answer.
    payloads(&fake, 8).await;
    fake.go_silent(false);
    assert_eq!(payloads(&fake, 10).await[8..].iter().map(|payload| payload.connection).collect::<Vec<_>>(), [1, 1]);
    measurements(&app, "", 2).await;
    app.logged("the service does not answer").await;
    peer.close_and_wait().await;
    recording_is(&app, &pcm).await;
}

#[tokio::test]
async fn a_track_closes_promptly_while_the_service_owes_answers() {
    let fake = hume();
    fake.go_silent(true);
    let app = streaming_to(&fake.url()).start().await;
    let pcm = counter_pcm(48_000, 1);
    let mut peer = connect(&app, "ana", "0.5").await;
    peer.send_pcm(&pcm).await.unwrap();
    payloads(&fake, 2).await;
    let closing = Instant::now();
    assert!(peer.close_and_wait().await.close_frame);
    assert!(closing.elapsed() < PROMPTLY, "{:?}", closing.elapsed());
    recording_is(&app, &pcm).await;
}

#[tokio::test]
async fn sigterm_does_not_wait_for_a_service_that_answers_nothing() {
    let fake = hume();
    fake.go_silent(true);
    let app = streaming_to(&fake.url()).start().await;
    let pcm = counter_pcm(48_000, 1);
    let mut peer = connect(&app, "ana", "0.5").await;
    peer.send_pcm(&pcm).await.unwrap();
    payloads(&fake, 2).await;
    let file = app.wav_file();
    let (status, took, _stopped) = app.terminate().await;
    assert!(status.success(), "{status}");
    // It waits 2 s for the last answers; four times that, and what was promised with it.
    assert!(took < Duration::from_secs(8), "{took:?}");
    assert!(read_wav(&file).1 == pcm);
}

#[tokio::test]
async fn garbage_is_no_answer_and_stops_nothing() {
    let fake = hume();
    fake.answer_garbage(true);
    let app = streaming_to(&fake.url()).start().await;
    let pcm = counter_pcm(24_000 * 6, 1);
    let mut peer = connect(&app, "ana", "0.5").await;
    peer.send_pcm(&pcm[..HALF_SECOND * 3]).await.unwrap();
    payloads(&fake, 3).await;
    fake.answer_garbage(false);
    peer.send_pcm(&pcm[HALF_SECOND * 3..]).await.unwrap();
    let rows = measurements(&app, "", 3).await;
    assert!(rows.iter().all(|row| row["startMs"].as_u64().unwrap() > 1_400), "{rows:?}");
    assert_eq!(fake.handshakes().len(), 1);
    assert_eq!(app.items("/api/v1/tracks/live").await[0]["restarts"]["analysis"], 0);
    peer.close_and_wait().await;
    recording_is(&app, &pcm).await;
}

#[tokio::test]
async fn a_refused_key_is_said_once_tried_by_one_and_flows_for_all_when_it_is_accepted() {
    const RETRY: Duration = Duration::from_secs(3);
    let fake = hume();
    fake.refuse_with(Some(401));
    let app = streaming_to(&fake.url()).env("LIVE_MEETING__HUME__REFUSED_RETRY", "3s").start().await;
    let mut peers = Vec::new();
    for name in ["ana", "bob", "eve"] {
        let mut peer = connect(&app, name, "0.5").await;
        peer.send_pcm(&counter_pcm(24_000, 1)).await.unwrap();
        app.logged("refuses the key").await;
        peers.push(peer);
    }
    fake.wait_until("three tries", |seen| seen.handshakes.len() == 3).await;
    let tries = fake.handshakes();
    assert!(tries.windows(2).all(|pair| pair[1].at - pair[0].at >= RETRY), "{tries:?}");
    fake.refuse_with(None);
    payloads(&fake, 3).await;
    // The try that succeeds is the others' permission: they do not wait for another turn.
    let accepted: Vec<Instant> = fake.handshakes().iter().filter(|seen| seen.status == 101).map(|seen| seen.at).collect();
    assert_eq!(accepted.len(), 3);
    assert!(accepted[2] - accepted[0] < RETRY, "{accepted:?}");
    for once in ["refuses the key", "accepts the key again"] {
        assert_eq!(app.log().matches(once).count(), 1, "{once}: {}", app.log());
    }
}
