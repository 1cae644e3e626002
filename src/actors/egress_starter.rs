//! Keeps one track egress for every track that is to be recorded: starts it, adopts it, replaces it, and gives up when the track has ended.
//!
//! Owns the open rows of this server in `egresses`, which are its queue: it survives the process, and what memory holds is read from it.
//! In: [`QueueChanged`] and [`SocketNews`](super::session_registry::SocketNews) from the registry, [`FirstLookTaken`] and [`EgressesListed`] from the
//! reconciler, [`StopEgress`] from operators, [`StopStarting`] from `app`. Out: calls to LiveKit, rows, [`DropConnection`] to the registry.
//! Full: hints are dropped and said; rows are read again with each heartbeat. Dies: the process ends, as with the registry.

mod attempt;
mod job;
mod judge;
pub mod pacer;
mod sockets;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use chrono::{TimeDelta, Utc};

use self::attempt::Attempted;
use self::job::{CONNECT_DEADLINE, CONNECT_PATIENCE, Job, JobPhase, Next, Times, next_phase};
use self::judge::Ending;
use self::pacer::{Pacer, Round};
use self::sockets::Socket;
use super::child::jitter;
use super::session_registry::DropConnection;
use crate::config::LiveKitConfig;
use crate::db::rows::egresses::Egress;
use crate::db::{DbError, Store};
use crate::fail_point;
use crate::ids::{EgressId, RoomName, StartId, TicketId, TrackSid};
use crate::livekit::api::{LiveKit, OwnEgress};
use crate::session::plan::Reason;
use crate::ticket::TicketMint;

/// 200 tracks may be published at once, each with a word about its row and its socket.
const MAILBOX_CAPACITY: usize = 1_024;
/// Between two readings of the queue while it keeps changing.
const SYNC_INTERVAL: Duration = Duration::from_millis(50);
/// How often this server says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How long it must have been heard itself before it takes others for dead: two heartbeats of theirs.
const HEARD_FOR: Duration = Duration::from_secs(10);
/// A server that has not said so for this long is dead.
const PATIENCE: TimeDelta = TimeDelta::seconds(20);

/// Rows of the queue have changed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct QueueChanged;

/// The egresses that send to this server, as LiveKit lists them. Resolves when those that are in no row are settled.
#[derive(Message)]
#[rtype(result = "()")]
pub struct EgressesListed {
    pub egresses: Vec<OwnEgress>,
    /// When LiveKit was asked.
    pub asked_at: Instant,
    /// Tracks that have a socket here.
    pub live: HashSet<(RoomName, TrackSid)>,
}

/// What LiveKit says was compared for the first time, or not in time: starts may begin.
#[derive(Message)]
#[rtype(result = "()")]
pub struct FirstLookTaken;

/// Ends a row and its egress, on an operator's word.
#[derive(Message)]
#[rtype(result = "Result<(), DbError>")]
pub struct StopEgress {
    pub id: StartId,
    pub reason: Reason,
}

/// Starts and replaces nothing any more: the server stops.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopStarting;

pub struct EgressStarterParams {
    pub store: Store,
    pub livekit: Arc<LiveKit>,
    pub mint: TicketMint,
    /// What LiveKit's egress reaches this server by.
    pub ws_base: String,
    pub config: LiveKitConfig,
    /// The length of a group where no rule says another.
    pub group_seconds: f64,
    pub drop: Recipient<DropConnection>,
}

/// What the calls need, wherever they run.
pub(super) struct Tools {
    store: Store,
    livekit: Arc<LiveKit>,
    mint: TicketMint,
    ws_base: String,
    config: LiveKitConfig,
    group_seconds: f64,
}

pub struct EgressStarter {
    tools: Arc<Tools>,
    drop: Recipient<DropConnection>,
    pacer: Pacer,
    jobs: HashMap<StartId, Job>,
    /// The sockets that are open here.
    sockets: HashMap<TicketId, Socket>,
    /// Not before the first look at LiveKit: what ended meanwhile need not be started.
    may_start: bool,
    /// Since when the database has taken every word that this server lives.
    heard_since: Option<Instant>,
    stopping: bool,
    syncing: bool,
    sync_again: bool,
    /// Whose tries were over while rows were being read.
    answered_meanwhile: HashSet<StartId>,
    wake: Option<(Instant, SpawnHandle)>,
}

impl EgressStarter {
    pub fn new(params: EgressStarterParams) -> Self {
        let EgressStarterParams { store, livekit, mint, ws_base, config, group_seconds, drop } = params;
        let pacer = Pacer::new(config.min_starts, config.max_starts);
        Self {
            tools: Arc::new(Tools { store, livekit, mint, ws_base, config, group_seconds }),
            drop,
            pacer,
            jobs: HashMap::new(),
            sockets: HashMap::new(),
            may_start: false,
            heard_since: None,
            stopping: false,
            syncing: false,
            sync_again: false,
            answered_meanwhile: HashSet::new(),
            wake: None,
        }
    }

    /// Reads the open rows, one reading at a time.
    fn sync(&mut self, ctx: &mut Context<Self>) {
        fail_point::pass("starter-sync");
        if std::mem::replace(&mut self.syncing, true) {
            self.sync_again = true;
            return;
        }
        self.answered_meanwhile.clear();
        let store = self.tools.store.clone();
        ctx.spawn(async move { store.own_egresses().await }.into_actor(self).map(|rows, starter, ctx| {
            starter.syncing = false;
            match rows {
                Ok(rows) => starter.take_in(rows, ctx),
                Err(error) => log::warn!("the start queue cannot be read now error={error}"),
            }
            if std::mem::take(&mut starter.sync_again) {
                // Many changes at once are read together.
                ctx.run_later(SYNC_INTERVAL, |starter, ctx| starter.sync(ctx));
            }
        }));
    }

    fn take_in(&mut self, rows: Vec<Egress>, ctx: &mut Context<Self>) {
        let open: HashSet<&StartId> = rows.iter().map(|egress| &egress.id).collect();
        self.jobs.retain(|id, _| open.contains(id));
        for egress in rows {
            if self.answered_meanwhile.contains(&egress.id) {
                // Read before its try was over: it may be due by this, and is put off by now.
                self.sync_again = true;
                continue;
            }
            let connected = self.is_connected(&egress, ctx);
            let known = self.jobs.get(&egress.id).map(|job| job.phase);
            let (id, next) = (egress.id.clone(), next_phase(&egress, known, connected, self.times()));
            match next {
                Next::Nothing => {
                    if let Some(job) = self.jobs.get_mut(&id) {
                        job.egress = egress;
                    }
                }
                Next::Phase(phase) => {
                    self.jobs.insert(id, Job { egress, phase });
                }
                Next::Judge => {
                    self.jobs.insert(id.clone(), Job { egress, phase: JobPhase::Live });
                    self.judge(&id, Ending::Told, ctx);
                }
            }
        }
        self.pump(ctx);
    }

    /// Starts what is due and may be, and comes back for the rest. Tracks that were recorded a moment ago do not wait for the others: their gaps grow.
    fn pump(&mut self, ctx: &mut Context<Self>) {
        if self.may_start && !self.stopping {
            self.pump_those(Job::is_first_replacement, Pacer::next_replacement, ctx);
            self.pump_those(|job| !job.is_first_replacement(), Pacer::next, ctx);
        }
    }

    fn pump_those(&mut self, of_those: fn(&Job) -> bool, allowed: fn(&Pacer, Instant) -> Option<Instant>, ctx: &mut Context<Self>) {
        loop {
            let now = Instant::now();
            let waiting = self.jobs.iter().filter(|(_, job)| of_those(job)).filter_map(|(id, job)| match job.phase {
                JobPhase::Waiting { due, doubtful } => Some((due, job.egress.row.restarts == 0, id, doubtful)),
                JobPhase::Asking | JobPhase::Connecting { .. } | JobPhase::Live | JobPhase::Judging => None,
            });
            // Of those that are due, a track that was recorded before comes first, then whoever has waited longest, so that nobody starves.
            let next = waiting.min_by_key(|(due, is_new, id, _)| ((*due).max(now), *is_new, *due, (*id).clone()));
            let Some((due, id, doubtful)) = next.map(|(due, _, id, doubtful)| (due, id.clone(), doubtful)) else { return };
            let Some(allowed) = allowed(&self.pacer, now) else { return };
            let at = due.max(allowed);
            if at > now {
                return self.wake_at(at, ctx);
            }
            self.ask(&id, doubtful, ctx);
        }
    }

    fn wake_at(&mut self, at: Instant, ctx: &mut Context<Self>) {
        if let Some((set, timer)) = self.wake.take() {
            if set <= at && set > Instant::now() {
                self.wake = Some((set, timer));
                return;
            }
            ctx.cancel_future(timer);
        }
        let timer = ctx.run_later(at.saturating_duration_since(Instant::now()), |starter, ctx| {
            starter.wake = None;
            starter.pump(ctx);
        });
        self.wake = Some((at, timer));
    }

    fn ask(&mut self, id: &StartId, doubtful: bool, ctx: &mut Context<Self>) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.phase = JobPhase::Asking;
        let round = self.pacer.started();
        let (tools, id) = (Arc::clone(&self.tools), id.clone());
        let row = id.clone();
        ctx.spawn(async move { tools.attempt(row, doubtful).await }.into_actor(self).map(move |attempted, starter, ctx| {
            starter.attempted(&id, round, attempted, ctx);
        }));
    }

    fn attempted(&mut self, id: &StartId, round: Round, attempted: Attempted, ctx: &mut Context<Self>) {
        let now = Instant::now();
        if self.syncing {
            self.answered_meanwhile.insert(id.clone());
        }
        match attempted {
            Attempted::Agreed => self.pacer.succeeded(),
            Attempted::PutOff { was_busy: true, .. } => {
                if self.pacer.refused(round, now, jitter()) {
                    let waiting = self.jobs.values().filter(|job| matches!(job.phase, JobPhase::Waiting { .. } | JobPhase::Asking)).count();
                    log::warn!("LiveKit has no room for more egresses now waiting={waiting}");
                }
            }
            Attempted::PutOff { was_busy: false, .. } | Attempted::Over => self.pacer.ended(),
        }
        let deadline = now + self.times().connect_deadline;
        if let Some(job) = self.jobs.get_mut(id) {
            match attempted {
                Attempted::Agreed if job.egress.ticket().is_some_and(|ticket| self.sockets.contains_key(&ticket)) => job.phase = JobPhase::Live,
                Attempted::Agreed => job.phase = JobPhase::Connecting { deadline, since: now },
                Attempted::PutOff { wait, doubtful, .. } => job.phase = JobPhase::Waiting { due: now + wait, doubtful },
                // Read anew, if it is still open.
                Attempted::Over => drop(self.jobs.remove(id)),
            }
        }
        self.sync(ctx);
        self.pump(ctx);
    }

    /// Its socket or its egress has ended: decides what follows.
    fn judge(&mut self, id: &StartId, ending: Ending, ctx: &mut Context<Self>) {
        if self.stopping {
            return;
        }
        let Some(job) = self.jobs.get_mut(id) else { return };
        if matches!(job.phase, JobPhase::Judging | JobPhase::Asking) {
            return;
        }
        job.phase = JobPhase::Judging;
        if let Some(ticket) = job.egress.ticket() {
            // Before the registry says so: what follows must not take it for its own.
            self.sockets.remove(&ticket);
            self.drop_connection(Some(ticket));
        }
        let (tools, id) = (Arc::clone(&self.tools), id.clone());
        ctx.spawn(async move { (tools.judge(&id, ending).await, id) }.into_actor(self).map(|(judged, id), starter, ctx| {
            starter.jobs.remove(&id);
            match judged {
                Ok(()) => starter.sync(ctx),
                // The row is as it was, and is looked at again with the next heartbeat.
                Err(error) => log::error!("what follows an egress cannot be decided now start_id={id} error={error}"),
            }
        }));
    }

    /// What no message tells: sockets that never came, and egresses that outlive their tracks.
    fn look_around(&mut self, ctx: &mut Context<Self>) {
        let now = Instant::now();
        let late = |job: &Job| matches!(job.phase, JobPhase::Connecting { deadline, .. } if deadline <= now);
        let late: Vec<StartId> = self.jobs.iter().filter(|(_, job)| late(job)).map(|(id, _)| id.clone()).collect();
        for id in late {
            self.judge(&id, Ending::Failed(format!("no socket came within {} s", self.times().connect_deadline.as_secs_f64())), ctx);
        }
        let outlived = |job: &Job| matches!(job.phase, JobPhase::Live | JobPhase::Connecting { .. }) && job.outlives_its_track(Utc::now());
        let outlived: Vec<StartId> = self.jobs.iter().filter(|(_, job)| outlived(job)).map(|(id, _)| id.clone()).collect();
        for id in outlived {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            job.phase = JobPhase::Judging;
            log::warn!(
                "an egress does not end with its track, it is stopped room={:?} track_sid={}",
                job.egress.room.as_str(),
                job.egress.track_sid()
            );
            let (reason, ticket) = (if job.egress.session_is_active { Reason::TrackEnded } else { Reason::SessionEnded }, job.egress.ticket());
            self.drop_connection(ticket);
            ctx.notify(StopEgress { id, reason });
        }
        let tools = Arc::clone(&self.tools);
        let takes = self.heard_since.is_some_and(|since| since.elapsed() >= HEARD_FOR);
        ctx.spawn(async move { tools.store.take_over_egresses(PATIENCE, takes, Utc::now()).await }.into_actor(self).map(|taken, starter, ctx| {
            starter.heard_since = taken.is_ok().then(|| starter.heard_since.unwrap_or_else(Instant::now));
            match taken {
                Ok(0) => {}
                Ok(rows) => {
                    log::warn!("the egresses of a server that is gone are taken over egresses={rows}");
                    starter.sync(ctx);
                }
                Err(error) => log::warn!("this server cannot say that it lives error={error}"),
            }
        }));
    }

    fn times(&self) -> Times {
        Times { now: Instant::now(), wall: Utc::now(), connect_deadline: (self.tools.config.restart_after * CONNECT_PATIENCE).min(CONNECT_DEADLINE) }
    }
}

impl Actor for EgressStarter {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
        self.look_around(ctx);
        ctx.run_interval(HEARTBEAT, |starter, ctx| {
            starter.look_around(ctx);
            // A hint may have been dropped.
            starter.sync(ctx);
        });
    }
}

impl Handler<QueueChanged> for EgressStarter {
    type Result = ();

    fn handle(&mut self, _: QueueChanged, ctx: &mut Context<Self>) {
        if self.may_start {
            self.sync(ctx);
        }
    }
}

impl Handler<FirstLookTaken> for EgressStarter {
    type Result = ();

    fn handle(&mut self, _: FirstLookTaken, ctx: &mut Context<Self>) {
        if !std::mem::replace(&mut self.may_start, true) {
            self.sync(ctx);
        }
    }
}

impl Handler<EgressesListed> for EgressStarter {
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, msg: EgressesListed, ctx: &mut Context<Self>) -> Self::Result {
        let EgressesListed { egresses, asked_at, live } = msg;
        let listed: HashSet<&EgressId> = egresses.iter().map(|egress| &egress.id).collect();
        let gone = |job: &Job| match (job.phase, job.egress.egress_id()) {
            // One that was agreed on after the question may be missing from the answer.
            (JobPhase::Connecting { since, .. }, Some(egress)) => since < asked_at && !listed.contains(&egress),
            _ => false,
        };
        let gone: Vec<StartId> = self.jobs.iter().filter(|(_, job)| gone(job)).map(|(id, _)| id.clone()).collect();
        for id in gone {
            self.judge(&id, Ending::Failed("LiveKit lists no such egress".to_owned()), ctx);
        }
        let tools = Arc::clone(&self.tools);
        Box::pin(async move { tools.settle_orphans(egresses, live).await }.into_actor(self).map(|settled, starter, ctx| {
            if let Err(error) = settled {
                log::warn!("egresses that nobody asked for are left for now error={error}");
            }
            if starter.may_start {
                starter.sync(ctx);
            }
        }))
    }
}

impl Handler<StopEgress> for EgressStarter {
    type Result = ResponseActFuture<Self, Result<(), DbError>>;

    fn handle(&mut self, StopEgress { id, reason }: StopEgress, _: &mut Context<Self>) -> Self::Result {
        let tools = Arc::clone(&self.tools);
        let row = id.clone();
        Box::pin(async move { tools.stop(&row, reason).await }.into_actor(self).map(move |stopped, starter, ctx| {
            // Read anew: the row has ended, or is as it was.
            starter.jobs.remove(&id);
            starter.sync(ctx);
            stopped
        }))
    }
}

impl Handler<StopStarting> for EgressStarter {
    type Result = ();

    fn handle(&mut self, _: StopStarting, _: &mut Context<Self>) {
        self.stopping = true;
    }
}
