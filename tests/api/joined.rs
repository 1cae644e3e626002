//! Recordings of several segments: one time line, one file.

use diesel::connection::SimpleConnection;
use serde_json::{Value, json};

use super::bearer;
use crate::support::egress_peer::{EgressPeer, Handshake, counter_pcm};
use crate::support::test_app::{Response, TestApp, read_wav};

const PATH: &str = "/egress-audio?roomName=room&participant=ana&trackId=TR_1";
/// 48 kHz stereo.
const FRAME_BYTES: usize = 4;

/// The only recording. The list and the recording itself say the same, but for what happens between the two questions.
async fn recording(app: &TestApp) -> Value {
    let agreed = async || {
        let items = app.items("/api/v1/recordings").await;
        assert_eq!(items.len(), 1, "{items:?}");
        let id = items[0]["id"].as_str().unwrap();
        (app.get_json(&format!("/api/v1/recordings/{id}")).await == items[0]).then(|| items[0].clone())
    };
    app.eventually("the list and the recording say the same", agreed).await
}

async fn media(app: &TestApp, method: &str, headers: &[(&str, &str)]) -> Response {
    let path = format!("/api/v1/recordings/{}/media", recording(app).await["id"].as_str().unwrap());
    app.request(method, &path, &[&[("Authorization", &*bearer())], headers].concat(), b"").await
}

fn segments(recording: &Value) -> &[Value] {
    recording["segments"].as_array().unwrap()
}

fn reasons(recording: &Value) -> Vec<&str> {
    segments(recording).iter().map(|segment| segment["endReason"].as_str().unwrap_or("open")).collect()
}

/// Start and end of each segment on the recording's time line.
fn times(recording: &Value) -> Vec<(u64, u64)> {
    segments(recording).iter().map(|segment| (segment["startMs"].as_u64().unwrap(), segment["endMs"].as_u64().unwrap())).collect()
}

/// A connection that sends and is lost, as an egress that is killed.
async fn send_and_vanish(app: &TestApp, pcm: &[u8]) {
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(pcm).await.unwrap();
    peer.vanish().await;
    let all_ended = async || {
        let recording = app.items("/api/v1/recordings").await.first()?.clone();
        (recording["endedAt"].is_string() && !reasons(&recording).contains(&"open")).then_some(())
    };
    app.eventually("the loss is noticed", all_ended).await;
}

async fn send_and_close(app: &TestApp, pcm: &[u8]) {
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(pcm).await.unwrap();
    peer.close_and_wait().await;
    app.settled().await;
}

/// Sets the clock by which the segments started, in their order.
async fn started(app: &TestApp, times: &[&str]) {
    let recording = recording(app).await;
    assert_eq!(segments(&recording).len(), times.len());
    for (segment, time) in segments(&recording).iter().zip(times) {
        let id = segment["id"].as_str().unwrap();
        app.database().batch_execute(&format!("UPDATE segments SET started_at = '2026-11-20 {time}' WHERE id = '{id}'")).unwrap();
    }
}

/// 100 ms that are lost, 150 ms that nobody recorded, 50 ms that end well; what they are, and the PCM of the whole.
async fn interrupted(app: &TestApp) -> Vec<u8> {
    let (one, two) = (counter_pcm(4_800, 1), counter_pcm(2_400, 50_000));
    send_and_vanish(app, &one).await;
    send_and_close(app, &two).await;
    started(app, &["10:53:12", "10:53:12.250"]).await;
    [one, vec![0; 7_200 * FRAME_BYTES], two].concat()
}

fn heard(app: &TestApp, media: &Response) -> (hound::WavSpec, Vec<u8>) {
    let file = app.dir.path().join("heard.wav");
    std::fs::write(&file, &media.body).unwrap();
    read_wav(&file)
}

#[tokio::test]
async fn two_connections_of_a_track_are_one_file_with_silence_between_them() {
    let app = TestApp::builder().open().start().await;
    let pcm = interrupted(&app).await;
    let recording = recording(&app).await;
    assert_eq!(reasons(&recording), ["lost", "closed"]);
    assert_eq!(times(&recording), [(0, 100), (250, 300)]);
    assert_eq!((&recording["durationMs"], &recording["gaps"]), (&json!(300), &json!([{"startMs": 100, "endMs": 250, "reason": "lost"}])));
    let whole = media(&app, "GET", &[]).await;
    assert_eq!((whole.status, whole.header("content-type"), whole.header("accept-ranges")), (200, Some("audio/wav"), Some("bytes")));
    assert_eq!((whole.header("x-wav-format"), whole.body.len()), (None, 44 + pcm.len()));
    let (spec, heard) = heard(&app, &whole);
    assert!((spec.sample_rate, spec.channels) == (48_000, 2) && heard == pcm);
    let head = media(&app, "HEAD", &[]).await;
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, Some(whole.body.len().to_string().as_str()), 0));
    assert_eq!(head.header("etag"), whole.header("etag"));
}

#[tokio::test]
async fn any_range_of_the_joined_file_is_that_slice_of_it() {
    let app = TestApp::builder().open().start().await;
    let pcm = interrupted(&app).await;
    let whole = media(&app, "GET", &[]).await;
    let (body, total) = (&whole.body, whole.body.len());
    let (first, gap) = (44 + 4_800 * FRAME_BYTES, 44 + 12_000 * FRAME_BYTES);
    let ranges = [
        (0, 1),
        (0, 44),
        (43, 45),
        (10, first + 3),
        (first - 1, first + 1),
        (first, gap),
        (gap - 5, gap + 5),
        (first + 7, total - 1),
        (1, total),
        (0, total),
    ];
    for (start, end) in ranges {
        let part = media(&app, "GET", &[("Range", &format!("bytes={start}-{}", end - 1))]).await;
        let content_range = format!("bytes {start}-{}/{total}", end - 1);
        assert_eq!((part.status, part.header("content-range")), (206, Some(content_range.as_str())));
        assert!(part.body == body[start..end], "{start}..{end}");
    }
    let (tail, open) = (media(&app, "GET", &[("Range", "bytes=-9600")]).await, media(&app, "GET", &[("Range", &format!("bytes={gap}-"))]).await);
    assert!(tail.body == pcm[pcm.len() - 9_600..] && open.body == tail.body);
    for range in [format!("bytes={total}-"), "bytes=-0".to_owned()] {
        let refused = media(&app, "GET", &[("Range", &range)]).await;
        refused.assert_problem(416, "rangeNotSatisfiable");
        assert_eq!(refused.header("content-range"), Some(format!("bytes */{total}").as_str()), "{range}");
    }
    for range in ["bytes=5-2", "bytes=0-1,4-5", "frames=0-1", "bytes=x"] {
        let ignored = media(&app, "GET", &[("Range", range)]).await;
        assert_eq!((ignored.status, ignored.header("content-range"), ignored.body.len()), (200, None, total), "{range}");
    }
}

#[tokio::test]
async fn a_finished_recording_keeps_its_etag_until_it_goes_on() {
    let app = TestApp::builder().open().start().await;
    interrupted(&app).await;
    let whole = media(&app, "GET", &[]).await;
    let (etag, modified) = (whole.header("etag").unwrap().to_owned(), whole.header("last-modified").unwrap().to_owned());
    assert!(etag.starts_with('"'), "{etag} is strong");
    for known in [("If-None-Match", &etag), ("If-Modified-Since", &modified)] {
        let unchanged = media(&app, "GET", &[(known.0, known.1)]).await;
        assert_eq!((unchanged.status, unchanged.header("etag"), unchanged.body.len()), (304, Some(etag.as_str()), 0), "{known:?}");
    }
    let range = ("Range", "bytes=0-9");
    for state in [&etag, &modified] {
        assert_eq!(media(&app, "GET", &[range, ("If-Range", state)]).await.status, 206, "{state}");
    }
    send_and_close(&app, &counter_pcm(480, 1)).await;
    started(&app, &["10:53:12", "10:53:12.250", "10:53:13"]).await;
    let longer = media(&app, "GET", &[("If-None-Match", &etag), range, ("If-Range", &etag)]).await;
    assert_eq!(longer.status, 200, "another file: whole");
    assert!(longer.body.len() > whole.body.len() && longer.header("etag") != Some(&etag));
    media(&app, "GET", &[("If-Match", &etag)]).await.assert_problem(412, "preconditionFailed");
}

#[tokio::test]
async fn rotated_segments_are_joined_to_the_sample_whatever_the_clocks_say() {
    let app = TestApp::builder().open().env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", "1s").start().await;
    let pcm = counter_pcm(48_000 * 3, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    for part in pcm.chunks(96_000) {
        peer.send_pcm(part).await.unwrap();
        let sent = peer.sent().audio_bytes;
        let written = async || (app.items("/api/v1/tracks/live").await.first()?["recordedBytes"].as_u64()? == sent as u64).then_some(());
        app.eventually("it is written", written).await;
    }
    peer.close_and_wait().await;
    let sealed = async || (!reasons(&recording(&app).await).contains(&"open")).then_some(());
    app.eventually("every segment is sealed", sealed).await;
    let shown = recording(&app).await;
    let count = segments(&shown).len();
    assert!(count >= 3 && reasons(&shown)[..count - 1].iter().all(|reason| *reason == "rotated"), "{shown}");
    let hours: Vec<String> = (10..10 + count).map(|hour| format!("{hour}:00:00")).collect();
    for clocks in [None, Some(hours)] {
        if let Some(hours) = &clocks {
            started(&app, &hours.iter().map(String::as_str).collect::<Vec<_>>()).await;
        }
        let shown = recording(&app).await;
        assert_eq!((&shown["durationMs"], &shown["gaps"]), (&json!(3_000), &json!([])), "{clocks:?}");
        assert!(times(&shown).windows(2).all(|pair| pair[0].1 == pair[1].0), "{shown}");
        let whole = media(&app, "GET", &[]).await;
        assert!(heard(&app, &whole).1 == pcm, "{clocks:?}: {} bytes", whole.body.len());
    }
}

#[tokio::test]
async fn segments_that_overlap_by_the_clock_are_laid_one_behind_the_other() {
    let app = TestApp::builder().open().start().await;
    let (one, two) = (counter_pcm(4_800, 1), counter_pcm(2_400, 50_000));
    send_and_vanish(&app, &one).await;
    send_and_close(&app, &two).await;
    started(&app, &["10:53:12", "10:53:12.040"]).await;
    let shown = recording(&app).await;
    assert_eq!((times(&shown), &shown["gaps"]), (vec![(0, 100), (100, 150)], &json!([])));
    assert!(media(&app, "GET", &[]).await.body[44..] == [one, two].concat());
}

#[tokio::test]
async fn segments_of_different_formats_are_not_joined_but_linked() {
    let app = TestApp::builder().open().start().await;
    send_and_vanish(&app, &counter_pcm(4_800, 1)).await;
    let handshake = Handshake { content_type: None, headers: &[] };
    let mut peer = EgressPeer::connect_with(app.addr, &format!("{PATH}&sampleRate=44100&channels=1"), handshake).await.unwrap();
    peer.send_pcm(&counter_pcm(2_205, 1)).await.unwrap();
    peer.close_and_wait().await;
    started(&app, &["10:53:12", "10:53:13"]).await;
    let shown = recording(&app).await;
    assert_eq!((times(&shown), &shown["durationMs"]), (vec![(0, 100), (1_000, 1_100)], &json!(1_100)), "the time line does not need one format");
    let refused = media(&app, "GET", &[]).await;
    refused.assert_problem(409, "manySegments");
    let document = refused.json();
    assert!(document["detail"].as_str().unwrap().contains("48000 Hz stereo, then 44100 Hz mono"), "{document}");
    let links: Vec<&str> = document["segments"].as_array().unwrap().iter().map(|link| link.as_str().unwrap()).collect();
    assert_eq!(links, segments(&shown).iter().map(|segment| segment["media"].as_str().unwrap()).collect::<Vec<_>>());
    for (link, bytes) in links.iter().zip([19_200, 8_820]) {
        assert_eq!(app.get(link).await.body.len(), 44 + bytes, "{link}");
    }
}

#[tokio::test]
async fn a_live_recording_is_shown_and_served_as_far_as_it_is() {
    let app = TestApp::builder().open().start().await;
    let (one, two) = (counter_pcm(4_800, 1), counter_pcm(9_600, 50_000));
    send_and_vanish(&app, &one).await;
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    let mut etags = Vec::new();
    for half in [1, 2] {
        let so_far = two.len() / 2 * half;
        peer.send_pcm(&two[so_far - two.len() / 2..so_far]).await.unwrap();
        let recorded = async || (app.items("/api/v1/tracks/live").await.first()?["recordedBytes"] == so_far).then_some(());
        app.eventually("it is recorded", recorded).await;
        app.eventually("its row is there", async || (segments(&recording(&app).await).len() == 2).then_some(())).await;
        started(&app, &["10:53:12", "10:53:12.250"]).await;
        let shown = recording(&app).await;
        let end = 250 + 100 * half as u64;
        assert_eq!((reasons(&shown), times(&shown), &shown["durationMs"]), (vec!["lost", "open"], vec![(0, 100), (250, end)], &json!(end)));
        assert_eq!(
            (segments(&shown)[1]["frames"].as_u64(), segments(&shown)[1]["seconds"].as_f64()),
            (Some(4_800 * half as u64), Some(0.1 * half as f64))
        );
        let whole = media(&app, "GET", &[]).await;
        assert!(heard(&app, &whole).1 == [&one[..], &vec![0; 28_800], &two[..so_far]].concat());
        let tail = media(&app, "GET", &[("Range", "bytes=-100")]).await;
        assert_eq!((tail.status, tail.body.as_slice()), (206, &two[so_far - 100..so_far]));
        assert!(whole.header("etag").is_some_and(|etag| etag.starts_with("W/")) && whole.header("last-modified").is_none(), "{:?}", whole.headers);
        etags.extend(whole.header("etag").map(str::to_owned));
    }
    assert_ne!(etags[0], etags[1]);
    peer.close_and_wait().await;
    let sealed = media(&app, "GET", &[]).await;
    assert!(sealed.header("etag").is_some_and(|etag| etag.starts_with('"')), "{:?}", sealed.headers);
}

#[tokio::test]
async fn past_four_gibibytes_the_file_is_rf64_and_says_so() {
    let app = TestApp::builder().open().start().await;
    let (one, two) = (counter_pcm(4_800, 1), counter_pcm(2_400, 50_000));
    send_and_vanish(&app, &one).await;
    send_and_close(&app, &two).await;
    started(&app, &["10:00:00", "17:00:00"]).await;
    let data = 7 * 3_600 * 192_000 + two.len();
    let total = 80 + data;
    let head = media(&app, "HEAD", &[]).await;
    assert_eq!((head.header("x-wav-format"), head.header("content-length")), (Some("RF64"), Some(total.to_string().as_str())));
    let start = media(&app, "GET", &[("Range", "bytes=0-19279")]).await;
    let data_sizes = [&data.to_le_bytes()[..], &(data / FRAME_BYTES).to_le_bytes()].concat();
    assert_eq!(
        (start.status, start.header("x-wav-format"), &start.body[..4], &start.body[28..44]),
        (206, Some("RF64"), &b"RF64"[..], &data_sizes[..])
    );
    assert!(start.body[80..] == one);
    let around = format!("bytes={}-", total - two.len() - 100_000);
    assert!(media(&app, "GET", &[("Range", &around)]).await.body == [vec![0; 100_000], two].concat());
    assert_eq!(recording(&app).await["durationMs"], 7 * 3_600_000 + 50);
}

#[tokio::test]
async fn a_missing_or_shortened_file_is_never_made_up() {
    let app = TestApp::builder().open().start().await;
    let pcm = interrupted(&app).await;
    let shown = recording(&app).await;
    let file = app.audio_dir().join(segments(&shown)[1]["path"].as_str().unwrap());
    std::fs::File::options().write(true).open(&file).unwrap().set_len(44 + 1_000).unwrap();
    let cut = media(&app, "GET", &[]).await;
    assert_eq!((cut.status, cut.header("content-length")), (200, Some((44 + pcm.len()).to_string().as_str())));
    let held = 44 + 12_000 * FRAME_BYTES + 1_000;
    assert!((44..=held).contains(&cut.body.len()), "{}: at most what the files hold", cut.body.len());
    assert!(pcm.starts_with(&cut.body[44..]));
    app.logged("a file ends before its segment does, or is gone").await;
    std::fs::remove_file(&file).unwrap();
    media(&app, "GET", &[]).await.assert_problem(404, "notFound");
    app.get(segments(&shown)[1]["media"].as_str().unwrap()).await.assert_problem(404, "notFound");
    assert_eq!(recording(&app).await, shown, "the rows say it still");
    // Not even a row that was tampered with leads out of the audio directory.
    std::fs::write(app.audio_dir().join("../outside.wav"), vec![1; 20_000]).unwrap();
    let id = segments(&shown)[1]["id"].as_str().unwrap();
    app.database().batch_execute(&format!("UPDATE segments SET path = '../outside.wav' WHERE id = '{id}'")).unwrap();
    media(&app, "GET", &[]).await.assert_problem(404, "notFound");
}
