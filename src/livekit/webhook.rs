//! LiveKit's webhooks: is it from LiveKit, and what does it say?
//!
//! The token is verified by `livekit-api`; what it vouches for is compared here, over the raw body and in constant time. The body is read by a
//! small tolerant structure of our own: the generated one refuses the whole event for one new enum value (`docs/FACTS.md`, webhooks).

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Datelike, Utc};
use jsonwebtoken::errors::ErrorKind;
use livekit_api::access_token::{AccessToken, AccessTokenError, Claims, TokenVerifier, VideoGrants};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::scrub::{is_scrubbed, scrub_text};
use crate::ids::{EgressId, EventId, Identity, ParticipantSid, RoomName, RoomSid, TrackSid};
use crate::session::event::{EgressReport, EgressStatus, EventKind, Participant, Room, SessionEvent, Track};

/// Why a webhook is not believed. The sender is told none of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("no LiveKit credentials are configured")]
    NoCredentials,
    #[error("there is no token")]
    Unsigned,
    #[error("the token is not valid")]
    Forged,
    #[error("the signature is good but its times are not: the clocks of this machine and LiveKit's differ")]
    BadTimes,
    #[error("the token vouches for another body")]
    OtherBody,
    /// LiveKit encodes nothing; decoding is what a small body becomes a large one by.
    #[error("the body has a Content-Encoding")]
    Encoded,
}

/// Verifies webhooks signed with any of LiveKit's API keys.
#[derive(Debug)]
pub struct WebhookVerifier {
    /// By the key's name.
    verifiers: BTreeMap<String, TokenVerifier>,
}

impl WebhookVerifier {
    /// Of keys with their secrets.
    pub fn new<'a>(keys: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let verifier = |(key, secret): (&str, &str)| (key.to_owned(), TokenVerifier::with_api_key(key, secret));
        Self { verifiers: keys.into_iter().map(verifier).collect() }
    }

    /// Checks the `Authorization` header against the raw body.
    ///
    /// # Errors
    /// Anything but an HS256 token of one of our keys with valid `exp` and `nbf` (60 s leeway), no grants, and the SHA-256 of exactly this body.
    pub fn verify(&self, authorization: Option<&str>, body: &[u8]) -> Result<(), Rejection> {
        let header = authorization.ok_or(Rejection::Unsigned)?;
        // LiveKit sends the bare token (`docs/FACTS.md`, webhooks).
        let token = header.strip_prefix("Bearer ").unwrap_or(header).trim();
        // Who claims to have signed is believed only as far as to choose the secret that can prove it.
        let issuer = Claims::from_unverified(token).map_err(|_| Rejection::Forged)?.iss;
        let verifier = self.verifiers.get(&issuer).ok_or(Rejection::Forged)?;
        let claims = verifier.verify(token).map_err(|error| match error {
            AccessTokenError::Encoding(error) if matches!(error.kind(), ErrorKind::ExpiredSignature | ErrorKind::ImmatureSignature) => {
                Rejection::BadTimes
            }
            AccessTokenError::InvalidKeys | AccessTokenError::InvalidEnv(_) | AccessTokenError::InvalidClaims(_) | AccessTokenError::Encoding(_) => {
                Rejection::Forged
            }
        })?;
        // A participant's token is signed with the same secret: it has grants and no digest. The library passes absent claims: an absent
        // `nbf` reads as 0, an absent issuer as the empty text, which names no key.
        if claims.iss != issuer || claims.nbf == 0 || claims.sha256.is_empty() || claims.video != VideoGrants::default() {
            return Err(Rejection::Forged);
        }
        let digest = STANDARD.encode(Sha256::digest(body));
        if bool::from(digest.as_bytes().ct_eq(claims.sha256.as_bytes())) { Ok(()) } else { Err(Rejection::OtherBody) }
    }
}

/// The `Authorization` header with which LiveKit would send `body`.
///
/// # Errors
/// An empty key or secret.
pub fn sign(api_key: &str, api_secret: &str, body: &[u8]) -> Result<String, AccessTokenError> {
    let token = AccessToken::with_api_key(api_key, api_secret).with_ttl(Duration::from_secs(300));
    token.with_sha256(&STANDARD.encode(Sha256::digest(body))).to_jwt()
}

/// The longest id or name that is taken for one, in bytes.
const MAX_NAME_BYTES: usize = 1_024;

/// A verified body, read.
#[derive(Debug, Clone, PartialEq)]
pub struct Understood {
    pub event: SessionEvent,
    /// Whether the body was an event at all.
    pub understood: bool,
}

/// Reads a verified body. What cannot be understood becomes an event of its own that changes nothing, known by its digest.
pub fn parse(body: &[u8], now: SystemTime) -> Understood {
    match serde_json::from_slice::<RawEvent>(body) {
        Ok(raw) if !raw.event.is_empty() && raw.names_are_sane() => Understood { event: raw.into_event(body, now), understood: true },
        _ => Understood {
            event: SessionEvent { id: digest_id(body), name: "unknown".to_owned(), created_at: now.into(), room: None, kind: EventKind::Other },
            understood: false,
        },
    }
}

/// Reads a body as it is kept: without secrets, and under the id and the time that it was kept with where it names none itself.
pub fn parse_kept(body: &str, id: EventId, created_at: DateTime<Utc>) -> Understood {
    let Understood { mut event, understood } = parse(body.as_bytes(), created_at.into());
    event.id = id;
    if let Some(room) = &mut event.room {
        room.metadata.take_if(|metadata| is_scrubbed(metadata));
    }
    // What lacks a part must not replace the whole that was told before.
    if let EventKind::ParticipantJoined(participant) | EventKind::ParticipantLeft(participant) = &mut event.kind {
        participant.complete &= ![&participant.name, &participant.metadata, &participant.attributes].into_iter().any(|text| is_scrubbed(text));
    }
    Understood { event, understood }
}

fn digest_id(body: &[u8]) -> EventId {
    let hex: String = Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect();
    EventId::new(format!("sha256:{hex}"))
}

/// protojson: camelCase, 64-bit numbers as strings, zero values left out. Every field is read as if it could be anything.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawEvent {
    event: String,
    id: Value,
    created_at: Value,
    room: Value,
    participant: Value,
    track: Value,
    egress_info: Value,
    ingress_info: Value,
}

impl RawEvent {
    /// LiveKit's names are at most 256 bytes long. Some of these stand in an index, and PostgreSQL refuses rows with more than 2,704 bytes there.
    fn names_are_sane(&self) -> bool {
        let names = [
            (&self.id, ""),
            (&self.room, "sid"),
            (&self.room, "name"),
            (&self.egress_info, "roomId"),
            (&self.egress_info, "roomName"),
            (&self.ingress_info, "roomName"),
            (&self.participant, "sid"),
            (&self.participant, "identity"),
            (&self.track, "sid"),
        ];
        names.into_iter().filter_map(|(value, key)| text(value, key)).all(|name| name.len() <= MAX_NAME_BYTES)
    }

    fn into_event(self, body: &[u8], now: SystemTime) -> SessionEvent {
        let id = text(&self.id, "").map_or_else(|| digest_id(body), EventId::new);
        let created_at = seconds(&self.created_at).unwrap_or_else(|| now.into());
        SessionEvent { id, created_at, room: self.room(), kind: self.kind(), name: self.event }
    }

    fn room(&self) -> Option<Room> {
        let sid = text(&self.room, "sid").or_else(|| text(&self.egress_info, "roomId"));
        let name = text(&self.room, "name").or_else(|| text(&self.egress_info, "roomName")).or_else(|| text(&self.ingress_info, "roomName"));
        let (sid, name) = (sid?, name?);
        let created_at = number(&self.room, "creationTimeMs").and_then(milliseconds).or_else(|| self.room.get("creationTime").and_then(seconds));
        // Only a whole room has its time of making; one without metadata says so by leaving it out.
        let metadata = created_at.map(|_| text(&self.room, "metadata").unwrap_or_default());
        Some(Room { sid: RoomSid::new(sid), name: RoomName::new(name), created_at, metadata })
    }

    fn kind(&self) -> EventKind {
        let participant = || self.participant();
        let track = || self.track();
        let both = |kind: fn(Participant, Track) -> EventKind| match (participant(), track()) {
            (Some(participant), Some(track)) => kind(participant, track),
            _ => EventKind::Other,
        };
        match self.event.as_str() {
            // Only the first of each row is LiveKit's; the predecessor's contract names the others.
            "room_started" | "room_created" => EventKind::RoomStarted,
            "room_finished" | "room_ended" | "room_deleted" => EventKind::RoomEnded,
            "participant_joined" => participant().map_or(EventKind::Other, EventKind::ParticipantJoined),
            "participant_left" | "participant_connection_aborted" => participant().map_or(EventKind::Other, EventKind::ParticipantLeft),
            "track_published" => both(EventKind::TrackPublished),
            "track_unpublished" => both(EventKind::TrackUnpublished),
            "egress_started" | "egress_updated" | "egress_ended" => self.egress().map_or(EventKind::Other, EventKind::Egress),
            _ => EventKind::Other,
        }
    }

    /// `None` for an egress, which joins its room as a hidden participant (`docs/FACTS.md`, webhooks).
    fn participant(&self) -> Option<Participant> {
        let raw = &self.participant;
        let kind = text(raw, "kind").unwrap_or_else(|| "STANDARD".to_owned());
        let sid = text(raw, "sid")?;
        if kind == "EGRESS" {
            return None;
        }
        let metadata = text(raw, "metadata").unwrap_or_default();
        let attributes: BTreeMap<String, String> =
            raw.get("attributes").and_then(|value| serde_json::from_value(value.clone()).ok()).unwrap_or_default();
        Some(Participant {
            sid: ParticipantSid::new(sid),
            identity: Identity::new(text(raw, "identity").unwrap_or_default()),
            name: text(raw, "name").unwrap_or_default(),
            kind,
            role: role(&attributes, &metadata),
            metadata,
            attributes: attributes_text(&attributes),
            joined_at: number(raw, "joinedAtMs").and_then(milliseconds).or_else(|| raw.get("joinedAt").and_then(seconds)),
            complete: self.event.starts_with("participant_"),
        })
    }

    fn track(&self) -> Option<Track> {
        let raw = &self.track;
        Some(Track {
            sid: TrackSid::new(text(raw, "sid")?),
            // A missing enum is its zero value.
            kind: text(raw, "type").unwrap_or_else(|| "AUDIO".to_owned()),
            source: text(raw, "source").unwrap_or_else(|| "UNKNOWN".to_owned()),
            name: text(raw, "name").unwrap_or_default(),
            mime_type: text(raw, "mimeType").unwrap_or_default(),
            encryption: text(raw, "encryption").unwrap_or_else(|| "NONE".to_owned()),
        })
    }

    fn egress(&self) -> Option<EgressReport> {
        let raw = &self.egress_info;
        let status = text(raw, "status");
        let detail = text(raw, "error").or_else(|| text(raw, "details"));
        Some(EgressReport {
            id: EgressId::new(text(raw, "egressId")?),
            // Zero is left out (`docs/FACTS.md`, webhooks): the first of an egress's events has no status.
            status: status.map_or(EgressStatus::Starting, |name| EgressStatus::from_name(&name)),
            detail: detail.map(|detail| scrub_text(&detail)),
        })
    }
}

/// What an application calls a participant's role: LiveKit has no field for it.
pub fn role(attributes: &BTreeMap<String, String>, metadata: &str) -> String {
    let of_metadata = || serde_json::from_str::<Value>(metadata).ok().and_then(|value| text(&value, "role"));
    attributes.get("role").cloned().or_else(of_metadata).unwrap_or_default().replace('\0', "\u{2400}")
}

/// Attributes as they are stored.
pub fn attributes_text(attributes: &BTreeMap<String, String>) -> String {
    // JSON escapes NUL, and PostgreSQL's TEXT takes that.
    serde_json::to_string(attributes).expect("a map of texts is plain data")
}

/// A non-empty string at `key`, or of the value itself for an empty key. Numbers, which newer enums may come as, are text too.
fn text(value: &Value, key: &str) -> Option<String> {
    let found = if key.is_empty() { value } else { value.get(key)? };
    match found {
        // PostgreSQL stores no NUL.
        Value::String(text) if !text.is_empty() => Some(text.replace('\0', "\u{2400}")),
        Value::Number(number) => Some(number.to_string()),
        Value::String(_) | Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A whole number above zero at `key`, as a number or a string.
fn number(value: &Value, key: &str) -> Option<i64> {
    text(value, key)?.parse().ok().filter(|number| *number > 0)
}

fn seconds(value: &Value) -> Option<DateTime<Utc>> {
    milliseconds(number(value, "")?.checked_mul(1_000)?)
}

/// A time of four-digit years: later ones have no RFC 3339, do not sort in SQLite, and overflow when something is added.
fn milliseconds(since_1970: i64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_millis(since_1970).filter(|time| time.year() < 9_999)
}

#[cfg(test)]
mod tests {
    use hmac::{Hmac, KeyInit, Mac};
    use serde_json::json;

    use super::*;

    const KEY: &str = "devkey";
    const SECRET: &str = "a-secret-of-thirty-two-characters";
    const SECOND_KEY: &str = "second";
    const SECOND_SECRET: &str = "another-of-thirty-two-characters";

    fn now() -> i64 {
        Utc::now().timestamp()
    }

    /// A token of exactly these parts, signed with HS256.
    fn token(header: &Value, claims: &Value, secret: &str) -> String {
        let part = |value: &Value| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("any key length");
        mac.update(signed.as_bytes());
        format!("{signed}.{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
    }

    fn claims(body: &[u8]) -> Value {
        json!({"iss": KEY, "nbf": now(), "iat": now(), "exp": now() + 300, "sha256": STANDARD.encode(Sha256::digest(body))})
    }

    fn with(mut claims: Value, key: &str, value: Value) -> Value {
        let members = claims.as_object_mut().expect("an object");
        if value.is_null() {
            members.remove(key)
        } else {
            members.insert(key.to_owned(), value)
        };
        claims
    }

    #[test]
    fn what_livekit_signs_is_believed_with_and_without_bearer() {
        let verifier = WebhookVerifier::new([(KEY, SECRET)]);
        let token = sign(KEY, SECRET, b"body").expect("signed");
        assert_eq!(verifier.verify(Some(&token), b"body"), Ok(()));
        assert_eq!(verifier.verify(Some(&format!("Bearer {token}")), b"body"), Ok(()));
    }

    #[test]
    fn w1_nothing_else_is() {
        let body = b"{}";
        let hs256 = json!({"alg": "HS256", "typ": "JWT"});
        let good = claims(body);
        let seconds = with(good.clone(), "iss", json!(SECOND_KEY));
        let verifier = WebhookVerifier::new([(KEY, SECRET), (SECOND_KEY, SECOND_SECRET)]);
        assert_eq!(verifier.verify(Some(&token(&hs256, &good, SECRET)), body), Ok(()), "the table's starting point is good");
        assert_eq!(verifier.verify(Some(&token(&hs256, &seconds, SECOND_SECRET)), body), Ok(()), "and so is the second key's");
        let rotated = WebhookVerifier::new([(SECOND_KEY, SECOND_SECRET)]);
        assert_eq!(rotated.verify(Some(&token(&hs256, &good, SECRET)), body), Err(Rejection::Forged), "the key was removed");
        assert_eq!(WebhookVerifier::new([]).verify(Some(&token(&hs256, &good, SECRET)), body), Err(Rejection::Forged), "there is no key");
        let cases = [
            ("another secret", token(&hs256, &good, "another-secret-of-32-characters!!"), Rejection::Forged),
            ("the second key's secret", token(&hs256, &good, SECOND_SECRET), Rejection::Forged),
            ("the first key's secret under the second's name", token(&hs256, &seconds, SECRET), Rejection::Forged),
            ("alg none", token(&json!({"alg": "none"}), &good, SECRET), Rejection::Forged),
            ("alg HS512", token(&json!({"alg": "HS512"}), &good, SECRET), Rejection::Forged),
            ("alg RS256", token(&json!({"alg": "RS256"}), &good, SECRET), Rejection::Forged),
            ("wrong issuer", token(&hs256, &with(good.clone(), "iss", json!("other")), SECRET), Rejection::Forged),
            ("no issuer", token(&hs256, &with(good.clone(), "iss", Value::Null), SECRET), Rejection::Forged),
            ("no expiry", token(&hs256, &with(good.clone(), "exp", Value::Null), SECRET), Rejection::Forged),
            ("expiry as text", token(&hs256, &with(good.clone(), "exp", json!("never")), SECRET), Rejection::Forged),
            ("no nbf", token(&hs256, &with(good.clone(), "nbf", Value::Null), SECRET), Rejection::Forged),
            ("nbf as text", token(&hs256, &with(good.clone(), "nbf", json!("x")), SECRET), Rejection::Forged),
            ("no digest, as a participant's", token(&hs256, &with(good.clone(), "sha256", Value::Null), SECRET), Rejection::Forged),
            ("with grants", token(&hs256, &with(good.clone(), "video", json!({"roomJoin": true})), SECRET), Rejection::Forged),
            ("expired", token(&hs256, &with(good.clone(), "exp", json!(now() - 62)), SECRET), Rejection::BadTimes),
            ("61 s too early", token(&hs256, &with(good.clone(), "nbf", json!(now() + 63)), SECRET), Rejection::BadTimes),
            ("not a token", "abc".to_owned(), Rejection::Forged),
        ];
        for (case, token, rejection) in cases {
            assert_eq!(verifier.verify(Some(&token), body), Err(rejection), "{case}");
        }
        assert_eq!(verifier.verify(None, body), Err(Rejection::Unsigned));
        assert_eq!(verifier.verify(Some(&token(&hs256, &good, SECRET)), b"{} "), Err(Rejection::OtherBody));
    }

    #[test]
    fn clocks_may_differ_by_a_minute() {
        let verifier = WebhookVerifier::new([(KEY, SECRET)]);
        let hs256 = json!({"alg": "HS256"});
        for (key, skew) in [("exp", -55), ("nbf", 55)] {
            let token = token(&hs256, &with(claims(b""), key, json!(now() + skew)), SECRET);
            assert_eq!(verifier.verify(Some(&token), b""), Ok(()), "{key}");
        }
    }

    fn parsed(body: Value) -> SessionEvent {
        parse(body.to_string().as_bytes(), SystemTime::now()).event
    }

    #[test]
    fn protojson_is_read_with_its_habits() {
        let event = parsed(json!({
            "event": "track_published", "id": "EV_1", "createdAt": "1739900130",
            "room": {"sid": "RM_1", "name": "r"},
            "participant": {"sid": "PA_1", "identity": "ana"},
            "track": {"sid": "TR_1", "source": "MICROPHONE", "mimeType": "audio/opus", "brandNew": [1]},
        }));
        assert_eq!((event.id.as_str(), event.created_at.timestamp()), ("EV_1", 1_739_900_130));
        let EventKind::TrackPublished(participant, track) = event.kind else { panic!("{:?}", event.kind) };
        assert_eq!((participant.kind.as_str(), participant.complete), ("STANDARD", false));
        assert_eq!((track.kind.as_str(), track.source.as_str()), ("AUDIO", "MICROPHONE"));
    }

    #[test]
    fn the_predecessors_event_names_and_numbers_are_understood() {
        for (name, kind) in [("room_created", EventKind::RoomStarted), ("room_ended", EventKind::RoomEnded), ("room_deleted", EventKind::RoomEnded)] {
            let event = parsed(json!({"event": name, "createdAt": 1_739_900_130, "room": {"sid": "RM_1", "name": "r"}}));
            assert_eq!((event.kind, event.created_at.timestamp()), (kind, 1_739_900_130));
            assert!(event.id.as_str().starts_with("sha256:"), "an event without an id is known by its body");
        }
    }

    #[test]
    fn new_enum_values_and_events_do_no_harm() {
        let event = parsed(json!({"event": "hologram_started", "id": "EV_2", "room": {"sid": "RM_1", "name": "r"}, "participant": {"kind": 99}}));
        assert_eq!(event.kind, EventKind::Other);
        assert!(event.room.is_some(), "it is a sign of life of its room");
    }

    #[test]
    fn an_egress_is_no_participant() {
        let event = parsed(json!({"event": "participant_joined", "room": {"sid": "RM_1", "name": "r"},
            "participant": {"sid": "PA_E", "identity": "EG_1", "kind": "EGRESS"}}));
        assert_eq!(event.kind, EventKind::Other);
    }

    #[test]
    fn names_that_no_database_takes_are_not_understood_and_nul_is_replaced() {
        let long = "x".repeat(1_025);
        for event in [
            json!({"event": "room_started", "room": {"sid": "RM_1", "name": long}}),
            json!({"event": "room_started", "id": long, "room": {"sid": "RM_1", "name": "r"}}),
            json!({"event": "participant_joined", "room": {"sid": "RM_1", "name": "r"}, "participant": {"sid": long}}),
        ] {
            assert!(!parse(event.to_string().as_bytes(), SystemTime::now()).understood, "{event}");
        }
        let event = parsed(json!({"event": "participant_joined", "room": {"sid": "RM_1", "name": "r"}, "participant": {"sid": "PA", "kind": "A\0"}}));
        let EventKind::ParticipantJoined(participant) = event.kind else { panic!("{:?}", event.kind) };
        assert_eq!(participant.kind, "A\u{2400}");
    }

    #[test]
    fn a_body_that_is_no_event_is_kept_by_its_digest() {
        for body in [&b"\xff\x00"[..], b"[]", b"{}", br#"{"event":7}"#] {
            let parsed = parse(body, SystemTime::now());
            assert!(!parsed.understood, "{body:?}");
            assert_eq!(parsed.event.id, digest_id(body));
        }
    }

    #[test]
    fn a_kept_body_is_read_under_its_own_id_and_time() {
        let at = DateTime::from_timestamp(1_739_900_130, 0).expect("a time");
        let body = json!({"event": "participant_joined", "room": {"sid": "RM_1", "name": "r", "creationTime": "7", "metadata": "see wss://h/x"},
            "participant": {"sid": "PA_1", "name": "Ana", "metadata": "ticket=v1.a.b"}})
        .to_string();
        let Understood { event, understood } = parse_kept(&super::super::scrub::storable(body.as_bytes()), digest_id(body.as_bytes()), at);
        assert_eq!((understood, &event.id, event.created_at), (true, &digest_id(body.as_bytes()), at));
        assert_eq!(event.room.expect("a room").metadata, None, "it would replace what it is a part of");
        let EventKind::ParticipantJoined(ana) = event.kind else { panic!("{:?}", event.kind) };
        assert_eq!((ana.name.as_str(), ana.complete), ("Ana", false));
        assert!(!parse_kept("[]", EventId::new("EV"), at).understood);
    }

    #[test]
    fn an_egress_is_told_without_its_url() {
        let event = parsed(json!({"event": "egress_ended", "id": "EV_3", "room": {"sid": "RM_1", "name": "r"}, "egressInfo": {
            "egressId": "EG_1", "status": "EGRESS_FAILED", "error": "dial wss://h/egress-audio?ticket=v1.a.b: refused",
            "track": {"trackId": "TR_1", "websocketUrl": "wss://h/egress-audio?ticket=v1.a.b"}}}));
        let EventKind::Egress(report) = event.kind else { panic!("{:?}", event.kind) };
        assert_eq!((report.id.as_str(), report.status), ("EG_1", EgressStatus::Failed));
        assert_eq!(report.detail.as_deref(), Some("dial {...}: refused"));
        let started = parsed(json!({"event": "egress_started", "egressInfo": {"egressId": "EG_1", "roomId": "RM_1", "roomName": "r"}}));
        let EventKind::Egress(report) = started.kind else { panic!("{:?}", started.kind) };
        assert_eq!(report.status, EgressStatus::Starting);
    }

    #[test]
    fn a_role_is_an_attribute_or_a_word_of_the_metadata() {
        let event = parsed(json!({"event": "participant_joined", "room": {"sid": "RM_1", "name": "r"}, "participant": {
            "sid": "PA_1", "identity": "ana", "metadata": "{\"role\":\"guest\"}", "attributes": {"role": "host", "team": "a"}}}));
        let EventKind::ParticipantJoined(ana) = event.kind else { panic!("{:?}", event.kind) };
        assert_eq!((ana.role.as_str(), ana.attributes.as_str()), ("host", r#"{"role":"host","team":"a"}"#));
        assert_eq!(role(&BTreeMap::new(), &ana.metadata), "guest");
        assert_eq!(role(&BTreeMap::new(), "no JSON"), "");
    }
}
