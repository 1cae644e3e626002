//! The webhook-driven life of sessions, and every live track.
//!
//! In: [`ApplyEvent`] from the webhook door; [`ReserveTrack`] and [`TrackOpened`] from the egress door, [`TrackEnding`] and [`TrackEnded`] from tracks;
//! [`DropConnection`] from the starter of egresses; [`StopTracks`] from `app`. Out: store calls, [`FinishTrack`] to tracks, [`SocketNews`] and
//! [`QueueChanged`](super::egress_starter::QueueChanged) to the starter, [`Reconcile`](super::reconciler::Reconcile) to the reconciler. Full: callers
//! wait; the webhook door answers 503 after 4 s and LiveKit repeats. Dies: the process ends, for nothing would be let in or sealed any more; whoever
//! started it starts it again.

mod autopilot;
mod events;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use actix::prelude::*;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::future::join_all;
use serde::Serialize;
use tokio::sync::oneshot;

pub use self::autopilot::{AttachAutopilot, DropConnection, SocketNews, SocketState};
use super::stats::{TrackSnapshot, TrackStats};
use super::track::rows::TrackIdentity;
use super::track::{FinishTrack, TrackActor};
use crate::db::rows::EndReason;
use crate::db::rows::events::{Applied, Arrival};
use crate::db::{DbError, Store};
use crate::fail_point;
use crate::ids::{Identity, MeetingId, RoomName, TicketId, TrackSid};
use crate::journal::Journal;
use crate::journal::replay::Replayed;

/// 200 events a room at most wait at LiveKit; 500 tracks may open at once.
const MAILBOX_CAPACITY: usize = 1_024;
/// How often spent tickets that have expired are forgotten.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// How often connections are looked at that bring nothing.
const STALL_INTERVAL: Duration = Duration::from_secs(1);
/// How long webhooks are kept, to be looked at and replayed.
const EVENTS_KEPT: TimeDelta = TimeDelta::days(7);
/// How often older ones are forgotten.
const FORGET_INTERVAL: Duration = Duration::from_secs(3_600);

/// How long a stop waits for tracks that are sealed but not at their end.
const STRAGGLERS_DEADLINE: Duration = Duration::from_secs(2);

/// Tells connections apart, in logs and between actors. Counts from 1 at each start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ConnectionId(u64);

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Keeps a verified event and all it changes. The reply means that it is committed, or in the journal.
#[derive(Message)]
#[rtype(result = "Result<Kept, DbError>")]
pub struct ApplyEvent(pub Arrival);

/// Where an event is kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Kept {
    InDatabase(Applied),
    /// The database did not take it in time.
    InJournal,
}

/// Events of the journal have been applied.
#[derive(Message)]
#[rtype(result = "()")]
pub struct EventsReplayed(pub Replayed);

/// Something else than an event has changed what is known of sessions and tracks: an operator, a replay, a comparison with LiveKit.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SessionsChanged;

/// The meeting of a room, as far as this process remembers: for when the database does not answer in time.
#[derive(Message)]
#[rtype(result = "Option<MeetingId>")]
pub struct GetRememberedMeeting(pub RoomName);

/// Lets a connection in, if nothing speaks against it. Its ticket is spent by it.
#[derive(Message)]
#[rtype(result = "Result<ConnectionId, Refusal>")]
pub struct ReserveTrack {
    pub identity: TrackIdentity,
    /// With the time after which it is worth nothing anyway.
    pub ticket: Option<(TicketId, DateTime<Utc>)>,
    pub stats: Arc<TrackStats>,
    /// The address that the sender dialled from.
    pub peer: String,
}

/// Why a connection is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    TicketSpent,
    /// The track has a connection that is not stalled.
    TrackIsLive,
    ShuttingDown,
}

/// The reserved connection has its actor.
#[derive(Message)]
#[rtype(result = "()")]
pub struct TrackOpened {
    pub connection: ConnectionId,
    pub track: Addr<TrackActor>,
}

/// A connection's actor has ended, or never started.
#[derive(Message)]
#[rtype(result = "()")]
pub struct TrackEnded {
    pub connection: ConnectionId,
}

/// Every open track.
#[derive(Message)]
#[rtype(result = "Vec<LiveTrack>")]
pub struct GetLiveTracks;

/// Lets nobody in any more and seals every track. Resolves when all of them are sealed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopTracks;

/// A connection has begun to end. A hint: [`TrackEnded`] follows when all is done.
#[derive(Message)]
#[rtype(result = "()")]
pub struct TrackEnding {
    pub connection: ConnectionId,
    pub reason: EndReason,
}

/// Answered by a registry that does its work.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Ping;

/// An open track.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LiveTrack {
    pub connection: ConnectionId,
    pub meeting_id: MeetingId,
    pub room_name: RoomName,
    pub participant: Option<Identity>,
    pub track_sid: Option<TrackSid>,
    pub connected_at: DateTime<Utc>,
    #[serde(flatten)]
    pub stats: TrackSnapshot,
}

pub struct SessionRegistry {
    store: Store,
    journal: Journal,
    stall_after: Duration,
    active: HashMap<RoomName, MeetingId>,
    live: HashMap<ConnectionId, Live>,
    by_track: HashMap<TrackKey, ConnectionId>,
    spent: HashMap<TicketId, DateTime<Utc>>,
    last_connection: u64,
    stopping: bool,
    idle: Vec<oneshot::Sender<()>>,
    autopilot: Option<AttachAutopilot>,
}

/// What can be live once only. Connections that name no track have none.
type TrackKey = (RoomName, TrackSid);

struct Live {
    identity: TrackIdentity,
    stats: Arc<TrackStats>,
    connected_at: DateTime<Utc>,
    /// `None` while the handshake is under way.
    track: Option<Addr<TrackActor>>,
    ticket: Option<TicketId>,
    peer: String,
    /// The last that was told of its socket.
    told: Option<SocketState>,
}

impl Live {
    /// A handshake whose client went before its track was made: nobody else knows of it.
    fn is_abandoned(&self) -> bool {
        self.track.is_none() && Arc::strong_count(&self.stats) == 1
    }
}

impl SessionRegistry {
    pub fn new(store: Store, journal: Journal, stall_after: Duration) -> Self {
        Self {
            store,
            journal,
            stall_after,
            active: HashMap::new(),
            live: HashMap::new(),
            by_track: HashMap::new(),
            spent: HashMap::new(),
            last_connection: 0,
            stopping: false,
            idle: Vec::new(),
            autopilot: None,
        }
    }

    fn forget_abandoned(&mut self) {
        self.live.retain(|_, live| !live.is_abandoned());
        self.by_track.retain(|_, connection| self.live.contains_key(connection));
    }

    fn forget_events(&self, ctx: &mut Context<Self>) {
        let store = self.store.clone();
        let forgotten = async move { store.forget_events((Utc::now() - EVENTS_KEPT).naive_utc()).await };
        ctx.spawn(forgotten.into_actor(self).map(|forgotten, _, _| match forgotten {
            Ok(0) => {}
            Ok(events) => log::info!("old webhooks are forgotten events={events}"),
            Err(error) => log::warn!("old webhooks could not be forgotten error={error}"),
        }));
    }

    /// Asks a track to finish, and holds the question until it has.
    fn finish(&self, connection: ConnectionId, reason: EndReason, ctx: &mut Context<Self>) {
        let Some(track) = self.live.get(&connection).and_then(|live| live.track.clone()) else { return };
        ctx.spawn(async move { track.send(FinishTrack { reason }).await }.into_actor(self).map(move |finished, _, _| {
            if let Err(error) = finished {
                log::error!("a track died while it was finished connection={connection} error={error}");
            }
        }));
    }
}

impl Actor for SessionRegistry {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
        ctx.run_interval(SWEEP_INTERVAL, |registry, _| {
            registry.spent.retain(|_, expires| *expires > Utc::now());
            registry.forget_abandoned();
        });
        ctx.run_interval(STALL_INTERVAL, |registry, _| registry.tell_stalled());
        self.forget_events(ctx);
        ctx.run_interval(FORGET_INTERVAL, |registry, ctx| registry.forget_events(ctx));
    }
}

impl Handler<SessionsChanged> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, _: SessionsChanged, _: &mut Context<Self>) {
        self.queue_changed();
    }
}

impl Handler<DropConnection> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, DropConnection(ticket): DropConnection, ctx: &mut Context<Self>) {
        let open = self.live.iter().find(|(_, live)| live.ticket.as_ref() == Some(&ticket) && !live.stats.draining.load(Relaxed));
        if let Some(connection) = open.map(|(connection, _)| *connection) {
            self.finish(connection, EndReason::Superseded, ctx);
        }
    }
}

impl Handler<TrackEnding> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, msg: TrackEnding, _: &mut Context<Self>) {
        self.tell(msg.connection, SocketState::Ended(msg.reason));
    }
}

impl Handler<GetRememberedMeeting> for SessionRegistry {
    type Result = Option<MeetingId>;

    fn handle(&mut self, GetRememberedMeeting(room): GetRememberedMeeting, _: &mut Context<Self>) -> Self::Result {
        self.active.get(&room).cloned()
    }
}

impl Handler<ReserveTrack> for SessionRegistry {
    type Result = Result<ConnectionId, Refusal>;

    fn handle(&mut self, msg: ReserveTrack, ctx: &mut Context<Self>) -> Self::Result {
        fail_point::pass("registry-reserve");
        if self.stopping {
            return Err(Refusal::ShuttingDown);
        }
        if msg.ticket.as_ref().is_some_and(|(ticket, _)| self.spent.contains_key(ticket)) {
            return Err(Refusal::TicketSpent);
        }
        let key = msg.identity.track.clone().map(|track| (msg.identity.room.clone(), track));
        if let Some(other) = key.as_ref().and_then(|key| self.by_track.get(key)).copied()
            && let Some(live) = self.live.get(&other)
            && !live.stats.draining.load(Relaxed)
            && !live.is_abandoned()
        {
            if live.stats.idle() <= self.stall_after {
                return Err(Refusal::TrackIsLive);
            }
            log::warn!("a stalled connection gives way to a new one of its track connection={other}");
            self.finish(other, EndReason::Superseded, ctx);
        }
        self.last_connection += 1;
        let connection = ConnectionId(self.last_connection);
        if let Some(key) = key {
            self.by_track.insert(key, connection);
        }
        let ticket = msg.ticket.as_ref().map(|(ticket, _)| ticket.clone());
        self.spent.extend(msg.ticket);
        let live = Live { identity: msg.identity, stats: msg.stats, connected_at: Utc::now(), track: None, ticket, peer: msg.peer, told: None };
        self.live.insert(connection, live);
        Ok(connection)
    }
}

impl Handler<TrackOpened> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, msg: TrackOpened, ctx: &mut Context<Self>) {
        if let Some(live) = self.live.get_mut(&msg.connection) {
            live.track = Some(msg.track);
            let node = live.peer.clone();
            self.tell(msg.connection, SocketState::Opened { node });
        }
        if self.stopping {
            self.finish(msg.connection, EndReason::Shutdown, ctx);
        }
    }
}

impl Handler<TrackEnded> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, msg: TrackEnded, _: &mut Context<Self>) {
        // Has been told, but of a track that died.
        self.tell(msg.connection, SocketState::Ended(EndReason::Failed));
        self.live.remove(&msg.connection);
        self.by_track.retain(|_, connection| *connection != msg.connection);
        if self.live.is_empty() {
            for waiting in self.idle.drain(..) {
                // The one who waited may have given up.
                waiting.send(()).ok();
            }
        }
    }
}

impl Handler<Ping> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, _: Ping, _: &mut Context<Self>) {}
}

impl Handler<GetLiveTracks> for SessionRegistry {
    type Result = Vec<LiveTrack>;

    fn handle(&mut self, _: GetLiveTracks, _: &mut Context<Self>) -> Self::Result {
        let mut tracks: Vec<LiveTrack> = self
            .live
            .iter()
            .filter(|(_, live)| live.track.is_some() && !live.stats.draining.load(Relaxed))
            .map(|(connection, live)| LiveTrack {
                connection: *connection,
                meeting_id: live.identity.meeting.clone(),
                room_name: live.identity.room.clone(),
                participant: live.identity.participant.clone(),
                track_sid: live.identity.track.clone(),
                connected_at: live.connected_at,
                stats: live.stats.snapshot(self.stall_after),
            })
            .collect();
        tracks.sort_by_key(|track| track.connection);
        tracks
    }
}

impl Handler<StopTracks> for SessionRegistry {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: StopTracks, _: &mut Context<Self>) -> Self::Result {
        self.stopping = true;
        self.forget_abandoned();
        let tracks: Vec<Addr<TrackActor>> = self.live.values().filter_map(|live| live.track.clone()).collect();
        let sealed = join_all(tracks.into_iter().map(|track| async move { track.send(FinishTrack { reason: EndReason::Shutdown }).await }));
        let (done, idle) = oneshot::channel();
        if self.live.is_empty() {
            done.send(()).ok();
        } else {
            self.idle.push(done);
        }
        Box::pin(async move {
            for error in sealed.await.into_iter().filter_map(Result::err) {
                log::error!("a track died while it was finished error={error}");
            }
            // What is left is analysis that waits for its last answers, and handshakes that were under way.
            tokio::time::timeout(STRAGGLERS_DEADLINE, idle).await.ok();
        })
    }
}
