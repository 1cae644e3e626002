//! A track's children: how they are made, and what happens when one dies.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use actix::prelude::*;
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle};

use super::phase::TrackEvent;
use super::rows::TrackIdentity;
use super::segment_end::{SegmentRow, Taken};
use super::{SegmentFull, Service, TrackActor, WriterFailed};
use crate::actors::buffer::{BufferActor, BufferParams, MAX_SEGMENT_BYTES, Taker, UseTaker, UseWriter};
use crate::actors::child::{Child, RestartPolicy, Verdict, jitter};
use crate::actors::hume_client::{HumeClientActor, HumeClientParams};
use crate::actors::wav_writer::{FinishSegment, WavWriterActor, WavWriterParams};
use crate::audio::window::{GroupLimits, Grouper};
use crate::db::rows::EndReason;
use crate::ids::{Identity, SegmentId, TrackSid};
use crate::recording::path::SegmentName;

/// 5 in 60 s, then the track fails; the next segment opens at once.
pub(super) const WRITER_RESTARTS: RestartPolicy =
    RestartPolicy { intensity: 5, window: Duration::from_secs(60), first_backoff: Duration::ZERO, max_backoff: Duration::ZERO };
const ANALYSIS_RESTARTS: RestartPolicy =
    RestartPolicy { intensity: 5, window: Duration::from_secs(60), first_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(30) };

/// Listed in the order of the audio's way.
pub(super) struct Children {
    pub(super) buffer: Child<BufferActor>,
    pub(super) writer: Child<WavWriterActor>,
    pub(super) analysis: Option<Child<HumeClientActor>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChildKind {
    Buffer,
    Writer,
    Analysis,
    VideoWriter,
}

impl TrackActor {
    /// What its files are named after.
    pub(super) fn segment_name(&self) -> SegmentName {
        let TrackIdentity { meeting, room, participant, track, .. } = self.params.identity.clone();
        SegmentName {
            meeting: meeting.into_string(),
            room: room.into_string(),
            participant: participant.map(Identity::into_string),
            track: track.map(TrackSid::into_string),
        }
    }

    pub(super) fn start_children(&mut self, ctx: &mut Context<Self>) {
        let resources = Arc::clone(&self.params.resources);
        let TrackIdentity { meeting, participant, track, session_started_at, .. } = &self.params.identity;
        let log = resources.pipeline_log.of_track(meeting.as_str(), participant.as_ref().map(Identity::as_str), track.as_ref().map(TrackSid::as_str));
        let name = self.segment_name();
        let (rows, stats, shared) = (self.rows.clone(), Arc::clone(&self.params.stats), Arc::clone(&resources));
        let (taken, session_started_at) = (Arc::clone(&self.taken), *session_started_at);
        let (clock, stays_suspect) = (self.params.clock, Arc::clone(&self.stays_suspect));
        let (writer, writer_runs) = Child::start(WRITER_RESTARTS, move || {
            WavWriterActor::new(WavWriterParams {
                id: SegmentId::fresh(),
                root: shared.root.clone(),
                name: name.clone(),
                format: stats.recorded_format(),
                session_started_at,
                rows: SegmentRow::new(rows.clone()),
                stats: Arc::clone(&stats),
                taken: Taken::new(Arc::clone(&taken)),
                lag: Arc::clone(&shared.lag),
                clock,
                syncer: shared.syncer.clone(),
                append_pool: shared.append_pool.clone(),
                stays_suspect: Arc::clone(&stays_suspect),
            })
        });
        let analysis = match &resources.service {
            Service::Streaming(service) if self.params.analyse => {
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
            Service::Streaming(_) | Service::Nobody(_) => None,
        };
        let taker = self.taker(analysis.as_ref().map(|(child, _)| child));
        let limits = GroupLimits { seconds: self.params.group_seconds, bytes: resources.analysis.group_bytes };
        let format = self.params.stats.recorded_format();
        let mut buffer_params = Some(BufferParams {
            format,
            grouper: Grouper::new(format, limits, matches!(taker, Taker::Service(_)), self.in_doubt),
            normalize: resources.analysis.normalize,
            taker,
            log,
            mute: resources.recording.mute,
            spool_bytes: format.bytes_in(resources.recording.spool_per_track),
            clock,
            longest_fill: resources.recording.longest_fill,
            budget: Arc::clone(&resources.budget),
            pulse: resources.pulse.clone(),
            stats: Arc::clone(&self.params.stats),
            writer: self.use_writer(&writer),
            writer_failed: ctx.address().recipient(),
            segment_full: ctx.address().recipient(),
            lifeline: self.lifeline.subscribe(),
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
            (None, _) if !self.params.analyse => Taker::Nobody("the connection asked for none"),
            (None, Service::Nobody(reason)) => Taker::Nobody(reason),
            (None, Service::Streaming(_)) => Taker::Nobody("the analysis failed too often"),
        }
    }

    fn use_writer(&self, writer: &Child<WavWriterActor>) -> UseWriter {
        let format = self.params.stats.recorded_format();
        let limit_bytes = format.bytes_in(self.params.resources.recording.segment_duration).min(MAX_SEGMENT_BYTES);
        UseWriter { writer: writer.addr().clone().recipient(), generation: writer.generation(), limit_bytes }
    }

    /// Waits for a child's end, which only the supervisor may judge.
    pub(super) fn watch(kind: ChildKind, generation: u32, running: JoinHandle<()>, ctx: &mut Context<Self>) {
        ctx.spawn(running.into_actor_outcome(kind, generation));
    }

    fn child_ended(&mut self, kind: ChildKind, generation: u32, outcome: Result<(), JoinError>, ctx: &mut Context<Self>) {
        let Err(error) = outcome else { return };
        log::error!("a child of a track panicked connection={} child={kind:?} generation={generation} error={error}", self.params.connection);
        match kind {
            ChildKind::Buffer => self.on(TrackEvent::End(EndReason::Failed), ctx),
            ChildKind::Writer => self.replace_failed_writer(generation, "it panicked", false, ctx),
            ChildKind::Analysis => self.restart_analysis(generation, ctx),
            ChildKind::VideoWriter => self.video_writer_panicked(generation, ctx),
        }
    }

    fn replace_failed_writer(&mut self, generation: u32, error: &str, is_suspect: bool, ctx: &mut Context<Self>) {
        let Some(children) = &mut self.children else { return };
        if children.writer.generation() != generation {
            return;
        }
        match children.writer.budget.on_failure(Instant::now(), jitter()) {
            Verdict::RestartIn(_) => {
                log::error!("a segment failed, the next one goes on connection={} error={error}", self.params.connection);
                self.params.stats.note_writer_restart();
                self.next_segment(EndReason::Failed, ctx);
            }
            Verdict::GiveUp if is_suspect => {
                self.stay_suspect(error);
                self.next_segment(EndReason::Failed, ctx);
            }
            Verdict::GiveUp => {
                log::error!("a track's segments fail again and again, it is given up connection={} error={error}", self.params.connection);
                self.params.stats.totals().given_up.inc();
                self.make_haste();
                self.on(TrackEvent::End(EndReason::Failed), ctx);
            }
        }
    }

    /// Syncs fail again and again. What is written may be there all the same, and what is not written is not: the next file is written to its end.
    pub(super) fn stay_suspect(&self, error: &str) {
        log::error!(
            "the disk fails again and again, the next segment stays open though it is suspect connection={} error={error}",
            self.params.connection
        );
        self.params.stats.note_writer_restart();
        self.stays_suspect.store(true, Relaxed);
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
        // Sealing a long file may take seconds: the buffer goes on meanwhile.
        let (done, sealed) = oneshot::channel();
        self.sealing.push(sealed);
        ctx.spawn(async move { buffer.send(next).await }.into_actor(self).map(|told, track, ctx| {
            if told.is_err() {
                track.on(TrackEvent::End(EndReason::Failed), ctx);
            }
        }));
        let finish = FinishSegment { reason };
        let finished = self.look_after_seal(async move { old.send(finish).await });
        ctx.spawn(finished.into_actor(self).map(move |finished, track, _| {
            if let Ok(Err(error)) = finished {
                // A dead writer cannot finish: its row ends by what the file says.
                log::warn!("a segment was not finished by its writer connection={} error={error}", track.params.connection);
            }
            done.send(()).ok();
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
        let told = children.buffer.addr().send(UseTaker(taker));
        ctx.spawn(told.into_actor(self).map(|told, track, ctx| {
            if told.is_err() {
                track.on(TrackEvent::End(EndReason::Failed), ctx);
            }
        }));
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

impl Handler<WriterFailed> for TrackActor {
    type Result = ();

    fn handle(&mut self, msg: WriterFailed, ctx: &mut Context<Self>) {
        self.replace_failed_writer(msg.generation, &msg.error, msg.is_suspect, ctx);
    }
}

impl Handler<SegmentFull> for TrackActor {
    type Result = ();

    fn handle(&mut self, msg: SegmentFull, ctx: &mut Context<Self>) {
        if self.children.as_ref().is_some_and(|children| children.writer.generation() == msg.generation) {
            self.next_segment(msg.reason, ctx);
        }
    }
}
