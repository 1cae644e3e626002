//! How a track ends: everything goes to its place before anybody is told, and nothing holds up a shutdown.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use actix::prelude::*;
use futures_util::future::join_all;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::phase::TrackEvent;
use super::{CloseSocket, TakeTail, TrackActor};
use crate::actors::buffer::FinishBuffer;
use crate::actors::hume_client::FinishAnalysis;
use crate::actors::session_registry::{TrackEnded, TrackEnding};
use crate::actors::wav_writer::FinishSegment;
use crate::audio::mixdown::Mixdown;
use crate::db::rows::EndReason;

/// How long a socket may take to hand over its last 150 ms.
const TAIL_DEADLINE: Duration = Duration::from_millis(250);
/// How long the buffer may take to empty itself, and a segment to be sealed, when the track ends in haste: both within a shutdown's 10 s. Else they have as
/// long as the disk takes: what waits for it is not lost because its sender has gone.
pub(super) const DRAIN_DEADLINE: Duration = Duration::from_secs(4);
/// How long the end waits for the rows; they go on without it.
const ROWS_DEADLINE: Duration = Duration::from_secs(2);
/// How long the service may take to answer what is left.
const ANALYSIS_DEADLINE: Duration = Duration::from_secs(10);
const ANALYSIS_SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

impl TrackActor {
    /// Waits for the last work of a track, in haste for no longer than [`DRAIN_DEADLINE`]; `None` is too late.
    pub(super) fn in_time<W: Future>(&self, work: W) -> impl Future<Output = Option<W::Output>> + use<W> {
        let mut in_haste = self.in_haste.subscribe();
        async move {
            let too_late = async {
                // A track that is gone is in haste too.
                in_haste.wait_for(|in_haste| *in_haste).await.map(drop).ok();
                tokio::time::sleep(DRAIN_DEADLINE).await;
            };
            tokio::select! {
                done = work => Some(done),
                () = too_late => None,
            }
        }
    }

    /// From now on, and if it ends already, the end waits no longer than [`DRAIN_DEADLINE`].
    pub(super) fn make_haste(&self) {
        self.in_haste.send_replace(true);
    }

    /// Ends the track; where that is not the socket's own doing, what it has collected comes along first.
    pub(super) fn end_with_tail(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
        if reason == EndReason::Shutdown {
            self.make_haste();
        }
        let tail = match reason {
            EndReason::Shutdown => self.socket.as_ref().map(|socket| socket.tail.send(TakeTail)),
            EndReason::Closed
            | EndReason::Lost
            | EndReason::Idle
            | EndReason::Superseded
            | EndReason::Rotated
            | EndReason::Gap
            | EndReason::Violation
            | EndReason::TicketSpent
            | EndReason::Failed
            | EndReason::Crashed => None,
        };
        let Some(tail) = tail else { return self.on(TrackEvent::End(reason), ctx) };
        let own = ctx.address();
        let taken = async move {
            // A socket that is frozen by its peer has nothing to give in time. By the mailbox: what came before it may wait there, and a handler that is
            // called from here would overtake even one whose wait has just begun.
            if let Ok(Ok(Some(tail))) = tokio::time::timeout(TAIL_DEADLINE, tail).await
                && let Err(error) = own.send(tail).await
            {
                log::error!("the last audio of a track is lost error={error}");
            }
        };
        ctx.spawn(taken.into_actor(self).map(move |(), track, ctx| track.on(TrackEvent::End(reason), ctx)));
    }

    /// Buffer, then segment, then rows: each with a deadline, so that nothing holds up a shutdown.
    pub(super) fn drain(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
        self.params.stats.draining.store(true, Relaxed);
        let ending = TrackEnding { connection: self.params.connection, reason };
        if let Err(error) = self.params.ending.try_send(ending) {
            log::warn!("the end of a track is not told early connection={} error={error}", self.params.connection);
        }
        if self.video.is_some() {
            return self.drain_video(reason, ctx);
        }
        if let Some(torn) = self.mixdown.as_ref().map(Mixdown::torn_bytes).filter(|torn| *torn > 0) {
            log::warn!("the last frame of a track was torn and is left out bytes={torn}");
        }
        let Some(children) = &self.children else { return self.on(TrackEvent::Drained, ctx) };
        let buffer = children.buffer.addr().clone();
        // Sent when it is first polled, and not here: audio whose handing over has begun may wait to be polled, and comes first.
        let emptied = self.in_time(async move { buffer.send(FinishBuffer).await });
        let drained = emptied
            .into_actor(self)
            .then(move |emptied, track, ctx| {
                if !matches!(emptied, Some(Ok(()))) {
                    log::error!("a track ended before all of its audio was written connection={}", track.params.connection);
                }
                track.finish_analysis(reason, ctx);
                let writer = track.children.as_ref().map(|children| children.writer.addr().clone());
                let finish = FinishSegment { reason };
                let earlier = join_all(std::mem::take(&mut track.sealing));
                let last = track.look_after_seal(async move {
                    if let Some(writer) = writer
                        && let Err(error) = writer.send(finish).await
                    {
                        // It is dead and has sealed nothing: its row ends by what the file says.
                        log::warn!("a segment was not finished by its writer error={error}");
                    }
                });
                let sealed = async move { tokio::join!(earlier, last) };
                track.in_time(sealed).into_actor(track)
            })
            .map(|sealed, track, ctx| track.settle_rows(sealed.is_some(), ctx));
        ctx.spawn(drained);
    }

    /// Has a segment sealed beside the track, which may end before it: a writer that hangs seals its file all the same. That it hangs the watchdog tells, for
    /// nobody else is without an answer then.
    pub(super) fn look_after_seal<F: Future + 'static>(&self, seal: F) -> JoinHandle<F::Output> {
        let work = self.params.resources.watchdog.work("the seal of a segment".to_owned());
        actix_rt::spawn(async move {
            work.begin();
            let sealed = seal.await;
            work.end();
            sealed
        })
    }

    /// The last step of an end: what is known goes into the rows.
    pub(super) fn settle_rows(&mut self, sealed: bool, ctx: &mut Context<Self>) {
        if !sealed {
            log::error!("a segment was not sealed in time connection={}", self.params.connection);
        }
        self.params.stats.mutes.note(false, self.params.stats.position());
        self.tell_facts();
        self.rows.end();
        let rows = self.rows.clone();
        let flushed = async move { tokio::time::timeout(ROWS_DEADLINE, rows.flushed()).await.is_ok() };
        ctx.spawn(flushed.into_actor(self).map(|flushed, track, ctx| {
            if !flushed {
                log::warn!("the rows of a track follow later connection={}", track.params.connection);
            }
            track.on(TrackEvent::Drained, ctx);
        }));
    }

    /// Lets the analysis have its last answers, beside everything else. The actor ends with it.
    pub(super) fn finish_analysis(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
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

    pub(super) fn release(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
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
        if let Some(Err(SendError::Full(_))) = self.socket.take().map(|socket| socket.close.try_send(CloseSocket { reason })) {
            log::warn!("a socket does not take its order to close connection={}", self.params.connection);
        }
        if self.children.is_none() && self.video.is_none() {
            ctx.stop();
        }
    }
}
