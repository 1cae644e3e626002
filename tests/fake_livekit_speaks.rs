//! The fake LiveKit is a LiveKit: livekit-api's own client and receivers of the tests' own agree with it.

mod ear;
mod egress;
mod webhooks;

use std::time::Duration;

use livekit_api::access_token::{AccessToken, VideoGrants};
use livekit_api::services::egress::{EgressClient, EgressListFilter, EgressListOptions, TrackEgressOutput};
use livekit_api::services::room::RoomClient;
use livekit_api::services::{ServerError, ServiceError, ServiceResult};
use livekit_protocol as proto;
use proto::participant_info::Kind;

use crate::support::fake_livekit::{FakeLiveKit, Fault, Method, camera, mic, person, screen_audio};
use crate::support::http::request;
use crate::support::test_app::{API_KEY, API_SECRET};

/// The time-out of a client that gives up on purpose.
const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

fn rooms(livekit: &FakeLiveKit) -> RoomClient {
    RoomClient::with_api_key(&livekit.url(), API_KEY, API_SECRET).with_failover(false).with_request_timeout(LONG)
}

fn egress_client(livekit: &FakeLiveKit, patience: Duration) -> EgressClient {
    EgressClient::with_api_key(&livekit.ws_url(), API_KEY, API_SECRET).with_failover(false).with_request_timeout(patience)
}

async fn start(livekit: &FakeLiveKit, room: &str, track: &str, url: &str) -> ServiceResult<proto::EgressInfo> {
    egress_client(livekit, LONG).start_track_egress(room, TrackEgressOutput::WebSocket(url.to_owned()), track).await
}

async fn list(livekit: &FakeLiveKit, room: &str, active: bool) -> Vec<String> {
    let options = EgressListOptions { filter: EgressListFilter::Room(room.to_owned()), active, ..EgressListOptions::default() };
    let listed = egress_client(livekit, LONG).list_egress(options).await.unwrap();
    listed.into_iter().map(|info| info.egress_id).collect()
}

/// The Twirp code of a refusal, or what else went wrong.
#[track_caller]
fn code<T: std::fmt::Debug>(result: ServiceResult<T>) -> String {
    match result.expect_err("it must not succeed") {
        ServiceError::Twirp(ServerError::Twirp(error)) => error.code,
        ServiceError::Twirp(ServerError::Request(error)) if error.is_timeout() => "timeout".to_owned(),
        ServiceError::Twirp(ServerError::Request(error)) if error.is_connect() => "refused".to_owned(),
        ServiceError::Twirp(ServerError::Request(error)) if error.is_decode() => "unreadable".to_owned(),
        ServiceError::Twirp(ServerError::Request(_)) => "broken".to_owned(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_client_finds_the_world_as_it_is() {
    let livekit = FakeLiveKit::start().await;
    let sid = livekit.start_room_with("standup", "weekly").await;
    assert_eq!(livekit.room("standup"), sid, "one name is one room while it runs");
    livekit.join("standup", person("bot").kind(Kind::Agent).name("Bot").metadata("m").attribute("a", "1")).await;
    let microphone = livekit.publish("standup", "ana", mic().name("headset").mime("audio/opus")).await;
    let screen = livekit.publish("standup", "ana", screen_audio().muted().encrypted()).await;
    let video = livekit.publish("standup", "ana", camera()).await;
    livekit.start_room("other").await;

    let client = rooms(&livekit);
    let listed = client.list_rooms(Vec::new()).await.unwrap();
    assert_eq!(listed.iter().map(|room| room.name.as_str()).collect::<Vec<_>>(), ["standup", "other"]);
    let room = &client.list_rooms(vec!["standup".to_owned()]).await.unwrap()[0];
    assert_eq!((&*room.sid, &*room.metadata, room.num_participants, room.num_publishers), (&*sid, "weekly", 2, 1));
    assert_eq!(room.creation_time, room.creation_time_ms / 1_000);

    let participants = client.list_participants("standup").await.unwrap();
    let bot = &participants[0];
    assert_eq!((bot.kind(), &*bot.name, &*bot.metadata, &*bot.attributes["a"]), (Kind::Agent, "Bot", "m", "1"));
    let ana = client.get_participant("standup", "ana").await.unwrap();
    assert_eq!(ana, participants[1]);
    let tracks: Vec<_> =
        ana.tracks.iter().map(|track| (&track.sid, track.r#type().as_str_name(), track.source().as_str_name(), track.muted)).collect();
    assert_eq!(
        tracks,
        [(&microphone, "AUDIO", "MICROPHONE", false), (&screen, "AUDIO", "SCREEN_SHARE_AUDIO", true), (&video, "VIDEO", "CAMERA", false)]
    );
    assert_eq!((&*ana.tracks[0].name, &*ana.tracks[0].mime_type, ana.tracks[1].encryption().as_str_name()), ("headset", "audio/opus", "GCM"));

    livekit.mute(&screen, false).await;
    livekit.set_room_metadata("standup", "daily").await;
    let renewed = livekit.rejoin("standup", "ana").await;
    let again = client.get_participant("standup", "ana").await.unwrap();
    assert!(again.sid != ana.sid && again.tracks.iter().all(|track| !track.muted), "{again:?}");
    assert_eq!(again.tracks.iter().map(|track| track.sid.clone()).collect::<Vec<_>>(), renewed);
    assert!(!renewed.contains(&microphone) && again.tracks[0].name == "headset");
    livekit.unpublish(&renewed[2]).await;
    assert_eq!(client.get_participant("standup", "ana").await.unwrap().tracks.len(), 2);
    livekit.leave("standup", "ana").await;
    assert_eq!(code(client.get_participant("standup", "ana").await), "not_found");

    client.delete_room("standup").await.unwrap();
    assert_eq!(client.list_rooms(Vec::new()).await.unwrap().len(), 1);
    assert!(client.list_participants("standup").await.unwrap().is_empty());
    livekit.tune(|knobs| knobs.unknown_rooms_are_refused = true);
    for refused in [code(client.list_participants("standup").await), code(client.delete_room("standup").await)] {
        assert_eq!(refused, "not_found");
    }
    assert_ne!(livekit.start_room("standup").await, sid, "a new room of an old name has another SID");
}

#[tokio::test]
async fn only_a_token_that_grants_it_may_ask() {
    let livekit = FakeLiveKit::start().await;
    livekit.start_room("a").await;
    let addr = livekit.url().strip_prefix("http://").unwrap().parse().unwrap();
    let token = |secret: &str, grants: VideoGrants| AccessToken::with_api_key(API_KEY, secret).with_grants(grants).to_jwt().unwrap();
    let of_b = VideoGrants { room_admin: true, room: "b".to_owned(), ..VideoGrants::default() };
    let recorder = VideoGrants { room_record: true, ..VideoGrants::default() };
    let lister = VideoGrants { room_list: true, ..VideoGrants::default() };
    let bearer = |token: String| format!("Bearer {token}");
    let list_a = prost::Message::encode_to_vec(&proto::ListParticipantsRequest { room: "a".to_owned() });
    for (method, body, authorization, status, code) in [
        ("RoomService/ListRooms", &b""[..], Some(bearer(token(API_SECRET, lister.clone()))), 200, ""),
        ("RoomService/ListRooms", b"", None, 401, "unauthenticated"),
        ("RoomService/ListRooms", b"", Some(token(API_SECRET, lister.clone())), 401, ""),
        ("RoomService/ListRooms", b"", Some(bearer(token("another-secret-of-32-characters!", lister.clone()))), 401, ""),
        ("RoomService/ListRooms", b"", Some(bearer(token(API_SECRET, recorder.clone()))), 401, "unauthenticated"),
        ("RoomService/ListParticipants", &list_a, Some(bearer(token(API_SECRET, of_b))), 401, "unauthenticated"),
        ("Egress/ListEgress", b"", Some(bearer(token(API_SECRET, lister.clone()))), 401, "unauthenticated"),
        ("Egress/ListEgress", b"", Some(bearer(token(API_SECRET, recorder))), 200, ""),
        ("RoomService/ListRooms", b"\xff", Some(bearer(token(API_SECRET, lister.clone()))), 400, "malformed"),
        ("RoomService/MutePublishedTrack", b"", Some(bearer(token(API_SECRET, lister))), 404, "bad_route"),
    ] {
        let mut headers = vec![("Content-Type", "application/protobuf")];
        headers.extend(authorization.as_deref().map(|authorization| ("Authorization", authorization)));
        let answer = request(addr, "POST", &format!("/twirp/livekit.{method}"), &headers, body).await;
        assert_eq!(answer.status, status, "{method}");
        if code.is_empty() {
            let kind = if status == 200 { "application/protobuf" } else { "text/plain; charset=utf-8" };
            assert_eq!(answer.header("content-type"), Some(kind), "{method}");
        } else {
            assert_eq!((answer.json()["code"].as_str(), answer.header("content-type")), (Some(code), Some("application/json")));
        }
    }
}

#[tokio::test]
async fn every_scripted_fault_looks_to_the_client_as_it_should_and_then_is_over() {
    let livekit = FakeLiveKit::start().await;
    livekit.start_room("a").await;
    let faults = [
        (Fault::Unavailable, "unavailable"),
        (Fault::Hang, "timeout"),
        (Fault::HangButRun, "timeout"),
        (Fault::Close, "broken"),
        (Fault::CloseButRun, "broken"),
        (Fault::ProxyPage, "unreadable"),
        (Fault::NotFound, "not_found"),
        (Fault::Unauthenticated, "unauthenticated"),
        (Fault::ResourceExhausted, "resource_exhausted"),
        (Fault::Slow(LONG), "timeout"),
    ];
    for (fault, seen) in faults {
        livekit.fail_next(Method::StartTrackEgress, fault, 1);
        let client = egress_client(&livekit, if seen == "timeout" { SHORT } else { LONG });
        let output = TrackEgressOutput::WebSocket("ws://127.0.0.1:1/".to_owned());
        assert_eq!(code(client.start_track_egress("a", output, "TR_1").await), seen, "{fault:?}");
    }
    assert_eq!(livekit.egresses().len(), 3, "those that hang but run, close but run, and are slow");
    assert_eq!(livekit.calls(Method::StartTrackEgress), 10);
    let journal = livekit.journal();
    assert_eq!(journal.iter().map(|call| call.fault).collect::<Vec<_>>(), faults.map(|(fault, _)| Some(fault)));
    assert!(journal.iter().all(|call| call.room == "a" && call.track == "TR_1"));
    assert!(journal.is_sorted_by_key(|call| call.at));
    assert_eq!((journal[0].status, journal[1].status, journal[5].status), (Some(503), None, Some(502)));

    livekit.fail(Method::ListRooms, Fault::Unavailable);
    for _ in 0..3 {
        assert_eq!(code(rooms(&livekit).list_rooms(Vec::new()).await), "unavailable");
    }
    livekit.clear(Method::ListRooms);
    rooms(&livekit).list_rooms(Vec::new()).await.unwrap();
}

#[tokio::test]
async fn an_unreachable_livekit_refuses_and_comes_back_where_it_was() {
    let livekit = FakeLiveKit::start().await;
    let client = rooms(&livekit);
    client.list_rooms(Vec::new()).await.unwrap();
    for _ in 0..2 {
        livekit.unreachable().await;
        let first = code(client.list_rooms(Vec::new()).await);
        assert!(["broken", "refused"].contains(&&*first), "on the connection it had, or on a new one: {first}");
        assert_eq!(code(client.list_rooms(Vec::new()).await), "refused");
        livekit.reachable();
        client.list_rooms(Vec::new()).await.unwrap();
    }
}

#[tokio::test]
async fn starts_past_what_the_nodes_admit_are_unavailable() {
    let livekit = FakeLiveKit::start().await;
    livekit.start_room("a").await;
    livekit.nodes(2);
    for _ in 0..12 {
        start(&livekit, "a", "TR_1", "ws://127.0.0.1:1/").await.unwrap();
    }
    assert_eq!(code(start(&livekit, "a", "TR_1", "ws://127.0.0.1:1/").await), "unavailable");
    livekit.tune(|knobs| knobs.start_window = Duration::ZERO);
    start(&livekit, "a", "TR_1", "ws://127.0.0.1:1/").await.unwrap();
    livekit.nodes(0);
    assert_eq!(code(start(&livekit, "a", "TR_1", "ws://127.0.0.1:1/").await), "unavailable");
}

#[tokio::test]
async fn what_cannot_be_started_or_stopped_is_refused() {
    let livekit = FakeLiveKit::start().await;
    assert_eq!(code(start(&livekit, "nowhere", "TR_1", "ws://127.0.0.1:1/").await), "not_found");
    livekit.start_room("a").await;
    assert_eq!(code(start(&livekit, "a", "TR_1", "http://127.0.0.1:1/").await), "invalid_argument");
    assert_eq!(code(egress_client(&livekit, LONG).stop_egress("EG_unknown").await), "not_found");
    assert!(livekit.egresses().is_empty());
}
