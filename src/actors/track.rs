//! One egress connection: supervises the buffer, the writer and the analysis of its track, and outlives its socket to finalize.
//!
//! In: [`AudioArrived`], [`MuteTold`], [`FinishTrack`] and [`SocketLost`] from the socket's adapter and the registry; [`WriterFailed`] and
//! [`SegmentFull`] from `BufferActor`. Out: everything to its children, rows to the store, [`CloseSocket`] to the adapter, [`TrackEnded`] to the
//! registry. Full: the adapter keeps its batch and tries again. Dies: the registry forgets it; the rows' task closes its segment.

pub mod phase;
pub mod rows;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use actix::prelude::*;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinError, JoinHandle};

use self::phase::{Effect, Phase, TrackEvent};
use self::rows::{RowLog, TrackIdentity};
use super::buffer::{BufferActor, BufferParams, FinishBuffer, PushAudio, SetMuted, SettleFormat, SpoolBudget, Taker, UseWriter};
use super::child::{Child, RestartPolicy, Verdict, jitter};
use super::hume_client::{AnalysisService, FinishAnalysis, HumeClientActor, HumeClientParams};
use super::session_registry::{ConnectionId, TrackEnded};
use super::stats::{TrackStats, WriteLag};
use super::wav_writer::{CorrectFormat, FinishSegment, WavWriterActor, WavWriterParams};
use crate::audio::format::PcmFormat;
use crate::audio::rate_judge::{RateJudge, Verdict as RateVerdict};
use crate::audio::window::{GroupLimits, Grouper};
use crate::config::{AnalysisConfig, IngestConfig, RecordingConfig};
use crate::db::Store;
use crate::db::rows::{EndReason, MuteSpan, TrackFacts};
use crate::ids::TicketId;
use crate::recording::path::SegmentName;
use crate::recording::pipeline_log::PipelineLog;
use crate::recording::wav_header::MAX_DATA_BYTES;

/// 6 s of batches.
const MAILBOX_CAPACITY: usize = 64;
/// How often idleness is looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How long the buffer may take to empty itself, and a segment to be sealed, when the track ends: both within a shutdown's 10 s.
const DRAIN_DEADLINE: Duration = Duration::from_secs(4);
/// How long the end waits for the rows; they go on without it.
const ROWS_DEADLINE: Duration = Duration::from_secs(2);
/// How long the service may take to answer what is left.
const ANALYSIS_DEADLINE: Duration = Duration::from_secs(10);
const ANALYSIS_SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

/// 5 in 60 s, then the track fails (`reliability.md` I8); the next segment opens at once.
const WRITER_RESTARTS: RestartPolicy =
    RestartPolicy { intensity: 5, window: Duration::from_secs(60), first_backoff: Duration::ZERO, max_backoff: Duration::ZERO };
const ANALYSIS_RESTARTS: RestartPolicy =
    RestartPolicy { intensity: 5, window: Duration::from_secs(60), first_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(30) };

/// A batch of the socket's binary messages, as one run of bytes.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AudioArrived {
    pub audio: Bytes,
    /// When its first byte came.
    pub arrived: Instant,
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

/// The adapter says where it can be told to close.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AttachSocket(pub Recipient<CloseSocket>);

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
}

/// A segment has reached its length.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SegmentFull {
    pub generation: u32,
}

/// What all tracks share.
pub struct TrackResources {
    pub audio_dir: PathBuf,
    pub ingest: IngestConfig,
    pub recording: RecordingConfig,
    pub analysis: AnalysisConfig,
    pub store: Store,
    pub pipeline_log: PipelineLog,
    pub lag: Arc<WriteLag>,
    pub budget: Arc<SpoolBudget>,
    pub service: Service,
}

/// The analysis service, or why there is none.
pub enum Service {
    Streaming(AnalysisService),
    Nobody(&'static str),
}

/// What one connection declared.
pub struct TrackParams {
    pub connection: ConnectionId,
    pub identity: TrackIdentity,
    pub ticket: Option<TicketId>,
    pub format: PcmFormat,
    /// The handshake was LiveKit's.
    pub from_livekit: bool,
    pub group_seconds: f64,
    pub stats: Arc<TrackStats>,
    pub resources: Arc<TrackResources>,
    pub registry: Recipient<TrackEnded>,
}

pub struct TrackActor {
    params: TrackParams,
    phase: Phase,
    judge: RateJudge,
    /// Groups wait for the judge.
    in_doubt: bool,
    rows: RowLog,
    children: Option<Children>,
    socket: Option<Recipient<CloseSocket>>,
    finishing: Vec<oneshot::Sender<()>>,
    /// Byte positions from a mute text to the next unmute text.
    mute_spans: Vec<(u64, Option<u64>)>,
    spent: Option<oneshot::Receiver<()>>,
    /// Dropped with the track, whatever it dies of.
    lifeline: watch::Sender<()>,
}

/// Listed in the order of the audio's way.
struct Children {
    buffer: Child<BufferActor>,
    writer: Child<WavWriterActor>,
    analysis: Option<Child<HumeClientActor>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChildKind {
    Buffer,
    Writer,
    Analysis,
}

impl TrackActor {
    /// Starts the track on this thread. A panic of it is logged and told to the registry.
    pub fn launch(params: TrackParams) -> Addr<Self> {
        let (registry, connection) = (params.registry.clone(), params.connection);
        let context = Context::new();
        let addr = context.address();
        let (told, spent) = oneshot::channel();
        let (resources, stats) = (Arc::clone(&params.resources), Arc::clone(&params.stats));
        let rows = RowLog::start(resources.store.clone(), resources.audio_dir.clone(), params.identity.clone(), params.ticket.clone(), told);
        let judge = RateJudge::new(params.format, params.from_livekit);
        let track = Self {
            phase: Phase::Waiting,
            in_doubt: judge.may_be_stereo(),
            judge,
            rows,
            children: None,
            socket: None,
            finishing: Vec::new(),
            mute_spans: Vec::new(),
            spent: Some(spent),
            lifeline: watch::Sender::new(()),
            params,
        };
        let running = actix_rt::spawn(context.into_future(track));
        actix_rt::spawn(async move {
            if let Err(error) = running.await {
                log::error!("a track failed connection={connection} error={error}");
                stats.draining.store(true, Relaxed);
                if let Err(error) = registry.send(TrackEnded { connection }).await {
                    log::error!("the registry is gone error={error}");
                }
            }
        });
        addr
    }

    fn start_children(&mut self, ctx: &mut Context<Self>) {
        let resources = Arc::clone(&self.params.resources);
        let TrackIdentity { meeting, room, participant, track } = &self.params.identity;
        let log = resources.pipeline_log.of_track(
            meeting.as_str(),
            participant.as_ref().map(crate::ids::Identity::as_str),
            track.as_ref().map(crate::ids::TrackSid::as_str),
        );
        let name = SegmentName {
            meeting: meeting.as_str().to_owned(),
            room: room.as_str().to_owned(),
            participant: participant.clone().map(crate::ids::Identity::into_string),
            track: track.clone().map(crate::ids::TrackSid::into_string),
        };
        let (rows, stats, shared) = (self.rows.clone(), Arc::clone(&self.params.stats), Arc::clone(&resources));
        let (writer, writer_runs) = Child::start(WRITER_RESTARTS, move || {
            WavWriterActor::new(WavWriterParams {
                audio_dir: shared.audio_dir.clone(),
                name: name.clone(),
                format: stats.format(),
                rows: rows.clone(),
                lag: Arc::clone(&shared.lag),
            })
        });
        let analysis = match &resources.service {
            Service::Nobody(_) => None,
            Service::Streaming(service) => {
                let (service, rows, log, stats) = (service.clone(), self.rows.clone(), log.clone(), Arc::clone(&self.params.stats));
                let lifeline = self.lifeline.subscribe();
                Some(Child::start(ANALYSIS_RESTARTS, move || {
                    HumeClientActor::new(HumeClientParams {
                        service: service.clone(),
                        rows: rows.clone(),
                        log: log.clone(),
                        stats: Arc::clone(&stats),
                        lifeline: lifeline.clone(),
                    })
                }))
            }
        };
        let taker = self.taker(analysis.as_ref().map(|(child, _)| child));
        let limits = GroupLimits { seconds: self.params.group_seconds, bytes: resources.analysis.group_bytes };
        let mut buffer_params = Some(BufferParams {
            format: self.params.format,
            grouper: Grouper::new(self.params.format, limits, matches!(taker, Taker::Service(_)), self.in_doubt),
            normalize: resources.analysis.normalize,
            taker,
            log,
            mute: resources.recording.mute,
            spool_bytes: self.params.format.bytes_in(resources.recording.spool_per_track),
            budget: Arc::clone(&resources.budget),
            stats: Arc::clone(&self.params.stats),
            writer: self.use_writer(&writer),
            writer_failed: ctx.address().recipient(),
            segment_full: ctx.address().recipient(),
        });
        // The buffer is made once: it holds the only copy, so its death ends the track.
        let (buffer, buffer_runs) =
            Child::start(WRITER_RESTARTS, move || BufferActor::new(buffer_params.take().expect("a buffer is never restarted")));
        Self::watch(ChildKind::Buffer, 0, buffer_runs, ctx);
        Self::watch(ChildKind::Writer, 0, writer_runs, ctx);
        let analysis = analysis.map(|(child, runs)| {
            Self::watch(ChildKind::Analysis, 0, runs, ctx);
            child
        });
        self.children = Some(Children { buffer, writer, analysis });
    }

    fn taker(&self, analysis: Option<&Child<HumeClientActor>>) -> Taker {
        match (analysis, &self.params.resources.service) {
            (Some(child), _) => Taker::Service(child.addr().clone().recipient()),
            (None, Service::Nobody(reason)) => Taker::Nobody(reason),
            (None, Service::Streaming(_)) => Taker::Nobody("the analysis failed too often"),
        }
    }

    fn use_writer(&self, writer: &Child<WavWriterActor>) -> UseWriter {
        let format = self.params.stats.format();
        let limit_bytes = format.bytes_in(self.params.resources.recording.segment_duration).min(MAX_DATA_BYTES - (8 << 20));
        UseWriter { writer: writer.addr().clone().recipient(), generation: writer.generation(), limit_bytes }
    }

    /// Waits for a child's end, which only the supervisor may judge.
    fn watch(kind: ChildKind, generation: u32, running: JoinHandle<()>, ctx: &mut Context<Self>) {
        ctx.spawn(running.into_actor_outcome(kind, generation));
    }

    fn child_ended(&mut self, kind: ChildKind, generation: u32, outcome: Result<(), JoinError>, ctx: &mut Context<Self>) {
        let Err(error) = outcome else { return };
        log::error!("a child of a track panicked connection={} child={kind:?} generation={generation} error={error}", self.params.connection);
        match kind {
            ChildKind::Buffer => self.on(TrackEvent::End(EndReason::Failed), ctx),
            ChildKind::Writer => self.replace_failed_writer(generation, "it panicked", ctx),
            ChildKind::Analysis => self.restart_analysis(generation, ctx),
        }
    }

    fn replace_failed_writer(&mut self, generation: u32, error: &str, ctx: &mut Context<Self>) {
        let Some(children) = &mut self.children else { return };
        if children.writer.generation() != generation {
            return;
        }
        match children.writer.budget.on_failure(Instant::now(), jitter()) {
            Verdict::RestartIn(_) => {
                log::error!("a segment failed, the next one goes on connection={} error={error}", self.params.connection);
                self.params.stats.writer_restarts.fetch_add(1, Relaxed);
                self.next_segment(EndReason::Failed, ctx);
            }
            Verdict::GiveUp => {
                log::error!("a track's segments fail again and again, it is given up connection={} error={error}", self.params.connection);
                self.on(TrackEvent::End(EndReason::Failed), ctx);
            }
        }
    }

    /// Finishes the segment in the background and lets the buffer go on with the next.
    fn next_segment(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
        let Some(children) = &mut self.children else { return };
        let old = children.writer.addr().clone();
        let runs = children.writer.restart();
        let (generation, buffer) = (children.writer.generation(), children.buffer.addr().clone());
        Self::watch(ChildKind::Writer, generation, runs, ctx);
        let Some(children) = &self.children else { return };
        let next = self.use_writer(&children.writer);
        let turn = async move {
            // A dead or broken writer cannot finish: the rows' task then measures the file itself.
            if let Err(error) = tokio::time::timeout(DRAIN_DEADLINE, old.send(FinishSegment { reason })).await {
                log::error!("a segment was not finished in time error={error}");
            }
            buffer.send(next).await
        };
        ctx.spawn(turn.into_actor(self).map(|told, track, ctx| {
            if told.is_err() {
                track.on(TrackEvent::End(EndReason::Failed), ctx);
            }
        }));
    }

    fn restart_analysis(&mut self, generation: u32, ctx: &mut Context<Self>) {
        let Some(child) = self.children.as_mut().and_then(|children| children.analysis.as_mut()) else { return };
        if child.generation() != generation {
            return;
        }
        match child.budget.on_failure(Instant::now(), jitter()) {
            Verdict::RestartIn(wait) => {
                ctx.run_later(wait, |track, ctx| {
                    let Some(child) = track.children.as_mut().and_then(|children| children.analysis.as_mut()) else { return };
                    let runs = child.restart();
                    track.params.stats.analysis_restarts.fetch_add(1, Relaxed);
                    Self::watch(ChildKind::Analysis, child.generation(), runs, ctx);
                    track.tell_taker(ctx);
                });
            }
            Verdict::GiveUp => {
                log::error!("the analysis of a track fails again and again, it is given up connection={}", self.params.connection);
                if let Some(children) = &mut self.children {
                    children.analysis = None;
                }
                self.tell_taker(ctx);
            }
        }
    }

    fn tell_taker(&mut self, ctx: &mut Context<Self>) {
        let Some(children) = &self.children else { return };
        let taker = self.taker(children.analysis.as_ref());
        let told = children.buffer.addr().send(super::buffer::UseTaker(taker));
        ctx.spawn(told.into_actor(self).map(|told, track, ctx| {
            if told.is_err() {
                track.on(TrackEvent::End(EndReason::Failed), ctx);
            }
        }));
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

    /// Buffer, then segment, then rows: each with a deadline, so that nothing holds up a shutdown.
    fn drain(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
        self.params.stats.draining.store(true, Relaxed);
        let Some(children) = &self.children else { return self.on(TrackEvent::Drained, ctx) };
        let buffer = children.buffer.addr().clone();
        let emptied = async move { tokio::time::timeout(DRAIN_DEADLINE, buffer.send(FinishBuffer)).await };
        let drained = emptied
            .into_actor(self)
            .then(move |emptied, track, ctx| {
                if !matches!(emptied, Ok(Ok(()))) {
                    log::error!("a track ended before all of its audio was written connection={}", track.params.connection);
                }
                track.finish_analysis(reason, ctx);
                let writer = track.children.as_ref().map(|children| children.writer.addr().clone());
                async move {
                    match writer {
                        Some(writer) => tokio::time::timeout(DRAIN_DEADLINE, writer.send(FinishSegment { reason })).await.is_ok(),
                        None => true,
                    }
                }
                .into_actor(track)
            })
            .then(|sealed, track, _| {
                if !sealed {
                    log::error!("a segment was not sealed in time connection={}", track.params.connection);
                }
                if let Some((_, end @ None)) = track.mute_spans.last_mut() {
                    *end = Some(track.params.stats.received_bytes.load(Relaxed));
                }
                track.tell_facts();
                track.rows.end();
                let rows = track.rows.clone();
                async move { tokio::time::timeout(ROWS_DEADLINE, rows.flushed()).await.is_ok() }.into_actor(track)
            })
            .map(|flushed, track, ctx| {
                if !flushed {
                    log::warn!("the rows of a track follow later connection={}", track.params.connection);
                }
                track.on(TrackEvent::Drained, ctx);
            });
        ctx.spawn(drained);
    }

    /// Lets the analysis have its last answers, beside everything else. The actor ends with it.
    fn finish_analysis(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
        let analysis = self.children.as_ref().and_then(|children| children.analysis.as_ref()).map(|child| child.addr().clone());
        let deadline = if reason == EndReason::Shutdown { ANALYSIS_SHUTDOWN_DEADLINE } else { ANALYSIS_DEADLINE };
        let (done, finished) = oneshot::channel();
        self.finishing.push(done);
        let (registry, connection) = (self.params.registry.clone(), self.params.connection);
        let last = async move {
            if let Some(analysis) = analysis
                && let Err(error) = analysis.send(FinishAnalysis { deadline }).await
            {
                log::warn!("the analysis of a track died before its end connection={connection} error={error}");
            }
            // Not before the file is sealed.
            finished.await.ok();
            registry.send(TrackEnded { connection }).await
        };
        ctx.spawn(last.into_actor(self).map(|told, _, ctx| {
            if let Err(error) = told {
                log::error!("the registry is gone error={error}");
            }
            ctx.stop();
        }));
    }

    fn release(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
        log::info!(
            "track closed connection={} reason={} bytes={}",
            self.params.connection,
            reason.as_str(),
            self.params.stats.recorded_bytes.load(Relaxed)
        );
        for waiting in self.finishing.drain(..) {
            // A socket that went meanwhile waits no more.
            waiting.send(()).ok();
        }
        if let Some(Err(SendError::Full(_))) = self.socket.take().map(|socket| socket.try_send(CloseSocket { reason })) {
            log::warn!("a socket does not take its order to close connection={}", self.params.connection);
        }
        if self.children.is_none() {
            ctx.stop();
        }
    }

    fn tell_facts(&self) {
        let format = self.params.stats.format();
        let ms = |bytes: u64| format.frame_ms(format.frames(bytes));
        let mute_spans = self.mute_spans.iter().map(|(start, end)| MuteSpan { start_ms: ms(*start), end_ms: end.map(ms) }).collect();
        self.rows.facts(TrackFacts { format_mismatch: self.params.stats.format_mismatch(), mute_spans });
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
                    "declared as mono, but LiveKit's 48 kHz stereo arrives: corrected to 2 channels".to_owned()
                }
            };
            log::warn!("the format of a track is not as declared connection={} mismatch={mismatch:?}", self.params.connection);
            self.params.stats.set_format_mismatch(mismatch);
            self.tell_facts();
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

/// Turns a child's end into a call of its supervisor.
trait Watched {
    fn into_actor_outcome(self, kind: ChildKind, generation: u32) -> std::pin::Pin<Box<dyn ActorFuture<TrackActor, Output = ()>>>;
}

impl Watched for JoinHandle<()> {
    fn into_actor_outcome(self, kind: ChildKind, generation: u32) -> std::pin::Pin<Box<dyn ActorFuture<TrackActor, Output = ()>>> {
        Box::pin(actix::fut::wrap_future::<_, TrackActor>(self).map(move |outcome, track: &mut TrackActor, ctx| {
            track.child_ended(kind, generation, outcome, ctx);
        }))
    }
}

impl Actor for TrackActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
        self.start_children(ctx);
        ctx.run_interval(WATCH_INTERVAL, |track, ctx| {
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

    fn handle(&mut self, AttachSocket(socket): AttachSocket, _: &mut Context<Self>) {
        self.socket = Some(socket);
    }
}

impl Handler<AudioArrived> for TrackActor {
    type Result = ();

    fn handle(&mut self, msg: AudioArrived, ctx: &mut Context<Self>) {
        self.on(TrackEvent::Audio, ctx);
        let bytes = u64::try_from(msg.audio.len()).unwrap_or(u64::MAX);
        if self.phase != Phase::Streaming {
            return;
        }
        self.params.stats.received_bytes.fetch_add(bytes, Relaxed);
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
        let push = PushAudio { audio: msg.audio, arrived: msg.arrived, arrived_at: msg.arrived_at };
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
        let position = self.params.stats.received_bytes.load(Relaxed);
        match (muted, self.mute_spans.last_mut()) {
            (true, None | Some((_, Some(_)))) => self.mute_spans.push((position, None)),
            (false, Some((_, end @ None))) => *end = Some(position),
            // LiveKit's values alternate; a repetition changes nothing.
            (true, Some((_, None))) | (false, None | Some((_, Some(_)))) => return,
        }
        self.params.stats.muted.store(muted, Relaxed);
        self.tell_facts();
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
        self.on(TrackEvent::End(msg.reason), ctx);
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

impl Handler<WriterFailed> for TrackActor {
    type Result = ();

    fn handle(&mut self, msg: WriterFailed, ctx: &mut Context<Self>) {
        self.replace_failed_writer(msg.generation, &msg.error, ctx);
    }
}

impl Handler<SegmentFull> for TrackActor {
    type Result = ();

    fn handle(&mut self, msg: SegmentFull, ctx: &mut Context<Self>) {
        if self.children.as_ref().is_some_and(|children| children.writer.generation() == msg.generation) {
            self.next_segment(EndReason::Rotated, ctx);
        }
    }
}
