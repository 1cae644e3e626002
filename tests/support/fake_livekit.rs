//! A LiveKit of the tests' own: its server API, its webhooks and its egress, as `docs/FACTS.md` and livekit/livekit v1.13.5 have them.
//!
//! [`FakeLiveKit`] is a cheap handle. One watched [`State`] holds the truth, so a test can wait for anything; listener, webhook queues and
//! egresses are tasks of the current Tokio runtime and end with it. A room does not end by itself when it is empty.
//!
//! ```ignore
//! let livekit = FakeLiveKit::start().await;
//! let app = TestApp::builder().start().await; // told `livekit.url()`
//! livekit.deliver_to(app.addr);
//! let track = livekit.publish("standup", "ana", mic()).await;
//! livekit.crash_egress(&track).await;
//! ```

mod egress;
mod pcm;
mod server;
mod twirp;
mod webhooks;
mod worker;
mod world;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use livekit_protocol as proto;
use proto::DisconnectReason;
use socket2::Socket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use egress::{EgressSeen, End, Script};
pub use pcm::{Audio, Sent};
pub use twirp::{Call, Fault, Method};
pub use webhooks::{Delivery, Fate, Verdict};
pub use world::{Participant, Track, camera, mic, person, screen_audio};

use egress::{Command, Egress};
use twirp::ScriptedFault;
use webhooks::Webhooks;
use world::World;

/// How long a condition may take to come true before the test fails.
const PATIENCE: Duration = Duration::from_secs(20);
/// The host in a URL by which egresses find the server that webhooks are delivered to: its port is not known before it has started.
pub const OUR_NAME: &str = "live-meeting.test";
/// How often a condition is looked at that no change of the state announces.
const TICK: Duration = Duration::from_millis(10);

/// LiveKit's numbers where a test does not have to wait for them.
#[derive(Clone, Debug)]
pub struct Knobs {
    /// Between a start and its dial.
    pub dial_delay: Duration,
    /// No egress dials while this is so.
    pub hold_dials: bool,
    /// How long an egress waits for a track that is not there. LiveKit: 30 s.
    pub subscription_timeout: Duration,
    /// Audio between the reason to end and the Close. LiveKit: up to 3 s.
    pub trailing: Duration,
    /// How much faster than real time audio is streamed.
    pub pace: f64,
    /// Egress nodes; `None` takes every start.
    pub nodes: Option<usize>,
    /// Starts that a node of four cores takes in a window: 80 % of its cores, of which each start is given a half for so long
    /// (livekit/egress v1.14.1, `pkg/stats/monitor.go`).
    pub starts_per_node: usize,
    pub start_window: Duration,
    /// Whether `ListParticipants` of a room that is not there answers `not_found` instead of nobody, as LiveKit does: both have to be borne.
    pub unknown_rooms_are_refused: bool,
    /// Rooms and tracks are another server's: an egress of any track that is not here streams this until it is told to end.
    pub elsewhere: Option<Audio>,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            dial_delay: Duration::ZERO,
            hold_dials: false,
            subscription_timeout: Duration::from_secs(1),
            trailing: Duration::from_millis(30),
            pace: 1.0,
            nodes: None,
            starts_per_node: 6,
            start_window: Duration::from_secs(15),
            unknown_rooms_are_refused: false,
            elsewhere: None,
        }
    }
}

#[derive(Default)]
struct State {
    world: World,
    egresses: Vec<Egress>,
    /// Egresses that are connected now.
    connected: usize,
    /// When the admitted starts of the window were.
    starts: Vec<Instant>,
    scripts: VecDeque<Script>,
    standing_script: Option<Script>,
    journal: Vec<Call>,
    faults: Vec<ScriptedFault>,
    webhooks: Webhooks,
    knobs: Knobs,
}

struct Shared {
    state: watch::Sender<State>,
}

impl Shared {
    fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.borrow())
    }

    /// Changes the state, and queues the webhooks that follow from it before anybody else can.
    fn change<T>(self: &Arc<Self>, change: impl FnOnce(&mut State) -> T) -> T {
        let (mut result, mut idle) = (None, Vec::new());
        self.state.send_modify(|state| {
            result = Some(change(state));
            let events = std::mem::take(&mut state.world.outbox);
            idle = state.webhooks.queue(events);
        });
        self.drain(idle);
        result.expect("the change was made")
    }

    fn drain(self: &Arc<Self>, queues: Vec<String>) {
        for key in queues {
            tokio::spawn(webhooks::drain(Arc::clone(self), key));
        }
    }
}

#[derive(Clone)]
pub struct FakeLiveKit {
    shared: Arc<Shared>,
    port: u16,
    /// Keeps the port while nobody listens on it.
    _reserved: Arc<Socket>,
    serving: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// Start, address, knobs.
impl FakeLiveKit {
    /// Listens on a free port of 127.0.0.1.
    pub async fn start() -> Self {
        let reserved = server::bind(0);
        let port = reserved.local_addr().ok().and_then(|addr| addr.as_socket()).expect("a bound socket has an address").port();
        let shared = Arc::new(Shared { state: watch::Sender::new(State::default()) });
        let livekit = Self { shared, port, _reserved: Arc::new(reserved), serving: Arc::default() };
        livekit.reachable();
        livekit
    }

    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    pub fn ws_url(&self) -> String {
        format!("ws://{}", self.addr())
    }

    /// Where webhooks go from now on. Before, they are dropped.
    pub fn deliver_to(&self, addr: SocketAddr) {
        self.shared.change(|state| state.webhooks.target = Some(addr));
    }

    /// A second URL that every webhook goes to, once and after the first has answered.
    pub fn also_deliver_to(&self, addr: SocketAddr) {
        self.shared.change(|state| state.webhooks.second_target = Some(addr));
    }

    pub fn tune(&self, tune: impl FnOnce(&mut Knobs)) {
        self.shared.change(|state| tune(&mut state.knobs));
    }

    /// So many egress nodes, each taking so many starts in a window (see [`Knobs`]).
    pub fn nodes(&self, nodes: usize) {
        self.tune(|knobs| knobs.nodes = Some(nodes));
    }

    /// How much faster than real time audio is streamed.
    pub fn pace(&self, pace: f64) {
        self.tune(|knobs| knobs.pace = pace);
    }

    /// Refuses connections from now on, and ends those that there are. Egresses and webhooks go on.
    pub async fn unreachable(&self) {
        let serving = self.serving.lock().unwrap().take();
        if let Some(serving) = serving {
            serving.abort();
            serving.await.expect_err("it serves until it is aborted");
        }
    }

    /// Listens again on the same port.
    pub fn reachable(&self) {
        let listener = server::listen(self.port);
        let serving = tokio::spawn(server::serve(Arc::clone(&self.shared), listener));
        let earlier = self.serving.lock().unwrap().replace(serving);
        assert!(earlier.is_none(), "it was reachable");
    }
}

/// The world.
impl FakeLiveKit {
    /// The SID of the running room of this name, which is started if there is none.
    pub async fn start_room(&self, name: &str) -> String {
        self.shared.change(|state| state.world.start_room(name, ""))
    }

    pub async fn start_room_with(&self, name: &str, metadata: &str) -> String {
        self.shared.change(|state| state.world.start_room(name, metadata))
    }

    /// The same as [`FakeLiveKit::start_room`].
    pub fn room(&self, name: &str) -> String {
        self.shared.change(|state| state.world.start_room(name, ""))
    }

    pub async fn set_room_metadata(&self, name: &str, metadata: &str) {
        self.shared.change(|state| state.world.set_room_metadata(name, metadata));
    }

    /// The participant's SID. The room is started if there is none.
    pub async fn join(&self, room: &str, participant: Participant) -> String {
        self.shared.change(|state| {
            let sid = state.world.join(room, participant);
            state.close_sources(); // of one that was replaced
            sid
        })
    }

    /// The track's SID. The room is started and the participant joins if they are not there.
    pub async fn publish(&self, room: &str, identity: &str, track: Track) -> String {
        self.shared.change(|state| state.world.publish(room, identity, track))
    }

    pub async fn unpublish(&self, track: &str) {
        self.shared.change(|state| {
            state.world.unpublish(track);
            state.close_sources();
        });
    }

    pub async fn leave(&self, room: &str, identity: &str) {
        self.shared.change(|state| {
            state.world.leave(room, identity, DisconnectReason::ClientInitiated);
            state.close_sources();
        });
    }

    /// A full reconnect: the participant and its tracks get new SIDs. Those of the tracks are returned in their old order.
    pub async fn rejoin(&self, room: &str, identity: &str) -> Vec<String> {
        self.shared.change(|state| {
            let tracks = state.world.rejoin(room, identity);
            state.close_sources();
            tracks
        })
    }

    pub async fn finish_room(&self, name: &str) {
        self.shared.change(|state| {
            state.world.finish_room(name);
            state.close_sources();
        });
    }

    /// Mutes or unmutes a track: its egresses say so and stream silence meanwhile.
    pub async fn mute(&self, track: &str, muted: bool) {
        self.shared.change(|state| {
            state.world.set_muted(track, muted);
            for egress in state.egresses.iter().filter(|egress| egress.track == track && egress.connected) {
                egress.tell(Command::Mute(muted));
            }
        });
    }
}

/// Webhooks.
impl FakeLiveKit {
    /// Drops every webhook from now on, silently.
    pub fn lose_webhooks(&self, lose: bool) {
        self.shared.change(|state| state.webhooks.lose_all = lose);
    }

    pub fn lose_next(&self, webhooks: usize) {
        self.shared.change(|state| state.webhooks.lose_next = webhooks);
    }

    /// Delivers everything twice.
    pub fn duplicate(&self, duplicate: bool) {
        self.shared.change(|state| state.webhooks.duplicate = duplicate);
    }

    /// Decides on each webhook by its event's name.
    pub fn filter_webhooks(&self, filter: impl Fn(&str) -> Verdict + Send + Sync + 'static) {
        self.shared.change(|state| state.webhooks.filter = Some(Arc::new(filter)));
    }

    /// Takes the filter off, and queues what it held back.
    pub fn release_webhooks(&self) {
        let idle = self.shared.change(|state| {
            state.webhooks.filter = None;
            state.webhooks.release()
        });
        self.shared.drain(idle);
    }

    /// The first pause between attempts (LiveKit: 1 s), the age past which nothing is sent (30 s), and how many may wait (200).
    pub fn webhook_limits(&self, backoff: Duration, max_age: Duration, max_depth: usize) {
        self.shared.change(|state| {
            let webhooks = &mut state.webhooks;
            (webhooks.backoff, webhooks.max_age, webhooks.max_depth) = (backoff, max_age, max_depth);
        });
    }

    /// Every webhook there was to send, and what became of it.
    pub fn deliveries(&self) -> Vec<Delivery> {
        self.shared.look(|state| state.webhooks.deliveries.clone())
    }

    /// Those of one event.
    pub fn deliveries_of(&self, event: &str) -> Vec<Delivery> {
        self.shared.look(|state| state.webhooks.deliveries.iter().filter(|delivery| delivery.event.event == event).cloned().collect())
    }

    /// Waits until no webhook is on its way.
    pub async fn webhooks_delivered(&self) {
        self.eventually("every webhook at its end", |livekit| {
            livekit.shared.look(|state| state.webhooks.deliveries.iter().all(|delivery| delivery.fate != Fate::Waiting)).then_some(())
        })
        .await;
    }
}

/// The server API.
impl FakeLiveKit {
    /// What the next calls of a method come to. Faults of one method follow each other in the order they were given.
    pub fn fail_next(&self, method: Method, fault: Fault, calls: usize) {
        assert_ne!(calls, 0, "no call would ever meet it");
        self.shared.change(|state| state.faults.push(ScriptedFault { method, fault, left: Some(calls) }));
    }

    /// What every call of a method comes to until [`FakeLiveKit::clear`].
    pub fn fail(&self, method: Method, fault: Fault) {
        self.shared.change(|state| state.faults.push(ScriptedFault { method, fault, left: None }));
    }

    pub fn clear(&self, method: Method) {
        self.shared.change(|state| state.faults.retain(|scripted| scripted.method != method));
    }

    /// How often a method was called with a body that could be read.
    pub fn calls(&self, method: Method) -> usize {
        self.shared.look(|state| state.journal.iter().filter(|call| call.method == method).count())
    }

    pub fn journal(&self) -> Vec<Call> {
        self.shared.look(|state| state.journal.clone())
    }
}

/// Egresses. Where one is named, by its id or its track, all running ones of that name are meant.
impl FakeLiveKit {
    /// What the next start does; several follow each other.
    pub fn script_next(&self, script: Script) {
        self.shared.change(|state| state.scripts.push_back(script));
    }

    /// What every start does that has no script of its own.
    pub fn script_all(&self, script: Option<Script>) {
        self.shared.change(|state| state.standing_script = script);
    }

    pub async fn crash_egress(&self, track_or_id: &str) {
        self.end_egress(track_or_id, End::Crash).await;
    }

    pub async fn reset_egress(&self, track_or_id: &str) {
        self.end_egress(track_or_id, End::Reset).await;
    }

    /// Ends by itself as if the track had ended.
    pub async fn close_egress(&self, track_or_id: &str) {
        self.end_egress(track_or_id, End::SourceClosed).await;
    }

    /// Ends what runs, and waits until it has ended.
    pub async fn end_egress(&self, track_or_id: &str, end: End) {
        let told = self.command(track_or_id, &Command::End(end));
        self.eventually("the egress's end", |livekit| livekit.shared.look(|state| told.iter().all(|id| !state.egress(id).is_live())).then_some(()))
            .await;
    }

    /// Stays connected, and sends nothing any more.
    pub fn stall_egress(&self, track_or_id: &str) {
        self.command(track_or_id, &Command::Stall);
    }

    /// Connects once more with the URL of the track's running egress; what the handshake was answered with.
    pub async fn dial_again(&self, track_or_id: &str) -> Option<u16> {
        let id = self.active_for(track_or_id).first().unwrap_or_else(|| panic!("no egress of {track_or_id} runs")).id.clone();
        worker::dial_again(Arc::clone(&self.shared), id).await
    }

    /// All that ever were, in the order of their starts.
    pub fn egresses(&self) -> Vec<EgressSeen> {
        self.shared.look(|state| state.egresses.iter().map(Egress::seen).collect())
    }

    /// Those that have not ended.
    pub fn active_for(&self, track_or_id: &str) -> Vec<EgressSeen> {
        self.shared.look(|state| state.egresses.iter().filter(|egress| egress.is(track_or_id) && egress.is_live()).map(Egress::seen).collect())
    }

    /// What each egress of a track has streamed, in the order of their starts.
    pub fn sent_pcm(&self, track_or_id: &str) -> Vec<Sent> {
        let of_track = |state: &State| {
            let wanted = state.egresses.iter().filter(|egress| egress.is(track_or_id));
            wanted.map(|egress| egress.sent.lock().unwrap().clone()).collect()
        };
        self.shared.look(of_track)
    }

    /// Waits until a track is streamed by an egress, which is returned.
    pub async fn streaming(&self, track_or_id: &str) -> EgressSeen {
        self.eventually(&format!("an egress that streams {track_or_id}"), |livekit| {
            livekit.active_for(track_or_id).into_iter().find(|egress| egress.connected)
        })
        .await
    }

    fn command(&self, track_or_id: &str, command: &Command) -> Vec<String> {
        let told: Vec<String> = self.active_for(track_or_id).into_iter().map(|egress| egress.id).collect();
        assert!(!told.is_empty(), "no egress of {track_or_id} runs: {:?}", self.egresses());
        self.shared.look(|state| {
            for id in &told {
                state.egress(id).tell(command.clone());
            }
        });
        told
    }
}

impl FakeLiveKit {
    /// Waits until `probe` finds something; fails after 20 s, naming `what`.
    pub async fn eventually<T>(&self, what: &str, mut probe: impl FnMut(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut changes = self.shared.state.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(found) = probe(self) {
                return found;
            }
            if Instant::now() >= deadline {
                let fates: Vec<_> = self.deliveries().into_iter().map(|delivery| (delivery.event.event, delivery.answers, delivery.fate)).collect();
                panic!("{what} did not come true; egresses: {:#?}\ncalls: {:#?}\nwebhooks: {fates:?}", self.egresses(), self.journal());
            }
            timeout(TICK, changes.changed()).await.ok(); // what no change announces is found at the next tick
        }
    }
}
