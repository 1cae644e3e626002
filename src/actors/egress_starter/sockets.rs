//! What the sockets of egresses tell.

use actix::prelude::*;
use chrono::Utc;

use super::EgressStarter;
use super::judge::Ending;
use crate::actors::session_registry::{DropConnection, SocketNews, SocketState};
use crate::db::rows::EndReason;
use crate::db::rows::egresses::{Egress, EgressState};
use crate::ids::{RoomName, StartId, TicketId, TrackSid};

/// An open socket, and whose it is.
#[derive(Clone)]
pub(super) struct Socket {
    pub room: RoomName,
    pub track: TrackSid,
    pub node: String,
}

impl EgressStarter {
    /// Ends the connection behind a ticket, if there still is one.
    pub(super) fn drop_connection(&self, ticket: Option<TicketId>) {
        if let Some(Err(error)) = ticket.map(|ticket| self.drop.try_send(DropConnection(ticket))) {
            log::warn!("a connection is not dropped now error={error}");
        }
    }

    pub(super) fn connected(&mut self, ticket: TicketId, Socket { room, track, node }: Socket, ctx: &mut Context<Self>) {
        let store = self.tools.store.clone();
        let told = async move { store.egress_connected(ticket, room, track, node, Utc::now()).await };
        ctx.spawn(told.into_actor(self).map(|told, starter, ctx| match told {
            Ok(true) => starter.sync(ctx),
            // Nobody here asked for it, or its row has ended.
            Ok(false) => {}
            Err(error) => log::warn!("the row of an egress does not say that it is connected error={error}"),
        }));
    }

    /// Whether a row's egress has its socket here. One that was opened before the row was made, with the ticket of an earlier try, or while the database was
    /// busy, is its too.
    pub(super) fn is_connected(&mut self, egress: &Egress, ctx: &mut Context<Self>) -> bool {
        let sid = egress.track_sid();
        let by_ticket = egress.ticket().and_then(|ticket| self.sockets.get_key_value(&ticket));
        let by_track = || self.sockets.iter().find(|(_, socket)| socket.room == egress.room && socket.track == sid);
        let Some((ticket, socket)) = by_ticket.or_else(by_track) else { return false };
        if egress.state == EgressState::Starting {
            let (ticket, socket) = (ticket.clone(), socket.clone());
            self.connected(ticket, socket, ctx);
        }
        true
    }

    pub(super) fn job_of_ticket(&self, ticket: &TicketId) -> Option<StartId> {
        self.jobs.iter().find(|(_, job)| job.egress.row.ticket_id.as_deref() == Some(ticket.as_str())).map(|(id, _)| id.clone())
    }
}

impl Handler<SocketNews> for EgressStarter {
    type Result = ();

    fn handle(&mut self, news: SocketNews, ctx: &mut Context<Self>) {
        let SocketNews { ticket, room, track, state } = news;
        match state {
            SocketState::Opened { node } => {
                let socket = Socket { room, track, node };
                self.sockets.insert(ticket.clone(), socket.clone());
                self.connected(ticket, socket, ctx);
            }
            SocketState::Ended(reason) => {
                self.sockets.remove(&ticket);
                if let Some(id) = self.job_of_ticket(&ticket) {
                    let ending =
                        if reason == EndReason::Closed { Ending::InOrder } else { Ending::Failed(format!("its socket ended: {}", reason.as_str())) };
                    self.judge(&id, ending, ctx);
                }
            }
            SocketState::Stalled => {
                if let Some(id) = self.job_of_ticket(&ticket) {
                    let seconds = self.tools.config.restart_after.as_secs_f64();
                    self.judge(&id, Ending::Failed(format!("no audio came for {seconds} s")), ctx);
                }
            }
        }
    }
}
