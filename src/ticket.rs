//! Tickets that open the ingest: `v1.<payload>.<mac>`, signed with HMAC-SHA256 by a key of their own.
//!
//! LiveKit's egress can carry a credential only in the URL, and repeats that URL in webhooks and logs (`docs/FACTS.md`, egress socket). So a ticket is bound to
//! one track, opens one connection, and is worth nothing ten minutes after it was made.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use crate::audio::mixdown::Mix;
use crate::config::Secret;
use crate::ids::{Identity, MeetingId, RoomName, TicketId, TrackSid};
use crate::video::codec::VideoCodec;

/// How long after its making a ticket may open its connection.
pub const LIFETIME: Duration = Duration::from_secs(600);

const VERSION: &str = "v1";

/// Which endpoint a ticket opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TicketKind {
    Audio,
    Video,
}

/// What a ticket is good for. What it says wins over the query.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ticket {
    #[serde(rename = "jti")]
    pub id: TicketId,
    #[serde(rename = "exp", with = "chrono::serde::ts_seconds")]
    pub expires_at: DateTime<Utc>,
    pub kind: TicketKind,
    #[serde(flatten)]
    pub subject: TicketSubject,
}

/// The track that a ticket is bound to, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TicketSubject {
    pub room_name: RoomName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub participant: Option<Identity>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_id: Option<TrackSid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meeting_id: Option<MeetingId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_rate: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<u16>,
    /// Length of the groups for analysis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_seconds: Option<f64>,
    /// Whether the analysis service may hear it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub analyse: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mix: Option<Mix>,
    /// Of a ticket for video.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub codec: Option<VideoCodec>,
}

/// The longest name in a ticket, in bytes. LiveKit's own limits are 256 and below.
const MAX_NAME_BYTES: usize = 1_024;

impl TicketSubject {
    /// Bound to a room, and to nothing else.
    pub fn of_room(room_name: RoomName) -> Self {
        Self {
            room_name,
            participant: None,
            track_id: None,
            meeting_id: None,
            sample_rate: None,
            channels: None,
            group_seconds: None,
            analyse: None,
            mix: None,
            codec: None,
        }
    }

    /// What no ticket of a kind may say; nothing when it is in order.
    pub fn faults_of(&self, kind: TicketKind) -> Vec<String> {
        let mut faults = self.faults();
        match (kind, self.codec) {
            (TicketKind::Video, None) => faults.push("codec is required for video: h264, vp8 or vp9".to_owned()),
            (TicketKind::Audio, Some(_)) => faults.push("codec is for video alone".to_owned()),
            (TicketKind::Video, Some(_)) | (TicketKind::Audio, None) => {}
        }
        faults
    }

    /// What no ticket may say; nothing when it is in order.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.room_name.as_str().is_empty() {
            faults.push("roomName is required".to_owned());
        }
        let names = [
            Some(self.room_name.as_str()),
            self.participant.as_ref().map(Identity::as_str),
            self.track_id.as_ref().map(TrackSid::as_str),
            self.meeting_id.as_ref().map(MeetingId::as_str),
        ];
        if names.iter().flatten().any(|name| name.len() > MAX_NAME_BYTES) {
            faults.push(format!("a name is longer than {MAX_NAME_BYTES} bytes"));
        }
        if self.sample_rate.is_some_and(|rate| !(8_000..=192_000).contains(&rate)) {
            faults.push("sampleRate must be a number from 8000 to 192000".to_owned());
        }
        if self.channels.is_some_and(|channels| !(1..=2).contains(&channels)) {
            faults.push("channels must be a number from 1 to 2".to_owned());
        }
        if self.group_seconds.is_some_and(|seconds| !(0.1..=30.0).contains(&seconds)) {
            faults.push("groupSeconds must be a number from 0.1 to 30 seconds".to_owned());
        }
        faults
    }
}

/// The URL that a ticket opens: what LiveKit's track egress takes as `websocketUrl`. `base` is such as `ws://10.0.0.5:3001`.
///
/// It says all that the ticket says, for whoever reads it in an `EgressInfo`; the ticket, which comes last, decides.
pub fn socket_url(base: &str, ticket: &Ticket, text: &str) -> String {
    let path = match ticket.kind {
        TicketKind::Audio => "egress-audio",
        TicketKind::Video => "egress-video",
    };
    let TicketSubject { room_name, participant, track_id, meeting_id, sample_rate, channels, group_seconds, analyse, mix, codec } = &ticket.subject;
    let said = [
        ("participant", participant.as_ref().map(|identity| percent_encode(identity.as_str()))),
        ("trackId", track_id.as_ref().map(|sid| percent_encode(sid.as_str()))),
        ("meetingId", meeting_id.as_ref().map(|id| percent_encode(id.as_str()))),
        ("sampleRate", sample_rate.map(|rate| rate.to_string())),
        ("channels", channels.map(|channels| channels.to_string())),
        ("groupSeconds", group_seconds.map(|seconds| seconds.to_string())),
        ("analyse", analyse.map(|analyse| analyse.to_string())),
        ("mix", mix.map(|mix| mix.as_str().to_owned())),
        ("codec", codec.map(|codec| codec.as_str().to_owned())),
    ];
    let said: String = said.into_iter().filter_map(|(name, value)| Some(format!("&{name}={}", value?))).collect();
    format!("{base}/{path}?roomName={}{said}&ticket={text}", percent_encode(room_name.as_str()))
}

/// A value of a query string.
pub fn percent_encode(text: &str) -> String {
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if unreserved(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// Why a ticket opens nothing. The sender is told none of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    #[error("the ticket is not one of ours")]
    Forged,
    #[error("the ticket has expired")]
    Expired,
    #[error("the ticket is for another endpoint")]
    OtherKind,
}

/// Makes and checks tickets.
#[derive(Debug, Clone)]
pub struct TicketMint {
    key: Secret,
}

impl TicketMint {
    pub fn new(key: Secret) -> Self {
        Self { key }
    }

    /// A fresh ticket as text, and what it says.
    pub fn mint(&self, kind: TicketKind, subject: TicketSubject, now: DateTime<Utc>) -> (String, Ticket) {
        let lifetime = TimeDelta::from_std(LIFETIME).expect("ten minutes are in range");
        let ticket = Ticket { id: TicketId::new(Uuid::new_v4().simple().to_string()), expires_at: now + lifetime, kind, subject };
        let payload = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&ticket).expect("a ticket is plain data"));
        let signed = format!("{VERSION}.{payload}");
        let mac = URL_SAFE_NO_PAD.encode(self.mac(&signed));
        (format!("{signed}.{mac}"), ticket)
    }

    /// Checks signature, time and kind, but not whether the ticket is spent.
    ///
    /// # Errors
    /// See [`TicketError`].
    pub fn check(&self, text: &str, kind: TicketKind, now: DateTime<Utc>) -> Result<Ticket, TicketError> {
        let (signed, mac) = text.rsplit_once('.').ok_or(TicketError::Forged)?;
        let mac = URL_SAFE_NO_PAD.decode(mac).map_err(|_| TicketError::Forged)?;
        if !bool::from(self.mac(signed).as_slice().ct_eq(&mac)) {
            return Err(TicketError::Forged);
        }
        let payload = signed.strip_prefix(VERSION).and_then(|rest| rest.strip_prefix('.')).ok_or(TicketError::Forged)?;
        let payload = URL_SAFE_NO_PAD.decode(payload).map_err(|_| TicketError::Forged)?;
        let ticket: Ticket = serde_json::from_slice(&payload).map_err(|_| TicketError::Forged)?;
        if ticket.expires_at <= now {
            return Err(TicketError::Expired);
        }
        if ticket.kind != kind {
            return Err(TicketError::OtherKind);
        }
        Ok(ticket)
    }

    fn mac(&self, signed: &str) -> Vec<u8> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.key.expose().as_bytes()).expect("HMAC takes a key of any length");
        mac.update(signed.as_bytes());
        mac.finalize().into_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mint() -> TicketMint {
        TicketMint::new(Secret::new("a-ticket-key-of-thirty-two-chars"))
    }

    fn subject() -> TicketSubject {
        TicketSubject {
            participant: Some(Identity::new("ana")),
            sample_rate: Some(48_000),
            channels: Some(2),
            group_seconds: Some(2.5),
            analyse: Some(false),
            mix: Some(Mix::Mono),
            ..TicketSubject::of_room(RoomName::new("room"))
        }
    }

    fn url(kind: TicketKind, subject: TicketSubject) -> String {
        let ticket = Ticket { id: TicketId::new("id"), expires_at: Utc::now(), kind, subject };
        socket_url("wss://media.example.com", &ticket, "v1.x.y")
    }

    #[test]
    fn the_url_says_what_the_ticket_says_and_the_ticket_last() {
        let said = "roomName=room&participant=ana&sampleRate=48000&channels=2&groupSeconds=2.5&analyse=false&mix=mono&ticket=v1.x.y";
        assert_eq!(url(TicketKind::Audio, subject()), format!("wss://media.example.com/egress-audio?{said}"));
        let named = TicketSubject {
            participant: Some(Identity::new("a=b?c#d%20")),
            track_id: Some(TrackSid::new("TR_1")),
            meeting_id: Some(MeetingId::new("M\u{e9}")),
            group_seconds: Some(2.0),
            ..TicketSubject::of_room(RoomName::new("a room & more"))
        };
        let said = "roomName=a%20room%20%26%20more&participant=a%3Db%3Fc%23d%2520&trackId=TR_1&meetingId=M%C3%A9&groupSeconds=2&ticket=v1.x.y";
        assert_eq!(url(TicketKind::Video, named), format!("wss://media.example.com/egress-video?{said}"));
    }

    #[test]
    fn a_ticket_for_video_names_a_codec_and_no_other_does() {
        let of = |codec| TicketSubject { codec, ..TicketSubject::of_room(RoomName::new("room")) };
        let video = of(Some(VideoCodec::Vp9));
        assert_eq!(url(TicketKind::Video, video.clone()), "wss://media.example.com/egress-video?roomName=room&codec=vp9&ticket=v1.x.y");
        assert_eq!((video.faults_of(TicketKind::Video), of(None).faults_of(TicketKind::Audio)), (vec![], vec![]));
        assert_eq!(of(None).faults_of(TicketKind::Video), ["codec is required for video: h264, vp8 or vp9"]);
        assert_eq!(video.faults_of(TicketKind::Audio), ["codec is for video alone"]);
    }

    #[test]
    fn groups_of_a_tenth_of_a_second_to_half_a_minute_are_in_order() {
        let faults = |seconds| TicketSubject { group_seconds: Some(seconds), ..subject() }.faults();
        for good in [0.1, 2.5, 30.0] {
            assert_eq!(faults(good), Vec::<String>::new(), "{good}");
        }
        for bad in [0.09, 30.1, 0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(faults(bad), ["groupSeconds must be a number from 0.1 to 30 seconds"], "{bad}");
        }
    }

    #[test]
    fn a_ticket_says_what_it_was_made_for() {
        let now = Utc::now();
        let (text, ticket) = mint().mint(TicketKind::Audio, subject(), now);
        let checked = mint().check(&text, TicketKind::Audio, now).expect("valid");
        assert_eq!((checked.id, checked.subject), (ticket.id, subject()));
        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)), "it needs no escaping in a URL");
    }

    #[test]
    fn nothing_else_opens() {
        let now = Utc::now();
        let (text, _) = mint().mint(TicketKind::Audio, subject(), now);
        let other = TicketMint::new(Secret::new("another-ticket-key-of-32-letters"));
        let check = |mint: &TicketMint, text: &str, kind, now| mint.check(text, kind, now).expect_err("refused");
        assert_eq!(check(&other, &text, TicketKind::Audio, now), TicketError::Forged);
        assert_eq!(check(&mint(), &text, TicketKind::Video, now), TicketError::OtherKind);
        assert_eq!(check(&mint(), &text, TicketKind::Audio, now + TimeDelta::seconds(601)), TicketError::Expired);
        let payload = URL_SAFE_NO_PAD.encode(r#"{"roomName":"other"}"#);
        let mac = text.rsplit('.').next().expect("a mac");
        for forged in ["", ".", "v1.", "v1.x.y", &text[1..], &format!("v1.{payload}.{mac}"), &format!("v2{}", &text[2..])] {
            assert_eq!(check(&mint(), forged, TicketKind::Audio, now), TicketError::Forged, "{forged}");
        }
        let mut bytes = text.clone().into_bytes();
        let last = bytes.len() - 3;
        bytes[last] = if bytes[last] == b'A' { b'B' } else { b'A' };
        assert_eq!(check(&mint(), &String::from_utf8(bytes).expect("ASCII"), TicketKind::Audio, now), TicketError::Forged);
    }

    #[test]
    fn no_two_tickets_are_the_same() {
        let now = Utc::now();
        assert_ne!(mint().mint(TicketKind::Audio, subject(), now).1.id, mint().mint(TicketKind::Audio, subject(), now).1.id);
    }
}
