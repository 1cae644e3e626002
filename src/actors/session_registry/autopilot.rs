//! What the registry tells those who start egresses and compare with LiveKit. All of it is hints: what gets lost is found by looking.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use actix::prelude::*;

use super::{ConnectionId, Live, SessionRegistry};
use crate::actors::egress_starter::QueueChanged;
use crate::actors::reconciler::Reconcile;
use crate::db::rows::EndReason;
use crate::ids::{RoomName, TicketId, TrackSid};

/// Where news of sockets and of the start queue go, and who compares with LiveKit.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AttachAutopilot {
    pub queue: Option<Recipient<QueueChanged>>,
    pub sockets: Option<Recipient<SocketNews>>,
    pub reconcile: Recipient<Reconcile>,
    /// After so long without audio a connection has stalled.
    pub stalled_after: Duration,
}

/// What became of the socket of a ticket.
#[derive(Message, Debug, Clone)]
#[rtype(result = "()")]
pub struct SocketNews {
    pub ticket: TicketId,
    pub room: RoomName,
    pub track: TrackSid,
    pub state: SocketState,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketState {
    /// From this address.
    Opened {
        node: String,
    },
    Ended(EndReason),
    /// No audio came for long; it is still open. Said again while it is so: it may have been said while nothing could be done about it.
    Stalled,
}

/// Another egress takes the place of the one behind this ticket: its connection, if there still is one, ends.
#[derive(Message)]
#[rtype(result = "()")]
pub struct DropConnection(pub TicketId);

impl SessionRegistry {
    /// Tells what became of a connection's socket, and nothing behind its end. Connections without a ticket or a track are nobody's.
    pub(super) fn tell(&mut self, connection: ConnectionId, state: SocketState) {
        let Some(sockets) = self.autopilot.as_ref().and_then(|autopilot| autopilot.sockets.as_ref()) else { return };
        let Some(live) = self.live.get_mut(&connection).filter(|_| !self.stopping) else { return };
        let (Some(ticket), Some(track)) = (live.ticket.clone(), live.identity.track.clone()) else { return };
        let is_old = live.told.as_ref() == Some(&state) && state != SocketState::Stalled;
        if is_old || matches!(live.told, Some(SocketState::Ended(_))) {
            return;
        }
        match sockets.try_send(SocketNews { ticket, room: live.identity.room.clone(), track, state: state.clone() }) {
            Ok(()) => live.told = Some(state),
            Err(error) => log::warn!("the end or start of a socket is not told connection={connection} error={error}"),
        }
    }

    pub(super) fn tell_stalled(&mut self) {
        let Some(stalled_after) = self.autopilot.as_ref().map(|autopilot| autopilot.stalled_after) else { return };
        let is_stalled = |live: &Live| live.track.is_some() && !live.stats.draining.load(Relaxed) && live.stats.without_audio() > stalled_after;
        let stalled = self.live.iter().filter(|(_, live)| is_stalled(live));
        for connection in stalled.map(|(connection, _)| *connection).collect::<Vec<_>>() {
            self.tell(connection, SocketState::Stalled);
        }
    }

    pub(super) fn queue_changed(&self) {
        let queue = self.autopilot.as_ref().and_then(|autopilot| autopilot.queue.as_ref());
        // A full mailbox holds the same word already.
        if let Some(Err(SendError::Closed(_))) = queue.map(|queue| queue.try_send(QueueChanged)) {
            log::error!("nobody starts egresses any more");
        }
    }

    pub(super) fn reconcile(&self) {
        let reconcile = self.autopilot.as_ref().map(|autopilot| autopilot.reconcile.try_send(Reconcile));
        if let Some(Err(SendError::Closed(_))) = reconcile {
            log::error!("nobody compares with LiveKit any more");
        }
    }
}

impl Handler<AttachAutopilot> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, msg: AttachAutopilot, _: &mut Context<Self>) {
        self.autopilot = Some(msg);
    }
}
