//! Owns one connection to an analysis service, for one track.
//!
//! In: [`AnalyseGroup`] from `BufferActor`, [`FinishAnalysis`] from `TrackActor`. Out: measurements to the track's rows, a line per group to the
//! pipeline log. Full: its queue is bounded in time of audio; the oldest group is dropped and counted. Dies: `TrackActor` restarts it with
//! backoff; the recording never notices.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use actix::prelude::*;
use actix_rt::task::spawn_blocking;
use chrono::Utc;
use tokio::sync::{Notify, watch};

use super::child::{backoff, jitter};
use super::stats::TrackStats;
use super::track::rows::RowLog;
use crate::analysis::connection::{AnalysisService, ConnectError, Received, ServiceConnection};
use crate::analysis::gate::Permit;
use crate::analysis::speech_stream::SpeechStream;
use crate::analysis::{Reply, SPEECH_RATE, SpeechSlice, WireFormat, WireMessage};
use crate::audio::window::Group;
use crate::fail_point;
use crate::ids::new_row_id;
use crate::journal::rows::Measured;
use crate::recording::pipeline_log::{Fate, TrackLog};

/// A group each 0.1 s is the most there is: 6 s of them.
const MAILBOX_CAPACITY: usize = 64;
/// Slices that may be without an answer; more wait in the queue.
const MAX_UNANSWERED: usize = 8;
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Two pings without an answer: the connection is half open.
const SILENCE: Duration = Duration::from_secs(20);
/// A service that answers pings but no slice for so long does not work, and neither does one whose answers cannot be understood.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// How long a group may take to be made ready and sent. Anything hangs that takes longer.
const SEND_DEADLINE: Duration = Duration::from_secs(20);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// A group that is not silent.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AnalyseGroup(pub Group);

/// Resolves when everything is sent and answered, or at the deadline. Ends the actor.
#[derive(Message)]
#[rtype(result = "()")]
pub struct FinishAnalysis {
    pub deadline: Duration,
}

pub struct HumeClientParams {
    pub service: AnalysisService,
    pub rows: RowLog,
    pub log: TrackLog,
    pub stats: Arc<TrackStats>,
    /// Closed when the track is gone: a conversation keeps its actor alive, so it must be told.
    pub lifeline: watch::Receiver<()>,
}

pub struct HumeClientActor {
    shared: Rc<Shared>,
}

/// What the mailbox and the conversation share: one thread, no lock.
struct Shared {
    params: HumeClientParams,
    queue: RefCell<VecDeque<Group>>,
    finishing: RefCell<bool>,
    /// Something changed that the conversation should look at.
    changed: Notify,
    done: Notify,
}

impl HumeClientActor {
    pub fn new(params: HumeClientParams) -> Self {
        let shared = Shared { params, queue: RefCell::default(), finishing: RefCell::new(false), changed: Notify::new(), done: Notify::new() };
        Self { shared: Rc::new(shared) }
    }
}

impl Actor for HumeClientActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
        ctx.spawn(converse(Rc::clone(&self.shared)).into_actor(self));
        let mut lifeline = self.shared.params.lifeline.clone();
        let cut = async move { while lifeline.changed().await.is_ok() {} };
        ctx.spawn(cut.into_actor(self).map(|(), _, ctx| ctx.stop()));
    }
}

impl Drop for HumeClientActor {
    fn drop(&mut self) {
        while let Some(group) = self.shared.pop() {
            self.shared.count_dropped(&group);
        }
    }
}

impl Handler<AnalyseGroup> for HumeClientActor {
    type Result = ();

    fn handle(&mut self, AnalyseGroup(group): AnalyseGroup, _: &mut Context<Self>) {
        self.shared.queue.borrow_mut().push_back(group);
        while self.shared.queue.borrow().len() > 1
            && self.shared.queued() > self.shared.params.service.queue
            && let Some(oldest) = self.shared.pop()
        {
            self.shared.count_dropped(&oldest);
        }
        self.shared.note_queue();
        self.shared.changed.notify_one();
    }
}

impl Handler<FinishAnalysis> for HumeClientActor {
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, msg: FinishAnalysis, _: &mut Context<Self>) -> Self::Result {
        *self.shared.finishing.borrow_mut() = true;
        self.shared.changed.notify_one();
        let shared = Rc::clone(&self.shared);
        let finished = async move { tokio::time::timeout(msg.deadline, shared.done.notified()).await };
        Box::pin(finished.into_actor(self).map(|finished, _, ctx| {
            if finished.is_err() {
                log::warn!("the analysis of a track ended before the service had answered everything");
            }
            ctx.stop();
        }))
    }
}

impl Shared {
    fn pop(&self) -> Option<Group> {
        self.queue.borrow_mut().pop_front()
    }

    /// The time of audio that waits.
    fn queued(&self) -> Duration {
        self.queue.borrow().iter().map(|group| group.format.duration(group.bytes)).sum()
    }

    fn is_empty(&self) -> bool {
        self.queue.borrow().is_empty()
    }

    fn finishing(&self) -> bool {
        *self.finishing.borrow()
    }

    fn note_queue(&self) {
        self.params.stats.analysis_queued_groups.store(u64::try_from(self.queue.borrow().len()).unwrap_or(0), Relaxed);
    }

    fn count_dropped(&self, group: &Group) {
        if self.params.stats.analysis_dropped_groups.fetch_add(1, Relaxed) == 0 {
            log::warn!("groups are dropped: the analysis service is not reached or too slow service={}", self.params.service.wire.service());
        }
        self.params.log.append(group, &Fate::Dropped);
    }
}

/// Connects when there is something to say, and says it, until the track ends.
async fn converse(shared: Rc<Shared>) {
    let service = shared.params.service.clone();
    let name = service.wire.service();
    let mut speech = SpeechStream::default();
    let mut failures = 0u32;
    loop {
        while shared.is_empty() {
            if shared.finishing() {
                return shared.done.notify_one();
            }
            shared.changed.notified().await;
        }
        let acceptance = service.gate.acceptance();
        if let Permit::Wait(wait) = service.gate.permit(Instant::now()) {
            if shared.finishing() {
                return shared.done.notify_one();
            }
            tokio::select! {
                () = pause(&shared, wait) => {}
                () = acceptance => {}
            }
            continue;
        }
        let failure = match service.connect().await {
            Ok(connection) => {
                if service.gate.accepted() {
                    log::info!("the analysis service accepts the key again service={name}");
                }
                shared.params.stats.analysis_connections.fetch_add(1, Relaxed);
                let started = Instant::now();
                let mut conversation =
                    Conversation { shared: &shared, unanswered: VecDeque::new(), payloads: 0, last_received: started, last_progress: started };
                let end = conversation.run(connection, &mut speech).await;
                if started.elapsed() > MAX_BACKOFF {
                    failures = 0;
                }
                match end {
                    // An idle service closes; the next group opens the next connection.
                    Ok(End::Idle) => continue,
                    Ok(End::Finished) => return shared.done.notify_one(),
                    Err(problem) => problem,
                }
            }
            Err(ConnectError::KeyRefused(status)) => {
                if service.gate.refused(Instant::now()) {
                    log::error!("the analysis service refuses the key; it is tried again from time to time service={name} status={status}");
                }
                continue;
            }
            Err(error) => error.to_string(),
        };
        if shared.finishing() && failures > 0 {
            return shared.done.notify_one();
        }
        if failures == 0 {
            log::warn!("the analysis service is not reached, trying again service={name} problem={failure:?}");
        }
        pause(&shared, backoff(failures, FIRST_BACKOFF, MAX_BACKOFF, jitter())).await;
        failures = failures.saturating_add(1);
    }
}

/// Waits, but not past the order to finish.
async fn pause(shared: &Shared, wait: Duration) {
    let deadline = tokio::time::Instant::now() + wait;
    while !shared.finishing() {
        if tokio::time::timeout_at(deadline, shared.changed.notified()).await.is_err() {
            return;
        }
    }
}

/// How a conversation ended in good order.
enum End {
    Idle,
    Finished,
}

struct Conversation<'a> {
    shared: &'a Shared,
    /// Payload id, start and end in milliseconds, oldest first.
    unanswered: VecDeque<(String, u64, u64)>,
    payloads: u64,
    last_received: Instant,
    /// When the service last answered a slice, or began to owe an answer.
    last_progress: Instant,
}

impl Conversation<'_> {
    /// # Errors
    /// What broke it off.
    async fn run(&mut self, mut connection: ServiceConnection, speech: &mut SpeechStream) -> Result<End, String> {
        let wire = Arc::clone(&self.shared.params.service.wire);
        if let Some(opening) = wire.opening() {
            connection.send(opening).await?;
        }
        let mut ping = tokio::time::interval(PING_INTERVAL);
        loop {
            if self.shared.finishing() && self.shared.is_empty() && self.unanswered.is_empty() {
                // Everything is answered: nothing depends on this Close.
                connection.close().await.ok();
                return Ok(End::Finished);
            }
            let may_send = self.unanswered.len() < MAX_UNANSWERED && !self.shared.is_empty();
            tokio::select! {
                received = connection.receive() => {
                    self.last_received = Instant::now();
                    match received {
                        Received::Reply(reply) => self.on_reply(wire.decode(&reply)),
                        Received::Ping(payload) => connection.pong(payload).await?,
                        Received::Other => {}
                        Received::Ended(how) => return self.ended(how),
                    }
                }
                () = std::future::ready(()), if may_send => {
                    if let Some(group) = self.shared.pop() {
                        let sent = self.send_group(&mut connection, &wire, speech, group);
                        match tokio::time::timeout(fail_point::deadline("analysis-patience", SEND_DEADLINE), sent).await {
                            Ok(sent) => sent?,
                            Err(_) => {
                                log::error!("the analysis of a track hangs, its connection is given up service={}", wire.service());
                                return Err("the service takes nothing".to_owned());
                            }
                        }
                    }
                }
                () = self.shared.changed.notified() => {}
                () = tokio::time::sleep_until(self.deadline().into()) => return Err("the service does not answer".to_owned()),
                _ = ping.tick() => connection.ping().await?,
            }
        }
    }

    /// When the connection counts as lost if nothing more comes.
    fn deadline(&self) -> Instant {
        let half_open = self.last_received + SILENCE;
        if self.unanswered.is_empty() { half_open } else { half_open.min(self.last_progress + ANSWER_DEADLINE) }
    }

    /// The other side ended it: after a time in which nothing was asked of it, that is no failure.
    fn ended(&self, how: String) -> Result<End, String> {
        if self.unanswered.is_empty() && self.shared.is_empty() { Ok(End::Idle) } else { Err(how) }
    }

    async fn send_group(
        &mut self,
        connection: &mut ServiceConnection,
        wire: &Arc<dyn WireFormat>,
        speech: &mut SpeechStream,
        group: Group,
    ) -> Result<(), String> {
        self.shared.note_queue();
        fail_point::hold("analysis-send").await;
        let max_samples =
            usize::try_from(wire.max_slice().as_millis()).unwrap_or(usize::MAX).saturating_mul(usize::try_from(SPEECH_RATE / 1000).unwrap_or(16));
        let (mut moved, encoder, first) = (std::mem::take(speech), Arc::clone(wire), self.payloads);
        let prepared = spawn_blocking(move || {
            let slices = moved.push(&group, max_samples);
            let encoded: Vec<(String, SpeechSlice, WireMessage)> = (first..)
                .zip(slices)
                .map(|(number, slice)| {
                    let payload = number.to_string();
                    let message = encoder.encode(&slice, &payload);
                    (payload, slice, message)
                })
                .collect();
            (moved, group, encoded)
        });
        let (moved, group, encoded) = prepared.await.map_err(|error| error.to_string())?;
        *speech = moved;
        for (payload, slice, encoded) in encoded {
            self.payloads += 1;
            if let Err(problem) = connection.send(encoded).await {
                self.shared.count_dropped(&group);
                return Err(problem);
            }
            if self.unanswered.is_empty() {
                self.last_progress = Instant::now();
            }
            self.unanswered.push_back((payload, slice.start_ms, slice.end_ms()));
        }
        self.shared.params.stats.analysis_sent_groups.fetch_add(1, Relaxed);
        self.shared.params.log.append(&group, &Fate::Sent);
        Ok(())
    }

    fn on_reply(&mut self, reply: Reply) {
        let HumeClientParams { service, rows, stats, .. } = &self.shared.params;
        let wire = &service.wire;
        let row = |start_ms, end_ms, scores, warning| Measured {
            id: new_row_id(),
            service: wire.service().into(),
            kind: wire.kind().into(),
            start_ms,
            end_ms,
            scores,
            warning,
            received_at: Utc::now(),
        };
        let measured = match reply {
            Reply::Measured { payload, predictions } => {
                let Some((start_ms, _)) = self.answered(payload.as_deref()) else { return };
                let at = |seconds: f64| {
                    start_ms.saturating_add(u64::try_from(Duration::try_from_secs_f64(seconds).unwrap_or_default().as_millis()).unwrap_or(0))
                };
                predictions.into_iter().map(|p| row(at(p.begin_s), at(p.end_s), p.scores, None)).collect()
            }
            Reply::Warning { payload, text } => {
                let Some((start_ms, end_ms)) = self.answered(payload.as_deref()) else { return };
                vec![row(start_ms, end_ms, Vec::new(), Some(text))]
            }
            Reply::Refused { payload, text } => {
                self.answered(payload.as_deref());
                log::warn!("the analysis service refused a slice service={} problem={text:?}", wire.service());
                return;
            }
            Reply::Acknowledged => return,
            Reply::Unknown => {
                log::debug!("the analysis service said something unknown service={}", wire.service());
                return;
            }
        };
        stats.measurements.fetch_add(u64::try_from(measured.len()).unwrap_or(0), Relaxed);
        if !measured.is_empty() {
            rows.measured(measured);
        }
    }

    /// The stretch that a reply speaks of: by its payload id, else the oldest without an answer.
    fn answered(&mut self, payload: Option<&str>) -> Option<(u64, u64)> {
        let position = match payload {
            Some(payload) => self.unanswered.iter().position(|(id, ..)| id == payload)?,
            None => 0,
        };
        self.last_progress = Instant::now();
        self.unanswered.remove(position).map(|(_, start_ms, end_ms)| (start_ms, end_ms))
    }
}

/// Makes the actor panic, for the tests of its supervision.
#[cfg(test)]
impl Handler<super::wav_writer::Panic> for HumeClientActor {
    type Result = ();

    fn handle(&mut self, _: super::wav_writer::Panic, _: &mut Context<Self>) {
        panic!("as asked");
    }
}
