//! Holds a track's audio between the socket and its takers: keeps the recording edge lossless and the analysis edge lossy.
//!
//! In: [`PushAudio`], [`SetMuted`], [`SettleFormat`], [`UseWriter`] and [`FinishBuffer`] from `TrackActor`. Out: [`AppendAudio`] to the writer,
//! one in flight; groups to the analysis; [`WriterFailed`] and [`SegmentFull`] to `TrackActor`.
//! Full: its mailbox is fed by one actor of the same thread; audio beyond the spool is dropped, counted, and keeps its length as a hole.
//! Dies: the track fails, for it holds the only copy.

mod append;
pub mod budget;
mod ending;
mod holes;
mod spool;
#[cfg(test)]
pub mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use actix::prelude::*;
use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Utc};
use tokio::sync::{oneshot, watch};

use self::budget::SpoolBudget;
pub use self::ending::FinishBuffer;
use self::spool::{Batch, MAX_APPEND_BYTES, Spool};
use super::hume_client::AnalyseGroup;
use super::in_flight::InFlight;
use super::stats::TrackStats;
use super::track::{SegmentFull, WriterFailed};
use super::wav_writer::{AppendAudio, Appended, RecordingError};
use crate::audio::format::PcmFormat;
use crate::audio::level::{Level, is_digital_silence, normalize_peak};
use crate::audio::sample_clock::{SampleClock, Verdict};
use crate::audio::window::{Group, Grouper};
use crate::clock::Clock;
use crate::config::MuteMode;
use crate::db::rows::EndReason;
use crate::fail_point;
use crate::recording::pipeline_log::{Fate, TrackLog};
use crate::recording::pulse::DiskPulse;
use crate::recording::segment_file::Piece;
use crate::recording::wav_header::MAX_DATA_BYTES;

/// One message for each batch of the socket, which comes every 150 ms, and what TrackActor says besides.
const MAILBOX_CAPACITY: usize = 64;
/// The most of a segment: one append below what a WAV file may hold.
pub const MAX_SEGMENT_BYTES: u64 = MAX_DATA_BYTES - 2 * MAX_APPEND_BYTES;
/// How much longer a segment is when it would end where silence may be missing: that is known 10 s after a pause (`audio::sample_clock`).
const LATEST_ROTATION: Duration = Duration::from_secs(30);
/// Gaps that a segment is told of, and those of one append: with more the next one begins, which loses nothing. As many as mute spans of a connection.
pub const MAX_GAPS: usize = 1_000;
/// How often a disk that takes nothing is tried again.
pub const NOT_NOW_RETRY: Duration = Duration::from_secs(1);

/// Audio as it came, cut anywhere.
#[derive(Message)]
#[rtype(result = "()")]
pub struct PushAudio {
    pub audio: Bytes,
    /// When its first byte came, and when its last was read.
    pub arrived: Instant,
    pub read: Instant,
    pub arrived_at: DateTime<Utc>,
}

/// What LiveKit's text message said.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SetMuted(pub bool);

/// The format is known for good: cut groups by it.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SettleFormat(pub PcmFormat);

/// Goes on with a new segment, of which `limit_bytes` may be written.
#[derive(Message)]
#[rtype(result = "()")]
pub struct UseWriter {
    pub writer: Recipient<AppendAudio>,
    pub generation: u32,
    pub limit_bytes: u64,
}

/// Groups go to somebody else from now on.
#[derive(Message)]
#[rtype(result = "()")]
pub struct UseTaker(pub Taker);

/// Who takes the groups.
#[derive(Clone)]
pub enum Taker {
    Service(Recipient<AnalyseGroup>),
    /// Nobody, and why.
    Nobody(&'static str),
}

/// What a buffer is made with.
pub struct BufferParams {
    pub format: PcmFormat,
    pub grouper: Grouper,
    pub normalize: bool,
    pub taker: Taker,
    pub log: TrackLog,
    pub mute: MuteMode,
    /// Bytes of audio that may wait for the disk.
    pub spool_bytes: u64,
    pub clock: Clock,
    /// A longer silence of the sender ends the segment instead of being filled.
    pub longest_fill: Duration,
    pub budget: Arc<SpoolBudget>,
    pub pulse: DiskPulse,
    pub stats: Arc<TrackStats>,
    pub writer: UseWriter,
    pub writer_failed: Recipient<WriterFailed>,
    pub segment_full: Recipient<SegmentFull>,
    /// Closed when the track is gone.
    pub lifeline: watch::Receiver<()>,
}

pub struct BufferActor {
    params: BufferParams,
    /// The start of a frame whose rest has not come.
    torn: BytesMut,
    muted: bool,
    spool: Spool,
    sample_clock: SampleClock,
    /// How many bytes the spool had been given for files when something may have been missing.
    hole_at: u64,
    /// The track has been muted from there on, and its silence is left out.
    hole_is_muted: bool,
    /// Bytes in the spool and in flight that hold memory.
    spooled_bytes: u64,
    edge: Edge,
    in_flight: InFlight<Batch>,
    /// As its writer last said.
    segment: Appended,
    /// The disk takes nothing.
    waiting: bool,
    drained: Vec<oneshot::Sender<()>>,
}

/// The way to the file.
enum Edge {
    Ready,
    /// An append is in flight, or waits to be tried again.
    Busy,
    /// The segment is full or its writer dead: the next one comes with [`UseWriter`].
    Waiting {
        again: Option<Batch>,
    },
}

impl BufferActor {
    pub fn new(params: BufferParams) -> Self {
        Self {
            sample_clock: SampleClock::new(params.format.sample_rate, params.longest_fill),
            hole_at: 0,
            hole_is_muted: false,
            params,
            torn: BytesMut::new(),
            muted: false,
            spool: Spool::default(),
            spooled_bytes: 0,
            edge: Edge::Ready,
            in_flight: InFlight::default(),
            segment: Appended::default(),
            waiting: false,
            drained: Vec::new(),
        }
    }

    /// Makes whole frames of what came; keeps the rest for later.
    fn whole_frames(&mut self, audio: Bytes) -> Bytes {
        let frame = usize::try_from(self.params.format.frame_bytes()).unwrap_or(4);
        if self.torn.is_empty() && audio.len().is_multiple_of(frame) {
            return audio;
        }
        self.torn.extend_from_slice(&audio);
        let whole = self.torn.len() / frame * frame;
        self.torn.split_to(whole).freeze()
    }

    fn record(&mut self, audio: Bytes, arrived: Instant, arrived_at: DateTime<Utc>) {
        let bytes = len(&audio);
        let fits = self.spooled_bytes + bytes <= self.params.spool_bytes && self.params.budget.take(bytes);
        let piece = if fits {
            self.spooled_bytes += bytes;
            Piece::Audio(audio)
        } else {
            if self.params.stats.note_lost(bytes) {
                log::error!("audio is lost: the disk is too slow for too long; its length is kept as a hole");
            }
            Piece::Lost(bytes)
        };
        self.spool.push(piece, arrived, arrived_at);
        self.params.stats.spooled_bytes.store(self.spooled_bytes, Relaxed);
    }

    /// Leaves out the all-zero audio of a muted track in slices of 10 ms, LiveKit's frames.
    fn record_without_silence(&mut self, audio: &Bytes, arrived: Instant, arrived_at: DateTime<Utc>) {
        let slice = usize::try_from(self.params.format.bytes_in(Duration::from_millis(10))).unwrap_or(1_920).max(4);
        let slices: Vec<&[u8]> = audio.chunks(slice).collect();
        for alike in slices.chunk_by(|one, next| is_digital_silence(one) == is_digital_silence(next)) {
            if alike.first().is_some_and(|slice| is_digital_silence(slice)) {
                let bytes = alike.iter().map(|slice| len(slice)).sum();
                self.spool.push(Piece::Muted(bytes), arrived, arrived_at);
                continue;
            }
            // A copy of its own: what waits for the disk holds no more memory than it counts.
            let part = if alike.len() == slices.len() { audio.clone() } else { alike.concat().into() };
            let groups = self.params.grouper.push(&part);
            self.hand_on(groups);
            self.record(part, arrived, arrived_at);
        }
    }

    fn hand_on(&mut self, groups: Vec<Group>) {
        let stats = &self.params.stats;
        for mut group in groups {
            stats.groups.fetch_add(1, Relaxed);
            if group.is_silent() {
                stats.silent_groups.fetch_add(1, Relaxed);
                self.params.log.append(&group, &Fate::Silent);
                continue;
            }
            match &self.params.taker {
                Taker::Nobody(reason) => self.params.log.append(&group, &Fate::Skipped(reason)),
                Taker::Service(service) => {
                    if self.params.normalize {
                        normalize_peak(&mut group.audio);
                    }
                    if let Err(SendError::Full(AnalyseGroup(group)) | SendError::Closed(AnalyseGroup(group))) = service.try_send(AnalyseGroup(group))
                    {
                        stats.analysis_dropped_groups.fetch_add(1, Relaxed);
                        self.params.log.append(&group, &Fate::Dropped);
                    }
                }
            }
        }
    }

    /// Starts the next append, if the way is free and anything waits.
    fn append_next(&mut self, ctx: &mut Context<Self>) {
        if !matches!(self.edge, Edge::Ready) {
            return;
        }
        if self.spool.is_empty() {
            return self.tell_drained();
        }
        let after_silence = self.spool.takes_new_segment();
        if after_silence || self.segment_is_full() {
            // Only now that there is more: a track that ends here ends in this segment.
            self.segment = Appended::default();
            self.edge = Edge::Waiting { again: None };
            let reason = if after_silence { EndReason::Gap } else { EndReason::Rotated };
            let full = SegmentFull { generation: self.params.writer.generation, reason };
            return self.tell(&self.params.segment_full.clone(), full, ctx);
        }
        if let Some(batch) = self.spool.next_batch(self.params.format) {
            self.append(batch, ctx);
        }
    }

    /// Silence that may be missing in front of audio of this segment is put into it before the next one begins.
    fn segment_is_full(&self) -> bool {
        let (Appended { segment_bytes: bytes, gaps }, limit) = (self.segment, self.params.writer.limit_bytes);
        if bytes < limit && gaps < MAX_GAPS {
            return false;
        }
        let latest = MAX_SEGMENT_BYTES.min(limit + self.params.format.bytes_in(LATEST_ROTATION));
        let may_be_filled = self.sample_clock.is_undecided() && self.spool.taken_bytes() > self.hole_at || self.spool.moves_audio();
        bytes >= latest || gaps >= 2 * MAX_GAPS || !may_be_filled
    }

    fn on_appended(&mut self, reply: Result<Result<Appended, RecordingError>, MailboxError>, batch: Batch, generation: u32, ctx: &mut Context<Self>) {
        let is_suspect = matches!(reply, Ok(Err(RecordingError::Suspect)));
        let error = match reply {
            Ok(Ok(appended)) => {
                self.edge = Edge::Ready;
                if std::mem::take(&mut self.waiting) {
                    log::warn!("recordings can be written again");
                }
                self.spooled_bytes -= batch.memory_bytes;
                self.params.budget.give_back(batch.memory_bytes);
                self.params.stats.spooled_bytes.store(self.spooled_bytes, Relaxed);
                self.params.stats.note_recorded(batch.pieces.iter().map(Piece::file_bytes).sum());
                self.segment = if generation == self.params.writer.generation { appended } else { Appended::default() };
                return self.append_next(ctx);
            }
            Ok(Err(RecordingError::NotNow { what, cause })) => {
                // No failure of the writer: it stays, and the spool takes what comes.
                if !std::mem::replace(&mut self.waiting, true) {
                    log::error!("{what}, trying again every second error={cause}");
                }
                ctx.run_later(NOT_NOW_RETRY, move |this, ctx| this.append(batch, ctx));
                return;
            }
            // The next writer was there before this answer.
            _ if generation != self.params.writer.generation => return self.append(batch, ctx),
            Ok(Err(RecordingError::TooLarge(_))) => {
                // Nothing of the batch counts in the old file, so the next one begins with it.
                self.edge = Edge::Waiting { again: Some(batch) };
                return self.tell(&self.params.segment_full.clone(), SegmentFull { generation, reason: EndReason::Rotated }, ctx);
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        self.edge = Edge::Waiting { again: Some(batch) };
        self.tell(&self.params.writer_failed.clone(), WriterFailed { generation, error, is_suspect }, ctx);
    }

    /// Sends a message to the supervisor and holds it until it is handled.
    fn tell<M>(&self, supervisor: &Recipient<M>, message: M, ctx: &mut Context<Self>)
    where
        M: Message<Result = ()> + Send + 'static,
    {
        ctx.spawn(supervisor.send(message).into_actor(self).map(|told, _, _| {
            if let Err(error) = told {
                log::error!("a track's supervisor is gone error={error}");
            }
        }));
    }

    fn tell_drained(&mut self) {
        for waiting in self.drained.drain(..) {
            // The one who waited may have given up.
            waiting.send(()).ok();
        }
    }
}

impl Actor for BufferActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
        self.outlive_its_track(ctx);
    }
}

impl Drop for BufferActor {
    fn drop(&mut self) {
        self.params.stats.note_left_behind(self.spooled_bytes);
        self.params.budget.give_back(self.spooled_bytes);
    }
}

impl Handler<PushAudio> for BufferActor {
    type Result = ();

    fn handle(&mut self, msg: PushAudio, ctx: &mut Context<Self>) {
        fail_point::pass("buffer-push");
        let audio = self.whole_frames(msg.audio);
        if audio.is_empty() {
            return;
        }
        let frames = self.params.format.frames(len(&audio));
        let verdict = self.sample_clock.on_audio(self.params.clock.elapsed_at(msg.read), frames);
        self.before(verdict, msg.arrived, msg.arrived_at);
        if let Some(drift) = self.sample_clock.drift() {
            self.params.stats.set_drift(drift);
        }
        self.params.stats.set_level(Level::of(&audio));
        if self.muted && self.params.mute == MuteMode::Pause {
            self.record_without_silence(&audio, msg.arrived, msg.arrived_at);
        } else {
            let groups = self.params.grouper.push(&audio);
            self.hand_on(groups);
            self.record(audio, msg.arrived, msg.arrived_at);
        }
        if let Verdict::Lacks(frames) = verdict {
            self.fill(frames, msg.arrived, msg.arrived_at);
        }
        self.append_next(ctx);
    }
}

impl Handler<SetMuted> for BufferActor {
    type Result = ();

    fn handle(&mut self, SetMuted(muted): SetMuted, _: &mut Context<Self>) {
        self.muted = muted;
        self.hole_is_muted = false;
    }
}

impl Handler<SettleFormat> for BufferActor {
    type Result = ();

    fn handle(&mut self, SettleFormat(format): SettleFormat, _: &mut Context<Self>) {
        // Bounds in time of audio, in the bytes of the true format.
        let rescaled = |bytes: u64| bytes.saturating_mul(format.byte_rate()) / self.params.format.byte_rate();
        self.params.spool_bytes = rescaled(self.params.spool_bytes);
        self.params.writer.limit_bytes = rescaled(self.params.writer.limit_bytes).min(MAX_SEGMENT_BYTES);
        if format != self.params.format {
            self.sample_clock = SampleClock::new(format.sample_rate, self.params.longest_fill);
        }
        self.params.format = format;
        let groups = self.params.grouper.settle(format);
        self.hand_on(groups);
    }
}

impl Handler<UseWriter> for BufferActor {
    type Result = ();

    fn handle(&mut self, writer: UseWriter, ctx: &mut Context<Self>) {
        self.params.writer = writer;
        self.segment = Appended::default();
        match std::mem::replace(&mut self.edge, Edge::Ready) {
            Edge::Waiting { again: Some(batch) } => self.append(batch, ctx),
            Edge::Waiting { again: None } | Edge::Ready => self.append_next(ctx),
            // The old writer still owes an answer, and what it did not take goes to the new one then.
            Edge::Busy => self.edge = Edge::Busy,
        }
    }
}

impl Handler<UseTaker> for BufferActor {
    type Result = ();

    fn handle(&mut self, UseTaker(taker): UseTaker, _: &mut Context<Self>) {
        self.params.grouper.keep_audio(matches!(taker, Taker::Service(_)));
        self.params.taker = taker;
    }
}

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
