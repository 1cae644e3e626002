//! One egress connection: supervises the buffer, the writer and the analysis of its track, and outlives its socket to finalize.
//!
//! In: [`AudioArrived`], [`MuteTold`], [`FinishTrack`] and [`SocketLost`] from the socket's adapter and the registry; [`WriterFailed`] and
//! [`SegmentFull`] from `BufferActor`. Out: everything to its children, rows to the store, [`CloseSocket`] to the adapter, [`TrackEnded`] to the
//! registry. Full: the adapter keeps its batch and tries again. Dies: the registry forgets it; the rows' task closes its segment.

mod children;
mod ending;
pub mod phase;
mod resources;
pub mod rows;
pub mod segment_end;
#[cfg(test)]
mod tests;
pub mod video;
pub mod video_queue;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use actix::prelude::*;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use tokio::sync::{oneshot, watch};

use self::children::Children;
use self::phase::{Effect, Phase, TrackEvent};
pub use self::resources::{Service, TrackResources};
use self::rows::{RowLog, TrackIdentity};
use self::video::Video;
use super::buffer::{PushAudio, SetMuted, SettleFormat};
use super::session_registry::{ConnectionId, TrackEnded, TrackEnding};
use super::stats::TrackStats;
use super::wav_writer::CorrectFormat;
use crate::audio::format::PcmFormat;
use crate::audio::mixdown::{Mix, Mixdown};
use crate::audio::rate_judge::{RateJudge, Verdict as RateVerdict};
use crate::clock::Clock;
use crate::db::rows::{EndReason, TrackFacts};
use crate::fail_point;
use crate::ids::TicketId;
use crate::video::codec::VideoCodec;

/// 9 s of batches.
const MAILBOX_CAPACITY: usize = 64;
/// How often idleness is looked at, and changed facts are told to the rows.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// A batch of the socket's binary messages, as one run of bytes.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AudioArrived {
    pub audio: Bytes,
    /// When its first byte came, and when its last was read.
    pub arrived: Instant,
    pub read: Instant,
    pub arrived_at: DateTime<Utc>,
}

/// LiveKit's mute text, in its place between the batches.
#[derive(Message)]
#[rtype(result = "()")]
pub struct MuteTold(pub bool);

/// Resolves when the file is sealed and its row final, or cannot be.
#[derive(Message)]
#[rtype(result = "()")]
pub struct FinishTrack {
    pub reason: EndReason,
}

/// The adapter is gone, with what it had not handed over yet.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SocketLost {
    pub tail: Option<AudioArrived>,
}

/// The adapter says where it can be asked and told.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AttachSocket {
    pub close: Recipient<CloseSocket>,
    pub tail: Recipient<TakeTail>,
}

/// Asks the adapter for what it has collected. From then on it takes nothing more.
#[derive(Message)]
#[rtype(result = "Option<AudioArrived>")]
pub struct TakeTail;

/// The track has ended without the peer's doing.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct CloseSocket {
    pub reason: EndReason,
}

/// A writer could not write, or died.
#[derive(Message)]
#[rtype(result = "()")]
pub struct WriterFailed {
    pub generation: u32,
    pub error: String,
    /// It could have gone on in its file, of which a sync has failed.
    pub is_suspect: bool,
}

/// The segment has reached its length, or its sender has been silent for too long.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SegmentFull {
    pub generation: u32,
    pub reason: EndReason,
}

/// What one connection declared.
pub struct TrackParams {
    pub connection: ConnectionId,
    pub identity: TrackIdentity,
    pub ticket: Option<TicketId>,
    /// Of what arrives.
    pub format: PcmFormat,
    /// The handshake was LiveKit's.
    pub from_livekit: bool,
    pub group_seconds: f64,
    /// Whether the analysis service may hear it.
    pub analyse: bool,
    pub mix: Option<Mix>,
    pub clock: Clock,
    /// Of a track of video; its format is [`PcmFormat::NONE`].
    pub video: Option<VideoCodec>,
    pub stats: Arc<TrackStats>,
    pub resources: Arc<TrackResources>,
    pub ending: Recipient<TrackEnding>,
    pub registry: Recipient<TrackEnded>,
}

pub struct TrackActor {
    params: TrackParams,
    phase: Phase,
    judge: RateJudge,
    /// Between what arrives and the children, where two channels are recorded as one.
    mixdown: Option<Mixdown>,
    /// Groups wait for the judge.
    in_doubt: bool,
    rows: RowLog,
    /// Of audio.
    children: Option<Children>,
    video: Option<Video>,
    socket: Option<AttachSocket>,
    finishing: Vec<oneshot::Sender<()>>,
    /// Frames of the connection that its finished segments took in.
    taken: Arc<AtomicU64>,
    /// Earlier segments that are not sealed yet.
    sealing: Vec<oneshot::Receiver<()>>,
    /// It has been said that the sender's clock drifts.
    drift_is_told: bool,
    /// Mute spans or format are newer than what the rows were told.
    facts_changed: bool,
    spent: Option<oneshot::Receiver<()>>,
    /// Dropped with the track, whatever it dies of.
    lifeline: watch::Sender<()>,
    /// Its end is not to wait for the disk for long.
    in_haste: watch::Sender<bool>,
    /// Syncs fail again and again, and no next file is any better: writers stay in one that is suspect.
    stays_suspect: Arc<AtomicBool>,
}

impl TrackActor {
    /// Starts the track on this thread. A panic of it is logged and told to the registry.
    pub fn launch(params: TrackParams) -> Addr<Self> {
        let (registry, connection) = (params.registry.clone(), params.connection);
        let context = Context::new();
        let addr = context.address();
        let (told, spent) = oneshot::channel();
        let (resources, stats) = (Arc::clone(&params.resources), Arc::clone(&params.stats));
        let (store, journal) = (resources.store.clone(), resources.journal.clone());
        let root = if params.video.is_some() { &resources.video_root } else { &resources.root };
        let rows = RowLog::start(store, journal, root.clone(), params.identity.clone(), params.ticket.clone(), told, &resources.watchdog);
        let judge = RateJudge::new(params.format, params.from_livekit);
        let track = Self {
            phase: Phase::Waiting,
            in_doubt: judge.may_be_stereo(),
            judge,
            mixdown: (params.stats.recorded_format() != params.format).then(Mixdown::default),
            rows,
            children: None,
            video: None,
            socket: None,
            finishing: Vec::new(),
            taken: Arc::default(),
            sealing: Vec::new(),
            drift_is_told: false,
            facts_changed: false,
            spent: Some(spent),
            lifeline: watch::Sender::new(()),
            in_haste: watch::Sender::new(false),
            stays_suspect: Arc::default(),
            params,
        };
        let running = actix_rt::spawn(context.into_future(track));
        stats.totals().live_tracks.inc();
        actix_rt::spawn(async move {
            let outcome = running.await;
            stats.totals().live_tracks.dec();
            if let Err(error) = outcome {
                log::error!("a track failed connection={connection} error={error}");
                stats.draining.store(true, Relaxed);
                if let Err(error) = registry.send(TrackEnded { connection }).await {
                    log::error!("the registry is gone error={error}");
                }
            }
        });
        addr
    }

    fn on(&mut self, event: TrackEvent, ctx: &mut Context<Self>) {
        let (phase, effect) = self.phase.on(event);
        self.phase = phase;
        match effect {
            Effect::Nothing | Effect::TakeAudio => {}
            Effect::IgnoreAudio => log::debug!("audio after the end of a track connection={}", self.params.connection),
            Effect::Drain(reason) => self.drain(reason, ctx),
            Effect::Release(reason) => self.release(reason, ctx),
        }
    }

    fn tell_facts(&self) {
        let mute_spans = self.params.stats.mutes.in_ms(self.params.stats.format());
        self.rows.facts(TrackFacts { format_mismatch: self.params.stats.format_mismatch(), mute_spans });
    }

    /// Says once that the sender's clock is out of order. What it sends is recorded as it comes.
    fn look_at_drift(&mut self) {
        if let Some(drift) = self.params.stats.drift().filter(|drift| drift.is_alarming && !self.drift_is_told) {
            self.drift_is_told = true;
            self.params.stats.totals().drifting.inc();
            log::warn!("the clock of a sender drifts away connection={} ppm={:.0}", self.params.connection, drift.ppm);
        }
    }

    /// What the arriving rate says. Returns the format that groups are to be cut by from now on, if that has just been decided.
    fn judge(&mut self, now: Instant, bytes: u64) -> Option<PcmFormat> {
        let verdict = self.judge.on_audio(now, bytes);
        let declared = self.params.format;
        if let Some(RateVerdict::IsStereo | RateVerdict::Mismatch { .. }) = verdict {
            let mismatch = match verdict {
                Some(RateVerdict::Mismatch { arriving_byte_rate }) => format!(
                    "declared {} Hz and {} channels, which are {} bytes per second, but {arriving_byte_rate} bytes per second arrive",
                    declared.sample_rate,
                    declared.channels,
                    declared.byte_rate()
                ),
                Some(RateVerdict::IsStereo | RateVerdict::AsDeclared) | None => {
                    // The file has stereo under a mono header by now: one header fits all of it, and no sample is made anew.
                    let unmixed = if self.params.mix.is_some() { " and not mixed" } else { "" };
                    format!("declared as mono, but LiveKit's 48 kHz stereo arrives: corrected to 2 channels{unmixed}")
                }
            };
            log::warn!("the format of a track is not as declared connection={} mismatch={mismatch:?}", self.params.connection);
            self.params.stats.set_format_mismatch(mismatch);
            self.facts_changed = true;
        }
        if verdict == Some(RateVerdict::IsStereo) {
            self.params.stats.set_format(PcmFormat::LIVEKIT);
            self.in_doubt = false;
            return Some(PcmFormat::LIVEKIT);
        }
        if self.in_doubt && !self.judge.may_be_stereo() {
            self.in_doubt = false;
            return Some(declared);
        }
        None
    }
}

impl Actor for TrackActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
        match self.params.video {
            Some(codec) => self.start_video(codec, ctx),
            None => self.start_children(ctx),
        }
        ctx.run_interval(WATCH_INTERVAL, |track, ctx| {
            if track.facts_changed && !track.rows.facts_are_waiting() {
                track.facts_changed = false;
                track.tell_facts();
            }
            track.look_at_drift();
            if track.params.stats.idle() > track.params.resources.ingest.idle_timeout {
                track.on(TrackEvent::End(EndReason::Idle), ctx);
            }
        });
        if let Some(spent) = self.spent.take() {
            ctx.spawn(spent.into_actor(self).map(|told, track, ctx| {
                if told.is_ok() {
                    track.on(TrackEvent::End(EndReason::TicketSpent), ctx);
                }
            }));
        }
    }
}

impl Handler<AttachSocket> for TrackActor {
    type Result = ();

    fn handle(&mut self, socket: AttachSocket, _: &mut Context<Self>) {
        self.socket = Some(socket);
    }
}

impl Handler<AudioArrived> for TrackActor {
    type Result = ();

    fn handle(&mut self, msg: AudioArrived, ctx: &mut Context<Self>) {
        fail_point::pass("track-audio");
        self.on(TrackEvent::Audio, ctx);
        let bytes = u64::try_from(msg.audio.len()).unwrap_or(u64::MAX);
        if self.phase != Phase::Streaming {
            return;
        }
        self.params.stats.note_received(bytes);
        let settled = self.judge(Instant::now(), bytes);
        let Some(children) = &self.children else { return };
        if let Some(format) = settled.filter(|format| *format != self.params.format) {
            self.params.format = format;
            let corrected = children.writer.addr().send(CorrectFormat(format));
            ctx.spawn(corrected.into_actor(self).map(|corrected, _, _| {
                if !matches!(corrected, Ok(Ok(()))) {
                    log::error!("the header of a recording could not be corrected");
                }
            }));
        }
        let buffer = children.buffer.addr().clone();
        // What came is counted and judged by now: the children know only what is recorded.
        let audio = match &mut self.mixdown {
            Some(mixdown) => mixdown.push(&msg.audio).into(),
            None => msg.audio,
        };
        let push = PushAudio { audio, arrived: msg.arrived, read: msg.read, arrived_at: msg.arrived_at };
        // One message under way: the buffer only takes it over, so this is as long as its turn.
        let pushed = async move {
            if let Some(format) = settled {
                buffer.send(SettleFormat(format)).await?;
            }
            buffer.send(push).await
        };
        ctx.wait(pushed.into_actor(self).map(|pushed: Result<(), MailboxError>, track, ctx| {
            if pushed.is_err() {
                track.on(TrackEvent::End(EndReason::Failed), ctx);
            }
        }));
    }
}

impl Handler<MuteTold> for TrackActor {
    type Result = ();

    fn handle(&mut self, MuteTold(muted): MuteTold, ctx: &mut Context<Self>) {
        if !self.params.stats.mutes.note(muted, self.params.stats.position()) {
            return;
        }
        self.params.stats.muted.store(muted, Relaxed);
        self.facts_changed = true;
        if let Some(children) = &self.children {
            let told = children.buffer.addr().send(SetMuted(muted));
            ctx.wait(told.into_actor(self).map(|told, track, ctx| {
                if told.is_err() {
                    track.on(TrackEvent::End(EndReason::Failed), ctx);
                }
            }));
        }
    }
}

impl Handler<FinishTrack> for TrackActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, msg: FinishTrack, ctx: &mut Context<Self>) -> Self::Result {
        let (done, finished) = oneshot::channel();
        if matches!(self.phase, Phase::Closed(_)) {
            done.send(()).ok();
        } else {
            self.finishing.push(done);
        }
        self.end_with_tail(msg.reason, ctx);
        Box::pin(async move {
            if finished.await.is_err() {
                log::error!("a track ended without being sealed");
            }
        })
    }
}

impl Handler<SocketLost> for TrackActor {
    type Result = ();

    fn handle(&mut self, msg: SocketLost, ctx: &mut Context<Self>) {
        if let Some(tail) = msg.tail {
            self.handle(tail, ctx);
        }
        self.on(TrackEvent::End(EndReason::Lost), ctx);
    }
}
