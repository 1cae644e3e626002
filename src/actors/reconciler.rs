//! Compares what LiveKit lists with what is known, and sets right what webhooks did not tell: they are lost and reordered by design (`docs/FACTS.md`, webhooks).
//!
//! Owns no rows. In: [`Reconcile`] from the registry after a webhook that could not be kept and from operators; its own clock. Out: changes to the store,
//! [`SessionsChanged`] to the registry, [`EgressesListed`] and [`FirstLookTaken`] to the starter. Full: a wish to compare is held already.
//! While LiveKit does not answer nothing is closed, and nothing waits for it. Dies: the process ends, as with the registry.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use tokio::sync::oneshot;

use super::egress_starter::{EgressStarter, EgressesListed, FirstLookTaken};
use super::session_registry::{GetLiveTracks, LiveTrack, SessionRegistry, SessionsChanged};
use crate::db::{DbError, Store};
use crate::fail_point;
use crate::ids::RoomSid;
use crate::livekit::api::{CallError, LiveKit};
use crate::session::event::Room;
use crate::session::lifecycle::{Cause, Change};
use crate::session::reconcile::{Audible, ListedRoom, Misses, Moment, compare};

/// A wish to compare is one wish, however often it is said.
const MAILBOX_CAPACITY: usize = 16;
/// When something was missing for the first time: another look decides.
const SECOND_LOOK: Duration = Duration::from_secs(2);
/// Starts wait for the first look no longer: LiveKit may hang, in one room or in all.
const FIRST_LOOK_DEADLINE: Duration = Duration::from_secs(3);
/// Rooms whose participants are asked for at the same time.
const ROOMS_AT_ONCE: usize = 8;

/// Compares now. Resolves when that is done, or LiveKit did not answer.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Reconcile;

pub struct ReconcilerParams {
    pub store: Store,
    pub livekit: Arc<LiveKit>,
    pub interval: Duration,
    pub registry: Addr<SessionRegistry>,
    /// With what LiveKit's egress reaches this server by; `None` where nothing is started.
    pub starter: Option<(Addr<EgressStarter>, String)>,
}

pub struct Reconciler {
    params: Arc<ReconcilerParams>,
    missing: Misses,
    /// Another look is under way to what was missing.
    second_look: bool,
    looking: bool,
    /// Those who asked while a look was under way: their answer is the next.
    waiting: Vec<oneshot::Sender<()>>,
    /// Since when LiveKit has not answered; it is said once.
    silent_since: Option<Instant>,
}

/// Why a comparison came to nothing.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Store(#[from] DbError),
    #[error("the registry is gone: {0}")]
    Registry(#[from] MailboxError),
}

impl Reconciler {
    pub fn new(params: ReconcilerParams) -> Self {
        Self { params: Arc::new(params), missing: Misses::new(), second_look: false, looking: false, waiting: Vec::new(), silent_since: None }
    }

    /// Looks, one look at a time; `done` hears when a look that began after this call has ended.
    fn look(&mut self, done: Option<oneshot::Sender<()>>, ctx: &mut Context<Self>) {
        if self.looking {
            self.waiting.extend(done);
            return;
        }
        fail_point::pass("reconciler-look");
        self.looking = true;
        let (params, before) = (Arc::clone(&self.params), self.missing.clone());
        ctx.spawn(async move { look(&params, &before).await }.into_actor(self).map(move |looked, reconciler, ctx| {
            reconciler.looking = false;
            reconciler.looked(looked, ctx);
            reconciler.let_starts_begin();
            if let Some(done) = done {
                // Who asked may have gone.
                done.send(()).ok();
            }
            for waiting in std::mem::take(&mut reconciler.waiting) {
                reconciler.look(Some(waiting), ctx);
            }
        }));
    }

    fn let_starts_begin(&self) {
        if let Some((starter, _)) = &self.params.starter
            && let Err(SendError::Full(_)) = starter.try_send(FirstLookTaken)
        {
            log::warn!("the starter of egresses is not told that LiveKit was looked at");
        }
    }

    fn looked(&mut self, looked: Result<Misses, LookError>, ctx: &mut Context<Self>) {
        match looked {
            Ok(missing) => {
                if let Some(since) = self.silent_since.take() {
                    log::info!("LiveKit answers again after_s={}", since.elapsed().as_secs());
                }
                self.missing = missing;
                if !self.missing.is_empty() && !std::mem::replace(&mut self.second_look, true) {
                    ctx.run_later(SECOND_LOOK, |reconciler, ctx| {
                        reconciler.second_look = false;
                        reconciler.look(None, ctx);
                    });
                }
            }
            Err(error) => {
                // Not every look has missed it.
                self.missing.clear();
                if self.silent_since.is_none() {
                    log::warn!("what LiveKit has cannot be compared with what is known, nothing is closed meanwhile error={error}");
                    self.silent_since = Some(Instant::now());
                }
            }
        }
    }
}

impl Actor for Reconciler {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
        self.look(None, ctx);
        ctx.run_later(FIRST_LOOK_DEADLINE, |reconciler, _| reconciler.let_starts_begin());
        ctx.run_interval(self.params.interval, |reconciler, ctx| reconciler.look(None, ctx));
    }
}

impl Handler<Reconcile> for Reconciler {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: Reconcile, ctx: &mut Context<Self>) -> Self::Result {
        let (done, looked) = oneshot::channel();
        self.look(Some(done), ctx);
        Box::pin(async move {
            // Dropped only with the actor.
            looked.await.ok();
        })
    }
}

async fn look(params: &ReconcilerParams, before: &Misses) -> Result<Misses, LookError> {
    // Read before LiveKit is: what is known and not listed was there before the list was made.
    let known = params.store.known_sessions().await?;
    let mut rooms = params.livekit.rooms().await?;
    // The end of a session is final, an operator's too: what goes on in its room is left alone.
    let ended = params.store.ended_rooms(rooms.iter().map(|room| room.sid.clone()).collect()).await?;
    rooms.retain(|room| !ended.contains(&room.sid));
    let listed: Vec<ListedRoom> =
        futures_util::stream::iter(rooms).map(|room| look_inside(&params.livekit, room)).buffer_unordered(ROOMS_AT_ONCE).collect().await;
    let live = params.registry.send(GetLiveTracks).await?;
    let (now, audible) = (Utc::now(), audible(&live));
    let findings = compare(&known, &listed, Moment { before, audible: &audible, now });
    let has_news = !findings.changes.is_empty();
    if has_news {
        log::info!("LiveKit knows more than its webhooks told changes={}", findings.changes.len());
        apply(&params.store, findings.changes, now).await;
    }
    if let Some((starter, base)) = &params.starter {
        let asked_at = Instant::now();
        match params.livekit.own_egresses(None, base).await {
            Ok(egresses) => {
                let live = live.into_iter().filter_map(|track| Some((track.room_name, track.track_sid?))).collect();
                starter.send(EgressesListed { egresses, asked_at, live }).await?;
            }
            // Sessions go on without: LiveKit without Redis has no egress at all.
            Err(error) => log::warn!("LiveKit does not list its egresses error={error}"),
        }
    }
    if has_news {
        // Starts begin now: what runs already is known by now.
        params.registry.send(SessionsChanged).await?;
    }
    Ok(findings.missing)
}

/// Each room for itself: what the database does not take of one keeps no other from being set right. The next look says it again.
async fn apply(store: &Store, changes: Vec<Change>, now: DateTime<Utc>) {
    let mut rooms: BTreeMap<RoomSid, Vec<Change>> = BTreeMap::new();
    for change in changes {
        rooms.entry(change.session.room_sid.clone()).or_default().push(change);
    }
    for (room, changes) in rooms {
        if let Err(error) = store.apply_changes(changes, Cause::Reconciler, now).await {
            log::error!("what LiveKit says of a room could not be kept room_sid={room} error={error}");
        }
    }
}

/// Whose audio arrives: a stalled connection says nothing of what is there.
fn audible(live: &[LiveTrack]) -> Audible {
    let mut audible = Audible::default();
    for track in live.iter().filter(|track| !track.stats.stalled) {
        audible.rooms.insert(track.room_name.clone());
        audible.people.extend(track.participant.clone().map(|identity| (track.room_name.clone(), identity)));
        audible.tracks.extend(track.track_sid.clone());
    }
    audible
}

async fn look_inside(livekit: &LiveKit, room: Room) -> ListedRoom {
    let inside = match livekit.participants(&room.name).await {
        Ok(listed) => Some(listed.into_iter().map(|listed| (listed.participant, listed.tracks)).collect()),
        // Not from LiveKit 1.13.5, which answers nobody: that is judged by the next looks.
        Err(CallError::NotFound(_)) => None,
        Err(error) => {
            log::warn!("LiveKit does not say who is in a room room={:?} error={error}", room.name.as_str());
            None
        }
    };
    ListedRoom { room, inside }
}
