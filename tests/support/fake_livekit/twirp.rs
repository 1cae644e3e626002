//! LiveKit's server API: who may call, what is answered, what is made to go wrong, and a journal of it all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use livekit_api::access_token::{TokenVerifier, VideoGrants};
use livekit_protocol as proto;
use prost::Message;
use proto::EgressStatus;
use serde_json::json;
use tokio::time::sleep;

use super::egress::{Command, End, is_over};
use super::server::{Answer, Reply, Request};
use super::world::World;
use super::{Shared, State, worker};
use crate::support::test_app::{API_KEY, API_SECRET};

/// The methods that the fake has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    ListRooms,
    ListParticipants,
    GetParticipant,
    DeleteRoom,
    StartTrackEgress,
    ListEgress,
    StopEgress,
}

/// What goes wrong instead of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 503, as when no egress node answers.
    Unavailable,
    /// It is done, but the client never hears of it.
    HangButRun,
    Hang,
    /// The connection ends without an answer.
    Close,
    /// It is done, then the connection ends without an answer.
    CloseButRun,
    /// 502 with a proxy's page.
    ProxyPage,
    NotFound,
    Unauthenticated,
    ResourceExhausted,
    /// It is done, and answered after this time.
    Slow(Duration),
}

/// One call, as it came and was answered.
#[derive(Clone, Debug)]
pub struct Call {
    pub method: Method,
    pub room: String,
    pub track: String,
    pub egress_id: String,
    pub at: Instant,
    pub fault: Option<Fault>,
    /// Of the answer; `None` where there was or will be none.
    pub status: Option<u16>,
}

/// A fault of the next calls of a method, or of all.
#[derive(Debug)]
pub struct ScriptedFault {
    pub method: Method,
    pub fault: Fault,
    /// `None` is until it is cleared.
    pub left: Option<usize>,
}

/// An error as Twirp has it; what checks tokens stands before Twirp, and has words without a code (docs/FACTS.md, server API).
#[derive(Debug)]
struct Failure {
    status: u16,
    code: Option<&'static str>,
    message: String,
}

type Outcome = Result<Vec<u8>, Failure>;

enum Asked {
    ListRooms(proto::ListRoomsRequest),
    ListParticipants(proto::ListParticipantsRequest),
    GetParticipant(proto::RoomParticipantIdentity),
    DeleteRoom(proto::DeleteRoomRequest),
    StartTrackEgress(Box<proto::TrackEgressRequest>),
    ListEgress(proto::ListEgressRequest),
    StopEgress(proto::StopEgressRequest),
}

pub async fn answer(shared: &Arc<Shared>, request: &Request) -> Answer {
    let Some(method) = method(request) else {
        return failed(&failure(404, "bad_route", &format!("no handler for path {:?}", request.path)));
    };
    let asked = match asked(method, request) {
        Ok(asked) => asked,
        Err(failure) => return failed(&failure),
    };
    let fault = shared.change(|state| {
        let fault = take_fault(&mut state.faults, method);
        state.journal.push(call(method, &asked, fault));
        (fault, state.journal.len() - 1)
    });
    let (fault, at) = fault;
    let run = || match permitted(request, &asked) {
        Ok(()) => perform(shared, &asked),
        Err(failure) => Err(failure),
    };
    let answer = match fault {
        None => reply(run()),
        Some(Fault::Slow(delay)) => {
            let outcome = run();
            sleep(delay).await;
            reply(outcome)
        }
        Some(Fault::HangButRun) => {
            run().ok();
            Answer::Hang
        }
        Some(Fault::CloseButRun) => {
            run().ok();
            Answer::Close
        }
        Some(Fault::Hang) => Answer::Hang,
        Some(Fault::Close) => Answer::Close,
        Some(Fault::Unavailable) => failed(&no_response()),
        Some(Fault::NotFound) => failed(&failure(404, "not_found", "scripted by the test")),
        Some(Fault::Unauthenticated) => failed(&failure(401, "unauthenticated", "scripted by the test")),
        Some(Fault::ResourceExhausted) => failed(&failure(429, "resource_exhausted", "scripted by the test")),
        Some(Fault::ProxyPage) => {
            let body = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>".to_vec();
            Answer::Reply(Reply { status: 502, content_type: "text/html", body })
        }
    };
    if let Answer::Reply(reply) = &answer {
        shared.change(|state| state.journal[at].status = Some(reply.status));
    }
    answer
}

fn method(request: &Request) -> Option<Method> {
    if request.method != "POST" || request.headers.get("content-type").map(String::as_str) != Some("application/protobuf") {
        return None;
    }
    Some(match request.path.strip_prefix("/twirp/livekit.")? {
        "RoomService/ListRooms" => Method::ListRooms,
        "RoomService/ListParticipants" => Method::ListParticipants,
        "RoomService/GetParticipant" => Method::GetParticipant,
        "RoomService/DeleteRoom" => Method::DeleteRoom,
        "Egress/StartTrackEgress" => Method::StartTrackEgress,
        "Egress/ListEgress" => Method::ListEgress,
        "Egress/StopEgress" => Method::StopEgress,
        _ => return None,
    })
}

fn asked(method: Method, request: &Request) -> Result<Asked, Failure> {
    fn read<M: Message + Default>(request: &Request) -> Result<M, Failure> {
        M::decode(request.body.as_slice()).map_err(|error| failure(400, "malformed", &error.to_string()))
    }
    Ok(match method {
        Method::ListRooms => Asked::ListRooms(read(request)?),
        Method::ListParticipants => Asked::ListParticipants(read(request)?),
        Method::GetParticipant => Asked::GetParticipant(read(request)?),
        Method::DeleteRoom => Asked::DeleteRoom(read(request)?),
        Method::StartTrackEgress => Asked::StartTrackEgress(Box::new(read(request)?)),
        Method::ListEgress => Asked::ListEgress(read(request)?),
        Method::StopEgress => Asked::StopEgress(read(request)?),
    })
}

fn call(method: Method, asked: &Asked, fault: Option<Fault>) -> Call {
    let (room, track, egress_id) = match asked {
        Asked::ListRooms(_) => ("", "", ""),
        Asked::ListParticipants(request) => (&*request.room, "", ""),
        Asked::GetParticipant(request) => (&*request.room, "", ""),
        Asked::DeleteRoom(request) => (&*request.room, "", ""),
        Asked::StartTrackEgress(request) => (&*request.room_name, &*request.track_id, ""),
        Asked::ListEgress(request) => (&*request.room_name, "", &*request.egress_id),
        Asked::StopEgress(request) => ("", "", &*request.egress_id),
    };
    let (room, track, egress_id) = (room.to_owned(), track.to_owned(), egress_id.to_owned());
    Call { method, room, track, egress_id, at: Instant::now(), fault, status: None }
}

fn take_fault(faults: &mut Vec<ScriptedFault>, method: Method) -> Option<Fault> {
    let at = faults.iter().position(|scripted| scripted.method == method)?;
    let fault = faults[at].fault;
    if let Some(left) = &mut faults[at].left {
        *left -= 1;
        if *left == 0 {
            faults.remove(at);
        }
    }
    Some(fault)
}

/// Whether the token is LiveKit's key's, and grants what is asked.
fn permitted(request: &Request, asked: &Asked) -> Result<(), Failure> {
    let untrusted = |message: &str| Failure { status: 401, code: None, message: message.to_owned() };
    let forbidden = || failure(401, "unauthenticated", "permissions denied");
    let header = request.headers.get("authorization").ok_or_else(forbidden)?;
    let token = header.strip_prefix("Bearer ").ok_or_else(|| untrusted("invalid authorization header. Must start with Bearer "))?;
    let verified = TokenVerifier::with_api_key(API_KEY, API_SECRET).verify(token);
    let video: VideoGrants = verified.map_err(|error| untrusted(&format!("invalid token: {token}, error: {error}")))?.video;
    let granted = match asked {
        Asked::ListRooms(_) => video.room_list,
        Asked::ListParticipants(request) => video.room_admin && video.room == request.room,
        Asked::GetParticipant(request) => video.room_admin && video.room == request.room,
        Asked::DeleteRoom(_) => video.room_create,
        Asked::StartTrackEgress(_) | Asked::ListEgress(_) | Asked::StopEgress(_) => video.room_record,
    };
    if granted { Ok(()) } else { Err(forbidden()) }
}

fn perform(shared: &Arc<Shared>, asked: &Asked) -> Outcome {
    match asked {
        Asked::ListRooms(request) => Ok(shared.look(|state| list_rooms(&state.world, &request.names)).encode_to_vec()),
        Asked::ListParticipants(request) => shared.look(|state| {
            let participants = match state.world.room(&request.room) {
                Some(room) => room.participants.clone(),
                None if state.knobs.unknown_rooms_are_refused => return Err(no_room()),
                None => Vec::new(),
            };
            Ok(proto::ListParticipantsResponse { participants }.encode_to_vec())
        }),
        Asked::GetParticipant(request) => shared.look(|state| {
            let participant = state.world.participant(&request.room, &request.identity);
            Ok(participant.ok_or_else(|| refusal(404, "not_found", "participant does not exist"))?.encode_to_vec())
        }),
        Asked::DeleteRoom(request) => shared.change(|state| {
            state.world.room(&request.room).ok_or_else(no_room)?;
            state.world.finish_room(&request.room);
            state.close_sources();
            Ok(proto::DeleteRoomResponse::default().encode_to_vec())
        }),
        Asked::StartTrackEgress(request) => start(shared, request),
        Asked::ListEgress(request) => Ok(shared.look(|state| list_egress(state, request)).encode_to_vec()),
        Asked::StopEgress(request) => shared.change(|state| stop(state, &request.egress_id)),
    }
}

fn list_rooms(world: &World, names: &[String]) -> proto::ListRoomsResponse {
    let wanted = world.rooms.iter().filter(|room| names.is_empty() || names.contains(&room.info.name));
    proto::ListRoomsResponse { rooms: wanted.map(World::listed).collect() }
}

fn list_egress(state: &State, request: &proto::ListEgressRequest) -> proto::ListEgressResponse {
    let wanted = state.egresses.iter().map(|egress| &egress.info).filter(|info| {
        (request.room_name.is_empty() || info.room_name == request.room_name)
            && (request.egress_id.is_empty() || info.egress_id == request.egress_id)
            && !(request.active && is_over(info.status()))
    });
    proto::ListEgressResponse { items: wanted.cloned().collect(), ..proto::ListEgressResponse::default() }
}

fn start(shared: &Arc<Shared>, request: &proto::TrackEgressRequest) -> Outcome {
    let (info, worker) = shared.change(|state| {
        let room_id = match state.world.room(&request.room_name) {
            Some(room) => room.info.sid.clone(),
            None if state.knobs.elsewhere.is_some() => String::new(),
            None => return Err(no_room()),
        };
        let Some(proto::track_egress_request::Output::WebsocketUrl(url)) = &request.output else {
            return Err(refusal(400, "invalid_argument", "request has missing or invalid field: output"));
        };
        if !(url.starts_with("ws://") || url.starts_with("wss://")) {
            return Err(refusal(400, "invalid_argument", "invalid scheme"));
        }
        if !state.admits_start() {
            return Err(no_response());
        }
        Ok(state.start_egress(room_id, request, url))
    })?;
    tokio::spawn(worker::run(Arc::clone(shared), worker));
    Ok(info.encode_to_vec())
}

fn stop(state: &mut State, egress_id: &str) -> Outcome {
    let Some(egress) = state.egresses.iter().find(|egress| egress.info.egress_id == egress_id) else {
        return Err(refusal(404, "not_found", "egress does not exist"));
    };
    let status = egress.info.status();
    if is_over(status) {
        let message = format!("egress with status {} cannot be stopped", status.as_str_name());
        return Err(refusal(412, "failed_precondition", &message));
    }
    egress.tell(Command::End(End::Stopped));
    if status == EgressStatus::EgressActive {
        state.tell_of_egress(egress_id, "egress_updated", |info| info.set_status(EgressStatus::EgressEnding));
    }
    Ok(state.egress(egress_id).info.encode_to_vec())
}

fn reply(outcome: Outcome) -> Answer {
    match outcome {
        Ok(body) => Answer::Reply(Reply { status: 200, content_type: "application/protobuf", body }),
        Err(failure) => failed(&failure),
    }
}

fn failed(failure: &Failure) -> Answer {
    let Failure { status, code, message } = failure;
    let (content_type, body) = match code {
        Some(code) => ("application/json", json!({ "code": code, "msg": message }).to_string()),
        None => ("text/plain; charset=utf-8", message.clone()),
    };
    Answer::Reply(Reply { status: *status, content_type, body: body.into_bytes() })
}

fn failure(status: u16, code: &'static str, message: &str) -> Failure {
    Failure { status, code: Some(code), message: message.to_owned() }
}

/// A service's own word; LiveKit puts these before it.
fn refusal(status: u16, code: &'static str, message: &str) -> Failure {
    failure(status, code, &format!("twirp error unknown: {message}"))
}

fn no_room() -> Failure {
    refusal(404, "not_found", "requested room does not exist")
}

fn no_response() -> Failure {
    refusal(503, "unavailable", "no response from servers")
}
