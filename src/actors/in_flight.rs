//! The append that is under way to a writer, and what becomes of it when its answer does not come.
//!
//! A disk that hangs is no reason to begin another segment, which would hang too: what comes waits, and the append is answered when the disk is back.
//! A writer that hangs while the disk answers is given up, and the next segment goes on with what it has not acknowledged.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;

use crate::fail_point;
use crate::recording::fence::Fence;
use crate::recording::pulse::DiskPulse;

/// An append without an answer for so long is looked at. With the time below, a writer that hangs is found within 30 s.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the writer has after the disk has answered: it may have been the disk's fault until just then.
const SECOND_LOOK: Duration = Duration::from_secs(5);

/// Sends appends to a writer, one at a time.
pub trait Appends: Actor<Context = Context<Self>> {
    /// What one append takes.
    type Batch: 'static;

    /// `None` where there is no writer.
    fn in_flight(&mut self) -> Option<&mut InFlight<Self::Batch>>;

    /// Of the disk that the writer writes to.
    fn pulse(&self) -> DiskPulse;

    /// The disk works and the writer does not: the batch has to go to another.
    fn on_given_up(&mut self, batch: Self::Batch, generation: u32, error: String, ctx: &mut Context<Self>);
}

/// At most one append.
pub struct InFlight<B> {
    append: Option<Append<B>>,
    /// Those that were begun, ever.
    begun: u64,
    /// Somebody will look whether it has its answer.
    is_watched: bool,
}

struct Append<B> {
    number: AppendNumber,
    generation: u32,
    batch: B,
    fence: Arc<Fence>,
    since: Instant,
    /// The disk has answered meanwhile.
    disk_answered: bool,
}

/// Which append an answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppendNumber(u64);

impl<B> Default for InFlight<B> {
    fn default() -> Self {
        Self { append: None, begun: 0, is_watched: false }
    }
}

impl<B> InFlight<B> {
    /// Keeps the batch until its answer comes.
    pub fn begin(&mut self, batch: B, generation: u32) -> (AppendNumber, Arc<Fence>) {
        self.begun += 1;
        let (number, fence) = (AppendNumber(self.begun), Arc::<Fence>::default());
        self.append = Some(Append { number, generation, batch, fence: Arc::clone(&fence), since: Instant::now(), disk_answered: false });
        (number, fence)
    }

    /// The batch that is answered. The answer to one that was given up comes late or never, and changes nothing.
    pub fn answered(&mut self, number: AppendNumber) -> Option<B> {
        self.append.take_if(|append| append.number == number).map(|append| append.batch)
    }
}

/// Sees to it that the append which has just begun is looked after, by one timer however many there are.
pub fn look_after<A: Appends>(actor: &mut A, ctx: &mut Context<A>) {
    if actor.in_flight().is_some_and(|in_flight| !std::mem::replace(&mut in_flight.is_watched, true)) {
        look_in(fail_point::deadline("append-patience", PATIENCE), ctx);
    }
}

fn look_in<A: Appends>(wait: Duration, ctx: &mut Context<A>) {
    ctx.run_later(wait, look);
}

fn look<A: Appends>(actor: &mut A, ctx: &mut Context<A>) {
    let patience = fail_point::deadline("append-patience", PATIENCE);
    let Some(in_flight) = actor.in_flight() else { return };
    let Some(append) = &in_flight.append else {
        in_flight.is_watched = false;
        return;
    };
    let left = patience.saturating_sub(append.since.elapsed());
    if !left.is_zero() {
        return look_in(left, ctx);
    }
    if append.disk_answered {
        return give_up(actor, ctx);
    }
    log::error!("an append has no answer, asking the disk waited_s={}", append.since.elapsed().as_secs());
    let number = append.number;
    let pulse = actor.pulse();
    let asked = async move { pulse.answers().await };
    ctx.spawn(asked.into_actor(actor).map(move |answered, actor, ctx| {
        let append = actor.in_flight().and_then(|in_flight| in_flight.append.as_mut());
        if let Some(append) = append.filter(|append| append.number == number) {
            append.disk_answered = answered;
        }
        look_in(fail_point::deadline("append-second-look", SECOND_LOOK), ctx);
    }));
}

fn give_up<A: Appends>(actor: &mut A, ctx: &mut Context<A>) {
    let Some(in_flight) = actor.in_flight() else { return };
    in_flight.is_watched = false;
    // One that counts has its answer on the way.
    let Some(Append { batch, since, generation, .. }) = in_flight.append.take_if(|append| append.fence.give_up()) else { return };
    let error = format!("no answer for {} s while the disk works", since.elapsed().as_secs());
    actor.on_given_up(batch, generation, error, ctx);
}
