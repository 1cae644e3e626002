//! `GET /egress-video`: as `/egress-audio`, for encoded video. Stock LiveKit refuses to send video to a WebSocket (`docs/FACTS.md`, video): this is for bridges.
//!
//! One message is under way to `TrackActor` at a time, and nothing is read meanwhile. So a connection holds three messages at most, of 2 MiB each: one that is being
//! read, one in fragments, one under way. What waits for the disk is the track's, within its bounds.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use actix::prelude::*;
use actix_http::ws::{Codec, Item};
use actix_web::{HttpRequest, HttpResponse, web};
use actix_web_actors::ws::{CloseCode, CloseReason, Message, ProtocolError, WebsocketContext};
use bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;

use super::Doors;
use super::admission::{admit, authenticate, reserve, storage_is_ready};
use super::egress_socket::{close_reason, handshake, violation_close};
use super::error::{ApiError, ErrorCode};
use super::ingest_query::{CODEC_IS_REQUIRED, IngestQuery};
use super::ws_guard::{GuardLimits, Violation, WsGuard};
use crate::actors::session_registry::{TrackEnded, TrackEnding, TrackOpened};
use crate::actors::stats::TrackStats;
use crate::actors::track::rows::TrackIdentity;
use crate::actors::track::video::VideoArrived;
use crate::actors::track::{AttachSocket, CloseSocket, FinishTrack, SocketLost, TakeTail, TrackActor, TrackParams};
use crate::audio::format::PcmFormat;
use crate::clock::Clock;
use crate::db::rows::EndReason;
use crate::fail_point;
use crate::recording::video_stream::Arrival;
use crate::ticket::TicketKind;

/// Of one binary message, also in fragments: a key frame of 4K at a high rate stays below.
const MAX_BINARY_BYTES: u64 = 2 << 20;
/// The same, for the codec.
const MAX_FRAME_BYTES: usize = 2 << 20;
const MAX_TEXT_BYTES: u64 = 4 << 10;
/// Of a message of 2 MiB in gorilla's fragments of 4,096 bytes.
const MAX_FRAGMENTS: u32 = 512;
const MAX_MESSAGE_TIME: Duration = Duration::from_secs(5);
/// A sender declares no rate: what 4K needs, 20 Mbit/s, of which `ingest.max_speed` times as much is read.
const BYTES_PER_SECOND: f64 = 2_500_000.0;
/// Frames per second that are always read, besides those of gorilla's fragments.
const FRAME_RATE: f64 = 800.0;
const FRAGMENT_BYTES: f64 = 4_096.0;
/// Seconds of video that may come at any speed.
const BURST_SECONDS: f64 = 10.0;

pub async fn egress_video(request: HttpRequest, payload: web::Payload, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let peer = request.peer_addr().map_or_else(|| "unknown".to_owned(), |address| address.ip().to_string());
    open(request, payload, &peer, doors.clone()).await.inspect_err(|error| {
        doors.counts.refused_connections.of(error.code().as_str()).inc();
        log::warn!("a connection is refused peer={peer} problem={error}");
    })
}

async fn open(request: HttpRequest, payload: web::Payload, peer: &str, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let query = IngestQuery::parse_of(TicketKind::Video, request.query_string())?;
    let (query, ticket) = authenticate(query, TicketKind::Video, &doors)?;
    let codec = query.codec.ok_or_else(|| ApiError::new(ErrorCode::InvalidRequest, CODEC_IS_REQUIRED))?;
    let mut response = handshake(&request)?;
    let (meeting, session_started_at) = admit(&query, ticket.as_ref().map(|(id, _)| id.clone()), &doors).await?;
    storage_is_ready("video", &doors.video_storage, &query, &doors).await?;
    let identity = TrackIdentity { meeting, room: query.room, participant: query.participant, track: query.track, session_started_at };
    let stats = Arc::new(TrackStats::of_video(codec, Arc::clone(&doors.tracks.totals)));
    let connection = reserve(&identity, ticket.as_ref(), &stats, peer, &doors).await?;
    log::info!(
        "track opened connection={connection} meeting={:?} room={:?} participant={:?} track={:?} codec={}",
        identity.meeting.as_str(),
        identity.room.as_str(),
        identity.participant.as_ref().map(crate::ids::Identity::as_str),
        identity.track.as_ref().map(crate::ids::TrackSid::as_str),
        codec.as_str()
    );
    let clock = Clock::start();
    let track = TrackActor::launch(TrackParams {
        connection,
        identity,
        ticket: ticket.map(|(id, _)| id),
        format: PcmFormat::NONE,
        from_livekit: false,
        group_seconds: doors.tracks.analysis.group_seconds,
        analyse: false,
        mix: None,
        clock,
        video: Some(codec),
        stats: Arc::clone(&stats),
        resources: Arc::clone(&doors.tracks),
        ending: doors.registry.clone().recipient::<TrackEnding>(),
        registry: doors.registry.clone().recipient::<TrackEnded>(),
    });
    let violation = Rc::default();
    let guard = WsGuard::new(payload, guard_limits(doors.tracks.ingest.max_speed), Rc::clone(&violation));
    let socket = VideoSocket { track: track.clone(), clock, stats, violation, fragments: None, finishing: false, deaf: false };
    let stream = WebsocketContext::with_codec(socket, guard, Codec::new().max_size(MAX_FRAME_BYTES));
    doors.registry.send(TrackOpened { connection, track }).await?;
    Ok(response.streaming(stream))
}

pub(crate) fn guard_limits(max_speed: f64) -> GuardLimits {
    let bytes_per_second = max_speed * BYTES_PER_SECOND;
    GuardLimits {
        binary_bytes: MAX_BINARY_BYTES,
        text_bytes: MAX_TEXT_BYTES,
        fragments: MAX_FRAGMENTS,
        message_time: MAX_MESSAGE_TIME,
        bytes_per_second,
        frames_per_second: FRAME_RATE + bytes_per_second / FRAGMENT_BYTES,
        burst_bytes: BURST_SECONDS * BYTES_PER_SECOND,
        burst_frames: BURST_SECONDS * (FRAME_RATE + BYTES_PER_SECOND / FRAGMENT_BYTES),
    }
}

/// The adapter between one WebSocket and its `TrackActor`.
struct VideoSocket {
    track: Addr<TrackActor>,
    clock: Clock,
    stats: Arc<TrackStats>,
    violation: Rc<Cell<Option<Violation>>>,
    /// The message whose last fragment has not come; `None` in it for one of text, which is not kept.
    fragments: Option<Option<BytesMut>>,
    finishing: bool,
    /// The track ends and takes nothing more.
    deaf: bool,
}

impl VideoSocket {
    fn on_binary(&mut self, message: Bytes, ctx: &mut WebsocketContext<Self>) {
        if message.is_empty() {
            return;
        }
        fail_point::pass("video-message");
        self.stats.note_audio();
        let at = Instant::now();
        let arrived = VideoArrived { message, arrival: Arrival { at, wall: self.clock.at(at) } };
        // Sent from a task of its own: one that belonged to this actor would be lost with it.
        let (track, (done, taken)) = (self.track.clone(), oneshot::channel());
        let stall = self.stats.totals().read_stalls.begin();
        actix_rt::spawn(async move {
            done.send(track.send(arrived).await).ok();
        });
        ctx.wait(taken.into_actor(self).map(move |taken, socket, ctx| {
            drop(stall);
            // A track that ends says so by CloseSocket first: one that takes nothing before has died.
            if !matches!(taken, Ok(Ok(()))) && !std::mem::replace(&mut socket.finishing, true) {
                log::error!("a connection is closed: its track has died");
                ctx.close(Some(CloseReason { code: CloseCode::Error, description: Some(EndReason::Failed.as_str().to_owned()) }));
                ctx.stop();
            }
        }));
    }

    fn on_text(&self) {
        self.stats.unknown_texts.fetch_add(1, Relaxed);
    }

    fn on_fragment(&mut self, item: Item, ctx: &mut WebsocketContext<Self>) {
        match item {
            Item::FirstBinary(first) => self.fragments = Some(Some(BytesMut::from(&first[..]))),
            Item::FirstText(_) => self.fragments = Some(None),
            Item::Continue(next) => {
                if let Some(Some(message)) = &mut self.fragments {
                    message.extend_from_slice(&next);
                }
            }
            Item::Last(last) => match self.fragments.take() {
                Some(Some(mut message)) => {
                    message.extend_from_slice(&last);
                    // A copy of its own: what waits holds no more memory than it has bytes.
                    self.on_binary(Bytes::copy_from_slice(&message), ctx);
                }
                Some(None) => self.on_text(),
                None => {}
            },
        }
    }

    /// Seals the track, and then closes.
    fn finish(&mut self, reason: EndReason, close: Option<CloseReason>, ctx: &mut WebsocketContext<Self>) {
        if std::mem::replace(&mut self.finishing, true) {
            return;
        }
        let (track, (done, finished)) = (self.track.clone(), oneshot::channel());
        actix_rt::spawn(async move {
            if let Err(error) = track.send(FinishTrack { reason }).await {
                log::error!("a track ended before its connection error={error}");
            }
            done.send(()).ok();
        });
        ctx.spawn(finished.into_actor(self).map(move |_, _, ctx| {
            ctx.close(close);
            ctx.stop();
        }));
    }
}

impl Actor for VideoSocket {
    type Context = WebsocketContext<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let attach = AttachSocket { close: ctx.address().recipient(), tail: ctx.address().recipient() };
        if let Err(error) = self.track.try_send(attach) {
            log::error!("a track does not take its socket error={error}");
        }
    }
}

impl Drop for VideoSocket {
    fn drop(&mut self) {
        if !self.finishing {
            // The peer vanished and nothing asynchronous runs any more. The one message of this kind, so no bound is needed; if the track is
            // gone too, there is nobody to tell.
            self.track.do_send(SocketLost { tail: None });
        }
    }
}

impl StreamHandler<Result<Message, ProtocolError>> for VideoSocket {
    fn handle(&mut self, item: Result<Message, ProtocolError>, ctx: &mut Self::Context) {
        if self.finishing || self.deaf {
            return;
        }
        self.stats.note_arrival();
        match item {
            Ok(Message::Binary(message)) => self.on_binary(Bytes::copy_from_slice(&message), ctx),
            Ok(Message::Text(_)) => self.on_text(),
            Ok(Message::Ping(payload)) => ctx.pong(&payload),
            Ok(Message::Pong(_) | Message::Nop) => {}
            Ok(Message::Continuation(item)) => self.on_fragment(item, ctx),
            Ok(Message::Close(reason)) => self.finish(EndReason::Closed, reason, ctx),
            Err(_) => {
                let close = violation_close(self.violation.get());
                self.finish(EndReason::Violation, Some(close), ctx);
            }
        }
    }

    /// The connection has ended or broken without a Close, or behind one.
    fn finished(&mut self, ctx: &mut Self::Context) {
        self.finish(EndReason::Lost, None, ctx);
    }
}

impl Handler<TakeTail> for VideoSocket {
    type Result = MessageResult<TakeTail>;

    /// Nothing is collected here.
    fn handle(&mut self, _: TakeTail, _: &mut Self::Context) -> Self::Result {
        self.deaf = true;
        MessageResult(None)
    }
}

impl Handler<CloseSocket> for VideoSocket {
    type Result = ();

    fn handle(&mut self, msg: CloseSocket, ctx: &mut Self::Context) {
        if !std::mem::replace(&mut self.finishing, true) {
            ctx.close(Some(close_reason(msg.reason)));
            ctx.stop();
        }
    }
}
