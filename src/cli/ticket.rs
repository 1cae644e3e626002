//! `live-meeting ticket`

use std::process::ExitCode;

use anyhow::{Context, bail};
use chrono::{SecondsFormat, Utc};

use super::ConfigArg;
use crate::app::TICKET_KEY_FILE;
use crate::audio::mixdown::Mix;
use crate::ids::{Identity, MeetingId, RoomName, TrackSid};
use crate::keys;
use crate::ticket::{TicketKind, TicketMint, TicketSubject, socket_url};
use crate::video::codec::VideoCodec;

/// The ticket opens one connection within ten minutes. It is signed with INGEST_TICKET_SECRET, else with the key that the server keeps in its
/// storage directory: run this where the server runs.
#[derive(Debug, clap::Args)]
#[command(
    after_long_help = "The ticket opens one connection within ten minutes. It is signed with INGEST_TICKET_SECRET,\nelse with the key in the storage directory: run this where the server runs."
)]
pub struct TicketArgs {
    /// LiveKit room name
    #[arg(long)]
    room: String,
    /// Participant identity
    #[arg(long)]
    participant: Option<String>,
    /// Track SID
    #[arg(long)]
    track: Option<String>,
    /// Meeting that the recording is kept under [default: the room's active session]
    #[arg(long)]
    meeting: Option<String>,
    /// Sample rate in Hz, for a sender that is not LiveKit
    #[arg(long)]
    sample_rate: Option<u32>,
    /// Channels, 1 or 2, for a sender that is not LiveKit
    #[arg(long)]
    channels: Option<u16>,
    /// Length of the groups for analysis, 0.1 to 30 [default: analysis.group_seconds]
    #[arg(long, value_name = "SECONDS")]
    group_seconds: Option<f64>,
    /// Whether the analysis service may hear the track [default: true]
    #[arg(long, value_name = "true|false")]
    analyse: Option<bool>,
    /// `mono` records the mean of two channels as one
    #[arg(long, value_name = "mono")]
    mix: Option<Mix>,
    /// Makes it a ticket for video: `h264`, `vp8` or `vp9`
    #[arg(long, value_name = "CODEC")]
    codec: Option<VideoCodec>,
    #[command(flatten)]
    config: ConfigArg,
}

pub fn run(args: &TicketArgs) -> anyhow::Result<ExitCode> {
    let config = args.config.load()?;
    let key = match config.secrets.ingest_ticket_secret.clone() {
        Some(key) => key,
        None => keys::load_or_make(&config.storage.dir, TICKET_KEY_FILE).context("cannot read the ticket key")?.key,
    };
    let subject = TicketSubject {
        room_name: RoomName::new(&args.room),
        participant: args.participant.as_ref().map(Identity::new),
        track_id: args.track.as_ref().map(TrackSid::new),
        meeting_id: args.meeting.as_ref().map(MeetingId::new),
        sample_rate: args.sample_rate,
        channels: args.channels,
        group_seconds: args.group_seconds,
        analyse: args.analyse,
        mix: args.mix,
        codec: args.codec,
    };
    let kind = if args.codec.is_some() { TicketKind::Video } else { TicketKind::Audio };
    let faults = subject.faults_of(kind);
    if !faults.is_empty() {
        bail!(faults.join("; "));
    }
    let (text, ticket) = TicketMint::new(key).mint(kind, subject, Utc::now());
    let base = config.ingest.ws_base.unwrap_or_else(|| format!("ws://localhost:{}", config.http.port));
    println!("{}", socket_url(&base, &ticket, &text));
    eprintln!("opens one connection until {}", ticket.expires_at.to_rfc3339_opts(SecondsFormat::Secs, true));
    Ok(ExitCode::SUCCESS)
}
