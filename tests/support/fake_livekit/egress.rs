//! An egress as LiveKit's API and webhooks have it, and the ways it can go and end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chrono::Utc;
use livekit_protocol as proto;
use proto::EgressStatus;
use tokio::sync::{Notify, mpsc};

use super::State;
use super::pcm::Sent;
use super::worker::Worker;
use super::world::{event, sid};

/// How an egress ends. The first three and `RoomLost` are orderly: trailing audio and a Close without a code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The track or its publisher has gone.
    SourceClosed,
    /// StopEgress.
    Stopped,
    LimitReached,
    /// Stopped before it started.
    Aborted,
    /// LiveKit's SFU is lost.
    RoomLost,
    /// The process is gone: the end of TCP without a Close.
    Crash,
    /// The same with RST.
    Reset,
    Failed {
        error: String,
        code: i32,
    },
}

impl End {
    pub fn failed(error: impl Into<String>, code: i32) -> Self {
        Self::Failed { error: error.into(), code }
    }

    pub fn is_orderly(&self) -> bool {
        matches!(self, Self::SourceClosed | Self::Stopped | Self::LimitReached | Self::Aborted | Self::RoomLost)
    }

    /// What `EgressInfo` then says.
    pub fn apply(&self, info: &mut proto::EgressInfo) {
        let (status, error, code, details) = match self {
            Self::SourceClosed => (EgressStatus::EgressComplete, "", 0, "End reason: Source closed"),
            Self::Stopped => (EgressStatus::EgressComplete, "", 0, "End reason: StopEgress API"),
            Self::LimitReached => (EgressStatus::EgressLimitReached, "Session limit reached", 413, "End reason: Session limit reached"),
            Self::Aborted => (EgressStatus::EgressAborted, "Stop called before pipeline could start", 412, ""),
            Self::RoomLost => (EgressStatus::EgressFailed, "recording ended early: connection to room failed", 503, "End reason: Failure"),
            Self::Crash => (EgressStatus::EgressFailed, "internal error: signal: killed", 500, "End reason: Failure"),
            Self::Reset => (EgressStatus::EgressFailed, "write tcp: connection reset by peer", 503, "End reason: Failure"),
            Self::Failed { error, code } => (EgressStatus::EgressFailed, error.as_str(), *code, "End reason: Failure"),
        };
        info.set_status(status);
        (info.error, info.error_code, info.details) = (error.to_owned(), code, details.to_owned());
        info.ended_at = nanoseconds();
        for stream in &mut info.stream_results {
            stream.set_status(proto::stream_info::Status::Finished);
            stream.ended_at = info.ended_at;
            stream.duration = if stream.started_at == 0 { 0 } else { stream.ended_at - stream.started_at };
        }
    }
}

/// What a start is to do that a good one does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Script {
    DialAfter(Duration),
    DieBeforeDial,
    /// Stays `EGRESS_STARTING` until it is stopped.
    NeverDial,
    /// Connects, and sends nothing.
    Stall,
    /// Streams so much audio, then ends so.
    EndAfter(Duration, End),
    /// Connects twice with the same URL.
    DialTwice,
}

/// What a running egress is told.
#[derive(Clone, Debug)]
pub enum Command {
    End(End),
    Stall,
    Mute(bool),
}

/// An egress the fake knows of.
#[derive(Debug)]
pub struct Egress {
    pub info: proto::EgressInfo,
    pub track: String,
    pub url: String,
    /// Whether it has seen its track; from then on the track's end is its own.
    pub subscribed: bool,
    pub connected: bool,
    /// What its handshakes were answered with.
    pub handshakes: Vec<u16>,
    pub commands: mpsc::UnboundedSender<Command>,
    /// Rung with a sudden end, which does not wait for a write.
    pub killed: Arc<Notify>,
    pub sent: Arc<Mutex<Sent>>,
}

/// An egress as a test sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct EgressSeen {
    pub id: String,
    pub room: String,
    pub track: String,
    pub status: EgressStatus,
    pub url: String,
    /// The parameters of the URL, decoded.
    pub query: BTreeMap<String, String>,
    pub connected: bool,
    pub handshakes: Vec<u16>,
    pub error: String,
    pub error_code: i32,
    pub details: String,
}

impl Egress {
    pub fn seen(&self) -> EgressSeen {
        let info = self.info.clone();
        EgressSeen {
            id: info.egress_id.clone(),
            room: info.room_name.clone(),
            track: self.track.clone(),
            status: info.status(),
            url: self.url.clone(),
            query: query(&self.url),
            connected: self.connected,
            handshakes: self.handshakes.clone(),
            error: info.error,
            error_code: info.error_code,
            details: info.details,
        }
    }

    pub fn is_live(&self) -> bool {
        !is_over(self.info.status())
    }

    pub fn tell(&self, command: Command) {
        let sudden = matches!(command, Command::End(End::Crash | End::Reset));
        self.commands.send(command).ok(); // one that is ending anyway does not listen
        if sudden {
            self.killed.notify_one();
        }
    }

    /// Whether a test that names this track or this egress means it.
    pub fn is(&self, track_or_id: &str) -> bool {
        self.track == track_or_id || self.info.egress_id == track_or_id
    }
}

pub fn is_over(status: EgressStatus) -> bool {
    !matches!(status, EgressStatus::EgressStarting | EgressStatus::EgressActive | EgressStatus::EgressEnding)
}

impl State {
    pub fn egress(&self, id: &str) -> &Egress {
        self.egresses.iter().find(|egress| egress.info.egress_id == id).unwrap_or_else(|| panic!("there is no egress {id}"))
    }

    pub fn egress_mut(&mut self, id: &str) -> &mut Egress {
        self.egresses.iter_mut().find(|egress| egress.info.egress_id == id).unwrap_or_else(|| panic!("there is no egress {id}"))
    }

    /// Changes what is known of an egress, and queues the webhook about it.
    pub fn tell_of_egress(&mut self, id: &str, name: &str, change: impl FnOnce(&mut proto::EgressInfo)) {
        let info = &mut self.egress_mut(id).info;
        change(info);
        info.updated_at = nanoseconds();
        copy_to_the_deprecated_member(info);
        let info = info.clone();
        let room = proto::Room { sid: info.room_id.clone(), name: info.room_name.clone(), ..proto::Room::default() };
        self.world.outbox.push(proto::WebhookEvent { egress_info: Some(info), ..event(name, &room) });
    }

    /// Whether a node has room for one more start: each takes so many in its window (livekit/egress v1.14.1, `pkg/stats/monitor.go`).
    pub fn admits_start(&mut self) -> bool {
        let Some(nodes) = self.knobs.nodes else { return true };
        let window = self.knobs.start_window;
        self.starts.retain(|start| start.elapsed() < window);
        let admitted = self.starts.len() < nodes * self.knobs.starts_per_node;
        if admitted {
            self.starts.push(Instant::now());
        }
        admitted
    }

    /// A new egress, and the task that is to run it.
    pub fn start_egress(&mut self, room_id: String, request: &proto::TrackEgressRequest, url: &str) -> (proto::EgressInfo, Worker) {
        let id = sid("EG_");
        let info = proto::EgressInfo {
            egress_id: id.clone(),
            room_id,
            room_name: request.room_name.clone(),
            source_type: proto::EgressSourceType::Sdk.into(),
            started_at: nanoseconds(),
            request: Some(proto::egress_info::Request::Track(request.clone())),
            stream_results: vec![proto::StreamInfo { url: url.to_owned(), ..proto::StreamInfo::default() }],
            ..proto::EgressInfo::default()
        };
        let (commands, inbox) = mpsc::unbounded_channel();
        let egress = Egress {
            info,
            track: request.track_id.clone(),
            url: url.to_owned(),
            subscribed: false,
            connected: false,
            handshakes: Vec::new(),
            commands,
            killed: Arc::default(),
            sent: Arc::new(Mutex::new(Sent { egress_id: id.clone(), ..Sent::default() })),
        };
        let script = self.scripts.pop_front().or_else(|| self.standing_script.clone());
        let worker = Worker::new(self.egresses.len(), &egress, script, inbox);
        self.egresses.push(egress);
        self.tell_of_egress(&id, "egress_started", |_| {});
        (self.egress(&id).info.clone(), worker)
    }

    /// Tells the egresses of tracks that are no more.
    pub fn close_sources(&mut self) {
        for egress in self.egresses.iter().filter(|egress| egress.subscribed && egress.is_live()) {
            if !self.world.sounds.contains_key(&egress.track) {
                egress.tell(Command::End(End::SourceClosed));
            }
        }
    }
}

/// LiveKit still fills it.
#[expect(deprecated, reason = "it is what LiveKit sends")]
fn copy_to_the_deprecated_member(info: &mut proto::EgressInfo) {
    info.result = Some(proto::egress_info::Result::Stream(proto::StreamInfoList { info: info.stream_results.clone() }));
}

pub fn nanoseconds() -> i64 {
    Utc::now().timestamp_nanos_opt().expect("a time before 2262")
}

fn query(url: &str) -> BTreeMap<String, String> {
    let pairs = url.split_once('?').map_or("", |(_, query)| query).split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (decoded(name), decoded(value))).collect()
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                u8::from_str_radix(std::str::from_utf8(&digits).expect("two digits"), 16).expect("two digits")
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes).expect("a parameter is UTF-8")
}
