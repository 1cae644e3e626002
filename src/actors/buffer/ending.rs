//! How a buffer ends: everything that it holds goes to the file first, whether its track asks for that or has died.

use std::time::Duration;

use actix::prelude::*;
use tokio::sync::oneshot;

use super::BufferActor;

/// How long the buffer of a track that died may take to empty itself.
const ORPHAN_DEADLINE: Duration = Duration::from_secs(4);

/// Resolves when the last byte is in the file and the last group is handed on.
#[derive(Message)]
#[rtype(result = "()")]
pub struct FinishBuffer;

impl BufferActor {
    /// An actor that has anything under way lives on without an address, and its writer's file with it: it must be told of its track's death.
    pub(super) fn outlive_its_track(&self, ctx: &mut Context<Self>) {
        let mut lifeline = self.params.lifeline.clone();
        let orphaned = async move { while lifeline.changed().await.is_ok() {} };
        let last = orphaned.into_actor(self).then(|(), this, ctx| {
            let drained = this.drain(ctx);
            async move { tokio::time::timeout(ORPHAN_DEADLINE, drained).await.is_ok() }.into_actor(this)
        });
        ctx.spawn(last.map(|drained, _, ctx| {
            if !drained {
                log::error!("the track of a buffer died, and not all of its audio could be written");
            }
            ctx.stop();
        }));
    }

    fn drain(&mut self, ctx: &mut Context<Self>) -> oneshot::Receiver<()> {
        let (done, drained) = oneshot::channel();
        self.drained.push(done);
        self.append_next(ctx);
        drained
    }
}

impl Handler<FinishBuffer> for BufferActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: FinishBuffer, ctx: &mut Context<Self>) -> Self::Result {
        if !self.torn.is_empty() {
            log::warn!("the last frame of a track was torn and is left out bytes={}", self.torn.len());
            self.torn.clear();
        }
        let groups = self.params.grouper.flush();
        self.hand_on(groups);
        let drained = self.drain(ctx);
        Box::pin(async move {
            if drained.await.is_err() {
                log::error!("a track's buffer ended before it was drained");
            }
        })
    }
}
