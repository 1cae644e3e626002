//! I7: a server that is told to stop while hundreds of tracks speak.
//!
//! 500 are promised. `SHUTDOWN_TRACKS=500` is the number; a test run has fewer, so that it goes anywhere.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::{PROMISED, assert_told};
use crate::support::machine::number;
use crate::support::speaker::{Spoken, recorded, speak, speech};
use crate::support::test_app::TestApp;

const TRACKS: u64 = 100;
/// An hour, which nobody waits for.
const ON_AND_ON: usize = 36_000;
const STOPS_ACCEPTING: Duration = Duration::from_millis(100);
/// D1: 250 ms, which a kill may cost.
const MOST_LOST: usize = 8_000;

struct Crowd {
    speakers: Vec<JoinHandle<Spoken>>,
    /// What the server had received of each before the signal.
    received: BTreeMap<u32, usize>,
}

async fn crowd(app: &TestApp) -> Crowd {
    let tracks = number("SHUTDOWN_TRACKS", TRACKS) as u32;
    let mut speakers = Vec::new();
    for number in 0..tracks {
        speakers.push(speak(app, number, ON_AND_ON).await);
    }
    let all_are_heard = async || {
        let live = app.items("/api/v1/tracks/live").await;
        let heard = live.iter().filter(|track| track["recordedBytes"].as_u64() > Some(0)).count();
        (heard == tracks as usize).then_some(())
    };
    app.eventually("all are heard", all_are_heard).await;
    // A segment's row follows that of its recording.
    let all_have_rows = async || {
        let recorded = recorded(app).await;
        (recorded.len() == tracks as usize && recorded.values().all(|track| track.rows.len() == 1)).then_some(())
    };
    app.eventually("all have their rows", all_have_rows).await;
    let live = app.items("/api/v1/tracks/live").await;
    let of = |track: &Value| (track["participant"].as_str().unwrap()[1..].parse().unwrap(), track["bytes"].as_u64().unwrap() as usize);
    Crowd { speakers, received: live.iter().map(of).collect() }
}

/// Every track is there, its rows final, from its first sample to what had been received, less what may be missing.
async fn assert_kept(app: &TestApp, spoken: &[Spoken], received: &BTreeMap<u32, usize>, missing: usize) {
    let kept = recorded(app).await;
    assert_eq!(kept.len(), spoken.len());
    for Spoken { number, sent, .. } in spoken {
        let track = &kept[number];
        assert!(track.ended && track.rows.len() == 1, "{:?}", track.rows);
        let enough = track.pcm.len() + missing >= received[number];
        assert!(enough, "p{number}: {} of {}", track.pcm.len(), received[number]);
        let said = speech(*number, *sent);
        let differs = said.iter().zip(&track.pcm).position(|(said, kept)| said != kept);
        if let Some(at) = differs {
            let places: Vec<_> =
                track.pcm.chunks(4).skip(at / 4).step_by(100).take(40).map(|frame| said.chunks(4).position(|said| said == frame)).collect();
            panic!(
                "p{number}: {} of {sent} kept, {} received, at frame {} is {places:?}; {:?}",
                track.pcm.len(),
                received[number],
                at / 4,
                track.rows[0]["gaps"]
            );
        }
        assert!(track.pcm.len() <= said.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_sigterm_seals_a_crowd_of_live_tracks_within_ten_seconds() {
    let app = TestApp::builder().open().start().await;
    let Crowd { speakers, received } = crowd(&app).await;
    let addr = app.addr;
    let newcomers = tokio::spawn(async move {
        // Until a connection is refused, or not answered any more.
        let start = Instant::now();
        while start.elapsed() < 4 * PROMISED {
            let answered = async {
                let mut stream = TcpStream::connect(addr).await.ok()?;
                super::ask_root(&mut stream).await
            };
            match tokio::time::timeout(Duration::from_millis(500), answered).await {
                Ok(Some(())) => tokio::time::sleep(Duration::from_millis(5)).await,
                Ok(None) | Err(_) => return,
            }
        }
        panic!("newcomers are let in for ever");
    });
    let (status, took, stopped) = app.terminate().await;
    println!("{} tracks were sealed in {took:?}", speakers.len());
    assert_eq!(status.code(), Some(0), "{}", stopped.log);
    assert!(took < 4 * PROMISED, "{took:?}");
    newcomers.await.unwrap();
    let mut spoken = Vec::new();
    for speaker in speakers {
        let ended = speaker.await.unwrap();
        assert_told(&ended.close);
        spoken.push(ended);
    }
    for wav in stopped.wav_files() {
        assert!(wav.with_extension("wav.json").exists(), "{wav:?} has its sidecar when the server ends");
    }
    let app = stopped.restart().await;
    assert!(!app.log().contains("left open"), "every row was final or in the journal: {}", app.log());
    assert_kept(&app, &spoken, &received, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_d1_a_second_sigterm_amid_a_crowd_loses_no_more_than_a_kill() {
    let mut app = TestApp::builder().open().start().await;
    let Crowd { speakers, received } = crowd(&app).await;
    // A locked database holds the end up, so that the second signal comes before it.
    let mut database = app.database();
    diesel::connection::SimpleConnection::batch_execute(&mut database, "BEGIN IMMEDIATE").unwrap();
    app.signal(Signal::TERM);
    app.logged("stopping:").await;
    app.signal(Signal::TERM);
    let status = tokio::time::timeout(4 * PROMISED, app.child.wait()).await.expect("it ends").unwrap();
    drop(database);
    assert_eq!(status.code(), Some(1), "by the second signal, and not when all was done: {}", app.log());
    let mut spoken = Vec::new();
    for speaker in speakers {
        spoken.push(speaker.await.unwrap());
    }
    let app = TestApp::builder().open().dir(&app.dir).start().await;
    assert_kept(&app, &spoken, &received, MOST_LOST).await;
}

#[tokio::test]
async fn i7_sigterm_closes_the_door_at_once() {
    let app = TestApp::builder().open().start().await;
    // A locked database holds the end up for as long as rows are waited for.
    let speaker = speak(&app, 0, ON_AND_ON).await;
    let heard = async || app.live("p000").await.filter(|live| live["recordedBytes"].as_u64() > Some(0)).map(drop);
    app.eventually("it is heard", heard).await;
    let mut database = app.database();
    diesel::connection::SimpleConnection::batch_execute(&mut database, "BEGIN IMMEDIATE").unwrap();
    app.signal(Signal::TERM);
    tokio::time::sleep(4 * STOPS_ACCEPTING).await;
    let answered = async {
        let mut late = TcpStream::connect(app.addr).await.ok()?;
        super::ask_root(&mut late).await
    };
    let answered = tokio::time::timeout(STOPS_ACCEPTING, answered).await;
    assert!(!matches!(answered, Ok(Some(()))), "nobody is let in after 100 ms, and this was four times that");
    assert_told(&speaker.await.unwrap().close);
}
