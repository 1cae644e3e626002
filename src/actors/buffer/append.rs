//! What goes to the writer, one append at a time.

use std::sync::Arc;

use actix::prelude::*;

use super::spool::Batch;
use super::{BufferActor, Edge};
use crate::actors::in_flight::{Appends, InFlight, look_after};
use crate::actors::track::WriterFailed;
use crate::actors::wav_writer::AppendAudio;
use crate::recording::pulse::DiskPulse;

impl BufferActor {
    pub(super) fn append(&mut self, batch: Batch, ctx: &mut Context<Self>) {
        self.edge = Edge::Busy;
        let generation = self.params.writer.generation;
        let (pieces, arrived, arrived_at) = (Arc::clone(&batch.pieces), batch.arrived, batch.arrived_at);
        let (number, fence) = self.in_flight.begin(batch, generation);
        let sent = self.params.writer.writer.send(AppendAudio { pieces, arrived, arrived_at, fence }).into_actor(self);
        ctx.spawn(sent.map(move |reply, this, ctx| {
            if let Some(batch) = this.in_flight.answered(number) {
                this.on_appended(reply, batch, generation, ctx);
            }
        }));
        look_after(self, ctx);
    }
}

impl Appends for BufferActor {
    type Batch = Batch;

    fn in_flight(&mut self) -> Option<&mut InFlight<Batch>> {
        Some(&mut self.in_flight)
    }

    fn pulse(&self) -> DiskPulse {
        self.params.pulse.clone()
    }

    fn on_given_up(&mut self, batch: Batch, generation: u32, error: String, ctx: &mut Context<Self>) {
        if generation != self.params.writer.generation {
            return self.append(batch, ctx);
        }
        self.edge = Edge::Waiting { again: Some(batch) };
        self.tell(&self.params.writer_failed.clone(), WriterFailed { generation, error, is_suspect: false }, ctx);
    }
}
