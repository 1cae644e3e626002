//! Is the server able to do its work, and does it say so?

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use serde_json::Value;

use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::test_app::{Response, TestApp, read_wav};

/// What anybody may ask, without a key.
async fn health(app: &TestApp) -> Response {
    app.request("GET", "/health", &[], b"").await
}

#[track_caller]
fn assert_time(health: &Value) {
    let timestamp = chrono::DateTime::parse_from_rfc3339(health["timestamp"].as_str().expect("a timestamp")).expect("RFC 3339");
    let age = chrono::Utc::now().signed_duration_since(timestamp);
    assert!(age.num_seconds().abs() < 60 && timestamp.offset().local_minus_utc() == 0, "{health}");
}

#[track_caller]
fn assert_healthy(response: &Response) {
    let health = response.json();
    assert_eq!((response.status, health["status"].as_str()), (200, Some("healthy")), "{health}");
    assert_eq!(health.as_object().unwrap().len(), 2, "{health}");
    assert_time(&health);
}

#[track_caller]
fn assert_unhealthy(response: &Response) {
    let health = response.json();
    assert_eq!((response.status, health["status"].as_str()), (503, Some("unhealthy")), "{health}");
    assert_eq!((health.as_object().unwrap().len(), health["reasons"].as_array().unwrap().len()), (3, 1), "{health}");
    assert_time(&health);
}

/// A disk that stalls may be told of for a moment.
async fn becomes_healthy(app: &TestApp) {
    let healthy = async || Some(health(app).await).filter(|answer| answer.json()["status"] == "healthy");
    assert_healthy(&app.eventually("it is healthy", healthy).await);
}

/// Waits until there is one reason, which begins like this.
async fn becomes_unhealthy(app: &TestApp, reason: &str) {
    let told = async || {
        let answer = health(app).await;
        let reasons = answer.json()["reasons"].as_array().cloned().unwrap_or_default();
        (reasons.len() == 1 && reasons[0].as_str().is_some_and(|told| told.starts_with(reason))).then_some(answer)
    };
    assert_unhealthy(&app.eventually(reason, told).await);
}

#[tokio::test]
async fn a_server_that_can_work_is_healthy() {
    let app = TestApp::builder().start().await;
    becomes_healthy(&app).await;
    let left: Vec<_> = std::fs::read_dir(app.audio_dir()).unwrap().collect();
    assert!(left.is_empty(), "looking leaves nothing behind: {left:?}");
}

#[tokio::test]
async fn a_read_only_audio_directory_is_told_and_refuses_senders_until_it_is_writable_again() {
    const PATH: &str = "/egress-audio?roomName=room";
    let app = TestApp::builder().open().unprivileged().start().await;
    becomes_healthy(&app).await;
    let set_mode = |mode| std::fs::set_permissions(app.audio_dir(), std::fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o555);
    becomes_unhealthy(&app, "audio directory:").await;
    let refusal = EgressPeer::connect(app.addr, PATH).await.map(drop).expect_err("nothing can be recorded");
    assert_eq!((refusal.status, refusal.content_type.as_str()), (503, "application/problem+json"));
    let problem: Value = serde_json::from_str(&refusal.body).unwrap();
    assert_eq!(problem["code"], "storageUnavailable", "{problem}");
    assert!(app.items("/api/v1/tracks/live").await.is_empty() && app.wav_files().is_empty());
    set_mode(0o755);
    becomes_healthy(&app).await;
    let pcm = counter_pcm(480, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    peer.close_and_wait().await;
    assert_eq!(read_wav(&app.wav_file()).1, pcm);
}

#[tokio::test]
async fn a_locked_database_is_told_in_time_until_it_takes_writes_again() {
    let app = TestApp::builder().start().await;
    let mut lock = app.database();
    lock.batch_execute("BEGIN IMMEDIATE").unwrap();
    // Also while earlier looks still wait for the lock.
    for _ in 0..3 {
        let asked = Instant::now();
        assert_eq!(health(&app).await.status, 503);
        // It looks for 1 s; four times that decide.
        assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
        becomes_unhealthy(&app, "database:").await;
    }
    drop(lock);
    becomes_healthy(&app).await;
}
