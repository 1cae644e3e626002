//! What a sender declares in the URL of its connection.

use actix_web::web;

use super::error::{ApiError, ErrorCode};
use crate::audio::format::PcmFormat;
use crate::audio::mixdown::Mix;
use crate::ids::{Identity, MeetingId, RoomName, TrackSid};
use crate::livekit::egress_stream::CONTENT_TYPE;
use crate::ticket::{TicketKind, TicketSubject};
use crate::video::codec::VideoCodec;

/// The longest name, in bytes. LiveKit's own limits are 256 and below.
pub const MAX_NAME_BYTES: usize = 1_024;

/// The documented format of a sender that says nothing: the predecessor's.
const DEFAULT_FORMAT: PcmFormat = PcmFormat { sample_rate: 48_000, channels: 1 };

/// What is said to a sender of video that names none, nor its ticket.
pub const CODEC_IS_REQUIRED: &str = "codec is required: h264, vp8 or vp9";

/// The query of `/egress-audio` and `/egress-video`.
#[derive(Debug, Clone, PartialEq)]
pub struct IngestQuery {
    pub room: RoomName,
    pub participant: Option<Identity>,
    pub track: Option<TrackSid>,
    pub meeting: Option<MeetingId>,
    pub sample_rate: Option<u32>,
    pub channels: Option<u16>,
    pub group_seconds: Option<f64>,
    /// Whether the analysis service may hear it; else it may.
    pub analyse: Option<bool>,
    pub mix: Option<Mix>,
    /// Of `/egress-video` alone.
    pub codec: Option<VideoCodec>,
    pub ticket: Option<String>,
}

impl IngestQuery {
    /// Reads a raw query string. An empty parameter counts as absent; the first of several counts.
    ///
    /// # Errors
    /// 400 with every fault.
    pub fn parse(query: &str) -> Result<Self, ApiError> {
        Self::parse_of(TicketKind::Audio, query)
    }

    /// Reads the query of an endpoint. Of video, `codec` is required unless a ticket may say it.
    ///
    /// # Errors
    /// 400 with every fault.
    pub fn parse_of(kind: TicketKind, query: &str) -> Result<Self, ApiError> {
        let pairs: Vec<(String, String)> = web::Query::from_query(query)
            .map(web::Query::into_inner)
            .map_err(|error| ApiError::new(ErrorCode::InvalidRequest, format!("the query cannot be read: {error}")))?;
        let mut faults = Vec::new();
        let get = |names: &[&str]| {
            names.iter().find_map(|name| pairs.iter().find(|(key, value)| key == name && !value.is_empty())).map(|(_, value)| value.as_str())
        };
        let mut name = |names: &[&str]| {
            let value = get(names)?;
            if value.len() > MAX_NAME_BYTES {
                faults.push(format!("{} is longer than {MAX_NAME_BYTES} bytes", names.first()?));
            }
            Some(value.to_owned())
        };
        let room = name(&["roomName", "room"]);
        let participant = name(&["participant"]).map(Identity::new);
        let track = name(&["trackId", "track"]).map(TrackSid::new);
        let meeting = name(&["meetingId"]).map(MeetingId::new);
        let sample_rate = number(get(&["sampleRate"]), "sampleRate", 8_000, 192_000, "", &mut faults);
        let channels = number(get(&["channels"]), "channels", 1, 2, "", &mut faults);
        let group_seconds = number(get(&["groupSeconds"]), "groupSeconds", 0.1, 30.0, " seconds", &mut faults);
        let analyse = word(get(&["analyse"]), "analyse must be true or false", &mut faults);
        let mix = word(get(&["mix"]), "mix must be mono", &mut faults);
        let ticket = get(&["ticket"]).map(str::to_owned);
        let codec = match (kind, get(&["codec"])) {
            (TicketKind::Audio, _) => None,
            (TicketKind::Video, None) => {
                faults.extend(ticket.is_none().then(|| CODEC_IS_REQUIRED.to_owned()));
                None
            }
            (TicketKind::Video, codec) => word(codec, "codec must be h264, vp8 or vp9", &mut faults),
        };
        if room.is_none() {
            faults.insert(0, "roomName is required".to_owned());
        }
        match room {
            Some(room) if faults.is_empty() => {
                Ok(Self { room: RoomName::new(room), participant, track, meeting, sample_rate, channels, group_seconds, analyse, mix, codec, ticket })
            }
            Some(_) | None => Err(ApiError::new(ErrorCode::InvalidRequest, faults.join("; "))),
        }
    }

    /// Lays what a ticket says over what the query says. The ticket's room and track are the only ones: what it leaves open, it was not bound to.
    pub fn overridden_by(self, ticket: TicketSubject) -> Self {
        Self {
            room: ticket.room_name,
            participant: ticket.participant.or(self.participant),
            track: ticket.track_id.or(self.track),
            meeting: ticket.meeting_id.or(self.meeting),
            sample_rate: ticket.sample_rate.or(self.sample_rate),
            channels: ticket.channels.or(self.channels),
            group_seconds: ticket.group_seconds.or(self.group_seconds),
            analyse: ticket.analyse.or(self.analyse),
            mix: ticket.mix.or(self.mix),
            codec: ticket.codec.or(self.codec),
            ticket: self.ticket,
        }
    }

    /// The declared format. LiveKit's handshake without `channels` means what LiveKit always sends.
    pub fn format(&self, content_type: Option<&str>) -> PcmFormat {
        match self.channels {
            None if is_livekit(content_type) => PcmFormat::LIVEKIT,
            channels => PcmFormat {
                sample_rate: self.sample_rate.unwrap_or(DEFAULT_FORMAT.sample_rate),
                channels: channels.unwrap_or(DEFAULT_FORMAT.channels),
            },
        }
    }
}

/// Whether a handshake has the content type of LiveKit's egress.
pub fn is_livekit(content_type: Option<&str>) -> bool {
    content_type.is_some_and(|value| value.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case(CONTENT_TYPE)))
}

fn number<T>(value: Option<&str>, name: &str, least: T, most: T, unit: &str, faults: &mut Vec<String>) -> Option<T>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    let value = value?;
    let number = value.parse().ok().filter(|number| *number >= least && *number <= most);
    if number.is_none() {
        faults.push(format!("{name} must be a number from {least} to {most}{unit}"));
    }
    number
}

fn word<T: std::str::FromStr>(value: Option<&str>, fault: &str, faults: &mut Vec<String>) -> Option<T> {
    let word = value?.parse().ok();
    if word.is_none() {
        faults.push(fault.to_owned());
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_names_and_empty_parameters() {
        let query = IngestQuery::parse("room=r%20s&track=TR_1&participant=&meetingId=&channels=2&sampleRate=").expect("a query");
        assert_eq!((query.room.as_str(), query.track), ("r s", Some(TrackSid::new("TR_1"))));
        assert_eq!((query.participant, query.meeting, query.channels, query.sample_rate), (None, None, Some(2), None));
    }

    #[test]
    fn faults_are_told_together() {
        let error = IngestQuery::parse("sampleRate=7999&channels=3&groupSeconds=31&analyse=no&mix=stereo").expect_err("refused").to_string();
        for name in ["roomName is required", "sampleRate", "channels", "groupSeconds", "analyse must be true or false", "mix must be mono"] {
            assert!(error.contains(name), "{error}");
        }
        let bad = ["sampleRate=192001", "sampleRate=x", "channels=0", "channels=1.5", "groupSeconds=0.09", "groupSeconds=NaN", "groupSeconds=inf"];
        for bad in bad.into_iter().chain(["analyse=1", "analyse=True", "mix=stereo", "mix=Mono", "mix=1"]) {
            IngestQuery::parse(&format!("roomName=r&{bad}")).expect_err(bad);
        }
        let good = ["sampleRate=8000", "sampleRate=192000", "channels=1", "groupSeconds=0.1", "groupSeconds=30"];
        for good in good.into_iter().chain(["analyse=true", "analyse=false", "mix=mono", "mix="]) {
            IngestQuery::parse(&format!("roomName=r&{good}")).expect(good);
        }
        IngestQuery::parse(&format!("roomName={}", "x".repeat(1_025))).expect_err("too long");
    }

    #[test]
    fn video_names_its_codec_or_has_a_ticket() {
        let parse = |query: &str| IngestQuery::parse_of(TicketKind::Video, query);
        for (text, codec) in [("h264", VideoCodec::H264), ("vp8", VideoCodec::Vp8), ("vp9", VideoCodec::Vp9)] {
            assert_eq!(parse(&format!("roomName=r&codec={text}")).expect("a query").codec, Some(codec));
        }
        assert_eq!(parse("roomName=r&ticket=t").expect("the ticket may say it").codec, None);
        for (bad, fault) in [
            ("roomName=r", CODEC_IS_REQUIRED),
            ("roomName=r&codec=", CODEC_IS_REQUIRED),
            ("codec=vp8", "roomName is required"),
            ("roomName=r&codec=av1&ticket=t", "codec must be h264, vp8 or vp9"),
            ("codec=H264", "roomName is required; codec must be h264, vp8 or vp9"),
        ] {
            let error = parse(bad).expect_err(bad).to_string();
            assert!(error.contains(fault), "{bad}: {error}");
        }
        assert_eq!(IngestQuery::parse("roomName=r&codec=opus").expect("audio has none").codec, None);
    }

    #[test]
    fn format_by_declaration_and_content_type() {
        let format = |query: &str, content_type| IngestQuery::parse(&format!("roomName=r{query}")).expect("a query").format(content_type);
        let pcm = |sample_rate, channels| PcmFormat { sample_rate, channels };
        assert_eq!(format("", Some("audio/x-raw")), PcmFormat::LIVEKIT);
        assert_eq!(format("&sampleRate=16000", Some("audio/x-raw; x=y")), PcmFormat::LIVEKIT, "LiveKit has no other");
        assert_eq!(format("&channels=1", Some("audio/x-raw")), pcm(48_000, 1));
        assert_eq!(format("", None), pcm(48_000, 1));
        assert_eq!(format("&sampleRate=16000", Some("audio/L16")), pcm(16_000, 1));
        assert_eq!(format("&sampleRate=44100&channels=2", None), pcm(44_100, 2));
    }

    #[test]
    fn a_ticket_wins_over_the_query() {
        let query = IngestQuery::parse("roomName=mine&participant=me&trackId=TR_mine&channels=1&groupSeconds=1&analyse=true").expect("a query");
        let ticket = TicketSubject {
            participant: Some(Identity::new("you")),
            track_id: Some(TrackSid::new("TR_yours")),
            channels: Some(2),
            group_seconds: Some(2.5),
            analyse: Some(false),
            mix: Some(Mix::Mono),
            ..TicketSubject::of_room(RoomName::new("yours"))
        };
        let silent = TicketSubject { group_seconds: None, analyse: None, mix: None, ..ticket.clone() };
        let unsaid = query.clone().overridden_by(silent);
        assert_eq!((unsaid.group_seconds, unsaid.analyse, unsaid.mix), (Some(1.0), Some(true), None), "what it leaves open");
        let query = query.overridden_by(ticket);
        assert_eq!((query.group_seconds, query.analyse, query.mix), (Some(2.5), Some(false), Some(Mix::Mono)));
        assert_eq!((query.room.as_str(), query.participant.expect("said").as_str()), ("yours", "you"));
        assert_eq!((query.track.expect("said").as_str(), query.channels), ("TR_yours", Some(2)));
    }
}
