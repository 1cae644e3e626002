//! I8 and I9 of video: the same promises as of audio.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::failing;
use super::hangs::SHORT;
use crate::support::egress_peer::{CloseSeen, EgressPeer, Handshake};
use crate::support::test_app::TestApp;
use crate::support::video::pictures;

const TRACKS: u8 = 6;
/// 3 s.
const PICTURES: u8 = 75;
/// A camera's pace.
const PICTURE_TIME: Duration = Duration::from_millis(40);

/// A picture of VP8 that builds on others, each another.
fn picture(track: u8, number: u8) -> Vec<u8> {
    [&[0x11, track, number][..], &vec![number; 100 + usize::from(number)]].concat()
}

/// What a sender knows when it has ended.
#[derive(Debug)]
struct Filmed {
    sent: u8,
    close: CloseSeen,
}

async fn film(app: &TestApp, track: u8, count: u8) -> JoinHandle<(u8, Filmed)> {
    let path = format!("/egress-video?roomName=room&participant=v{track}&trackId=TR_{track}&codec=vp8");
    let mut peer = EgressPeer::connect_with(app.addr, &path, Handshake { content_type: None, headers: &[] }).await.unwrap();
    tokio::spawn(async move {
        let mut due = Instant::now();
        for number in 0..count {
            tokio::time::sleep_until(due).await;
            due += PICTURE_TIME;
            // One message, which is written when what has come is taken in: the Close is not lost to a reset.
            if peer.send_realtime(&picture(track, number)).await.is_err() {
                return (track, Filmed { sent: number, close: peer.expect_close().await });
            }
        }
        (track, Filmed { sent: count, close: peer.close_and_wait().await })
    })
}

async fn all_film(app: &TestApp) -> BTreeMap<u8, Filmed> {
    all_film_for(app, PICTURES).await
}

async fn all_film_for(app: &TestApp, pictures: u8) -> BTreeMap<u8, Filmed> {
    let mut filming = Vec::new();
    for track in 0..TRACKS {
        filming.push(film(app, track, pictures).await);
    }
    let mut filmed = BTreeMap::new();
    for film in filming {
        let (track, ended) = tokio::time::timeout(Duration::from_secs(60), film).await.expect("nobody films for ever").unwrap();
        filmed.insert(track, ended);
    }
    filmed
}

/// What is kept of a track.
struct Kept {
    rows: Vec<Value>,
    pictures: Vec<Vec<u8>>,
}

/// What is kept of each of so many, when every row is final.
async fn all_final(app: &TestApp, tracks: usize) -> BTreeMap<u8, Kept> {
    let all = async || {
        let items = app.items("/api/v1/recordings").await;
        let is_final =
            |item: &Value| item["endedAt"].is_string() && item["segments"].as_array().unwrap().iter().all(|row| row["endedAt"].is_string());
        (items.len() == tracks && items.iter().all(is_final)).then_some(items)
    };
    let items = app.eventually("every row is final", all).await;
    let of = |item: &Value| {
        let rows = item["segments"].as_array().unwrap().clone();
        let file = |row: &Value| std::fs::read(app.dir.path().join("storage/egress/video").join(row["path"].as_str().unwrap())).unwrap();
        let pictures = rows.iter().flat_map(|row| pictures(&file(row))).map(|(_, picture)| picture).collect();
        (item["participant"].as_str().unwrap()[1..].parse().unwrap(), Kept { rows, pictures })
    };
    items.iter().map(of).collect()
}

/// Those whose pictures are not all there. Of these, what is there is what came first.
fn cut_short(filmed: &BTreeMap<u8, Filmed>, kept: &BTreeMap<u8, Kept>) -> Vec<u8> {
    let whole = |track: &u8| {
        let said: Vec<Vec<u8>> = (0..filmed[track].sent).map(|number| picture(*track, number)).collect();
        assert!(said.starts_with(&kept[track].pictures), "v{track}: {} of {} pictures, and not the first", kept[track].pictures.len(), said.len());
        said.len() == kept[track].pictures.len() && filmed[track].close.close_frame
    };
    filmed.keys().copied().filter(|track| !whole(track)).collect()
}

fn continued(kept: &BTreeMap<u8, Kept>) -> usize {
    kept.values().filter(|track| track.rows.len() > 1).count()
}

/// Panics once, in one of the tracks. How many are cut short by it, and how many go on in another segment?
async fn a_panic_at(point: &str, after: u32, short: usize, further: usize) {
    let app = failing(&format!("{point}={after}*off->1*panic->off")).start().await;
    let filmed = all_film(&app).await;
    let kept = all_final(&app, usize::from(TRACKS)).await;
    app.logged("panicked").await;
    let cut = cut_short(&filmed, &kept);
    assert_eq!((cut.len(), continued(&kept)), (short, further), "{point}: {cut:?} are cut short; the log:\n{}", app.log());
    app.healthy().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_panic_of_a_socket_of_video_ends_that_track_alone() {
    a_panic_at("video-message", 150, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_track_of_video_that_panics_ends_alone() {
    a_panic_at("track-video", 150, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_video_writer_that_panics_is_followed_by_the_next_segment_without_a_loss() {
    for point in ["video-turn", "video-append"] {
        a_panic_at(point, 40, 0, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_the_segment_of_a_video_writer_that_panics_is_final_while_its_track_goes_on() {
    for point in ["video-turn", "video-append"] {
        let app = failing(&format!("{point}=5*off->1*panic->off")).start().await;
        let filming = film(&app, 0, 250).await;
        let ended = async || app.items("/api/v1/recordings").await.first()?["segments"][0]["endedAt"].as_str().map(drop);
        app.eventually("the first segment's row is final", ended).await;
        assert!(app.live("v0").await.is_some_and(|live| live["restarts"]["wavWriter"] == 1), "{point}: its track goes on: {}", app.log());
        drop(app);
        filming.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_the_sixth_failure_within_a_minute_ends_a_track_of_video_and_is_told() {
    let app = failing("video-append=1*off->6*panic->off").start().await;
    let (_, filmed) = film(&app, 0, 200).await.await.unwrap();
    assert_eq!((filmed.close.code, filmed.close.reason.as_str()), (Some(1011), "failed"), "{:?}; {}", filmed.close, app.log());
    let kept = all_final(&app, 1).await;
    assert_eq!(kept[&0].rows.last().unwrap()["endReason"], "failed", "{:?}", kept[&0].rows);
    let metrics = String::from_utf8(app.get("/metrics").await.body).unwrap();
    for told in ["live_meeting_writer_restarts_total 5", "live_meeting_tracks_given_up_total 1"] {
        assert!(metrics.contains(told), "{told}:\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_video_writer_that_hangs_is_given_up_and_no_picture_is_lost_or_doubled() {
    // In the middle of a write, and before it has begun: it ends when its pictures are in the next segment.
    for point in ["video-append", "video-queue"] {
        let app = failing(&format!("{SHORT};{point}=30*off->1*sleep(8000)->off")).start().await;
        let filmed = all_film_for(&app, 250).await;
        let kept = all_final(&app, usize::from(TRACKS)).await;
        assert_eq!((cut_short(&filmed, &kept).len(), continued(&kept)), (0, 1), "{point}: {}", app.log());
        assert!(app.log().contains("while the disk works"), "{}", app.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_segment_of_video_that_hangs_as_it_is_made_leaves_no_file() {
    let app = failing(&format!("{SHORT};video-append=1*sleep(8000)->off")).start().await;
    let (track, filmed) = film(&app, 0, 250).await.await.unwrap();
    let kept = all_final(&app, 1).await;
    assert_eq!((cut_short(&BTreeMap::from([(track, filmed)]), &kept), kept[&0].rows.len()), (Vec::new(), 1), "{}", app.log());
    let files = async || {
        let kinds = crate::support::video::files(app.dir.path()).into_iter().filter(|file| file.extension().is_some_and(|kind| kind == "ivf"));
        (kinds.count() == 1).then_some(())
    };
    app.eventually("the file of the one that hung is gone", files).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_disk_that_hangs_costs_no_restart_and_no_picture_that_fits() {
    // The disk's own answer takes longer than the write.
    let app = failing(&format!("{SHORT};video-append=3*off->1*sleep(6000)->off;disk-pulse=1*sleep(20000)->off")).start().await;
    let (track, filmed) = film(&app, 0, 200).await.await.unwrap();
    assert!(app.log().contains("asking the disk"), "it is told: {}", app.log());
    let kept = all_final(&app, 1).await;
    let cut = cut_short(&BTreeMap::from([(track, filmed)]), &kept);
    assert_eq!((cut, kept[&0].rows.len()), (Vec::new(), 1), "no segment was given up: {}", app.log());
}
