//! `GET /egress-audio`: authenticates and admits a sender before the upgrade, then turns frames into batches.
//!
//! The adapter holds nothing worth saving: when its peer vanishes it is dropped in the middle, and `TrackActor` finalizes without it.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use actix::prelude::*;
use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder, web};
use actix_web_actors::ws::{self, CloseCode, CloseReason, Message, ProtocolError, WebsocketContext};
use bytes::BytesMut;
use tokio::sync::oneshot;

use super::Doors;
use super::admission::{admit, authenticate, reserve, storage_is_ready};
use super::error::{ApiError, ErrorCode};
use super::ingest_query::{IngestQuery, is_livekit};
use super::intake::Intake;
use super::low_water::SocketHandle;
use super::ws_guard::{GuardLimits, Violation, WsGuard};
use crate::actors::session_registry::{TrackEnded, TrackEnding, TrackOpened};
use crate::actors::stats::TrackStats;
use crate::actors::track::rows::TrackIdentity;
use crate::actors::track::{AttachSocket, AudioArrived, CloseSocket, FinishTrack, MuteTold, SocketLost, TakeTail, TrackActor, TrackParams};
use crate::audio::format::PcmFormat;
use crate::audio::mixdown::Mix;
use crate::clock::Clock;
use crate::db::rows::EndReason;
use crate::fail_point;
use crate::livekit::egress_stream::{FRAMES_PER_SECOND, TextMessage, parse_text};
use crate::ticket::TicketKind;

/// How long what waits in the kernel may take to come, when a connection is to give all it has.
const LAST_READ: Duration = Duration::from_millis(20);
/// Of one binary message, also in fragments: OWASP's bound for WebSockets. LiveKit sends 1,920 bytes.
const MAX_BINARY_BYTES: u64 = 64 << 10;
const MAX_TEXT_BYTES: u64 = 4 << 10;
const MAX_FRAGMENTS: u32 = 64;
const MAX_MESSAGE_TIME: Duration = Duration::from_secs(5);
/// Frames per second that are always read; LiveKit sends 100.
const FRAME_RATE: f64 = 800.0;
/// Seconds of audio that may come at any speed.
const BURST_SECONDS: f64 = 10.0;

pub async fn egress_audio(request: HttpRequest, payload: web::Payload, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let peer = request.peer_addr().map_or_else(|| "unknown".to_owned(), |address| address.ip().to_string());
    // LiveKit throws the answer away (`docs/FACTS.md`, egress socket): this line is all that tells why.
    open(request, payload, &peer, doors.clone()).await.inspect_err(|error| {
        doors.counts.refused_connections.of(error.code().as_str()).inc();
        log::warn!("a connection is refused peer={peer} problem={error}");
    })
}

async fn open(request: HttpRequest, payload: web::Payload, peer: &str, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let query = IngestQuery::parse(request.query_string())?;
    let (query, ticket) = authenticate(query, TicketKind::Audio, &doors)?;
    let mut response = handshake(&request)?;
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let (format, from_livekit) = (query.format(content_type), is_livekit(content_type));

    let (meeting, session_started_at) = admit(&query, ticket.as_ref().map(|(id, _)| id.clone()), &doors).await?;
    storage_is_ready("audio", &doors.storage, &query, &doors).await?;
    let identity = TrackIdentity { meeting, room: query.room, participant: query.participant, track: query.track, session_started_at };
    let stats = TrackStats::new(format, Arc::clone(&doors.tracks.totals));
    let stats = Arc::new(match query.mix {
        Some(Mix::Mono) if format.channels == 2 => stats.mixed_down(),
        Some(Mix::Mono) | None => stats,
    });
    let connection = reserve(&identity, ticket.as_ref(), &stats, peer, &doors).await?;

    log::info!(
        "track opened connection={connection} meeting={:?} room={:?} participant={:?} track={:?} sample_rate={} channels={}",
        identity.meeting.as_str(),
        identity.room.as_str(),
        identity.participant.as_ref().map(crate::ids::Identity::as_str),
        identity.track.as_ref().map(crate::ids::TrackSid::as_str),
        format.sample_rate,
        format.channels
    );
    let clock = Clock::start();
    let track = TrackActor::launch(TrackParams {
        connection,
        identity,
        ticket: ticket.map(|(id, _)| id),
        format,
        from_livekit,
        group_seconds: query.group_seconds.unwrap_or(doors.tracks.analysis.group_seconds),
        analyse: query.analyse.unwrap_or(true),
        mix: query.mix,
        clock,
        video: None,
        stats: Arc::clone(&stats),
        resources: Arc::clone(&doors.tracks),
        ending: doors.registry.clone().recipient::<TrackEnding>(),
        registry: doors.registry.clone().recipient::<TrackEnded>(),
    });
    let violation = Rc::default();
    let limits = guard_limits(format, from_livekit, doors.tracks.ingest.max_speed);
    // A body with a framing of its own is decoded by actix-http alone.
    let is_plain = ![header::TRANSFER_ENCODING, header::CONTENT_LENGTH].iter().any(|name| request.headers().contains_key(name));
    let handle = request.conn_data::<SocketHandle>().filter(|_| is_plain).and_then(SocketHandle::take);
    let intake = Intake::new(format, Arc::clone(&stats), clock, handle);
    let guard = WsGuard::new(payload, limits, Rc::clone(&violation)).collecting_in(Rc::clone(&intake));
    let socket = EgressSocket { track: track.clone(), stats, violation, intake, fragments: None, finishing: false, deaf: false };
    let stream = WebsocketContext::create(socket, guard);
    doors.registry.send(TrackOpened { connection, track }).await?;
    Ok(response.streaming(stream))
}

/// The answer that opens the WebSocket.
pub(super) fn handshake(request: &HttpRequest) -> Result<HttpResponseBuilder, ApiError> {
    ws::handshake(request).map_err(|error| ApiError::new(ErrorCode::InvalidRequest, format!("no WebSocket handshake: {error}")))
}

/// What a sender is told that broke the rules.
pub(super) fn violation_close(violation: Option<Violation>) -> CloseReason {
    let (code, text) = match violation {
        Some(Violation::TooBig) => (CloseCode::Size, "a message is too big"),
        Some(Violation::Protocol(problem)) => (CloseCode::Protocol, problem),
        None => (CloseCode::Protocol, "not a WebSocket message"),
    };
    log::warn!("a sender broke the protocol problem={text:?}");
    CloseReason { code, description: Some(text.to_owned()) }
}

/// What a sender is told whose track has ended.
pub(super) fn close_reason(reason: EndReason) -> CloseReason {
    let code = match reason {
        EndReason::Shutdown => CloseCode::Restart,
        EndReason::Failed | EndReason::Crashed => CloseCode::Error,
        EndReason::Idle | EndReason::Superseded | EndReason::TicketSpent => CloseCode::Policy,
        EndReason::Violation => CloseCode::Protocol,
        EndReason::Closed | EndReason::Lost | EndReason::Rotated | EndReason::Gap => CloseCode::Normal,
    };
    CloseReason { code, description: Some(reason.as_str().to_owned()) }
}

pub(crate) fn guard_limits(format: PcmFormat, from_livekit: bool, max_speed: f64) -> GuardLimits {
    // A mono declaration of LiveKit may turn out to be stereo.
    let byte_rate = if from_livekit { format.byte_rate().max(PcmFormat::LIVEKIT.byte_rate()) } else { format.byte_rate() };
    let byte_rate = f64::from(u32::try_from(byte_rate).unwrap_or(u32::MAX));
    let livekit_frames = f64::from(FRAMES_PER_SECOND);
    GuardLimits {
        binary_bytes: MAX_BINARY_BYTES,
        text_bytes: MAX_TEXT_BYTES,
        fragments: MAX_FRAGMENTS,
        message_time: MAX_MESSAGE_TIME,
        bytes_per_second: max_speed * byte_rate,
        frames_per_second: FRAME_RATE.max(max_speed * livekit_frames),
        burst_bytes: BURST_SECONDS * byte_rate,
        burst_frames: BURST_SECONDS * livekit_frames,
    }
}

/// The adapter between one WebSocket and its `TrackActor`.
struct EgressSocket {
    track: Addr<TrackActor>,
    stats: Arc<TrackStats>,
    violation: Rc<Cell<Option<Violation>>>,
    intake: Rc<Intake>,
    /// The text or binary message whose last fragment has not come.
    fragments: Option<(bool, BytesMut)>,
    finishing: bool,
    /// The track ends and takes nothing more.
    deaf: bool,
}

impl EgressSocket {
    fn on_text(&mut self, text: &str, ctx: &mut WebsocketContext<Self>) {
        match parse_text(text) {
            TextMessage::Muted(muted) => {
                // In its place between the audio before and behind it.
                self.flush(ctx);
                self.hand_over(MuteTold(muted), ctx);
            }
            TextMessage::Unknown => {
                self.stats.unknown_texts.fetch_add(1, Relaxed);
            }
        }
    }

    fn flush(&mut self, ctx: &mut WebsocketContext<Self>) {
        if let Some(batch) = self.intake.take() {
            fail_point::pass("socket-batch");
            self.hand_over(batch, ctx);
        }
    }

    /// Gives a message to the track. Where its mailbox is full, nothing more is read until it has room: TCP holds the rest.
    fn hand_over<M>(&mut self, message: M, ctx: &mut WebsocketContext<Self>)
    where
        M: actix::Message<Result = ()> + Send + 'static,
        TrackActor: Handler<M>,
    {
        match self.track.try_send(message) {
            Ok(()) => {}
            Err(SendError::Full(message)) => {
                // Sent from a task of its own: one that belonged to this actor would be lost with it.
                let (track, (done, taken)) = (self.track.clone(), oneshot::channel());
                let stall = self.stats.totals().read_stalls.begin();
                actix_rt::spawn(async move {
                    if let Err(error) = track.send(message).await {
                        log::error!("a track ended under its audio error={error}");
                    }
                    done.send(()).ok();
                });
                ctx.wait(taken.into_actor(self).map(move |_, _, _| drop(stall)));
            }
            Err(SendError::Closed(_)) => {
                // A track that ends says so by CloseSocket first: this one died.
                if !std::mem::replace(&mut self.finishing, true) {
                    log::error!("a connection is closed: its track has died");
                    ctx.close(Some(CloseReason { code: CloseCode::Error, description: Some(EndReason::Failed.as_str().to_owned()) }));
                    ctx.stop();
                }
            }
        }
    }

    /// Seals the track, and then closes.
    fn finish(&mut self, reason: EndReason, close: Option<CloseReason>, ctx: &mut WebsocketContext<Self>) {
        if std::mem::replace(&mut self.finishing, true) {
            return;
        }
        let (track, tail, (done, finished)) = (self.track.clone(), self.intake.take(), oneshot::channel());
        actix_rt::spawn(async move {
            let sealed = async {
                if let Some(tail) = tail {
                    track.send(tail).await?;
                }
                track.send(FinishTrack { reason }).await
            };
            if let Err(error) = sealed.await {
                log::error!("a track ended before its connection error={error}");
            }
            done.send(()).ok();
        });
        ctx.spawn(finished.into_actor(self).map(move |_, _, ctx| {
            ctx.close(close);
            ctx.stop();
        }));
    }

    fn on_violation(&mut self, ctx: &mut WebsocketContext<Self>) {
        let close = violation_close(self.violation.get());
        self.finish(EndReason::Violation, Some(close), ctx);
    }
}

impl Actor for EgressSocket {
    type Context = WebsocketContext<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let attach = AttachSocket { close: ctx.address().recipient(), tail: ctx.address().recipient() };
        self.hand_over(attach, ctx);
    }
}

impl Drop for EgressSocket {
    fn drop(&mut self) {
        if !self.finishing {
            // The peer vanished and nothing asynchronous runs any more. The one message of this kind, so no bound is needed; if the track is
            // gone too, there is nobody to tell.
            let tail = self.intake.take();
            self.track.do_send(SocketLost { tail });
        }
    }
}

impl StreamHandler<Result<Message, ProtocolError>> for EgressSocket {
    fn handle(&mut self, item: Result<Message, ProtocolError>, ctx: &mut Self::Context) {
        if self.finishing || self.deaf {
            // Or the guard would say for ever that it is there.
            drop(self.intake.take());
            return;
        }
        match item {
            // The guard collects what is binary.
            Ok(Message::Binary(_) | Message::Nop) => {}
            Ok(Message::Text(text)) => self.on_text(&text, ctx),
            Ok(Message::Ping(payload)) => ctx.pong(&payload),
            // The guard's word that a batch is there, or the peer's, which is a sign of life and no more.
            Ok(Message::Pong(_)) if self.intake.is_full() || self.intake.is_due() => self.flush(ctx),
            Ok(Message::Pong(_)) => {}
            Ok(Message::Continuation(item)) => self.on_fragment(item, ctx),
            Ok(Message::Close(reason)) => self.finish(EndReason::Closed, reason, ctx),
            // The guard's word, or a text that is not UTF-8.
            Err(_) => self.on_violation(ctx),
        }
    }

    /// The connection has ended or broken without a Close, or behind one.
    fn finished(&mut self, ctx: &mut Self::Context) {
        self.finish(EndReason::Lost, None, ctx);
    }
}

impl EgressSocket {
    fn on_fragment(&mut self, item: actix_http::ws::Item, ctx: &mut WebsocketContext<Self>) {
        use actix_http::ws::Item;
        match item {
            Item::FirstBinary(first) => self.fragments = Some((true, BytesMut::from(&first[..]))),
            Item::FirstText(first) => self.fragments = Some((false, BytesMut::from(&first[..]))),
            Item::Continue(next) => {
                if let Some((_, message)) = &mut self.fragments {
                    message.extend_from_slice(&next);
                }
            }
            Item::Last(last) => {
                let Some((binary, mut message)) = self.fragments.take() else { return };
                message.extend_from_slice(&last);
                match std::str::from_utf8(&message) {
                    _ if binary => {
                        self.intake.push(&message, [0; 4], message.len());
                        if self.intake.is_full() {
                            self.flush(ctx);
                        }
                    }
                    Ok(text) => self.on_text(text, ctx),
                    Err(_) => self.on_violation(ctx),
                }
            }
        }
    }
}

impl Handler<TakeTail> for EgressSocket {
    type Result = ResponseActFuture<Self, Option<AudioArrived>>;

    fn handle(&mut self, _: TakeTail, _: &mut Self::Context) -> Self::Result {
        self.intake.lower();
        Box::pin(tokio::time::sleep(LAST_READ).into_actor(self).map(|(), socket, _| {
            socket.deaf = true;
            socket.intake.take()
        }))
    }
}

impl Handler<CloseSocket> for EgressSocket {
    type Result = ();

    fn handle(&mut self, msg: CloseSocket, ctx: &mut Self::Context) {
        if std::mem::replace(&mut self.finishing, true) {
            return;
        }
        ctx.close(Some(close_reason(msg.reason)));
        ctx.stop();
    }
}
