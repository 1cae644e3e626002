//! The fake LiveKit answers as the real one does, refusals too: what the other tests rely on.

use livekit_api::access_token::{AccessToken, VideoGrants};
use livekit_protocol as proto;
use prost::Message;

use super::{Venue, installed};
use crate::support::fake_livekit::FakeLiveKit;
use crate::support::http::{Response, request};
use crate::support::test_app::{API_KEY, API_SECRET};

fn bearer(key: &str, secret: &str, grants: VideoGrants) -> Option<String> {
    Some(format!("Bearer {}", AccessToken::with_api_key(key, secret).with_grants(grants).to_jwt().expect("a token")))
}

/// What matters of an answer: LiveKit's words before Twirp's door are its own.
fn seen(answer: &Response) -> (u16, Option<String>, String) {
    let kind = answer.header("content-type").map(str::to_owned);
    let words = if kind.as_deref() == Some("application/json") { answer.json()["msg"].to_string() } else { String::new() };
    let code = if kind.as_deref() == Some("application/json") { answer.json()["code"].to_string() } else { String::new() };
    (answer.status, kind, format!("{code} {words}"))
}

#[tokio::test]
async fn the_fake_livekit_answers_as_the_real_one() {
    let Some(installed) = installed() else { return };
    let venue = Venue::open(&installed, &[]).await;
    let fake = FakeLiveKit::start().await;
    let lister = || VideoGrants { room_list: true, ..VideoGrants::default() };
    let maker = || VideoGrants { room_create: true, ..VideoGrants::default() };
    let recorder = || VideoGrants { room_record: true, ..VideoGrants::default() };
    let admin = |room: &str| VideoGrants { room_admin: true, room: room.to_owned(), ..VideoGrants::default() };
    let ours = |grants: VideoGrants| bearer(API_KEY, API_SECRET, grants);
    let nowhere = || "nowhere".to_owned();
    let of_room = proto::ListParticipantsRequest { room: nowhere() }.encode_to_vec();
    let of_ana = proto::RoomParticipantIdentity { room: nowhere(), identity: "ana".to_owned(), ..Default::default() }.encode_to_vec();
    let deletion = proto::DeleteRoomRequest { room: nowhere() }.encode_to_vec();
    let output = Some(proto::track_egress_request::Output::WebsocketUrl("ws://127.0.0.1:1/".to_owned()));
    let egress = proto::TrackEgressRequest { room_name: nowhere(), track_id: "TR_1".to_owned(), output, ..Default::default() }.encode_to_vec();
    let cases: Vec<(&str, &str, Option<String>, &[u8])> = vec![
        ("no rooms", "RoomService/ListRooms", ours(lister()), b""),
        ("no token", "RoomService/ListRooms", None, b""),
        ("a token without its word", "RoomService/ListRooms", ours(lister()).map(|token| token.replace("Bearer ", "")), b""),
        ("no token at all", "RoomService/ListRooms", Some("Bearer nonsense".to_owned()), b""),
        ("an unknown key", "RoomService/ListRooms", bearer("nobody", API_SECRET, lister()), b""),
        ("a wrong secret", "RoomService/ListRooms", bearer(API_KEY, "another-secret-of-32-characters!", lister()), b""),
        ("another grant", "RoomService/ListRooms", ours(recorder()), b""),
        ("who is in a room that is not there", "RoomService/ListParticipants", ours(admin("nowhere")), &of_room),
        ("the grant for another room", "RoomService/ListParticipants", ours(admin("other")), &of_room),
        ("somebody who is not there", "RoomService/GetParticipant", ours(admin("nowhere")), &of_ana),
        ("the end of a room that is not there", "RoomService/DeleteRoom", ours(maker()), &deletion),
        ("an end without a grant", "RoomService/DeleteRoom", ours(lister()), &deletion),
        ("an egress of a room that is not there", "Egress/StartTrackEgress", ours(recorder()), &egress),
        ("an egress without a grant", "Egress/StartTrackEgress", ours(lister()), &egress),
        ("a method that is not there", "RoomService/Nothing", ours(lister()), b""),
        ("what is no message", "RoomService/ListRooms", ours(lister()), b"\xff\xff"),
    ];
    for (what, method, authorization, body) in cases {
        let mut headers = vec![("Content-Type", "application/protobuf")];
        headers.extend(authorization.as_deref().map(|authorization| ("Authorization", authorization)));
        let path = format!("/twirp/livekit.{method}");
        let real = request(venue.livekit.addr, "POST", &path, &headers, body).await;
        let (real, fake) = (seen(&real), seen(&request(fake.addr(), "POST", &path, &headers, body).await));
        assert_eq!((real.0, &real.1), (fake.0, &fake.1), "{what}");
        if !matches!(method, "RoomService/Nothing") && body != b"\xff\xff" {
            assert_eq!(real.2, fake.2, "{what}");
        }
    }
}
