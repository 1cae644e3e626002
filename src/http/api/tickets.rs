//! Tickets for the ingest.

use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{SecondsFormat, Utc};
use serde::{Deserialize, Serialize};

use crate::audio::mixdown::Mix;
use crate::http::Doors;
use crate::http::body::read_json;
use crate::http::error::{ApiError, ErrorCode};
use crate::ids::{Identity, MeetingId, RoomName, TrackSid};
use crate::ticket::{TicketKind, TicketSubject, socket_url};
use crate::video::codec::VideoCodec;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewTicket {
    room_name: String,
    participant: Option<String>,
    track_id: Option<String>,
    meeting_id: Option<String>,
    sample_rate: Option<u32>,
    channels: Option<u16>,
    group_seconds: Option<f64>,
    analyse: Option<bool>,
    mix: Option<Mix>,
    codec: Option<VideoCodec>,
    /// Without it, video where a codec is named.
    #[serde(default)]
    kind: Option<TicketKind>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct MintedTicket {
    ticket: String,
    /// What to give LiveKit as the track egress's `websocketUrl`.
    url: String,
    expires_at: String,
}

/// `POST /api/v1/tickets`
pub async fn mint(request: HttpRequest, payload: web::Payload, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let new: NewTicket = read_json(&request, payload).await?;
    let kind = new.kind.unwrap_or(if new.codec.is_some() { TicketKind::Video } else { TicketKind::Audio });
    let subject = new.subject(kind)?;
    let (ticket, said) = doors.mint.mint(kind, subject, Utc::now());
    let base = doors.ws_base.clone().unwrap_or_else(|| format!("ws://{}", request.connection_info().host()));
    let minted =
        MintedTicket { url: socket_url(&base, &said, &ticket), expires_at: said.expires_at.to_rfc3339_opts(SecondsFormat::Secs, true), ticket };
    Ok(HttpResponse::build(StatusCode::CREATED).json(minted))
}

impl NewTicket {
    fn subject(self, kind: TicketKind) -> Result<TicketSubject, ApiError> {
        let subject = TicketSubject {
            room_name: RoomName::new(self.room_name),
            participant: self.participant.filter(|text| !text.is_empty()).map(Identity::new),
            track_id: self.track_id.filter(|text| !text.is_empty()).map(TrackSid::new),
            meeting_id: self.meeting_id.filter(|text| !text.is_empty()).map(MeetingId::new),
            sample_rate: self.sample_rate,
            channels: self.channels,
            group_seconds: self.group_seconds,
            analyse: self.analyse,
            mix: self.mix,
            codec: self.codec,
        };
        let faults = subject.faults_of(kind);
        if faults.is_empty() { Ok(subject) } else { Err(ApiError::new(ErrorCode::InvalidRequest, faults.join("; "))) }
    }
}
