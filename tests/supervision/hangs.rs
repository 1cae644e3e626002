//! I9: what hangs is found, with deadlines that the fail points shorten: 30 s are 1.5.

use std::time::{Duration, Instant};

use tokio::net::UnixDatagram;

use super::{all_final, continued, cut_short, failing, twenty_speak, twenty_speak_for};
use crate::support::fake_hume::{FakeHume, FakeHumeOptions};
use crate::support::speaker::{recorded, speak, speech};
use crate::support::test_app::TestApp;

/// In place of 20 and 5 s, and of 1 s.
pub const SHORT: &str = "append-patience=return(1000);append-second-look=return(250);analysis-patience=return(1000);watchdog-tick=return(50)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_writer_that_hangs_is_given_up_and_nothing_is_lost_or_doubled() {
    // In the middle of a write, and before it has begun: it ends when its audio is in the next segment.
    for point in ["writer-append", "writer-queue"] {
        let app = failing(&format!("{SHORT};{point}=60*off->1*sleep(8000)->off")).start().await;
        let spoken = twenty_speak_for(&app, 100).await;
        let kept = all_final(&app).await;
        assert_eq!((cut_short(&spoken, &kept).len(), continued(&kept)), (0, 1), "{point}: {}", app.log());
        assert!(app.log().contains("while the disk works"), "{}", app.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_segment_that_hangs_as_it_is_made_leaves_no_file() {
    let app = failing(&format!("{SHORT};writer-append=1*sleep(8000)->off")).start().await;
    let spoken = speak(&app, 0, 100).await.await.unwrap();
    let ended = async || recorded(&app).await.remove(&0).filter(|track| track.ended);
    let track = app.eventually("its rows are final", ended).await;
    assert!(track.pcm == speech(0, spoken.sent), "{} of {} bytes", track.pcm.len(), spoken.sent);
    assert_eq!((track.rows.len(), app.wav_files().len()), (1, 1), "{}", app.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_disk_that_hangs_costs_no_restart_and_no_audio_that_fits() {
    // The disk's own answer takes longer than the write.
    let app = failing(&format!("{SHORT};writer-append=3*off->1*sleep(6000)->off;disk-pulse=1*sleep(20000)->off")).start().await;
    let spoken = speak(&app, 0, 80).await.await.unwrap();
    assert!(app.log().contains("asking the disk"), "it is told: {}", app.log());
    let ended = async || recorded(&app).await.remove(&0).filter(|track| track.ended);
    let track = app.eventually("its rows are final", ended).await;
    assert!(track.pcm == speech(0, spoken.sent), "{} of {} bytes", track.pcm.len(), spoken.sent);
    assert_eq!(track.rows.len(), 1, "no segment was given up: {}", app.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_rows_that_hang_are_told_and_no_recording_notices() {
    let app = failing(&format!("{SHORT};rows-keep=5*off->1*return(4000)->off")).start().await;
    let spoken = twenty_speak(&app).await;
    app.logged("the rows of a track hangs, recordings go on without it").await;
    let kept = all_final(&app).await;
    assert_eq!((cut_short(&spoken, &kept).len(), continued(&kept)), (0, 0), "{}", app.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_seal_that_hangs_is_told_as_is_its_end_and_costs_nothing() {
    // At the end of a track, and while the next segment goes on.
    for length in ["1h", "1s"] {
        let points = format!("{SHORT};writer-seal=1*sleep(6000)->off");
        let app = failing(&points).env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", length).start().await;
        let speaker = speak(&app, 0, 30).await;
        let told = async || {
            let health = app.request("GET", "/health", &[], b"").await.json();
            let reasons = health["reasons"].as_array()?.clone();
            let seal =
                |reason: &serde_json::Value| reason.as_str().is_some_and(|reason| reason.starts_with("the seal of a segment has not answered for"));
            reasons.iter().any(seal).then(|| health["status"].clone())
        };
        assert_eq!(app.eventually("it is told", told).await, "degraded", "{length}");
        app.logged("the seal of a segment hangs, recordings go on without it").await;
        app.logged("the seal of a segment answers again").await;
        let healthy = async || (app.request("GET", "/health", &[], b"").await.json()["status"] == "healthy").then_some(());
        app.eventually("it is healthy", healthy).await;
        let spoken = speaker.await.unwrap();
        let ended = async || recorded(&app).await.remove(&0).filter(|track| track.ended);
        let track = app.eventually("its rows are final", ended).await;
        assert!(track.pcm == speech(0, spoken.sent), "{length}: {} of {} bytes", track.pcm.len(), spoken.sent);
        assert_eq!(track.rows.len() > 1, length == "1s", "{:?}", track.rows);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_an_analysis_that_hangs_is_told_and_given_up_and_no_recording_notices() {
    let fake = FakeHume::start(FakeHumeOptions { api_key: "key".to_owned(), ..FakeHumeOptions::default() });
    let streaming = failing(&format!("{SHORT};analysis-send=1*return(3600000)->off"));
    let app = streaming.env("HUME_WS_URL", fake.url()).env("HUME_API_KEY", "key").start().await;
    let spoken = twenty_speak(&app).await;
    app.logged("the analysis of a track hangs").await;
    let kept = all_final(&app).await;
    assert_eq!((cut_short(&spoken, &kept).len(), continued(&kept)), (0, 0), "{}", app.log());
}

/// A thread that is blocked for good: 28 looks later the process ends, and the next start finishes what it has recorded.
async fn a_blocked_thread_ends_the_process(point: &str, trigger: bool) {
    let mut app = failing(&format!("{SHORT};{point}=25*off->1*sleep(3600000)")).start().await;
    let mut speakers = vec![speak(&app, 0, 3_000).await];
    if trigger {
        for number in 1..=25 {
            let path = format!("/egress-audio?roomName=room&participant=q{number}");
            let answer = crate::support::egress_peer::EgressPeer::connect(app.addr, &path);
            if tokio::time::timeout(Duration::from_secs(1), answer).await.is_err() {
                break;
            }
        }
    } else {
        speakers.push(speak(&app, 1, 3_000).await);
    }
    let start = Instant::now();
    let status = tokio::time::timeout(Duration::from_secs(30), app.child.wait()).await.expect("it ends").unwrap();
    println!("{point}: ended {:?} later", start.elapsed());
    assert_eq!(status.code(), Some(70), "{}", app.log());
    // What it said last may still be on its way here.
    for told in ["has not answered for 5 s", "hangs, the server ends"] {
        app.logged(told).await;
    }
    for speaker in speakers {
        let spoken = speaker.await.unwrap();
        assert!(!spoken.close.close_frame, "{:?}", spoken.close);
    }
    let app = TestApp::builder().open().dir(&app.dir).start().await;
    let kept = recorded_p(&app).await;
    assert!(!kept.is_empty() && kept.iter().all(|ended| *ended), "{}", app.log());
}

/// Whether each recording is final.
async fn recorded_p(app: &TestApp) -> Vec<bool> {
    app.items("/api/v1/recordings").await.iter().map(|item| item["endedAt"].is_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_worker_that_is_blocked_ends_the_process() {
    a_blocked_thread_ends_the_process("track-audio", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_registry_that_is_blocked_ends_the_process() {
    a_blocked_thread_ends_the_process("registry-reserve", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_health_tells_of_a_worker_that_does_not_answer_before_the_process_ends() {
    // 5 looks are 3 s here, and 28 of them 17.
    let app = failing("watchdog-tick=return(600);track-audio=5*off->1*sleep(3600000)").start().await;
    let speaker = speak(&app, 0, 3_000).await;
    let told = async || {
        // Connections go round the workers, and one of these does not answer.
        let asked = tokio::time::timeout(Duration::from_millis(300), app.get("/health")).await.ok()?;
        (asked.status == 503 && String::from_utf8_lossy(&asked.body).contains("has not answered for")).then_some(())
    };
    app.eventually("it is told", told).await;
    drop(app);
    speaker.await.unwrap();
}

#[tokio::test]
async fn i9_a_process_that_was_stopped_goes_on_when_it_may() {
    let app = failing(SHORT).start().await;
    app.signal(rustix::process::Signal::STOP);
    // Longer than 28 looks.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    app.signal(rustix::process::Signal::CONT);
    let spoken = speak(&app, 0, 20).await.await.unwrap();
    assert!(spoken.close.close_frame, "{}", app.log());
    assert!(!app.log().contains("has not answered"), "{}", app.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_tracks_of_a_process_that_was_stopped_for_10_s_lose_nothing_and_have_no_hole() {
    let app = failing(SHORT).start().await;
    let mut speakers = Vec::new();
    for number in 0..5 {
        speakers.push(speak(&app, number, 150).await);
    }
    let heard = async || app.live("p004").await.filter(|live| live["recordedBytes"].as_u64() > Some(20_000)).map(drop);
    app.eventually("they are heard", heard).await;
    app.signal(rustix::process::Signal::STOP);
    // 200 looks. They speak on meanwhile.
    tokio::time::sleep(Duration::from_secs(10)).await;
    app.signal(rustix::process::Signal::CONT);
    for speaker in speakers {
        let spoken = speaker.await.unwrap();
        assert!(spoken.close.close_frame, "{:?}; {}", spoken.close, app.log());
        let ended = async || recorded(&app).await.remove(&spoken.number).filter(|track| track.ended);
        let track = app.eventually("its rows are final", ended).await;
        assert!(track.pcm == speech(spoken.number, spoken.sent), "p{}: {} of {} bytes", spoken.number, track.pcm.len(), spoken.sent);
        assert_eq!((track.rows.len(), &track.rows[0]["gaps"]), (1, &serde_json::json!([])), "{:?}", track.rows);
    }
    assert!(!app.log().contains("has not answered"), "{}", app.log());
}

#[tokio::test]
async fn i9_systemd_is_told_that_the_server_is_ready_lives_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let told = async |what: &str| {
        let heard = async {
            let mut buffer = [0; 256];
            loop {
                let length = socket.recv(&mut buffer).await.unwrap();
                if String::from_utf8_lossy(&buffer[..length]).lines().any(|line| line == what) {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), heard).await.unwrap_or_else(|_| panic!("{what} is not told"));
    };
    let app = TestApp::builder().env("NOTIFY_SOCKET", path.to_str().unwrap()).env("WATCHDOG_USEC", "30000000").start().await;
    for what in ["READY=1", "WATCHDOG=1", "WATCHDOG=1"] {
        told(what).await;
    }
    app.signal(rustix::process::Signal::TERM);
    told("STOPPING=1").await;
}
