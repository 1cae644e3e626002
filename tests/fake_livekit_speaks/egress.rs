//! Egresses: what they stream, how they end, and what is said of them.

use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use livekit_api::services::egress::TrackEgressOutput;
use livekit_protocol as proto;
use proto::EgressStatus;
use proto::participant_info::Kind;

use super::ear::{Door, Ear, Ended};
use super::{LONG, code, egress_client, list, rooms, start};
use crate::support::egress_peer::{CHUNK_BYTES, counter_pcm};
use crate::support::fake_livekit::{Audio, EgressSeen, End, FakeLiveKit, Script, camera, mic};

/// Streams the microphone of ana in `standup` to an ear.
async fn streaming(livekit: &FakeLiveKit, ear: &Ear, path: &str) -> (String, EgressSeen) {
    let track = livekit.publish("standup", "ana", mic()).await;
    start(livekit, "standup", &track, &ear.url(path)).await.unwrap();
    let egress = livekit.streaming(&track).await;
    (track, egress)
}

async fn ended(livekit: &FakeLiveKit, id: &str) -> EgressSeen {
    let over = |livekit: &FakeLiveKit| livekit.egresses().into_iter().find(|egress| egress.id == id && livekit.active_for(id).is_empty());
    livekit.eventually("the egress's end", over).await
}

#[tokio::test]
async fn an_egress_lives_as_the_api_the_socket_and_the_webhooks_tell() {
    let (livekit, ear, door) = (FakeLiveKit::start().await, Ear::start().await, Door::start(&[200]).await);
    livekit.pace(4.0);
    let before = SystemTime::now();
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.deliver_to(door.addr);
    let url = ear.url("/egress-audio?roomName=a%20b&ticket=t");
    let info = start(&livekit, "standup", &track, &url).await.unwrap();
    assert_eq!((info.status(), &*info.room_name, info.source_type()), (EgressStatus::EgressStarting, "standup", proto::EgressSourceType::Sdk));
    assert!(info.egress_id.starts_with("EG_"), "{info:?}");

    let egress = livekit.streaming(&track).await;
    assert_eq!((&egress.id, egress.status, egress.handshakes), (&info.egress_id, EgressStatus::EgressActive, vec![101]));
    assert_eq!((&*egress.query["roomName"], &*egress.query["ticket"], &egress.url), ("a b", "t", &url));
    let participants = rooms(&livekit).list_participants("standup").await.unwrap();
    assert_eq!((&participants[1].identity, participants[1].kind()), (&info.egress_id, Kind::Egress));
    assert_eq!(rooms(&livekit).list_rooms(Vec::new()).await.unwrap()[0].num_participants, 1, "a hidden participant does not count");
    assert_eq!(list(&livekit, "standup", true).await, [&*info.egress_id]);
    ear.until("ten messages", |heard| heard.first().is_some_and(|heard| heard.lengths.len() >= 10)).await;

    let stopped = egress_client(&livekit, LONG).stop_egress(&info.egress_id).await.unwrap();
    assert_eq!(stopped.status(), EgressStatus::EgressEnding);
    assert_eq!(livekit.journal().pop().unwrap().egress_id, info.egress_id);
    let egress = ended(&livekit, &info.egress_id).await;
    assert_eq!((egress.status, &*egress.details, egress.connected), (EgressStatus::EgressComplete, "End reason: StopEgress API", false));
    ear.until("the end", |heard| heard[0].ended.is_some()).await;
    let heard = &ear.heard()[0];
    assert_eq!((heard.ended, &*heard.path), (Some(Ended::Close(None)), "/egress-audio?roomName=a%20b&ticket=t"));
    assert!(heard.lengths.iter().all(|length| *length == CHUNK_BYTES), "{:?}", heard.lengths);
    let sent = livekit.sent_pcm(&track);
    assert!(sent[0].egress_id == info.egress_id && sent[0].stretches[0].at >= before);
    assert_eq!((sent.len(), sent[0].bytes() == heard.pcm, sent[0].frames() * 4), (1, true, heard.pcm.len() as u64));
    assert_eq!(heard.pcm, counter_pcm(heard.pcm.len() / 4, 1));

    assert_eq!(code(egress_client(&livekit, LONG).stop_egress(&info.egress_id).await), "failed_precondition");
    assert!(list(&livekit, "standup", true).await.is_empty());
    assert_eq!(list(&livekit, "standup", false).await, [&*info.egress_id]);
    livekit.webhooks_delivered().await;
    let told: Vec<_> = door.knocks().iter().map(super::ear::Knock::json).filter(|body| !body["egressInfo"].is_null()).collect();
    let statuses: Vec<_> = told.iter().map(|body| (body["event"].as_str().unwrap(), body["egressInfo"]["status"].as_str())).collect();
    let expected = [
        ("egress_started", None),
        ("egress_updated", Some("EGRESS_ACTIVE")),
        ("egress_updated", Some("EGRESS_ENDING")),
        ("egress_ended", Some("EGRESS_COMPLETE")),
    ];
    assert_eq!(statuses, expected);
    let active = &told[1]["egressInfo"];
    for place in ["/track/websocketUrl", "/streamResults/0/url", "/stream/info/0/url"] {
        assert_eq!(active.pointer(place).and_then(|found| found.as_str()), Some(&*url), "{place} of {active}");
    }
    assert!(active["streamResults"][0]["startedAt"].is_string() && active["sourceType"] == "EGRESS_SOURCE_TYPE_SDK", "{active}");
    for event in ["participant_joined", "participant_left"] {
        let hidden =
            &livekit.deliveries_of(event).into_iter().rfind(|delivery| delivery.event.participant.as_ref().unwrap().identity == info.egress_id);
        assert_eq!(hidden.as_ref().unwrap().json()["participant"]["kind"], "EGRESS", "{event}");
    }
}

#[tokio::test]
async fn every_end_shows_on_the_socket_and_in_the_api() {
    let (livekit, ear) = (FakeLiveKit::start().await, Ear::start().await);
    let ends = [
        (End::Crash, Ended::Broken, EgressStatus::EgressFailed),
        (End::Reset, Ended::Broken, EgressStatus::EgressFailed),
        (End::SourceClosed, Ended::Close(None), EgressStatus::EgressComplete),
        (End::LimitReached, Ended::Close(None), EgressStatus::EgressLimitReached),
        (End::Aborted, Ended::Close(None), EgressStatus::EgressAborted),
        (End::RoomLost, Ended::Close(None), EgressStatus::EgressFailed),
    ];
    for (index, (end, on_the_socket, status)) in ends.into_iter().enumerate() {
        let (track, egress) = streaming(&livekit, &ear, "/").await;
        livekit.end_egress(&track, end.clone()).await;
        ear.until("the end", |heard| heard.len() > index && heard[index].ended.is_some()).await;
        assert_eq!(ear.heard()[index].ended, Some(on_the_socket), "{end:?}");
        assert_eq!(ended(&livekit, &egress.id).await.status, status, "{end:?}");
        livekit.unpublish(&track).await;
    }
    let lost = livekit.egresses().pop().unwrap();
    assert_eq!(lost.error, "recording ended early: connection to room failed");
}

#[tokio::test]
async fn the_end_of_the_source_ends_the_egress_in_order() {
    let (livekit, ear) = (FakeLiveKit::start().await, Ear::start().await);
    let (first, _) = streaming(&livekit, &ear, "/").await;
    livekit.unpublish(&first).await;
    let (second, _) = streaming(&livekit, &ear, "/").await;
    let renewed = livekit.rejoin("standup", "ana").await;
    let (third, _) = streaming(&livekit, &ear, "/").await;
    livekit.leave("standup", "ana").await;
    let (fourth, _) = streaming(&livekit, &ear, "/").await;
    livekit.finish_room("standup").await;
    assert!(!renewed.contains(&second));
    for track in [first, second, third, fourth] {
        let id = livekit.egresses().into_iter().find(|egress| egress.track == track).unwrap().id;
        let egress = ended(&livekit, &id).await;
        assert_eq!((egress.status, &*egress.details), (EgressStatus::EgressComplete, "End reason: Source closed"));
        assert!(livekit.sent_pcm(&track)[0].duration() >= Duration::from_millis(30), "trailing audio comes before the Close");
    }
    ear.until("four ends", |heard| heard.iter().filter(|heard| heard.ended == Some(Ended::Close(None))).count() == 4).await;
}

#[tokio::test]
async fn what_cannot_connect_fails_with_the_words_of_livekit() {
    let (livekit, ear) = (FakeLiveKit::start().await, Ear::start().await);
    livekit.tune(|knobs| knobs.subscription_timeout = Duration::from_millis(50));
    let (track, video) = (livekit.publish("standup", "ana", mic()).await, livekit.publish("standup", "ana", camera()).await);
    for (track, url, error, error_code) in [
        (&*track, ear.url("/?refuse=403"), "websocket: bad handshake", 400),
        (&*track, "ws://127.0.0.1:1/".to_owned(), "dial tcp 127.0.0.1:1", 400),
        (&*track, "ws://user:pass@127.0.0.1:1/".to_owned(), "malformed ws or wss URL", 400),
        ("TR_none", ear.url("/"), "track TR_none not found", 404),
        (&*video, ear.url("/"), "format websocket incompatible with codec video/vp8", 400),
        (&*track, ear.url("/?close=1"), "websocket: close sent", 503),
    ] {
        let info = start(&livekit, "standup", track, &url).await.unwrap();
        let egress = ended(&livekit, &info.egress_id).await;
        assert_eq!((egress.status, egress.error_code), (EgressStatus::EgressFailed, error_code), "{egress:?}");
        assert!(egress.error.starts_with(error) && egress.details == "End reason: Failure", "{egress:?}");
    }
    assert_eq!(livekit.egresses()[0].handshakes, [403]);
}

#[tokio::test]
async fn scripts_decide_what_the_next_starts_do() {
    let (livekit, ear) = (FakeLiveKit::start().await, Ear::start().await);
    livekit.pace(8.0);
    let track = livekit.publish("standup", "ana", mic()).await;
    let begin = async || start(&livekit, "standup", &track, &ear.url("/")).await.unwrap().egress_id;
    livekit.script_next(Script::DieBeforeDial);
    livekit.script_next(Script::NeverDial);
    livekit.script_next(Script::EndAfter(Duration::from_millis(250), End::Crash));
    livekit.script_next(Script::DialTwice);
    livekit.script_next(Script::Stall);
    livekit.script_next(Script::DialAfter(Duration::from_millis(20)));
    let dead = ended(&livekit, &begin().await).await;
    assert_eq!((dead.status, dead.handshakes.len()), (EgressStatus::EgressFailed, 0));
    let never = begin().await;
    assert_eq!(egress_client(&livekit, LONG).stop_egress(&never).await.unwrap().status(), EgressStatus::EgressStarting);
    let aborted = ended(&livekit, &never).await;
    assert_eq!((aborted.status, &*aborted.error), (EgressStatus::EgressAborted, "Stop called before pipeline could start"));
    let exact = begin().await;
    ended(&livekit, &exact).await;
    assert_eq!(livekit.sent_pcm(&exact)[0].duration(), Duration::from_millis(250));

    let twice = begin().await;
    livekit.eventually("two handshakes", |livekit| (livekit.active_for(&twice).first()?.handshakes.len() == 2).then_some(())).await;
    livekit.close_egress(&twice).await;
    let stalled = begin().await;
    livekit.streaming(&stalled).await;
    assert_eq!(livekit.dial_again(&stalled).await, Some(101));
    livekit.end_egress(&stalled, End::Stopped).await;
    assert_eq!((ended(&livekit, &stalled).await.error.as_str(), livekit.sent_pcm(&stalled)[0].frames()), ("pipeline frozen", 0));

    let late = begin().await;
    livekit.streaming(&late).await;
    livekit.stall_egress(&late);
    livekit.reset_egress(&late).await;
    livekit.script_all(Some(Script::DieBeforeDial));
    for _ in 0..2 {
        assert_eq!(ended(&livekit, &begin().await).await.status, EgressStatus::EgressFailed);
    }
    livekit.script_all(None);
    livekit.streaming(&begin().await).await;
}

#[tokio::test]
async fn a_muted_track_says_so_and_streams_silence_without_losing_its_place() {
    let (livekit, ear) = (FakeLiveKit::start().await, Ear::start().await);
    livekit.pace(8.0);
    let pcm = counter_pcm(480 * 40, 9);
    let track = livekit.publish("standup", "ana", mic().audio(Audio::pcm(&pcm[..pcm.len() - 4])).muted()).await;
    start(&livekit, "standup", &track, &ear.url("/")).await.unwrap();
    ear.until("silence", |heard| heard.first().is_some_and(|heard| heard.pcm.len() > 10_000)).await;
    assert_eq!(ear.heard()[0].texts, [r#"{"muted":true}"#]);
    livekit.mute(&track, false).await;
    ear.until("sound, then silence", |heard| heard[0].pcm.len() > 100_000 + pcm.len()).await;
    livekit.close_egress(&track).await;
    ear.until("the end", |heard| heard[0].ended.is_some()).await;
    let heard = &ear.heard()[0];
    assert_eq!(heard.texts, [r#"{"muted":true}"#, r#"{"muted":false}"#]);
    let sound = heard.pcm.iter().position(|byte| *byte != 0).unwrap();
    assert_eq!(sound % CHUNK_BYTES, 0);
    assert_eq!(heard.pcm[sound..sound + pcm.len() - 4], pcm[..pcm.len() - 4]);
    assert!(heard.pcm[sound + pcm.len() - 4..].iter().all(|byte| *byte == 0), "after the sound there is silence");
    assert_eq!(livekit.sent_pcm(&track)[0].bytes(), heard.pcm);
}

#[tokio::test]
async fn two_hundred_egresses_stream_at_once() {
    let (livekit, ear) = (FakeLiveKit::start().await, Ear::start().await);
    let mut tracks = Vec::new();
    for index in 0..200 {
        tracks.push(livekit.publish("plenary", &format!("p{index}"), mic()).await);
    }
    let client = egress_client(&livekit, LONG);
    let output = || TrackEgressOutput::WebSocket(ear.url("/"));
    for started in join_all(tracks.iter().map(|track| client.start_track_egress("plenary", output(), track))).await {
        started.unwrap();
    }
    ear.until("200 streams", |heard| heard.len() == 200 && heard.iter().all(|heard| heard.lengths.len() >= 20)).await;
    livekit.finish_room("plenary").await;
    ear.until("200 ends", |heard| heard.iter().all(|heard| heard.ended == Some(Ended::Close(None)))).await;
    let firsts: std::collections::BTreeSet<Vec<u8>> = ear.heard().into_iter().map(|heard| heard.pcm[..4].to_vec()).collect();
    assert_eq!(firsts.len(), 200, "each counts from a number of its own");
}

#[tokio::test]
async fn a_sudden_end_does_not_wait_for_a_reader_that_stalls() {
    let livekit = FakeLiveKit::start().await;
    livekit.pace(64.0);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let track = livekit.publish("standup", "ana", mic()).await;
    start(&livekit, "standup", &track, &format!("ws://{}/", listener.local_addr().unwrap())).await.unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let _socket = tokio_tungstenite::accept_async(stream).await.unwrap(); // which is never read
    livekit.streaming(&track).await;
    let mut before = 0;
    let stuck = |livekit: &FakeLiveKit| {
        let frames = livekit.sent_pcm(&track)[0].frames();
        (frames > 0 && std::mem::replace(&mut before, frames) == frames).then_some(())
    };
    livekit.eventually("full buffers", stuck).await;
    livekit.crash_egress(&track).await;
    assert_eq!(livekit.egresses()[0].error, "internal error: signal: killed");
}
