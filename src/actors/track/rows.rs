//! The rows of one track, in order, for as long as the database takes: rows follow, the recording never waits for them.
//!
//! A task of the store owns the order; it outlives the actors. What it cannot write it tries again, so a database that is down for a while
//! costs nothing but memory for a few small messages. Only measurements and facts could become many: the ones have a bound, and
//! of the others one waits.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{mpsc, oneshot};

use crate::actors::child::{backoff, jitter};
use crate::audio::format::PcmFormat;
use crate::db::rows::{ClosedSegment, EndReason, MuteSpan, NewMeasurement, NewRecording, NewSegment, OpenedRecording, TrackFacts};
use crate::db::{DbError, Store};
use crate::ids::{Identity, MeetingId, RoomName, SegmentId, TicketId, TrackSid};
use crate::recording::path::below;
use crate::recording::repair::{Interrupted, Outcome, repair};
use crate::sealing::closed_by;

const FIRST_RETRY: Duration = Duration::from_millis(100);
/// Replies of an analysis service that wait for the database: ten minutes of them, in groups of 2 s.
const MAX_MEASURED: usize = 300;
const MAX_RETRY: Duration = Duration::from_secs(5);

/// Whose rows they are.
#[derive(Debug, Clone)]
pub struct TrackIdentity {
    pub meeting: MeetingId,
    pub room: RoomName,
    pub participant: Option<Identity>,
    pub track: Option<TrackSid>,
    /// Of the session that the recording belongs to, if one is known.
    pub session_started_at: Option<DateTime<Utc>>,
}

/// A file that has just been made.
#[derive(Debug, Clone)]
pub struct OpenedSegment {
    pub id: SegmentId,
    /// Below the audio directory.
    pub path: String,
    pub format: PcmFormat,
    pub started_at: DateTime<Utc>,
}

/// What an analysis service said of a stretch of the connection's audio.
#[derive(Debug, Clone)]
pub struct Measured {
    pub service: &'static str,
    pub kind: &'static str,
    /// From the connection's first sample, in milliseconds.
    pub start_ms: u64,
    pub end_ms: u64,
    pub scores: Vec<(String, f64)>,
    pub warning: Option<String>,
    pub received_at: DateTime<Utc>,
}

enum RowOp {
    Opened(OpenedSegment),
    Closed(ClosedSegment),
    /// Its writer died.
    Abandoned(SegmentId),
    Facts(TrackFacts),
    Measured(Vec<Measured>),
    /// Answers when everything before it is in the database.
    Flush(oneshot::Sender<()>),
    End,
}

/// The way to the rows of one track. Cheap to clone; every call returns at once.
#[derive(Debug, Clone)]
pub struct RowLog {
    ops: mpsc::UnboundedSender<RowOp>,
    measured_waiting: Arc<AtomicUsize>,
    facts_waiting: Arc<AtomicBool>,
}

impl RowLog {
    /// `spent` is told when the connection's ticket turns out to have opened another before.
    pub fn start(store: Store, audio_dir: PathBuf, identity: TrackIdentity, ticket: Option<TicketId>, spent: oneshot::Sender<()>) -> Self {
        let (ops, received) = mpsc::unbounded_channel();
        let (measured_waiting, facts_waiting) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let keeper = Keeper {
            store: store.clone(),
            audio_dir,
            identity,
            ticket,
            recording: None,
            open: Vec::new(),
            measured_waiting: Arc::clone(&measured_waiting),
            facts_waiting: Arc::clone(&facts_waiting),
            spent: Some(spent),
        };
        store.spawn(keeper.run(received));
        Self { ops, measured_waiting, facts_waiting }
    }

    pub fn segment_opened(&self, segment: OpenedSegment) {
        self.put(RowOp::Opened(segment));
    }

    pub fn segment_closed(&self, segment: ClosedSegment) {
        self.put(RowOp::Closed(segment));
    }

    /// Its writer died: the file says how it ended.
    pub fn segment_abandoned(&self, id: SegmentId) {
        self.put(RowOp::Abandoned(id));
    }

    /// Mute spans count from the connection's first sample.
    pub fn facts(&self, facts: TrackFacts) {
        self.facts_waiting.store(true, Relaxed);
        self.put(RowOp::Facts(facts));
    }

    /// Whether earlier facts still wait for the database: newer ones had better wait too.
    pub fn facts_are_waiting(&self) -> bool {
        self.facts_waiting.load(Relaxed)
    }

    /// Behind a database that is down, a bounded number of them waits; what comes then is dropped, and said.
    pub fn measured(&self, measured: Vec<Measured>) {
        if self.measured_waiting.fetch_add(1, Relaxed) < MAX_MEASURED {
            self.put(RowOp::Measured(measured));
        } else {
            self.measured_waiting.fetch_sub(1, Relaxed);
            log::error!("measurements are lost: the database has been away for too long");
        }
    }

    /// Ends the recording's row.
    pub fn end(&self) {
        self.put(RowOp::End);
    }

    /// Resolves when everything so far is in the database.
    pub async fn flushed(&self) {
        let (done, flushed) = oneshot::channel();
        self.put(RowOp::Flush(done));
        if flushed.await.is_err() {
            log::error!("rows of a track were not written: their task is gone");
        }
    }

    fn put(&self, op: RowOp) {
        if self.ops.send(op).is_err() {
            log::error!("a row of a track was not written: its task is gone");
        }
    }
}

struct Keeper {
    store: Store,
    audio_dir: PathBuf,
    identity: TrackIdentity,
    /// Goes on the row of the connection's first segment.
    ticket: Option<TicketId>,
    recording: Option<OpenedRecording>,
    /// The segments whose end nobody has reported yet: the one that is written, one that is being sealed, and those of writers that died.
    open: Vec<OpenedSegment>,
    measured_waiting: Arc<AtomicUsize>,
    facts_waiting: Arc<AtomicBool>,
    spent: Option<oneshot::Sender<()>>,
}

impl Keeper {
    async fn run(mut self, mut ops: mpsc::UnboundedReceiver<RowOp>) {
        while let Some(op) = ops.recv().await {
            self.apply(op).await;
        }
        // A track that died could not say its end.
        self.end().await;
    }

    async fn apply(&mut self, op: RowOp) {
        match op {
            RowOp::Opened(segment) => self.open_segment(segment).await,
            RowOp::Closed(closed) => {
                self.open.retain(|open| open.id != closed.id);
                self.insist("segment", |store| store.close_segment(closed.clone())).await;
            }
            RowOp::Facts(facts) => {
                self.facts_waiting.store(false, Relaxed);
                if let Some(OpenedRecording { id, offset_ms, facts: earlier }) = self.recording.clone() {
                    let own = facts.mute_spans.iter().map(|span| shifted(span, offset_ms));
                    let mute_spans = earlier.mute_spans.into_iter().chain(own).collect();
                    let facts = TrackFacts { mute_spans, format_mismatch: facts.format_mismatch.or(earlier.format_mismatch) };
                    self.insist("track", |store| store.set_track_facts(id.clone(), facts.clone())).await;
                }
            }
            RowOp::Measured(measured) => {
                self.measured_waiting.fetch_sub(1, Relaxed);
                if let Some(recording) = &self.recording {
                    let rows: Vec<NewMeasurement> = measured.into_iter().map(|measured| measurement(measured, recording)).collect();
                    self.insist("measurements", |store| store.add_measurements(rows.clone())).await;
                }
            }
            RowOp::Flush(done) => {
                // Nobody may be waiting any more.
                done.send(()).ok();
            }
            RowOp::Abandoned(id) => {
                let (dead, others) = std::mem::take(&mut self.open).into_iter().partition(|open| open.id == id);
                self.open = others;
                self.close_abandoned(dead).await;
            }
            RowOp::End => self.end().await,
        }
    }

    async fn end(&mut self) {
        let open = std::mem::take(&mut self.open);
        self.close_abandoned(open).await;
        if let Some(OpenedRecording { id, .. }) = self.recording.clone() {
            self.insist("recording", |store| store.close_recording(id.clone())).await;
        }
    }

    async fn open_segment(&mut self, segment: OpenedSegment) {
        if self.recording.is_none() {
            let TrackIdentity { meeting, room, participant, track, .. } = self.identity.clone();
            let new = NewRecording { meeting, room, participant, track, started_at: segment.started_at };
            self.recording = self.insist("recording", |store| store.open_recording(new.clone())).await;
        }
        let Some(recording) = self.recording.clone() else { return };
        loop {
            let new = NewSegment {
                id: segment.id.clone(),
                recording: recording.id.clone(),
                path: segment.path.clone(),
                format: segment.format,
                track: self.identity.track.clone(),
                started_at: segment.started_at,
                ticket: self.ticket.clone(),
            };
            match retried(&self.store, "segment", |store| store.open_segment(new.clone())).await {
                Ok(()) => {
                    self.ticket = None;
                    break;
                }
                Err(DbError::TicketSpent) => {
                    // The audio is kept, with a row of its own; the connection goes.
                    log::error!("a spent ticket was used again, while the database could not be asked segment_id={}", segment.id);
                    self.ticket = None;
                    if let Some(spent) = self.spent.take() {
                        spent.send(()).ok();
                    }
                }
                Err(error) => {
                    log::error!("a row was not written what=segment error={error}");
                    return;
                }
            }
        }
        self.open.push(segment);
    }

    /// Writers that died have left their segments open: the files themselves know their length.
    async fn close_abandoned(&self, segments: Vec<OpenedSegment>) {
        for segment in segments {
            let interrupted = self.interrupted(&segment);
            let repaired = tokio::task::spawn_blocking(move || repair(&interrupted)).await;
            let Ok(Ok(Outcome::Recovered(sidecar) | Outcome::Sealed(sidecar))) = repaired else {
                log::error!("a segment whose writer died cannot be read segment_id={} path={:?} outcome={repaired:?}", segment.id, segment.path);
                continue;
            };
            let closed = closed_by(segment.id, &sidecar);
            self.insist("segment", |store| store.close_segment(closed.clone())).await;
        }
    }

    fn interrupted(&self, segment: &OpenedSegment) -> Interrupted {
        Interrupted {
            path: below(&self.audio_dir, &segment.path).unwrap_or_default(),
            segment_id: Some(segment.id.clone()),
            meeting_id: Some(self.identity.meeting.as_str().to_owned()),
            room_name: Some(self.identity.room.as_str().to_owned()),
            participant: self.identity.participant.clone().map(Identity::into_string),
            track_sid: self.identity.track.clone().map(TrackSid::into_string),
            format: Some(segment.format),
            started_at: Some(segment.started_at),
            session_started_at: self.identity.session_started_at,
            end_reason: Some(EndReason::Failed.as_str()),
        }
    }

    /// Makes a call until it succeeds, or can never.
    async fn insist<'a, T, F: Future<Output = Result<T, DbError>>>(&'a self, what: &str, call: impl FnMut(&'a Store) -> F) -> Option<T> {
        let outcome = retried(&self.store, what, call).await;
        outcome.inspect_err(|error| log::error!("a row was not written what={what} error={error}")).ok()
    }
}

async fn retried<'a, T, F: Future<Output = Result<T, DbError>>>(
    store: &'a Store,
    what: &str,
    mut call: impl FnMut(&'a Store) -> F,
) -> Result<T, DbError> {
    let mut attempt = 0;
    loop {
        match call(store).await {
            Err(error) if error.is_retryable() => {
                if attempt == 0 {
                    log::warn!("a row waits for the database what={what} error={error}");
                }
                tokio::time::sleep(backoff(attempt, FIRST_RETRY, MAX_RETRY, jitter())).await;
                attempt += 1;
            }
            outcome => return outcome,
        }
    }
}

fn shifted(span: &MuteSpan, offset_ms: u64) -> MuteSpan {
    MuteSpan { start_ms: span.start_ms + offset_ms, end_ms: span.end_ms.map(|end| end + offset_ms) }
}

fn measurement(measured: Measured, recording: &OpenedRecording) -> NewMeasurement {
    NewMeasurement {
        recording: recording.id.clone(),
        service: measured.service,
        kind: measured.kind,
        start_ms: measured.start_ms + recording.offset_ms,
        end_ms: measured.end_ms + recording.offset_ms,
        scores: measured.scores,
        warning: measured.warning,
        received_at: measured.received_at,
    }
}
