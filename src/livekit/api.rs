//! LiveKit's server API, as far as recordings need it: what is there, and track egresses to our own address.
//!
//! An answer is told apart from no answer, and "no such thing" from both: only an answer says that something is not there.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::DateTime;
use livekit_api::services::egress::{EgressClient, EgressListFilter, EgressListOptions, TrackEgressOutput};
use livekit_api::services::room::RoomClient;
use livekit_api::services::{ServerError, ServerErrorCode, ServiceError};
use livekit_protocol as proto;

use super::scrub::scrub_text;
use super::webhook::{attributes_text, role};
use crate::config::Secret;
use crate::ids::{EgressId, Identity, ParticipantSid, RoomName, RoomSid, TrackSid};
use crate::session::event::{EgressStatus, Participant, Room, Track};

/// Why a call brought nothing. The texts hold no URL of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// LiveKit says that there is no such room, track or egress.
    #[error("LiveKit knows no such thing: {0}")]
    NotFound(String),
    /// Nobody takes it now: no egress node has room (`docs/FACTS.md`, server API), or a limit is reached.
    #[error("LiveKit is busy: {0}")]
    Busy(String),
    /// The request itself is refused: credentials, or what it asks for.
    #[error("LiveKit refuses: {0}")]
    Refused(String),
    /// LiveKit or what stands before it failed, or the answer was lost: it may have been done all the same.
    #[error("LiveKit did not answer: {0}")]
    Unanswered(String),
    /// It never reached LiveKit.
    #[error("LiveKit cannot be reached: {0}")]
    Unreachable(String),
}

impl CallError {
    /// Whether what was asked for may be under way.
    pub fn may_have_happened(&self) -> bool {
        match self {
            Self::Unanswered(_) => true,
            Self::NotFound(_) | Self::Busy(_) | Self::Refused(_) | Self::Unreachable(_) => false,
        }
    }
}

impl From<ServiceError> for CallError {
    fn from(error: ServiceError) -> Self {
        let text = |error: &dyn std::error::Error| scrub_text(&chain(error));
        match error {
            ServiceError::Twirp(ServerError::Twirp(answer)) => from_code(&answer.code, scrub_text(&answer.to_string())),
            ServiceError::Twirp(ServerError::Request(error)) if error.is_connect() => Self::Unreachable(text(&error)),
            // livekit-api reads every error as JSON and loses the status: of a proxy's page, and of LiveKit's words on a token (`docs/FACTS.md`, server API).
            ServiceError::Twirp(ServerError::Request(error)) if is_no_json(&error) => {
                Self::Unanswered(format!("the API key or its secret is wrong, or a proxy answered in its place: {}", text(&error)))
            }
            ServiceError::Twirp(ServerError::Request(error)) => Self::Unanswered(text(&error)),
            ServiceError::Twirp(ServerError::Prost(error)) => Self::Unanswered(text(&error)),
            ServiceError::Twirp(ServerError::Url(error)) => Self::Refused(text(&error)),
            ServiceError::Env(error) => Self::Refused(text(&error)),
            ServiceError::AccessToken(error) => Self::Refused(text(&error)),
        }
    }
}

/// Twirp's codes (twitchtv.github.io/twirp/docs/spec_v7.html, error codes).
fn from_code(code: &str, text: String) -> CallError {
    match code {
        ServerErrorCode::NOT_FOUND => CallError::NotFound(text),
        ServerErrorCode::UNAVAILABLE | ServerErrorCode::RESOURCE_EXHAUSTED => CallError::Busy(text),
        ServerErrorCode::INVALID_ARGUMENT
        | ServerErrorCode::MALFORMED
        | ServerErrorCode::BAD_ROUTE
        | ServerErrorCode::ALREADY_EXISTS
        | ServerErrorCode::PERMISSION_DENIED
        | ServerErrorCode::UNAUTHENTICATED
        | ServerErrorCode::FAILED_PRECONDITION
        | ServerErrorCode::OUT_OF_RANGE
        | ServerErrorCode::UNIMPLEMENTED => CallError::Refused(text),
        // canceled, unknown, deadline_exceeded, aborted, internal, dataloss, and what Twirp may add.
        _ => CallError::Unanswered(text),
    }
}

/// Whether an answer came whole and was not JSON.
fn is_no_json(error: &dyn std::error::Error) -> bool {
    error.source().is_some_and(|cause| cause.is::<serde_json::Error>())
}

/// An error with what caused it: reqwest's own words leave that out.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source()).map(|cause| format!(": {cause}"));
    std::iter::once(error.to_string()).chain(causes).collect()
}

/// Where LiveKit is and who we are to it.
#[derive(Debug, Clone)]
pub struct LiveKitAccess {
    pub url: String,
    pub api_key: String,
    pub api_secret: Secret,
    pub timeout: Duration,
}

/// A participant and what it publishes.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    pub participant: Participant,
    pub tracks: Vec<Track>,
}

/// An egress that runs, of a track and to our address.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnEgress {
    pub id: EgressId,
    pub room: RoomName,
    pub track: TrackSid,
    pub status: EgressStatus,
}

/// LiveKit's server API.
#[derive(Debug)]
pub struct LiveKit {
    rooms: RoomClient,
    egress: EgressClient,
}

impl LiveKit {
    pub fn new(access: &LiveKitAccess) -> Self {
        let LiveKitAccess { url, api_key, api_secret, timeout } = access;
        Self {
            rooms: RoomClient::with_api_key(url, api_key, api_secret.expose()).with_failover(false).with_request_timeout(*timeout),
            egress: EgressClient::with_api_key(url, api_key, api_secret.expose()).with_failover(false).with_request_timeout(*timeout),
        }
    }

    /// The rooms that are open now.
    pub async fn rooms(&self) -> Result<Vec<Room>, CallError> {
        Ok(self.rooms.list_rooms(Vec::new()).await?.into_iter().map(room).collect())
    }

    /// Who is in a room, but for egresses.
    pub async fn participants(&self, room: &RoomName) -> Result<Vec<Listed>, CallError> {
        Ok(self.rooms.list_participants(room.as_str()).await?.into_iter().filter_map(listed).collect())
    }

    /// The egresses that run and send to `base`, of one room or of all.
    pub async fn own_egresses(&self, room: Option<&RoomName>, base: &str) -> Result<Vec<OwnEgress>, CallError> {
        let filter = room.map_or(EgressListFilter::All, |room| EgressListFilter::Room(room.as_str().to_owned()));
        let listed = self.egress.list_egress(EgressListOptions { filter, active: true, page_token: None }).await?;
        Ok(listed.into_iter().filter_map(|info| own(info, base)).filter(|egress| !egress.status.is_final()).collect())
    }

    /// Asks for a track egress to `url`. The socket comes later than the answer.
    pub async fn start_track_egress(&self, room: &RoomName, track: &TrackSid, url: String) -> Result<EgressId, CallError> {
        let info = self.egress.start_track_egress(room.as_str(), TrackEgressOutput::WebSocket(url), track.as_str()).await?;
        Ok(EgressId::new(info.egress_id))
    }

    /// Ends an egress. One that has ended or was never there is no error.
    pub async fn stop_egress(&self, egress: &EgressId) -> Result<(), CallError> {
        match self.egress.stop_egress(egress.as_str()).await {
            Ok(_) => Ok(()),
            // The second is LiveKit's word for an egress that has ended.
            Err(ServiceError::Twirp(ServerError::Twirp(answer)))
                if [ServerErrorCode::NOT_FOUND, ServerErrorCode::FAILED_PRECONDITION].contains(&answer.code.as_str()) =>
            {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn room(room: proto::Room) -> Room {
    let created_at = if room.creation_time_ms > 0 {
        DateTime::from_timestamp_millis(room.creation_time_ms)
    } else {
        DateTime::from_timestamp(room.creation_time, 0).filter(|_| room.creation_time > 0)
    };
    Room { sid: RoomSid::new(room.sid), name: RoomName::new(room.name), created_at, metadata: Some(room.metadata.replace('\0', "\u{2400}")) }
}

/// An enum value by its name, or by its number where this version knows no name.
fn name<E: Into<i32>>(number: i32, known: E, name: &str) -> String {
    if known.into() == number { name.to_owned() } else { number.to_string() }
}

fn listed(info: proto::ParticipantInfo) -> Option<Listed> {
    let kind = name(info.kind, info.kind(), info.kind().as_str_name());
    if kind == "EGRESS" {
        return None;
    }
    let tracks = info.tracks.iter().map(track).collect();
    let attributes: BTreeMap<String, String> = info.attributes.into_iter().collect();
    let metadata = info.metadata.replace('\0', "\u{2400}");
    let joined_at =
        if info.joined_at_ms > 0 { DateTime::from_timestamp_millis(info.joined_at_ms) } else { DateTime::from_timestamp(info.joined_at, 0) };
    let participant = Participant {
        sid: ParticipantSid::new(info.sid),
        identity: Identity::new(info.identity),
        name: info.name.replace('\0', "\u{2400}"),
        kind,
        role: role(&attributes, &metadata),
        metadata,
        attributes: attributes_text(&attributes),
        joined_at: joined_at.filter(|_| info.joined_at > 0 || info.joined_at_ms > 0),
        complete: true,
    };
    Some(Listed { participant, tracks })
}

fn track(info: &proto::TrackInfo) -> Track {
    Track {
        sid: TrackSid::new(&info.sid),
        kind: name(info.r#type, info.r#type(), info.r#type().as_str_name()),
        source: name(info.source, info.source(), info.source().as_str_name()),
        name: info.name.replace('\0', "\u{2400}"),
        mime_type: info.mime_type.replace('\0', "\u{2400}"),
        encryption: name(info.encryption, info.encryption(), info.encryption().as_str_name()),
    }
}

/// `None` for what is not a track's or not to us. The URL goes no further (`docs/FACTS.md`, egress socket).
fn own(info: proto::EgressInfo, base: &str) -> Option<OwnEgress> {
    let status = EgressStatus::from_name(info.status().as_str_name());
    let Some(proto::egress_info::Request::Track(request)) = info.request else { return None };
    let Some(proto::track_egress_request::Output::WebsocketUrl(url)) = request.output else { return None };
    let to_us = url.strip_prefix(base).is_some_and(|path| path.starts_with("/egress-audio"));
    to_us.then(|| OwnEgress {
        id: EgressId::new(info.egress_id),
        room: RoomName::new(request.room_name),
        track: TrackSid::new(request.track_id),
        status,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart() {
        let table = [
            ("not_found", CallError::NotFound(String::new())),
            ("unavailable", CallError::Busy(String::new())),
            ("resource_exhausted", CallError::Busy(String::new())),
            ("unauthenticated", CallError::Refused(String::new())),
            ("permission_denied", CallError::Refused(String::new())),
            ("invalid_argument", CallError::Refused(String::new())),
            ("deadline_exceeded", CallError::Unanswered(String::new())),
            ("internal", CallError::Unanswered(String::new())),
            ("a_code_of_the_future", CallError::Unanswered(String::new())),
        ];
        for (code, error) in table {
            assert_eq!(from_code(code, String::new()), error, "{code}");
        }
        assert!(CallError::Unanswered(String::new()).may_have_happened());
        assert!(!CallError::Unreachable(String::new()).may_have_happened());
    }

    fn info(url: &str) -> proto::EgressInfo {
        let output = Some(proto::track_egress_request::Output::WebsocketUrl(url.to_owned()));
        let request = proto::TrackEgressRequest { room_name: "room".into(), track_id: "TR_1".into(), output, ..Default::default() };
        proto::EgressInfo { egress_id: "EG_1".into(), request: Some(proto::egress_info::Request::Track(request)), ..Default::default() }
    }

    #[test]
    fn only_egresses_to_our_address_are_ours() {
        let base = "wss://media.example.com";
        let found = own(info("wss://media.example.com/egress-audio?roomName={...}"), base).expect("ours, even with its query redacted");
        assert_eq!((found.id.as_str(), found.track.as_str(), found.status), ("EG_1", "TR_1", EgressStatus::Starting));
        for other in ["wss://media.example.com.evil/egress-audio", "wss://other/egress-audio", "ws://media.example.com/egress-audio"] {
            assert_eq!(own(info(other), base), None, "{other}");
        }
        assert_eq!(own(proto::EgressInfo { request: None, ..info("") }, base), None);
    }

    #[test]
    fn new_enum_values_are_kept_by_number() {
        let info = proto::TrackInfo { sid: "TR_1".into(), source: 99, encryption: 1, ..Default::default() };
        let track = track(&info);
        assert_eq!((track.kind.as_str(), track.source.as_str(), track.encryption.as_str()), ("AUDIO", "99", "GCM"));
        assert_eq!(listed(proto::ParticipantInfo { kind: 2, ..Default::default() }), None, "an egress is no participant");
        assert_eq!(listed(proto::ParticipantInfo { kind: 44, ..Default::default() }).expect("listed").participant.kind, "44");
    }
}
