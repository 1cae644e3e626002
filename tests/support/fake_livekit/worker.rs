//! The task behind one egress: it joins the room, waits for the track, dials, streams, ends. See `docs/FACTS.md`, egress socket.

use std::any::Any;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use livekit_protocol as proto;
use proto::{DisconnectReason, EgressStatus};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::OUR_NAME;
use super::Shared;
use super::egress::{Command, Egress, End, Script, nanoseconds};
use super::pcm::{Audio, Burst, Cursor, Sent};
use super::world::Sound;
use crate::support::egress_peer::{CHUNK_TIME, CLOSE, EgressPeer, frame};

/// LiveKit's `pingPeriod` (docs/FACTS.md, egress socket).
const PING_PERIOD: Duration = Duration::from_secs(30);
/// How often a stalled egress looks at its socket.
const STALLED_TICK: Duration = Duration::from_millis(100);
/// So many connections make each of them write one message more at a time: hundreds then cost as little as a few.
const CONNECTIONS_PER_MESSAGE: usize = 16;
const MAX_MESSAGES_AT_ONCE: usize = 10;

type Inbox = mpsc::UnboundedReceiver<Command>;

/// An egress to be run.
pub struct Worker {
    plan: Plan,
    inbox: Inbox,
}

struct Plan {
    id: String,
    room: String,
    track: String,
    url: String,
    script: Option<Script>,
    killed: Arc<Notify>,
    sent: Arc<Mutex<Sent>>,
    cursor: Cursor,
    stalled: bool,
    /// As it was last heard; the trailing audio of a track that is no more.
    sound: Sound,
    messages_sent: u128,
    /// What the last mute text said; they alternate.
    told_muted: bool,
}

impl Worker {
    /// `ordinal` is the egress's place among all.
    pub fn new(ordinal: usize, egress: &Egress, script: Option<Script>, inbox: Inbox) -> Self {
        let plan = Plan {
            id: egress.info.egress_id.clone(),
            room: egress.info.room_name.clone(),
            track: egress.track.clone(),
            url: egress.url.clone(),
            stalled: script == Some(Script::Stall),
            script,
            killed: Arc::clone(&egress.killed),
            sent: Arc::clone(&egress.sent),
            cursor: Cursor::new(ordinal),
            sound: Sound { audio: Audio::Silence, muted: false, mime: String::new() },
            messages_sent: 0,
            told_muted: false,
        };
        Self { plan, inbox }
    }
}

pub async fn run(shared: Arc<Shared>, worker: Worker) {
    let Worker { mut plan, mut inbox } = worker;
    let connected = tokio::select! {
        biased;
        end = told_to_end(&mut inbox) => Err(end),
        connected = plan.connect(&shared) => connected,
    };
    let end = match connected {
        Err(end) => end,
        Ok(peer) => {
            shared.change(|state| {
                state.connected += 1;
                state.egress_mut(&plan.id).connected = true;
                state.tell_of_egress(&plan.id, "egress_updated", |info| {
                    info.set_status(EgressStatus::EgressActive);
                    info.stream_results.iter_mut().for_each(|stream| stream.started_at = nanoseconds());
                });
            });
            let served = AssertUnwindSafe(plan.serve(&shared, peer, &mut inbox)).catch_unwind().await;
            shared.change(|state| {
                state.connected -= 1;
                state.egress_mut(&plan.id).connected = false;
            });
            served.unwrap_or_else(|panic| End::failed(words(&*panic), 503))
        }
    };
    shared.change(|state| {
        state.world.leave(&plan.room, &plan.id, DisconnectReason::ClientInitiated);
        state.tell_of_egress(&plan.id, "egress_ended", |info| end.apply(info));
    });
}

/// Waits for an end that comes before the start.
async fn told_to_end(inbox: &mut Inbox) -> End {
    loop {
        match inbox.recv().await {
            Some(Command::End(End::Stopped | End::SourceClosed)) => return End::Aborted,
            Some(Command::End(end)) => return end,
            Some(Command::Stall | Command::Mute(_)) => {}
            None => std::future::pending().await,
        }
    }
}

impl Plan {
    async fn connect(&mut self, shared: &Arc<Shared>) -> Result<EgressPeer, End> {
        match &self.script {
            Some(Script::DialAfter(delay)) => sleep(*delay).await,
            Some(Script::DieBeforeDial) => return Err(End::Crash),
            Some(Script::NeverDial) => std::future::pending().await,
            None | Some(Script::Stall | Script::EndAfter(..) | Script::DialTwice) => {}
        }
        sleep(shared.look(|state| state.knobs.dial_delay)).await;
        let mut changes = shared.state.subscribe();
        changes.wait_for(|state| !state.knobs.hold_dials).await.map(drop).expect("the sender lives");
        shared.change(|state| state.world.join_egress(&self.room, &self.id));
        let patience = shared.look(|state| state.knobs.subscription_timeout);
        let subscribed = timeout(patience, self.subscribe(shared)).await;
        self.sound = subscribed.map_err(|_| End::failed(format!("track {} not found", self.track), 404))?;
        if self.sound.mime.starts_with("video/") {
            return Err(End::failed(format!("format websocket incompatible with codec {}", self.sound.mime.to_lowercase()), 400));
        }
        let peer = dial(shared, &self.id, &self.url).await?;
        if self.script == Some(Script::DialTwice) {
            tokio::spawn(dial_again(Arc::clone(shared), self.id.clone()));
        }
        Ok(peer)
    }

    /// Waits until the track is published. From then on its end is told; one that is elsewhere is there at once, and nobody tells its end.
    async fn subscribe(&self, shared: &Arc<Shared>) -> Sound {
        if let Some(audio) = shared.look(|state| state.knobs.elsewhere.clone()) {
            return Sound { audio, muted: false, mime: "audio/opus".to_owned() };
        }
        let mut changes = shared.state.subscribe();
        loop {
            changes.wait_for(|state| state.world.has_track(&self.room, &self.track)).await.map(drop).expect("the sender lives");
            let sound = shared.change(|state| {
                let sound = state.world.sounds.get(&self.track).cloned();
                state.egress_mut(&self.id).subscribed = sound.is_some();
                sound
            });
            if let Some(sound) = sound {
                return sound;
            }
        }
    }

    async fn serve(&mut self, shared: &Arc<Shared>, mut peer: EgressPeer, inbox: &mut Inbox) -> End {
        let end = self.stream(shared, &mut peer, inbox).await;
        if end == End::Crash {
            peer.vanish().await;
            return end;
        }
        if end == End::Reset {
            peer.reset();
            return end;
        }
        if !end.is_orderly() {
            return end;
        }
        shared.change(|state| {
            if state.egress(&self.id).info.status() == EgressStatus::EgressActive {
                state.tell_of_egress(&self.id, "egress_updated", |info| info.set_status(EgressStatus::EgressEnding));
            }
        });
        if self.stalled {
            return End::failed("pipeline frozen", 500);
        }
        let trailing = shared.look(|state| state.knobs.trailing).as_nanos() / CHUNK_TIME.as_nanos();
        let mut due = Instant::now();
        for _ in 0..trailing {
            sleep_until(due).await;
            if let Ok(Command::End(End::Crash)) = inbox.try_recv() {
                peer.vanish().await;
                return End::Crash;
            }
            if let Err(error) = self.send(shared, &mut peer, 1).await {
                return write_failed(&error);
            }
            due += CHUNK_TIME.div_f64(shared.look(|state| state.knobs.pace));
        }
        match peer.close_abruptly_after_close_frame().await {
            Ok(()) => end,
            Err(error) => write_failed(&error),
        }
    }

    /// Streams until there is a reason to end.
    async fn stream(&mut self, shared: &Arc<Shared>, peer: &mut EgressPeer, inbox: &mut Inbox) -> End {
        let muted = shared.look(|state| state.world.sounds.get(&self.track).is_some_and(|sound| sound.muted));
        if let Err(error) = self.tell_muted(peer, muted).await {
            return write_failed(&error);
        }
        let limit = match &self.script {
            Some(Script::EndAfter(audio, end)) => Some((audio.as_nanos() / CHUNK_TIME.as_nanos(), end.clone())),
            _ => None,
        };
        let (mut due, mut ping_due) = (Instant::now(), Instant::now() + PING_PERIOD);
        loop {
            tokio::select! {
                biased;
                command = inbox.recv() => match command {
                    Some(Command::End(end)) => return end,
                    Some(Command::Stall) => self.stalled = true,
                    Some(Command::Mute(muted)) => if let Err(error) = self.tell_muted(peer, muted).await {
                        return write_failed(&error);
                    },
                    None => std::future::pending().await,
                },
                () = sleep_until(due) => {
                    if let Some((messages, end)) = &limit && self.messages_sent >= *messages {
                        return end.clone();
                    }
                    let written = if self.stalled {
                        due = Instant::now() + STALLED_TICK;
                        peer.ping().await.ok(); // a pipeline that hangs does not keep LiveKit from it
                        Ok(())
                    } else {
                        let (pace, connected) = shared.look(|state| (state.knobs.pace, state.connected));
                        let mut messages = (1 + connected / CONNECTIONS_PER_MESSAGE).min(MAX_MESSAGES_AT_ONCE).max(pace.ceil() as usize);
                        if let Some((limit, _)) = &limit {
                            messages = messages.min((limit - self.messages_sent) as usize);
                        }
                        due += CHUNK_TIME.mul_f64(messages as f64 / pace);
                        self.send(shared, peer, messages).await
                    };
                    if let Err(error) = written {
                        return write_failed(&error);
                    }
                    if Instant::now() >= ping_due && !self.stalled {
                        ping_due += PING_PERIOD;
                        peer.ping().await.ok(); // the next message finds out
                    }
                    let closes: Vec<Vec<u8>> = peer.poll_incoming().await.into_iter().filter(|seen| seen.opcode == CLOSE).map(|seen| seen.payload).collect();
                    if let Some(payload) = closes.first() {
                        peer.send_raw(&frame(CLOSE, true, payload.get(..2).unwrap_or_default(), true)).await.ok(); // it may be gone already
                        if !self.stalled {
                            return End::failed("websocket: close sent", 503);
                        }
                    }
                }
            }
        }
    }

    async fn tell_muted(&mut self, peer: &mut EgressPeer, muted: bool) -> io::Result<()> {
        if std::mem::replace(&mut self.told_muted, muted) == muted {
            return Ok(());
        }
        peer.mute(muted).await
    }

    async fn send(&mut self, shared: &Arc<Shared>, peer: &mut EgressPeer, messages: usize) -> io::Result<()> {
        if let Some(sound) = shared.look(|state| state.world.sounds.get(&self.track).cloned()) {
            self.sound = sound;
        }
        let mut burst = Burst::default();
        for _ in 0..messages {
            self.cursor.next(&self.sound.audio, self.sound.muted, &mut burst);
        }
        tokio::select! {
            biased;
            () = self.killed.notified() => return Ok(()), // the inbox has the reason
            written = peer.send_raw(&burst.wire) => written?,
        }
        burst.record(&mut self.sent.lock().unwrap());
        self.messages_sent += messages as u128;
        Ok(())
    }
}

fn write_failed(error: &io::Error) -> End {
    End::failed(format!("write tcp: {error}"), 503)
}

/// Connects with an egress's URL and notes the answer.
async fn dial(shared: &Arc<Shared>, id: &str, url: &str) -> Result<EgressPeer, End> {
    let rest = url.strip_prefix("ws://").ok_or_else(|| End::failed("tls: failed to verify certificate", 400))?;
    let at = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(at);
    if authority.contains('@') {
        return Err(End::failed("malformed ws or wss URL", 400));
    }
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let named = if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
    let found = match shared.look(|state| state.webhooks.target) {
        Some(server) if authority == OUR_NAME => Some(server),
        _ => tokio::net::lookup_host(&named).await.ok().and_then(|mut found| found.next()),
    };
    let addr = found.ok_or_else(|| End::failed(format!("dial tcp: lookup {authority}: no such host"), 400))?;
    // The peer panics where nobody listens or answers, which for a test of its own is right.
    match AssertUnwindSafe(EgressPeer::connect(addr, &path)).catch_unwind().await {
        Ok(Ok(peer)) => {
            shared.change(|state| state.egress_mut(id).handshakes.push(101));
            Ok(peer)
        }
        Ok(Err(refusal)) => {
            shared.change(|state| state.egress_mut(id).handshakes.push(refusal.status));
            Err(End::failed("websocket: bad handshake", 400))
        }
        Err(panic) => Err(End::failed(format!("dial tcp {addr}: {}", words(&*panic)), 400)),
    }
}

/// Connects once more with an egress's URL, and sends silence as long as the server takes it. `None` is no answer.
pub async fn dial_again(shared: Arc<Shared>, id: String) -> Option<u16> {
    let (url, before) = shared.look(|state| (state.egress(&id).url.clone(), state.egress(&id).handshakes.len()));
    if let Ok(mut peer) = dial(&shared, &id, &url).await {
        let stream = async move {
            let mut cursor = Cursor::new(0);
            loop {
                let mut burst = Burst::default();
                cursor.next(&Audio::Silence, false, &mut burst);
                let over = peer.send_raw(&burst.wire).await.is_err() || peer.poll_incoming().await.iter().any(|seen| seen.opcode == CLOSE);
                if over {
                    return;
                }
                sleep(CHUNK_TIME).await;
            }
        };
        tokio::spawn(AssertUnwindSafe(stream).catch_unwind());
    }
    shared.look(|state| state.egress(&id).handshakes.get(before).copied())
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}
