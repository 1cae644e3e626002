//! The start queue.

use std::collections::HashSet;

use chrono::{DateTime, TimeDelta, Utc};

use super::rows::egresses::{Adoption, Egress, EgressFilter};
use super::rows::{Page, TrackRow};
use super::{DbError, Engine, POOL_WAIT, Store, postgres, sqlite};
use crate::ids::{EgressId, Identity, RoomName, RoomSid, StartId, TicketId, TrackSid};
use crate::session::lifecycle::Cause;
use crate::session::plan::{Reason, Wish};
use crate::session::reconcile::KnownSession;

impl Store {
    /// The open rows of this server.
    pub async fn own_egresses(&self) -> Result<Vec<Egress>, DbError> {
        let host = self.host();
        run!(self, reader, egresses::open(Some(&host.server)))
    }

    /// The open rows of every server.
    pub async fn open_egresses(&self) -> Result<Vec<Egress>, DbError> {
        run!(self, reader, egresses::open(None))
    }

    /// One row as it is now, open or not.
    pub async fn egress(&self, id: StartId) -> Result<Option<Egress>, DbError> {
        run!(self, reader, egresses::find(&id))
    }

    /// What LiveKit said of whoever has this identity, last.
    pub async fn participant_kind(&self, session: String, identity: Identity) -> Result<Option<String>, DbError> {
        run!(self, reader, tracks::participant_kind(&session, identity.as_str()))
    }

    /// Notes that LiveKit is about to be asked. `false`: it is not this row's turn any more.
    pub async fn egress_asked(&self, id: StartId, ticket: TicketId) -> Result<bool, DbError> {
        let host = self.host();
        run!(self, writer, egresses::asked(&id, &ticket, &host))
    }

    /// `false`: the row has ended meanwhile, or has another egress.
    pub async fn egress_agreed(&self, id: StartId, egress: EgressId, now: DateTime<Utc>) -> Result<bool, DbError> {
        run!(self, writer, egresses::agreed(&id, &egress, now))
    }

    /// `counts`: LiveKit was asked for something else than the egress, which nobody has counted yet.
    pub async fn egress_put_off(&self, id: StartId, error: String, due: DateTime<Utc>, counts: bool) -> Result<(), DbError> {
        let host = self.host();
        run!(self, writer, egresses::put_off(&id, &error, due, counts, &host))
    }

    /// `false`: the socket is of no open egress.
    pub async fn egress_connected(
        &self,
        ticket: TicketId,
        room: RoomName,
        track: TrackSid,
        node: String,
        now: DateTime<Utc>,
    ) -> Result<bool, DbError> {
        let host = self.host();
        run!(self, writer, egresses::connected((&ticket, &room, &track), &node, &host, now))
    }

    /// Whether an egress was one of ours that has been replaced or stopped.
    pub async fn is_former_egress(&self, egress: EgressId) -> Result<bool, DbError> {
        run!(self, reader, egresses::is_former(&egress))
    }

    /// Takes an egress that nobody here asked for as a track's own, where that has none.
    pub async fn adopt_egress(&self, room: RoomName, track: TrackSid, egress: EgressId, now: DateTime<Utc>) -> Result<Adoption, DbError> {
        let host = self.host();
        run!(self, writer, egresses::adopt((&room, &track), &egress, &host, now))
    }

    pub async fn egress_lost(&self, id: StartId, error: Option<String>) -> Result<bool, DbError> {
        run!(self, writer, egresses::lost(&id, error.as_deref()))
    }

    pub async fn end_egress(&self, id: StartId, reason: Reason, now: DateTime<Utc>) -> Result<bool, DbError> {
        run!(self, writer, egresses::end(&id, reason, now))
    }

    /// Ends a row and queues its successor. `false`: somebody else did.
    pub async fn restart_egress(&self, id: StartId, due: DateTime<Utc>, now: DateTime<Utc>) -> Result<bool, DbError> {
        let host = self.host();
        run!(self, writer, egresses::restart(&id, due, &host, now))
    }

    /// When a track's egresses were replaced, oldest first.
    pub async fn restarts_since(&self, track_id: String, since: DateTime<Utc>) -> Result<Vec<DateTime<Utc>>, DbError> {
        run!(self, reader, egresses::restarts_since(&track_id, since))
    }

    /// Says that this server lives, and takes over the rows of those that did not say so for `patience`.
    /// `takes`: whether it has said so for a while.
    pub async fn take_over_egresses(&self, patience: TimeDelta, takes: bool, now: DateTime<Utc>) -> Result<usize, DbError> {
        let host = self.host();
        run!(self, writer, egresses::take_over(&host, patience, takes, now))
    }

    pub async fn egresses(&self, filter: EgressFilter, page: Page) -> Result<Vec<Egress>, DbError> {
        run!(self, reader, egresses::list(&filter, &page))
    }

    /// Every session that has not ended, with who is in it and what they publish.
    pub async fn known_sessions(&self) -> Result<Vec<KnownSession>, DbError> {
        let host = self.host();
        run!(self, reader, changes::known(&host))
    }

    /// Those of some rooms whose sessions have ended here.
    pub async fn ended_rooms(&self, rooms: Vec<RoomSid>) -> Result<HashSet<RoomSid>, DbError> {
        run!(self, reader, sessions::ended(&rooms))
    }

    /// Notes what an operator wants of a track, plans anew, and tells the track's open egress. `None`: there is no such track in an active session.
    pub async fn wish(&self, room: String, track: TrackSid, wish: Wish, now: DateTime<Utc>) -> Result<Option<(TrackRow, Option<Egress>)>, DbError> {
        let host = self.host();
        run!(self, writer, changes::wish(&room, &track, wish, &Cause::Operator, &host, now))
    }
}
