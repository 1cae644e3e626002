//! The append that is under way, and what becomes of it when its answer does not come.
//!
//! A disk that hangs is no reason to begin another segment, which would hang too: the spool takes what comes, and the append is answered when the disk is back.
//! A writer that hangs while the disk answers is given up, and the next segment goes on with what it has not acknowledged.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;

use super::spool::Batch;
use super::{BufferActor, Edge};
use crate::actors::track::WriterFailed;
use crate::actors::wav_writer::AppendAudio;
use crate::fail_point;
use crate::recording::fence::Fence;

/// An append without an answer for so long is looked at. With the time below, a writer that hangs is found within 30 s.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the writer has after the disk has answered: it may have been the disk's fault until just then.
const SECOND_LOOK: Duration = Duration::from_secs(5);

pub(super) struct InFlight {
    number: u64,
    generation: u32,
    batch: Batch,
    fence: Arc<Fence>,
    since: Instant,
    /// The disk has answered meanwhile.
    disk_answered: bool,
}

impl BufferActor {
    pub(super) fn append(&mut self, batch: Batch, ctx: &mut Context<Self>) {
        self.edge = Edge::Busy;
        self.appends += 1;
        let (number, generation, fence) = (self.appends, self.params.writer.generation, Arc::<Fence>::default());
        let append =
            AppendAudio { pieces: Arc::clone(&batch.pieces), arrived: batch.arrived, arrived_at: batch.arrived_at, fence: Arc::clone(&fence) };
        self.in_flight = Some(InFlight { number, generation, batch, fence, since: Instant::now(), disk_answered: false });
        let sent = self.params.writer.writer.send(append).into_actor(self);
        ctx.spawn(sent.map(move |reply, this, ctx| {
            // The answer to one that was given up comes late or never, and changes nothing.
            if let Some(answered) = this.in_flight.take_if(|in_flight| in_flight.number == number) {
                this.on_appended(reply, answered.batch, generation, ctx);
            }
        }));
        if !std::mem::replace(&mut self.patience_ends, true) {
            self.look_in(fail_point::deadline("append-patience", PATIENCE), ctx);
        }
    }

    fn look_in(&self, wait: Duration, ctx: &mut Context<Self>) {
        ctx.run_later(wait, Self::look_at_append);
    }

    fn look_at_append(&mut self, ctx: &mut Context<Self>) {
        let patience = fail_point::deadline("append-patience", PATIENCE);
        let Some(in_flight) = &self.in_flight else {
            self.patience_ends = false;
            return;
        };
        let left = patience.saturating_sub(in_flight.since.elapsed());
        if !left.is_zero() {
            return self.look_in(left, ctx);
        }
        if in_flight.disk_answered {
            return self.give_up(ctx);
        }
        log::error!("an append has no answer, asking the disk waited_s={}", in_flight.since.elapsed().as_secs());
        let (pulse, number) = (self.params.pulse.clone(), in_flight.number);
        let asked = async move { pulse.answers().await };
        ctx.spawn(asked.into_actor(self).map(move |answered, this, ctx| {
            if let Some(in_flight) = this.in_flight.as_mut().filter(|in_flight| in_flight.number == number) {
                in_flight.disk_answered = answered;
            }
            this.look_in(fail_point::deadline("append-second-look", SECOND_LOOK), ctx);
        }));
    }

    /// The disk works and the writer does not.
    fn give_up(&mut self, ctx: &mut Context<Self>) {
        self.patience_ends = false;
        // One that counts has its answer on the way.
        let Some(InFlight { batch, since, generation, .. }) = self.in_flight.take_if(|in_flight| in_flight.fence.give_up()) else { return };
        if generation != self.params.writer.generation {
            return self.append(batch, ctx);
        }
        let error = format!("no answer for {} s while the disk works", since.elapsed().as_secs());
        self.edge = Edge::Waiting { again: Some(batch) };
        self.tell(&self.params.writer_failed.clone(), WriterFailed { generation, error }, ctx);
    }
}
